"""For all tests. Time is measured in benchmarks and never asserted: hypothesis sets no deadline. Tests that
need a GPU are left out where there is none, and those marked `long` unless they are asked for; the last lines
of the report say how many."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

LEFT_OUT = pytest.StashKey[dict[str, int]]()
WHY = {
    "cuda": "because torch finds no CUDA device; where there is one: pytest -m cuda",
    "long": "because all together must be done in 25 minutes; by themselves: pytest -m long",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for mark, count in config.stash.get(LEFT_OUT, {}).items():
        terminalreporter.write_line(f"NOT RUN: {count} tests marked {mark}, {WHY[mark]}", yellow=True)
