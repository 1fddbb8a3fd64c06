"""One p2pd, and hivemind's DHT node on it: what lives and dies with the process.

This is the only module that imports hivemind, and as that takes seconds (torch), do it late. hivemind gives
the DHT node and the words of p2pd's control protocol; what a node keeps and answers is bounded here.

Not covered: when one is started, and what it is for (`libp2p`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import base58

from p2ptrain.errors import ConfigError, LocalFault, Refused, Unreachable
from p2ptrain.events import short
from p2ptrain.protocol.presence import look_seconds
from p2ptrain.records import PeerId
from p2ptrain.swarm import reach
from p2ptrain.swarm.lanes import KINDS, Kind, Stream
from p2ptrain.swarm.p2pd import Daemon
from p2ptrain.swarm.partly import parts_only
from p2ptrain.swarm.validator import MAX_CLOCK_SKEW_SECONDS, Budgets, RecordValidator

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

# hivemind would print warnings with tracebacks about peers that leave; handlers are for the command to set.
use_hivemind_log_handler("nowhere")
logging.getLogger("hivemind").setLevel(logging.ERROR)

CONNECT_SECONDS = 5.0
"""At the start, for all initial peers together: with the start itself, whoever waits hears within 10 s."""
REPLICAS = 8
"""Nodes that are asked to keep a record; some may just have left."""
KEEPERS_SECONDS = 60.0
"""So long, or as long as between two looks of a large swarm, they are not searched anew while they answer:
whoever searches is sent all that they keep."""
DHT_RECORDS_PER_SECOND = 100.0
DHT_RECORDS_AT_ONCE = 2000.0
MAX_INVALID = 64
"""In one dictionary of records, which a node sends when it is asked, or meets another: what is behind these
is not looked at. Honest nodes have few such, of peers that were put out meanwhile."""
READ_BUFFER_BYTES = 2**20

PROTOCOLS: dict[Kind, str] = {kind: f"/p2ptrain/1/{kind}" for kind in KINDS}
KIND_OF = {protocol: kind for kind, protocol in PROTOCOLS.items()}
_PEER = re.compile(r"(/.+)/p2p/([1-9A-HJ-NP-Za-km-z]+)")


@dataclass(frozen=True)
class Entry:
    """A peer, and maybe an address to reach it at."""

    peer: PeerId
    address: str = ""

    def __str__(self) -> str:
        return f"{self.address}/p2p/{self.peer}"


def entry_of(address: str) -> Entry:
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
    return Entry(PeerId(parts[2]), parts[1])


# -- what the DHT node keeps and answers ---------------------------------------------------------------------


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


# -- the node -----------------------------------------------------------------------------------------------


@dataclass
class Node:
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
    async def attach(cls, daemon: Daemon, control: Path) -> Node:
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
            addr=address, proto=[*KIND_OF, reach.PROTOCOL], balanced=False
        )
        await self._tell(p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_HANDLER, streamHandler=handler))

    async def start_dht(self, validator: RecordValidator, before: Node | None) -> None:
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

    async def connect(self, entry: Entry, *, through: Entry | None = None) -> None:
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


@dataclass(frozen=True)
class Opened:
    """Who has opened a stream to us, for which protocol, and the address that it came from."""

    peer: PeerId
    protocol: str
    observed: str


async def opened(reader: asyncio.StreamReader) -> Opened:
    """What p2pd says in front of an inbound stream. Raises OSError or EOFError if it dies meanwhile."""
    info = p2pd_pb2.StreamInfo()
    await read_pbmsg_safe(reader, info)
    return Opened(PeerId(base58.b58encode(info.peer).decode()), info.proto, str(Multiaddr(info.addr)))


def key_of(run_id: str, kind: str) -> DHTID:
    """Under which records of this kind lie."""
    return DHTID.generate(f"{run_id}.{kind}")
