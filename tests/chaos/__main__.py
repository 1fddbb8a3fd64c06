"""Play rows of the fault matrix and write what was measured into this folder's README.

    python -m tests.chaos [--gate | --nightly | --ci | --all | --rows 1,2,5]
        [--short | --soak] [--seeds 0,1,2] [--json]

Exit status 1 if a row failed, 3 if none did but one could not be run here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from p2ptrain.errors import P2PTrainError
from p2ptrain.events import duration
from tests.chaos.lab import NotHere
from tests.chaos.rows import Failed, Figures, Form, Row, Trial, deadline, load_rows
from tests.chaos.table import Line, Result, update

DEADLINES = {Form.SHORT: 0.5, Form.GATE: 1.0, Form.SOAK: 20.0}
"""How much of its deadline a row may take in each form."""


@dataclass(frozen=True)
class Played:
    """How a row went, with all seeds."""

    row: Row
    result: Result
    measured: str
    numbers: tuple[dict[str, float], ...]
    """Of each seed, as far as it came."""
    seconds: float


def play(row: Row, seeds: Sequence[int], form: Form) -> Played:
    """The row with each seed, until one fails. Its processes and hosts are gone afterwards; what they wrote
    is kept if it failed."""
    began, figures = time.monotonic(), list[Figures]()
    folder = Path(tempfile.mkdtemp(prefix=f"row{row.number}-"))
    limit = row.deadline_seconds * DEADLINES[form]

    def played(result: Result, measured: str) -> Played:
        numbers = tuple(each.numbers for each in figures)
        return Played(row, result, measured, numbers, time.monotonic() - began)

    for seed in seeds:
        try:
            with deadline(limit):
                figures.append(row.play(Trial(folder, seed, form)))
        except NotHere as reason:
            return played(Result.NOT_RUN, str(reason))
        except (Failed, P2PTrainError, OSError) as reason:
            which = f" (seed {seed})" if len(seeds) > 1 else ""
            print(f"    everything is kept in {folder}", file=sys.stderr)
            return played(Result.FAIL, f"{reason}{which}")
        except Exception as mistake:  # of ours; the other rows are still to be played
            traceback.print_exc()
            return played(Result.FAIL, f"the row itself is broken: {mistake!r}")
    shutil.rmtree(folder)
    return played(Result.PASS, " / ".join(each.text for each in figures))


def chosen(rows: dict[int, Row], options: argparse.Namespace) -> list[Row]:
    if options.rows:
        numbers = [int(number) for number in options.rows.split(",")]
        if unknown := [number for number in numbers if number not in rows]:
            raise SystemExit(f"there is no row {unknown[0]}; rows are {', '.join(map(str, rows))}")
        return [rows[number] for number in numbers]
    if options.all:
        return list(rows.values())
    if options.nightly:
        return [row for row in rows.values() if not row.gate]
    if options.ci:
        return [row for row in rows.values() if row.ci]
    return [row for row in rows.values() if row.gate]


def commit() -> str:
    """Of the tree that is played; a plus says that it has changes on top."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "p2ptrain", "peers")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rows", default="", help="numbers, with commas")
    which.add_argument("--gate", action="store_true", help="those that must pass for a release (default)")
    which.add_argument("--nightly", action="store_true", help="the others")
    which.add_argument("--ci", action="store_true", help="the short forms that run with every change")
    which.add_argument("--all", action="store_true")
    parser.add_argument(
        "--short", action="store_true", help="the short form of the chosen rows; writes no table"
    )
    parser.add_argument("--soak", action="store_true", help="the long form of the chosen rows")
    parser.add_argument("--seeds", default="0", help="each row once with each, with commas")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    rows, seeds = chosen(load_rows(), options), [int(seed) for seed in options.seeds.split(",")]
    form = Form.SHORT if options.ci or options.short else Form.SOAK if options.soak else Form.GATE
    began = time.monotonic()
    results: list[Played] = []
    for number, row in enumerate(rows):
        left = ""
        if results:
            left = f", about {duration((time.monotonic() - began) / number * (len(rows) - number))} left"
        print(f"[{number + 1}/{len(rows)}{left}] row {row.number}: {row.fault}", flush=True)
        results.append(played := play(row, seeds, form))
        print(f"    {played.result} in {duration(played.seconds)}: {played.measured}", flush=True)
        if form is not Form.SHORT:  # after each row: a run that is broken off has measured something, too
            today = datetime.now(UTC).date().isoformat()
            line = Line(row.number, row.fault, row.injected, played.measured, played.result, commit(), today)
            update([line])
    failed = [played.row.number for played in results if played.result is Result.FAIL]
    missing = [played.row.number for played in results if played.result is Result.NOT_RUN]
    print(f"{len(results) - len(failed) - len(missing)} passed, {len(failed)} FAILED {failed or ''}".rstrip())
    if missing:
        print(f"{len(missing)} COULD NOT BE RUN on this machine: {missing}")
    if options.json:
        report = [
            {
                "row": played.row.number,
                "result": played.result.name.lower(),
                "measured": played.measured,
                "numbers": played.numbers,
                "seconds": round(played.seconds, 1),
            }
            for played in results
        ]
        print(json.dumps({"commit": commit(), "form": form.value, "seeds": seeds, "rows": report}))
    sys.exit(1 if failed else 3 if missing else 0)


if __name__ == "__main__":
    main()
