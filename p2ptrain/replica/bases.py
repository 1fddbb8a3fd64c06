"""Where a replica can go back to: the state that it had before the newest lie that may still come to light.

A lie is found within a few steps of it, as long as there is somebody to look. So a state whose entries have
stood for `SETTLED_SECONDS` counts as audited, and the newest such state is kept; while a newer one is
settling, both are.

Not covered: going back. That takes the state, and the entries of the log that follow it.
"""

from __future__ import annotations

from p2ptrain.records import Position
from p2ptrain.replica.snapshot import Snapshot

SETTLED_SECONDS = 60.0
"""Audits ask three times within 5 s and give an answer 30 s."""
PERIOD_SECONDS = 300.0
"""Between two such states: what a proven lie costs at most, if the log does not reach back to them."""


class Bases:
    """At most two states, the older one audited. Told the time, and decides nothing else."""

    def __init__(self) -> None:
        self._kept: list[tuple[Snapshot, float]] = []

    def due(self, now: float) -> bool:
        """Whether the state as it is now shall be kept."""
        if self._kept and now - self._kept[-1][1] >= SETTLED_SECONDS:
            del self._kept[:-1]
        return not self._kept or (len(self._kept) == 1 and now - self._kept[0][1] >= PERIOD_SECONDS)

    def keep(self, snapshot: Snapshot, now: float) -> None:
        """This is the state now."""
        self._kept.append((snapshot, now))

    def clear(self) -> None:
        """The replica has come by another state than its log led to."""
        self._kept.clear()

    def before(self, step: int) -> Snapshot | None:
        """The newest kept state at that step or an earlier one; what is newer is forgotten."""
        self._kept = [each for each in self._kept if each[0].position.step <= step]
        return self._kept[-1][0] if self._kept else None

    @property
    def positions(self) -> list[Position]:
        """Of the kept states, oldest first."""
        return [snapshot.position for snapshot, _ in self._kept]
