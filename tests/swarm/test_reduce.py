"""Attempts between real peers on loopback: the bytes they hold are the same whichever way the chunks went.

The roster and the freeze are made up; who makes them in earnest is shown by whole trainers elsewhere. Not
covered: how fast it is, see `tests/benchmarks`.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import Recorder, presence
from libp2p_fabric import Libp2pFabric

from p2ptrain import allreduce
from p2ptrain.allreduce import Attempt, Contribution, Work, at_once
from p2ptrain.court import Told
from p2ptrain.events import AbortCause, Carrier
from p2ptrain.gradients.aggregation import mean_chunk
from p2ptrain.gradients.codecs import codec_named
from p2ptrain.gradients.feedback import Owed
from p2ptrain.gradients.reducing import Scratch
from p2ptrain.records import Averaged, Ballot, Chunk, EntryHeader, Freeze, PeerId
from p2ptrain.swarm.port import Buffer

pytestmark = pytest.mark.swarm

RUN, VALUES, CHUNK_VALUES = "f" * 64, 50_000, 4096


class Averaging(Recorder):
    """Gives every chunk to the one attempt that there is."""

    attempt: Attempt | None = None
    placed = 0

    def place(self, sender: PeerId, header: Chunk | Averaged, size: int) -> memoryview | None:
        place = None if self.attempt is None else self.attempt.place(sender, header, size)
        self.placed += place is not None
        return place

    async def on_chunk(self, sender: PeerId, header: Chunk | Averaged, payload: Buffer) -> None:
        await self.until(lambda _: self.attempt is not None and self.attempt.awaits(header))
        assert self.attempt is not None
        await self.attempt.receive(sender, header, payload)

    def begin(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self._changed.set()


def made(step: int, roster: list[PeerId]) -> Freeze:
    return Freeze(
        step=step,
        parent="e" * 64,
        ballot=Ballot(number=1, leader=roster[0]),
        roster=tuple(roster),
        spans=(0, 20_001, VALUES),
        finishing=(),
        cutoff_seconds=0.0,
        deadline_seconds=20.0,
    )


async def average(
    swarms: list[Any], handlers: list[Averaging], step: int, codec: str, work: Work
) -> list[tuple[EntryHeader, bytes]]:
    """What each peer holds in the end. Peer i's contribution is drawn from seed i."""
    loop = asyncio.get_running_loop()
    freeze = made(step, [swarm.peer_id for swarm in swarms])
    ended = [loop.create_future() for _ in swarms]
    async with asyncio.TaskGroup() as group:
        for number, (swarm, handler) in enumerate(zip(swarms, handlers, strict=True)):

            def on_failed(suspects: Any, cause: AbortCause, detail: str, number: int = number) -> None:
                ended[number].set_exception(AssertionError(f"{cause}: {detail}"))

            attempt = Attempt(
                Told(freeze, swarm, RUN, ""),
                swarm,
                codec_named(codec),
                mean_chunk,
                CHUNK_VALUES,
                100,
                0.0,
                Owed(codec_named(codec)),
                group.create_task,
                work,
                Scratch(),
                None,
                None,
                lambda header, _, number=number: ended[number].set_result(header),
                on_failed,
            )
            generator = torch.Generator().manual_seed(number)
            attempt.contribute(Contribution(torch.randn(VALUES, generator=generator), number + 1))
            handler.begin(attempt)
        async with asyncio.timeout(20):
            headers = [await each for each in ended]
        held = [bytes(handler.attempt.payload()) for handler in handlers if handler.attempt is not None]
        for handler in handlers:
            assert handler.attempt is not None
            handler.attempt.close()
    return list(zip(headers, held, strict=True))


async def over(folder: Path, data_port: int | None, work: Work) -> dict[str, tuple[EntryHeader, bytes]]:
    """By codec, what two peers held in the end: both the same. With a data port, it came over TLS."""
    fabric = Libp2pFabric(folder)
    try:
        swarms = sorted(
            [await fabric.join(name, data_port=data_port) for name in ("alice", "bob")],
            key=lambda swarm: swarm.peer_id,
        )
        handlers = [Averaging(), Averaging()]
        for swarm, handler in zip(swarms, handlers, strict=True):
            swarm.serve(handler)
            await swarm.publish(presence(swarm.peer_id), ttl_seconds=60)
        for swarm in swarms:
            await swarm.lookup("presence")
        step, held = 0, {}
        if data_port is not None:
            while any(swarm.carriers.get(Carrier.TLS) != 1 for swarm in swarms):
                await average(swarms, handlers, step, "fp32", work)
                step += 1
        before = [swarm.traffic for swarm in swarms]
        placed = [handler.placed for handler in handlers]
        for codec in ("fp32", "fp16"):
            first, second = await average(swarms, handlers, step, codec, work)
            assert first == second
            held[codec] = first
            step += 1
        for swarm, handler, then, so_far in zip(swarms, handlers, before, placed, strict=True):
            lane, other = ("data", "tls") if data_port is None else ("tls", "data")
            assert swarm.traffic[lane][0] > then[lane][0] + VALUES * 2
            assert swarm.traffic.get(other) == then.get(other)
            assert (handler.placed > so_far) == (data_port is not None)  # received straight into its place
        return held
    finally:
        await fabric.aclose()


async def test_peers_hold_the_same_bytes_whichever_way_the_chunks_went_and_whoever_added_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same identities, and so the same roster: over TLS with threads that add, over libp2p without."""
    loop, handed_over = asyncio.get_running_loop(), 0
    with ThreadPoolExecutor(2) as threads, monkeypatch.context() as slow:

        async def beside(function: Any, *arguments: Any) -> Any:
            nonlocal handed_over
            handed_over += 1
            return await loop.run_in_executor(threads, function, *arguments)

        slow.setattr(allreduce, "AT_ONCE_VALUES", 0)
        over_tls = await over(tmp_path, 0, beside)
    assert handed_over > 2 * VALUES // CHUNK_VALUES
    over_libp2p = await over(tmp_path, None, at_once)
    for codec, (header, payload) in over_libp2p.items():
        assert over_tls[codec][0].digest == header.digest
        assert over_tls[codec][0].squared_norms == header.squared_norms
        assert over_tls[codec][1] == payload
    generators = [torch.Generator().manual_seed(number) for number in range(2)]
    totals = [torch.randn(VALUES, generator=generator) for generator in generators]
    mean = (totals[0] + totals[1]) / torch.tensor(3.0)
    assert over_tls["fp32"][1] == mean.numpy().tobytes()


# -- the memory that averages are received into --------------------------------------------------------------


class Nobody:
    peer_id = PeerId("alice")
    delivered_bytes = 0

    async def send_chunk(self, to: PeerId, header: Any, payload: Any) -> None:
        """Gone."""

    def sign(self, claim: bytes) -> str:
        return "0" * 128


ALICE, BOB = PeerId("alice"), PeerId("bob")


def alices(group: asyncio.TaskGroup, failures: list[Any]) -> Attempt:
    """Her attempt with Bob, in fp32, to whom nothing is sent."""
    codec = codec_named("fp32")
    nobody: Any = Nobody()
    return Attempt(
        Told(made(0, [ALICE, BOB]), nobody, RUN, ""),
        nobody,
        codec,
        mean_chunk,
        CHUNK_VALUES,
        100,
        0.0,
        Owed(codec),
        group.create_task,
        at_once,
        Scratch(),
        None,
        None,
        lambda header, seconds: None,
        lambda *failure: failures.append(failure),
    )


def named(attempt: Attempt) -> dict[str, Any]:
    """By what a frame says that it is of this attempt."""
    freeze = attempt.freeze
    names = {"step": freeze.step, "parent": freeze.parent, "ballot": freeze.ballot}
    return names | {"freeze": attempt.told.frozen}


async def test_chunk_that_comes_twice_does_not_write_over_what_was_accepted() -> None:
    """A connection stalls in the middle of a mean, which then comes over the other carrier."""
    async with AsyncExitStack() as stack:
        group = await stack.enter_async_context(asyncio.TaskGroup())
        failures: list[Any] = []
        attempt = alices(group, failures)
        header = Averaged(**named(attempt), number=0, samples=(1, 2))
        payload = torch.ones(CHUNK_VALUES).numpy().tobytes()
        place = attempt.place(BOB, header, len(payload))
        assert place is not None
        assert attempt.place(BOB, header, len(payload)) is None  # lent once
        assert attempt.place(BOB, header.model_copy(update={"number": 1}), 5) is None
        assert attempt.place(ALICE, header, len(payload)) is None  # our own span comes from nobody
        await attempt.receive(BOB, header, payload)
        place[:] = bytes(len(payload))  # the stalled connection goes on after all
        begins = 4 * 20_001
        assert bytes(attempt.payload())[begins : begins + len(payload)] == payload
        assert not failures
        attempt.close()


async def test_memory_of_a_part_is_lent_once_until_it_has_been_added() -> None:
    async with asyncio.TaskGroup() as group:
        failures: list[Any] = []
        attempt = alices(group, failures)
        header = Chunk(**named(attempt), number=0, samples=1)
        later = [header.model_copy(update={"number": number}) for number in range(5)]
        size = 4 * CHUNK_VALUES
        assert attempt.place(BOB, header, size - 4) is None
        assert attempt.place(BOB, header.model_copy(update={"number": 5}), size) is None  # alice has five
        assert attempt.place(ALICE, header, size) is None
        place = attempt.place(BOB, header, size)
        assert place is not None
        assert attempt.place(BOB, header, size) is None
        place[:] = torch.full((CHUNK_VALUES,), 3.0).numpy().tobytes()
        await attempt.receive(BOB, header, place)
        beside = attempt.place(BOB, later[1], size)
        assert beside is not place  # it waits to be added
        attempt.contribute(Contribution(torch.ones(VALUES), 1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert attempt.place(BOB, later[2], size) is place
        assert bytes(attempt.payload()[:size]) == torch.full((CHUNK_VALUES,), 2.0).numpy().tobytes()
        assert not failures
        attempt.close()


async def test_attempt_fails_by_the_name_of_who_sends_a_part_of_the_wrong_size_and_nothing_breaks() -> None:
    """Bob's came first; then Alice's own completes the chunk."""
    async with asyncio.TaskGroup() as group:
        failures: list[Any] = []
        attempt = alices(group, failures)
        await attempt.receive(BOB, Chunk(**named(attempt), number=0, samples=1), bytes(5))
        attempt.contribute(Contribution(torch.ones(VALUES), 1))
        for _ in range(5):
            await asyncio.sleep(0)
        ((suspects, cause, detail),) = failures
        assert (suspects, cause) == ([BOB], AbortCause.BAD_CHUNK)
        assert f"has 5 bytes, not {4 * CHUNK_VALUES}" in detail
        attempt.close()
