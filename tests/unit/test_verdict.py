"""Whether a combined adapter is better: only where it beats all that it was made of, beyond the noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from p2ptrain.adapters.verdict import Verdict, verdict

WINDOWS = 40


def hardness(seed: int = 0) -> Tensor:
    """float64 [WINDOWS]: windows differ by far more than candidates do."""
    return 3 + torch.randn(WINDOWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def judged(gains: dict[str, float], noise: float = 0.01) -> Verdict:
    """Candidates that are better than the base by so much in each window, give or take."""
    common = hardness()
    return verdict(
        {
            name: common - gain + noise * (hardness(1 + number) - 3)
            for number, (name, gain) in enumerate(gains.items())
        }
    )


def test_result_is_improved_when_it_beats_all_by_more_than_the_noise_though_windows_differ_by_more() -> None:
    found = judged({"base": 0.0, "parent1": 0.1, "parent2": 0.05, "result": 0.12})
    assert found.word == "improved"
    assert float(hardness().std()) / math.sqrt(WINDOWS) > 0.12  # unpaired, nothing could be told
    assert found.losses["base"] - found.losses["result"] == pytest.approx(0.12, abs=0.01)


@pytest.mark.parametrize(
    ("gains", "word"),
    [
        ({"base": 0.0, "parent1": 0.10, "result": 0.101}, "within noise"),
        ({"base": 0.0, "parent1": 0.10, "result": 0.05}, "worse"),
        ({"base": 0.0, "parent1": -0.2, "result": -0.1}, "worse"),
        ({"base": 0.0, "parent1": 0.10, "parent2": 0.3, "result": 0.2}, "worse"),
        ({"base": 0.0, "parent1": -0.2, "result": 0.1}, "improved"),
    ],
)
def test_result_is_not_improved_when_base_or_a_parent_is_as_good(gains: dict[str, float], word: str) -> None:
    assert judged(gains).word == word


def test_noise_is_two_standard_errors_of_the_paired_differences() -> None:
    base, result = hardness(1), hardness(2)
    [margin] = verdict({"base": base, "result": result}).margins
    differences = result - base
    assert margin.difference == pytest.approx(float(differences.mean()))
    assert margin.noise == pytest.approx(2 * float(differences.std()) / math.sqrt(WINDOWS))


def test_same_losses_are_no_improvement() -> None:
    same = hardness()
    assert verdict({"base": same, "parent1": same, "result": same}).word == "within noise"


def test_few_windows_with_much_noise_tell_nothing() -> None:
    """What chance alone gives is called an improvement in few of many trials: below 5 % for each margin."""
    called = 0
    for trial in range(400):
        chance = torch.Generator().manual_seed(trial)
        base, parent, result = torch.randn(3, 20, generator=chance, dtype=torch.float64)
        called += verdict({"base": base, "parent1": parent, "result": result}).word == "improved"
    assert called <= 20
