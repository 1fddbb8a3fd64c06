"""Synchronous training: N peers are one process with one large batch, and copies of one another.

Each swarm here is made of whole trainers with uneven micro-batches and paces; see `training`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training import Regression, Trainer, Training, check_replicas, small_run

from p2ptrain.config import CausalLmTask, Optimizer, PeerConfig, RunConfig, Schedule
from p2ptrain.gradients.codecs import CODECS
from p2ptrain.records import EntryHeader
from p2ptrain.replica.schedule import learning_rate
from p2ptrain.swarm import clock
from p2ptrain.swarm.memory import MemoryHub
from p2ptrain.tasks import Task, build_task
from tests.unit.hub_models import save_shards

pytestmark = [pytest.mark.swarm, pytest.mark.virtual]

STEPS = 20
PACES = ((3, 0.1), (5, 0.17), (2, 0.05), (7, 0.4), (1, 0.03))
"""(samples, virtual seconds) of each peer's micro-batches."""


@dataclass(frozen=True)
class Trained:
    """What a swarm did in its first `STEPS` steps."""

    lives: Sequence[Trainer]
    headers: Sequence[EntryHeader]
    parameters: Tensor
    """float32 [numel], at step `STEPS`."""


def trained_by(peers: int, run: RunConfig, seed: int = 1, task: Task | None = None) -> Trained:
    """Let so many peers train together from the start."""

    async def story() -> Trained:
        training = Training(MemoryHub(seed), run)
        training.task = task or training.task
        async with training:
            for number, (samples, seconds) in enumerate(PACES[:peers]):
                training.start(f"peer{number}", micro_batch_size=samples, batch_seconds=seconds)
            await training.until_step(STEPS + 1)  # by then all have hashed what they had at `STEPS`
            first = training.lives[0]
            at_end = next(position for position in first.positions if position.step == STEPS)
            headers = first.headers()[:STEPS]
            return Trained(training.lives, headers, first.parameters[at_end.lineage])

    return clock.run(story())


# -- each other's copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peers", "codec"),
    [(peers, codec) for peers in (1, 2, 3, 5) for codec in ("fp32", "fp16")]
    + [(3, codec) for codec in CODECS if CODECS[codec].feedback],
)
def test_replicas_are_bit_equal_after_every_step_when_micro_batches_are_uneven(
    peers: int, codec: str
) -> None:
    trained = trained_by(peers, small_run(codec=codec))
    compared = check_replicas(trained.lives)
    assert compared >= (peers - 1) * (STEPS - 2)  # nobody stood aside for more than its first steps
    assert all(len(header.roster) == peers for header in trained.headers[2:])
    for life in trained.lives:
        lineages = [position.lineage for position in life.positions if position.step <= STEPS]
        assert lineages == [position.lineage for position in trained.lives[0].positions][: STEPS + 1]
        assert set(lineages) <= life.state_digests().keys()


# -- one large batch -----------------------------------------------------------------------------------------


def one_process(
    run: RunConfig, headers: Sequence[EntryHeader], task: Task | None = None
) -> tuple[Tensor, list[float]]:
    """Plain torch on the samples that the entries counted: parameters (float32 [numel]), each step's norm."""
    task = task or Regression()
    model = task.build_model(run.seed)
    optimizer = plain_optimizer(run.optimizer, model)
    norms = []
    for header in headers:
        optimizer.zero_grad()
        loss = torch.zeros(())
        for peer, samples in zip(header.roster, header.samples, strict=True):
            if samples:
                loss = loss + task.loss_sum(model, task.batch(header.step, peer, 0, samples))
        (loss / header.total_samples).backward()  # type: ignore[no-untyped-call]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        if run.optimizer.clip_norm and norms[-1] > run.optimizer.clip_norm:
            for gradient in gradients:
                gradient.mul_(run.optimizer.clip_norm / norms[-1])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run, header.step)
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]), norms


def plain_optimizer(config: Optimizer, model: torch.nn.Module) -> torch.optim.Optimizer:
    match config.kind:
        case "adamw":
            matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
            vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
            groups = [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ]
            return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.epsilon)
        case "sgd":
            # torch's decay passes through the momentum and ours does not; without decay they are the same.
            assert config.weight_decay == 0
            return torch.optim.SGD(model.parameters(), momentum=config.momentum, nesterov=config.nesterov)


COSINE = Schedule(kind="cosine", warmup_steps=5)


@pytest.mark.parametrize("peers", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "optimizer",
    [
        Optimizer(kind="adamw", lr=0.01, clip_norm=1.0),
        Optimizer(kind="sgd", lr=0.1, weight_decay=0.0, clip_norm=0.3),
        Optimizer(kind="sgd", lr=0.1, weight_decay=0.0, clip_norm=1e9, nesterov=False),
    ],
    ids=["adamw", "sgd with nesterov, clipped", "sgd, not clipped"],
)
def test_swarm_equals_one_process_when_it_trains_on_the_pooled_batch(
    optimizer: Optimizer, peers: int
) -> None:
    run = small_run(optimizer=optimizer, schedule=COSINE, total_steps=2 * STEPS)
    trained = trained_by(peers, run)
    assert [header.step for header in trained.headers] == list(range(STEPS))
    assert min(header.total_samples for header in trained.headers) >= run.target_batch_size
    assert any(len(set(header.samples)) == peers for header in trained.headers)  # they were uneven

    alone, norms = one_process(run, trained.headers)
    difference = (trained.parameters - alone).norm() / alone.norm()
    assert difference <= 1e-5
    for header, norm in zip(trained.headers, norms, strict=True):
        assert math.sqrt(sum(header.squared_norms)) == pytest.approx(norm, rel=1e-5)


def test_swarm_equals_one_process_when_it_trains_a_language_model_on_shards(tmp_path: Path) -> None:
    """Its embedding is its head, too, and which text a peer reads depends on which row group it has drawn."""
    save_shards(tmp_path)
    run = small_run(task=CausalLmTask(layers=1, width=16, heads=2, context=16, dataset="shards"))

    def task() -> Task:
        return build_task(run, PeerConfig(corpus=str(tmp_path)))

    trained = trained_by(3, run, task=task())
    assert check_replicas(trained.lives) >= 2 * (STEPS - 2)
    alone, _ = one_process(run, trained.headers, task())
    assert (trained.parameters - alone).norm() / alone.norm() <= 1e-5


def test_one_sample_less_is_noticed_when_parity_is_measured() -> None:
    """The measure itself: were one sample of one entry not counted, it would say so."""
    run = small_run()
    trained = trained_by(2, run)
    first = trained.headers[0]
    fewer = first.model_copy(update={"samples": (first.samples[0] - 1, *first.samples[1:])})
    alone, _ = one_process(run, [fewer, *trained.headers[1:]])
    assert (trained.parameters - alone).norm() / alone.norm() > 1e-5
