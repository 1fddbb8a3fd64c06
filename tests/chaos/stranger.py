"""Somebody who found the peers' addresses and was not let in: asks for all that a peer gives, and tells what
came.

    python -m tests.chaos.stranger RUN_ID GUISES ADDRESS…

Each address ends in `/p2p/` and a peer id. `GUISES` is a JSON object: name → null, to show nothing, or
`[INVITE, PEER_ID]`, to show that invite as that peer would (empty: as itself), whether or not it still holds.
In each guise it is a new peer that speaks the protocol, and says that it trains what those peers train, for
that is in the DHT for all to read. It prints one JSON object: name → `asked`, `refused`, `answered`, `bytes`.
Not covered: a stranger who stands between two peers.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path

from p2ptrain.errors import PeerFault, Refused
from p2ptrain.records import (
    GetEntry,
    GetManifest,
    GetPiece,
    GetRun,
    Manifest,
    Pass,
    PeerId,
    Presence,
    Request,
)
from p2ptrain.swarm.access import decode
from p2ptrain.swarm.gate import Gate
from p2ptrain.swarm.libp2p import Libp2pSwarm

SECONDS = 10.0
FIND_SECONDS = 30.0
NOTHING = "0" * 64

Guise = tuple[str, str] | None


class Forced(Gate):
    """Shows what it was given, and lets in everybody."""

    def __init__(self, shown: Pass) -> None:
        super().__init__(shown, PeerId("nobody"))

    def flaw(self, peer: PeerId, shown: Pass | None, *, any_run: bool = False) -> str:
        return ""


async def known(swarm: Libp2pSwarm) -> Presence:
    """A peer that trains, as the DHT tells everybody."""
    async with asyncio.timeout(FIND_SECONDS):
        while True:
            for record in await swarm.lookup("presence"):
                if isinstance(record, Presence) and record.position is not None:
                    return record
            await asyncio.sleep(0.2)


async def ask(run_id: str, guise: Guise, addresses: list[str], folder: Path) -> dict[str, int]:
    told = {"asked": 0, "refused": 0, "answered": 0, "bytes": 0}
    swarm = Libp2pSwarm(folder / "key", run_id, initial_peers=addresses, listen=["/ip4/0.0.0.0/tcp/0"])
    async with swarm:
        there = await known(swarm)
        if guise is not None:
            line, bearer = guise
            swarm._lanes.gate = Forced(decode(line).shown_by(PeerId(bearer or swarm.peer_id)))
        swarm.adopt(there.fingerprint)
        assert there.position is not None
        step = there.position.step
        for address in addresses:
            peer = PeerId(address.rsplit("/", 1)[1])
            questions: list[Request] = [
                GetRun(),
                GetManifest(),
                *(GetEntry(step=max(0, step - back)) for back in range(1, 5)),
                GetPiece(state_digest=NOTHING, number=0),
            ]
            while questions:
                question = questions.pop(0)
                told["asked"] += 1
                try:
                    reply, payload = await swarm.request(
                        peer, question, timeout_seconds=SECONDS, max_bytes=2**26
                    )
                except Refused:
                    told["refused"] += 1
                except PeerFault as fault:
                    print(fault, file=sys.stderr)
                else:
                    told["answered"] += 1
                    told["bytes"] += len(payload)
                    if isinstance(reply, Manifest):
                        questions.append(GetPiece(state_digest=reply.state_digest, number=0))
    return told


async def ask_in_all(
    run_id: str, guises: dict[str, Guise], addresses: list[str]
) -> dict[str, dict[str, int]]:
    told = {}
    for name, guise in guises.items():
        with tempfile.TemporaryDirectory() as folder:
            told[name] = await ask(run_id, guise, addresses, Path(folder))
    return told


def main() -> None:
    run_id, guises, *addresses = sys.argv[1:]
    print(json.dumps(asyncio.run(ask_in_all(run_id, json.loads(guises), addresses))))


if __name__ == "__main__":
    main()
