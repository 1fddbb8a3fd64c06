"""The connections of an HTTP server: which of them may stay, and what strangers on them may cost.

A timer for each would hold on to it, and to what it has sent, long after it has ended: a stranger who sends a
megabyte a hundred times a second would fill the memory. So one task looks at those that are open, and nothing
here knows of any other.
"""

from __future__ import annotations

import asyncio
import logging
import math

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

LOOKS = 10
"""In the time that a connection has."""


class Connections:
    """Until closed, ends those that are open for `seconds` and have not been `asked` a whole question."""

    def __init__(self, server: web.Server, seconds: float) -> None:
        self._server, self._seconds = server, seconds
        self._since: dict[web.RequestHandler, float] = {}
        self._watching = asyncio.create_task(self._watch())

    def asked(self, connection: web.RequestHandler) -> None:
        """It may stay as long as it likes."""
        self._since[connection] = math.inf

    def close(self) -> None:
        """End all of them now: a reader that hangs, or a page that follows, must not hold up the end."""
        self._watching.cancel()
        for connection in self._server.connections:
            _cut(connection)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._seconds / LOOKS)
            now = asyncio.get_running_loop().time()
            self._since = {each: self._since.get(each, now) for each in self._server.connections}
            for connection, since in self._since.items():
                if now - since > self._seconds:
                    _cut(connection)


def _cut(connection: web.RequestHandler) -> None:
    """End it now, whatever is still unread: `close` would wait for the reader."""
    if connection.transport is not None:
        connection.transport.abort()


def quiet(name: str) -> logging.Logger:
    """The logger of a server that says nothing of requests that are none: who sends them has the answer, and
    our owner no use for it."""
    logger = logging.getLogger(name)
    logger.addFilter(_is_ours)
    return logger


def _is_ours(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))
