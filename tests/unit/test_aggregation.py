"""The reducer's sum: exact about order, division and who brought nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.gradients.aggregation import OUTSIZED, EmptyRound, mean_chunk, outsized, squared_norm
from p2ptrain.gradients.codecs import CODECS, LARGEST, Codec
from p2ptrain.records import MAX_ROSTER

members = st.lists(
    st.tuples(
        st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5).map(torch.tensor),
        st.integers(0, 2000),
    ),
    min_size=1,
    max_size=12,
).filter(lambda brought: any(samples for _, samples in brought))


@given(members=members)
def test_mean_equals_the_float64_reference_when_rounded_to_float32(
    members: list[tuple[torch.Tensor, int]],
) -> None:
    totals, samples = zip(*members, strict=True)
    reference = sum(
        (total.double() for total, count in members if count), torch.zeros(5, dtype=torch.float64)
    ) / sum(samples)
    largest = sum(total.double().abs() for total, _ in members) / sum(samples)
    error = (mean_chunk(totals, samples).double() - reference).abs()
    assert (error <= (len(members) + 1) * 2.0**-24 * largest + 2.0**-149).all()


@given(members=members)
def test_mean_has_the_bits_of_a_plain_left_to_right_sum_and_one_division(
    members: list[tuple[torch.Tensor, int]],
) -> None:
    totals, samples = zip(*members, strict=True)
    expected = []
    for value in range(5):
        column = [np.float32(total[value].item()) for total, count in members if count]
        dumb = column[0]
        for each in column[1:]:
            dumb = np.float32(dumb + each)
        expected.append(np.float32(dumb / np.float32(sum(samples))))
    assert np.array_equal(
        mean_chunk(totals, samples).numpy().view(np.int32), np.array(expected).view(np.int32)
    )


def test_mean_adds_in_roster_order_when_order_matters() -> None:
    huge, one = torch.tensor([2.0**24]), torch.tensor([1.0])
    assert mean_chunk([huge, one, one], [1, 1, 2]).item() == 2.0**24 / 4
    assert mean_chunk([one, one, huge], [1, 1, 2]).item() == (2.0**24 + 2) / 4


def test_mean_does_not_look_at_a_total_when_its_member_brought_nothing() -> None:
    assert mean_chunk([torch.tensor([float("nan")]), torch.tensor([6.0])], [0, 3]).tolist() == [2.0]


def test_mean_leaves_the_totals_alone_when_it_adds() -> None:
    totals = [torch.ones(2), torch.ones(2)]
    mean_chunk(totals, [1, 1])
    assert [total.tolist() for total in totals] == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("samples", [[], [0], [0, 0]])
def test_mean_raises_empty_round_when_nobody_brought_a_sample(samples: list[int]) -> None:
    with pytest.raises(EmptyRound, match="brought a sample"):
        mean_chunk([torch.ones(1) for _ in samples], samples)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_mean_can_be_encoded_when_every_member_brings_the_largest_values_allowed(codec: Codec) -> None:
    totals = [torch.tensor([LARGEST, -LARGEST])] * MAX_ROSTER
    mean = mean_chunk(totals, [1] * MAX_ROSTER)
    assert mean.tolist() == [LARGEST, -LARGEST]
    codec.encode(mean)


def test_squared_norm_is_taken_in_float64_when_float32_would_lose_it() -> None:
    assert squared_norm(torch.tensor([3.0, 4.0])) == 25.0
    assert squared_norm(torch.tensor([2.0**100, 1.0])) == 2.0**200  # beyond float32
    assert squared_norm(torch.tensor([2.0**13, 1.0])) == 2.0**26 + 1


def test_member_whose_gradient_is_out_of_all_proportion_is_named() -> None:
    honest = [torch.randn(100, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert outsized([honest[0] * 8, honest[1], honest[2] * 1e6], [8, 1, 1], 0.0) == 2
    assert outsized([honest[0] * 1e6, honest[1], honest[2]], [10**6, 1, 1], 0.0) is None, (
        "a sum of many samples"
    )
    assert outsized([honest[0] * 100, honest[1], honest[2]], [1, 1, 1], 0.0) is None, "peers differ"


def test_nobody_is_named_when_there_is_nothing_to_compare_with() -> None:
    value = torch.ones(4)
    assert outsized([value, value * 1e9], [1, 1], 0.0) is None, "two: either may be the odd one"
    assert outsized([value, value * 1e9], [1, 1], 5.0) == 1, "but the last gradient tells"
    assert outsized([value * 1e9], [1], 5.0) is None, "alone"
    assert outsized([value * 0, value * 0, value], [1, 1, 1], 0.0) is None, (
        "rows of a table that only one has used"
    )
    assert outsized([value, value, value * OUTSIZED * 1.01], [1, 1, 1], 0.0) == 2
    assert outsized([value, value, value * OUTSIZED * 0.99], [1, 1, 1], 0.0) is None
