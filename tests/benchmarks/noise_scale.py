"""Does the noise scale predict the critical batch? Steps to a loss against batch size, and S/G² on the way.

    python tests/benchmarks/noise_scale.py [--seeds 2] [--kinds sgd adamw] [--out FOLDER] [--json]

Two rows of what the literature promises, on a language model that is small enough for three minutes: a
perceptron that predicts the next byte of the standard library's source from the eight before it, 29,000
parameters, one thread.

- *Steps against batch* (McCandlish et al. 2018, section 2): with the learning rate tuned for each batch B,
  the steps to one loss are Smin (1 + Bc/B), so samples are Emin (1 + B/Bc). `critical` is Bc of the fit,
  `r_squared` how much of the spread of log steps it explains, and `hyperbola` is (S/Smin - 1)(E/Emin - 1), 1
  by that law.
- *Noise scale*: S/G² rises as the loss falls, and at that loss is about Bc for SGD (asked: within a factor of
  5, either way). It is measured as in a round, from four peers with batches of 1, 3, 8 and 20, by
  `p2ptrain.gradients.noise`, over the means of both since the last line. For Adam it is shown, not asked for.

With `--out` the tables go there as CSV, and with matplotlib (extra `plot`) the plot as PNG.

Not covered: larger models, other data, and batches at which several rates are equally good.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2ptrain.config import Optimizer
from p2ptrain.gradients.noise import spread_of
from p2ptrain.replica.optimizers import FlatOptimizer, build_optimizer
from p2ptrain.tasks.corpus import load_corpus

BATCHES = (16, 64, 256, 1024)
CONTEXT, WIDTH = 8, 64
GOAL = 2.6
"""Nats per byte, held out: from 5.5 at first, 3.3 when only the frequencies are learned."""
RATES = {"sgd": [2.0**k for k in range(-5, 4)], "adamw": [2.0**k for k in range(-11, -3)]}
"""Powers of two around the best ones of all batches: none of these is at an end, or `rate` says so."""
MOST_STEPS = 3000
LOOK_EVERY = 5
HELDOUT = 4096
PEERS = (1, 3, 8, 20)
"""Samples of each in a step on which the noise is measured: uneven, as in a swarm."""
FIRST_LINE, NOISE_STEPS = 20, 1200
LINES = 7
"""Of the table, at steps that are so many equal factors apart."""


class Perceptron(nn.Module):
    """Predicts a byte from the `CONTEXT` before it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 16)
        self.hidden = nn.Linear(16 * CONTEXT, WIDTH)
        self.out = nn.Linear(WIDTH, 256)

    def forward(self, bytes_before: Tensor) -> Tensor:
        """int64 [samples, CONTEXT] → logits float32 [samples, 256]."""
        return self.out(torch.tanh(self.hidden(self.table(bytes_before).flatten(1))))


class Learner:
    """A model whose parameters and gradients are one vector each, as a replica's, and its optimizer."""

    def __init__(self, kind: str, rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Perceptron()
        named = list(self.model.parameters())
        self.parameters = torch.cat([p.detach().reshape(-1) for p in named])
        self.gradient = torch.zeros_like(self.parameters)
        at, tensors = 0, []
        for p in named:
            tensors.append((at, at + p.numel()))
            p.data = self.parameters[at : at + p.numel()].view_as(p)
            p.grad = self.gradient[at : at + p.numel()].view_as(p)
            at += p.numel()
        config = Optimizer(kind=kind, momentum=0.0, nesterov=False, weight_decay=0.0)
        self.optimizer: FlatOptimizer = build_optimizer(config, tensors, [])
        self.rate = rate

    def summed(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The gradient of the sum of losses over these samples: in a buffer that the next call uses again."""
        self.gradient.zero_()
        F.cross_entropy(self.model(batch[0]), batch[1], reduction="sum").backward()
        return self.gradient

    def step(self, mean: Tensor) -> None:
        self.optimizer.step(self.parameters, mean, self.rate)

    def loss(self, batch: tuple[Tensor, Tensor]) -> float:
        with torch.no_grad():
            return F.cross_entropy(self.model(batch[0]), batch[1]).item()


@dataclass(frozen=True)
class Text:
    """Bytes to learn and to look at."""

    train: Tensor
    heldout: tuple[Tensor, Tensor]

    @classmethod
    def load(cls) -> Text:
        corpus = load_corpus("stdlib", holdout=0.05, context=CONTEXT)
        starts = torch.linspace(0, len(corpus.heldout) - CONTEXT - 1, HELDOUT).long()
        return cls(corpus.train.long(), windows(corpus.heldout.long(), starts))

    def draw(self, count: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
        return windows(self.train, torch.randint(len(self.train) - CONTEXT, (count,), generator=chance))


def windows(data: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes from each start on, and the one that follows them."""
    rows = data[starts[:, None] + torch.arange(CONTEXT + 1)]
    return rows[:, :CONTEXT], rows[:, CONTEXT]


# -- steps against batch -------------------------------------------------------------------------------------


def steps_to_goal(text: Text, kind: str, rate: float, batch: int, seed: int, most: int) -> int | None:
    """Steps until the held-out loss is at `GOAL`; None if that takes more than `most`."""
    learner, chance = Learner(kind, rate, seed), torch.Generator().manual_seed(1000 + seed)
    before = math.inf
    for step in range(1, most + 1):
        learner.step(learner.summed(text.draw(batch, chance)).div_(batch))
        if step % LOOK_EVERY == 0:
            loss = learner.loss(text.heldout)
            if not loss < 20:
                return None
            if loss <= GOAL:  # between two looks, in a straight line
                share = (before - GOAL) / (before - loss) if before < math.inf else 1.0
                return max(round(step - LOOK_EVERY * (1 - share)), 1)
            before = loss
    return None


@dataclass(frozen=True)
class Cell:
    """One batch size with the best rate for it; `steps` is the mean over the seeds."""

    kind: str
    batch: int
    rate: float
    at_the_end_of_the_grid: bool
    steps: float
    samples: float


def best_cell(text: Text, kind: str, batch: int, seeds: int, tell: Callable[[str], None]) -> Cell:
    """Tries all rates, each only as long as the best one took."""
    best: tuple[float, int] | None = None
    rates = RATES[kind]
    for at, rate in enumerate(rates):
        found: list[int] = []
        for seed in range(seeds):
            most = MOST_STEPS if best is None else math.ceil(best[0] * seeds - sum(found))
            steps = steps_to_goal(text, kind, rate, batch, seed, min(most, MOST_STEPS))
            if steps is None:
                break
            found.append(steps)
        if len(found) == seeds and (best is None or statistics.fmean(found) < best[0]):
            best = statistics.fmean(found), at
    if best is None:
        raise SystemExit(f"{kind} with batches of {batch}: no rate reaches {GOAL} in {MOST_STEPS} steps")
    steps, at = best
    tell(f"{kind}, batch {batch}: {steps:.0f} steps at rate {rates[at]:g}")
    return Cell(kind, batch, rates[at], at in (0, len(rates) - 1), steps, steps * batch)


@dataclass(frozen=True)
class Fit:
    """Steps = least_steps · (1 + critical / batch), fitted to the logs of steps."""

    least_steps: float
    critical: float
    r_squared: float

    def steps(self, batch: int) -> float:
        return self.least_steps * (1 + self.critical / batch)


def fit(batches: Sequence[int], steps: Sequence[float]) -> Fit:
    """Least squares in log steps: the best Smin for a Bc is a mean, and Bc is searched for, ever finer."""
    logs = [math.log(value) for value in steps]

    def residuals(critical: float) -> tuple[float, float]:
        bends = [math.log1p(critical / batch) for batch in batches]
        level = statistics.fmean(log - bend for log, bend in zip(logs, bends, strict=True))
        return level, sum((log - level - bend) ** 2 for log, bend in zip(logs, bends, strict=True))

    low, high = math.log(1.0), math.log(1e6)
    for _ in range(40):
        points = [low + (high - low) * k / 20 for k in range(21)]
        middle = min(points, key=lambda point: residuals(math.exp(point))[1])
        width = (high - low) / 20
        low, high = middle - width, middle + width
    critical = math.exp((low + high) / 2)
    level, rest = residuals(critical)
    mean = statistics.fmean(logs)
    return Fit(math.exp(level), critical, 1 - rest / sum((log - mean) ** 2 for log in logs))


# -- noise scale ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """S/G² over the steps since the last line, at the loss that they ended with."""

    kind: str
    step: int
    loss: float
    noise_scale: float


def noise_on_the_way(text: Text, kind: str, rate: float, seeds: int) -> list[Noise]:
    """While a model trains with `PEERS`; mean over the seeds of S and of G², and of the loss."""
    bounds = [round(FIRST_LINE * (NOISE_STEPS / FIRST_LINE) ** (k / (LINES - 1))) for k in range(LINES)]
    learners = [Learner(kind, rate, seed) for seed in range(seeds)]
    chances = [torch.Generator().manual_seed(2000 + seed) for seed in range(seeds)]
    lines, noise, signal = [], 0.0, 0.0
    for step in range(1, bounds[-1] + 1):
        for learner, chance in zip(learners, chances, strict=True):
            totals = torch.stack([learner.summed(text.draw(count, chance)).clone() for count in PEERS])
            spread = spread_of(PEERS, (totals @ totals.T).double())
            assert spread is not None
            noise, signal = noise + spread.noise, signal + spread.signal
            learner.step(totals.sum(0).div_(sum(PEERS)))
        if step in bounds:
            loss = statistics.fmean(learner.loss(text.heldout) for learner in learners)
            lines.append(Noise(kind, step, loss, noise / signal))
            noise = signal = 0.0
    return lines


def on_the_way(lines: Sequence[Noise]) -> float:
    """The noise scale where the loss is at the goal: between two lines, by logs."""
    for before, after in pairwise(lines):
        if after.loss <= GOAL <= before.loss:
            share = (before.loss - GOAL) / (before.loss - after.loss)
            return before.noise_scale ** (1 - share) * after.noise_scale**share
    return lines[-1].noise_scale


# -- the report ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """Of one optimizer."""

    kind: str
    cells: list[Cell]
    fit: Fit
    noise: list[Noise]
    noise_at_goal: float

    @property
    def ratio(self) -> float:
        """Noise scale over critical batch."""
        return self.noise_at_goal / self.fit.critical

    def hyperbola(self) -> list[float]:
        """(S/Smin - 1)(E/Emin - 1) of each cell."""
        least = self.fit.least_steps
        fewest = least * self.fit.critical
        return [(cell.steps / least - 1) * (cell.samples / fewest - 1) for cell in self.cells]


def lines_of(report: Report) -> list[str]:
    found = report.fit
    return [
        f"\n{report.kind}: steps to {GOAL} nats per byte = {found.least_steps:.0f} · "
        f"(1 + {found.critical:.0f}/batch), R² = {found.r_squared:.3f} in logs",
        f"{'batch':>7} {'rate':>9} {'steps':>7} {'fit':>7} {'samples':>9} {'hyperbola':>10}",
        *(
            f"{cell.batch:>7} {cell.rate:>9.4g} {cell.steps:>7.0f} "
            f"{found.steps(cell.batch):>7.0f} {cell.samples:>9,.0f} {law:>10.2f}"
            + ("  (at the end of the rates that were tried)" if cell.at_the_end_of_the_grid else "")
            for cell, law in zip(report.cells, report.hyperbola(), strict=True)
        ),
        f"{'step':>7} {'loss':>9} {'noise scale':>12}",
        *(f"{line.step:>7} {line.loss:>9.3f} {line.noise_scale:>12.0f}" for line in report.noise),
        f"noise scale at {GOAL}: {report.noise_at_goal:.0f}, {report.ratio:.2f} of the critical batch",
    ]


def verdict(reports: Sequence[Report]) -> list[str]:
    """What was asked, and whether it was reached."""
    asked = []
    for report in reports:
        asked.append((f"{report.kind}: R² above 0.95", report.fit.r_squared > 0.95))
        if report.kind == "sgd":
            scales = [line.noise_scale for line in report.noise]
            asked.append(("sgd: the noise scale rises fourfold", scales[-1] > 4 * scales[0]))
            asked.append(("sgd: noise scale within a fifth and five of Bc", 0.2 <= report.ratio <= 5))
    return [f"{'reached' if reached else 'MISSED':<8} {what}" for what, reached in asked]


def write(folder: Path, reports: Sequence[Report]) -> list[Path]:
    """Tables as CSV, and the plot if matplotlib is there."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, rows in (
        ("steps", [asdict(cell) for report in reports for cell in report.cells]),
        ("noise", [asdict(line) for report in reports for line in report.noise]),
    ):
        written.append(folder / f"{name}.csv")
        with written[-1].open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    try:
        import matplotlib
    except ImportError:
        print("no plot without matplotlib: pip install 'p2ptrain[plot]'", file=sys.stderr)
        return written
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for report in reports:
        batches = [cell.batch for cell in report.cells]
        (points,) = left.loglog(batches, [cell.steps for cell in report.cells], "o", label=report.kind)
        curve = [report.fit.steps(batch) for batch in batches]
        left.loglog(batches, curve, "-", color=points.get_color())
        left.axvline(report.fit.critical, color=points.get_color(), linestyle=":")
        scales = [line.noise_scale for line in report.noise]
        right.semilogy([line.loss for line in report.noise], scales, "o-", label=report.kind)
        right.axhline(report.fit.critical, color=points.get_color(), linestyle=":")
    left.set(xlabel="batch, samples", ylabel=f"steps to {GOAL} nats per byte")
    right.set(xlabel="loss, nats per byte (falls to the right)", ylabel="noise scale, samples")
    right.invert_xaxis()
    for axes in (left, right):
        axes.legend(title="dotted: critical batch")
    written.append(folder / "noise_scale.png")
    figure.savefig(written[-1], dpi=150)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=["sgd", "adamw"], choices=["sgd", "adamw"])
    parser.add_argument("--out", type=Path, help="folder for the tables and the plot")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    text = Text.load()

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    reports = []
    for kind in options.kinds:
        cells = [best_cell(text, kind, batch, options.seeds, tell) for batch in BATCHES]
        found = fit(BATCHES, [cell.steps for cell in cells])
        noise = noise_on_the_way(text, kind, cells[1].rate / 2, options.seeds)
        reports.append(Report(kind, cells, found, noise, on_the_way(noise)))
    if options.json:
        plain: list[dict[str, Any]] = [
            asdict(report) | {"ratio": report.ratio, "hyperbola": report.hyperbola()} for report in reports
        ]
        print(json.dumps(plain))
    else:
        print("\n".join(line for report in reports for line in lines_of(report)))
        print("\n" + "\n".join(verdict(reports)))
    if options.out:
        for path in write(options.out, reports):
            tell(f"written: {path}")


if __name__ == "__main__":
    main()
