"""What a carrier brings to be held to the contract of `swarm.port`, and a handler that keeps what it gets.

A carrier is a function that tells a story: it makes a `Fabric`, runs `story(fabric)` on an event loop of its
choice (`memory` may take one with a virtual clock) and closes the fabric.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from p2ptrain.errors import Refused
from p2ptrain.records import (
    Ask,
    Averaged,
    Ballot,
    Chunk,
    GetRun,
    Message,
    PeerId,
    Piece,
    Position,
    Presence,
    Refusal,
    Reply,
    Request,
)
from p2ptrain.swarm.port import Buffer, Swarm

RUN = "1" * 64
OTHER_RUN = "2" * 64


class Fabric(Protocol):
    """A network that peers can join and be torn from."""

    async def join(self, name: str, fingerprint: str = RUN) -> Swarm:
        """A started peer; the same name again, after it left or was killed, is the same peer id again."""
        ...

    async def leave(self, swarm: Swarm) -> None:
        """It ends as it should."""
        ...

    async def kill(self, swarm: Swarm) -> None:
        """It ends as by `kill -9`."""
        ...

    async def aclose(self) -> None:
        """All that are left leave."""
        ...


Story = Callable[[Fabric], Awaitable[None]]
Carrier = Callable[[Story, Path], None]
"""Tells the story; the path is an empty folder."""


class Recorder:
    """A `Handler` that keeps what arrives, in order."""

    def __init__(self) -> None:
        self.messages: list[tuple[PeerId, Message]] = []
        self.chunks: list[tuple[PeerId, Chunk | Averaged, bytes]] = []
        self.links: list[tuple[PeerId, bool]] = []
        self.requests: list[tuple[PeerId, Request]] = []
        self.answer: Callable[[Request], Awaitable[tuple[Reply, Buffer]]] = give_nothing
        self.gate = asyncio.Event()
        """While it is not set, `on_chunk` does not return."""
        self.gate.set()
        self._changed = asyncio.Event()

    def on_message(self, sender: PeerId, message: Message) -> None:
        self.messages.append((sender, message))
        self._changed.set()

    async def on_chunk(self, sender: PeerId, header: Chunk | Averaged, payload: Buffer) -> None:
        self.chunks.append((sender, header, bytes(payload)))
        self._changed.set()
        await self.gate.wait()

    def place(self, sender: PeerId, header: Chunk | Averaged, size: int) -> memoryview | None:
        return None

    def on_link(self, peer: PeerId, up: bool) -> None:
        self.links.append((peer, up))
        self._changed.set()

    async def on_request(self, sender: PeerId, request: Request) -> tuple[Reply, Buffer]:
        self.requests.append((sender, request))
        self._changed.set()
        return await self.answer(request)

    async def until(self, condition: Callable[[Recorder], object], seconds: float = 10.0) -> None:
        """Wait until what has arrived fulfils the condition."""
        async with asyncio.timeout(seconds):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()


async def give_nothing(request: Request) -> tuple[Reply, Buffer]:
    return Refusal(reason="I have nothing"), b""


async def give_run(request: Request) -> tuple[Reply, Buffer]:
    """What a bootstrap peer answers."""
    return (Piece(), b"the run") if isinstance(request, GetRun) else (Refusal(reason="only the run"), b"")


def recorded(swarm: Swarm) -> Recorder:
    """A recorder that serves this peer."""
    recorder = Recorder()
    swarm.serve(recorder)
    return recorder


def ask(step: int) -> Ask:
    """A control message that can be told from others."""
    return Ask(position=Position(step=step, lineage=RUN, weight=0))


def steps(messages: Sequence[tuple[PeerId, Message]]) -> list[int]:
    """Of the `ask` messages among these."""
    return [message.position.step for _, message in messages if isinstance(message, Ask)]


def chunk(leader: PeerId, number: int) -> Chunk:
    ballot = Ballot(number=1, leader=leader)
    return Chunk(step=0, parent="e" * 64, ballot=ballot, freeze="f" * 64, number=number, samples=1)


def presence(peer: PeerId, fingerprint: str = RUN, step: int = 0) -> Presence:
    return Presence(
        peer=peer,
        role="train",
        name=f"peer {peer[-4:]}",
        protocol=1,
        fingerprint=fingerprint,
        incarnation="1",
        position=Position(step=step, lineage=fingerprint, weight=0),
    )


async def arrives(swarm: Swarm, to: PeerId, recorder: Recorder, step: int) -> None:
    """Say `ask(step)` until it is heard: after a fault, one message may still be lost."""
    async with asyncio.timeout(10):
        while step not in steps(recorder.messages):
            swarm.send(to, ask(step))
            await asyncio.sleep(0.05)


async def is_refused(swarm: Swarm, to: PeerId, request: Request) -> str:
    """The reason for which this request is refused."""
    try:
        reply, _ = await swarm.request(to, request, timeout_seconds=10, max_bytes=2**20)
    except Refused as fault:
        return str(fault)
    raise AssertionError(f"{reply!r} in place of a refusal")
