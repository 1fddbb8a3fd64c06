"""What taking part costs a peer beyond training alone: memory, and speed of the training thread, as JSON.

    python tests/benchmarks/memory.py [--peers 2] [--megabytes 100] [--codec fp16] [--delay 0]

- memory: of a peer that trains over loopback, TLS and all, beside a process that holds nothing but the same
  model, its gradients and torch's AdamW. Of both, a small model's is taken off, so that programs and
  libraries do not count; the unit is the gradient's bytes as float32. A peer's peak is the kernel's count of
  resident memory (VmHWM), and the largest that was seen of what is no file (RssAnon). The other process has
  what it holds between two steps, without what a step needs for a moment.
- speed: of a thread that has a core to itself and trains the default model, in micro-batches that lie in a
  round beside those while nothing happens. All else of that peer, and the other peer, has a second core, and
  does rounds one after the other.

Not covered: catching up, donating, checkpoints, and activations, which are the model's own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from round_latency import INPUTS, START_SECONDS, say, train_here, workers

TARGETS = {"extra_gradients_per_peer": "<= 3", "training_thread_loses_percent": "<= 5"}
BLOCKS = 16
"""Layers of the model, so that what autograd holds of one of them is small beside the whole."""
SMALL_MEGABYTES = 1.0
STEPS = 12
BATCH_MS = 50.0
SAMPLE_SECONDS = 0.002
SETTLE_SECONDS = 3.0
ALONE_SECONDS = 10.0
ROUNDS = 30
MICRO_BATCH = 8
"""For the training thread to be disturbed by."""
WARMUP_ROUNDS = 4
NEIGHBOUR = "import hashlib; data = bytes(2**24)\nwhile True: hashlib.sha256(data)"
"""Another process that keeps the second core busy: what cores share costs as much without any round."""


# -- in the workers ------------------------------------------------------------------------------------------


class Blocks:
    """A task of `values` parameters in layers beside each other, with hardly any activations."""

    note = shared_note = ""

    def __init__(self, values: int) -> None:
        self._outputs = values // BLOCKS // INPUTS

    def build_model(self, seed: int) -> Any:
        import torch
        from torch import nn

        torch.manual_seed(seed)
        return nn.ModuleList(nn.Linear(INPUTS, self._outputs, bias=False) for _ in range(BLOCKS))

    def batch(self, step: int, peer: str, first: int, count: int) -> Any:
        import torch

        time.sleep(BATCH_MS / 1000)
        return torch.ones(count, INPUTS)

    def loss_sum(self, model: Any, batch: Any) -> Any:
        return sum(layer(batch).square().sum() for layer in model)

    def evaluate(self, model: Any) -> dict[str, float]:
        return {"loss": 0.0}

    def preview(self, model: Any, prompt: str, length: int, generator: Any) -> str:
        return ""


def status_bytes(name: str) -> int:
    """That line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the kernel does not tell {name}; this benchmark needs Linux")


class Watch:
    """The most memory that is no file, looked at now and then on a thread."""

    def __init__(self) -> None:
        self.most_bytes = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.most_bytes = max(self.most_bytes, status_bytes("RssAnon"))
            time.sleep(SAMPLE_SECONDS)


def plain_here(values: int) -> None:
    import torch

    torch.set_num_threads(1)
    task = Blocks(values)
    model = task.build_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    for step in range(4):
        optimizer.zero_grad()
        task.loss_sum(model, task.batch(step, "", 0, 1)).backward()
        optimizer.step()
    say(addresses=["-"])
    sys.stdin.readline()
    say(anonymous=status_bytes("RssAnon"), resident=status_bytes("VmRSS"))
    sys.stdin.read()


def run(training: Any) -> None:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(training)


def peer_here(
    folder: Path, number: int, peers: int, entries: list[str], values: int, codec: str, delay: int, log: int
) -> None:
    watch = Watch()
    settings = {"codec": codec, "delay": delay}
    task = Blocks(values)
    kept = {"data_port": 0, "settings": settings, "task": task, "log_megabytes": log}
    run(train_here(folder, number, peers, entries, STEPS, 0.0, **kept))
    say(anonymous=watch.most_bytes, resident=status_bytes("VmHWM"))


class Training:
    """A thread on a core of its own that trains the default model, and notes each micro-batch."""

    def __init__(self, core: int) -> None:
        from p2ptrain.config import RunConfig
        from p2ptrain.tasks import build_task

        self.batches: list[tuple[float, float]] = []
        self._run, self._count = RunConfig(), MICRO_BATCH
        self._task = build_task(self._run)
        self._core = core
        self._over = False
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._over = True
        self._thread.join()

    def _train(self) -> None:
        os.sched_setaffinity(0, {self._core})  # of this thread
        model = self._task.build_model(self._run.seed)
        while not self._over:
            began = time.monotonic()
            model.zero_grad()
            batch = self._task.batch(len(self.batches), "", 0, self._count)
            self._task.loss_sum(model, batch).backward()
            self.batches.append((began, time.monotonic()))


def beside_here(
    folder: Path, number: int, peers: int, entries: list[str], values: int, codec: str, core: int
) -> None:
    import torch

    import p2ptrain.swarm.libp2p  # takes seconds, in which nothing is to be measured
    import p2ptrain.trainer  # noqa: F401

    torch.set_num_threads(1)
    training = Training(core) if number == 0 else None
    time.sleep(SETTLE_SECONDS)
    began = time.monotonic()
    time.sleep(ALONE_SECONDS)
    alone = [(began, time.monotonic())]
    run(
        train_here(
            folder,
            number,
            peers,
            entries,
            WARMUP_ROUNDS + ROUNDS,
            1.0,
            outputs=values // (INPUTS + 1),
            data_port=0,
            settings={"codec": codec},
        )
    )
    time.sleep(SETTLE_SECONDS / 3)
    began = time.monotonic()
    if training is not None:
        time.sleep(ALONE_SECONDS)
        alone.append((began, time.monotonic()))
        neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR])
        began = time.monotonic()
        time.sleep(ALONE_SECONDS)
        busy = [(began, time.monotonic())]
        neighbour.kill()
        neighbour.wait()
        training.end()
        say(alone=alone, busy=busy, batches=training.batches)
    else:
        say()


# -- measuring -----------------------------------------------------------------------------------------------


def memory(chosen: argparse.Namespace) -> dict[str, Any]:
    """Bytes by process and size of model, and what the larger one costs in gradients."""
    sizes = [round(megabytes * 1e6 / 4) for megabytes in (SMALL_MEGABYTES, chosen.megabytes)]
    seen: dict[str, list[dict[str, int]]] = {"plain": [], "peer": []}
    for values in sizes:
        with workers("plain", 1, str(values), script=__file__) as (worker,):
            worker.tell()
            seen["plain"].append(worker.hear(START_SECONDS))
        words = (str(values), chosen.codec, str(chosen.delay), str(chosen.log_megabytes))
        with workers("peer", chosen.peers, *words, script=__file__) as started:
            for worker in started:
                noted = worker.hear(START_SECONDS + STEPS * 10)
                assert set(noted["peers"].values()) == {chosen.peers}
                worker.end_of_input()
            heard = [worker.hear(START_SECONDS) for worker in started]
            seen["peer"].append({kind: max(each[kind] for each in heard) for kind in heard[0]})
    gradient = 4 * (sizes[1] - sizes[0])
    found = {
        f"{who}_{kind}_gradients": round((large[kind] - small[kind]) / gradient, 2)
        for who, (small, large) in seen.items()
        for kind in small
    }
    extra = max(
        found[f"peer_{kind}_gradients"] - found[f"plain_{kind}_gradients"] for kind in seen["peer"][0]
    )
    return found | {"extra_gradients_per_peer": round(extra, 2)}


def speed(chosen: argparse.Namespace) -> dict[str, Any]:
    """How long micro-batches take alone, and within a round."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    pinned = ("taskset", "--cpu-list", str(second))
    words = (str(round(chosen.megabytes * 1e6 / 4)), chosen.codec, str(first))
    with workers("beside", 2, *words, script=__file__, insides=[pinned] * 2) as started:
        patience = START_SECONDS + 2 * ALONE_SECONDS + ROUNDS * 10
        noted = [worker.hear(patience) for worker in started]
        for worker in started:
            worker.end_of_input()
        heard = started[0].hear(patience)
    steps = range(WARMUP_ROUNDS, WARMUP_ROUNDS + ROUNDS)
    rounds = [
        (max(each["ready"][str(step)] for each in noted), max(each["committed"][str(step)] for each in noted))
        for step in steps
        if all(str(step) in each["ready"] for each in noted)
    ]
    alone, within = (within_spans(heard["batches"], spans) for spans in (heard["alone"], rounds))
    if len(within) < 5:
        raise RuntimeError(f"only {len(within)} micro-batches lay within a round: raise --megabytes")
    slower = statistics.mean(within) / statistics.mean(alone)
    return {
        "micro_batch_ms_alone": round(statistics.mean(alone) * 1000, 2),
        "micro_batch_ms_within_a_round": round(statistics.mean(within) * 1000, 2),
        "micro_batch_ms_beside_a_busy_process": round(
            statistics.mean(within_spans(heard["batches"], heard["busy"])) * 1000, 2
        ),
        "micro_batches": [len(alone), len(within)],
        "median_round_seconds": round(statistics.median(end - begin for begin, end in rounds), 3),
        "training_thread_loses_percent": round(100 * (1 - 1 / slower), 2),
    }


def within_spans(batches: Sequence[tuple[float, float]], spans: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds of each micro-batch that lies within one of these spans of time."""
    return [
        end - begin for begin, end in batches if any(first <= begin and end <= last for first, last in spans)
    ]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        kind, folder, number, peers, entries, *rest = sys.argv[2:]
        who = (Path(folder), int(number), int(peers), json.loads(entries))
        match kind:
            case "plain":
                plain_here(int(rest[0]))
            case "peer":
                peer_here(*who, int(rest[0]), rest[1], int(rest[2]), int(rest[3]))
            case "beside":
                beside_here(*who, int(rest[0]), rest[1], int(rest[2]))
        return

    parser = argparse.ArgumentParser(description="Memory and speed that taking part costs a peer.")
    parser.add_argument("--peers", type=int, default=2, help="for memory; speed is measured with 2")
    parser.add_argument("--megabytes", type=float, default=100.0, help="of the gradient, as float32")
    parser.add_argument("--codec", default="fp16")
    parser.add_argument("--delay", type=int, default=0, choices=[0, 1], help="of the run, for memory")
    parser.add_argument("--log-megabytes", type=int, default=256, help="of a peer's file, for memory")
    parser.add_argument("--only", nargs="+", default=["memory", "speed"], choices=["memory", "speed"])
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended, too
    report: dict[str, Any] = {"peers": chosen.peers, "megabytes": chosen.megabytes, "codec": chosen.codec}
    report |= {"delay": chosen.delay, "load_before": round(os.getloadavg()[0], 1)}
    if "memory" in chosen.only:
        report["memory"] = memory(chosen)
    if "speed" in chosen.only:
        report["speed"] = speed(chosen)
    print(json.dumps(report | {"targets": TARGETS}))


if __name__ == "__main__":
    main()
