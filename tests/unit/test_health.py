"""The pages, over real HTTP on loopback, read politely and otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest
import uvloop
from aiohttp import web

from p2ptrain.errors import ConfigError, PortBusy
from p2ptrain.telemetry import health
from p2ptrain.telemetry.health import HealthServer


class Subject:
    """What the pages tell about."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.pages = 0
        self.body = b"p2ptrain_global_step 41\n"

    def page(self) -> bytes:
        self.pages += 1
        return self.body

    def failed_checks(self) -> list[str]:
        return self.failed


@pytest.fixture
def subject() -> Subject:
    return Subject()


@pytest.fixture
async def server(subject: Subject) -> AsyncIterator[HealthServer]:
    async with HealthServer(subject.page, subject.failed_checks) as server:
        yield server


async def get(port: int, path: str) -> tuple[int, str, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}{path}") as response,
    ):
        return response.status, response.headers["Content-Type"], await response.text()


async def say(port: int, words: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(words)
    return reader, writer


async def ended(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the other end hangs up, in whichever way."""
    heard = b""
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(5):
            while piece := await reader.read(4096):
                heard += piece
    return heard


def open_connections(server: HealthServer) -> int:
    assert server._runner.server is not None
    return len(server._runner.server.connections)


async def until(condition: Callable[[], bool]) -> None:
    """What happens inside the server gives no sign that a test could wait for."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_metrics_are_prometheus_text_when_scraped(server: HealthServer, subject: Subject) -> None:
    assert await get(server.port, "/metrics") == (
        200,
        "text/plain; version=0.0.4; charset=utf-8",
        subject.body.decode(),
    )


@pytest.mark.parametrize("path", ["/livez", "/healthz"])
async def test_live_answers_when_not_ready(server: HealthServer, subject: Subject, path: str) -> None:
    subject.failed = ["no swarm yet"]
    assert (await get(server.port, path))[0] == 200


async def test_ready_names_the_failed_checks_when_there_are_some(
    server: HealthServer, subject: Subject
) -> None:
    subject.failed = ["no peer reached", "state not caught up"]
    status, kind, body = await get(server.port, "/readyz")
    assert (status, kind) == (503, "application/json; charset=utf-8")
    assert body == '{"ready": false, "failed": ["no peer reached", "state not caught up"]}'
    subject.failed = []
    status, _, body = await get(server.port, "/readyz")
    assert (status, body) == (200, '{"ready": true, "failed": []}')


async def test_nothing_else_is_served_when_asked_for(server: HealthServer) -> None:
    assert (await get(server.port, "/"))[0] == 404
    assert (await get(server.port, "/metrics/../../etc/passwd"))[0] == 404


async def test_writing_is_refused_when_tried(server: HealthServer) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://127.0.0.1:{server.port}/metrics", data=b"x" * 100_000) as response,
    ):
        assert response.status == 405


async def test_metrics_are_written_out_once_when_scraped_in_a_hurry(
    server: HealthServer, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PAGE_SECONDS", 60.0)
    for _ in range(10):
        await get(server.port, "/metrics")
    assert subject.pages == 1


async def test_metrics_are_written_out_again_when_the_page_is_old(
    server: HealthServer, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PAGE_SECONDS", 0.0)
    await get(server.port, "/metrics")
    subject.body = b"p2ptrain_global_step 42\n"
    assert (await get(server.port, "/metrics"))[2] == "p2ptrain_global_step 42\n"


@pytest.mark.parametrize("path", ["/livez", "/nowhere"])
async def test_connection_ends_after_one_answer_when_the_client_would_keep_it(
    server: HealthServer, path: str
) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    reader, writer = await say(server.port, request + request)
    heard = await ended(reader)
    assert heard.count(b"HTTP/1.1") == 1
    assert b"Connection: close" in heard
    writer.close()


async def test_request_is_refused_when_its_head_is_huge(server: HealthServer) -> None:
    reader, writer = await say(
        server.port, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nCookie: " + b"x" * 100_000 + b"\r\n\r\n"
    )
    assert (await ended(reader)).startswith(b"HTTP/1.0 400 ")
    writer.close()
    assert (await get(server.port, "/livez"))[0] == 200


async def test_client_is_cut_off_when_it_never_asks(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "CONNECTION_SECONDS", 0.05)
    async with HealthServer(subject.page, subject.failed_checks) as server:
        reader, writer = await say(server.port, b"GET /metr")
        assert await ended(reader) == b""
        writer.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # garbage of other tests
async def test_nothing_is_kept_or_logged_of_a_request_that_is_none(
    server: HealthServer, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        reader, writer = await say(server.port, b"GET /metrics HTTP/1.1\r\nX: " + b"y" * 100_000)
        await ended(reader)
        writer.close()
    await until(lambda: open_connections(server) == 0)
    gc.collect()
    kept = [each for each in gc.get_objects() if type(each) is web.RequestHandler]
    assert [each for each in kept if each._manager is server._runner.server] == []
    assert caplog.text == ""


async def test_others_are_served_when_a_scraper_hangs(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "CONNECTION_SECONDS", 0.3)
    subject.body = b"#" * 64 * 2**20  # far more than the kernel takes for a reader that does not read
    async with HealthServer(subject.page, subject.failed_checks) as server:
        _, writer = await say(server.port, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await get(server.port, "/livez"))[0] == 200
        assert subject.pages == 1
        await until(lambda: open_connections(server) == 0)
        writer.close()


async def test_end_comes_at_once_when_a_scraper_hangs(subject: Subject) -> None:
    subject.body = b"#" * 64 * 2**20
    loop = asyncio.get_running_loop()
    async with HealthServer(subject.page, subject.failed_checks) as server:
        _, writer = await say(server.port, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await until(lambda: subject.pages > 0)
        leaving = loop.time()
    assert loop.time() - leaving < 1.0
    writer.close()


async def test_connection_is_refused_when_too_many_are_open(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "MAX_CONNECTIONS", 3)
    idle = [await say(server.port, b"GET /") for _ in range(3)]
    await until(lambda: open_connections(server) == 3)
    reader, writer = await say(server.port, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert await ended(reader) == b""
    for _, each in [*idle, (reader, writer)]:
        each.close()
    await until(lambda: open_connections(server) == 0)
    assert (await get(server.port, "/livez"))[0] == 200


async def test_port_busy_says_where_and_what_to_do_when_taken(server: HealthServer, subject: Subject) -> None:
    with pytest.raises(PortBusy, match=f"metrics_port {server.port} on 127.0.0.1 .* set metrics_port"):
        async with HealthServer(subject.page, subject.failed_checks, port=server.port):
            pass


async def test_config_error_says_what_to_do_when_the_address_is_not_ours(subject: Subject) -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1.* set metrics_host"):
        async with HealthServer(subject.page, subject.failed_checks, host="192.0.2.1"):
            pass


async def test_port_is_free_again_when_the_server_has_ended(subject: Subject) -> None:
    async with HealthServer(subject.page, subject.failed_checks) as server:
        port = server.port
    async with HealthServer(subject.page, subject.failed_checks, port=port) as again:
        assert (await get(again.port, "/livez"))[0] == 200


def test_pages_are_served_and_signals_left_alone_when_the_loop_is_uvloop(subject: Subject) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    async def scenario() -> None:
        during = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        async with HealthServer(subject.page, subject.failed_checks) as server:
            assert (await get(server.port, "/metrics"))[0] == 200
            assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == during
        with pytest.raises(PortBusy):
            async with (
                HealthServer(subject.page, subject.failed_checks) as first,
                HealthServer(subject.page, subject.failed_checks, port=first.port),
            ):
                pass

    uvloop.run(scenario())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "127.0.0.1:9410"}, 200),
        ({"Host": "[::1]:9410"}, 200),
        ({"Host": "attacker.example"}, 403),
        ({"Host": "127.0.0.1.attacker.example"}, 403),
        ({"Origin": "https://attacker.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
)
async def test_page_is_read_by_no_other_site_through_a_visitors_browser(
    server: HealthServer, headers: dict[str, str], status: int
) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{server.port}/metrics", headers=headers) as response,
    ):
        assert response.status == status
        assert (b"p2ptrain" in await response.read()) is (status == 200)


async def test_page_has_any_name_when_it_is_served_to_others_anyway(subject: Subject) -> None:
    async with (
        HealthServer(subject.page, subject.failed_checks, host="0.0.0.0") as server,
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{server.port}/livez", headers={"Host": "lab"}) as response,
    ):
        assert response.status == 200
