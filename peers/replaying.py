"""A journal that is shown again, as a monitor would have shown it, and what that has in common with watching.

A peer's own journal is known by its events, a monitor's history by its kinds of lines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from p2ptrain import events
from p2ptrain.errors import StorageError
from p2ptrain.records import PeerId
from p2ptrain.telemetry.journal import read_journal
from p2ptrain.telemetry.swarm_metrics import SwarmMetrics
from peers.monitor_pages import Pages, Source, Updates
from peers.signals import Stop
from peers.watching import Json, Watch

HISTORY = "history.jsonl"
"""A monitor's own."""


@dataclass(frozen=True)
class Options:
    """How to serve."""

    host: str
    port: int
    public: bool
    folder: Path
    file_sd: Path | None
    share: str
    """Invite for the join box; empty: none."""


async def replay(path: Path, options: Options, ready: Callable[[str], None]) -> Json:
    """Serve the page for a journal of a peer, or for a monitor's history, as if it were now."""
    watch, last, count = story(path)
    source = Source(
        state=lambda: {**watch.snapshot(last), "replay": path.name},
        timeline=watch.timeline,
        updates=Updates(),
        targets=lambda address: [],
        metrics=SwarmMetrics().page,
        peer_metrics=_nobody,
        failed_checks=list,
    )
    with Stop() as stop:
        async with Pages(source, options.host, options.port, public=options.public) as pages:
            ready(address(options.host, pages.port))
            await stop.first()
    return {"journal": str(path), "records": count, "step": watch.step}


def story(path: Path) -> tuple[Watch, float, int]:
    """What a file tells, when it ends, and how many lines it has. Raises StorageError."""
    watch, last, count = Watch(), 0.0, 0
    if not path.exists():
        raise StorageError(
            f"there is no journal {path}; name a peer's journal.jsonl or a monitor's {HISTORY}"
        )
    for record in read_journal(path):
        last = max(last, _replayed(watch, record))
        count += 1
    if not watch.rows and not watch.log:
        raise StorageError(f"{path} holds no events; name a peer's journal.jsonl or a monitor's {HISTORY}")
    watch.settle(last + 3600)
    watch.kept = []
    return watch, last, count


def _replayed(watch: Watch, record: Mapping[str, Any]) -> float:
    """Fold one line of either kind of file in; its time, 0 if it has none."""
    if "kind" in record:
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            watch.restore(record)
        return watch.last_commit
    event, at = events.from_dict(record), _moment(record)
    if event is None or at is None:
        return 0.0
    # Whose journal it is only its first lines say.
    peer = event.peer if isinstance(event, events.Joined) else next(iter(watch.peers), "this peer")
    if peer != "this peer" and "this peer" in watch.peers:
        watch.peers[peer] = watch.peers.pop("this peer")
        watch.peers[peer].id = peer
    watch.event(PeerId(peer), at, event)
    return at


def _moment(record: Mapping[str, Any]) -> float | None:
    try:
        return datetime.fromisoformat(record["time"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None


async def _nobody(peer: str) -> bytes:
    raise KeyError(peer)


def address(host: str, port: int) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(  # noqa: S104 - for a link, nothing binds here
        host, f"[{host}]" if ":" in host else host
    )
    return f"http://{name}:{port}/"
