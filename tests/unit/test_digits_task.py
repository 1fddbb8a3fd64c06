"""The digits: everyone's samples and pictures are the same, none is both trained on and held out, and they
are learned within seconds."""

from __future__ import annotations

import builtins
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from p2ptrain.config import DigitsTask as Settings
from p2ptrain.config import RunConfig
from p2ptrain.errors import ConfigError
from p2ptrain.tasks import build_task
from p2ptrain.tasks.digits import DigitsTask


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def task() -> DigitsTask:
    return DigitsTask(Settings(), seed=0)


def test_sample_depends_on_step_peer_and_number_alone(task: DigitsTask) -> None:
    pictures, digits = task.batch(3, "alice", 0, 6)
    later, _ = DigitsTask(Settings(), seed=0).batch(3, "alice", 4, 2)
    assert torch.equal(pictures[4:], later)
    assert pictures.shape == (6, 64)
    assert pictures.dtype == torch.float32
    assert digits.tolist() == [5, 9, 0, 8, 7, 1]
    for other in (task.batch(4, "alice", 0, 6), task.batch(3, "bob", 0, 6)):
        assert not torch.equal(pictures, other[0])


def test_numbered_samples_are_all_that_is_not_held_out_each_once(task: DigitsTask) -> None:
    pictures, digits = task.samples(range(task.size))
    assert task.size == len(pictures) == len(digits) == 1797 - 300
    one, digit = task.samples([41])
    assert torch.equal(one[0], pictures[41])
    assert digit[0] == digits[41]


def test_held_out_pictures_are_never_trained_on(task: DigitsTask) -> None:
    held = {tuple(each.tolist()) for each in task._pictures[task._heldout]}
    trained = {tuple(each.tolist()) for each in task.batch(0, "alice", 0, 20_000)[0]}
    assert len(held) == 300
    assert len(trained) > 1450
    assert not held & trained


def test_loss_is_that_of_not_knowing_before_training(task: DigitsTask) -> None:
    figures = task.evaluate(task.build_model(0))
    assert figures["loss"] == pytest.approx(math.log(10), abs=0.7)
    assert figures["accuracy"] < 0.35


def test_digits_are_learned_in_two_hundred_steps(task: DigitsTask) -> None:
    model = task.build_model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(200):
        optimizer.zero_grad()
        (task.loss_sum(model, task.batch(step, "alice", 0, 64)) / 64).backward()
        optimizer.step()
    assert task.evaluate(model)["accuracy"] > 0.95
    *picture, guess = task.preview(model, "", 0, torch.Generator().manual_seed(2)).splitlines()
    assert len(picture) == 8
    assert guess == "is a 5, taken for a 5"


def test_loss_sum_adds_up_the_samples(task: DigitsTask) -> None:
    model = task.build_model(0)
    whole = task.loss_sum(model, task.batch(0, "alice", 0, 5))
    parts = [task.loss_sum(model, task.batch(0, "alice", number, 1)) for number in range(5)]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-5)


def test_command_that_helps_is_named_when_scikit_learn_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ConfigError, match=r'sklearn, which is not installed; run pip install "p2ptrain\[digit'
    ):
        build_task(RunConfig(task=Settings()))
