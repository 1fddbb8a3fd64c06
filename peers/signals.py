"""Ctrl-C and SIGTERM, counted: once means finish, twice means now. Commands can ask for the same."""

from __future__ import annotations

import asyncio
import signal
from types import TracebackType
from typing import Self


class Stop:
    """While entered, on a running loop, SIGINT and SIGTERM set these instead of killing the process."""

    def __init__(self) -> None:
        self.reason = ""
        self.finishing = False
        """Leave once the step under way is done, however long that takes."""
        self._first = asyncio.Event()
        self._second = asyncio.Event()

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._came, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    @property
    def asked(self) -> bool:
        """Whether a first signal came, or a command asked for the same."""
        return self._first.is_set()

    async def first(self) -> None:
        """Returns when the first signal came."""
        await self._first.wait()

    async def second(self) -> None:
        """Returns when a second one came."""
        await self._second.wait()

    def ask(self, reason: str) -> None:
        """As if a first signal had come."""
        self.reason = self.reason or reason
        self._first.set()

    def finish(self) -> None:
        """No signal: the round under way has all the time that it takes."""
        self.reason = self.reason or "p2ptrain finish"
        self.finishing = True

    def _came(self, number: signal.Signals) -> None:
        (self._second if self._first.is_set() else self._first).set()
        self.reason = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
