"""Tasks that work beside the one inside `async with`, and end with it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any


class Crew:
    """Tasks that are cancelled when their owner, the task that entered, leaves.

    If one fails, the owner is cancelled and that failure comes out of its `async with`: none dies unnoticed.
    Unlike with asyncio.TaskGroup the owner's own errors come out as they are, in no group, so that callers
    can tell a `LocalFault` from a `PeerFault`; and leaving does not wait for work that has no end.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._owner: asyncio.Task[Any] | None = None
        self._failure: BaseException | None = None
        self._leaving = False

    async def __aenter__(self) -> Crew:
        self._owner = asyncio.current_task()
        return self

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do this work beside."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        if self._leaving:
            task.cancel()
        return task

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving = True
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        if self._failure is not None:
            if isinstance(error, asyncio.CancelledError) and self._owner is not None:
                self._owner.uncancel()
            raise self._failure

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (failure := task.exception()) is None or self._failure is not None:
            return
        self._failure = failure
        if self._owner is not None and not self._leaving:
            self._owner.cancel()
