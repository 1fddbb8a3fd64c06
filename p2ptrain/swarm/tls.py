"""Chunks over TLS 1.3 connections of our own, beside libp2p: several times as fast, where one can be made.

A peer says in its signed presence record where it listens and by which certificate it is known; both ends of
a connection hold the other to that. A connection serves both directions and is kept from round to round, and
a pair opens more where one does not fill the link. While there is none, the pair's chunks go over libp2p, and
it is tried again after a pause that grows; when one breaks, the lanes are told, as of any other break.

Not covered: peers that neither can open a connection to the other; no hole is punched here.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

from p2ptrain.errors import BadMessage, LocalFault, PeerFault, PortBusy, Refused, Unreachable
from p2ptrain.events import Carrier, CarrierChanged, clean, short
from p2ptrain.records import Averaged, Chunk, Direct, Greeting, PeerId, Refusal, Wire
from p2ptrain.swarm.certificate import make_credentials
from p2ptrain.swarm.flow import MAX_FLOWS, Flow, flows_wanted
from p2ptrain.swarm.frames import pack
from p2ptrain.swarm.holders import port_holder
from p2ptrain.swarm.machine import bind
from p2ptrain.swarm.port import Buffer
from p2ptrain.swarm.throttle import Throttle

HANDSHAKE_SECONDS = 5.0
"""For TLS, and again for both greetings."""
MAX_HANDSHAKES = 32
"""Strangers that may be at it at once; each costs memory before it has proved anything."""
MAX_KNOWN = 2048
"""Peers whose presence is remembered."""
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
STEADY_SECONDS = 60.0
"""A connection that held for so long was a good one: the next pause is short again."""


class Receiver(Protocol):
    """Who is told what comes and goes: `lanes.Lanes`."""

    def greeting(self, to: PeerId) -> Greeting: ...

    def why_apart(self, peer: PeerId, greeting: Greeting) -> str:
        """Why the sender of that greeting is none of ours; empty if it is."""
        ...

    def place(self, sender: PeerId, header: Wire, size: int) -> memoryview | None: ...

    async def deliver(self, sender: PeerId, header: Chunk | Averaged, payload: Buffer) -> None: ...

    def reached(self, peer: PeerId) -> None: ...

    def broken(self, peer: PeerId) -> None: ...

    def blame(self, peer: PeerId, fault: PeerFault) -> None: ...


class TlsCarrier:
    """One peer's TLS connections. Inside `async with`, it accepts them."""

    def __init__(
        self,
        me: PeerId,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        *,
        listen: Sequence[str],
        port: int,
        max_payload_bytes: int,
        on_event: Callable[[CarrierChanged], None],
        throttle: Throttle | None = None,
    ) -> None:
        """`listen`: IP addresses to accept on, all at `port`; 0 takes a free one."""
        self.faults: Counter[str] = Counter()
        """Handshakes that failed, and connections that were refused, by kind."""
        self.port = port
        self._me = me
        self._spawn = spawn
        self._listen = listen
        self._max_payload_bytes = max_payload_bytes
        self._on_event = on_event
        self._throttle = throttle or Throttle()
        self._credentials = make_credentials()
        self._receiver: Receiver | None = None
        self._known: dict[PeerId, Direct] = {}
        self._flows: dict[PeerId, list[Flow]] = {}
        self._dialling: set[PeerId] = set()
        self._pauses: dict[PeerId, tuple[float, float]] = {}  # peer → (loop time to try again, seconds)
        self._carriers: dict[PeerId, Carrier] = {}  # as told
        self._past_bytes = [0, 0]
        self._past_delivered_bytes = 0
        self._exit = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Raises PortBusy, LocalFault."""
        async with AsyncExitStack() as stack:
            for host in self._listen:
                listener = stack.enter_context(_listener(host, self.port))
                self.port = listener.getsockname()[1]
                accepting = self._spawn(self._accept(listener))
                stack.callback(accepting.cancel)
            stack.callback(self._close)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.aclose()

    def serve(self, receiver: Receiver) -> None:
        """Deliver what arrives to `receiver`; until then nobody is let in."""
        self._receiver = receiver

    def where(self, hosts: Sequence[str]) -> Direct | None:
        """What to say of this peer in its presence record, if it can be reached at these addresses."""
        if not hosts:
            return None
        return Direct(hosts=tuple(hosts[:8]), port=self.port, certificate=self._credentials.fingerprint)

    def meet(self, peer: PeerId, direct: Direct | None) -> None:
        """Take note of what a presence record says of a peer."""
        if direct is None:
            self._known.pop(peer, None)
        elif peer != self._me and self._known.get(peer) != direct:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[peer] = direct
            self._pauses.pop(peer, None)  # it has started anew, or has another address

    # -- for the lanes ---------------------------------------------------------------------------------------

    def carries(self, peer: PeerId) -> bool:
        """Whether chunks to this peer go over TLS now. If not, see to it that they may soon."""
        flows = self._flows.get(peer, ())
        if len(flows) < self._wanted(flows):
            self._dial_if_due(peer)
        return bool(flows)

    async def send(self, to: PeerId, frame: bytes, content: memoryview) -> None:
        """Returns once the bytes are encrypted. Raises Unreachable if the connection broke."""
        flows = self._flows.get(to)
        if not flows:
            raise Unreachable(f"the connection to peer {short(to)} has just broken")
        flow = min(flows, key=lambda flow: (not flow.has_room, flow.waiting_bytes))
        try:
            await flow.write(frame, content)
        except PeerFault as fault:
            raise Unreachable(f"the connection to peer {short(to)} broke: {fault}") from None

    def drop(self, peer: PeerId) -> None:
        """The peer is gone for all we know."""
        for flow in self._flows.get(peer, ()):
            flow.fail(Unreachable("the peer is gone"))
        self._carriers.pop(peer, None)

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes (sent, received) so far, framing included and encryption not."""
        now = [flow for flows in self._flows.values() for flow in flows]
        return (
            self._past_bytes[0] + sum(flow.sent_bytes for flow in now),
            self._past_bytes[1] + sum(flow.received_bytes for flow in now),
        )

    @property
    def delivered_bytes(self) -> int:
        """Bytes that have reached others so far, as far as the kernel tells."""
        now = (flow.delivered_bytes() for flows in self._flows.values() for flow in flows)
        return self._past_delivered_bytes + sum(now)

    @property
    def peers(self) -> Counter[Carrier]:
        """How many peers' chunks go which way, of those that there have been any for."""
        return Counter(self._carriers.values())

    @property
    def carrier_of(self) -> Mapping[PeerId, Carrier]:
        """The same by peer."""
        return self._carriers

    # -- dialling --------------------------------------------------------------------------------------------

    def _wanted(self, flows: Sequence[Flow]) -> int:
        if not flows:
            return 1
        return flows_wanted(sum(flow.bytes_per_second for flow in flows), flows[0].rtt_seconds())

    def _dial_if_due(self, peer: PeerId) -> None:
        if self._receiver is None or peer in self._dialling:
            return
        if peer not in self._known:
            self._tell(peer, Carrier.LIBP2P, "it has not said where it takes TLS connections")
        elif self._now() >= self._pauses.get(peer, (0.0, 0.0))[0]:
            self._dialling.add(peer)
            self._spawn(self._dial(peer, self._known[peer], self._receiver))

    async def _dial(self, peer: PeerId, direct: Direct, receiver: Receiver) -> None:
        """Try the peer's addresses, one after the other."""
        reasons = []
        try:
            for host in direct.hosts:
                try:
                    flow = await self._connect(peer, host, direct, receiver)
                except PeerFault as fault:
                    reasons.append(f"{host} port {direct.port}: {fault}")
                    if not isinstance(fault, Unreachable):
                        receiver.blame(peer, fault)
                else:
                    self._add(peer, flow, receiver)
                    return
        finally:
            self._dialling.discard(peer)
        self.faults["dial"] += 1
        self._pause(peer)
        if not self._flows.get(peer):
            self._tell(peer, Carrier.LIBP2P, "; ".join(reasons))

    async def _connect(self, peer: PeerId, host: str, direct: Direct, receiver: Receiver) -> Flow:
        """A connection on which both have greeted. Raises PeerFault."""
        loop, began = asyncio.get_running_loop(), self._now()
        flow = Flow(self._max_payload_bytes, direct.certificate, self._throttle)
        try:
            async with asyncio.timeout(2 * HANDSHAKE_SECONDS):
                await loop.create_connection(
                    lambda: flow,
                    str(ipaddress.ip_address(host)),  # a stranger wrote it
                    direct.port,
                    ssl=self._credentials.client,
                    server_hostname="",
                    ssl_handshake_timeout=HANDSHAKE_SECONDS,
                    ssl_shutdown_timeout=1.0,
                )
                await flow.write(pack(receiver.greeting(peer)), memoryview(b""))
                answer, _ = await flow.read()
                match answer:
                    case Refusal():
                        raise Refused(f"it refused: {clean(answer.reason)}")
                    case Greeting():
                        if answer.sender != peer or (why := receiver.why_apart(peer, answer)):
                            raise Refused(why or f"it greets as {short(answer.sender)}")
                    case _:
                        raise BadMessage(f"a {answer.kind} where a connection should begin with a greeting")
        except TimeoutError:
            flow.fail(fault := Unreachable(f"no answer within {self._now() - began:.0f} s"))
            raise fault from None
        except (OSError, ValueError) as error:
            flow.fail(fault := Unreachable(_said(error)))
            raise fault from None
        except BaseException:  # refused, or cancelled: nobody else has the connection to close it
            flow.fail(Unreachable("given up"))
            raise
        return flow

    def _pause(self, peer: PeerId) -> None:
        """Leave the peer alone for a while, twice as long as the last time."""
        seconds = min(2 * self._pauses.get(peer, (0.0, FIRST_PAUSE_SECONDS / 2))[1], LONGEST_PAUSE_SECONDS)
        if peer not in self._pauses and len(self._pauses) >= MAX_KNOWN:
            self._pauses.clear()
        self._pauses[peer] = self._now() + seconds, seconds

    # -- accepting -------------------------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        loop, places = asyncio.get_running_loop(), asyncio.Semaphore(MAX_HANDSHAKES)
        while True:
            await places.acquire()
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:  # out of file descriptors, or it has left again
                places.release()
                await asyncio.sleep(0.1)
                continue
            self._spawn(self._welcome(connection, places))

    async def _welcome(self, connection: socket.socket, places: asyncio.Semaphore) -> None:
        """Find out who it is, within bounds."""
        loop, flow = asyncio.get_running_loop(), Flow(0, throttle=self._throttle)
        try:
            async with asyncio.timeout(2 * HANDSHAKE_SECONDS):
                # What this returns beside the transport is not always the protocol.
                transport, _ = await loop.connect_accepted_socket(
                    lambda: flow,
                    connection,
                    ssl=self._credentials.server,
                    ssl_handshake_timeout=HANDSHAKE_SECONDS,
                    ssl_shutdown_timeout=1.0,
                )
                greeting, _ = await flow.read()
                peer, why = self._admit(flow, greeting)
                if why or self._receiver is None:
                    await flow.write(pack(Refusal(reason=why)), memoryview(b""))
                    transport.close()
                    return
                flow.max_payload_bytes = self._max_payload_bytes
                await flow.write(pack(self._receiver.greeting(peer)), memoryview(b""))
                self._add(peer, flow, self._receiver)
        except (OSError, PeerFault):
            self.faults["handshake"] += 1
            flow.fail(Unreachable("no handshake"))
            connection.close()
        finally:
            places.release()

    def _admit(self, flow: Flow, greeting: Wire) -> tuple[PeerId, str]:
        """Who greets so, and why it is not let in; empty if it is. Nobody is blamed for what a stranger
        claims."""
        if self._receiver is None or not isinstance(greeting, Greeting):
            self.faults["refused"] += 1
            return self._me, "not ready" if self._receiver is None else "no greeting"
        peer, direct = greeting.sender, self._known.get(greeting.sender)
        if greeting.to != self._me:
            why = f"this is {short(self._me)}"
        elif why := self._receiver.why_apart(peer, greeting):
            pass
        elif direct is None:
            why = f"no presence record of {short(peer)} is known here yet"
        elif direct.certificate != flow.certificate:
            why = f"the presence record of {short(peer)} names another certificate"
            self.faults["certificate"] += 1
        elif len(self._flows.get(peer, ())) >= MAX_FLOWS:
            why = f"more than {MAX_FLOWS} connections"
        if why:
            self.faults["refused"] += 1
        return peer, why

    # -- connections -----------------------------------------------------------------------------------------

    def _add(self, peer: PeerId, flow: Flow, receiver: Receiver) -> None:
        flow.place = partial(receiver.place, peer)
        self._flows.setdefault(peer, []).append(flow)
        self._tell(peer, Carrier.TLS)
        receiver.reached(peer)
        self._spawn(self._listen_to(peer, flow, receiver))

    async def _listen_to(self, peer: PeerId, flow: Flow, receiver: Receiver) -> None:
        """Deliver what comes on a connection until it ends."""
        began = self._now()
        try:
            while True:
                header, payload = await flow.read()
                if not isinstance(header, Chunk | Averaged):
                    raise BadMessage(f"a {header.kind} where chunks go")
                await receiver.deliver(peer, header, payload)
        except PeerFault as fault:
            flow.fail(fault)
            if isinstance(fault, BadMessage):
                receiver.blame(peer, fault)
            self._remove(peer, flow)
            if self._now() - began > STEADY_SECONDS:
                self._pauses.pop(peer, None)
            self._pause(peer)
            if peer in self._carriers and peer not in self._flows:
                self._tell(peer, Carrier.LIBP2P, str(fault))
            receiver.broken(peer)
        except BaseException:  # cancelled, as we leave: the connection must not outlive whoever reads it
            flow.fail(Unreachable("we left"))
            self._remove(peer, flow)
            raise

    def _remove(self, peer: PeerId, flow: Flow) -> None:
        self._past_bytes[0] += flow.sent_bytes
        self._past_bytes[1] += flow.received_bytes
        self._past_delivered_bytes += flow.delivered_bytes()
        self._flows[peer].remove(flow)
        if not self._flows[peer]:
            del self._flows[peer]

    def _tell(self, peer: PeerId, carrier: Carrier, reason: str = "") -> None:
        """Say which way the peer's chunks go, when that changes."""
        if self._carriers.get(peer) is not carrier:
            if len(self._carriers) >= MAX_KNOWN:
                self._carriers.clear()
            self._carriers[peer] = carrier
            self._on_event(CarrierChanged(peer=peer, carrier=carrier, reason=reason))

    def _close(self) -> None:
        self._receiver = None
        for flows in list(self._flows.values()):
            for flow in list(flows):
                flow.fail(Unreachable("we left"))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _said(error: Exception) -> str:
    """What the system says, without its number: `[Errno 111] Connect call failed` is no sentence."""
    return clean(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bind(listener, host, port)
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortBusy(
                f"port {port} of {host}, the data_port, is taken by {port_holder(port)}; stop that one, or "
                "choose another data_port"
            ) from None
        raise LocalFault(
            f"cannot listen on port {port} of {host}: {error.strerror}; choose another data_port"
        ) from None
    return listener
