"""The figures of a swarm under faults, from journals that are written here."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import pytest
from event_examples import ABORTED, ANNA, COMMITTED, ONE_OF_EACH, ROLLED_BACK, WASTED

from p2ptrain.events import CatchUpBy, CaughtUp, Event, Joined
from peers.chronicle import Record
from peers.ledger import Ledger, Samples, Spread, loss_at, slope_per_minute, spread

NOON = 1_800_000_000.0
CATCH_UP = {"from_step": 0, "to_step": 1, "how": CatchUpBy.LOG, "received_bytes": 1, "seconds": 0.1}


def record(event: Event, at: float) -> Record:
    return {"time": datetime.fromtimestamp(NOON + at, UTC).isoformat(), **event.to_dict()}


def joined(at: float) -> Record:
    return record(Joined(run_id="r", peer=ANNA, name="", others=0), at)


def committed(
    step: int,
    at: float,
    *,
    mine: int = 8,
    samples: int = 16,
    peers: int = 2,
    lineage: str = "",
    attempt: int = 1,
) -> Record:
    event = dataclasses.replace(
        COMMITTED,
        step=step,
        mine=mine,
        samples=samples,
        peers=peers,
        attempt=attempt,
        accumulate_seconds=2.0,
        lineage=lineage or f"{step:064d}",
    )
    return record(event, at)


@pytest.fixture
def two() -> Ledger:
    ledger = Ledger(target_batch_size=16)
    for name in ("peer-1", "peer-2"):
        ledger.observe(name, joined(-1))
    return ledger


def test_ledger_takes_every_event_when_one_is_added(two: Ledger) -> None:
    for event in ONE_OF_EACH:
        two.observe("peer-1", record(event, 0))


def test_attempts_are_counted_once_when_several_peers_tell_of_them(two: Ledger) -> None:
    for name in ("peer-1", "peer-2"):
        two.observe(name, record(dataclasses.replace(ABORTED, step=1, attempt=1), 1))
        two.observe(name, record(dataclasses.replace(ABORTED, step=1, attempt=2), 2))
        two.observe(name, committed(1, 3, attempt=3))
    # One that was late gave up the attempt that the others committed.
    two.observe("peer-2", record(dataclasses.replace(ABORTED, step=1, attempt=3), 3))
    assert (two.attempted, two.committed) == (3, 1)


def test_rounds_of_both_sides_count_when_they_trained_apart(two: Ledger) -> None:
    two.observe("peer-1", committed(1, 3, attempt=2, lineage="a" * 64))
    two.observe("peer-2", committed(1, 4, attempt=2, lineage="b" * 64))
    two.observe("peer-2", record(dataclasses.replace(ABORTED, step=1, attempt=1), 2))
    assert (two.attempted, two.committed, two.lineages) == (3, 2, 2)


@pytest.mark.parametrize(
    ("killed", "died_out"),
    [((), 0), (("peer-1",), 0), (("peer-1", "peer-2"), 1), (("peer-1", "peer-2", "peer-3"), 1)],
)
def test_lineage_has_died_out_when_all_who_committed_it_were_killed(
    two: Ledger, killed: tuple[str, ...], died_out: int
) -> None:
    for name, lineage in {"peer-1": "a", "peer-2": "a", "peer-3": "b"}.items():
        two.observe(name, committed(1, 3, lineage=lineage * 64))
    for name in killed:
        two.gone(name, NOON + 4, killed=True)
    assert (two.lineages, two.died_out) == (2, died_out)


def test_no_lineage_has_died_out_when_nobody_went_another_way(two: Ledger) -> None:
    for name in ("peer-1", "peer-2"):
        two.observe(name, committed(1, 3))
        two.gone(name, NOON + 4, killed=True)
    assert two.died_out == 0


def test_samples_add_up_when_some_are_wasted_rolled_back_or_lost(two: Ledger) -> None:
    for name in ("peer-1", "peer-2"):
        two.observe(name, committed(0, 10))
    two.observe("peer-1", committed(1, 12, lineage="a" * 64, samples=8, peers=1))
    two.observe("peer-2", committed(1, 12, lineage="b" * 64, samples=8, peers=1))
    two.observe("peer-2", record(ROLLED_BACK, 13))
    two.observe("peer-2", record(dataclasses.replace(WASTED, samples=3), 13))
    two.gone("peer-1", NOON + 13.5, killed=True)  # 1.5 s at 4 samples a second
    assert two.samples(used=16 + 8) == Samples(
        computed=24 + 8 + 3 + 6, used=24, wasted={"behind": 3, "rolled_back": 8}, lost=6
    )
    assert (two.rollbacks, two.lineages) == (1, 2)


def test_samples_of_a_killed_peer_are_not_lost_when_the_round_counted_them(two: Ledger) -> None:
    for name in ("peer-1", "peer-2"):
        two.observe(name, committed(0, 10))
    two.gone("peer-2", NOON + 12, killed=True)
    two.observe("peer-1", committed(1, 12.2))  # 16 samples, of which its own are 8
    assert two.samples(used=32).lost == 0


def test_killed_peer_lost_no_more_than_a_batch_however_long_it_had_given_nothing(two: Ledger) -> None:
    two.observe("peer-2", committed(0, 10))
    two.gone("peer-2", NOON + 500, killed=True)
    assert two.samples(used=16).lost == 16 - 8  # 8 of the round are in nobody's journal: they may be its own


def test_peer_that_is_killed_before_its_first_round_after_a_restart_loses_what_it_had_since(
    two: Ledger,
) -> None:
    for name in ("peer-1", "peer-2"):
        two.observe(name, committed(0, 10))  # at 4 samples a second
    two.gone("peer-2", NOON + 10, killed=True)
    two.restarted("peer-2")
    two.observe("peer-2", joined(15))
    two.observe("peer-2", record(CaughtUp(**CATCH_UP), 16))
    two.gone("peer-2", NOON + 17.5, killed=True)
    assert two.samples(used=16).lost == 6


def test_peer_that_was_in_no_round_yet_loses_nothing_when_it_is_killed(two: Ledger) -> None:
    two.gone("peer-2", NOON + 5, killed=True)
    assert two.samples(used=0) == Samples(computed=0, used=0, wasted={}, lost=0)


def test_participation_is_of_those_who_live_when_peers_come_and_go(two: Ledger) -> None:
    two.observe("peer-1", committed(0, 1, peers=2))
    two.observe("peer-2", committed(0, 1.1, peers=2))
    two.observe("peer-1", committed(1, 2, peers=1))  # half of the two
    two.gone("peer-2", NOON + 3, killed=True)
    two.observe("peer-1", committed(2, 4, peers=1))
    two.restarted("peer-2")  # it loads its modules
    two.observe("peer-1", committed(3, 5, peers=1))
    two.observe("peer-2", joined(6))
    two.observe("peer-1", committed(4, 7, peers=1))
    assert two.participation(NOON, NOON + 100) == pytest.approx((1 + 0.5 + 1 + 1 + 0.5) / 5)
    assert two.participation(NOON + 3.5, NOON + 5.5) == 1
    assert two.participation(NOON + 50, NOON + 60) is None


def test_paused_peer_counts_again_once_it_goes_on(two: Ledger) -> None:
    two.gone("peer-2", NOON)
    two.observe("peer-1", committed(0, 1, peers=1))
    two.went_on("peer-2")
    two.observe("peer-1", committed(1, 2, peers=1))
    assert two.participation(NOON, NOON + 9) == pytest.approx(0.75)


def test_resume_lasts_to_the_next_commit_by_another_when_journals_are_read_late(two: Ledger) -> None:
    for name in ("peer-1", "peer-2"):
        two.observe(name, committed(0, 1))
    two.gone("peer-2", NOON + 10, killed=True)
    two.gone("peer-1", NOON + 30, killed=True)
    two.observe("peer-1", committed(1, 9.9))
    two.observe("peer-1", committed(3, 22))
    two.observe("peer-1", committed(2, 13))
    two.observe("peer-2", committed(2, 10.5))  # it was seen alive after its death: not a survivor's
    two.observe("peer-2", committed(4, 32))
    assert two.resumed() == Spread(count=2, median=2.5, worst=3.0)


def test_only_kills_of_peers_that_trained_count_for_the_resume(two: Ledger) -> None:
    two.observe("peer-1", committed(0, 1))
    two.gone("bootstrap", NOON + 2, killed=True)
    two.gone("peer-2", NOON + 2, killed=True)  # it was in no round yet
    two.observe("peer-1", committed(1, 3))
    assert two.resumed() == Spread(count=0, median=None, worst=None)


def test_survivors_gave_up_what_they_could_not_bring_into_the_round_after_a_kill(two: Ledger) -> None:
    def wasted(step: int, samples: int, at: float) -> Record:
        return record(dataclasses.replace(WASTED, step=step, samples=samples), at)

    two.observe("peer-3", joined(0))
    for name in ("peer-1", "peer-2", "peer-3"):
        two.observe(name, committed(0, 1))
    two.observe("peer-4", joined(1))
    two.gone("peer-3", NOON + 2, killed=True)
    two.observe("peer-1", wasted(0, 8, 2.1))  # a micro-batch that ended after the round before
    two.observe("peer-1", committed(1, 3))
    assert two.survivors_gave_up() == 0
    two.observe("peer-1", wasted(1, 8, 3.1))  # the same of this one
    two.observe("peer-4", wasted(1, 8, 3.2))  # it has never been in a round
    two.observe("peer-2", wasted(1, 40, 3.3))
    two.observe("peer-2", wasted(2, 8, 5))  # of another round
    assert two.survivors_gave_up() == 40


def test_crowd_is_in_when_the_last_of_it_was_in_a_round_and_the_rate_is_of_samples(two: Ledger) -> None:
    for step in range(10):
        two.observe("peer-1", committed(step, step + 1.0))
    assert two.took_part(["peer-2"], NOON) is None
    two.observe("peer-2", committed(4, 5.1))
    two.observe("peer-2", committed(5, 6.1))
    two.observe("peer-3", committed(8, 9.1))
    assert two.took_part(["peer-2", "peer-3"], NOON) == pytest.approx(NOON + 9.1)
    assert two.took_part(["peer-2", "peer-3"], NOON + 6.5) is None
    assert two.samples_per_second(NOON + 2, NOON + 6) == pytest.approx(16)
    assert two.samples_per_second(NOON + 20, NOON + 30) == 0


def test_longest_gap_has_the_ends_in_it_when_commits_stop_early(two: Ledger) -> None:
    for step, at in enumerate((1, 2, 5)):
        two.observe("peer-1", committed(step, at))
    assert two.longest_gap_seconds(NOON, NOON + 6) == pytest.approx(3)
    assert two.longest_gap_seconds(NOON, NOON + 60) == pytest.approx(55)
    assert two.last_commit_at == pytest.approx(NOON + 5)


def test_way_back_is_by_snapshot_when_one_was_taken_since_the_start(two: Ledger) -> None:
    def caught_up(how: CatchUpBy) -> Record:
        event = CaughtUp(from_step=0, to_step=9, how=how, received_bytes=1, seconds=0.1)
        return record(event, 1)

    assert two.caught_up_by("peer-2") == "log"
    two.observe("peer-2", caught_up(CatchUpBy.SNAPSHOT))
    two.observe("peer-2", caught_up(CatchUpBy.LOG))
    assert two.caught_up_by("peer-2") == "snapshot"
    two.restarted("peer-2")
    assert two.caught_up_by("peer-2") == "log"


def test_spread_is_empty_when_nothing_was_measured() -> None:
    assert spread([]) == Spread(count=0, median=None, worst=None)
    assert spread([3.0, 1.0, 2.004]) == Spread(count=3, median=2.0, worst=3.0)


def test_loss_of_a_twin_is_read_between_two_points_and_nowhere_else() -> None:
    curve = [(100, 3.0), (200, 2.0), (400, 1.0)]
    assert loss_at(100, curve) == 3.0
    assert loss_at(283, curve) == pytest.approx(1.5, abs=0.001)  # 200 times the root of 2
    assert loss_at(400, curve) == 1.0
    assert loss_at(99, curve) is None
    assert loss_at(401, curve) is None
    assert loss_at(100, []) is None


def test_slope_is_per_minute_and_leaves_the_warm_up_out() -> None:
    leak = [(float(second), 100 + second / 60) for second in range(60, 300, 2)]
    start = [(float(second), 10 * second) for second in range(0, 60, 2)]
    assert slope_per_minute([*start, *leak]) == pytest.approx(1.0)


@pytest.mark.parametrize("points", [[], [(0.0, 1.0)], [(float(second), 1.0) for second in range(0, 110, 2)]])
def test_slope_is_unknown_when_a_process_lived_too_short(points: list[tuple[float, float]]) -> None:
    assert slope_per_minute(points) is None
