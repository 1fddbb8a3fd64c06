"""The organizer's bootstrap peer: a well-known address, the run file for whoever has an invite, and a DHT
node.

It trains nothing and decides nothing. If it dies, the swarm goes on, and newcomers can enter by any other
peer whose address they have; started again, it has the same identity and port.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import Callable
from pathlib import Path

from p2ptrain import PROTOCOL_VERSION
from p2ptrain.config import RunConfig, canonical_json, run_digest
from p2ptrain.records import (
    Averaged,
    Chunk,
    GetRun,
    Message,
    PeerId,
    Piece,
    Presence,
    Refusal,
    Reply,
    Request,
)
from p2ptrain.swarm.access import Invite, encode
from p2ptrain.swarm.libp2p import Libp2pSwarm
from p2ptrain.swarm.port import Buffer
from peers.places import made
from peers.signals import Stop

logger = logging.getLogger("p2ptrain")

DEFAULT_LISTEN = "/ip4/0.0.0.0/tcp/31337"
PRESENCE_SECONDS = 10.0


class _RunFile:
    """Answers the one question that a bootstrap peer is asked: what run is this?"""

    def __init__(self, run: RunConfig) -> None:
        self._run_json = canonical_json(run).encode()

    def on_message(self, sender: PeerId, message: Message) -> None:
        """No part in any round."""

    async def on_chunk(self, sender: PeerId, header: Chunk | Averaged, payload: bytes) -> None:
        """No part in any round."""

    def on_link(self, peer: PeerId, up: bool) -> None:
        """Peers come and go."""

    async def on_request(self, sender: PeerId, request: Request) -> tuple[Reply, Buffer]:
        if isinstance(request, GetRun):
            return Piece(), self._run_json
        return Refusal(reason="this is a bootstrap peer: it holds no state"), b""


async def bootstrap(
    run: RunConfig, listen: str, announce: tuple[str, ...], folder: Path, ready: Callable[[str], None]
) -> dict[str, object]:
    """Serve the run until a signal comes; `ready` is given the invite once peers can enter."""
    swarm = Libp2pSwarm(
        made(folder) / "bootstrap.key",
        run.run_id,
        listen=(listen,),
        announce=announce,
        on_event=lambda event: logger.log(event.level, event.sentence()),
    )
    with Stop() as stop:
        async with swarm:
            swarm.serve(_RunFile(run))
            invite = Invite(
                run_id=run.run_id,
                run_digest=run_digest(run),
                addresses=tuple(_entrances(swarm.visible_addresses())),
            )
            ready(encode(invite))
            presence = asyncio.create_task(_keep_present(swarm, run), name="presence")
            try:
                await stop.first()
            finally:
                presence.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await presence
            logger.info("leaving (%s); the swarm goes on without its bootstrap", stop.reason)
            return {"run_id": run.run_id, "peer": swarm.peer_id, "invite": encode(invite)}


def _entrances(addresses: list[str]) -> list[str]:
    """At most 8 addresses for the invite, those that others can reach first: loopback is for this machine
    only."""
    return sorted(addresses, key=lambda address: address.startswith(("/ip4/127.", "/ip6/::1")))[:8]


async def _keep_present(swarm: Libp2pSwarm, run: RunConfig) -> None:
    incarnation = secrets.token_hex(8)
    while True:
        record = Presence(
            peer=swarm.peer_id,
            role="bootstrap",
            name="bootstrap",
            protocol=PROTOCOL_VERSION,
            fingerprint=run_digest(run),
            incarnation=incarnation,
            position=None,
        )
        await swarm.publish(record, ttl_seconds=3 * PRESENCE_SECONDS)
        await asyncio.sleep(PRESENCE_SECONDS)


def print_invite(invite: str, as_json: bool, say: Callable[[str], None]) -> None:
    """What the organizer hands on."""
    if as_json:
        say(json.dumps({"event": "ready", "invite": invite}))
        return
    say("To let somebody in, send this command:\n")
    say(f"    p2ptrain join {invite}\n")
