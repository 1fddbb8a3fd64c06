"""What `memory` adds to the contract: faults on demand, virtual time, and the same story every time."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import subprocess
import sys
from contextlib import AsyncExitStack

import pytest
from contract import OTHER_RUN, Recorder, ask, chunk, presence, recorded, steps

from p2ptrain.errors import LocalFault, PeerFault, Unreachable
from p2ptrain.records import Ask, Averaged, Chunk, GetRun, Message, PeerId
from p2ptrain.swarm.clock import Stuck, run
from p2ptrain.swarm.lanes import OPEN_SECONDS, REOPEN_SECONDS
from p2ptrain.swarm.memory import READ_BUFFER_BYTES, WINDOW_BYTES, MemoryHub, MemorySwarm
from p2ptrain.swarm.port import Buffer

pytestmark = pytest.mark.swarm

ALICE, BOB, CAROL = PeerId("alice"), PeerId("bob"), PeerId("carol")


def now() -> float:
    return asyncio.get_running_loop().time()


def hub_with(latency_seconds: float = 0.1, bandwidth_bytes_per_second: float | None = None) -> MemoryHub:
    """Every message takes the same time."""
    return MemoryHub(1, (latency_seconds, latency_seconds), bandwidth_bytes_per_second)


async def all_join(stack: AsyncExitStack, hub: MemoryHub, *names: str) -> list[tuple[MemorySwarm, Recorder]]:
    """Peers that are there until the stack ends, each with what it hears."""
    swarms = [await stack.enter_async_context(hub.swarm(name)) for name in names]
    return [(swarm, recorded(swarm)) for swarm in swarms]


# -- determinism ---------------------------------------------------------------------------------------------


async def eventful_minute(seed: int) -> str:
    """Digest of all that happens to four peers among losses, a kill, a return and a partition."""
    hub = MemoryHub(seed, (0.01, 0.2), bandwidth_bytes_per_second=1e6, loss=0.01, trace_lines=100_000)
    chance = random.Random(seed)

    async def talk(swarm: MemorySwarm, other: PeerId) -> None:
        match chance.choice(["publish", "send", "send_chunk", "request"]):
            case "publish":
                await swarm.publish(presence(swarm.peer_id), ttl_seconds=5)
                await swarm.lookup("presence")
            case "send":
                swarm.send(other, ask(1))
            case "send_chunk":
                await swarm.send_chunk(other, chunk(other, 1), bytes(20_000))
            case "request":
                await swarm.request(other, GetRun(), timeout_seconds=3, max_bytes=10)

    async def live(name: str, until: float) -> None:
        async with hub.swarm(name) as swarm:
            recorded(swarm)
            while now() < until:
                await asyncio.sleep(chance.expovariate(5))
                try:
                    await talk(swarm, PeerId(chance.choice([other for other in "abcd" if other != name])))
                except PeerFault:
                    await asyncio.sleep(1)

    async def befall() -> None:
        await asyncio.sleep(20)
        hub.kill("d")
        await asyncio.sleep(10)
        hub.partition([["a", "b"], ["c", "d"]])
        await asyncio.sleep(5)
        hub.heal()
        await live("d", until=60)

    async with asyncio.TaskGroup() as group:
        for name, until in (("a", 60), ("b", 60), ("c", 60), ("d", 25)):
            group.create_task(live(name, until))
        group.create_task(befall())
    assert hub.network.delivered > 1000
    assert hub.network.lost > 20
    return hashlib.sha256("\n".join(hub.network.trace).encode()).hexdigest()


def test_swarm_tells_another_story_only_when_the_seed_is_another() -> None:
    one, again, other = run(eventful_minute(1)), run(eventful_minute(1)), run(eventful_minute(2))
    assert one == again != other


def test_swarm_tells_the_same_story_in_another_process_when_its_hashes_differ() -> None:
    stories = [
        subprocess.run(
            [sys.executable, __file__, "1"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert stories[0] == stories[1]
    assert len(stories[0].strip()) == 64


# -- time ----------------------------------------------------------------------------------------------------


def test_chunk_takes_its_size_of_the_senders_time_when_there_is_a_bandwidth() -> None:
    async def main() -> None:
        hub = hub_with(bandwidth_bytes_per_second=1e6)
        async with AsyncExitStack() as stack:
            (alice, _), (_, at_bob), (_, at_carol) = await all_join(stack, hub, "alice", "bob", "carol")
            async with asyncio.TaskGroup() as group:
                for to in (BOB, CAROL):
                    group.create_task(alice.send_chunk(to, chunk(ALICE, 1), bytes(1_000_000)))
            assert now() == pytest.approx(2.4, abs=0.01), "0.4 s for opening and greeting, then two seconds"
            await at_bob.until(lambda heard: heard.chunks)
            await at_carol.until(lambda heard: heard.chunks)
            assert now() == pytest.approx(2.5, abs=0.01)

    run(main())


def test_message_is_not_held_up_when_the_uplink_is_busy_with_chunks() -> None:
    async def main() -> None:
        hub = hub_with(bandwidth_bytes_per_second=1e6)
        async with AsyncExitStack() as stack:
            (alice, _), (_, at_bob) = await all_join(stack, hub, "alice", "bob")
            alice.send(BOB, ask(0))
            await at_bob.until(lambda heard: heard.messages)
            sending = asyncio.create_task(alice.send_chunk(BOB, chunk(ALICE, 1), bytes(10_000_000)))
            await asyncio.sleep(2)
            said_at = now()
            alice.send(BOB, ask(1))
            await at_bob.until(lambda heard: len(heard.messages) == 2)
            assert now() - said_at == pytest.approx(0.1, abs=0.01)
            assert not sending.done()
            await sending

    run(main())


def test_everything_takes_longer_when_a_peer_is_slow() -> None:
    async def main() -> None:
        hub = hub_with()
        async with AsyncExitStack() as stack:
            (alice, _), (_, at_bob) = await all_join(stack, hub, "alice", "bob")
            hub.slow("bob", 4)
            alice.send(BOB, ask(1))
            await at_bob.until(lambda heard: heard.messages)
            assert now() == pytest.approx(5 * 0.4, abs=0.01), "open, opened, hello, hello, message"

    run(main())


def test_run_is_stuck_when_a_peer_waits_for_a_message_that_nobody_sends() -> None:
    async def main() -> None:
        async with hub_with().swarm("alice") as alice:
            heard = recorded(alice)
            await heard.until(lambda heard: heard.messages, seconds=float("inf"))

    with pytest.raises(Stuck, match=r"main:\d+ > Recorder.until:\d+"):
        run(main())


def test_sender_waits_when_the_receiver_takes_nothing() -> None:
    async def main() -> None:
        hub = hub_with()
        async with AsyncExitStack() as stack:
            (alice, _), (_, at_bob) = await all_join(stack, hub, "alice", "bob")
            at_bob.gate.clear()
            size, sent_bytes = 2**18, 0

            async def send_for_ever() -> None:
                nonlocal sent_bytes
                while True:
                    await alice.send_chunk(BOB, chunk(ALICE, 1), bytes(size))
                    sent_bytes += size

            with pytest.raises(TimeoutError):
                await asyncio.wait_for(send_for_ever(), 100)
            assert sent_bytes <= 2 * READ_BUFFER_BYTES + WINDOW_BYTES + 2 * size
            at_bob.gate.set()
            await at_bob.until(lambda heard: len(heard.chunks) * size >= sent_bytes)

    run(main())


# -- faults --------------------------------------------------------------------------------------------------


def test_each_side_goes_on_by_itself_and_they_meet_again_when_a_partition_heals() -> None:
    async def main() -> None:
        hub = hub_with()
        async with AsyncExitStack() as stack:
            (alice, at_alice), (bob, at_bob), (carol, at_carol) = await all_join(
                stack, hub, "alice", "bob", "carol"
            )
            for swarm in (alice, carol):
                swarm.send(BOB, ask(1))
            await at_bob.until(lambda heard: len(heard.messages) == 2)
            hub.partition([["alice", "carol"], ["bob"]])
            alice.send(BOB, ask(2))
            alice.send(CAROL, ask(3))
            await at_alice.until(lambda heard: heard.links == [(BOB, False)], seconds=5)
            await at_carol.until(lambda heard: steps(heard.messages) == [3])
            assert steps(at_bob.messages) == [1, 1]
            with pytest.raises(Unreachable):
                await alice.request(BOB, GetRun(), timeout_seconds=5, max_bytes=10)
            hub.heal()
            await asyncio.sleep(2)
            alice.send(BOB, ask(4))
            await at_bob.until(lambda heard: steps(heard.messages) == [1, 1, 4])
            assert at_alice.links == [(BOB, False), (BOB, True)]
            bob.send(CAROL, ask(5))
            await at_carol.until(lambda heard: steps(heard.messages) == [3, 5])

    run(main())


def test_peer_that_noticed_no_partition_is_told_when_it_next_says_something() -> None:
    async def main() -> None:
        hub = hub_with()
        async with AsyncExitStack() as stack:
            (alice, at_alice), (bob, at_bob) = await all_join(stack, hub, "alice", "bob")
            bob.send(ALICE, ask(1))
            await at_alice.until(lambda heard: heard.messages)
            hub.partition([["alice"], ["bob"]])
            alice.send(BOB, ask(2))
            await at_alice.until(lambda heard: heard.links)
            hub.heal()
            assert at_bob.links == []
            bob.send(ALICE, ask(3))
            await at_bob.until(lambda heard: heard.links)
            assert (steps(at_alice.messages), at_bob.links) == ([1], [(ALICE, True)])

    run(main())


def test_peer_behind_a_slow_link_is_given_longer_to_answer_again_when_its_lane_broke() -> None:
    async def main() -> None:
        hub = hub_with(latency_seconds=0.4)
        async with AsyncExitStack() as stack:
            (alice, at_alice), (_, at_bob) = await all_join(stack, hub, "alice", "bob")
            assert alice.dial_seconds == REOPEN_SECONDS
            alice.send(BOB, ask(1))
            await at_bob.until(lambda heard: heard.messages)
            assert 1.6 <= alice.dial_seconds < OPEN_SECONDS, "open, opened, hello, hello: 1.6 s were seen"
            hub.kill("bob")
            await all_join(stack, hub, "bob")
            await at_alice.until(lambda heard: heard.links)
            assert at_alice.links == [(BOB, True)]

    run(main())


def test_no_stream_is_left_when_a_peer_answers_after_the_question_was_given_up() -> None:
    async def main() -> None:
        hub = hub_with()
        async with AsyncExitStack() as stack:
            (alice, _), (bob, _) = await all_join(stack, hub, "alice", "bob")
            hub.slow("bob", 20)  # 2 s each way
            with pytest.raises(Unreachable, match=r"did not answer get_run within 1 s"):
                await alice.request(BOB, GetRun(), timeout_seconds=1, max_bytes=10)
            assert (now(), alice.connected_peers(), bob.connected_peers()) == (1, 0, 0)
            await asyncio.sleep(1.5)
            assert bob.connected_peers() == 1
            await asyncio.sleep(4)
            assert bob.connected_peers() == 0

    run(main())


def test_two_peers_lose_each_other_only_when_their_link_is_cut() -> None:
    async def main() -> None:
        hub = hub_with()
        async with AsyncExitStack() as stack:
            (alice, at_alice), _, (carol, at_carol) = await all_join(stack, hub, "alice", "bob", "carol")
            hub.cut("alice", "bob")
            alice.send(BOB, ask(1))
            alice.send(CAROL, ask(1))
            carol.send(BOB, ask(1))
            await at_alice.until(lambda heard: heard.links)
            await at_carol.until(lambda heard: heard.messages)
            await asyncio.sleep(5)
            assert (at_alice.links, at_carol.links) == ([(BOB, False)], [])

    run(main())


def test_killed_peer_says_and_hears_nothing_more_and_its_name_is_free() -> None:
    async def main() -> None:
        hub = hub_with()
        async with AsyncExitStack() as stack:
            (alice, at_alice), (bob, at_bob) = await all_join(stack, hub, "alice", "bob")
            alice.send(BOB, ask(1))
            await at_bob.until(lambda heard: heard.messages)
            with pytest.raises(LocalFault, match="bob is online already"):
                await stack.enter_async_context(hub.swarm("bob"))
            publishing = asyncio.create_task(bob.publish(presence(BOB), ttl_seconds=60))
            await asyncio.sleep(0)
            hub.kill("bob")
            hub.kill("bob")
            assert not await publishing
            assert not await alice.lookup("presence")
            bob.send(ALICE, ask(2))
            with pytest.raises(Unreachable):
                await bob.send_chunk(ALICE, chunk(BOB, 1), b"")
            with pytest.raises(Unreachable):
                await bob.request(ALICE, GetRun(), timeout_seconds=5, max_bytes=10)
            assert not await bob.publish(presence(BOB), ttl_seconds=5)
            assert not await bob.lookup("presence")
            alice.send(BOB, ask(3))
            [(_, at_new_bob)] = await all_join(stack, hub, "bob")
            await asyncio.sleep(5)
            alice.send(BOB, ask(4))
            await at_new_bob.until(lambda heard: heard.messages)
            assert steps(at_new_bob.messages) == [4]
            assert (at_alice.messages, at_bob.links, steps(at_bob.messages)) == ([], [], [1])
            assert (bob.connected_peers(), alice.connected_peers()) == (0, 1)

    run(main())


def test_swarm_raises_the_error_as_it_is_when_its_user_or_its_handler_fails() -> None:
    class Careless(Recorder):
        def on_message(self, sender: PeerId, message: Message) -> None:
            raise KeyError("in the handler")

    async def main(fail: bool) -> None:
        hub = hub_with()
        async with hub.swarm("alice") as alice, hub.swarm("bob") as bob:
            recorded(alice)
            bob.serve(Careless())
            alice.send(BOB, ask(1))
            if fail:
                raise LocalFault("of the user")
            await asyncio.sleep(100)

    with pytest.raises(LocalFault, match="of the user"):
        run(main(fail=True))
    with pytest.raises(KeyError, match="in the handler"):
        run(main(fail=False))


# -- records -------------------------------------------------------------------------------------------------


def test_record_is_found_until_its_time_is_over_when_its_author_is_killed() -> None:
    async def main() -> None:
        hub = hub_with(latency_seconds=0.0)
        async with AsyncExitStack() as stack:
            (alice, _), (bob, _) = await all_join(stack, hub, "alice", "bob")
            assert await bob.publish(presence(BOB), ttl_seconds=30)
            hub.kill("bob")
            await asyncio.sleep(29)
            assert [record.peer for record in await alice.lookup("presence")] == [BOB]
            await asyncio.sleep(2)
            assert not await alice.lookup("presence")

    run(main())


def test_records_are_seen_on_their_side_only_when_there_is_a_partition() -> None:
    async def main() -> None:
        hub = hub_with()
        async with AsyncExitStack() as stack:
            peers = await all_join(stack, hub, "alice", "bob", "carol")
            hub.partition([["alice", "bob"], ["carol"]])
            taken = [await swarm.publish(presence(swarm.peer_id), ttl_seconds=100) for swarm, _ in peers]
            assert taken == [True, True, False]
            seen = [[record.peer for record in await swarm.lookup("presence")] for swarm, _ in peers]
            assert seen == [[ALICE, BOB], [ALICE, BOB], [CAROL]]
            hub.heal()
            assert [record.peer for record in await peers[2][0].lookup("presence")] == [ALICE, BOB, CAROL]

    run(main())


def test_publishing_is_refused_when_the_record_is_not_our_own_or_lives_too_long() -> None:
    async def main() -> None:
        async with hub_with().swarm("alice") as alice:
            for record, ttl_seconds in ((presence(BOB), 5), (presence(ALICE), 1000), (presence(ALICE), 0)):
                with pytest.raises(ValueError, match="expected our own"):
                    await alice.publish(record, ttl_seconds=ttl_seconds)

    run(main())


def test_peer_that_knows_no_run_meets_others_once_it_has_adopted_theirs() -> None:
    async def main() -> None:
        hub = hub_with()
        async with hub.swarm("alice") as alice, hub.swarm("bob", OTHER_RUN) as bob:
            recorded(alice)
            heard = recorded(bob)
            await alice.publish(presence(ALICE), ttl_seconds=60)
            assert not await bob.lookup("presence")
            bob.adopt(presence(ALICE).fingerprint)
            assert [record.peer for record in await bob.lookup("presence")] == [ALICE]
            alice.send(BOB, ask(1))
            await heard.until(lambda heard: heard.messages)

    run(main())


# -- the lanes' promise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_messages_come_once_in_order_and_every_gap_is_told_when_the_network_is_bad(seed: int) -> None:
    """Ten minutes of five peers under losses, kills, partitions and cuts."""
    chance = random.Random(seed)
    names = [PeerId(name) for name in ("alice", "bob", "carol", "dave", "eve")]
    ends_at = 600.0

    class Witness(Recorder):
        """Of one life of one peer: when its links changed, and which numbers came from whom."""

        def __init__(self, life: int) -> None:
            super().__init__()
            self.life = life
            self.link_times: dict[PeerId, list[tuple[float, bool]]] = {}
            self.numbers: dict[tuple[PeerId, int], list[int]] = {}

        def on_message(self, sender: PeerId, message: Message) -> None:
            assert isinstance(message, Ask)
            its_life, number = divmod(message.position.step, 2**20)
            self.numbers.setdefault((sender, its_life), []).append(number)

        def on_link(self, peer: PeerId, up: bool) -> None:
            self.link_times.setdefault(peer, []).append((now(), up))

    witnesses: dict[tuple[PeerId, int], Witness] = {}
    said: dict[tuple[PeerId, int, PeerId], list[tuple[float, int]]] = {}
    survivors: set[tuple[PeerId, int]] = set()
    lost = 0

    async def main() -> None:
        hub = MemoryHub(seed, (0.01, 0.3), loss=chance.choice([0.0, 0.01]))

        async def live(name: PeerId, life: int, until: float) -> None:
            async with hub.swarm(name) as swarm:
                witness = witnesses[name, life] = Witness(life)
                swarm.serve(witness)
                number = 0
                while now() < until:
                    await asyncio.sleep(chance.expovariate(2))
                    to = chance.choice([other for other in names if other != name])
                    number += 1
                    said.setdefault((name, life, to), []).append((now(), number))
                    swarm.send(to, ask(life * 2**20 + number))
                if until < ends_at:
                    hub.kill(name)
                else:
                    await asyncio.sleep(20)  # for what is under way, and for what is to be told
                    survivors.add((name, life))

        async def lives(name: PeerId) -> None:
            life = 0
            while now() < ends_at:
                life += 1
                await live(name, life, min(ends_at, now() + chance.expovariate(1 / 200)))
                await asyncio.sleep(chance.choice([0.0, 0.5, 10.0]))

        async def befall() -> None:
            while now() < ends_at - 60:
                await asyncio.sleep(chance.expovariate(1 / 20))
                match chance.choice(["partition", "cut", "heal", "slow"]):
                    case "partition":
                        some = chance.sample(names, 2)
                        hub.partition([some, [name for name in names if name not in some]])
                    case "cut":
                        hub.cut(*chance.sample(names, 2))
                    case "heal":
                        hub.heal()
                    case "slow":
                        hub.slow(chance.choice(names), chance.choice([1.0, 5.0]))
            hub.heal()

        async with asyncio.TaskGroup() as group:
            for name in names:
                group.create_task(lives(name))
            group.create_task(befall())

    run(main())
    for (name, life, to), numbers in said.items():
        witness = witnesses[name, life]
        links = witness.link_times.get(to, [])
        arrived: list[int] = []
        for (who, _), other in sorted(witnesses.items()):
            if who == to:
                arrived += other.numbers.get((name, life), [])
        assert arrived == sorted(set(arrived)), f"{name} to {to}: {arrived}"
        for at, number in numbers:
            if number not in set(arrived) and (name, life) in survivors:
                lost += 1
                told = [up for when, up in links if when >= at]
                down = [up for when, up in links if when < at][-1:] == [False]
                assert told or down, f"{name} to {to}: {number} of {at:.3f} s is lost, links {links}"
    assert lost > 10, "this was no bad network"


@pytest.mark.parametrize("seed", range(4))
def test_chunks_come_whole_and_in_order_and_no_sender_hangs_when_lanes_break(seed: int) -> None:
    chance = random.Random(seed)
    numbers: list[int] = []

    class Slow(Recorder):
        async def on_chunk(self, sender: PeerId, header: Chunk | Averaged, payload: Buffer) -> None:
            assert payload == bytes([header.number]) * len(payload)
            await asyncio.sleep(chance.uniform(0, 0.5))
            numbers.append(header.number)

    async def main() -> None:
        hub = MemoryHub(seed, (0.01, 0.1), bandwidth_bytes_per_second=1e7, loss=0.05)
        async with hub.swarm("alice") as alice, hub.swarm("bob") as bob:
            recorded(alice)
            bob.serve(Slow())
            for number in range(200):
                payload = bytes([number]) * chance.choice([1, 10_000, 2_000_000])
                try:
                    await asyncio.wait_for(alice.send_chunk(BOB, chunk(ALICE, number), payload), 30)
                except Unreachable:
                    await asyncio.sleep(1)
            await asyncio.sleep(30)
            assert hub.network.lost > 10

    run(main())
    assert numbers == sorted(set(numbers))
    assert 50 < len(numbers) < 200


if __name__ == "__main__":
    print(run(eventful_minute(int(sys.argv[1]))))
