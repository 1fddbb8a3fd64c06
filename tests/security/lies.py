"""What lies cost, who is named for them, and how soon a lying reducer is proven to lie, as JSON.

    python -m tests.security.lies [--seeds 10]

Whole trainers on the memory swarm, in virtual time, and a small model. `losses`: held-out loss after 30 steps
with one of five members lying about its gradient, relative to that of plain means of honest ones; `named`:
whom the honest peers' metrics name for it. `found`: steps from the first false sum of one of four reducers
until all others hold the proof, and whether they went back before it, per chance that a span is audited.
Exit status 1 if a target is missed.

What audits cost an all-reduce between processes is measured by `tests/benchmarks/allreduce.py`, the same
attacks on real processes are rows 26 and 41 of `tests/chaos`. Not covered: liars that know of each other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from p2ptrain import allreduce, events
from p2ptrain.allreduce import Attempt, Contribution
from p2ptrain.gradients.aggregation import AGGREGATIONS
from p2ptrain.swarm import clock
from p2ptrain.swarm.memory import MemoryHub
from tests.swarm import test_audit_stories as audits
from tests.swarm import test_robust_training as robust
from tests.swarm.training import Training, small_run

PEERS, LIAR = 5, "peer4"
LOSS, STEPS = 1.05, 20
"""Targets: with the best rule, loss over that without a liar; steps until proven, with every span audited."""


def losses() -> dict[str, dict[str, float]]:
    """Rule → lie → loss over that of honest means."""
    clean = robust.final_loss("mean", "")
    return {
        rule: {lie: round(robust.final_loss(rule, lie) / clean, 3) for lie in ("", *robust.LIES)}
        for rule in AGGREGATIONS
    }


def named(lie: Callable[[Tensor], Tensor]) -> list[str]:
    """Whom four honest peers name while the fifth tells that lie."""
    contribute = Attempt.contribute

    def lying(self: Attempt, contribution: Contribution) -> None:
        if self._me == LIAR:
            contribution = Contribution(lie(contribution.total), contribution.samples)
        contribute(self, contribution)

    found: set[str] = set()

    async def story() -> None:
        run = small_run(aggregation="multi_krum", target_batch_size=40)
        async with Training(MemoryHub(0), run) as training:
            for number in range(PEERS):
                training.start(f"peer{number}", micro_batch_size=8 - number)
            honest = [trainer for name, trainer in training.peers.items() if name != LIAR]
            await training.until(lambda: all(trainer.of(events.PeerStoodOut) for trainer in honest), 600)
            found.update(event.peer for trainer in honest for event in trainer.of(events.PeerStoodOut))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allreduce.Attempt, "contribute", lying)
        clock.run(story())
    return sorted(found)


def proven(share: float, seeds: int) -> dict[str, Any]:
    """How many steps after the first false sum all others hold the proof, and how many went back."""
    steps, back, wrong = [], 0, set[str]()
    for seed in range(seeds):
        begin = 0

        with pytest.MonkeyPatch.context() as patch, audits.lying_sums(patch, -1.0) as bend:

            def bent(training: Training, bend: Callable[[Training], None] = bend) -> None:
                nonlocal begin
                begin = max(trainer.step for trainer in training.lives)
                bend(training)

            training = audits.play(
                audits.audited(audit=share),
                lambda each: audits.told_by_all(each, events.PeerConvicted),
                lambda each: all(trainer.of(events.RolledBack) for trainer in audits.honest(each)),
                bend=bent,
                seed=seed,
            )
        told = [event for life in audits.honest(training) for event in life.of(events.PeerConvicted)]
        steps.append(max(event.step for event in told) - begin + 1)
        wrong |= {event.peer for event in told} - {audits.LIAR}
        back += all(life.of(events.RolledBack)[0].liar == audits.LIAR for life in audits.honest(training))
    return {
        "stories": seeds,
        "median_steps": statistics.median(steps),
        "most_steps": max(steps),
        "undone": back,
        "wrongly_convicted": sorted(wrong),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="What lies cost, and how soon they are found.")
    parser.add_argument("--seeds", type=int, default=10)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "losses": losses(),
        "named": {lie: named(tell) for lie, tell in robust.LIES.items()},
        "found": {f"audit = {share:g}": proven(share, chosen.seeds) for share in (1.0, 0.25)},
    }
    best = report["losses"]["multi_krum"]
    always = report["found"]["audit = 1"]
    missed = [
        *(f"multi_krum, {lie}: loss {ratio}" for lie, ratio in best.items() if ratio > LOSS),
        *(f"{lie}: {who} named" for lie, who in report["named"].items() if who != [LIAR]),
        *([f"found after {always['most_steps']} steps"] if always["most_steps"] > STEPS else []),
        *([f"undone in {always['undone']} stories"] if always["undone"] < chosen.seeds else []),
        *(f"{who} did nothing" for each in report["found"].values() for who in each["wrongly_convicted"]),
    ]
    print(json.dumps(report | {"missed": missed}, indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
