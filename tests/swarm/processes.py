"""The installed `p2ptrain` command as processes: started as a user would, with deadlines, none left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

COMMAND = Path(sys.executable).parent / "p2ptrain"

RUN = """
run_id = "{run_id}"
total_steps = {steps}
target_batch_size = {batch}
codec = "fp16"
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


def until(holds: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """Wait until `holds()` is true and return it; fail with `what` after the deadline."""
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what() if callable(what) else what}"
        time.sleep(0.05)  # a poll with a deadline: the other side is a process
    return value


def get(url: str, **headers: str) -> tuple[int, str]:
    """Status and text of that page; 0 if nobody answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()
    except OSError:
        return 0, ""


class Process:
    """One command, its output in two files."""

    def __init__(self, folder: Path, *words: str, inside: Sequence[str] = ()) -> None:
        """`inside`: words before the command, such as `ip netns exec NAME`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.output, self.errors = folder / "output", folder / "errors"
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*inside, str(COMMAND), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env={**os.environ, "XDG_DATA_HOME": str(folder / "data"), "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def __str__(self) -> str:
        return f"{self.output.read_text()}\n{self.errors.read_text()[-3000:]}"

    def said(self, words: str) -> bool:
        assert self.process.poll() is None or words in str(self), f"ended before {words!r}: {self}"
        return words in str(self)

    def daemons(self) -> list[psutil.Process]:
        """Its p2pd."""
        return [p for p in psutil.Process(self.process.pid).children(recursive=True) if p.name() == "p2pd"]

    def end(self, seconds: float = 30.0) -> int:
        """Its exit code, once it has ended by itself."""
        until(lambda: self.process.poll() is not None, lambda: f"its end: {self}", seconds)
        return int(self.process.returncode)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def result(self) -> dict[str, Any]:
        """The JSON object in the last line of output."""
        found: dict[str, Any] = json.loads(self.output.read_text().strip().splitlines()[-1])
        return found

    def journal(self, data_dir: Path) -> str:
        path = data_dir / "journal.jsonl"
        return path.read_text() if path.exists() else ""

    def kill(self) -> None:
        """Whatever is left of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Crew:
    """Processes that end with their test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Process] = []

    def start(self, *words: str, inside: Sequence[str] = ()) -> Process:
        process = Process(self.folder / f"process-{len(self.started)}", *words, inside=inside)
        self.started.append(process)
        return process

    def bootstrap(
        self,
        run: Path,
        listen: str = "/ip4/127.0.0.1/tcp/0",
        *options: str,
        inside: Sequence[str] = (),
        data_dir: str = "",
    ) -> tuple[Process, str]:
        """A bootstrap that is ready, and its invite; `data_dir`: the name of its folder, else a new one."""
        data = self.folder / (data_dir or f"bootstrap-{len(self.started)}")
        words = ("--listen", listen, "--data-dir", str(data), "--json", *options)
        process = self.start("bootstrap", str(run), *words, inside=inside)
        until(lambda: process.said('"ready"'), lambda: f"an invite: {process}")
        return process, json.loads(process.output.read_text().splitlines()[0])["invite"]

    def join(
        self,
        invite: str,
        name: str,
        *words: str,
        listen: str = "/ip4/127.0.0.1/tcp/0",
        inside: Sequence[str] = (),
        **settings: Any,
    ) -> Process:
        """A peer with its own data folder `name` and these settings in its peer file."""
        file = self.folder / f"peer-{len(self.started)}.toml"
        told = {"data_dir": str(self.folder / name), "listen": [listen], "eval_every_steps": 0, **settings}
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in told.items()))
        return self.start("join", invite, "--peer", str(file), "--json", *words, inside=inside)


@contextmanager
def crew(folder: Path) -> Iterator[Crew]:
    """Everything that is started in it is gone afterwards."""
    started = Crew(folder)
    try:
        yield started
    finally:
        for process in reversed(started.started):
            process.kill()


def run_file(folder: Path, run_id: str, steps: int, batch: int = 8) -> Path:
    path = folder / f"{run_id}.toml"
    path.write_text(RUN.format(run_id=run_id, steps=steps, batch=batch))
    return path
