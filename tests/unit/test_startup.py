"""What the command loads before it knows what to do: little, or its help would take seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "hivemind", "numpy", "aiohttp")

SHOW_HELP = """
import sys
from peers import cli
for words in ([], ["config"], ["demo"], ["chaos"]):
    sys.argv = ["p2ptrain", *words, "--help"]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, end.code
"""


@pytest.mark.parametrize(
    "program",
    [SHOW_HELP, "import peers.demo", "import peers.chaos"],
    ids=["when_help_is_shown", "when_the_demo_watches", "when_chaos_watches"],
)
def test_nothing_heavy_is_loaded(program: str) -> None:
    report = f"\nimport sys; print('loaded', [name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program + report], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded []"
