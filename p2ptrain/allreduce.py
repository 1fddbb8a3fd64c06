"""The round's effects, carried out: one `Member` machine wired to the swarm, and the bytes of each attempt.

`Rounds` feeds the machine with messages, broken links and time, and does what it answers. `Attempt` moves the
bytes: it sends this peer's contribution to every reducer, averages this peer's own span, and collects the
averaged chunks of all spans in a shadow buffer that touches nothing until the round is committed.

Not covered: the numeric work of an attempt runs on the event loop, chunk by chunk.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

import torch
from torch import Tensor

from p2ptrain.errors import BadMessage, Unreachable
from p2ptrain.events import AbortCause
from p2ptrain.gradients.aggregation import OUTSIZED, Aggregation, outsized, squared_norm
from p2ptrain.gradients.codecs import Codec
from p2ptrain.gradients.likeness import Likeness, StoodOut, Watch
from p2ptrain.protocol.member import Member
from p2ptrain.protocol.reduction import Reduction
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
from p2ptrain.records import (
    Averaged,
    Ballot,
    Chunk,
    EntryHeader,
    Freeze,
    Message,
    PeerId,
    Position,
    Reply,
    Request,
)
from p2ptrain.replica.log import Entry
from p2ptrain.swarm.port import Buffer, Swarm

# -- outcomes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Committed:
    """Everyone on the roster applies this entry."""

    entry: Entry
    newcomers: tuple[PeerId, ...]
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


LEAST_SENT_BYTES = 64 * 1024
"""So much fits into the buffers on the way: how long it took says nothing."""

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
"""Starts a task whose failure is ours and ends the program."""

# -- one attempt ---------------------------------------------------------------------------------------------


@dataclass
class _Outbox:
    """Frames for one peer, in order. After a broken link they are sent again from the first: receivers know
    duplicates."""

    frames: list[tuple[Chunk | Averaged, Buffer]] = field(default_factory=list)
    sent: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, header: Chunk | Averaged, payload: Buffer) -> None:
        self.frames.append((header, payload))
        self.wake.set()

    def rewind(self) -> None:
        self.sent = 0
        self.wake.set()


@dataclass
class _Pace:
    """How fast this peer sends while it has something to send."""

    sent_bytes: int = 0
    seconds: float = 0.0
    _sending: int = 0
    _since: float = 0.0

    def begins(self, now: float) -> None:
        """One more frame is on its way."""
        if not self._sending:
            self._since = now
        self._sending += 1

    def ends(self, now: float, sent_bytes: int) -> None:
        """The carrier has taken so much of one of them."""
        self._sending -= 1
        self.sent_bytes += sent_bytes
        if not self._sending:
            self.seconds += now - self._since


class Attempt:
    """The transfers of one attempt; `on_held` or `on_failed` is called when they are over."""

    def __init__(
        self,
        freeze: Freeze,
        swarm: Swarm,
        codec: Codec,
        aggregation: Aggregation,
        chunk_values: int,
        most_samples: int,
        usual_norm: float,
        spawn: Spawn,
        on_held: Callable[[EntryHeader, float], None],
        on_failed: Callable[[Sequence[PeerId], AbortCause, str], None],
    ) -> None:
        """`usual_norm`: of the last averaged gradient, 0 if there was none."""
        self.freeze = freeze
        self._usual_norm = usual_norm
        self.began = asyncio.get_running_loop().time()
        self.held = self.began
        self.sealed: float | None = None
        """Loop time when the contribution was given, None before."""
        self.header: EntryHeader | None = None
        self._me = swarm.peer_id
        self._swarm = swarm
        self._codec = codec
        self._aggregation = aggregation
        self.likeness = Likeness()
        self._reduction = Reduction(freeze, self._me, chunk_values, most_samples)
        self._ranges = [
            chunk_ranges(start, stop, chunk_values)
            for start, stop in zip(freeze.spans, freeze.spans[1:], strict=False)
        ]
        self._on_held, self._on_failed = on_held, on_failed
        self._parts: dict[tuple[int, int], bytes] = {}  # (member's rank, chunk of my span) → encoded sum
        self._shadow: dict[tuple[int, int], bytes] = {}  # (reducer's rank, chunk) → encoded mean
        self._pace = _Pace()
        self._norm = 0.0
        self._over = self._failed = False
        self._outboxes = {peer: _Outbox() for peer in freeze.roster if peer != self._me}
        self._senders = [spawn(self._send_all(peer, outbox)) for peer, outbox in self._outboxes.items()]
        self._timer = asyncio.get_running_loop().call_later(freeze.deadline_seconds, self._overdue)

    def contribute(self, contribution: Contribution) -> None:
        """Seal: send every reducer its span. The tensor must not change until the attempt is over."""
        self.sealed = asyncio.get_running_loop().time()
        for rank, reducer in enumerate(self.freeze.roster):
            ranges = self._ranges[rank] if contribution.samples else self._ranges[rank][:1]
            for number, (start, stop) in enumerate(ranges):
                header = Chunk(
                    step=self.freeze.step,
                    parent=self.freeze.parent,
                    ballot=self.freeze.ballot,
                    number=number,
                    samples=contribution.samples,
                )
                encoded = self._codec.encode(contribution.total[start:stop]) if contribution.samples else b""
                self._deliver(reducer, header, encoded)

    def receive(self, sender: PeerId, header: Chunk | Averaged, payload: bytes) -> None:
        """A frame of this attempt arrived. What breaks the contract fails the attempt by the sender's
        name."""
        if self._over:
            return
        try:
            if isinstance(header, Chunk):
                self._take_part(sender, header, payload)
            else:
                self._take_mean(sender, header, payload)
        except BadMessage as fault:
            self._fail([sender], AbortCause.BAD_CHUNK, str(fault))

    def awaits(self, header: Chunk | Averaged) -> bool:
        """Whether the frame is of this attempt."""
        freeze = self.freeze
        return (header.step, header.parent, header.ballot) == (freeze.step, freeze.parent, freeze.ballot)

    def rewind(self, peer: PeerId) -> None:
        """The link to `peer` was reset: say everything again."""
        if peer in self._outboxes:
            self._outboxes[peer].rewind()

    @property
    def sent_at(self) -> float | None:
        """Bytes per second while this peer had something to send; None if it sent next to nothing."""
        pace = self._pace
        return (
            pace.sent_bytes / pace.seconds if pace.sent_bytes >= LEAST_SENT_BYTES and pace.seconds else None
        )

    def payload(self) -> bytes:
        """The averaged bytes, spans in roster order, once all are here."""
        return b"".join(self._shadow[key] for key in sorted(self._shadow))

    def close(self) -> None:
        """Stop all transfers."""
        self._over = True
        self._timer.cancel()
        for sender in self._senders:
            sender.cancel()

    # -- inside ----------------------------------------------------------------------------------------------

    def _deliver(self, to: PeerId, header: Chunk | Averaged, payload: bytes) -> None:
        if to == self._me:
            self.receive(to, header, payload)
        else:
            self._outboxes[to].put(header, payload)

    def _take_part(self, sender: PeerId, chunk: Chunk, payload: bytes) -> None:
        reduction = self._reduction
        if not reduction.accept(sender, chunk):
            return
        rank = self.freeze.roster.index(sender)
        if chunk.samples:
            start, stop = self._ranges[reduction.rank][chunk.number]
            if len(payload) != (expected := self._codec.encoded_bytes(stop - start)):
                raise BadMessage(
                    f"chunk {chunk.number} from {sender[-8:]} has {len(payload)} bytes, not {expected}"
                )
            self._parts[rank, chunk.number] = payload
        for number in reduction.ready():
            self._average(number)
            if self._over:
                return

    def _average(self, number: int) -> None:
        """All of chunk `number` is here: aggregate in roster order, encode once, same bytes to all."""
        reduction, roster = self._reduction, self.freeze.roster
        start, stop = self._ranges[reduction.rank][number]
        ranks = reduction.contributors()
        samples = reduction.samples
        parts = []
        for rank in ranks:
            part = torch.empty(stop - start)
            try:
                self._codec.decode(self._parts.pop((rank, number)), part)
            except BadMessage as fault:
                self._fail([roster[rank]], AbortCause.NONFINITE, str(fault))
                return
            parts.append(part)
        counts = [samples[rank] for rank in ranks]
        if not parts:
            self._fail([], AbortCause.BAD_CHUNK, "nobody brought a sample")
            return
        if (odd := outsized(parts, counts, self._usual_norm)) is not None:
            peer = roster[ranks[odd]]
            detail = f"the gradient of {peer[-8:]} is over {OUTSIZED:,.0f} times as long as the others'"
            self._fail([peer], AbortCause.BAD_CHUNK, detail)
            return
        self.likeness.add(ranks, parts, counts)
        encoded = self._codec.encode(self._aggregation(parts, counts))
        decoded = torch.empty(stop - start)
        self._codec.decode(encoded, decoded)
        self._norm += squared_norm(decoded)
        last = number == len(self._ranges[reduction.rank]) - 1
        header = Averaged(
            step=self.freeze.step,
            parent=self.freeze.parent,
            ballot=self.freeze.ballot,
            number=number,
            samples=samples,
            squared_norm=self._norm if last else None,
        )
        for peer in roster:
            if peer != self._me:
                self._deliver(peer, header, encoded)
        self._deliver(self._me, header, encoded)

    def _take_mean(self, reducer: PeerId, averaged: Averaged, payload: bytes) -> None:
        reduction = self._reduction
        if not reduction.receive(reducer, averaged):
            return
        rank = self.freeze.roster.index(reducer)
        start, stop = self._ranges[rank][averaged.number]
        if reducer != self._me:
            # Checked now and not when applying: after the commit it would be too late to refuse.
            self._codec.decode(payload, torch.empty(stop - start))
        self._shadow[rank, averaged.number] = payload
        if reduction.complete and self.header is None:
            digest = hashlib.sha256()
            for key in sorted(self._shadow):
                digest.update(hashlib.sha256(self._shadow[key]).digest())
            self.header = reduction.header(digest.hexdigest())
            self._timer.cancel()
            self.held = asyncio.get_running_loop().time()
            self._on_held(self.header, self.held - (self.sealed or self.held))

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
        while True:
            if outbox.sent == len(outbox.frames):
                outbox.wake.clear()
                await outbox.wake.wait()
                continue
            header, payload = outbox.frames[outbox.sent]
            outbox.sent += 1
            loop, taken = asyncio.get_running_loop(), 0
            self._pace.begins(loop.time())
            try:
                await self._swarm.send_chunk(peer, header, payload)
                taken = len(payload)
            except Unreachable:
                # Either the link comes back and `rewind` says everything again, or the peer is lost and the
                # leader ends the attempt.
                outbox.sent = len(outbox.frames)
            finally:
                self._pace.ends(loop.time(), taken)


# -- the machine and its surroundings ------------------------------------------------------------------------


Note = TookOver | Waiting | Diverged | Distrusted | Benched | Faulted | Gone | StoodOut
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
    ) -> None:
        self.member = member
        self.attempt: Attempt | None = None
        self.outcome: Outcome | None = None
        """How the last attempt, or the wait for one, ended; the trainer takes it and sets None."""
        self._swarm = swarm
        self._codec = codec
        self._aggregation = aggregation
        self._watch = Watch()
        self._chunk_values = chunk_values
        self._serve = serve
        self._spawn = spawn
        self._note = note
        self._turn = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._due = float("inf")
        """When the timer goes off. uvloop's cannot be asked if that time has passed: it is no timer then."""
        self._closed = False

    # -- for the trainer -------------------------------------------------------------------------------------

    def advance(
        self, position: Position, last: EntryHeader | None, newcomers: Iterable[PeerId], *, settled: bool
    ) -> None:
        """The replica stands at `position` now."""
        self.outcome = None
        self._carry_out(
            self.member.advance(position, last, self._now(), newcomers=newcomers, settled=settled)
        )

    def progressed(
        self, samples: int, in_flight: int, finish_seconds: float, batch_seconds: float, digest: str | None
    ) -> None:
        """How far this peer is; see `Member.progressed`."""
        self._carry_out(
            self.member.progressed(samples, in_flight, finish_seconds, batch_seconds, digest, self._now())
        )

    def informed(self, present: Mapping[PeerId, Position]) -> None:
        """Who is there, from the DHT."""
        self._carry_out(self.member.informed(present, self._now()))

    def offended(self, peer: PeerId) -> None:
        """A donor broke the contract."""
        self._carry_out(self.member.offended(peer, self._now()))

    def unhelpful(self, donor: PeerId) -> None:
        """The trainer could not get from `donor` what it had promised."""
        self.member.unhelpful(donor)

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
        self._carry_out(self.member.received(sender, message, self._now()))

    def on_link(self, peer: PeerId, up: bool) -> None:
        if up and self.attempt is not None:
            self.attempt.rewind(peer)
        if not up:
            self._note(Gone(peer))
        self._carry_out(self.member.linked(peer, up, self._now()))

    async def on_chunk(self, sender: PeerId, header: Chunk | Averaged, payload: bytes) -> None:
        """Give the frame to its attempt. One that is early waits here, and its lane with it; a late one is
        dropped."""
        patience = self._now() + self.member.deadlines.silence_seconds([sender])
        while not self._closed:
            attempt, position = self.attempt, self.member.position
            if attempt is not None and attempt.awaits(header):
                attempt.receive(sender, header, payload)
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

    async def on_request(self, sender: PeerId, request: Request) -> tuple[Reply, Buffer]:
        return await self._serve(sender, request)

    # -- inside ----------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

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
        self.attempt = Attempt(
            freeze,
            self._swarm,
            self._codec,
            self._aggregation,
            self._chunk_values,
            self.member.rules.most_samples,
            math.sqrt(math.fsum(last.squared_norms)) if last is not None else 0.0,
            self._spawn,
            on_held,
            on_failed,
        )
        self._change()

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        if self._closed:
            return
        for effect in effects:
            match effect:
                case Send(to, message):
                    self._swarm.send(to, message)
                case Begin(freeze):
                    self._begin(freeze)
                case Cancel(ballot, cause, dropped):
                    began = self.attempt.began if self.attempt is not None else self._now()
                    self._end(Aborted(ballot, cause, dropped, self._now() - began))
                case Apply(header, newcomers):
                    attempt = self.attempt
                    assert attempt is not None
                    assert attempt.sealed is not None
                    entry = Entry(header, attempt.payload())
                    for stood_out in self._watch.saw(header.roster, attempt.likeness):
                        self._note(stood_out)
                    self._end(Committed(entry, newcomers, attempt.sealed, attempt.held))
                case CatchUp(donor, position, afresh):
                    self._end(Behind(donor, position, afresh))
                case TookOver() | Waiting() | Diverged() | Distrusted() | Benched():
                    self._note(effect)
                case _:
                    assert_never(effect)
        self._arm()

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
