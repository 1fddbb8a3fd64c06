"""Inner steps: those that a peer takes by itself between two rounds, with strategies `local` and `partition`.

Not covered: what of them a peer brings to a round; see `apart` and `parts`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from p2ptrain.gradients.accumulator import in_bounds
from p2ptrain.replica.optimizers import clip_factor


class InnerSteps(ABC):
    """What strategies in which a peer takes steps of its own have in common, each an `Accumulator` to the
    trainer: gradients are summed until an inner batch is full, and its mean makes a step."""

    total: Tensor
    """float32 [values], on the CPU: what this peer brings."""
    counts_each = False

    def __init__(self, inner_batch_size: int, working: Tensor) -> None:
        """`working`: the model's parameters [numel]."""
        self.samples, self.loss_sum = 0, 0.0
        """In steps that were taken; Σ loss over them."""
        self._inner_batch_size, self._working = inner_batch_size, working
        self._sum = torch.zeros_like(working)
        self._summed, self._waiting_loss, self._stale = 0, 0.0, False

    @property
    def room(self) -> int:
        """Samples that the inner batch under way still takes."""
        return self._inner_batch_size - self._summed

    @property
    def gathered(self) -> bool:
        """Whether `total` is up to date."""
        return not self._stale

    def add(self, gradient: Tensor, samples: int, loss_sum: float = 0.0) -> bool:
        """Add a gradient (float32 [numel]) and a loss, summed over at most `room` samples; when the inner
        batch is full, take the step. False, and nothing changed, if the gradient is not finite (I5)."""
        if not 1 <= samples <= self.room or gradient.shape != self._sum.shape:
            raise ValueError(
                f"expected a gradient of {list(self._sum.shape)} over 1 to {self.room} samples, "
                f"not {list(gradient.shape)} over {samples}"
            )
        if not in_bounds(gradient):
            return False
        self._sum.add_(gradient)
        self._summed += samples
        self._waiting_loss += loss_sum
        if not self.room:
            self._step(
                self._sum.div_(
                    torch.tensor(float(self._summed), dtype=torch.float32, device=self._sum.device)
                )
            )
            self.samples += self._summed
            self.loss_sum += self._waiting_loss
            self._sum.zero_()
            self._summed, self._waiting_loss, self._stale = 0, 0.0, True
        return True

    @abstractmethod
    def _step(self, mean: Tensor) -> None:
        """By the gradient of an inner batch (float32 [numel]), which may be changed."""

    def _begin(self) -> None:
        """Nothing brought yet."""
        self.total.zero_()
        self._sum.zero_()
        self.samples, self.loss_sum = 0, 0.0
        self._summed, self._waiting_loss, self._stale = 0, 0.0, False


def clip(mean: Tensor, norm: float) -> None:
    """Make the gradient no longer than `norm`, if that is not 0."""
    if (factor := clip_factor([float(torch.linalg.vector_norm(mean)) ** 2], norm)) < 1.0:
        mean.mul_(factor)
