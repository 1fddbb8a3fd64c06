"""The work on one chunk, and the memory that it is done in: whose that is, and when it is used again.

Not covered: what is made of the members' chunks, see `test_aggregation`, and what codecs refuse, see
`test_codecs`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from blake3 import blake3

from p2ptrain.errors import BadMessage
from p2ptrain.gradients.aggregation import AGGREGATIONS
from p2ptrain.gradients.codecs import LARGEST, codec_named
from p2ptrain.gradients.feedback import Owed
from p2ptrain.gradients.likeness import Likeness
from p2ptrain.gradients.reducing import MAX_SPARE, Rule, Scratch, average_chunk, check_chunk, sum_again


def test_threads_decode_into_memory_of_their_own() -> None:
    """Two of a peer's threads look at chunks at the same time."""
    scratch = Scratch()
    mine = scratch.take(0, 8).fill_(1.0)
    with ThreadPoolExecutor(1) as other:
        other.submit(lambda: scratch.take(0, 8).fill_(2.0)).result()
    assert mine.tolist() == [1.0] * 8
    assert scratch.take(0, 8).data_ptr() == mine.data_ptr()


def test_memory_that_was_given_back_is_lent_again_if_it_fits() -> None:
    scratch = Scratch()
    first, second = scratch.lend(8), scratch.lend(8)
    first[:], second[:] = b"first 8.", b"second 8"
    assert bytes(first) == b"first 8."
    scratch.give_back(first)
    assert scratch.lend(8) is first
    scratch.give_back(first)
    assert scratch.lend(16).nbytes == 16


def test_no_more_memory_is_kept_than_a_few_chunks_need() -> None:
    scratch = Scratch()
    lent = [scratch.lend(8) for _ in range(MAX_SPARE + 5)]
    for memory in lent:
        scratch.give_back(memory)
    again = {id(scratch.lend(8)) for _ in lent}
    assert len(again & {id(memory) for memory in lent}) == MAX_SPARE


@pytest.mark.parametrize("rule", AGGREGATIONS)
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_sum_that_is_done_again_is_what_the_reducer_made_of_the_same_bytes(rule: str, name: str) -> None:
    codec, place = codec_named(name), memoryview(bytearray(codec_named(name).encoded_bytes(500)))
    parts = [codec.encode(torch.randn(500, generator=torch.Generator().manual_seed(at))) for at in range(5)]
    samples = [3, 8, 1, 5, 5]
    how = Rule(codec, AGGREGATIONS[rule], 0.0, Owed(codec, 0, 500), Likeness(), audited=True)
    _, _, hashed = average_chunk(how, Scratch(), range(5), parts, samples, 0, 500, place)
    assert sum_again(codec, AGGREGATIONS[rule], Scratch(), parts, samples, 500) == bytes(place)
    assert hashed == [blake3(part).digest() for part in parts]


def test_nothing_may_have_been_made_of_a_part_that_cannot_be_decoded() -> None:
    codec = codec_named("fp32")
    parts = [torch.ones(3).numpy().tobytes(), torch.tensor([1.0, float("nan"), 1.0]).numpy().tobytes()]
    assert sum_again(codec, AGGREGATIONS["mean"], Scratch(), parts, [1, 1], 3) is None


@pytest.mark.parametrize("large", [2.0**65, LARGEST])
def test_chunk_is_accepted_whose_squares_are_beyond_float32(large: float) -> None:
    values = torch.tensor([1.0, -large, large])
    check_chunk(codec_named("fp32"), Scratch(), codec_named("fp32").encode(values), 3, None)


@pytest.mark.parametrize("bad", [2.0**120, float("inf"), float("-inf"), float("nan")])
def test_chunk_is_refused_that_holds_one_bad_value_among_many_good_ones(bad: float) -> None:
    values = torch.ones(10_000)
    values[7_777] = bad
    with pytest.raises(BadMessage, match="must be finite"):
        check_chunk(codec_named("fp32"), Scratch(), values.numpy().tobytes(), 10_000, None)
