"""What a peer's claims are held against: its own past, and everybody's."""

from __future__ import annotations

from p2ptrain.protocol.deadlines import Deadlines
from p2ptrain.protocol.leader import Leader, Phase
from p2ptrain.protocol.round import Rules
from p2ptrain.protocol.speeds import JUMP, MAX_KNOWN, Speeds
from p2ptrain.records import Ballot, EntryHeader, PeerId, Position, Report

A, B, C, D = (PeerId(name) for name in "ABCD")
AT_ONCE, NEVER = float("-inf"), float("inf")
RULES = Rules(
    target_batch_size=160,
    min_peers=1,
    max_peers=8,
    values=100,
    encoded_bytes=400,
    heartbeat_seconds=1.0,
    silence_seconds=3.0,
    silence_most_seconds=60.0,
    attempt_most_seconds=600.0,
)
HERE = Position(step=7, lineage="a" * 64, weight=1000)


def entry(samples: dict[PeerId, int]) -> EntryHeader:
    return EntryHeader(
        step=6,
        parent="e" * 64,
        ballot=Ballot(number=1, leader=A),
        roster=tuple(samples),
        samples=tuple(samples.values()),
        spans=tuple(range(0, 10 * len(samples) + 1, 10)),
        squared_norms=(1.0,) * len(samples),
        digest="d" * 64,
    )


def seen(*entries: dict[PeerId, int], seconds: float = 10.0) -> Speeds:
    speeds = Speeds()
    for samples in entries:
        speeds.saw(entry(samples), seconds)
    return speeds


USUAL = {A: 100, B: 20, C: 20, D: 20}


def test_nothing_is_held_against_anybody_before_the_first_entry() -> None:
    assert Speeds().counts_from(A, 10**9, 0.0) == AT_ONCE


def test_claim_counts_at_once_up_to_some_times_what_is_usual_or_fair() -> None:
    speeds = seen(USUAL)
    assert speeds.counts_from(A, int(JUMP * 100), 5.0) == AT_ONCE
    assert speeds.counts_from(B, int(JUMP * 40), 5.0) == AT_ONCE  # 160 of 4 peers: 40 each


def test_larger_claim_counts_when_it_can_have_been_computed_at_some_times_the_speed() -> None:
    speeds = seen(USUAL)
    assert speeds.counts_from(A, 600, 5.0) == 5.0 + 600 / (JUMP * 10.0)
    assert speeds.counts_from(B, 160, 5.0) == 5.0 + 160 / (JUMP * 4.0)  # a fair speed, as it has been slower


def test_peer_that_was_cut_short_once_keeps_what_it_usually_brings() -> None:
    speeds = seen(USUAL, USUAL | {A: 0})
    assert speeds.counts_from(A, int(JUMP * 90), 0.0) == AT_ONCE
    assert speeds.counts_from(A, int(JUMP * 100), 0.0) > 0.0


def test_newcomer_may_be_as_fast_as_the_fastest() -> None:
    speeds = seen(USUAL)
    assert speeds.counts_from(PeerId("new"), 300, 0.0) == AT_ONCE
    assert speeds.counts_from(PeerId("new"), 301, 0.0) == 301 / 30.0


def test_peer_that_never_brought_anything_is_not_shut_out_for_ever() -> None:
    speeds = seen({A: 0, B: 160})
    assert 0.0 < speeds.counts_from(A, 320, 0.0) < NEVER


def test_memory_of_peers_is_bounded() -> None:
    speeds = Speeds()
    for number in range(2 * MAX_KNOWN):
        speeds.saw(entry({A: 1, PeerId(str(number)): 1}), 1.0)
    assert len(speeds._usual) == len(speeds._rate) <= MAX_KNOWN


# -- what a leader makes of it -------------------------------------------------------------------------------


def leading(speeds: Speeds, began: float = 100.0) -> Leader:
    return Leader(A, RULES, HERE, entry(USUAL), Deadlines(RULES), expected=(), speeds=speeds, began=began)


def report(samples: int, in_flight: int = 0) -> Report:
    return Report(
        incarnation="i",
        position=HERE,
        samples=samples,
        in_flight=in_flight,
        finish_seconds=0.0,
        batch_seconds=1.0,
    )


def test_step_is_not_fired_early_by_a_claim_that_cannot_be_true_yet() -> None:
    leader = leading(seen(USUAL))
    leader.report(A, report(10), 100.1)
    leader.report(B, report(160), 100.2)
    leader.report(C, report(2), 100.3)
    assert leader.phase is Phase.COLLECTING
    leader.report(C, report(0, in_flight=310), 100.4)
    assert leader.phase is Phase.COLLECTING
    leader.report(C, report(20), 105.0)
    leader.report(A, report(140), 106.0)  # enough without B
    assert leader.attempt is not None
    assert leader.attempt.freeze.roster == (A, C)


def test_claim_counts_when_its_time_has_come_and_nobody_is_blamed() -> None:
    leader = leading(seen(USUAL))
    leader.report(A, report(10), 100.1)
    leader.report(B, report(160), 100.2)
    due = leader.deadline()
    assert due == 100.0 + 160 / (JUMP * 4.0)
    leader.tick(due)
    assert leader.attempt is not None
    assert leader.attempt.freeze.roster == (A, B)
    assert not leader.dropped


def test_leader_that_waits_for_a_newcomer_does_not_wake_up_in_vain() -> None:
    leader = leading(seen(USUAL))
    leader.report(A, report(10), 100.1)
    leader.report(B, report(200), 100.2)
    leader.welcome(D, 116.0)
    leader.tick(116.5)
    assert leader.deadline() > 116.5
