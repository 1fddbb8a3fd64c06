"""Text files as windows of tokens, for measuring what adapters make of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from p2ptrain.errors import AdapterError
from p2ptrain.tasks.tokens import ByteTokenizer, FolderTokenizer, Tokenizer

MAX_TEXT_BYTES = 64 * 2**20


def tokenizer_of(base: Path) -> Tokenizer:
    """The one in the base's folder, or bytes if there is none."""
    if any((base / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return FolderTokenizer(base)
    return ByteTokenizer()


def windows(file: Path, tokenizer: Tokenizer, length: int, most: int) -> Tensor:
    """int64 [windows, length]: at most `most` windows, evenly spread over the text, none overlapping another.

    Raises AdapterError if the file cannot be read or is shorter than five windows.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_TEXT_BYTES).decode(errors="replace")
    except OSError as error:
        raise AdapterError(f"cannot read the text {file}: {error.strerror}; name a file of text") from None
    tokens = tokenizer.encode(text)
    count = len(tokens) // length
    if count < 5:
        raise AdapterError(
            f"{file} has {len(tokens):,} tokens; at least five windows of {length} are needed: give more "
            "text, or a smaller --length"
        )
    cut = torch.tensor(tokens[: count * length]).view(count, length)
    return cut[torch.arange(min(count, most)) * count // min(count, most)]


def split(texts: Tensor) -> tuple[Tensor, Tensor]:
    """Four of five windows to learn from, and the fifths to be judged by."""
    held = torch.arange(len(texts)) % 5 == 4
    return texts[~held], texts[held]
