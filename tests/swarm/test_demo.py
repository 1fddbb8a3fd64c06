"""`p2ptrain demo` as its users have it: real processes, real signals, and nothing left behind."""

from __future__ import annotations

import math
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from p2ptrain.errors import PortBusy
from tests.swarm.rehearsals import SMALL_RUN, Started

pytestmark = pytest.mark.swarm

KEYS = {
    "steps",
    "committed",
    "aborted",
    "peers",
    "first_step_seconds",
    "heldout_loss_first",
    "heldout_loss_last",
    "digests_equal",
    "kills",
    "rejoin_seconds",
    "checkpoint",
}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts a demo with these options."""
    demos: list[Started] = []

    def started(*options: str) -> Started:
        (tmp_path / "run.toml").write_text(SMALL_RUN)
        demos.append(Started(tmp_path, "demo", "--run", str(tmp_path / "run.toml"), *options))
        return demos[-1]

    yield started
    for demo in demos:
        demo.clear()


def test_demo_shows_equal_replicas_when_a_peer_is_killed_and_comes_back(
    start: Callable[..., Started],
) -> None:
    demo = start("--peers", "2", "--seconds", "20")
    assert demo.ends() == 0, demo.errors.read_text()
    receipt = demo.receipt()
    assert receipt.keys() >= KEYS
    assert receipt["problem"] == ""
    assert receipt["digests_equal"] is True
    assert receipt["states_compared"] > 1
    assert receipt["kills"] == 1
    assert 0 < receipt["rejoin_seconds"] < 60
    assert 0 < receipt["first_step_seconds"] < 60
    assert receipt["steps"] >= receipt["committed"] > 1
    assert receipt["heldout_loss_last"] <= receipt["heldout_loss_first"] < math.log(256)
    assert receipt["sample"].startswith("def ")
    assert (Path(receipt["checkpoint"]) / "manifest.json").exists()
    assert demo.seen("p2pd") >= 4  # the bootstrap's, two peers', and that of the one that came back
    assert demo.left() == []


def test_demo_leaves_in_order_when_ctrl_c_is_pressed(start: Callable[..., Started]) -> None:
    demo = start("--peers", "2", "--seconds", "600")
    demo.until("2 of 2 peers training")
    os.killpg(demo.process.pid, signal.SIGINT)
    assert demo.ends(40) == 0, demo.errors.read_text()
    receipt = demo.receipt()
    assert (receipt["problem"], receipt["kills"], receipt["digests_equal"]) == ("", 0, True)
    assert (Path(receipt["checkpoint"]) / "manifest.json").exists()
    assert demo.left() == []


def test_demo_ends_in_a_sentence_when_a_process_breaks(start: Callable[..., Started]) -> None:
    demo = start("--peers", "1", "--seconds", "600")
    demo.until("the bootstrap is ready")
    demo.child("bootstrap").kill()
    assert demo.ends(20) == 1
    assert demo.errors.read_text().startswith("p2ptrain: bootstrap ended by itself: ended by SIGKILL; ")
    assert demo.left() == []


def test_demo_ends_in_that_sentence_and_status_when_a_process_cannot_begin(
    start: Callable[..., Started],
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        demo = start("--listen", f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}")
        assert demo.ends(30) == PortBusy.exit_code
    complaint = demo.errors.read_text()
    assert complaint.startswith("p2ptrain: bootstrap: /ip4/127.0.0.1/tcp/")
    assert complaint.count("\n") == 1
    assert demo.left() == []


def test_nothing_is_left_when_the_demo_itself_is_killed(start: Callable[..., Started]) -> None:
    demo = start("--peers", "2", "--seconds", "600")
    demo.until("peers training")
    assert demo.seen("p2pd") == 3
    demo.process.kill()
    demo.process.wait()
    assert demo.left() == []
