"""A task to try a swarm out: name handwritten digits. It is over in seconds, and everyone has the same data.

The data are the 1,797 pictures of 8 × 8 grey values that scikit-learn ships (the test part of the "Optical
Recognition of Handwritten Digits" set, Alpaydin and Kaynak 1998); every sixth is held out. A network with one
hidden layer of 64 names 97 of 100 of those after 200 steps of 64 samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2ptrain import config
from p2ptrain.tasks.draws import draws
from p2ptrain.tasks.extras import needs
from p2ptrain.tasks.placing import device_of

PIXELS = 64
DIGITS = 10
DARKEST = 16
"""Grey values are 0 … 16."""
HELD_OUT_EVERY = 6
SHADES = " .:-=+*#%@"


class DigitsTask:
    """A sample is a picture, float32 [64] in 0 … 1, and its digit; its loss, in nats, the cross entropy."""

    def __init__(self, settings: config.DigitsTask, seed: int) -> None:
        """Raises ConfigError if scikit-learn is missing."""
        with needs("digits"):
            from sklearn.datasets import load_digits

        pictures, digits = load_digits(return_X_y=True)
        self._settings = settings
        self._seed = seed
        self._pictures = torch.from_numpy(pictures).float() / DARKEST
        self._digits = torch.from_numpy(digits).long()
        held = torch.arange(len(self._digits)) % HELD_OUT_EVERY == 0
        self._trained, self._heldout = torch.where(~held)[0], torch.where(held)[0]

    @property
    def note(self) -> str:
        return f"{len(self._digits)} digits"

    @property
    def shared_note(self) -> str:
        return self.note

    def build_model(self, seed: int) -> nn.Module:
        """A freshly initialised model, float32 on the CPU; its loss is about ln 10, that of not knowing."""
        model = nn.Sequential(
            nn.Linear(PIXELS, self._settings.width), nn.ReLU(), nn.Linear(self._settings.width, DIGITS)
        )
        chance = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                # He et al. 2015, from the width of what is read; biases start at zero.
                std = math.sqrt(2 / parameter.shape[1]) if parameter.ndim == 2 else 0.0
                parameter.normal_(0.0, std, generator=chance)
        return model

    def batch(self, step: int, peer: str, first: int, count: int) -> tuple[Tensor, Tensor]:
        """float32 [count, 64] and int64 [count]."""
        drawn = [each % len(self._trained) for each in draws(self._seed, step, peer, first, count)]
        return self._samples(self._trained[drawn])

    @property
    def size(self) -> int:
        """Pictures to train on."""
        return len(self._trained)

    def samples(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """float32 [len(numbers), 64] and int64 [len(numbers)]."""
        return self._samples(self._trained[list(numbers)])

    def loss_sum(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Scalar of the model's dtype: Σ over the batch's samples of their losses."""
        pictures, digits = (each.to(device_of(model)) for each in batch)
        return F.cross_entropy(model(pictures), digits, reduction="sum")

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`loss` in nats over the held-out pictures, and `accuracy`, the share that is named rightly."""
        pictures, digits = (each.to(device_of(model)) for each in self._samples(self._heldout))
        scores = model(pictures)
        return {
            "loss": F.cross_entropy(scores, digits).item(),
            "accuracy": (scores.argmax(-1) == digits).double().mean().item(),
        }

    @torch.no_grad()
    def preview(
        self, model: nn.Module, prompt: str, length: int, generator: torch.Generator, temperature: float = 0.7
    ) -> str:
        """One held-out picture in characters, and what the model takes it for. Only the generator counts."""
        chosen = torch.randint(len(self._heldout), (1,), generator=generator)
        pictures, digits = self._samples(self._heldout[chosen])
        shades = (pictures[0] * (len(SHADES) - 1)).long().view(8, 8).tolist()
        lines = ["".join(2 * SHADES[shade] for shade in row).rstrip() for row in shades]
        guess = int(model(pictures.to(device_of(model))).argmax())
        return "\n".join([*lines, f"is a {int(digits)}, taken for a {guess}"])

    def _samples(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        return self._pictures[chosen], self._digits[chosen]
