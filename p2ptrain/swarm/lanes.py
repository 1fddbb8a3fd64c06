"""Frames over streams: all of `port.Swarm` but discovery, for a carrier that can open and accept streams.

Each peer opens one stream per lane towards each peer it has something for, and keeps it open. Both ends begin
with a `Hello`, and with a `Gate` nothing else is said to who is not invited; the lanes are for peers of the
same run only. A request has a stream of its own, and so has the question whether a peer is still there: it is
a request stream that is closed after the greeting.

Chunks take a faster way, if the carrier has one to that peer (`Direct`), and the data lane otherwise.

When a lane or another connection to or from a peer breaks, the peer is greeted anew, once: if it answers, the
link is up, and the lanes open again when they are needed; if not, it is down, everything to and from the peer
is closed, and for a second nothing is tried again. A peer that was down is up as soon as a lane to or from it
opens.

Not covered: how streams come about (`libp2p`), and silence without a break, which is for deadlines above to
notice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Literal, Protocol

from p2ptrain import PROTOCOL_VERSION
from p2ptrain.errors import (
    BadMessage,
    OtherVersion,
    P2PTrainError,
    PeerFault,
    Refused,
    Uninvited,
    Unreachable,
)
from p2ptrain.events import FaultCause, PeerFaulted, clean, short
from p2ptrain.protocol.estimate import Estimate, clamp
from p2ptrain.records import (
    MAX_HEADER_BYTES,
    MAX_HELLO_BYTES,
    Averaged,
    Chunk,
    EntryReply,
    FalseSum,
    GetEvents,
    GetMetrics,
    GetRun,
    Greeting,
    Hello,
    Input,
    Later,
    Lineage,
    Manifest,
    Message,
    Pass,
    PeerId,
    Piece,
    Pledges,
    Probe,
    Probed,
    Redeem,
    Redeemed,
    Refusal,
    Reply,
    Request,
    TwoStories,
    Watching,
    Wire,
)
from p2ptrain.swarm.frames import pack, read_frame
from p2ptrain.swarm.gate import Gate, permits
from p2ptrain.swarm.port import Buffer, Handler
from p2ptrain.swarm.throttle import Throttle
from p2ptrain.swarm.validator import Budgets

Kind = Literal["control", "data", "request"]
KINDS: tuple[Kind, ...] = ("control", "data", "request")

ASKING = "0" * 64
"""The fingerprint of who knows none: it may ask what the run is, redeem an invite, measure the way there
and watch; no more."""
ANY_RUN = (GetRun, Redeem, Probe, GetMetrics, GetEvents)

OPEN_SECONDS = 10.0
"""A dial through relays takes a few seconds."""
REOPEN_SECONDS = 1.0
"""Within this, or longer where opening a stream was seen to take longer, a peer whose lane broke must answer
again, or it counts as gone."""
RETRY_SECONDS = 1.0
"""So long a peer that could not be reached is not dialled again."""
HELLO_SECONDS = 5.0
"""A stream that says nothing useful for so long is closed."""
REPLY_SECONDS = 600.0
"""64 MB, the largest piece of a snapshot, at 1 Mbit/s."""
STALLED_SECONDS = 30.0
"""Who takes nothing of a reply for so long does not want it."""

MAX_QUEUED_BYTES = 4 * 2**20
"""Control messages that wait for one peer's stream; more are dropped."""
MESSAGES_PER_SECOND = 500.0
MESSAGES_AT_ONCE = 1000.0
"""Control messages that are heard from one peer; each costs the event loop up to a millisecond."""
MAX_REQUESTS_PER_PEER = 8
MAX_REMEMBERED = 1024
"""Peers that are remembered as down, or as already complained about."""

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
OpenStream = Callable[[PeerId, Kind, float], Awaitable[Stream]]
"""Opens a stream of that kind to a peer within so many seconds, or raises Unreachable."""


class Direct(Protocol):
    """A faster way for chunks than the data lane: `tls.TlsCarrier`."""

    def carries(self, peer: PeerId) -> bool:
        """Whether it reaches this peer now; if not, it may try to."""
        ...

    async def send(self, to: PeerId, frame: bytes, content: memoryview) -> None:
        """Returns once it has taken the bytes. Raises Unreachable."""
        ...

    def drop(self, peer: PeerId) -> None:
        """The peer is gone for all we know."""
        ...

    @property
    def delivered_bytes(self) -> int:
        """Bytes that have reached others so far, as far as can be told."""
        ...


class _Lane:
    """Our end of one outbound stream. It lives as long as the stream does; the next one is another lane."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.opened: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
        self.turn = asyncio.Lock()
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    def offer(self, frame: bytes) -> bool:
        """Queue the frame; False if the queue is full, or the stream has just broken."""
        writer = self.opened.result() if self.opened.done() and not self.opened.exception() else None
        queued = self._waiting_bytes if writer is None else writer.transport.get_write_buffer_size()
        if queued + len(frame) > MAX_QUEUED_BYTES or (writer is not None and _is_closed(writer)):
            return False
        if writer is not None:
            writer.write(frame)
        else:
            self._waiting.append(frame)
            self._waiting_bytes += len(frame)
        return True

    def start(self, writer: asyncio.StreamWriter) -> None:
        """The stream is open: send what waits."""
        if not _is_closed(writer):
            writer.writelines(self._waiting)
        self._waiting.clear()
        self.opened.set_result(writer)

    def end(self, why: str) -> None:
        """The stream is no more, or never was."""
        if not self.opened.done():
            self.opened.set_exception(Unreachable(why))
            self.opened.exception()  # nobody need wait for it
        elif not self.opened.exception():
            self.opened.result().transport.abort()
        if self.task is not None:
            self.task.cancel()


class Lanes:
    """One peer's frames to and from all others."""

    def __init__(
        self,
        me: PeerId,
        fingerprint: str,
        open_stream: OpenStream,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        *,
        max_payload_bytes: int,
        on_event: Callable[[PeerFaulted], None],
        direct: Direct | None = None,
        gate: Gate | None = None,
        throttle: Throttle | None = None,
    ) -> None:
        """`spawn` starts a task whose failure is ours and ends the program. Without a `gate` all may come."""
        self.fingerprint = fingerprint
        self.gate = gate
        self.faults: Counter[str] = Counter()
        self._me = me
        self._open_stream = open_stream
        self._spawn = spawn
        self._max_payload_bytes = max_payload_bytes
        self._on_event = on_event
        self._direct = direct
        self._throttle = throttle or Throttle()
        self._handler: Handler | None = None
        self._closed = False
        self._outbound: dict[tuple[PeerId, Kind], _Lane] = {}
        self._inbound: dict[tuple[PeerId, Kind], asyncio.Task[Any]] = {}
        self._answering: Counter[PeerId] = Counter()
        self._greeting: set[PeerId] = set()
        self._shown: dict[PeerId, Pass] = {}  # by whom there is a lane with, for `review`
        self._down: dict[PeerId, float] = {}  # peer that could not be reached → loop time to try again
        self._complained: set[tuple[PeerId, FaultCause]] = set()
        self._dials: dict[PeerId, Estimate] = {}  # seconds from dialling to the other's hello
        self._heard = Budgets(MESSAGES_PER_SECOND, MESSAGES_AT_ONCE)
        self._sent: Counter[Kind] = Counter()
        self._received: Counter[Kind] = Counter()

    @property
    def traffic(self) -> Mapping[str, tuple[int, int]]:
        """Lane → bytes (sent, received) so far, framing included."""
        return {kind: (self._sent[kind], self._received[kind]) for kind in KINDS}

    @property
    def delivered_bytes(self) -> int:
        """See `port.Swarm`."""
        return self._sent["data"] + (self._direct.delivered_bytes if self._direct is not None else 0)

    @property
    def dial_seconds(self) -> float:
        """The longest that any peer is given to answer again now."""
        return max((self._reopen_seconds(peer) for peer in self._dials), default=REOPEN_SECONDS)

    # -- port.Swarm ------------------------------------------------------------------------------------------

    def serve(self, handler: Handler) -> None:
        self._handler = handler

    def send(self, to: PeerId, message: Message) -> None:
        frame = pack(message)
        lane = self._lane(to, "control")
        if lane is not None and lane.offer(frame):
            self._sent["control"] += len(frame)
            self._throttle.sent(len(frame))
        else:
            self.faults["dropped"] += 1

    async def send_chunk(self, to: PeerId, header: Chunk | Averaged, payload: Buffer) -> None:
        content = memoryview(payload).cast("B")
        if content.nbytes > self._max_payload_bytes:
            raise ValueError(
                f"a chunk of {content.nbytes} bytes; peers take at most {self._max_payload_bytes}"
            )
        frame = pack(header, content.nbytes)
        if self._now() < self._down.get(to, 0.0):
            raise Unreachable(f"peer {short(to)} could not be reached a moment ago")
        if self._direct is not None and self._direct.carries(to):
            await self._direct.send(to, frame, content)
            return
        lane = self._lane(to, "data")
        if lane is None:
            raise Unreachable("we left")
        try:
            writer = await asyncio.shield(lane.opened)
            await self._throttle.before_sending(len(frame) + content.nbytes)
            async with lane.turn:
                await writer.drain()  # of a frame whose sender was cancelled
                if _is_closed(writer):
                    raise Unreachable("it has just broken")
                writer.write(frame)
                writer.write(content)
                try:
                    await writer.drain()
                except asyncio.CancelledError:
                    if not content.readonly:
                        writer.transport.abort()  # the caller may now change the bytes that are still to go
                    raise
        except (OSError, Unreachable) as error:
            raise Unreachable(f"the data lane to peer {short(to)} broke: {error}") from None
        self._sent["data"] += len(frame) + content.nbytes

    async def request(
        self, to: PeerId, request: Request, *, timeout_seconds: float, max_bytes: int
    ) -> tuple[Reply, bytes]:
        await self._throttle.before_receiving()
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._ask(to, request, timeout_seconds, max_bytes)
        except TimeoutError:
            raise Unreachable(
                f"peer {short(to)} did not answer {request.kind} within {timeout_seconds:g} s"
            ) from None
        except BadMessage as fault:
            self.blame(to, fault)
            raise

    # -- for the carrier -------------------------------------------------------------------------------------

    async def accept(
        self, peer: PeerId, kind: Kind, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Serve a stream that `peer` opened, until it ends; closing it is for the caller."""
        try:
            hello, _ = await self._read(peer, reader, kind, 0, HELLO_SECONDS, MAX_HELLO_BYTES)
            if not isinstance(hello, Hello):
                raise BadMessage(f"a {hello.kind} where a stream should begin with hello")
            if self._handler is None or self._closed:
                self._write(writer, kind, Refusal(reason="not ready yet"))
                return
            if flaw := self._uninvited(peer, hello):
                self._write(writer, kind, Refusal(reason=clean(flaw, 300), uninvited=True))
                await _linger(reader)
                return
            self._write(writer, kind, self._hello())
            if self._fits(peer, hello):
                self.reached(peer)
            if kind == "request":
                await self._answer(peer, hello, reader, writer, self._handler)
            elif self._same_run(peer, hello, kind):
                await self._listen(peer, kind, reader, self._handler)
        except BadMessage as fault:
            self.blame(peer, fault)
        except Unreachable:
            pass  # it left, or never said anything; if this was a lane, `_listen` has seen to it

    def greeting(self, to: PeerId) -> Greeting:
        """With which a direct connection begins."""
        return Greeting(
            protocol=PROTOCOL_VERSION,
            fingerprint=self.fingerprint,
            sender=self._me,
            to=to,
            access=self.gate.own if self.gate else None,
        )

    def why_apart(self, peer: PeerId, hello: Hello | Greeting, *, in_rounds: bool = True) -> str:
        """Why one that greets so is no peer of our run, or may take no part `in_rounds`; empty if it may."""
        if hello.protocol != PROTOCOL_VERSION:
            return f"it speaks protocol {hello.protocol} and we {PROTOCOL_VERSION}; upgrade the older side"
        if self.gate and (flaw := self.gate.flaw(peer, hello.access)):
            return flaw
        if hello.fingerprint != self.fingerprint or self.fingerprint == ASKING:
            return f"it trains {_named(hello.fingerprint)} and we {_named(self.fingerprint)}"
        if in_rounds and self.gate and hello.access and not permits(role := hello.access.grant.role, None):
            return f"an invite for role {role!r} does not allow to take part in rounds"
        return ""

    def place(self, sender: PeerId, header: Wire, size: int) -> memoryview | None:
        """Where the payload of a chunk that is about to come directly shall be written; None: wherever."""
        if self._handler is None or self._closed or not isinstance(header, Chunk | Averaged):
            return None
        return self._handler.place(sender, header, size)

    async def deliver(self, sender: PeerId, header: Chunk | Averaged, payload: Buffer) -> None:
        """A chunk came directly."""
        if self._handler is not None and not self._closed:
            await self._handler.on_chunk(sender, header, payload)

    def blame(self, peer: PeerId, fault: PeerFault) -> None:
        """The peer broke the contract, or is none of ours."""
        refused = isinstance(fault, Refused)
        self.faults["refused" if refused else "bad_message"] += 1
        self._complain(peer, FaultCause.REFUSED if refused else FaultCause.BAD_MESSAGE, str(fault))

    def review(self) -> None:
        """Part from those whose invite has ended since they showed it; for the carrier to call now and
        then."""
        linked = {peer for peer, _ in (*self._outbound, *self._inbound)}
        self._shown = {peer: shown for peer, shown in self._shown.items() if peer in linked}
        for peer, shown in list(self._shown.items()):
            if self.gate is not None and (flaw := self.gate.flaw(peer, shown)):
                self.blame(peer, Refused(flaw))
                self._lose(peer)

    def renew(self, peer: PeerId, shown: Pass) -> None:
        """The peer has shown this meanwhile, and it holds."""
        if peer in self._shown:
            self._shown[peer] = shown

    def close(self) -> None:
        """Open and tell nothing any more."""
        self._closed = True
        for lane in self._outbound.values():
            lane.end("we left")

    # -- outbound --------------------------------------------------------------------------------------------

    def _lane(self, to: PeerId, kind: Kind) -> _Lane | None:
        """The lane to that peer, being opened if there was none; None while it may not be dialled."""
        if to == self._me:
            raise ValueError("a peer has no lane to itself")
        lane = self._outbound.get((to, kind))
        if lane is None and not self._closed and self._now() >= self._down.get(to, 0.0):
            lane = self._outbound[to, kind] = _Lane()
            lane.task = self._spawn(self._keep_open(to, kind, lane))
        return lane

    async def _keep_open(self, to: PeerId, kind: Kind, lane: _Lane) -> None:
        try:
            reader, writer = await self._open(to, kind, OPEN_SECONDS)
        except PeerFault as fault:
            lane.task = None
            lane.end(str(fault))
            self._lose(to)
            return
        if kind == "data" and not _is_closed(writer):
            # `drain` then returns only when the kernel has every byte, and the caller may reuse its buffer.
            writer.transport.set_write_buffer_limits(high=0)
        lane.start(writer)
        self.reached(to)
        with contextlib.suppress(OSError):
            await reader.read(1)  # nothing more is due on this side: whatever comes, it is over
        if self._outbound.get((to, kind)) is lane:
            del self._outbound[to, kind]
            lane.task = None
            lane.end("it broke")
            self.broken(to)

    async def _open(
        self, to: PeerId, kind: Kind, seconds: float, *, first: bytes = b"", any_run: bool = False
    ) -> Stream:
        """A stream on which both have said hello and we, right after, `first`.

        Raises Refused if their hello does not fit ours, BadMessage if they said something else, Unreachable.
        """
        began = self._now()
        reader, writer = await self._open_stream(to, kind, seconds)
        try:
            self._write(writer, kind, self._hello())
            writer.write(first)
            answer, _ = await self._read(to, reader, kind, 0, seconds, MAX_HELLO_BYTES)
            match answer:
                case Refusal():
                    refusal = Uninvited if answer.uninvited else Refused
                    raise refusal(f"peer {short(to)} refused: {clean(answer.reason, 300)}")
                case Hello():
                    if flaw := self._uninvited(to, answer):
                        raise Refused(f"peer {short(to)} is not one of the invited: {flaw}")
                    if any_run and answer.protocol != PROTOCOL_VERSION:
                        said = f"peer {short(to)} speaks protocol {answer.protocol}, not {PROTOCOL_VERSION}"
                        raise OtherVersion(said, answer.protocol)
                    if not (any_run or self._same_run(to, answer, kind)):
                        raise Refused(f"peer {short(to)} does not train this run")
                case _:
                    raise BadMessage(f"a {answer.kind} where a stream should begin with hello")
        except BaseException:
            writer.transport.abort()
            raise
        self._dial(to).observe(self._now() - began)
        return reader, writer

    async def _ask(self, to: PeerId, request: Request, seconds: float, max_bytes: int) -> tuple[Reply, bytes]:
        question = pack(request)
        any_run = isinstance(request, ANY_RUN)
        reader, writer = await self._open(to, "request", seconds, first=question, any_run=any_run)
        self._sent["request"] += len(question)
        try:
            reply, payload = await self._read(to, reader, "request", max_bytes, seconds)
        finally:
            writer.transport.abort()
        match reply:
            case Refusal():
                raise Refused(f"peer {short(to)} refused {request.kind}: {clean(reply.reason)}")
            case (
                Piece()
                | EntryReply()
                | Lineage()
                | Manifest()
                | Later()
                | Input()
                | Pledges()
                | FalseSum()
                | TwoStories()
                | Redeemed()
                | Probed()
            ):
                return reply, payload
            case _:
                raise BadMessage(f"a {reply.kind} in answer to {request.kind}")

    # -- inbound ---------------------------------------------------------------------------------------------

    async def _listen(self, peer: PeerId, kind: Kind, reader: asyncio.StreamReader, handler: Handler) -> None:
        """Deliver what comes on a lane until it breaks, or a newer one of its kind takes its place."""
        me = asyncio.current_task()
        assert me is not None
        older = self._inbound.get((peer, kind))
        self._inbound[peer, kind] = me
        if older is not None:
            older.cancel()
            self._tell(peer, True)  # it has noticed a break before we did
        max_payload_bytes = self._max_payload_bytes if kind == "data" else 0
        try:
            while True:
                header, payload = await self._read(peer, reader, kind, max_payload_bytes, None)
                if kind == "control" and isinstance(header, Message):
                    handler.on_message(peer, header)
                    if wait := self._heard.wait_seconds(peer, 1, self._now()):
                        await asyncio.sleep(wait)  # the next ones wait in its own buffers
                elif kind == "data" and isinstance(header, Chunk | Averaged):
                    await handler.on_chunk(peer, header, payload)
                    await self._throttle.before_receiving()
                else:
                    raise BadMessage(f"a {header.kind} on the {kind} lane")
        except PeerFault:
            if self._inbound.get((peer, kind)) is me:
                self.broken(peer)
            raise
        finally:
            if self._inbound.get((peer, kind)) is me:
                del self._inbound[peer, kind]

    async def _answer(
        self,
        peer: PeerId,
        hello: Hello,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        handler: Handler,
    ) -> None:
        request, _ = await self._read(peer, reader, "request", 0, HELLO_SECONDS)
        if not isinstance(request, Request):
            raise BadMessage(f"a {request.kind} where a request was due")
        reply: Reply
        payload: Buffer = b""
        if isinstance(request, Watching) and (flaw := self._unwatched(peer, hello)):
            reply = Refusal(reason=clean(flaw, 300))
        elif not (isinstance(request, ANY_RUN) or self._same_run(peer, hello, "request")):
            reply = Refusal(reason="we do not train the same run")
        elif self.gate and hello.access and not permits(role := hello.access.grant.role, request):
            reply = Refusal(reason=f"an invite for role {role!r} does not allow {request.kind}")
        elif self._answering[peer] >= MAX_REQUESTS_PER_PEER:
            reply = Refusal(reason=f"more than {MAX_REQUESTS_PER_PEER} requests at once")
        else:
            self._answering[peer] += 1
            try:
                reply, payload = await handler.on_request(peer, request)
            except P2PTrainError as error:
                reply = Refusal(reason=clean(str(error), 300))
            finally:
                self._answering[peer] -= 1
                self._answering += Counter()  # forgets peers at zero
        await self._throttle.before_sending(memoryview(payload).nbytes)
        if _is_closed(writer):
            return  # who asked has left meanwhile
        writer.transport.set_write_buffer_limits(high=0)  # `drain` then waits until all has gone
        self._write(writer, "request", reply, payload)
        try:
            async with asyncio.timeout(REPLY_SECONDS):
                await _taken(writer)
        except OSError:  # a TimeoutError is one
            writer.transport.abort()

    # -- links -----------------------------------------------------------------------------------------------

    def reached(self, peer: PeerId) -> None:
        """A stream or connection to or from the peer has opened, and it trains our run."""
        if self._down.pop(peer, None) is not None:
            self._tell(peer, True)

    def broken(self, peer: PeerId) -> None:
        """A lane or connection to or from the peer has ended. Often several do at once; the peer is greeted
        once."""
        if not self._closed and peer not in self._greeting:
            self._greeting.add(peer)
            self._spawn(self._greet(peer))

    async def _greet(self, peer: PeerId) -> None:
        seconds, began = self._reopen_seconds(peer), self._now()
        try:
            _, writer = await self._open(peer, "request", seconds)
        except PeerFault:
            if self._now() - began >= seconds:
                self._dial(peer).miss()
            self._lose(peer)
        else:
            writer.close()
            self._down.pop(peer, None)
            self._tell(peer, True)
        finally:
            self._greeting.discard(peer)

    def _dial(self, peer: PeerId) -> Estimate:
        if peer not in self._dials and len(self._dials) >= MAX_REMEMBERED:
            self._dials.clear()
        return self._dials.setdefault(peer, Estimate(first=REOPEN_SECONDS))

    def _reopen_seconds(self, peer: PeerId) -> float:
        return clamp(REOPEN_SECONDS, 2 * self._dial(peer).bound, OPEN_SECONDS)

    def _lose(self, peer: PeerId) -> None:
        """The peer is gone for all we know."""
        for kind in KINDS:
            if (lane := self._outbound.pop((peer, kind), None)) is not None:
                lane.end("the peer is gone")
            if (task := self._inbound.pop((peer, kind), None)) is not None:
                task.cancel()
        if self._direct is not None:
            self._direct.drop(peer)
        self._down.pop(peer, None)
        if len(self._down) >= MAX_REMEMBERED:
            del self._down[next(iter(self._down))]
        self._down[peer] = self._now() + RETRY_SECONDS
        self._tell(peer, False)

    def _tell(self, peer: PeerId, up: bool) -> None:
        if self._handler is not None and not self._closed:
            self._handler.on_link(peer, up)

    # -- greetings and counting ------------------------------------------------------------------------------

    def _hello(self) -> Hello:
        access = self.gate.own if self.gate else None
        return Hello(protocol=PROTOCOL_VERSION, fingerprint=self.fingerprint, access=access)

    def _uninvited(self, peer: PeerId, hello: Hello) -> str:
        """Why that peer is told nothing, not even what run this is; empty if it may ask."""
        flaw = self.gate.flaw(peer, hello.access, any_run=True) if self.gate else ""
        if flaw:
            self.blame(peer, Refused(flaw))
        return flaw

    def _unwatched(self, peer: PeerId, hello: Hello) -> str:
        """Why that peer is not told how we are; empty if it is. It need not train, but its invite must be to
        this run."""
        if hello.protocol != PROTOCOL_VERSION:
            return f"it speaks protocol {hello.protocol} and we {PROTOCOL_VERSION}; upgrade the older side"
        return self.gate.flaw(peer, hello.access) if self.gate else ""

    def _fits(self, peer: PeerId, hello: Hello) -> bool:
        return not self.why_apart(peer, hello, in_rounds=False)

    def _same_run(self, peer: PeerId, hello: Hello, kind: Kind) -> bool:
        """Whether that was the hello of a peer of our run, which may have a lane if that is the kind; if not,
        it is counted and told."""
        if why := self.why_apart(peer, hello, in_rounds=kind != "request"):
            self.blame(peer, Refused(why))
        elif hello.access and kind != "request":
            self._shown[peer] = hello.access
        return not why

    def _complain(self, peer: PeerId, cause: FaultCause, detail: str) -> None:
        """Once per peer and cause: a stranger must not fill the log."""
        if (peer, cause) not in self._complained:
            if len(self._complained) >= MAX_REMEMBERED:
                self._complained.clear()
            self._complained.add((peer, cause))
            self._on_event(PeerFaulted(peer=peer, cause=cause, detail=detail))

    async def _read(
        self,
        peer: PeerId,
        reader: asyncio.StreamReader,
        kind: Kind,
        max_payload_bytes: int,
        seconds: float | None,
        max_header_bytes: int = MAX_HEADER_BYTES,
    ) -> tuple[Wire, bytes]:
        """The next frame. Raises Unreachable if the stream ends or `seconds` pass first, BadMessage."""
        try:
            async with asyncio.timeout(seconds):
                header, payload, size = await read_frame(
                    reader, max_payload_bytes=max_payload_bytes, max_header_bytes=max_header_bytes
                )
        except (OSError, EOFError):
            raise Unreachable(f"peer {short(peer)} ended the stream") from None
        except TimeoutError:
            raise Unreachable(f"peer {short(peer)} said nothing for {seconds:g} s") from None
        self._received[kind] += size
        self._throttle.received(size)
        return header, payload

    def _write(self, writer: asyncio.StreamWriter, kind: Kind, header: Wire, payload: Buffer = b"") -> None:
        """Raises Unreachable if the stream is closed."""
        if _is_closed(writer):
            raise Unreachable("the other side has closed the stream")
        content = memoryview(payload).cast("B")
        frame = pack(header, content.nbytes)
        writer.write(frame)
        writer.write(content)
        self._sent[kind] += len(frame) + content.nbytes

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


async def _taken(writer: asyncio.StreamWriter) -> None:
    """Returns when all that was written has gone. Raises OSError if the stream breaks, TimeoutError if the
    other side takes nothing for `STALLED_SECONDS`."""
    while True:
        waiting = writer.transport.get_write_buffer_size()
        try:
            async with asyncio.timeout(STALLED_SECONDS):
                await writer.drain()
                return
        except TimeoutError:
            if writer.transport.get_write_buffer_size() >= waiting:
                raise


async def _linger(reader: asyncio.StreamReader) -> None:
    """Until the other side has closed: with what it has sent unread, it might not get our last word."""
    with contextlib.suppress(OSError):  # a TimeoutError is one
        async with asyncio.timeout(HELLO_SECONDS):
            while await reader.read(MAX_HELLO_BYTES):
                pass


def _is_closed(writer: asyncio.StreamWriter) -> bool:
    """asyncio ignores what is written to a closed stream; uvloop raises RuntimeError, which is nobody's
    fault."""
    return writer.transport.is_closing()


def _named(fingerprint: str) -> str:
    return "nothing" if fingerprint == ASKING else f"run {fingerprint[:12]}…"
