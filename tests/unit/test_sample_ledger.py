"""The sample ledger: every sample counts once, whoever comes, goes or is late."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.protocol.ledger import (
    Account,
    Leases,
    account,
    after,
    follows,
    lease,
    leases,
    numbers,
    prefix,
    shuffled,
    taken,
)
from p2ptrain.records import Ballot, Change, DataPosition, EntryHeader, PeerId, Terms

TARGET = 4
SIZE = 2 * TARGET
"""Of a lease."""
A, B, C, D = (PeerId(name) for name in "ABCD")


def entry(
    step: int,
    roster: tuple[PeerId, ...],
    samples: tuple[int, ...],
    data: DataPosition | None,
    *,
    skipped: tuple[int, ...] = (),
    leader: PeerId | None = None,
) -> EntryHeader:
    return EntryHeader(
        step=step,
        parent="0" * 64,
        ballot=Ballot(number=1, leader=leader or roster[0]),
        roster=roster,
        samples=samples,
        spans=tuple(range(len(roster) + 1)),
        squared_norms=(1.0,) * len(roster),
        digest="d" * 64,
        skipped=skipped,
        data=data,
    )


def at(end: int, *returned: tuple[int, int]) -> DataPosition:
    return DataPosition(next=end, returned=returned)


# -- whose the next samples are ------------------------------------------------------------------------------


def test_only_the_leader_has_a_lease_at_the_start() -> None:
    of = leases(None, B, TARGET)
    assert lease(of, B) == ((0, 8),)
    assert lease(of, A) == ()


def test_roster_of_the_last_entry_leases_in_the_order_in_which_it_leads() -> None:
    last = entry(0, (A, B, C), (4, 0, 0), at(4))
    of = leases(last, B, TARGET)
    assert of.holders == (B, C, A)
    assert [lease(of, peer) for peer in (B, C, A)] == [((4, 12),), ((12, 20),), ((20, 28),)]


def test_leader_that_was_not_in_the_last_entry_leases_after_its_roster() -> None:
    last = entry(1, (A, B), (4, 4), at(8))
    of = leases(last, D, TARGET)
    assert lease(of, D) == ((24, 32),)
    assert lease(of, C) == ()


def test_what_was_returned_comes_first_and_is_filled_up_with_fresh_samples() -> None:
    last = entry(2, (A, B, C), (4, 4, 0), at(40, (0, 3), (10, 20)))
    of = leases(last, A, TARGET)
    assert lease(of, A) == ((0, 3), (18, 20), (40, 43))
    assert lease(of, B) == ((10, 18),)
    assert lease(of, C) == ((43, 51),)


def test_ranges_that_are_more_than_the_peers_are_leased_before_fresh_samples() -> None:
    of = leases(entry(1, (A,), (4,), at(40, (0, 3), (10, 12), (20, 21))), A, TARGET)
    assert lease(of, A) == ((0, 3), (10, 12), (20, 21), (40, 42))


def test_part_of_a_lease_is_taken_from_its_start() -> None:
    held = ((0, 3), (40, 45))
    assert numbers(held, 0, 2) == [0, 1]
    assert numbers(held, 2, 3) == [2, 40, 41]
    assert numbers(held, 4, 9) == [41, 42, 43, 44]
    assert numbers(held, 8, 1) == []
    assert prefix(held, 0) == ()
    assert prefix(held, 5) == ((0, 3), (40, 42))
    with pytest.raises(ValueError, match="1 samples more"):
        prefix(held, 9)


def test_leases_grow_with_a_target_that_the_organizer_has_announced() -> None:
    change = Change(step=9, key="target_batch_size", value=20.0)
    terms = Terms(peer=A, revision=1, signature="0" * 128, changes=(change,))
    last = entry(1, (A, B), (4, 4), at(8)).model_copy(update={"terms": terms})
    assert lease(leases(last, B, TARGET), A) == ((8, 48),)


# -- where the data stands then ------------------------------------------------------------------------------


def test_lease_of_a_peer_that_vanished_is_given_out_again() -> None:
    of = leases(entry(0, (A, B, C), (4, 0, 0), at(4)), B, TARGET)
    data = after(of, {B: 8, A: 3})  # C is gone
    assert data == at(23, (12, 20))
    again = leases(entry(1, (A, B), (3, 8), data), A, TARGET)
    assert lease(again, A) == ((12, 20),)
    assert lease(again, B) == ((23, 31),)


def test_data_stands_where_it_stood_when_nobody_brought_anything() -> None:
    of = Leases(at(40, (0, 3)), (A, B), SIZE)
    assert after(of, {A: 0}) == at(40, (0, 3))


def test_ranges_that_meet_become_one() -> None:
    of = Leases(at(8), (A, B, C), SIZE)
    assert taken(of, {A: 8, B: 8}) == ((8, 24),)
    assert after(of, {A: 8, B: 8}) == at(24)
    assert after(of, {C: 2}) == at(26, (8, 24))


def test_skipped_samples_are_lost_and_not_given_out_again() -> None:
    last = entry(1, (A, B), (4, 4), at(8))
    header = entry(2, (A, B), (4, 5), at(23, (12, 16)), skipped=(0, 2))
    assert follows(last, header, TARGET) == ((8, 12), (16, 23))
    assert account(at(23, (12, 16)), weight=17) == Account(unique=17, lost=2, repeated=0, returned=4)


def test_account_tells_of_samples_that_count_twice() -> None:
    assert account(at(10), weight=12) == Account(unique=10, lost=0, repeated=2, returned=0)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (entry(2, (A, B), (4, 4), at(20)), "stands at"),
        (entry(2, (A, B), (4, 4), None), "stands at"),
        (entry(2, (A, B), (9, 0), at(17)), "1 samples more"),
        (entry(2, (A, B, C), (4, 0, 1), at(12)), "1 samples more"),
        (entry(2, (A, B), (4, 0), at(12), skipped=(5, 0)), "1 samples more"),
    ],
)
def test_entry_is_refused_when_it_takes_what_was_not_leased(header: EntryHeader, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        follows(entry(1, (A, B), (4, 4), at(8)), header, TARGET)


@pytest.mark.parametrize("returned", [((3, 3),), ((5, 3),), ((0, 3), (3, 6)), ((6, 8), (0, 2)), ((6, 10),)])
def test_data_position_has_one_form(returned: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="must rise"):
        DataPosition(next=10, returned=returned)


# -- whatever happens ----------------------------------------------------------------------------------------

ROUNDS = st.lists(
    st.dictionaries(
        st.sampled_from([PeerId(name) for name in "ABCDEF"]),
        st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)),
        min_size=1,
    ),
    max_size=30,
)
"""Who is in each round, and how many samples of its lease each of them brings and skips, if it has one."""


@given(ROUNDS)
def test_every_sample_counts_once_and_none_is_forgotten_whoever_comes_and_goes(
    rounds: list[dict[PeerId, tuple[int, int]]],
) -> None:
    last: EntryHeader | None = None
    counted: Counter[int] = Counter()
    slots = 0
    for step, members in enumerate(rounds):
        roster = tuple(sorted(members))
        leader = roster[step % len(roster)]
        of = leases(last, leader, TARGET)
        slots = max(slots, len(of.holders))
        held = {peer: lease(of, peer) for peer in roster}
        every = [number for ranges in held.values() for number in numbers(ranges, 0, SIZE)]
        assert len(every) == len(set(every))
        assert not counted.keys() & set(every)
        brought = {peer: members[peer] if held[peer] else (0, 0) for peer in roster}
        brought = {peer: (samples, min(over, SIZE - samples)) for peer, (samples, over) in brought.items()}
        for peer, (samples, over) in brought.items():
            counted.update(numbers(held[peer], 0, samples + over))
        header = entry(
            step,
            roster,
            tuple(brought[peer][0] for peer in roster),
            after(of, {peer: sum(each) for peer, each in brought.items()}),
            skipped=tuple(brought[peer][1] for peer in roster),
            leader=leader,
        )
        assert {n for a, b in follows(last, header, TARGET) for n in range(a, b)} == {
            n for peer in roster for n in numbers(held[peer], 0, sum(brought[peer]))
        }
        data, last = header.data, header
        assert data is not None
        returned = {number for start, stop in data.returned for number in range(start, stop)}
        assert counted.keys() | returned == set(range(data.next))
        assert not counted.keys() & returned
        assert max(counted.values(), default=1) == 1
        assert len(data.returned) <= slots
        assert len(returned) <= slots * SIZE
        assert DataPosition.model_validate_json(data.model_dump_json()) == data


# -- which data they are -------------------------------------------------------------------------------------


@given(size=st.integers(1, 300), seed=st.integers(0, 5), passed=st.integers(0, 3))
def test_every_pass_has_each_of_the_data_once(size: int, seed: int, passed: int) -> None:
    order = [shuffled(number, size, seed) for number in range(passed * size, (passed + 1) * size)]
    assert sorted(order) == list(range(size))


def test_order_is_the_known_one_and_differs_by_pass_and_seed() -> None:
    first, second, other = (
        [shuffled(number + start, 10, seed) for number in range(10)]
        for start, seed in ((0, 1), (10, 1), (0, 2))
    )
    assert first == [2, 5, 3, 7, 4, 6, 9, 1, 8, 0]
    assert len({tuple(first), tuple(second), tuple(other)}) == 3


def test_order_has_no_preference() -> None:
    """Of 2,000 seeds, each of 8 data comes first about as often."""
    firsts = Counter(shuffled(0, 8, seed) for seed in range(2000))
    assert set(firsts) == set(range(8))
    assert all(180 < count < 320 for count in firsts.values())
