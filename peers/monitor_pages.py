"""What the monitor serves over HTTP, and every peer whose owner wishes it: the page, its data, and what
Prometheus asks for.

    /                     the page, from files that ship with p2ptrain
    /api/v1/state         the whole picture, as JSON
    /api/v1/events        what changes, as server-sent events; resumes after `Last-Event-ID`
    /api/v1/timeline      rounds that were, for looking back
    /api/v1/sd            the peers as targets, for Prometheus' http_sd
    /metrics              the swarm's metrics
    /peers/ID/metrics     that peer's, through the P2P link
    /livez /readyz        for whoever supervises this process

Everything is read-only and public to whoever can connect; by default that is this machine. There, a request
must name this machine as its host, or a foreign page could read us through a name of its own that it points
at loopback. A request that another page makes is refused everywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import io
import json
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from aiohttp import web

from p2ptrain.errors import ConfigError, PeerFault, PortBusy
from p2ptrain.telemetry.connections import Connections, quiet
from p2ptrain.telemetry.health import MAX_HEADER_BYTES
from peers.watching import Json

MONITOR_PORT, BOOTSTRAP_PORT = 9411, 9412
"""Unless the owner says otherwise; both may run on one machine."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
MOST_CONNECTIONS = 256
QUESTION_SECONDS = 10.0
"""A connection that has asked nothing by then is cut, or a few idle ones would keep everybody out."""
MOST_LISTENERS = 64
"""Pages that follow at one time."""
REMEMBERED = 600
"""Updates that a page which lost its connection can catch up by."""
WRITE_SECONDS = 20.0
"""For a slow reader to take an update."""
BEAT_SECONDS = 15.0
"""A connection that says nothing for longer may be cut by what is between."""
MOST_TIMELINE = 500

PAGE = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/app.js": ("app.js", "text/javascript"),
    "/story.js": ("story.js", "text/javascript"),
    "/charts.js": ("charts.js", "text/javascript"),
    "/timeline.js": ("timeline.js", "text/javascript"),
    "/uPlot.esm.js": ("vendor/uPlot.esm.js", "text/javascript"),
    "/uPlot.min.css": ("vendor/uPlot.min.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Updates:
    """Numbered updates, the last of which are remembered for those who come late."""

    def __init__(self) -> None:
        self._life = secrets.token_hex(4)
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=REMEMBERED)
        self._last = 0
        self._more = asyncio.Event()

    @property
    def last(self) -> str:
        """The id of the newest."""
        return f"{self._life}-{self._last}"

    def publish(self, update: Json) -> None:
        """One more."""
        self._last += 1
        self._kept.append((self._last, json.dumps(update, separators=(",", ":")).encode()))
        more, self._more = self._more, asyncio.Event()
        more.set()

    def after(self, identifier: str) -> list[tuple[str, bytes]] | None:
        """Those that came after that one; None if they are no longer all known."""
        life, _, number = identifier.rpartition("-")
        if life != self._life or not number.isdecimal() or len(number) > 15:
            return None
        first = int(number) + 1
        if first > self._last + 1 or (self._kept and first < self._kept[0][0]):
            return None
        return [(f"{life}-{each}", text) for each, text in self._kept if each >= first]

    async def more(self, seconds: float) -> None:
        """Until there is another one, or for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._more.wait()


@dataclass(frozen=True)
class Source:
    """What the pages show, and where it comes from."""

    state: Callable[[], Json]
    timeline: Callable[[int, int], list[list[Any]]]
    updates: Updates
    targets: Callable[[str], list[Json]]
    """For Prometheus, given by which address it reached us."""
    metrics: Callable[[], bytes]
    peer_metrics: Callable[[str], Awaitable[bytes]]
    """Raises KeyError for a peer that is not known, PeerFault for one that cannot be asked."""
    failed_checks: Callable[[], Sequence[str]]
    invite: str = ""
    """For the join box; empty: there is none."""
    read: Callable[[], None] = lambda: None
    """Called whenever somebody asks how the swarm is."""
    answered: Callable[[str, int], object] = lambda path, status: None
    """Told the path and status of every answer."""


CannotListen = Callable[[str, int, OSError], ConfigError | PortBusy]


class Pages:
    """Serves them while entered. Raises PortBusy or ConfigError if it cannot listen."""

    def __init__(
        self,
        source: Source,
        host: str,
        port: int,
        *,
        public: bool,
        fault: CannotListen = lambda host, port, error: _cannot_listen(host, port, error),
    ) -> None:
        """`public`: whoever can connect may come by whatever name; else only by one of this machine. `fault`
        says what to do where it cannot listen."""
        self._source, self._host, self._port, self._public = source, host, port, public
        self._fault = fault
        self._listening = 0
        self._listener: asyncio.Server | None = None
        self._connections: Connections | None = None
        self._files = {path: _file(name) for path, (name, _) in PAGE.items()}
        self._runner = web.AppRunner(
            self._application(),
            handle_signals=False,
            access_log=None,
            logger=quiet(__name__),
            shutdown_timeout=0.5,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            keepalive_timeout=30,
        )

    @property
    def port(self) -> int:
        """Where it listens; 0 stands for any free port until then."""
        return self._port

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        server = self._runner.server
        assert server is not None
        try:
            loop = asyncio.get_running_loop()
            self._listener = await loop.create_server(server, self._host, self._port, backlog=128)
        except OSError as error:
            await self._runner.cleanup()
            raise self._fault(self._host, self._port, error) from error
        self._port = self._listener.sockets[0].getsockname()[1]
        self._connections = Connections(server, QUESTION_SECONDS)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listener is not None:
            self._listener.close()
        if self._connections is not None:
            self._connections.close()
        await self._runner.cleanup()

    def _application(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_HEADER_BYTES)
        for path in PAGE:
            app.router.add_get(path, self._static)
        app.router.add_get("/api/v1/state", self._state)
        app.router.add_get("/api/v1/events", self._events)
        app.router.add_get("/api/v1/timeline", self._timeline)
        app.router.add_get("/api/v1/sd", self._sd)
        app.router.add_get("/qr.svg", self._qr)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/peers/{peer}/metrics", self._peer_metrics)
        app.router.add_get("/livez", self._live)
        app.router.add_get("/healthz", self._live)
        app.router.add_get("/readyz", self._ready)
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        response: web.StreamResponse
        if self._connections is not None:
            self._connections.asked(request.protocol)
        if flaw := self._flaw(request):
            response = web.Response(status=403, text=f"{flaw}\n")
        else:
            try:
                response = await handler(request)
            except web.HTTPException as refusal:  # how aiohttp says 404 and 405
                refusal.headers.update(HEADERS)
                self._source.answered(request.path, refusal.status)
                raise
        if not response.prepared:
            response.headers.update(HEADERS)
        self._source.answered(request.path, response.status)
        return response

    def _flaw(self, request: web.Request) -> str:
        """Why this request is not answered; empty if it is."""
        server = self._runner.server
        if server is not None and len(server.connections) > MOST_CONNECTIONS:
            return "too many connections"
        try:
            name = urlsplit(f"//{request.host}").hostname or ""
            origin = request.headers.get("Origin")
            foreign = origin is not None and urlsplit(origin).netloc != request.host
        except ValueError:
            return "the Host or Origin of this request is none"
        if not self._public and name not in LOOPBACK | {self._host}:
            return f"this page is for its own machine: open http://127.0.0.1:{self._port}/ there"
        return "this request comes from another page" if foreign else ""

    # -- the page and its data -------------------------------------------------------------------------------

    async def _static(self, request: web.Request) -> web.Response:
        path = request.path
        return _zipped(request, self._files[path], PAGE[path][1])

    async def _state(self, request: web.Request) -> web.Response:
        self._source.read()
        state = {**self._source.state(), "id": self._source.updates.last, "invite": self._source.invite}
        # A long history takes a while to write, for which a peer's rounds must not wait.
        body = await asyncio.to_thread(lambda: json.dumps(state, separators=(",", ":")).encode())
        return await asyncio.to_thread(_zipped, request, body, "application/json")

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self._listening >= MOST_LISTENERS:
            return web.Response(
                status=503, text="too many pages follow already\n", headers={"Retry-After": "30"}
            )
        updates = self._source.updates
        known = request.headers.get("Last-Event-ID") or request.query.get("after", "")
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream"})
        await response.prepare(request)
        self._listening += 1
        try:
            await response.write(b"retry: 1000\n\n")
            while True:
                self._source.read()
                pending = updates.after(known)
                if pending is None:
                    everything = json.dumps(self._source.state(), separators=(",", ":")).encode()
                    pending = [(updates.last, everything)]
                frames = [b"id: %s\ndata: %s\n\n" % (each.encode(), text) for each, text in pending]
                async with asyncio.timeout(WRITE_SECONDS):
                    await response.write(b"".join(frames) or b": still here\n\n")
                known = pending[-1][0] if pending else known
                await updates.more(BEAT_SECONDS)
        except (OSError, TimeoutError):
            pass  # the page has gone, or reads too slowly; it comes again and says what it has
        finally:
            self._listening -= 1
        return response

    async def _timeline(self, request: web.Request) -> web.Response:
        try:
            until, count = int(request.query.get("until", "")), int(request.query.get("count", "40"))
        except ValueError:
            return web.json_response({"error": "until and count are numbers"}, status=400)
        self._source.read()
        return web.json_response({"parts": self._source.timeline(until, max(1, min(count, MOST_TIMELINE)))})

    async def _qr(self, request: web.Request) -> web.Response:
        if not self._source.invite:
            raise web.HTTPNotFound
        return web.Response(body=qr(f"p2ptrain join {self._source.invite}"), content_type="image/svg+xml")

    # -- for Prometheus and supervisors ----------------------------------------------------------------------

    async def _sd(self, request: web.Request) -> web.Response:
        self._source.read()
        return web.json_response(self._source.targets(request.host))

    async def _metrics(self, request: web.Request) -> web.Response:
        return _prometheus(self._source.metrics())

    async def _peer_metrics(self, request: web.Request) -> web.Response:
        try:
            return _prometheus(await self._source.peer_metrics(request.match_info["peer"]))
        except KeyError:
            raise web.HTTPNotFound from None
        except PeerFault as fault:
            return web.Response(status=502, text=f"{fault}\n")

    async def _live(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, request: web.Request) -> web.Response:
        failed = list(self._source.failed_checks())
        return web.json_response({"ready": not failed, "failed": failed}, status=503 if failed else 200)


def qr(text: str) -> bytes:
    """The text as a QR code, an SVG that stands on white."""
    import segno

    drawn = io.BytesIO()
    segno.make(text, error="l", micro=False).save(drawn, kind="svg", scale=2, border=4, light="#fff")
    return drawn.getvalue()


def _prometheus(page: bytes) -> web.Response:
    return web.Response(body=page, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def _zipped(request: web.Request, body: bytes, kind: str) -> web.Response:
    headers: Mapping[str, str] = {"Vary": "Accept-Encoding"}
    if len(body) > 2048 and "gzip" in request.headers.get("Accept-Encoding", ""):
        body, headers = gzip.compress(body, 1), {**headers, "Content-Encoding": "gzip"}
    return web.Response(body=body, content_type=kind, charset="utf-8", headers=headers)


def _file(name: str) -> bytes:
    return files("peers").joinpath("page", *name.split("/")).read_bytes()


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError | PortBusy:
    if error.errno == errno.EADDRINUSE:
        return PortBusy(
            f"port {port} on {host} is taken by another process; choose another --port, or 0 for any"
        )
    return ConfigError(
        f"cannot listen on {host} port {port} ({error.strerror or error}); choose another --host or --port"
    )
