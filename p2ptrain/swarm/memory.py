"""Whole swarms in one process: the real lanes, over streams that are simulated.

A `MemoryHub` is the network between its peers; latency, bandwidth, losses and faults follow from a seed. Each
peer's `MemorySwarm` is a `port.Swarm` like any other: frames, greetings, refusals, back-pressure and broken
links are those of `lanes`, byte for byte; only the streams under them are ours. Time is the running event
loop's: under `clock.run` it is virtual, and an hour of training is over in seconds.

Not covered: forgery. Here every peer is who it says it is, and what it publishes is its own;
invites hold for streams and not for records.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from types import TracebackType
from typing import Any, Self

from p2ptrain.errors import LocalFault, Unreachable
from p2ptrain.events import PeerFaulted, short
from p2ptrain.records import SIGNED, Averaged, Chunk, Message, PeerId, Presence, Reply, Request, SignedRecord
from p2ptrain.swarm.clock import Cancellable
from p2ptrain.swarm.crew import Crew
from p2ptrain.swarm.gate import Gate
from p2ptrain.swarm.identity import SIGNATURE_BYTES, Identity, of_seed, verify
from p2ptrain.swarm.lanes import ASKING, Kind, Lanes, Stream
from p2ptrain.swarm.network import Network as Network
from p2ptrain.swarm.port import Buffer, Handler
from p2ptrain.swarm.validator import MAX_RECORD_BYTES, MAX_TTL_SECONDS

logger = logging.getLogger(__name__)

ONE_RUN = "1" * 64
"""The fingerprint of peers that are given none: they all train the same."""
READ_BUFFER_BYTES = 2**20
WINDOW_BYTES = 2**20
"""What may be on its way on one stream, or wait at its end to be read, before its sender has to wait."""
SHOWN_BYTES = 200
"""Of what is sent, in the network's trace."""


class MemoryHub:
    """The network between the peers of one process, and the records they publish."""

    def __init__(
        self,
        seed: int,
        latency: tuple[float, float] = (0.01, 0.05),
        bandwidth_bytes_per_second: float | None = None,
        loss: float = 0.0,
        *,
        trace_lines: int = 0,
    ) -> None:
        """See `Network`, which is there as `network`: its counters, its trace, its faults."""
        self.network = Network(
            seed,
            latency,
            loss,
            bandwidth_bytes_per_second=bandwidth_bytes_per_second,
            clock=_RunningLoop(),
            trace_lines=trace_lines,
        )
        self._latency = latency
        self._chance = random.Random(f"hub {seed}")  # noqa: S311 - a seeded schedule, no secret
        self._swarms: dict[PeerId, MemorySwarm] = {}
        self._records: dict[tuple[str, PeerId], tuple[SignedRecord, float]] = {}

    def swarm(
        self,
        name: str,
        fingerprint: str = ONE_RUN,
        *,
        max_payload_bytes: int = 32 * 2**20,
        on_event: Callable[[PeerFaulted], None] = lambda event: logger.log(event.level, event.sentence()),
        gate: Gate | None = None,
    ) -> MemorySwarm:
        """The network as the peer with the id `name` sees it; to be entered with `async with`."""
        return MemorySwarm(
            self,
            PeerId(name),
            fingerprint,
            max_payload_bytes=max_payload_bytes,
            on_event=on_event,
            gate=gate,
        )

    # -- faults ----------------------------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """The peer is off the net from one moment to the next; its swarm can only be left any more."""
        swarm = self._swarms.get(PeerId(name))
        if swarm is not None:
            swarm.vanish()

    def partition(self, groups: Iterable[Iterable[str]]) -> None:
        """See `Network.partition`."""
        self.network.partition([[PeerId(name) for name in group] for group in groups])

    def cut(self, a: str, b: str) -> None:
        """See `Network.cut`."""
        self.network.cut(PeerId(a), PeerId(b))

    def heal(self) -> None:
        """See `Network.heal`."""
        self.network.heal()

    def slow(self, name: str, factor: float) -> None:
        """See `Network.slow`."""
        self.network.slow(PeerId(name), factor)

    # -- for the swarms --------------------------------------------------------------------------------------

    def enter(self, swarm: MemorySwarm) -> None:
        """Raises LocalFault if a peer of that id is there already."""
        if swarm.peer_id in self._swarms:
            raise LocalFault(f"peer {swarm.peer_id} is online already; kill it, or wait until it has left")
        self._swarms[swarm.peer_id] = swarm
        self.network.attach(swarm.peer_id, swarm.receive, swarm.on_link)

    def leave(self, swarm: MemorySwarm) -> None:
        del self._swarms[swarm.peer_id]
        self.network.detach(swarm.peer_id)

    async def store(self, record: SignedRecord, expires_at: float) -> bool:
        """Keep the record where it can be found; False if its author reaches nobody who would keep it."""
        await self._round_trip()
        author, now = record.peer, self.network.now
        if author not in self._swarms:
            return False
        self._records = {key: kept for key, kept in self._records.items() if kept[1] > now}
        self._records[record.kind, author] = record, expires_at
        return any(other != author and self.network.reachable(author, other) for other in self._swarms)

    async def find(self, asker: PeerId, kind: str) -> list[SignedRecord]:
        """The records of that kind by peers on the asker's side of a partition, in the order of their ids."""
        await self._round_trip()
        return [
            record
            for (its_kind, author), (record, expires_at) in sorted(self._records.items())
            if its_kind == kind and expires_at > self.network.now and self.network.reachable(asker, author)
        ]

    async def _round_trip(self) -> None:
        await asyncio.sleep(2 * self._chance.uniform(*self._latency))


class MemorySwarm:
    """`port.Swarm` inside one process. Inside `async with`, the peer is on the net."""

    def __init__(
        self,
        hub: MemoryHub,
        peer_id: PeerId,
        fingerprint: str,
        *,
        max_payload_bytes: int,
        on_event: Callable[[PeerFaulted], None],
        gate: Gate | None = None,
    ) -> None:
        self._hub = hub
        self._peer_id = peer_id
        self._identity = _identity_of(peer_id)
        self._crew = Crew()
        self._lanes = Lanes(
            peer_id,
            fingerprint,
            self._open_stream,
            self._crew.spawn,
            max_payload_bytes=max_payload_bytes,
            on_event=on_event,
            gate=gate,
        )
        self._ends: dict[PeerId, dict[_End, None]] = {}
        self._online = False

    async def __aenter__(self) -> Self:
        self._hub.enter(self)
        self._online = True
        await self._crew.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.vanish()
        await self._crew.__aexit__(kind, error, trace)

    def vanish(self) -> None:
        """Be off the net at once, whatever was going on."""
        if not self._online:
            return
        self._online = False
        self._hub.leave(self)
        self._lanes.close()
        for peer in list(self._ends):
            self.on_link(peer, False)

    def adopt(self, fingerprint: str) -> None:
        """What run we train, once we know: from now on we may meet those who train it too."""
        self._lanes.fingerprint = fingerprint

    # -- port.Swarm ------------------------------------------------------------------------------------------

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    @property
    def dial_seconds(self) -> float:
        return self._lanes.dial_seconds

    def sign(self, claim: bytes) -> str:
        return self._identity.sign(claim).hex()

    def signed(self, peer: PeerId, claim: bytes, signature: str) -> bool:
        return verify(_identity_of(peer).peer_id, claim, bytes.fromhex(signature))

    def serve(self, handler: Handler) -> None:
        self._lanes.serve(handler)

    def send(self, to: PeerId, message: Message) -> None:
        self._lanes.send(to, message)

    async def send_chunk(self, to: PeerId, header: Chunk | Averaged, payload: Buffer) -> None:
        await self._lanes.send_chunk(to, header, payload)

    async def request(
        self, to: PeerId, request: Request, *, timeout_seconds: float, max_bytes: int
    ) -> tuple[Reply, bytes]:
        return await self._lanes.request(to, request, timeout_seconds=timeout_seconds, max_bytes=max_bytes)

    async def publish(self, record: SignedRecord, *, ttl_seconds: float) -> bool:
        if record.peer != self.peer_id or not 0 < ttl_seconds <= MAX_TTL_SECONDS:
            raise ValueError(
                f"a record of peer {record.peer} for {ttl_seconds} s; expected our own, a short one"
            )
        text = record.model_dump_json()
        if len(text) > MAX_RECORD_BYTES - SIGNATURE_BYTES:
            raise ValueError(
                f"a record of {len(text)} bytes; at most {MAX_RECORD_BYTES - SIGNATURE_BYTES} fit"
            )
        expires_at = self._hub.network.now + ttl_seconds
        return self._online and await self._hub.store(SIGNED.validate_json(text), expires_at)

    async def lookup(self, kind: str) -> Sequence[SignedRecord]:
        if not self._online:
            return ()
        records = []
        for record in await self._hub.find(self.peer_id, kind):
            if isinstance(record, Presence) and self._lanes.fingerprint not in (ASKING, record.fingerprint):
                self.faults["foreign_record"] += 1
            else:
                records.append(record)
        return records

    # -- for metrics -----------------------------------------------------------------------------------------

    @property
    def faults(self) -> Counter[str]:
        """What went wrong with others so far, by kind."""
        return self._lanes.faults

    @property
    def delivered_bytes(self) -> int:
        return self._lanes.delivered_bytes

    @property
    def traffic(self) -> Mapping[str, tuple[int, int]]:
        """Lane → bytes (sent, received) so far, framing included."""
        return self._lanes.traffic

    def connected_peers(self) -> int:
        """Peers with which a stream is open."""
        return len(self._ends)

    def review(self) -> None:
        """See `Lanes.review`; here nobody does it by the clock."""
        self._lanes.review()

    # -- streams ---------------------------------------------------------------------------------------------

    async def _open_stream(self, to: PeerId, kind: Kind, seconds: float) -> Stream:
        """See `lanes.OpenStream`."""
        if not self._online:
            raise Unreachable("this peer is off the net")
        end = _End(self, to, kind)
        self.post(to, kind, _Open(end))
        try:
            async with asyncio.timeout(seconds):
                await end.opened
        except BaseException as error:
            end.abort()
            if isinstance(error, TimeoutError):
                raise Unreachable(f"no stream to peer {short(to)} within {seconds:g} s") from None
            raise
        return end.reader, end.writer

    async def _serve_stream(self, end: _End) -> None:
        try:
            await self._lanes.accept(end.peer, end.kind, end.reader, end.writer)
        finally:
            end.close()

    def receive(self, sender: PeerId, message: object) -> None:
        """For the network: a message has arrived."""
        match message:
            case _Open(far):
                end = _End(self, sender, far.kind)
                end.connect(far)
                self.post(sender, far.kind, _Opened(far, end))
                self._crew.spawn(self._serve_stream(end))
            case _Opened(end, far):
                end.connect(far)
            case _Segment(end, content):
                end.arrive(content)
            case _:
                raise TypeError(f"{message!r} in a network of streams")

    def on_link(self, peer: PeerId, up: bool) -> None:
        """For the network: a lane to or from `peer` broke; all streams go, as if they shared a connection."""
        for end in list(self._ends.get(peer, ())):
            end.cut_off(tell=up)

    def post(self, to: PeerId, kind: Kind, message: _Open | _Opened | _Segment) -> float:
        """Put a message on the network; returns the time when it will have left."""
        size_bytes = len(message.content or b"") if isinstance(message, _Segment) else 0
        return self._hub.network.send(self.peer_id, to, message, kind, size_bytes)

    def began(self, end: _End) -> None:
        self._ends.setdefault(end.peer, {})[end] = None

    def ended(self, end: _End) -> None:
        ends = self._ends[end.peer]
        del ends[end]
        if not ends:
            del self._ends[end.peer]


@cache
def _identity_of(name: PeerId) -> Identity:
    """Peers of a hub have short names; what one signs, nobody else signs by mistake."""
    return of_seed(sha256(name.encode()).digest())


# -- simulated streams ---------------------------------------------------------------------------------------


class _End(asyncio.Transport):
    """One end of a stream between two peers, as asyncio's readers and writers know it.

    What is written leaves as fast as the uplink takes it, but at most `WINDOW_BYTES` are under way or unread.
    """

    def __init__(self, owner: MemorySwarm, peer: PeerId, kind: Kind) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self.peer, self.kind = peer, kind
        self.far: _End | None = None
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self.reader = asyncio.StreamReader(READ_BUFFER_BYTES, self._loop)
        self._protocol = asyncio.StreamReaderProtocol(self.reader, loop=self._loop)
        self.writer = asyncio.StreamWriter(self, self._protocol, self.reader, self._loop)
        self._owner = owner
        self._closing = self._gone = False
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        """Written, and still to leave; what `drain` waits for."""
        self._leaving = False
        self._untaken_bytes = 0
        """Sent, and not yet in the far end's reader."""
        self._writing_paused = False
        self._low_bytes = self._high_bytes = 0
        self._reading_paused = False
        self._unread: deque[bytes] = deque()
        self.set_write_buffer_limits()
        self._protocol.connection_made(self)
        owner.began(self)

    # -- asyncio.Transport -----------------------------------------------------------------------------------

    def write(self, data: Buffer) -> None:
        if self._closing or not data:
            return
        content = bytes(data)
        self._queue.append(content)
        self._queued_bytes += len(content)
        self._push()

    def get_write_buffer_size(self) -> int:
        return self._queued_bytes

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high_bytes = 64 * 2**10 if high is None else high
        self._low_bytes = self._high_bytes // 4 if low is None else low
        self._pace()

    def pause_reading(self) -> None:
        self._reading_paused = True

    def resume_reading(self) -> None:
        self._reading_paused = False
        while self._unread and not self._reading_paused:
            self._take(self._unread.popleft())

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Send what is queued, and then the end."""
        self._closing = True
        self._push()

    def abort(self) -> None:
        if not self._gone:
            self._say(None)
            self._finish(None)

    # -- for the swarm ---------------------------------------------------------------------------------------

    def connect(self, far: _End) -> None:
        """Somebody is at the other end."""
        self.far = far
        if self._gone:
            self._owner.post(
                self.peer, self.kind, _Segment(far, None)
            )  # whoever dialled did not wait so long
        elif not self.opened.done():
            self.opened.set_result(None)

    def arrive(self, content: bytes | None) -> None:
        """See `_Segment`."""
        if self._gone:
            if content:
                self._say(None)  # as TCP does where nobody reads any more
        elif content is None:
            self._finish(ConnectionResetError("the far end reset the stream"))
        elif self._reading_paused or self._unread:
            self._unread.append(content)
        else:
            self._take(content)

    def cut_off(self, *, tell: bool) -> None:
        """The connection under this stream is gone; `tell` the far end, which may not have noticed."""
        if tell:
            self._say(None)
        self._finish(ConnectionResetError("the connection broke"))

    # -- inside ----------------------------------------------------------------------------------------------

    def _push(self) -> None:
        """Send what may be sent, and then the end, if that is due."""
        if self._gone:
            return
        while self._queue and not self._leaving:
            size = len(self._queue[0])
            if self._untaken_bytes and self._untaken_bytes + size > WINDOW_BYTES:
                break
            self._untaken_bytes += size
            leaves = self._say(self._queue.popleft())
            if leaves > self._loop.time():
                self._leaving = True
                self._loop.call_at(leaves, self._left, size)
            else:
                self._queued_bytes -= size
        self._pace()
        if self._closing and not self._queued_bytes:
            self._say(b"")
            self._finish(None)

    def _left(self, size: int) -> None:
        self._leaving = False
        self._queued_bytes -= size
        self._push()

    def _pace(self) -> None:
        if self._queued_bytes > self._high_bytes and not self._writing_paused:
            self._writing_paused = True
            self._protocol.pause_writing()
        elif self._queued_bytes <= self._low_bytes and self._writing_paused:
            self._writing_paused = False
            self._protocol.resume_writing()

    def _say(self, content: bytes | None) -> float:
        if self.far is None:
            return 0.0
        return self._owner.post(self.peer, self.kind, _Segment(self.far, content))

    def _take(self, content: bytes) -> None:
        assert self.far is not None
        if content:
            self._protocol.data_received(content)
        else:
            self._protocol.eof_received()
        self.far._taken(len(content))

    def _taken(self, size: int) -> None:
        self._untaken_bytes -= size
        self._push()

    def _finish(self, error: ConnectionResetError | None) -> None:
        if self._gone:
            return
        self._gone = self._closing = True
        if not self.opened.done():
            self.opened.set_exception(Unreachable(f"peer {short(self.peer)} could not be reached"))
            self.opened.exception()  # nobody need wait for it
        self._owner.ended(self)
        self._loop.call_soon(self._protocol.connection_lost, error)


@dataclass(frozen=True, repr=False)
class _Open:
    """May I have a stream with you, of the kind of this end?"""

    near: _End

    def __repr__(self) -> str:
        return "open"


@dataclass(frozen=True, repr=False)
class _Opened:
    """Yes, and `far` is my end of it."""

    near: _End
    far: _End

    def __repr__(self) -> str:
        return "opened"


@dataclass(frozen=True, repr=False)
class _Segment:
    """Bytes for that end; with none, no more will come, and None resets the stream."""

    end: _End
    content: bytes | None

    def __repr__(self) -> str:
        if not self.content:
            return "reset" if self.content is None else "end"
        return f"{len(self.content)} bytes {self.content[:SHOWN_BYTES]!r}"


class _RunningLoop:
    """The clock of whatever event loop is running: a hub may be made before one is."""

    def time(self) -> float:
        return asyncio.get_running_loop().time()

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> Cancellable:
        return asyncio.get_running_loop().call_at(when, callback, *args)
