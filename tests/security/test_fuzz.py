"""Every parser of outside bytes meets what long runs have found, and a few seconds of new inputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.security
SECONDS = 10


def test_no_input_crashes_or_hangs_a_parser(tmp_path: Path) -> None:
    fuzzing = subprocess.run(
        [sys.executable, "-m", "tests.security.fuzz", "--seconds", str(SECONDS), "--into", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert fuzzing.returncode == 0, fuzzing.stderr[-3000:]
    assert "stat::number_of_executed_units" in fuzzing.stderr
