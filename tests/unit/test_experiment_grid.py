"""Which grids an experiment takes, and what it says of those that it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2ptrain.errors import ConfigError
from p2ptrain.experiment.grid import PROFILES, Arm, Cell, Grid, load_grid
from p2ptrain.experiment.trials import cost, due, whole_cost
from tests.unit.experiments import conducted, grid_of

SHIPPED = sorted((Path(__file__).parents[2] / "configs/experiments").glob("*.toml"))

SMALL = """
name = "small"
samples = 64
batch_size = 8
peers = [1, 2]
steps = [1, 4]
seeds = [1, 2]
rates = [0.1, 0.2]

[[arms]]
name = "sync"
strategy = "sync"

[[arms]]
name = "average"
"""


def small(tmp_path: Path, text: str = SMALL, profile: str = "full") -> Grid:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return load_grid(path, profile)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_grid_has_cells_that_fit_its_budget_in_every_profile(path: Path, profile: str) -> None:
    grid = load_grid(path, profile)
    for cell in grid.cells():
        run = grid.run(cell, 0.1, 1)
        assert run.total_steps * run.target_batch_size == grid.samples
        assert cell.arm == "sync" or run.target_batch_size == grid.batch_size * cell.steps


def test_every_cell_spends_the_same_samples_in_steps_of_the_same_batch(tmp_path: Path) -> None:
    grid = small(tmp_path)
    assert [(cell.arm, cell.peers, cell.steps) for cell in grid.cells()] == [
        ("sync", 1, 1),
        ("sync", 2, 1),
        ("average", 1, 1),
        ("average", 1, 4),
        ("average", 2, 1),
        ("average", 2, 4),
    ]
    run = grid.run(Cell("average", 2, 4), 0.2, 7)
    assert (run.strategy, run.target_batch_size, run.total_steps) == ("local", 32, 2)
    assert (run.local.inner_batch_size, run.optimizer.lr, run.seed) == (4, 0.2, 7)
    assert (run.local.outer_learning_rate, run.local.outer_momentum) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            ("steps = [1, 4]", "steps = [1, 3]"),
            "FILE: 3 steps between averages take 24 samples, so the budget of 64 samples is 2.67 rounds of "
            "them, and must be a whole number for each cell; set samples to 72, or change steps",
        ),
        (
            ("steps = [1, 4]", "steps = [1, 16]"),
            "FILE: 16 steps between averages take 128 samples, so the budget of 64 samples is 0.5 rounds of "
            "them, and must be a whole number for each cell; set samples to 128, or change steps",
        ),
        (
            ("peers = [1, 2]", "peers = [1, 3]"),
            "FILE: batch_size (8) must be divisible by the number of peers, and is not by 3; change one of "
            "them",
        ),
        (("seeds = [1, 2]", "seeds = [0, 1]"), "FILE: tuning_seed (0) must not be among seeds"),
        (("rates = [0.1, 0.2]", "rates = [0.2, 0.1]"), "FILE: rates must be one number or more, rising"),
        (("rates = ", "rate = "), 'unknown key "rate" in FILE; the nearest known key is rates'),
        (('strategy = "sync"', 'strategi = "sync"'), 'unknown key "arms[0].strategi" in FILE; the nearest'),
        (('name = "average"', 'name = "sync"'), "FILE: arms must have different names, not sync, sync"),
        (
            ('strategy = "sync"', 'strategy = "gossip"'),
            'arms[0].strategy in FILE must be "sync" or "local" or "partition", but is "gossip"',
        ),
        (
            ('name = "average"', 'name = "average"\nsplit = "label"'),
            'FILE: arm average has split = "label", but samples of task kind "bytes" have no label',
        ),
        (
            ("[[arms]]", '[task]\ncorpus = "novels"\n\n[[arms]]'),
            "FILE: task must be one that needs no peer file",
        ),
        (("samples = 64", 'samples = "many"'), "samples in FILE must be a whole number from 1"),
    ],
)
def test_grid_is_refused_with_a_sentence(tmp_path: Path, change: tuple[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small(tmp_path, SMALL.replace(*change, 1))
    said = str(caught.value).replace(str(tmp_path / "grid.toml"), "FILE")
    assert said.startswith(sentence)
    assert "\n" not in said


def test_profile_is_refused_when_its_budget_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile ci of .*4 steps between averages take 32"):
        small(tmp_path, SMALL.replace("[[arms]]", "[ci]\nsamples = 48\n\n[[arms]]", 1), "ci")


def test_arm_is_compared_with_the_synchronous_one_that_trains_the_same() -> None:
    arms = (
        Arm(name="sync", strategy="sync"),
        Arm(name="apart"),
        Arm(name="sgd", optimizer="sgd"),
        Arm(name="sgd-sync", strategy="sync", optimizer="sgd"),
        Arm(name="lamb", optimizer="lamb"),
    )
    grid = grid_of(arms=arms)
    found = {arm.name: (base.name if (base := grid.baseline(arm)) else None) for arm in arms}
    assert found == {
        "sync": "sync",
        "apart": "sync",
        "sgd": "sgd-sync",
        "sgd-sync": "sgd-sync",
        "lamb": None,
    }


# -- which trials are due ------------------------------------------------------------------------------------


def test_rate_is_tuned_with_its_own_seed_before_the_others_are_measured() -> None:
    grid = grid_of()
    results, order = conducted(grid, lambda trial: abs(trial.rate - 0.2))
    assert [(trial.rate, trial.seed) for trial in order] == [
        (0.1, 0),
        (0.2, 0),
        (0.4, 0),
        (0.2, 1),
        (0.2, 2),
    ]
    assert due(grid, results) == []


def test_row_of_rates_is_gone_on_with_when_the_best_is_at_its_end() -> None:
    _, order = conducted(grid_of(), lambda trial: abs(trial.rate - 1.7))
    assert [trial.rate for trial in order if trial.seed == 0] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2])
    assert {trial.rate for trial in order if trial.seed} == {1.6}
    _, order = conducted(grid_of(), lambda trial: trial.rate)
    assert [trial.rate for trial in order if trial.seed == 0] == pytest.approx(
        [0.1, 0.2, 0.4, 0.05, 0.025, 0.0125]
    )


def test_rate_that_diverges_is_the_worst() -> None:
    _, order = conducted(grid_of(), lambda trial: None if trial.rate > 0.1 else 9.0)
    assert {trial.rate for trial in order if trial.seed} == {0.0125}


def test_results_of_another_budget_do_not_count() -> None:
    results, _ = conducted(grid_of(), lambda trial: abs(trial.rate - 0.2))
    assert len(due(grid_of(samples=128), results)) == 3
    assert due(grid_of(link_mbit=(5.0,)), results) == []


def test_cost_of_all_is_that_of_what_is_conducted() -> None:
    grid = grid_of(peers=(1, 2), steps=(1, 4))
    _, order = conducted(grid, lambda trial: abs(trial.rate - 0.2))
    assert len(order) == 4 * 5
    assert whole_cost(grid) == pytest.approx(sum(cost(grid, trial) for trial in order))
