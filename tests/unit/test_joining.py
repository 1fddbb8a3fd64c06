"""The decisions of joining: replay or snapshot, whom to believe, what to ask of whom, how fast to give."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.protocol.presence import milestone
from p2ptrain.records import Manifest, Milestone, PeerId, Position
from p2ptrain.replica.joining import (
    BURST_SECONDS,
    MAX_LEAD_STEPS,
    OVERDUE,
    PIECES_PER_DONOR,
    REPLAY_SECONDS,
    UPLOAD_SHARE,
    Bench,
    Errands,
    Pace,
    Progress,
    Upload,
    agreed_step,
    attested,
    common_step,
    elect,
    outvoted,
    replay_pays,
    sent_in_round,
    spread,
)

A, B, C, D = (PeerId(name) for name in "abcd")


def manifest(step: int = 40, weight: int = 900, lineage: str = "1", state: str = "2") -> Manifest:
    return Manifest(
        position=Position(step=step, lineage=lineage * 64, weight=weight),
        state_digest=state * 64,
        size_bytes=10,
        piece_bytes=4,
        pieces=(state * 64,) * 3,
        last=None,
    )


# -- replay or snapshot --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "rate", "pays"),
    [
        (6, 0.0, True),  # as many bytes as the snapshot
        (7, 0.0, False),
        (100, 100 * 2 / REPLAY_SECONDS, True),  # many more, but done in a moment
        (101, 100 * 2 / REPLAY_SECONDS, False),
    ],
)
def test_replay_goes_on_when_it_is_cheaper_than_a_snapshot_or_soon_done(
    entries: int, rate: float, pays: bool
) -> None:
    assert replay_pays(entries, entry_bytes=2, snapshot_bytes=12, bytes_per_second=rate) is pays


# -- on which step donors meet -------------------------------------------------------------------------------


def test_donor_proposes_where_it_is_when_steps_are_slow_or_unknown() -> None:
    assert agreed_step(41, 10.0) == 41
    assert agreed_step(41, 0.0) == 41


def test_donors_propose_one_step_ahead_when_steps_are_fast() -> None:
    assert {agreed_step(here, 0.02) for here in range(100, 104)} == {128}


@given(st.integers(0, 10**6), st.floats(1e-4, 100))
def test_proposed_step_is_never_behind_and_never_far(here: int, step_seconds: float) -> None:
    assert here <= agreed_step(here, step_seconds) < here + 2 * MAX_LEAD_STEPS


def test_one_donor_cannot_put_the_common_step_out_of_reach() -> None:
    assert common_step([41, 42, 2**50], 4) == 46


# -- which snapshot to believe -------------------------------------------------------------------------------


def test_nothing_is_elected_when_nothing_is_offered() -> None:
    assert elect({}, A, fresh=True) is None


@pytest.mark.parametrize("fresh", [True, False])
def test_majority_tells_what_the_state_is_when_donors_contradict_each_other_at_one_position(
    fresh: bool,
) -> None:
    honest, lie = manifest(), manifest(state="3")
    elected = elect({A: lie, B: honest, C: honest}, A, fresh=fresh)
    assert elected is not None
    assert (elected.manifest, elected.donors, elected.outvoted) == (honest, (B, C), (A,))


def test_chosen_donor_is_believed_when_two_contradict_each_other() -> None:
    elected = elect({A: manifest(), B: manifest(state="3")}, B, fresh=True)
    assert elected is not None
    assert (elected.donors, elected.outvoted) == ((B,), (A,))


def test_newcomer_follows_the_majority_and_returning_peer_the_heavier_log_it_was_sent_to() -> None:
    most, heavy = manifest(), manifest(weight=5000, lineage="4", state="5")
    offers = {A: most, B: most, C: heavy}
    fresh, returning = (elect(offers, C, fresh=fresh) for fresh in (True, False))
    assert fresh is not None
    assert returning is not None
    assert (fresh.manifest, returning.manifest) == (most, heavy)
    assert fresh.outvoted == returning.outvoted == ()  # another log is no lie


def test_heavier_of_two_logs_is_taken_when_they_have_as_many_donors() -> None:
    elected = elect({A: manifest(), B: manifest(weight=901, lineage="0")}, A, fresh=True)
    assert elected is not None
    assert elected.donors == (B,)


def test_step_with_most_donors_is_taken_and_the_later_one_of_two() -> None:
    early, late = manifest(40), manifest(44, 1000, "6", "7")
    for offers, donors in (({A: early, B: early, C: late}, (A, B)), ({A: early, C: late}, (C,))):
        elected = elect(offers, A, fresh=True)
        assert elected is not None
        assert elected.donors == donors


def test_interrupted_download_goes_on_when_one_donor_still_has_its_snapshot() -> None:
    begun, newer = manifest(40), manifest(44, 1000, "6", "7")
    elected = elect({A: newer, B: newer, C: begun}, A, fresh=True, begun=begun)
    assert elected is not None
    assert (elected.manifest, elected.donors) == (begun, (C,))
    other = elect({A: newer}, A, fresh=True, begun=begun)
    assert other is not None
    assert other.manifest == newer


def said(step: int, state: str, lineage: str = "1") -> Milestone:
    return milestone(Position(step=step, lineage=lineage * 64, weight=0), state * 64)


@pytest.mark.parametrize(
    ("records", "state"),
    [
        ([], None),
        ([[said(40, "2")]], "2"),
        ([[said(40, "2")], [said(40, "3")]], None),  # a tie is no majority
        ([[said(40, "2")], [said(40, "3")], [said(36, "9"), said(40, "2")]], "2"),
        ([[said(40, "3", lineage="7")], [said(36, "3")], [said(40, "2")]], "2"),  # of another log, or step
    ],
)
def test_state_of_a_position_is_what_most_of_those_who_speak_of_it_have_signed(
    records: list[list[Milestone]], state: str | None
) -> None:
    expected = state and state * 32
    assert attested(40, "1" * 64, records) == expected


def test_peer_is_outvoted_only_by_more_than_half_of_all_records_its_own_among_them() -> None:
    mine = (said(36, "2"), said(40, "3"))
    assert outvoted(mine, {}) is None
    assert outvoted(mine, {A: (said(40, "2"),)}) is None
    assert outvoted(mine, {A: (said(40, "2"),), B: (said(36, "2"),)}) is None
    found = outvoted(mine, {C: (said(40, "2"),), B: (said(40, "2"),), A: (said(40, "3", "7"),)})
    assert found is not None
    assert (found.mine, found.theirs, found.donor) == (said(40, "3"), "2" * 32, B)


# -- which piece to ask of whom ------------------------------------------------------------------------------


def test_every_donor_is_asked_for_other_pieces_when_there_are_enough() -> None:
    errands = Errands(range(10), [A, B])
    asked = errands.ask(0.0)
    assert sorted(asked) == [(A, 0), (A, 2), (B, 1), (B, 3)]
    assert errands.ask(0.0) == []
    errands.came(A, 0, 1.0)
    assert errands.ask(1.0) == [(A, 4)]


def test_piece_is_asked_for_again_when_its_donor_has_failed() -> None:
    errands = Errands(range(3), [A, B])
    assert errands.ask(0.0) == [(A, 0), (B, 1), (A, 2)]
    errands.gone(A, 0)
    assert A not in errands.donors
    errands.came(B, 1, 1.0)
    assert errands.ask(1.0) == [(B, 0)]
    errands.gone(A, 2)  # the other one that was on its way
    assert errands.ask(1.0) == [(B, 2)]


def test_second_donor_is_asked_when_nothing_else_is_missing_and_a_piece_is_overdue() -> None:
    errands = Errands(range(2), [A, B, C])
    assert errands.ask(0.0) == [(A, 0), (B, 1)]
    errands.came(A, 0, 1.0)
    assert errands.ask(1.0) == []
    assert errands.wake_at(1.0) == OVERDUE
    assert errands.ask(OVERDUE) == [(A, 1)]
    assert errands.ask(10 * OVERDUE) == []  # two are enough
    errands.came(A, 1, 10 * OVERDUE)
    assert errands.missing == set()


def test_busy_donor_is_asked_again_when_its_time_has_come() -> None:
    errands = Errands(range(4), [A])
    first, second = errands.ask(0.0)
    errands.later(*first, 5.0)
    errands.came(*second, 1.0)
    assert errands.ask(4.9) == []
    assert errands.wake_at(4.9) == 5.0
    assert errands.ask(5.0) == [(A, 0), (A, 2)]


@pytest.mark.parametrize("seed", range(200))
def test_all_pieces_come_while_one_donor_is_left(seed: int) -> None:
    chance = random.Random(seed)
    pieces, peers = chance.randint(1, 30), [PeerId(str(number)) for number in range(chance.randint(1, 5))]
    errands = Errands(range(pieces), peers)
    under_way: list[tuple[PeerId, int]] = []
    now = 0.0
    while errands.missing:
        under_way += errands.ask(now)
        assert all(errands.busy(peer) <= PIECES_PER_DONOR for peer in peers)
        assert all(sum(each == piece for _, each in under_way) <= 2 for piece in range(pieces))
        if not under_way:
            now = errands.wake_at(now)
            assert now < float("inf")
            continue
        now += chance.random()
        donor, piece = under_way.pop(chance.randrange(len(under_way)))
        fate = chance.random()
        if fate < 0.2 and errands.donors.keys() != {donor}:
            errands.gone(donor, piece)
        elif fate < 0.4:
            errands.later(donor, piece, now + 1.0)
        else:
            errands.came(donor, piece, now)


# -- whom to ask ---------------------------------------------------------------------------------------------


def test_peer_is_left_alone_until_its_time_is_over() -> None:
    bench = Bench()
    bench.put(A, 10.0, now=100.0)
    bench.put(A, 1.0, now=101.0)
    assert bench.without([A, B], now=109.0) == [B]
    assert bench.without([A, B], now=110.0) == [A, B]


def test_joiners_do_not_all_begin_with_the_same_donor() -> None:
    donors = [PeerId(f"donor {number}") for number in range(20)]
    firsts = {spread(PeerId(f"joiner {number}"), donors)[0] for number in range(20)}
    assert len(firsts) > 8
    assert sorted(spread(A, donors)) == sorted(donors)


# -- when a piece may leave ----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 2000)), min_size=1, max_size=60))
def test_no_more_leaves_than_the_cap_in_any_time(asked: list[tuple[float, int]]) -> None:
    rate = 1000.0
    upload, now = Upload(rate), 0.0
    left: list[tuple[float, int]] = []
    for pause, size in asked:
        now += pause
        left.append((now + upload.take(size, now), size))
    for start in range(len(left)):
        for stop in range(start, len(left)):
            seconds = left[stop][0] - left[start][0]
            sent = sum(size for _, size in left[start : stop + 1])
            assert sent <= rate * (seconds + BURST_SECONDS) + left[stop][1] + 1e-3


def test_piece_leaves_at_once_when_nothing_left_for_a_while_and_waits_its_turn_after_that() -> None:
    upload = Upload(1000.0)
    assert [upload.take(1000, 50.0) for _ in range(3)] == [0.0, 0.0, 1.0]
    assert upload.wait(50.0) == 2.0
    assert upload.take(1000, 60.0) == 0.0


def test_cap_is_a_share_of_the_fastest_of_the_last_rounds_when_none_is_set() -> None:
    upload = Upload(0.0)
    assert upload.bytes_per_second == float("inf")
    assert upload.take(10**9, 0.0) == upload.take(10**9, 0.0) == 0.0  # no round that could suffer
    for seconds in (2.0, 1.0, 4.0):
        upload.round(8000, seconds)
    assert upload.bytes_per_second == UPLOAD_SHARE * 8000
    upload.round(0, 1.0)  # alone in a round, it sent nothing
    assert upload.bytes_per_second == UPLOAD_SHARE * 8000


def test_sent_bytes_of_a_round_are_own_gradient_and_own_means() -> None:
    assert sent_in_round(1000, [0, 100], 0) == 0
    assert sent_in_round(1000, [0, 50, 100], 1) == 1000
    assert sent_in_round(1000, [0, 25, 50, 75, 100], 2) == pytest.approx(2 * 1000 * 3 / 4)
    assert sent_in_round(1000, [0, 100, 100], 1) == 1000  # reduces nothing


# -- how far it is -------------------------------------------------------------------------------------------


def test_time_left_follows_the_pace_of_the_last_seconds() -> None:
    pace = Pace(0.0)
    assert pace.bytes_per_second(1.0) == 0.0
    pace.add(1000, 10.0)
    assert pace.bytes_per_second(10.0) == 100.0
    for second in range(11, 41):
        pace.add(500, float(second))
    assert pace.bytes_per_second(40.0) == pytest.approx(500)
    progress = Progress("pieces", 1, 4, 1000, 4000, pace.bytes_per_second(40.0), 3)
    assert progress.eta_seconds == pytest.approx(6.0)
    assert Progress("pieces", 0, 4, 0, 4000, 0.0, 3).eta_seconds is None
