"""Which target batch pays: the arithmetic of `p2ptrain batch advise`.

To reach one loss takes Smin (1 + Bc/B) steps of B samples, so Emin (1 + B/Bc) samples in all, where Bc is the
critical batch (McCandlish et al. 2018, "An empirical model of large-batch training"). Where each step also
costs a round of c seconds, and all peers together compute R samples a second, the time

    Smin (1 + Bc/B) (c + B/R)

is shortest at B* = √(c R Bc), between the critical batch and the samples that a round costs. With `delay` a
step takes the longer of the two times, max(c, B/R), and the best batch just hides the round.

Not covered: that Bc itself grows while the loss falls, and learning rates, which follow the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchAdvice:
    """The present batch beside the best one; times in seconds, batches in samples."""

    batch_size: int
    best_batch_size: float
    critical_batch_size: float
    round_seconds: float
    samples_per_second: float
    """Of all peers together."""
    steps_factor: float
    """1 + Bc/B: steps at the present batch, over the fewest there could be."""
    samples_factor: float
    """1 + B/Bc: samples at the present batch, over the fewest there could be."""
    more_time: float
    """By what share the present batch takes longer than the best one to the same loss."""
    more_samples: float
    """By what share it takes more samples, less than 0 for fewer."""


def advise(
    *, batch_size: int, critical: float, round_seconds: float, samples_per_second: float, delay: int = 0
) -> BatchAdvice:
    """All arguments but `round_seconds`, which may be 0, are more than 0."""
    round_samples = round_seconds * samples_per_second
    best = round_samples if delay else math.sqrt(round_samples * critical)
    best = max(best, 1.0)

    def seconds(batch: float) -> float:
        return step_seconds(batch, round_seconds, samples_per_second, delay) * (1 + critical / batch)

    return BatchAdvice(
        batch_size=batch_size,
        best_batch_size=best,
        critical_batch_size=critical,
        round_seconds=round_seconds,
        samples_per_second=samples_per_second,
        steps_factor=1 + critical / batch_size,
        samples_factor=1 + batch_size / critical,
        more_time=seconds(batch_size) / seconds(best) - 1,
        more_samples=(1 + batch_size / critical) / (1 + best / critical) - 1,
    )


def step_seconds(batch: float, round_seconds: float, samples_per_second: float, delay: int) -> float:
    """What one step takes."""
    compute = batch / samples_per_second
    return max(compute, round_seconds) if delay else compute + round_seconds
