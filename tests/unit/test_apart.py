"""Strategy `local` is what the papers say it is: identities that hold whatever is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from p2ptrain.config import CausalLmTask, Local, Optimizer, RunConfig
from p2ptrain.gradients.codecs import codec_named
from p2ptrain.replica.apart import LocalSteps, effective_steps
from p2ptrain.replica.optimizers import FlatOptimizer, build_optimizer, outer_optimizer

SIZE = 6
Gradient = Callable[[Tensor, int, int, int], Tensor]
"""(parameters, peer, round, inner step) → mean gradient of the inner batch there."""


def optimizer(dtype: torch.dtype = torch.float64, **settings: Any) -> FlatOptimizer:
    """Its state in that dtype, for identities that float32 would blur."""
    built = build_optimizer(Optimizer(**{"weight_decay": 0.0, "clip_norm": 0.0, **settings}), [(0, SIZE)], ())
    for name, value in vars(built).items():
        if isinstance(value, Tensor) and value.dtype == torch.float32 and value.numel() == SIZE:
            setattr(built, name, value.to(dtype))
    return built


def outer(settings: Local) -> FlatOptimizer:
    config = outer_optimizer(settings)
    return optimizer(kind="sgd", lr=config.lr, momentum=config.momentum, nesterov=True)


class Peer:
    """One that trains apart from θ, in float64."""

    def __init__(self, settings: Local, anchor: Tensor, rate: float, inner: FlatOptimizer) -> None:
        self.working = anchor.clone()
        self.steps = LocalSteps(settings, anchor, self.working, inner, 0.0, lambda: rate)


def trained(
    gradient: Gradient,
    *,
    counts: Sequence[int],
    rounds: int,
    rate: float,
    settings: Local,
    inner: Callable[[], FlatOptimizer],
    start: Tensor,
) -> Tensor:
    """θ after so many rounds of peers that take `counts` inner steps each."""
    theta, size = start.clone(), settings.inner_batch_size
    peers = [Peer(settings, theta, rate, inner()) for _ in counts]
    outer_step = outer(settings)
    for number in range(rounds):
        for rank, (peer, count) in enumerate(zip(peers, counts, strict=True)):
            for step in range(count):
                assert peer.steps.add(size * gradient(peer.working, rank, number, step), size)
            peer.steps.gather()
        samples = [peer.steps.samples for peer in peers]
        mean = torch.stack([peer.steps.total for peer in peers]).sum(0) / sum(samples)
        if settings.weighting == "fednova":
            mean *= effective_steps(samples, size)
        outer_step.step(theta, mean, settings.outer_learning_rate)
        for peer in peers:
            peer.working.copy_(theta)
            peer.steps.settle(codec_named("fp32"), ())
    return theta


def averaging(**changes: Any) -> Local:
    settings = {"inner_batch_size": 4, "outer_learning_rate": 1.0, "outer_momentum": 0.0}
    return Local(**{**settings, **changes})


def noisy(parameters: Tensor, peer: int, number: int, step: int) -> Tensor:
    """Of a quadratic with the same curvature for all, and noise that does not depend on the parameters."""
    generator = torch.Generator().manual_seed(1000 * peer + 100 * number + step)
    curvature = torch.linspace(0.1, 1.0, SIZE, dtype=torch.float64)
    return curvature * parameters + torch.randn(SIZE, generator=generator, dtype=torch.float64)


START = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
SGD: list[dict[str, Any]] = [
    {"momentum": 0.0, "nesterov": False},
    {"momentum": 0.9, "nesterov": False},
    {"momentum": 0.9, "nesterov": True},
]


@pytest.mark.parametrize("settings", SGD, ids=["plain", "momentum", "nesterov"])
def test_one_inner_step_is_synchronous_training_when_the_inner_optimizer_is_sgd(
    settings: dict[str, Any],
) -> None:
    """T7: it is linear, so momentum kept by each peer averages to that of the averaged gradient."""
    found = trained(
        noisy,
        counts=[1, 1, 1],
        rounds=6,
        rate=0.05,
        settings=averaging(),
        inner=lambda: optimizer(kind="sgd", **settings),
        start=START,
    )
    theta, sync = START.clone(), optimizer(kind="sgd", **settings)
    for number in range(6):
        mean = torch.stack([noisy(theta, peer, number, 0) for peer in range(3)]).mean(0)
        sync.step(theta, mean, 0.05)
    assert torch.allclose(found, theta, rtol=0, atol=1e-12)


def test_one_inner_step_with_outer_momentum_is_synchronous_nesterov() -> None:
    """T8: at the product of both rates."""
    found = trained(
        noisy,
        counts=[1, 1],
        rounds=8,
        rate=0.25,
        settings=averaging(outer_learning_rate=0.5, outer_momentum=0.75),
        inner=lambda: optimizer(kind="sgd", momentum=0.0),
        start=START,
    )
    theta, sync = START.clone(), optimizer(kind="sgd", momentum=0.75, nesterov=True)
    for number in range(8):
        sync.step(theta, torch.stack([noisy(theta, peer, number, 0) for peer in range(2)]).mean(0), 0.125)
    assert torch.allclose(found, theta, rtol=0, atol=1e-12)


def test_one_inner_step_is_not_synchronous_training_when_the_inner_optimizer_is_adamw() -> None:
    found = trained(
        noisy,
        counts=[1, 1],
        rounds=6,
        rate=0.05,
        settings=averaging(),
        inner=lambda: optimizer(kind="adamw"),
        start=START,
    )
    theta, sync = START.clone(), optimizer(kind="adamw")
    for number in range(6):
        sync.step(theta, torch.stack([noisy(theta, peer, number, 0) for peer in range(2)]).mean(0), 0.05)
    assert (found - theta).abs().max() > 1e-3


def test_averaging_later_changes_nothing_on_a_quadratic_that_all_share() -> None:
    """T9: with the same noise in the same order. Where curvatures differ it does change something."""

    def in_order(parameters: Tensor, peer: int, number: int, step: int, every: int) -> Tensor:
        return noisy(parameters, peer, 0, number * every + step)

    def unlike(parameters: Tensor, peer: int, number: int, step: int, every: int) -> Tensor:
        return (1 + peer) * in_order(parameters, peer, number, step, every)

    def after(gradient: Any, every: int) -> Tensor:
        return trained(
            lambda *at: gradient(*at, every),
            counts=[every] * 2,
            rounds=12 // every,
            rate=0.1,
            settings=averaging(),
            inner=lambda: optimizer(kind="sgd", momentum=0.0),
            start=START,
        )

    assert torch.allclose(after(in_order, 12), after(in_order, 1), rtol=0, atol=1e-12)
    assert (after(unlike, 12) - after(unlike, 1)).abs().max() > 1e-2


@pytest.mark.parametrize("peers", [1, 2, 5])
def test_peers_with_the_same_data_are_one_peer_that_trains_alone(peers: int) -> None:
    """T10."""
    found = trained(
        lambda parameters, peer, number, step: noisy(parameters, 0, number, step),
        counts=[7] * peers,
        rounds=3,
        rate=0.05,
        settings=averaging(),
        inner=lambda: optimizer(kind="adamw"),
        start=START,
    )
    theta, alone = START.clone(), optimizer(kind="adamw")
    for number in range(3):
        for step in range(7):
            alone.step(theta, noisy(theta, 0, number, step), 0.05)
    assert torch.allclose(found, theta, rtol=0, atol=1e-12)


def test_unequal_work_moves_the_goal_and_fednova_does_not_let_it() -> None:
    """Two peers with goals +1 and -1, and short steps. By samples, whoever takes three times as many steps
    pulls nine times as hard: by its share and by its way."""

    def pulled(parameters: Tensor, peer: int, number: int, step: int) -> Tensor:
        return parameters - (1.0 if peer == 0 else -1.0)

    def end(weighting: str) -> float:
        found = trained(
            pulled,
            counts=[60, 20],
            rounds=200,
            rate=0.001,
            settings=averaging(weighting=weighting),
            inner=lambda: optimizer(kind="sgd", momentum=0.0),
            start=torch.zeros(SIZE, dtype=torch.float64),
        )
        return float(found.mean())

    assert end("fednova") == pytest.approx(0.75 - 0.25, abs=0.02)
    assert end("samples") == pytest.approx(0.9 - 0.1, abs=0.02)


def test_effective_steps_are_the_steps_when_all_take_equally_many() -> None:
    assert effective_steps([40, 40, 40], 4) == 10
    assert effective_steps([60, 20], 4) == pytest.approx((60 * 15 + 20 * 5) / 80)


def test_an_inner_batch_under_way_does_not_count_and_is_dropped() -> None:
    peer = Peer(averaging(), START.clone(), 0.1, optimizer(kind="sgd", momentum=0.0))
    ones = torch.ones(SIZE, dtype=torch.float64)
    assert peer.steps.add(4 * ones, 4)
    assert peer.steps.add(3 * ones, 3)
    peer.steps.gather()
    assert (peer.steps.samples, peer.steps.room) == (4, 1)
    assert torch.allclose(peer.steps.total, 0.4 * ones, atol=1e-7)
    peer.steps.settle(codec_named("fp32"), ())
    assert (peer.steps.samples, peer.steps.room) == (0, 4)
    assert not peer.steps.total.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    peer = Peer(averaging(), START.clone(), 0.1, optimizer(kind="sgd"))
    assert not peer.steps.add(torch.full((SIZE,), bad, dtype=torch.float64), 4)
    assert peer.steps.room == 4
    assert torch.equal(peer.working, START)


def test_what_a_codec_lost_comes_with_the_next_change() -> None:
    codec = codec_named("int4")
    anchor = torch.linspace(-1, 1, 128)
    working = anchor.clone()
    inner = build_optimizer(Optimizer(kind="sgd", momentum=0.0, weight_decay=0.0), [(0, 128)], ())
    steps = LocalSteps(averaging(), anchor, working, inner, 0.0, lambda: 0.1)
    steps.add(4 * torch.linspace(0, 1, 128), 4)
    steps.gather()
    total, data = steps.total.clone(), codec.encode(steps.total)
    decoded = torch.empty(128)
    codec.decode(data, decoded)
    steps.settle(codec, [(0, 128, data)])
    working.copy_(anchor)
    steps.add(4 * torch.zeros(128), 4)
    steps.gather()
    assert torch.allclose(steps.total, total - decoded, atol=1e-6)
    steps.reset()
    steps.add(4 * torch.zeros(128), 4)
    steps.gather()
    assert not steps.total.any()


def test_run_files_that_cannot_work_are_refused_by_the_fields() -> None:
    with pytest.raises(ValueError, match="delay"):
        RunConfig(strategy="local", delay=1)
    with pytest.raises(ValueError, match="audit"):
        RunConfig(strategy="local", audit=1.0, codec="fp16")
    with pytest.raises(ValueError, match="adapters"):
        RunConfig(strategy="local", payload="lora", task=CausalLmTask())
    with pytest.raises(ValueError, match="inner_batch_size"):
        RunConfig(strategy="local", target_batch_size=8, local=Local(inner_batch_size=16))
