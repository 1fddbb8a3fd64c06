"""A swarm that trains adapters: it equals one process on the pooled batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lora_models import Arithmetic
from torch import nn
from training import Trainer, Training, check_replicas, small_run

from p2ptrain.config import Local, Lora, Optimizer, RunConfig, Schedule
from p2ptrain.records import EntryHeader
from p2ptrain.replica.schedule import learning_rate
from p2ptrain.swarm import clock
from p2ptrain.swarm.memory import MemoryHub
from p2ptrain.tasks import build_model

pytestmark = [pytest.mark.swarm, pytest.mark.virtual]

STEPS = 50
PACES = ((3, 0.1), (5, 0.17), (2, 0.05))
"""(samples, virtual seconds) of each peer's micro-batches."""
RUN = small_run(
    run_id="adapters",
    payload="lora",
    lora=Lora(rank=4),
    optimizer=Optimizer(lr=0.01, weight_decay=0.01),
    schedule=Schedule(kind="cosine", warmup_steps=5),
    total_steps=2 * STEPS,
)


def start_all(training: Training) -> None:
    training.task = Arithmetic()
    for number, (samples, seconds) in enumerate(PACES):
        training.start(f"peer{number}", micro_batch_size=samples, batch_seconds=seconds)


def one_process(run: RunConfig, headers: Sequence[EntryHeader]) -> nn.Module:
    """Plain PEFT and torch on the samples that the entries counted."""
    task = Arithmetic()
    model, _ = build_model(task, run)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = run.optimizer
    optimizer = torch.optim.AdamW(
        trained,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    for header in headers:
        optimizer.zero_grad()
        pairs = zip(header.roster, header.samples, strict=True)
        batch = torch.cat([task.batch(header.step, peer, 0, samples) for peer, samples in pairs if samples])
        (task.loss_sum(model, batch) / header.total_samples).backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
        for parameter in trained:
            if parameter.grad is not None and norm > config.clip_norm:
                parameter.grad.mul_(config.clip_norm / norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run, header.step)
        optimizer.step()
    return model


def test_swarm_of_adapters_equals_one_process_on_the_pooled_batch() -> None:
    """T2, through the whole pipeline in float32."""

    async def story() -> tuple[Trainer, list[EntryHeader]]:
        async with Training(MemoryHub(seed=1), RUN) as training:
            start_all(training)
            await training.until_step(STEPS)
            assert check_replicas(training.lives)
            first = training.lives[0]
            return first, first.headers()

    first, headers = clock.run(story())
    alone = one_process(RUN, headers[: first.step])
    task = Arithmetic()
    untrained = task.evaluate(build_model(task, RUN)[0])["loss"]
    loss, expected = task.evaluate(first.replica.model)["loss"], task.evaluate(alone)["loss"]
    assert expected < untrained - 0.1
    assert loss == pytest.approx(expected, rel=1e-4)


def test_swarm_of_adapters_that_train_apart_learns_and_a_newcomer_is_bit_equal() -> None:
    """With a warm-up, and with momentum in the outer step."""
    apart = Local(
        inner_batch_size=6, outer_learning_rate=0.7, outer_momentum=0.5, warmup_rounds=2, warmup_batch_size=24
    )
    run = RUN.model_copy(
        update={
            "strategy": "local",
            "local": apart,
            "target_batch_size": 96,
            "schedule": Schedule(warmup_steps=0),
        }
    )

    async def story() -> None:
        async with Training(MemoryHub(seed=1), run) as training:
            start_all(training)
            await training.until_step(6)
            late = training.start("late", micro_batch_size=2, batch_seconds=0.1)
            await training.until(lambda: late.peer is not None and late.peer.samples_given)
            await training.until_step(14)
            assert check_replicas(training.lives) > 20
            task = Arithmetic()
            untrained = task.evaluate(build_model(task, run)[0])["loss"]
            assert task.evaluate(late.replica.model)["loss"] < untrained - 0.1

    clock.run(story())


def test_newcomer_takes_a_snapshot_of_adapters_and_trains_on(tmp_path: Path) -> None:
    async def story() -> None:
        async with Training(MemoryHub(seed=1), RUN, tmp_path) as training:
            start_all(training)
            await training.until_step(5)
            late = training.start("late", micro_batch_size=2, batch_seconds=0.1)
            await training.until(lambda: late.peer is not None and late.peer.samples_given)
            assert check_replicas(training.lives)
            assert late.replica.base_digest == training.lives[0].replica.base_digest

    clock.run(story())
