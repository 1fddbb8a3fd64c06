"""Somebody without an invite who found a peer's address: asks for all that a peer gives, and tells what came.

    python -m tests.chaos.stranger RUN_ID ADDRESS…

Each address ends in `/p2p/` and a peer id. It speaks the protocol with a fingerprint of its own making and
prints one JSON object (`asked`, `refused`, `got_bytes`). Not covered: a stranger who knows the run file, for
that is what an invite leads to.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path

from p2ptrain.errors import PeerFault, Refused
from p2ptrain.records import GetEntry, GetManifest, GetPiece, PeerId, Request
from p2ptrain.swarm.libp2p import Libp2pSwarm

SECONDS = 10.0
NOTHING = "0" * 64


async def ask(run_id: str, addresses: list[str], folder: Path) -> dict[str, int]:
    told = {"asked": 0, "refused": 0, "got_bytes": 0}
    swarm = Libp2pSwarm(
        folder / "key", run_id, "5" * 64, initial_peers=addresses, listen=["/ip4/0.0.0.0/tcp/0"]
    )
    questions: list[Request] = [
        GetManifest(),
        GetPiece(state_digest=NOTHING, number=0),
        *(GetEntry(step=step) for step in range(5)),
    ]
    async with swarm:
        for address in addresses:
            peer = PeerId(address.rsplit("/", 1)[1])
            for question in questions:
                told["asked"] += 1
                try:
                    _, payload = await swarm.request(peer, question, timeout_seconds=SECONDS, max_bytes=2**26)
                    told["got_bytes"] += len(payload) + 1
                except Refused:
                    told["refused"] += 1
                except PeerFault as fault:
                    print(fault, file=sys.stderr)
    return told


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asyncio.run(ask(sys.argv[1], sys.argv[2:], Path(folder)))))


if __name__ == "__main__":
    main()
