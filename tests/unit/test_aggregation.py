"""The reducer's sum, exact about order, division and who brought nothing; and the rules that bound a liar.

Not covered: what a rule costs in training (`tests/swarm/test_robust_training.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2ptrain.config import RunConfig
from p2ptrain.gradients.aggregation import (
    AGGREGATIONS,
    CLIP_AT,
    OUTSIZED,
    Aggregation,
    EmptyRound,
    about_squared_norm,
    for_chunk,
    mean_chunk,
    norm_clip,
    outsized,
    squared_norm,
    usual_norm,
)
from p2ptrain.gradients.codecs import CODECS, LARGEST
from p2ptrain.records import MAX_ROSTER, Ballot, EntryHeader, PeerId

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


@pytest.mark.parametrize("rule", AGGREGATIONS.values(), ids=AGGREGATIONS)
@pytest.mark.parametrize("samples", [[], [0], [0, 0]])
def test_round_is_empty_when_nobody_brought_a_sample(samples: list[int], rule: Aggregation) -> None:
    with pytest.raises(EmptyRound, match="brought a sample"):
        rule([torch.ones(1) for _ in samples], samples)


IN_PAIRS = AGGREGATIONS.keys() - {"mean", "norm_clip"}
"""Rules that compare each member with each other, which takes a full roster seconds."""


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_result_can_be_encoded_when_every_member_brings_the_largest_values_allowed(name: str) -> None:
    members = 64 if name in IN_PAIRS else MAX_ROSTER
    each = LARGEST * (MAX_ROSTER // members)  # what is added up is as large as that of a full roster
    result = AGGREGATIONS[name]([torch.tensor([each, -each])] * members, [1] * members)
    assert result.tolist() == [each, -each]
    for codec in CODECS.values():
        codec.encode(torch.tensor([LARGEST, -LARGEST]))


# -- the rules that bound a liar -----------------------------------------------------------------------------

ROBUST = {name: rule for name, rule in AGGREGATIONS.items() if name != "mean"}
robust = pytest.mark.parametrize("rule", ROBUST.values(), ids=ROBUST)
few = settings(max_examples=30)  # for each rule
a_member = st.tuples(
    st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5).map(torch.tensor), st.integers(1, 2000)
)


def test_run_file_can_ask_for_every_rule_there_is() -> None:
    assert [RunConfig.model_validate({"aggregation": name}).aggregation for name in AGGREGATIONS] == [
        *AGGREGATIONS
    ]
    assert RunConfig().aggregation == "mean"


@robust
@few
@given(
    gradient=st.lists(st.integers(-1000, 1000), min_size=5, max_size=5),
    samples=st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any),
)
def test_result_is_what_all_members_bring_when_they_agree(
    rule: Aggregation, gradient: list[int], samples: list[int]
) -> None:
    agreed = torch.tensor(gradient, dtype=torch.float32)
    assert torch.equal(rule([agreed * count for count in samples], samples), agreed)


@robust
@few
@given(members=members)
def test_result_has_no_negative_zero_and_leaves_the_totals_alone(
    rule: Aggregation, members: list[tuple[torch.Tensor, int]]
) -> None:
    totals, samples = zip(*members, strict=True)
    before = [total.clone() for total in totals]
    result = rule(totals, samples)
    assert all(torch.equal(total, kept) for total, kept in zip(totals, before, strict=True))
    assert all(result.data_ptr() != total.data_ptr() for total in totals)
    if sum(count > 0 for count in samples) >= 3:
        assert not (torch.signbit(result) & (result == 0)).any()


@robust
@few
@given(brought=st.lists(a_member, min_size=1, max_size=2), silent=st.integers(0, 3))
def test_every_rule_is_the_mean_when_fewer_than_three_brought_samples(
    rule: Aggregation, brought: list[tuple[torch.Tensor, int]], silent: int
) -> None:
    totals = [total for total, _ in brought] + [torch.full((5,), float("nan"))] * silent
    samples = [count for _, count in brought] + [0] * silent
    assert torch.equal(rule(totals, samples), mean_chunk(totals, samples))


honest = st.lists(a_member, min_size=2, max_size=9)
anything = st.lists(st.floats(-LARGEST, LARGEST, width=32), min_size=5, max_size=5).map(torch.tensor)


def with_liar(
    honest: list[tuple[torch.Tensor, int]], liar: torch.Tensor, claimed: int, at: int
) -> tuple[list[torch.Tensor], list[int]]:
    members = [*honest]
    members.insert(at % (len(honest) + 1), (liar, claimed))
    return [total for total, _ in members], [count for _, count in members]


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
@few
@given(honest=honest, liar=anything, claimed=st.integers(1, 2**24), at=st.integers(0, 9))
def test_every_value_is_between_honest_ones_whatever_one_liar_brings(
    name: str, honest: list[tuple[torch.Tensor, int]], liar: torch.Tensor, claimed: int, at: int
) -> None:
    result = AGGREGATIONS[name](*with_liar(honest, liar, claimed, at))
    means = torch.stack([total / torch.tensor(float(count)) for total, count in honest])
    assert (result >= means.amin(0)).all()
    assert (result <= means.amax(0)).all()


@few
@given(honest=honest, liar=anything, claimed=st.integers(1, 2**24), at=st.integers(0, 9))
def test_liar_moves_a_clipped_result_by_its_bounded_share_of_honest_distances(
    honest: list[tuple[torch.Tensor, int]], liar: torch.Tensor, claimed: int, at: int
) -> None:
    totals, samples = with_liar(honest, liar, claimed, at)
    result = AGGREGATIONS["centered_clip"](totals, samples)
    means = torch.stack([total / torch.tensor(float(count)) for total, count in honest])
    beyond = (result - result.clamp(means.amin(0), means.amax(0))).norm()
    # Counts are cut at the lower median, so half of the members or more weigh in full.
    share = 1 / math.ceil((len(totals) + 1) / 2)
    farthest = (means - AGGREGATIONS["median"](totals, samples)).norm(dim=1).max()
    assert beyond <= share * farthest * (1 + 1e-5) + 1e-4


@few
@given(
    honest=honest,
    liar=st.lists(st.sampled_from([-(2.0**80), -(2.0**20), 2.0**20, 2.0**80]), min_size=5, max_size=5),
    claimed=st.integers(1, 2**24),
    at=st.integers(0, 9),
)
def test_liar_far_from_all_others_does_not_count_by_krum_whatever_it_claims(
    honest: list[tuple[torch.Tensor, int]], liar: list[float], claimed: int, at: int
) -> None:
    result = AGGREGATIONS["multi_krum"](*with_liar(honest, torch.tensor(liar) * claimed, claimed, at))
    means = torch.stack([total / torch.tensor(float(count)) for total, count in honest])
    assert (result >= means.amin(0)).all()
    assert (result <= means.amax(0)).all()


@pytest.mark.parametrize("lie", [lambda sound: -sound, torch.randn_like], ids=["flipped", "noise"])
def test_krum_leaves_out_the_liar_and_not_the_slow_peer_when_gradients_are_mostly_noise(
    lie: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    torch.manual_seed(0)
    true, samples = torch.randn(4000), [16, 16, 2, 16, 16]
    totals = [count * true + 6 * count**0.5 * torch.randn(4000) for count in samples]
    lied = lie(totals[3])
    totals[3] = lied * (totals[3].norm() / lied.norm())
    sound = sum(totals[at] for at in (0, 1, 2, 4)) / torch.tensor(50.0)
    torch.testing.assert_close(AGGREGATIONS["multi_krum"](totals, samples), sound)


@robust
def test_peer_that_claims_a_billion_samples_weighs_as_much_as_the_median_one(rule: Aggregation) -> None:
    means = [torch.tensor([float(value)]) for value in (1, 2, 4, 9, 16)]
    as_others = rule([8 * mean for mean in means], [8] * 5)
    claimed = rule([*(8 * mean for mean in means[:4]), means[4] * 10**9], [8, 8, 8, 8, 10**9])
    assert torch.equal(claimed, as_others)
    assert mean_chunk([*(8 * mean for mean in means[:4]), means[4] * 10**9], [8, 8, 8, 8, 10**9]) > 15


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean", 26.2),
        ("trimmed_mean", 14 / 3),
        ("median", 4.0),
        ("centered_clip", 4 + (-3 + 3 - 2 + 3) / 5),
        ("multi_krum", 3.75),
    ],
)
def test_rules_give_what_is_worked_out_by_hand(name: str, expected: float) -> None:
    values = [torch.tensor([float(value)]) for value in (1, 116, 2, 8, 4)]
    assert AGGREGATIONS[name](values, [1] * 5).item() == pytest.approx(expected)


def test_gradient_that_is_longer_than_the_last_entry_s_is_shortened_to_a_bound() -> None:
    values = [torch.tensor([float(value)]) for value in (1, 116, 2, 8, 4)]
    bound = CLIP_AT * 5**0.5
    assert norm_clip(values, [1] * 5, 1.0).item() == pytest.approx((1 + bound + 2 + bound + 4) / 5)
    assert norm_clip(values, [1] * 5, 0.0).item() == pytest.approx(26.2)  # there was no entry before


@few
@given(honest=honest, liar=anything, claimed=st.integers(1, 2**24), at=st.integers(0, 9))
def test_no_norm_clipped_result_is_longer_than_the_bound(
    honest: list[tuple[torch.Tensor, int]], liar: torch.Tensor, claimed: int, at: int
) -> None:
    totals, samples = with_liar(honest, liar, claimed, at)
    bound = CLIP_AT * len(totals) ** 0.5 * 3.0
    assert norm_clip(totals, samples, 3.0).norm() <= bound * (1 + 1e-5)


def test_bound_follows_the_spans_of_the_last_entry() -> None:
    last = EntryHeader(
        step=3,
        parent="a" * 64,
        ballot=Ballot(number=1, leader=PeerId("anna")),
        roster=(PeerId("anna"), PeerId("bert"), PeerId("cara")),
        samples=(1, 1, 1),
        spans=(0, 8, 8, 12),
        squared_norms=(16.0, 0.0, 36.0),
        digest="d" * 64,
    )
    assert [usual_norm(last, *chunk) for chunk in ((0, 8), (8, 12), (4, 10), (2, 4))] == [
        4.0,
        6.0,
        (8 + 18) ** 0.5,
        2.0,
    ]
    values = [torch.tensor([100.0, 0.0])] * 3
    assert for_chunk(norm_clip, last, 8, 10)(values, [1, 1, 1]).tolist() == pytest.approx(
        [CLIP_AT * 3**0.5 * 18**0.5, 0.0]
    )
    assert for_chunk(norm_clip, None, 8, 10) is norm_clip
    assert for_chunk(mean_chunk, last, 8, 10) is mean_chunk


def test_squared_norm_is_taken_in_float64_when_float32_would_lose_it() -> None:
    assert squared_norm(torch.tensor([3.0, 4.0])) == 25.0
    assert squared_norm(torch.tensor([2.0**100, 1.0])) == 2.0**200  # beyond float32
    assert squared_norm(torch.tensor([2.0**13, 1.0])) == 2.0**26 + 1


def outsized_of(totals: list[torch.Tensor], samples: list[int], usual: float) -> int | None:
    return outsized([about_squared_norm(total) for total in totals], samples, usual)


def test_member_whose_gradient_is_out_of_all_proportion_is_named() -> None:
    honest = [torch.randn(100, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert outsized_of([honest[0] * 8, honest[1], honest[2] * 1e6], [8, 1, 1], 0.0) == 2
    assert outsized_of([honest[0] * 1e6, honest[1], honest[2]], [10**6, 1, 1], 0.0) is None, (
        "a sum of many samples"
    )
    assert outsized_of([honest[0] * 100, honest[1], honest[2]], [1, 1, 1], 0.0) is None, "peers differ"


def test_nobody_is_named_when_there_is_nothing_to_compare_with() -> None:
    value = torch.ones(4)
    assert outsized_of([value, value * 1e9], [1, 1], 0.0) is None, "two: either may be the odd one"
    assert outsized_of([value, value * 1e9], [1, 1], 5.0) == 1, "but the last gradient tells"
    assert outsized_of([value * 1e9], [1], 5.0) is None, "alone"
    assert outsized_of([value * 0, value * 0, value], [1, 1, 1], 0.0) is None, (
        "rows of a table that only one has used"
    )
    assert outsized_of([value, value, value * OUTSIZED * 1.01], [1, 1, 1], 0.0) == 2
    assert outsized_of([value, value, value * OUTSIZED * 0.99], [1, 1, 1], 0.0) is None
