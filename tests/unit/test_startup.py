"""What the command loads before it knows what to do: little, or its help would take seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "hivemind", "numpy", "aiohttp")
SLOW = (*HEAVY, "cryptography", "p2ptrain.config", "p2ptrain.records")
HELP = (*SLOW, "p2ptrain.events")
"""What the verbs for a running peer do without, as do all helps: they answer within 0.3 s. Building what
checks messages takes longer than all the rest."""

SHOW_HELP = """
import sys
from peers import cli
for words in ([], ["config"], ["identity"], ["service"], ["demo"], ["chaos"], ["monitor"], ["experiment"]):
    sys.argv = ["p2ptrain", *words, "--help"]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, end.code
"""


ASK = """
import os, sys
os.environ["XDG_DATA_HOME"] = "/nowhere"
from peers import cli
for words in (["status"], ["top"], ["pause", "--for", "2h"], ["resume"], ["finish"], ["leave"], ["logs"]):
    sys.argv = ["p2ptrain", *words]
    try:
        cli.main()
    except SystemExit as end:
        assert end.code == 9, end.code
from p2ptrain.telemetry import journal
from peers import chronicle, control_cli
"""


@pytest.mark.parametrize(
    ("program", "heavy"),
    [(SHOW_HELP, HELP), (ASK, SLOW), ("import peers.demo", HEAVY), ("import peers.chaos", HEAVY)],
    ids=["when_help_is_shown", "when_a_peer_is_asked", "when_the_demo_watches", "when_chaos_watches"],
)
def test_nothing_heavy_is_loaded(program: str, heavy: tuple[str, ...]) -> None:
    report = f"\nimport sys; print('loaded', [name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program + report], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded []"
