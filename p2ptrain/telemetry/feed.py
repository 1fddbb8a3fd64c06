"""What a peer tells those who watch it: its last events, how it stands, and its metrics page.

A watcher asks again and again (`records.GetEvents`), each time for what it has not seen; the answer waits
until there is something, so a watcher hears of an event within a moment and costs next to nothing otherwise.
The answer is one JSON object of at most `MAX_ANSWER_BYTES`:

    {"life": "…", "next": 42, "lost": 0, "status": {…}, "events": [{"time": "…", "event": "…", …}, …]}

`next` is to be asked for `after`; `lost` counts events that were no longer there. Whoever reads it must
expect lies: `read_answer` checks all of it.

Not covered: a whole history, which is in the peer's journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePath
from typing import Any

from p2ptrain.errors import BadMessage
from p2ptrain.events import CheckpointFailed, Event, Leaving, StateHashed, clean, from_dict
from p2ptrain.records import MAX_ROSTER, GetEvents, GetMetrics, PeerId, Piece, Refusal, Reply, Request
from p2ptrain.telemetry.journal import shown_moment

MAX_EVENTS = 2048
"""That are kept."""
MAX_ANSWER_BYTES = 256 * 1024
MAX_ANSWERED = 400
"""Events in one answer."""
GATHER_SECONDS = 0.2
"""After the first event, before the answer: steps may be many in a second."""
MAX_WATCHERS = 32
"""That wait at one time: monitors, and peers whose page is read just now."""
PAGE_SECONDS = 1.0
"""A metrics page this fresh is given again as it is."""
MAX_PAGE_BYTES = 512 * 1024

Answer = tuple[Reply, bytes]


class Feed:
    """Keeps one peer's last events for those who watch, and answers them."""

    def __init__(
        self,
        status: Callable[[], Mapping[str, Any]],
        metrics: Callable[[], bytes],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`status`: how the peer stands, as JSON values that may be told to everybody in the run."""
        self.life = secrets.token_hex(8)
        self._status, self._metrics, self._clock = status, metrics, clock
        self._events: deque[bytes] = deque(maxlen=MAX_EVENTS)
        self._next = 0
        self._more = asyncio.Event()
        self._leaves = asyncio.Event()
        """That this peer leaves is told at once, or it would be gone before."""
        self._watchers = 0
        self._cached, self._cached_until = b"", float("-inf")

    def observe(self, event: Event) -> None:
        """Keep what happened, less what is nobody else's business."""
        if isinstance(event, StateHashed):
            return  # of every step, and told by the commit
        record = {"time": shown_moment(self._clock()), **event.to_dict()}
        if "path" in record:
            record["path"] = PurePath(record["path"]).name
        if isinstance(event, CheckpointFailed):
            record["reason"] = "see this peer's own log"
        self._events.append(json.dumps(record, separators=(",", ":")).encode())
        self._next += 1
        self._more.set()
        if isinstance(event, Leaving):
            self._leaves.set()

    async def answer(self, sender: PeerId, request: Request) -> Answer:
        """The reply to a watcher's request, and its payload."""
        match request:
            case GetMetrics():
                return Piece(), self.page()
            case GetEvents() if self._watchers >= MAX_WATCHERS:
                return Refusal(reason=f"more than {MAX_WATCHERS} watch this peer already"), b""
            case GetEvents():
                self._watchers += 1
                try:
                    await self._wait(request)
                finally:
                    self._watchers -= 1
                return Piece(), self._since(request)
            case _:
                return Refusal(reason="this is no question of a watcher"), b""

    async def _wait(self, request: GetEvents) -> None:
        if request.life != self.life or request.after < self._next or not request.wait_seconds:
            return
        self._more.clear()
        try:
            async with asyncio.timeout(request.wait_seconds):
                await self._more.wait()
        except TimeoutError:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GATHER_SECONDS):
                await self._leaves.wait()

    def _since(self, request: GetEvents) -> bytes:
        after = request.after if request.life == self.life else 0
        first = max(after, self._next - len(self._events))
        status = json.dumps(self._status(), separators=(",", ":"), allow_nan=False).encode()
        chosen: list[bytes] = []
        size = len(status) + 256
        for number in range(first, min(self._next, first + MAX_ANSWERED)):
            line = self._events[number - self._next + len(self._events)]
            size += len(line) + 1
            if size > MAX_ANSWER_BYTES:
                break
            chosen.append(line)
        head = {"life": self.life, "next": first + len(chosen), "lost": first - after}
        return b'%s,"status":%s,"events":[%s]}' % (
            json.dumps(head, separators=(",", ":"))[:-1].encode(),
            status,
            b",".join(chosen),
        )

    def page(self) -> bytes:
        """The peer's metrics, written out at most once a second."""
        now = asyncio.get_running_loop().time()
        if now >= self._cached_until:
            self._cached, self._cached_until = self._metrics(), now + PAGE_SECONDS
        return self._cached


@dataclass(frozen=True)
class Told:
    """What a watched peer said of itself; nothing of it is proven but who said it."""

    life: str
    next: int
    lost: int
    status: Mapping[str, Any]
    """Only keys and kinds of values that `STATUS` names."""
    events: tuple[tuple[float, Event], ...]
    """Each with its time by that peer's clock, in Unix time."""


STATUS: Mapping[str, type | tuple[type, ...]] = {
    "state": str,
    "version": str,
    "device": str,
    "waiting": str,
    "step": int,
    "rounds": int,
    "samples": int,
    "hidden": bool,
    "direct": int,
    "relay": int,
    "sent_bytes_per_second": (int, float),
    "received_bytes_per_second": (int, float),
    "samples_per_second": (int, float),
    "seconds": (int, float),
    "pauses": list,
}
"""What a status may hold."""
MAX_TEXT = 4000
MAX_STATUS_TEXT = 200
MAX_PAUSES = 8


def read_answer(payload: bytes) -> Told:
    """What a peer answered to `GetEvents`. Raises BadMessage for anything that `Feed` would not have said.

    Events of kinds that this version does not know are passed over.
    """
    try:
        answer = json.loads(payload)
        life, following, lost = answer["life"], answer["next"], answer["lost"]
        status, records = answer["status"], answer["events"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadMessage("an answer to a watcher that is no such JSON") from None
    fine = (
        isinstance(life, str)
        and len(life) <= 32
        and all(type(number) is int and 0 <= number < 2**53 for number in (following, lost))
        and isinstance(status, dict)
        and isinstance(records, list)
        and len(records) <= MAX_ANSWERED
    )
    if not fine:
        raise BadMessage("an answer to a watcher with values out of bounds")
    events = []
    for record in records:
        event = from_dict(record) if isinstance(record, dict) else None
        moment = _time(record) if event is not None else None
        if event is not None and moment is not None and _is_bounded(event):
            events.append((moment, event))
    return Told(life, following, lost, _known(status), tuple(events))


def _known(status: Mapping[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for name, kind in STATUS.items():
        value = status.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            continue
        match value:
            case str():
                known[name] = clean(value, MAX_STATUS_TEXT)
            case list():
                pauses = [each for each in value[:MAX_PAUSES] if isinstance(each, str)]
                known[name] = [clean(each, MAX_STATUS_TEXT) for each in pauses]
            case bool():
                known[name] = value
            case int() | float() if abs(value) < 2**53:  # NaN is not
                known[name] = value
    return known


def _time(record: Mapping[str, Any]) -> float | None:
    try:
        return datetime.fromisoformat(record["time"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _is_bounded(event: Event) -> bool:
    """Whether no number or text in it is larger than an honest one would be."""
    for value in vars(event).values():
        match value:
            case str() if len(value) > MAX_TEXT:
                return False
            case int() if not 0 <= value < 2**53:
                return False
            case float() if abs(value) > 1e15:
                return False
            case tuple() if len(value) > MAX_ROSTER or any(len(str(each)) > MAX_TEXT for each in value):
                return False
            case _:
                pass
    return True
