"""Ctrl-C and SIGTERM, counted: once means finish, twice means now."""

from __future__ import annotations

import asyncio
import signal
from types import TracebackType
from typing import Self


class Stop:
    """While entered, on a running loop, SIGINT and SIGTERM set these instead of killing the process."""

    def __init__(self) -> None:
        self.reason = ""
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

    async def first(self) -> None:
        """Returns when the first signal came."""
        await self._first.wait()

    async def second(self) -> None:
        """Returns when a second one came."""
        await self._second.wait()

    def _came(self, number: signal.Signals) -> None:
        (self._second if self._first.is_set() else self._first).set()
        self.reason = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
