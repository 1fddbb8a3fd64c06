"""The real network: libp2p through the daemon p2pd, and hivemind's DHT for finding each other.

One daemon is a `node`, which imports hivemind, and as that takes seconds (torch), do it late. Daemon, streams
and links are looked after here, in one process, on the caller's event loop, asyncio's own or uvloop. If p2pd
dies it is started again under the same identity and ports, and callers see no more than broken links.

Not covered: the bulk of large models: a libp2p stream carries a few hundred MB/s. Chunks go by `tls`, where
that can make a connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ValidationError

from p2ptrain.errors import (
    BadMessage,
    LocalFault,
    P2PTrainError,
    Unreachable,
)
from p2ptrain.events import (
    Carrier,
    CarrierChanged,
    DaemonRestarted,
    PeerFaulted,
    PeerKicked,
    ReachChanged,
    short,
)
from p2ptrain.records import (
    DECREES,
    SIGNED,
    Averaged,
    Chunk,
    Decree,
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
from p2ptrain.swarm.gate import Gate, permits
from p2ptrain.swarm.identity import load_or_create, verify
from p2ptrain.swarm.lanes import ASKING, Kind, Lanes, Stream
from p2ptrain.swarm.machine import (
    host_of,
    hosts_of,
    is_loopback,
    private_directory,
    reserved,
    sole_user,
)
from p2ptrain.swarm.node import (
    CONNECT_SECONDS,
    KIND_OF,
    PROTOCOLS,
    READ_BUFFER_BYTES,
    Entry,
    Node,
    entry_of,
    key_of,
    opened,
)
from p2ptrain.swarm.outside import Outside
from p2ptrain.swarm.p2pd import START_SECONDS, Daemon
from p2ptrain.swarm.port import Buffer, Handler
from p2ptrain.swarm.throttle import Throttle
from p2ptrain.swarm.tls import TlsCarrier
from p2ptrain.swarm.validator import (
    MAX_TTL_SECONDS,
    RecordValidator,
    seal,
    unseal,
)

logger = logging.getLogger(__name__)


TWIN_SECONDS = 3.0
"""For finding out whether our identity is online elsewhere; if it takes longer, it is not."""
RESTART_SECONDS = 30.0
"""So long a stream to be opened waits for a daemon that is being restarted."""
DHT_SECONDS = 10.0
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
RELAY_LIMITS = {"relayDataLimit": str(2**50), "relayTimeLimit": "24h", "relayBufferSize": str(2**16)}
"""Of one connection that we relay; at its end both sides make another, and one round is tried again."""

REVIEW_SECONDS = 3.0
"""How often a peer asks what the organizer has decreed, and looks at whose invite has ended."""
DECREE_SECONDS = 60.0
"""For which a decree is published; whoever keeps it there begins anew when it has expired."""
KEEPERS = 3
"""So many peers keep each decree published; it outlives the organizer's own."""

STRANGERS = ""
"""All whom no record in the DHT says are invited, as one."""

MAX_STREAMS = 2048
"""Inbound streams at one time; a file descriptor each."""
MAX_STREAMS_OF_STRANGERS = 256
"""Of these, of peers that no record in the DHT says are invited: newcomers, but also whoever opens streams
and says nothing."""
MAX_STREAMS_PER_PEER = 32
"""Two lanes, 8 requests, and as many again that are being closed."""


Event = PeerFaulted | PeerKicked | CarrierChanged | ReachChanged | DaemonRestarted


class Told(BaseModel):
    """What every signed record has, of whichever version."""

    kind: str
    access: Pass | None = None


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
        self._initial = [entry for entry in map(entry_of, initial_peers) if entry.peer != self.peer_id]
        self._listen = list(listen)
        self._announce = list(announce)
        self._relay_for = relay_for
        self._outside = Outside(
            self.peer_id, self._initial, self._listen, self._announce, self._start_daemon, on_event
        )
        self._keys = {kind: key_of(run_id, kind) for kind in ("presence", "round", *DECREES)}
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
                listen=list(dict.fromkeys(host_of(address) for address in self._listen)),
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
        self._node: Node | None = None
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
            stack.enter_context(sole_user(self._identity_path))
            self._directory = Path(stack.enter_context(private_directory()))
            for number, address in enumerate(self._listen):
                self._listen[number], keeper = reserved(address)
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
            await self._outside.look(self._node)
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
            record = record.model_copy(update={"direct": self._tls.where(hosts_of(self._addresses))})
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
            told = Told.model_validate_json(text)
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

    @property
    def reach(self) -> reach.Reach:
        """What others say of us: whether they can open connections to us."""
        return self._outside.reach

    @property
    def relays(self) -> tuple[Entry, ...]:
        """Where other hidden peers can meet us, if we are hidden."""
        return self._outside.relays

    def links(self) -> Mapping[str, int]:
        """Of these, how many `direct`, and how many only by a `relay`."""
        return self._links

    # -- the daemon, and the DHT on it -----------------------------------------------------------------------

    async def _start_node(self) -> Node:
        """A daemon that answers and accepts, with a DHT node that knows nobody yet. Raises LocalFault."""
        node = await self._start_daemon(self._daemon_options())
        try:
            async with asyncio.timeout(START_SECONDS):
                await node.listen(self._directory / "streams")
                await node.start_dht(self._validator, self._node)
                await self._look_at(node)
                relays = self._relay_for and not all(map(is_loopback, self._listen))
                if relays and await self._outside.relays_little(node):
                    await node.stop()
                    return await self._start_node()
        except BaseException as error:
            await node.stop()
            if isinstance(error, OSError | EOFError):  # a TimeoutError is an OSError
                raise LocalFault(f"the libp2p daemon died, or hung, while starting: {error!r}") from error
            raise
        return node

    async def _start_daemon(self, options: Mapping[str, str]) -> Node:
        self._starts += 1
        control = self._directory / f"control{self._starts}"
        daemon = await Daemon.start(control, options)
        try:
            async with asyncio.timeout(START_SECONDS):
                return await Node.attach(daemon, control)
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
        if not all(map(is_loopback, self._listen)):
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

    async def _is_online(self, anonymous: Node, entry: Entry) -> bool | None:
        """Whether this initial peer knows how to reach us; None if it does not say."""
        try:
            async with asyncio.timeout(TWIN_SECONDS):
                await anonymous.connect(entry)
                while True:
                    try:
                        await anonymous.connect(Entry(self.peer_id))
                        return True
                    except Unreachable as fault:
                        if "failed to find any peer in table" not in str(fault):
                            return False
                    await asyncio.sleep(0.01)  # until the daemon has taken the initial peer into its table
        except (Unreachable, OSError, EOFError):
            return None

    async def _enter(self, node: Node) -> None:
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
        self, node: Node, entry: Entry, outcomes: asyncio.Queue[P2PTrainError | None]
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

    # -- upkeep ----------------------------------------------------------------------------------------------

    async def _running_node(self) -> Node:
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
                self._crew.spawn(self._outside.look(node))
            if self.reach.hidden and loop.time() >= reserve_at:
                reserve_at = loop.time() + RESERVE_SECONDS
                self._crew.spawn(self._outside.reserve(node))

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

    async def _look_at(self, node: Node) -> None:
        with contextlib.suppress(OSError, EOFError):  # it just died; `_supervise` sees to it
            addresses = sorted(await node.addresses(), key=is_loopback)
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
                    return await self._outside.stream_to(node, peer, PROTOCOLS[kind], seconds)
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
            stream = await opened(reader)
            peer = stream.peer
            whose = (peer,) if self._validator.knows(peer) else (peer, STRANGERS)
            self._streams.update(whose)
            if (
                self._streams[peer] > MAX_STREAMS_PER_PEER
                or self._streams[STRANGERS] > MAX_STREAMS_OF_STRANGERS
            ):
                self.faults["overload"] += 1
                writer.transport.abort()
            elif stream.protocol == reach.PROTOCOL:
                await self._outside.answer(peer, stream.observed, reader, writer)
            else:
                await self._lanes.accept(peer, KIND_OF[stream.protocol], reader, writer)
        except (OSError, EOFError):
            pass  # the daemon died
        finally:
            self._open_streams -= 1
            self._streams.subtract(whose)
            self._streams += Counter()  # forgets those at zero
            writer.close()
