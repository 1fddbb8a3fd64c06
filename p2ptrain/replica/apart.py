"""Strategy `local`: what a peer does alone between two averages, and what it brings to the next one.

Each peer takes steps of its own from the swarm's parameters θ (McMahan et al. 2017; Douillard et al. 2023)
and brings how far they led, Δ = θ - θ_peer, times its samples, which is to a round what a sum of gradients
is: the mean over all samples is Σ p·Δ with p its share of them. The replicas apply that as if it were a
gradient, by SGD with momentum, the outer optimizer. One step, plain SGD and an outer rate of 1 make it
strategy `sync`.

Peers of unlike speed take unlike numbers of steps. Weighted by samples, the fast ones pull the result towards
where they alone would go; `fednova` (Wang et al. 2020) divides each Δ by its number of steps first. As all
inner batches have one size, samples ÷ steps is the same for everyone, and what the sum must be multiplied by
in the end follows from the sample counts in the entry (`effective_steps`).

The state of the inner optimizer is this peer's own: it is in no snapshot, and who joins starts with a fresh
one. It lies where the model is, and need not round alike everywhere.

How far the copies came apart shows in each round for nothing: `agreement`.

Not covered: layers with running statistics, which `Replica` refuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2ptrain.config import Local
from p2ptrain.gradients.accumulator import LARGEST_GRADIENT, Sent
from p2ptrain.gradients.codecs import Codec
from p2ptrain.gradients.noise import Spread
from p2ptrain.records import EntryHeader
from p2ptrain.replica.inner import InnerSteps, clip
from p2ptrain.replica.optimizers import FlatOptimizer


def effective_steps(samples: Sequence[int], inner_batch_size: int) -> float:
    """Σ p·steps over the roster: how many inner steps an average of `fednova` stands for."""
    return math.fsum(count * count for count in samples) / (sum(samples) * inner_batch_size)


@dataclass(frozen=True)
class Agreement:
    """How peers' ways from the common parameters, Δ_i with shares p_i, were to each other in a round."""

    norm: float
    """‖Σ p·Δ‖, of the pseudo-gradient."""
    cosine: float | None
    """Mean cosine between two peers' ways, where they are of equal length; else the long ones count for more.
    1: all went the same way. None if fewer than two brought any, or the codec hides it."""
    consensus_distance: float | None
    """√Σ p·‖θ_i - Σ p·θ‖²: how far a copy was from the average of all, before that replaced it."""


def agreement(header: EntryHeader, spread: Spread | None, factor: float) -> Agreement:
    """From what the round measured anyway; `factor` is what the entry's mean is multiplied by when it is
    applied, and with it everything that is a length here."""
    norm = factor * math.sqrt(math.fsum(header.squared_norms))
    if spread is None:
        return Agreement(norm, None, None)
    squares = math.fsum((count / header.total_samples) ** 2 for count in header.samples)
    together, each = spread.of_mean, spread.of_groups
    cosine = (together - squares * each) / ((1 - squares) * each) if each else None
    return Agreement(norm, cosine, factor * math.sqrt(max(each - together, 0.0)))


class LocalSteps(InnerSteps):
    """`total` (float32 [numel]) is how far this peer's own steps led, times its samples."""

    def __init__(
        self,
        settings: Local,
        anchor: Tensor,
        working: Tensor,
        optimizer: FlatOptimizer,
        clip_norm: float,
        rate: Callable[[], float],
    ) -> None:
        """`anchor`: θ, the replica's parameters; `working`: those of the model, which start as a copy of it
        and are reset to one by whoever moves the anchor; `rate`: the inner learning rate as of now."""
        super().__init__(settings.inner_batch_size, working)
        self.total = torch.zeros_like(anchor)
        self._settings, self._anchor = settings, anchor
        self._optimizer, self._clip_norm, self._rate = optimizer, clip_norm, rate
        self._owed: Tensor | None = None

    def _step(self, mean: Tensor) -> None:
        clip(mean, self._clip_norm)
        self._optimizer.step(self._working, mean, self._rate())

    def gather(self) -> None:
        """Bring `total` up to date. Nothing may be added meanwhile. If this peer's own steps have led to what
        is not finite, it brings nothing (I5), and begins anew when its model is reset."""
        times = self.samples if self._settings.weighting == "samples" else self._settings.inner_batch_size
        torch.sub(self._anchor, self._working.to(self._anchor.device), out=self.total)
        self.total.mul_(times)
        if self._owed is not None:
            self.total.add_(self._owed)
        if not bool(self.total.isfinite().all()):
            self._begin()
            return
        self.total.clamp_(-LARGEST_GRADIENT, LARGEST_GRADIENT)
        self._stale = False

    def settle(self, codec: Codec, sent: Iterable[Sent]) -> None:
        """The round is committed, and the total is in it as `sent`: as `Accumulator.settle`. What an inner
        batch under way has so far is dropped: it is of parameters that are no more."""
        if codec.feedback and self.samples:
            self._owed = self.total.clone() if self._owed is None else self._owed.copy_(self.total)
            for start, stop, data in sent:
                decoded = torch.empty(stop - start)
                codec.decode(data, decoded)
                self._owed[start:stop].sub_(decoded)
        self._begin()

    def reset(self) -> None:
        """Nothing brought yet, and nothing owed."""
        self._owed = None
        self._begin()
