"""Language models of the Hugging Face libraries: new ones, or any that `transformers` knows, from a folder or
from the hub.

A sample is a window of `context + 1` tokens; its loss, in nats, the mean cross entropy of all but the first.
Models run without dropout, so that a sample's gradient is a function of the parameters alone.

Not covered: models that predict otherwise than token after token (encoders, encoder-decoders), auxiliary
losses of mixtures of experts, quantised weights, and code that comes with a model: none is ever run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2ptrain import config
from p2ptrain.errors import ConfigError
from p2ptrain.tasks.documents import Documents
from p2ptrain.tasks.extras import needs
from p2ptrain.tasks.hub import folder_of
from p2ptrain.tasks.placing import device_of
from p2ptrain.tasks.tokens import ByteTokenizer, FolderTokenizer, Tokenizer, brief

EVALUATED_WINDOWS = 32
EVALUATED_AT_ONCE = 4
"""Windows in one forward pass of `evaluate`: bounds its memory."""
VOCABULARY_STEP = 64
"""A new model's vocabulary is rounded up to a multiple of this, which matrix products like."""


class CausalLmTask:
    """Predict the next token."""

    def __init__(
        self, settings: config.CausalLmTask, seed: int, peer: config.PeerConfig, *, with_data: bool = True
    ) -> None:
        """Read the tokenizer, and open the data unless only the model is wanted. Raises ConfigError and
        CorpusError."""
        self._settings = settings
        self._peer = peer
        self.folder = self._model_folder()
        """Of the model that this run starts from; None for a new one."""
        self.tokenizer = self._tokenizer()
        self._documents = Documents(settings, self.tokenizer, seed, peer.corpus) if with_data else None

    @property
    def documents(self) -> Documents:
        if self._documents is None:
            raise RuntimeError("this task was built without data")
        return self._documents

    @property
    def note(self) -> str:
        """Names tokenizer and data by their digests."""
        return f"{self._tokenizer_note}, {self.documents.note}"

    @property
    def shared_note(self) -> str:
        return self.note if self._settings.exact else self._tokenizer_note

    @property
    def _tokenizer_note(self) -> str:
        return f"tokenizer {self.tokenizer.digest[:16]}"

    # -- the model -------------------------------------------------------------------------------------------

    def _model_folder(self) -> Path | None:
        if self._settings.model == "llama":
            return None
        return folder_of("model", self._settings.model, self._settings.model_revision, self._peer.model)

    def _tokenizer(self) -> Tokenizer:
        named = self._settings.tokenizer
        if named == "bytes" and not self._peer.tokenizer:
            return ByteTokenizer()
        if named == "model" and not self._peer.tokenizer:
            assert self.folder is not None  # the run file says so
            return FolderTokenizer(self.folder)
        revision = self._settings.tokenizer_revision
        return FolderTokenizer(folder_of("tokenizer", named, revision, self._peer.tokenizer))

    def build_model(self, seed: int) -> nn.Module:
        """The model, float32 on the CPU: with the weights in its folder, or with random ones of this seed.

        Raises ConfigError if the folder holds no model that predicts the next token, or one that does not fit
        the tokenizer or the context.
        """
        with needs("hf"):
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging

        logging.set_verbosity_error()  # what it says about loading is not for volunteers
        logging.disable_progress_bar()
        form = self._form()
        options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False}
        options["attn_implementation"] = "sdpa"  # a folder's own word could name code on the hub
        try:
            if self.folder is not None and self._settings.pretrained:
                model = AutoModelForCausalLM.from_pretrained(
                    str(self.folder), config=form, use_safetensors=True, **options
                )
            else:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    model = AutoModelForCausalLM.from_config(form, **options)
        except Exception as error:  # of whatever kind the libraries raise for what is not as it must be
            raise ConfigError(
                f"{self._where} cannot be loaded as a model that predicts the next token ({brief(error)}); "
                "choose one with a causal language-model head and safetensors weights"
            ) from error
        module: nn.Module = model.eval()
        return module

    @property
    def _where(self) -> str:
        return f"the model {self._settings.model}" + (f" in {self.folder}" if self.folder else "")

    def _form(self) -> Any:
        """The model's configuration, looked over."""
        if self.folder is None:
            return self._llama()
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        try:
            form = AutoConfig.from_pretrained(str(self.folder), trust_remote_code=False)
        except Exception as error:  # as above
            raise ConfigError(
                f"there is no model in {self.folder} ({brief(error)}); it needs a config.json that "
                "transformers knows, and code that comes with a model is not run"
            ) from error
        if form.is_encoder_decoder or type(form) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ConfigError(
                f"{self._where} is of type {form.model_type!r}, which has no loss for the next token; choose "
                "a causal language model"
            )
        if getattr(form, "quantization_config", None) is not None:
            raise ConfigError(f"{self._where} is quantised, but training needs float32 weights; choose those")
        text = form.get_text_config()
        if self.tokenizer.size > text.vocab_size:
            raise ConfigError(
                f"the tokenizer {self._settings.tokenizer} has {self.tokenizer.size:,} tokens, but "
                f"{self._where} knows {text.vocab_size:,}; set task.tokenizer to the one it was made with, "
                'as "model" does'
            )
        reach = getattr(text, "max_position_embeddings", None)
        if reach is not None and self._settings.context > reach:
            raise ConfigError(
                f"task.context ({self._settings.context}) is more than the {reach} positions that "
                f"{self._where} has; lower task.context"
            )
        return form

    def _llama(self) -> Any:
        """Touvron et al. 2023, with the head tied to the embedding and an MLP of 8/3 times the width."""
        from transformers import LlamaConfig

        width = self._settings.width
        return LlamaConfig(
            vocab_size=-(-self.tokenizer.size // VOCABULARY_STEP) * VOCABULARY_STEP,
            hidden_size=width,
            intermediate_size=-(-8 * width // (3 * 64)) * 64,
            num_hidden_layers=self._settings.layers,
            num_attention_heads=self._settings.heads,
            max_position_embeddings=self._settings.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=self.tokenizer.end,
        )

    @property
    def base(self) -> str:
        """The name of the model that this run starts from; empty for a new one."""
        return "" if self.folder is None or not self._settings.pretrained else self._settings.model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the model and its tokenizer as a folder that `from_pretrained` loads. Raises OSError."""
        model.save_pretrained(folder)  # type: ignore[operator]
        self.tokenizer.save(folder)

    # -- samples ---------------------------------------------------------------------------------------------

    def batch(self, step: int, peer: str, first: int, count: int) -> Tensor:
        """int64 [count, context + 1]: samples `first … first + count - 1` that `peer` draws for `step`.

        Raises CorpusError if the data cannot be read any more.
        """
        return torch.stack(self.documents.samples(step, peer, first, count))

    @property
    def size(self) -> int:
        """How many samples there are, side by side; 0 for a stream. The first call reads all of the text."""
        return self.documents.size

    def samples(self, numbers: Sequence[int]) -> Tensor:
        """int64 [len(numbers), context + 1]: the samples of these numbers. Raises CorpusError."""
        return self.documents.numbered(numbers)

    def loss_sum(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Scalar of the model's dtype: Σ over the batch's samples of their losses."""
        batch = batch.to(device_of(model))
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        entropy = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        return entropy / (batch.shape[1] - 1)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures on the same held-out windows every time: `loss` in nats per token, `bits_per_byte` of the
        text that they stand for, which compares models of different tokenizers."""
        windows = self.documents.heldout(EVALUATED_WINDOWS)
        losses, size_bytes = [], 0
        for start in range(0, len(windows), EVALUATED_AT_ONCE):
            part = torch.stack(windows[start : start + EVALUATED_AT_ONCE])
            losses.append(self.loss_sum(model, part).item())
            size_bytes += sum(len(self.tokenizer.decode(each[1:].tolist()).encode()) for each in part)
        loss = math.fsum(losses) / len(windows)
        nats = loss * len(windows) * self._settings.context
        return {"loss": loss, "bits_per_byte": nats / math.log(2) / max(size_bytes, 1)}

    @torch.no_grad()
    def preview(
        self, model: nn.Module, prompt: str, length: int, generator: torch.Generator, temperature: float = 0.7
    ) -> str:
        """The prompt, and how the model goes on from it for at most `length` tokens, or until its context is
        full or it ends the document."""
        context = self._settings.context
        start = [] if self.tokenizer.end is None else [self.tokenizer.end]
        text = (self.tokenizer.encode(prompt) or start or [0])[-context // 2 :]
        device = device_of(model)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 1e-3 else {}
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # the libraries' loop, which keeps keys and values, takes no generator
            written: Tensor = model.generate(  # type: ignore[operator]
                torch.tensor([text], device=device),
                attention_mask=torch.ones(1, len(text), dtype=torch.int64, device=device),
                max_new_tokens=min(length, context - len(text)),
                eos_token_id=self.tokenizer.end,
                pad_token_id=self.tokenizer.end or 0,
                **({"do_sample": False} | sampling),
            )
        return self.tokenizer.decode(written[0].tolist())
