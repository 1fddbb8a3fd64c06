"""A task whose samples are not alike on all peers: each draws from a part of the data of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from p2ptrain.replica.strategy import PROBE
from p2ptrain.tasks import Numbered, Task
from p2ptrain.tasks.draws import draws


class ByLabel:
    """A `Task`: the numbered samples of another, sorted by label, in as many equal parts as the roster has
    peers; each draws from its own, and the probe, which is nobody, from all."""

    def __init__(self, task: Task, seed: int, roster: Sequence[str]) -> None:
        """`task`: of samples (inputs, labels int64 [n]) that are numbered."""
        assert isinstance(task, Numbered)
        _, labels = task.samples(range(task.size))
        order = torch.argsort(labels, stable=True)
        parts = torch.tensor_split(order, len(roster))
        self._numbered, self._task, self._seed = task, task, seed
        self._parts: dict[str, Tensor] = dict(zip(roster, parts, strict=True))

    @property
    def note(self) -> str:
        return self._task.note

    @property
    def shared_note(self) -> str:
        return self._task.shared_note

    def build_model(self, seed: int) -> nn.Module:
        return self._task.build_model(seed)

    def batch(self, step: int, peer: str, first: int, count: int) -> Any:
        if peer == PROBE:
            return self._task.batch(step, peer, first, count)
        part = self._parts[peer]
        drawn = [each % len(part) for each in draws(self._seed, step, peer, first, count)]
        return self._numbered.samples(part[drawn].tolist())

    def loss_sum(self, model: nn.Module, batch: Any) -> Tensor:
        return self._task.loss_sum(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self._task.evaluate(model)

    def preview(
        self, model: nn.Module, prompt: str, length: int, generator: torch.Generator, temperature: float = 0.7
    ) -> str:
        return self._task.preview(model, prompt, length, generator, temperature)
