"""Every deviation of a rogue still fits the product that it is put around. What it does to a swarm is for the
rows to show."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).parents[2]

INSTALL_ALL = """
from tests.chaos.rogue import DEATHS, LIES, Rogue
for name, install in [*DEATHS.items(), *LIES.items()]:
    install(Rogue(name))
print(len(DEATHS), len(LIES))
"""


def test_every_deviation_finds_what_it_is_put_around() -> None:
    """In a process of its own: what is patched stays so."""
    done = subprocess.run([sys.executable, "-c", INSTALL_ALL], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    deaths, lies = map(int, done.stdout.split())
    assert deaths >= 11
    assert lies >= 15


def test_rogue_refuses_an_order_that_it_does_not_know() -> None:
    command = [sys.executable, "-m", "tests.chaos.rogue", "--die", "laughing", "join", "INVITE"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "accumulating" in done.stderr
