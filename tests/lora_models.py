"""A small language model and a task for it, for the tests of adapters."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, CONTEXT = 64, 12


def tiny_llama(seed: int = 0) -> nn.Module:
    """39,000 parameters in two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=None,
            )
        )


class Arithmetic:
    """Tokens that count up by a step of each sample's own: soon learned, and needs more than the bias."""

    note = shared_note = ""

    def __init__(self, model_seed: int | None = None) -> None:
        """`model_seed`: another base than the run's seed gives."""
        self._model_seed = model_seed

    def build_model(self, seed: int) -> nn.Module:
        return tiny_llama(seed if self._model_seed is None else self._model_seed)

    def batch(self, step: int, peer: str, first: int, count: int) -> Tensor:
        """int64 [count, CONTEXT + 1]."""
        return torch.stack([_sample(f"{step}/{peer}/{number}") for number in range(first, first + count)])

    def loss_sum(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum") / CONTEXT

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"loss": float(self.loss_sum(model, self.batch(0, "held out", 0, 32))) / 32}

    def preview(
        self, model: nn.Module, prompt: str, length: int, generator: torch.Generator, temperature: float = 0.7
    ) -> str:
        return ""


def _sample(name: str) -> Tensor:
    digest = hashlib.sha256(name.encode()).digest()
    return (digest[0] + (1 + digest[1] % 4) * torch.arange(CONTEXT + 1)) % VOCABULARY
