"""How fast the way to another peer is, both ways, before there is a round to measure it by.

One asks the other for bytes of nothing, and to be asked for some. What opening a stream takes is measured
first, with a single byte, and taken off. Nobody sends more than 4 MB for one question, or asks two back at
once.

Not covered: TCP's own time to get up to speed; a round, which lasts longer, may be faster than this.
"""

from __future__ import annotations

import asyncio
import time

from p2ptrain.errors import BadMessage, PeerFault
from p2ptrain.records import (
    MAX_PROBE_BYTES,
    Averaged,
    Chunk,
    Later,
    Message,
    PeerId,
    Piece,
    Probe,
    Probed,
    Refusal,
    Reply,
    Request,
)
from p2ptrain.swarm.port import Buffer, Swarm

PROBE_SECONDS = 8.0
"""For one answer."""
FIRST_BYTES = 64 * 1024
AIM_SECONDS = 1.0
"""Of sending, by what the first bytes took."""
LEAST_SECONDS = 1e-3
"""What cannot be told from nothing."""


class Prober:
    """Answers probes, and nothing else."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._busy = asyncio.Lock()

    def on_message(self, sender: PeerId, message: Message) -> None:
        """No part in any round."""

    async def on_chunk(self, sender: PeerId, header: Chunk | Averaged, payload: Buffer) -> None:
        """No part in any round."""

    def place(self, sender: PeerId, header: Chunk | Averaged, size: int) -> memoryview | None:
        return None

    def on_link(self, peer: PeerId, up: bool) -> None:
        """Peers come and go."""

    async def on_request(self, sender: PeerId, request: Request) -> tuple[Reply, Buffer]:
        if not isinstance(request, Probe):
            return Refusal(reason="this peer only measures how fast it is"), b""
        return await self.answer(sender, request)

    async def answer(self, sender: PeerId, probe: Probe) -> tuple[Reply, Buffer]:
        """The bytes, or how long those of the other took."""
        if not probe.back:
            return Piece(), bytes(probe.size_bytes)
        if self._busy.locked():
            return Later(seconds=PROBE_SECONDS), b""
        async with self._busy:
            try:
                return Probed(seconds=await _fetch(self._swarm, sender, probe.size_bytes)), b""
            except PeerFault as fault:
                return Refusal(reason=f"you could not be asked back: {fault}"[:300]), b""


async def measure(swarm: Swarm, peer: PeerId) -> tuple[float, float, float]:
    """(bytes per second to it, from it, seconds there and back). Raises PeerFault."""
    opening = await _fetch(swarm, peer, 1)
    down = await _rate(swarm, peer, opening, back=False)
    up = await _rate(swarm, peer, await _send(swarm, peer, 1), back=True)
    return up, down, opening / 2  # a stream takes two round trips: its opening, and the answer


async def _rate(swarm: Swarm, peer: PeerId, opening: float, *, back: bool) -> float:
    size = FIRST_BYTES
    for _ in range(2):
        took = await (_send if back else _fetch)(swarm, peer, size)
        rate = size / max(took - opening, LEAST_SECONDS)
        if took - opening >= AIM_SECONDS / 2:
            break
        size = int(min(max(rate * AIM_SECONDS, FIRST_BYTES), MAX_PROBE_BYTES))
    return rate


async def _fetch(swarm: Swarm, peer: PeerId, size_bytes: int) -> float:
    """Seconds that so many bytes took to come from there."""
    began = time.monotonic()
    reply, payload = await swarm.request(
        peer, Probe(size_bytes=size_bytes), timeout_seconds=PROBE_SECONDS, max_bytes=size_bytes
    )
    if not isinstance(reply, Piece) or len(payload) != size_bytes:
        raise BadMessage(f"a probe for {size_bytes} bytes was answered by a {reply.kind} of {len(payload)}")
    return time.monotonic() - began


async def _send(swarm: Swarm, peer: PeerId, size_bytes: int) -> float:
    """Seconds that so many bytes took to get there, as they say."""
    probe = Probe(size_bytes=size_bytes, back=True)
    reply, _ = await swarm.request(peer, probe, timeout_seconds=2 * PROBE_SECONDS, max_bytes=0)
    if not isinstance(reply, Probed):
        raise BadMessage(f"a probe was answered by a {reply.kind}")
    return reply.seconds
