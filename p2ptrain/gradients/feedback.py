"""What the codec lost of a mean is owed: its reducer adds it to the next mean of the same values.

A member does the same with its contributions, see `Accumulator.settle`. So what a lossy codec takes from one
step it gives to the next ones, and the sum of all steps is that of the gradients, up to what is owed at the
end (error feedback: Seide et al. 2014; in both directions: Tang et al. 2019, "DoubleSqueeze").

Only a committed attempt counts: each works on a copy of what was owed when it began. Replicas stay equal
whatever is owed, since all of them decode the bytes that came of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from p2ptrain.gradients.codecs import LARGEST, Buffer, Codec


class Owed:
    """What a codec with `feedback` lost of the means of one span. With any other codec, nothing is owed."""

    def __init__(self, codec: Codec, start: int = 0, stop: int = 0) -> None:
        """Nothing is owed yet to the values [start, stop)."""
        self._codec, self._start = codec, start
        self._lost = torch.zeros(stop - start if codec.feedback else 0)

    def moved(self, start: int, stop: int) -> Owed:
        """A copy for a reducer whose span is now [start, stop): what it owed to values that went to another
        reducer is forgotten, and it owes nothing to those that came."""
        moved = Owed(self._codec, start, stop)
        low, high = max(start, self._start), min(stop, self._start + len(self._lost))
        if low < high:
            kept = self._lost[low - self._start : high - self._start]
            moved._lost[low - start : high - start] = kept
        return moved

    def encode(self, start: int, mean: Tensor, memory: Tensor | None = None) -> tuple[Buffer, Tensor]:
        """The mean (float32 [n], which is used up) of the values from `start` on, plus what was owed to them:
        as bytes, and as everyone will decode these, in `memory` if there is some. What they lose is owed from
        now on."""
        if self._codec.feedback:
            owed = self._lost[start - self._start :][: len(mean)]
            mean.add_(owed).clamp_(-LARGEST, LARGEST)
        encoded = self._codec.encode(mean)
        if self._codec.exact:
            return encoded, mean
        decoded = torch.empty_like(mean) if memory is None else memory
        self._codec.decode(encoded, decoded)
        if self._codec.feedback:
            torch.sub(mean, decoded, out=owed)
        return encoded, decoded
