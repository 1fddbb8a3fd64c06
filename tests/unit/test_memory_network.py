"""The seeded network of plain callbacks: what it promises, and what it does to those who rely on more."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2ptrain.records import PeerId
from p2ptrain.swarm.clock import Stuck
from p2ptrain.swarm.memory import Network
from p2ptrain.swarm.network import REDIAL_SECONDS

ALICE, BOB, CAROL = PeerId("alice"), PeerId("bob"), PeerId("carol")


class Ear:
    """A peer that only listens."""

    def __init__(self, network: Network, name: PeerId) -> None:
        self.network, self.name = network, name
        self.heard: list[tuple[PeerId, object]] = []
        self.links: list[tuple[PeerId, bool]] = []
        self.times: list[float] = []
        network.attach(name, self.receive, self.on_link)

    def receive(self, sender: PeerId, message: object) -> None:
        self.heard.append((sender, message))
        self.times.append(self.network.now)

    def on_link(self, peer: PeerId, up: bool) -> None:
        self.links.append((peer, up))


def chatter(seed: int, trace_lines: int = 10_000) -> Network:
    """Three peers that answer each other under losses, a crash and a partition."""
    network = Network(seed, latency=(0.01, 0.1), loss=0.02, trace_lines=trace_lines)
    chance = random.Random(seed)

    def join(name: PeerId) -> None:
        def answer(sender: PeerId, message: object) -> None:
            assert isinstance(message, int)
            if message:
                network.send(name, sender, message - 1)

        network.attach(name, answer, lambda peer, up: network.send(name, peer, 20))

    for name in (ALICE, BOB, CAROL):
        join(name)
    for _ in range(30):
        network.send(*chance.sample([ALICE, BOB, CAROL], 2), 50)
    network.at(1.0, lambda: network.detach(CAROL))
    network.at(1.5, lambda: join(CAROL))
    network.at(2.0, lambda: network.partition([[ALICE], [BOB, CAROL]]))
    network.at(2.5, network.heal)
    network.run(until=10.0)
    return network


# -- determinism ---------------------------------------------------------------------------------------------


def test_network_tells_the_same_story_when_the_seed_is_the_same() -> None:
    one, again, other = chatter(7), chatter(7), chatter(8)
    assert list(one.trace) == list(again.trace)
    assert (one.sent, one.delivered, one.lost) == (again.sent, again.delivered, again.lost)
    assert list(one.trace) != list(other.trace)


def test_network_tells_the_same_story_when_nobody_records_it() -> None:
    recorded, silent = chatter(3), chatter(3, trace_lines=0)
    assert not silent.trace
    assert (recorded.sent, recorded.delivered, recorded.lost) == (silent.sent, silent.delivered, silent.lost)


def test_trace_keeps_the_last_lines_when_more_happened() -> None:
    assert list(chatter(7).trace)[-5:] == list(chatter(7, trace_lines=5).trace)


def test_trace_shows_who_said_what_to_whom_when_it_is_read() -> None:
    network = Network(1, latency=(0.5, 0.5), trace_lines=10)
    Ear(network, ALICE), Ear(network, BOB)
    network.send(ALICE, BOB, "a" * 1000)
    network.send(ALICE, CAROL, {"digest": "0123456789abcdef" * 4})
    network.run(until=10.0)
    lines = list(network.trace)
    assert lines[0].strip() == "0.000000 alice is there"
    assert "alice ✕ carol (control) {'digest': '01234567…'}" in lines[2]
    assert lines[3].startswith("   0.500000 alice → bob (control) 'aaa")
    assert len(lines[3]) < 300
    assert lines[4].endswith("alice finds carol down")


# -- messages ------------------------------------------------------------------------------------------------


def test_messages_arrive_in_order_and_within_the_latency_when_nothing_breaks() -> None:
    network = Network(1, latency=(0.01, 0.5))
    Ear(network, ALICE)
    bob = Ear(network, BOB)
    for number in range(100):
        network.at(number / 100, lambda n=number: network.send(ALICE, BOB, n, size_bytes=10))
    network.run(until=10.0)
    assert bob.heard == [(ALICE, number) for number in range(100)]
    assert min(at - number / 100 for number, at in enumerate(bob.times)) >= 0.01
    assert max(bob.times) <= 0.99 + 0.5
    assert (network.sent, network.delivered, network.lost, network.sent_bytes) == (100, 100, 0, 1000)


def test_lanes_overtake_each_other_when_one_is_busy() -> None:
    network = Network(1, latency=(0.1, 0.1), bandwidth_bytes_per_second=1000)
    Ear(network, ALICE)
    bob, carol = Ear(network, BOB), Ear(network, CAROL)
    left = [network.send(ALICE, to, "bulk", "data", size_bytes=1000) for to in (BOB, CAROL)]
    network.send(ALICE, BOB, "word", size_bytes=100)
    network.run(until=10.0)
    assert left == [1.0, 2.0], "one uplink sends one thing after the other"
    assert [message for _, message in bob.heard] == ["word", "bulk"]
    assert bob.times == pytest.approx([0.2, 1.1])
    assert carol.times == pytest.approx([2.1])


def test_messages_take_longer_when_a_peer_is_slow() -> None:
    network = Network(1, latency=(0.1, 0.1))
    Ear(network, ALICE)
    bob, carol = Ear(network, BOB), Ear(network, CAROL)
    network.slow(BOB, 10)
    network.send(ALICE, BOB, 1)
    network.send(ALICE, CAROL, 1)
    network.run(until=10.0)
    assert bob.times == pytest.approx([1.0])
    assert carol.times == pytest.approx([0.1])


def test_nothing_is_sent_when_the_sender_is_not_attached() -> None:
    network = Network(1)
    bob = Ear(network, BOB)
    network.send(ALICE, BOB, 1)
    network.run(until=10.0)
    assert (bob.heard, network.sent) == ([], 0)


# -- faults --------------------------------------------------------------------------------------------------


def test_both_ends_hear_of_a_reset_and_what_was_in_flight_is_lost_when_a_lane_breaks() -> None:
    network = Network(1, latency=(0.1, 0.1), loss=0.2)
    alice, bob = Ear(network, ALICE), Ear(network, BOB)
    for number in range(10):
        network.send(ALICE, BOB, number)
    network.run(until=10.0)
    assert (network.delivered, network.lost) == (0, 10), "what was in flight before the reset is lost with it"
    assert alice.links == [(BOB, True)]
    assert bob.links == [(ALICE, True)]


def test_other_lanes_go_on_when_one_is_reset() -> None:
    for seed in range(20):
        network = Network(seed, latency=(0.1, 0.1), loss=0.5)
        Ear(network, ALICE)
        bob = Ear(network, BOB)
        network.send(ALICE, BOB, "data", "data")
        network.send(ALICE, BOB, "control", "control")
        network.run(until=10.0)
        if [message for _, message in bob.heard] == ["control"]:
            return
    raise AssertionError("in no story did one lane break and the other go on")


@pytest.mark.parametrize("seed", range(20))
def test_peers_hear_that_one_is_down_after_its_last_words_when_it_crashes(seed: int) -> None:
    network = Network(seed, latency=(0.1, 0.9))
    alice, carol = Ear(network, ALICE), Ear(network, CAROL)
    order: list[str] = []
    network.attach(
        BOB,
        lambda sender, message: order.append(f"heard {message}"),
        lambda peer, up: order.append(f"{peer} {'up' if up else 'down'}"),
    )
    network.send(ALICE, BOB, "last words")
    network.send(CAROL, ALICE, "lost on the way")
    network.detach(ALICE)
    network.run(until=10.0)
    assert order == ["heard last words", "alice down"]
    assert carol.links == [(ALICE, False)]
    assert alice.heard == alice.links == []


def test_sender_hears_up_and_messages_are_lost_when_a_peer_restarts_at_once() -> None:
    network = Network(1, latency=(0.1, 0.1))
    alice = Ear(network, ALICE)
    before = Ear(network, BOB)
    network.send(ALICE, BOB, 1)
    network.detach(BOB)
    after = Ear(network, BOB)
    network.send(ALICE, BOB, 2)
    network.run(until=10.0)
    assert before.heard == after.heard == []
    assert alice.links == [(BOB, True)]
    assert after.links == [], "it knows nothing of links that another incarnation had"
    network.send(ALICE, BOB, 3)
    network.run(until=20.0)
    assert after.heard == [(ALICE, 3)]


def test_sender_hears_soon_that_a_peer_is_down_when_it_was_never_there() -> None:
    network = Network(1, latency=(0.1, 0.1))
    alice = Ear(network, ALICE)
    network.send(ALICE, BOB, 1)
    assert network.run(until=lambda: bool(alice.links))
    assert alice.links == [(BOB, False)]
    assert network.now == pytest.approx(0.2)


def test_only_one_side_of_a_partition_is_heard_when_messages_meet_it() -> None:
    network = Network(1, latency=(0.1, 0.1))
    alice, bob, carol = Ear(network, ALICE), Ear(network, BOB), Ear(network, CAROL)
    network.send(ALICE, BOB, "in flight")
    network.partition([[ALICE, CAROL], [BOB]])
    network.send(ALICE, BOB, "into the wall")
    network.send(ALICE, CAROL, "same side")
    network.run(until=10.0)
    assert bob.heard == bob.links == []
    assert carol.heard == [(ALICE, "same side")]
    assert alice.links == [(BOB, False)]
    assert not network.reachable(ALICE, BOB)
    assert network.reachable(ALICE, CAROL)


def test_peers_in_no_group_reach_each_other_when_there_is_a_partition() -> None:
    network = Network(1)
    network.partition([[ALICE]])
    assert network.reachable(BOB, CAROL)
    assert not network.reachable(ALICE, BOB)


def test_message_in_flight_is_lost_and_told_when_a_partition_falls_in_its_way() -> None:
    network = Network(1, latency=(0.1, 0.1))
    alice, bob = Ear(network, ALICE), Ear(network, BOB)
    network.send(ALICE, BOB, 1)
    network.at(0.05, lambda: network.partition([[ALICE], [BOB]]))
    network.run(until=lambda: bool(alice.links))
    assert network.now == pytest.approx(0.1 + REDIAL_SECONDS)
    assert (alice.links, bob.heard, bob.links) == ([(BOB, False)], [], [])


def test_sender_hears_up_when_a_partition_heals_before_it_gives_up() -> None:
    network = Network(1, latency=(0.1, 0.1))
    alice, bob = Ear(network, ALICE), Ear(network, BOB)
    network.partition([[ALICE], [BOB]])
    network.send(ALICE, BOB, 1)
    network.at(REDIAL_SECONDS / 2, network.heal)
    network.at(REDIAL_SECONDS / 2, lambda: network.send(ALICE, BOB, 2))
    network.run(until=10.0)
    assert alice.links == [(BOB, True)]
    assert bob.heard == [], "what follows a loss is lost too, until the sender has been told"
    network.send(ALICE, BOB, 3)
    network.run(until=20.0)
    assert bob.heard == [(ALICE, 3)]


def test_a_cut_parts_one_pair_only_and_ends_when_healed() -> None:
    network = Network(1)
    network.cut(ALICE, BOB)
    assert not network.reachable(ALICE, BOB)
    assert not network.reachable(BOB, ALICE)
    assert network.reachable(ALICE, CAROL)
    network.heal()
    assert network.reachable(ALICE, BOB)


def test_a_one_way_cut_parts_one_direction_only() -> None:
    network = Network(1)
    network.cut(ALICE, BOB, one_way=True)
    assert not network.reachable(ALICE, BOB)
    assert network.reachable(BOB, ALICE)
    network.heal()
    assert network.reachable(ALICE, BOB)


def test_peer_across_a_partition_learns_of_a_crash_only_when_it_sends() -> None:
    network = Network(1, latency=(0.1, 0.1))
    alice = Ear(network, ALICE)
    Ear(network, BOB)
    network.send(ALICE, BOB, 1)
    network.run(until=1.0)
    network.partition([[ALICE], [BOB]])
    network.detach(BOB)
    network.run(until=5.0)
    assert alice.links == []
    network.heal()
    network.send(ALICE, BOB, 2)
    network.run(until=10.0)
    assert alice.links == [(BOB, False)]


def test_sender_hears_up_and_its_message_is_lost_when_a_peer_restarted_across_a_partition() -> None:
    network = Network(1, latency=(0.1, 0.1))
    alice, before = Ear(network, ALICE), Ear(network, BOB)
    network.send(ALICE, BOB, 1)
    network.run(until=1.0)
    network.partition([[ALICE], [BOB]])
    network.detach(BOB)
    after = Ear(network, BOB)
    network.heal()
    network.send(ALICE, BOB, 2)
    network.run(until=10.0)
    assert (before.heard, after.heard) == ([(ALICE, 1)], [])
    assert alice.links == [(BOB, True)]


def test_peer_hears_nothing_of_the_lanes_it_had_when_it_comes_back() -> None:
    network = Network(1, latency=(0.1, 0.1))
    Ear(network, ALICE)
    Ear(network, BOB)
    network.send(ALICE, BOB, "lost")
    network.detach(ALICE)
    again = Ear(network, ALICE)
    network.partition([[ALICE], [BOB]])
    network.run(until=10.0)
    assert network.lost == 1
    assert again.links == []


FAULTS: dict[str, Callable[[Network, PeerId, PeerId], None]] = {
    "partition": lambda network, a, b: network.partition([[a], [b]]),
    "cut": lambda network, a, b: network.cut(a, b),
    "one-way cut": lambda network, a, b: network.cut(a, b, one_way=True),
    "heal": lambda network, a, b: network.heal(),
    "slow": lambda network, a, b: network.slow(a, 3.0),
}


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), loss=st.sampled_from([0.0, 0.05]), faults=st.integers(0, 12))
def test_lane_delivers_a_gapless_beginning_and_tells_of_every_loss_when_anything_happens(
    seed: int, loss: float, faults: int
) -> None:
    chance = random.Random(seed)
    network = Network(seed, latency=(0.01, 0.3), loss=loss)
    names = [ALICE, BOB, CAROL]
    lives = dict.fromkeys(names, 0)
    links = 0
    # (sender, its life, receiver, lane, how often the sender was told about that receiver) → numbers
    sent: dict[tuple[PeerId, int, PeerId, str, int], list[int]] = {}
    got: dict[tuple[PeerId, int, PeerId, str, int], list[int]] = {}
    told: dict[tuple[PeerId, int, PeerId], int] = {}

    def join(name: PeerId) -> None:
        life = lives[name] = lives[name] + 1

        def receive(sender: PeerId, message: object) -> None:
            *key, number = message
            got.setdefault(tuple(key), []).append(number)
            assert life == lives[name], "a peer that is gone hears nothing"

        def on_link(peer: PeerId, up: bool) -> None:
            nonlocal links
            links += 1
            told[name, life, peer] = told.get((name, life, peer), 0) + 1
            assert life == lives[name]

        network.attach(name, receive, on_link)

    def say(source: PeerId, to: PeerId, lane: str, number: int) -> None:
        key = (source, lives[source], to, lane, told.get((source, lives[source], to), 0))
        sent.setdefault(key, []).append(number)
        network.send(source, to, (*key, number), lane)

    def restart(name: PeerId, after: float) -> None:
        network.detach(name)
        lives[name] += 1
        network.after(after, lambda: join(name))

    def befall() -> None:
        fault = chance.choice(["restart", *FAULTS])
        a, b = chance.sample(names, 2)
        if fault != "restart":
            FAULTS[fault](network, a, b)
        elif lives[a] % 2:  # odd while it is there
            restart(a, chance.choice([0.0, 0.1, 1.0]))

    for name in names:
        join(name)
    for number in range(200):
        source, to = chance.sample(names, 2)
        lane = chance.choice(["control", "data"])
        network.at(chance.uniform(0, 5), lambda s=source, t=to, la=lane, n=number: say(s, t, la, n))
    for _ in range(faults):
        network.at(chance.uniform(0, 5), befall)
    network.run(until=60.0)

    for key, numbers in sent.items():
        arrived = got.get(key, [])
        assert arrived == numbers[: len(arrived)], f"{key}: {arrived} of {numbers}"
        source, life, to, _, times_told = key
        if len(arrived) < len(numbers) and life == lives[source]:
            assert told.get((source, life, to), 0) > times_told, f"{key}: nobody told of {numbers}"
    assert network.delivered + network.lost == network.sent


# -- time ----------------------------------------------------------------------------------------------------


def test_callbacks_run_in_order_of_time_and_not_at_all_when_cancelled() -> None:
    network = Network(1)
    ran: list[str] = []
    network.after(2.0, lambda: ran.append("late"))
    network.at(1.0, lambda: ran.append("early"))
    network.at(1.0, lambda: ran.append("early, scheduled later"))
    network.at(1.5, lambda: ran.append("never")).cancel()
    assert network.run(until=1.0)
    assert (ran, network.now) == (["early", "early, scheduled later"], 1.0)
    assert network.run(until=5.0)
    assert (ran[2:], network.now) == (["late"], 5.0)


@pytest.mark.parametrize("when", [0.5, float("nan"), float("inf")])
def test_scheduling_is_refused_when_the_time_never_comes(when: float) -> None:
    network = Network(1)
    network.run(until=1.0)
    with pytest.raises(ValueError, match="already"):
        network.at(when, lambda: None)


def test_run_says_no_when_nothing_is_left_to_happen() -> None:
    network = Network(1)
    network.at(1.0, lambda: None)
    assert not network.run(until=lambda: False)
    assert network.run(until=lambda: True)


def test_run_is_stuck_when_events_never_end() -> None:
    network = Network(1)

    def again() -> None:
        network.after(0.0, again)

    again()
    with pytest.raises(Stuck, match="1000 events"):
        network.run(until=1.0, max_events=1000)


def test_error_of_a_callback_names_seed_and_time_when_it_comes_out() -> None:
    network = Network(42)
    network.at(1.25, lambda: {}["missing"])
    with pytest.raises(KeyError) as caught:
        network.run(until=2.0)
    assert caught.value.__notes__ == ["at 1.250000 s of virtual time", "in the network of seed 42"]


def test_network_refuses_what_makes_no_sense_when_it_is_built_or_used() -> None:
    for bad in ({"latency": (0.2, 0.1)}, {"loss": 1.5}, {"bandwidth_bytes_per_second": 0}):
        with pytest.raises(ValueError, match="must be"):
            Network(1, **bad)
    network = Network(1)
    Ear(network, ALICE)
    with pytest.raises(ValueError, match="alice is on this network already"):
        Ear(network, ALICE)


def test_every_message_arrives_when_a_thousand_peers_chat(
    record_property: Callable[[str, object], None],
) -> None:
    """How fast is not asserted, but recorded: messages per second of one core."""
    network = Network(1)
    names = [PeerId(f"peer {number}") for number in range(1000)]

    def join(name: PeerId) -> None:
        def answer(sender: PeerId, message: object) -> None:
            if network.sent < 20_000:
                network.send(name, sender, message)

        network.attach(name, answer, lambda peer, up: None)

    for name in names:
        join(name)
    for one, other in pairwise(names):
        network.send(one, other, "hello")
    began = time.perf_counter()
    network.run(until=lambda: network.delivered == 20_000)
    record_property("messages_per_second", round(20_000 / (time.perf_counter() - began)))
    assert (network.sent, network.lost) == (20_000, 0)
