"""Optimizers: the same steps as torch's and as the formula, and a state that can be moved."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from p2ptrain.config import Optimizer
from p2ptrain.replica import optimizers
from p2ptrain.replica.optimizers import FlatOptimizer, build_optimizer, clip_factor

NUMEL = 4000
EVERYTHING = [(0, NUMEL)]
TENSORS = [(0, 1500), (1500, 1501), (1501, NUMEL)]
VARIANTS = {
    "adamw": Optimizer(kind="adamw", lr=0.01, weight_decay=0.1),
    "sgd": Optimizer(kind="sgd", lr=0.01, weight_decay=0.1, nesterov=False),
    "nesterov": Optimizer(kind="sgd", lr=0.01, weight_decay=0.1, nesterov=True),
    "lamb": Optimizer(kind="lamb", lr=0.01, weight_decay=0.1),
    "plain sgd": Optimizer(kind="sgd", lr=0.01, weight_decay=0.0, momentum=0.0, nesterov=False),
}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def gradients(steps: int = 20, numel: int = NUMEL) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-6, 1, numel)
    return [torch.randn(numel, generator=generator) * sizes for _ in range(steps)]


def start(numel: int = NUMEL) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(0))


def trained(optimizer: FlatOptimizer, config: Optimizer, parameters: Tensor, steps: list[Tensor]) -> Tensor:
    for gradient in steps:
        optimizer.step(parameters, gradient, config.lr)
    return parameters


# torch's functional forms: what its classes call, without the second that importing its compiler takes them.


def by_torch_adamw(steps: list[Tensor]) -> Tensor:
    theta, mean, square, count = start(), torch.zeros(NUMEL), torch.zeros(NUMEL), torch.tensor(0.0)
    for gradient in steps:
        adamw(
            [theta],
            [gradient],
            [mean],
            [square],
            [],
            [count],
            foreach=False,
            amsgrad=False,
            beta1=0.9,
            beta2=0.99,
            lr=0.01,
            weight_decay=0.1,
            eps=1e-8,
            maximize=False,
        )
    return theta


def by_torch_sgd(steps: list[Tensor], momentum: float, nesterov: bool) -> Tensor:
    theta, velocities = start(), [None]
    for gradient in steps:
        sgd(
            [theta],
            [gradient],
            velocities,
            foreach=False,
            weight_decay=0.0,
            momentum=momentum,
            lr=0.01,
            dampening=0.0,
            nesterov=nesterov,
            maximize=False,
        )
    return theta


def by_formula(config: Optimizer, steps: list[Tensor]) -> Tensor:
    """The textbook in float64, one vector at a time."""
    theta = start().double()
    velocity, mean, square = torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros_like(theta)
    for t, g in enumerate((gradient.double() for gradient in steps), start=1):
        decayed = theta * (1 - config.lr * config.weight_decay)
        if config.kind == "lamb":
            mean = config.beta1 * mean + (1 - config.beta1) * g
            square = config.beta2 * square + (1 - config.beta2) * g * g
            unbiased = square / (1 - config.beta2**t)
            r = mean / (1 - config.beta1**t) / (unbiased.sqrt() + config.epsilon)
            r += config.weight_decay * theta
            decayed, direction = theta, torch.empty_like(r)
            for tensor in (slice(start, stop) for start, stop in TENSORS):
                direction[tensor] = theta[tensor].norm() / r[tensor].norm() * r[tensor]
        elif config.kind == "sgd":
            velocity = config.momentum * velocity + g
            direction = g + config.momentum * velocity if config.nesterov else velocity
        else:
            mean = config.beta1 * mean + (1 - config.beta1) * g
            square = config.beta2 * square + (1 - config.beta2) * g * g
            unbiased = square / (1 - config.beta2**t)
            direction = mean / (1 - config.beta1**t) / (unbiased.sqrt() + config.epsilon)
        theta = decayed - config.lr * direction
    return theta


def test_adamw_agrees_with_torch_when_20_steps_are_taken() -> None:
    config = VARIANTS["adamw"]
    ours = trained(build_optimizer(config, TENSORS, EVERYTHING), config, start(), gradients())
    theirs = by_torch_adamw(gradients())
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.9, True), (0.0, False)])
def test_sgd_agrees_with_torch_when_20_steps_are_taken(momentum: float, nesterov: bool) -> None:
    config = Optimizer(kind="sgd", lr=0.01, weight_decay=0.0, momentum=momentum, nesterov=nesterov)
    ours = trained(build_optimizer(config, TENSORS, EVERYTHING), config, start(), gradients())
    theirs = by_torch_sgd(gradients(), momentum, nesterov)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@variants
def test_optimizer_agrees_with_the_formula_when_20_steps_are_taken(config: Optimizer) -> None:
    ours = trained(build_optimizer(config, TENSORS, EVERYTHING), config, start(), gradients())
    torch.testing.assert_close(ours.double(), by_formula(config, gradients()), rtol=1e-6, atol=1e-6)


@variants
def test_optimizer_gives_the_same_bits_when_it_works_in_other_blocks(
    config: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(build_optimizer(config, TENSORS, EVERYTHING), config, start(), gradients(5))
    monkeypatch.setattr(optimizers, "BLOCK_VALUES", 37)
    blocks = trained(build_optimizer(config, TENSORS, EVERYTHING), config, start(), gradients(5))
    assert torch.equal(whole, blocks)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_weight_decay_shrinks_only_its_ranges_when_the_gradient_is_zero(kind: str) -> None:
    config = Optimizer(kind=kind, lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(config, [(0, 6)], [(1, 3), (5, 6)])
    parameters = torch.ones(6)
    optimizer.step(parameters, torch.zeros(6), 0.1)
    assert parameters.tolist() == pytest.approx([1, 0.95, 0.95, 1, 1, 0.95])


@pytest.mark.parametrize(
    ("weights", "gradient", "after"),
    [
        ([0.0, 0.0], [3.0, -1.0], [-0.1, 0.1]),  # no weights: Adam's first step, of length lr each
        ([3.0, 4.0], [0.0, 0.0], [3.0, 4.0]),  # no direction: no step
        ([3.0, 4.0], [1.0, 1.0], [3.0 - 0.5 / math.sqrt(2), 4.0 - 0.5 / math.sqrt(2)]),  # a tenth of 5
    ],
)
def test_lamb_takes_the_ratio_for_one_when_a_norm_is_zero(
    weights: list[float], gradient: list[float], after: list[float]
) -> None:
    optimizer = build_optimizer(Optimizer(kind="lamb", weight_decay=0.0), [(0, 2)], [])
    parameters = torch.tensor(weights)
    optimizer.step(parameters, torch.tensor(gradient), 0.1)
    assert parameters.tolist() == pytest.approx(after, rel=1e-6)


def test_lamb_moves_each_tensor_by_the_same_share_of_its_length_when_gradients_differ_by_far() -> None:
    config = Optimizer(kind="lamb", lr=0.01, weight_decay=0.0)
    parameters, before = start(), start()
    scaled = gradients(1)[0]
    scaled[:1500] *= 1e4
    build_optimizer(config, TENSORS, []).step(parameters, scaled, 0.01)
    for begin, end in TENSORS:
        moved = (parameters - before)[begin:end].norm() / before[begin:end].norm()
        assert moved.item() == pytest.approx(0.01, rel=1e-3)


@variants
def test_optimizer_leaves_the_gradient_alone_when_it_steps(config: Optimizer) -> None:
    gradient = gradients(1)[0]
    build_optimizer(config, TENSORS, EVERYTHING).step(start(), gradient, 0.01)
    assert torch.equal(gradient, gradients(1)[0])


@variants
def test_optimizer_goes_on_alike_when_its_state_was_moved_to_another(config: Optimizer) -> None:
    first = build_optimizer(config, TENSORS, EVERYTHING)
    halfway = trained(first, config, start(), gradients()[:10])
    second = build_optimizer(config, TENSORS, EVERYTHING)
    second.load(first.state_tensors(), first.scalars())
    rest = gradients()[10:]
    moved = trained(second, config, halfway.clone(), rest)
    assert torch.equal(moved, trained(first, config, halfway, rest))


def test_optimizer_keeps_its_own_state_when_the_loaded_tensors_change() -> None:
    config = VARIANTS["adamw"]
    source, target = (build_optimizer(config, [(0, 3)], [(0, 3)]) for _ in range(2))
    target.load(source.state_tensors(), source.scalars())
    source.step(torch.ones(3), torch.ones(3), 0.1)
    assert target.state_tensors()["mean"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("squared_norms", "clip_norm", "factor"),
    [([9.0, 16.0], 1.0, 0.2), ([9.0, 16.0], 5.0, 1.0), ([9.0, 16.0], 6.0, 1.0), ([0.0], 1.0, 1.0)],
)
def test_clip_factor_brings_the_norm_down_when_it_is_too_large(
    squared_norms: list[float], clip_norm: float, factor: float
) -> None:
    assert clip_factor(squared_norms, clip_norm) == factor


def test_clip_factor_is_one_when_the_run_scales_nothing() -> None:
    assert clip_factor([9.0, 16.0], 0.0) == 1.0


def test_clip_factor_is_zero_and_not_an_error_when_the_norms_overflow() -> None:
    assert clip_factor([1e308, 1e308], 1.0) == 0.0


def test_clip_factor_adds_left_to_right_when_the_order_shows() -> None:
    # Python 3.12's `sum` would give sqrt(1e16 + 2): the factor must not depend on the Python.
    assert clip_factor([1e16, 1.0, 1.0], 1.0) == 1.0 / math.sqrt(1e16)
