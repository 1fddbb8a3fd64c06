"""Strategy `partition` by whole trainers: parts that nobody else trains become one model in every round."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from training import Regression, Training, check_replicas, rounds_at_unlike_speeds, small_run

from p2ptrain import events
from p2ptrain.config import Optimizer, Partition, RunConfig, Schedule
from p2ptrain.records import EntryHeader, PeerId
from p2ptrain.replica.subspaces import coordinates, owners, turn_of
from p2ptrain.swarm import clock
from p2ptrain.swarm.memory import MemoryHub

pytestmark = [pytest.mark.swarm, pytest.mark.virtual]

ROUNDS = 8


def part_run(**fields: Any) -> RunConfig:
    """Rounds of 72 samples, in inner batches of 6."""
    defaults: dict[str, Any] = {
        "strategy": "partition",
        "target_batch_size": 72,
        "partition": Partition(by="random", inner_batch_size=6, rotate_every=2, probe_every=1),
        "schedule": Schedule(warmup_steps=0),
    }
    return small_run(**{**defaults, **fields})


def one_process(run: RunConfig, headers: Sequence[EntryHeader]) -> Tensor:
    """The same by plain torch with SGD, part by part: parameters (float32 [numel]) after the last round."""
    task, size = Regression(), run.partition.inner_batch_size
    model = task.build_model(run.seed)
    bounds = [0, *accumulate(parameter.numel() for parameter in model.parameters())]
    theta = vector(model)
    last: EntryHeader | None = None
    for header in headers:
        change = torch.zeros_like(theta)
        for peer, samples in zip(header.roster, header.samples, strict=True):
            mask, weight = torch.ones_like(theta), samples / header.total_samples
            if last is not None:
                turn = turn_of(header.step, run.partition.rotate_every)
                of = owners(run.partition.by, list(pairwise(bounds)), len(last.roster), run.seed, turn)
                assert peer in last.roster or not samples
                mask, weight = torch.zeros_like(theta), 1.0
                if samples:
                    mask[coordinates(of, last.roster.index(peer))] = 1
            own = theta.clone()
            for first in range(0, samples, size):
                torch.nn.utils.vector_to_parameters(own.clone(), model.parameters())
                model.zero_grad()
                batch = task.batch(header.step, peer, first, size)
                (task.loss_sum(model, batch) / size).backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_norm)
                gradient = torch.cat([each.grad.reshape(-1) for each in model.parameters()])  # type: ignore[union-attr]
                own -= run.optimizer.lr * gradient * mask
            change += weight * (own - theta)
        theta = theta + change
        last = header
    return theta


def vector(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def test_parts_that_peers_of_unlike_speed_train_equal_the_method_by_plain_torch() -> None:
    """With digests equal after every round."""
    settings = Partition(by="random", inner_batch_size=6, rotate_every=2, gamma="1")
    plain = Optimizer(kind="sgd", lr=0.05, momentum=0.0, nesterov=False, weight_decay=0.0)
    run = part_run(partition=settings, optimizer=plain)

    headers, found, compared = clock.run(rounds_at_unlike_speeds(run, ROUNDS))
    assert compared >= 2 * (ROUNDS - 2)
    assert any(len(set(header.samples)) == 3 for header in headers)  # their work was unequal
    expected = one_process(run, headers)
    assert (found - expected).norm() / expected.norm() <= 2e-5


def test_part_of_a_peer_that_dies_is_trained_on_and_it_comes_back_to_a_part() -> None:
    async def story() -> None:
        async with Training(MemoryHub(2), part_run()) as training:
            for name in ("a", "b", "c"):
                training.start(name, micro_batch_size=3)
            await training.until_step(5)
            await training.kill("b")
            await training.until_step(8)
            back = training.start("b", micro_batch_size=3)
            await training.until(lambda: any(event.mine for event in back.of(events.RoundCommitted)))
            await training.until_step(back.step + 3)
            assert check_replicas(training.lives) >= 15
            first = training.lives[0]
            sizes = [event.owners for event in first.of(events.PartsUnited)]
            assert {2, 3} <= set(sizes)
            newcomer = [header for header in first.headers() if PeerId("b") in header.roster]
            assert any(0 in header.samples for header in newcomer)  # it owned nothing in its first round
            told = [event for event in first.of(events.PartsUnited) if event.defect is not None]
            assert len(told) >= 4
            for life in training.lives:  # gamma and defect are the same on every replica
                for event in life.of(events.PartsUnited):
                    assert event.defect is None or event in told

    clock.run(story())


def test_a_newcomer_goes_on_alone_when_everybody_who_owned_a_part_has_gone() -> None:
    async def story() -> None:
        async with Training(MemoryHub(3), part_run()) as training:
            training.start("a", micro_batch_size=3, batch_seconds=0.5)
            await training.until_step(3)
            late = training.start("b", micro_batch_size=3, batch_seconds=0.5)
            await training.until(lambda: late.of(events.CaughtUp))
            await training.kill("a")
            await training.until_step(late.step + 3)
            rosters = [header.roster for header in late.headers()]
            assert ("b",) in rosters
            assert not any({"a", "b"} <= set(roster) for roster in rosters)  # b never owned anything before
            check_replicas(training.lives)

    clock.run(story())


def test_all_are_warned_when_parts_undo_each_others_work() -> None:
    """Many long steps of parts that are drawn coordinate by coordinate."""
    settings = Partition(by="random", inner_batch_size=6, gamma="1", probe_every=1)
    harsh = Optimizer(kind="sgd", lr=0.5, momentum=0.0, nesterov=False, weight_decay=0.0, clip_norm=0.0)
    run = part_run(partition=settings, optimizer=harsh, target_batch_size=1440)

    async def story() -> None:
        async with Training(MemoryHub(4), run) as training:
            for name in ("a", "b", "c"):
                training.start(name, micro_batch_size=6, batch_seconds=0.05)
            await training.until(lambda: all(life.of(events.GainsEaten) for life in training.lives))
            warning = training.lives[0].of(events.GainsEaten)[0]
            assert warning.defect > 0.5 * abs(warning.parts_change)

    clock.run(story())
