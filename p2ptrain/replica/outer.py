"""A second momentum around the optimizer: every so many steps, over how far these led together.

DiLoCo's outer step (Douillard et al. 2023) with one replica, as in MuLoCo (2025). Where everyone trains apart
it is what averages are applied by; where all take the same steps, as here, it costs no communication at all:
each peer does it by itself, by operations that round alike everywhere (see `optimizers`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from p2ptrain.config import Outer as OuterConfig


class Outer:
    """With Δ = anchor - θ: v ← momentum·v + Δ, θ ← anchor - rate·(Δ + momentum·v), anchor ← θ (Nesterov)."""

    def __init__(self, config: OuterConfig, parameters: Tensor) -> None:
        """From `parameters` (float32 [numel]) on, those of step 0."""
        self._config = config
        self._anchor = parameters.clone()
        self._velocity = torch.zeros_like(parameters)

    def after(self, step: int, parameters: Tensor) -> None:
        """The optimizer led to `step`; if it is a multiple of `every`, `parameters` change in place."""
        if step % self._config.every:
            return
        momentum, rate = (
            torch.tensor(value, dtype=torch.float32, device=parameters.device)
            for value in (self._config.momentum, self._config.learning_rate)
        )
        moved = torch.sub(self._anchor, parameters)
        self._velocity.mul_(momentum).add_(moved)
        moved.add_(torch.mul(self._velocity, momentum)).mul_(rate)
        self._anchor.sub_(moved)
        parameters.copy_(self._anchor)

    def state_tensors(self) -> dict[str, Tensor]:
        """The state itself, not a copy: float32 [numel] each."""
        return {"outer_anchor": self._anchor, "outer_velocity": self._velocity}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Adopt a copy of a state whose names and shapes are those of `state_tensors`."""
        self._anchor.copy_(tensors["outer_anchor"])
        self._velocity.copy_(tensors["outer_velocity"])
