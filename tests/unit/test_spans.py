"""Spans cover every value exactly once, whatever the shares; chunks cover a span."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.protocol.spans import chunk_count, chunk_ranges, share_out

shares = st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(lambda s: sum(s) > 0)


@given(st.integers(1, 10**9), shares)
def test_spans_cover_every_value_once(values: int, parts: list[float]) -> None:
    spans = share_out(values, parts)
    assert spans[0] == 0
    assert spans[-1] == values
    assert all(a <= b for a, b in pairwise(spans))


@given(st.integers(0, 10**6), st.integers(0, 10**5), st.integers(1, 10**5))
def test_chunks_cover_a_span_once_and_are_counted_right(start: int, length: int, size: int) -> None:
    ranges = chunk_ranges(start, start + length, size)
    assert [value for a, b in ranges for value in (a, b)][:1] == ([start] if length else [])
    assert sum(b - a for a, b in ranges) == length
    assert all(0 < b - a <= size for a, b in ranges)
    assert len(ranges) == chunk_count(start, start + length, size)


def test_equal_shares_give_equal_spans() -> None:
    assert share_out(12, [1.0] * 4) == (0, 3, 6, 9, 12)


@pytest.mark.parametrize("parts", [[0.0, 0.0], [-1.0, 2.0]])
def test_shares_are_refused_when_they_cannot_be_shares(parts: list[float]) -> None:
    with pytest.raises(ValueError, match="shares must be"):
        share_out(10, parts)
