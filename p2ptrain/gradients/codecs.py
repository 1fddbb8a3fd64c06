"""A chunk of float32 values ⇄ bytes, with a stated worst error.

A codec must be exact about itself: `encode(decode(encode(x))) == encode(x)`, so a value that has been through
it once is not changed by going through it again (`lowrank` says how nearly), and decoding gives the same bits
on every kernel. The functions are pure and hold no state; chunks of 16 k to 256 k values stay in the cache
and run fastest. A chunk has at least one value.

Not covered: what becomes of what a codec loses; see `feedback`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from p2ptrain.errors import BadMessage

Buffer = bytes | bytearray | memoryview

LARGEST = 2.0**117
"""No value beyond ± this is encoded or decoded. The totals of 1024 members (`records.MAX_ROSTER`) within it
cannot add up to more than a float32 holds, and their mean is within it again: an average of accepted chunks
can always be sent."""


class Codec(Protocol):
    """How a chunk travels."""

    @property
    def name(self) -> str: ...

    @property
    def feedback(self) -> bool:
        """Whether it loses so much that this must be kept and sent later."""
        ...

    @property
    def exact(self) -> bool:
        """Whether it loses nothing at all."""
        ...

    @property
    def quick(self) -> bool:
        """Whether a chunk takes less time than handing it to another thread does."""
        ...

    def encoded_bytes(self, count: int) -> int:
        """Size of `count` encoded values, in bytes."""
        ...

    def encode(self, values: Tensor) -> Buffer:
        """The bytes of a chunk (float32 [n], contiguous); they may be those of `values` itself.

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
    exact = True
    feedback = False
    quick = True

    def encoded_bytes(self, count: int) -> int:
        return 4 * count

    def encode(self, values: Tensor) -> Buffer:
        if not _are_small(values):
            _largest_to_send(values)
        return values.numpy().data.cast("B").toreadonly()

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
    exact = False
    feedback = False
    quick = True

    def encoded_bytes(self, count: int) -> int:
        return 4 + 2 * count

    def encode(self, values: Tensor) -> bytes:
        scale, half = _to_half(values)
        return b"".join((struct.pack("<f", scale), half.numpy().data))

    def decode(self, data: Buffer, out: Tensor) -> None:
        _check_size(self, data, out)
        half = torch.empty(out.numel(), dtype=torch.float16)
        _copy_bytes(memoryview(data)[4:], half)
        out.copy_(half).mul_(_received_scale(self, data))
        _check_received(out)


# With 2^-125 the smallest fp16, 2^-24, still decodes to a float32 exactly (2^-149, the smallest there is),
# and with 2^102 the value `LARGEST` comes to 2^15.
_SMALLEST_SCALE, _LARGEST_SCALE = -125, 102


def _to_half(values: Tensor) -> tuple[float, Tensor]:
    """A power of two, and fp16 [n]: their product is `values`, rounded."""
    mantissa, exponent = math.frexp(_largest_to_send(values))
    # From here up, rounding to fp16's 11 bits carries into the next power of two. Without this the
    # largest value would overflow, and a second encoding would pick another scale than the first.
    if mantissa >= 1 - 2**-12:
        exponent += 1
    scale_exponent = max(exponent - 16, _SMALLEST_SCALE)
    half = torch.mul(values, _float32(math.ldexp(1.0, -scale_exponent))).to(torch.float16)
    return math.ldexp(1.0, scale_exponent), half


def _received_scale(codec: Codec, data: Buffer) -> Tensor:
    """The scale that `data` begins with."""
    (scale,) = struct.unpack_from("<f", data)
    mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5 or not _SMALLEST_SCALE <= exponent - 1 <= _LARGEST_SCALE:
        raise BadMessage(
            f"the scale of an {codec.name} chunk must be a power of two "
            f"from 2^{_SMALLEST_SCALE} to 2^{_LARGEST_SCALE}, not {scale}"
        )
    return _float32(scale)


class Bf16:
    """The upper half of each float32, rounded to nearest even: 2 bytes a value.

    |decoded - x| ≤ max(2^-8 · |x|, 2^-126): what is smaller than a normal float32 may come out as zero.
    """

    name = "bf16"
    exact = False
    feedback = True
    quick = True

    def encoded_bytes(self, count: int) -> int:
        return 2 * count

    def encode(self, values: Tensor) -> bytes:
        if not _are_small(values):
            _largest_to_send(values)
        return values.to(torch.bfloat16).view(torch.int16).numpy().tobytes()

    def decode(self, data: Buffer, out: Tensor) -> None:
        _check_size(self, data, out)
        upper = torch.empty(out.numel(), dtype=torch.int16)
        _copy_bytes(data, upper)
        out.copy_(upper.view(torch.bfloat16))
        _check_received(out)


# -- integers ------------------------------------------------------------------------------------------------


class Int8:
    """Whole numbers from -127 to 127 times one scale per block of 128 values: the scales as bf16, then a byte
    a value.

    |decoded - x| ≤ max(largest |x| of the block / 252, 2^-126).
    """

    name = "int8"
    exact = False
    feedback = True
    quick = True
    block, most = 128, 127

    def encoded_bytes(self, count: int) -> int:
        return 2 * _blocks(count, self.block) + count

    def encode(self, values: Tensor) -> bytes:
        scales, levels = _to_levels(values, self.block, self.most)
        return b"".join((scales, levels.numpy().data))

    def decode(self, data: Buffer, out: Tensor) -> None:
        _check_size(self, data, out)
        levels = torch.empty(out.numel(), dtype=torch.int8)
        _copy_bytes(memoryview(data)[2 * _blocks(out.numel(), self.block) :], levels)
        _from_levels(self, data, levels, self.block, out)


class Int4:
    """Whole numbers from -7 to 7 times one scale per block of 64 values: the scales as bf16, then a byte for
    two values.

    |decoded - x| ≤ max(largest |x| of the block / 13.9, 2^-126).

    A byte holds a value of the chunk's first half in its low four bits and the one as far into the second
    half in its high ones: so both halves are runs of memory and not every other value.
    """

    name = "int4"
    exact = False
    feedback = True
    quick = False
    block, most = 64, 7

    def encoded_bytes(self, count: int) -> int:
        return 2 * _blocks(count, self.block) + (count + 1) // 2

    def encode(self, values: Tensor) -> bytes:
        scales, levels = _to_levels(values, self.block, self.most)
        half = (len(levels) + 1) // 2
        pairs = levels[:half] & 15
        pairs[: len(levels) - half].bitwise_or_(levels[half:].bitwise_left_shift_(4))
        return b"".join((scales, pairs.numpy().data))

    def decode(self, data: Buffer, out: Tensor) -> None:
        _check_size(self, data, out)
        count = out.numel()
        half = (count + 1) // 2
        pairs, levels = torch.empty(half, dtype=torch.int8), torch.empty(count, dtype=torch.int8)
        _copy_bytes(memoryview(data)[2 * _blocks(count, self.block) :], pairs)
        torch.bitwise_right_shift(pairs[: count - half], 4, out=levels[half:])
        # Shifted up and down again, the low four bits are a signed number, too.
        torch.bitwise_left_shift(pairs, 4, out=levels[:half]).bitwise_right_shift_(4)
        _from_levels(self, data, levels, self.block, out)


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


def _to_levels(values: Tensor, block: int, most: int) -> tuple[bytes, Tensor]:
    """The blocks' scales (bf16, as bytes) and int8 [n], within ±`most`: their product is `values`, rounded.

    A scale is the block's largest value / `most`, rounded to 8 bits: by at most 2^-8 of itself.
    So the largest value still comes to `most`, and none beyond; and its product with a level has 15 bits, so
    it is exact, and encoding once more finds the same scale. No scale is below the smallest normal number.
    """
    count = len(values)
    whole = F.pad(values, (0, -count % block)) if count % block else values
    rows = whole.view(-1, block)
    largest = rows.abs().amax(1)
    _largest_to_send(largest)
    scales = largest.div_(_float32(most)).clamp_(min=_SMALLEST_NORMAL).to(torch.bfloat16)
    levels = torch.mul(rows, scales.float().reciprocal_()[:, None]).round_().to(torch.int8)
    return scales.view(torch.int16).numpy().tobytes(), levels.view(-1)[:count]


def _from_levels(codec: Codec, data: Buffer, levels: Tensor, block: int, out: Tensor) -> None:
    """`levels` times the scales that `data` begins with, into `out`."""
    count = out.numel()
    bits = torch.empty(_blocks(count, block), dtype=torch.int16)
    _copy_bytes(memoryview(data)[: 2 * len(bits)], bits)
    scales = bits.view(torch.bfloat16).float()
    low, high = (extreme.item() for extreme in torch.aminmax(scales))
    if not _SMALLEST_NORMAL <= low <= high <= LARGEST:  # written so that NaN is refused too
        raise BadMessage(
            f"the scales of an {codec.name} chunk must be from 2^-126 to {LARGEST:.3g}, not {low} to {high}"
        )
    whole = count - count % block
    out.copy_(levels)
    out[:whole].view(-1, block).mul_(scales[: whole // block, None])
    out[whole:].mul_(scales[-1])
    if high * 128 > LARGEST:
        _check_received(out)


_SMALLEST_NORMAL = 2.0**-126


# -- the largest values only ---------------------------------------------------------------------------------


class TopK:
    """The 1/32 of the chunk's values that are largest, as `fp16` holds them: a float32 scale, how many of
    them lie in each run of 65,536 values, where in their run, and what they are: 4 bytes a value that is
    kept, an eighth of a byte a value of the chunk.

    A value that is kept has the error of fp16; one that is not is lost, and is no larger than any that is
    kept. Together: Σ (decoded - x)² ≤ (1 - kept / count) · Σ x², beside the error of fp16. Of values that are
    equal in fp16 the first ones are kept.
    """

    name = "topk"
    exact = False
    feedback = True
    quick = False

    def kept(self, count: int) -> int:
        return _blocks(count, 32)

    def encoded_bytes(self, count: int) -> int:
        return 4 + 4 * _blocks(count, _RUN) + 4 * self.kept(count)

    def encode(self, values: Tensor) -> bytes:
        count, kept = len(values), self.kept(len(values))
        scale, half = _to_half(values)
        bits = half.view(torch.int16).numpy()
        size = bits & 0x7FFF  # without its sign, a float sorts as the integer that its bits are
        least = np.partition(size, count - kept)[count - kept]
        chosen = size > least
        chosen[np.flatnonzero(size == least)[: kept - np.count_nonzero(chosen)]] = True
        where = np.flatnonzero(chosen)
        runs = np.bincount(where // _RUN, minlength=_blocks(count, _RUN))
        return b"".join(
            (
                struct.pack("<f", scale),
                runs.astype("<u4").tobytes(),
                (where % _RUN).astype("<u2").tobytes(),
                bits[where].tobytes(),
            )
        )

    def decode(self, data: Buffer, out: Tensor) -> None:
        _check_size(self, data, out)
        count, kept = out.numel(), self.kept(out.numel())
        scale = _received_scale(self, data)
        runs = np.frombuffer(data, "<u4", _blocks(count, _RUN), 4).astype(np.int64)
        if runs.sum() != kept:
            raise BadMessage(f"a topk chunk of {count} values keeps {kept}, not {runs.sum()}")
        at = 4 + 4 * len(runs)
        where = np.repeat(np.arange(len(runs)) * _RUN, runs) + np.frombuffer(data, "<u2", kept, at)
        if where[-1] >= count or not (where[1:] > where[:-1]).all():
            raise BadMessage(f"the places in a topk chunk of {count} values must rise and lie within it")
        values = torch.empty(kept, dtype=torch.float16)
        _copy_bytes(memoryview(data)[at + 2 * kept :], values)
        values = values.float().mul_(scale)
        _check_received(values)
        out.zero_()
        out.numpy()[where] = values.numpy()


_RUN = 2**16


# -- two thin matrices ---------------------------------------------------------------------------------------


class LowRank:
    """The chunk as a matrix of 128 columns, approximated by the product of two factors of rank 4: both as
    `fp16` chunks, together 16 bytes for 256 values and 1 KB a chunk. A chunk of fewer than 1,024 values is an
    `fp16` chunk.

    ‖decoded - x‖ ≤ 1.01 · ‖x‖ (Euclidean, of the chunk) where some |x| > 2^-100: a matrix whose singular
    values are all alike comes through hardly at all, one of rank 4 or less nearly as in `fp16`. So encoding
    again what was decoded changes it, though whole rows but little.

    This is not PowerSGD (Vogels et al. 2019), though the power iteration is. There, all members share one
    factor, average the other and then the first, which takes two rounds in a row and the shapes of the
    model's matrices. Here each member has factors of its own, found by two iterations from a fixed start, the
    reducer adds up the products and approximates their mean again; a row of the model's matrices may begin
    anywhere in one of the chunk's.
    """

    name = "lowrank"
    exact = False
    feedback = True
    quick = False
    columns, rank, least = 128, 4, 1024

    def encoded_bytes(self, count: int) -> int:
        if count < self.least:
            return _FP16.encoded_bytes(count)
        return _FP16.encoded_bytes(self._left(count)) + _FP16.encoded_bytes(self.columns * self.rank)

    def encode(self, values: Tensor) -> bytes:
        count = len(values)
        if count < self.least:
            return _FP16.encode(values)
        # Within ±1, so that no square overflows.
        _, exponent = math.frexp(_largest_to_send(values))
        scale = max(exponent, -126)
        matrix = torch.mul(values, _float32(math.ldexp(1.0, -scale)))
        matrix = F.pad(matrix, (0, -count % self.columns)).view(-1, self.columns)
        right = _START
        for _ in range(2):
            left, _ = torch.linalg.qr(matrix @ right)
            right, _ = torch.linalg.qr(matrix.T @ left)
        right = right.half().float()  # as it will be decoded, so that the other factor can make up for it
        left = (matrix @ right).mul_(_float32(math.ldexp(1.0, scale - _SPARE)))
        return _FP16.encode(left.reshape(-1)) + _FP16.encode(right.reshape(-1))

    def decode(self, data: Buffer, out: Tensor) -> None:
        _check_size(self, data, out)
        count = out.numel()
        if count < self.least:
            _FP16.decode(data, out)
            return
        left, right = torch.empty(self._left(count)), torch.empty(self.columns * self.rank)
        at = _FP16.encoded_bytes(len(left))
        _FP16.decode(memoryview(data)[:at], left)
        _FP16.decode(memoryview(data)[at:], right)
        if not _largest(right) <= 2:
            raise BadMessage(f"the right factor of a lowrank chunk must be within ±2, not {_largest(right)}")
        left.mul_(_float32(2.0**_SPARE))
        # One product and one sum at a time: what a matrix product rounds, and when, differs between kernels.
        rows, columns = left.view(-1, self.rank, 1), right.view(self.columns, self.rank)
        matrix = rows[:, 0] * columns[:, 0]
        for column in range(1, self.rank):
            matrix.add_(rows[:, column] * columns[:, column])
        out.copy_(matrix.view(-1)[:count]).clamp_(-LARGEST, LARGEST)

    def _left(self, count: int) -> int:
        return _blocks(count, self.columns) * self.rank


_FP16 = Fp16()
_SPARE = 4
"""The left factor travels divided by 2^4: its values are up to √128 times as large as the chunk's."""
_START = torch.from_numpy(
    np.random.default_rng(0).standard_normal((LowRank.columns, LowRank.rank)).astype(np.float32)
)


CODECS: Mapping[str, Codec] = MappingProxyType(
    {codec.name: codec for codec in (Fp32(), Fp16(), Bf16(), Int8(), Int4(), TopK(), LowRank())}
)


def _float32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _largest(values: Tensor) -> float:
    """Largest absolute value; NaN if there is a NaN. (numpy is twice as fast as `torch.aminmax`, and that 10
    times as `isfinite().all()`.)"""
    array = values.numpy()
    return max(-float(array.min()), float(array.max()))


def _are_small(values: Tensor) -> bool:
    """Whether the values are certainly finite and within `LARGEST`: no value is larger than the root of the
    sum of all squares, and if that is finite, none is beyond 2^64. (To look for the largest takes longer.)"""
    return math.isfinite(torch.dot(values, values).item())


def _largest_to_send(values: Tensor) -> float:
    largest = _largest(values)
    if not largest <= LARGEST:  # written so that NaN is refused too
        raise ValueError(f"a chunk to encode must be finite and within ±{LARGEST:.3g}, not {largest}")
    return largest


def _check_received(values: Tensor) -> None:
    if not _are_small(values) and not (largest := _largest(values)) <= LARGEST:
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
