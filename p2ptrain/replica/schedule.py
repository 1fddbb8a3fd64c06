"""The learning rate of each step, and what another batch size makes of the optimizer's settings: equal to the
last bit on every platform.

`math.cos` is the C library's, and libraries differ in the last bit; so the cosine is built from `+ - * /` on
float64, which IEEE 754 rounds alike everywhere.
"""

from __future__ import annotations

import math
from typing import assert_never

from p2ptrain.config import Optimizer, RunConfig


def learning_rate(run: RunConfig, step: int) -> float:
    """Learning rate of the optimizer step that leads from `step` to `step + 1`.

    It rises in equal parts over `warmup_steps` steps to `lr`, as `optimizer_for_batch` has it, then stays
    there or falls to `final_ratio · lr`, which it reaches at `total_steps`.
    """
    peak, schedule = optimizer_for_batch(run).lr, run.schedule
    if step < schedule.warmup_steps:
        return peak * ((step + 1) / schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / (run.total_steps - schedule.warmup_steps))
    match schedule.kind:
        case "constant":
            return peak
        case "linear":
            height = 1.0 - progress
        case "cosine":
            height = half_cosine(progress)
        case _:
            assert_never(schedule.kind)
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * height)


def optimizer_for_batch(run: RunConfig) -> Optimizer:
    """The run's optimizer with the settings that its batch wants, k times the one that they were tuned for.

    `linear`: lr · k (Goyal et al. 2017, for SGD up to the critical batch). `sqrt`: lr · √k, and with `adamw`
    also 1 - k (1 - β) for both betas and ε / √k, so that the running means span as many samples as before
    (Malladi et al. 2022). If the target is changed while the run goes on, the rate follows and
    the rest stays.
    """
    optimizer = run.optimizer
    if optimizer.batch_rule == "none":
        return optimizer
    factor = run.stepped_batch_size / optimizer.tuned_batch_size
    if optimizer.batch_rule == "linear":
        return optimizer.model_copy(update={"lr": optimizer.lr * factor})
    root = math.sqrt(factor)
    scaled = {"lr": optimizer.lr * root}
    if optimizer.kind == "adamw":
        scaled["beta1"] = 1.0 - factor * (1.0 - optimizer.beta1)
        scaled["beta2"] = 1.0 - factor * (1.0 - optimizer.beta2)
        scaled["epsilon"] = optimizer.epsilon / root
    return optimizer.model_copy(update=scaled)


def half_cosine(progress: float) -> float:
    """(1 + cos(π · progress)) / 2 for `progress` in [0, 1], within 2e-16.

    cos(π p) = -sin(π (p - 1/2)), whose Taylor series up to x^21 leaves out less than 2e-18 for |x| ≤ π/2.
    """
    x = 3.141592653589793 * (progress - 0.5)
    series = 1.0
    for k in range(20, 0, -2):  # Horner's rule, from the last term: 1 - x²/(k (k + 1)) · (…)
        series = 1.0 - x * x / (k * (k + 1)) * series
    return (1.0 - x * series) / 2.0
