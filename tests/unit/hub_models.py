"""Small models, tokenizers and Parquet shards as on the Hugging Face hub, but made here, not fetched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"

FINEWEB_COLUMNS = ("id", "dump", "url", "date", "file_path", "language")
"""Beside `text`, `language_score` and `token_count`: those of HuggingFaceFW/fineweb."""


def save_model(folder: Path, *, vocabulary: int = 320, positions: int = 64, seed: int = 0) -> Path:
    """A GPT-2 of two tiny layers, with weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=vocabulary, n_positions=positions, n_embd=32, n_layer=2, n_head=2)
        )
    model.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, texts: Sequence[str], size: int = 320) -> Path:
    """A byte-level BPE, trained on these texts, with `<end>` after each document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(folder)
    return folder


def into_cache(cache: Path, kind: str, name: str) -> Path:
    """Where a fetched `owner/name` of this kind ("models", "datasets") lies in the hub's cache."""
    top = cache / f"{kind}--{name.replace('/', '--')}"
    (top / "refs").mkdir(parents=True)
    (top / "refs" / "main").write_text(COMMIT)
    snapshot = top / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def documents(shard: int, count: int) -> list[str]:
    """Texts of 20 to 300 words; each begins with its own name, and hardly repeats another."""

    def words(number: int) -> str:
        start = 7919 * shard + 104_729 * number
        return " ".join(f"word{(start + 31 * k * k) % 5003}" for k in range(20 + number * 13 % 280))

    return [f"document {shard}/{number} {words(number)}" for number in range(count)]


def save_shards(folder: Path, shards: int = 4, rows: int = 60, group: int = 20) -> list[Path]:
    """Parquet files with fineweb's columns, in row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(shards):
        columns: dict[str, Any] = {"text": documents(shard, rows)}
        columns |= {name: [f"{name} {number}" for number in range(rows)] for name in FINEWEB_COLUMNS}
        columns |= {"language_score": [0.9] * rows, "token_count": list(range(rows))}
        paths.append(folder / f"{shard:03d}_00000.parquet")
        pq.write_table(pa.table(columns), paths[-1], row_group_size=group)
    return paths


def save_json_lines(path: Path, rows: int = 50) -> Path:
    lines = [json.dumps({"text": text, "number": number}) for number, text in enumerate(documents(9, rows))]
    path.write_text("\n".join(lines) + "\n")
    return path
