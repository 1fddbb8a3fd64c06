"""Several people's adapters made one: concatenated, averaged, cut to a smaller rank, or merged into the base.

What one adapter of the mean is worth depends on what they learned. If all learned the same thing, the mean is
better than each; if they learned different things it is worse than the base, and choosing among them
(`route`) is what helps. Cosine and sign agreement say beforehand which of the two it is.

Not covered: heuristics for different tasks (TIES, DARE); the tables that are known show them behind choosing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

from p2ptrain.adapters.factors import Compressed, Factors, compressed, concatenated, inner, sign_agreement
from p2ptrain.adapters.files import Adapter, check_together
from p2ptrain.errors import AdapterError

Method = Literal["cat", "mean", "sum", "svd", "merge"]


@dataclass(frozen=True)
class Likeness:
    """How much two adapters' changes are alike, over all weights together."""

    a: int
    b: int
    """Which two, counted as they were given."""
    cosine: float
    sign_agreement: float
    """Share of the values changed by both that they change in the same direction; 0.5 is chance."""


@dataclass(frozen=True)
class Combined:
    """The result, and what to say of it."""

    factors: Mapping[str, Factors]
    weights: tuple[float, ...]
    likenesses: tuple[Likeness, ...]
    energy_kept: float
    """Share of the exact result's squared norm; 1 if nothing was cut off."""
    lost_norm: float
    """Frobenius norm of what was cut off, over all weights."""

    @property
    def ranks(self) -> tuple[int, int]:
        """The smallest and the largest rank."""
        ranks = [each.rank for each in self.factors.values()]
        return min(ranks), max(ranks)

    def facts(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "weights": self.weights,
            "ranks": self.ranks,
            "values": sum(each.a.numel() + each.b.numel() for each in self.factors.values()),
            "energy_kept": self.energy_kept,
            "lost_norm": self.lost_norm,
            "likenesses": [asdict(each) for each in self.likenesses],
        }


def weights_for(adapters: Sequence[Adapter], method: Method, text: str) -> tuple[float, ...]:
    """The weight of each: `text` is `samples`, numbers separated by commas, or empty for equal ones.

    `cat` takes them as they are (1 if none are given), `sum` has none but 1; the others want their sum to be
    1, and get it. Raises AdapterError.
    """
    if method == "sum" and text:
        raise AdapterError("--method sum adds all with weight 1; leave --weights out, or use --method cat")
    if text == "samples":
        unknown = [str(each.path) for each in adapters if not each.note.samples]
        if unknown:
            raise AdapterError(f"{unknown[0]} does not say how many samples it was trained on; give numbers")
        weights = [float(each.note.samples) for each in adapters]
    elif text:
        try:
            weights = [float(word) for word in text.split(",")]
        except ValueError:
            raise AdapterError(
                f"--weights {text[:60]!r}: expected `samples` or numbers such as 1,1,2"
            ) from None
        if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
            raise AdapterError(
                f"--weights {text[:60]!r}: expected {len(adapters)} finite numbers, one for each adapter"
            )
    else:
        weights = [1.0] * len(adapters)
    if method == "sum" or (method == "cat" and text != "samples"):
        return tuple(weights)
    whole = math.fsum(weights)
    if abs(whole) < 1e-9 * math.fsum(map(abs, weights)) or not whole:
        raise AdapterError(
            f"--weights {text[:60]!r} sum to {whole:g}, and a mean divides by that; give weights that sum to "
            "something, or use --method cat, which takes them as they are"
        )
    return tuple(weight / whole for weight in weights)


def combine(
    adapters: Sequence[Adapter],
    method: Method,
    weights: Sequence[float],
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> Combined:
    """Σ weight · change, exactly, then cut to `rank` or to that share of the squared norm if one is given.

    `svd` without either cuts to the largest rank among the adapters. A module that only some adapters change
    counts as unchanged in the others. Raises AdapterError.
    """
    check_together(list(adapters))
    if method == "svd" and rank is None and energy is None:
        rank = max(each.rank for adapter in adapters for each in adapter.factors.values())
    factors: dict[str, Factors] = {}
    lost = whole = 0.0
    for module in sorted({module for adapter in adapters for module in adapter.factors}):
        pairs = [
            (a.factors[module], w) for a, w in zip(adapters, weights, strict=True) if module in a.factors
        ]
        exact = concatenated(*zip(*pairs, strict=True))
        if rank is None and energy is None:
            factors[module] = exact
            continue
        cut = _cut(module, exact, rank, energy)
        factors[module] = cut.factors
        lost, whole = lost + cut.lost_squared, whole + cut.whole_squared
    return Combined(
        factors=factors,
        weights=tuple(weights),
        likenesses=tuple(
            _likeness(i, j, adapters[i].factors, adapters[j].factors)
            for i, j in combinations(range(len(adapters)), 2)
        ),
        energy_kept=1 - lost / whole if whole else 1.0,
        lost_norm=math.sqrt(lost),
    )


def _cut(module: str, exact: Factors, rank: int | None, energy: float | None) -> Compressed:
    try:
        return compressed(exact, rank, energy)
    except ValueError as error:
        raise AdapterError(
            f"--rank {rank} is above what {module} can hold, {error}; give a smaller one"
        ) from None


def _likeness(a: int, b: int, one: Mapping[str, Factors], other: Mapping[str, Factors]) -> Likeness:
    both = one.keys() & other.keys()
    product = math.fsum(inner(one[module], other[module]) for module in both)
    norms = [math.fsum(inner(each, each) for each in side.values()) for side in (one, other)]
    same, counted = (
        map(sum, zip(*(sign_agreement(one[m], other[m]) for m in both), strict=True)) if both else (0, 0)
    )
    size = math.sqrt(norms[0] * norms[1])
    return Likeness(a, b, product / size if size else 0.0, same / counted if counted else 0.5)
