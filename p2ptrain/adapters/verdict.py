"""Is a combined adapter better than what it was made of? Measured on text, window by window.

All candidates read the same windows, so their losses are compared in pairs: the difference in each window,
its mean over them, and two standard errors of that mean for the noise. What a window is hard by is common to
all and falls out, so a gain shows that is far below the spread of the losses themselves. The result counts as
`improved` if it beats the base *and* each parent beyond the noise, as `worse` if one of them beats it, else
as `within noise`: it is as good as the best of them for all that these windows tell.

Not covered: text that a parent was trained on, which flatters it; windows so close to each other in one text
that they are not independent. Those of a text are spread evenly over it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from p2ptrain.adapters.factors import Factors
from p2ptrain.adapters.files import Adapter, save_adapter
from p2ptrain.adapters.panel import Panel
from p2ptrain.adapters.texts import tokenizer_of, windows

RESULT = "result"
STANDARD_ERRORS = 2.0

Word = Literal["improved", "within noise", "worse"]


@dataclass(frozen=True)
class Margin:
    """How the result does beside another candidate, in nats per token; below zero it is better."""

    than: str
    difference: float
    """Mean over the windows of its loss less the other's."""
    noise: float
    """Two standard errors of that mean."""

    @property
    def better(self) -> bool:
        return self.difference < -self.noise

    @property
    def worse(self) -> bool:
        return self.difference > self.noise


@dataclass(frozen=True)
class Verdict:
    """What was measured, and what it comes to."""

    losses: Mapping[str, float]
    """Candidate → mean loss in nats per token: `base`, `parent1`, …, `result`."""
    margins: tuple[Margin, ...]
    """Beside the base, and beside each parent."""
    windows: int

    @property
    def word(self) -> Word:
        if all(margin.better for margin in self.margins):
            return "improved"
        return "worse" if any(margin.worse for margin in self.margins) else "within noise"

    def facts(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "verdict": self.word}


def verdict(losses: Mapping[str, Tensor]) -> Verdict:
    """`losses`: candidate → float64 [windows], the mean loss of each window; `result` is the last of them."""
    result = losses[RESULT]
    margins = [_margin(name, result - other) for name, other in losses.items() if name != RESULT]
    means = {name: each.mean().item() for name, each in losses.items()}
    return Verdict(means, tuple(margins), len(result))


def _margin(than: str, differences: Tensor) -> Margin:
    error = differences.std().item() / math.sqrt(len(differences))
    return Margin(than, differences.mean().item(), STANDARD_ERRORS * error)


def judged(
    base: Path,
    parents: Sequence[Adapter],
    factors: Mapping[str, Factors],
    texts: Sequence[Path],
    *,
    length: int,
    most: int,
    progress: Callable[[str], None],
) -> Verdict:
    """Base, parents and the result (`factors`) on at most `most` windows of `length` tokens of each text.

    The result is read as an adapter in float32, whatever is then written. Raises AdapterError.
    """
    tokenizer = tokenizer_of(base)
    tokens = torch.cat([windows(text, tokenizer, length, most) for text in texts])
    with tempfile.TemporaryDirectory(prefix="p2ptrain-") as folder:
        combined = Path(folder) / RESULT
        save_adapter(combined, factors, parents[0], {}, sorted(factors))
        everyone = {f"parent{number}": each.path for number, each in enumerate(parents, 1)}
        panel = Panel(base, everyone | {RESULT: combined})
    losses = {}
    for number, name in enumerate(panel.choices):
        progress(f"{name}: reading {len(tokens)} windows of {length} tokens")
        losses[name] = panel.losses(tokens, [number] * len(tokens)).mean(1)
    return verdict(losses)
