"""The round's effects, carried out: one `Member` machine wired to the swarm, and the bytes of each attempt.

`Rounds` feeds the machine with messages, broken links and time, and does what it answers. `Attempt` moves the
bytes: it sends this peer's contribution to every reducer, averages this peer's own span, and collects the
averaged chunks of all spans in a shadow buffer that touches nothing until the round is committed.

Numeric work is done by whatever `Work` the caller gives, a thread beside the event loop for instance, while
other chunks are sent and received; what takes less time than to hand it to a thread is done at once. Its
order and so its results are the same for any.

Not covered: contributions that come faster than they are added wait in memory, at most a span of each member.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

import numpy as np
from torch import Tensor

from p2ptrain.auditing import Audit, Auditor, BadInput, Evidence
from p2ptrain.court import AttemptKey, Convicted, Court, Told
from p2ptrain.errors import BadMessage, Unreachable
from p2ptrain.events import AbortCause
from p2ptrain.gradients.accumulator import Sent
from p2ptrain.gradients.aggregation import Aggregation, mean_chunk
from p2ptrain.gradients.codecs import Codec
from p2ptrain.gradients.feedback import Owed
from p2ptrain.gradients.likeness import Likeness, StoodOut, Watch
from p2ptrain.gradients.noise import UNMEASURED, Spread, Strangers, Unlike
from p2ptrain.gradients.reducing import Rule, Scratch, Spoilt, average_chunk, check_chunk, encode_chunk
from p2ptrain.protocol.ledger import Leases, Ranges, lease
from p2ptrain.protocol.lineage import joint_digest
from p2ptrain.protocol.member import Member
from p2ptrain.protocol.reduction import Reduction
from p2ptrain.protocol.roster import freeze_of
from p2ptrain.protocol.round import (
    Apply,
    Begin,
    Benched,
    Cancel,
    CatchUp,
    Distrusted,
    Diverged,
    Effect,
    Send,
    TookOver,
    Waiting,
)
from p2ptrain.protocol.spans import chunk_ranges
from p2ptrain.protocol.terms import most_samples
from p2ptrain.records import (
    Accusation,
    Averaged,
    Ballot,
    Call,
    Chunk,
    EntryHeader,
    Freeze,
    GetInput,
    GetPledges,
    GetProof,
    Message,
    PeerId,
    Position,
    Reply,
    Request,
    Terms,
    TwoStories,
)
from p2ptrain.replica.log import Entry
from p2ptrain.swarm.port import Buffer, Swarm

# -- outcomes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Committed:
    """Everyone on the roster applies this entry."""

    entry: Entry
    newcomers: tuple[PeerId, ...]
    sent: Sequence[Sent]
    """This peer's contribution as the entry has it, if the codec loses something."""
    spread: Spread | None
    """How far the members' gradients were apart, if that can be told."""
    sealed: float
    """Loop time of sealing the contribution, and of holding every span."""
    held: float


@dataclass(frozen=True)
class Behind:
    """The swarm stands elsewhere; `donor` knows where."""

    donor: PeerId
    position: Position
    afresh: bool
    """This replica is damaged: only a snapshot will do."""
    undo: int | None = None
    """Go back to this step, or before it: what led on was a lie."""


@dataclass(frozen=True)
class Aborted:
    """Nobody stepped; the contribution is kept."""

    ballot: Ballot
    cause: AbortCause
    dropped: tuple[PeerId, ...]
    seconds: float
    """From the freeze until now."""


Outcome = Committed | Behind | Aborted


@dataclass(frozen=True)
class Contribution:
    """What this peer brings: `total` float32 [values] = Σ over its samples of the gradient, and their
    number."""

    total: Tensor
    samples: int
    skipped: int = 0
    """Samples of the lease that are not in it, their gradient not being finite."""
    lease: Ranges = ()
    """From whose start the samples are, where these are leased."""


@dataclass(frozen=True)
class Faulted:
    """For the log: this peer could not finish an attempt, and why."""

    suspects: tuple[PeerId, ...]
    cause: AbortCause
    detail: str


@dataclass(frozen=True)
class Gone:
    """For the log: the link to a peer could not be restored."""

    peer: PeerId


STRETCH_SECONDS, LOOK_SECONDS = 0.5, 0.05
"""How much is delivered is looked at so often, and over at least so long: confirmations come in bursts, when
they had to wait behind what the other side sends."""

NORM_DOUBT = 0.01
"""By so much of it a receiver, which adds up squares in float32 and in any order, may find another one."""

AT_ONCE_VALUES = 2**20
"""Adding up so many values, of all members together, takes half a millisecond or less. To hand it to a thread
and wait for it costs a quarter, most of it in two threads' fight for the interpreter's lock."""

Work = Callable[..., Awaitable[Any]]
"""Runs a function with its arguments, one after the other, and gives its result."""


async def at_once(function: Callable[..., Any], *arguments: Any) -> Any:
    """`Work` that is done here and now."""
    return function(*arguments)


Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
"""Starts a task whose failure is ours and ends the program."""

# -- one attempt ---------------------------------------------------------------------------------------------


@dataclass
class _Outbox:
    """Frames for one peer, in order: the chunks of our contribution, which a reducer waits for, before any
    mean. After a broken link they are sent again from the first: receivers know duplicates."""

    frames: list[tuple[Chunk | Averaged, Buffer]] = field(default_factory=list)
    sent: int = 0
    contributed: int = 0
    """Chunks of our contribution that were encoded."""
    lost: bool = False
    """The link is broken."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, header: Chunk | Averaged, payload: Buffer) -> None:
        at = self.sent if isinstance(header, Chunk) else len(self.frames)
        self.frames.insert(at, (header, payload))
        self.wake.set()

    def rewind(self) -> None:
        self.sent, self.lost = 0, False
        self.wake.set()


class Pace:
    """How fast this peer can send: what it delivered in the best stretch of an attempt.

    The mean over an attempt would say nothing. Spans are such that all end together, so each peer sends, on
    average, as fast as it was taken for: one whose receivers were busy looked slow, got less to reduce, and
    sent even less in the same time, until one peer reduced all. But for a while each link is full.
    """

    def __init__(self, delivered_bytes: Callable[[], int]) -> None:
        """`delivered_bytes`: what has reached others so far."""
        self.bytes_per_second: float | None = None
        """None as long as nothing was sent in a whole stretch."""
        self._delivered_bytes = delivered_bytes
        self._looks: deque[tuple[float, int]] = deque()

    def look(self, now: float) -> None:
        """A frame goes to the carrier now, or was taken by it."""
        if self._looks and now < self._looks[-1][0] + LOOK_SECONDS:
            return
        delivered = self._delivered_bytes()
        self._looks.append((now, delivered))
        while len(self._looks) > 1 and self._looks[1][0] <= now - STRETCH_SECONDS:
            self._looks.popleft()
        since, before = self._looks[0]
        if since <= now - STRETCH_SECONDS and delivered > before:
            self.bytes_per_second = max(self.bytes_per_second or 0.0, (delivered - before) / (now - since))


_Key = tuple[int, int]
"""(reducer's rank, number) of a chunk of the entry, or (member's rank, number) of one to be averaged."""


def touched_memory(size_bytes: int) -> memoryview:
    """Memory that the kernel has really given: the first touch of a page costs as much as a copy of it."""
    memory = np.empty(size_bytes, np.uint8)
    memory[::_PAGE_BYTES] = 0
    return memory.data


_PAGE_BYTES = 4096


class _Shadow:
    """The averaged bytes of all spans, in one piece of memory; each chunk is received straight into it.

    A place is lent once: two connections that bring the same chunk, one of them stalled, must not write over
    each other. What comes a second time, over the other carrier, is kept beside.
    """

    def __init__(
        self, ranges: Sequence[Sequence[tuple[int, int]]], codec: Codec, memory: memoryview | None
    ) -> None:
        """`memory`: for it to be in, if large enough; whoever gives it does not use it again."""
        self._bounds: dict[_Key, tuple[int, int]] = {}
        at = 0
        for rank, chunks in enumerate(ranges):
            for number, (start, stop) in enumerate(chunks):
                self._bounds[rank, number] = at, (at := at + codec.encoded_bytes(stop - start))
        if memory is None or memory.nbytes < at:
            memory = np.empty(at, np.uint8).data
        self._memory = memory[:at]
        self._lent: dict[_Key, memoryview] = {}
        self._beside: dict[_Key, Buffer] = {}

    def lend(self, key: _Key, size: int) -> memoryview | None:
        """The place of that chunk, if it is one, of that size, and not lent yet."""
        start, stop = self._bounds.get(key, (0, 0))
        if key in self._lent or size != stop - start:
            return None
        place = self._lent[key] = self._memory[start:stop]
        return place

    def own(self, key: _Key) -> memoryview:
        """The place of a chunk that nobody else has to do with."""
        start, stop = self._bounds[key]
        return self._memory[start:stop]

    def place_of(self, key: _Key, payload: Buffer) -> memoryview | None:
        """Where that payload still has to be copied to; None if it is there already, or kept beside."""
        if self._lent.get(key) is payload:
            return None
        if (place := self.lend(key, len(payload))) is None:
            self._beside[key] = payload
        return place

    def payload(self) -> Buffer:
        """All of it, once all of it is here."""
        if not self._beside:
            return self._memory.toreadonly()
        return b"".join(self._beside.get(key, self._memory[slice(*at)]) for key, at in self._bounds.items())


class Attempt:
    """The transfers of one attempt; `on_held` or `on_failed` is called when they are over."""

    def __init__(
        self,
        told: Told,
        swarm: Swarm,
        codec: Codec,
        aggregation: Aggregation,
        chunk_values: int,
        most_samples: int,
        usual_norm: float,
        owed: Owed,
        spawn: Spawn,
        work: Work,
        scratch: Scratch,
        memory: memoryview | None,
        evidence: Evidence | None,
        on_held: Callable[[EntryHeader, float], None],
        on_failed: Callable[[Sequence[PeerId], AbortCause, str], None],
        on_proof: Callable[[TwoStories], None] = lambda _: None,
        last: EntryHeader | None = None,
        leases: Leases | None = None,
    ) -> None:
        """`told`: the freeze, and what else is pledged in this attempt; `usual_norm`: of the last averaged
        gradient, 0 if there was none; `owed`: by this peer as a reducer since the last commit; `memory`: for
        the averaged bytes, if it is large enough; `evidence`: where this attempt's is gathered, if the run is
        audited. `on_proof` is given the proof that the leader has called others to another freeze."""
        self.told = told
        self.freeze = freeze = told.freeze
        self.lease = () if leases is None else lease(leases, swarm.peer_id)
        """The samples that this peer may bring, where they are leased."""
        self.began = asyncio.get_running_loop().time()
        self.held = self.began
        self.sealed: float | None = None
        """Loop time when the contribution was given, None before."""
        self.header: EntryHeader | None = None
        self._contribution: Contribution | None = None
        self._me = swarm.peer_id
        self._swarm = swarm
        self._codec = codec
        self._work = work
        self._quick = codec.quick and aggregation is mean_chunk
        self._scratch = scratch
        self._spawn = spawn
        self.likeness = Likeness()
        self._reduction = Reduction(freeze, self._me, chunk_values, most_samples, leases)
        self._ranges = [
            chunk_ranges(start, stop, chunk_values)
            for start, stop in zip(freeze.spans, freeze.spans[1:], strict=False)
        ]
        self.owed = owed.moved(*freeze.spans[self._reduction.rank :][:2])
        self.evidence = evidence
        audited = evidence is not None
        self._rule = Rule(codec, aggregation, usual_norm, self.owed, self.likeness, audited, last)
        self.sent: list[Sent] = []
        self._on_held, self._on_failed, self._on_proof = on_held, on_failed, on_proof
        self._parts: dict[_Key, Buffer] = {}  # (member's rank, chunk of my span) → encoded sum
        self._lent: dict[_Key, memoryview] = {}  # the same → where it is being received
        self._shadow = _Shadow(self._ranges, codec, memory)
        self._digests: dict[_Key, bytes] = {}  # of the means that are here and were looked at
        self._pace = Pace(lambda: swarm.delivered_bytes)
        self._norm = 0.0
        self._squares = [0.0] * len(freeze.roster)
        """Squared norms of the others' spans, as far as they are here, in float32."""
        self._over = self._failed = False
        self._outboxes = {peer: _Outbox() for peer in freeze.roster if peer != self._me}
        self._part_came = asyncio.Event()
        self._tasks = [spawn(self._send_all(peer, outbox)) for peer, outbox in self._outboxes.items()]
        self._tasks.append(spawn(self._reduce()))
        self._timer = asyncio.get_running_loop().call_later(freeze.deadline_seconds, self._overdue)

    def contribute(self, contribution: Contribution) -> None:
        """Seal: send every reducer its span. The tensor must not change until the attempt is over. Samples of
        another lease than this attempt gives stay out of it."""
        self.sealed = asyncio.get_running_loop().time()
        if contribution.lease != self.lease:
            contribution = Contribution(contribution.total, 0)
        self._contribution = contribution
        if self.evidence is not None:
            self.evidence.samples = contribution.samples
        for number in range(self._to_contribute(self._reduction.rank)):
            self._take_part(self._me, self._chunk(self._reduction.rank, number), None)
        for outbox in self._outboxes.values():
            outbox.wake.set()

    def place(self, sender: PeerId, header: Chunk | Averaged, size: int) -> memoryview | None:
        """Where the payload of a frame of this attempt, about to arrive, shall be written; None: wherever."""
        if self._over or sender not in self._outboxes or header.freeze != self.told.frozen:
            return None
        key = self.freeze.roster.index(sender), header.number
        if isinstance(header, Averaged):
            return self._shadow.lend(key, size)
        mine = self._ranges[self._reduction.rank]
        if key in self._lent or header.number >= len(mine):
            return None
        start, stop = mine[header.number]
        if size != self._codec.encoded_bytes(stop - start):
            return None
        place = self._lent[key] = self._scratch.lend(size)
        return place

    async def receive(self, sender: PeerId, header: Chunk | Averaged, payload: Buffer) -> None:
        """A frame of this attempt arrived. What breaks the contract fails the attempt by the sender's
        name."""
        if self._over:
            return
        try:
            if header.freeze != self.told.frozen:
                if header.called is not None:  # only the first one of a sender shows whose fault it is
                    self._called_otherwise(header)
            elif isinstance(header, Chunk):
                self._take_part(sender, header, payload)
            else:
                await self._take_mean(sender, header, payload)
        except BadMessage as fault:
            self._fail([sender], AbortCause.BAD_CHUNK, str(fault))

    def awaits(self, header: Chunk | Averaged) -> bool:
        """Whether the frame is of this attempt."""
        freeze = self.freeze
        return (header.step, header.parent, header.ballot) == (freeze.step, freeze.parent, freeze.ballot)

    def _called_otherwise(self, header: Chunk | Averaged) -> None:
        if (proof := self.told.contradicted_by(header)) is not None:
            self._on_proof(proof)
            return
        leader = self.freeze.ballot.leader
        self._fail([leader], AbortCause.BAD_CHUNK, f"{leader[-8:]} called others to another freeze before")

    def refuse(self) -> None:
        """Fail it, as its leader has not signed that it called to this freeze."""
        leader = self.freeze.ballot.leader
        self._fail([leader], AbortCause.BAD_CHUNK, f"{leader[-8:]} calls without having signed for it")

    def rewind(self, peer: PeerId) -> None:
        """The link to `peer` was reset: say everything again."""
        if peer in self._outboxes:
            self._outboxes[peer].rewind()

    @property
    def sent_at(self) -> float | None:
        """Bytes per second at which this peer can send; None if it was not seen to send for long enough."""
        return self._pace.bytes_per_second

    def spread(self) -> Spread | None:
        """How far the members' gradients were apart, if all reducers could tell."""
        samples = [count for count in self._reduction.averaged_over if count]
        if (told := self._reduction.spread()) is None or len(samples) < 2:
            return None
        return Spread(len(samples), sum(samples), *told)

    def payload(self) -> Buffer:
        """The averaged bytes, spans in roster order, once all are here."""
        return self._shadow.payload()

    def digests(self) -> list[list[bytes]]:
        """Of the averaged chunks, by rank, once all are here."""
        return [
            [self._digests[rank, at] for at in range(len(each))] for rank, each in enumerate(self._ranges)
        ]

    def close(self) -> None:
        """Stop all transfers."""
        self._over = True
        self._timer.cancel()
        # A cancelled task holds the frame that it was in, and that holds this: megabytes, until the collector
        # of cycles comes by, which it does the more rarely the larger the program is.
        while self._tasks:
            self._tasks.pop().cancel()

    # -- inside ----------------------------------------------------------------------------------------------

    async def _do(self, values: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Numeric work on so many values: here and now if it is quick."""
        if self._quick and values <= AT_ONCE_VALUES:
            return function(*arguments)
        return await self._work(function, *arguments)

    def _to_contribute(self, rank: int) -> int:
        """How many chunks of our contribution that reducer is to get; one, empty, if we bring no samples."""
        if self._contribution is None:
            return 0
        chunks = len(self._ranges[rank])
        return chunks if self._contribution.samples else min(chunks, 1)

    def _chunk(self, rank: int, number: int) -> Chunk:
        """The header of a chunk for that reducer: with the last one, this peer signs for all of them."""
        assert self._contribution is not None
        signed: dict[str, Any] = {}
        last = number == self._to_contribute(rank) - 1
        if self.evidence is not None and last and rank != self._reduction.rank:
            signed = self.evidence.signature(rank, self._contribution.samples)
        return Chunk(
            **self._attempt(number),
            number=number,
            samples=self._contribution.samples,
            skipped=self._contribution.skipped,
            **signed,
        )

    def _attempt(self, number: int) -> dict[str, Any]:
        """By what a chunk says to which attempt it belongs; the first one proves it."""
        freeze = self.freeze
        return {
            "step": freeze.step,
            "parent": freeze.parent,
            "ballot": freeze.ballot,
            "freeze": self.told.frozen,
            "called": None if number else freeze.signature,
            "caller": "" if number else freeze.caller,
        }

    async def _encoded(self, rank: int, number: int) -> Buffer:
        """A chunk of our contribution for that reducer, just before it is sent or added: so it is in the
        cache then."""
        assert self._contribution is not None
        if not self._contribution.samples:
            return b""
        start, stop = self._ranges[rank][number]
        values = self._contribution.total[start:stop]
        encoded: Buffer
        if self.evidence is not None:
            encoded, digest = await self._do(stop - start, encode_chunk, self._codec, values)
            self.evidence.sends(rank, number, encoded, digest)
        else:
            encoded = await self._do(stop - start, self._codec.encode, values)
        if self._codec.feedback:
            self.sent.append((start, stop, encoded))
        return encoded

    def _take_part(self, sender: PeerId, chunk: Chunk, payload: Buffer | None) -> None:
        """`payload`: None for our own, which is encoded when its turn comes."""
        reduction = self._reduction
        mine = self._ranges[reduction.rank]
        if chunk.samples and payload is not None and chunk.number < len(mine):
            start, stop = mine[chunk.number]
            if len(payload) != (expected := self._codec.encoded_bytes(stop - start)):
                raise BadMessage(
                    f"chunk {chunk.number} from {sender[-8:]} has {len(payload)} bytes, not {expected}"
                )
        if not reduction.accept(sender, chunk):
            return
        rank = self.freeze.roster.index(sender)
        if self.evidence is not None:
            self.evidence.told(rank, chunk)
        if chunk.samples and payload is not None:
            self._parts[rank, chunk.number] = payload
        self._part_came.set()

    async def _reduce(self) -> None:
        """Average the chunks of my span, in order, as soon as all members' parts of each are here."""
        while not (self._over or self._failed):
            for number in self._reduction.ready():
                await self._average(number)
                if self._over or self._failed:
                    return
                await asyncio.sleep(0)  # what is done at once lets nobody else have a turn
            await self._part_came.wait()
            self._part_came.clear()

    async def _average(self, number: int) -> None:
        """All of chunk `number` is here: aggregate in roster order, encode once, same bytes to all."""
        reduction, roster = self._reduction, self.freeze.roster
        start, stop = self._ranges[reduction.rank][number]
        ranks, samples = reduction.contributors(), reduction.samples
        if not ranks:
            self._fail([], AbortCause.BAD_CHUNK, "nobody brought a sample")
            return
        mine = reduction.rank
        parts = [
            await self._encoded(mine, number) if rank == mine else self._parts.pop((rank, number))
            for rank in ranks
        ]
        counts = [samples[rank] for rank in ranks]
        key = reduction.rank, number
        encoded = self._shadow.own(key)
        try:
            norm, digest, hashed = await self._do(
                len(parts) * (stop - start),
                average_chunk,
                self._rule,
                self._scratch,
                ranks,
                parts,
                counts,
                start,
                stop - start,
                encoded,
            )
        except Spoilt as fault:
            peer = roster[ranks[fault.index]]
            if fault.finite:
                self._fail([peer], AbortCause.BAD_CHUNK, f"the gradient of {peer[-8:]} is {fault}")
            else:
                self._fail([peer], AbortCause.NONFINITE, str(fault))
            return
        for rank, part in zip(ranks, parts, strict=True):
            if self._lent.get((rank, number)) is part:
                self._scratch.give_back(self._lent.pop((rank, number)))
        self._norm += norm
        self._digests[key] = digest
        ends = number == len(self._ranges[mine]) - 1
        signed: dict[str, Any] = {}
        outputs = [self._digests[mine, at] for at in range(number + 1)] if ends else []
        if self.evidence is not None:
            for rank, part_digest in zip(ranks, hashed, strict=True):
                self.evidence.inputs[rank].append(part_digest)
            if ends:
                try:
                    signed = self.evidence.concluded(samples, outputs)
                except BadInput as fault:
                    self._fail([fault.member], AbortCause.BAD_CHUNK, str(fault))
                    return
        if ends:
            signed |= self.told.pledge(mine, joint_digest(outputs))
        spread = self.likeness.spread() if ends and self._codec.name not in UNMEASURED else None
        header = Averaged(
            **self._attempt(number),
            number=number,
            samples=samples,
            skipped=reduction.skipped,
            squared_norm=self._norm if ends else None,
            spread=None if spread is None else (spread.of_groups, spread.of_mean),
            **signed,
        )
        for outbox in self._outboxes.values():
            outbox.put(header, encoded.toreadonly())
        reduction.receive(self._me, header)
        self._look_at_all(key, digest)

    async def _take_mean(self, reducer: PeerId, averaged: Averaged, payload: Buffer) -> None:
        rank = self.freeze.roster.index(reducer) if reducer in self._outboxes else -1
        if not self._reduction.receive(reducer, averaged):
            return
        if averaged.number == len(self._ranges[rank]) - 1:
            self.told.pledged(rank, averaged)
            if self.evidence is not None:
                self.evidence.concludes(rank, averaged)
        key = rank, averaged.number
        start, stop = self._ranges[rank][averaged.number]
        place = self._shadow.place_of(key, payload)
        try:
            count = stop - start
            digest, squares = await self._do(
                count, check_chunk, self._codec, self._scratch, payload, count, place
            )
            self._squares[rank] += squares
        except BadMessage as fault:
            self._fail([reducer], AbortCause.BAD_CHUNK, str(fault))
            return
        self._look_at_all(key, digest)

    def _look_at_all(self, key: _Key, digest: bytes) -> None:
        """One more mean is here. With the last one, this peer holds what it would commit."""
        self._digests[key] = digest
        if self._over or self.header is not None or len(self._digests) < sum(map(len, self._ranges)):
            return
        if self.evidence is not None and not self._is_signed(self.evidence):
            return
        self.told.hold([joint_digest(each) for each in self.digests()])
        joint = joint_digest(self._digests[key] for key in sorted(self._digests))
        header = self._reduction.header(joint)
        if (liar := self._misstated(header)) is not None:
            self._fail([liar], AbortCause.BAD_CHUNK, f"{liar[-8:]} states another norm than its span has")
            return
        self.header = header
        self._timer.cancel()
        self.held = asyncio.get_running_loop().time()
        self._on_held(self.header, self.held - (self.sealed or self.held))

    def _misstated(self, header: EntryHeader) -> PeerId | None:
        """A reducer that states another norm than its span has: by these the whole step is clipped."""
        for rank, (stated, squares) in enumerate(zip(header.squared_norms, self._squares, strict=True)):
            if rank != self._reduction.rank and abs(stated - squares) > NORM_DOUBT * max(stated, squares):
                return header.roster[rank]
        return None

    def _is_signed(self, evidence: Evidence) -> bool:
        """Whether each reducer has signed for what is here; else the attempt has failed."""
        for rank, outputs in enumerate(self.digests()):
            if outputs and rank != self._reduction.rank:
                try:
                    evidence.check(rank, outputs)
                except BadMessage as fault:
                    self._fail([self.freeze.roster[rank]], AbortCause.BAD_CHUNK, str(fault))
                    return False
        return True

    def _overdue(self) -> None:
        suspects = self._reduction.suspects()
        self._fail(
            suspects, AbortCause.DEADLINE, f"nothing from {', '.join(p[-8:] for p in suspects)} in time"
        )

    def _fail(self, suspects: Sequence[PeerId], cause: AbortCause, detail: str) -> None:
        if not self._over and not self._failed and self.header is None:
            self._failed = True
            self._on_failed(suspects, cause, detail)

    async def _send_all(self, peer: PeerId, outbox: _Outbox) -> None:
        rank = self.freeze.roster.index(peer)
        while True:
            if (number := outbox.contributed) < self._to_contribute(rank) and not outbox.lost:
                outbox.contributed += 1
                encoded = await self._encoded(rank, number)
                outbox.put(self._chunk(rank, number), encoded)
            if outbox.sent == len(outbox.frames):
                outbox.wake.clear()
                await outbox.wake.wait()
                continue
            header, payload = outbox.frames[outbox.sent]
            outbox.sent += 1
            loop = asyncio.get_running_loop()
            self._pace.look(loop.time())
            try:
                await self._swarm.send_chunk(peer, header, payload)
            except Unreachable:
                # Either the link comes back and `rewind` says everything again, or the peer is lost and the
                # leader ends the attempt.
                outbox.sent, outbox.lost = len(outbox.frames), True
            self._pace.look(loop.time())


# -- the machine and its surroundings ------------------------------------------------------------------------


Note = TookOver | Waiting | Diverged | Distrusted | Benched | Faulted | Gone | StoodOut | Unlike | Convicted
"""What the driver has to tell besides outcomes."""
Serve = Callable[[PeerId, Request], Awaitable[tuple[Reply, Buffer]]]


class Rounds:
    """The handler of everything that arrives, and the driver of this peer's `Member`.

    The trainer waits on it (`changed`), reads `attempt` and takes the `outcome`; it never sees a message.
    """

    def __init__(
        self,
        swarm: Swarm,
        member: Member,
        codec: Codec,
        aggregation: Aggregation,
        chunk_values: int,
        serve: Serve,
        spawn: Spawn,
        note: Callable[[Note], None],
        run: str,
        work: Work = at_once,
        audit: Audit | None = None,
    ) -> None:
        """`run`: its fingerprint, to which all signatures are bound."""
        self.member = member
        self.attempt: Attempt | None = None
        self.outcome: Outcome | None = None
        """How the last attempt, or the wait for one, ended; the trainer takes it and sets None."""
        self.lawful: Callable[[Terms], bool] = lambda terms: True
        """Whether the organizer has signed these."""
        self._swarm = swarm
        self._codec = codec
        self._owed = Owed(codec)
        self._aggregation = aggregation
        self._watch, self._strangers = Watch(), Strangers()
        self._chunk_values = chunk_values
        self._serve = serve
        self._spawn = spawn
        self._note = note
        self._work, self._scratch = work, Scratch()
        self.court = Court(swarm, run, spawn, self._convicted, self._withheld)
        self.auditor = None
        if audit is not None:
            self.auditor = Auditor(
                swarm, audit, codec, aggregation, chunk_values, spawn, work, self.court, self._withheld
            )
        self._called: tuple[AttemptKey, dict[str, str]] | None = None
        """The last freeze that this peer has called to, and its word for that."""
        self._memory: memoryview | None = None
        self._entry_bytes = 0
        self._turn = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._due = float("inf")
        """When the timer goes off. uvloop's cannot be asked if that time has passed: it is no timer then."""
        self._closed = False

    # -- for the trainer -------------------------------------------------------------------------------------

    def advance(
        self,
        position: Position,
        last: EntryHeader | None,
        newcomers: Iterable[PeerId],
        *,
        settled: bool,
        above: Ballot | None = None,
    ) -> None:
        """The replica stands at `position` now; what was owed counts no more if no commit led there."""
        self.outcome = None
        if not settled:
            self._owed = Owed(self._codec)
        if settled and self._memory is None:
            self._spawn(self._fetch_memory())
        self._carry_out(
            self.member.advance(
                position, last, self._now(), newcomers=newcomers, settled=settled, above=above
            )
        )

    def progressed(
        self, samples: int, in_flight: int, finish_seconds: float, batch_seconds: float, digest: str | None
    ) -> None:
        """How far this peer is; see `Member.progressed`."""
        self._carry_out(
            self.member.progressed(samples, in_flight, finish_seconds, batch_seconds, digest, self._now())
        )

    def informed(self, present: Mapping[PeerId, Position]) -> None:
        """Who is there, from the DHT. Who comes anew has heard of no proof yet."""
        for peer in present.keys() - self.member.known.keys():
            self.accuse(peer)
        self._carry_out(self.member.informed(present, self._now()))

    def offended(self, peer: PeerId) -> None:
        """A donor broke the contract."""
        self._carry_out(self.member.offended(peer, self._now()))

    def undo(self, step: int, void: Iterable[str]) -> None:
        """See `Member.undo`."""
        self._carry_out(self.member.undo(step, void))

    def accuse(self, peer: PeerId) -> None:
        """Tell that peer of all lies whose proof is here."""
        for told in self.court.accusations():
            self._swarm.send(peer, told)

    def outvoted(self, step: int, ours: str, theirs: str, donor: PeerId) -> None:
        """See `Member.outvoted`."""
        self._carry_out(self.member.outvoted(step, ours, theirs, donor))

    def unhelpful(self, donor: PeerId) -> None:
        """The trainer could not get from `donor` what it had promised."""
        self.member.unhelpful(donor)

    def withdraw(self) -> None:
        """Take part in nothing until `advance`, and have nobody wait for that."""
        self._carry_out(self.member.withdraw())

    async def changed(self, timeout_seconds: float | None) -> bool:
        """Wait until an attempt began or ended; False if nothing did in that time."""
        turn = self._turn
        try:
            async with asyncio.timeout(timeout_seconds):
                await turn.wait()
        except TimeoutError:
            return False
        return True

    async def join(self, contribution: Contribution) -> Outcome:
        """Bring the contribution to the attempt, and to the one that replaces it, until one ends."""
        while self.outcome is None:
            if self.attempt is not None and self.attempt.sealed is None:
                self.attempt.contribute(contribution)
                continue
            await self._turn.wait()
        outcome, self.outcome = self.outcome, None
        return outcome

    def close(self) -> None:
        """Take part in nothing any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self.attempt is not None:
            self.attempt.close()
        self._change()

    # -- Handler ---------------------------------------------------------------------------------------------

    def on_message(self, sender: PeerId, message: Message) -> None:
        if isinstance(message, Call) and message.terms is not None and not self.lawful(message.terms):
            detail = "it calls to a round under terms that the organizer has not signed"
            self._note(Distrusted(sender, detail))
            return
        if isinstance(message, Accusation) and not self.member.is_benched(sender, self._now()):
            self.court.accused(sender, message)
        self._carry_out(self.member.received(sender, message, self._now()))

    def on_link(self, peer: PeerId, up: bool) -> None:
        if up and self.attempt is not None:
            self.attempt.rewind(peer)
        if not up:
            self._note(Gone(peer))
        self._carry_out(self.member.linked(peer, up, self._now()))

    async def on_chunk(self, sender: PeerId, header: Chunk | Averaged, payload: Buffer) -> None:
        """Give the frame to its attempt. One that is early waits here, and its lane with it; a late one is
        dropped."""
        patience = self._now() + self.member.deadlines.silence_seconds([sender])
        while not self._closed:
            attempt, position = self.attempt, self.member.position
            if attempt is not None and attempt.awaits(header):
                await attempt.receive(sender, header, payload)
                return
            if position is None or not position.step <= header.step <= position.step + 1:
                return
            if header.step == position.step:
                if header.parent != position.lineage:
                    return
                joined, obeyed = self.member.joined, self.member.ballot
                if (joined and header.ballot <= joined) or (obeyed and header.ballot < obeyed):
                    return
            if not await self.changed(patience - self._now()):
                return

    def place(self, sender: PeerId, header: Chunk | Averaged, size: int) -> memoryview | None:
        attempt = self.attempt
        if attempt is None or not attempt.awaits(header):
            return None
        return attempt.place(sender, header, size)

    async def on_request(self, sender: PeerId, request: Request) -> tuple[Reply, Buffer]:
        if isinstance(request, GetPledges | GetProof):
            return self.court.answer(request)
        if self.auditor is not None and isinstance(request, GetInput):
            return self.auditor.answer(request)
        return await self._serve(sender, request)

    # -- inside ----------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _convicted(self, found: Convicted, told: Accusation) -> None:
        """By a proof that anyone can check: whoever is known here shall do so."""
        self._note(found)
        for peer in sorted(self.member.known.keys() - {found.peer, self.member.me}):
            self._swarm.send(peer, told)
        self._carry_out(self.member.convicted(found.peer, self._now()))

    def _withheld(self, peer: PeerId, why: str) -> None:
        """What a peer did towards this one, without a proof for others."""
        self._note(Faulted((peer,), AbortCause.BAD_CHUNK, why))
        self.offended(peer)

    def _change(self) -> None:
        turn, self._turn = self._turn, asyncio.Event()
        turn.set()

    def _end(self, outcome: Outcome) -> None:
        if self.attempt is not None:
            if (rate := self.attempt.sent_at) is not None:
                self.member.sent_at(rate)
            self.attempt.close()
            self.attempt = None
        self.outcome = outcome
        self._change()

    def _begin(self, freeze: Freeze) -> None:
        def on_held(header: EntryHeader, reduce_seconds: float) -> None:
            self._carry_out(self.member.held(header, reduce_seconds, self._now()))

        def on_failed(suspects: Sequence[PeerId], cause: AbortCause, detail: str) -> None:
            self._note(Faulted(tuple(suspects), cause, detail))
            self._carry_out(self.member.failed(freeze.ballot, suspects, cause, self._now()))

        self.outcome = None
        last = self.member.last
        told = self.court.begin(freeze, self.member.incarnation)
        self.attempt = Attempt(
            told,
            self._swarm,
            self._codec,
            self._aggregation,
            self._chunk_values,
            most_samples(self.member.rules, self.member.terms, freeze.terms),
            math.sqrt(math.fsum(last.squared_norms)) if last is not None else 0.0,
            self._owed,
            self._spawn,
            self._work,
            self._scratch,
            self._memory,
            self.auditor.begin(freeze, self.member.incarnation, last) if self.auditor is not None else None,
            on_held,
            on_failed,
            lambda proof: self.court.proven(proof, b""),
            last,
            self.member.leases(freeze.ballot.leader),
        )
        if not told.is_called():
            asyncio.get_running_loop().call_soon(self.attempt.refuse)
        self._memory = None
        self._change()

    async def _fetch_memory(self) -> None:
        """Have memory ready for an entry of about the last one's size, while nobody waits for it."""
        self._memory = await self._work(touched_memory, self._entry_bytes + self._entry_bytes // 64 + 1024)

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        if self._closed:
            return
        for effect in effects:
            match effect:
                case Send(to, Call() as call):
                    self._swarm.send(to, self._signed(to, call))
                case Send(to, message):
                    self._swarm.send(to, message)
                case Begin(freeze):
                    self._begin(freeze)
                case Cancel(ballot, cause, dropped):
                    began = self.attempt.began if self.attempt is not None else self._now()
                    if cause is AbortCause.DIGEST_MISMATCH and self.attempt is not None:
                        self.court.compare(self.attempt.told)
                    self._end(Aborted(ballot, cause, dropped, self._now() - began))
                case Apply(header, newcomers):
                    attempt = self.attempt
                    assert attempt is not None
                    assert attempt.sealed is not None
                    entry = Entry(header, attempt.payload())
                    self._entry_bytes = len(entry.payload)
                    self._owed = attempt.owed
                    if self.auditor is not None and attempt.evidence is not None:
                        self.auditor.committed(attempt.evidence, header, entry.payload, attempt.digests())
                    for note in self._judge(header.roster, attempt.likeness):
                        self._note(note)
                    self._end(
                        Committed(
                            entry, newcomers, attempt.sent, attempt.spread(), attempt.sealed, attempt.held
                        )
                    )
                case CatchUp(donor, position, afresh, undo):
                    self._end(Behind(donor, position, afresh, undo))
                case TookOver() | Waiting() | Diverged() | Distrusted() | Benched():
                    self._note(effect)
                case _:
                    assert_never(effect)
        self._arm()

    def _signed(self, to: PeerId, call: Call) -> Call:
        """The call with this peer's word that it calls all to the same."""
        if self._called is None or self._called[0] != (call.parent, call.ballot):
            freeze = freeze_of(to, call, self.member.last, self.member.rules.values)
            assert freeze is not None
            self._called = (call.parent, call.ballot), self.court.call(freeze, self.member.incarnation)
        return call.model_copy(update=self._called[1])

    def _judge(self, roster: Sequence[PeerId], likeness: Likeness) -> Sequence[StoodOut | Unlike]:
        """Whom to name, from what this peer saw of the members' gradients."""
        odd = self._watch.saw(roster, likeness)
        if self._codec.name in UNMEASURED:
            return odd
        return [*odd, *self._strangers.saw(roster, likeness.ranks, likeness.samples, likeness.products)]

    def _arm(self) -> None:
        due = self.member.deadline()
        if self._timer is not None:
            if self._due == due:
                return
            self._timer.cancel()
            self._timer = None
        self._due = due
        if due != float("inf"):
            self._timer = asyncio.get_running_loop().call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._carry_out(self.member.tick(self._now()))
