"""Am I reachable: what is asked, what the answers come to, and what a relay grants, as plain functions.

Not covered: real routers and relays; row 21 of the fault matrix has those.
"""

from __future__ import annotations

import contextlib

import pytest

from p2ptrain.errors import BadMessage
from p2ptrain.events import ReachChanged
from p2ptrain.records import Dialled, PeerId
from p2ptrain.swarm import reach

RELAY = PeerId("12D3KooWN5oFqMH9P8U51nSXNGVS416XjyHSxzHrhoqxzDY5Hd7w")
# As p2pd answers: type 2 (status), a reservation, a limit of 120 s and 128 KiB, status 100.
SMALL = b"\x08\x02\x1a\x02\x08\x05" + b"\x22\x06\x08\x78\x10\x80\x80\x08" + b"\x28\x64"


# -- dialling back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("observed", "dialled"),
    [
        ("/ip4/203.0.113.7/tcp/54321", "/ip4/203.0.113.7/tcp/31337"),
        ("/ip6/2001:db8::7/tcp/54321", "/ip6/2001:db8::7/tcp/31337"),
        (f"/ip4/203.0.113.7/tcp/4001/p2p/{RELAY}/p2p-circuit", None),  # that would be the relay's door
        ("/ip4/203.0.113.7/udp/4001/quic-v1", None),
        ("", None),
    ],
)
def test_peer_is_dialled_only_at_the_address_that_it_asked_from(observed: str, dialled: str | None) -> None:
    assert reach.target(observed, 31337) == dialled


def test_few_are_dialled_at_one_time_and_each_not_too_often() -> None:
    door = reach.Doorkeeper()
    peers = [PeerId(f"peer-{number}") for number in range(reach.MAX_DIALS + 1)]
    assert [door.admits(peer, 0.0) for peer in peers] == [True] * reach.MAX_DIALS + [False]
    door.done()
    assert door.admits(peers[-1], 0.0)
    door.done()
    assert not door.admits(peers[0], reach.PAUSE_SECONDS - 0.1)
    assert door.admits(peers[0], reach.PAUSE_SECONDS)


def test_one_dial_that_got_through_outweighs_all_that_did_not() -> None:
    failed = Dialled(reachable=False, address="/ip4/203.0.113.7/tcp/1", detail="no answer within 3 s")
    through = Dialled(reachable=True, address="/ip4/203.0.113.7/tcp/2")
    untried = Dialled(reachable=None, detail="busy; ask again later")
    assert reach.judged([failed, through, untried]) == reach.Reach(True, "/ip4/203.0.113.7/tcp/2")
    assert reach.judged([failed, untried]).hidden
    assert reach.judged([untried]).reachable is None
    assert not reach.judged([]).hidden


def test_hidden_peer_says_how_it_takes_part() -> None:
    def told(relays: int) -> str:
        return ReachChanged(reachable=False, address="/ip4/203.0.113.7/tcp/1", relays=relays).sentence()

    assert "behind NAT" in told(1)
    assert "by way of a relay" in told(1)
    assert "not at all" in told(0)


# -- relays --------------------------------------------------------------------------------------------------


def test_relays_are_sought_among_direct_connections_initial_peers_first() -> None:
    peers = [PeerId(f"peer-{number:02}") for number in range(reach.MAX_RELAYS + 2)]
    connections = [(peer, f"/ip4/203.0.113.{number}/tcp/1") for number, peer in enumerate(peers)]
    relayed = (PeerId("a"), f"/ip4/203.0.113.7/tcp/1/p2p/{RELAY}/p2p-circuit")
    asked = reach.candidates([relayed, *connections, connections[0]], [peers[-1]])
    assert asked == [connections[-1], *connections[: reach.MAX_RELAYS - 1]]


def test_relay_grants_what_its_answer_says() -> None:
    assert reach.granted(SMALL) == 128 * 1024 < reach.ENOUGH_BYTES
    assert reach.granted(SMALL.replace(b"\x22\x06\x08\x78\x10\x80\x80\x08", b"")) == reach.UNLIMITED
    assert reach.granted(SMALL.replace(b"\x28\x64", b"\x28\xc8\x01")) == 0  # status 200: refused
    assert reach.granted(b"") == 0


@pytest.mark.parametrize("cut", range(1, len(SMALL)))
def test_relay_s_answer_is_refused_or_worth_nothing_when_it_is_cut_short(cut: int) -> None:
    with contextlib.suppress(BadMessage):
        assert reach.granted(SMALL[:cut]) == 0


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 20, b"\x22\xff\x7f", b"\x0d\x00\x00\x00\x00", b"\x20\x05\x28\x64"]
)
def test_relay_s_answer_is_refused_when_it_is_garbage(garbage: bytes) -> None:
    with pytest.raises(BadMessage, match="a relay's answer"):
        reach.granted(garbage)


def test_way_through_a_relay_is_its_address_its_id_and_the_circuit() -> None:
    transport = b"\x04\xcb\x00\x71\x07\x06\x7a\x69"  # /ip4/203.0.113.7/tcp/31337
    way = reach.circuit(transport, RELAY)
    assert way.startswith(transport + b"\xa5\x03\x26\x00\x24\x08\x01\x12\x20")
    assert way.endswith(b"\xa2\x02")
    assert len(way) == len(transport) + 3 + 38 + 2


def test_connection_by_way_of_a_relay_is_told_from_a_direct_one() -> None:
    assert reach.is_relayed(f"/ip4/203.0.113.7/tcp/4001/p2p/{RELAY}/p2p-circuit")
    assert not reach.is_relayed("/ip4/203.0.113.7/tcp/4001")
