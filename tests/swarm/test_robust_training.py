"""A small model trains although one of five peers lies, with every rule that bounds it; the plain mean does
not bear it, and the peers name the liar.

Not covered: liars that know what the others bring, and the same between real processes (row 26 of
`tests/chaos`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from p2ptrain import allreduce, events
from p2ptrain.allreduce import Attempt, Contribution
from p2ptrain.config import fingerprint
from p2ptrain.gradients.aggregation import AGGREGATIONS, norm_clip
from p2ptrain.protocol.spans import chunk_ranges
from p2ptrain.replica.flat import parameter_table
from p2ptrain.replica.optimizers import build_optimizer
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.schedule import learning_rate
from p2ptrain.swarm import clock
from p2ptrain.swarm.memory import MemoryHub
from tests.swarm.training import Regression, Training, check_replicas, small_run

pytestmark = [pytest.mark.swarm, pytest.mark.virtual]

PEERS, SAMPLES, STEPS = 5, 128, 30
TASK = Regression()


def noise(sound: Tensor) -> Tensor:
    """Of the same length."""
    drawn = torch.randn(sound.shape, generator=torch.Generator().manual_seed(int(sound[0].view(torch.int32))))
    return drawn * sound.square().mean().sqrt()


LIES: dict[str, Callable[[Tensor], Tensor]] = {
    "flipped": lambda sound: -sound,
    "constant": lambda sound: torch.full_like(sound, float(sound.abs().max())),
    "noise": noise,
    "against all the others": lambda sound: -PEERS * sound,
    # The inner product with the honest mean is negative, and the length like theirs or less.
    "half against": lambda sound: -0.5 * sound,
}


@cache
def batch(step: int, peer: int) -> tuple[Tensor, Tensor]:
    return TASK.batch(step, f"peer{peer}", 0, SAMPLES)


@cache
def final_loss(rule: str, lie: str) -> float:
    """Held-out loss after training with the last of the peers lying; no lie: an honest one."""
    run, model = small_run(), TASK.build_model(0)
    replica = Replica(model, run, fingerprint(run, parameter_table(model)))
    optimizer, mean = build_optimizer(run.optimizer, [(0, replica.numel)], []), torch.empty(replica.numel)
    for step in range(STEPS):
        totals = []
        for peer in range(PEERS):
            replica.gradient.zero_()
            TASK.loss_sum(replica.model, batch(step, peer)).backward()  # type: ignore[no-untyped-call]
            totals.append(replica.gradient.clone())
        if lie:
            totals[-1] = LIES[lie](totals[-1])
        for start, stop in chunk_ranges(0, replica.numel, run.chunk_values):
            parts = [total[start:stop] for total in totals]
            usual = float(mean[start:stop].norm()) if step else 0.0
            how = partial(norm_clip, usual=usual) if rule == "norm_clip" else AGGREGATIONS[rule]
            mean[start:stop] = how(parts, [SAMPLES] * PEERS)
        optimizer.step(replica.parameters, mean, learning_rate(run, step))
    return TASK.evaluate(replica.model)["loss"]


@pytest.mark.parametrize("lie", ["", *LIES])
@pytest.mark.parametrize(
    ("rule", "most"), [("multi_krum", 1.05), ("centered_clip", 1.1), ("trimmed_mean", 1.1), ("median", 1.1)]
)
def test_model_learns_nearly_as_well_as_by_the_mean_of_honest_peers_when_one_of_five_lies(
    rule: str, most: float, lie: str
) -> None:
    """Multi-Krum leaves the liar out. With the others it still pushes each value a little, always the same
    way if it likes."""
    assert final_loss(rule, lie) <= most * final_loss("mean", "")


@pytest.mark.parametrize(
    ("lie", "most"), [("", 1.01), ("flipped", 1.1), ("noise", 1.1), ("against all the others", 1.5)]
)
def test_clipped_norms_keep_a_lie_from_being_longer_than_it_is_usual_and_no_more(
    lie: str, most: float
) -> None:
    assert final_loss("norm_clip", lie) <= most * final_loss("mean", "")


@pytest.mark.parametrize("lie", ["constant", "against all the others"])
def test_plain_mean_does_not_bear_one_liar(lie: str) -> None:
    assert final_loss("mean", lie) > 10 * final_loss("mean", "")


def test_every_peer_names_the_liar_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    contribute = Attempt.contribute

    def lying(self: Attempt, contribution: Contribution) -> None:
        if self._me == "peer4":
            contribution = Contribution(-contribution.total, contribution.samples)
        contribute(self, contribution)

    monkeypatch.setattr(allreduce.Attempt, "contribute", lying)

    async def story() -> None:
        run = small_run(aggregation="trimmed_mean", target_batch_size=40)
        async with Training(MemoryHub(0), run) as training:
            for number in range(PEERS):
                training.start(f"peer{number}", micro_batch_size=8 - number)
            await training.until(
                lambda: all(
                    trainer.of(events.PeerStoodOut)
                    for name, trainer in training.peers.items()
                    if name != "peer4"
                )
            )
            named = {event.peer for life in training.lives for event in life.of(events.PeerStoodOut)}
            assert named == {"peer4"}
            check_replicas(training.lives)

    clock.run(story())
