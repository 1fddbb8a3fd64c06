"""How fast one peer trains between rounds, beside the same training loop written by hand without p2ptrain.

    python tests/benchmarks/overhead.py [--task bytes] [--micro-batch 8] [--seconds 3] [--turns 9]

Both compute the gradients of the same model, on windows of the same text, so many at once, on one thread,
and add them up; neither steps. The peer is a whole one: event loop, libp2p daemon, compute thread, checks of
every gradient. They are two processes that train in turns, since the speed of a machine changes from minute
to minute: while one does, the other is stopped. Speeds are medians over the turns, ratios of neighbours'.

`wall` is what a volunteer sees on a quiet machine; `core`, samples per second of processor time of the whole
process, is disturbed less by what else runs, and counts what p2ptrain does on other threads, too.

Not covered: rounds (`round_latency.py`, `wan.py`, `memory.py`), devices other than the CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import psutil

TARGET_PERCENT = 95.0
WIDTHS = {"bytes": 128, "bytes-wide": 512}
"""What `--task` chooses: the default model (1 M parameters), and one of 16 M."""
SETTLE_SECONDS = 0.3
"""After a process goes on, before it is timed."""


def run_of(width: int) -> Any:
    from p2ptrain.config import BytesTask, RunConfig

    task = BytesTask(width=width, layers=2 if width == 128 else 4)
    return RunConfig(run_id="overhead", target_batch_size=2**24, task=task)


# -- one of the two ------------------------------------------------------------------------------------------


def by_hand(width: int, count: int, samples: Synchronized[int]) -> None:
    """What one writes who knows torch: random windows, forward, backward."""
    import torch
    import torch.nn.functional as F

    from p2ptrain.tasks.bytes import ByteTransformer
    from p2ptrain.tasks.corpus import load_corpus

    torch.set_num_threads(1)
    run = run_of(width)
    context = run.task.context
    text = load_corpus("stdlib", holdout=run.task.holdout, context=context).train
    model = ByteTransformer(run.task, run.seed)
    offsets = torch.arange(context + 1)
    while True:
        starts = torch.randint(len(text) - context, (count, 1))
        batch = text[starts + offsets].long()
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        samples.value += count


def as_peer(width: int, count: int, samples: Synchronized[int]) -> None:
    """A whole peer that never fills its batch."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(asyncio.CancelledError):
        asyncio.run(_peer(Path(folder), width, count, samples))


async def _peer(folder: Path, width: int, count: int, samples: Synchronized[int]) -> None:
    from p2ptrain import events
    from p2ptrain.config import PeerConfig, fingerprint
    from p2ptrain.gradients.devices import CPU
    from p2ptrain.gradients.engine import Engine
    from p2ptrain.replica.flat import parameter_table
    from p2ptrain.replica.replica import Replica
    from p2ptrain.swarm.libp2p import Libp2pSwarm
    from p2ptrain.tasks import build_task
    from p2ptrain.trainer import Peer, train
    from peers.volunteer import threads

    run = run_of(width)
    task = build_task(run)
    model = task.build_model(run.seed)
    print_ = fingerprint(run, parameter_table(model))
    replica = Replica(model, run, print_)
    config = PeerConfig(micro_batch_size=count, eval_every_steps=0, checkpoint_every_steps=0)
    swarm = Libp2pSwarm(folder / "key", run.run_id, print_, [], ["/ip4/127.0.0.1/tcp/0"], data_port=0)

    def watch(event: events.Event) -> None:
        if isinstance(event, events.RoundCommitted):
            raise AssertionError("a round was committed, but what is measured is between rounds")

    with contextlib.ExitStack() as stack:
        async with swarm:
            peer = Peer(
                swarm,
                run,
                config,
                task,
                replica,
                Engine(replica.model, replica.gradient, CPU, count),
                fingerprint=print_,
                incarnation="overhead",
                compute=threads(stack, "compute", 1),
                aside=threads(stack, "aside", 2),
                work=threads(stack, "reduce", 1),
                observe=watch,
            )
            async with peer:
                training = asyncio.create_task(train(peer, run))
                while not training.done():
                    samples.value = peer.gathered.samples
                    await asyncio.sleep(0.01)
                await training


# -- in turns ------------------------------------------------------------------------------------------------


class Contender:
    """One of the two, stopped but for its turns."""

    def __init__(self, target: Any, width: int, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._samples: Synchronized[int] = context.Value("q", 0, lock=False)  # type: ignore[assignment]
        self._process = context.Process(target=target, args=(width, count, self._samples))
        self._process.start()
        assert self._process.pid is not None
        self._pid = self._process.pid
        self._times = psutil.Process(self._pid)
        self.wall: list[float] = []
        self.core: list[float] = []

    def warm_up(self, least: int) -> None:
        deadline = time.monotonic() + 120
        while self._samples.value < least:
            if time.monotonic() > deadline or not self._process.is_alive():
                raise SystemExit("overhead: a contender did not begin to train within two minutes")
            time.sleep(0.1)
        os.kill(self._pid, signal.SIGSTOP)

    def turn(self, seconds: float) -> None:
        os.kill(self._pid, signal.SIGCONT)
        time.sleep(SETTLE_SECONDS)
        began, before, busy = time.monotonic(), self._samples.value, self._cpu_seconds()
        time.sleep(seconds)
        took, done = time.monotonic() - began, self._samples.value - before
        self.wall.append(done / took)
        self.core.append(done / (self._cpu_seconds() - busy))
        os.kill(self._pid, signal.SIGSTOP)

    def _cpu_seconds(self) -> float:
        times = self._times.cpu_times()
        return float(times.user + times.system)

    def end(self) -> None:
        """The libp2p daemon of a peer goes with it."""
        self._process.kill()
        os.kill(self._pid, signal.SIGCONT)
        self._process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--task", choices=WIDTHS, default="bytes")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one turn")
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or both would be left behind
    width = WIDTHS[options.task]
    hand, peer = (Contender(target, width, options.micro_batch) for target in (by_hand, as_peer))
    try:
        for contender in (hand, peer):
            contender.warm_up(3 * options.micro_batch)
        for number in range(options.turns):
            print(f"turn {number + 1} of {options.turns}", file=sys.stderr, flush=True)
            for contender in (hand, peer) if number % 2 else (peer, hand):
                contender.turn(options.seconds)
    finally:
        for contender in (hand, peer):
            contender.end()
    ratios = {
        name: statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        for name, ours, theirs in (("wall", peer.wall, hand.wall), ("core", peer.core, hand.core))
    }
    figures = {
        "task": options.task,
        "micro_batch": options.micro_batch,
        "by_hand_samples_per_second": statistics.median(hand.wall),
        "peer_samples_per_second": statistics.median(peer.wall),
        "percent_of_by_hand": 100 * ratios["wall"],
        "percent_of_by_hand_per_core_second": 100 * ratios["core"],
        "target_percent": TARGET_PERCENT,
        "turns": [{"by_hand": a, "peer": b} for a, b in zip(hand.wall, peer.wall, strict=True)],
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
