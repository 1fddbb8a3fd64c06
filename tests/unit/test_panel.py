"""The panel of a running peer, and `top`, driven by its own pilot: what it shows, and what its keys ask."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from textual.widgets import RichLog, Static

from p2ptrain.errors import NotRunning
from peers.panel import Below, framed
from peers.top import Top

JOINING: dict[str, Any] = {"run_id": "stdlib", "state": "joining", "seconds": 2.0, "pauses": []}
TRAINING: dict[str, Any] = {
    "run_id": "stdlib",
    "state": "accumulating",
    "seconds": 75.0,
    "pauses": [],
    "peer": "12D3KooWabcdefgh",
    "name": "Anna's",
    "step": 12,
    "total_steps": 100,
    "lineage": "ab" * 32,
    "waiting": "",
    "catching_up": None,
    "batch": {"mine": 24, "target": 64},
    "rounds": 11,
    "samples": 500,
    "loss": 3.5,
    "losses": [5.5, 4.0, 3.5],
    "heldout_loss": None,
    "samples_per_second": 10.0,
    "swarm_samples_per_second": 20.0,
    "roster": 2,
    "connected": 2,
    "links": {"direct": 2},
    "carriers": {},
    "hidden": False,
    "sent_bytes": 10**6,
    "received_bytes": 10**6,
    "sent_bytes_per_second": 1e4,
    "received_bytes_per_second": 1e4,
    "deadlines": {},
}
BATTERY = {
    "reason": "battery",
    "because": "the machine runs on battery",
    "resumes": "when it has had mains power for 60 s",
    "since": 0.0,
    "until": None,
}
PROGRESS = {
    "what": "pieces",
    "done": 12,
    "total": 48,
    "done_bytes": 12_000_000,
    "total_bytes": 48_000_000,
    "bytes_per_second": 4e6,
    "eta_seconds": 9.0,
    "donors": 3,
}


def drawn(status: dict[str, Any]) -> str:
    terminal = io.StringIO()
    Console(file=terminal, width=110).print(framed(status, now=100.0))
    return terminal.getvalue()


def test_panel_shows_the_state_the_step_and_the_losses() -> None:
    assert "joining" in drawn(JOINING)
    text = drawn(TRAINING)
    for words in ("stdlib", "1:15", "training", "12 of 100", "24 of 64 samples are mine", "5.50 █▃▁ 3.50"):
        assert words in text, text


def test_panel_says_why_it_waits_and_when_that_ends() -> None:
    paused = drawn(TRAINING | {"state": "paused", "pauses": [BATTERY]})
    assert "paused: the machine runs on battery; resumes when it has had mains power for 60 s" in paused
    coming = drawn(TRAINING | {"state": "catching_up", "catching_up": PROGRESS})
    assert "12 of 48 pieces from 3 donors, 4.0 MB/s, 0:09 left" in coming
    assert "left" not in drawn(TRAINING | {"catching_up": PROGRESS | {"eta_seconds": None}})


def test_panel_keeps_below_the_log_and_leaves_nothing_behind() -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=110)
    with Below(console) as panel:
        panel.show(TRAINING, 100.0)
        console.print("step 12 is averaged")
    written = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert "step 12 is averaged" in written
    assert "\x1b[2K" in written[written.rindex("are mine") :]  # lines are wiped after the last drawing


# -- top -----------------------------------------------------------------------------------------------------


class Peer:
    """What answers on the socket."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.fault = ""

    def ask(self, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
        assert folder == Path("/data")
        if self.fault:
            raise NotRunning(self.fault)
        if request["ask"] != "status":
            self.asked.append(request)
        return TRAINING


def figures(top: Top) -> str:
    terminal = io.StringIO()
    Console(file=terminal, width=110).print(top.query_one("#figures", Static).content)
    return terminal.getvalue()


async def test_top_shows_the_peer_and_its_keys_ask_for_what_they_say() -> None:
    peer, news = Peer(), [["step 11: averaged", "step 12: averaged"]]
    top = Top(Path("/data"), lambda: news.pop() if news else [], peer.ask)
    async with top.run_test() as pilot:
        await top.workers.wait_for_complete()
        await pilot.pause()
        assert "12 of 100" in figures(top)
        assert [line.text for line in top.query_one("#news", RichLog).lines] == [
            "step 11: averaged",
            "step 12: averaged",
        ]
        for key in "prfl":
            await pilot.press(key)
            await top.workers.wait_for_complete()
        await pilot.press("q")
    assert [each["ask"] for each in peer.asked] == ["pause", "resume", "finish", "leave"]
    assert peer.asked[0]["seconds"] is None


async def test_long_line_of_top_has_the_whole_width() -> None:
    news = ["word " * 24 + "end"]
    top = Top(Path("/data"), lambda: [news.pop()] if news else [], Peer().ask)
    async with top.run_test(size=(140, 40)) as pilot:
        await top.workers.wait_for_complete()
        await pilot.pause()
        assert len(top.query_one("#news", RichLog).lines) == 1


@pytest.mark.parametrize("fault", ["no peer runs with the data folder /data; start one"])
async def test_top_says_so_when_the_peer_is_gone(fault: str) -> None:
    peer = Peer()
    peer.fault = fault
    top = Top(Path("/data"), list, peer.ask)
    async with top.run_test() as pilot:
        await top.workers.wait_for_complete()
        await pilot.pause()
        assert fault in " ".join(figures(top).split())
