"""The noise scale: unbiased for unequal groups, and what it tells about the data that peers train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from p2ptrain.gradients.accumulator import Accumulator
from p2ptrain.gradients.aggregation import about_squared_norm, mean_chunk
from p2ptrain.gradients.codecs import codec_named
from p2ptrain.gradients.likeness import Likeness
from p2ptrain.gradients.noise import (
    IDENTICAL,
    LEAST_ROUNDS,
    NoiseMeter,
    Reading,
    Spread,
    Strangers,
    Unlike,
    apart,
    spread_of,
)
from p2ptrain.records import PeerId

PEERS = [PeerId(name) for name in "ABCD"]
UNEQUAL = (1, 3, 8, 20)
NUMEL = 30


def products_of(totals: Sequence[Tensor]) -> Tensor:
    rows = torch.stack(list(totals)).double()
    return rows @ rows.T


def add(likeness: Likeness, ranks: Sequence[int], totals: Sequence[Tensor], samples: Sequence[int]) -> None:
    likeness.add(ranks, totals, samples, [about_squared_norm(total) for total in totals])


# -- the estimate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [UNEQUAL, (8, 8, 8), (2, 30)])
def test_noise_and_signal_are_unbiased_when_groups_are_unequal(sizes: tuple[int, ...]) -> None:
    """T14: 1 % over 40,000 draws. The formula for equal groups is off where they are not."""
    draws, chance = 40_000, np.random.default_rng(1)
    deviation = np.geomspace(0.2, 3.0, NUMEL)
    truth = chance.standard_normal(NUMEL) * 0.3
    signal, noise = float(truth @ truth), float(deviation @ deviation)
    counts = np.array(sizes, dtype=float)
    weights, everyone, n = counts / counts.sum(), counts.sum(), len(sizes)
    squares, means = np.zeros((draws, n)), np.zeros((draws, NUMEL))
    for at, count in enumerate(sizes):
        group = truth + chance.standard_normal((draws, NUMEL)) * deviation / np.sqrt(count)
        squares[:, at] = np.einsum("dv,dv->d", group, group)
        means += weights[at] * group
    of_groups, of_mean = squares @ weights, np.einsum("dv,dv->d", means, means)
    spreads = Spread(n, int(everyone), of_groups.mean(), of_mean.mean())  # both are linear in these
    assert spreads.noise == pytest.approx(noise, rel=0.01)
    assert spreads.signal == pytest.approx(signal, rel=0.01 * (1 + noise / everyone / signal))

    equal = everyone / n  # McCandlish's appendix A.2, with the mean group for each
    unweighted = float((squares.mean() - of_mean.mean()) / (1 / equal - 1 / everyone))
    assert (unweighted == pytest.approx(noise, rel=0.01)) is (len(set(sizes)) == 1)


def test_spread_follows_from_inner_products_when_compared_with_the_gradients_themselves() -> None:
    chance = torch.Generator().manual_seed(0)
    totals = [torch.randn(NUMEL, generator=chance, dtype=torch.float64) for _ in UNEQUAL]
    spread = spread_of(UNEQUAL, products_of(totals))
    assert spread is not None
    everyone = sum(UNEQUAL)
    norms = [(total / count).square().sum().item() for total, count in zip(totals, UNEQUAL, strict=True)]
    weighted = sum(count / everyone * norm for count, norm in zip(UNEQUAL, norms, strict=True))
    assert spread.of_groups == pytest.approx(weighted, rel=1e-12)
    assert spread.of_mean == pytest.approx((sum(totals) / everyone).square().sum().item(), rel=1e-12)
    assert spread.noise + everyone * spread.signal == pytest.approx(everyone * spread.of_mean, rel=1e-12)


@pytest.mark.parametrize("members", [2, 3, 5])
def test_spans_add_up_to_the_whole_vector_when_reducers_tell_theirs(members: int) -> None:
    chance, samples = torch.Generator().manual_seed(members), list(range(1, members + 1))
    totals = [torch.randn(3000, generator=chance) for _ in samples]
    whole = spread_of(samples, products_of(totals))
    parts = []
    for span in (slice(0, 1000), slice(1000, 1700), slice(1700, 3000)):
        likeness = Likeness()
        for chunk in torch.arange(3000)[span].split(512):
            add(likeness, range(members), [total[chunk] for total in totals], samples)
        parts.append(likeness.spread())
    assert whole is not None
    assert sum(part.of_groups for part in parts if part) == pytest.approx(whole.of_groups, rel=1e-6)
    assert sum(part.of_mean for part in parts if part) == pytest.approx(whole.of_mean, rel=1e-5)


@pytest.mark.parametrize("totals", [[torch.ones(3)], [torch.full((3,), 1e30)] * 2])
def test_spread_says_nothing_when_one_member_brought_samples_or_squares_overflow(
    totals: list[Tensor],
) -> None:
    likeness = Likeness()
    add(likeness, range(len(totals)), totals, [4] * len(totals))
    assert likeness.spread() is None


def test_accumulator_tells_the_spread_of_its_micro_batches_when_the_round_is_committed() -> None:
    chance, codec = torch.Generator().manual_seed(3), codec_named("fp16")
    batches, samples = [torch.randn(200, generator=chance) for _ in range(3)], [2, 5, 1]
    accumulator, ahead = Accumulator(200), Accumulator(200)
    for into, batch, count in zip((accumulator, accumulator, ahead), batches, samples, strict=True):
        into.add(batch, count)
    accumulator.absorb(ahead)
    found, expected = accumulator.settle(codec, []), spread_of(samples, products_of(batches))
    assert found is not None
    assert expected is not None
    assert (found.groups, found.samples) == (3, 8)
    assert found.noise == pytest.approx(expected.noise, rel=1e-5)
    accumulator.add(batches[0], 4)
    assert accumulator.settle(codec, []) is None  # of one micro-batch nothing can be told
    accumulator.add(batches[0], 4)
    accumulator.add(batches[1], 4)
    assert accumulator.settle(codec_named("topk"), []) is None


@pytest.mark.parametrize("sizes", [(3, 5), (1, 2, 4, 9), (7,)])
def test_mean_of_unequal_batches_is_the_gradient_of_the_pooled_batch(sizes: tuple[int, ...]) -> None:
    """T1, in float64: within 1e-12. The mean of the peers' means is another."""
    chance = torch.Generator().manual_seed(4)
    inputs = torch.randn(sum(sizes), 6, generator=chance, dtype=torch.float64)
    targets = torch.randn(sum(sizes), generator=chance, dtype=torch.float64)
    weights = torch.randn(6, generator=chance, dtype=torch.float64, requires_grad=True)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, weights)[0]

    def losses(part: slice) -> Tensor:
        return torch.tanh(inputs[part] @ weights).sub(targets[part]).square()

    bounds = np.cumsum([0, *sizes])
    parts = [slice(a, b) for a, b in pairwise(bounds)]
    averaged = mean_chunk([gradient(losses(part).sum()) for part in parts], sizes)
    pooled = gradient(losses(slice(None)).mean())
    torch.testing.assert_close(averaged, pooled, rtol=1e-12, atol=1e-14)
    if len(sizes) > 1:
        means = torch.stack([gradient(losses(part).mean()) for part in parts]).mean(0)
        assert not torch.allclose(means, pooled, rtol=1e-3)


# -- what it tells -------------------------------------------------------------------------------------------

TRUE = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OTHER = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
STRAY = 6.0


def batches(chance: torch.Generator, count: int, truth: Tensor) -> Tensor:
    """Gradients of single samples."""
    return truth + STRAY * torch.randn(count, len(truth), generator=chance, dtype=torch.float64)


def metered(draw: Callable[[torch.Generator], list[Tensor]], rounds: int = 60) -> list[Reading]:
    """What the first of some peers reads when each brings these samples, the first in two micro-batches."""
    meter, readings, chance = NoiseMeter(), [], torch.Generator().manual_seed(7)
    for _ in range(rounds):
        peers = draw(chance)
        mine = peers[0].split(len(peers[0]) // 2)
        within = spread_of([len(part) for part in mine], products_of([part.sum(0) for part in mine]))
        between = spread_of([len(one) for one in peers], products_of([one.sum(0) for one in peers]))
        readings.append(meter.round(between, within))
    return readings


def test_noise_scale_is_that_of_the_samples_when_peers_draw_alike() -> None:
    last = metered(lambda chance: [batches(chance, count, TRUE) for count in (8, 24, 4)], 200)[-1]
    assert last.signal == pytest.approx(TRUE.square().sum().item(), rel=0.1)
    assert last.noise_scale == pytest.approx(STRAY**2 * 400 / TRUE.square().sum().item(), rel=0.1)
    assert last.excess == pytest.approx(1.0, abs=0.05)


def test_nothing_is_told_before_there_are_enough_rounds() -> None:
    readings = metered(lambda chance: [batches(chance, 8, TRUE) for _ in range(2)], LEAST_ROUNDS)
    assert readings[-2] == Reading(None, None, None, duplicated=False)
    assert None not in (readings[-1].noise_scale, readings[-1].signal, readings[-1].excess)


def same_samples(chance: torch.Generator) -> list[Tensor]:
    drawn = batches(chance, 16, TRUE)
    return [drawn[:8], drawn]


def same_gradients(chance: torch.Generator) -> list[Tensor]:
    drawn = batches(chance, 8, TRUE)
    return [drawn, drawn, drawn]


def unlike_samples(chance: torch.Generator) -> list[Tensor]:
    return [batches(chance, 8, TRUE), batches(chance, 16, OTHER)]


@pytest.mark.parametrize(("draw", "times"), [(same_samples, 1), (same_gradients, 1), (unlike_samples, 0)])
def test_alarm_is_given_once_when_peers_draw_the_same_samples(
    draw: Callable[[torch.Generator], list[Tensor]], times: int
) -> None:
    assert sum(reading.duplicated for reading in metered(draw, 90)) == times


def test_alarm_is_given_when_gradients_are_identical_and_peers_have_one_micro_batch_each() -> None:
    meter, identical = NoiseMeter(), Spread(2, 16, 5.0, 5.0 * (1 - IDENTICAL / 2))
    readings = [meter.round(identical, None) for _ in range(LEAST_ROUNDS + 5)]
    assert [reading.duplicated for reading in readings].index(True) == LEAST_ROUNDS - 1
    assert sum(reading.duplicated for reading in readings) == 1


def test_excess_is_what_the_difference_of_data_explains_when_peers_differ() -> None:
    last = metered(unlike_samples, 200)[-1]
    mean = (8 * TRUE + 16 * OTHER) / 24
    unlike = (8 * (TRUE - mean).square().sum() + 16 * (OTHER - mean).square().sum()).item()  # B/(n-1) Σ …
    assert last.excess == pytest.approx(1 + unlike / (STRAY**2 * 400), rel=0.1)


def test_round_is_passed_over_when_a_reducer_tells_a_number_that_cannot_be() -> None:
    sound, absurd = Spread(2, 8, 2.0, 1.0), Spread(2, 8, 1.7e308, 1.0)
    meter, fair = NoiseMeter(), NoiseMeter()
    for _ in range(LEAST_ROUNDS):
        expected = fair.round(sound, None)
        meter.round(absurd, None)
        assert meter.round(sound, None) == expected


# -- who trains on something else ----------------------------------------------------------------------------


def watched(
    truths: Sequence[Tensor], samples: Sequence[int], rounds: int = 90, roster: Sequence[PeerId] = PEERS
) -> list[Unlike]:
    strangers, named, chance = Strangers(), [], torch.Generator().manual_seed(5)
    for _ in range(rounds):
        totals = [batches(chance, count, truth).sum(0) for truth, count in zip(truths, samples, strict=True)]
        named += strangers.saw(roster, range(len(totals)), samples, products_of(totals))
    return named


def test_both_estimates_are_the_noise_when_a_member_draws_from_the_same_data() -> None:
    chance, samples = torch.Generator().manual_seed(6), (1, 6, 12)
    found = []
    for _ in range(300):
        totals = [batches(chance, count, TRUE).sum(0) for count in samples]
        found.append(apart(samples, products_of(totals)))
    for of_member in torch.tensor(found).mean(0):
        assert of_member.tolist() == pytest.approx([STRAY**2 * 400] * 2, rel=0.02)


def test_nobody_is_named_when_all_draw_from_the_same_data_in_unequal_numbers() -> None:
    assert watched([TRUE] * 4, (1, 4, 16, 64)) == []


@pytest.mark.parametrize("stranger", [0, 2])
def test_peer_is_named_once_when_its_data_are_others(stranger: int) -> None:
    truths = [OTHER if at == stranger else TRUE for at in range(4)]
    named = watched(truths, (32, 64, 48, 64))
    assert [each.peer for each in named] == [PEERS[stranger]]
    assert named[0].excess > 2


def test_nobody_is_named_when_there_are_two_and_neither_can_be_told_from_the_other() -> None:
    assert watched([TRUE, OTHER], (64, 64)) == []
