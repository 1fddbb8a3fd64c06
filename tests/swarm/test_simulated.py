"""A simulated cell is what peers do: the same headers, and states that are equal bit for bit (T18)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from libp2p_fabric import LOOPBACK
from training import Regression, Trainer, Training, check_replicas

from p2ptrain import events
from p2ptrain.config import Optimizer, RunConfig
from p2ptrain.experiment.grid import Arm, Cell, Grid
from p2ptrain.experiment.simulate import Simulation
from p2ptrain.records import EntryHeader
from p2ptrain.swarm import clock
from p2ptrain.swarm.memory import MemoryHub

pytestmark = pytest.mark.swarm

ROUNDS = 10
MICRO_BATCH = 4
SYNC, APART, PARTS = Cell("sync", 3, 1), Cell("nesterov", 3, 4), Cell("union", 3, 4)
GRID = Grid(
    name="cell",
    samples=12_000,
    batch_size=24,
    peers=(3,),
    steps=(4,),
    seeds=(1,),
    rates=(0.01,),
    optimizer=Optimizer(clip_norm=1.0),
    arms=(
        Arm(name="sync", strategy="sync"),
        Arm(name="nesterov", outer_learning_rate=0.7, outer_momentum=0.6),
        Arm(name="union", strategy="partition", by="random", gamma="auto"),
    ),
)


def run_of(cell: Cell, codec: str = "fp32") -> RunConfig:
    run = GRID.model_copy(update={"codec": codec}).run(cell, 0.01, 1)
    fields: dict[str, Any] = {"chunk_values": 1024, "heartbeat_seconds": 0.5, "silence_seconds": 5.0}
    return run.model_copy(update=fields)


def check_simulated(run: RunConfig, lives: Sequence[Trainer]) -> None:
    """The same rounds again without a network; a header names the bytes that were averaged."""
    headers = lives[0].headers()[:ROUNDS]
    assert len(headers) == ROUNDS
    assert all(len(header.roster) == 3 for header in headers)
    assert sum(all(header.samples) for header in headers) > ROUNDS // 2
    simulation = Simulation(run, Regression(), headers[0].roster, MICRO_BATCH)
    for header in headers:
        for life, member in zip(lives, simulation.members, strict=True):
            # Who brought nothing to a round computes in smaller micro-batches for a while.
            member.micro_batch_size = life.batch_sizes.get(header.step, MICRO_BATCH)
        assert simulation.round(header.samples, header.spans, header.ballot) == header
        position = simulation.replica.position
        for life in lives:
            theirs = life.parameters[position.lineage]
            for member in simulation.members:
                assert torch.equal(member.replica.parameters.view(torch.int32), theirs.view(torch.int32))
    digest = simulation.replica.compute_state_digest()
    assert [life.state_digests()[position.lineage] for life in lives] == [digest for _ in lives]


@pytest.mark.parametrize(
    ("cell", "codec"),
    [(SYNC, "fp32"), (SYNC, "int8"), (APART, "fp16"), (APART, "lowrank"), (PARTS, "fp32")],
    ids=lambda value: value.arm if isinstance(value, Cell) else value,
)
def test_simulated_cell_is_three_peers_bit_for_bit(cell: Cell, codec: str) -> None:
    run = run_of(cell, codec)

    async def story() -> Sequence[Trainer]:
        async with Training(MemoryHub(1), run) as training:
            for name in ("anna", "bert", "carl"):
                training.start(name, micro_batch_size=MICRO_BATCH)
            await training.until_step(ROUNDS + 1)
            return training.lives

    lives = clock.run(story())
    assert check_replicas(lives)
    check_simulated(run, lives)


def test_one_sample_less_is_noticed_when_a_cell_is_compared() -> None:
    """The measure itself: a peer that brought one micro-batch less would have made another header."""
    run = run_of(SYNC)

    async def story() -> list[EntryHeader]:
        async with Training(MemoryHub(1), run) as training:
            for name in ("anna", "bert", "carl"):
                training.start(name, micro_batch_size=MICRO_BATCH)
            await training.until_step(2)
            return training.lives[0].headers()

    header = clock.run(story())[0]
    most = max(range(3), key=header.samples.__getitem__)
    fewer = [count - MICRO_BATCH * (rank == most) for rank, count in enumerate(header.samples)]
    simulation = Simulation(run, Regression(), header.roster, MICRO_BATCH)
    assert simulation.round(fewer, header.spans, header.ballot).digest != header.digest


class LoopbackHub:
    """Real peers in this process, over libp2p and TLS; each enters by those that are there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._swarms: list[Any] = []

    def swarm(self, name: str, fingerprint: str) -> Any:
        from p2ptrain.swarm.libp2p import Libp2pSwarm  # slow: not while pytest collects

        swarm = Libp2pSwarm(
            self._folder / name,
            "cell",
            fingerprint,
            initial_peers=[address for peer in self._swarms for address in peer.visible_addresses()],
            listen=LOOPBACK,
            data_port=0,
        )
        self._swarms.append(swarm)
        return swarm


@pytest.mark.long
@pytest.mark.parametrize("cell", [SYNC, APART], ids=lambda cell: cell.arm)
def test_simulated_cell_is_three_peers_on_loopback_bit_for_bit(cell: Cell, tmp_path: Path) -> None:
    run = run_of(cell, "fp16")

    async def story() -> Sequence[Trainer]:
        hub: Any = LoopbackHub(tmp_path)
        async with Training(hub, run) as training:
            for name in ("anna", "bert", "carl"):
                peer = training.start(name, micro_batch_size=MICRO_BATCH, batch_seconds=0.02)
                await training.until(lambda peer=peer: peer.of(events.Joined))
            await training.until_step(ROUNDS + 1)
            return training.lives

    lives = asyncio.run(story())
    check_simulated(run, lives)
