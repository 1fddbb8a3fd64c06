"""Who reduces which slice of the gradient, and how a slice is cut into chunks.

Not covered: a peer's rates up and down are not told apart, and neither are its links to single others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

MOST_OF_MEDIAN = 8.0
"""A rate counts for no more than so many medians: who boasts does not get to reduce everything."""
LEAST_OF_MEDIAN = 2.0**-12
"""And for no less: at that, there is nothing to reduce anyway."""
STEPS_PER_OCTAVE = 4
"""Of a rate in medians, which is rounded to them (by 9 % at most): spans stay where they are while measured
rates waver, and a rate can travel as one letter."""
LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_MEDIAN = 48
"""The letter of the median rate, by its place; the least and the most are 48 below and 12 above it."""
_IN_OCTAVE = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
"""As literals: what a machine's own `exp2` says may be off by a bit, and all must find the same spans."""
WORTH_IT = 1.25
"""Unequal spans must promise to end a round so many times sooner than equal ones. A rate is known within a
fifth at best, and one that is wrong by a fifth can make a span twice as large as it should be."""
NO_REDUCER = "-"
"""Of a member that reduces nothing, whatever its rate."""


def levels(rates: Sequence[float | None]) -> str:
    """The rates as they count, a letter each: in quarter octaves around the median of those that are known.

    `rates`: bytes per second in roster order, 0 for unknown, which counts as the median; None for a member
    that wants to reduce nothing, which is heeded as long as others do.
    """
    known = sorted(rate for rate in rates if rate)
    usual = known[(len(known) - 1) // 2] if known else 1.0
    all_clients = all(rate is None for rate in rates)
    letters = []
    for rate in rates:
        if rate is None and not all_clients:
            letters.append(NO_REDUCER)
            continue
        medians = max(LEAST_OF_MEDIAN, min(rate / usual, MOST_OF_MEDIAN)) if rate else 1.0
        letters.append(LETTERS[_MEDIAN + round(STEPS_PER_OCTAVE * math.log2(medians))])
    return "".join(letters)


@lru_cache(maxsize=64)  # rosters and rates change less often than attempts are made
def shares(levels: str) -> tuple[float, ...]:
    """Shares of the gradient, 1 in sum, with which members of these levels end as early as can be; the same
    on every machine, to the bit. Raises ValueError for what is no level, or if nobody reduces.

    Of n members, one with share x sends 1 - x to the other reducers and x to each of the n - 1 others:
    1 + (n - 2) x of the gradient in all, and receives as much. Whoever takes longer than the others with no
    share at all gets none; those that have one end together. This is the optimum of the linear program that
    minimises the longest time, and then the next longest. Where it is not `WORTH_IT`, shares are equal; with
    two members they change nothing.
    """
    members, reducers = len(levels), len(levels) - levels.count(NO_REDUCER)
    each = [0.0 if x == NO_REDUCER else _medians(LETTERS.index(x) - _MEDIAN) for x in levels]
    if not reducers:
        raise ValueError("nobody reduces")
    equal = tuple(1 / reducers if rate else 0.0 for rate in each)
    if members < 3:
        return equal
    fastest_first, sum_of_rates = sorted(each, reverse=True), 0.0
    for count, rate in enumerate(fastest_first[:reducers], 1):
        sum_of_rates += rate
        ends = (members - 2 + count) / sum_of_rates  # if only these have shares
        if count == reducers or fastest_first[count] * ends <= 1:
            break
    slowest = fastest_first[reducers - 1]
    ends_equal = (1 + (members - 2) / reducers) / slowest
    if ends_equal <= WORTH_IT * max(ends, 1 / slowest):
        return equal
    return tuple(max(rate * ends - 1, 0.0) / (members - 2) for rate in each)


def balanced(rates: Sequence[float | None]) -> tuple[float, ...]:
    """`shares` of the `levels` of these rates."""
    return shares(levels(rates))


def moved_bytes(members: int, encoded_bytes: int) -> float:
    """What a member of a round sends, and receives as well, if all have equal shares: 2 (n − 1) / n of the
    encoded gradient."""
    return 2 * (members - 1) / members * encoded_bytes


def share_out(values: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Boundaries of `len(shares)` spans over `values` values, in proportion to `shares` (> 0 in sum).

    The first boundary is 0 and the last `values`; a share of 0 gives an empty span.
    """
    total = sum(shares)
    if total <= 0 or min(shares) < 0:
        raise ValueError(f"shares must be non-negative with a positive sum, not {tuple(shares)}")
    return (0, *(round(values * part / total) for part in accumulate(shares)))


def chunk_ranges(start: int, stop: int, chunk_values: int) -> list[tuple[int, int]]:
    """[start, stop) cut into chunks of `chunk_values` values, the last one possibly shorter."""
    return [(at, min(at + chunk_values, stop)) for at in range(start, stop, chunk_values)]


def chunk_count(start: int, stop: int, chunk_values: int) -> int:
    """How many chunks `chunk_ranges` gives."""
    return -(-(stop - start) // chunk_values)


def _medians(steps: int) -> float:
    octaves, step = divmod(steps, STEPS_PER_OCTAVE)
    return math.ldexp(_IN_OCTAVE[step], octaves)
