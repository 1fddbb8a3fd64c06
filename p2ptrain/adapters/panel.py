"""One base with several adapters in memory, and what each makes of a text. It needs `transformers` and
`peft`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from p2ptrain.adapters.route import Scores
from p2ptrain.errors import AdapterError

BASE = "base"
"""The choice without any adapter; no adapter may have this name."""
_PEFT_BASE = "__base__"
AT_ONCE = 8
"""Texts in one pass: bounds its memory."""


class Panel:
    """The base and its adapters, on the CPU; `choices` names them, the base first."""

    def __init__(self, base: Path, adapters: Mapping[str, Path]) -> None:
        """Load all of them. Raises AdapterError if one cannot be."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()  # what it says about loading is not for our users
        logging.disable_progress_bar()
        self.choices = (BASE, *adapters)
        self._names = (_PEFT_BASE, *adapters)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                str(base), dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
        except Exception as error:  # of whatever kind the libraries raise for what is not as it must be
            raise AdapterError(
                f"{base} cannot be loaded as a causal language model ({_brief(error)})"
            ) from None
        for number, (name, path) in enumerate(adapters.items()):
            try:
                if number == 0:
                    model = PeftModel.from_pretrained(model, str(path), adapter_name=name)
                else:
                    model.load_adapter(str(path), adapter_name=name)
            except Exception as error:
                raise AdapterError(
                    f"the adapter in {path} does not fit the base {base} ({_brief(error)})"
                ) from None
        self.model: Any = model.eval()

    @torch.no_grad()
    def losses(self, tokens: Tensor, choices: Sequence[int]) -> Tensor:
        """float64 [texts, length - 1]: loss of every token but the first, in nats, by the choice for each
        text.

        tokens: int64 [texts, length]. Texts of different choices go through in one pass.
        """
        parts = []
        for at in range(0, len(tokens), AT_ONCE):
            batch = tokens[at : at + AT_ONCE]
            logits = self._forward(batch, choices[at : at + AT_ONCE]).logits[:, :-1]
            parts.append(F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").double())
        return torch.cat(parts)

    @torch.no_grad()
    def features(self, prefixes: Tensor) -> Tensor:
        """float64 [texts, 3 · width]: means over the prefix of the base's embeddings, its hidden states
        half-way up, and its last ones. What is said of a text lies in the upper ones, which bytes it has in
        the lower. prefixes: int64 [texts, length]."""
        parts = []
        for at in range(0, len(prefixes), AT_ONCE):
            batch = prefixes[at : at + AT_ONCE]
            states = self._forward(batch, [0] * len(batch), output_hidden_states=True).hidden_states
            looked_at = (states[0], states[len(states) // 2], states[-1])
            parts.append(torch.cat([each.double().mean(dim=1) for each in looked_at], dim=1))
        return torch.cat(parts)

    def scores(self, tokens: Tensor, prefix: int, domain: int, choices: int) -> Scores:
        """What the first so many choices make of these texts (int64 [texts, length]), decided on after
        `prefix` tokens."""
        losses = [self.losses(tokens, [choice] * len(tokens)) for choice in range(choices)]
        return Scores(
            prefix=torch.stack([each[:, : prefix - 1].mean(1) for each in losses]),
            rest=torch.stack([each[:, prefix - 1 :].mean(1) for each in losses]),
            features=self.features(tokens[:, :prefix]),
            domains=(domain,) * len(tokens),
        )

    @torch.no_grad()
    def write(self, tokens: list[int], choice: int, length: int, temperature: float, seed: int) -> list[int]:
        """At most `length` tokens with which that choice goes on; at temperature 0 the likeliest."""
        options: dict[str, Any] = {"max_new_tokens": length, "pad_token_id": 0}
        if temperature:
            options |= {"do_sample": True, "temperature": temperature}
        else:
            options["do_sample"] = False
        if len(self.choices) > 1:
            options["adapter_names"] = [self._names[choice]]
        given = torch.tensor([tokens])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            written = self.model.generate(input_ids=given, attention_mask=torch.ones_like(given), **options)
        more: list[int] = written[0, len(tokens) :].tolist()
        return more

    def _forward(self, tokens: Tensor, choices: Sequence[int], **options: Any) -> Any:
        if len(self.choices) > 1:
            options["adapter_names"] = [self._names[choice] for choice in choices]
        return self.model(input_ids=tokens, use_cache=False, **options)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
