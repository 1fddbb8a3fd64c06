"""The event journal: one JSON line per event, in files of bounded size, and never in training's way.

`path` holds the newest lines and `path` + ".1" those before, each of at most `max_bytes`. A line is handed to
the operating system as it is written, so it outlives a killed process, though not a power cut. A line that
cannot be written (the disk is full, the folder is gone) is lost and counted; the log says so once per outage.

Not covered: two processes with one path. A peer's data folder belongs to one process.
"""

from __future__ import annotations

import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from p2ptrain.events import Event

logger = logging.getLogger(__name__)


class Journal:
    """Appends events to a file. A context manager; opens the file when the first event comes."""

    def __init__(
        self, path: Path, *, max_bytes: int = 16 * 2**20, clock: Callable[[], float] = time.time
    ) -> None:
        self.lost = 0
        """Events that could not be written."""
        self._path = path
        self._max_bytes = max_bytes
        self._clock = clock
        self._file: io.FileIO | None = None
        self._size = 0
        self._failing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; a later `write` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, event: Event) -> None:
        """Append the event, or count it as lost; never raises for want of disk."""
        self.append({"time": shown_moment(self._clock()), **event.to_dict()})

    def append(self, record: Mapping[str, Any]) -> None:
        """The same for a record of another kind: strict JSON."""
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        try:
            self._append(line)
        except OSError as error:
            self.close()
            self.lost += 1
            if not self._failing:
                self._failing = True
                logger.warning(
                    "cannot write the event journal %s (%s); training goes on, its events are lost meanwhile",
                    self._path,
                    error.strerror or error,
                )
        else:
            if self._failing:
                self._failing = False
                logger.info(
                    "the event journal %s is written again; %d events are lost", self._path, self.lost
                )

    def _append(self, line: bytes) -> None:
        file = self._file or self._open()
        if self._size and self._size + len(line) > self._max_bytes:
            self.close()
            os.replace(self._path, older(self._path))
            file = self._open()
        written = file.write(line)
        if written != len(line):
            # The disk filled up within the line; `_open` will cut the torn piece off.
            raise OSError(f"only {written} of {len(line)} bytes were taken")
        self._size += len(line)

    def _open(self) -> io.FileIO:
        """Open for appending after the last whole line: what a crash or a full disk tore is cut off."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that nothing is ever half in our memory and half on the disk.
        self._file = io.FileIO(self._path, "a+")
        self._size = _whole_lines(self._file)
        os.truncate(self._file.fileno(), self._size)
        return self._file


def shown_moment(seconds: float) -> str:
    """Unix time as ISO-8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def older(path: Path) -> Path:
    """Where the journal's previous lines are."""
    return path.with_name(path.name + ".1")


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The journal's records, oldest first; those of a missing file are none.

    A line that is torn or is no JSON object is passed over: its writer may be within it, or have died there.
    Reading while the journal is being rotated may miss or repeat lines.
    """
    for file in (older(path), path):
        try:
            lines = file.open("rb")
        except FileNotFoundError:
            continue
        with lines:
            for line in lines:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    yield record


def _whole_lines(file: io.FileIO, block_bytes: int = 4096) -> int:
    """Size of the file up to and with its last newline."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - block_bytes)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
