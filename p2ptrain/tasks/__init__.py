"""What is trained: the `Task` interface, and the built-in tasks."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from p2ptrain.config import RunConfig


class Task(Protocol):
    """Model, data and loss of a run. Built from the run file alone, so it is the same on every peer.

    Which sample is which is a pure function of (run seed, step, peer, number): there is no data state to save, a
    sample that was never committed is drawn again, and none can be counted twice (I4).
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


def build_task(run: RunConfig, corpus: str = "") -> Task:
    """The task of a run. `corpus` is where this peer has the text, if the run does not name the standard library.

    Raises CorpusError if that text is missing, empty or too small.
    """
    from p2ptrain.tasks.bytes import BytesTask

    return BytesTask(run.task, run.seed, corpus or run.task.corpus)
