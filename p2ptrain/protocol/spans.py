"""Who reduces which slice of the gradient, and how a slice is cut into chunks.

Not covered: a peer's rates up and down are not told apart, and neither are its links to single others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

MOST_OF_MEDIAN = 8.0
"""A rate counts for no more than so many medians: who boasts does not get to reduce everything."""
STEPS_PER_OCTAVE = 4
"""Of a rate in medians, which is rounded to them (by 9 % at most): spans stay where they are while measured
rates waver."""


def balanced(rates: Sequence[float]) -> list[float]:
    """Shares of the gradient, 1 in sum, with which members that send at these rates end as early as can be.

    `rates`: bytes per second in roster order, 0 for unknown, which counts as the median. Of n members, one
    with share x sends 1 - x to the other reducers and x to each of the n - 1 others: 1 + (n - 2) x of the
    gradient in all, and receives as much. Whoever takes longer than the others with no share at all gets
    none; those that have one end together. This is the optimum of the linear program that minimises the
    longest time, and then the next longest; with two members, shares change nothing and are equal.
    """
    members = len(rates)
    known = sorted(rate for rate in rates if rate > 0)
    if members < 3 or not known:
        return [1 / members] * members
    usual = known[(len(known) - 1) // 2]
    each = [_rounded(min(rate / usual, MOST_OF_MEDIAN)) if rate > 0 else 1.0 for rate in rates]
    fastest_first, sum_of_rates = sorted(each, reverse=True), 0.0
    for count, rate in enumerate(fastest_first, 1):
        sum_of_rates += rate
        ends = (members - 2 + count) / sum_of_rates  # if only these have shares
        if count == members or fastest_first[count] * ends <= 1:
            break
    return [max(rate * ends - 1, 0.0) / (members - 2) for rate in each]


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


def _rounded(medians: float) -> float:
    return math.exp2(round(STEPS_PER_OCTAVE * math.log2(medians)) / STEPS_PER_OCTAVE)
