"""What an experiment's results add up to: gaps to synchronous training with their spread, one answer for each
number of peers, and what time and bytes a cell would take over given links.

A gap is the mean over seeds of a cell's held-out loss minus that of the synchronous cell with as many peers
and the same seed. Its σ is √((s² + s₀²) / seeds), with s₀ the standard deviation over seeds of the
synchronous cells, pooled over numbers of peers, and s that of the cell itself, or s₀ if that is larger: three
seeds that happen to lie close together make nothing certain.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2ptrain.experiment.grid import Arm, Cell, Grid
from p2ptrain.experiment.trials import Result, Trial, at_the_edge, best_rate, key_of, tuned
from p2ptrain.protocol.forecast import Links, forecast
from p2ptrain.replica.subspaces import Cohesion

SIGMAS = 2.0
"""Within so many of them a gap may be chance."""


@dataclass(frozen=True)
class Copies:
    """How far what peers did apart was from each other, as in `Result`, mean over seeds; None: not known."""

    change_norm: float | None
    cosine: float | None
    consensus_distance: float | None
    barrier: float | None
    """In nats."""

    @property
    def known(self) -> bool:
        return any(value is not None for value in (self.change_norm, self.barrier))


@dataclass(frozen=True)
class Measured:
    """A cell with all its seeds; losses in nats, infinite where it diverged."""

    cell: Cell
    rate: float
    """The best one."""
    at_edge: bool
    """Whether it is at an end of the rates tried: then a better one may lie beyond."""
    losses: tuple[float, ...]
    """By seed."""
    accuracies: tuple[float, ...]
    """By seed, for tasks that have one."""
    curve: tuple[tuple[int, float], ...]
    """(samples, mean held-out loss over seeds) on the way; empty if it diverged with any."""
    rounds: int
    sent_bytes: float
    """By each peer."""
    encoded_bytes: int
    gap: float | None
    """To the synchronous cell; None if it is one, or there is none."""
    sigma: float
    """Of the gap."""
    percent: float | None
    """The gap, of the synchronous loss."""
    cohesion: Cohesion | None
    """With strategy `partition`: mean over seeds and rounds."""
    copies: Copies

    @property
    def loss(self) -> float:
        return math.fsum(self.losses) / len(self.losses) if self.finite else math.inf

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.losses))

    @property
    def spread(self) -> float:
        """Standard deviation over seeds."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 and self.finite else 0.0

    @property
    def as_synchronous(self) -> bool:
        """Whether it is no worse than synchronous training, as far as these seeds tell."""
        return self.gap is not None and self.gap <= SIGMAS * self.sigma


@dataclass(frozen=True)
class Summary:
    grid: Grid
    cells: tuple[Measured, ...]
    """Those with all their seeds, in the grid's order."""
    missing: int
    """Cells that lack some."""
    sample_seconds: float
    """What a sample takes one core here."""

    def at(self, cell: Cell) -> Measured | None:
        return next((each for each in self.cells if each.cell == cell), None)

    def of(self, arm: str, *, peers: int | None = None, steps: int | None = None) -> list[Measured]:
        """Those of an arm, with so many peers and steps if given, by rising peers and steps."""
        found = [
            each
            for each in self.cells
            if each.cell.arm == arm and peers in (None, each.cell.peers) and steps in (None, each.cell.steps)
        ]
        return sorted(found, key=lambda each: each.cell)

    @property
    def apart(self) -> list[Arm]:
        """The arms that are compared with a synchronous one."""
        return [arm for arm in self.grid.arms if arm.strategy != "sync"]


def summarise(grid: Grid, results: Mapping[str, Result]) -> Summary:
    """Of what there is so far."""
    alone: dict[Cell, list[Result]] = {}
    for cell in grid.cells():
        tried = tuned(grid, cell, results)
        if not set(grid.rates_of(cell)) <= tried.keys():
            continue
        rate = best_rate(tried)
        found = [results.get(key_of(grid, Trial(cell, rate, seed))) for seed in grid.seeds]
        whole = [each for each in found if each is not None]
        if len(whole) == len(grid.seeds):
            alone[cell] = whole
    noise = {arm.name: _pooled(grid, arm, alone) for arm in grid.arms if arm.strategy == "sync"}
    cells = tuple(_measured(grid, cell, of_seeds, alone, noise, results) for cell, of_seeds in alone.items())
    spent = math.fsum(result.seconds for result in results.values())
    trained = math.fsum(result.rounds * grid.batch_size * result.steps for result in results.values())
    return Summary(grid, cells, len(grid.cells()) - len(cells), spent / trained if trained else 0.0)


def _pooled(grid: Grid, arm: Arm, alone: Mapping[Cell, Sequence[Result]]) -> float:
    """Standard deviation over seeds within the cells of that arm."""
    losses = [[each.height for each in found] for cell, found in alone.items() if cell.arm == arm.name]
    variances = [statistics.variance(of) for of in losses if len(of) > 1 and all(map(math.isfinite, of))]
    return math.sqrt(math.fsum(variances) / len(variances)) if variances else 0.0


def _measured(
    grid: Grid,
    cell: Cell,
    found: Sequence[Result],
    alone: Mapping[Cell, Sequence[Result]],
    noise: Mapping[str, float],
    results: Mapping[str, Result],
) -> Measured:
    losses = tuple(each.height for each in found)
    finite = all(map(math.isfinite, losses))
    baseline = grid.baseline(grid.arm(cell.arm))
    compared = None if baseline is None else alone.get(Cell(baseline.name, cell.peers, 1))
    gap, sigma, percent = None, 0.0, None
    if baseline is not None and baseline.name != cell.arm and compared is not None:
        others = [each.height for each in compared]
        pairs = zip(losses, others, strict=True)
        gap = math.fsum(a - b for a, b in pairs) / len(losses) if finite else math.inf
        percent = 100 * gap / statistics.fmean(others)
        own = statistics.stdev(losses) if finite and len(losses) > 1 else 0.0
        own = max(own, noise[baseline.name])
        sigma = math.sqrt((own**2 + noise[baseline.name] ** 2) / len(losses))
    curves = [dict(each.curve) for each in found]
    seen = sorted(set.intersection(*map(set, curves))) if finite else []
    return Measured(
        cell=cell,
        rate=found[0].rate,
        at_edge=at_the_edge(grid, cell, tuned(grid, cell, results)),
        losses=losses,
        accuracies=tuple(each.accuracy for each in found if each.accuracy is not None),
        curve=tuple((at, statistics.fmean(curve[at] for curve in curves)) for at in seen),
        rounds=max(each.rounds for each in found),
        sent_bytes=max(each.sent_bytes for each in found),
        encoded_bytes=found[0].encoded_bytes,
        gap=gap,
        sigma=sigma,
        percent=percent,
        cohesion=_cohesion(found),
        copies=Copies(
            change_norm=_mean([each.change_norm for each in found]),
            cosine=_mean([each.cosine for each in found]),
            consensus_distance=_mean([each.consensus_distance for each in found]),
            barrier=_mean([each.barrier for each in found]),
        ),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """None unless all are known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _cohesion(found: Sequence[Result]) -> Cohesion | None:
    told = [(each.parts_change, each.defect) for each in found]
    known = [(parts, defect) for parts, defect in told if parts is not None and defect is not None]
    if not known:
        return None
    parts, defect = (statistics.fmean(values) for values in zip(*known, strict=True))
    return Cohesion(union=parts + defect, parts=parts)


# -- answers -------------------------------------------------------------------------------------------------


def largest_steps(summary: Summary, arm: Arm, peers: int) -> int | None:
    """Most steps between averages that are no worse than synchronous training; None if none are."""
    good = [each.cell.steps for each in summary.of(arm.name, peers=peers) if each.as_synchronous]
    return max(good, default=None)


def answers(summary: Summary) -> list[str]:
    """How long before averaging: one sentence for each way and number of peers."""
    said = []
    for arm in summary.apart:
        for peers in sorted({each.cell.peers for each in summary.of(arm.name)}):
            row = [each for each in summary.of(arm.name, peers=peers) if each.gap is not None]
            if not row:
                continue
            largest = largest_steps(summary, arm, peers)
            tried = ", ".join(str(each.cell.steps) for each in row)
            found = f"H = {largest}" if largest else "none"
            last = row[-1]
            cost = "diverges" if last.percent is None or not last.finite else f"costs {last.percent:+.1f} %"
            said.append(
                f"{arm.name}, N = {peers}: largest H within 2 sigma of synchronous: {found} "
                f"(of {tried}); H = {last.cell.steps} {cost}"
            )
    return said


def hours(summary: Summary, each: Measured, mbit: float) -> float:
    """That the cell's rounds would take, by the model of `p2ptrain plan`, if each peer had such a link, and a
    core as fast as this one."""
    rate = mbit * 1e6 / 8
    step = forecast(
        peers=each.cell.peers,
        batch_size=each.cell.round_samples(summary.grid.batch_size),
        sample_seconds=summary.sample_seconds,
        encoded_bytes=each.encoded_bytes,
        state_bytes=0,
        most_donors=1,
        donor_share=1.0,
        links=Links(rate, rate, summary.grid.rtt_milliseconds / 1000),
    )
    return each.rounds * step.step_seconds / 3600


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of those that no other beats in both coordinates (less is better), by the first coordinate."""
    order = sorted(range(len(points)), key=lambda at: points[at])
    front: list[int] = []
    for at in order:
        if math.isfinite(points[at][1]) and (not front or points[at][1] < points[front[-1]][1]):
            front.append(at)
    return front


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; of equal values, each has their mean rank. 0 if all of one are equal."""
    ranks = _ranks(a), _ranks(b)
    if any(len(set(each)) < 2 for each in ranks):
        return 0.0
    return statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]
