"""What a round of adapters takes, beside one of the whole model, and whether training them together is exact.

    python -m tests.benchmarks.lora [--steps 50] [--peers 4] [--rank 8] [--codec fp32] [--layers q_proj …]

Whole peers train a causal language model of 26 million parameters on the Python standard library: in one
process, over the memory swarm, in virtual time. Bytes are those that each peer sent, messages included,
between two commits; with `payload = "full"` they are measured over a few rounds. Then plain PEFT and torch
train on the samples that the entries counted, as one process with the whole batch, and the held-out losses
are compared. In fp32, since what a codec rounds is the codec's difference (`codecs.py`), and does not change
the share of bytes. Adapters are on the attention's layers, where they were first proposed (Hu et al. 2021);
without `--layers` values they are on all.

Not covered: how long a round takes (`wan.py`), and what the adapters learn that a whole model would.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from p2ptrain.config import CausalLmTask, Lora, Optimizer, RunConfig, Schedule
from p2ptrain.records import EntryHeader
from p2ptrain.replica.schedule import learning_rate
from p2ptrain.swarm import clock
from p2ptrain.swarm.memory import MemoryHub
from p2ptrain.tasks import build_model, build_task
from tests.swarm.training import Trainer, Training, check_replicas

TARGETS = {"percent_of_full": "<= 2", "relative_loss_difference": "<= 1e-4"}
SAMPLES = (1, 2, 1, 3)
"""Of each peer's micro-batches, again from the start if there are more peers: uneven, as in a swarm."""
FULL_STEPS = 4
SETTLED = 2
"""Steps after which all peers take part, and bytes are counted."""


def run_of(payload: str, rank: int, codec: str, layers: Sequence[str]) -> RunConfig:
    task = CausalLmTask(layers=8, width=512, heads=8, context=32)
    return RunConfig.model_validate(
        {
            "run_id": f"bench-{payload}",
            "payload": payload,
            "lora": Lora(rank=rank, target_modules=tuple(layers)),
            "codec": codec,
            "target_batch_size": 8,
            "task": task,
            "optimizer": Optimizer(lr=3e-3),
            "schedule": Schedule(warmup_steps=5),
        }
    )


def trained(run: RunConfig, peers: int, steps: int) -> tuple[Trainer, list[EntryHeader], float, int]:
    """A peer of the swarm, its log, the bytes that a peer sent per round, and the values in a gradient."""

    async def story() -> tuple[Trainer, list[EntryHeader], float, int]:
        async with Training(MemoryHub(seed=1), run) as training:
            training.task = build_task(run)
            for number in range(peers):
                samples = SAMPLES[number % len(SAMPLES)]
                training.start(
                    f"peer{number}", micro_batch_size=samples, batch_seconds=0.1 * samples, log_megabytes=200
                )
            await training.until_step(SETTLED)
            began = [(life.step, sent_bytes(life)) for life in training.lives]
            for step in range(SETTLED + 1, steps + 1):
                await training.until_step(step)
                print(f"{run.payload}: step {step} of {steps}", file=sys.stderr, flush=True)
            ended = [(life.step, sent_bytes(life)) for life in training.lives]
            assert check_replicas(training.lives)
            pairs = zip(began, ended, strict=True)
            per_round = [(after - before) / (end - begin) for (begin, before), (end, after) in pairs]
            first = training.lives[0]
            return first, first.headers()[: first.step], sum(per_round) / peers, first.replica.numel

    return clock.run(story())


def sent_bytes(life: Trainer) -> int:
    assert life.peer is not None
    return sum(sent for sent, _ in life.peer.swarm.traffic.values())  # type: ignore[attr-defined]


def one_process(run: RunConfig, headers: Sequence[EntryHeader]) -> float:
    """Held-out loss of plain PEFT and torch, with all of an entry's samples as one batch."""
    task = build_task(run)
    model, _ = build_model(task, run)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = run.optimizer
    optimizer = torch.optim.AdamW(
        adapters, betas=(config.beta1, config.beta2), eps=config.epsilon, weight_decay=config.weight_decay
    )
    for header in headers:
        optimizer.zero_grad()
        pairs = zip(header.roster, header.samples, strict=True)
        batch = torch.cat([task.batch(header.step, peer, 0, samples) for peer, samples in pairs if samples])
        (task.loss_sum(model, batch) / header.total_samples).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(adapters, config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run, header.step)
        optimizer.step()
        print(f"alone: step {header.step + 1} of {len(headers)}", file=sys.stderr, flush=True)
    return task.evaluate(model)["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--codec", default="fp32")
    parser.add_argument("--layers", nargs="*", default=["q_proj", "k_proj", "v_proj", "o_proj"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    _, _, full_bytes, full_values = trained(
        run_of("full", options.rank, options.codec, []), options.peers, FULL_STEPS
    )
    run = run_of("lora", options.rank, options.codec, options.layers)
    untrained = build_task(run).evaluate(build_model(build_task(run), run)[0])["loss"]
    life, headers, lora_bytes, lora_values = trained(run, options.peers, options.steps)
    swarm = build_task(run).evaluate(life.replica.model)["loss"]
    alone = one_process(run, headers)
    figures: dict[str, Any] = {
        "peers": options.peers,
        "rank": options.rank,
        "codec": options.codec,
        "layers": options.layers or "all",
        "steps": len(headers),
        "values": {"full": full_values, "lora": lora_values},
        "sent_bytes_per_peer_and_round": {"full": full_bytes, "lora": lora_bytes},
        "percent_of_full": 100 * lora_bytes / full_bytes,
        "loss": {"untrained": untrained, "swarm": swarm, "one_process": alone},
        "relative_loss_difference": abs(swarm - alone) / alone,
        "targets": TARGETS,
        "seconds": time.monotonic() - began,
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
