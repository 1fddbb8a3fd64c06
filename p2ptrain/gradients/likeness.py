"""Whose gradient stands out: how alike the members' gradients are in the span that this peer reduces.

Honest gradients of one model point the same way, more or less; one that is flipped, constant, noise, or
nothing at all does not. So each member's is compared with each other's, by the cosine of the angle between
them. This names people and changes no sum: it is what one peer has seen by itself (ADR 15), and need not be
the same on any two of them.

Not covered: a liar whose gradient is as like the others' as theirs are to each other, and rounds in which
those have nothing in common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2ptrain.gradients.aggregation import FEWEST
from p2ptrain.gradients.noise import Spread, spread_of
from p2ptrain.records import PeerId

LEAST_AGREEMENT = 0.05
"""Where the usual cosine between two members is less, directions say nothing."""
ODD_AGREEMENT = 0.25
"""Share of the usual agreement below which a member stands out."""
ODD_LENGTH = 4.0
"""And so it does with a gradient so many times as long as the usual one."""
ODD_ROUNDS = 8
"""It is named after so many more rounds in which it stood out than rounds in which it did not."""


class Likeness:
    """Inner products of the totals of those who brought samples, over the chunks so far."""

    def __init__(self) -> None:
        self.ranks: Sequence[int] = ()
        self.samples: Sequence[int] = ()
        self.products = torch.zeros(0, 0, dtype=torch.float64)

    def add(
        self,
        ranks: Sequence[int],
        totals: Sequence[Tensor],
        samples: Sequence[int],
        squares: Sequence[float],
    ) -> None:
        """One more chunk of the same members: their ranks in the roster, and totals and samples as in
        `Aggregation`, but only of those who brought any; `squares` are ‖total‖²."""
        if not self.ranks:
            self.ranks, self.samples = tuple(ranks), tuple(samples)
            self.products = torch.zeros(len(ranks), len(ranks), dtype=torch.float64)
        if len(totals) == 2:  # as quick as it can be, as it is done between two chunks
            (one, other), cross = squares, torch.dot(*totals).item()
            self.products += torch.tensor([[one, cross], [cross, other]], dtype=torch.float64)
        elif len(totals) > 2:
            rows = torch.stack(list(totals))
            self.products += rows @ rows.T

    def spread(self) -> Spread | None:
        """How far the members' gradients are apart, in the chunks so far."""
        return spread_of(self.samples, self.products)

    def odd(self) -> list[int] | None:
        """Ranks of the members that stand out; None if that cannot be told.

        A gradient of few samples is mostly noise: it is longer, and less like the others, by up to the square
        root of their ratio. That is allowed for; whoever claims few samples to profit from it weighs little.
        """
        members = len(self.ranks)
        if members < FEWEST:
            return None
        products = self.products.tolist()
        lengths = [math.sqrt(products[at][at]) for at in range(members)]

        def cosine(one: int, other: int) -> float:
            both = lengths[one] * lengths[other]
            return products[one][other] / both if both else 0.0

        agreements = [
            _median([cosine(one, other) for other in range(members) if other != one])
            for one in range(members)
        ]
        usual_agreement, usual_samples = _median(agreements), _median(self.samples)
        usual_length = _median([length / count for length, count in zip(lengths, self.samples, strict=True)])
        if usual_agreement < LEAST_AGREEMENT:
            return None
        odd = []
        for rank, agreement, length, samples in zip(
            self.ranks, agreements, lengths, self.samples, strict=True
        ):
            allowance = min(1.0, math.sqrt(samples / usual_samples))
            if (
                agreement < ODD_AGREEMENT * allowance * usual_agreement
                or length / samples * allowance > ODD_LENGTH * usual_length
            ):
                odd.append(rank)
        return odd


@dataclass(frozen=True)
class StoodOut:
    """For the log: a member's gradients were odd in so many more rounds than they were not."""

    peer: PeerId
    rounds: int


class Watch:
    """In how many rounds the members stood out, of those that this peer could judge. Who leaves the roster is
    forgotten."""

    def __init__(self) -> None:
        self._odd_rounds: dict[PeerId, int] = {}

    def saw(self, roster: Sequence[PeerId], likeness: Likeness) -> list[StoodOut]:
        """A round of this roster was committed; who is to be named now, and counts from nothing again."""
        if (odd := likeness.odd()) is None:
            return []
        before, self._odd_rounds, named = self._odd_rounds, {}, []
        for rank, peer in enumerate(roster):
            rounds = before.get(peer, 0)
            if rank in likeness.ranks:
                rounds = max(rounds + (1 if rank in odd else -1), 0)
            if rounds == ODD_ROUNDS:
                named.append(StoodOut(peer, rounds))
                rounds = 0
            self._odd_rounds[peer] = rounds
        return named


def _median(values: Sequence[float]) -> float:
    """The higher one of two: of two others, one honest is enough."""
    return sorted(values)[len(values) // 2]
