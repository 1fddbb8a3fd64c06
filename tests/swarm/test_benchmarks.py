"""The benchmarks that train real peers still start, and end with a report.

Not covered: their figures, which are the machine's, and `wan`, `lora` and `noise_scale`, which take minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.long]
FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("round_latency.py --rounds 5 --hivemind-rounds 0 --json", "p2ptrain"),
        ("allreduce.py --megabytes 1 --rounds 2 --without hivemind", "contenders"),
        ("memory.py --megabytes 10 --only memory", "memory"),
        ("overhead.py --seconds 0.2 --turns 1", "percent_of_by_hand"),
    ],
)
def test_benchmark_ends_with_its_report(words: str, told: str) -> None:
    script, *options = words.split()
    ended = subprocess.run(
        [sys.executable, str(FOLDER / script), *options], capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert told in json.loads(ended.stdout[ended.stdout.index("{") :])
