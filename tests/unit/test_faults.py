"""Which fault, when, to whom, and when it is over: all of it without a process or a clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from p2ptrain.errors import ConfigError
from peers.faults import Condition, Kind, Mend, Plan, Recovered, Storm, Strike, parse_kinds, parse_rate

NAMES = ["peer-1", "peer-2", "peer-3"]
PLAN = Plan(
    kinds=(Kind.KILL,), rate=1.0, absence_seconds=2.0, silence_seconds=5.0, max_peers=5, seed=3
)  # fmt: skip


def storm(*kinds: Kind, peers: list[str] = NAMES, **changes: object) -> Storm:
    return Storm(replace(PLAN, kinds=kinds, **changes), peers, 0.0)  # type: ignore[arg-type]


def first_strike(storm: Storm) -> tuple[Strike, float]:
    """The first deed and when it was due, to a hundredth of a second."""
    for hundredths in range(10_000):
        if deeds := storm.due(hundredths / 100):
            (deed,) = deeds
            assert isinstance(deed, Strike)
            return deed, hundredths / 100
    raise AssertionError("nothing happened within 100 s at one fault per second")


# -- what the options say ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rate"), [("60/h", 1 / 60), ("30/min", 0.5), ("0.5/s", 0.5), (" 20/min ", 1 / 3)]
)
def test_rate_is_read_per_second(text: str, rate: float) -> None:
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["60", "60/day", "-1/h", "0/h", "1e9/s", "11/s", "", "nan/h"])
def test_rate_is_refused_with_an_example_when_it_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 60/h"):
        parse_rate(text)


def test_kinds_are_read_once_each_and_in_order() -> None:
    assert parse_kinds("pause, kill,pause") == (Kind.PAUSE, Kind.KILL)


def test_no_kind_is_a_choice_too() -> None:
    assert parse_kinds("none") == ()
    weather = storm()
    assert [deed for second in range(1000) for deed in weather.due(second)] == []
    assert weather.over


@pytest.mark.parametrize(
    ("text", "said"), [("kill,boom", "'boom'"), ("kill,", "''"), ("", "''"), ("none,kill", "'none'")]
)
def test_kinds_are_refused_with_the_list_when_one_is_unknown(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_kinds(text)
    assert "kill, pause, partition, leave, bootstrap, spawn, crowd, with commas, or none" in str(caught.value)


# -- when and whom -------------------------------------------------------------------------------------------


def story(seed: int, seconds: int = 2000) -> list[tuple[float, object]]:
    """A storm of kills and pauses over three peers that recover at once."""
    weather, told = storm(Kind.KILL, Kind.PAUSE, seed=seed, rate=0.1), []
    for now in (tenth / 10 for tenth in range(seconds * 10)):
        for deed in weather.due(now):
            told.append((now, deed))
            if isinstance(deed, Mend):
                weather.committed(deed.on[0], "a", now)
    return told


def test_same_seed_gives_the_same_faults_and_another_seed_others() -> None:
    assert story(1) == story(1)
    assert story(1) != story(2)


def test_faults_come_at_the_rate_and_strike_everybody_when_nobody_is_exempt() -> None:
    strikes = [deed for _, deed in story(1) if isinstance(deed, Strike)]
    assert 150 < len(strikes) < 250  # 200 expected, of which a few wait
    by_name = Counter(strike.on[0] for strike in strikes)
    assert set(by_name) == set(NAMES)
    assert min(by_name.values()) > 40
    assert {strike.kind for strike in strikes} == {Kind.KILL, Kind.PAUSE}


def test_bootstrap_is_struck_as_often_as_each_peer_when_it_is_not_exempt() -> None:
    weather, struck = storm(Kind.KILL, Kind.BOOTSTRAP, rate=0.1), Counter[str]()
    for second in range(5000):
        for deed in weather.due(float(second)):
            match deed:
                case Strike():
                    struck[deed.on[0]] += 1
                case Mend(Kind.BOOTSTRAP):
                    weather.ready(second)
                case Mend():
                    weather.committed(deed.on[0], "a", second)
    assert set(struck) == {*NAMES, "bootstrap"}
    assert 80 < min(struck.values()) <= max(struck.values()) < 160  # 125 expected of each


def test_last_peer_in_training_is_spared_until_another_trains() -> None:
    weather = storm(Kind.KILL, peers=["peer-1", "peer-2"], absence_seconds=50.0)
    struck, _ = first_strike(weather)
    assert [deed for tenth in range(400) for deed in weather.due(tenth / 10 + 10)] == []
    mend, again = weather.due(200.0)  # it is back, but was in no round yet: the other is still the last
    assert mend == Mend(Kind.KILL, struck.on)
    assert again == Strike(Kind.KILL, struck.on)


def test_overdue_faults_do_not_come_all_at_once() -> None:
    weather = storm(Kind.KILL)
    assert len(weather.due(1000.0)) == 1
    assert weather.due(1000.0) == []


# -- one fault after the other -------------------------------------------------------------------------------


def test_killed_peer_is_started_after_its_absence_and_has_recovered_with_a_later_commit() -> None:
    weather = storm(Kind.KILL, rate=1e-6)
    weather._next_at = 10.0
    (strike,) = weather.due(10.0)
    (name,) = strike.on
    assert weather.conditions[name] is Condition.AWAY
    assert weather.due(11.9) == []
    assert weather.due(12.0) == [Mend(Kind.KILL, (name,))]
    assert weather.committed(name, "a", 9.5) == [], "a line of its former life, read late"
    assert not weather.over
    assert weather.committed(name, "a", 15.5) == [Recovered(Kind.KILL, (name,), 3.5)]
    assert weather.over
    assert weather.conditions[name] is Condition.TRAINING


def test_start_that_came_to_nothing_is_tried_again_and_counts_from_the_first() -> None:
    weather = storm(Kind.KILL, rate=1e-6)
    weather._next_at = 10.0
    (strike,) = weather.due(10.0)
    (name,) = strike.on
    assert weather.due(12.0) == [Mend(Kind.KILL, (name,))]
    weather.ended(name, 14.0)
    assert weather.failed_starts == 1
    assert weather.due(16.0) == [Mend(Kind.KILL, (name,))]
    assert weather.committed(name, "a", 20.0) == [Recovered(Kind.KILL, (name,), 8.0)]


def test_leaver_is_started_only_once_it_has_gone() -> None:
    weather = storm(Kind.LEAVE, rate=1e-6)
    weather._next_at = 10.0
    (strike,) = weather.due(10.0)
    assert weather.due(100.0) == []
    weather.ended(strike.on[0], 100.0)
    assert weather.failed_starts == 0
    assert weather.due(101.9) == []
    assert weather.due(102.0) == [Mend(Kind.LEAVE, strike.on)]


def test_peer_that_crashed_is_started_again_and_struck_like_any_other() -> None:
    weather = storm(Kind.KILL, rate=1e-6)
    weather.ended("peer-2", 5.0)
    assert weather.unrecovered == ["peer-2 (kill)"]
    assert weather.due(7.0) == [Mend(Kind.KILL, ("peer-2",))]


def test_paused_peer_that_was_killed_by_the_machine_is_started_again() -> None:
    weather = storm(Kind.PAUSE, rate=1e-6)
    weather._next_at = 10.0
    (strike,) = weather.due(10.0)
    (mend,) = weather.due(26.0)  # at most three silences
    assert mend == Mend(Kind.PAUSE, strike.on)
    weather.ended(strike.on[0], 27.0)
    assert weather.due(29.0) == [Mend(Kind.KILL, strike.on)]


def test_bootstrap_is_struck_once_at_a_time_and_has_recovered_when_it_is_ready() -> None:
    weather = storm(Kind.BOOTSTRAP)
    strike, at = first_strike(weather)
    assert strike == Strike(Kind.BOOTSTRAP, ("bootstrap",))
    assert weather.ready(at + 1) == [], "what it said before its end"
    assert weather.due(at + 30) == [Mend(Kind.BOOTSTRAP, ("bootstrap",))]
    assert weather.due(at + 60) == []
    assert weather.ready(at + 63) == [Recovered(Kind.BOOTSTRAP, ("bootstrap",), 33.0)]
    assert len(weather.due(at + 200)) == 1


def test_spawned_peer_is_one_of_them_until_there_are_enough() -> None:
    weather = storm(Kind.SPAWN, max_peers=4)
    strike, at = first_strike(weather)
    assert strike == Strike(Kind.SPAWN, ("peer-4",))
    assert weather.due(at + 1000) == []
    assert weather.committed("peer-4", "a", at + 6) == [Recovered(Kind.SPAWN, ("peer-4",), 6.0)]
    assert weather.over


def test_crowd_is_all_that_may_come_at_once_and_each_recovers_with_its_first_round() -> None:
    weather = storm(Kind.CROWD, max_peers=6)
    strike, at = first_strike(weather)
    assert strike == Strike(Kind.CROWD, ("peer-4", "peer-5", "peer-6"))
    assert weather.due(at + 1000) == [], "there are enough"
    assert weather.committed("peer-5", "a", at + 6) == [Recovered(Kind.SPAWN, ("peer-5",), 6.0)]
    assert weather.unrecovered == ["peer-4 (spawn)", "peer-6 (spawn)"]


@pytest.mark.parametrize("seed", range(20))
def test_partition_leaves_a_trainer_on_each_side_and_ends_with_a_round_of_both(seed: int) -> None:
    weather = storm(Kind.PARTITION, seed=seed)
    strike, at = first_strike(weather)
    here, there = set(NAMES) - set(strike.on), set(strike.on)
    assert here
    assert there
    assert set(NAMES) == here | there
    assert weather.due(at + 4.9) == [], "it lasts at least a silence"
    for side, lineage in ((here, "a"), (there, "b")):
        assert weather.committed(min(side), lineage, at + 5) == []
    assert weather.due(at + 21) == [Mend(Kind.PARTITION, strike.on)]
    assert weather.committed(min(here), "c", at + 20) == []
    assert weather.committed(min(there), "c", at + 20) == [], "heard late of a round before the mending"
    assert weather.committed(min(here), "d", at + 23) == []
    assert weather.committed(min(there), "e", at + 23) == [], "not the same round"
    assert weather.committed(min(there), "d", at + 23) == [Recovered(Kind.PARTITION, strike.on, 2.0)]
    assert weather.over


def test_calm_mends_at_once_and_strikes_no_more() -> None:
    weather = storm(Kind.KILL, Kind.PAUSE, absence_seconds=100.0)
    strike, at = first_strike(weather)
    weather.calm(at + 0.5)
    assert weather.due(at + 0.5) == [Mend(strike.kind, strike.on)]
    assert weather.due(at + 1000) == []
    assert not weather.over
