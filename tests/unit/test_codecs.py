"""Codecs: the stated worst error holds, encoding again changes nothing, no hostile chunk gets through."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from p2ptrain.errors import BadMessage
from p2ptrain.gradients.codecs import CODECS, LARGEST, Codec, codec_named

codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)

floats = st.floats(-LARGEST, LARGEST, width=32)
# Chunks whose values are all of one size somewhere on the scale, besides those that mix all sizes.
sized = st.builds(
    lambda exponent, values: [value * 2.0**exponent for value in values],
    st.integers(-140, 118),
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60),
)
chunks = st.one_of(sized, st.lists(floats, min_size=1, max_size=60)).map(torch.tensor)


def decoded(codec: Codec, data: bytes, count: int) -> Tensor:
    out = torch.full((count,), float("nan"))
    codec.decode(data, out)
    return out


@given(values=chunks)
def test_fp32_gives_back_the_same_bits_always(values: Tensor) -> None:
    codec = codec_named("fp32")
    out = decoded(codec, codec.encode(values), len(values))
    assert torch.equal(out.view(torch.int32), values.view(torch.int32))


@given(values=chunks)
@example(values=torch.tensor([0.0, -0.0]))
@example(values=torch.tensor([2.0**-149]))
@example(values=torch.tensor([2.0**-126, 3 * 2.0**-149]))
@example(values=torch.tensor([LARGEST, -LARGEST, 1e-30]))
@example(values=torch.tensor([1 - 2.0**-12, 2.0**-24]))
@example(values=torch.tensor([1 - 2.0**-12 - 2.0**-24, 2.0**-24]))
def test_fp16_stays_within_its_stated_error_always(values: Tensor) -> None:
    codec = codec_named("fp16")
    exact = values.double()
    error = (decoded(codec, codec.encode(values), len(values)).double() - exact).abs()
    bound = torch.maximum(exact.abs() * 2.0**-11, exact.abs().max() * 2.0**-40)
    assert (error <= bound).all()


@codecs
@given(values=chunks)
@example(values=torch.tensor([1 - 2.0**-13, 2.0**-23]))  # rounds up to the next power of two
@example(values=torch.tensor([2.0**-149, -(2.0**-148)]))
@example(values=torch.tensor([LARGEST * (1 - 2.0**-13), 1.0]))
def test_codec_changes_nothing_when_a_value_passes_it_again(codec: Codec, values: Tensor) -> None:
    once = codec.encode(values)
    assert codec.encode(decoded(codec, once, len(values))) == once


@codecs
@given(values=chunks)
def test_codec_gives_the_announced_size_always(codec: Codec, values: Tensor) -> None:
    assert len(codec.encode(values)) == codec.encoded_bytes(len(values))


@pytest.mark.parametrize("size", [1.0, 1e-10, 1e-30, 1e-37, 1e30])
def test_fp16_keeps_11_bits_when_the_whole_chunk_is_tiny_or_huge(size: float) -> None:
    values = torch.linspace(0.001, 1, 1000) * size
    codec = codec_named("fp16")
    error = (decoded(codec, codec.encode(values), 1000).double() - values.double()).abs()
    assert (error <= values.double() * 2.0**-11).all()


@codecs
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2 * LARGEST, -2 * LARGEST])
def test_codec_refuses_to_encode_when_a_value_is_out_of_contract(codec: Codec, bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        codec.encode(torch.tensor([1.0, bad, 2.0]))


@codecs
@pytest.mark.parametrize("change", [-5, -1, 1, 4])
def test_codec_refuses_to_decode_when_the_size_is_wrong(codec: Codec, change: int) -> None:
    data = bytes(codec.encoded_bytes(3) + change)
    with pytest.raises(BadMessage, match=r"chunk of 3 values has \d+ bytes"):
        codec.decode(data, torch.empty(3))


@codecs
def test_codec_refuses_to_decode_when_there_is_nothing(codec: Codec) -> None:
    with pytest.raises(BadMessage):
        codec.decode(b"", torch.empty(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1.5 * LARGEST])
def test_fp32_refuses_to_decode_when_a_value_is_out_of_contract(bad: float) -> None:
    with pytest.raises(BadMessage, match="must be finite"):
        codec_named("fp32").decode(struct.pack("<3f", 1.0, bad, 2.0), torch.empty(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_fp16_refuses_to_decode_when_a_value_is_not_finite(bad: float) -> None:
    with pytest.raises(BadMessage, match="must be finite"):
        codec_named("fp16").decode(struct.pack("<f3e", 1.0, 1.0, bad, 2.0), torch.empty(3))


def test_fp16_refuses_to_decode_when_scale_and_value_together_are_too_large() -> None:
    with pytest.raises(BadMessage, match="within"):
        codec_named("fp16").decode(struct.pack("<fe", 2.0**104, 65504.0), torch.empty(1))


@pytest.mark.parametrize(
    "scale", [0.0, -1.0, 3.0, 2.0**-126, 2.0**-149, 2.0**105, float("inf"), -float("inf"), float("nan")]
)
def test_fp16_refuses_to_decode_when_the_scale_is_hostile(scale: float) -> None:
    with pytest.raises(BadMessage, match="scale"):
        codec_named("fp16").decode(struct.pack("<fe", scale, 1.0), torch.empty(1))


@codecs
@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_codec_decodes_alike_when_the_buffer_is_of_another_kind(codec: Codec, buffer: type) -> None:
    values = torch.tensor([1.0, -2.5, 0.0])
    assert torch.equal(decoded(codec, buffer(codec.encode(values)), 3), values)


@codecs
@given(data=st.binary(min_size=8, max_size=8))
def test_codec_decodes_or_refuses_when_the_bytes_are_arbitrary(codec: Codec, data: bytes) -> None:
    out = torch.empty(2)
    try:
        codec.decode(data, out)
    except BadMessage:
        return
    codec.encode(out)  # what was accepted can be sent


def test_codec_named_lists_the_choices_when_the_name_is_unknown() -> None:
    with pytest.raises(ValueError, match="fp16, fp32"):
        codec_named("int8")
