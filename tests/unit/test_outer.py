"""The outer momentum: what it equals, and that it is a part of the state."""

from __future__ import annotations

import pytest
import torch
from replicas import next_entry, small_replica, small_run
from torch import Tensor

from p2ptrain.config import Optimizer, Outer, RunConfig, Sync
from p2ptrain.replica.outer import Outer as OuterStep


def run_with(**outer: float) -> RunConfig:
    plain = Optimizer(kind="sgd", lr=0.01, momentum=0.0, nesterov=False, weight_decay=0.0, clip_norm=0.0)
    return small_run(optimizer=plain, sync=Sync(outer=Outer(**outer)), codec="fp32")


def trained(run: RunConfig, steps: int) -> Tensor:
    replica = small_replica(run)
    for _ in range(steps):
        replica.apply(next_entry(replica))
    return replica.parameters.clone()


def test_outer_step_equals_nesterov_sgd_when_it_is_taken_after_every_step() -> None:
    """T8: inner SGD at rate a and outer rate b are SGD at rate a·b with the outer momentum."""
    ours = trained(run_with(every=1, momentum=0.6, learning_rate=0.7), 20)
    theirs = run_with(every=0)
    nesterov = Optimizer(kind="sgd", lr=0.01 * 0.7, momentum=0.6, weight_decay=0.0, clip_norm=0.0)
    theirs = theirs.model_copy(
        update={"optimizer": nesterov, "schedule": theirs.schedule.model_copy(update={"warmup_steps": 0})}
    )
    constant = run_with(every=1, momentum=0.6, learning_rate=0.7)
    constant = constant.model_copy(update={"schedule": theirs.schedule})
    torch.testing.assert_close(trained(constant, 20), trained(theirs, 20), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, trained(run_with(), 20))


def test_outer_step_follows_the_formula_when_it_comes_every_third_step() -> None:
    run = run_with(every=3, momentum=0.6, learning_rate=0.7)
    outer, theta = OuterStep(run.sync.outer, torch.zeros(1)), torch.zeros(1)
    anchor, velocity = 0.0, 0.0
    for step in range(1, 10):
        theta -= 1.0
        outer.after(step, theta)
        if step % 3 == 0:  # the inner steps have led from the anchor to anchor - 3
            velocity = 0.6 * velocity + 3.0
            anchor -= 0.7 * (3.0 + 0.6 * velocity)
            assert theta.item() == pytest.approx(anchor, rel=1e-6)


def test_outer_step_changes_nothing_when_its_rate_is_one_and_its_momentum_zero() -> None:
    same = trained(run_with(every=4, momentum=0.0, learning_rate=1.0), 10)
    torch.testing.assert_close(same, trained(run_with(), 10), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
@pytest.mark.parametrize("at", [5, 6, 8])
def test_replica_goes_on_bit_by_bit_when_it_resumes_from_a_snapshot_between_outer_steps(
    kind: str, at: int
) -> None:
    """T16."""
    run = small_run(optimizer=Optimizer(kind=kind, lr=0.01), sync=Sync(outer=Outer(every=4)))
    replica = small_replica(run)
    for _ in range(at):
        replica.apply(next_entry(replica))
    resumed = small_replica(run, seed=1)
    resumed.load_state(replica.snapshot())
    for _ in range(7):
        entry = next_entry(replica)
        replica.apply(entry)
        resumed.apply(entry)
    assert torch.equal(resumed.parameters, replica.parameters)
    assert resumed.compute_state_digest() == replica.compute_state_digest()


def test_state_has_no_outer_tensors_when_there_is_no_outer_step() -> None:
    with_outer = small_replica(small_run(sync=Sync(outer=Outer(every=2))))
    assert with_outer.max_state_bytes > small_replica().max_state_bytes + 2 * 4 * with_outer.numel
