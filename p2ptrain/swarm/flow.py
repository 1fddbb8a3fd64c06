"""Frames on one connection, received straight into their place; and how many connections a pair needs.

A frame's lengths and header are read into a small buffer of the connection's own. Its payload goes where the
receiver wants it, or into a buffer of exactly its size, and is not copied again. Reading stops while a few
frames wait to be taken, and writing waits while the network has enough to do: nothing here grows.

Not covered: who is at the other end, which is for `tls` to find out.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable
from typing import cast

from p2ptrain.errors import BadMessage, PeerFault, Unreachable
from p2ptrain.records import Wire
from p2ptrain.swarm.certificate import fingerprint_of
from p2ptrain.swarm.frames import LENGTHS_BYTES, lengths, parse
from p2ptrain.swarm.throttle import SIP_BYTES, Throttle

STALL_SECONDS = 10.0
"""A frame that was begun and does not go on for so long, either way, is the end of its connection."""
BROKEN_SECONDS = 30
"""A connection on which the network confirms nothing for so long is broken."""
BYTES_ACKED_AT, MIN_RTT_AT = 120, 148
"""Where Linux has `tcpi_bytes_acked` and `tcpi_min_rtt`, microseconds, in its `struct tcp_info`."""
RTT_SECONDS = 0.1
"""The kernel is asked again after so long: to ask before each frame costs 2 % of a round."""
MAX_HEADER_BYTES = 16 * 1024
"""That of an averaged chunk names the samples of up to 1024 members: some 10 kB."""
READ_AHEAD_FRAMES = 2
"""Frames that may wait to be taken."""
WRITE_AHEAD_BYTES = 2**18
"""Encrypted, and not yet in the kernel's hands; beyond this a writer waits."""
UNSENT_BYTES = 2**17
"""In the kernel's hands, and not on the wire. Its buffers hold megabytes more, and what they swallow would be
taken for sent: spans follow the rates that are measured by that."""
SLICE_BYTES = 2**18
"""What is encrypted at once: while it is in the cache, it goes to the kernel."""
FIRST_READ_BYTES = 1024
"""Enough for most headers; what it takes of the payload has to be copied."""

FLOW_BYTES = 2**20
MAX_FLOWS = 8


def flows_wanted(bytes_per_second: float, rtt_seconds: float) -> int:
    """How many connections a pair of peers needs, by what those it has were seen to carry.

    One TCP connection keeps a few MB under way at best, and fewer after each loss. So where more than
    `FLOW_BYTES` are on the wire, one more may carry more; if it does not, none is added after it.
    """
    return min(1 + math.floor(bytes_per_second * rtt_seconds / FLOW_BYTES), MAX_FLOWS)


class Flow(asyncio.BufferedProtocol):
    """One TLS connection of frames, from its handshake to its end."""

    def __init__(
        self, max_payload_bytes: int, expected: str | None = None, throttle: Throttle | None = None
    ) -> None:
        """`expected`: the fingerprint that the other's certificate must have, if that is known already."""
        self.max_payload_bytes = max_payload_bytes
        self.certificate = ""
        """Fingerprint of the other's."""
        self.place: Callable[[Wire, int], memoryview | None] = lambda header, size: None
        """Where the payload of the frame with this header shall go; None: wherever."""
        self.bytes_per_second = 0.0
        """While there was more to send than the network took."""
        self.sent_bytes = self.received_bytes = 0
        self._expected = expected
        self._transport: asyncio.Transport | None = None
        self._socket: socket.socket | None = None
        self._fault: PeerFault | None = None
        self._loop = asyncio.get_running_loop()
        self._throttle = throttle or Throttle()
        self._sips = bool(self._throttle.download.bytes_per_second)
        # reading
        self._resting = False
        """Nothing is read until what has come is paid for."""
        self._head = memoryview(bytearray(MAX_HEADER_BYTES + LENGTHS_BYTES))
        self._have = 0
        self._need = LENGTHS_BYTES
        self._header: Wire | None = None
        self._payload = memoryview(b"")
        self._filled = 0
        self._frames: deque[tuple[Wire, memoryview]] = deque()
        self._news = asyncio.Event()
        # writing
        self._room = asyncio.Event()
        self._room.set()
        self._paused_at = 0.0
        self._paused_bytes = 0
        # what the kernel told
        self._rtt_seconds = self._ask_rtt_at = 0.0
        self._acked_bytes: int | None = None

    # -- for `tls` -------------------------------------------------------------------------------------------

    async def read(self) -> tuple[Wire, memoryview]:
        """The next frame. Raises BadMessage if what comes is none or stops in the middle, or Unreachable."""
        while not self._frames:
            if self._fault is not None:
                raise self._fault
            self._news.clear()
            received = self.received_bytes
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    await self._news.wait()
            except TimeoutError:
                if (self._have or self._header is not None) and received == self.received_bytes:
                    self.fail(BadMessage(f"nothing for {STALL_SECONDS:g} s in the middle of a frame"))
        frame = self._frames.popleft()
        if len(self._frames) == READ_AHEAD_FRAMES - 1:
            self._go_on_reading()
        return frame

    async def write(self, frame: bytes, content: memoryview) -> None:
        """Returns when the frame is encrypted: its bytes are the caller's again. Raises PeerFault, as what
        ended it."""
        await self._throttle.before_sending(len(frame) + content.nbytes)
        while self._fault is None and not self._room.is_set():
            waiting = self.waiting_bytes
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    await self._room.wait()
            except TimeoutError:
                if self.waiting_bytes >= waiting:
                    self.fail(Unreachable(f"it took nothing for {STALL_SECONDS:g} s"))
        if self._fault is not None:
            raise self._fault
        assert self._transport is not None
        self._transport.writelines([frame, content[:SLICE_BYTES]])
        for start in range(SLICE_BYTES, content.nbytes, SLICE_BYTES):
            self._transport.write(content[start : start + SLICE_BYTES])
        self.sent_bytes += len(frame) + content.nbytes

    @property
    def waiting_bytes(self) -> int:
        """Written, and not yet in the kernel's hands."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    @property
    def has_room(self) -> bool:
        return self._room.is_set()

    def rtt_seconds(self) -> float:
        """The shortest time to and fro that the kernel has seen, as of a moment ago; 0 where it does not tell
        (but on Linux)."""
        if (now := self._loop.time()) >= self._ask_rtt_at:
            self._ask_rtt_at = now + RTT_SECONDS
            self._ask()
        return self._rtt_seconds

    def delivered_bytes(self) -> int:
        """What the other side has confirmed, encryption included; where the kernel does not tell, what it
        took."""
        self._ask()
        return self.sent_bytes - self.waiting_bytes if self._acked_bytes is None else self._acked_bytes

    def _ask(self) -> None:
        """Have the kernel tell what it knows of the connection."""
        if self._socket is None or not hasattr(socket, "TCP_INFO"):
            return
        with contextlib.suppress(OSError, ValueError):  # ValueError: uvloop has closed it by now
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, MIN_RTT_AT + 4)
            if len(info) == MIN_RTT_AT + 4:
                self._rtt_seconds = struct.unpack_from("=I", info, MIN_RTT_AT)[0] / 1e6
                self._acked_bytes = struct.unpack_from("=Q", info, BYTES_ACKED_AT)[0]

    def fail(self, fault: PeerFault) -> None:
        """End it for this reason, unless it has ended for another."""
        if self._fault is None:
            self._fault = fault
        if self._transport is not None:
            self._transport.abort()
        self._news.set()
        self._room.set()

    # -- asyncio.BufferedProtocol ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._socket = cast(socket.socket, transport.get_extra_info("socket"))
        with contextlib.suppress(OSError, AttributeError):  # AttributeError: not on this system
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, BROKEN_SECONDS * 1000)
        with contextlib.suppress(OSError, AttributeError):  # apart from that: macOS has this one only
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        secured: ssl.SSLObject = transport.get_extra_info("ssl_object")
        self.certificate = fingerprint_of(secured.getpeercert(binary_form=True) or b"")
        if self._expected not in (None, self.certificate):
            self.fail(
                BadMessage(
                    f"the certificate there is {self.certificate[:12]}…, "
                    f"and its presence record says {self._expected[:12]}…"
                )
            )
            return
        self._transport.set_write_buffer_limits(high=WRITE_AHEAD_BYTES, low=WRITE_AHEAD_BYTES // 4)

    def connection_lost(self, error: Exception | None) -> None:
        self.fail(Unreachable(f"the connection broke: {error}" if error else "the other side has closed it"))

    def eof_received(self) -> bool:
        return False

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._header is not None:
            return self._payload[self._filled : self._filled + SIP_BYTES if self._sips else None]
        return self._head[self._have : max(self._need, FIRST_READ_BYTES)]

    def buffer_updated(self, nbytes: int) -> None:
        self.received_bytes += nbytes
        if self._fault is not None:
            return
        if self._sips and (seconds := self._throttle.received(nbytes)):
            self._rest(seconds)
        if self._header is None:
            self._have += nbytes
            try:
                self._unpack()
            except BadMessage as fault:
                self.fail(fault)
            return
        self._filled += nbytes
        if self._filled == self._payload.nbytes:
            self._complete()

    def pause_writing(self) -> None:
        self._room.clear()
        self._paused_at, self._paused_bytes = self._loop.time(), self.waiting_bytes

    def resume_writing(self) -> None:
        seconds = self._loop.time() - self._paused_at
        if seconds > 0:
            self.bytes_per_second = (self._paused_bytes - self.waiting_bytes) / seconds
        self._room.set()

    # -- inside ----------------------------------------------------------------------------------------------

    def _rest(self, seconds: float) -> None:
        """Read nothing for so long."""
        assert self._transport is not None
        if not self._resting:
            self._resting = True
            self._transport.pause_reading()
            self._loop.call_later(seconds, self._rested)

    def _rested(self) -> None:
        self._resting = False
        if len(self._frames) < READ_AHEAD_FRAMES:
            self._go_on_reading()

    def _go_on_reading(self) -> None:
        if self._transport is not None and self._fault is None and not self._resting:
            self._transport.resume_reading()

    def _unpack(self) -> None:
        """Take from the small buffer what is whole."""
        while self._have >= LENGTHS_BYTES:
            head, have = self._head, self._have
            header_bytes, payload_bytes = lengths(
                head[:LENGTHS_BYTES],
                max_payload_bytes=self.max_payload_bytes,
                max_header_bytes=MAX_HEADER_BYTES,
            )
            self._need = begins = LENGTHS_BYTES + header_bytes
            if have < begins:
                return
            self._header = parse(bytes(head[LENGTHS_BYTES:begins]))
            place = self.place(self._header, payload_bytes) if payload_bytes else None
            self._payload = memoryview(bytearray(payload_bytes)) if place is None else place
            ends = min(begins + payload_bytes, have)
            self._filled = ends - begins
            self._payload[: self._filled] = head[begins:ends]
            rest = bytes(head[ends:have])
            head[: len(rest)] = rest
            self._have, self._need = len(rest), LENGTHS_BYTES
            if self._filled < payload_bytes:
                return
            self._complete()

    def _complete(self) -> None:
        assert self._header is not None
        self._frames.append((self._header, self._payload))
        self._header, self._payload = None, memoryview(b"")
        self._news.set()
        if len(self._frames) == READ_AHEAD_FRAMES and self._transport is not None:
            self._transport.pause_reading()
