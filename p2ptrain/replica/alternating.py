"""Adapters trained apart: one factor of each at a time, so that averaging them is exact.

An adapter changes a weight by s·B·A. Of adapters that peers trained apart the mean is Σ p·B_i·A_i, and not
the product of mean factors, which has cross terms B_i·A_j. But where one factor is held by all alike for a
round, Σ p·B_i·A = (Σ p·B_i)·A: then the mean of what travels *is* the mean of the adapters, and an outer step
along it, whatever its rate and momentum, is that step of their product. So in even rounds all train B, which
starts from zero, and in odd ones A (as RoLoRA does, Chen et al. 2025, arXiv:2502.01755). Each factor has an
optimizer of its own, which rests while it is the other's turn.

The residual Σ p·B_i·A_i - (Σ p·B_i)·(Σ p·A_i), which FedEx-LoRA adds to the base, has a rank of up to
rank · peers: no sum over peers carries it in less than the bytes of the whole weights, and the base would
become part of the replicated state.

Not covered: rounds that carry only the factor whose turn it is. The other's values travel, too, as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from p2ptrain.replica.optimizers import FlatOptimizer

Parts = Mapping[str, tuple[int, int]]
"""Name → range [start, stop) of a vector."""


class Alternating:
    """A `FlatOptimizer` that steps one part of the vector at a time. The rest of the vector, and of its own
    state, does not change by a bit."""

    def __init__(
        self, parts: Parts, build: Callable[[int, int], FlatOptimizer], turn: Callable[[], str]
    ) -> None:
        """`build`: (start, stop) → the optimizer of that range; `turn`: the name of the part to step now."""
        self._parts, self._turn = parts, turn
        self._each = {name: build(*bounds) for name, bounds in parts.items()}

    @property
    def weight_decay(self) -> float:
        return next(iter(self._each.values())).weight_decay

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        for each in self._each.values():
            each.weight_decay = value

    def step(self, parameters: Tensor, gradient: Tensor, lr: float) -> None:
        name = self._turn()
        start, stop = self._parts[name]
        self._each[name].step(parameters[start:stop], gradient[start:stop], lr)

    def state_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}_{key}": tensor
            for name, each in self._each.items()
            for key, tensor in each.state_tensors().items()
        }

    def scalars(self) -> dict[str, float]:
        return {
            f"{name}_{key}": value
            for name, each in self._each.items()
            for key, value in each.scalars().items()
        }

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
        for name, each in self._each.items():
            each.load(
                {key: tensors[f"{name}_{key}"] for key in each.state_tensors()},
                {key: scalars[f"{name}_{key}"] for key in each.scalars()},
            )

    def load_whole(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
        """Adopt a copy of the state of one optimizer for the whole vector."""
        for name, each in self._each.items():
            start, stop = self._parts[name]
            each.load({key: tensor[start:stop] for key, tensor in tensors.items()}, scalars)
