"""Cells that are trained: what comes of one, and an experiment that is stopped and goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from p2ptrain.config import BytesTask, DigitsTask, Local, Optimizer, RunConfig, Schedule
from p2ptrain.experiment import running
from p2ptrain.experiment.grid import Arm, Cell, Grid
from p2ptrain.experiment.simulate import Diverged, Simulation
from p2ptrain.experiment.skew import ByLabel
from p2ptrain.experiment.store import open_store
from p2ptrain.experiment.trials import Result, Trial, conduct, due, roster
from p2ptrain.replica.strategy import PROBE
from p2ptrain.tasks.digits import DigitsTask as Digits
from tests.unit.experiments import grid_of

torch.set_num_threads(1)  # for so little work, threads only wait for each other

TINY = BytesTask(layers=1, width=8, heads=1, context=8)


def tiny(**fields: object) -> Grid:
    arms = (Arm(name="sync", strategy="sync"), Arm(name="average"))
    return grid_of(task=TINY, steps=(2,), rates=(0.01,), seeds=(1,), arms=arms, **fields)


class Line:
    """Fit y = 2x: one weight, so that every number can be followed by hand. `a` sees x = 1, `b` x = 2."""

    note = shared_note = ""

    def build_model(self, seed: int) -> nn.Module:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def batch(self, step: int, peer: str, first: int, count: int) -> Tensor:
        return torch.full((count, 1), 1.0 if peer == "a" else 2.0)

    def loss_sum(self, model: nn.Module, batch: Tensor) -> Tensor:
        return ((model(batch) - 2 * batch) ** 2 / 2).sum()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"loss": float(self.loss_sum(model, torch.ones(1, 1)))}

    def preview(self, *arguments: object, **named: object) -> str:
        return ""


def line_run(**fields: object) -> RunConfig:
    settings = {
        "codec": "fp32",
        "optimizer": Optimizer(kind="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, clip_norm=0.0),
        "schedule": Schedule(warmup_steps=0),
        "target_batch_size": 2,
        "local": Local(inner_batch_size=1, outer_learning_rate=1.0, outer_momentum=0.0),
    }
    return RunConfig(**settings | fields)


def weight(simulation: Simulation) -> float:
    return float(simulation.replica.parameters)


def test_synchronous_round_takes_the_mean_gradient() -> None:
    simulation = Simulation(line_run(), Line(), ["a", "b"], 1)
    simulation.round([1, 1])
    # Gradients at w = 0 are -2 and -8; their mean is -5.
    assert weight(simulation) == pytest.approx(0.5)
    assert simulation.evaluate()["loss"] == pytest.approx(1.5**2 / 2)


def test_round_apart_takes_the_mean_of_where_the_peers_went() -> None:
    simulation = Simulation(line_run(strategy="local", target_batch_size=4), Line(), ["a", "b"], 1)
    simulation.round([2, 2])
    # From 0, two steps each: `a` to 2 (1 - 0.9²), `b` to 2 (1 - 0.6²).
    assert weight(simulation) == pytest.approx((2 * (1 - 0.81) + 2 * (1 - 0.36)) / 2)


def test_copies_are_compared_as_they_are_before_they_are_averaged() -> None:
    """One goes to 0.2 and the other to 0.8; on the probe, where x is 2, w is 2 (w - 2)² off."""
    run = line_run(strategy="local")
    simulation = Simulation(run, Line(), ["a", "b"], 1, barrier_every=2)
    simulation.round([1, 1])
    found = simulation.agreements[0]
    assert found.norm == pytest.approx(0.5)
    assert found.consensus_distance == pytest.approx(0.3)
    assert found.cosine == pytest.approx((0.2 * 0.8) / ((0.2**2 + 0.8**2) / 2))
    assert simulation.barriers == []
    simulation.round([1, 1])
    assert weight(simulation) == pytest.approx(0.5 + (0.15 + 0.6) / 2)
    copies = [0.5 + 0.15, 0.5 + 0.6]
    losses = [2 * (w - 2) ** 2 for w in [*copies, sum(copies) / 2]]
    assert simulation.barriers == [pytest.approx(losses[2] - (losses[0] + losses[1]) / 2)]


def test_measuring_the_barrier_changes_no_bit_of_the_training() -> None:
    run = line_run(strategy="local", local=Local(inner_batch_size=1), target_batch_size=4)
    looking, plain = (Simulation(run, Line(), ["a", "b"], 1, barrier_every=every) for every in (1, 0))
    for _ in range(4):
        for one in (looking, plain):
            one.round([2, 2])
    assert len(looking.barriers) == 4
    assert looking.replica.compute_state_digest() == plain.replica.compute_state_digest()


def test_member_that_brings_nothing_counts_for_nothing() -> None:
    simulation = Simulation(line_run(), Line(), ["a", "b"], 1)
    header = simulation.round([1, 0])
    assert weight(simulation) == pytest.approx(0.2)
    assert header.total_samples == 1


def test_all_replicas_are_equal_after_each_round() -> None:
    simulation = Simulation(line_run(strategy="local", codec="int8"), Line(), ["a", "b"], 1)
    for _ in range(3):
        simulation.round([1, 1])
        first, second = (member.replica for member in simulation.members)
        assert first.position == second.position
        assert torch.equal(first.parameters, second.parameters)
    assert simulation.replica.position.weight == 6


def test_training_that_explodes_is_told_as_diverged() -> None:
    run = line_run(optimizer=line_run().optimizer.model_copy(update={"lr": 10.0}))
    simulation = Simulation(run, Line(), ["a", "b"], 1)

    def go_on() -> None:
        for _ in range(100):
            simulation.round([1, 1])

    with pytest.raises(Diverged):
        go_on()


def test_cell_has_the_same_figures_when_it_is_trained_again() -> None:
    grid, trial = tiny(), Trial(Cell("average", 2, 2), 0.01, 1)
    result = conduct(grid, trial)
    assert replace(conduct(grid, trial), seconds=result.seconds) == result
    assert None not in (result.change_norm, result.cosine, result.consensus_distance)
    assert (result.rounds, result.curve[-1][0]) == (4, 64)
    assert result.loss == result.curve[-1][1]
    assert result.loss is not None
    assert result.loss < 5.6  # ln 256 is 5.55
    # Each of two peers sends half of its change, and half of the mean.
    assert result.sent_bytes == pytest.approx(4 * result.encoded_bytes)


def test_peers_know_few_labels_each_when_split_by_label() -> None:
    names = roster(5)
    task = ByLabel(Digits(DigitsTask(), 1), 1, names)
    labels = [set(task.batch(0, name, 0, 200)[1].tolist()) for name in names]
    assert set.union(*labels) == set(range(10))
    assert all(len(each) <= 3 for each in labels)
    assert torch.equal(task.batch(3, names[0], 5, 5)[1], task.batch(3, names[0], 0, 10)[1][5:])


def test_probe_knows_all_labels_when_split_by_label() -> None:
    task = ByLabel(Digits(DigitsTask(), 1), 1, roster(5))
    assert set(task.batch(0, PROBE, 0, 200)[1].tolist()) == set(range(10))


def test_experiment_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    told: list[tuple[float, float, Result | None]] = []

    def stop(done: float, total: float, result: Result | None) -> None:
        """The user presses Ctrl-C after the second result."""
        told.append((done, total, result))
        if len(told) == 3:
            raise KeyboardInterrupt

    grid = tiny()
    with pytest.raises(KeyboardInterrupt):
        running.run(grid, open_store(tmp_path / "out", grid, resume=False), 1, stop)
    store = open_store(tmp_path / "out", grid, resume=True)
    assert len(store.results) == 2
    running.run(grid, store, 1, stop)
    assert due(grid, store.results) == []
    trials = [(result.arm, result.seed) for result in store.results.values()]
    assert trials == [("sync", 0), ("sync", 1), ("average", 0), ("average", 1)]
    assert [round(done / total, 3) for done, total, _ in told] == [0, 0.25, 0.5, 0.5, 0.75, 1]
