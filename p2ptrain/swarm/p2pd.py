"""The libp2p daemon `p2pd` as a child process that never outlives this one, not even when this one is killed.

hivemind ships the binary and starts it from `P2P.create`, where it survives `kill -9` of its parent as an
orphan, hears the terminal's Ctrl-C and keeps its sockets in the common temporary folder. So it is started
here instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from p2ptrain.errors import LocalFault

logger = logging.getLogger(__name__)

START_SECONDS = 15.0
STOP_SECONDS = 1.0
"""p2pd leaves within milliseconds of SIGTERM; one that does not is killed."""

# Asks the kernel to kill this process when its parent dies, and becomes p2pd. It is a process of its own
# because preexec_fn, which would do the same, runs Python after a fork and can deadlock in a program with
# threads. The parent may have died before the kernel was asked: then its id has changed.
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def binary() -> Path:
    """Where hivemind keeps p2pd; hivemind itself is not imported. Raises LocalFault if it cannot be run."""
    package = importlib.util.find_spec("hivemind")
    if package is None or package.origin is None:
        raise LocalFault(
            "the package hivemind is not installed, so there is no libp2p daemon; reinstall p2ptrain"
        )
    path = Path(package.origin).parent / "hivemind_cli" / "p2pd"
    if not os.access(path, os.X_OK):
        raise LocalFault(f"there is no libp2p daemon that can be run at {path}; reinstall hivemind")
    return path


class Daemon:
    """A p2pd that listens on its control socket."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._last_lines: deque[str] = deque(maxlen=5)
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, control: Path, options: Mapping[str, str]) -> Daemon:
        """Start p2pd with these `-options`, and wait until it takes commands at `control`, a new socket.

        On Linux the kernel kills it when the calling thread dies, which should therefore be the main one;
        elsewhere it ends by itself when nobody is connected to it any more. Raises LocalFault if it does not
        start.
        """
        options = {**options, "listen": f"/unix{control}", "idleTimeout": "30s"}
        command = [str(binary()), *(f"-{name}={value}" for name, value in options.items())]
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                env={"GOLOG_LOG_LEVEL": "error", **os.environ},
                start_new_session=True,  # or Ctrl-C in the terminal would reach it too
            )
        except OSError as error:
            raise LocalFault(f"the libp2p daemon could not be started: {error}") from error
        self = cls(process)
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._until_ready()
        except TimeoutError:
            await self.stop()
            raise LocalFault(
                f"the libp2p daemon was not ready after {START_SECONDS:.0f} s; is this machine overloaded?"
            ) from None
        except BaseException:
            await self.stop()
            raise
        self._reading = asyncio.create_task(self._read(), name="p2pd output")
        return self

    async def wait(self) -> str:
        """Wait until it has died; returns how, for the log."""
        code = await self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"{how}; {self._last_lines[-1]}" if self._last_lines else how

    def kill(self) -> None:
        """Kill it at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def stop(self) -> None:
        """End it, and return when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        if self._reading is not None:
            await self._reading

    async def _until_ready(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            self._keep(line)
            if line.startswith(b"Peer ID:"):
                return
        told = "; ".join(self._last_lines) or "it said nothing"
        raise LocalFault(f"the libp2p daemon ended while starting: {told}")

    async def _read(self) -> None:
        # Always read, or p2pd would block when the pipe is full.
        assert self._process.stdout is not None
        while some := await self._process.stdout.read(4096):
            self._keep(some)

    def _keep(self, output: bytes) -> None:
        for line in output.decode(errors="replace").splitlines():
            if text := line.strip()[:500]:
                self._last_lines.append(text)
                logger.debug("p2pd: %s", text)
