"""Small experiments whose trials nobody conducts: their losses are made up."""

from __future__ import annotations

from typing import Any

from p2ptrain.experiment.grid import Arm, Grid
from p2ptrain.experiment.trials import Result, Trial, due, key_of


def grid_of(**fields: Any) -> Grid:
    defaults: dict[str, Any] = {
        "name": "small",
        "samples": 64,
        "batch_size": 8,
        "peers": (2,),
        "steps": (4,),
        "seeds": (1, 2),
        "rates": (0.1, 0.2, 0.4),
        "arms": (Arm(name="average"),),
    }
    return Grid(**defaults | fields)


def result_of(grid: Grid, trial: Trial, loss: float | None) -> Result:
    return Result(
        key=key_of(grid, trial),
        arm=trial.cell.arm,
        peers=trial.cell.peers,
        steps=trial.cell.steps,
        rate=trial.rate,
        seed=trial.seed,
        loss=loss,
        curve=() if loss is None else ((32, loss + 1), (64, loss)),
        accuracy=None,
        rounds=2,
        sent_bytes=100.0 * trial.cell.peers / trial.cell.steps,
        encoded_bytes=400,
        seconds=0.5,
    )


def conducted(grid: Grid, loss: Any) -> tuple[dict[str, Result], list[Trial]]:
    """All that is due until nothing is, where a trial's loss is `loss(trial)`."""
    results: dict[str, Result] = {}
    order: list[Trial] = []
    while trials := due(grid, results):
        for trial in trials:
            result = result_of(grid, trial, loss(trial))
            results[result.key] = result
        order += trials
    return results, order
