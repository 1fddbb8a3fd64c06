"""The accumulator: a sum and a count, which no single bad gradient can spoil."""

from __future__ import annotations

import pytest
import torch

from p2ptrain.gradients.accumulator import LARGEST_GRADIENT, Accumulator
from p2ptrain.gradients.codecs import codec_named


def test_accumulator_holds_the_sum_and_the_count_when_gradients_are_added() -> None:
    accumulator = Accumulator(3)
    assert accumulator.add(torch.tensor([1.0, 2.0, 3.0]), 8)
    assert accumulator.add(torch.tensor([0.5, -2.0, 0.0]), 4)
    assert accumulator.samples == 12
    assert accumulator.total.tolist() == [1.5, 0.0, 3.0]


def test_accumulator_keeps_its_own_sum_when_the_gradient_buffer_is_cleared() -> None:
    accumulator, gradient = Accumulator(2), torch.ones(2)
    accumulator.add(gradient, 1)
    gradient.zero_()
    assert accumulator.total.tolist() == [1.0, 1.0]


def test_total_that_was_settled_stays_for_one_more_step_where_an_audit_may_ask_for_it() -> None:
    accumulator = Accumulator(2)
    accumulator.keep_one_more()
    accumulator.add(torch.ones(2), 1)
    first = accumulator.total
    accumulator.settle(codec_named("fp32"), ())
    assert accumulator.total.tolist() == [0.0, 0.0]
    accumulator.add(torch.full((2,), 3.0), 1)
    assert first.tolist() == [1.0, 1.0]
    second = accumulator.total
    accumulator.settle(codec_named("fp32"), ())
    assert accumulator.total is first
    assert (first.tolist(), second.tolist()) == ([0.0, 0.0], [3.0, 3.0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2 * LARGEST_GRADIENT, -1e38])
def test_accumulator_stays_as_it_was_when_a_gradient_is_not_finite(bad: float) -> None:
    accumulator = Accumulator(3)
    accumulator.add(torch.ones(3), 2)
    assert not accumulator.add(torch.tensor([1.0, bad, 1.0]), 5)
    assert (accumulator.samples, accumulator.total.tolist()) == (2, [1.0, 1.0, 1.0])


def test_accumulator_takes_what_is_large_but_within_bounds() -> None:
    accumulator = Accumulator(2)
    assert accumulator.add(torch.tensor([LARGEST_GRADIENT / 2, -LARGEST_GRADIENT / 2]), 1)
    assert accumulator.samples == 1


@pytest.mark.parametrize(("shape", "samples"), [((4,), 1), ((3, 1), 1), ((3,), 0), ((3,), -1)])
def test_accumulator_raises_when_shape_or_count_cannot_be(shape: tuple[int, ...], samples: int) -> None:
    with pytest.raises(ValueError, match="expected a gradient"):
        Accumulator(3).add(torch.ones(shape), samples)


def test_accumulator_takes_over_all_that_another_holds() -> None:
    one, other = Accumulator(2), Accumulator(2)
    one.add(torch.tensor([1.0, 2.0]), 3, 0.5)
    other.add(torch.tensor([4.0, -1.0]), 5, 0.25)
    one.absorb(other)
    assert (one.total.tolist(), one.samples, one.loss_sum) == ([5.0, 1.0], 8, 0.75)
    assert (other.total.tolist(), other.samples, other.loss_sum) == ([0.0, 0.0], 0, 0.0)


def test_accumulator_is_empty_when_reset() -> None:
    accumulator = Accumulator(2)
    accumulator.add(torch.ones(2), 3)
    accumulator.reset()
    assert (accumulator.samples, accumulator.total.tolist()) == (0, [0.0, 0.0])


def test_gradients_from_another_device_count_once_they_are_gathered() -> None:
    here, there = Accumulator(2), Accumulator(2, torch.device("cpu"))
    for accumulator in (here, there):
        accumulator.add(torch.tensor([1.0, 2.0]), 3, 0.5)
        accumulator.add(torch.tensor([0.5, -1.0]), 1, 0.25)
    assert here.gathered
    assert not there.gathered
    assert there.total.tolist() == [0.0, 0.0]
    for _ in range(2):  # the second time nothing waits
        there.gather()
        assert there.gathered
        assert there.total.tolist() == here.total.tolist()
    assert (there.samples, there.loss_sum) == (here.samples, here.loss_sum)
    there.add(torch.ones(2), 1)  # after an abort, say
    there.gather()
    assert there.total.tolist() == [2.5, 2.0]


def test_nothing_waits_on_the_other_device_when_reset_or_absorbed() -> None:
    one, other = (Accumulator(2, torch.device("cpu")) for _ in range(2))
    one.add(torch.tensor([1.0, 2.0]), 3)
    other.add(torch.tensor([4.0, -1.0]), 5)
    one.absorb(other)
    assert other.gathered
    one.gather()
    assert (one.total.tolist(), one.samples) == ([5.0, 1.0], 8)
    one.add(torch.ones(2), 1)
    one.reset()
    assert one.gathered
    one.gather()
    assert one.total.tolist() == [0.0, 0.0]
