"""The road of the chaos lab: what becomes of packets, with time and chance as arguments."""

from __future__ import annotations

import random

import pytest

from tests.chaos.relay import HELD_BACK_SECONDS, MOST_PACKETS, QUEUE_SECONDS, Link, Road


def packet(number: int, source: int = 1, target: int = 2, size: int = 100) -> bytes:
    """An IPv4 packet between two hosts whose content is its number."""
    header = bytearray(20)
    header[0] = 0x45
    header[12:20] = bytes([10, 83, 0, source, 10, 83, 0, target])
    return bytes(header) + number.to_bytes(4, "big") * ((size - 20) // 4)


def number(arrived: bytes) -> int:
    return int.from_bytes(arrived[20:24], "big")


@pytest.fixture
def road() -> Road:
    return Road(random.Random(1))


def test_packet_arrives_after_the_delay_and_not_before(road: Road) -> None:
    road.send(packet(7), Link(delay_seconds=0.1), 5.0)
    assert road.next_at == pytest.approx(5.1)
    assert road.arrived(5.09) == []
    assert road.arrived(5.1001) == [packet(7)]
    assert road.next_at is None


def test_jitter_keeps_the_order_within_a_pair_of_hosts_and_spreads_arrivals(road: Road) -> None:
    link, arrivals = Link(delay_seconds=0.1, jitter_seconds=0.05), []
    for each in range(200):
        road.send(packet(each), link, each * 0.001)
    for tick in range(1000):
        arrivals += [(number(p), tick / 1000) for p in road.arrived(tick / 1000)]
    assert [each for each, _ in arrivals] == list(range(200))
    delays = [at - each * 0.001 for each, at in arrivals]
    assert 0.05 <= min(delays) < 0.1 < max(delays) <= 0.152


def test_packets_of_one_pair_do_not_wait_for_those_of_another(road: Road) -> None:
    road.send(packet(1, source=1), Link(delay_seconds=1.0), 0.0)
    road.send(packet(2, source=3), Link(delay_seconds=0.1), 0.0)
    assert [number(p) for p in road.arrived(0.5)] == [2]


def test_shares_are_those_that_were_asked_for_and_are_counted(road: Road) -> None:
    link = Link(loss=0.05, duplicate=0.05, reorder=0.1, corrupt=0.01)
    for each in range(10_000):
        road.send(packet(each), link, each * 0.001)
    arrived = road.arrived(100.0)
    counts = road.counts
    assert counts["sent"] == 10_000
    assert counts["lost"] == pytest.approx(500, rel=0.2)
    assert counts["duplicated"] == pytest.approx(475, rel=0.2)
    assert counts["reordered"] == pytest.approx(950, rel=0.2)
    assert counts["corrupted"] == pytest.approx(95, rel=0.4)
    assert len(arrived) == 10_000 - counts["lost"] + counts["duplicated"]


def test_damage_is_one_bit_and_never_in_the_header(road: Road) -> None:
    for each in range(100):
        road.send(packet(each), Link(corrupt=1.0), float(each))
    for each, damaged in enumerate(road.arrived(1000.0)):
        whole = packet(each)
        assert damaged[:20] == whole[:20]
        assert sum((a ^ b).bit_count() for a, b in zip(damaged, whole, strict=True)) == 1


def test_packet_out_of_order_comes_after_those_sent_a_little_later(road: Road) -> None:
    road.send(packet(1), Link(reorder=1.0), 0.0)
    road.send(packet(2), Link(), HELD_BACK_SECONDS / 2)
    assert [number(p) for p in road.arrived(1.0)] == [2, 1]


def test_slow_line_paces_packets_and_drops_what_waits_too_long(road: Road) -> None:
    link = Link(mbit=1.0)  # 1,000 bytes take 8 ms up, and 8 ms down
    for each in range(1000):
        road.send(packet(each, size=1000), link, 0.0)
    assert len(road.arrived(0.1)) == pytest.approx(0.1 / 0.008, abs=2)
    assert len(road.arrived(10.0)) <= QUEUE_SECONDS / 0.008 + 2
    assert road.counts["overflow"] > 900


def test_no_more_packets_are_on_the_way_than_there_is_room_for(road: Road) -> None:
    for each in range(MOST_PACKETS + 10):
        road.send(packet(each, size=24), Link(delay_seconds=1.0), 0.0)
    assert len(road.arrived(2.0)) == MOST_PACKETS
    assert road.counts["overflow"] == 10


def test_what_is_no_ipv4_packet_is_left_out(road: Road) -> None:
    road.send(b"\x60" + bytes(60), Link(), 0.0)
    road.send(b"\x45", Link(), 0.0)
    assert road.arrived(1.0) == []
    assert road.counts == {"not_ipv4": 2}
