"""What an experiment compares: numbers of peers × steps between averages × ways to train, at one budget.

Every cell spends the same samples, and all peers together the same batch, so that a cell differs from the
synchronous one in nothing but who steps where (the protocol of "Scaling laws for DiLoCo", 2503.09799). With a
budget for each peer instead, more peers would bring more data, and the sign of the effect in the number of
peers would turn (DiLoCo, table 3): every table here says which it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from p2ptrain.config import (
    AnyTask,
    BytesTask,
    Local,
    Optimizer,
    Partition,
    RunConfig,
    RunId,
    Schedule,
    Section,
    load,
)
from p2ptrain.errors import ConfigError

PROFILES = ("smoke", "ci", "full")
STEPS_BETWEEN_PROBES = 20
"""At least so many, where peers train apart: to measure what putting together does costs as much as some
steps."""

Peers = Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(strict=False, max_length=16)]
Steps = Annotated[tuple[Annotated[int, Field(ge=1, le=10**6)], ...], Field(strict=False, max_length=32)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(strict=False, max_length=32)]
Rates = Annotated[tuple[Annotated[float, Field(gt=0, le=10)], ...], Field(strict=False, max_length=32)]
Budget = Annotated[int, Field(ge=1, le=10**9)]


class Profile(Section):
    """What a shorter run of the grid has in place of its own; 0 or empty: as the grid says."""

    samples: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Budget of each cell."""

    peers: Peers = ()
    """Numbers of peers."""

    steps: Steps = ()
    """Steps between two averages."""

    seeds: Seeds = ()
    """Seeds that are measured."""

    rates: Rates = ()
    """Learning rates that are tried."""


class Arm(Section):
    """One way to train."""

    name: RunId
    """What tables call it."""

    strategy: Literal["sync", "local", "partition"] = "local"
    """As in a run file. Strategy `sync` averages after each step, whatever `steps` says."""

    outer_learning_rate: Annotated[float, Field(gt=0, le=10)] = 1.0
    """local: share of the average change that is taken."""

    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """local: how much of the last outer step is repeated in the next (Nesterov); 0: plain averaging."""

    by: Literal["tensor", "block", "random"] = "tensor"
    """partition: what a part is."""

    gamma: Literal["1", "1/n", "auto"] = "auto"
    """partition: by what the union of all parts' changes is multiplied."""

    optimizer: Literal["", "adamw", "sgd", "lamb"] = ""
    """In place of the grid's `optimizer.kind`."""

    split: Literal["iid", "label"] = "iid"
    """Which samples each peer draws. `iid`: any. `label`: the data is sorted by label and cut into as many
    parts as there are peers, so that each knows few labels (McMahan et al. 2017); for tasks of pictures and
    labels."""

    peers: Peers = ()
    """In place of the grid's, for this way alone."""

    steps: Steps = ()
    """In place of the grid's, for this way alone."""

    rates: Rates = ()
    """In place of the grid's, for this way alone."""


class Grid(Section):
    """An experiment: which cells, and what is trained in each of them."""

    name: RunId
    """What the report calls it."""

    row: Literal["", "R5", "R6", "R9"] = ""
    """Which expectation from the literature the report holds the result against; see the room's README."""

    samples: Budget
    """Samples that each cell trains on, all its peers together."""

    batch_size: Annotated[int, Field(ge=1, le=2**20)]
    """Samples in one step of all peers together: each takes its share of them."""

    peers: Peers
    """Numbers of peers."""

    steps: Steps
    """Steps that each peer takes between two averages."""

    seeds: Seeds
    """Of parameters and samples; each cell is measured with each of them."""

    tuning_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """With which the learning rate of each cell is chosen; none of `seeds`."""

    rates: Rates
    """Learning rates to choose from, rising. If the best is at an end, the row is gone on with, up to three
    times."""

    codec: Literal["fp32", "fp16", "bf16", "int8", "int4", "topk", "lowrank"] = "fp16"
    """How what is averaged travels."""

    task: AnyTask = BytesTask()
    """What is trained, as in a run file."""

    optimizer: Optimizer = Optimizer(clip_norm=0.0)
    """Of each peer's own steps, as in a run file; the rate is the tuned one."""

    arms: Annotated[tuple[Arm, ...], Field(strict=False, min_length=1, max_length=16)]
    """The ways to train. Each is compared with the one of strategy `sync` that has its optimizer and
    split, if there is one."""

    link_mbit: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1e6)], ...], Field(strict=False, max_length=8)
    ] = (10.0, 100.0, 1000.0)
    """Megabits per second, of each peer and either way, for which the report foretells hours."""

    rtt_milliseconds: Annotated[float, Field(ge=0, le=10_000)] = 50.0
    """Round trip between two peers, for the same."""

    smoke: Profile = Profile()
    """Seconds: does it work at all?"""

    ci: Profile = Profile()
    """Minutes."""

    @model_validator(mode="after")
    def _cells_make_sense(self) -> Self:
        for key in ("peers", "steps", "seeds", "rates"):
            values: tuple[float, ...] = getattr(self, key)
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"{key} must be one number or more, rising, not {list(values)}")
        if self.task.kind == "own" or self.task.names:
            raise ValueError(
                "task must be one that needs no peer file: nothing here says where a model or a text is, or "
                "allows code of others; take a new model, and stdlib or digits"
            )
        for arm in self.arms:
            for key in ("peers", "steps", "rates"):
                values = getattr(arm, key)
                if list(values) != sorted(set(values)):
                    raise ValueError(f"{key} of arm {arm.name} must be rising, not {list(values)}")
        if self.tuning_seed in self.seeds:
            raise ValueError(
                f"tuning_seed ({self.tuning_seed}) must not be among seeds: the rate would be chosen by what "
                "it is then judged by; take another number"
            )
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"arms must have different names, not {', '.join(names)}")
        for cell in self.cells():
            self._check(cell)
        return self

    def _check(self, cell: Cell) -> None:
        if self.batch_size % cell.peers:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be divisible by the number of peers, and is not by "
                f"{cell.peers}; change one of them"
            )
        if self.samples % cell.round_samples(self.batch_size):
            rounds = self.samples / cell.round_samples(self.batch_size)
            all_whole = math.lcm(*(each.round_samples(self.batch_size) for each in self.cells()))
            whole = max(1, round(self.samples / all_whole)) * all_whole
            raise ValueError(
                f"{cell.steps} steps between averages take {cell.round_samples(self.batch_size)} samples, so "
                f"the budget of {self.samples} samples is {rounds:.3g} rounds of them, and must be a whole "
                f"number for each cell; set samples to {whole}, or change steps"
            )
        arm = self.arm(cell.arm)
        if arm.split == "label" and self.task.kind != "digits":
            raise ValueError(
                f'arm {arm.name} has split = "label", but samples of task kind "{self.task.kind}" have no '
                'label; set split to "iid", or task.kind to "digits"'
            )

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def kind_of(self, arm: Arm) -> str:
        """The optimizer of each peer's own steps."""
        return arm.optimizer or self.optimizer.kind

    def baseline(self, arm: Arm) -> Arm | None:
        """The synchronous one that it is compared with; for that one, itself."""
        alike = (
            other
            for other in self.arms
            if other.strategy == "sync"
            and (self.kind_of(other), other.split) == (self.kind_of(arm), arm.split)
        )
        return next(alike, None)

    def cells(self) -> list[Cell]:
        """In the order in which they are run."""
        return [
            Cell(arm.name, peers, steps)
            for arm in self.arms
            for peers in arm.peers or self.peers
            for steps in ((1,) if arm.strategy == "sync" else arm.steps or self.steps)
        ]

    def rates_of(self, cell: Cell) -> tuple[float, ...]:
        return self.arm(cell.arm).rates or self.rates

    def run(self, cell: Cell, rate: float, seed: int) -> RunConfig:
        """The run file of that cell: what its peers would join."""
        arm = self.arm(cell.arm)
        optimizer = self.optimizer.model_copy(update={"kind": self.kind_of(arm), "lr": rate})
        target = cell.round_samples(self.batch_size)
        return RunConfig(
            run_id=self.name,
            strategy=arm.strategy,
            total_steps=self.samples // target,
            target_batch_size=target,
            min_peers=cell.peers,
            max_peers=cell.peers,
            codec=self.codec if arm.strategy != "partition" else "fp32",
            seed=seed,
            task=self.task,
            optimizer=optimizer,
            local=Local(
                inner_batch_size=self.batch_size // cell.peers,
                outer_learning_rate=arm.outer_learning_rate,
                outer_momentum=arm.outer_momentum,
            ),
            partition=Partition(
                by=arm.by,
                inner_batch_size=self.batch_size // cell.peers,
                gamma=arm.gamma,
                probe_every=rounds_between_probes(cell.steps),
            ),
            schedule=Schedule(warmup_steps=0),
        )


@dataclass(frozen=True, order=True)
class Cell:
    """One combination that is measured."""

    arm: str
    peers: int
    steps: int
    """Between two averages."""

    def round_samples(self, batch_size: int) -> int:
        """Samples of all peers together between two averages."""
        return batch_size * self.steps


def rounds_between_probes(steps: int) -> int:
    """With so many steps between averages."""
    return max(1, STEPS_BETWEEN_PROBES // steps)


def load_grid(path: Path | str, profile: str = "full") -> Grid:
    """The grid in this TOML file, as that profile has it. Raises ConfigError."""
    return with_profile(load(Grid, path), profile, str(path))


def with_profile(grid: Grid, profile: str, where: str) -> Grid:
    """Raises ConfigError if what the profile changes makes no valid grid."""
    if profile == "full":
        return grid
    given: Profile = getattr(grid, profile)
    changes = {key: value for key, value in given if value}
    try:
        return Grid.model_validate(grid.model_dump() | changes)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ConfigError(f"profile {profile} of {where}: {problem['ctx']['error']}") from None


def sizes(cells: Sequence[Cell]) -> tuple[list[int], list[int]]:
    """The numbers of peers and of steps that these cells have, rising."""
    return sorted({cell.peers for cell in cells}), sorted({cell.steps for cell in cells})
