"""Low-rank changes of one weight, and what can be done with several of them without ever forming one.

A LoRA adapter changes a weight W [out, in] by s·B·A with A [rank, in], B [out, rank] (Hu et al. 2021). The
scale s is kept inside B here: on one factor only, or sums of several adapters would have it twice. Then

    w₁·B₁A₁ + w₂·B₂A₂  =  [w₁B₁ w₂B₂] · [A₁; A₂],

exactly, at the sum of the ranks. Adding the factors themselves, as FedIT and others do, is another thing: it
has cross terms B₁A₂. To come back to a smaller rank, the two tall factors are reduced to triangles by QR, and
the small product of these is cut by its singular values (as FLoRIST does, arXiv:2506.09199); what is lost is
known beforehand (Eckart-Young): the root of the sum of the squares that are cut off.

Everything is in float64, so that the order of adding does not show in a float32 result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIGN_VALUES = 2**20
"""Values of each weight's change that are looked at for `sign_agreement`: whole rows, evenly spread."""


@dataclass(frozen=True)
class Factors:
    """The change `b @ a` of one weight: `a` float64 [rank, in], `b` float64 [out, rank], the scale inside
    `b`."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in], of the weight that is changed."""
        return self.b.shape[0], self.a.shape[1]

    def delta(self) -> Tensor:
        """float64 [out, in]: as large as the weight itself."""
        return self.b @ self.a


def concatenated(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σ weight·b·a, exactly; its rank is the sum of the parts' ranks."""
    return Factors(
        torch.cat([part.a for part in parts]),
        torch.cat([weight * part.b for part, weight in zip(parts, weights, strict=True)], dim=1),
    )


def inner(one: Factors, other: Factors) -> float:
    """Σ over all values of the product of two changes: tr((B₁ᵀB₂)(A₂A₁ᵀ)), never larger than rank by rank."""
    return float(((one.b.T @ other.b) * (one.a @ other.a.T)).sum())


@dataclass(frozen=True)
class Compressed:
    """A change at a smaller rank, and what that costs."""

    factors: Factors
    lost_squared: float
    """Squared Frobenius norm of what is missing."""
    whole_squared: float
    """… of what there was."""


def compressed(whole: Factors, rank: int | None, energy: float | None) -> Compressed:
    """The nearest change of that `rank`, or of the smallest that keeps that share of the squared norm.

    Raises ValueError if the rank is more than the factors can hold.
    """
    most = min(whole.rank, *whole.shape)
    if rank is not None and rank > most:
        raise ValueError(
            f"at most rank {most}: its factors are {list(whole.b.shape)} and {list(whole.a.shape)}"
        )
    left, left_triangle = torch.linalg.qr(whole.b)
    right, right_triangle = torch.linalg.qr(whole.a.T)
    u, singular, vh = torch.linalg.svd(left_triangle @ right_triangle.T)
    squares = singular.square().tolist()
    if rank is None:
        assert energy is not None
        rank = _smallest(squares, energy)
    root = singular[:rank].sqrt()
    return Compressed(
        Factors(a=root[:, None] * (vh[:rank] @ right.T), b=left @ u[:, :rank] * root),
        lost_squared=math.fsum(squares[rank:]),
        whole_squared=math.fsum(squares),
    )


def _smallest(squares: Sequence[float], energy: float) -> int:
    """How many of these falling squares make up that share of their sum; at least one."""
    whole = math.fsum(squares)
    for count in range(1, len(squares)):
        if math.fsum(squares[:count]) >= energy * whole:
            return count
    return len(squares)


def sign_agreement(one: Factors, other: Factors) -> tuple[int, int]:
    """Of the values that both change, how many they change in the same direction; and how many these are."""
    rows, columns = one.shape
    every = max(1, -(-rows * columns // SIGN_VALUES))
    product = (one.b[::every] @ one.a).sign() * (other.b[::every] @ other.a).sign()
    return int((product > 0).sum()), int((product != 0).sum())
