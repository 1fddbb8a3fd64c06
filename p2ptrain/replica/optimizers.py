"""SGD, AdamW and LAMB on one flat vector, equal to the last bit on every machine.

torch's own optimizers use fused multiply-adds (`addcmul`, `lerp`, `add(alpha=…)`), which round once where
other kernels round twice, so replicas on different processors drift apart. Here every operation is one that
IEEE 754 defines to the bit (mul, add, sub, div, sqrt), one call each, and `tests/unit/test_kernels.py` holds
each of them to it.

- The square root is numpy's: torch's goes through MKL's vector library, whose last bit is wrong for 17 % of
  all numbers (measured over every float32) and is not even reproducible (pytorch issue 188792).
- Scalars are 0-dim float32 tensors on the same device, rounded once: on CUDA a Python scalar, or a tensor
  that lives on the CPU, is turned into its reciprocal before a division.
- Powers of beta are repeated products, because `pow` is the C library's.
- Norms are added up in a stated order, which no BLAS and no number of threads changes.

Each step goes over the vectors block by block, so that a block is still in the cache for the next operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, assert_never

import numpy as np
import torch
from torch import Tensor

from p2ptrain.config import Local as LocalConfig
from p2ptrain.config import Optimizer as OptimizerConfig
from p2ptrain.gradients.aggregation import squared_norm_in_order
from p2ptrain.protocol.spans import chunk_ranges

BLOCK_VALUES = 2**18
"""Measured on 20 million parameters: blocks of 2^17 to 2^19 values take two thirds of the time that the whole
vector at once takes, since they stay in the cache; smaller ones lose it again to the calls."""

NORM_VALUES = 2**18
"""A norm is that of pieces of so many values, added left to right. A part of the formula: with another number
its last bits would be others."""

Ranges = Sequence[tuple[int, int]]
CPU = torch.device("cpu")


class FlatOptimizer(Protocol):
    """Turns an averaged gradient into new parameters."""

    weight_decay: float
    """May be set between two steps."""

    def step(self, parameters: Tensor, gradient: Tensor, lr: float) -> None:
        """Move `parameters` (float32 [numel]) in place against `gradient` (float32 [numel], unchanged)."""
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """The state itself, not a copy: float32 [numel] each."""
        ...

    def scalars(self) -> dict[str, float]:
        """The rest of the state."""
        ...

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
        """Adopt a copy of a state whose names and shapes are those of `state_tensors` and `scalars`."""
        ...


def build_optimizer(
    config: OptimizerConfig, tensors: Ranges, decayed: Ranges, device: torch.device = CPU
) -> FlatOptimizer:
    """A fresh optimizer for the vector that `tensors` make, the ranges [start, stop) of each, in order;
    `decayed` are the ranges under weight decay. Its state lies on `device`, where the vector must be; only on
    the CPU is a step the same to the last bit on every machine."""
    numel = tensors[-1][1]
    match config.kind:
        case "adamw":
            return AdamW(config, numel, decayed, device)
        case "sgd":
            return SGD(config, numel, decayed, device)
        case "lamb":
            return LAMB(config, tensors, decayed, device)
        case _:
            assert_never(config.kind)


def outer_optimizer(local: LocalConfig) -> OptimizerConfig:
    """By what strategy `local` applies an average: SGD, with Nesterov's momentum if any (DiLoCo)."""
    return OptimizerConfig(
        kind="sgd",
        lr=local.outer_learning_rate,
        momentum=local.outer_momentum,
        nesterov=True,
        weight_decay=0.0,
    )


def clip_factor(squared_norms: Sequence[float], clip_norm: float) -> float:
    """What to multiply a gradient by so that its norm is at most `clip_norm`: 1.0 if it is already, or if
    `clip_norm` is 0, which bounds nothing.

    The norm comes from the squared norms in the entry's header alone, added in roster order, so that it is
    the same number everywhere (a norm measured locally depends on the kernel's order of addition).
    """
    norm = math.sqrt(_sum_in_order(squared_norms))
    return clip_norm / norm if 0 < clip_norm < norm else 1.0


def scaled(vector: Tensor, factor: float) -> Tensor:
    """The vector (float32) times a number, in place: by a scalar that is rounded once, alike everywhere."""
    if factor != 1.0:
        vector.mul_(torch.tensor(factor, dtype=torch.float32))
    return vector


class SGD:
    """θ ← (1 - lr·decay)·θ - lr·d, with velocity ← momentum·velocity + g, and d the velocity or, with
    Nesterov, g + momentum·velocity. Weight decay is decoupled: it does not pass through the velocity."""

    def __init__(
        self, config: OptimizerConfig, numel: int, decayed: Ranges, device: torch.device = CPU
    ) -> None:
        self._config = config
        self.weight_decay = config.weight_decay
        self._decayed = decayed
        self._velocity = torch.zeros(numel, device=device)
        self._scratch = torch.empty(min(numel, BLOCK_VALUES), device=device)

    def step(self, parameters: Tensor, gradient: Tensor, lr: float) -> None:
        momentum, rate = (_scalar(value, parameters) for value in (self._config.momentum, lr))
        _decay(parameters, self._decayed, lr * self.weight_decay)
        for theta, g, velocity in _blocks(parameters, gradient, self._velocity):
            scratch = self._scratch[: len(theta)]
            velocity.mul_(momentum).add_(g)
            if self._config.nesterov:
                torch.mul(velocity, momentum, out=scratch).add_(g).mul_(rate)
            else:
                torch.mul(velocity, rate, out=scratch)
            theta.sub_(scratch)

    def state_tensors(self) -> dict[str, Tensor]:
        return {"velocity": self._velocity}

    def scalars(self) -> dict[str, float]:
        return {}

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
        self._velocity.copy_(tensors["velocity"])


class AdamW:
    """θ ← (1 - lr·decay)·θ - lr/(1 - β1^t) · m / (√v/√(1 - β2^t) + ε), where m and v are the running means of
    g and g² (Loshchilov and Hutter, "Decoupled weight decay regularization")."""

    def __init__(
        self, config: OptimizerConfig, numel: int, decayed: Ranges, device: torch.device = CPU
    ) -> None:
        self._config = config
        self.weight_decay = config.weight_decay
        self._decayed = decayed
        self._mean = torch.zeros(numel, device=device)
        self._square_mean = torch.zeros(numel, device=device)
        self._beta1_power = 1.0
        self._beta2_power = 1.0
        self._scratch = torch.empty(min(numel, BLOCK_VALUES), device=device)

    def step(self, parameters: Tensor, gradient: Tensor, lr: float) -> None:
        config = self._config
        self._beta1_power *= config.beta1
        self._beta2_power *= config.beta2
        beta1, beta2, rest1, rest2, root_correction, epsilon, rate = (
            _scalar(value, parameters)
            for value in (
                config.beta1,
                config.beta2,
                1.0 - config.beta1,
                1.0 - config.beta2,
                math.sqrt(1.0 - self._beta2_power),
                config.epsilon,
                lr / (1.0 - self._beta1_power),
            )
        )
        _decay(parameters, self._decayed, lr * self.weight_decay)
        for theta, g, mean, square_mean in _blocks(parameters, gradient, self._mean, self._square_mean):
            scratch = self._scratch[: len(theta)]
            mean.mul_(beta1).add_(torch.mul(g, rest1, out=scratch))
            square_mean.mul_(beta2).add_(torch.mul(g, g, out=scratch).mul_(rest2))
            _square_root(square_mean, scratch)
            scratch.div_(root_correction).add_(epsilon)
            theta.sub_(torch.div(mean, scratch, out=scratch).mul_(rate))

    def state_tensors(self) -> dict[str, Tensor]:
        return {"mean": self._mean, "square_mean": self._square_mean}

    def scalars(self) -> dict[str, float]:
        return {"beta1_power": self._beta1_power, "beta2_power": self._beta2_power}

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
        self._mean.copy_(tensors["mean"])
        self._square_mean.copy_(tensors["square_mean"])
        self._beta1_power, self._beta2_power = scalars["beta1_power"], scalars["beta2_power"]


class LAMB:
    """θ ← θ - lr · (‖θ‖ / ‖r‖) · r for each tensor apart, with r = m̂ / (√v̂ + ε) + decay · θ, and m̂ and v̂ as
    AdamW has them; where either norm is 0, their ratio is 1 (You et al., "Large batch optimization for deep
    learning").

    So each tensor moves by the share `lr` of its own length, whatever its gradient. The paper leaves open
    bounds on ‖θ‖; there are none here.
    """

    def __init__(
        self, config: OptimizerConfig, tensors: Ranges, decayed: Ranges, device: torch.device = CPU
    ) -> None:
        numel = tensors[-1][1]
        self._config = config
        self.weight_decay = config.weight_decay
        self._tensors, self._decayed = tensors, decayed
        self._mean = torch.zeros(numel, device=device)
        self._square_mean = torch.zeros(numel, device=device)
        self._beta1_power = 1.0
        self._beta2_power = 1.0
        self._direction = torch.empty(numel, device=device)
        self._scratch = torch.empty(min(numel, BLOCK_VALUES), device=device)

    def step(self, parameters: Tensor, gradient: Tensor, lr: float) -> None:
        config = self._config
        self._beta1_power *= config.beta1
        self._beta2_power *= config.beta2
        beta1, beta2, rest1, rest2, root_correction, epsilon, correction, decay = (
            _scalar(value, parameters)
            for value in (
                config.beta1,
                config.beta2,
                1.0 - config.beta1,
                1.0 - config.beta2,
                math.sqrt(1.0 - self._beta2_power),
                config.epsilon,
                1.0 / (1.0 - self._beta1_power),
                self.weight_decay,
            )
        )
        for g, mean, square_mean, direction in _blocks(
            gradient, self._mean, self._square_mean, self._direction
        ):
            scratch = self._scratch[: len(g)]
            mean.mul_(beta1).add_(torch.mul(g, rest1, out=scratch))
            square_mean.mul_(beta2).add_(torch.mul(g, g, out=scratch).mul_(rest2))
            _square_root(square_mean, scratch)
            scratch.div_(root_correction).add_(epsilon)
            torch.div(mean, scratch, out=direction).mul_(correction)
        if self.weight_decay > 0:
            for start, stop in self._decayed:
                for theta, direction in _blocks(parameters[start:stop], self._direction[start:stop]):
                    direction.add_(torch.mul(theta, decay, out=self._scratch[: len(theta)]))
        for start, stop in self._tensors:
            weights, whole = parameters[start:stop], self._direction[start:stop]
            rate = _scalar(lr * trust_ratio(_norm(weights), _norm(whole)), parameters)
            for theta, direction in _blocks(weights, whole):
                theta.sub_(direction.mul_(rate))

    def state_tensors(self) -> dict[str, Tensor]:
        return {"mean": self._mean, "square_mean": self._square_mean}

    def scalars(self) -> dict[str, float]:
        return {"beta1_power": self._beta1_power, "beta2_power": self._beta2_power}

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
        self._mean.copy_(tensors["mean"])
        self._square_mean.copy_(tensors["square_mean"])
        self._beta1_power, self._beta2_power = scalars["beta1_power"], scalars["beta2_power"]


def trust_ratio(weights_norm: float, direction_norm: float) -> float:
    """By how much LAMB lengthens a tensor's step: 1 where there is nothing to go by."""
    return weights_norm / direction_norm if weights_norm > 0 and direction_norm > 0 else 1.0


def _norm(values: Tensor) -> float:
    """√Σ x², to the same bit everywhere."""
    pieces = chunk_ranges(0, len(values), NORM_VALUES)
    return math.sqrt(_sum_in_order([squared_norm_in_order(values[start:stop]) for start, stop in pieces]))


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def _square_root(values: Tensor, out: Tensor) -> None:
    """Correctly rounded on the CPU (see above); elsewhere as the device does it."""
    if values.device.type == "cpu":
        np.sqrt(values.numpy(), out=out.numpy())
    else:
        torch.sqrt(values, out=out)


def _decay(parameters: Tensor, ranges: Ranges, amount: float) -> None:
    if amount > 0:
        kept = _scalar(1.0 - amount, parameters)
        for start, stop in ranges:
            parameters[start:stop].mul_(kept)


def _blocks(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same block of every vector, block after block."""
    for start, stop in chunk_ranges(0, len(vectors[0]), BLOCK_VALUES):
        yield tuple(vector[start:stop] for vector in vectors)


def _sum_in_order(values: Sequence[float]) -> float:
    """Plain left-to-right sum: since Python 3.12 the built-in `sum` compensates, and 3.11 would get another
    result."""
    total = 0.0
    for value in values:
        total += value
    return total
