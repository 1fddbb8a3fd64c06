"""A swarm that is only told of: the monitor's own picture and pages, fed with made-up events."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

from p2ptrain import PROTOCOL_VERSION
from p2ptrain.config import RunConfig
from p2ptrain.events import (
    AbortCause,
    Evaluated,
    Event,
    Paused,
    PauseReason,
    Previewed,
    RoundAborted,
    RoundCommitted,
)
from p2ptrain.records import PeerId, Position, Presence
from p2ptrain.telemetry.feed import Told
from peers.monitor_pages import Pages, Source, Updates
from peers.watching import Watch

HOSTILE = '<img src=x onerror="document.title=1">'
INVITE = "p2ptrain:" + "abc123" * 100


class Simulated:
    """So many peers, round after round."""

    def __init__(self, peers: int, seed: int = 0) -> None:
        self.chance = Random(seed)
        self.peers = [PeerId(f"12D3KooW{number:044d}") for number in range(peers)]
        self.watch, self.updates = Watch(), Updates()
        self.watch.run = RunConfig(run_id="simulated", total_steps=20_000, target_batch_size=16 * peers)
        self.step = 0

    def names(self, number: int) -> str:
        return HOSTILE if number == 1 else f"peer-{number}"

    def present(self, now: float) -> None:
        self.watch.present([self._presence(number) for number in range(len(self.peers))], [], now)

    def _presence(self, number: int) -> Presence:
        return Presence(
            peer=self.peers[number],
            role="train",
            name=self.names(number),
            protocol=PROTOCOL_VERSION,
            fingerprint="f" * 64,
            incarnation="1",
            position=Position(step=self.step, lineage="a" * 64, weight=1),
        )

    def tell(self, number: int, now: float, *events: Event, **status: Any) -> None:
        usual = {
            "state": "accumulating",
            "version": "0.1.0",
            "step": self.step,
            "hidden": False,
            "samples_per_second": 100.0 + number,
            "sent_bytes_per_second": 1e6,
            "received_bytes_per_second": 2e6,
        }
        happened = tuple((now, event) for event in events)
        self.watch.told(self.peers[number], Told("life", 0, 0, usual | status, happened), now)

    def committed(self, seconds: float) -> RoundCommitted:
        loss = 5.5 * math.exp(-self.step / 400) + 1.4 + self.chance.gauss(0, 0.03)
        share = self.chance.random() * 0.2
        return RoundCommitted(
            step=self.step,
            attempt=1,
            samples=16 * len(self.peers),
            mine=16,
            peers=len(self.peers),
            loss=loss,
            gradient_norm=0.5,
            learning_rate=0.001,
            compute_seconds=seconds * (0.6 - share),
            accumulate_seconds=seconds * 0.65,
            reduce_seconds=seconds * 0.25,
            commit_seconds=seconds * 0.04,
            apply_seconds=seconds * 0.06,
            lineage="a" * 64,
            digest="b" * 64,
        )

    def round(self, now: float, seconds: float = 1.0, members: int | None = None) -> None:
        """One more step, told by all, or by the first so many."""
        event = self.committed(seconds)
        for number in range(members or len(self.peers)):
            self.tell(number, now, event)
        self.step += 1

    def history(self, rounds: int, now: float, seconds: float = 1.0, members: int = 3) -> None:
        """Rounds that were, the last of them now."""
        for number in range(rounds):
            at = now - (rounds - number) * seconds
            self.round(at, seconds, members)
            if number % 50 == 0:
                bits = 8 * math.exp(-number / 500) + 1.9
                evaluation = Evaluated(
                    step=self.step,
                    loss=bits * math.log(2),
                    bits_per_byte=bits,
                    seconds=0.1,
                    zlib_bits_per_byte=2.08,
                )
                self.tell(
                    0, at, evaluation, Previewed(step=self.step, text=f"def f{number}(x):\n    return x\n")
                )
            if number % 97 == 96:
                cause = self.chance.choice(list(AbortCause))
                self.tell(
                    number % len(self.peers),
                    at,
                    RoundAborted(step=self.step, attempt=1, cause=cause, dropped=(), seconds=0.4 * seconds),
                )
        self.publish(now)

    def pause(self, number: int, now: float) -> None:
        self.tell(
            number,
            now,
            Paused(reasons=(PauseReason.USER,), seconds=None),
            state="paused",
            pauses=["you asked for it"],
        )

    def publish(self, now: float) -> None:
        """What the monitor does every moment."""
        if (changed := self.watch.changes(now)) is not None:
            self.updates.publish(changed)

    @asynccontextmanager
    async def served(self, port: int = 0) -> AsyncIterator[str]:
        """The page's address."""

        async def nobody(peer: str) -> bytes:
            raise KeyError(peer)

        source = Source(
            state=lambda: self.watch.snapshot(time.time()),
            timeline=self.watch.timeline,
            updates=self.updates,
            targets=lambda address: [],
            metrics=bytes,
            peer_metrics=nobody,
            failed_checks=list,
            invite=INVITE,
        )
        async with Pages(source, "127.0.0.1", port, public=False) as pages:
            yield f"http://127.0.0.1:{pages.port}/"
