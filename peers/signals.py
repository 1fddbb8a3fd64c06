"""Ctrl-C and SIGTERM, counted: once means finish, twice means now. Commands can ask for the same."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self


class Stopped(Exception):
    """A first signal came before there was anything to finish; says which."""


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


@contextlib.asynccontextmanager
async def heeding(stop: Stop) -> AsyncIterator[Callable[[], None]]:
    """While entered, a first signal ends what this task waits for, at once, and Stopped comes out; until what
    is given here has been called: from then on the signal is somebody else's to heed."""
    owner = asyncio.current_task()
    assert owner is not None
    ended = False

    def end(watch: asyncio.Task[None]) -> None:
        nonlocal ended
        if not watch.cancelled():
            ended = True
            owner.cancel()

    def over() -> None:
        watching.remove_done_callback(end)
        watching.cancel()

    watching = asyncio.create_task(stop.first(), name="stop")
    watching.add_done_callback(end)
    try:
        yield over
    except asyncio.CancelledError:
        if ended and owner.uncancel() == 0:
            raise Stopped(stop.reason) from None
        raise
    finally:
        over()
