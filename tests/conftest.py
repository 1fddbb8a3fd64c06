"""For all tests. Time is measured in benchmarks and never asserted: hypothesis sets no deadline. Tests that
need a GPU are left out where there is none, and those marked `long` unless they are asked for; the last lines
of the report say how many.

Tests that neither start processes nor measure may run beside each other (`pytest -n 2 -m "not alone"`): those
in `unit` and `simulation`, and what is marked `virtual`. All others are marked `alone` here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each worker has a core; torch would take all of them

LEFT_OUT = pytest.StashKey[dict[str, int]]()
WHY = {
    "cuda": "because torch finds no CUDA device; where there is one: pytest -m cuda",
    "long": "because all together must be done in 25 minutes; by themselves: pytest -m long",
}
TESTS = Path(__file__).parent
BESIDE_OTHERS = {"unit", "simulation"}
"""Folders whose tests do not mind what else the machine does."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What these import takes ten seconds: not when nothing of theirs is asked for."""
    beside_others = collection_path.parent == TESTS and collection_path.name in BESIDE_OTHERS
    return True if beside_others and config.option.markexpr == "alone" else None


@pytest.hookimpl(tryfirst=True)  # before pytest looks which marks were asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder not in BESIDE_OTHERS and not item.get_closest_marker("virtual"):
            item.add_marker("alone")
    config.stash[LEFT_OUT] = {}
    for mark in WHY:
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and not _wanted(mark, config):
            items[:] = [item for item in items if item not in marked]
            config.hook.pytest_deselected(items=marked)
            config.stash[LEFT_OUT][mark] = len(marked)


def _wanted(mark: str, config: pytest.Config) -> bool:
    if mark == "long":
        return "long" in config.option.markexpr
    import torch

    return torch.cuda.is_available()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist tells what it has left out; each of them collects all."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT] = node.workeroutput.get("left_out", {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for mark, count in config.stash.get(LEFT_OUT, {}).items():
        terminalreporter.write_line(f"NOT RUN: {count} tests marked {mark}, {WHY[mark]}", yellow=True)
