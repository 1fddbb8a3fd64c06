"""What an organizer says to a run that goes on reaches all its peers, by the installed command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.swarm.processes import Crew, Process, crew, run_file, until

pytestmark = pytest.mark.swarm

HEARD_SECONDS = 8.0
"""By when all have heard of an order: the book is read every 2 s, and decrees are asked for every 3."""


@pytest.fixture
def people(tmp_path: Path) -> Iterator[Crew]:
    with crew(tmp_path) as started:
        yield started


def happened(folder: Path, event: str) -> list[dict[str, Any]]:
    """The events of that kind in a peer's journal."""
    path = folder / "journal.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [each for each in map(json.loads, lines) if each["event"] == event]


def test_change_holds_everywhere_from_one_step_and_the_run_is_paused_resumed_and_stopped(
    people: Crew, tmp_path: Path
) -> None:
    _, invite = people.bootstrap(run_file(tmp_path, "told", 1_000_000, batch=64), data_dir="host")
    peers = {name: people.join(invite, name) for name in ("anna", "bert")}
    for peer in peers.values():
        until(lambda peer=peer: peer.said("from 2 peers"), lambda peer=peer: f"a round: {peer}")
    folders = [tmp_path / name for name in peers]

    def order(*words: str) -> Process:
        process = people.start("run", *words, "--data-dir", str(tmp_path / "host"))
        assert process.end() == 0, process
        return process

    def heard(event: str, count: int = 1) -> Any:
        return until(
            lambda: all(len(happened(each, event)) >= count for each in folders) and folders,
            lambda: f"{count} of {event}: {peers}",
        )

    def soon() -> int:
        """The step that will be reached when all have heard of an order: some seconds from now."""
        rounds = happened(folders[0], "round_committed")[-5:]
        first, last = rounds[0], rounds[-1]
        began, now = (datetime.fromisoformat(each["time"]) for each in (first, last))
        pace = (last["step"] - first["step"]) / max((now - began).total_seconds(), 0.1)
        return int(last["step"] + max(HEARD_SECONDS * pace, 10))

    until(lambda: len(happened(folders[0], "round_committed")) > 5, "a few rounds")
    step = soon()
    order("set", "optimizer.lr=0.0005", "--at-step", str(step))
    heard("terms_heard")
    heard("terms_applied")
    rates: dict[int, set[float]] = {}
    for each in folders:
        for one in happened(each, "round_committed"):
            rates.setdefault(one["step"], set()).add(one["learning_rate"])
    assert all(len(of_all) == 1 for of_all in rates.values())  # at no step do two differ
    changed = [at for at, of_all in sorted(rates.items()) if of_all == {0.0005}]
    assert changed == [at for at in sorted(rates) if at >= changed[0]]
    assert changed[0] >= step

    order("pause", "--reason", "new data")
    heard("paused")
    status = people.start("status", "--data-dir", str(tmp_path / "anna"))
    assert status.end() == 0
    assert "paused: the organizer has paused the run (new data); resumes when the organizer" in str(status)
    heard("checkpoint_saved")
    order("resume")
    heard("resumed")
    stood = max(each["step"] for each in happened(folders[0], "round_committed"))
    until(
        lambda: all(happened(each, "round_committed")[-1]["step"] > stood + 6 for each in folders),
        lambda: f"rounds after the pause: {peers}",
    )
    end = soon()
    order("stop", "--at-step", str(end))
    heard("terms_heard", 4)
    for peer in peers.values():
        assert peer.end(60) == 0, peer
        assert peer.result()["step"] >= end  # later, if they heard of it later
