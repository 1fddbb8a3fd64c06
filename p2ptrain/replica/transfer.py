"""State transfer: how a peer gets to where the swarm is, and how it helps others there.

A peer that missed a few rounds replays the entries it missed. One that missed more, or whose lineage was
outweighed, takes a snapshot in hash-checked pieces and then replays. Nobody waits for it: the donor answers
requests between its own micro-batches, from a copy.

Not covered: several donors at once; proof that a snapshot belongs to the lineage that the donor claims for
it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from p2ptrain.errors import BadMessage, Refused
from p2ptrain.events import CatchUpBy
from p2ptrain.gradients.codecs import Codec
from p2ptrain.protocol.lineage import heavier
from p2ptrain.records import (
    EntryHeader,
    EntryReply,
    GetEntry,
    GetManifest,
    GetPiece,
    GetRun,
    Manifest,
    PeerId,
    Piece,
    Position,
    Refusal,
    Reply,
    Request,
)
from p2ptrain.replica.log import Entry, EntryLog, verify_entry
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.snapshot import Assembly, Snapshot
from p2ptrain.swarm.port import Buffer, Swarm

Compute = Callable[..., Awaitable[Any]]
"""Runs a function on the one thread that owns the replica's tensors."""

PIECES_AT_ONCE = 4
REQUEST_SECONDS = 30.0
NEXT_ENTRY_SECONDS = 1.0
SNAPSHOT_STEPS = 100
"""A snapshot older than this is renewed: replaying that many entries takes about as long as the download."""


class Donor:
    """Answers other peers' requests from this peer's run file, log and replica."""

    def __init__(self, run_json: str, replica: Replica, log: EntryLog, compute: Compute) -> None:
        self._run_json = run_json.encode()
        self._replica = replica
        self._log = log
        self._compute = compute
        self._snapshots: list[Snapshot] = []  # the newest two: a download may outlast a renewal
        self._renewing = asyncio.Lock()
        self._appended = asyncio.Event()

    async def answer(self, sender: PeerId, request: Request) -> tuple[Reply, Buffer]:
        """The reply and its payload; what cannot be served is refused with the reason."""
        match request:
            case GetRun():
                return Piece(), self._run_json
            case GetEntry(step=step, with_payload=with_payload):
                entry = self._log.get(step) or await self._next(step)
                if entry is None:
                    return Refusal(reason=f"entry {step} is not in my log"), b""
                return EntryReply(header=entry.header), entry.payload if with_payload else b""
            case GetManifest(weight=weight):
                return (await self._snapshot(weight)).manifest(), b""
            case GetPiece(state_digest=digest, number=number):
                for snapshot in self._snapshots:
                    if snapshot.state_digest == digest and number < len(snapshot.manifest().pieces):
                        return Piece(), snapshot.piece(number)
                return Refusal(reason="that snapshot is gone; ask for the manifest again"), b""

    def appended(self) -> None:
        """The log has a new entry; whoever asked for it a moment too early gets it now."""
        waiting, self._appended = self._appended, asyncio.Event()
        waiting.set()

    async def _next(self, step: int) -> Entry | None:
        """The entry that is being committed right now, if `step` is that one."""
        if step == self._replica.position.step:
            try:
                async with asyncio.timeout(NEXT_ENTRY_SECONDS):
                    await self._appended.wait()
            except TimeoutError:
                return None
        return self._log.get(step)

    async def _snapshot(self, weight: int) -> Snapshot:
        """The newest one if it will do, else a fresh one; as heavy as asked for, if this replica is."""
        async with self._renewing:
            newest = self._snapshots[-1] if self._snapshots else None
            here = self._replica.position
            if newest is not None:
                replayable = self._log.get(newest.position.step) is not None or newest.position == here
                recent = here.step - newest.position.step <= SNAPSHOT_STEPS
                same = self._log.lineage_at(newest.position.step) == newest.position.lineage
                enough = newest.position.weight >= weight or newest.position == here
                if replayable and recent and same and enough:
                    return newest
            fresh: Snapshot = await self._compute(self._replica.snapshot)
            self._snapshots = [*self._snapshots[-1:], fresh]
            return fresh


@dataclass(frozen=True)
class Progress:
    """How far a catch-up is, for whoever watches."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Arrival:
    """How a catch-up went."""

    how: CatchUpBy
    given_up: int | None
    """If this peer's log led elsewhere than the donor's: the samples behind its own entries since they
    parted."""
    received_bytes: int


class CatchUp:
    """Bring `replica` and `log` to where `donor` stands. Raises PeerFault if that donor cannot help."""

    def __init__(
        self,
        swarm: Swarm,
        replica: Replica,
        log: EntryLog,
        codec: Codec,
        compute: Compute,
        watch: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._swarm, self._replica, self._log = swarm, replica, log
        self._codec, self._compute, self._watch = codec, compute, watch
        self._received = 0
        self._forked = False

    async def from_donor(self, donor: PeerId, claimed: Position, *, afresh: bool) -> Arrival:
        """Replay the donor's entries up to `claimed`, after a snapshot where replay alone does not lead
        there.

        `afresh`: what is here is damaged, so take a snapshot in any case.
        """
        self._received = 0
        if not afresh and await self._replay(donor, claimed):
            return Arrival(CatchUpBy.LOG, None, self._received)
        given_up = await self._given_up(donor, claimed) if self._forked else None
        await self._load_snapshot(donor, afresh)
        await self._replay(donor, claimed)
        return Arrival(CatchUpBy.SNAPSHOT, given_up, self._received)

    async def _replay(self, donor: PeerId, claimed: Position) -> bool:
        """Apply the donor's entries from here to `claimed`. False if they do not lead on from here."""
        first = self._replica.position.step
        fetching: asyncio.Task[tuple[EntryHeader, bytes]] | None = None
        try:
            while (position := self._replica.position).step < claimed.step:
                fetching = fetching or self._fetch(donor, position.step)
                header, payload = await fetching
                fetching = None
                if header.parent != position.lineage:
                    self._forked = True
                    return False
                if position.step + 1 < claimed.step:
                    fetching = self._fetch(donor, position.step + 1)  # on its way while this one is applied
                entry = Entry(header, payload)
                verify_entry(entry, self._codec, self._replica.run.chunk_values, self._replica.numel)
                await self._compute(self._replica.apply, entry)
                self._log.append(entry)
                self._watch(Progress("entries", position.step + 1 - first, claimed.step - first))
        except Refused:
            return False
        finally:
            if fetching is not None:
                fetching.cancel()
        if position.lineage == claimed.lineage or not heavier(claimed, position):
            return True
        self._forked = True  # it has more behind it without more steps than here: another log
        return False

    def _fetch(self, donor: PeerId, step: int) -> asyncio.Task[tuple[EntryHeader, bytes]]:
        return asyncio.create_task(self._entry(donor, step, with_payload=True), name=f"entry {step}")

    async def _entry(self, donor: PeerId, step: int, *, with_payload: bool) -> tuple[EntryHeader, bytes]:
        reply, payload = await self._swarm.request(
            donor,
            GetEntry(step=step, with_payload=with_payload),
            timeout_seconds=REQUEST_SECONDS,
            max_bytes=4 * self._replica.numel + 2**20,
        )
        if not isinstance(reply, EntryReply) or reply.header.step != step:
            raise BadMessage(f"{donor[-8:]} answered a request for entry {step} with {reply.kind}")
        self._received += len(payload)
        return reply.header, payload

    async def _given_up(self, donor: PeerId, claimed: Position) -> int:
        """The samples of the own entries that the donor's log does not have, as far as both logs reach
        back."""
        low, high = self._log.oldest or 0, self._log.step
        while low < high:
            middle = (low + high) // 2
            try:
                header, _ = await self._entry(donor, middle, with_payload=False)
                same = header.parent == self._log.lineage_at(middle)
            except Refused:
                same = middle < claimed.step  # so old that the donor has dropped it: taken for common
            low, high = (middle + 1, high) if same else (low, middle)
        own = (self._log.get(step) for step in range(max(low - 1, 0), self._log.step))
        return sum(entry.header.total_samples for entry in own if entry is not None)

    async def _load_snapshot(self, donor: PeerId, afresh: bool) -> None:
        wanted = GetManifest(weight=self._replica.position.weight + (0 if afresh else 1))
        manifest, _ = await self._swarm.request(donor, wanted, timeout_seconds=REQUEST_SECONDS, max_bytes=0)
        if not isinstance(manifest, Manifest):
            raise BadMessage(f"{donor[-8:]} answered a request for a manifest with {manifest.kind}")
        same = afresh and manifest.position == self._replica.position
        if not same and not heavier(manifest.position, self._replica.position):
            raise BadMessage(
                f"{donor[-8:]} offers step {manifest.position.step} with {manifest.position.weight} samples "
                f"behind it; this peer already has {self._replica.position.weight}"
            )
        if manifest.size_bytes > self._replica.max_state_bytes:
            raise BadMessage(
                f"{donor[-8:]} offers a snapshot of {manifest.size_bytes} bytes; "
                f"this model's is at most {self._replica.max_state_bytes}"
            )
        assembly = Assembly(manifest)
        missing = iter(assembly.missing())

        async def fetch() -> None:
            for number in missing:
                _, data = await self._swarm.request(
                    donor,
                    GetPiece(state_digest=manifest.state_digest, number=number),
                    timeout_seconds=REQUEST_SECONDS,
                    max_bytes=manifest.piece_bytes,
                )
                assembly.add(number, data)
                self._received += len(data)
                self._watch(
                    Progress("pieces", len(manifest.pieces) - len(assembly.missing()), len(manifest.pieces))
                )

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(PIECES_AT_ONCE):
                    group.create_task(fetch())
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        snapshot = assembly.snapshot()
        await self._compute(self._replica.load_state, snapshot)
        self._log.restart(snapshot.position)
