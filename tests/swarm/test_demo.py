"""`p2ptrain demo` as its users have it: real processes, real signals, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from p2ptrain.errors import PortBusy

pytestmark = pytest.mark.swarm

SMALL_RUN = """
run_id = "small"
total_steps = 1000000
target_batch_size = 48  # a step takes as long as with a larger model
chunk_values = 4096
heartbeat_seconds = 0.5
silence_seconds = 3.0

[task]
layers = 1
width = 32
heads = 2
context = 32

[schedule]
warmup_steps = 2
"""

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


class Started:
    """A demo as a process of its own, and every process that was ever seen below it."""

    def __init__(self, folder: Path, *options: str) -> None:
        (folder / "run.toml").write_text(SMALL_RUN)
        self.output, self.errors = folder / "output", folder / "errors"
        program = (sys.executable, "-c", "from peers import cli; cli.main()")
        command = [*program, "demo", "--run", str(folder / "run.toml"), "--json"]
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*command, *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env={**os.environ, "XDG_DATA_HOME": str(folder)},
                start_new_session=True,  # a process group to itself, as a terminal gives a command
            )
        self._seen: dict[int, tuple[psutil.Process, str]] = {}

    def until(self, what: str, seconds: float = 60) -> None:
        """Wait until it has printed these words."""
        deadline = time.monotonic() + seconds
        while what not in self.output.read_text():
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline, f"no {what!r} in: {self.output.read_text()}"
            self._look()

    def ends(self, seconds: float = 90) -> int:
        """Wait for its end; its exit status."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end: {self.output.read_text()}"
            self._look()
        assert self.process.returncode is not None
        return self.process.returncode

    def receipt(self) -> dict[str, Any]:
        """The last line of its output."""
        value = json.loads(self.output.read_text().splitlines()[-1])
        assert isinstance(value, dict)
        return value

    def child(self, verb: str) -> psutil.Process:
        """The first of its processes that runs this verb."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if verb in child.cmdline())

    def seen(self, program: str) -> int:
        """How many processes of this name were seen below it."""
        return sum(name == program for _, name in self._seen.values())

    def left(self) -> list[psutil.Process]:
        """What is still there of all that was seen, a few seconds after its end at most."""
        _, alive = psutil.wait_procs([process for process, _ in self._seen.values()], timeout=5)
        return list(alive)

    def clear(self) -> None:
        """End whatever a failed test would leave behind."""
        self.process.kill()
        self.process.wait()
        for process in self.left():
            process.kill()

    def _look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                # Its name changes when it becomes another program.
                self._seen[process.pid] = process, process.name()
        time.sleep(0.1)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts a demo with these options."""
    demos: list[Started] = []

    def started(*options: str) -> Started:
        demos.append(Started(tmp_path, *options))
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
