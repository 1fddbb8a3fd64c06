"""The pages of one process for operators: `/metrics`, `/livez`, `/readyz`, and `/healthz`, which is `/livez`.

The pages share the event loop with training, so whoever reads them can cost it little: the metrics are
written out at most once a second, a connection carries one request and lives for seconds however slowly its
other end reads, and only so many are open at once.

On loopback they are opened by its address or as `localhost`, and by no other name: a web page elsewhere could
have its name lead here, and read them through a visitor's browser (DNS rebinding). Nor is a request answered
that the browser says was made by another site's page.

Not covered: who may read. The pages hold no secrets, and are on loopback unless told otherwise.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self, cast

from aiohttp import web

from p2ptrain.errors import ConfigError, PortBusy
from p2ptrain.telemetry.connections import Connections, quiet

CONNECTION_SECONDS = 10.0
"""Prometheus waits as long for a scrape."""
MAX_CONNECTIONS = 32
MAX_HEADER_BYTES = 4096
PAGE_SECONDS = 1.0
"""A metrics page this fresh is served again as it is."""


class HealthServer:
    """Serves the pages while its context is open, on a loop that stays its owner's: no signal is touched.

    `page` returns the metrics as Prometheus text; `failed_checks` says in words what keeps this process from
    being ready, nothing when it is. Both run on the loop and must be quick. Entering raises PortBusy if
    another process has the port, ConfigError if this machine has no such address.
    """

    def __init__(
        self,
        page: Callable[[], bytes],
        failed_checks: Callable[[], Sequence[str]],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        answered: Callable[[str, int], object] = lambda path, status: None,
    ) -> None:
        """`answered` is told the path and status of every answer."""
        self._page = page
        self._answered = answered
        self._failed_checks = failed_checks
        self._host = host
        self._port = port
        self._cached = b""
        self._cached_until = float("-inf")
        self._listener: asyncio.Server | None = None
        self._connections: Connections | None = None
        self._runner = _runner(self)

    @property
    def port(self) -> int:
        """Where it listens; 0 stands for any free port until then."""
        return self._port

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        try:
            self._listener = await asyncio.get_running_loop().create_server(
                self._accept, self._host, self._port
            )
        except OSError as error:
            await self._runner.cleanup()
            raise cannot_listen(self._host, self._port, error) from error
        self._port = self._listener.sockets[0].getsockname()[1]
        assert self._runner.server is not None
        self._connections = Connections(self._runner.server, CONNECTION_SECONDS)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._listener is not None
        assert self._connections is not None
        self._listener.close()
        self._connections.close()
        await self._runner.cleanup()

    # -- pages -----------------------------------------------------------------------------------------------

    async def metrics(self, request: web.Request) -> web.Response:
        now = asyncio.get_running_loop().time()
        if now >= self._cached_until:
            self._cached = self._page()
            self._cached_until = now + PAGE_SECONDS
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=self._cached, headers=headers)

    async def live(self, request: web.Request) -> web.Response:
        """The event loop answers; that is all there is to say."""
        return web.Response(text="ok\n")

    async def ready(self, request: web.Request) -> web.Response:
        failed = list(self._failed_checks())
        return web.json_response({"ready": not failed, "failed": failed}, status=503 if failed else 200)

    # -- connections -----------------------------------------------------------------------------------------

    @web.middleware
    async def _one_request(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Close the connection after the answer: one that is kept open is one more to watch."""
        status = 500
        try:
            if flaw := self._stray(request):
                raise web.HTTPForbidden(text=f"{flaw}\n")
            response = await handler(request)
            status = response.status
        except web.HTTPException as refusal:  # how aiohttp says 404 and 405
            status = refusal.status
            refusal.force_close()
            raise
        finally:
            self._answered(request.path, status)
        response.force_close()
        return response

    def _stray(self, request: web.Request) -> str:
        """Why that request is none for us; empty if it is one."""
        if request.headers.get("Origin") or request.headers.get("Sec-Fetch-Site") in (
            "cross-site",
            "same-site",
        ):
            return "no page of another site reads this"
        if is_loopback(self._host) and not is_loopback(request.url.host or "localhost"):
            return "this is opened by its address, or as localhost"
        return ""

    def _accept(self) -> asyncio.BaseProtocol:
        """The protocol of a new connection."""
        server = self._runner.server
        if server is None or len(server.connections) >= MAX_CONNECTIONS:
            return _HangUp()
        return server()


def _runner(server: HealthServer) -> web.AppRunner:
    app = web.Application(middlewares=[server._one_request], client_max_size=MAX_HEADER_BYTES)
    app.router.add_get("/metrics", server.metrics)
    app.router.add_get("/livez", server.live)
    app.router.add_get("/healthz", server.live)
    app.router.add_get("/readyz", server.ready)
    return web.AppRunner(
        app,
        handle_signals=False,
        access_log=None,
        logger=quiet(__name__),
        shutdown_timeout=1.0,
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
    )


class _HangUp(asyncio.Protocol):
    """Too many connections: not this one."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()


def is_loopback(host: str) -> bool:
    """Whether this address or name is of this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def cannot_listen(host: str, port: int, error: OSError) -> ConfigError | PortBusy:
    """What to tell a peer's owner who chose where its metrics and page are."""
    if error.errno == errno.EADDRINUSE:
        return PortBusy(
            f"metrics_port {port} on {host} is taken by another process; "
            "set metrics_port in the peer file to a free port, or to 0 for any"
        )
    return ConfigError(
        f"cannot serve metrics on {host} port {port} ({error.strerror or error}); "
        "set metrics_host in the peer file to an address of this machine, and metrics_port to 0 or above 1023"
    )
