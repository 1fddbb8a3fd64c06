"""A chunk of float32 values ⇄ bytes, with a stated worst error.

A codec must be exact about itself: `encode(decode(encode(x))) == encode(x)`, so a value that has been through
it once is not changed by going through it again, and decoding gives the same bits on every kernel. The
functions are pure and hold no state; chunks of 16 k to 256 k values stay in the cache and run fastest. A
chunk has at least one value.

Not covered: error feedback. What a codec loses of a contribution is lost.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from p2ptrain.errors import BadMessage

Buffer = bytes | bytearray | memoryview

LARGEST = 2.0**119
"""No value beyond ± this is encoded or decoded. The totals of 256 members (`records.MAX_ROSTER`) within it
cannot add up to more than a float32 holds, and their mean is within it again: an average of accepted chunks
can always be sent."""


class Codec(Protocol):
    """How a chunk travels."""

    @property
    def name(self) -> str: ...

    def encoded_bytes(self, count: int) -> int:
        """Size of `count` encoded values, in bytes."""
        ...

    def encode(self, values: Tensor) -> bytes:
        """The bytes of a chunk (float32 [n], contiguous).

        Raises ValueError if a value is not finite or beyond `LARGEST`: what we send was ours to check.
        """
        ...

    def decode(self, data: Buffer, out: Tensor) -> None:
        """Write the chunk into `out` (float32 [n], contiguous).

        Raises BadMessage if the size is not that of n values, or a value is not finite or beyond `LARGEST`;
        what `out` holds then must not be used.
        """
        ...


def codec_named(name: str) -> Codec:
    """The codec that a run file calls `name`."""
    if name not in CODECS:
        raise ValueError(f"there is no codec {name!r}; there are {', '.join(sorted(CODECS))}")
    return CODECS[name]


class Fp32:
    """The values themselves: 4 bytes each, no error."""

    name = "fp32"

    def encoded_bytes(self, count: int) -> int:
        return 4 * count

    def encode(self, values: Tensor) -> bytes:
        _largest_to_send(values)
        return values.numpy().tobytes()

    def decode(self, data: Buffer, out: Tensor) -> None:
        _check_size(self, data, out)
        _copy_bytes(data, out)
        _check_received(out)


class Fp16:
    """Half precision under one power-of-two scale per chunk: a float32 scale, then 2 bytes a value.

    The scale brings the largest value of the chunk into [2^15, 2^16), the top of what fp16 holds, so that
    small gradients do not underflow. Multiplying by it is exact both ways, so all that is lost is the
    rounding to fp16: |decoded - x| ≤ max(2^-11 · |x|, 2^-40 · largest |x| of the chunk).
    """

    name = "fp16"

    def encoded_bytes(self, count: int) -> int:
        return 4 + 2 * count

    def encode(self, values: Tensor) -> bytes:
        mantissa, exponent = math.frexp(_largest_to_send(values))
        # From here up, rounding to fp16's 11 bits carries into the next power of two. Without this the
        # largest value would overflow, and a second encoding would pick another scale than the first.
        if mantissa >= 1 - 2**-12:
            exponent += 1
        scale_exponent = max(exponent - 16, _SMALLEST_SCALE)
        half = torch.mul(values, _float32(math.ldexp(1.0, -scale_exponent))).to(torch.float16)
        return b"".join((struct.pack("<f", math.ldexp(1.0, scale_exponent)), half.numpy().data))

    def decode(self, data: Buffer, out: Tensor) -> None:
        _check_size(self, data, out)
        (scale,) = struct.unpack_from("<f", data)
        mantissa, exponent = math.frexp(scale)
        if mantissa != 0.5 or not _SMALLEST_SCALE <= exponent - 1 <= _LARGEST_SCALE:
            raise BadMessage(
                f"the scale of an fp16 chunk must be a power of two "
                f"from 2^{_SMALLEST_SCALE} to 2^{_LARGEST_SCALE}, not {scale}"
            )
        half = torch.empty(out.numel(), dtype=torch.float16)
        _copy_bytes(memoryview(data)[4:], half)
        out.copy_(half).mul_(_float32(scale))
        _check_received(out)


# With 2^-125 the smallest fp16, 2^-24, still decodes to a float32 exactly (2^-149, the smallest there is),
# and with 2^104 the value `LARGEST` comes to 2^15.
_SMALLEST_SCALE, _LARGEST_SCALE = -125, 104

CODECS: Mapping[str, Codec] = MappingProxyType({codec.name: codec for codec in (Fp32(), Fp16())})


def _float32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _largest(values: Tensor) -> float:
    """Largest absolute value; NaN if there is a NaN. (`aminmax` is 10 times faster than
    `isfinite().all()`.)"""
    low, high = torch.aminmax(values)
    return max(-low.item(), high.item())


def _largest_to_send(values: Tensor) -> float:
    largest = _largest(values)
    if not largest <= LARGEST:  # written so that NaN is refused too
        raise ValueError(f"a chunk to encode must be finite and within ±{LARGEST:.3g}, not {largest}")
    return largest


def _check_received(values: Tensor) -> None:
    largest = _largest(values)
    if not largest <= LARGEST:
        raise BadMessage(f"a chunk must be finite and within ±{LARGEST:.3g}, but holds {largest}")


def _check_size(codec: Codec, data: Buffer, out: Tensor) -> None:
    expected = codec.encoded_bytes(out.numel())
    if len(data) != expected:
        raise BadMessage(
            f"a {codec.name} chunk of {out.numel()} values has {expected} bytes, not {len(data)}"
        )


def _copy_bytes(data: Buffer, out: Tensor) -> None:
    """`data` as the memory of `out`. (`torch.frombuffer` would warn of every read-only buffer.)"""
    out.numpy().data.cast("B")[:] = data
