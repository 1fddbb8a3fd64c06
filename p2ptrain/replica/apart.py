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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from p2ptrain import events
from p2ptrain.config import Local, Optimizer, RunConfig
from p2ptrain.gradients.accumulator import LARGEST_GRADIENT, Sent
from p2ptrain.gradients.codecs import Codec, codec_named
from p2ptrain.gradients.noise import Spread
from p2ptrain.records import EntryHeader, PeerId
from p2ptrain.replica.alternating import Alternating
from p2ptrain.replica.flat import FlatModel
from p2ptrain.replica.inner import InnerSteps, clip
from p2ptrain.replica.log import Entry
from p2ptrain.replica.optimizers import (
    CPU,
    FlatOptimizer,
    Ranges,
    build_optimizer,
    outer_optimizer,
    scaled,
)
from p2ptrain.replica.schedule import optimizer_for_batch
from p2ptrain.replica.strategy import Probe, Round, Told

if TYPE_CHECKING:  # it has a strategy
    from p2ptrain.replica.replica import Replica

# -- what a peer does alone ----------------------------------------------------------------------------------


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


# -- the strategy --------------------------------------------------------------------------------------------


class LocalStrategy:
    """State: the outer optimizer's. With adapters it steps their factors in turn, and so do those of the
    peers (`alternating`)."""

    def __init__(
        self, run: RunConfig, flat: FlatModel, step: Callable[[], int], warm: FlatOptimizer | None = None
    ) -> None:
        """`step`: of the replica, as of now; `warm`: by what the rounds of the warm-up were applied, if this
        replica took part in the last of them."""
        self.values = flat.numel
        self._run, self._flat, self._step, self._warm = run, flat, step, warm
        self.optimizer = self._built(outer_optimizer(run.local), ())

    def tensors(self) -> dict[str, Tensor]:
        return self.optimizer.state_tensors()

    def scalars(self) -> dict[str, float]:
        return self.optimizer.scalars()

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
        self.optimizer.load(tensors, scalars)
        self._warm = None

    def factor(self, header: EntryHeader) -> float:
        """What the entry's mean is multiplied by before it is applied."""
        local = self._run.local
        if local.weighting == "samples":
            return 1.0
        return effective_steps(header.samples, local.inner_batch_size)

    def apply(self, mean: Tensor, run: RunConfig, header: EntryHeader, last: EntryHeader | None) -> None:
        scaled(mean, self.factor(header))
        self.optimizer.step(self._flat.parameters, mean, run.local.outer_learning_rate)

    def show_average(self, mean: Tensor, header: EntryHeader) -> None:
        """Let the model have the mean of the peers' own parameters, by the `mean` in that entry (float32
        [numel], which is overwritten), until the next step or state."""
        self._flat.apart().copy_(torch.sub(self._flat.parameters, scaled(mean, self.factor(header))))

    def contributor(self, replica: Replica, me: PeerId, probe: Probe, probes_every: int) -> LocalContributor:
        return LocalContributor(replica, self, self._own_steps(replica), probe, probes_every)

    def _own_steps(self, replica: Replica) -> LocalSteps:
        """The state of the optimizer for these is this peer's own: that of the warm-up if it took part in its
        last round, else a fresh one."""
        working = self._flat.apart()
        inner = self._built(optimizer_for_batch(self._run), self._flat.decayed, working.device)
        if (warm := self._warm) is not None:
            load = inner.load_whole if isinstance(inner, Alternating) else inner.load
            load(warm.state_tensors(), warm.scalars())
            self._warm = None
        clip_norm = self._run.optimizer.clip_norm
        return LocalSteps(
            self._run.local, self._flat.parameters, working, inner, clip_norm, replica.learning_rate_now
        )

    def _built(self, config: Optimizer, decayed: Ranges, device: torch.device = CPU) -> FlatOptimizer:
        flat = self._flat
        if self._run.payload == "full":
            return build_optimizer(config, flat.tensors, decayed, device)

        def of_factor(start: int, stop: int) -> FlatOptimizer:
            tensors, shrinking = (
                [(a - start, b - start) for a, b in ranges if start <= a < stop]
                for ranges in (flat.tensors, decayed)
            )
            return build_optimizer(config, tensors, shrinking, device)

        return Alternating(flat.factors, of_factor, lambda: "ba"[self._step() % 2])


class LocalContributor:
    """Steps of one's own, on a copy of the parameters that every entry resets to what all have."""

    ahead = None
    judges_data = False
    """How far peers came apart from each other tells nothing of single samples."""

    def __init__(
        self, replica: Replica, strategy: LocalStrategy, steps: LocalSteps, probe: Probe, probes_every: int
    ) -> None:
        self.gathered = steps
        self._replica, self._strategy, self._codec = replica, strategy, codec_named(replica.run.codec)
        self._probe, self._probes_every = probe, probes_every

    def take(self, committed: Round) -> Told:
        entry, header = committed.entry, committed.entry.header
        found = agreement(header, committed.spread, self._strategy.factor(header))
        own, average = self._losses(entry)
        self._replica.apply(entry)
        self.gathered.settle(self._codec, committed.sent)
        averaged = events.CopiesAveraged(
            step=header.step,
            change_norm=found.norm,
            cosine=found.cosine,
            consensus_distance=found.consensus_distance,
            own_loss=own,
            average_loss=average,
        )
        return Told(math.sqrt(math.fsum(header.squared_norms)), events=(averaged,))

    def _losses(self, entry: Entry) -> tuple[float, float] | tuple[None, None]:
        """What averaging does to the loss, before the outer step: that of this peer's copy, if it has one,
        and of all copies' average, which the model has from then until the entry is applied."""
        every, replica = self._probes_every, self._replica
        if not self.gathered.samples or not every or (entry.header.step + 1) % every:
            return None, None
        own = self._probe(0)
        self._strategy.show_average(replica.mean_of(entry), entry.header)
        return own, self._probe(0)

    def reset(self) -> None:
        self.gathered.reset()

    def rethink(self, orphaned: bool) -> Callable[[], None] | None:
        return None
