"""What a reducer computes: one gradient out of the members' totals, by the rule that the run file names.

`mean` is exact and takes everyone at their word: one liar owns it. The other rules start from the members'
mean gradients and bound what any of them can do. They go by coordinate or by chunk, so that a reducer needs
nothing but its span.

Whatever the order in which chunks arrived, members come in roster order, and every operation rounds once:
float addition is not associative, and dividing by a Python scalar multiplies by its reciprocal on some
devices. So whoever has the same chunks gets the same bytes, on any kernel.

Not covered: liars that stay as close to the others as those are to each other; no rule can tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from itertools import combinations
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from p2ptrain.errors import PeerFault
from p2ptrain.records import EntryHeader

FEWEST = 3
"""With fewer members that brought samples there is no majority, and every rule is the plain mean."""


class EmptyRound(PeerFault):
    """No member of the round brought a sample: there is nothing to average."""


Aggregation = Callable[[Sequence[Tensor], Sequence[int]], Tensor]
"""(totals, samples) → the gradient to apply, for one chunk: a new tensor, float32 [n].

`totals[i]` (float32 [n]) is member i's sum over its `samples[i]` ≥ 0 samples, in roster order; the total of a
member that brought none is not looked at. Raises EmptyRound if no member brought a sample.
"""


def mean_chunk(totals: Sequence[Tensor], samples: Sequence[int]) -> Tensor:
    """Mean gradient over every sample of the round. See `Aggregation`."""
    brought = [total for total, count in zip(totals, samples, strict=True) if count > 0]
    if not brought:
        raise EmptyRound(f"none of the {len(samples)} members of the round brought a sample")
    mean = torch.add(*brought[:2]) if len(brought) > 1 else brought[0].clone()
    for total in brought[2:]:
        mean.add_(total)
    return mean.div_(_scalar(sum(samples)))


def median(totals: Sequence[Tensor], samples: Sequence[int]) -> Tensor:
    """In each coordinate the median of the members' mean gradients; each counts once, whatever it brought.

    With fewer than half of the members lying, every value is between two that honest members brought.
    """
    means, _ = _means(totals, samples)
    if len(means) < FEWEST:
        return mean_chunk(totals, samples)
    ordered = _in_order(means)
    return _within(_middle(ordered), ordered[0], ordered[-1])


def trimmed_mean(totals: Sequence[Tensor], samples: Sequence[int]) -> Tensor:
    """In each coordinate, the mean of what is left of the members' mean gradients without the highest and the
    lowest quarter (at least one each); weighted by samples, see `_means`.

    With no more than a quarter of the members lying, or one, every value is between two that honest members
    brought.
    """
    means, weights = _means(totals, samples)
    if len(means) < FEWEST:
        return mean_chunk(totals, samples)
    ordered, cut = _in_order(means), max(len(means) // 4, 1)
    low, high = ordered[cut], ordered[-1 - cut]
    summed, weight = torch.zeros_like(low), torch.zeros_like(low)
    for mean, own in zip(means, weights, strict=True):
        counted = ((mean >= low) & (mean <= high)).float().mul_(_scalar(own))
        summed.add_(mean.mul(counted))
        weight.add_(counted)
    return _within(summed.div_(weight), low, high)


def centered_clip(totals: Sequence[Tensor], samples: Sequence[int]) -> Tensor:
    """CenteredClip (Karimireddy et al. 2021), one step from the median: the members' differences from it are
    shortened to the length of the median one, and their mean, weighted by samples (see `_means`), is added.

    With fewer than half of the members lying, each moves the result by no more than its share of the weight,
    times the distance from the median to the honest member that is farthest from it.
    """
    means, weights = _means(totals, samples)
    if len(means) < FEWEST:
        return mean_chunk(totals, samples)
    ordered = _in_order(means)
    centre = _middle(ordered)
    differences = [mean.sub(centre) for mean in means]
    lengths = [math.sqrt(squared_norm_in_order(difference)) for difference in differences]
    radius, everyone = sorted(lengths)[(len(lengths) - 1) // 2], math.fsum(weights)
    clipped = centre.clone()
    for difference, length, weight in zip(differences, lengths, weights, strict=True):
        share = weight / everyone * (radius / length if length > radius else 1.0)
        clipped.add_(difference.mul_(_scalar(share)))
    return _within(clipped, ordered[0], ordered[-1])


def multi_krum(totals: Sequence[Tensor], samples: Sequence[int]) -> Tensor:
    """Multi-Krum (Blanchard et al. 2017): the mean, weighted by samples (see `_means`), without the quarter
    of the members (at least one) that is farthest from its nearest neighbours, as many as are kept.

    Squared distances count in units of 1/samples of the one + 1/samples of the other: so far apart are honest
    gradients that differ by chance only, and a slow peer is not taken for a liar.

    With no more than a quarter of the members lying, or one, a liar counts only if it is as near to the
    others as an honest member is. One that claims fewer samples may be farther away, and weighs less.
    """
    means, weights = _means(totals, samples)
    if len(means) < FEWEST:
        return mean_chunk(totals, samples)
    members = range(len(means))
    kept = len(means) - max(len(means) // 4, 1)
    noise = [1 / count for count in samples if count > 0]
    apart = [[0.0 for _ in members] for _ in members]
    for one, other in combinations(members, 2):
        squared = squared_norm_in_order(means[one].sub(means[other]))
        apart[one][other] = apart[other][one] = squared / (noise[one] + noise[other])
    # Each is at no distance from itself, and comes first among its own neighbours.
    score = [math.fsum(sorted(distances)[:kept]) for distances in apart]
    near = sorted(sorted(members, key=score.__getitem__)[:kept])
    chosen, summed = [means[at] for at in near], torch.zeros_like(means[0])
    for at in near:
        summed.add_(means[at].mul(_scalar(weights[at])))
    summed.div_(_scalar(math.fsum(weights[at] for at in near)))
    return _within(summed, reduce(torch.minimum, chosen), reduce(torch.maximum, chosen))


CLIP_AT = 2.0
"""Of the norm that an honest gradient has if it is nothing but noise."""


def norm_clip(totals: Sequence[Tensor], samples: Sequence[int], usual: float = 0.0) -> Tensor:
    """The mean of the members' mean gradients, weighted by samples (see `_means`), each shortened to
    `CLIP_AT` × √members × `usual` where it is longer.

    `usual`: the norm that the last entry had in these values, 0 for unknown: then nothing is shortened. The
    mean of n gradients that are nothing but noise is √n times as short as each of them, hence the √members:
    without it honest gradients would be shortened, and the bound with them, from step to step.

    A member that lies moves the result by no more than its share of the weight, times that bound.
    """
    means, weights = _means(totals, samples)
    if len(means) < FEWEST:
        return mean_chunk(totals, samples)
    bound = CLIP_AT * math.sqrt(len(means)) * usual
    for mean in means if bound else ():
        length = math.sqrt(squared_norm_in_order(mean))
        if length > bound:
            mean.mul_(_scalar(bound / length))
    summed = torch.zeros_like(means[0])
    for mean, weight in zip(means, weights, strict=True):
        summed.add_(mean.mul(_scalar(weight)))
    summed.div_(_scalar(math.fsum(weights)))
    return _within(summed, reduce(torch.minimum, means), reduce(torch.maximum, means))


def for_chunk(aggregation: Aggregation, last: EntryHeader | None, start: int, stop: int) -> Aggregation:
    """The rule for the values [start, stop). One that follows past entries is told of the last one: its
    header is a part of the lineage, so all members have the same."""
    if aggregation is not norm_clip or last is None:
        return aggregation
    return partial(norm_clip, usual=usual_norm(last, start, stop))


def usual_norm(last: EntryHeader, start: int, stop: int) -> float:
    """The norm that entry had in the values [start, stop), if each of its spans had it evenly."""
    parts = [
        squared * (min(stop, ends) - max(start, begins)) / (ends - begins)
        for begins, ends, squared in zip(last.spans, last.spans[1:], last.squared_norms, strict=False)
        if begins < ends and begins < stop and start < ends
    ]
    return math.sqrt(math.fsum(parts))


AGGREGATIONS: Mapping[str, Aggregation] = MappingProxyType(
    {
        "mean": mean_chunk,
        "multi_krum": multi_krum,
        "centered_clip": centered_clip,
        "trimmed_mean": trimmed_mean,
        "median": median,
        "norm_clip": norm_clip,
    }
)
"""By the name that the run file gives them."""


OUTSIZED = 1e4
"""Honest peers differ in the norm of their mean gradients by less than a hundred."""


def outsized(squares: Sequence[float], samples: Sequence[int], usual: float) -> int | None:
    """Index of a member whose mean gradient is more than `OUTSIZED` times as long as the median one; None if
    there is none, if there are fewer than three to compare, or if the median is nothing (rows that few use).

    `squares`: ‖total‖² of those who brought samples; `usual`, the norm of the last averaged
    gradient, counts as one more, 0 for unknown. Such a member would own the average, whatever the others
    bring (I5).
    """
    if len(squares) + bool(usual) < 3:
        return None
    norms = [math.sqrt(square) / count for square, count in zip(squares, samples, strict=True)]
    known = sorted([*norms, usual] if usual else norms)
    if not (median := known[(len(known) - 1) // 2]):
        return None
    longest = max(range(len(norms)), key=norms.__getitem__)
    return longest if norms[longest] > OUTSIZED * median else None


def about_squared_norm(values: Tensor) -> float:
    """Σ x² in float32, three times as fast as in float64, unless that overflows or vanishes."""
    about = torch.dot(values, values).item()
    return about if 2.0**-60 < about < math.inf else squared_norm(values)


def squared_norm(values: Tensor) -> float:
    """Σ x² of a chunk or span, in float64, and the same on whichever thread: a BLAS adds up in an order that
    depends on how many threads it has there."""
    double = values.numpy().astype(np.float64)
    return float(np.add.reduce(np.multiply(double, double, out=double)))


def squared_norm_in_order(values: Tensor) -> float:
    """Σ x², to the same bit everywhere: squares of float32 are exact in float64, and are added in pairs,
    halving the vector, where `squared_norm` adds in the kernel's own order."""
    double = values.double()
    squares = double.mul_(double)
    while len(squares) > 1:
        half = (len(squares) + 1) // 2
        rest = squares[half:]
        squares = squares[:half]
        squares[: len(rest)].add_(rest)
    return squares.item()


# -- inside --------------------------------------------------------------------------------------------------


def _means(totals: Sequence[Tensor], samples: Sequence[int]) -> tuple[list[Tensor], list[float]]:
    """Mean gradients of those who brought samples, and their weights: samples in units of the median, at most
    1. So claiming many gains nothing over the median member, and bringing few does not count for more.

    Raises EmptyRound if nobody brought any.
    """
    brought = [(total, count) for total, count in zip(totals, samples, strict=True) if count > 0]
    if not brought:
        raise EmptyRound(f"none of the {len(samples)} members of the round brought a sample")
    counts = sorted(count for _, count in brought)
    usual = counts[(len(counts) - 1) // 2]
    return [total.div(_scalar(count)) for total, count in brought], [min(c / usual, 1.0) for _, c in brought]


def _in_order(rows: Sequence[Tensor]) -> list[Tensor]:
    """The rows, sorted in each coordinate, lowest first: as many times as there are rows, neighbours change
    places. (For so few rows that is many times faster than `torch.sort`.)"""
    ordered = list(rows)
    for turn in range(len(ordered)):
        for at in range(turn % 2, len(ordered) - 1, 2):
            pair = ordered[at], ordered[at + 1]
            ordered[at], ordered[at + 1] = torch.minimum(*pair), torch.maximum(*pair)
    return ordered


def _middle(ordered: Sequence[Tensor]) -> Tensor:
    """The middle row, or the mean of the middle two."""
    at = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[at]
    half = _scalar(0.5)  # of each before adding: the sum of two could be beyond float32
    return ordered[at - 1].mul(half).add_(ordered[at].mul(half))


def _within(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """A new tensor: rounding moves no value beyond what members brought, and -0 is 0, since which of the two
    wins a comparison is the kernel's choice."""
    return torch.clamp(values, low, high).add_(_scalar(0.0))


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)
