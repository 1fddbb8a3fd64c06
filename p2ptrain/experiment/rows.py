"""What the literature lets expect, and whether a result agrees: the rules of rows R5, R6 and R9.

They are written down before the measuring, and a result that contradicts them is told as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from p2ptrain.experiment.grid import Cell
from p2ptrain.experiment.summary import SIGMAS, Measured, Summary, spearman

MONOTONE = 0.9
"""Rank correlation above which a row counts as rising: of five points, all in order."""

PUBLISHED_STEPS = 30
PUBLISHED: Mapping[str, Mapping[int, float]] = MappingProxyType(
    {
        "35 M": {1: -0.1, 2: 0.7, 4: 2.0, 8: 3.9},
        "90 M": {2: 0.5, 4: 1.5, 8: 3.1},
        "180 M": {2: 0.3, 4: 1.1, 8: 2.3},
        "335 M": {2: 0.1, 4: 0.9, 8: 2.0},
        "550 M": {2: 0.2, 4: 0.7, 8: 1.7},
        "1.3 B": {2: 0.2, 4: 0.5, 8: 1.3},
        "2.4 B": {2: -0.1, 4: 0.3, 8: 1.1},
    }
)
"""Parameters → peers → gap to data-parallel training in % of the evaluation loss, at 30 steps between
averages with outer Nesterov, global batch and token budget fixed, rates tuned: "Communication-efficient
language model training scales reliably and robustly: scaling laws for DiLoCo" (Charles et al. 2025,
2503.09799), table 4."""


@dataclass(frozen=True)
class Check:
    """One thing that was expected."""

    expected: str
    holds: bool
    seen: str


def checks(summary: Summary) -> list[Check]:
    """Those of the grid's row; none if it has none, or cells are missing."""
    rule = RULES.get(summary.grid.row)
    return rule(summary) if rule and not summary.missing else []


def _nodes_and_steps(summary: Summary) -> list[Check]:
    """R5: up in N, up in H; and plain SGD that averages after each step is synchronous, whatever N is.

    With outer momentum H = 1 is worst (2503.09799, figure 9), so there the loss rises from the next H on.
    """
    found = []
    for arm in summary.apart:
        cells = summary.of(arm.name)
        if len({each.cell.steps for each in cells}) < 3:
            continue
        for peers in sorted({each.cell.peers for each in cells} - {1}):
            row = summary.of(arm.name, peers=peers)
            begins = "rises with H"
            if arm.outer_momentum:
                row = [each for each in row if each.cell.steps > 1]
                begins = "rises with H > 1"
            found.append(_rises(f"{arm.name}, N = {peers}: the loss {begins}", row, "H"))
        for steps in sorted({each.cell.steps for each in cells}):
            column = summary.of(arm.name, steps=steps)
            found.append(_rises(f"{arm.name}, H = {steps}: the loss rises with N", column, "N"))
    for arm in summary.apart:
        if summary.grid.kind_of(arm) == "sgd" and not summary.grid.optimizer.momentum:
            found.append(_flat(f"{arm.name}, H = 1: the same for every N", summary.of(arm.name, steps=1)))
    return found


def _rises(expected: str, cells: list[Measured], axis: str) -> Check:
    at = [each.cell.steps if axis == "H" else each.cell.peers for each in cells]
    correlation = spearman(at, [each.loss for each in cells])
    losses = ", ".join(f"{axis} = {x}: {_loss(each)}" for x, each in zip(at, cells, strict=True))
    return Check(expected, correlation > MONOTONE, f"rank correlation {correlation:+.2f} ({losses})")


def _flat(expected: str, cells: list[Measured]) -> Check:
    first, pooled = cells[0], math.sqrt(math.fsum(each.spread**2 for each in cells) / len(cells))
    sigma = pooled * math.sqrt(2 / len(first.losses))
    finite = all(each.finite for each in cells)
    apart = max(abs(each.loss - first.loss) for each in cells) if finite else math.inf
    losses = ", ".join(f"N = {each.cell.peers}: {_loss(each)}" for each in cells)
    seen = f"at most {apart:.4f} from N = {first.cell.peers}, σ is {sigma:.4f} ({losses})"
    return Check(expected, apart <= SIGMAS * sigma, seen)


FEW_STEPS, MANY_STEPS = 5, 100
FEW_COST, BREAKS, STABLE = 5.0, 20.0, 10.0
"""In % of the loss."""


def _parts(summary: Summary) -> list[Check]:
    """R6: parts of one model fit together after few steps apart, and break after many, unless damped."""
    found = []
    averages = {
        each.cell: each for arm in summary.apart if arm.strategy == "local" for each in summary.of(arm.name)
    }
    for arm in summary.apart:
        cells = [each for each in summary.of(arm.name) if each.cell.peers > 1]
        if arm.strategy != "partition" or not cells:
            continue
        last = cells[-1]
        if arm.gamma == "1/n":
            first = next(each for each in cells if each.cell.peers == last.cell.peers)
            rise = 100 * (last.loss / first.loss - 1)
            found.append(
                Check(
                    f"{_named(last)}: damped, it is stable: within {STABLE:g} % of H = {first.cell.steps}",
                    rise <= STABLE,
                    f"{_loss(last)} against {_loss(first)}: {rise:+.1f} %",
                )
            )
        for each in cells if arm.gamma == "1" else ():
            percent = math.inf if each.percent is None or not each.finite else each.percent
            seen = f"{_loss(each)}, {percent:+.1f} %"
            if each.cell.steps <= FEW_STEPS:
                expected = f"{_named(each)}: few steps cost less than {FEW_COST:g} %"
                found.append(Check(expected, percent < FEW_COST, seen))
            if each.cell.steps >= MANY_STEPS:
                expected = f"{_named(each)}: many steps cost more than {BREAKS:g} %"
                found.append(Check(expected, percent > BREAKS, seen))
                alike = (one for cell, one in averages.items() if _same(cell, each.cell))
                if (average := next(alike, None)) is not None:
                    expected = f"{_named(each)}: worse than {average.cell.arm}"
                    worse = each.loss - average.loss > SIGMAS * max(each.sigma, average.sigma)
                    found.append(Check(expected, worse, f"{_loss(each)} against {_loss(average)}"))
    return found


def _named(each: Measured) -> str:
    return f"{each.cell.arm}, N = {each.cell.peers}, H = {each.cell.steps}"


def _same(one: Cell, other: Cell) -> bool:
    return (one.peers, one.steps) == (other.peers, other.steps)


def _labels(summary: Summary) -> list[Check]:
    """R9: where each peer knows few labels, training apart for long does worse than where all know all."""
    arms = {arm.split: arm.name for arm in summary.apart}
    iid, label = summary.of(arms["iid"]), summary.of(arms["label"])
    found = []
    for one, other in zip(iid, label, strict=True):
        if (one.cell.peers, one.cell.steps) != (iid[-1].cell.peers, iid[-1].cell.steps):
            continue
        sigma = math.sqrt((one.spread**2 + other.spread**2) / len(one.losses))
        worse = other.loss - one.loss
        found.append(
            Check(
                f"N = {one.cell.peers}, H = {one.cell.steps}: the loss is higher with few labels each",
                worse > SIGMAS * sigma,
                f"{_loss(other)} against {_loss(one)}: {worse:+.4f}, σ is {sigma:.4f}",
            )
        )
    return found


def _loss(each: Measured) -> str:
    return f"{each.loss:.4f}" if each.finite else "diverged"


RULES: Mapping[str, Callable[[Summary], list[Check]]] = MappingProxyType(
    {"R5": _nodes_and_steps, "R6": _parts, "R9": _labels}
)
