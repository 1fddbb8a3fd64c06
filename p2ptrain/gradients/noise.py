"""How noisy gradients are, and so how large a batch pays: measured in every round, for two numbers per span.

Independent samples have gradients of mean G and covariance Σ. With S = tr Σ and G² = ‖G‖², the mean over B
of them is off by S/B, squared, so steps hardly improve beyond a batch of about S/G² samples, the (simple)
noise scale (McCandlish et al. 2018, "An empirical model of large-batch training", appendix A). Both follow
without bias from the squared norms of the mean gradients g_i of n ≥ 2 groups of b_i samples, and of all:

    S = B/(n - 1) · (Σ (b_i/B) ‖g_i‖² - ‖Σ (b_i/B) g_i‖²),    G² = ‖Σ (b_i/B) g_i‖² - S/B,    B = Σ b_i

The paper has equal groups; weights make it hold for any. A reducer takes the peers of a round for groups;
all norms are sums over values, so the spans of a round add up. A peer takes its own micro-batches, too:
between peers whose data differ, S is larger than within one (by B/(n - 1) Σ (b_i/B) ‖G_i - G‖²), and between
peers that compute on the same samples it is smaller. So the ratio of the two tells what peers train on.

The noise scale is what SGD's critical batch is about. With Adam the critical one can be larger by far
(Merrill et al. 2025, "Critical batch size revisited"), so take it for a lower bound there.

Not covered: what travels is not the gradient (see `UNMEASURED`; strategy `local`); samples that are not
independent, such as windows of one text that overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2ptrain.records import PeerId

UNMEASURED = frozenset({"topk", "lowrank"})
"""Codecs that leave out most of a gradient until later: the norms of what they bring say nothing. The others
change a squared norm by 2 % at most."""

MEMORY_ROUNDS = 100
"""Means reach back about so far: S and G² of a single round are mostly chance."""
LEAST_ROUNDS = 30
"""Fewer rounds tell nothing yet."""
STRANGER_ROUNDS = 40
"""Nobody is called a stranger before: among peers that draw the same samples one may look like that, and by
then it is known whether they do."""
DUPLICATED = 0.4
"""Share of the noise within this peer below which that between peers is too small for independent samples. Of
two peers that draw the same ones, one b_1 and the other b_2 > b_1 of them, it is (b_2 - b_1)/(b_2 + b_1)."""
IDENTICAL = 1e-4
"""Where peers' gradients differ by no more than this share of their squares, they are the same."""
UNLIKE = 2.0
"""A peer whose gradient is off the others' by so many times what chance explains trains on something else."""
TOLD_AGAIN = 1.25
"""An alarm is over, and may come again, when the ratio is back by this factor."""


@dataclass(frozen=True)
class Spread:
    """Squared norms in a span, or in the whole vector: they add up."""

    groups: int
    samples: int
    of_groups: float
    """Σ (b_i/B) ‖g_i‖², of the groups' mean gradients."""
    of_mean: float
    """‖Σ (b_i/B) g_i‖², of the mean over all samples."""

    @property
    def noise(self) -> float:
        """An unbiased estimate of S. By chance it may be below zero."""
        return self.samples / (self.groups - 1) * (self.of_groups - self.of_mean)

    @property
    def signal(self) -> float:
        """An unbiased estimate of G². By chance it may be below zero."""
        return self.of_mean - self.noise / self.samples


class Within:
    """The same, of one peer's micro-batches: fed while they come, one after the other."""

    def __init__(self) -> None:
        self.groups = self.samples = 0
        self._squares = 0.0

    def add(self, squared_norm: float, samples: int) -> None:
        """A micro-batch: ‖Σ of its samples' gradients‖², and their number."""
        self.groups += 1
        self.samples += samples
        self._squares += squared_norm / samples

    def absorb(self, other: Within) -> None:
        """The other's micro-batches count as this one's."""
        self.groups += other.groups
        self.samples += other.samples
        self._squares += other._squares

    def spread(self, squared_norm: float) -> Spread | None:
        """`squared_norm`: of the sum over all of them. None if there were not two."""
        if self.groups < 2:
            return None
        return Spread(self.groups, self.samples, self._squares / self.samples, squared_norm / self.samples**2)


def spread_of(samples: Sequence[int], products: Tensor) -> Spread | None:
    """`products` (float64 [n, n]): the inner products of n totals over so many samples each. None if there
    are not two, or not all of it is finite."""
    if len(samples) < 2:
        return None
    everyone = sum(samples)
    counts = torch.tensor(samples, dtype=torch.float64)
    of_groups = (products.diagonal() / counts).sum().item() / everyone
    of_mean = products.sum().item() / everyone**2
    if not (math.isfinite(of_groups) and math.isfinite(of_mean)):
        return None
    return Spread(len(samples), everyone, of_groups, max(of_mean, 0.0))


def apart(samples: Sequence[int], products: Tensor) -> list[tuple[float, float]]:
    """For each of n ≥ 3 members: how far its mean gradient is from the mean of the others', squared and in
    units of 1/b_i + 1/(B - b_i), and the noise among those others. Where all draw from the same data both are
    S on average. Arguments as in `spread_of`."""
    everyone = sum(samples)
    counts = torch.tensor(samples, dtype=torch.float64)
    rest, own, row = everyone - counts, products.diagonal(), products.sum(dim=1)
    others = row.sum() - 2 * row + own  # ‖Σ of the others' totals‖²
    distance = own / counts**2 - 2 * (row - own) / (counts * rest) + others / rest**2
    noise = ((own / counts).sum() - own / counts - others / rest) / (len(samples) - 2)
    return list(zip((distance / (1 / counts + 1 / rest)).tolist(), noise.tolist(), strict=True))


class Mean:
    """The mean of the last rounds or so; each counts less by 1/`MEMORY_ROUNDS` than the next."""

    def __init__(self) -> None:
        self.rounds = 0
        self._sum = self._weight = 0.0

    def add(self, value: float) -> None:
        keep = 1 - 1 / MEMORY_ROUNDS
        self.rounds += 1
        self._sum = keep * self._sum + value
        self._weight = keep * self._weight + 1

    @property
    def value(self) -> float:
        return self._sum / self._weight


def _ratio(above: Mean, below: Mean, least: int = LEAST_ROUNDS) -> float | None:
    """Of the means, and not the mean of ratios, which is biased; None while it cannot be told."""
    if min(above.rounds, below.rounds) < least or below.value <= 0:
        return None
    return max(above.value, 0.0) / below.value


@dataclass(frozen=True)
class Reading:
    """What the rounds say so far; None for what cannot be told yet."""

    noise_scale: float | None
    """S/G², in samples."""
    signal: float | None
    """G²."""
    excess: float | None
    """Noise between peers, as a multiple of that within this one: 1 where all draw from the same data."""
    duplicated: bool
    """Peers seem to compute on the same samples. Said once, until it is over."""


UNREAD = Reading(noise_scale=None, signal=None, excess=None, duplicated=False)
"""Where nothing is measured."""


class NoiseMeter:
    """The noise over the rounds that this peer took part in."""

    def __init__(self) -> None:
        self._noise, self._signal, self._within = Mean(), Mean(), Mean()
        self._identical = 0
        self._told = False

    def round(self, between: Spread | None, within: Spread | None) -> Reading:
        """A round was committed; None for what could not be measured in it."""
        if between is not None and math.isfinite(between.noise + between.signal):
            self._noise.add(between.noise)
            self._signal.add(between.signal)
            same = between.of_groups - between.of_mean <= IDENTICAL * between.of_groups
            self._identical = self._identical + 1 if same else 0
        if within is not None and math.isfinite(within.noise):
            self._within.add(within.noise)
        known = self._noise.rounds >= LEAST_ROUNDS
        excess = _ratio(self._noise, self._within)
        return Reading(
            noise_scale=_ratio(self._noise, self._signal),
            signal=max(self._signal.value, 0.0) if known else None,
            excess=excess,
            duplicated=self._is_news(excess),
        )

    @property
    def duplicates(self) -> bool:
        """Whether peers seem to compute on the same samples now: then nobody can be told from the others."""
        return self._told

    def _is_news(self, excess: float | None) -> bool:
        same = self._identical >= LEAST_ROUNDS
        if same or (excess is not None and excess < DUPLICATED):
            news, self._told = not self._told, True
            return news
        if excess is None or excess > TOLD_AGAIN * DUPLICATED:
            self._told = False
        return False


@dataclass(frozen=True)
class Unlike:
    """For the log: a member's gradients are off the others' by so many times what chance explains."""

    peer: PeerId
    excess: float


class Strangers:
    """Who trains on other data than the others, as its gradients tell in the span that this peer reduces. Who
    leaves the roster is forgotten."""

    def __init__(self) -> None:
        self._seen: dict[PeerId, tuple[Mean, Mean]] = {}
        self._told: set[PeerId] = set()

    def saw(
        self, roster: Sequence[PeerId], ranks: Sequence[int], samples: Sequence[int], products: Tensor
    ) -> list[Unlike]:
        """A round of this roster was committed; the members of these ranks brought so many samples, for the
        rest see `apart`. Returns who is to be named now."""
        here = set(roster)
        self._seen = {peer: means for peer, means in self._seen.items() if peer in here}
        self._told &= here
        if len(samples) < 3:
            return []
        named = []
        for rank, (distance, noise) in zip(ranks, apart(samples, products), strict=True):
            if not (math.isfinite(distance) and math.isfinite(noise)):
                continue
            above, below = self._seen.setdefault(roster[rank], (Mean(), Mean()))
            above.add(distance)
            below.add(noise)
            if (excess := _ratio(above, below, STRANGER_ROUNDS)) is None:
                continue
            if excess > UNLIKE and roster[rank] not in self._told:
                self._told.add(roster[rank])
                named.append(Unlike(roster[rank], excess))
            elif excess < UNLIKE / TOLD_AGAIN:
                self._told.discard(roster[rank])
        return named
