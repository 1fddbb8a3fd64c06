"""The engine: the same sum of gradients however it is computed, and no sample lost to memory or overflow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from replicas import FINGERPRINT, small_replica, small_run
from torch import Tensor, nn

from p2ptrain.errors import DeviceError
from p2ptrain.gradients.devices import CPU, Found, Place
from p2ptrain.gradients.engine import FIRST_SCALE, GROWS_AFTER, LARGEST_SCALE, Engine, LossScale
from p2ptrain.replica.replica import Replica

BF16 = Place(Found("cpu", bf16=True), "bf16")
FP16 = Place(Found("cpu"), "fp16")
"""Which the CPU computes too, if slowly."""


def draw(first: int, count: int) -> Tensor:
    """float32 [count, 32]: sample k is always the same."""
    samples = [torch.randn(32, generator=torch.Generator().manual_seed(first + k)) for k in range(count)]
    return torch.stack(samples)


def loss_sum(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().sum()
    return loss


def engine_of(replica: Replica, place: Place = CPU, most: int = 8, *, compiled: bool = False) -> Engine:
    return Engine(replica.model, replica.gradient, place, most, compiled=compiled)


def plain_gradient(count: int) -> Tensor:
    replica = small_replica()
    loss_sum(replica.model, draw(0, count)).backward()  # type: ignore[no-untyped-call]
    return replica.gradient


@pytest.mark.parametrize("most", [1, 3, 8])
def test_gradients_are_those_of_all_samples_however_many_fit_at_once(most: int) -> None:
    replica = small_replica()
    engine = engine_of(replica, most=most)
    for _ in range(2):  # what was there before does not count
        loss = engine.gradients(draw, loss_sum, 0, 8, chance=1)
    torch.testing.assert_close(replica.gradient, plain_gradient(8))
    assert loss == pytest.approx(float(loss_sum(replica.model, draw(0, 8)).detach()), rel=1e-5)


@pytest.mark.parametrize("most", [3, 8])
def test_gradient_is_zero_where_a_parameter_has_no_part_in_the_loss(most: int) -> None:
    replica = small_replica()
    engine = engine_of(replica, most=most)
    engine.gradients(draw, loss_sum, 0, 8, chance=1)
    first = next(replica.model.parameters())

    def of_the_first(model: nn.Module, batch: Tensor) -> Tensor:
        return first.sum() * len(batch)

    engine.gradients(draw, of_the_first, 0, 8, chance=1)
    assert first.grad is not None
    assert bool((first.grad == 8).all())
    assert replica.gradient.sum() == 8 * first.numel()


def test_another_backward_pass_adds_to_the_gradient_as_ever_when_there_are_engines() -> None:
    """Gradients of the model are views of one vector before, between and after an engine's passes."""
    replica = small_replica()
    other, engine = engine_of(replica), engine_of(replica)
    other.gradients(draw, loss_sum, 0, 8, chance=1)
    engine.gradients(draw, loss_sum, 0, 8, chance=1)
    torch.testing.assert_close(replica.gradient, plain_gradient(8))
    loss_sum(replica.model, draw(0, 8)).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(replica.gradient, 2 * plain_gradient(8))


def out_of_memory_above(room: int, asked: list[int]) -> Callable[[nn.Module, Tensor], Tensor]:
    """A loss whose backward pass runs out of memory, as those of real devices do, for more than so many
    samples: part of the gradient is written by then."""

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(context: object, values: Tensor) -> Tensor:
            return values.clone()

        @staticmethod
        def backward(context: object, *gradients: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        asked.append(len(batch))
        plain = loss_sum(model, batch)
        first = next(model.parameters())
        return plain + Full.apply(first).sum() if len(batch) > room else plain  # type: ignore[no-untyped-call]

    return loss


def test_micro_batch_is_computed_in_smaller_ones_when_memory_does_not_suffice() -> None:
    replica, asked = small_replica(), list[int]()
    engine = engine_of(replica)
    engine.gradients(draw, out_of_memory_above(3, asked), 0, 8, chance=1)
    assert asked == [8, 4, 2, 2, 2, 2]
    assert engine.most_samples == 2
    torch.testing.assert_close(replica.gradient, plain_gradient(8))


def test_peer_is_told_what_to_do_when_one_sample_is_too_much() -> None:
    engine = engine_of(small_replica())
    with pytest.raises(DeviceError, match="memory of cpu does not suffice for one sample of this run; close"):
        engine.gradients(draw, out_of_memory_above(0, []), 0, 8, chance=1)
    assert not engine.try_size(draw, out_of_memory_above(0, []), 1)
    assert engine.try_size(draw, loss_sum, 4)


def test_peer_is_told_what_to_do_when_held_out_samples_are_too_much() -> None:
    engine = engine_of(small_replica())
    engine.gradients(draw, loss_sum, 0, 8, chance=1)

    def look(model: nn.Module) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(DeviceError, match=r"held-out samples; close .* eval_every_steps = 0 in"):
        engine.judge(look)


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    engine = engine_of(small_replica())
    with pytest.raises(ZeroDivisionError):
        engine.judge(lambda model: 1 / 0)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine.judge(lambda model: model(torch.ones(1, 31)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine.gradients(lambda first, count: torch.ones(count, 31), loss_sum, 0, 8, chance=1)


@pytest.mark.parametrize("place", [BF16, FP16], ids=lambda place: place.precision)
def test_gradients_are_near_and_their_sum_is_float32_when_passes_are_less_precise(place: Place) -> None:
    replica, dtypes = small_replica(), set()
    engine = engine_of(replica, place, most=4)

    def watched(model: nn.Module, batch: Tensor) -> Tensor:
        dtypes.add(model(batch).dtype)
        return loss_sum(model, batch)

    engine.gradients(draw, watched, 0, 8, chance=1)
    assert dtypes == {torch.bfloat16 if place is BF16 else torch.float16}
    assert replica.gradient.dtype == torch.float32
    expected = plain_gradient(8)
    assert (replica.gradient - expected).norm() < 0.02 * expected.norm()


def test_gradient_too_small_for_float16_does_not_vanish() -> None:
    replica = small_replica()
    engine_of(replica, FP16).gradients(draw, lambda *each: loss_sum(*each) * 1e-7, 0, 8, chance=1)
    expected = plain_gradient(8) * 1e-7
    assert (replica.gradient - expected).norm() < 0.1 * expected.norm()


def test_micro_batch_is_computed_again_at_a_lower_scale_when_float16_overflows() -> None:
    replica = small_replica()
    engine = engine_of(replica, FP16)
    engine.gradients(draw, lambda *each: loss_sum(*each) * 1000, 0, 8, chance=1)
    expected = plain_gradient(8) * 1000
    assert (replica.gradient - expected).norm() < 0.02 * expected.norm()
    assert engine._scale is not None
    assert engine._scale.value < FIRST_SCALE


@pytest.mark.parametrize("place", [CPU, FP16], ids=lambda place: place.precision)
def test_what_is_not_finite_comes_back_once_it_is_no_overflow(place: Place) -> None:
    replica = small_replica()
    engine_of(replica, place).gradients(draw, lambda *each: loss_sum(*each) * float("nan"), 0, 8, chance=1)
    assert not replica.gradient.isfinite().all()


def test_loss_scale_grows_again_up_to_a_bound() -> None:
    scale = LossScale()
    while scale.overflowed():
        pass
    assert scale.value == 1
    for _ in range(30 * GROWS_AFTER):
        scale.fitted()
    assert scale.value == LARGEST_SCALE


def test_dropout_is_drawn_from_the_number_given_and_rests_while_judged() -> None:
    replica = Replica(nn.Sequential(nn.Linear(32, 4), nn.Dropout(0.5)), small_run(), FINGERPRINT)
    engine = engine_of(replica)
    gradients = []
    for chance in (1, 1, 2):
        engine.gradients(draw, loss_sum, 0, 8, chance)
        gradients.append(replica.gradient.clone())
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])

    looks = [engine.judge(lambda model, batch: model(batch), draw(0, 8)) for _ in range(2)]
    assert torch.equal(looks[0], looks[1])
    assert torch.equal(looks[0], replica.model[0](draw(0, 8)))  # type: ignore[index]
    assert replica.model.training
