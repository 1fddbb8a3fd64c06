"""One training of one cell, and which of them are still due.

Each cell is first trained with the tuning seed at every rate. Of those with the least held-out loss, or
within a hundredth of it, the lowest is the cell's, and with it each of the measured seeds is trained. `due`
says what is next by what is there already, so an experiment that was stopped goes on where it stood, and the
order in which trials end is of no account.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from p2ptrain.config import AnyTask, RunConfig, canonical_json
from p2ptrain.experiment.grid import Cell, Grid, rounds_between_probes
from p2ptrain.experiment.simulate import Diverged, Simulation
from p2ptrain.experiment.skew import ByLabel
from p2ptrain.protocol.spans import moved_bytes
from p2ptrain.replica.subspaces import together
from p2ptrain.tasks import Task, build_task

MOST_EXTENSIONS = 3
"""Rates beyond either end of the row that are tried while the best is at that end."""
AS_GOOD = 0.01
"""Of the least loss: rates that come so near it are as good, and the lowest of them is the farthest from
where training fails with another seed."""
LARGEST_RATE = 10.0
"""That a run file may have."""
LOOKS = 12
"""At the held-out loss on the way, the last of them at the end."""
PASS_SAMPLES = 8
"""A pass through the model costs about as much as so many samples more would: for the progress bar."""


@dataclass(frozen=True)
class Trial:
    """One training: a cell, at a learning rate, from a seed."""

    cell: Cell
    rate: float
    seed: int


@dataclass(frozen=True)
class Result:
    """What came of a trial: a line of the results."""

    key: str
    """Names all that the figures follow from."""
    arm: str
    peers: int
    steps: int
    rate: float
    seed: int
    loss: float | None
    """Held out, in nats, at the end; None: it diverged."""
    curve: tuple[tuple[int, float], ...]
    """(samples, held-out loss) on the way."""
    accuracy: float | None
    rounds: int
    sent_bytes: float
    """By each peer, in all rounds."""
    encoded_bytes: int
    """Of what is averaged in one round."""
    seconds: float
    """That it took here, on one core."""
    parts_change: float | None = None
    """Strategy `partition`: change of the loss, in nats, by each part alone, Σ over parts, mean over the
    rounds that were measured; None for others."""
    defect: float | None = None
    """The cohesion defect of a round, likewise."""
    change_norm: float | None = None
    """Strategy `local`, mean over the rounds: length of the mean of the peers' changes; None for others."""
    cosine: float | None = None
    """Likewise, between two peers' changes; None for one peer, or where the codec hides it."""
    consensus_distance: float | None = None
    """Likewise, of a copy from the average of all."""
    barrier: float | None = None
    """What putting together what peers did apart adds to the mean loss of their copies, on samples that
    nobody trains on, mean over the rounds that were measured: the average of the copies with strategy
    `local`, the undamped union of the parts with `partition`. Below zero it helps."""

    @property
    def cell(self) -> Cell:
        return Cell(self.arm, self.peers, self.steps)

    @property
    def trial(self) -> Trial:
        return Trial(self.cell, self.rate, self.seed)

    @property
    def height(self) -> float:
        """The loss, infinite if it diverged."""
        return math.inf if self.loss is None else self.loss


def key_of(grid: Grid, trial: Trial) -> str:
    """Of equal keys, the figures are equal."""
    run = canonical_json(grid.run(trial.cell, trial.rate, trial.seed))
    split = grid.arm(trial.cell.arm).split
    text = f"{run} peers {trial.cell.peers} split {split} torch {torch.__version__}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def roster(peers: int) -> list[str]:
    """Names of so many peers, in roster order; with more of them, the first keep their samples."""
    return [f"peer-{number:02d}" for number in range(peers)]


@lru_cache(maxsize=8)
def _task(run_task: AnyTask, seed: int, split: str, peers: int) -> Task:
    task = build_task(RunConfig(task=run_task, seed=seed))
    return task if split == "iid" else ByLabel(task, seed, roster(peers))


def conduct(grid: Grid, trial: Trial) -> Result:
    """Train it. Raises ConfigError or CorpusError if the task lacks something."""
    cell = trial.cell
    run = grid.run(cell, trial.rate, trial.seed)
    task = _task(grid.task, trial.seed, grid.arm(cell.arm).split, cell.peers)
    began = time.perf_counter()
    inner = grid.batch_size // cell.peers
    every = rounds_between_probes(cell.steps) if cell.peers > 1 else 0
    simulation = Simulation(run, task, roster(cell.peers), inner, barrier_every=every)
    each = [run.target_batch_size // cell.peers] * cell.peers
    looks = {math.ceil(run.total_steps * look / LOOKS) for look in range(1, LOOKS + 1)}
    curve: list[tuple[int, float]] = []
    figures: dict[str, float] = {}
    rounds = 0
    try:
        while rounds < run.total_steps:
            simulation.round(each)
            rounds += 1
            if rounds in looks:
                figures = simulation.evaluate()
                if not math.isfinite(figures["loss"]):
                    raise Diverged("the held-out loss is not finite")
                curve.append((simulation.replica.position.weight, figures["loss"]))
    except Diverged:
        figures = {}
    encoded = simulation.encoded_bytes
    rounds_measured, fits = len(simulation.cohesions), together(simulation.cohesions)
    barriers = [each.union - each.parts / cell.peers for each in simulation.cohesions] or simulation.barriers
    return Result(
        key=key_of(grid, trial),
        arm=cell.arm,
        peers=cell.peers,
        steps=cell.steps,
        rate=trial.rate,
        seed=trial.seed,
        loss=figures.get("loss"),
        curve=tuple(curve),
        accuracy=figures.get("accuracy"),
        rounds=rounds,
        sent_bytes=rounds * moved_bytes(cell.peers, encoded),
        encoded_bytes=encoded,
        seconds=time.perf_counter() - began,
        parts_change=fits.parts / rounds_measured if rounds_measured else None,
        defect=fits.defect / rounds_measured if rounds_measured else None,
        change_norm=_mean([each.norm for each in simulation.agreements]),
        cosine=_mean([each.cosine for each in simulation.agreements]),
        consensus_distance=_mean([each.consensus_distance for each in simulation.agreements]),
        barrier=_mean(barriers),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known; None if none is, or one is not finite, as in a training that diverged."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and all(map(math.isfinite, known)) else None


# -- what is due ---------------------------------------------------------------------------------------------


def due(grid: Grid, results: Mapping[str, Result]) -> list[Trial]:
    """The trials that can be conducted now, by the results there are, by their keys; none: all is done."""
    trials: list[Trial] = []
    for cell in grid.cells():
        tried = tuned(grid, cell, results)
        missing = [
            Trial(cell, rate, grid.tuning_seed)
            for rate in _row(grid.rates_of(cell), tried)
            if rate not in tried
        ]
        if not missing:
            best = best_rate(tried)
            wanted = [Trial(cell, best, seed) for seed in grid.seeds]
            missing = [trial for trial in wanted if key_of(grid, trial) not in results]
        trials += missing
    return trials


def tuned(grid: Grid, cell: Cell, results: Mapping[str, Result]) -> dict[float, float]:
    """Rate → loss with the tuning seed, of the rates of this cell's row that were tried, extensions
    included."""
    tried: dict[float, float] = {}
    first = grid.rates_of(cell)
    for rate in [*first, *_beyond(first, up=False), *_beyond(first, up=True)]:
        result = results.get(key_of(grid, Trial(cell, rate, grid.tuning_seed)))
        if result is not None:
            tried[rate] = result.height
    return tried


def best_rate(tried: Mapping[float, float]) -> float:
    """The lowest of those that are as good as the one with the least loss."""
    least = min(tried.values())
    return min(rate for rate, loss in tried.items() if loss <= least * (1 + AS_GOOD))


def at_the_edge(grid: Grid, cell: Cell, tried: Mapping[float, float]) -> bool:
    """Whether the least loss is at an end of the rates tried, so that a lower one may lie beyond."""
    return len(grid.rates_of(cell)) > 1 and _lowest(tried) in (min(tried), max(tried))


def _lowest(tried: Mapping[float, float]) -> float:
    """The rate with the least loss; of equal ones, the lowest."""
    return min(sorted(tried), key=tried.__getitem__)


def _beyond(row: Sequence[float], *, up: bool) -> list[float]:
    """By which a row of rates is gone on with at that end, in steps as long as its own there."""
    if len(row) < 2:
        return []
    end, ratio = (row[-1], row[-1] / row[-2]) if up else (row[0], row[0] / row[1])
    rates = [end * ratio**step for step in range(1, MOST_EXTENSIONS + 1)]
    return [rate for rate in rates if rate <= LARGEST_RATE]


def _row(first: tuple[float, ...], tried: Mapping[float, float]) -> list[float]:
    """The rates to try by what is known: the first ones, and beyond an end as long as the best is there."""
    if not set(first) <= tried.keys():
        return list(first)
    best = _lowest(tried)
    beyond = [
        rate
        for end, up in ((max(tried), True), (min(tried), False))
        if best == end
        for rate in _beyond(first, up=up)
        if rate not in tried
    ]
    return [*first, *beyond[:1]]


def cost(grid: Grid, trial: Trial) -> float:
    """In samples and passes, on a scale of its own: what is done of all, for a progress bar."""
    passes = grid.samples * trial.cell.peers / grid.batch_size
    return grid.samples + PASS_SAMPLES * passes


def whole_cost(grid: Grid) -> float:
    """Of all trials, if no row of rates is gone on with."""
    return math.fsum(
        cost(grid, Trial(cell, 1.0, 0)) * (len(grid.rates_of(cell)) + len(grid.seeds))
        for cell in grid.cells()
    )
