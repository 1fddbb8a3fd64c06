"""The TLS carrier between real sockets on loopback, with lanes as they are and no libp2p under them.

Shown are who gets in and who does not, what breaks and what stalls. That the streams of libp2p take over is
shown here with none: the lanes ask for one. Not covered: a network that is slow or loses packets.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import ssl
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import uvloop
from contract import OTHER_RUN, RUN, Recorder, chunk, presence
from libp2p_fabric import Libp2pFabric

from p2ptrain import PROTOCOL_VERSION
from p2ptrain.errors import PortBusy, Unreachable
from p2ptrain.events import Carrier, CarrierChanged, FaultCause, PeerFaulted
from p2ptrain.records import Direct, Greeting, PeerId
from p2ptrain.swarm import flow as flow_module
from p2ptrain.swarm import tls
from p2ptrain.swarm.certificate import Credentials, make_credentials
from p2ptrain.swarm.crew import Crew
from p2ptrain.swarm.flow import FLOW_BYTES, MAX_FLOWS, UNSENT_BYTES, Flow, flows_wanted
from p2ptrain.swarm.frames import pack
from p2ptrain.swarm.lanes import Kind, Lanes, Stream
from p2ptrain.swarm.throttle import BURST_SECONDS, SIP_BYTES, Throttle
from p2ptrain.swarm.tls import TlsCarrier

pytestmark = pytest.mark.swarm

LARGEST = 2**20
LOOPBACK = ["127.0.0.1"]


class Side:
    """One peer: lanes over a TLS carrier and no other streams."""

    def __init__(self, name: str, run: str, crew: Crew, throttle: Throttle | None) -> None:
        self.id = PeerId(name)
        self.events: list[Any] = []
        self.asked: list[Kind] = []
        """Streams that the lanes wanted from libp2p."""
        self.heard = Recorder()
        self.carrier = TlsCarrier(
            self.id,
            crew.spawn,
            listen=LOOPBACK,
            port=0,
            max_payload_bytes=LARGEST,
            on_event=self.events.append,
            throttle=throttle,
        )
        self.lanes = Lanes(
            self.id,
            run,
            self._open_stream,
            crew.spawn,
            max_payload_bytes=LARGEST,
            on_event=self.events.append,
            direct=self.carrier,
        )
        self.lanes.serve(self.heard)

    async def _open_stream(self, peer: PeerId, kind: Kind, seconds: float) -> Stream:
        self.asked.append(kind)
        raise Unreachable("there is no libp2p here")

    @property
    def where(self) -> Direct:
        direct = self.carrier.where(LOOPBACK)
        assert direct is not None
        return direct

    async def connected(self, peer: Side) -> None:
        await until(lambda: self.carrier.carries(peer.id))

    def carriers(self) -> list[tuple[Carrier, str]]:
        return [(each.carrier, each.reason) for each in self.events if isinstance(each, CarrierChanged)]

    def faults(self) -> list[tuple[FaultCause, str]]:
        return [(each.cause, each.detail) for each in self.events if isinstance(each, PeerFaulted)]


async def until(condition: Any, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - of two sides, neither of which knows of this test
            await asyncio.sleep(0.002)


@pytest.fixture
async def sides() -> AsyncIterator[Any]:
    async with AsyncExitStack() as stack:

        async def make(name: str, run: str = RUN, throttle: Throttle | None = None) -> Side:
            side = Side(name, run, await stack.enter_async_context(Crew()), throttle)
            await stack.enter_async_context(side.carrier)
            side.carrier.serve(side.lanes)
            stack.callback(side.lanes.close)
            return side

        yield make


async def pair(make: Any, run: str = RUN, throttle: Throttle | None = None) -> tuple[Side, Side]:
    """Two that know of each other; `throttle`: the second one's."""
    alice, bob = await make("alice"), await make("bob", run, throttle)
    alice.carrier.meet(bob.id, bob.where)
    bob.carrier.meet(alice.id, alice.where)
    return alice, bob


async def stranger(to: Side, credentials: Credentials) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A TLS connection of somebody's, not of a `TlsCarrier`."""
    return await asyncio.open_connection("127.0.0.1", to.carrier.port, ssl=credentials.client)


def greeting(sender: str, to: str) -> bytes:
    return pack(Greeting(protocol=PROTOCOL_VERSION, fingerprint=RUN, sender=PeerId(sender), to=PeerId(to)))


async def said(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the other end closes."""
    content = b""
    async with asyncio.timeout(10):
        try:
            while more := await reader.read(2**16):
                content += more
        except (OSError, ssl.SSLError):
            pass
    return content


# -- what works ----------------------------------------------------------------------------------------------


async def test_chunks_go_both_ways_over_one_kept_connection_of_tls_1_3(sides: Any) -> None:
    alice, bob = await pair(sides)
    await alice.connected(bob)
    payload = bytes(range(256)) * 4000
    for number in range(3):
        await alice.lanes.send_chunk(bob.id, chunk(alice.id, number), payload[number:])
        await bob.lanes.send_chunk(alice.id, chunk(alice.id, number), memoryview(payload)[: number * 100])
    await bob.heard.until(lambda heard: len(heard.chunks) == 3)
    await alice.heard.until(lambda heard: len(heard.chunks) == 3)
    assert [(who, header.number, content) for who, header, content in bob.heard.chunks] == [
        (alice.id, number, payload[number:]) for number in range(3)
    ]
    assert [content for _, _, content in alice.heard.chunks] == [payload[: n * 100] for n in range(3)]
    [flow] = alice.carrier._flows[bob.id]
    assert flow._transport.get_extra_info("cipher")[1] == "TLSv1.3"  # type: ignore[union-attr]
    assert len(bob.carrier._flows[alice.id]) == 1
    assert alice.carriers() == bob.carriers() == [(Carrier.TLS, "")]
    assert alice.carrier.traffic[0] > 3 * 10**6 < bob.carrier.traffic[1]
    assert not alice.asked + bob.asked


def test_what_was_delivered_is_known_when_the_connection_has_ended_on_uvloop() -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            found: list[Side] = []
            for name in ("alice", "bob"):
                found.append(side := Side(name, RUN, await stack.enter_async_context(Crew()), None))
                await stack.enter_async_context(side.carrier)
                side.carrier.serve(side.lanes)
                stack.callback(side.lanes.close)
            alice, bob = found
            alice.carrier.meet(bob.id, bob.where)
            bob.carrier.meet(alice.id, alice.where)
            await alice.connected(bob)
            await alice.lanes.send_chunk(bob.id, chunk(alice.id, 0), bytes(LARGEST))
            await until(lambda: bob.heard.chunks and alice.lanes.delivered_bytes >= LARGEST)
            alice.carrier.drop(bob.id)
            await until(lambda: not alice.carrier._flows)
            assert alice.lanes.delivered_bytes >= LARGEST

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as peers use; the others, asyncio's
        runner.run(story())


@pytest.mark.parametrize("way", ["upload", "download"])
async def test_limited_side_keeps_its_rate_and_loses_nothing(sides: Any, way: str) -> None:
    rate, content = 400_000.0, bytes(range(250)) * 400
    alice, bob = await pair(sides, throttle=Throttle(**{way: rate}))
    await alice.connected(bob)
    await bob.connected(alice)
    sender, receiver = (bob, alice) if way == "upload" else (alice, bob)
    began, count = asyncio.get_running_loop().time(), 3
    for number in range(count):
        await sender.lanes.send_chunk(receiver.id, chunk(alice.id, number), content)
    await receiver.heard.until(lambda heard: len(heard.chunks) == count)
    seconds = asyncio.get_running_loop().time() - began
    assert [content for _, _, content in receiver.heard.chunks] == [content] * count
    # The last gulp is only paid for afterwards, and the greeting was before.
    assert count * len(content) - SIP_BYTES <= rate * (seconds + BURST_SECONDS) * 1.01


def unsent_in_kernel(flow: Flow) -> int:
    """Bytes that it has taken and not put on the wire (Linux's SIOCOUTQNSD)."""
    assert flow._socket is not None
    return int.from_bytes(fcntl.ioctl(flow._socket.fileno(), 0x894B, bytes(4)), sys.byteorder)


async def test_sender_waits_when_the_receiver_takes_no_chunk(sides: Any) -> None:
    alice, bob = await pair(sides)
    await alice.connected(bob)
    bob.heard.gate.clear()
    sent = 0

    async def send() -> None:
        nonlocal sent
        for number in range(64):
            await alice.lanes.send_chunk(bob.id, chunk(alice.id, number), bytes(LARGEST))
            sent += 1

    sending = asyncio.create_task(send())
    [flow] = alice.carrier._flows[bob.id]
    await until(lambda: not flow.has_room and unsent_in_kernel(flow))
    assert sent < 64
    # What the kernel would swallow beyond that counts as sent, and hides how fast the link is.
    assert unsent_in_kernel(flow) <= 2 * UNSENT_BYTES
    assert alice.lanes.delivered_bytes <= flow.sent_bytes - unsent_in_kernel(flow)
    bob.heard.gate.set()
    await sending
    await bob.heard.until(lambda heard: len(heard.chunks) == 64)
    await until(lambda: alice.lanes.delivered_bytes >= 64 * LARGEST)


def test_one_connection_will_do_unless_much_is_under_way() -> None:
    assert flows_wanted(1e9, 0.0) == flows_wanted(0.0, 0.3) == 1
    assert flows_wanted(12.5e6, 0.05) == 1  # 100 Mbit/s at home
    assert flows_wanted(3 * FLOW_BYTES / 0.3, 0.3) == 4
    assert flows_wanted(1e9, 0.3) == MAX_FLOWS


async def test_another_connection_is_made_when_one_seems_too_few(
    sides: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob = await pair(sides)
    await alice.connected(bob)
    monkeypatch.setattr(tls, "flows_wanted", lambda rate, rtt: 3)
    await until(lambda: alice.carrier.carries(bob.id) and len(alice.carrier._flows[bob.id]) == 3)
    for number in range(9):
        await alice.lanes.send_chunk(bob.id, chunk(alice.id, number), bytes(LARGEST))
    await bob.heard.until(lambda heard: len(heard.chunks) == 9)
    assert {header.number for _, header, _ in bob.heard.chunks} == set(range(9))


# -- who does not get in -------------------------------------------------------------------------------------


async def test_dialler_refuses_when_the_certificate_is_not_that_of_the_presence_record(sides: Any) -> None:
    alice, bob = await pair(sides)
    alice.carrier.meet(bob.id, bob.where.model_copy(update={"certificate": "a" * 64}))
    assert not alice.carrier.carries(bob.id)
    await until(alice.carriers)
    [(carrier, reason)] = alice.carriers()
    assert carrier is Carrier.LIBP2P
    assert "its presence record says aaaaaaaaaaaa…" in reason
    assert [cause for cause, _ in alice.faults()] == [FaultCause.BAD_MESSAGE]
    assert not bob.carriers()


async def test_listener_refuses_when_the_certificate_is_not_that_of_the_presence_record(sides: Any) -> None:
    alice, bob = await pair(sides)
    bob.carrier.meet(alice.id, alice.where.model_copy(update={"certificate": "a" * 64}))
    assert not alice.carrier.carries(bob.id)
    await until(alice.carriers)
    [(carrier, reason)] = alice.carriers()
    assert carrier is Carrier.LIBP2P
    assert "it refused: the presence record of …alice names another certificate" in reason
    assert bob.carrier.faults["certificate"] == 1
    assert not bob.carriers()
    assert not bob.faults()  # whoever it was need not have been alice


@pytest.mark.parametrize(
    ("sender", "to", "why"),
    [
        ("alice", "bob", b"names another certificate"),
        ("mallory", "alice", b"this is"),
        ("carol", "bob", b"no presence record of"),
    ],
)
async def test_listener_refuses_who_greets_as_somebody_else(
    sides: Any, sender: str, to: str, why: bytes
) -> None:
    _, bob = await pair(sides)
    theirs = make_credentials()
    bob.carrier.meet(PeerId("mallory"), Direct(hosts=("127.0.0.1",), port=1, certificate=theirs.fingerprint))
    reader, writer = await stranger(bob, theirs)
    writer.write(greeting(sender, to))
    assert why in await said(reader)
    writer.close()
    assert bob.carrier.faults["refused"] == 1
    assert not bob.carriers()


async def test_peers_of_different_runs_refuse_each_other(sides: Any) -> None:
    alice, bob = await pair(sides, OTHER_RUN)
    assert not alice.carrier.carries(bob.id)
    await until(alice.carriers)
    assert "it trains run 111111111111… and we run 222222222222…" in alice.carriers()[0][1]


async def test_listener_wants_a_certificate(sides: Any) -> None:
    _, bob = await pair(sides)
    none = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    none.check_hostname, none.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection("127.0.0.1", bob.carrier.port, ssl=none)
    writer.write(greeting("alice", "bob"))
    assert await said(reader) == b""
    writer.close()
    await until(lambda: bob.carrier.faults["handshake"] == 1)


async def test_others_get_in_when_strangers_connect_and_stall(
    sides: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_SECONDS", 0.3)
    alice, bob = await pair(sides)
    stalling = [socket.create_connection(("127.0.0.1", bob.carrier.port)) for _ in range(4)]
    await alice.connected(bob)
    await until(lambda: bob.carrier.faults["handshake"] >= 4)
    for connection in stalling:
        connection.close()


async def test_dialler_gives_up_and_says_so_when_a_listener_stalls(
    sides: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_SECONDS", 0.1)
    alice = await sides("alice")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        alice.carrier.meet(PeerId("bob"), Direct(hosts=("127.0.0.1",), port=port, certificate="a" * 64))
        assert not alice.carrier.carries(PeerId("bob"))
        await until(alice.carriers)
    [(carrier, reason)] = alice.carriers()
    assert carrier is Carrier.LIBP2P
    assert f"127.0.0.1 port {port}:" in reason
    assert alice.carrier.faults["dial"] == 1


# -- what breaks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("garbage", "why"),
    [
        (struct.pack(">II", 10, LARGEST + 1), "payload bytes; at most"),
        (struct.pack(">II", 2**20, 0), "a frame of 1048576 header"),
        (struct.pack(">II", 2, 0) + b"{}", "no record"),
        (pack(chunk(PeerId("x"), 0), 1000) + b"short", "in the middle of a frame"),
        (greeting("mallory", "bob"), "a greeting where chunks go"),
    ],
)
async def test_connection_ends_and_its_peer_is_named_when_a_frame_is_out_of_contract(
    sides: Any, monkeypatch: pytest.MonkeyPatch, garbage: bytes, why: str
) -> None:
    monkeypatch.setattr(flow_module, "STALL_SECONDS", 0.1)
    bob = await sides("bob")
    theirs = make_credentials()
    bob.carrier.meet(PeerId("mallory"), Direct(hosts=("127.0.0.1",), port=1, certificate=theirs.fingerprint))
    reader, writer = await stranger(bob, theirs)
    writer.write(greeting("mallory", "bob"))
    await until(bob.carriers)
    writer.write(garbage)
    await said(reader)
    writer.close()
    [(cause, detail)] = bob.faults()
    assert cause is FaultCause.BAD_MESSAGE
    assert why in detail
    assert [carrier for carrier, _ in bob.carriers()][:2] == [Carrier.TLS, Carrier.LIBP2P]


async def test_chunks_go_the_other_way_and_back_again_when_the_connection_breaks(sides: Any) -> None:
    alice, bob = await pair(sides)
    await alice.connected(bob)
    bob.carrier._flows[alice.id][0].fail(Unreachable("pulled"))
    await until(lambda: not alice.carrier._flows)
    assert "request" in alice.asked  # the lanes greet the peer anew, over libp2p
    alice.lanes._down.clear()  # as if it had answered
    with pytest.raises(Unreachable):
        await alice.lanes.send_chunk(bob.id, chunk(alice.id, 0), b"")
    assert "data" in alice.asked
    alice.carrier._pauses.clear()  # as if time had passed
    await alice.connected(bob)
    carriers = [carrier for carrier, _ in alice.carriers()]
    assert carriers[0] is carriers[-1] is Carrier.TLS


async def test_pauses_between_attempts_grow_up_to_a_minute(sides: Any) -> None:
    alice = await sides("alice")
    for _ in range(10):
        alice.carrier._pause(PeerId("bob"))
    assert alice.carrier._pauses["bob"][1] == tls.LONGEST_PAUSE_SECONDS
    alice.carrier.meet(PeerId("bob"), Direct(hosts=("127.0.0.1",), port=1, certificate="a" * 64))
    assert not alice.carrier._pauses


async def test_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        async with Crew() as crew:
            carrier = TlsCarrier(
                PeerId("a"), crew.spawn, listen=LOOPBACK, port=port, max_payload_bytes=1, on_event=print
            )
            with pytest.raises(PortBusy, match=f"port {port} of 127.0.0.1, the data_port, is taken by"):
                await carrier.__aenter__()


# -- beside libp2p -------------------------------------------------------------------------------------------


async def test_chunks_go_over_tls_once_presence_records_are_seen(
    tmp_path: Any,
) -> None:
    fabric = Libp2pFabric(tmp_path)
    try:
        alice, bob = [await fabric.join(name, data_port=0) for name in ("alice", "bob")]
        heard = [Recorder(), Recorder()]
        alice.serve(heard[0])
        bob.serve(heard[1])
        await alice.send_chunk(bob.peer_id, chunk(alice.peer_id, 0), b"first")
        for swarm in (alice, bob):
            await swarm.publish(presence(swarm.peer_id), ttl_seconds=60)
        for swarm in (alice, bob):
            await swarm.lookup("presence")
        number = 1
        async with asyncio.timeout(10):
            while alice.carriers.get(Carrier.TLS) != 1:
                await alice.send_chunk(bob.peer_id, chunk(alice.peer_id, number), b"more")
                number += 1
                await asyncio.sleep(0.01)
        before = alice.traffic
        await alice.send_chunk(bob.peer_id, chunk(alice.peer_id, number), b"last")
        await heard[1].until(lambda heard: any(content == b"last" for *_, content in heard.chunks))
        assert alice.traffic["data"] == before["data"]
        assert alice.traffic["tls"][0] > before["tls"][0]
        assert {header.number for _, header, _ in heard[1].chunks} == set(range(number + 1))
        assert heard[0].links == heard[1].links == []
    finally:
        await fabric.aclose()
