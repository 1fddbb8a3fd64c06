"""One of the peers that `p2ptrain bench` starts: goes through all measurements, and prints a line for each.

What it drives is what trains elsewhere, `Peer` on a `Libp2pSwarm`, with a task that computes next to nothing,
so that steps are rounds. Peers need no conductor: a round waits for all of them, and who is first in each
measurement leaves its address in the folder that they share.

Not covered: training, and rounds whose chunks went another way than over TLS; those are not counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from p2ptrain import PROTOCOL_VERSION, events
from p2ptrain.config import Optimizer, PeerConfig, RunConfig, Schedule, fingerprint
from p2ptrain.errors import Unreachable
from p2ptrain.gradients.codecs import CODECS, Codec
from p2ptrain.gradients.devices import CPU
from p2ptrain.gradients.engine import Engine
from p2ptrain.protocol.forecast import Links
from p2ptrain.protocol.spans import chunk_ranges
from p2ptrain.records import Averaged, Ballot, Chunk, Message, PeerId, Presence, Reply, Request
from p2ptrain.replica.flat import parameter_table
from p2ptrain.replica.replica import Replica
from p2ptrain.swarm.libp2p import Libp2pSwarm
from p2ptrain.swarm.port import Buffer
from p2ptrain.trainer import Peer, train
from peers.plan import plan
from peers.volunteer import threads

logger = logging.getLogger("p2ptrain")

TINY_VALUES = 1000
TINY_STEPS = 120
WARMUP_STEPS = 3
COUNTED_STEPS = 7
"""For each codec."""
CODEC_VALUES = 2**22
CODEC_REPEATS = 3
TLS_BYTES = 2**27
TLS_CHUNK_BYTES = 2**18
ENTRY_SECONDS = 60.0
"""For the first peer of a measurement to be there."""
MEET_SECONDS = 20.0
"""For a TLS connection to be made."""
OWN_SAMPLES = 2
SPARE_SECONDS = 1.0
"""For the others' samples of a step, at most."""
TLS_SECONDS = 60.0
"""For all bytes over it."""
NOBODYS_RUN = "1" * 64
"""Fingerprint of none."""
GREET_SECONDS = 5.0
"""Less than a training peer's record lives: of two, the DHT keeps the one that lives longer."""
POLL_SECONDS = 0.02
LEAVE_SECONDS = 10.0
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


async def take_part(
    folder: Path, number: int, peers: int, values: int, codecs: list[str], links: list[Links]
) -> None:
    """Everything that peer `number` of `peers` does, with gradients of `values`; `links` are forecast."""
    torch.set_num_threads(1)
    if number == 0:  # the others wait for its address meanwhile, and so leave it a core
        speeds = {name: codec_speed(CODECS[name], RunConfig().chunk_values) for name in codecs}
        say("codecs", speeds=speeds)
        say("plans", plans=_plans(peers, links))
    if peers > 1 and number < 2:
        await _send_or_receive(folder, number)
    for what, codec, size, steps in (
        ("tiny", "fp16", TINY_VALUES, TINY_STEPS),
        *((name, name, values, WARMUP_STEPS + COUNTED_STEPS) for name in codecs),
    ):
        say(what, rounds=await _rounds(folder, number, peers, what, codec, size, steps))


def say(what: str, **found: Any) -> None:
    """One line for the command that started this."""
    print(json.dumps({"what": what, **found}), flush=True)


# -- alone ---------------------------------------------------------------------------------------------------


def codec_speed(
    codec: Codec, chunk_values: int, values: int = CODEC_VALUES, repeats: int = CODEC_REPEATS
) -> dict[str, float]:
    """Bytes per value, and GB/s of float32 that one core encodes, decodes, and both: medians.

    Of chunks that are read from memory, encoded, and decoded at once, as a reducer does. It is CPU time,
    which a busy machine disturbs less.
    """
    before = torch.randn(values, generator=torch.Generator().manual_seed(0)).mul_(1e-3)
    after = torch.empty_like(before)
    encode, decode, size = [0.0] * repeats, [0.0] * repeats, 0
    for repeat in range(repeats):
        for start, stop in chunk_ranges(0, values, chunk_values):
            began = time.thread_time()
            data = codec.encode(before[start:stop])
            between = time.thread_time()
            codec.decode(data, after[start:stop])
            encode[repeat] += between - began
            decode[repeat] += time.thread_time() - between
            size += len(data)
    both = [first + second for first, second in zip(encode, decode, strict=True)]
    return {
        "bytes_per_value": round(size / repeats / values, 4),
        **{
            f"{what}_gigabytes_per_second": round(4 * values / statistics.median(seconds) / 1e9, 2)
            for what, seconds in (("encode", encode), ("decode", decode), ("both", both))
        },
    }


def _plans(peers: int, links: list[Links]) -> list[dict[str, Any]]:
    """Of the default run over each of these, with what a peer computes here."""
    run, tokens_per_second, plans = RunConfig(), 0.0, []
    for each in links:
        plans.append(plan(run, peers, each, tokens_per_second, PeerConfig()))
        tokens_per_second = plans[0].samples_per_second * run.task.tokens_per_sample
    return [asdict(each) for each in plans]


# -- two of them ---------------------------------------------------------------------------------------------


class _Counting:
    """A handler that counts what arrives, and notes when all has."""

    def __init__(self, expected_bytes: int) -> None:
        self._missing = expected_bytes
        self.ended: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def on_message(self, sender: PeerId, message: Message) -> None:
        """Nothing is agreed here."""

    async def on_chunk(self, sender: PeerId, header: Chunk | Averaged, payload: Buffer) -> None:
        if header.step:  # step 0 is to get acquainted
            self._missing -= len(payload)
        if self._missing <= 0 and not self.ended.done():
            self.ended.set_result(time.monotonic())

    def place(self, sender: PeerId, header: Chunk | Averaged, size: int) -> memoryview | None:
        return None

    def on_link(self, peer: PeerId, up: bool) -> None:
        """A link that breaks shows as `Unreachable`, or as a deadline."""

    async def on_request(self, sender: PeerId, request: Request) -> tuple[Reply, Buffer]:
        raise AssertionError("nobody asks here")


async def _send_or_receive(folder: Path, number: int) -> None:
    """Peer 1 sends to peer 0, over the connection that chunks take; both say when on one clock."""
    async with _swarm(folder, number, "tls", NOBODYS_RUN) as swarm:
        counting = _Counting(TLS_BYTES)
        swarm.serve(counting)
        (other,) = await _acquainted(swarm, NOBODYS_RUN, 2)
        if number == 0:
            async with asyncio.timeout(2 * TLS_SECONDS):
                say("tls", ended=await counting.ended)
            (folder / "tls-over").touch()
            return
        payload, deadline = bytes(TLS_CHUNK_BYTES), time.monotonic() + MEET_SECONDS

        async def send(step: int) -> None:
            header = Chunk(
                step=step,
                parent=NOBODYS_RUN,
                ballot=Ballot(number=1, leader=swarm.peer_id),
                freeze=NOBODYS_RUN,
                number=0,
                samples=1,
            )
            await swarm.send_chunk(other, header, payload)

        while not swarm.carriers.get(events.Carrier.TLS):
            await send(0)
            await _pause("a TLS connection between two peers on this machine", deadline)
        began = time.monotonic()
        for _ in range(TLS_BYTES // TLS_CHUNK_BYTES):
            await send(1)
        say("tls", began=began, bytes=TLS_BYTES)
        while not (folder / "tls-over").exists():
            await _pause("the end of the transfer", began + TLS_SECONDS)


async def _pause(awaited: str, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise Unreachable(f"{awaited} did not come in time; is this machine overloaded?")
    await asyncio.sleep(POLL_SECONDS)


async def _acquainted(swarm: Libp2pSwarm, print_: str, peers: int) -> list[PeerId]:
    """The others, once all know where each takes TLS connections."""
    me = Presence(
        peer=swarm.peer_id,
        role="train",
        name="",
        protocol=PROTOCOL_VERSION,
        fingerprint=print_,
        incarnation="",
        position=None,
    )
    deadline = time.monotonic() + MEET_SECONDS
    while True:
        await swarm.publish(me, ttl_seconds=GREET_SECONDS)
        found = {record.peer for record in await swarm.lookup("presence")} - {swarm.peer_id}
        if len(found) == peers - 1:
            return sorted(found)
        await _pause("the presence records of all peers", deadline)


# -- all of them ---------------------------------------------------------------------------------------------


class _Weights(nn.Module):
    """So many values, which are the whole model."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(values))


class _Noise:
    """A task whose gradient is the same noise every time, so that computing it takes next to nothing.

    Of each step a peer computes `OWN_SAMPLES` at once, and at one more until a round begins, or for
    `SPARE_SECONDS`.
    """

    note = shared_note = ""

    def __init__(self, values: int, seed: int) -> None:
        self._noise = torch.randn(values, generator=torch.Generator().manual_seed(seed)).mul_(1e-3)
        self.may_begin = threading.Event()
        """Unset while the last step's state is still being hashed, which computing outlasts in training."""
        self.is_over: Callable[[], bool] = lambda: True

    def build_model(self, seed: int) -> nn.Module:
        return _Weights(len(self._noise))

    def batch(self, step: int, peer: str, first: int, count: int) -> Tensor:
        self.may_begin.wait(ENTRY_SECONDS)
        deadline = time.monotonic() + SPARE_SECONDS
        while first >= OWN_SAMPLES and not self.is_over() and time.monotonic() < deadline:
            time.sleep(0.0002)
        return self._noise

    def loss_sum(self, model: nn.Module, batch: Tensor) -> Tensor:
        assert isinstance(model, _Weights)
        return torch.dot(model.values, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": 0.0}

    def preview(
        self, model: nn.Module, prompt: str, length: int, generator: torch.Generator, temperature: float = 0.7
    ) -> str:
        return ""


@dataclass
class _Diary:
    """When each round of this peer was where, on the clock that all processes here share."""

    task: _Noise
    swarm: Libp2pSwarm
    rounds: list[dict[str, float]] = field(default_factory=list)

    def observe(self, event: events.Event) -> None:
        logger.log(event.level, event.sentence())
        match event:
            case events.StateHashed():
                self.task.may_begin.set()
            case events.RoundCommitted():
                self.task.may_begin.clear()
                applied = time.monotonic()
                held = applied - event.apply_seconds - event.commit_seconds
                self.rounds.append(
                    {
                        "step": event.step,
                        "sealed": held - event.reduce_seconds,
                        "held": held,
                        "applied": applied,
                        "samples": event.mine,
                        "peers": event.peers,
                        "peers_over_tls": self.swarm.carriers.get(events.Carrier.TLS, 0),
                    }
                )


async def _rounds(
    folder: Path, number: int, peers: int, what: str, codec: str, values: int, steps: int
) -> list[dict[str, float]]:
    """All rounds of a run of so many steps that no peer makes alone."""
    run = RunConfig.model_validate(
        {
            "run_id": f"bench-{what}",
            "total_steps": steps,
            "target_batch_size": (OWN_SAMPLES + 1) * (peers - 1) + 1,  # no fewer than all peers have so many
            "min_peers": peers,
            "max_peers": peers,
            "codec": codec,
            "optimizer": Optimizer(kind="sgd", lr=1e-3),
            "schedule": Schedule(warmup_steps=0),
        }
    )
    config = PeerConfig(
        micro_batch_size=1, eval_every_steps=0, checkpoint_every_steps=0, log_megabytes=1, listen=LOOPBACK
    )
    with contextlib.ExitStack() as stack:
        thread, waiting = threads(stack, "compute", 1), 0

        async def compute(function: Callable[..., Any], *arguments: Any) -> Any:
            nonlocal waiting
            waiting += 1
            try:
                return await thread(function, *arguments)
            finally:
                waiting -= 1

        aside = threads(stack, "aside", 2)
        work = threads(stack, "reduce", 1)
        task = _Noise(values, number)
        model = task.build_model(run.seed)
        print_ = fingerprint(run, parameter_table(model))
        replica = Replica(model, run, print_)
        async with _swarm(folder, number, what, print_) as swarm:
            diary = _Diary(task, swarm)
            peer = Peer(
                swarm,
                run,
                config,
                task,
                replica,
                Engine(replica.model, replica.gradient, CPU, 1),
                fingerprint=print_,
                incarnation=str(number),
                compute=compute,
                aside=aside,
                work=work,
                observe=diary.observe,
            )
            task.is_over = lambda: peer.rounds.attempt is not None or waiting > 1
            await _acquainted(swarm, print_, peers)
            async with peer:
                await train(peer, run)
                await peer.see_off(LEAVE_SECONDS)
    return diary.rounds


@contextlib.asynccontextmanager
async def _swarm(folder: Path, number: int, what: str, print_: str) -> AsyncIterator[Libp2pSwarm]:
    """A swarm of its own for each measurement; the others enter it by peer 0."""
    address = folder / f"{what}-address"
    entries: list[str] = []
    if number:
        deadline = time.monotonic() + ENTRY_SECONDS
        while not address.exists():
            await _pause("the first peer of this measurement", deadline)
        entries = address.read_text().split()
    identity = folder / f"{what}-{number}.key"
    swarm = Libp2pSwarm(identity, f"bench-{what}", print_, entries, LOOPBACK, data_port=0)
    async with swarm:
        if not number:
            (folder / f"{what}-address.new").write_text(" ".join(swarm.visible_addresses()))
            (folder / f"{what}-address.new").rename(address)
        yield swarm
