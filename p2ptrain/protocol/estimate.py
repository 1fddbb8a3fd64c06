"""What something takes at most, as far as it was seen: the basis of every deadline that is derived.

The mean plus four mean deviations, as TCP sets its retransmission timeout (RFC 6298); a miss doubles it.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_BACKOFF = 6
"""Doublings of an estimate; 64 times it is another order of magnitude."""


@dataclass
class Estimate:
    """What something takes at most, as far as it was seen: mean + 4 mean deviations."""

    first: float
    """Taken while nothing was observed."""
    mean: float = 0.0
    deviation: float = 0.0
    seen: bool = False
    missed: int = 0

    def observe(self, value: float) -> None:
        """It took so much. (Jacobson and Karels' gains: 1/8 for the mean, 1/4 for the deviation.)"""
        if not self.seen:
            self.mean, self.deviation, self.seen = value, value / 2, True
        else:
            self.deviation += (abs(value - self.mean) - self.deviation) / 4
            self.mean += (value - self.mean) / 8
        self.missed = 0

    def miss(self) -> None:
        """It took longer than `bound`: allow twice as much until it is seen again."""
        self.missed = min(self.missed + 1, MAX_BACKOFF)

    @property
    def bound(self) -> float:
        """In the unit of what was observed."""
        return (self.mean + 4 * self.deviation if self.seen else self.first) * (1 << self.missed)


def clamp(least: float, value: float, most: float) -> float:
    """The value, within these bounds."""
    return max(least, min(value, most))
