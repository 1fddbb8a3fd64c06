"""Strategy `local` by whole trainers: peers train apart, and are one copy again after every round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_parity import plain_optimizer
from torch import Tensor
from training import Regression, Training, check_replicas, rounds_at_unlike_speeds, small_run

from p2ptrain import events
from p2ptrain.config import Local, Optimizer, RunConfig, Schedule
from p2ptrain.records import EntryHeader, PeerId
from p2ptrain.replica.apart import effective_steps
from p2ptrain.swarm import clock
from p2ptrain.swarm.memory import MemoryHub

pytestmark = [pytest.mark.swarm, pytest.mark.virtual]

ROUNDS = 12


def local_run(weighting: str = "samples", *, warmup_rounds: int = 0, **fields: Any) -> RunConfig:
    """Rounds of 96 samples, in inner batches of 6."""
    settings = Local(
        inner_batch_size=6,
        outer_learning_rate=0.7,
        outer_momentum=0.6,
        weighting=weighting,
        warmup_rounds=warmup_rounds,
        warmup_batch_size=24,
    )
    defaults: dict[str, Any] = {
        "strategy": "local",
        "target_batch_size": 96,
        "local": settings,
        "schedule": Schedule(warmup_steps=0),
    }
    return small_run(**{**defaults, **fields})


def one_process(run: RunConfig, headers: Sequence[EntryHeader]) -> Tensor:
    """The same by plain torch, peer by peer: parameters (float32 [numel]) after the last round."""
    task, size = Regression(), run.local.inner_batch_size
    theta = vector(task.build_model(run.seed))
    velocity = torch.zeros_like(theta)
    models = {peer: task.build_model(run.seed) for header in headers for peer in header.roster}
    inner = {peer: plain_optimizer(run.optimizer, model) for peer, model in models.items()}
    for header in headers:
        if header.step < run.local.warmup_rounds:
            theta = synchronized(task, run, header, theta, models, inner)
            continue
        change = torch.zeros_like(theta)
        for peer, samples in zip(header.roster, header.samples, strict=True):
            model, optimizer = models[peer], inner[peer]
            torch.nn.utils.vector_to_parameters(theta.clone(), model.parameters())
            for group in optimizer.param_groups:
                group["lr"] = run.optimizer.lr
            assert samples % size == 0
            for first in range(0, samples, size):
                optimizer.zero_grad()
                batch = task.batch(header.step, peer, first, size)
                (task.loss_sum(model, batch) / size).backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_norm)
                optimizer.step()
            times = samples if run.local.weighting == "samples" else size
            change += (theta - vector(model)) * times / header.total_samples
        if run.local.weighting == "fednova":
            change *= effective_steps(header.samples, size)
        velocity = run.local.outer_momentum * velocity + change
        theta = theta - run.local.outer_learning_rate * (change + run.local.outer_momentum * velocity)
    return theta


def synchronized(
    task: Regression,
    run: RunConfig,
    header: EntryHeader,
    theta: Tensor,
    models: dict[PeerId, torch.nn.Module],
    inner: dict[PeerId, torch.optim.Optimizer],
) -> Tensor:
    """The same step of the whole batch by everybody, each with an optimizer of its own."""
    for peer, model in models.items():
        torch.nn.utils.vector_to_parameters(theta.clone(), model.parameters())
        inner[peer].zero_grad()
        for group in inner[peer].param_groups:
            group["lr"] = run.optimizer.lr
        for member, samples in zip(header.roster, header.samples, strict=True):
            if samples:
                batch = task.batch(header.step, member, 0, samples)
                (task.loss_sum(model, batch) / header.total_samples).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_norm)
        inner[peer].step()
    return vector(model)


def vector(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("weighting", "kind", "warmup_rounds"),
    [("samples", "adamw", 0), ("fednova", "adamw", 3), ("samples", "sgd", 3), ("fednova", "sgd", 0)],
)
def test_peers_that_train_apart_equal_the_method_by_plain_torch(
    weighting: str, kind: Any, warmup_rounds: int
) -> None:
    run = local_run(
        weighting,
        optimizer=Optimizer(kind=kind, lr=0.01, weight_decay=0.0),
        min_peers=3,  # who comes after the warm-up begins with a fresh optimizer
        warmup_rounds=warmup_rounds,
    )

    headers, found, compared = clock.run(rounds_at_unlike_speeds(run, ROUNDS))
    assert compared >= 2 * (ROUNDS - 2)
    assert any(len(set(header.samples)) == 3 for header in headers)  # their work was unequal
    sizes = [header.total_samples for header in headers]
    assert all(24 <= size < 48 for size in sizes[:warmup_rounds])
    assert all(size >= 96 for size in sizes[warmup_rounds:])
    expected = one_process(run, headers)
    assert (found - expected).norm() / expected.norm() <= 2e-5


def test_one_plain_inner_step_and_an_outer_rate_of_1_are_strategy_sync() -> None:
    """By whole trainers, whose replicas have one digest after each round."""
    plain = Optimizer(kind="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, clip_norm=0.0)
    ended = []
    for strategy in ("sync", "local"):
        run = small_run(
            strategy=strategy,
            optimizer=plain,
            schedule=Schedule(warmup_steps=0),
            target_batch_size=12,
            min_peers=2,
            local=Local(inner_batch_size=6, outer_learning_rate=1.0, outer_momentum=0.0),
        )

        async def story(run: RunConfig = run) -> tuple[list[tuple[int, ...]], Tensor]:
            async with Training(MemoryHub(1), run) as training:
                for name in ("a", "b"):
                    training.start(name, micro_batch_size=6, batch_seconds=2.0)
                await training.until_step(ROUNDS + 1)
                check_replicas(training.lives)
                first = training.lives[0]
                at_end = next(position for position in first.positions if position.step == ROUNDS)
                samples = [header.samples for header in first.headers()[:ROUNDS]]
                return samples, first.parameters[at_end.lineage]

        ended.append(clock.run(story()))
    (sync_samples, sync), (local_samples, local) = ended
    assert sync_samples == local_samples == [(6, 6)] * ROUNDS
    assert (sync - local).norm() / sync.norm() <= 1e-5


def test_every_round_tells_how_the_copies_were_to_each_other() -> None:
    """And every few of them whether averaging helps: by losses on the same samples for all."""

    async def story() -> None:
        async with Training(MemoryHub(1), local_run(min_peers=2, warmup_rounds=2)) as training:
            for name in ("a", "b"):
                training.start(name, micro_batch_size=6, eval_every_steps=3)
            await training.until_step(9)
            told = [life.of(events.CopiesAveraged) for life in training.lives]
            for each in told:
                assert [event.step for event in each[:6]] == list(range(2, 8))
                assert all(-1 <= event.cosine <= 1 and event.consensus_distance > 0 for event in each)
                assert [event.step for event in each if event.barrier is not None][:2] == [2, 5]
            mine, theirs = ({event.step: event for event in each} for each in told)
            for step in (2, 5):
                assert mine[step].average_loss == theirs[step].average_loss
                assert mine[step].own_loss != theirs[step].own_loss
                assert mine[step].cosine == theirs[step].cosine

    clock.run(story())


def test_a_peer_that_comes_in_the_warm_up_or_after_it_trains_on() -> None:
    async def story() -> None:
        async with Training(MemoryHub(2), local_run(warmup_rounds=4)) as training:
            training.start("a", micro_batch_size=3)
            await training.until_step(2)
            training.start("b", micro_batch_size=3)
            await training.until_step(6)
            training.start("c", micro_batch_size=3)
            await training.until_step(10)
            assert check_replicas(training.lives) >= 8
            for life in training.lives[1:]:
                assert any(event.mine for event in life.of(events.RoundCommitted))

    clock.run(story())


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_a_peer_that_dies_and_comes_back_has_the_swarms_state(codec: str) -> None:
    async def story() -> None:
        async with Training(MemoryHub(2), local_run(codec=codec)) as training:
            for name in ("a", "b", "c"):
                training.start(name, micro_batch_size=3)
            await training.until_step(4)
            await training.kill("b")
            await training.until_step(7)
            back = training.start("b", micro_batch_size=3)
            await training.until_step(11)
            committed = [event for event in back.of(events.RoundCommitted) if event.mine]
            assert committed
            assert check_replicas(training.lives) >= 15

    clock.run(story())
