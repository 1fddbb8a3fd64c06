"""The contract of `swarm.port`, told to every carrier."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from contract import (
    OTHER_RUN,
    Carrier,
    Fabric,
    Story,
    arrives,
    ask,
    chunk,
    give_run,
    is_refused,
    presence,
    recorded,
    steps,
)
from libp2p_fabric import Libp2pFabric
from memory_fabric import MemoryFabric

from p2ptrain.errors import BadMessage, Unreachable
from p2ptrain.records import GetManifest, GetRun, Piece, Reply, Request
from p2ptrain.swarm import clock
from p2ptrain.swarm.memory import MemoryHub
from p2ptrain.swarm.port import Buffer

pytestmark = pytest.mark.swarm


async def tell(story: Story, fabric: Fabric) -> None:
    try:
        await story(fabric)
    finally:
        await fabric.aclose()


def over_libp2p(story: Story, folder: Path) -> None:
    asyncio.run(tell(story, Libp2pFabric(folder)))


def over_memory(story: Story, folder: Path) -> None:
    clock.run(tell(story, MemoryFabric(MemoryHub(seed=1))))


def over_memory_in_real_time(story: Story, folder: Path) -> None:
    asyncio.run(tell(story, MemoryFabric(MemoryHub(seed=1, latency=(0.0, 0.01)))))


CARRIERS: dict[str, Carrier] = {
    "libp2p": over_libp2p,
    "memory": over_memory,
    "memory in real time": over_memory_in_real_time,
}


@pytest.fixture(params=CARRIERS)
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Story], None]:
    """Tells a story over one of the carriers."""
    return lambda story: CARRIERS[request.param](story, tmp_path)


# -- lanes ---------------------------------------------------------------------------------------------------


def test_messages_arrive_in_order_when_many_are_sent_at_once(play: Callable[[Story], None]) -> None:
    async def story(fabric: Fabric) -> None:
        alice, bob = await fabric.join("alice"), await fabric.join("bob")
        heard_by_alice, heard_by_bob = recorded(alice), recorded(bob)
        for step in range(300):
            alice.send(bob.peer_id, ask(step))
            bob.send(alice.peer_id, ask(1000 + step))
        await heard_by_bob.until(lambda heard: len(heard.messages) == 300)
        await heard_by_alice.until(lambda heard: len(heard.messages) == 300)
        assert steps(heard_by_bob.messages) == list(range(300))
        assert steps(heard_by_alice.messages) == list(range(1000, 1300))
        assert {sender for sender, _ in heard_by_bob.messages} == {alice.peer_id}
        assert heard_by_alice.links == heard_by_bob.links == []

    play(story)


def test_chunks_arrive_whole_and_in_order_when_3_mb_go_both_ways(play: Callable[[Story], None]) -> None:
    async def story(fabric: Fabric) -> None:
        alice, bob = await fabric.join("alice"), await fabric.join("bob")
        heard_by_alice, heard_by_bob = recorded(alice), recorded(bob)
        payload = os.urandom(3 * 2**20)

        async with asyncio.TaskGroup() as both:
            for sender, receiver in ((alice, bob), (bob, alice)):
                for number in range(4):
                    header = chunk(alice.peer_id, number)
                    both.create_task(
                        sender.send_chunk(receiver.peer_id, header, memoryview(payload)[number:])
                    )
        for heard, sender in ((heard_by_alice, bob), (heard_by_bob, alice)):
            await heard.until(lambda heard: len(heard.chunks) == 4)
            assert [(who, header.number) for who, header, _ in heard.chunks] == [
                (sender.peer_id, number) for number in range(4)
            ]
            assert all(content == payload[header.number :] for _, header, content in heard.chunks)

    play(story)


def test_message_overtakes_and_sender_waits_when_the_data_lane_is_stalled(
    play: Callable[[Story], None],
) -> None:
    async def story(fabric: Fabric) -> None:
        alice, bob = await fabric.join("alice"), await fabric.join("bob")
        heard = recorded(bob)
        recorded(alice)
        heard.gate.clear()
        sent = 0

        async def send_all() -> None:
            nonlocal sent
            for number in range(100):
                await alice.send_chunk(bob.peer_id, chunk(alice.peer_id, number), bytes(2**20))
                sent += 1

        sending = asyncio.create_task(send_all())
        await heard.until(lambda heard: heard.chunks)
        alice.send(bob.peer_id, ask(7))
        await heard.until(lambda heard: heard.messages)
        assert len(heard.chunks) == 1, "on_chunk must be awaited before the next frame"
        assert sent < 100, "the receiver takes nothing, so the sender must wait"
        heard.gate.set()
        await sending
        await heard.until(lambda heard: len(heard.chunks) == 100)

    play(story)


def test_chunk_is_whole_when_its_buffer_is_reused_right_after_sending(play: Callable[[Story], None]) -> None:
    async def story(fabric: Fabric) -> None:
        alice, bob = await fabric.join("alice"), await fabric.join("bob")
        heard = recorded(bob)
        recorded(alice)
        buffer = bytearray(2**20)
        for number in range(8):
            buffer[:] = bytes([number]) * len(buffer)
            await alice.send_chunk(bob.peer_id, chunk(alice.peer_id, number), buffer)
        await heard.until(lambda heard: len(heard.chunks) == 8)
        assert all(content == bytes([header.number]) * 2**20 for _, header, content in heard.chunks)

    play(story)


# -- requests ------------------------------------------------------------------------------------------------


def test_request_is_answered_when_the_reply_fits(play: Callable[[Story], None]) -> None:
    async def story(fabric: Fabric) -> None:
        alice, bob = await fabric.join("alice"), await fabric.join("bob")
        recorded(bob).answer = give_run
        reply, payload = await alice.request(bob.peer_id, GetRun(), timeout_seconds=10, max_bytes=100)
        assert (reply, payload) == (Piece(), b"the run")

    play(story)


def test_request_raises_refused_with_the_reason_when_it_is_refused(play: Callable[[Story], None]) -> None:
    async def story(fabric: Fabric) -> None:
        alice, bob = await fabric.join("alice"), await fabric.join("bob")
        recorded(bob).answer = give_run
        assert "only the run" in await is_refused(alice, bob.peer_id, GetManifest())

    play(story)


def test_request_raises_bad_message_when_the_reply_is_larger_than_asked_for(
    play: Callable[[Story], None],
) -> None:
    async def story(fabric: Fabric) -> None:
        alice, bob = await fabric.join("alice"), await fabric.join("bob")
        recorded(bob).answer = give_run
        with pytest.raises(BadMessage):
            await alice.request(bob.peer_id, GetRun(), timeout_seconds=10, max_bytes=6)

    play(story)


def test_request_raises_unreachable_when_no_answer_comes_in_time(play: Callable[[Story], None]) -> None:
    async def story(fabric: Fabric) -> None:
        alice, bob = await fabric.join("alice"), await fabric.join("bob")

        async def never(request: Request) -> tuple[Reply, Buffer]:
            await asyncio.get_running_loop().create_future()
            raise AssertionError

        recorded(bob).answer = never
        with pytest.raises(Unreachable):
            await alice.request(bob.peer_id, GetRun(), timeout_seconds=0.3, max_bytes=100)

    play(story)


def test_peer_refuses_when_it_does_not_serve_yet(play: Callable[[Story], None]) -> None:
    async def story(fabric: Fabric) -> None:
        alice, bob = await fabric.join("alice"), await fabric.join("bob")
        await is_refused(alice, bob.peer_id, GetRun())

    play(story)


# -- other runs ----------------------------------------------------------------------------------------------


def test_peers_of_different_runs_never_meet_when_they_send_or_ask(play: Callable[[Story], None]) -> None:
    async def story(fabric: Fabric) -> None:
        alice, eve = await fabric.join("alice"), await fabric.join("eve", OTHER_RUN)
        heard_by_alice, heard_by_eve = recorded(alice), recorded(eve)
        heard_by_alice.answer = heard_by_eve.answer = give_run
        eve.send(alice.peer_id, ask(1))
        with pytest.raises(Unreachable):
            await eve.send_chunk(alice.peer_id, chunk(eve.peer_id, 0), b"poison")
        await is_refused(eve, alice.peer_id, GetManifest())
        await is_refused(alice, eve.peer_id, GetManifest())
        assert not heard_by_alice.messages
        assert not heard_by_alice.chunks
        assert not heard_by_alice.requests

    play(story)


def test_run_is_given_when_a_peer_of_another_run_asks_for_it(play: Callable[[Story], None]) -> None:
    async def story(fabric: Fabric) -> None:
        alice, eve = await fabric.join("alice"), await fabric.join("eve", OTHER_RUN)
        recorded(alice).answer = give_run
        _, payload = await eve.request(alice.peer_id, GetRun(), timeout_seconds=10, max_bytes=100)
        assert payload == b"the run"

    play(story)


# -- links ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["kill", "leave"])
@pytest.mark.parametrize("spoke", ["the one that ends", "the one that stays"])
def test_link_is_down_within_5_s_when_a_peer_ends(
    play: Callable[[Story], None], spoke: str, end: str
) -> None:
    async def story(fabric: Fabric) -> None:
        alice, bob = await fabric.join("alice"), await fabric.join("bob")
        heard_by_alice, heard_by_bob = recorded(alice), recorded(bob)
        if spoke == "the one that ends":
            bob.send(alice.peer_id, ask(1))
            await heard_by_alice.until(lambda heard: heard.messages)
        else:
            alice.send(bob.peer_id, ask(1))
            await heard_by_bob.until(lambda heard: heard.messages)
        await (fabric.kill(bob) if end == "kill" else fabric.leave(bob))
        await heard_by_alice.until(lambda heard: (bob.peer_id, False) in heard.links, seconds=5)

    play(story)


def test_link_is_down_when_something_is_said_to_a_peer_that_is_gone(play: Callable[[Story], None]) -> None:
    async def story(fabric: Fabric) -> None:
        alice, bob = await fabric.join("alice"), await fabric.join("bob")
        heard = recorded(alice)
        await fabric.leave(bob)
        alice.send(bob.peer_id, ask(1))
        await heard.until(lambda heard: heard.links)
        assert heard.links == [(bob.peer_id, False)]

    play(story)


def test_sending_a_chunk_raises_unreachable_when_the_peer_is_killed_meanwhile(
    play: Callable[[Story], None],
) -> None:
    async def story(fabric: Fabric) -> None:
        alice, bob = await fabric.join("alice"), await fabric.join("bob")
        recorded(alice)
        heard = recorded(bob)
        heard.gate.clear()

        async def send_for_ever() -> None:
            while True:
                await alice.send_chunk(bob.peer_id, chunk(alice.peer_id, 0), bytes(2**20))

        sending = asyncio.create_task(send_for_ever())
        await heard.until(lambda heard: heard.chunks)
        await fabric.kill(bob)
        async with asyncio.timeout(5):
            with pytest.raises(Unreachable):
                await sending

    play(story)


def test_peer_is_reachable_again_when_it_comes_back_after_a_kill(play: Callable[[Story], None]) -> None:
    async def story(fabric: Fabric) -> None:
        alice, bob = await fabric.join("alice"), await fabric.join("bob")
        heard_by_alice = recorded(alice)
        recorded(bob)
        bob.send(alice.peer_id, ask(1))
        await heard_by_alice.until(lambda heard: heard.messages)
        await fabric.kill(bob)
        await heard_by_alice.until(lambda heard: heard.links)

        again = await fabric.join("bob")
        heard_by_bob = recorded(again)
        assert again.peer_id == bob.peer_id
        await arrives(alice, again.peer_id, heard_by_bob, 2)
        await arrives(again, alice.peer_id, heard_by_alice, 3)
        await heard_by_alice.until(lambda heard: heard.links[-1] == (bob.peer_id, True))

    play(story)


def test_others_are_undisturbed_when_one_of_three_is_killed(play: Callable[[Story], None]) -> None:
    async def story(fabric: Fabric) -> None:
        alice, bob, carol = [await fabric.join(name) for name in ("alice", "bob", "carol")]
        heard_by_alice, heard_by_carol = recorded(alice), recorded(carol)
        recorded(bob)
        for peer in (bob, carol):
            peer.send(alice.peer_id, ask(1))
            alice.send(peer.peer_id, ask(1))
        await heard_by_alice.until(lambda heard: len(heard.messages) == 2)
        await heard_by_carol.until(lambda heard: heard.messages)
        await fabric.kill(bob)
        await heard_by_alice.until(lambda heard: heard.links)
        alice.send(carol.peer_id, ask(2))
        await heard_by_carol.until(lambda heard: len(heard.messages) == 2)
        assert steps(heard_by_carol.messages) == [1, 2]
        assert heard_by_alice.links == [(bob.peer_id, False)]
        assert heard_by_carol.links == []

    play(story)


# -- records -------------------------------------------------------------------------------------------------


def test_presence_is_found_by_others_when_it_was_published(play: Callable[[Story], None]) -> None:
    async def story(fabric: Fabric) -> None:
        alice, bob, carol = [await fabric.join(name) for name in ("alice", "bob", "carol")]
        for peer in (alice, bob):
            assert await peer.publish(presence(peer.peer_id), ttl_seconds=60)
        assert await bob.publish(presence(bob.peer_id, step=5), ttl_seconds=60)
        expected = sorted(
            [presence(alice.peer_id), presence(bob.peer_id, step=5)], key=lambda record: record.peer
        )
        for peer in (alice, bob, carol):
            found = await peer.lookup("presence")
            assert sorted(found, key=lambda record: record.peer) == expected
            assert not await peer.lookup("round")

    play(story)


def test_presence_is_not_found_when_it_is_of_another_run(play: Callable[[Story], None]) -> None:
    async def story(fabric: Fabric) -> None:
        alice, eve = await fabric.join("alice"), await fabric.join("eve", OTHER_RUN)
        await eve.publish(presence(eve.peer_id, OTHER_RUN), ttl_seconds=60)
        assert not await alice.lookup("presence")

    play(story)


def test_presence_is_gone_when_its_time_is_over(play: Callable[[Story], None]) -> None:
    async def story(fabric: Fabric) -> None:
        alice, bob = await fabric.join("alice"), await fabric.join("bob")
        await bob.publish(presence(bob.peer_id), ttl_seconds=1)
        assert await alice.lookup("presence")
        for _ in range(50):
            if not await alice.lookup("presence"):
                return
            await asyncio.sleep(0.1)
        raise AssertionError("a record of 1 s was still there after 5 s")

    play(story)


def test_publishing_says_no_when_nobody_else_is_there(play: Callable[[Story], None]) -> None:
    async def story(fabric: Fabric) -> None:
        alice = await fabric.join("alice")
        assert not await alice.publish(presence(alice.peer_id), ttl_seconds=60)
        bob = await fabric.join("bob")
        assert await bob.publish(presence(bob.peer_id), ttl_seconds=60)

    play(story)
