"""`p2ptrain demo` and `p2ptrain chaos` as processes, and every process that was ever seen below them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.swarm.processes import RUN

SMALL_RUN = RUN.format(run_id="small", steps=1_000_000, batch=48)
"""A step takes as long as with a larger model."""


class Started:
    """One command as a process of its own; what it leaves behind is found."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.output, self.errors = folder / "output", folder / "errors"
        program = (sys.executable, "-c", "from peers import cli; cli.main()")
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*program, *words, "--json"],
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
        time.sleep(0.1)  # a poll with a deadline: the other side is a process
