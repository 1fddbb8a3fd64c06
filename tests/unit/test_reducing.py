"""The work on one chunk, and the memory that it is done in: whose that is, and when it is used again.

Not covered: what is made of the members' chunks, see `test_aggregation`, and what codecs refuse, see
`test_codecs`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from p2ptrain.errors import BadMessage
from p2ptrain.gradients.codecs import LARGEST, codec_named
from p2ptrain.gradients.reducing import MAX_SPARE, Scratch, check_chunk


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
