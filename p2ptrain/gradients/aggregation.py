"""What a reducer computes: the mean of the members' totals over all their samples.

Float addition is not associative, so the members are added in roster order, whatever order their chunks
arrived in, and the division is done once, by a tensor: dividing by a Python scalar multiplies by its
reciprocal on some devices, which rounds differently.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from p2ptrain.errors import PeerFault


class EmptyRound(PeerFault):
    """No member of the round brought a sample: there is nothing to average."""


def mean_chunk(totals: Sequence[Tensor], samples: Sequence[int]) -> Tensor:
    """Mean gradient over every sample of the round, for one chunk. A new tensor, float32 [n].

    `totals[i]` (float32 [n]) is member i's sum over its `samples[i]` ≥ 0 samples, in roster order; the total
    of a member that brought none is not looked at. Raises EmptyRound if no member brought a sample.
    """
    brought = [total for total, count in zip(totals, samples, strict=True) if count > 0]
    if not brought:
        raise EmptyRound(f"none of the {len(samples)} members of the round brought a sample")
    mean = brought[0].clone()
    for total in brought[1:]:
        mean.add_(total)
    return mean.div_(torch.tensor(sum(samples), dtype=torch.float32, device=mean.device))


def squared_norm(values: Tensor) -> float:
    """Σ x² of a chunk or span, in float64."""
    double = values.double()
    return torch.dot(double, double).item()
