"""Which device a peer computes gradients on, and how precisely: tried out first, then chosen by rule.

The choice is local. Gradients differ in their last bits between devices, as they do between samples; what all
peers must have alike, parameters and optimizer state, is kept and stepped on the CPU (ADR 25).

Not covered: several devices for one peer (start one peer for each), and models larger than a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from p2ptrain.errors import DeviceError

Precision = Literal["fp32", "bf16", "fp16"]
ACCELERATORS = ("cuda", "mps", "xpu")
TRIED_WIDTH = 64


@dataclass(frozen=True)
class Found:
    """A device as it was found on this machine."""

    name: str
    """As torch spells it: `cpu`, `cuda:0`."""
    title: str = ""
    """As its maker calls it; may be empty."""
    bf16: bool = False
    """Whether it multiplies bfloat16 in hardware: emulated, it is slower than float32."""
    flaw: str = ""
    """Why it cannot compute; empty if it can."""

    def __str__(self) -> str:
        return f"{self.name} ({self.title})" if self.title else self.name


@dataclass(frozen=True)
class Place:
    """Where forward and backward passes run, and in which precision."""

    found: Found
    precision: Precision

    @property
    def device(self) -> torch.device:
        return torch.device(self.found.name)


CPU = Place(Found("cpu"), "fp32")


def choose_place(device: str, precision: str, found: Sequence[Found]) -> Place:
    """The place that the peer file's `device` and `precision` mean among what was found, the CPU among it.

    `auto` is the first accelerator that works, else the CPU; and there float32, on an accelerator bfloat16
    where the hardware has it and float16 elsewhere. Raises DeviceError if what was asked for is not there.
    """
    chosen = _chosen_device(device, found)
    return Place(chosen, _chosen_precision(precision, chosen))


def _chosen_device(wanted: str, found: Sequence[Found]) -> Found:
    if wanted == "auto":
        working = [each for each in found if not each.flaw]
        return min(working, key=lambda each: each.name == "cpu")
    name = wanted if ":" in wanted or wanted == "cpu" else f"{wanted}:0"
    for each in found:
        if each.name == name and not each.flaw:
            return each
        if each.name == name:
            raise DeviceError(
                f"device {each} does not compute: {each.flaw}; mend its driver, or set device to another or "
                'to "auto" in the peer file'
            )
    there = ", ".join(str(each) for each in found)
    raise DeviceError(
        f'the peer file asks for device "{wanted}", but torch finds only {there} on this machine; choose one '
        'of them or "auto", or install a torch that is built for that device'
    )


def _chosen_precision(wanted: str, on: Found) -> Precision:
    match wanted:
        case "fp32":
            return "fp32"
        case "bf16" if on.bf16:
            return "bf16"
        case "fp16" if on.name != "cpu":
            return "fp16"
        case "auto" if on.name == "cpu":
            return "fp32"
        case "auto":
            return "bf16" if on.bf16 else "fp16"
    other = "fp16" if on.name != "cpu" else "fp32"
    raise DeviceError(
        f'precision "{wanted}" would be slower than float32 on {on}, which has no instructions for it; set '
        f'precision to "{other}" or "auto" in the peer file'
    )


# -- trying out ----------------------------------------------------------------------------------------------


def find_devices() -> list[Found]:
    """The CPU, and every accelerator that torch sees, each tried with a small product."""
    found = [Found("cpu", bf16=_cpu_has_bf16())]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type not in ACCELERATORS:
        return found
    count = torch.accelerator.device_count()
    return found + [_try_out(f"{accelerator.type}:{index}") for index in range(count)]


def _try_out(name: str) -> Found:
    device = torch.device(name)
    module = torch.get_device_module(device)
    try:
        title = module.get_device_name(device) if hasattr(module, "get_device_name") else ""
        ones = torch.ones(TRIED_WIDTH, TRIED_WIDTH, device=device, requires_grad=True)
        (ones @ ones).sum().backward()  # type: ignore[no-untyped-call]
        gradient = ones.grad
        if gradient is None or not bool((gradient == 2 * TRIED_WIDTH).all()):
            return Found(name, title, flaw="it gets a product of small whole numbers wrong")
        return Found(name, title, bf16=_accelerator_has_bf16(device))
    except (RuntimeError, AssertionError) as error:  # drivers too old, devices in use by one process alone
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return Found(name, flaw=reason[0][:200])


def _cpu_has_bf16() -> bool:
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _accelerator_has_bf16(device: torch.device) -> bool:
    match device.type:
        case "cuda":
            with torch.cuda.device(device):
                return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        case "xpu":
            return bool(torch.xpu.is_bf16_supported())
        case _:
            return False  # Apple's first generation has none, and nothing tells which one this is


# -- memory --------------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that much memory was not to be had; another error is another problem."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # MPS and the CPU's allocator say so in words only.
    words = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in words or "can't allocate memory" in words)


def release_memory(device: torch.device) -> None:
    """Give what torch keeps for later back to the device; the CPU's allocator keeps nothing."""
    empty = getattr(torch.get_device_module(device), "empty_cache", None)
    if empty is not None:
        empty()
