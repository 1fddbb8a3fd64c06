"""Strategy `sync`: everyone's gradients are averaged, and all take one step of the optimizer by their mean.

Between two rounds a peer sums its samples' gradients, and with `delay` those for the next step while this
one's round is under way. How far gradients are apart says how large a batch pays, and whose data are unlike
(`gradients.noise`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from p2ptrain import events
from p2ptrain.config import RunConfig
from p2ptrain.gradients.accumulator import Accumulator
from p2ptrain.gradients.codecs import codec_named
from p2ptrain.gradients.noise import NoiseMeter
from p2ptrain.records import EntryHeader, PeerId
from p2ptrain.replica.flat import FlatModel
from p2ptrain.replica.optimizers import build_optimizer, clip_factor, scaled
from p2ptrain.replica.outer import Outer
from p2ptrain.replica.schedule import learning_rate, optimizer_for_batch
from p2ptrain.replica.strategy import Probe, Round, Told

if TYPE_CHECKING:  # it has a strategy
    from p2ptrain.replica.replica import Replica


class SyncStrategy:
    """State: the optimizer's, and that of the second momentum around it if the run has one."""

    def __init__(self, run: RunConfig, flat: FlatModel) -> None:
        self.values = flat.numel
        self.optimizer = build_optimizer(optimizer_for_batch(run), flat.tensors, flat.decayed)
        self._parameters = flat.parameters
        self._outer = Outer(run.sync.outer, flat.parameters) if run.sync.outer.every else None

    def tensors(self) -> dict[str, Tensor]:
        outer = {} if self._outer is None else self._outer.state_tensors()
        return self.optimizer.state_tensors() | outer

    def scalars(self) -> dict[str, float]:
        return self.optimizer.scalars()

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
        self.optimizer.load(tensors, scalars)
        if self._outer is not None:
            self._outer.load(tensors)

    def apply(self, mean: Tensor, run: RunConfig, header: EntryHeader, last: EntryHeader | None) -> None:
        scaled(mean, clip_factor(header.squared_norms, run.optimizer.clip_norm))
        self.optimizer.weight_decay = run.optimizer.weight_decay
        self.optimizer.step(self._parameters, mean, learning_rate(run, header.step))
        if self._outer is not None:
            self._outer.after(header.step + 1, self._parameters)

    def contributor(self, replica: Replica, me: PeerId, probe: Probe, probes_every: int) -> SyncContributor:
        return SyncContributor(replica)


class SyncContributor:
    """Sums of gradients."""

    def __init__(self, replica: Replica) -> None:
        run, there = replica.run, replica.gradient.device
        device = None if there.type == "cpu" else there
        self.gathered = Accumulator(replica.numel, device)
        self.ahead = Accumulator(replica.numel, device) if run.delay else None
        if run.audit:
            self.gathered.keep_one_more()
        self._replica, self._codec, self._noise = replica, codec_named(run.codec), NoiseMeter()

    @property
    def judges_data(self) -> bool:
        return not self._noise.duplicates

    def take(self, committed: Round) -> Told:
        header = committed.entry.header
        self._replica.apply(committed.entry)
        within = self.gathered.settle(self._codec, committed.sent)
        if self.ahead is not None:
            self.gathered.absorb(self.ahead)
        reading = self._noise.round(committed.spread, within)
        norm = math.sqrt(math.fsum(header.squared_norms))
        alarm = events.DataDuplicated(step=header.step, noise_excess=reading.excess)
        clip_norm = self._replica.run_for(header).optimizer.clip_norm
        return Told(norm, 0 < clip_norm < norm, reading, (alarm,) if reading.duplicated else ())

    def reset(self) -> None:
        self.gathered.reset()
        if self.ahead is not None:
            self.ahead.reset()

    def rethink(self, orphaned: bool) -> Callable[[], None] | None:
        return None
