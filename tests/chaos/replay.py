"""A recorded round, reduced again in shuffled arrival orders: it must give the same bytes each time (row 40).

    python -m tests.chaos.replay --orders 100 --json

Whole trainers on the memory swarm train the built-in model, and all that each member of one round was given
is kept: chunks, averaged chunks, its own contribution. A fresh production `Attempt` per member then gets that
in another order, and must send and hold what it did the first time.

Not covered: other kernels than this machine's (see `tests/unit/test_kernels.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import torch

from p2ptrain import allreduce
from p2ptrain.allreduce import Attempt, Contribution
from p2ptrain.config import BytesTask, RunConfig
from p2ptrain.gradients.aggregation import AGGREGATIONS
from p2ptrain.gradients.codecs import CODECS
from p2ptrain.gradients.reducing import Scratch
from p2ptrain.records import Averaged, PeerId
from p2ptrain.swarm import clock
from p2ptrain.swarm.memory import MemoryHub
from p2ptrain.tasks import build_task
from tests.swarm.training import Training

PACES = ((3, 0.1), (5, 0.17), (2, 0.05), (7, 0.4), (1, 0.03), (4, 0.2))
"""(samples, virtual seconds) of each peer's micro-batches: no two bring the same."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """What came of one codec's and one rule's replays."""

    codec: str
    aggregation: str
    members: int
    values: int
    samples: tuple[int, ...]
    orders: int
    identical: int
    """Orders in which every member sent and held what it did when the round was recorded, byte for byte."""
    seconds: float


class Recorded(Attempt):
    """A production attempt that keeps what it is given and what it says."""

    made: list[Recorded]

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.contribution: Contribution | None = None
        self.given: list[tuple[PeerId, Any, bytes]] = []
        super().__init__(*arguments)
        Recorded.made.append(self)

    def contribute(self, contribution: Contribution) -> None:
        self.contribution = Contribution(contribution.total.clone(), contribution.samples)
        super().contribute(contribution)

    async def receive(self, sender: PeerId, header: Any, payload: Any) -> None:
        if sender != self._me:
            self.given.append((sender, header, bytes(payload)))
        await super().receive(sender, header, payload)

    def outcome(self) -> str:
        """Digest of the averaged chunks that it sent, the header that it would commit, and the bytes that it
        holds."""
        assert self.header is not None, "the attempt did not come to its end"
        sha = hashlib.sha256()
        for to, outbox in sorted(self._outboxes.items()):
            said = [frame for frame in outbox.frames if isinstance(frame[0], Averaged)]
            for header, payload in sorted(said, key=lambda frame: frame[0].number):
                sha.update(f"{to} {header.model_dump_json()} {len(payload)}\n".encode())
                sha.update(payload)
        sha.update(self.header.model_dump_json().encode())
        sha.update(self.payload())
        return sha.hexdigest()


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """All attempts that anyone begins meanwhile, in order."""
    Recorded.made = []
    allreduce.Attempt, before = Recorded, allreduce.Attempt
    try:
        yield Recorded.made
    finally:
        allreduce.Attempt = before


def recorded_round(run: RunConfig, peers: int, seed: int) -> list[Recorded]:
    """Every member's side of one committed round that all of these peers were in."""

    async def story() -> list[Recorded]:
        training = Training(MemoryHub(seed), run)
        training.task = build_task(run)
        async with training:
            for number, (samples, seconds) in enumerate(PACES[:peers]):
                training.start(f"peer{number}", micro_batch_size=samples, batch_seconds=seconds)
            await training.until(lambda: complete(peers))
        return complete(peers)

    with recording():
        return clock.run(story())


def complete(peers: int) -> list[Recorded]:
    """The members of the first round that so many came to the end of, each with samples; empty if none is."""
    sides: dict[str, list[Recorded]] = {}
    for each in Recorded.made:
        if each.header is not None and min(each.header.samples) > 0:
            sides.setdefault(each.header.digest, []).append(each)
    return next((members for members in sides.values() if len(members) == peers), [])


class _Mute:
    """A swarm that carries nothing anywhere."""

    def __init__(self, peer_id: PeerId) -> None:
        self.peer_id = peer_id

    @property
    def delivered_bytes(self) -> int:
        return 0

    async def send_chunk(self, to: PeerId, header: Any, payload: Any) -> None:
        """Gone."""


async def reduced_again(member: Recorded, chance: Random) -> str:
    """What this member says and holds when the same things come in another order."""
    told, swarm, *terms, _spawn, work, _scratch, _memory, evidence, _held, _failed, proven, last, leases = (
        member.arguments
    )
    told = copy.copy(told)
    told._means = {}  # it has heard of none yet
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    Recorded.made = []
    attempt = Recorded(
        told,
        _Mute(swarm.peer_id),
        *terms,
        asyncio.get_running_loop().create_task,
        work,
        Scratch(),
        None,
        evidence,
        lambda header, seconds: ended.set_result(""),
        lambda suspects, cause, detail: ended.set_result(f"{cause}: {detail}"),
        proven,
        last,
        leases,
    )
    inputs: list[Any] = [member.contribution, *member.given]
    chance.shuffle(inputs)
    try:
        for each in inputs:
            if isinstance(each, Contribution):
                attempt.contribute(each)
            else:
                await attempt.receive(*each)
            if chance.random() < 0.5:  # what came so far may be worked on, or more may come first
                await asyncio.sleep(0)
        failure = await asyncio.wait_for(ended, 60)
        assert not failure, f"an attempt that went well before failed: {failure}"
        return attempt.outcome()
    finally:
        attempt.close()


def replay(members: Sequence[Recorded], run: RunConfig, orders: int, seed: int) -> Figures:
    """Reduce each member's side of the round in so many orders."""
    began = time.monotonic()
    expected = [member.outcome() for member in members]

    async def again(order: int) -> list[str]:
        chance = Random(f"{seed}/{order}")
        return [await reduced_again(member, chance) for member in members]

    async def all_orders() -> int:
        return sum([await again(order) == expected for order in range(orders)])

    identical = asyncio.run(all_orders())
    header = members[0].header
    assert header is not None
    return Figures(
        codec=run.codec,
        aggregation=run.aggregation,
        members=len(members),
        values=header.spans[-1],
        samples=header.samples,
        orders=orders,
        identical=identical,
        seconds=round(time.monotonic() - began, 2),
    )


def every_way(
    orders: int,
    *,
    peers: int = 4,
    seed: int = 0,
    width: int = 128,
    chunk_values: int = 16_384,
    codecs: Sequence[str] = tuple(sorted(CODECS)),
) -> list[Figures]:
    """Record a round and replay it, with each of these codecs and the mean; and in a tenth of the orders with
    each other rule in fp32, which hides no difference."""
    found = []
    torch.set_num_threads(1)
    ways = [(codec, "mean", orders) for codec in codecs]
    ways += [("fp32", name, -(-orders // 10)) for name in AGGREGATIONS if name != "mean"]
    for codec, aggregation, times in ways:
        run = RunConfig(
            run_id="replay",
            codec=codec,
            aggregation=aggregation,
            target_batch_size=64,
            chunk_values=chunk_values,
            task=BytesTask(layers=1, width=width, heads=4, context=32),
        )
        found.append(replay(recorded_round(run, peers, seed), run, times, seed))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--orders", type=int, default=100)
    parser.add_argument("--peers", type=int, default=4, choices=range(2, len(PACES) + 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    given = parser.parse_args()
    figures = every_way(given.orders, peers=given.peers, seed=given.seed)
    for each in figures:
        what = f"{each.members} members, {each.values:,} values, {each.samples} samples"
        same = f"{each.identical} of {each.orders} orders byte-identical"
        print(f"{each.codec}, {each.aggregation}: {same} ({what})")
    if given.json:
        print(json.dumps([dataclasses.asdict(each) for each in figures]))
    if any(each.identical != each.orders for each in figures):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
