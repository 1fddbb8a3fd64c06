"""What a peer tells who watches it, and what a watcher believes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import pytest
from event_examples import ABORTED, COMMITTED, ONE_OF_EACH, SAVED

from p2ptrain.errors import BadMessage
from p2ptrain.events import Leaving
from p2ptrain.records import GetEvents, GetMetrics, GetRun, PeerId, Piece, Refusal
from p2ptrain.telemetry import feed as module
from p2ptrain.telemetry.feed import MAX_ANSWER_BYTES, MAX_EVENTS, Feed, read_answer

WATCHER = PeerId("12D3KooWatcher")


@pytest.fixture
def feed() -> Feed:
    return Feed(lambda: {"state": "paused", "step": 42}, lambda: b"a page", clock=lambda: 1_800_000_000.0)


async def ask(feed: Feed, **question: Any) -> tuple[Any, bytes]:
    return await feed.answer(WATCHER, GetEvents(**question))


async def test_watcher_is_told_what_happened_when_it_asks(feed: Feed) -> None:
    feed.observe(COMMITTED)
    feed.observe(ABORTED)
    reply, payload = await ask(feed)
    told = read_answer(payload)
    assert isinstance(reply, Piece)
    assert [event for _, event in told.events] == [COMMITTED, ABORTED]
    assert told.events[0][0] == 1_800_000_000.0
    assert told.status == {"state": "paused", "step": 42}
    again = read_answer((await ask(feed, life=told.life, after=told.next))[1])
    assert again.events == ()


async def test_answer_waits_for_an_event_when_there_is_none(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GATHER_SECONDS", 0)
    asking = asyncio.create_task(ask(feed, life=feed.life, after=0, wait_seconds=30))
    await asyncio.sleep(0)
    feed.observe(COMMITTED)
    assert len(read_answer((await asking)[1]).events) == 1


async def test_answer_comes_at_once_when_the_peer_leaves(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GATHER_SECONDS", 1000)
    asking = asyncio.create_task(ask(feed, life=feed.life, after=0, wait_seconds=30))
    await asyncio.sleep(0)
    feed.observe(Leaving(step=42, reason="Ctrl-C", rounds=3, samples=30))
    assert len(read_answer((await asyncio.wait_for(asking, 5))[1]).events) == 1


async def test_answer_comes_in_time_when_nothing_happens(feed: Feed) -> None:
    told = read_answer((await ask(feed, life=feed.life, after=0, wait_seconds=0.001))[1])
    assert told.events == ()


async def test_lost_events_are_counted_when_a_watcher_comes_late(feed: Feed) -> None:
    for _ in range(MAX_EVENTS + 10):
        feed.observe(COMMITTED)
    told = read_answer((await ask(feed, life=feed.life, after=3))[1])
    assert told.lost == 7
    assert told.next == 10 + module.MAX_ANSWERED


async def test_all_comes_in_pieces_when_events_are_long(feed: Feed) -> None:
    long = dataclasses.replace(ABORTED, dropped=tuple(PeerId("x" * 60) for _ in range(60)))
    for _ in range(200):
        feed.observe(long)
    life, after, got = "", 0, 0
    while after < 200:
        _, payload = await ask(feed, life=life, after=after)
        assert len(payload) <= MAX_ANSWER_BYTES
        told = read_answer(payload)
        life, after, got = told.life, told.next, got + len(told.events)
    assert got == 200


async def test_nobody_learns_where_files_are_when_told_of_a_checkpoint(feed: Feed) -> None:
    feed.observe(dataclasses.replace(SAVED, path="/home/anna/secret/step-00000042"))
    _, payload = await ask(feed)
    assert b"anna" not in payload
    assert b"step-00000042" in payload


async def test_one_watcher_too_many_is_refused_when_all_wait(feed: Feed) -> None:
    waiting = [
        asyncio.create_task(ask(feed, life=feed.life, wait_seconds=30)) for _ in range(module.MAX_WATCHERS)
    ]
    await asyncio.sleep(0)
    reply, _ = await ask(feed)
    assert isinstance(reply, Refusal)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance((await ask(feed))[0], Piece)


async def test_metrics_are_written_out_once_when_asked_for_in_a_hurry() -> None:
    pages: list[None] = []
    feed = Feed(dict, lambda: pages.append(None) or b"page")  # type: ignore[func-returns-value]
    for _ in range(5):
        assert (await feed.answer(WATCHER, GetMetrics()))[1] == b"page"
    assert len(pages) == 1
    assert isinstance((await feed.answer(WATCHER, GetRun()))[0], Refusal)


async def test_every_event_arrives_as_it_was_when_told(feed: Feed) -> None:
    for event in ONE_OF_EACH:
        feed.observe(event)
    told = read_answer((await ask(feed))[1])
    names = {event.event for _, event in told.events}
    assert names == {event.event for event in ONE_OF_EACH} - {"state_hashed"}


def answer(**changes: Any) -> bytes:
    fine = {"life": "a", "next": 1, "lost": 0, "status": {}, "events": []}
    return json.dumps(fine | changes).encode()


@pytest.mark.parametrize(
    "lie",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        answer(next=-1),
        answer(next=True),
        answer(next=2**60),
        answer(life=7),
        answer(life="x" * 40),
        answer(status=[]),
        answer(events={}),
        answer(events=[{}] * 1000),
        answer(lost=1.5),
    ],
)
def test_answer_is_refused_when_it_is_none_that_a_feed_gives(lie: bytes) -> None:
    with pytest.raises(BadMessage):
        read_answer(lie)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 10**400},
        {"step": -1},
        {"step": "41"},
        {"samples": 2**60},
        {"lineage": "x" * 10_000},
        {"gradient_norm": 1e300},
        {"time": "yesterday"},
        {"time": 5},
        {"time": "9999999-01-01"},
        {"event": "no_such_event"},
        {"peers": None},
    ],
)
def test_event_is_passed_over_when_it_is_out_of_bounds(change: dict[str, Any]) -> None:
    record = {"time": "2027-01-01T00:00:00.000Z", **COMMITTED.to_dict()}
    assert len(read_answer(answer(events=[record])).events) == 1
    assert read_answer(answer(events=[record | change])).events == ()


def test_status_keeps_what_it_may_hold_when_there_is_more() -> None:
    status = {
        "state": "x" * 1000,
        "step": 5,
        "hidden": 1,
        "samples": True,
        "seconds": float("inf"),
        "waiting": "a\nb",
        "pauses": ["you asked\x00", 7, *["more"] * 50],
        "data_dir": "/home",
    }
    known = read_answer(answer(status=status)).status
    assert set(known) == {"state", "step", "waiting", "pauses"}
    assert len(known["state"]) == 200
    assert known["waiting"] == "a�b"
    assert known["pauses"][0] == "you asked�"
    assert len(known["pauses"]) == 7
