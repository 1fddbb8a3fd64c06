"""`p2ptrain experiment` as a user runs it: processes, Ctrl-C, and going on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.swarm

GRID = Path(__file__).parents[2] / "configs/experiments/digits.toml"


def start(grid: Path, jobs: int, *words: str) -> subprocess.Popen[str]:
    # Whoever runs the tests in the background has them ignore Ctrl-C, and a child would, too.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heed}; from peers.cli import main; main()"
    command = [sys.executable, "-c", code, "experiment", "run", str(grid)]
    return subprocess.Popen(
        [*command, "--profile", "smoke", "--jobs", str(jobs), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_experiment_that_was_stopped_by_ctrl_c_goes_on(tmp_path: Path) -> None:
    out, grid = tmp_path / "out", tmp_path / "grid.toml"
    text, few = GRID.read_text(), "samples = 1_000"
    assert few in text
    grid.write_text(text.replace(few, "samples = 4_000"))  # or it may be done before it is stopped
    stopped = start(grid, 2, "--out", str(out))
    assert stopped.stderr is not None
    assert "%" in stopped.stderr.readline()
    stopped.send_signal(signal.SIGINT)
    said = stopped.communicate(timeout=60)[1]
    assert stopped.returncode == 1
    assert said.splitlines()[-1].startswith("p2ptrain: stopped; ")
    before = (out / "results.jsonl").read_text()
    assert before.endswith("\n")

    goes_on = start(grid, 2, "--out", str(out), "--resume", "--json")
    printed, _ = goes_on.communicate(timeout=120)
    assert goes_on.returncode == 0
    assert (out / "results.jsonl").read_text().startswith(before)
    told = json.loads(printed.splitlines()[-1])
    assert told["missing_cells"] == 0
    assert {Path(file).name for file in told["files"]} == {"report.html", "report.png"}
    assert all((out / name).stat().st_size > 10_000 for name in ("report.html", "report.png"))
