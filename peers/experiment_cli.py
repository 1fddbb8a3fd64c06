"""`p2ptrain experiment`: how many peers, and how long before averaging? Measured here, without a swarm."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2ptrain.errors import P2PTrainError

if TYPE_CHECKING:  # the verbs import it when they run
    from p2ptrain.experiment.summary import Summary
    from p2ptrain.experiment.trials import Result

app = typer.Typer(
    name="experiment",
    help="Measure how many peers pay, and how many steps they may train apart before they average.",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of output.")]


class Profile(StrEnum):
    """How much of a grid is run."""

    SMOKE = "smoke"
    CI = "ci"
    FULL = "full"


@app.command()
def run(
    grid_file: Annotated[Path, typer.Argument(metavar="GRID.toml", help="What to compare.")],
    profile: Annotated[
        Profile, typer.Option(help="smoke: seconds; ci: minutes; full: all of the grid.")
    ] = Profile.FULL,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results and report; NAME-PROFILE if not given.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, max=256, help="Processes at once; 0: one a core.")] = 0,
    as_json: Json = False,
) -> None:
    """Train every cell of the grid, and report.

    Each result is kept as it ends. Ctrl-C ends it; --resume goes on.
    """
    from p2ptrain.experiment.grid import load_grid
    from p2ptrain.experiment.running import run as conduct
    from p2ptrain.experiment.store import open_store

    grid = load_grid(grid_file, profile)
    folder = out or Path(f"{grid.name}-{profile}")
    store = open_store(folder, grid, resume=resume)
    with _Bar() as bar:
        try:
            conduct(grid, store, jobs or os.cpu_count() or 1, bar.tell)
        except KeyboardInterrupt:
            raise P2PTrainError(
                f"stopped; {len(store.results)} results are in {folder}, and --resume goes on with them"
            ) from None
    command = f"p2ptrain experiment run {grid_file} --profile {profile} --out {folder}"
    _report(folder, command, as_json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="That `experiment run` has written.")],
    as_json: Json = False,
) -> None:
    """Say what the results add up to, and write it as a page and a picture."""
    _report(folder, "", as_json)


def _report(folder: Path, command: str, as_json: bool) -> None:
    from p2ptrain.experiment.report import lines, write
    from p2ptrain.experiment.store import read_store
    from p2ptrain.experiment.summary import summarise

    grid, results = read_store(folder)
    summary = summarise(grid, results)
    made = [command or f"p2ptrain experiment run … --out {folder}", f"p2ptrain experiment report {folder}"]
    written = write(summary, folder, made)
    if as_json:
        typer.echo(json.dumps(_plain(summary, written)))
        return
    typer.echo("\n".join(lines(summary)))
    typer.echo(f"\nwritten: {', '.join(map(str, written))}")


def _plain(summary: Summary, written: list[Path]) -> dict[str, Any]:
    from p2ptrain.experiment.rows import checks
    from p2ptrain.experiment.summary import answers, hours

    return {
        "name": summary.grid.name,
        "samples": summary.grid.samples,
        "missing_cells": summary.missing,
        "cells": [
            {
                "arm": each.cell.arm,
                "peers": each.cell.peers,
                "steps": each.cell.steps,
                "rate": each.rate,
                "rate_at_edge": each.at_edge,
                "losses": [loss if each.finite else None for loss in each.losses],
                "accuracies": each.accuracies,
                "gap": each.gap if each.finite else None,
                "gap_sigma": each.sigma,
                "gap_percent": each.percent if each.finite else None,
                "rounds": each.rounds,
                "sent_bytes": each.sent_bytes,
                "change_norm": each.copies.change_norm,
                "cosine": each.copies.cosine,
                "consensus_distance": each.copies.consensus_distance,
                "barrier": each.copies.barrier,
                "parts_change": None if each.cohesion is None else each.cohesion.parts,
                "cohesion_defect": None if each.cohesion is None else each.cohesion.defect,
                "hours": {f"{mbit:g}": hours(summary, each, mbit) for mbit in summary.grid.link_mbit},
            }
            for each in summary.cells
        ],
        "answers": answers(summary),
        "checks": [
            {"expected": each.expected, "holds": each.holds, "seen": each.seen} for each in checks(summary)
        ],
        "files": list(map(str, written)),
    }


class _Bar:
    """Progress on stderr, with the time that is left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            # Trials take unlike times, and several are under way: the last few tell little.
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=600,
        )
        self._task = self._progress.add_task("begins", total=None)

    def __enter__(self) -> _Bar:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def tell(self, done: float, total: float, result: Result | None) -> None:
        text = "trains"
        if result is not None:
            text = f"{result.arm} N={result.peers} H={result.steps} rate {result.rate:g}"
            if not self._console.is_terminal:
                loss = "diverged" if result.loss is None else f"{result.loss:.4f}"
                print_ = f"{done / total:4.0%} {text} seed {result.seed}: {loss}, {result.seconds:.1f} s"
                self._console.print(print_)
        self._progress.update(self._task, completed=done, total=total, description=text)
