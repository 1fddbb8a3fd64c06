"""What is trained: the `Task` interface, and the built-in tasks."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from p2ptrain.config import RunConfig
from p2ptrain.errors import CorpusError
from p2ptrain.tasks.bytes import BytesTask


class Task(Protocol):
    """Model, data and loss of a run. Built from the run file alone, so it is the same on every peer.

    Which sample is which is a pure function of (run seed, step, peer, number): there is no data state to
    save, a sample that was never committed is drawn again, and none can be counted twice (I4).
    """

    @property
    def note(self) -> str:
        """One line about this peer's data for its presence record, such as the corpus digest."""
        ...

    def build_model(self, seed: int) -> nn.Module:
        """A freshly initialised model, float32 on the CPU."""
        ...

    def batch(self, step: int, peer: str, first: int, count: int) -> Any:
        """Samples `first … first + count - 1` that `peer` draws for global step `step`."""
        ...

    def loss_sum(self, model: nn.Module, batch: Any) -> Tensor:
        """float32 scalar: Σ over the batch's samples of each sample's loss (never the mean)."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out figures; `loss` (nats) is always there."""
        ...

    def preview(self, model: nn.Module, prompt: str, length: int, generator: torch.Generator) -> str:
        """A short text that shows what the model has learned."""
        ...


def build_task(run: RunConfig, corpus_override: str = "") -> Task:
    """The task of a run, on the text at `corpus_override` (from the peer file) or else on the run's own.

    A run's corpus other than `stdlib` is only a name, never opened as a path: the run may come from a
    stranger, and a trained model can repeat what it has read.
    Raises CorpusError if the text is missing, empty or too small.
    """
    if not corpus_override and run.task.corpus != "stdlib":
        raise CorpusError(
            f"run {run.run_id} trains on the text {run.task.corpus!r}, which is only a name; "
            "set `corpus` in the peer file to the file or folder where you have that text"
        )
    return BytesTask(run.task, run.seed, corpus_override or "stdlib")
