"""Codecs: the stated worst error holds, encoding again changes nothing, no hostile chunk gets through."""

from __future__ import annotations

import struct
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2ptrain.config import RunConfig
from p2ptrain.errors import BadMessage
from p2ptrain.gradients.codecs import CODECS, LARGEST, Codec, Int4, Int8, LowRank, TopK, codec_named

torch.set_num_threads(1)  # for so little work, threads only wait for each other

codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)

floats = st.floats(-LARGEST, LARGEST, width=32)
# Chunks whose values are all of one size somewhere on the scale, besides those that mix all sizes.
sized = st.builds(
    lambda exponent, values: [value * 2.0**exponent for value in values],
    st.integers(-140, 116),
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60),
)
# Several blocks and runs of zeros, the last block short.
blocks = st.builds(
    lambda count, seed, exponent: (
        np.random.default_rng(seed).standard_normal(count, np.float32)
        * np.float32(2.0**exponent)
        * np.repeat(np.random.default_rng(seed).integers(0, 3, count // 50 + 1), 50)[:count].astype(
            np.float32
        )
    ),
    st.integers(1, 600),
    st.integers(0, 2**32),
    st.integers(-140, 110),
).map(torch.from_numpy)
chunks = st.one_of(
    sized.map(torch.tensor), st.lists(floats, min_size=1, max_size=60).map(torch.tensor), blocks
)


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


@given(values=chunks)
@example(values=torch.tensor([2.0**-126, 2.0**-133, -(2.0**-149), 0.0]))
@example(values=torch.tensor([LARGEST * (1 - 2.0**-24), 1 + 2.0**-8, 1 + 3 * 2.0**-8]))
def test_bf16_stays_within_its_stated_error_always(values: Tensor) -> None:
    codec = codec_named("bf16")
    exact = values.double()
    error = (decoded(codec, codec.encode(values), len(values)).double() - exact).abs()
    assert (error <= (exact.abs() * 2.0**-8).clamp(min=2.0**-126)).all()


@pytest.mark.parametrize(("codec", "share"), [(Int8(), 252), (Int4(), 13.9)], ids=["int8", "int4"])
@given(values=chunks)
@example(values=torch.tensor([LARGEST, -LARGEST, 1e-30]))
@example(values=torch.tensor([2.0**-126, 3 * 2.0**-149]))
@example(values=127 * torch.tensor([1 + 2.0**-8, (1 + 2.0**-8) / 254, 0.5, -0.5]))  # a scale that is a tie
@example(values=7 * torch.tensor([1 + 2.0**-7 + 2.0**-8, (1 + 2.0**-8) / 14, 0.5, -0.5]))
def test_integers_stay_within_their_stated_error_always(
    codec: Int8 | Int4, share: float, values: Tensor
) -> None:
    exact = values.double()
    error = (decoded(codec, codec.encode(values), len(values)).double() - exact).abs()
    for block, lost in zip(exact.split(codec.block), error.split(codec.block), strict=True):
        assert lost.max() <= max(block.abs().max().item() / share, 2.0**-126)


@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=["int8", "int4"])
def test_integers_keep_a_small_block_when_the_next_one_is_huge(codec: Int8 | Int4) -> None:
    ones, huge = torch.ones(codec.block), torch.full((codec.block,), 1e30)
    out = decoded(codec, codec.encode(torch.cat((ones, huge, ones))), 3 * codec.block)
    assert torch.allclose(out[: codec.block], ones, rtol=1 / 13)
    assert torch.allclose(out[-codec.block :], ones, rtol=1 / 13)


@given(values=chunks)
@example(values=torch.tensor([1.0, -1.0] * 100))
@example(values=torch.cat((torch.zeros(70), -torch.zeros(70))))
def test_topk_loses_nothing_larger_than_what_it_keeps(values: Tensor) -> None:
    codec = TopK()
    count, kept = len(values), codec.kept(len(values))
    exact, got = values.double(), decoded(codec, codec.encode(values), len(values)).double()
    rounding = torch.maximum(exact.abs() * 2.0**-11, exact.abs().max() * 2.0**-40)
    lost = got == 0
    assert (~lost).sum() <= kept
    assert ((got - exact).abs() <= rounding)[~lost].all()
    least = got[~lost].abs().min() if (~lost).sum() == kept else 0.0
    assert (exact.abs() <= least + rounding)[lost].all()
    size = exact.abs().max().clamp(min=2.0**-149)  # squares would overflow otherwise
    whole = (exact / size).square().sum()
    assert ((got - exact) / size).square().sum() <= (1 - kept / count) * whole + (2.0**-9) * whole


def test_topk_keeps_the_first_of_equal_values_and_finds_them_in_every_run() -> None:
    values = torch.zeros(200_000)
    values[[3, 70_000, 131_072, 199_999]] = torch.tensor([1.0, -2.0, 3.0, -4.0])
    out = decoded(TopK(), TopK().encode(values), len(values))
    assert torch.equal(out, values)
    ones = decoded(TopK(), TopK().encode(torch.ones(320)), 320)
    assert ones.tolist() == [1.0] * 10 + [0.0] * 310


matrices = st.builds(
    lambda count, rank, seed, exponent: (
        (
            np.random.default_rng(seed).standard_normal((count // 128 + 1, rank))
            @ np.random.default_rng(seed + 1).standard_normal((rank, 128))
            * 2.0**exponent
        )
        .reshape(-1)[:count]
        .astype(np.float32)
    ),
    st.integers(1024, 3000),
    st.sampled_from([1, 4, 20, 128]),
    st.integers(0, 2**32),
    st.integers(-90, 110),
).map(torch.from_numpy)


@given(values=st.one_of(chunks.filter(lambda values: bool(values.abs().max() > 2.0**-100)), matrices))
@example(values=torch.eye(128).flatten())
@example(values=torch.full((1024,), LARGEST))
@example(values=torch.cat((torch.zeros(1023), torch.ones(1))))
@settings(max_examples=20)
def test_lowrank_stays_within_its_stated_error_always(values: Tensor) -> None:
    codec = LowRank()
    exact = values.double() / values.abs().max()
    got = decoded(codec, codec.encode(values), len(values)).double() / values.abs().max()
    assert (got - exact).norm() <= 1.01 * exact.norm()


@given(values=matrices)
@settings(max_examples=10)
def test_lowrank_changes_little_when_a_chunk_of_whole_rows_passes_it_again(values: Tensor) -> None:
    codec, values = LowRank(), values[: len(values) // 128 * 128]
    once = decoded(codec, codec.encode(values), len(values))
    twice = decoded(codec, codec.encode(once), len(values))
    assert (twice - once).norm() <= 0.01 * once.norm()


def test_lowrank_loses_next_to_nothing_of_a_matrix_of_rank_4_and_its_best_part_of_any_other() -> None:
    chance = np.random.default_rng(3)
    left, right = chance.standard_normal((512, 4), np.float32), chance.standard_normal((4, 128), np.float32)
    four = torch.from_numpy(left @ right)
    noisy = four + 0.1 * torch.from_numpy(chance.standard_normal((512, 128), np.float32))
    for matrix, most in (
        (four, 0.002),
        (noisy, 1.02 * torch.linalg.svdvals(noisy)[4:].norm() / noisy.norm()),
    ):
        lost = decoded(LowRank(), LowRank().encode(matrix.flatten()), matrix.numel()) - matrix.flatten()
        assert lost.norm() <= most * matrix.norm()


def test_lowrank_refuses_to_decode_when_the_right_factor_is_too_large() -> None:
    half = codec_named("fp16")
    data = half.encode(torch.ones(32)) + half.encode(torch.full((512,), 3.0))
    with pytest.raises(BadMessage, match="within ±2, not 3"):
        LowRank().decode(data, torch.empty(1024))


def test_lowrank_decodes_to_values_that_can_be_sent_when_the_factors_are_huge() -> None:
    half = codec_named("fp16")
    data = half.encode(torch.full((32,), LARGEST)) + half.encode(torch.full((512,), -2.0))
    assert decoded(LowRank(), data, 1024).tolist() == [-LARGEST] * 1024


@pytest.mark.parametrize(
    "codec", [each for each in CODECS.values() if each.name != "lowrank"], ids=lambda c: c.name
)
@given(values=chunks)
@example(values=torch.tensor([1 - 2.0**-13, 2.0**-23]))  # rounds up to the next power of two
@example(values=torch.tensor([2.0**-149, -(2.0**-148)]))
@example(values=torch.tensor([LARGEST * (1 - 2.0**-13), 1.0]))
def test_codec_changes_nothing_when_a_value_passes_it_again(codec: Codec, values: Tensor) -> None:
    once = codec.encode(values)
    assert codec.encode(decoded(codec, once, len(values))) == once


@pytest.mark.parametrize("size", [1.0, 1e-10, 1e-30, 1e-37, 1e30])
def test_fp16_keeps_11_bits_when_the_whole_chunk_is_tiny_or_huge(size: float) -> None:
    values = torch.linspace(0.001, 1, 1000) * size
    codec = codec_named("fp16")
    error = (decoded(codec, codec.encode(values), 1000).double() - values.double()).abs()
    assert (error <= values.double() * 2.0**-11).all()


@codecs
def test_codec_announces_a_size_for_a_chunk_before_it_is_there(codec: Codec) -> None:
    values = torch.from_numpy(np.random.default_rng(5).standard_normal(140_001, np.float32))
    for count in (1, 63, 64, 65, 127, 128, 129, 65_535, 65_536, 65_537, 140_001):
        data = codec.encode(values[:count])
        assert len(data) == codec.encoded_bytes(count)
        if not isinstance(codec, LowRank):
            assert codec.encode(decoded(codec, data, count)) == data


@codecs
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2 * LARGEST, -2 * LARGEST])
def test_codec_refuses_to_encode_when_a_value_is_out_of_contract(codec: Codec, bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        codec.encode(torch.tensor([1.0, bad, 2.0]))


@codecs
@pytest.mark.parametrize("change", [-3, -1, 1, 4])
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
        codec_named("fp16").decode(struct.pack("<fe", 2.0**102, 65504.0), torch.empty(1))


@pytest.mark.parametrize(
    "scale", [0.0, -1.0, 3.0, 2.0**-126, 2.0**-149, 2.0**103, float("inf"), -float("inf"), float("nan")]
)
def test_fp16_refuses_to_decode_when_the_scale_is_hostile(scale: float) -> None:
    with pytest.raises(BadMessage, match="scale"):
        codec_named("fp16").decode(struct.pack("<fe", scale, 1.0), torch.empty(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2 * LARGEST])
def test_bf16_refuses_to_decode_when_a_value_is_out_of_contract(bad: float) -> None:
    with pytest.raises(BadMessage, match="must be finite"):
        codec_named("bf16").decode(bf16(1.0, bad, 2.0), torch.empty(3))


def bf16(*values: float) -> bytes:
    return torch.tensor(values).to(torch.bfloat16).view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=["int8", "int4"])
@pytest.mark.parametrize("scale", [0.0, -1.0, 2.0**-127, 2.0**120, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_integers_refuse_to_decode_when_a_scale_is_hostile(
    codec: Int8 | Int4, scale: float, place: int
) -> None:
    scales = [1.0, 1.0, 1.0]
    scales[place] = scale
    count = 2 * codec.block + 1
    levels = bytes(codec.encoded_bytes(count) - 6)
    with pytest.raises(BadMessage, match="scales of an int"):
        codec.decode(bf16(*scales) + levels, torch.empty(count))


@pytest.mark.parametrize(("codec", "level"), [(Int8(), b"\x80"), (Int4(), b"\x08")], ids=["int8", "int4"])
def test_integers_refuse_to_decode_when_scale_and_level_together_are_too_large(
    codec: Int8 | Int4, level: bytes
) -> None:
    with pytest.raises(BadMessage, match="within"):
        codec.decode(bf16(LARGEST) + level, torch.empty(1))


def topk_chunk(scale: float = 1.0, runs: tuple[int, ...] = (2,), places: tuple[int, ...] = (3, 60)) -> bytes:
    return struct.pack(f"<f{len(runs)}I{len(places)}H", scale, *runs, *places) + struct.pack("<2e", 1.0, 2.0)


def test_topk_decodes_a_chunk_that_was_written_by_hand() -> None:
    assert decoded(TopK(), topk_chunk(), 64).nonzero().flatten().tolist() == [3, 60]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (topk_chunk(runs=(1,)), "keeps 2, not 1"),
        (topk_chunk(runs=(2**32 - 1,)), "keeps 2, not 4294967295"),
        (topk_chunk(places=(3, 3)), "must rise"),
        (topk_chunk(places=(60, 3)), "must rise"),
        (topk_chunk(places=(3, 64)), "within it"),
        (topk_chunk(scale=3.0), "power of two"),
        (topk_chunk(scale=float("nan")), "power of two"),
        (topk_chunk()[:-2] + struct.pack("<e", float("inf")), "must be finite"),
        (topk_chunk()[:-2] + struct.pack("<e", float("nan")), "must be finite"),
    ],
)
def test_topk_refuses_to_decode_when_the_chunk_is_hostile(data: bytes, complaint: str) -> None:
    with pytest.raises(BadMessage, match=complaint):
        TopK().decode(data, torch.empty(64))


@codecs
@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_codec_decodes_alike_when_the_buffer_is_of_another_kind(codec: Codec, buffer: type) -> None:
    values = torch.tensor([127.0, -127.0, 0.0])
    data = codec.encode(values)
    assert torch.equal(decoded(codec, buffer(data), 3), decoded(codec, data, 3))


@codecs
@given(data=st.data())
def test_codec_decodes_or_refuses_when_the_bytes_are_arbitrary(codec: Codec, data: st.DataObject) -> None:
    size = codec.encoded_bytes(2)
    out = torch.empty(2)
    try:
        codec.decode(data.draw(st.binary(min_size=size, max_size=size)), out)
    except BadMessage:
        return
    codec.encode(out)  # what was accepted can be sent


def test_run_file_allows_every_codec_and_no_other() -> None:
    assert set(get_args(RunConfig.model_fields["codec"].annotation)) == set(CODECS)


def test_codec_named_lists_the_choices_when_the_name_is_unknown() -> None:
    with pytest.raises(ValueError, match="fp16, fp32, int4, int8"):
        codec_named("int7")
