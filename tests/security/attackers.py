"""What hostile behaviours are made of: nodes of one's own that lie about their pass, and bare connections."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from p2ptrain.errors import PeerFault, Refused
from p2ptrain.records import (
    Direct,
    GetEntry,
    GetManifest,
    GetPiece,
    GetRun,
    Pass,
    PeerId,
    Presence,
    Request,
)
from p2ptrain.swarm.certificate import make_credentials
from p2ptrain.swarm.gate import Gate
from p2ptrain.swarm.identity import Identity
from p2ptrain.swarm.libp2p import Libp2pSwarm

Kept = tuple[bytes, float]
PATIENCE_SECONDS = 6.0
NOTHING = "0" * 64


class Forced(Gate):
    """Shows what it was given, and lets in everybody."""

    def flaw(self, peer: PeerId, shown: Pass | None, *, any_run: bool = False) -> str:
        return ""


@asynccontextmanager
async def node(
    run_id: str, addresses: Iterable[str], shown: Callable[[PeerId], Pass] | None = None
) -> AsyncIterator[Libp2pSwarm]:
    """A node of one's own in the run's libp2p network. It shows that pass, or none, and says that it trains
    what those there do."""
    with tempfile.TemporaryDirectory() as folder:
        swarm = Libp2pSwarm(
            Path(folder) / "key", run_id, initial_peers=list(addresses), listen=["/ip4/127.0.0.1/tcp/0"]
        )
        async with swarm:
            there = await known(swarm)
            if shown is not None:
                swarm.gate = swarm._lanes.gate = Forced(shown(swarm.peer_id), swarm.peer_id)
            swarm.adopt(there.fingerprint)
            yield swarm


async def known(swarm: Libp2pSwarm) -> Presence:
    """A peer that trains, as the DHT tells everybody."""
    async with asyncio.timeout(30):
        while True:
            for record in await swarm.lookup("presence"):
                if isinstance(record, Presence) and record.role == "train" and record.position is not None:
                    return record
            await asyncio.sleep(0.2)


async def directs(swarm: Libp2pSwarm) -> dict[PeerId, Direct]:
    """Where peers take TLS connections."""
    there = [each for each in await swarm.lookup("presence") if isinstance(each, Presence)]
    return {each.peer: each.direct for each in there if each.direct is not None}


async def ask_for_all(swarm: Libp2pSwarm, peers: Iterable[PeerId]) -> dict[str, int]:
    """Ask each for what a peer gives, and count what comes."""
    told = {"asked": 0, "refused": 0, "answered": 0}
    questions: list[Request] = [
        GetRun(),
        GetManifest(),
        GetEntry(step=1),
        GetPiece(state_digest=NOTHING, number=0),
    ]
    for peer in peers:
        for question in questions:
            told["asked"] += 1
            try:
                await swarm.request(peer, question, timeout_seconds=PATIENCE_SECONDS, max_bytes=2**26)
            except Refused:
                told["refused"] += 1
            except PeerFault:
                pass
            else:
                told["answered"] += 1
    return told


@asynccontextmanager
async def stream(swarm: Libp2pSwarm, peer: PeerId, kind: Any = "control") -> AsyncIterator[Any]:
    """A bare libp2p stream: reader and writer, and nothing said on it."""
    reader, writer = await swarm._open_stream(peer, kind, PATIENCE_SECONDS)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def hangs_up(reader: asyncio.StreamReader, seconds: float) -> bool:
    """Whether the other side ends it within so long, whatever it says before."""
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(seconds):
            while await reader.read(65536):
                pass
            return True
        return False
    return True


async def keep(work: Callable[[], Awaitable[Any]], seconds: float) -> int:
    """Do it over and over for so long, whatever becomes of it; how often."""
    loop, count = asyncio.get_running_loop(), 0
    deadline = loop.time() + seconds
    while loop.time() < deadline:
        with contextlib.suppress(OSError, EOFError, PeerFault, asyncio.IncompleteReadError):
            async with asyncio.timeout(max(0.1, deadline - loop.time())):
                await work()
        count += 1
        await asyncio.sleep(0)
    return count


async def tcp(host: str, port: int, *, tls: bool = False) -> Any:
    """A bare connection; with a certificate of one's own, if it is for TLS."""
    context: ssl.SSLContext | None = make_credentials().client if tls else None
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await asyncio.open_connection(host, port, ssl=context, server_hostname="" if tls else None)


def frame(header: bytes, payload_bytes: int = 0) -> bytes:
    """Whatever is to pass for one."""
    return struct.pack(">II", len(header), payload_bytes) + header


async def bring(
    swarm: Libp2pSwarm,
    peer: PeerId,
    kind: str,
    items: Iterable[tuple[Any, bytes, float]],
    *,
    plain: bool = False,
) -> list[bool] | None:
    """Have the peer's DHT node keep (author, value, expires), as hivemind's own node would; None if it does
    not answer."""
    node, items = swarm._node, list(items)
    assert node is not None
    key = swarm._keys[kind]
    authors, values, expires = ([each[place] for each in items] for place in range(3))
    answer = await node.dht.protocol.call_store(
        node.p2p.peer_id.from_base58(peer), [key] * len(items), values, expires, None if plain else authors
    )
    return None if answer is None else list(answer)


def sealed(identity: Identity, swarm: Libp2pSwarm, kind: str, text: bytes, expires: float) -> bytes:
    """A record's value, signed, as it is stored."""
    from hivemind.utils import MSGPackSerializer

    from p2ptrain.swarm.validator import seal

    return bytes(MSGPackSerializer.dumps(seal(identity, swarm._keys[kind].to_bytes(), text, expires)))
