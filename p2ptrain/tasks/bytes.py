"""The built-in task: a byte-level transformer language model on plain text.

A GPT of the present day, without anything exotic: pre-norm, causal attention with rotary positions (Su 2021), an MLP
with squared ReLU (So 2021), no biases, the output tied to the byte embedding. A sample is one window of `context + 1`
bytes of the training text; its loss is the mean cross entropy of its `context` next bytes, in nats.
"""

from __future__ import annotations

import hashlib
import math
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2ptrain.config import BytesTask as Settings
from p2ptrain.tasks.corpus import Corpus, load_corpus, zlib_bits_per_byte

BYTES = 256
HELDOUT_WINDOWS = 64
EVALUATED_AT_ONCE = 16


class Attention(nn.Module):
    """Causal self-attention over `heads` heads, with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:  # x: float32 [batch, time, width]
        batch, time, width = x.shape
        heads = self.project(x).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(_turned(query, turn), _turned(key, turn), value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn)
        return x + self.down(F.relu(self.up(self.mlp_norm(x))).square())  # type: ignore[no-any-return]


class ByteTransformer(nn.Module):
    """uint8 or int64 [batch, time] → logits float32 [batch, time, 256] of each next byte."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.head_width = settings.width // settings.heads
        self.embedding = nn.Embedding(BYTES, settings.width)
        self.blocks = nn.ModuleList(Block(settings.width, settings.heads) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.width, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text.long())
        turn = _rotations(text.shape[1], self.head_width)
        for block in self.blocks:
            x = block(x, turn)
        return F.linear(self.norm(x), self.embedding.weight)


def _rotations(time: int, head_width: int) -> tuple[Tensor, Tensor]:
    """cos and signed sin of every position's angles, float32 [time, head_width]."""
    angles = torch.arange(time)[:, None] * 10_000.0 ** (-torch.arange(0, head_width, 2) / head_width)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((second, first), -1) * sin


class BytesTask:
    """`tasks.Task` for a `[task] kind = "bytes"` section."""

    def __init__(self, settings: Settings, seed: int, source: str) -> None:
        """`source`: where this peer has the corpus. Raises CorpusError."""
        self._settings = settings
        self._seed = seed
        self.corpus: Corpus = load_corpus(source, holdout=settings.holdout, context=settings.context)

    @property
    def note(self) -> str:
        return f"corpus {self.corpus.digest[:16]}, {len(self.corpus.train):,} bytes"

    @cached_property
    def zlib_bits_per_byte(self) -> float:
        """What zlib -9 needs for the held-out text: the yardstick beside our own figure."""
        return zlib_bits_per_byte(self.corpus.heldout)

    def build_model(self, seed: int) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        model = ByteTransformer(self._settings)
        residual = 0.02 / math.sqrt(2 * self._settings.layers)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    deviation = residual if name.endswith(("out.weight", "down.weight")) else 0.02
                    parameter.normal_(0.0, deviation, generator=generator)
        return model

    def batch(self, step: int, peer: str, first: int, count: int) -> Tensor:
        """uint8 [count, context + 1]."""
        key = hashlib.sha256(f"{self._seed} {step} {peer}".encode()).digest()
        # A counter-based generator can begin at any number, so a sample does not depend on how many are drawn.
        stream = np.random.Philox(key=int.from_bytes(key[:16], "little"), counter=[first, 0, 0, 0])
        draws = stream.random_raw(4 * count)[::4]  # each count of the counter gives four numbers
        places = len(self.corpus.train) - self._settings.context
        starts = torch.from_numpy((draws % np.uint64(places)).astype(np.int64))
        return self._windows(self.corpus.train, starts)

    def loss_sum(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(batch[:, :-1])
        targets = batch[:, 1:].long()
        summed = F.cross_entropy(logits.reshape(-1, BYTES), targets.reshape(-1), reduction="sum")
        return summed / targets.shape[1]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        text, context = self.corpus.heldout, self._settings.context
        starts = torch.linspace(0, len(text) - context - 1, HELDOUT_WINDOWS).long()
        windows = self._windows(text, starts)
        with torch.no_grad():
            losses = [float(self.loss_sum(model, part)) for part in windows.split(EVALUATED_AT_ONCE)]
        loss = math.fsum(losses) / HELDOUT_WINDOWS
        return {
            "loss": loss,
            "bits_per_byte": loss / math.log(2),
            "zlib_bits_per_byte": self.zlib_bits_per_byte,
        }

    def preview(
        self, model: nn.Module, prompt: str, length: int, generator: torch.Generator, temperature: float = 0.7
    ) -> str:
        text = list(prompt.encode() or b"\n")
        with torch.no_grad():
            for _ in range(length):
                window = torch.tensor([text[-self._settings.context :]])
                logits = model(window)[0, -1] / max(temperature, 1e-3)
                text.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
        return bytes(text).decode(errors="replace")

    def _windows(self, text: Tensor, starts: Tensor) -> Tensor:
        return text[starts[:, None] + torch.arange(self._settings.context + 1)]
