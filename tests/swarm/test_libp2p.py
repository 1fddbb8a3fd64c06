"""What only real peers can show: daemons, ports, processes that are killed, and strangers on the wire."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from shutil import copyfile
from typing import Any

import psutil
import pytest
from contract import (
    OTHER_RUN,
    RUN,
    Recorder,
    arrives,
    ask,
    chunk,
    give_run,
    is_refused,
    presence,
    recorded,
    steps,
)
from libp2p_fabric import LOOPBACK, Libp2pFabric

from p2ptrain import PROTOCOL_VERSION
from p2ptrain.errors import ConfigError, LocalFault, PortBusy, Unreachable
from p2ptrain.events import DaemonRestarted, FaultCause, PeerFaulted
from p2ptrain.records import GetManifest, GetRun, Hello, PeerId, Piece, Reply, Request
from p2ptrain.swarm.frames import pack
from p2ptrain.swarm.identity import load_or_create
from p2ptrain.swarm.lanes import ASKING, Kind, Lanes
from p2ptrain.swarm.port import Buffer

pytestmark = pytest.mark.swarm

HELLO = pack(Hello(protocol=PROTOCOL_VERSION, fingerprint=RUN))


@pytest.fixture
async def fabric(tmp_path: Path) -> AsyncIterator[Libp2pFabric]:
    fabric = Libp2pFabric(tmp_path)
    yield fabric
    await fabric.aclose()


def daemon_of(swarm: Any) -> psutil.Process:
    """The p2pd of this peer."""
    return psutil.Process(swarm._node.daemon._process.pid)


def port_of(swarm: Any) -> int:
    return int(swarm.visible_addresses()[0].split("/")[4])


# -- strangers -----------------------------------------------------------------------------------------------


async def test_others_are_undisturbed_when_garbage_comes_to_the_tcp_port(fabric: Libp2pFabric) -> None:
    alice, bob = await fabric.join("alice"), await fabric.join("bob")
    recorded(alice)
    heard = recorded(bob)
    alice.send(bob.peer_id, ask(1))
    await heard.until(lambda heard: heard.messages)
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(2**16), b""):
        with socket.create_connection(("127.0.0.1", port_of(bob))) as stranger:
            stranger.sendall(garbage)
    alice.send(bob.peer_id, ask(2))
    await heard.until(lambda heard: steps(heard.messages) == [1, 2])
    assert not heard.links


@pytest.mark.parametrize(
    ("kind", "garbage"),
    [
        ("control", os.urandom(2**16)),
        ("control", pack(ask(1))),  # before hello
        ("control", HELLO + struct.pack(">II", 2**32 - 1, 0)),
        ("control", HELLO + struct.pack(">II", 10, 1)),  # a control message has no payload
        ("control", HELLO + pack(chunk(PeerId("leader"), 0))),
        ("data", HELLO + struct.pack(">II", 10, 2**31)),
        ("data", HELLO + pack(ask(1))),
        ("request", HELLO + pack(ask(1))),
        ("request", HELLO + struct.pack(">II", 2, 0) + b"{}"),
    ],
)
async def test_stream_is_closed_and_counted_when_a_peer_sends_garbage(
    fabric: Libp2pFabric, kind: Kind, garbage: bytes
) -> None:
    events: list[object] = []
    alice = await fabric.join("alice", on_event=events.append)
    bob, mallory = await fabric.join("bob"), await fabric.join("mallory")
    heard = recorded(alice)
    recorded(bob)
    recorded(mallory)
    bob.send(alice.peer_id, ask(1))
    await heard.until(lambda heard: heard.messages)

    reader, writer = await mallory._open_stream(alice.peer_id, kind, 5)
    writer.write(garbage)
    async with asyncio.timeout(5):
        while await reader.read(2**16):
            pass
    writer.close()
    assert alice.faults["bad_message"] == 1
    [fault] = events
    assert isinstance(fault, PeerFaulted)
    assert (fault.peer, fault.cause) == (mallory.peer_id, FaultCause.BAD_MESSAGE)

    bob.send(alice.peer_id, ask(2))
    await heard.until(lambda heard: steps(heard.messages) == [1, 2])
    assert bob.peer_id not in [peer for peer, _ in heard.links]
    await arrives(mallory, alice.peer_id, heard, 3)  # it may have been a slip


async def test_record_is_refused_when_it_is_put_under_another_peers_id(fabric: Libp2pFabric) -> None:
    alice, bob, mallory = [await fabric.join(name) for name in ("alice", "bob", "mallory")]
    assert await bob.publish(presence(bob.peer_id), ttl_seconds=60)
    forgery = presence(bob.peer_id, step=99)
    with pytest.raises(ValueError, match="expected our own"):
        await mallory.publish(forgery, ttl_seconds=60)

    from p2ptrain.swarm.validator import seal

    assert mallory._node is not None
    node, key, expires = mallory._node, mallory._keys["presence"], time.time() + 90
    sealed = seal(mallory._identity, key.to_bytes(), forgery.model_dump_json().encode(), expires)
    for subkey in (bob.peer_id, None):  # a value without subkey would replace all
        assert not await node.store(key, subkey, sealed, expires)
    # Under its own id the forger may write what it likes; who reads it, sees through it.
    assert await node.store(key, mallory.peer_id, sealed, expires)
    assert await alice.lookup("presence") == [presence(bob.peer_id)]
    assert alice.faults["bad_record"] == 1


async def test_both_sides_tell_once_when_a_peer_trains_another_run(fabric: Libp2pFabric) -> None:
    events: list[tuple[str, PeerFaulted]] = []
    alice = await fabric.join("alice", on_event=lambda event: events.append(("alice", event)))
    eve = await fabric.join("eve", OTHER_RUN, on_event=lambda event: events.append(("eve", event)))
    recorded(alice)
    heard_by_eve = recorded(eve)
    eve.send(alice.peer_id, ask(1))
    await heard_by_eve.until(lambda heard: heard.links == [(alice.peer_id, False)])
    for _ in range(2):
        await is_refused(eve, alice.peer_id, GetManifest())
    assert sorted((name, event.peer, event.cause) for name, event in events) == [
        ("alice", eve.peer_id, FaultCause.REFUSED),
        ("eve", alice.peer_id, FaultCause.REFUSED),
    ]
    assert all(RUN[:12] in event.detail and OTHER_RUN[:12] in event.detail for _, event in events)


async def test_newcomer_may_ask_for_the_run_and_then_take_part_when_it_knew_nothing(
    fabric: Libp2pFabric,
) -> None:
    events: list[object] = []
    alice = await fabric.join("alice", on_event=events.append)
    newcomer = await fabric.join("newcomer", ASKING)
    heard = recorded(alice)
    heard.answer = give_run
    recorded(newcomer)
    _, run = await newcomer.request(alice.peer_id, GetRun(), timeout_seconds=5, max_bytes=100)
    assert run == b"the run"
    newcomer.send(alice.peer_id, ask(1))
    await is_refused(newcomer, alice.peer_id, GetManifest())
    assert not heard.messages
    newcomer.adopt(RUN)
    await arrives(newcomer, alice.peer_id, heard, 2)
    assert steps(heard.messages) == [2]


async def test_link_is_down_when_the_peer_id_is_none(fabric: Libp2pFabric) -> None:
    alice = await fabric.join("alice")
    heard = recorded(alice)
    for nonsense in (PeerId("0OIl"), PeerId("é"), PeerId("abc")):
        alice.send(nonsense, ask(1))
        await heard.until(lambda heard, peer=nonsense: (peer, False) in heard.links)  # type: ignore[misc]


# -- our own daemon ------------------------------------------------------------------------------------------


async def test_traffic_goes_on_when_a_daemon_is_killed(fabric: Libp2pFabric) -> None:
    events: list[object] = []
    alice, bob = await fabric.join("alice"), await fabric.join("bob", on_event=events.append)
    heard_by_alice, heard_by_bob = recorded(alice), recorded(bob)
    for here, there, heard in ((alice, bob, heard_by_bob), (bob, alice, heard_by_alice)):
        await arrives(here, there.peer_id, heard, 1)
        await here.send_chunk(there.peer_id, chunk(alice.peer_id, 1), b"before")
        await heard.until(lambda heard: heard.chunks)
    addresses = bob.visible_addresses()

    first = daemon_of(bob)
    first.send_signal(signal.SIGKILL)
    # The one whose daemon it is hears of a reset; the other may take it for gone, for a moment.
    await heard_by_bob.until(lambda heard: heard.links == [(alice.peer_id, True)])
    await heard_by_alice.until(lambda heard: heard.links and heard.links[-1] == (bob.peer_id, True))
    for here, there, heard in ((alice, bob, heard_by_bob), (bob, alice, heard_by_alice)):
        await arrives(here, there.peer_id, heard, 2)
        await here.send_chunk(there.peer_id, chunk(alice.peer_id, 2), b"after")
        await heard.until(lambda heard: heard.chunks[-1][2] == b"after")
    assert bob.visible_addresses() == addresses
    assert daemon_of(bob).pid != first.pid
    assert await bob.publish(presence(bob.peer_id), ttl_seconds=60)
    assert await alice.lookup("presence") == await bob.lookup("presence") == [presence(bob.peer_id)]
    assert [type(event) for event in events] == [DaemonRestarted]


async def test_daemon_is_replaced_when_it_hangs(
    fabric: Libp2pFabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    from p2ptrain.swarm import libp2p

    monkeypatch.setattr(libp2p, "UPKEEP_SECONDS", 0.1)
    monkeypatch.setattr(libp2p, "HANG_SECONDS", 1.0)
    alice = await fabric.join("alice")
    restarted = asyncio.Event()
    alice._on_event = lambda event: restarted.set()
    daemon = daemon_of(alice)
    daemon.send_signal(signal.SIGSTOP)
    await asyncio.wait_for(restarted.wait(), 10)
    assert daemon_of(alice).pid != daemon.pid


async def test_records_outlive_the_daemon_when_they_were_kept_for_others(fabric: Libp2pFabric) -> None:
    bootstrap, alice = await fabric.join("bootstrap"), await fabric.join("alice")
    assert await alice.publish(presence(alice.peer_id), ttl_seconds=60)
    restarted = asyncio.Event()
    bootstrap._on_event = lambda event: restarted.set()
    daemon_of(bootstrap).send_signal(signal.SIGKILL)
    await asyncio.wait_for(restarted.wait(), 10)
    await fabric.kill(alice)
    assert await bootstrap.lookup("presence") == [presence(alice.peer_id)]


async def test_bootstrap_peer_is_entered_again_when_it_comes_back_empty(
    fabric: Libp2pFabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    from p2ptrain.swarm import libp2p

    monkeypatch.setattr(libp2p, "UPKEEP_SECONDS", 0.05)
    monkeypatch.setattr(libp2p, "REENTER_SECONDS", 0.2)
    bootstrap = await fabric.join("bootstrap")
    alice = await fabric.join("alice")
    address, identity = f"/ip4/127.0.0.1/tcp/{port_of(bootstrap)}", bootstrap.peer_id
    await fabric.kill(bootstrap)
    assert not await alice.publish(presence(alice.peer_id), ttl_seconds=60)
    bootstrap = await fabric.join("bootstrap", initial_peers=(), listen=(address,))
    assert bootstrap.peer_id == identity
    for _ in range(150):  # libp2p itself does not dial an address for 5 s after it failed
        if await alice.publish(presence(alice.peer_id), ttl_seconds=60):
            break
        await asyncio.sleep(0.1)
    assert await bootstrap.lookup("presence") == [presence(alice.peer_id)]


async def test_nothing_is_left_and_nobody_waits_when_a_peer_leaves(fabric: Libp2pFabric) -> None:
    alice, bob = await fabric.join("alice"), await fabric.join("bob")
    recorded(alice)
    recorded(bob)
    alice.send(bob.peer_id, ask(1))
    daemon, directory = daemon_of(bob), bob._directory
    assert directory.exists()
    began = time.monotonic()
    await fabric.leave(bob)
    assert time.monotonic() - began < 2
    assert not daemon.is_running()
    assert not directory.exists()
    assert asyncio.all_tasks() == {asyncio.current_task()} | alice._crew._tasks | hivemind_tasks()


def hivemind_tasks() -> set[asyncio.Task[Any]]:
    """The two that look after hivemind's connection to a daemon that still runs."""
    return {
        task for task in asyncio.all_tasks() if "persistent_conn" in repr(task) or "p2pd output" in repr(task)
    }


async def test_daemon_is_beyond_the_reach_of_ctrl_c_when_it_runs(fabric: Libp2pFabric) -> None:
    alice = await fabric.join("alice")
    daemon = daemon_of(alice).pid
    assert os.getpgid(daemon) != os.getpgid(0)
    assert os.getsid(daemon) != os.getsid(0)


LONELY_PEER = """
import asyncio, sys
from p2ptrain.swarm.libp2p import Libp2pSwarm

async def main():
    async with Libp2pSwarm(sys.argv[1], "a-run", listen=("/ip4/127.0.0.1/tcp/0",)) as swarm:
        print(swarm._node.daemon._process.pid, flush=True)
        await asyncio.get_running_loop().create_future()

asyncio.run(main())
"""


def test_no_daemon_is_left_when_its_peer_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", LONELY_PEER, str(tmp_path / "key")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdout is not None
        daemon = psutil.Process(int(peer.stdout.readline()))
        assert daemon.name() == "p2pd"
        peer.kill()
    daemon.wait(timeout=5)


async def test_bug_of_a_handler_ends_its_peer_when_it_happens(fabric: Libp2pFabric, tmp_path: Path) -> None:
    from p2ptrain.swarm.libp2p import Libp2pSwarm

    alice = await fabric.join("alice")
    recorded(alice)

    async def live() -> None:
        async with Libp2pSwarm(tmp_path / "bob", "a-run", RUN, alice.visible_addresses(), LOOPBACK) as bob:
            heard = recorded(bob)
            heard.on_message = None  # type: ignore[assignment, method-assign]
            alice.send(bob.peer_id, ask(1))
            await asyncio.get_running_loop().create_future()

    with pytest.raises(TypeError, match="not callable"):
        await asyncio.wait_for(live(), 10)


# -- starting ------------------------------------------------------------------------------------------------


async def test_start_names_the_address_when_its_port_is_busy(fabric: Libp2pFabric) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"/ip4/127.0.0.1/tcp/{other.getsockname()[1]}"
        with pytest.raises(PortBusy, match=f"{address} is taken"):
            await fabric.join("alice", listen=(address,))


async def test_start_names_the_address_when_the_port_is_another_peers(fabric: Libp2pFabric) -> None:
    """libp2p would share the port, and half of the connections would come to the wrong peer."""
    alice = await fabric.join("alice")
    with pytest.raises(PortBusy, match=str(port_of(alice))):
        await fabric.join("bob", listen=(f"/ip4/127.0.0.1/tcp/{port_of(alice)}",))


async def test_start_names_address_and_cause_when_no_initial_peer_can_be_reached(
    fabric: Libp2pFabric, tmp_path: Path
) -> None:
    stranger = load_or_create(tmp_path / "stranger").peer_id
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, but not listening
        address = f"/ip4/127.0.0.1/tcp/{nobody.getsockname()[1]}/p2p/{stranger}"
        began = time.monotonic()
        with pytest.raises(Unreachable, match="connection refused") as caught:
            await fabric.join("alice", initial_peers=[address])
    assert address in str(caught.value)
    assert time.monotonic() - began < 10


async def test_start_gives_up_within_its_deadline_when_an_initial_peer_says_nothing(
    fabric: Libp2pFabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from p2ptrain.swarm import libp2p

    monkeypatch.setattr(libp2p, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"/ip4/127.0.0.1/tcp/{mute.getsockname()[1]}/p2p/{load_or_create(tmp_path / 'x').peer_id}"
        with pytest.raises(Unreachable, match="did not answer within"):
            await fabric.join("alice", initial_peers=[address])


async def test_start_succeeds_when_one_of_two_initial_peers_answers(
    fabric: Libp2pFabric, tmp_path: Path
) -> None:
    alice = await fabric.join("alice")
    gone = f"/ip4/127.0.0.1/tcp/9/p2p/{load_or_create(tmp_path / 'x').peer_id}"
    bob = await fabric.join("bob", initial_peers=[gone, *alice.visible_addresses()])
    assert bob.connected_peers() == 1


@pytest.mark.parametrize("copy", [False, True])
async def test_start_is_refused_when_the_identity_is_online_already(
    fabric: Libp2pFabric, tmp_path: Path, copy: bool
) -> None:
    alice, bob = await fabric.join("alice"), await fabric.join("bob")
    if copy:
        copyfile(tmp_path / "bob", tmp_path / "twin")
    with pytest.raises(LocalFault, match="an identity file of its own"):
        await fabric.join("twin" if copy else "bob")
    heard = recorded(bob)
    recorded(alice)
    await arrives(alice, bob.peer_id, heard, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"listen": ["127.0.0.1:4001"]},
        {"listen": ["/ip4/127.0.0.1/udp/4001/quic"]},
        {"listen": ["/ip4/127.0.0.1/tcp/99999"]},
        {"initial_peers": ["/ip4/127.0.0.1/tcp/4001"]},
        {
            "initial_peers": [
                "/ip4/1.2.3.4.5/tcp/4001/p2p/12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"
            ]
        },
        {"initial_peers": ["/ip4/127.0.0.1/tcp/4001/p2p/0"]},
    ],
)
async def test_start_is_refused_when_an_address_is_none(
    fabric: Libp2pFabric, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="such as"):
        await fabric.join("alice", **options)


async def test_start_says_so_when_the_address_is_not_of_this_machine(fabric: Libp2pFabric) -> None:
    with pytest.raises(LocalFault, match=r"cannot listen on /ip4/192\.0\.2\.1/tcp/0"):
        await fabric.join("alice", listen=["/ip4/192.0.2.1/tcp/0"])


async def test_start_says_so_when_the_clocks_differ(
    fabric: Libp2pFabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    from p2ptrain.swarm import node

    await fabric.join("alice")
    monkeypatch.setattr(node, "MAX_CLOCK_SKEW_SECONDS", -1.0)
    with pytest.raises(LocalFault, match="clock"):
        await fabric.join("bob")


def test_peers_meet_when_the_event_loop_is_uvloops(tmp_path: Path) -> None:
    import uvloop

    async def meet() -> None:
        fabric = Libp2pFabric(tmp_path)
        alice, bob = await fabric.join("alice"), await fabric.join("bob")
        recorded(alice)
        heard = recorded(bob)
        buffer = bytearray(2**20)
        for number in range(4):
            buffer[:] = bytes([number]) * len(buffer)
            await alice.send_chunk(bob.peer_id, chunk(alice.peer_id, number), buffer)
        await heard.until(lambda heard: len(heard.chunks) == 4)
        assert all(content == bytes([header.number]) * 2**20 for _, header, content in heard.chunks)
        await fabric.kill(alice)
        await heard.until(lambda heard: heard.links == [(alice.peer_id, False)])
        await fabric.aclose()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(meet())


def test_peer_goes_on_when_who_asked_has_closed_the_stream_before_the_answer(tmp_path: Path) -> None:
    """uvloop raises RuntimeError where asyncio ignores what is written to a closed stream."""
    import uvloop

    outcome: list[BaseException | None] = []

    async def meet() -> None:
        over = asyncio.Event()
        lanes = Lanes(PeerId("me"), RUN, nobody, spawn, max_payload_bytes=2**20, on_event=lambda event: None)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async def late(request: Request) -> tuple[Reply, Buffer]:
                with contextlib.suppress(OSError):
                    await reader.read()  # until it is reset
                return Piece(), b"the run"

            heard.answer = late
            try:
                await lanes.accept(PeerId("you"), "request", reader, writer)
                outcome.append(None)
            except Exception as error:
                outcome.append(error)
            over.set()

        heard = Recorder()
        lanes.serve(heard)
        server = await asyncio.start_unix_server(serve, tmp_path / "streams")
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(tmp_path / "streams"))
            asking.sendall(HELLO + pack(GetRun()))
            await heard.until(lambda heard: heard.requests)
        # The answer to its hello was unread: that is a reset.
        async with asyncio.timeout(10):
            await over.wait()
        server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(meet())
    assert outcome == [None]


async def nobody(peer: PeerId, kind: Kind, seconds: float) -> Any:
    raise Unreachable("there is nobody")


def spawn(work: Any) -> asyncio.Task[None]:
    return asyncio.create_task(work)


def test_hivemind_stays_unimported_when_only_the_rest_of_the_rim_is_used() -> None:
    code = (
        "import sys, p2ptrain.swarm.lanes, p2ptrain.swarm.p2pd, p2ptrain.swarm.validator; "
        "sys.exit('hivemind' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_of_hivemind_no_more_is_imported_than_is_used() -> None:
    code = (
        "import sys, p2ptrain.swarm.libp2p; "
        "sys.exit('hivemind.averaging' in sys.modules or 'scipy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
