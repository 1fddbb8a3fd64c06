"""Samples in, Σ of their gradients out: forward and backward passes of the one model on the one device.

A micro-batch that does not fit the memory is computed again in halves, and one that overflows float16 again
at a smaller loss scale (Micikevicius et al. 2018): no sample is lost to either. Sums are float32 whatever the
precision of the passes, because `backward` adds to float32.

A parameter's gradient is put where it belongs as soon as it is there, while it is in the cache. To have
`backward` add it to zeros that lie there costs a second and a third way through memory.

What is random in a model, such as dropout, is drawn from a number that the caller gives for each micro-batch.

Not covered: what is not finite for other reasons. Whoever takes the gradient looks at it (`Accumulator.add`).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from p2ptrain.errors import DeviceError
from p2ptrain.gradients.devices import Place, is_out_of_memory, release_memory

Draw = Callable[[int, int], Any]
"""(first, count) → a batch of samples `first … first + count - 1`, as `Task.batch` gives it."""
LossSum = Callable[[nn.Module, Any], Tensor]
"""As `Task.loss_sum`."""

FIRST_SCALE, LARGEST_SCALE = 2.0**16, 2.0**24
GROWS_AFTER = 2000
"""Micro-batches without overflow after which the loss scale is doubled, as torch's own scaler does."""

Result = TypeVar("Result")


def chance_of(seed: int, step: int, peer: str, first: int) -> int:
    """From which what is random in the model is drawn, in the micro-batch of that peer's step that begins
    with sample `first`."""
    drawn = hashlib.sha256(f"{seed}/{step}/{peer}/{first}/chance".encode())
    return int.from_bytes(drawn.digest()[:8], "big")


class LossScale:
    """What a float16 loss is multiplied by, so that small gradients do not vanish: a power of two."""

    def __init__(self) -> None:
        self.value = FIRST_SCALE
        self._fine = 0

    def overflowed(self) -> bool:
        """The gradient was not finite: go down. False if that is no use any more."""
        self._fine = 0
        if self.value <= 1:
            return False
        self.value /= 2
        return True

    def fitted(self) -> None:
        """The gradient was finite; after many of those, try more."""
        self._fine += 1
        if self._fine >= GROWS_AFTER:
            self._fine, self.value = 0, min(2 * self.value, LARGEST_SCALE)


class Engine:
    """The passes of one peer. Only the compute thread may use it; modules stay in the mode, training or not,
    that they came in."""

    def __init__(
        self, model: nn.Module, gradient: Tensor, place: Place, most_samples: int, *, compiled: bool = False
    ) -> None:
        """`gradient` (float32 [numel], on the device of the place) is what the model's `grad` are views of;
        `most_samples` in one pass. `compiled`: by `torch.compile`, at the first pass."""
        self.place = place
        self.most_samples = most_samples
        """Fewer than it began with once the memory did not suffice."""
        self._model, self._gradient = model, gradient
        self._forward: nn.Module = model
        self._compile_faults: tuple[type[Exception], ...] = ()
        if compiled:
            from torch._dynamo.exc import TorchDynamoException

            self._forward = torch.compile(model)  # type: ignore[assignment]
            self._compile_faults = (TorchDynamoException,)
        self._scale = LossScale() if place.precision == "fp16" else None
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._places: list[Tensor | None] | None = None
        """Where the gradient of each of these belongs, during a pass of this engine."""
        self._arrived: set[int] = set()
        """Those of this micro-batch that have a gradient already."""
        for number, parameter in enumerate(self._trained):
            take = partial(self._take, number)
            parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]

    def gradients(self, draw: Draw, loss_sum: LossSum, first: int, count: int, chance: int) -> float:
        """Σ of the gradients of samples `first … first + count - 1` into `gradient`; returns Σ of losses.

        Raises DeviceError if the memory does not suffice for one sample, or the model cannot be compiled.
        """
        while True:
            self._seed(chance)
            try:
                loss = self._passes(draw, loss_sum, first, count)
            except self._compile_faults as error:
                raise DeviceError(
                    f"torch.compile cannot compile this model here: {_first_line(error)}; set compile = "
                    "false in the peer file, or install a C++ compiler if it lacks one"
                ) from error
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                tried = min(self.most_samples, count)
            else:
                if self._scale is None or not math.isfinite(loss):
                    return loss
                if bool(self._gradient.isfinite().all()):
                    self._gradient.mul_(1 / self._scale.value)  # exact: it is a power of two
                    self._scale.fitted()
                    return loss
                if not self._scale.overflowed():
                    return loss
                continue
            # Outside of the handler: while the error lives, its traceback keeps the tensors that did not fit.
            self._shrink(tried)

    def try_size(self, draw: Draw, loss_sum: LossSum, size: int) -> bool:
        """One pass of that size, for `measure_sizes`; False if the memory does not suffice for it."""
        try:
            self._one_pass(draw(0, size), loss_sum)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        release_memory(self.place.device)
        return False

    def refuse(self) -> NoReturn:
        """Raises DeviceError: not even one sample fits the memory."""
        on_cpu = self.place.device.type == "cpu"
        other = "join from a larger machine" if on_cpu else 'set device = "cpu" in the peer file'
        raise DeviceError(
            f"the memory of {self.place.found} does not suffice for one sample of this run; close what else "
            f"uses it, or {other}"
        )

    def judge(self, look: Callable[..., Result], *arguments: Any) -> Result:
        """What `look(model, …)` returns, with the model as it is used and not trained: without dropout, and
        in float32, so that peers' figures compare whatever their precision.

        Raises DeviceError if the memory does not suffice for that."""
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        try:
            return look(self._model, *arguments)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceError(
                f"the memory of {self.place.found} does not suffice to look at held-out samples; close what "
                "else uses it, or set eval_every_steps = 0 in the peer file"
            ) from error
        finally:
            for module, training in modes:
                module.training = training

    @torch.no_grad()
    def mean_loss(self, draw: Draw, loss_sum: LossSum, count: int) -> float:
        """Of the first `count` samples, by the model as it is used; leaves no gradient."""
        firsts = range(0, count, self.most_samples)
        batches = (draw(first, min(self.most_samples, count - first)) for first in firsts)
        return math.fsum(float(self.judge(loss_sum, batch)) for batch in batches) / count

    def _passes(self, draw: Draw, loss_sum: LossSum, first: int, count: int) -> float:
        self._arrived.clear()
        losses = []
        for start in range(first, first + count, self.most_samples):
            size = min(self.most_samples, first + count - start)
            with self._receiving():
                losses.append(self._one_pass(draw(start, size), loss_sum))
        for number, parameter in enumerate(self._trained):
            if number not in self._arrived and parameter.grad is not None:
                parameter.grad.zero_()  # it had no part in the loss
        return math.fsum(losses)

    @contextlib.contextmanager
    def _receiving(self) -> Iterator[None]:
        """While entered, `backward` meets no gradients, so it hands over its own."""
        self._places = [parameter.grad for parameter in self._trained]
        for parameter in self._trained:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, place in zip(self._trained, self._places, strict=True):
                parameter.grad = place
            self._places = None

    def _take(self, number: int, parameter: Tensor) -> None:
        """Called by `backward` when that parameter's gradient of this pass is there."""
        place = None if self._places is None else self._places[number]
        if place is None or parameter.grad is None:
            return  # the pass is none of this engine's
        if number in self._arrived:
            place.add_(parameter.grad)
        else:
            self._arrived.add(number)
            place.copy_(parameter.grad)
        parameter.grad = None

    def _one_pass(self, batch: Any, loss_sum: LossSum) -> float:
        with self._autocast():
            loss = loss_sum(self._forward, batch).float()
        scaled = loss if self._scale is None else loss * self._scale.value
        scaled.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _seed(self, chance: int) -> None:
        """As `torch.manual_seed`, which also tells devices that are not used, and takes a millisecond to."""
        torch.default_generator.manual_seed(chance)
        if self.place.device.type != "cpu":
            torch.get_device_module(self.place.device).manual_seed(chance)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.place.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.place.precision == "bf16" else torch.float16
        return torch.autocast(self.place.device.type, dtype=dtype)

    def _shrink(self, tried: int) -> None:
        release_memory(self.place.device)
        if tried <= 1:
            self.refuse()
        self.most_samples = tried // 2


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
