"""Who reduces which slice of the gradient, and how a slice is cut into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


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
