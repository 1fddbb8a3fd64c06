"""The picture of a swarm that a monitor makes of what strangers say."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from event_examples import (
    ABORTED,
    ANNA,
    BERT,
    COMMITTED,
    ONE_OF_EACH,
    PAUSED,
    RESUMED,
    SAVED,
)

from p2ptrain import PROTOCOL_VERSION
from p2ptrain.config import RunConfig
from p2ptrain.events import Evaluated, Leaving, Previewed
from p2ptrain.records import PeerId, Position, Presence, RoundRecord
from p2ptrain.telemetry.feed import Told
from peers import watching
from peers.watching import Watch

NOW = 1_800_000_000.0
PRINT = "f" * 64
EVALUATED = Evaluated(step=42, loss=2.0, bits_per_byte=2.9, seconds=0.5, zlib_bits_per_byte=1.8)
PREVIEWED = Previewed(step=42, text="def f():\n\treturn 1")
LEAVING = Leaving(step=42, reason="Ctrl-C", rounds=3, samples=30)


def presence(peer: PeerId, **changes: Any) -> Presence:
    position = Position(step=41, lineage="a" * 64, weight=1)
    fine = {"role": "train", "name": "anna", "protocol": PROTOCOL_VERSION, "fingerprint": PRINT}
    return Presence(peer=peer, incarnation="1", position=position, **(fine | changes))


def told(*events: Any, at: float = NOW, **status: Any) -> Told:
    return Told("life", len(events), 0, status, tuple((at, event) for event in events))


def committed(step: int, mine: int, lineage: str = "a1" * 32, **changes: Any) -> Any:
    return dataclasses.replace(COMMITTED, step=step, mine=mine, lineage=lineage, **changes)


@pytest.fixture
def watch() -> Watch:
    watch = Watch()
    watch.run = RunConfig(min_peers=2, total_steps=1000)
    watch.present([presence(ANNA), presence(BERT, name="bert")], [], NOW)
    return watch


def test_round_is_one_row_when_its_members_tell_of_it(watch: Watch) -> None:
    watch.told(ANNA, told(committed(41, 10, loss=2.0, samples=40, peers=2)), NOW)
    watch.told(BERT, told(committed(41, 30, loss=4.0, samples=40, peers=2), at=NOW + 1), NOW + 1)
    changed = watch.changes(NOW + 1)
    assert changed is not None
    ((step, at, samples, peers, loss, seconds),) = changed["rounds"]
    assert (step, at, samples, peers) == (41, NOW + 1, 40, 2)
    assert loss == 3.5, "weighted by the samples"
    assert seconds == pytest.approx(3.2)
    assert {row[1] for row in changed["parts"]} == {ANNA, BERT}
    assert watch.step == 42


def test_part_of_a_round_adds_up_to_when_it_ended(watch: Watch) -> None:
    watch.told(ANNA, told(committed(41, 10)), NOW)
    ((_, _, began, compute, wait, reduce, apply, mine),) = watch.timeline(41, 5)
    assert began + compute + wait + reduce + apply == pytest.approx(NOW, abs=0.01)
    assert (compute, wait, reduce, apply, mine) == (8.5, 0.5, 2.9, pytest.approx(0.3), 10)


def test_samples_count_once_the_round_has_settled(watch: Watch) -> None:
    watch.told(ANNA, told(committed(41, 10)), NOW)
    watch.settle(NOW + 1)
    assert watch.peers[ANNA].samples == 0
    watch.settle(NOW + 5)
    watch.told(ANNA, told(committed(41, 10)), NOW + 5)
    watch.settle(NOW + 20)
    assert (watch.peers[ANNA].samples, watch.peers[ANNA].rounds) == (10, 1)


def test_samples_of_another_lineage_do_not_count_when_most_tell_otherwise(watch: Watch) -> None:
    liar = PeerId("12D3KooWLiar")
    for peer, lineage in ((ANNA, "a1" * 32), (BERT, "a1" * 32), (liar, "ff" * 32)):
        watch.told(peer, told(committed(41, 1000, lineage)), NOW)
    watch.settle(NOW + 10)
    assert [watch.peers[peer].samples for peer in (ANNA, BERT, liar)] == [1000, 1000, 0]
    assert watch.lineages() == 2
    assert "apart" in {each.key for each in watch.incidents(NOW)}


def test_peer_is_paused_with_its_reason_until_it_resumes(watch: Watch) -> None:
    watch.told(ANNA, told(PAUSED), NOW)
    assert watch.peers[ANNA].state == "paused"
    assert watch.peers[ANNA].to_dict()["pauses"] == ["you asked for it"]
    watch.told(ANNA, told(RESUMED, state="accumulating"), NOW)
    assert watch.peers[ANNA].state == "accumulating"


def test_peer_went_in_peace_or_was_lost_when_its_presence_ends(watch: Watch) -> None:
    watch.told(ANNA, told(LEAVING), NOW)
    watch.present([], [], NOW + watching.GONE_SECONDS + 1)
    assert (watch.left, watch.lost, watch.joined) == (1, 1, 2)
    assert [watch.peers[peer].state for peer in (ANNA, BERT)] == ["left", "gone"]
    watch.present([presence(ANNA)], [], NOW + 100)
    assert watch.joined == 3


def test_nobody_is_lost_who_left_while_nobody_looked(watch: Watch) -> None:
    watch.look_away()
    assert watch.phase(NOW)[0] == "looking"
    assert watch.incidents(NOW) == [], "that nobody was looked for says nothing"
    watch.present([presence(ANNA)], [], NOW + 10 * watching.GONE_SECONDS)
    assert (watch.left, watch.lost) == (0, 0)
    assert [watch.peers[peer].state for peer in (ANNA, BERT)] == ["unknown", "gone"]
    assert not [line for line in watch.log if line["event"] == "lost"]


def test_peer_that_is_shown_no_bootstrap_misses_none(watch: Watch) -> None:
    assert "bootstrap" in {each.key for each in watch.incidents(NOW)}
    watch.sees_bootstraps = False
    assert "bootstrap" not in {each.key for each in watch.incidents(NOW)}


def test_abort_is_shown_with_its_cause(watch: Watch) -> None:
    watch.told(ANNA, told(ABORTED), NOW)
    assert watch.aborts[0][1:] == [41, ANNA, "peer_lost", 1.3]
    assert watch.log[-1]["event"] == "round_aborted"


def test_nothing_is_said_when_nothing_has_changed(watch: Watch) -> None:
    watch.told(ANNA, told(COMMITTED), NOW)
    assert watch.changes(NOW) is not None
    assert watch.changes(NOW) is None


@pytest.mark.parametrize(
    ("name", "shown"), [("<b>anna</b>", "<b>anna</b>"), ("a\x00\u202eb\n", "a��b�"), ("x" * 64, "x" * 64)]
)
def test_name_is_printable_when_a_stranger_chose_it(watch: Watch, name: str, shown: str) -> None:
    watch.present([presence(ANNA, name=name)], [], NOW)
    assert watch.peers[ANNA].to_dict()["name"] == shown


def test_time_is_not_after_now_when_a_clock_is_ahead(watch: Watch) -> None:
    watch.told(ANNA, told(committed(41, 1), at=NOW + 10_000), NOW)
    assert watch.last_commit == NOW


def test_memory_is_bounded_when_peers_and_rounds_never_end(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "MOST_ROUNDS", 50)
    monkeypatch.setattr(watching, "MOST_PARTS", 100)
    monkeypatch.setattr(watching, "MOST_PEERS", 10)
    for number in range(300):
        peer = PeerId(f"12D3KooW{number}")
        for step in (number, number + 1):
            watch.told(peer if number < 20 else ANNA, told(committed(step, 1), ABORTED, PREVIEWED), NOW)
    assert len(watch.peers) == 10
    assert len(watch.rows) == 50
    assert sum(len(one.parts) for one in watch.rounds.values()) <= 100
    assert len(watch.log) <= watching.MOST_LINES


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda watch: watch.present([presence(ANNA, protocol=1)], [], NOW), f"protocol-{ANNA}"),
        (lambda watch: watch.present([presence(PeerId("z"), fingerprint="e" * 64)], [], NOW), "run-z"),
        (lambda watch: watch.told(ANNA, told(hidden=True, direct=0, relay=0), NOW), f"hidden-{ANNA}"),
        (lambda watch: watch.present([], [], NOW + watching.GONE_SECONDS + 1), "few"),
        (lambda watch: None, "bootstrap"),
    ],
)
def test_incident_has_its_remedy_when_something_is_wrong(watch: Watch, change: Any, key: str) -> None:
    change(watch)
    found = {each.key: each for each in watch.incidents(NOW)}
    assert key in found
    assert found[key].remedy


def test_standing_still_is_an_incident_after_a_while(watch: Watch) -> None:
    watch.told(ANNA, told(committed(41, 1)), NOW)
    assert "still" not in {each.key for each in watch.incidents(NOW + 20)}
    assert "still" in {each.key for each in watch.incidents(NOW + 40)}
    assert watch.phase(NOW + 40)[0] == "waiting"
    assert watch.phase(NOW)[0] == "training"


def test_incident_keeps_its_beginning_while_it_lasts(watch: Watch) -> None:
    (first,) = [each for each in watch.incidents(NOW) if each.key == "bootstrap"]
    (later,) = [each for each in watch.incidents(NOW + 60) if each.key == "bootstrap"]
    assert first.since == later.since == NOW


def test_history_is_the_same_when_restored_from_what_was_kept(watch: Watch) -> None:
    watch.told(ANNA, told(committed(41, 10), EVALUATED, PREVIEWED, SAVED), NOW)
    watch.told(BERT, told(committed(41, 5), committed(42, 6)), NOW)
    watch.settle(NOW + 10)
    kept = json.loads(json.dumps(watch.kept))
    again = Watch()
    for record in kept:
        again.restore(record)
    assert list(again.rows.values()) == list(watch.rows.values())
    assert list(again.evaluations) == list(watch.evaluations)
    assert list(again.samples) == list(watch.samples)
    assert [line["text"] for line in again.log] == [line["text"] for line in watch.log]
    assert {peer: seen.samples for peer, seen in again.peers.items()} == {ANNA: 10, BERT: 11}
    assert (again.total_samples, again.rounds_seen, again.step) == (watch.total_samples, 2, 43)
    again.told(ANNA, told(committed(41, 10)), NOW + 20)
    again.settle(NOW + 40)
    assert again.peers[ANNA].samples == 10, "a round that was counted before the restart counts no more"


def test_totals_stand_for_all_before_them_when_restored(watch: Watch) -> None:
    watch.told(ANNA, told(committed(41, 10)), NOW)
    watch.settle(NOW + 10)
    again = Watch()
    for record in [*watch.kept, json.loads(json.dumps(watch.totals()))]:
        again.restore(record)
    assert (again.peers[ANNA].samples, again.rounds_seen) == (10, 1)


@pytest.mark.parametrize(
    "record", [{}, {"kind": "round"}, {"kind": "round", "row": ["x"]}, {"kind": "totals"}]
)
def test_damaged_record_is_an_error_when_restored(record: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Watch().restore(record)


def test_position_of_the_round_record_counts_when_no_peer_has_told(watch: Watch) -> None:
    position = Position(step=77, lineage="a" * 64, weight=1)
    watch.present([], [RoundRecord(peer=ANNA, position=position, roster_size=3)], NOW)
    assert watch.step == 77


def test_everything_is_json_when_every_event_was_told(watch: Watch) -> None:
    watch.told(ANNA, told(*ONE_OF_EACH, state="averaging", samples_per_second=3.14159), NOW)
    text = json.dumps([watch.changes(NOW), watch.snapshot(NOW), watch.kept, watch.totals()], allow_nan=False)
    assert json.loads(text)
