"""The learning rate: its shape, and its bits."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from p2ptrain.config import Optimizer, RunConfig, Schedule
from p2ptrain.replica.schedule import half_cosine, learning_rate, optimizer_for_batch


def run_with(kind: str, warmup_steps: int = 10, final_ratio: float = 0.1) -> RunConfig:
    return RunConfig(
        total_steps=110,
        optimizer=Optimizer(lr=0.5),
        schedule=Schedule(kind=kind, warmup_steps=warmup_steps, final_ratio=final_ratio),
    )


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_learning_rate_rises_in_equal_parts_when_warming_up(kind: str) -> None:
    rates = [learning_rate(run_with(kind), step) for step in range(11)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)], rel=1e-15)
    assert rates[9] == 0.5
    assert rates[10] == pytest.approx(0.5, rel=1e-15)


@pytest.mark.parametrize(("kind", "middle", "end"), [("constant", 0.5, 0.5), ("linear", 0.275, 0.05)])
def test_learning_rate_is_constant_or_linear_when_the_schedule_says_so(
    kind: str, middle: float, end: float
) -> None:
    assert learning_rate(run_with(kind), 60) == pytest.approx(middle, rel=1e-15)
    assert learning_rate(run_with(kind), 110) == pytest.approx(end, rel=1e-15)


def test_learning_rate_follows_the_cosine_when_compared_with_the_library() -> None:
    for step in range(10, 111):
        cosine = 0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2)
        assert learning_rate(run_with("cosine"), step) == pytest.approx(cosine, rel=1e-14)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_learning_rate_never_rises_when_warm_up_is_over(kind: str) -> None:
    rates = [learning_rate(run_with(kind, final_ratio=0.0), step) for step in range(10, 200)]
    assert all(later <= earlier for earlier, later in pairwise(rates))
    assert rates[100:] == [pytest.approx(0.0, abs=1e-16)] * len(rates[100:])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_learning_rate_is_the_peak_at_once_when_there_is_no_warm_up(kind: str) -> None:
    assert learning_rate(run_with(kind, warmup_steps=0), 0) == pytest.approx(0.5, rel=1e-15)


def test_half_cosine_is_within_its_stated_error_when_compared_with_the_library() -> None:
    for i in range(10_001):
        assert abs(half_cosine(i / 10_000) - (1 + math.cos(math.pi * i / 10_000)) / 2) <= 2e-16 + 2**-53


@pytest.mark.parametrize(
    ("progress", "bits"),
    [
        (0.0, "0x1.0000000000000p+0"),
        (0.1, "0x1.f378709a22a80p-1"),
        (1 / 3, "0x1.8000000000000p-1"),
        (0.5, "0x1.0000000000000p-1"),
        (0.75, "0x1.2bec333018868p-3"),
        (1.0, "0x1.0000000000000p-54"),
    ],
)
def test_half_cosine_has_these_bits_when_run_anywhere(progress: float, bits: str) -> None:
    assert half_cosine(progress).hex() == bits


def run_for_batch(rule: str, factor: int, kind: str = "adamw") -> RunConfig:
    optimizer = Optimizer(
        kind=kind, lr=0.01, beta1=0.9, beta2=0.99, epsilon=1e-8, batch_rule=rule, tuned_batch_size=16
    )
    return RunConfig(optimizer=optimizer, target_batch_size=16 * factor)


def test_rate_is_multiplied_by_the_batch_factor_or_its_root_when_the_rule_says_so() -> None:
    assert [optimizer_for_batch(run_for_batch(rule, 4)).lr for rule in ("none", "linear", "sqrt")] == [
        0.01,
        0.04,
        0.02,
    ]
    assert learning_rate(run_for_batch("sqrt", 4), 5000) == 0.02


def test_averages_of_adam_span_as_many_samples_as_before_when_the_rule_is_sqrt() -> None:
    scaled = optimizer_for_batch(run_for_batch("sqrt", 4))
    assert (1 - scaled.beta1, 1 - scaled.beta2) == (pytest.approx(0.4), pytest.approx(0.04))
    assert scaled.epsilon == pytest.approx(0.5e-8)
    for untouched in (run_for_batch("linear", 4), run_for_batch("sqrt", 4, "sgd"), run_for_batch("none", 4)):
        assert optimizer_for_batch(untouched).beta1 == 0.9


@pytest.mark.parametrize("rule", ["none", "linear", "sqrt"])
def test_no_setting_moves_when_the_batch_is_the_one_that_they_were_tuned_for(rule: str) -> None:
    run = run_for_batch(rule, 1)
    same = optimizer_for_batch(run)
    assert same.lr == run.optimizer.lr
    assert (same.beta1, same.epsilon) == (pytest.approx(0.9, rel=1e-15), run.optimizer.epsilon)


def test_run_is_refused_when_its_batch_rule_cannot_be_followed() -> None:
    with pytest.raises(ValueError, match="tuned_batch_size is not set"):
        RunConfig(optimizer=Optimizer(batch_rule="sqrt"))
    with pytest.raises(ValueError, match="lower it to 160"):
        run_for_batch("sqrt", 11)
    assert optimizer_for_batch(run_for_batch("sqrt", 10)).beta1 == pytest.approx(0.0, abs=1e-15)
