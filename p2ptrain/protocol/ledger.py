"""The sample ledger: which samples have counted, and whose the next ones are.

With `data = "leased"` the samples of a run are numbered 0, 1, 2, … and each counts at most once (I4). Which
have is part of the state: every entry says where the data stands after it. Leases are not: they follow from
the last entry, so that everybody knows everybody's, no message hands them out, and no leader, old or new, can
give one out twice. A lease is for one step. What its holder does not bring in, being slow, late or dead, is
free again with the next entry.

    counted ▓, returned ░
    ▓▓▓▓▓▓▓▓▓▓▓▓░░░▓▓▓▓▓▓▓▓▓▓░░░░░░░░▓▓▓▓▓│ fresh …
                0            1    next ───┘2

Slot j begins with the j-th returned range and is filled up to as many as a peer may bring, so that anyone
alone can fill the step: with what else was returned, then with fresh samples. Slots belong to the roster of
the last entry, in the order in which it leads; the one after those to the leader, if it was not in it. Nobody
else has a lease: a newcomer brings no samples to its first round, and that entry gives it one. Slots are used
from their start, so there are never more returned ranges than there were slots in a step, nor more samples in
them than those held.

Not covered: whether a peer has really computed what it says; samples computed ahead of the last entry.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from blake3 import blake3

from p2ptrain.protocol.roster import leader_order
from p2ptrain.records import DataPosition, EntryHeader, PeerId

Ranges = tuple[tuple[int, int], ...]
"""Numbers of samples: each range from its start up to before its stop."""

START = DataPosition(next=0, returned=())

_ROUNDS = 4


@dataclass(frozen=True)
class Leases:
    """Who may take which samples in one step, from where the data stands."""

    data: DataPosition
    holders: tuple[PeerId, ...]
    """Of each slot."""
    size: int
    """Samples in each."""


@dataclass(frozen=True)
class Account:
    """What became of the samples before `DataPosition.next`."""

    unique: int
    """Counted."""
    lost: int
    """Taken out of the data and not counted: their gradient was not finite."""
    repeated: int
    """Counted again; 0, or the ledger is wrong."""
    returned: int
    """Leased and not brought in: they come next."""


def leases(last: EntryHeader | None, leader: PeerId, target: int) -> Leases:
    """Of the step that entry `last` led to, under that leader, in a run that began with that target batch
    size: twice as many samples each, or more where the organizer has announced that there will be."""
    if last is None:
        return Leases(data=START, holders=(leader,), size=2 * target)
    changes = last.terms.changes if last.terms is not None else ()
    targets = [int(change.value) for change in changes if change.key == "target_batch_size"]
    holders = leader_order(last.step + 1, last, (leader,))
    return Leases(data=last.data or START, holders=holders, size=2 * max(target, *targets, 0))


def lease(of: Leases, peer: PeerId) -> Ranges:
    """The samples that are that peer's in this step, in the order to take them; () if none are."""
    return _slots(of).get(peer, ())


def numbers(held: Ranges, first: int, count: int) -> list[int]:
    """The numbers of the `count` samples of a lease after its `first` ones; fewer at its end."""
    found: list[int] = []
    for start, stop in held:
        found += range(min(start + first, stop), min(start + first + count - len(found), stop))
        first = max(first - (stop - start), 0)
    return found


def prefix(held: Ranges, count: int) -> Ranges:
    """The first `count` samples of a lease. Raises ValueError if it has fewer."""
    taken = []
    for start, stop in held:
        if part := min(count, stop - start):
            taken.append((start, start + part))
            count -= part
    if count:
        raise ValueError(f"{count} samples more than the lease has")
    return tuple(taken)


def taken(of: Leases, counts: Mapping[PeerId, int]) -> Ranges:
    """The samples that an entry takes out of the data, in rising order: so many from the start of each peer's
    lease. Raises ValueError if that is more than it has."""
    slots = _slots(of)
    return _joined(part for peer, count in counts.items() for part in prefix(slots.get(peer, ()), count))


def after(of: Leases, counts: Mapping[PeerId, int]) -> DataPosition:
    """Where the data stands after that entry. Raises ValueError as `taken` does."""
    gone = taken(of, counts)
    end = max(of.data.next, gone[-1][1] if gone else 0)
    returned = list(_without((*of.data.returned, (of.data.next, end)), gone))
    if returned and returned[-1][1] == end:
        end = returned.pop()[0]
    return DataPosition(next=end, returned=tuple(returned))


def counts(
    roster: tuple[PeerId, ...], samples: tuple[int, ...], skipped: tuple[int, ...]
) -> dict[PeerId, int]:
    """How many samples of its lease each member of an entry has used, counted or skipped; `skipped` is empty
    if none were."""
    skipped = skipped or (0,) * len(roster)
    return {peer: count + over for peer, count, over in zip(roster, samples, skipped, strict=True)}


def follows(last: EntryHeader | None, header: EntryHeader, target: int) -> Ranges:
    """The samples that the entry takes out of the data, which stood where `last` left it.

    Raises ValueError if it takes what was not leased, or says that the data stands elsewhere after it.
    """
    of = leases(last, header.ballot.leader, target)
    used = counts(header.roster, header.samples, header.skipped)
    if header.data != (expected := after(of, used)):
        raise ValueError(f"after it the data stands at {expected}, and it says {header.data}")
    return taken(of, used)


def account(data: DataPosition, weight: int) -> Account:
    """Of a run that counts `weight` samples, and whose data stands there."""
    returned = sum(stop - start for start, stop in data.returned)
    spent = data.next - returned
    return Account(min(spent, weight), max(spent - weight, 0), max(weight - spent, 0), returned)


def shuffled(number: int, size: int, seed: int) -> int:
    """Which of `size` data the sample of that number is: in each pass, `size` samples, each once.

    The order is a Feistel network over the smallest even number of bits that holds `size`, walked until it
    falls within (Black and Rogaway 2002): it needs no memory, and anybody can begin anywhere in it.
    """
    passed, place = divmod(number, size)
    half = max((size - 1).bit_length() + 1, 2) // 2
    key = blake3(f"{seed}/{passed}".encode()).digest()
    while True:
        left, right = place >> half, place & ((1 << half) - 1)
        for turn in range(_ROUNDS):
            mixed = blake3(key + turn.to_bytes(1, "big") + right.to_bytes(8, "big")).digest()
            left, right = right, left ^ (int.from_bytes(mixed[:8], "big") & ((1 << half) - 1))
        place = left << half | right
        if place < size:
            return place


# -- inside --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _slots(of: Leases) -> Mapping[PeerId, Ranges]:
    """What each holder's lease is."""
    found: dict[PeerId, Ranges] = {}
    returned, slots = of.data.returned, len(of.holders)
    own = [(start, min(stop, start + of.size)) for start, stop in returned[:slots]]
    rest = deque((end, stop) for (_, end), (_, stop) in zip(own, returned, strict=False) if end < stop)
    rest += returned[slots:]
    rest.append((of.data.next, of.data.next + slots * of.size))
    for place, holder in enumerate(of.holders):
        held = own[place : place + 1]
        missing = of.size - sum(stop - start for start, stop in held)
        while missing:
            start, stop = rest.popleft()
            end = min(stop, start + missing)
            held.append((start, end))
            missing -= end - start
            if end < stop:
                rest.appendleft((end, stop))
        found[holder] = tuple(held)
    return found


def _joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same numbers in rising order, and in as few ranges as can be."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def _without(ranges: Iterable[tuple[int, int]], gone: Ranges) -> Iterator[tuple[int, int]]:
    """What is left of rising ranges without those in `gone`, which are rising, too."""
    for start, stop in ranges:
        for begin, end in gone:
            if end <= start or begin >= stop:
                continue
            if begin > start:
                yield start, begin
            start = end
        if start < stop:
            yield start, stop
