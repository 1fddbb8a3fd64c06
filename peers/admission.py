"""A pass that members accept, for whoever has an invite that is for a few peers, or by a key that the
organizer has replaced: the organizer's bootstrap gives it, once, and it is kept in the data folder.

Every other invite lets its bearer in as it is, and nothing here is done for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from p2ptrain.errors import InviteError, PeerFault, Refused, StorageError, Unreachable
from p2ptrain.events import short
from p2ptrain.records import Pass, PeerId, Succession
from p2ptrain.swarm.access import ASK, Invite
from p2ptrain.swarm.gate import Gate
from p2ptrain.swarm.libp2p import Libp2pSwarm

logger = logging.getLogger("p2ptrain")

KEPT = "pass.json"
ANSWER_SECONDS = 6.0
RENEW_SECONDS = 2.0
"""Between two looks whether the organizer's key has been replaced, or two attempts to follow."""


class Kept(BaseModel):
    """What the bootstrap gave."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    access: Pass
    succession: Succession | None
    """By which whoever trusts the invite's organizer trusts that of the pass."""


async def admit(swarm: Libp2pSwarm, invite: Invite, folder: Path) -> None:
    """See to it that the swarm's peers let this one in. Raises InviteError if they will not, Unreachable."""
    gate = swarm.gate
    assert gate is not None
    if (kept := _read(folder)) is not None:
        _recall(gate, swarm.peer_id, kept)
    if gate.has_to_redeem:
        await _redeem(swarm, gate, invite, folder)


async def stay_admitted(swarm: Libp2pSwarm, invite: Invite, folder: Path) -> None:
    """Follow the organizer to another key. Runs until it is cancelled."""
    gate, said = swarm.gate, ""
    assert gate is not None
    while True:
        await asyncio.sleep(RENEW_SECONDS)
        if not gate.has_to_redeem:
            continue
        try:
            await _redeem(swarm, gate, invite, folder)
            logger.info("the organizer has another key now, and knows this peer: it stays")
        except (InviteError, Unreachable, StorageError) as fault:
            if str(fault) != said:
                said = str(fault)
                logger.warning(
                    "the organizer has another key now, and this peer has no pass by it: %s", fault
                )


def _recall(gate: Gate, me: PeerId, kept: Kept) -> None:
    """Show the kept pass again, if it was made of this invite, for this peer."""
    of, grant = gate.own.grant, kept.access.grant
    if (grant.serial, grant.run_digest, grant.key) != (of.serial, of.run_digest, me):
        return
    if grant.organizer != gate.organizer and not (kept.succession and gate.learn(kept.succession)):
        return
    if grant.organizer == gate.organizer:
        gate.own = kept.access


async def _redeem(swarm: Libp2pSwarm, gate: Gate, invite: Invite, folder: Path) -> None:
    reasons, refused = [], False
    for address in invite.addresses:
        bootstrap = PeerId(address.rsplit("/p2p/", 1)[1])
        try:
            own = await swarm.redeem(bootstrap, timeout_seconds=ANSWER_SECONDS)
        except PeerFault as fault:
            refused |= isinstance(fault, Refused)
            reasons.append(f"{short(bootstrap)}: {fault}")
        else:
            _write(folder, Kept(access=own, succession=gate.succession))
            return
    if refused:
        raise InviteError(f"{'; '.join(reasons)}; {ASK}")
    raise Unreachable(
        f"this invite is redeemed at the organizer's bootstrap, which did not answer ({'; '.join(reasons)}); "
        "check that it runs"
    )


def _read(folder: Path) -> Kept | None:
    try:
        return Kept.model_validate_json((folder / KEPT).read_bytes())
    except (OSError, ValidationError):
        return None  # there is none, or it is of another version: the bootstrap remembers us


def _write(folder: Path, kept: Kept) -> None:
    draft = folder / f"{KEPT}.draft"
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(kept.model_dump_json() + "\n")
        draft.replace(folder / KEPT)
    except OSError as error:
        raise StorageError(
            f"the pass cannot be kept in {draft}: {error.strerror}; free some space"
        ) from error
