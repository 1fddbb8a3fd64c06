"""What training apart saves on a slow link: bytes for each sample, and time to a loss. As root.

    python tests/benchmarks/apart.py [--peers 4] [--megabits 20] [--rtt-ms 50] [--steps 50]

Four peers on hosts of their own, over the road of `tests/chaos/relay.py` (see `wan.py`), train the model of
`configs/experiments/nodes_and_steps.toml`, row R5: 32 samples in a step of all together. First with strategy
`local` and so many steps between two averages, for the samples that a cell of R5 may spend; the held-out loss
that it ends with is then the goal of strategy `sync`, which may take twice as many samples. Each has the
learning rate that was the best for it. Seconds count from the first commit on, and one mean round for what
came before it. Bytes are all that a peer sends between the first commit and the last, messages included.

Not covered: larger models, whose computing takes a larger share of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
from pathlib import Path
from time import monotonic
from typing import Any

from round_latency import say, train_here, workers
from wan import START_SECONDS, Homes, lab_here

TARGETS = {"bytes_a_sample_over_sync": "<= 1/40", "times_as_fast_as_sync": ">= 3"}
TASK = {"kind": "bytes", "layers": 1, "width": 32, "heads": 2, "context": 32}
BATCH, BUDGET = 32, 16_384
RATES = {"sync": 8e-3, "local": 8e-3}
LOOK_EVERY_SAMPLES = 160


def work() -> None:
    """In a worker: one peer, and, of the first, the losses on its way."""
    import uvloop

    _, folder, number, peers, entries, addresses, strategy, steps, samples, rate = sys.argv[2:]
    run, mine = settings(strategy, int(peers), int(steps), float(rate)), int(number)
    from p2ptrain.config import RunConfig
    from p2ptrain.tasks import build_task

    task = build_task(RunConfig.model_validate({"run_id": "apart", "task": TASK}))
    kept: list[tuple[int, float, Any]] = []
    seen, model, parameters = 0, None, None

    def stepped(step: int, replica: Any) -> None:
        nonlocal seen, model, parameters
        model, parameters = replica.model, replica.parameters
        weight = replica.position.weight
        if mine == 0 and (step == 0 or weight - seen >= LOOK_EVERY_SAMPLES):
            kept.append((weight, monotonic(), replica.parameters.clone()))
            seen = weight

    training = train_here(
        Path(folder),
        mine,
        int(peers),
        json.loads(entries),
        math.ceil(int(samples) / run["target_batch_size"]),
        0.0,
        listen=f"/ip4/{json.loads(addresses)[mine]}/tcp/0",
        data_port=0,
        settings=run,
        task=task,
        micro_batch_size=BATCH // int(peers),
        stepped=stepped,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(training)
    looks = []
    for weight, at, copy in kept:
        for parameter, start in zip(model.parameters(), starts(model), strict=True):  # type: ignore[union-attr]
            parameter.data = copy[start : start + parameter.numel()].view_as(parameter)
        looks.append({"samples": weight, "at": at, "loss": task.evaluate(model)["loss"]})  # type: ignore[arg-type]
    say(looks=looks)


def starts(model: Any) -> list[int]:
    """Where each parameter begins in the flat vector."""
    found, at = [], 0
    for parameter in model.parameters():
        found.append(at)
        at += parameter.numel()
    return found


def settings(strategy: str, peers: int, steps: int, rate: float) -> dict[str, Any]:
    """Of the run; plain averaging, as there are too few rounds for an outer momentum."""
    share = BATCH // peers
    return {
        "strategy": strategy,
        "task": TASK,
        "target_batch_size": BATCH * (steps if strategy == "local" else 1),
        "local": {"inner_batch_size": share, "outer_learning_rate": 1.0, "outer_momentum": 0.0},
        "optimizer": {"kind": "adamw", "lr": rate, "weight_decay": 0.0, "clip_norm": 0.0},
    }


def trained(homes: Homes, strategy: str, samples: int) -> dict[str, Any]:
    """How a swarm of that strategy fared with so many samples."""
    chosen = homes.chosen
    words = (json.dumps(homes.addresses), strategy, str(chosen.steps), str(samples), str(RATES[strategy]))
    with workers("apart", chosen.peers, *words, script=__file__, insides=homes.insides) as started:
        reports = [worker.hear(START_SECONDS + chosen.most_seconds) for worker in started]
        for worker in started:
            worker.end_of_input()
        looks = started[0].hear(START_SECONDS)["looks"]
    first, last = looks[0], looks[-1]
    sent = statistics.mean(max(each["sent"].values()) - min(each["sent"].values()) for each in reports)
    rounds = len(reports[0]["sent"]) - 1
    return {
        "rounds": rounds + 1,
        "sent_bytes_a_sample": sent / (last["samples"] - first["samples"]),
        "looks": [
            {
                "samples": look["samples"],
                "seconds": look["at"] - first["at"] + (last["at"] - first["at"]) / rounds,
                "loss": look["loss"],
            }
            for look in looks
        ],
    }


def measure(chosen: argparse.Namespace, lab: Any) -> dict[str, Any]:
    homes = Homes(chosen, lab)
    local = trained(homes, "local", chosen.samples)
    goal = local["looks"][-1]["loss"]
    print(f"local: {json.dumps(local)}", file=sys.stderr, flush=True)
    sync = trained(homes, "sync", 2 * chosen.samples)
    print(f"sync: {json.dumps(sync)}", file=sys.stderr, flush=True)
    there = next((look for look in sync["looks"] if look["loss"] <= goal), None)
    needed = local["looks"][-1]["seconds"]
    return {
        "loss": goal,
        "local": {key: local[key] for key in ("rounds", "sent_bytes_a_sample")} | local["looks"][-1],
        "sync": {key: sync[key] for key in ("rounds", "sent_bytes_a_sample")}
        | (there or {"seconds": None, "at_end": sync["looks"][-1]}),
        "bytes_a_sample_over_sync": local["sent_bytes_a_sample"] / sync["sent_bytes_a_sample"],
        "times_as_fast_as_sync": None if there is None else there["seconds"] / needed,
    }


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work()
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--megabits", type=float, default=20.0, help="of each host, up and down")
    parser.add_argument("--rtt-ms", type=float, default=50.0)
    parser.add_argument("--steps", type=int, default=50, help="that each peer takes between two averages")
    parser.add_argument("--samples", type=int, default=BUDGET, help="that `local` may spend; `sync` twice")
    parser.add_argument("--packet-bytes", type=int, default=1400, help="at most, of a packet")
    parser.add_argument("--congestion", default="", help="control of TCP, such as cubic; else as it is here")
    parser.add_argument("--most-seconds", type=float, default=900.0, help="for each strategy")
    chosen = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    with lab_here() as lab:
        report = measure(chosen, lab)
    about = {
        "peers": chosen.peers,
        "megabits": chosen.megabits,
        "rtt_ms": chosen.rtt_ms,
        "steps": chosen.steps,
    }
    print(json.dumps(about | report | {"targets": TARGETS, "load_before": load}))


if __name__ == "__main__":
    main()
