"""Spans cover every value exactly once, whatever the shares; chunks cover a span."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.protocol.spans import (
    LETTERS,
    MOST_OF_MEDIAN,
    STEPS_PER_OCTAVE,
    WORTH_IT,
    balanced,
    chunk_count,
    chunk_ranges,
    levels,
    share_out,
    shares,
)

parts_of_it = st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(lambda s: sum(s) > 0)


@given(st.integers(1, 10**9), parts_of_it)
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


exact = st.integers(0, 3 * STEPS_PER_OCTAVE).map(lambda step: 2 ** (step / STEPS_PER_OCTAVE))
"""Rates that are neither rounded nor beyond the bound."""


@given(st.lists(exact, min_size=3, max_size=31).filter(lambda rates: len(rates) % 2 == 1))
def test_members_that_reduce_end_together_and_the_others_could_not_end_earlier(rates: list[float]) -> None:
    parts, reducers = balanced(rates), len(rates) - 2
    assert sum(parts) == pytest.approx(1)
    # The median of an odd number is one of them, so ratios to it are not rounded either.
    ends = [(1 + reducers * share) / rate for share, rate in zip(parts, rates, strict=True)]
    if len(set(parts)) > 1:
        together = [end for end, share in zip(ends, parts, strict=True) if share]
        assert together == pytest.approx([together[0]] * len(together))
        assert min(ends) == pytest.approx(together[0])


@given(st.lists(exact, min_size=3, max_size=31).filter(lambda rates: len(rates) % 2 == 1))
def test_round_takes_hardly_longer_than_the_slowest_members_own_gradient_or_all_of_it(
    rates: list[float],
) -> None:
    parts, reducers = balanced(rates), len(rates) - 2
    ends = max((1 + reducers * share) / rate for share, rate in zip(parts, rates, strict=True))
    # Neither can be beaten: all that is sent, by all together; one's own gradient, by the slowest.
    assert ends <= 1.0001 * WORTH_IT * max((reducers + len(rates)) / sum(rates), 1 / min(rates))


def test_spans_are_equal_when_rates_differ_by_no_more_than_they_waver() -> None:
    assert balanced([8e6, 10e6, 12e6, 10e6]) == (0.25,) * 4
    assert balanced([5e6, 10e6, 12e6, 10e6])[0] == 0


def test_slow_uplink_sends_its_own_gradient_and_reduces_nothing() -> None:
    parts = balanced([10e6, 20e6, 50e6, 100e6])
    assert parts[0] == 0
    # What 10 Mbit/s take for the gradient bounds the round; everybody else is done by then.
    assert max((1 + 2 * x) / rate for x, rate in zip(parts, [10, 20, 50, 100], strict=True)) == 1 / 10


def test_client_gets_no_span_however_fast_it_is_and_the_rest_end_together() -> None:
    parts = balanced([50.0, None, 50.0, 25.0])
    assert parts[1] == 0
    assert sum(parts) == pytest.approx(1)
    ends = [
        (1 + 2 * share) / rate for share, rate in zip(parts, [50.0, 1.0, 50.0, 25.0], strict=True) if share
    ]
    assert ends == pytest.approx([ends[0]] * len(ends))


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([None, 3.0], (0, 1)),
        ([None, 0.0, None], (0, 1, 0)),
        ([None, None], (0.5, 0.5)),
        ([None] * 4, (0.25,) * 4),
    ],
)
def test_somebody_reduces_even_if_nobody_wants_to(
    rates: list[float | None], expected: tuple[float, ...]
) -> None:
    assert balanced(rates) == expected


def test_call_in_which_nobody_reduces_is_refused() -> None:
    with pytest.raises(ValueError, match="nobody reduces"):
        shares("---")


@pytest.mark.parametrize(
    "rates", [[5.0], [1.0, 9.0], [0.0, 0.0, 0.0], [100.0, 101.0, 99.0, 98.0], [7.0, 0, 0]]
)
def test_shares_are_equal_when_nothing_speaks_for_others(rates: list[float]) -> None:
    assert balanced(rates) == pytest.approx([1 / len(rates)] * len(rates))


def test_boaster_gets_no_more_than_a_very_fast_peer() -> None:
    assert balanced([1.0, 1.0, 1.0, 1e15]) == balanced([1.0, 1.0, 1.0, MOST_OF_MEDIAN])


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=20))
def test_a_level_is_within_a_ninth_of_the_rate_in_medians(rates: list[float]) -> None:
    known = sorted(rate for rate in rates if rate > 0)
    usual = known[(len(known) - 1) // 2] if known else 1.0
    at_median = levels([1.0])
    for rate, letter in zip(rates, levels(rates), strict=True):
        medians = min(max(rate / usual, 2**-12), MOST_OF_MEDIAN) if rate else 1.0
        steps = LETTERS.index(letter) - LETTERS.index(at_median)
        assert 2 ** (steps / STEPS_PER_OCTAVE) == pytest.approx(medians, rel=0.1)


def test_what_is_no_level_is_refused() -> None:
    with pytest.raises(ValueError, match="substring"):
        shares("zz?")
