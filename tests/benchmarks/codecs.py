"""What each codec costs and what it saves: bytes, speed, error, and the loss at equal steps against fp32.

    python tests/benchmarks/codecs.py [--steps 300] [--seeds 3] [--json]

Loss is that of the built-in task, held out, of a small model. All peers of the swarm are in one process:
the accumulators, codecs, means and what is owed of `p2ptrain.gradients`, and one replica that applies the
entries, since all would be equal. All codecs train on the same samples from the same parameters, so a
difference is the codec's, beside the noise that any change of the last bit brings: `--seeds` tells how much.

Speed is of chunks of the default size, on one core: each is read from memory, encoded, and decoded at once,
as a reducer does. It is CPU time, which a busy machine disturbs less.

Not covered: the network, and aborted attempts, which by design change nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from p2ptrain.config import BytesTask, RunConfig, Schedule
from p2ptrain.gradients.accumulator import Accumulator, Sent
from p2ptrain.gradients.aggregation import mean_chunk, squared_norm
from p2ptrain.gradients.codecs import CODECS, Codec
from p2ptrain.gradients.feedback import Owed
from p2ptrain.protocol.spans import chunk_ranges, share_out
from p2ptrain.records import Ballot, EntryHeader, PeerId
from p2ptrain.replica.log import Entry, entry_digest
from p2ptrain.replica.replica import Replica
from p2ptrain.tasks import Task, build_task
from peers.bench_peer import codec_speed

SAMPLES = (6, 2, 5, 3)
"""Of each peer in each step: uneven, as in a swarm."""
EVALUATIONS = 5
"""Held-out loss is the mean of so many, over the last tenth of the steps."""
SPEED_VALUES = 2**24
REPEATS = 7


# -- training ------------------------------------------------------------------------------------------------


class SimulatedSwarm:
    """Peers that average and step as a swarm does, without a network between them."""

    def __init__(self, run: RunConfig, task: Task, codec: Codec) -> None:
        self.run, self.task, self.codec = run, task, codec
        self.replica = Replica(task.build_model(run.seed), run, "0" * 64)
        self.peers = tuple(PeerId(f"peer{number}") for number in range(len(SAMPLES)))
        self.accumulators = [Accumulator(self.replica.numel) for _ in self.peers]
        self.owed = [Owed(codec) for _ in self.peers]
        self.payload_bytes = 0

    def step(self) -> None:
        """One round in which everybody takes part, and everyone's step."""
        for peer, samples, accumulator in zip(self.peers, SAMPLES, self.accumulators, strict=True):
            accumulator.add(self._gradient(peer, samples), samples)
        spans = share_out(self.replica.numel, [1.0] * len(self.peers))
        self.owed = [owed.moved(*span) for owed, span in zip(self.owed, pairwise(spans), strict=True)]

        chunks: list[bytes] = []
        norms = []
        sent: list[list[Sent]] = [[] for _ in self.peers]
        for owed, span in zip(self.owed, pairwise(spans), strict=True):
            norms.append(0.0)
            for start, stop in chunk_ranges(*span, self.run.chunk_values):
                parts = []
                for accumulator, mine in zip(self.accumulators, sent, strict=True):
                    mine.append((start, stop, self.codec.encode(accumulator.total[start:stop])))
                    parts.append(torch.empty(stop - start))
                    self.codec.decode(mine[-1][2], parts[-1])
                encoded, decoded = owed.encode(start, mean_chunk(parts, SAMPLES))
                chunks.append(encoded)
                norms[-1] += squared_norm(decoded)
        header = EntryHeader(
            step=self.replica.position.step,
            parent=self.replica.position.lineage,
            ballot=Ballot(number=0, leader=self.peers[0]),
            roster=self.peers,
            samples=SAMPLES,
            spans=spans,
            squared_norms=tuple(norms),
            digest=entry_digest(chunks),
        )
        entry = Entry(header, b"".join(chunks))
        self.payload_bytes = len(entry.payload)
        self.replica.apply(entry)
        for accumulator, mine in zip(self.accumulators, sent, strict=True):
            accumulator.settle(self.codec, mine)

    def _gradient(self, peer: PeerId, samples: int) -> Tensor:
        self.replica.gradient.zero_()
        batch = self.task.batch(self.replica.position.step, peer, 0, samples)
        self.task.loss_sum(self.replica.model, batch).backward()  # type: ignore[no-untyped-call]
        return self.replica.gradient


def forgetful(codec: Codec) -> Codec:
    """The same codec, but what it loses is lost."""
    forgetting: Codec = type("Forgetful", (type(codec),), {"feedback": False})()
    return forgetting


def trained(run: RunConfig, task: Task, codec: Codec, steps: int) -> dict[str, Any]:
    """Held-out loss after so many steps, and the codec's error on the gradient of the last one."""
    swarm = SimulatedSwarm(run, task, codec)
    every = max(steps // (10 * EVALUATIONS), 1)
    at = {steps - every * number for number in range(EVALUATIONS)}
    losses = []
    for step in range(1, steps + 1):
        swarm.step()
        if step in at:
            losses.append(task.evaluate(swarm.replica.model)["loss"])
    gradient = swarm._gradient(swarm.peers[0], 16)
    return {"loss": statistics.fmean(losses), "bytes": swarm.payload_bytes} | errors(
        codec, gradient, run.chunk_values
    )


def errors(codec: Codec, values: Tensor, chunk_values: int) -> dict[str, float]:
    """Of one encoding: ‖decoded - x‖ / ‖x‖ in all, and the worst |decoded - x| / largest |x| of its chunk."""
    out = torch.empty_like(values)
    worst = 0.0
    for start, stop in chunk_ranges(0, len(values), chunk_values):
        chunk, decoded = values[start:stop], out[start:stop]
        codec.decode(codec.encode(chunk), decoded)
        if chunk.any():
            worst = max(worst, float((decoded - chunk).abs().max() / chunk.abs().max()))
    return {"relative_error": float((out - values).norm() / values.norm()), "worst_error": worst}


def losses(codecs: Sequence[str], steps: int, seeds: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """For each codec, with and without feedback: the loss of every seed, and how far it is above fp32's."""
    variants = {name: CODECS[name] for name in ("fp32", *(each for each in codecs if each != "fp32"))}
    variants |= {
        f"{name} without feedback": forgetful(codec) for name, codec in variants.items() if codec.feedback
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for seed in range(seeds):
        for name, codec in variants.items():
            run = RunConfig(
                seed=seed,
                codec=codec.name,
                target_batch_size=sum(SAMPLES),
                task=BytesTask(layers=2, width=64, heads=4, context=64),
                schedule=Schedule(warmup_steps=min(50, steps // 2)),
            )
            found[name].append(trained(run, build_task(run), codec, steps))
            tell(f"seed {seed}: {name:24} loss {found[name][-1]['loss']:.4f}")
    exact = [each["loss"] for each in found["fp32"]]
    report = {}
    for name, runs in found.items():
        mine = [each["loss"] for each in runs]
        gaps = [loss / fp32 - 1 for loss, fp32 in zip(mine, exact, strict=True)]
        report[name] = {
            "loss": [round(loss, 4) for loss in mine],
            "loss_gap_percent": round(100 * statistics.fmean(gaps), 3),
            "loss_gap_stderr_percent": round(100 * statistics.stdev(gaps) / math.sqrt(seeds), 3)
            if seeds > 1
            else None,
            "payload_bytes": runs[0]["bytes"],
            "relative_error": float(f"{max(each['relative_error'] for each in runs):.3g}"),
            "worst_error": float(f"{max(each['worst_error'] for each in runs):.3g}"),
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes, speed, error and loss of every codec.")
    parser.add_argument("--steps", type=int, default=300, help="0: no loss, only speed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--codecs", default=",".join(CODECS), help="names, separated by commas")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    chosen = parser.parse_args()
    names = chosen.codecs.split(",")
    if unknown := [name for name in names if name not in CODECS]:
        parser.error(f"there is no codec {unknown[0]!r}; there are {', '.join(CODECS)}")
    torch.set_num_threads(1)
    chunk_values = RunConfig().chunk_values

    report: dict[str, Any] = {"steps": chosen.steps, "seeds": chosen.seeds, "chunk_values": chunk_values}
    report["load_before"] = round(os.getloadavg()[0], 1)
    report["speed"] = {name: codec_speed(CODECS[name], chunk_values, SPEED_VALUES, REPEATS) for name in names}
    if chosen.steps:
        report["training"] = losses(
            names, chosen.steps, chosen.seeds, lambda line: print(line, file=sys.stderr, flush=True)
        )
    if chosen.json:
        print(json.dumps(report))
        return
    for what in ("speed", "training"):
        for name, row in report.get(what, {}).items():
            print(f"  {name:24}", *(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
