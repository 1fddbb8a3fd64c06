"""What became of leased samples, added up from the ranges that each round took, as journals tell of them.

The protocol's own account is in every entry; this one believes nothing of it but the ranges, and so can find
that a sample counted twice or was forgotten.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from peers.chronicle import Record


@dataclass(frozen=True)
class Data:
    """The samples up to the last one that a round took."""

    unique: int
    """In a round that counts."""
    repeated: int
    """In another one as well."""
    lost: int
    """In none, and never to be given out again."""
    returned: int
    """Leased and not brought in: they come next."""


@dataclass(frozen=True)
class _Round:
    step: int
    parent: str
    taken: tuple[tuple[int, int], ...]
    skipped: int
    """By this and all rounds before it."""
    returned: int


@dataclass
class Passes:
    """The leased samples of all rounds that were told of, on whatever lineage."""

    _rounds: dict[str, _Round] = field(default_factory=dict)  # by the lineage that it led to

    def observe(self, record: Record) -> None:
        """The next line of some peer's journal."""
        match record:
            case {"event": "round_committed", "lineage": lineage, "taken": [_, *_] as taken}:
                ranges = tuple((start, stop) for start, stop in taken)
                self._rounds[lineage] = _Round(
                    record["step"], record["parent"], ranges, record["lost"], record["returned"]
                )

    def account(self, held: Collection[str]) -> Data | None:
        """Of the longest log that ends with one of these lineages; None if no samples were leased in it."""
        last = max(held & self._rounds.keys(), key=lambda each: self._rounds[each].step, default=None)
        if last is None:
            return None
        end = self._rounds[last]
        ranges: list[tuple[int, int]] = []
        at: str | None = last
        while at is not None and (each := self._rounds.get(at)) is not None:
            ranges += each.taken
            at = each.parent
        repeated, stop = 0, 0
        gaps = 0
        for start, end_of_range in sorted(ranges):
            gaps += max(start - stop, 0)
            repeated += max(min(stop, end_of_range) - start, 0)
            stop = max(stop, end_of_range)
        taken = stop - gaps
        return Data(
            unique=taken - end.skipped,
            repeated=repeated,
            lost=end.skipped + max(gaps - end.returned, 0),
            returned=end.returned,
        )
