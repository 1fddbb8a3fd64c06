"""What a checkpoint is good for: let it write (`p2ptrain generate`), compare it (`p2ptrain verify`)."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from p2ptrain.config import PeerConfig, difference, fingerprint, run_digest
from p2ptrain.errors import (
    BadMessage,
    CheckpointError,
    ConfigError,
    IncompatibleRun,
    PeerFault,
    Refused,
    Unreachable,
)
from p2ptrain.events import clean, short
from p2ptrain.records import (
    EntryHeader,
    EntryReply,
    GetEntry,
    GetManifest,
    Manifest,
    PeerId,
    Position,
    Presence,
)
from p2ptrain.replica.checkpoint import MANIFEST, LoadedCheckpoint, compare, latest, load, restore
from p2ptrain.replica.flat import parameter_table
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.snapshot import Snapshot
from p2ptrain.swarm.access import Invite
from p2ptrain.swarm.port import Swarm
from p2ptrain.tasks import NOTHING_SAID, Task, build_model, build_task

ASK_SECONDS = 20.0
PEER_ID = re.compile(r"12D3KooW[1-9A-HJ-NP-Za-km-z]{44}")
"""Of an Ed25519 key, as all of ours are."""


def found(path: Path) -> Path:
    """The checkpoint folder that `path` is, or the newest one in it or in its `checkpoints`.

    Raises CheckpointError if there is none.
    """
    if (path / MANIFEST).exists():
        return path
    newest = latest(path) or latest(path / "checkpoints")
    if newest is None:
        raise CheckpointError(
            f"there is no whole checkpoint at {path}; name a folder such as step-00000200, or the data "
            "folder of a peer that has saved one"
        )
    return newest


def blank(
    checkpoint: LoadedCheckpoint, peer: PeerConfig = NOTHING_SAID, *, with_data: bool = False
) -> tuple[Task, Replica]:
    """The checkpoint's task, as this peer file lets it be built, and a replica at step 0 of its run.

    Data plays no part in the latter. Raises ConfigError, and with data CorpusError.
    """
    run = checkpoint.run
    task = build_task(run, peer, with_data=with_data)
    model, base_digest = build_model(task, run)
    model.eval()
    return task, Replica(model, run, fingerprint(run, parameter_table(model), base_digest), base_digest)


# -- generate ------------------------------------------------------------------------------------------------


def generate(
    path: Path, prompt: str, length: int, temperature: float, seed: int, peer: PeerConfig = NOTHING_SAID
) -> str:
    """The prompt and the `length` bytes or tokens with which the checkpoint's model goes on from it.

    The same arguments give the same text. Raises CheckpointError.
    """
    torch.set_num_threads(1)  # more only get in each other's way at one byte at a time
    checkpoint = load(found(path))
    task, replica = blank(checkpoint, peer)
    restore(replica, checkpoint)
    chance = torch.Generator().manual_seed(seed)
    return task.preview(replica.model, prompt, length, chance, temperature)


# -- verify --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """How a checkpoint, the first, compares with another one or with a live peer, the second."""

    verdict: Literal["equal", "contained", "different"]
    """`equal`: the same state, bit for bit. `contained`: the live peer went on from exactly that state."""
    explanation: str
    first: Position
    second: Position


def verify(a: Path, b: Path) -> Verdict:
    """Compare two checkpoints bit for bit. Raises CheckpointError if one of them is not whole."""
    a, b = found(a), found(b)
    comparison = compare(a, b)
    runs = difference(load(a).run, load(b).run)
    if comparison.equal:
        word: Literal["equal", "different"] = "equal"
        where = f"both are at {_shown(comparison.a)}, and equal bit for bit"
    elif runs:
        word, where = "different", f"they are of different runs ({'; '.join(runs[:3])})"
    else:
        word, where = "different", f"they first differ in {comparison.difference}"
    return Verdict(word, where, comparison.a, comparison.b)


async def verify_live(path: Path, invite: Invite, peer: str, own: PeerConfig = NOTHING_SAID) -> Verdict:
    """Compare the checkpoint at `path` with that peer of the invite's swarm; if empty, with one that trains.
    The run's model is built as the peer file `own` lets it be.

    Raises CheckpointError, IncompatibleRun if the checkpoint is of another run, ConfigError for a peer id
    that is none, and PeerFault if no peer answered, or none could tell.
    """
    if peer and not PEER_ID.fullmatch(peer):
        raise ConfigError(f"after INVITE# goes a peer id, such as 12D3KooW…, not {clean(repr(peer), 60)}")
    checkpoint = load(found(path))
    if (digest := run_digest(checkpoint.run)) != invite.run_digest:
        raise IncompatibleRun(
            f"the checkpoint {checkpoint.path} is of run {checkpoint.run.run_id} with digest {digest[:8]}, "
            f"but the invite leads to {invite.run_id} with digest {invite.run_digest[:8]}"
        )
    _, replica = blank(checkpoint, own)
    from p2ptrain.swarm.libp2p import Libp2pSwarm  # takes seconds

    with tempfile.TemporaryDirectory(prefix="p2ptrain-") as folder:
        swarm = Libp2pSwarm(
            Path(folder) / "identity.key",  # of a guest, for this question only
            invite.run_id,
            replica.fingerprint,
            initial_peers=invite.addresses,
            invite=invite,
            listen=("/ip4/127.0.0.1/tcp/0",),  # nobody needs to reach us
        )
        async with swarm:
            asked = [PeerId(peer)] if peer else await _training(swarm)
            if not asked:
                raise Unreachable(
                    f"nobody trains {invite.run_id} at the moment, as far as the invite's peers know; try "
                    "again when a peer has joined"
                )
            return await _first_verdict(swarm, asked, checkpoint.snapshot)


async def _training(swarm: Swarm) -> list[PeerId]:
    records = await swarm.lookup("presence")
    return sorted(
        record.peer for record in records if isinstance(record, Presence) and record.role == "train"
    )


async def _first_verdict(swarm: Swarm, peers: Sequence[PeerId], ours: Snapshot) -> Verdict:
    """Of the first of these that can tell. Raises the last one's PeerFault if none can."""
    *others, last = peers
    for peer in others:
        with suppress(PeerFault):
            return await against(swarm, peer, ours)
    try:
        return await against(swarm, last, ours)
    except Unreachable as fault:
        raise Unreachable(f"{short(last)} could not be asked ({fault}); does it still train?") from fault


async def against(swarm: Swarm, peer: PeerId, ours: Snapshot) -> Verdict:
    """Compare our snapshot with a live peer, by its own snapshot and, where they stand apart, by its log.

    Raises Refused if that log does not reach to our step, or not back to it, and other PeerFaults.
    """
    wanted = GetManifest(weight=ours.position.weight)
    manifest, _ = await swarm.request(peer, wanted, timeout_seconds=ASK_SECONDS, max_bytes=0)
    if not isinstance(manifest, Manifest):
        raise BadMessage(f"{short(peer)} answered a request for a manifest with {manifest.kind}")
    here, there, name = ours.position, manifest.position, short(peer)

    if here == there:
        if ours.state_digest == manifest.state_digest:
            return Verdict("equal", f"{name} has the same state at {_shown(here)}, bit for bit", here, there)
        digests = f"{ours.state_digest[:8]} here, {manifest.state_digest[:8]} there"
        where = f"{name} has another state at {_shown(here)}: digest {digests}"
        return Verdict("different", where, here, there)

    match await _in_log(swarm, peer, ours):
        case True:
            where = (
                f"{name} went on from exactly this state, {_shown(here)}; its snapshot is of {_shown(there)}"
            )
            return Verdict("contained", where, here, there)
        case False:
            where = (
                f"{name} was not at lineage {here.lineage[:8]} at step {here.step}; it is at {_shown(there)}"
            )
            return Verdict("different", where, here, there)
        case None:
            raise Refused(
                f"{name} cannot tell about step {here.step}: it is not in its log, and its snapshot is of "
                f"{_shown(there)}; ask again with a newer checkpoint, or when that peer is past this one"
            )


async def _in_log(swarm: Swarm, peer: PeerId, ours: Snapshot) -> bool | None:
    """Whether the peer's log led to our lineage; None if it does not say."""
    step = ours.position.step
    if ours.last is not None and (header := await _entry(swarm, peer, step - 1)) is not None:
        return header == ours.last
    # Its log may begin at our step, or ours be step 0.
    if (header := await _entry(swarm, peer, step)) is not None:
        return header.parent == ours.position.lineage
    return None


async def _entry(swarm: Swarm, peer: PeerId, step: int) -> EntryHeader | None:
    request = GetEntry(step=step, with_payload=False)
    try:
        reply, _ = await swarm.request(peer, request, timeout_seconds=ASK_SECONDS, max_bytes=0)
    except Refused:
        return None
    if not isinstance(reply, EntryReply) or reply.header.step != step:
        raise BadMessage(f"{short(peer)} answered a request for entry {step} with {reply.kind}")
    return reply.header


def _shown(position: Position) -> str:
    return f"step {position.step} of lineage {position.lineage[:8]}"
