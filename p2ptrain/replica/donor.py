"""The donor's side of state transfer: what this peer gives to those who join or were away.

Snapshots are packed when somebody asks, at a step that all donors are asked for alike, between two
micro-batches; hashing them is done aside. One stays for as long as its pieces are asked for, even when there
is a newer one. Pieces leave at a bounded rate over all joiners together.

Not covered: entries of the log leave as fast as they are asked for. The swarm moves as many bytes itself at
each step, and a replay slower than its steps would never end.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from p2ptrain.records import (
    EntryReply,
    GetEntry,
    GetEvents,
    GetInput,
    GetLineage,
    GetManifest,
    GetMetrics,
    GetPiece,
    GetPledges,
    GetProof,
    GetRun,
    Later,
    Lineage,
    PeerId,
    Piece,
    Probe,
    Redeem,
    Refusal,
    Reply,
    Request,
)
from p2ptrain.replica.joining import LEAD_SECONDS, Upload, agreed_step
from p2ptrain.replica.log import Entry, EntryLog
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.snapshot import Packed, Snapshot
from p2ptrain.swarm.port import Buffer

Compute = Callable[..., Awaitable[Any]]
"""Runs a function on the one thread that owns the replica's tensors."""

NEXT_ENTRY_SECONDS = 1.0
SNAPSHOT_STEPS = 50
"""A snapshot older than this is not given to a new joiner, who would have to replay all these entries."""
MAX_SNAPSHOTS = 3
KEEP_SECONDS = 120.0
"""A snapshot nobody has asked for so long is dropped: a joiner that was killed is back by then."""
HELD_SNAPSHOTS = 8
"""So many times its size the entries after a snapshot may take beyond the log's limit, for those who download
it."""
MAX_AHEAD_STEPS = 128
REACH_SECONDS = 10.0
"""Whoever wants the snapshot of a step ahead hears after this time, at the latest, to ask again."""
PACKING_SHARE = 0.1
"""Of its time, at most, a donor packs snapshots, whatever it is asked for."""
QUEUE_SECONDS = 15.0
"""A piece that could not leave within this is not promised: ask again later, or another donor."""


@dataclass
class _Held:
    snapshot: Snapshot
    asked_at: float


class Donor:
    """Answers other peers' requests from this peer's run file, log and replica."""

    def __init__(
        self,
        run_json: str,
        replica: Replica,
        log: EntryLog,
        compute: Compute,
        aside: Compute,
        upload_bytes_per_second: float = 0.0,
    ) -> None:
        """`compute` runs a function on the one thread that owns the replica's tensors, `aside` on others. The
        limit is for pieces of snapshots; 0 derives it from rounds, see `Upload`."""
        self.served_bytes = 0
        """Of pieces and entries, to all joiners so far."""
        self.upload = Upload(upload_bytes_per_second)
        self._run_json = run_json.encode()
        self._replica = replica
        self._log = log
        self._compute, self._aside = compute, aside
        self._held: list[_Held] = []  # in the order in which they were packed
        self._packing = asyncio.Lock()
        self._rested_at = float("-inf")
        self._awaited: Counter[int] = Counter()
        """Steps ahead for whose snapshot somebody waits here."""
        self._appended = asyncio.Event()
        self._arrived = asyncio.Event()
        self._arrived_at: float | None = None
        self._step_seconds = 0.0

    async def answer(self, sender: PeerId, request: Request) -> tuple[Reply, Buffer]:
        """The reply and its payload; what cannot be served is refused with the reason."""
        match request:
            case GetRun():
                return Piece(), self._run_json
            case GetEntry(step=step, with_payload=with_payload):
                entry = self._log.get(step) or await self._next(step)
                if entry is None:
                    return Refusal(reason=f"entry {step} is not in my log"), b""
                payload = entry.payload if with_payload else b""
                self.served_bytes += len(payload)
                return EntryReply(header=entry.header), payload
            case GetLineage(step=step):
                return Lineage(lineage=self._log.lineage_at(step)), b""
            case GetManifest():
                return await self._manifest(request), b""
            case GetPiece():
                return await self._piece(request)
            case Probe():
                return Refusal(reason="the bootstrap answers that: my link is for rounds"), b""
            case Redeem():
                return Refusal(reason="invites are redeemed at the organizer's bootstrap"), b""
            case GetMetrics() | GetEvents():
                return Refusal(reason="this peer is not to be watched"), b""
            case GetInput() | GetProof() | GetPledges():
                return Refusal(reason="this run is not audited"), b""

    # -- what the trainer tells ------------------------------------------------------------------------------

    def appended(self) -> None:
        """The log has a new entry; whoever asked for it a moment too early gets it now."""
        waiting, self._appended = self._appended, asyncio.Event()
        waiting.set()

    def arrived(self) -> None:
        """The replica stands at another step; whoever wants the snapshot of that one gets it packed first."""
        waiting, self._arrived = self._arrived, asyncio.Event()
        waiting.set()
        now = self._now()
        if self._arrived_at is not None:
            took = now - self._arrived_at
            self._step_seconds = took if not self._step_seconds else 0.8 * self._step_seconds + 0.2 * took
        self._arrived_at = now
        self._held = [each for each in self._held if now - each.asked_at < KEEP_SECONDS]
        self._hold_entries()

    # -- entries ---------------------------------------------------------------------------------------------

    async def _next(self, step: int) -> Entry | None:
        """The entry that is being committed right now, if `step` is that one."""
        if step == self._replica.position.step:
            try:
                async with asyncio.timeout(NEXT_ENTRY_SECONDS):
                    await self._appended.wait()
            except TimeoutError:
                return None
        return self._log.get(step)

    # -- snapshots -------------------------------------------------------------------------------------------

    async def _manifest(self, wanted: GetManifest) -> Reply:
        """The manifest of the snapshot that is wanted, or at which step to ask for one."""
        for held in self._held:
            if held.snapshot.position.step == wanted.step and self._leads_here(held.snapshot):
                return self._given(held)
        here = self._replica.position
        if not wanted.exactly:
            for held in reversed(self._held):
                if self._leads_here(held.snapshot) and self._good_enough(held.snapshot, wanted.weight):
                    return self._given(held)
        if wanted.step is None:
            return await self._at(None)
        ahead = wanted.step - here.step
        soon = ahead <= 1 or 0 < ahead * self._step_seconds <= REACH_SECONDS
        if 0 <= ahead <= MAX_AHEAD_STEPS and soon:
            return await self._at(wanted.step)
        if here.weight < wanted.weight:  # a joiner itself, perhaps
            return Refusal(reason=f"I am at step {here.step}, with {here.weight} samples behind me")
        return self._propose()

    async def _at(self, step: int | None) -> Reply:
        """Wait for that step, pack there, and give the manifest; None: at this one."""
        now, here = self._now(), self._replica.position
        if step is not None and now < self._rested_at:
            return self._propose()
        if step is not None and step > here.step:
            self._awaited[step] += 1
            try:
                async with asyncio.timeout(REACH_SECONDS):
                    while self._replica.position.step < step:
                        await self._arrived.wait()
            except TimeoutError:
                return self._propose()
            finally:
                self._awaited[step] -= 1
                self._awaited += Counter()  # forgets steps that nobody waits for
        async with self._packing:
            for held in self._held:
                at = held.snapshot.position
                if (at == here if step is None else at.step == step) and self._leads_here(held.snapshot):
                    return self._given(held)  # another joiner asked for the same
            if step is not None and self._replica.position.step != step:
                return self._propose()
            held = await self._pack()
        if step is not None and held.snapshot.position.step != step:
            return self._propose()
        return self._given(held)

    async def _pack(self) -> _Held:
        """The snapshot of where the replica stands when the compute thread gets to it."""
        began = self._now()
        packed: Packed = await self._compute(self._replica.packed)
        packed_at = self._now()
        self._rested_at = packed_at + (packed_at - began) * (1 / PACKING_SHARE - 1)
        held = _Held(await self._aside(packed.snapshot), self._now())
        self._held.append(held)
        while len(self._held) > MAX_SNAPSHOTS:
            self._held.remove(min(self._held[:-1], key=lambda each: each.asked_at))
        self._hold_entries()
        return held

    def _hold_entries(self) -> None:
        """Whoever downloads a snapshot will need the entries after it."""
        if not self._held:
            self._log.hold(None)
            return
        oldest = min((each.snapshot for each in self._held), key=lambda each: each.position.step)
        self._log.hold(oldest.position.step, HELD_SNAPSHOTS * len(oldest.blob))

    def _given(self, held: _Held) -> Reply:
        held.asked_at = self._now()
        return held.snapshot.manifest()

    def _leads_here(self, snapshot: Snapshot) -> bool:
        """Whether the log leads from the snapshot to where the replica stands."""
        at, here = snapshot.position, self._replica.position
        return at == here or (
            self._log.get(at.step) is not None and self._log.lineage_at(at.step) == at.lineage
        )

    def _good_enough(self, snapshot: Snapshot, weight: int) -> bool:
        at, here = snapshot.position, self._replica.position
        return here.step - at.step <= SNAPSHOT_STEPS and (at.weight >= weight or at == here)

    def _propose(self) -> Later:
        """A step at which there will be a snapshot anyway, else one that can be agreed on."""
        ahead = max(LEAD_SECONDS, self._rested_at - self._now())
        step = agreed_step(self._replica.position.step, self._step_seconds, ahead)
        return Later(step=min((each for each in self._awaited if each <= step), default=step))

    # -- pieces ----------------------------------------------------------------------------------------------

    async def _piece(self, wanted: GetPiece) -> tuple[Reply, Buffer]:
        held = next((each for each in self._held if each.snapshot.state_digest == wanted.state_digest), None)
        if held is None or wanted.number >= len(held.snapshot.manifest().pieces):
            return Refusal(reason="that snapshot is gone; ask for the manifest again"), b""
        now = held.asked_at = self._now()
        if (wait := self.upload.wait(now)) > QUEUE_SECONDS:
            return Later(seconds=min(wait, KEEP_SECONDS / 4)), b""
        data = held.snapshot.piece(wanted.number)
        await asyncio.sleep(self.upload.take(len(data), now))
        self.served_bytes += len(data)
        return Piece(), data

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
