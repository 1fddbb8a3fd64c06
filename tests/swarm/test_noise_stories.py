"""What a swarm's rounds tell about noise and data: the same on every peer, and right."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import torch
from torch import Tensor
from training import Regression, Training, check_replicas, small_run

from p2ptrain import allreduce, events
from p2ptrain.allreduce import Attempt, Contribution
from p2ptrain.gradients.noise import LEAST_ROUNDS, STRANGER_ROUNDS, NoiseMeter, spread_of
from p2ptrain.swarm import clock
from p2ptrain.swarm.memory import MemoryHub

pytestmark = [pytest.mark.swarm, pytest.mark.virtual]

PACES = {"anna": (2, 0.1), "bert": (4, 0.17), "carl": (1, 0.05), "dora": (2, 0.12)}
"""(samples, virtual seconds) of each peer's micro-batches."""


def play(story: Callable[[Training], Awaitable[None]], task: Regression | None = None) -> None:
    async def whole() -> None:
        async with Training(MemoryHub(seed=1), small_run(target_batch_size=40)) as training:
            training.task = task or training.task
            for name, (samples, seconds) in PACES.items():
                training.start(name, micro_batch_size=samples, batch_seconds=seconds)
            await story(training)
            assert check_replicas(training.lives)

    clock.run(whole())


def test_all_peers_read_the_noise_scale_of_the_gradients_that_they_brought(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    brought: dict[int, dict[str, tuple[int, Tensor]]] = {}
    contribute = Attempt.contribute

    def recording(self: Attempt, contribution: Contribution) -> None:
        members = brought.setdefault(self.freeze.step, {})
        members[self._me] = contribution.samples, contribution.total.double().clone()
        contribute(self, contribution)

    monkeypatch.setattr(allreduce.Attempt, "contribute", recording)

    async def story(training: Training) -> None:
        await training.until_step(LEAST_ROUNDS + 10)
        last = {life.name: life.of(events.RoundCommitted)[-1] for life in training.lives}
        meter, expected = NoiseMeter(), {}
        for step, members in sorted(brought.items()):
            samples, totals = zip(*[each for each in members.values() if each[0]], strict=True)
            rows = torch.stack(totals)
            expected[step] = meter.round(spread_of(samples, rows @ rows.T), None)
        for event in last.values():
            reading = expected[event.step]
            assert event.noise_scale == pytest.approx(reading.noise_scale, rel=1e-3)
            assert event.signal_norm_squared == pytest.approx(reading.signal, rel=1e-3)
        for life in training.lives:
            assert not life.of(events.DataDuplicated)
            assert not life.of(events.DataUnlike)

    play(story)


class SameForAll(Regression):
    """Forgets to draw by peer."""

    def batch(self, step: int, peer: str, first: int, count: int) -> tuple[Tensor, Tensor]:
        return super().batch(step, "everyone", first, count)


def test_peers_that_draw_the_same_samples_are_warned() -> None:
    async def story(training: Training) -> None:
        await training.until_step(STRANGER_ROUNDS + 5)
        assert all(len(life.of(events.DataDuplicated)) == 1 for life in training.lives)
        assert not [event for life in training.lives for event in life.of(events.DataUnlike)]

    play(story, SameForAll())


class OneHasOther(Regression):
    """What dora is to learn is the opposite."""

    def batch(self, step: int, peer: str, first: int, count: int) -> tuple[Tensor, Tensor]:
        inputs, targets = super().batch(step, peer, first, count)
        return inputs, -targets if peer == "dora" else targets


def test_peer_that_trains_on_other_data_is_named_by_the_others_and_nobody_else_is() -> None:
    async def story(training: Training) -> None:
        others = [life for life in training.lives if life.name != "dora"]
        await training.until(lambda: all(life.of(events.DataUnlike) for life in others))
        named = {event.peer for life in training.lives for event in life.of(events.DataUnlike)}
        assert named == {"dora"}
        assert not [event for life in training.lives for event in life.of(events.DataDuplicated)]
        assert others[0].of(events.RoundCommitted)[-1].noise_excess > 1.2

    play(story, OneHasOther())
