"""Strategy `partition`: who owns which coordinates, and what becomes of the parts that were trained apart.

In each round every coordinate has one owner, who trains it while all others keep it as it was; what all
owners did is applied together, the *union*: θ ← θ + γ Σ Δ_p, with Δ_p zero outside of part p. That is block
coordinate descent by all blocks at once (Jacobi's method), and γ = 1 or 1/N are what CoCoA calls adding and
averaging (Ma et al. 2015, 1502.03508). To second order

    L(θ + Σ Δ_p) - L = Σ [L(θ + Δ_p) - L] + Σ_{p<q} Δ_pᵀ H Δ_q,

and the last term is the *cohesion defect*: what parts lose that did not know of each other.

All this is a pure function of what every replica knows: the last entry's roster, the step and the seed. So
nobody hands out parts, and that of a peer that has vanished is its successors' with the next entry.

Not covered: parts of unlike size for peers of unlike speed; whole neurons as units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np
import torch
from torch import Tensor

By = Literal["tensor", "block", "random"]
Gamma = Literal["1", "1/n", "auto"]
Ranges = Sequence[tuple[int, int]]

# -- whose is what -------------------------------------------------------------------------------------------


def turn_of(step: int, rotate_every: int) -> int:
    """How often parts have gone round before this step; 0 `rotate_every`: they stay."""
    return step // rotate_every if rotate_every else 0


def owners(by: By, tensors: Ranges, members: int, seed: int, turn: int) -> Tensor:
    """The rank of each coordinate's owner among so many members: int16 [numel].

    `tensors` are the ranges [start, stop) that make the vector, in order. `tensor`: whole ones, the largest
    first to whoever has the least; with more members than tensors some have nothing. `block`: as many ranges
    of one length as there are members. Both go on by one member in each turn. `random`: each coordinate by
    itself, and in each turn anew.
    """
    numel = tensors[-1][1]
    found = torch.empty(numel, dtype=torch.int16)
    match by:
        case "tensor":
            for (start, stop), slot in zip(tensors, _slots(tensors, members), strict=True):
                found[start:stop] = (slot + turn) % members
        case "block":
            bounds = [numel * slot // members for slot in range(members + 1)]
            for slot in range(members):
                found[bounds[slot] : bounds[slot + 1]] = (slot + turn) % members
        case "random":
            drawn = _mixed(np.arange(numel, dtype=np.uint64), _mixed_one(seed, turn))
            found = torch.from_numpy((drawn % np.uint64(members)).astype(np.int16))
        case _:
            assert_never(by)
    return found


def coordinates(owners: Tensor, rank: int) -> Tensor:
    """What that member owns: indices in rising order, int64 [any number]."""
    return torch.nonzero(owners == rank).reshape(-1)


def within(coordinates: Tensor, ranges: Ranges) -> list[tuple[int, int]]:
    """Which of these coordinates, by their place among them, lie in each of the rising ranges; those that
    hold none are left out."""
    bounds = torch.tensor(ranges, dtype=torch.int64).reshape(-1)
    places = torch.searchsorted(coordinates, bounds).reshape(len(ranges), 2).tolist()
    return [(start, stop) for start, stop in places if start < stop]


def _slots(tensors: Ranges, members: int) -> list[int]:
    """Of each tensor. Ties by order, so that it is the same everywhere."""
    sizes = [stop - start for start, stop in tensors]
    loads, slots = [0] * members, [0] * len(tensors)
    for index in sorted(range(len(tensors)), key=lambda index: (-sizes[index], index)):
        slot = min(range(members), key=lambda slot: (loads[slot], slot))
        slots[index] = slot
        loads[slot] += sizes[index]
    return slots


def _mixed_one(seed: int, turn: int) -> np.uint64:
    key = np.array([(seed << 32) ^ (turn & 0xFFFF_FFFF)], dtype=np.uint64)
    mixed: np.uint64 = _mixed(key, np.uint64(0))[0]
    return mixed


def _mixed(
    numbers: np.ndarray[tuple[int], np.dtype[np.uint64]], key: np.uint64
) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """SplitMix64 (Steele et al. 2014): torch's own generators may draw otherwise in another version."""
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


# -- the union -----------------------------------------------------------------------------------------------


def union_of_mean(mean: Tensor, samples: int) -> Tensor:
    """Σ of what the owners brought, in place, from the mean that a round makes of it: that divides by the
    samples of all. To take the mean for the union would damp it by them, without a word."""
    return mean.mul_(torch.tensor(float(samples), dtype=torch.float32))


def power(base: float, exponent: int) -> float:
    """base^exponent by squaring: the same bits everywhere, which the C library's `pow` does not promise."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def steps_behind(samples: int, owners: int, inner_batch_size: int) -> int:
    """Steps of the inner optimizer that an entry stands for: what an owner took on average, at least one."""
    return max(samples // (max(owners, 1) * inner_batch_size), 1)


# -- how well the parts fit together -------------------------------------------------------------------------

PROBE_VALUES = 7
"""That travel behind the parameters and the optimizer's state."""


def candidates(members: int) -> tuple[float, float, float, float]:
    """What γ may be with `auto`."""
    return 1.0, 0.5, 0.25, 1.0 / members


@dataclass(frozen=True)
class Probe:
    """What one peer has measured of the last round's union, or the sum over all peers that did: changes of
    the loss, in nats, on samples that nobody trains on, all the same for all peers."""

    peers: float
    """That measured."""
    whole: tuple[float, float, float, float]
    """By θ + γ Σ Δ_p, for each of the `candidates`."""
    parts: float
    """Owners that measured what they did alone."""
    alone: float
    """By θ + Δ_p: Σ over those."""

    def values(self) -> list[float]:
        """As they travel: `PROBE_VALUES` of them."""
        return [self.peers, *self.whole, self.parts, self.alone]

    @classmethod
    def of(cls, values: Sequence[float]) -> Probe:
        """As they came."""
        peers, *whole, parts, alone = values
        return cls(peers, (whole[0], whole[1], whole[2], whole[3]), parts, alone)

    @property
    def measured(self) -> bool:
        """Whether anybody has."""
        return self.peers > 0.5

    def cohesion(self, owners: int) -> Cohesion | None:
        """Of the last round, in which so many owners trained; None unless all of them measured their
        part."""
        if not self.measured or round(self.parts) != owners:
            return None
        return Cohesion(union=self.whole[0] / self.peers, parts=self.alone)


NOTHING = Probe(0.0, (0.0, 0.0, 0.0, 0.0), 0.0, 0.0)


@dataclass(frozen=True)
class Cohesion:
    """Changes of the loss by one round, in nats: below zero it fell."""

    union: float
    """By what all owners did together, undamped."""
    parts: float
    """Σ of what each owner's part alone does."""

    @property
    def defect(self) -> float:
        """What parts lose by not knowing of each other; below zero they help each other."""
        return self.union - self.parts

    @property
    def eats_the_gains(self) -> bool:
        """Whether more than half of what the parts gain is lost, or they gain nothing to begin with and lose
        together."""
        return self.defect > 0.5 * abs(self.parts)


def together(rounds: Sequence[Cohesion]) -> Cohesion:
    """Of several rounds."""
    return Cohesion(
        union=math.fsum(each.union for each in rounds), parts=math.fsum(each.parts for each in rounds)
    )


def chosen(gamma: Gamma, members: int, probe: Probe, before: float) -> float:
    """By what the union of a round is multiplied.

    With `auto` it is what would have been best for the last round's union, by the losses that peers measured
    and brought to this one; of equal ones the largest. Until somebody has, what it was `before`, and 1/n at
    the very beginning (0). So every replica takes the same from the entry alone.
    """
    match gamma:
        case "1":
            return 1.0
        case "1/n":
            return 1.0 / members
        case "auto":
            if not probe.measured:
                return before or 1.0 / members
            best = min(range(len(probe.whole)), key=probe.whole.__getitem__)
            return candidates(members)[best]
        case _:
            assert_never(gamma)
