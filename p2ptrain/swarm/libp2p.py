"""The real network: libp2p through the daemon p2pd, and hivemind's DHT for finding each other.

This is the only module that imports hivemind, and as that takes seconds (torch), do it late. hivemind gives
the DHT node and the words of p2pd's control protocol; daemon, streams and links are looked after here, in one
process, on the caller's event loop, asyncio's own or uvloop. If p2pd dies it is started again under the same
identity and ports, and callers see no more than broken links.

Not covered: the bulk of large models: a libp2p stream carries a few hundred MB/s. Chunks go by `tls`, where
that can make a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import math
import re
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import base58
from pydantic import BaseModel, ValidationError

from p2ptrain.errors import (
    BadMessage,
    ConfigError,
    LocalFault,
    P2PTrainError,
    PortBusy,
    Refused,
    StorageError,
    Unreachable,
)
from p2ptrain.events import (
    Carrier,
    CarrierChanged,
    DaemonRestarted,
    PeerFaulted,
    PeerKicked,
    ReachChanged,
    clean,
    short,
)
from p2ptrain.protocol.presence import look_seconds
from p2ptrain.records import (
    DECREES,
    SIGNED,
    Averaged,
    Chunk,
    Decree,
    DialBack,
    Dialled,
    Kick,
    Message,
    Pass,
    PeerId,
    Presence,
    Redeem,
    Redeemed,
    Reply,
    Request,
    RoundRecord,
    SignedRecord,
)
from p2ptrain.swarm import reach
from p2ptrain.swarm.access import Invite, pass_of
from p2ptrain.swarm.crew import Crew
from p2ptrain.swarm.frames import pack, read_frame
from p2ptrain.swarm.gate import Gate, permits
from p2ptrain.swarm.holders import lock_holder, port_holder
from p2ptrain.swarm.identity import load_or_create, verify
from p2ptrain.swarm.lanes import ASKING, KINDS, Kind, Lanes, Stream
from p2ptrain.swarm.p2pd import START_SECONDS, Daemon
from p2ptrain.swarm.partly import parts_only
from p2ptrain.swarm.port import Buffer, Handler
from p2ptrain.swarm.throttle import Throttle
from p2ptrain.swarm.tls import TlsCarrier
from p2ptrain.swarm.validator import (
    MAX_CLOCK_SKEW_SECONDS,
    MAX_TTL_SECONDS,
    Budgets,
    RecordValidator,
    seal,
    unseal,
)

with parts_only("hivemind"):  # its averagers want scipy: half a second more, and 40 MB
    from hivemind.dht.node import DHTNode
    from hivemind.dht.routing import DHTID
    from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
    from hivemind.dht.validation import DHTRecord
    from hivemind.p2p import P2P, PeerID
    from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe
    from hivemind.proto import dht_pb2, p2pd_pb2
    from hivemind.utils import MSGPackSerializer
    from hivemind.utils.logging import use_hivemind_log_handler
    from hivemind.utils.multiaddr import Multiaddr

logger = logging.getLogger(__name__)

# hivemind would print warnings with tracebacks about peers that leave; handlers are for the command to set.
use_hivemind_log_handler("nowhere")
logging.getLogger("hivemind").setLevel(logging.ERROR)

CONNECT_SECONDS = 5.0
"""At the start, for all initial peers together: with the start itself, whoever waits hears within 10 s."""
TWIN_SECONDS = 3.0
"""For finding out whether our identity is online elsewhere; if it takes longer, it is not."""
RESTART_SECONDS = 30.0
"""So long a stream to be opened waits for a daemon that is being restarted."""
DHT_SECONDS = 10.0
REPLICAS = 8
"""Nodes that are asked to keep a record; some may just have left."""
KEEPERS_SECONDS = 60.0
"""So long, or as long as between two looks of a large swarm, they are not searched anew while they answer:
whoever searches is sent all that they keep."""
UPKEEP_SECONDS = 2.0
"""Between two looks at our own daemon."""
HANG_SECONDS = 15.0
"""A daemon that does not answer a simple question for so long is killed."""
REENTER_SECONDS = 3.0
"""Between two attempts to get back to initial peers that were lost."""
FIRST_LOOK_SECONDS = 20.0
"""After the start, to be dialled back again: by then a router may have opened our port (UPnP)."""
LOOK_SECONDS = 600.0
"""Between two looks after that."""
RESERVE_SECONDS = 20.0
"""Between two reservations at relays; they may have been restarted meanwhile."""
STRANGER = {"noListenAddrs": "1", "tls": "1", "relay": "0"}
"""Options of a daemon without identity or connections, for looking at somebody from outside."""
RELAY_LIMITS = {"relayDataLimit": str(2**50), "relayTimeLimit": "24h", "relayBufferSize": str(2**16)}
"""Of one connection that we relay; at its end both sides make another, and one round is tried again."""

REVIEW_SECONDS = 3.0
"""How often a peer asks what the organizer has decreed, and looks at whose invite has ended."""
DECREE_SECONDS = 60.0
"""For which a decree is published; whoever keeps it there begins anew when it has expired."""
KEEPERS = 3
"""So many peers keep each decree published; it outlives the organizer's own."""

DHT_RECORDS_PER_SECOND = 100.0
DHT_RECORDS_AT_ONCE = 2000.0
MAX_INVALID = 64
"""In one dictionary of records, which a node sends when it is asked, or meets another: what is behind these
is not looked at. Honest nodes have few such, of peers that were put out meanwhile."""
STRANGERS = ""
"""All whom no record in the DHT says are invited, as one."""

READ_BUFFER_BYTES = 2**20
MAX_STREAMS = 2048
"""Inbound streams at one time; a file descriptor each."""
MAX_STREAMS_OF_STRANGERS = 256
"""Of these, of peers that no record in the DHT says are invited: newcomers, but also whoever opens streams
and says nothing."""
MAX_STREAMS_PER_PEER = 32
"""Two lanes, 8 requests, and as many again that are being closed."""

_PROTOCOLS: dict[Kind, str] = {kind: f"/p2ptrain/1/{kind}" for kind in KINDS}
_KIND_OF = {protocol: kind for kind, protocol in _PROTOCOLS.items()}
_LISTEN = re.compile(r"/(ip4|ip6)/([^/]+)/tcp/(\d{1,5})")
_ADDRESS = re.compile(r"/ip[46]/([0-9A-Fa-f.:]+)/")
_PEER = re.compile(r"(/.+)/p2p/([1-9A-HJ-NP-Za-km-z]+)")

Event = PeerFaulted | PeerKicked | CarrierChanged | ReachChanged | DaemonRestarted


class Libp2pSwarm:
    """`port.Swarm` over libp2p. Inside `async with`, the peer is on the net."""

    def __init__(
        self,
        identity_path: Path | str,
        run_id: str,
        fingerprint: str = ASKING,
        initial_peers: Sequence[str] = (),
        listen: Sequence[str] = ("/ip4/0.0.0.0/tcp/0",),
        announce: Sequence[str] = (),
        *,
        data_port: int | None = None,
        invite: Invite | None = None,
        redeems: bool = False,
        relay_for: int = 0,
        throttle: Throttle | None = None,
        max_payload_bytes: int = 32 * 2**20,
        on_event: Callable[[Event], None] = lambda event: logger.log(event.level, event.sentence()),
    ) -> None:
        """Nothing is started yet, but the identity file is read, or made.

        - `fingerprint`: of the run, see `config.fingerprint`; while it is `ASKING`, we may only `GetRun`.
        - `initial_peers`, `listen`, `announce`: multiaddresses. If initial peers are given, one must answer.
        - `data_port`: to take chunks on over TLS; 0 for any, None for neither taking nor sending them so.
        - `invite`: what we show to others; they must show one by the same organizer. Without it all may come.
        - `redeems`: let in those who can but ask for a grant of their own, which `serve`'s handler gives.
        - `relay_for`: how many hidden peers we pass traffic on for; we must be reachable ourselves.
        - `throttle`: what we may send and receive per second.
        - `max_payload_bytes`: of the largest chunk that is taken from another peer.

        Raises ConfigError for an address that is none, LocalFault for a damaged identity file.
        """
        self._identity_path = Path(identity_path)
        self._known_before = self._identity_path.exists()
        self._identity = load_or_create(self._identity_path)
        self._initial = [entry for entry in map(_entry, initial_peers) if entry.peer != self.peer_id]
        self._listen = list(listen)
        self._announce = list(announce)
        self._relay_for = relay_for
        self.reach = reach.Reach()
        """What others say of us: whether they can open connections to us."""
        self.relays: tuple[_Entry, ...] = ()
        """Where other hidden peers can meet us, if we are hidden."""
        self._doorkeeper = reach.Doorkeeper()
        self._keys = {kind: DHTID.generate(f"{run_id}.{kind}") for kind in ("presence", "round", *DECREES)}
        self._validator = RecordValidator(
            {key.to_bytes() for key in self._keys.values()}, admits=self._admits
        )
        self._on_event = on_event
        self._crew = Crew()
        self.throttle = throttle or Throttle()
        self._tls: TlsCarrier | None = None
        if data_port is not None:
            self._tls = TlsCarrier(
                self.peer_id,
                self._crew.spawn,
                listen=list(dict.fromkeys(_host(address) for address in self._listen)),
                port=data_port,
                max_payload_bytes=max_payload_bytes,
                on_event=on_event,
                throttle=self.throttle,
            )
        self.gate: Gate | None = None
        if invite is not None:
            self.gate = Gate(invite.shown_by(self.peer_id), self.peer_id, redeems=redeems)
        self._lanes = Lanes(
            self.peer_id,
            fingerprint,
            self._open_stream,
            self._crew.spawn,
            max_payload_bytes=max_payload_bytes,
            on_event=on_event,
            direct=self._tls,
            gate=self.gate,
            throttle=self.throttle,
        )
        self._exit = AsyncExitStack()
        self._node: _Node | None = None
        self._node_came = asyncio.Event()
        self._directory = Path()
        self._starts = 0
        self._open_streams = 0
        self._streams: Counter[str] = Counter()  # of each peer, and of all strangers
        self._addresses: list[str] = []
        self._links: Counter[str] = Counter()
        self.asked_dht: Callable[[str, bool, float], object] = lambda operation, ok, seconds: None
        """Told of each `publish` and `lookup`: whether it was done, and how long that took."""

    # -- lifetime --------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.enter_context(_sole_user(self._identity_path))
            self._directory = Path(stack.enter_context(_private_directory()))
            for number, address in enumerate(self._listen):
                self._listen[number], keeper = _reserved(address)
                stack.enter_context(keeper)
            await stack.enter_async_context(self._crew)
            if self._tls is not None:
                await stack.enter_async_context(self._tls)
                self._tls.serve(self._lanes)
            server = await asyncio.start_unix_server(
                self._accept, self._directory / "streams", limit=READ_BUFFER_BYTES
            )
            stack.callback(server.close)
            if self._known_before and self._initial:
                await self._refuse_twin()
            self._node = await self._start_node()
            stack.push_async_callback(self._stop_node)
            await self._enter(self._node)
            await self._look_outside(self._node)
            self._node_came.set()
            supervision = self._crew.spawn(self._supervise())
            self._crew.spawn(self._keep_up())
            if self.gate is not None:
                await self._hear(self.gate)
                self._crew.spawn(self._guard(self.gate))
            stack.callback(self._lanes.close)
            stack.callback(supervision.cancel)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._exit.__aexit__(kind, error, trace)

    def adopt(self, fingerprint: str) -> None:
        """What run we train, once we know: from now on we may meet those who train it too."""
        self._lanes.fingerprint = fingerprint

    async def redeem(self, bootstrap: PeerId, *, timeout_seconds: float) -> Pass:
        """Have the organizer's bootstrap give us a grant of our own, and show that from now on. Raises
        PeerFault."""
        assert self.gate is not None
        question = Redeem(access=self.gate.own)
        answer, _ = await self.request(bootstrap, question, timeout_seconds=timeout_seconds, max_bytes=0)
        if not isinstance(answer, Redeemed):
            raise BadMessage(f"a {answer.kind} in answer to {question.kind}")
        own = pass_of(answer, self._identity)
        if flaw := self.gate.flaw(self.peer_id, own):
            raise BadMessage(f"peer {short(bootstrap)} gave us a pass that does not hold: {flaw}")
        self.gate.own = own
        return own

    # -- port.Swarm ------------------------------------------------------------------------------------------

    @property
    def peer_id(self) -> PeerId:
        return self._identity.peer_id

    @property
    def dial_seconds(self) -> float:
        return self._lanes.dial_seconds

    def sign(self, claim: bytes) -> str:
        return self._identity.sign(claim).hex()

    def signed(self, peer: PeerId, claim: bytes, signature: str) -> bool:
        return verify(peer, claim, bytes.fromhex(signature))

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
        if self._tls is not None and isinstance(record, Presence):
            record = record.model_copy(update={"direct": self._tls.where(_hosts(self._addresses))})
        if isinstance(record, Presence | RoundRecord) and self.gate is not None:
            record = record.model_copy(update={"access": self.gate.own})
        key, expires = self._keys[record.kind], time.time() + ttl_seconds
        sealed = seal(self._identity, key.to_bytes(), record.model_dump_json().encode(), expires)
        kept, began = False, time.monotonic()
        try:
            async with asyncio.timeout(DHT_SECONDS):
                kept = await (await self._running_node()).store(key, self.peer_id, sealed, expires)
        except (TimeoutError, Unreachable):
            pass
        self.asked_dht("publish", kept, time.monotonic() - began)
        return kept

    async def lookup(self, kind: str) -> Sequence[SignedRecord]:
        began = time.monotonic()
        try:
            async with asyncio.timeout(DHT_SECONDS):
                found = await (await self._running_node()).fetch(self._keys[kind])
        except (TimeoutError, Unreachable):
            self.asked_dht("lookup", False, time.monotonic() - began)
            return ()
        self.asked_dht("lookup", True, time.monotonic() - began)
        records = []
        for author, (sealed, expires) in found.items():
            try:
                record = SIGNED.validate_json(unseal(sealed))
            except ValidationError:
                self.faults["bad_record"] += 1
                continue
            if record.kind != kind or record.peer != author:
                self.faults["bad_record"] += 1
            elif isinstance(record, Presence) and self._lanes.fingerprint not in (ASKING, record.fingerprint):
                self.faults["foreign_record"] += 1
            elif isinstance(record, Presence | RoundRecord) and self._is_uninvited(record):
                self.faults["uninvited_record"] += 1
            elif expires > time.time():
                records.append(record)
                if isinstance(record, Presence) and record.access is not None:
                    self._lanes.renew(record.peer, record.access)
                if self._tls is not None and isinstance(record, Presence):
                    self._tls.meet(record.peer, record.direct)
        return records

    def _is_uninvited(self, record: Presence | RoundRecord) -> bool:
        """Nor may somebody who is invited pass for what the invite does not allow."""
        if self.gate is None:
            return False
        any_run = self._lanes.fingerprint == ASKING
        if record.access is None or self.gate.flaw(record.peer, record.access, any_run=any_run):
            return True
        trains = isinstance(record, RoundRecord) or record.role == "train"
        return trains and not permits(record.access.grant.role, None)

    def _admits(self, author: str, text: bytes) -> bool:
        """Whether we keep that record for others: of whoever the organizer has invited to any run, and what
        the organizer has decreed, whoever brings it."""
        if self.gate is None:
            return True
        try:
            told = _Told.model_validate_json(text)
            if told.kind in DECREES:
                decree = SIGNED.validate_json(text)
                return isinstance(decree, Decree) and self.gate.learn(decree)
        except ValidationError:
            return False
        return not self.gate.flaw(PeerId(author), told.access, any_run=True)

    # -- for metrics and invites -----------------------------------------------------------------------------

    @property
    def faults(self) -> Counter[str]:
        """What went wrong so far: bad_message, refused, dropped, overload, bad_record, foreign_record,
        uninvited_record."""
        return self._lanes.faults

    @property
    def delivered_bytes(self) -> int:
        return self._lanes.delivered_bytes

    @property
    def traffic(self) -> Mapping[str, tuple[int, int]]:
        """Lane → bytes (sent, received) so far, framing included."""
        return self._lanes.traffic if self._tls is None else {**self._lanes.traffic, "tls": self._tls.traffic}

    @property
    def carriers(self) -> Mapping[Carrier, int]:
        """How many peers' chunks go which way."""
        return {} if self._tls is None else self._tls.peers

    @property
    def carrier_of(self) -> Mapping[PeerId, Carrier]:
        """Which way each peer's chunks go, of those that there have been any for."""
        return {} if self._tls is None else self._tls.carrier_of

    def visible_addresses(self) -> list[str]:
        """Multiaddresses with our peer id, to enter the swarm by, as of a moment ago; loopback last."""
        return self._addresses

    @property
    def clock_skew_seconds(self) -> float | None:
        """By how much an initial peer's clock is ahead of ours; None if none has said."""
        return self._node.skew_seconds if self._node is not None else None

    def dht_contacts(self) -> int:
        """Nodes that our DHT node knows."""
        return self._node.contacts() if self._node is not None else 0

    def connected_peers(self) -> int:
        """Peers that the daemon has a connection with; as of a moment ago."""
        return self._links.total()

    def links(self) -> Mapping[str, int]:
        """Of these, how many `direct`, and how many only by a `relay`."""
        return self._links

    # -- the daemon, and the DHT on it -----------------------------------------------------------------------

    async def _start_node(self) -> _Node:
        """A daemon that answers and accepts, with a DHT node that knows nobody yet. Raises LocalFault."""
        node = await self._start_daemon(self._daemon_options())
        try:
            async with asyncio.timeout(START_SECONDS):
                await node.listen(self._directory / "streams")
                await node.start_dht(self._validator, self._node)
                await self._look_at(node)
                relays = self._relay_for and not all(map(_is_loopback, self._listen))
                if relays and await self._relays_little(node):
                    await node.stop()
                    return await self._start_node()
        except BaseException as error:
            await node.stop()
            if isinstance(error, OSError | EOFError):  # a TimeoutError is an OSError
                raise LocalFault(f"the libp2p daemon died, or hung, while starting: {error!r}") from error
            raise
        return node

    async def _start_daemon(self, options: Mapping[str, str]) -> _Node:
        self._starts += 1
        control = self._directory / f"control{self._starts}"
        daemon = await Daemon.start(control, options)
        try:
            async with asyncio.timeout(START_SECONDS):
                return await _Node.attach(daemon, control)
        except BaseException as error:
            await daemon.stop()
            if isinstance(error, OSError | EOFError):
                raise LocalFault(f"the libp2p daemon died, or hung, while starting: {error!r}") from error
            raise

    def _daemon_options(self) -> dict[str, str]:
        options = {
            "id": str(self._identity_path),
            "hostAddrs": ",".join(self._listen),
            "dhtServer": "1",  # p2pd's own DHT finds addresses; hivemind's, on top, holds our records
            "tls": "1",
            "connManager": "1",
            "autonat": "1",
            "relay": "1",
        }
        if self._announce:
            options["announceAddrs"] = ",".join(self._announce)
        if self._relay_for:
            count = str(self._relay_for)
            options |= {"forceReachabilityPublic": "1", **RELAY_LIMITS}
            options |= {"relayMaxReservations": count, "relayMaxCircuits": count}
        else:
            options["relayService"] = "0"
        if not all(map(_is_loopback, self._listen)):
            options["natPortMap"] = "1"
        return options

    async def _refuse_twin(self) -> None:
        """Raises LocalFault if somebody of our identity is online: two would break each other's lanes.

        A daemon without identity asks for us, before ours is there to be found itself.
        """
        options = {"dhtClient": "1", "noListenAddrs": "1", "tls": "1", "relay": "1"}
        anonymous = await self._start_daemon(options)
        questions = [asyncio.create_task(self._is_online(anonymous, entry)) for entry in self._initial]
        online = None
        try:
            for answer in asyncio.as_completed(questions):
                if (online := await answer) is not None:
                    break
        finally:
            for question in questions:
                question.cancel()
            await anonymous.stop()
        if online:
            raise LocalFault(
                f"peer {short(self.peer_id)}, the identity in {self._identity_path}, is online already; "
                "stop the other p2ptrain, or give this one an identity file of its own"
            )

    async def _is_online(self, anonymous: _Node, entry: _Entry) -> bool | None:
        """Whether this initial peer knows how to reach us; None if it does not say."""
        try:
            async with asyncio.timeout(TWIN_SECONDS):
                await anonymous.connect(entry)
                while True:
                    try:
                        await anonymous.connect(_Entry(self.peer_id))
                        return True
                    except Unreachable as fault:
                        if "failed to find any peer in table" not in str(fault):
                            return False
                    await asyncio.sleep(0.01)  # until the daemon has taken the initial peer into its table
        except (Unreachable, OSError, EOFError):
            return None

    async def _enter(self, node: _Node) -> None:
        """Get known to the first initial peer that answers, and to the others meanwhile.

        Raises Unreachable if none answers, LocalFault if our clock is wrong.
        """
        outcomes: asyncio.Queue[P2PTrainError | None] = asyncio.Queue()
        for entry in self._initial:
            self._crew.spawn(self._enter_by(node, entry, outcomes))
        faults: list[P2PTrainError] = []
        while len(faults) < len(self._initial):
            outcome = await outcomes.get()
            if outcome is not None:
                faults.append(outcome)
                continue
            await self._look_at(node)
            return
        for fault in faults:
            if isinstance(fault, LocalFault):
                raise fault
        if faults:
            raise Unreachable(
                f"no initial peer could be reached: {'; '.join(map(str, faults))}. Is one of them running, "
                "is its address up to date, and does no firewall stand between?"
            )

    async def _enter_by(
        self, node: _Node, entry: _Entry, outcomes: asyncio.Queue[P2PTrainError | None]
    ) -> None:
        """Get known to one initial peer. The outcome is None, or a fault."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await node.connect(entry)
                await node.greet_dht(entry.peer)
            outcomes.put_nowait(None)
        except TimeoutError:
            outcomes.put_nowait(Unreachable(f"{entry} did not answer within {CONNECT_SECONDS:.0f} s"))
        except Unreachable as fault:
            outcomes.put_nowait(Unreachable(f"{entry}: {fault}"))
        except LocalFault as fault:
            outcomes.put_nowait(fault)
        except (OSError, EOFError):
            outcomes.put_nowait(Unreachable(f"{entry}: our own libp2p daemon died meanwhile"))

    # -- am I reachable --------------------------------------------------------------------------------------

    async def _look_outside(self, node: _Node) -> None:
        """Have the initial peers dial us back."""
        port = reach.port_of((self._announce or self._listen)[0])
        if port is None or all(map(_is_loopback, self._listen)):
            return  # on this machine everybody reaches everybody
        entries = [entry for entry in self._initial if node.knows(entry.peer)]
        answers = await asyncio.gather(*(self._ask_back(node, entry, port) for entry in entries))
        found = reach.judged([answer for answer in answers if answer is not None])
        before = self.reach
        if found.reachable is None or found.reachable is before.reachable:
            return
        self.reach = found
        await self._reserve(node)
        self._on_event(
            ReachChanged(reachable=bool(found.reachable), address=found.address, relays=len(self.relays))
        )

    async def _reserve(self, node: _Node) -> None:
        """Be there for other hidden peers, at each connected peer that relays. A relay forgets us when the
        connection breaks, or after an hour. p2pd would reserve by itself, but only once it knows that it is
        hidden, and that it never learns among private addresses."""
        if not self.reach.hidden:
            self.relays = ()
            return
        try:
            async with asyncio.timeout(reach.DIAL_SECONDS):
                entries = reach.candidates(await node.connections(), [each.peer for each in self._initial])
        except (OSError, EOFError):
            return  # our own daemon died; there will be another time
        grants = await asyncio.gather(*(self._granted(node, peer) for peer, _ in entries))
        self.relays = tuple(
            _Entry(peer, address)
            for (peer, address), grant in zip(entries, grants, strict=True)
            if grant >= reach.ENOUGH_BYTES
        )

    async def _granted(self, node: _Node, relay: PeerId) -> int:
        """How many bytes this peer relays for us and another, each way; 0 if it does not."""
        try:
            async with asyncio.timeout(reach.DIAL_SECONDS):
                reader, writer = await node.open_stream(relay, reach.HOP)
                try:
                    writer.write(reach.RESERVE)
                    return reach.granted(await reach.read_message(reader))
                finally:
                    writer.transport.abort()
        except (Unreachable, BadMessage, OSError, EOFError):  # a TimeoutError is an OSError
            return 0

    async def _relays_little(self, node: _Node) -> bool:
        """p2pd starts two relays for one protocol, ours and one that passes 128 KiB and hangs up, and which
        of them answers is chance. A stranger asks."""
        stranger = await self._start_daemon(STRANGER)
        try:
            async with asyncio.timeout(reach.DIAL_SECONDS):
                await stranger.connect(_Entry(self.peer_id, (await node.addresses())[0]))
            return await self._granted(stranger, self.peer_id) < reach.ENOUGH_BYTES
        except (Unreachable, OSError, EOFError):
            return False  # nobody could say
        finally:
            await stranger.stop()

    async def _ask_back(self, node: _Node, entry: _Entry, port: int) -> Dialled | None:
        """What that peer says; None if it does not."""
        try:
            async with asyncio.timeout(reach.ANSWER_SECONDS):
                reader, writer = await node.open_stream(entry.peer, reach.PROTOCOL)
                try:
                    writer.write(pack(DialBack(port=port)))
                    answer, _, _ = await read_frame(reader, max_payload_bytes=0)
                finally:
                    writer.transport.abort()
        except (Unreachable, BadMessage, OSError, EOFError):  # a TimeoutError is an OSError
            return None
        return answer if isinstance(answer, Dialled) else None

    async def _answer_reach(
        self, peer: PeerId, observed: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Dial back a peer that asks for it."""
        try:
            async with asyncio.timeout(reach.DIAL_SECONDS):
                question, _, _ = await read_frame(reader, max_payload_bytes=0)
        except (BadMessage, TimeoutError):
            return
        if not isinstance(question, DialBack):
            return
        address = reach.target(observed, question.port)
        if address is None:
            answer = Dialled(reachable=None, detail="not asked over TCP")
        elif not self._doorkeeper.admits(peer, asyncio.get_running_loop().time()):
            answer = Dialled(reachable=None, detail="busy; ask again later")
        else:
            try:
                failure = await self._dial_back(_Entry(peer, address))
                answer = Dialled(reachable=not failure, address=address, detail=clean(failure, 300))
            except LocalFault as fault:
                answer = Dialled(reachable=None, detail=clean(str(fault), 300))
            finally:
                self._doorkeeper.done()
        writer.write(pack(answer))
        await writer.drain()

    async def _dial_back(self, entry: _Entry) -> str:
        """Why no new connection can be made to this peer; empty if one can. A daemon of its own makes it:
        ours would use the connection that it has."""
        stranger = await self._start_daemon(STRANGER)
        try:
            async with asyncio.timeout(reach.DIAL_SECONDS):
                await stranger.connect(entry)
            return ""
        except TimeoutError:
            return f"no answer within {reach.DIAL_SECONDS:.0f} s"
        except Unreachable as fault:
            return str(fault)
        except (OSError, EOFError) as error:
            raise LocalFault(f"the libp2p daemon died while dialling: {error!r}") from error
        finally:
            await stranger.stop()

    async def _running_node(self) -> _Node:
        try:
            async with asyncio.timeout(RESTART_SECONDS):
                await self._node_came.wait()
        except TimeoutError:
            raise Unreachable("our own libp2p daemon is down") from None
        assert self._node is not None
        return self._node

    async def _supervise(self) -> None:
        """Whenever the daemon dies, start it again."""
        loop = asyncio.get_running_loop()
        while True:
            assert self._node is not None
            how = await self._node.daemon.wait()
            died = loop.time()
            logger.debug("p2pd died: %s", how)
            self._node_came.clear()
            self._node.died.set()
            self._node.detach()
            pause = 0.25
            while self._node.died.is_set():
                try:
                    self._node = await self._start_node()
                except LocalFault as fault:
                    logger.warning("the libp2p daemon died and could not be restarted yet: %s", fault)
                    await asyncio.sleep(pause)
                    pause = min(5.0, 2 * pause)
            with contextlib.suppress(P2PTrainError):  # `_keep_up` will try again
                await self._enter(self._node)
            self._node_came.set()
            self._on_event(DaemonRestarted(seconds=loop.time() - died))

    async def _keep_up(self) -> None:
        """Look after the daemon, and find back to lost initial peers: newcomers still enter by them."""
        loop = asyncio.get_running_loop()
        entered, reserve_at = loop.time(), loop.time()
        look_at = loop.time() + FIRST_LOOK_SECONDS
        while True:
            await asyncio.sleep(UPKEEP_SECONDS)
            node = self._node
            if node is None or node.died.is_set():
                continue
            try:
                async with asyncio.timeout(HANG_SECONDS):
                    await self._look_at(node)
            except TimeoutError:
                node.daemon.kill()
            if loop.time() >= entered + REENTER_SECONDS:
                for entry in self._initial:
                    if not node.knows(entry.peer):
                        self._crew.spawn(self._enter_by(node, entry, asyncio.Queue()))
                entered = loop.time()
            if loop.time() >= look_at:
                look_at = loop.time() + LOOK_SECONDS
                self._crew.spawn(self._look_outside(node))
            if self.reach.hidden and loop.time() >= reserve_at:
                reserve_at = loop.time() + RESERVE_SECONDS
                self._crew.spawn(self._reserve(node))

    async def _guard(self, gate: Gate) -> None:
        """Hear of the organizer's decrees, pass them on, and part from those who are no longer let in."""
        said: dict[str, tuple[int, float]] = {}
        told: set[Kick] = set()
        while True:
            heard = await self._hear(gate)
            for kick in set(gate.kicks) - told:
                seconds = None if kick.until is None else max(kick.until - time.time(), 0.0)
                self._on_event(PeerKicked(peer=kick.who, seconds=seconds, reason=kick.reason))
            told = set(gate.kicks)
            for kind, keepers in heard.items():
                newest = gate.decrees[kind]
                revision, at = said.get(kind, (-1, 0.0))
                due = newest.revision > revision or time.monotonic() > at + DECREE_SECONDS / 3
                if keepers < KEEPERS and due:
                    said[kind] = newest.revision, time.monotonic()
                    ours = SIGNED.validate_python(newest.model_copy(update={"peer": self.peer_id}))
                    await self.publish(ours, ttl_seconds=DECREE_SECONDS)
            self._lanes.review()
            await asyncio.sleep(REVIEW_SECONDS)

    async def _hear(self, gate: Gate) -> dict[str, int]:
        """Heed what the organizer has decreed; of each kind that there is, how many others keep the
        newest."""
        lists = await asyncio.gather(*map(self.lookup, DECREES))
        keepers = {}
        for kind, found in zip(DECREES, lists, strict=True):
            genuine = [each for each in found if isinstance(each, Decree) and gate.learn(each)]
            if (newest := gate.decrees.get(kind)) is not None:
                others = [each for each in genuine if each.peer != self.peer_id]
                keepers[kind] = sum(each.revision == newest.revision for each in others)
        return keepers

    async def _look_at(self, node: _Node) -> None:
        with contextlib.suppress(OSError, EOFError):  # it just died; `_supervise` sees to it
            addresses = sorted(await node.addresses(), key=_is_loopback)
            self._addresses = [f"{address}/p2p/{self.peer_id}" for address in addresses]
            self._links = await node.links()

    async def _stop_node(self) -> None:
        if self._node is not None:
            await self._node.stop()

    # -- streams ---------------------------------------------------------------------------------------------

    async def _open_stream(self, peer: PeerId, kind: Kind, seconds: float) -> Stream:
        """See `lanes.OpenStream`. The time in which our own daemon is down does not count."""
        while True:
            node = await self._running_node()
            try:
                async with asyncio.timeout(seconds):
                    return await self._stream_to(node, peer, _PROTOCOLS[kind], seconds)
            except TimeoutError:
                raise Unreachable(f"no stream to peer {short(peer)} within {seconds:g} s") from None
            except (ConnectionError, FileNotFoundError, EOFError):
                with contextlib.suppress(TimeoutError):  # the daemon is dying: its successor shall open it
                    async with asyncio.timeout(seconds):
                        await node.died.wait()
                        continue
                raise Unreachable("our own libp2p daemon does not answer") from None
            except OSError as error:
                raise Unreachable(f"no stream to peer {short(peer)}: {error}") from None

    async def _stream_to(self, node: _Node, peer: PeerId, protocol: str, seconds: float) -> Stream:
        """One that is hidden itself asks the relays for a peer that it cannot reach. One that is not leaves
        it to the hidden peer to come: that way is direct. Raises Unreachable or TimeoutError."""
        if not self.reach.hidden:
            return await node.open_stream(peer, protocol)
        try:
            async with asyncio.timeout(seconds / 2):
                return await node.open_stream(peer, protocol)
        except (Unreachable, TimeoutError) as fault:
            reasons = [str(fault) or "no answer"]
        for relay in self.relays:
            try:
                await node.connect(_Entry(peer), through=relay)
                return await node.open_stream(peer, protocol)
            except Unreachable as fault:
                reasons.append(f"by way of {short(relay.peer)}: {fault}")
        raise Unreachable("; ".join(reasons))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open_streams >= MAX_STREAMS:
            self.faults["overload"] += 1
            writer.transport.abort()
        else:
            self._crew.spawn(self._serve_stream(reader, writer))

    async def _serve_stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open_streams += 1
        whose: tuple[str, ...] = ()
        try:
            info = p2pd_pb2.StreamInfo()
            await read_pbmsg_safe(reader, info)
            peer = PeerId(base58.b58encode(info.peer).decode())
            whose = (peer,) if self._validator.knows(peer) else (peer, STRANGERS)
            self._streams.update(whose)
            if (
                self._streams[peer] > MAX_STREAMS_PER_PEER
                or self._streams[STRANGERS] > MAX_STREAMS_OF_STRANGERS
            ):
                self.faults["overload"] += 1
                writer.transport.abort()
            elif info.proto == reach.PROTOCOL:
                await self._answer_reach(peer, str(Multiaddr(info.addr)), reader, writer)
            else:
                await self._lanes.accept(peer, _KIND_OF[info.proto], reader, writer)
        except (OSError, EOFError):
            pass  # the daemon died
        finally:
            self._open_streams -= 1
            self._streams.subtract(whose)
            self._streams += Counter()  # forgets those at zero
            writer.close()


# -- one daemon ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A peer, and maybe an address to reach it at."""

    peer: PeerId
    address: str = ""

    def __str__(self) -> str:
        return f"{self.address}/p2p/{self.peer}"


class _Told(BaseModel):
    """What every signed record has, of whichever version."""

    kind: str
    access: Pass | None = None


class _Records(DHTLocalStorage):  # type: ignore[misc]  # hivemind has no types
    """What a DHT node keeps: one record of each author under a key, and the newest.

    hivemind's own would let a value that names no author take the place of all of them; and one that it
    declines, because a newer is there, would still have that one forgotten when it would have expired itself.
    """

    def store(self, key: Any, value: Any, expiration_time: float, subkey: Any = None) -> bool:
        return subkey is not None and self.store_subkey(key, subkey, value, expiration_time)

    def store_subkey(self, key: Any, subkey: Any, value: Any, expiration_time: float) -> bool:
        found = self.get(key)
        held = found.value.get(subkey) if found is not None else None
        if held is not None and held.expiration_time >= expiration_time:
            return False
        return bool(super().store_subkey(key, subkey, value, expiration_time))


class _Doorman:
    """hivemind's three remote procedures, for so much per second: for each peer whose record is here, and for
    all strangers together, who can have any number of names. A record costs a signature's check, 0.1 ms."""

    def __init__(self, protocol: Any, validator: RecordValidator) -> None:
        self._protocol, self._validator = protocol, validator
        self._budgets = Budgets(DHT_RECORDS_PER_SECOND, DHT_RECORDS_AT_ONCE)

    async def rpc_ping(self, request: dht_pb2.PingRequest, context: Any) -> dht_pb2.PingResponse:
        self._pay(context, 1)
        return await self._protocol.rpc_ping(request, context)

    async def rpc_find(self, request: dht_pb2.FindRequest, context: Any) -> dht_pb2.FindResponse:
        self._pay(context, len(request.keys))
        return await self._protocol.rpc_find(request, context)

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: Any) -> dht_pb2.StoreResponse:
        dictionaries = sum(tag == self._protocol.IS_DICTIONARY for tag in request.subkeys)
        self._pay(context, len(request.keys) + MAX_INVALID * dictionaries)
        return await self._protocol.rpc_store(request, context)

    def _pay(self, context: Any, amount: int) -> None:
        """Raises Refused."""
        peer = str(context.remote_id.to_base58())
        who = peer if self._validator.knows(peer) else ""
        if not self._budgets.allow(who, amount, time.monotonic()):
            raise Refused("too many records at once")


def _sifted(validator: RecordValidator, key: bytes, records: Any) -> bool:
    """Takes out what is not valid: hivemind would take no record of a node that has one such."""
    if not isinstance(records, DictionaryDHTValue):
        return False
    invalid = 0
    with records.freeze():
        for subkey, (value, expires) in list(records.items()):
            record = DHTRecord(key, MSGPackSerializer.dumps(subkey), value, expires)
            if invalid >= MAX_INVALID or not validator.validate(record):
                invalid += 1
                del records[subkey]
    return True


@dataclass
class _Node:
    """What lives and dies with one p2pd: the process, its control socket, and hivemind's DHT node on it.

    All methods but `stop` and `detach` raise OSError or EOFError if the daemon dies meanwhile.
    """

    daemon: Daemon
    control: Path
    p2p: Any
    dht: Any = None
    skew_seconds: float | None = None
    """Of the clock that was met last, against ours."""
    died: asyncio.Event = field(default_factory=asyncio.Event)
    _keepers: dict[DHTID, tuple[float, list[Any]]] = field(default_factory=dict)
    """Who keeps our records under a key, and when they were found, while all of them answer."""
    _found: Counter[DHTID] = field(default_factory=Counter)
    """How many records there were under a key at the last look."""

    @classmethod
    async def attach(cls, daemon: Daemon, control: Path) -> _Node:
        # By default hivemind puts its sockets into the common temporary folder.
        private: Any = type("PrivateP2P", (P2P,), {"_UNIX_SOCKET_PREFIX": f"/unix{control}-"})
        p2p = await private.replicate(Multiaddr(f"/unix{control}"))
        for task in (p2p._client.control._read_task, p2p._client.control._write_task):
            task.add_done_callback(_forget)
        return cls(daemon, control, p2p)

    async def listen(self, streams: Path) -> None:
        """Have inbound streams of our protocols brought to this unix socket."""
        address = Multiaddr(f"/unix{streams}").to_bytes()
        handler = p2pd_pb2.StreamHandlerRequest(
            addr=address, proto=[*_KIND_OF, reach.PROTOCOL], balanced=False
        )
        await self._tell(p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_HANDLER, streamHandler=handler))

    async def start_dht(self, validator: RecordValidator, before: _Node | None) -> None:
        self.dht = await DHTNode.create(
            p2p=self.p2p,
            # The same after a restart, or others would know us twice.
            node_id=DHTID.generate(source=self.p2p.peer_id.to_bytes()),
            record_validator=validator,
            cache_locally=False,  # records live for seconds
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
            reuse_get_requests=False,
            client_mode=True,  # or it would answer by itself, without bounds
        )
        protocol = self.dht.protocol
        protocol.client_mode = False
        protocol.node_info = dht_pb2.NodeInfo(node_id=protocol.node_id.to_bytes())
        protocol.storage = protocol.cache = _Records()
        protocol._validate_dictionary = partial(_sifted, validator)
        await protocol.add_p2p_handlers(self.p2p, _Doorman(protocol, validator))
        if before is not None and before.dht is not None:
            protocol.storage = protocol.cache = before.dht.protocol.storage

    async def greet_dht(self, peer: PeerId) -> None:
        """Get known to the peer's DHT node.

        Raises Unreachable, or LocalFault if our clocks differ too much for records that live for seconds.
        """
        protocol, remote = self.dht.protocol, PeerID.from_base58(peer)
        question = dht_pb2.PingRequest(peer=protocol.node_info, validate=True)
        try:
            answer = await protocol.get_stub(remote).rpc_ping(question, timeout=CONNECT_SECONDS)
            number = DHTID.from_bytes(answer.peer.node_id)
        except Exception as error:  # hivemind passes on whatever went wrong there, by any name
            raise Unreachable(f"it is there, but its DHT does not answer: {error!r}") from error
        self.skew_seconds = skew = answer.dht_time - time.time()
        if abs(skew) > MAX_CLOCK_SKEW_SECONDS:
            raise LocalFault(
                f"the clock of this machine and that of peer {short(peer)} differ by {skew:.0f} s, at most "
                f"{MAX_CLOCK_SKEW_SECONDS:.0f} s will do; set this one by network time"
            )
        await protocol.update_routing_table(number, remote, responded=True)

    async def store(self, key: DHTID, author: PeerId, sealed: bytes, expires: float) -> bool:
        """Have the nodes nearest to the key, and our own, keep the record; whether one of the others does.

        hivemind's own `store` tells what the last node said. That is no, if another node was quicker to pass
        our record on to it. For the same reason we keep it only after the others have been asked.
        """
        protocol, value = self.dht.protocol, MSGPackSerializer.dumps(sealed)
        found_at, keepers = self._keepers.pop(key, (float("-inf"), []))
        now = asyncio.get_running_loop().time()
        if now - found_at > max(KEEPERS_SECONDS, look_seconds(self._found[key], urgent=False)):
            nearest = await self.dht.find_nearest_nodes([key], k_nearest=REPLICAS, exclude_self=True)
            found_at, keepers = now, list(nearest[key].values())
        answers = await asyncio.gather(
            *(protocol.call_store(peer, [key], [value], [expires], [author]) for peer in keepers)
        )
        if len(keepers) == REPLICAS and all(answer is not None for answer in answers):
            self._keepers[key] = found_at, keepers
        protocol.storage.store_subkey(key, author, value, expires)
        return any(answer is not None and answer[0] for answer in answers)

    async def fetch(self, key: DHTID) -> Mapping[str, tuple[bytes, float]]:
        """The newest record of each author under the key, and when it expires."""
        # Not a number, because one that is later than any time would be met by a node which says that what it
        # has never expires; the search would end with it.
        found = (await self.dht.get_many_by_id([key], sufficient_expiration_time=math.nan))[key]
        self._found[key] = 0 if found is None else len(found.value)
        return {} if found is None else found.value

    def knows(self, peer: PeerId) -> bool:
        """Whether the DHT node has this peer among its contacts."""
        return self.dht.protocol.routing_table.get(peer_id=PeerID.from_base58(peer)) is not None

    def contacts(self) -> int:
        return 0 if self.dht is None else len(self.dht.protocol.routing_table.uid_to_peer_id)

    async def connect(self, entry: _Entry, *, through: _Entry | None = None) -> None:
        """`through`: a relay that both are connected to. Raises Unreachable."""
        addresses = [Multiaddr(entry.address).to_bytes()] if entry.address else []
        if through is not None:
            addresses = [reach.circuit(Multiaddr(through.address).to_bytes(), through.peer)]
        call = p2pd_pb2.ConnectRequest(peer=base58.b58decode(entry.peer), addrs=addresses)
        await self._tell(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=call))

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        """Raises Unreachable."""
        try:
            raw = base58.b58decode(peer)
        except ValueError:  # another peer told us of it
            raise Unreachable(f"{peer!r} is no peer id") from None
        call = p2pd_pb2.StreamOpenRequest(peer=raw, proto=[protocol])
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=call)
        _, reader, writer = await self._call(request)
        return reader, writer

    async def addresses(self) -> list[str]:
        response = await self._tell(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        return [str(Multiaddr(address)) for address in response.identify.addrs]

    async def links(self) -> Counter[str]:
        """Peers that are connected, by whether one of their connections is direct."""
        found = await self.connections()
        direct = {peer for peer, address in found if not reach.is_relayed(address)}
        return Counter("direct" if peer in direct else "relay" for peer in {peer for peer, _ in found})

    async def connections(self) -> list[tuple[PeerId, str]]:
        """Who is at the other end of each, and its address there."""
        response = await self._tell(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        return [
            (PeerId(base58.b58encode(info.id).decode()), str(Multiaddr(address)))
            for info in response.peers
            for address in info.addrs
        ]

    def detach(self) -> None:
        """Let go of hivemind's side of it."""
        if self.dht is not None:
            self.dht.is_alive = False
        self.p2p._terminate()

    async def stop(self) -> None:
        self.detach()
        await self.daemon.stop()

    async def _tell(self, request: Any) -> Any:
        response, _, writer = await self._call(request)
        writer.close()
        return response

    async def _call(self, request: Any) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        """One exchange, on a connection of its own as the protocol has it. Raises Unreachable if declined.

        hivemind's own client does the same, but leaves the connection open when it is cancelled.
        """
        reader, writer = await asyncio.open_unix_connection(self.control, limit=READ_BUFFER_BYTES)
        try:
            writer.write(_varint(request.ByteSize()) + request.SerializeToString())
            response = p2pd_pb2.Response()
            await read_pbmsg_safe(reader, response)
            if response.type == p2pd_pb2.Response.ERROR:
                raise Unreachable(_in_one_line(response.error.msg))
        except BaseException:
            writer.transport.abort()
            raise
        return response, reader, writer


def _forget(task: asyncio.Task[Any]) -> None:
    """Take note of how the task ended, or asyncio would complain that nobody did."""
    if not task.cancelled():
        task.exception()


def _varint(number: int) -> bytes:
    """Protobuf's variable-length integer."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _in_one_line(message: str) -> str:
    """What libp2p says in many lines, one for each address it tried: the reasons."""
    lines = message.splitlines()
    reasons = [line.strip(" *") for line in lines if line.lstrip().startswith("*")]
    return "; ".join(reasons) if reasons else " ".join(lines)


# -- this machine: addresses, ports, files -------------------------------------------------------------------


def _entry(address: str) -> _Entry:
    parts = _PEER.fullmatch(address)
    try:
        if parts is None:
            raise ValueError("it does not end in /p2p/ and a peer id")
        base58.b58decode(parts[2])
        Multiaddr(parts[1]).to_bytes()
    except Exception as error:  # the multiaddress parser has no exception type of its own
        raise ConfigError(
            f"initial peer {address!r}: expected an address such as "
            f"/ip4/203.0.113.7/tcp/31337/p2p/12D3Koo…; {error}"
        ) from None
    return _Entry(PeerId(parts[2]), parts[1])


def _host(address: str) -> str:
    """The IP address to listen on in a multiaddress. Raises ConfigError."""
    return _listening(address)[2]


def _hosts(addresses: Sequence[str]) -> list[str]:
    """The IP addresses in multiaddresses that lead here, not to a relay, each once."""
    ours = [_ADDRESS.match(address) for address in addresses if "/p2p-circuit" not in address]
    return list(dict.fromkeys(found[1] for found in ours if found is not None))


def _is_loopback(address: str) -> bool:
    return address.startswith(("/ip4/127.", "/ip6/::1/"))


def _listening(address: str) -> re.Match[str]:
    """Family, IP address and port of a listen address. Raises ConfigError."""
    parts = _LISTEN.fullmatch(address)
    if parts is None or int(parts[3]) > 65535:
        raise ConfigError(
            f"listen address {address!r}: expected an IP address and TCP port, such as /ip4/0.0.0.0/tcp/31337"
        )
    return parts


def _reserved(address: str) -> tuple[str, socket.socket]:
    """This listen address, with port 0 replaced by a free one, and a socket that keeps the port for us.

    p2pd shares its port with whoever else wants it (SO_REUSEPORT), so it would not notice that it is taken.
    """
    parts = _listening(address)
    family = socket.AF_INET if parts[1] == "ip4" else socket.AF_INET6
    keeper = socket.socket(family)
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(probe, parts[2], int(parts[3]))
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _bind(keeper, parts[2], int(parts[3]))
    except OSError as error:
        keeper.close()
        if error.errno == errno.EADDRINUSE:
            raise PortBusy(
                f"{address} is taken by {port_holder(int(parts[3]))}; stop that one, or choose another port "
                "in `listen`"
            ) from None
        raise LocalFault(
            f"cannot listen on {address}: {error.strerror}; choose another address or port in `listen`"
        ) from None
    return f"/{parts[1]}/{parts[2]}/tcp/{keeper.getsockname()[1]}", keeper


def _bind(listener: socket.socket, host: str, port: int) -> None:
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind((host, port))


def _sole_user(identity: Path) -> BinaryIO:
    """The identity file, held open so that a second p2ptrain on this machine does not use it too."""
    file = identity.open("rb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise LocalFault(
            f"the identity {identity} is in use on this machine by {lock_holder(identity)}; "
            "stop that one, or give this one a data_dir, and so an identity file of its own"
        ) from None
    return file


def _private_directory() -> tempfile.TemporaryDirectory[str]:
    """A folder for sockets, ours alone. Its path is short: that of a socket has at most 107 characters."""
    folder = tempfile.gettempdir()
    if len(folder) > 40:
        folder = "/tmp"  # noqa: S108 - the folder that is made there is nobody else's
    try:
        return tempfile.TemporaryDirectory(prefix="p2ptrain-", dir=folder)
    except OSError as error:
        raise StorageError(f"no folder for temporary sockets: {error}; set TMPDIR to one") from error
