"""Micro-batches: how large the next one is, the one under way, and whether it still counts when it ends.

One is under way at most, on the compute thread, and it is not interrupted: what has become too old when it
ends is thrown away. It takes what a volunteer's device takes, so its time is measured, and told to whoever
leads the round.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from p2ptrain import events
from p2ptrain.config import RunConfig
from p2ptrain.errors import DeviceError
from p2ptrain.gradients.engine import Engine, LossSum, chance_of
from p2ptrain.protocol.ledger import Ranges
from p2ptrain.records import PeerId
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.strategy import Gathered
from p2ptrain.training.hands import Hands, now
from p2ptrain.training.samples import Samples

MOST_NONFINITE = 20
"""Micro-batches without a finite gradient in a row, after which this peer gives up: nothing it computes
counts."""


def fitting_batch_size(size: int, brought: int, most: int) -> int:
    """Samples in the next micro-batch, after a step to which this peer brought so many: half of them, if its
    micro-batches outlast the step and nothing it computes counts; twice as many, up to what the device is
    given at once, where several fit into one."""
    if not brought:
        return max(size // 2, 1)
    return min(2 * size if brought >= 4 * size else size, most)


class Batches:
    """The micro-batches of one peer."""

    def __init__(
        self,
        run: RunConfig,
        me: PeerId,
        replica: Replica,
        engine: Engine,
        samples: Samples,
        loss_sum: LossSum,
        hands: Hands,
    ) -> None:
        self._run, self._me, self._replica, self._engine = run, me, replica, engine
        self._samples, self._loss_sum, self._hands = samples, loss_sum, hands
        self.took: Callable[[float], object] = lambda seconds: None
        """Told how long each one took."""
        self.size = engine.most_samples
        """Samples in the next one, if there are as many."""
        self.compute_seconds = 0.0
        """Of those that ended since the last step."""
        self.usual_seconds = 0.0
        """Of one of the size of the last; 0 before the first has ended."""
        self.under_way: asyncio.Future[tuple[float, float]] | None = None
        self._void: asyncio.Future[tuple[float, float]] | None = None
        self._most = self._count = engine.most_samples
        """What the engine takes at once, and samples in the one under way."""
        self._step, self._began = 0, 0.0
        self._nonfinite = 0
        """In a row."""

    def begin(self, most: int) -> None:
        """One of at most so many samples, for the step that the replica is at."""
        count, step = min(self.size, most), self._replica.position.step
        if count != self._count:
            self.usual_seconds *= count / self._count
            self._count = count
        self._step, self._began = step, now()
        lease, first = self._samples.lease, self._samples.next(count)
        self.under_way = asyncio.ensure_future(self._timed_gradients(step, first, count, lease))

    async def ends(self, change: Awaitable[object]) -> bool:
        """Wait for the one under way, or that change; True for the first of these."""
        assert self.under_way is not None
        other = asyncio.ensure_future(change)
        waiting: list[asyncio.Future[Any]] = [self.under_way, other]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            other.cancel()
        return self.under_way.done()

    def void(self) -> None:
        """The one under way, if any, will not count: its samples are drawn anew, or are others' by now, so
        they would count twice (I4)."""
        self._void = self.under_way

    def counts_for(self, step: int) -> bool:
        """Whether the one under way may count for that step: it is not older than the run allows."""
        if self.under_way is None or self.under_way is self._void:
            return False
        return step - self._step <= self._run.delay

    def in_flight(self, step: int) -> tuple[int, float]:
        """Samples under way that may count for that step, and in how many seconds they are done."""
        if not self.counts_for(step):
            return 0, 0.0
        return self._count, max(self._began + self.usual_seconds - now(), 0.0)

    async def take(self, into: Gathered, step: int) -> bool:
        """Add the one that has ended to what is gathered for that step; False if it is too old for that.
        Raises DeviceError if too many in a row were not finite."""
        assert self.under_way is not None
        counts = self.counts_for(step)
        batch, self.under_way = self.under_way, None
        loss_sum, ended = await batch
        count = self._count
        if not counts:
            self._wasted(count, events.WasteCause.LATE)
            return False
        took = ended - self._began
        self.compute_seconds += took
        self.took(took)
        self.usual_seconds = took if not self.usual_seconds else 0.7 * self.usual_seconds + 0.3 * took
        self._heed_shrinking()
        counted = into.samples
        if await self._hands.compute(into.add, self._replica.gradient, count, loss_sum):
            self._nonfinite = 0
        else:
            self._wasted(count, events.WasteCause.NONFINITE)
            self._samples.spoilt(count)
            self._nonfinite += 1
            if self._nonfinite >= MOST_NONFINITE:
                raise DeviceError(
                    f"the gradients of {self._nonfinite} micro-batches in a row were not finite, so nothing "
                    f"that this peer computes counts; look for numbers that are not finite in its data, set "
                    'precision = "fp32" in the peer file, or tell the organizer that the learning rate is '
                    "too high"
                )
        if into.counts_each or into.samples > counted:
            self._samples.skipped_for_good = self._samples.skipped
        return True

    def fit(self, brought: int) -> None:
        """A step is over, to which this peer brought so many samples."""
        self.size = fitting_batch_size(self.size, brought, self._engine.most_samples)

    async def close(self) -> None:
        """Wait until nothing is computed any more."""
        if self.under_way is not None:
            await asyncio.wait([self.under_way])

    async def _timed_gradients(self, step: int, first: int, count: int, held: Ranges) -> tuple[float, float]:
        """Σ of losses, and when it ended: with `delay` it may be taken later."""
        return await self._hands.compute(self._gradients, step, first, count, held), now()

    def _gradients(self, step: int, first: int, count: int, held: Ranges) -> float:
        """On the compute thread: Σ of the samples' gradients into `replica.gradient`; returns Σ of their
        losses."""
        return self._engine.gradients(
            partial(self._samples.batch, step, held),
            self._loss_sum,
            first,
            count,
            chance_of(self._run.seed, step, self._me, first),
        )

    def _heed_shrinking(self) -> None:
        """The device may have taken less at once than before."""
        if (most := self._engine.most_samples) >= self._most:
            return
        self._hands.observe(
            events.MicroBatchShrunk(
                step=self._step,
                device=self._engine.place.found.name,
                from_samples=self._most,
                to_samples=most,
            )
        )
        self._most, self.size = most, min(self.size, most)

    def _wasted(self, samples: int, cause: events.WasteCause) -> None:
        self._hands.observe(events.SamplesWasted(step=self._step, samples=samples, cause=cause))
