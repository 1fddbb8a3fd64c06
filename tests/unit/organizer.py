"""An organizer for tests: a key of its own, and invites signed with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from p2ptrain.config import RunConfig, run_digest
from p2ptrain.swarm.access import Invite, issue
from p2ptrain.swarm.identity import Identity, of_seed

ORGANIZER = of_seed(b"o" * 32)
NOBODY = "12D3KooWQpq3ogFstGJRSqBZ3GGPh186RaAYFtQnPpRKWs6ZLJtQ"
RUN_ID = RunConfig().run_id
NOW = 1_800_000_000
"""When the invites were made, unless a test says otherwise."""


def invite(
    addresses: Sequence[str] = (f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}",),
    run: RunConfig | None = None,
    organizer: Identity = ORGANIZER,
    **changes: Any,
) -> Invite:
    """An unlimited one to the default run, but for the `changes` to its grant."""
    run = run or RunConfig()
    given = {
        "run_id": run.run_id,
        "run_digest": run_digest(run),
        "role": "train",
        "serial": 1,
        "issued": 0,
        "expires": None,
    }
    return issue(organizer, addresses=addresses, **{**given, **changes})
