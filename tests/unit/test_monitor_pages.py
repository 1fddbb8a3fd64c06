"""What the monitor serves, over real HTTP on loopback, asked politely and otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from p2ptrain.errors import ConfigError, PortBusy, Unreachable
from peers import monitor_pages as module
from peers.monitor_pages import PAGE, Pages, Source, Updates


async def peer_metrics(peer: str) -> bytes:
    if peer == "away":
        raise Unreachable("peer …away ended the stream")
    return {"anna": b"p2ptrain_global_step 7\n"}[peer]


def source(updates: Updates | None = None, failed: list[str] | None = None, invite: str = "") -> Source:
    return Source(
        state=lambda: {"all": True, "now": 0, "name": "</script><b>"},
        timeline=lambda until, count: [[until, count]],
        updates=updates or Updates(),
        targets=lambda address: [{"targets": [address], "labels": {}}],
        metrics=lambda: b"p2ptrain_swarm_global_step 7\n",
        peer_metrics=peer_metrics,
        failed_checks=lambda: failed or [],
        invite=invite,
    )


@pytest.fixture
async def updates() -> Updates:
    return Updates()


@pytest.fixture
async def pages(updates: Updates) -> AsyncIterator[Pages]:
    async with Pages(source(updates, invite="p2ptrain:abc"), "127.0.0.1", 0, public=False) as pages:
        yield pages


async def get(pages: Pages, path: str, **headers: str) -> tuple[int, str, aiohttp.ClientResponse]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{pages.port}{path}", headers=headers) as response,
    ):
        return response.status, await response.text(), response


@pytest.mark.parametrize("path", PAGE)
async def test_file_of_the_page_is_served_with_its_policy(pages: Pages, path: str) -> None:
    status, text, response = await get(pages, path)
    assert (status, response.content_type) == (200, PAGE[path][1])
    assert text.strip()
    assert response.headers["Content-Security-Policy"].startswith("default-src 'self'; ")
    assert "unsafe" not in response.headers["Content-Security-Policy"]
    assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_page_names_only_files_that_are_served(pages: Pages) -> None:
    _, html, _ = await get(pages, "/")
    named = set(re.findall(r'(?:src|href)="(/[^"]*)"', html))
    for path in ("/app.js", "/charts.js", "/timeline.js", "/story.js"):
        _, script, _ = await get(pages, path)
        named |= set(re.findall(r'from "(/[^"]*)"', script))
        assert "innerHTML" not in script
    assert named <= set(PAGE)
    assert not re.search(r'(src|href)="(https?:)?//', html)
    assert "<script>" not in html
    assert " style=" not in html


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:9411", "127.0.0.1.evil.example", "[::2]", "a@b:x"]
)
async def test_foreign_host_is_refused_when_the_monitor_is_for_this_machine(pages: Pages, host: str) -> None:
    for path in ("/", "/api/v1/state", "/metrics", "/nowhere"):
        status, text, _ = await get(pages, path, Host=host)
        assert status == 403
        assert "script" not in text


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "[::1]:9411"])
async def test_name_of_this_machine_is_answered(pages: Pages, host: str) -> None:
    assert (await get(pages, "/livez", Host=host))[0] == 200


async def test_request_of_another_page_is_refused_everywhere(pages: Pages) -> None:
    here = f"127.0.0.1:{pages.port}"
    assert (await get(pages, "/api/v1/state", Origin=f"http://{here}"))[0] == 200
    for origin in ("http://evil.example", "null", f"http://{here}.evil.example", "http://127.0.0.1:1"):
        assert (await get(pages, "/api/v1/state", Origin=origin))[0] == 403
    async with Pages(source(), "127.0.0.1", 0, public=True) as public:
        assert (await get(public, "/api/v1/state", Host="swarm.example"))[0] == 200
        assert (await get(public, "/api/v1/state", Host="swarm.example", Origin="http://evil"))[0] == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_nothing_can_be_written(pages: Pages, method: str) -> None:
    async with aiohttp.ClientSession() as session:
        for path in ("/", "/api/v1/state", "/metrics"):
            async with session.request(method, f"http://127.0.0.1:{pages.port}{path}", data=b"x") as response:
                assert response.status == 405


@pytest.mark.parametrize(
    "path", ["/nowhere", "/../pyproject.toml", "/%2e%2e/app.py", "/vendor/LICENSE", "/peers//metrics"]
)
async def test_nothing_else_is_served(pages: Pages, path: str) -> None:
    assert (await get(pages, path))[0] == 404


async def test_service_discovery_keeps_the_contract_of_prometheus(pages: Pages) -> None:
    status, text, response = await get(pages, "/api/v1/sd")
    assert (status, response.content_type) == (200, "application/json")
    assert json.loads(text) == [{"targets": [f"127.0.0.1:{pages.port}"], "labels": {}}]


async def test_peer_s_metrics_are_passed_on_or_refused_with_the_reason(pages: Pages) -> None:
    status, text, response = await get(pages, "/peers/anna/metrics")
    assert (status, text) == (200, "p2ptrain_global_step 7\n")
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert (await get(pages, "/peers/bert/metrics"))[0] == 404
    status, text, _ = await get(pages, "/peers/away/metrics")
    assert (status, text) == (502, "peer …away ended the stream\n")


async def test_readiness_names_what_fails() -> None:
    async with Pages(source(failed=["nobody seen"]), "127.0.0.1", 0, public=False) as pages:
        assert (await get(pages, "/livez"))[0] == 200
        status, text, _ = await get(pages, "/readyz")
        assert (status, json.loads(text)) == (503, {"ready": False, "failed": ["nobody seen"]})


async def test_invite_is_in_the_join_box_and_its_code(pages: Pages) -> None:
    _, text, _ = await get(pages, "/api/v1/state")
    assert json.loads(text)["invite"] == "p2ptrain:abc"
    status, code, response = await get(pages, "/qr.svg")
    assert (status, response.content_type) == (200, "image/svg+xml")
    assert 'xmlns="http://www.w3.org/2000/svg"' in code
    async with Pages(source(), "127.0.0.1", 0, public=True) as without:
        assert (await get(without, "/qr.svg"))[0] == 404


@pytest.mark.parametrize("query", ["", "?until=x", "?until=1&count=x"])
async def test_timeline_says_what_is_wrong_when_the_question_is(pages: Pages, query: str) -> None:
    assert (await get(pages, f"/api/v1/timeline{query}"))[0] == 400
    _, text, _ = await get(pages, "/api/v1/timeline?until=41&count=9999")
    assert json.loads(text) == {"parts": [[41, 500]]}


# -- events --------------------------------------------------------------------------------------------------


async def events(pages: Pages, count: int, last: str = "") -> list[tuple[str, Any]]:
    """The first of what a page is told that had heard up to `last`."""
    found: list[tuple[str, Any]] = []
    headers = {"Last-Event-ID": last} if last else {}
    async with (
        asyncio.timeout(5),
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{pages.port}/api/v1/events", headers=headers) as response,
    ):
        assert response.content_type == "text/event-stream"
        identifier = ""
        while len(found) < count:
            line = (await response.content.readline()).decode().strip()
            if line.startswith("id: "):
                identifier = line.removeprefix("id: ")
            elif line.startswith("data: "):
                found.append((identifier, json.loads(line.removeprefix("data: "))))
    return found


async def test_page_goes_on_where_it_was_when_its_connection_broke(pages: Pages, updates: Updates) -> None:
    for number in range(5):
        updates.publish({"number": number})
    ((first, everything),) = await events(pages, 1)
    assert everything["all"], "who comes new is told everything"
    assert first == updates.last
    updates.publish({"number": 5})
    updates.publish({"number": 6})
    assert [update for _, update in await events(pages, 2, first)] == [{"number": 5}, {"number": 6}]


async def test_update_comes_at_once_when_it_is_published(pages: Pages, updates: Updates) -> None:
    waiting = asyncio.create_task(events(pages, 1, updates.last))
    while not pages._listening:  # noqa: ASYNC110
        await asyncio.sleep(0)
    updates.publish({"number": 1})
    assert (await waiting)[0][1] == {"number": 1}


@pytest.mark.parametrize(
    "last", ["other-3", "nonsense", "-1", "x" * 500, "{life}-99999999999999999999", "{life}-77"]
)
async def test_page_is_told_everything_when_what_it_heard_is_unknown(
    pages: Pages, updates: Updates, last: str
) -> None:
    updates.publish({"number": 1})
    life = updates.last.split("-")[0]
    assert (await events(pages, 1, last.format(life=life)))[0][1]["all"]


async def test_page_is_told_everything_when_it_was_away_too_long(pages: Pages, updates: Updates) -> None:
    begin = updates.last
    for number in range(module.REMEMBERED + 1):
        updates.publish({"number": number})
    assert updates.after(begin) is None
    assert (await events(pages, 1, begin))[0][1]["all"]


async def test_one_page_too_many_is_asked_to_come_later(
    pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_LISTENERS", 0)
    status, _, response = await get(pages, "/api/v1/events")
    assert (status, response.headers["Retry-After"]) == (503, "30")


async def test_end_comes_at_once_when_a_page_follows(updates: Updates) -> None:
    loop = asyncio.get_running_loop()
    async with Pages(source(updates), "127.0.0.1", 0, public=False) as pages:
        following = asyncio.create_task(events(pages, 5))
        while not pages._listening:  # noqa: ASYNC110
            await asyncio.sleep(0)
        leaving = loop.time()
    assert loop.time() - leaving < 2
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


async def test_port_that_is_taken_is_named(pages: Pages) -> None:
    with pytest.raises(PortBusy, match=f"port {pages.port} .* choose another --port"):
        async with Pages(source(), "127.0.0.1", pages.port, public=False):
            pass
    with pytest.raises(ConfigError, match="choose another --host"):
        async with Pages(source(), "192.0.2.1", 0, public=False):
            pass


async def test_connection_that_asks_nothing_is_cut_and_one_that_has_asked_is_not(
    updates: Updates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUESTION_SECONDS", 0.1)
    async with Pages(source(updates), "127.0.0.1", 0, public=False) as pages:
        silent = [await asyncio.open_connection("127.0.0.1", pages.port) for _ in range(3)]
        silent[1][1].write(b"GET / HTTP/1.1\r\nHost: 127")  # and never the rest
        following = asyncio.create_task(events(pages, 2))
        for reader, writer in silent:
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
        updates.publish({"number": 1})
        assert len(await following) == 2
