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
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from p2ptrain import events
from p2ptrain.config import Partition, RunConfig
from p2ptrain.gradients.accumulator import LARGEST_GRADIENT, Sent
from p2ptrain.gradients.codecs import Codec, codec_named
from p2ptrain.records import EntryHeader, PeerId
from p2ptrain.replica import strategy
from p2ptrain.replica.flat import FlatModel
from p2ptrain.replica.inner import InnerSteps, clip
from p2ptrain.replica.optimizers import FlatOptimizer, build_optimizer
from p2ptrain.replica.schedule import optimizer_for_batch
from p2ptrain.replica.strategy import Round, Told
from p2ptrain.replica.subspaces import (
    NOTHING,
    PROBE_VALUES,
    Cohesion,
    Probe,
    candidates,
    chosen,
    coordinates,
    owners,
    power,
    steps_behind,
    together,
    turn_of,
    union_of_mean,
    within,
)

if TYPE_CHECKING:  # it has a strategy
    from p2ptrain.replica.replica import Replica

GAMMA = "gamma"
"""The scalar of the state that says by what the last union was multiplied."""
COHESION_ROUNDS = 8
"""Over which is added up what parts gain alone and together: by one round it is mostly chance."""
MOST_CHANGE = 1e3
"""Of a loss, in nats: what is larger, or not a number, is as bad as that."""


# -- what a peer does to its part ----------------------------------------------------------------------------


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


# -- the strategy --------------------------------------------------------------------------------------------


class PartitionStrategy:
    """State: the optimizer's, and the last γ."""

    def __init__(self, run: RunConfig, flat: FlatModel) -> None:
        self.optimizer = build_optimizer(optimizer_for_batch(run), flat.tensors, flat.decayed)
        self.values = (1 + len(self.optimizer.state_tensors())) * flat.numel + PROBE_VALUES
        self.union: Union | None = None
        """What the last entry was, until the next one or another state."""
        self.cohesion: Cohesion | None = None
        """How well the parts of the entry before the last fitted together, as the last one tells."""
        self._run, self._flat = run, flat
        self._gamma = 0.0
        self._found_part: dict[tuple[int, int, int], Tensor] = {}

    def tensors(self) -> dict[str, Tensor]:
        return self.optimizer.state_tensors()

    def scalars(self) -> dict[str, float]:
        return self.optimizer.scalars() | {GAMMA: self._gamma}

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
        self.optimizer.load(tensors, scalars)
        self._gamma = scalars[GAMMA]
        self.union = self.cohesion = None

    def apply(self, mean: Tensor, run: RunConfig, header: EntryHeader, last: EntryHeader | None) -> None:
        """The union of what the owners of all parts did, or if there were none the mean of what everybody
        did."""
        brought = sum(count > 0 for count in header.samples)
        divided = last is not None and not set(last.roster).isdisjoint(header.roster)
        members = len(last.roster) if last is not None and divided else 1
        gamma, probe = 1.0, NOTHING
        if divided:
            union_of_mean(mean, header.total_samples).clamp_(-LARGEST_GRADIENT, LARGEST_GRADIENT)
            probe = Probe.of(mean[-PROBE_VALUES:].tolist())
            gamma = self._gamma = chosen(run.partition.gamma, members, probe, self._gamma)
        trained_before = sum(count > 0 for count in last.samples) if last is not None else 0
        self.cohesion = probe.cohesion(trained_before)

        change, *others = torch.split(mean[:-PROBE_VALUES], self._flat.numel)
        self._flat.parameters.add_(torch.mul(change, torch.tensor(gamma, dtype=torch.float32)))
        for (name, tensor), moved in zip(self.optimizer.state_tensors().items(), others, strict=True):
            tensor.add_(moved)
            if name == "square_mean":  # a rounding below zero would have no root
                tensor.clamp_(min=0.0)
        steps = steps_behind(header.total_samples, brought, run.partition.inner_batch_size)
        settings = optimizer_for_batch(run)
        powers = {
            name: value * power(getattr(settings, name.removesuffix("_power")), steps)
            for name, value in self.optimizer.scalars().items()
        }
        self.optimizer.load(self.optimizer.state_tensors(), powers)
        self.union = Union(change, gamma, members) if divided else None

    def contributor(
        self, replica: Replica, me: PeerId, probe: strategy.Probe, probes_every: int
    ) -> PartitionContributor:
        settings, parameters = self._run.partition, self._flat.parameters
        share = partial(self._share, replica, me)
        steps = PartSteps(settings, parameters, self._flat.apart(), self.values, share)
        return PartitionContributor(replica, self, steps, probe)

    def _share(self, replica: Replica, me: PeerId, orphaned: bool) -> Share:
        """What that peer trains in the step that the replica is at; everything, if nobody is there any more
        who owns a part."""
        last, settings = replica.last, self._run.partition
        divided = last is not None and not orphaned
        if last is None or orphaned:
            mine = torch.arange(self._flat.numel)
        elif me in last.roster:
            turn = turn_of(replica.position.step, settings.rotate_every)
            part = (len(last.roster), last.roster.index(me), turn)
            if part not in self._found_part:  # it is mostly that of the step before
                of = owners(settings.by, self._flat.tensors, part[0], self._run.seed, turn)
                self._found_part = {part: coordinates(of, part[1])}
            mine = self._found_part[part]
        else:
            mine = torch.empty(0, dtype=torch.int64)
        optimizer = replica.run_now.optimizer
        inner = build_optimizer(
            optimizer_for_batch(self._run), [(0, len(mine))], within(mine, self._flat.decayed)
        )
        state = {name: tensor[mine] for name, tensor in self.optimizer.state_tensors().items()}
        inner.load(state, self.optimizer.scalars())
        inner.weight_decay = optimizer.weight_decay
        return Share(mine, divided, inner, replica.learning_rate_now(), optimizer.clip_norm)


class PartitionContributor:
    """Steps of one's own, on what is one's own."""

    ahead = None
    judges_data = False

    def __init__(
        self, replica: Replica, strategy: PartitionStrategy, steps: PartSteps, probe: strategy.Probe
    ) -> None:
        self.gathered = steps
        self._replica, self._strategy, self._codec = replica, strategy, codec_named(replica.run.codec)
        self._probe = probe
        self._cohesions: deque[Cohesion] = deque(maxlen=COHESION_ROUNDS)
        """Of the last rounds."""
        self._gains_eaten = False
        self._gamma_told = 0.0

    def take(self, committed: Round) -> Told:
        header = committed.entry.header
        self._replica.apply(committed.entry)
        self.gathered.settle(self._codec, committed.sent)
        step, union = self._replica.position.step, self._strategy.union
        self.gathered.measure(partial(self._probe, step), union, step)
        if union is None:
            return Told(math.sqrt(math.fsum(header.squared_norms)))
        norm = float(torch.linalg.vector_norm(union.change))
        return Told(norm, events=tuple(self._cohesion_told(header.step, union)))

    def _cohesion_told(self, step: int, union: Union) -> list[events.Event]:
        """How the parts of the model were put together, when that has been measured or changes, and whether
        it is worth it."""
        before = self._strategy.cohesion
        if before is None and union.gamma == self._gamma_told:
            return []
        self._gamma_told = union.gamma
        united = events.PartsUnited(
            step=step,
            owners=union.members,
            gamma=union.gamma,
            union_change=None if before is None else before.union,
            parts_change=None if before is None else before.parts,
        )
        if before is None:
            return [united]
        self._cohesions.append(before)
        found, eaten_before = together(self._cohesions), self._gains_eaten
        self._gains_eaten = found.eats_the_gains
        if not found.eats_the_gains or eaten_before:
            return [united]
        eaten = events.GainsEaten(
            step=step, rounds=len(self._cohesions), parts_change=found.parts, defect=found.defect
        )
        return [united, eaten]

    def reset(self) -> None:
        self.gathered.reset()

    def rethink(self, orphaned: bool) -> Callable[[], None] | None:
        return None if orphaned == self.gathered.orphaned else partial(self.gathered.take_over, orphaned)
