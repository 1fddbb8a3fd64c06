"""Strategy `partition`: what a peer does alone to the part that it owns, and what it brings to a round.

A peer takes steps of its own, as with strategy `local`, but only on its coordinates: these, and the
optimizer's state for them, are taken out into short vectors, so nothing that the optimizer does, decay and
momentum included, can reach any other. What it brings is how far all of them went, zero elsewhere:

    change of θ │ change of each vector of the optimizer's state │ `Probe`

It is brought as if it were the sum over one sample, since what is wanted is a sum over peers
(`subspaces.union_of_mean`). The optimizer's state travels in every round and is part of the replicated state:
a part may have another owner after any round, as somebody may have come or gone, and goes on where it stood.

At step 0 nobody owns anything yet, nor does anybody who is there when all owners have gone. Then everyone
trains everything, and it is averaged by samples.

Not covered: sending only what is not zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2ptrain.config import Partition
from p2ptrain.gradients.accumulator import LARGEST_GRADIENT, Sent
from p2ptrain.gradients.codecs import Codec
from p2ptrain.replica.inner import InnerSteps, clip
from p2ptrain.replica.optimizers import FlatOptimizer
from p2ptrain.replica.subspaces import NOTHING, PROBE_VALUES, Probe, candidates

PROBE, PROBE_SAMPLES = "probe", 32
"""The peer by whose name, and how many, samples of each step are drawn that nobody trains on: the same for
all who have the same data."""
MOST_CHANGE = 1e3
"""Of a loss, in nats: what is larger, or not a number, is as bad as that."""


@dataclass(frozen=True)
class Share:
    """What a peer trains in one step of the run, and how."""

    coordinates: Tensor
    """int64, rising; empty: nothing."""
    divided: bool
    """Whether each coordinate has one owner; else all train all."""
    optimizer: FlatOptimizer
    """For these coordinates alone, with the state that they have."""
    rate: float
    clip_norm: float


@dataclass(frozen=True)
class Union:
    """What the last round was: θ ← θ + gamma · change."""

    change: Tensor
    """float32 [numel]."""
    gamma: float
    members: int
    """That owned parts."""


class PartSteps(InnerSteps):
    """`total` is what this peer's own steps changed, at its coordinates."""

    def __init__(
        self,
        settings: Partition,
        anchor: Tensor,
        working: Tensor,
        values: int,
        share: Callable[[bool], Share],
    ) -> None:
        """`anchor`: θ, the replica's parameters; `working`: those of the model, which whoever moves the
        anchor resets to a copy of it; `values` are brought; `share`: this peer's, as things stand, if
        nobody is left who owns anything (true) or somebody is."""
        super().__init__(settings.inner_batch_size, working)
        self.total = torch.zeros(values, dtype=anchor.dtype)
        self._settings = settings
        self._anchor, self._share_now = anchor, share
        self._before: Share | None = None
        self._begin()

    def _begin(self, *, orphaned: bool = False) -> None:
        super()._begin()
        self.share = share = self._share_now(orphaned)
        self.orphaned = orphaned
        self._there = share.coordinates.to(self._working.device)
        self._theta = self._anchor[share.coordinates]
        self._start = [
            self._theta.clone(),
            *(each.clone() for each in share.optimizer.state_tensors().values()),
        ]
        self.probe = NOTHING

    @property
    def room(self) -> int:
        """Samples that the inner batch under way still takes; 0: this peer owns nothing in this step."""
        return super().room if len(self.share.coordinates) else 0

    def _step(self, mean: Tensor) -> None:
        # The norm is that of the whole gradient, so that a short step is as short as with strategy `sync`.
        clip(mean, self.share.clip_norm)
        self.share.optimizer.step(self._theta, mean[self._there].to(self._theta.device), self.share.rate)
        self._working[self._there] = self._theta.to(self._working.device)

    def gather(self) -> None:
        """Bring `total` up to date. Nothing may be added meanwhile."""
        share, numel = self.share, len(self._anchor)
        now = [self._theta, *share.optimizer.state_tensors().values()]
        self.total.zero_()
        for section, (after, before) in enumerate(zip(now, self._start, strict=True)):
            change = (after - before).clamp_(-LARGEST_GRADIENT, LARGEST_GRADIENT)
            if not share.divided:
                change.mul_(self.samples)
            self.total[section * numel : (section + 1) * numel][share.coordinates] = change
        if share.divided:
            self.total[-PROBE_VALUES:] = torch.tensor(self.probe.values(), dtype=self.total.dtype)
        self._stale = False

    def settle(self, codec: Codec, sent: Iterable[Sent]) -> None:
        """The round is committed, and `codec` has lost nothing. What an inner batch under way has so far is
        dropped: it is of parameters that are no more."""
        self._before = self.share if self.share.divided and self.samples else None
        self._begin()

    def reset(self) -> None:
        """Nothing brought yet, wherever the replica is now."""
        self._before = None
        self._begin()

    def take_over(self, orphaned: bool) -> None:
        """Begin the step anew with what is this peer's if nobody is left who owns anything, or somebody is
        after all."""
        self._working.copy_(self._anchor)
        self._begin(orphaned=orphaned)

    def measure(self, loss: Callable[[], float], union: Union | None, step: int) -> None:
        """Find out what the round that led to this step, if it is the turn of that, did to the `loss` that
        the model has, and bring it to this round. Before the first sample is added."""
        if union is None or step % self._settings.probe_every or not self.share.divided:
            return
        origin = torch.sub(self._anchor, union.change, alpha=union.gamma)
        at = self._at(origin, None, loss)
        tried: Sequence[float] = candidates(union.members) if self._settings.gamma == "auto" else (1.0,)
        whole = [_bounded(self._at(origin, union.change * times, loss) - at) for times in tried]
        alone, parts = 0.0, 0.0
        if self._before is not None:
            part = torch.zeros_like(union.change)
            mine = self._before.coordinates
            part[mine] = union.change[mine]
            alone, parts = _bounded(self._at(origin, part, loss) - at), 1.0
        self._working.copy_(self._anchor)
        whole += [0.0] * (4 - len(whole))
        self.probe = Probe.of([1.0, *whole, parts, alone])

    def _at(self, origin: Tensor, change: Tensor | None, loss: Callable[[], float]) -> float:
        self._working.copy_(origin if change is None else change.add_(origin))
        return loss()


def _bounded(change: float) -> float:
    return min(max(change, -MOST_CHANGE), MOST_CHANGE) if math.isfinite(change) else MOST_CHANGE
