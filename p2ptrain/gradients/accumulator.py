"""What one peer brings to a round: the sum of its samples' gradients, and their number.

A sum and a count, never a mean: two peers' contributions then combine by adding both, whatever their sizes.
Gradients from another device are added up there, and brought here once a round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from p2ptrain.gradients.codecs import LARGEST, Buffer, Codec
from p2ptrain.gradients.noise import UNMEASURED, Spread, Within

LARGEST_GRADIENT = LARGEST / 2**25
"""A value beyond ± this counts as not finite: `config` allows no more than 2^24 samples a step, and so many
micro-batches within it, and what is owed from before, add up to a total that every codec accepts."""

MOST_SAMPLES = 2**24

Sent = tuple[int, int, Buffer]
"""(start, stop, encoded bytes) of a chunk of the total."""


class Accumulator:
    """`total` (float32 [numel]) = Σ ∂loss/∂θ over `samples` samples, and what the codec lost of such totals
    before; `loss_sum` = Σ loss over the same samples. The total is on the CPU, and is up to date unless
    gradients from another device wait there, see `gather`."""

    counts_each = True

    def __init__(self, numel: int, device: torch.device | None = None) -> None:
        """`device`: where the gradients come from, if that is another one."""
        self.total = torch.zeros(numel)
        self._there = None if device is None else torch.zeros(numel, device=device)
        self._waits = False
        self._before: Tensor | None = None
        self.samples = 0
        self.loss_sum = 0.0
        self._within = Within()

    def add(self, gradient: Tensor, samples: int, loss_sum: float = 0.0) -> bool:
        """Add the gradient (float32 [numel]) and the loss, both summed over `samples` samples.

        False, and nothing changed, if it holds a value that is not finite or beyond `LARGEST_GRADIENT`: one
        such value would spoil what every other peer brings (I5).
        """
        if samples < 1 or gradient.shape != self.total.shape:
            raise ValueError(
                f"expected a gradient of {list(self.total.shape)} over at least 1 sample, "
                f"not {list(gradient.shape)} over {samples}"
            )
        squares = _squared_norm(gradient)
        # Squares whose sum float32 holds are of values below 2^64; to look at each takes five times as long.
        if not (math.isfinite(squares) or in_bounds(gradient)):
            return False
        if self._there is None:
            self.total.add_(gradient)
        else:
            self._there.add_(gradient)
            self._waits = True
        self._within.add(squares, samples)
        self.samples += samples
        self.loss_sum += loss_sum
        return True

    @property
    def room(self) -> int:
        """Samples that still go in: any number."""
        return MOST_SAMPLES

    @property
    def gathered(self) -> bool:
        """Whether `total` is up to date."""
        return not self._waits

    def gather(self) -> None:
        """Bring what waits on the other device into `total`. Nothing may be added meanwhile."""
        if self._there is not None and self._waits:
            self.total.add_(self._there.cpu())
            self._there.zero_()
            self._waits = False

    def absorb(self, other: Accumulator) -> None:
        """Take over what the other holds; it is empty then."""
        self.total.add_(other.total)
        if self._there is not None and other._there is not None:
            self._there.add_(other._there)
            self._waits = self._waits or other._waits
        self._within.absorb(other._within)
        self.samples += other.samples
        self.loss_sum += other.loss_sum
        other.reset()

    def settle(self, codec: Codec, sent: Iterable[Sent]) -> Spread | None:
        """The round is committed, and the total is in it as `sent`, or not at all if it had no samples.
        Returns how far the micro-batches in it were apart, if that can be told.

        What a codec with `feedback` lost stays in the total, to be sent with the next samples. It is a part
        of a sum, so it counts for as much as it would have then, whatever the number of samples.
        """
        spread = None
        if codec.name not in UNMEASURED and self._within.groups > 1:
            spread = self._within.spread(_squared_norm(self.total))
        if codec.feedback:
            for start, stop, data in sent:
                lost, decoded = self.total[start:stop], torch.empty(stop - start)
                codec.decode(data, decoded)
                lost.sub_(decoded).clamp_(-LARGEST_GRADIENT, LARGEST_GRADIENT)
        elif self._before is not None:
            self.total, self._before = self._before.zero_(), self.total
        else:
            self.total.zero_()
        self.samples, self.loss_sum, self._within = 0, 0.0, Within()
        return spread

    def keep_one_more(self) -> None:
        """From now on a total that was settled stays as it is until the next one is: an audit may ask for
        it."""
        self._before = torch.zeros_like(self.total)

    def reset(self) -> None:
        """Nothing brought yet, and nothing owed."""
        self.total.zero_()
        if self._there is not None:
            self._there.zero_()
            self._waits = False
        self.samples, self.loss_sum, self._within = 0, 0.0, Within()


def in_bounds(gradient: Tensor) -> bool:
    """Whether each value is finite and within ± `LARGEST_GRADIENT`."""
    low, high = (extreme.item() for extreme in torch.aminmax(gradient))
    return low >= -LARGEST_GRADIENT and high <= LARGEST_GRADIENT  # a NaN is neither


def _squared_norm(vector: Tensor) -> float:
    """For figures only: to the millionth part, and infinite where float32 cannot hold it. On a CPU in
    pieces, as a sum in one go rounds more there."""
    size = 2**17 if vector.device.type == "cpu" else len(vector)
    return math.fsum(torch.dot(piece, piece).item() for piece in torch.split(vector, size))
