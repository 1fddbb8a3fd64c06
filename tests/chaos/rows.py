"""The rows of the fault matrix: what a row is, how it is registered, and what it gets to work with.

A row is a function that takes a `Trial`, does its fault to a swarm of its own, and returns the `Figures`
that it measured, or raises `Failed` with what it saw instead. The rows are in `rows_*.py`.
"""

from __future__ import annotations

import importlib
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

from p2ptrain.config import BytesTask, RunConfig, Schedule
from tests.chaos.lab import Lab
from tests.chaos.swarm import Failed, Swarm

__all__ = ["ROWS", "Failed", "Figures", "Form", "Row", "Trial", "load_rows", "must", "row"]


@dataclass(frozen=True)
class Figures:
    """What a row measured."""

    text: str
    """A few words for the table."""
    numbers: dict[str, float]
    """The same for programs; units last in the names."""


@dataclass(frozen=True)
class Row:
    """One fault and what must hold under it."""

    number: int
    fault: str
    injected: str
    criterion: str
    """Beyond I1 to I6, which hold in every row."""
    gate: bool
    """Whether it must pass for a release; the others run nightly."""
    ci: bool
    """Whether its short form runs with every change."""
    deadline_seconds: float
    play: Callable[[Trial], Figures]


ROWS: dict[int, Row] = {}


def row(
    number: int,
    *,
    fault: str,
    injected: str,
    criterion: str,
    gate: bool = True,
    ci: bool = False,
    deadline_seconds: float = 240.0,
) -> Callable[[Callable[[Trial], Figures]], Callable[[Trial], Figures]]:
    """Register a function as that row."""

    def register(play: Callable[[Trial], Figures]) -> Callable[[Trial], Figures]:
        assert number not in ROWS, f"there are two rows {number}"
        ROWS[number] = Row(number, fault, injected, criterion, gate, ci, deadline_seconds, play)
        return play

    return register


def load_rows() -> dict[int, Row]:
    """All rows, in order."""
    for path in sorted(Path(__file__).parent.glob("rows_*.py")):
        importlib.import_module(f"tests.chaos.{path.stem}")
    return dict(sorted(ROWS.items()))


def must(holds: bool, told: str) -> None:
    """Raises Failed with this unless it holds."""
    if not holds:
        raise Failed(told)


# -- what a row works with -----------------------------------------------------------------------------------

LARGE = BytesTask()
"""0.82 M parameters."""
SMALL = BytesTask(layers=1, width=32, heads=2, context=32)
"""0.12 M: a step takes little more than its round."""


class Form(Enum):
    """How much of itself a row shows; the faults and demands are the same."""

    SHORT = "short"
    """For CI: a small model, few peers, short waits."""
    GATE = "gate"
    SOAK = "soak"
    """As long as the row's fault asks for; the others are as in the gate."""


@dataclass(frozen=True)
class Trial:
    """One try at a row."""

    folder: Path
    seed: int
    form: Form

    def pick(self, gate: Any, short: Any, soak: Any = None) -> Any:
        """The value for the form that is played; with no `soak` the gate's holds there, too."""
        return short if self.form is Form.SHORT else gate if self.form is Form.GATE or soak is None else soak

    def tiny(self) -> dict[str, Any]:
        """Fields of a run with next to nothing to compute and to send, for rows with many peers."""
        return {"task": SMALL, "chunk_values": 4096, "heartbeat_seconds": 0.5, "silence_seconds": 3.0}

    def run(self, **changes: Any) -> RunConfig:
        """The run file: steps of about 2 s, in the short form of about half a second."""
        base: dict[str, Any] = {
            "run_id": "matrix",
            "total_steps": 1_000_000,
            "target_batch_size": self.pick(192, 1024),
            "seed": self.seed,
            "task": self.pick(LARGE, SMALL),
            "schedule": Schedule(warmup_steps=2),
            "chunk_values": self.pick(65_536, 4096),
            "heartbeat_seconds": self.pick(1.0, 0.5),
            "silence_seconds": self.pick(4.0, 3.0),
        }
        return RunConfig(**{**base, **changes})

    @contextmanager
    def swarm(
        self,
        *,
        peers: int = 4,
        tells: str | None = None,
        forks: bool = False,
        peer_file: Mapping[str, Any] = MappingProxyType({}),
        **changes: Any,
    ) -> Iterator[Swarm]:
        """A swarm in a lab of its own, training together; `changes`: of the run file. I1 to I6 are checked at
        the end of the block. The lab's folder is kept if anything failed."""
        folder = Path(tempfile.mkdtemp(prefix="lab-", dir=self.folder))
        with (
            Lab(folder) as lab,
            Swarm(
                lab,
                self.run(**changes),
                peers=peers,
                peer_file=peer_file,
                tells=tells,
                forks=forks,
            ) as swarm,
        ):
            if peers:
                swarm.together()
            yield swarm
        shutil.rmtree(folder)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises Failed in the block when it takes longer. For the main thread only."""

    def over(number: int, frame: FrameType | None) -> None:
        raise Failed(f"the row was not over after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
