"""What one peer brings to a round: the sum of its samples' gradients, and their number.

A sum and a count, never a mean: two peers' contributions then combine by adding both, whatever their sizes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from p2ptrain.gradients.codecs import LARGEST

LARGEST_GRADIENT = LARGEST / 2**24
"""A value beyond ± this counts as not finite: `config` allows no more than 2^24 samples a step, and so many
micro-batches within it add up to a total that every codec accepts."""


class Accumulator:
    """`total` (float32 [numel]) = Σ ∂loss/∂θ over `samples` samples."""

    def __init__(self, numel: int) -> None:
        self.total = torch.zeros(numel)
        self.samples = 0

    def add(self, gradient: Tensor, samples: int) -> bool:
        """Add the gradient (float32 [numel]) summed over `samples` samples.

        False, and nothing changed, if it holds a value that is not finite or beyond `LARGEST_GRADIENT`: one
        such value would spoil what every other peer brings (I5).
        """
        if samples < 1 or gradient.shape != self.total.shape:
            raise ValueError(
                f"expected a gradient of {list(self.total.shape)} over at least 1 sample, "
                f"not {list(gradient.shape)} over {samples}"
            )
        low, high = (extreme.item() for extreme in torch.aminmax(gradient))
        if math.isnan(low) or low < -LARGEST_GRADIENT or high > LARGEST_GRADIENT:
            return False
        self.total.add_(gradient)
        self.samples += samples
        return True

    def reset(self) -> None:
        """Nothing brought yet."""
        self.total.zero_()
        self.samples = 0
