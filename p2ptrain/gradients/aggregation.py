"""What a reducer computes: the mean of the members' totals over all their samples.

Float addition is not associative, so the members are added in roster order, whatever order their chunks
arrived in, and the division is done once, by a tensor: dividing by a Python scalar multiplies by its
reciprocal on some devices, which rounds differently.
"""

from __future__ import annotations

import math
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


OUTSIZED = 1e4
"""Honest peers differ in the norm of their mean gradients by less than a hundred."""


def outsized(totals: Sequence[Tensor], samples: Sequence[int], usual: float) -> int | None:
    """Index of a member whose mean gradient is more than `OUTSIZED` times as long as the median one; None if
    there is none, if there are fewer than three to compare, or if the median is nothing (rows that few use).

    Arguments as in `mean_chunk`, but of those who brought samples; `usual`, the norm of the last averaged
    gradient, counts as one more, 0 for unknown. Such a member would own the average, whatever the others
    bring (I5).
    """
    if len(totals) + bool(usual) < 3:
        return None
    norms = [
        math.sqrt(_about_squared_norm(total)) / count for total, count in zip(totals, samples, strict=True)
    ]
    known = sorted([*norms, usual] if usual else norms)
    if not (median := known[(len(known) - 1) // 2]):
        return None
    longest = max(range(len(norms)), key=norms.__getitem__)
    return longest if norms[longest] > OUTSIZED * median else None


def _about_squared_norm(values: Tensor) -> float:
    """Σ x² in float32, three times as fast as in float64, unless that overflows or vanishes."""
    about = torch.dot(values, values).item()
    return about if 2.0**-60 < about < math.inf else squared_norm(values)


def squared_norm(values: Tensor) -> float:
    """Σ x² of a chunk or span, in float64."""
    double = values.double()
    return torch.dot(double, double).item()
