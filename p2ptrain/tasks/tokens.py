"""Text to tokens and back: bytes as they are, or the tokenizer in a folder.

A tokenizer is read as data: no code that lies beside it is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from p2ptrain.errors import ConfigError
from p2ptrain.tasks.extras import needs

BYTES = 256
END = "<end>"


class Tokenizer(Protocol):
    """Text ⇄ numbers in 0 … `size` - 1."""

    size: int
    end: int | None
    """The token after each document; None if it has none."""
    digest: str
    """Hex SHA-256: equal digests make equal tokens of equal text."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str:
        """What is no text shows as �."""
        ...

    def save(self, folder: Path) -> None:
        """As a folder that `AutoTokenizer.from_pretrained` loads. Raises OSError."""
        ...


class ByteTokenizer:
    """A token is a byte of UTF-8; the one after the last byte ends a document."""

    size = BYTES + 1
    end: int | None = BYTES
    digest = hashlib.sha256(b"p2ptrain bytes").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode(errors="replace"))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < BYTES).decode(errors="replace")

    def save(self, folder: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        # Byte-pair encoding without a pair. Its letter for each byte, as GPT-2 has it: those that can be seen
        # stand for themselves, the others for those from 256 on, in order.
        seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
        unseen = [byte for byte in range(BYTES) if byte not in seen]
        letters = {byte: chr(byte if byte in seen else BYTES + unseen.index(byte)) for byte in range(BYTES)}
        vocabulary = {letter: byte for byte, letter in letters.items()} | {END: BYTES}
        inner = Tokenizer(models.BPE(vocabulary, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END).save_pretrained(folder)


class FolderTokenizer:
    """What a folder's `tokenizer.json` (or another form that transformers reads) says."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if there is none that can be read."""
        with needs("hf"):
            from transformers import AutoTokenizer

        try:
            self._inner: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except (
            Exception
        ) as error:  # of whatever kind the libraries raise for a folder that is not as it must be
            raise ConfigError(
                f"there is no tokenizer that can be read in {folder} ({brief(error)}); "
                "it needs a tokenizer.json"
            ) from error
        self._inner.model_max_length = 10**9  # documents of any length are cut later
        self.size = len(self._inner)
        self.end: int | None = self._inner.eos_token_id
        vocabulary = sorted(self._inner.get_vocab().items())
        rules = self._inner.backend_tokenizer.to_str() if self._inner.is_fast else ""
        said = json.dumps([vocabulary, self.end, rules])
        self.digest = hashlib.sha256(said.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self._inner.encode(text, add_special_tokens=False)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._inner.decode(list(tokens), skip_special_tokens=True)
        return text

    def save(self, folder: Path) -> None:
        self._inner.save_pretrained(folder)


def brief(error: Exception) -> str:
    """A library's complaint in one line of bounded length: theirs may fill a screen."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:200]}…"
