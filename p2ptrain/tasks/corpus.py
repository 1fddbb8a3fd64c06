"""Text on this machine as bytes: found, read, split into training and held-out text, and named by a digest.

A corpus is `stdlib` (the running Python's own top-level modules: always there, and everyone recognises what
a model trained on them writes), a text file, or a folder of text files. The same files give the same split
and the same digest everywhere, whatever order the file system lists them in.

Not covered: downloads, streaming, text larger than memory (loading takes about three times its size), and one
text under two names (a copy may be trained on while the other is held out).
"""

from __future__ import annotations

import hashlib
import logging
import os
import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from p2ptrain.errors import CorpusError

logger = logging.getLogger(__name__)

MAX_CORPUS_BYTES = 2 * 2**30
MAX_CORPUS_FILES = 200_000

FILES_TO_SPLIT = 20
"""From this many files on, whole files are held out; with fewer, the last part of the text is."""

ZLIB_BYTES = 2 * 2**20
"""zlib looks back at most 32 KiB, so more text than this changes its figure little; it takes 0.1 s."""


@dataclass(frozen=True)
class Corpus:
    """The text of a run as this peer has it. `train` and `heldout` are uint8 [bytes] and share no byte."""

    train: Tensor
    heldout: Tensor
    digest: str
    """SHA-256 that binds both parts: equal digests mean the same samples and the same held-out figures."""
    skipped: tuple[str, ...]
    """Files of the folder that were left out, as `name: reason`."""


@dataclass(frozen=True)
class Document:
    name: str
    """Relative to the corpus, with forward slashes on every system."""
    text: bytes


def load_corpus(source: str, *, holdout: float, context: int) -> Corpus:
    """Read `source` (`stdlib`, a file or a folder) and hold out about the fraction `holdout` of its bytes.

    Each part is long enough for one window of `context + 1` bytes.
    Raises CorpusError if the source is missing, holds no text, or is too small or too large.
    """
    documents, skipped = _read(source, _find(source))
    if not documents:
        seen = f"{len(skipped)} files were left out, the first is {skipped[0]}" if skipped else "it is empty"
        raise CorpusError(
            f"corpus {source} holds no text: {seen}; choose a text file or a folder of them "
            "in the peer file, or `stdlib` in the run file"
        )
    if skipped:
        logger.warning("corpus %s: %d files left out, the first is %s", source, len(skipped), skipped[0])

    train, heldout = _split(documents, holdout)
    for part, text in (("training", train), ("held-out", heldout)):
        if len(text) <= context:
            raise CorpusError(
                f"corpus {source} leaves {len(text)} bytes of {part} text (task.holdout is {holdout:g}), "
                f"but a sample of task.context {context} takes {context + 1}; choose more text"
            )
    digest = hashlib.sha256(hashlib.sha256(train).digest() + hashlib.sha256(heldout).digest()).hexdigest()
    return Corpus(_as_tensor(train), _as_tensor(heldout), digest, tuple(skipped))


def zlib_bits_per_byte(text: Tensor) -> float:
    """What `zlib -9` takes for this uint8 text: the yardstick for a model's bits per byte."""
    sample = text[:ZLIB_BYTES].numpy().tobytes()
    return 8 * len(zlib.compress(sample, 9)) / len(sample)


# -- finding and reading -------------------------------------------------------------------------------------


def _find(source: str) -> Sequence[tuple[str, Path]]:
    """The source's files as (name in the corpus, path), in the order of their names."""
    if source == "stdlib":
        modules = Path(sysconfig.get_path("stdlib")).glob("*.py")
        # `_sysconfigdata…` holds how one machine's Python was built: nobody's prose, different everywhere.
        return sorted((path.name, path) for path in modules if not path.name.startswith("_sysconfigdata"))
    path = Path(source).expanduser()
    if path.is_dir():
        return text_files(path)
    if path.is_file():
        return [(path.name, path)]
    raise CorpusError(
        f"corpus must be `stdlib`, a text file or a folder of them, but there is none at {path.absolute()}; "
        "correct `corpus` in the peer file"
    )


def text_files(folder: Path) -> list[tuple[str, Path]]:
    """All that may hold text in a folder, as (name in it, path), in the order of the names.

    Raises CorpusError if there are very many.
    """
    return sorted(_walk(folder))


def _walk(folder: Path) -> Iterable[tuple[str, Path]]:
    """All regular files below, but nothing hidden: `.git` and its like hold no text of the corpus."""
    count = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if path.is_file():
                count += 1
                if count > MAX_CORPUS_FILES:
                    raise CorpusError(
                        f"corpus {folder} has more than {MAX_CORPUS_FILES:,} files; choose a part of it"
                    )
                yield path.relative_to(folder).as_posix(), path


def _read(source: str, files: Iterable[tuple[str, Path]]) -> tuple[list[Document], list[str]]:
    """The files that hold text, and why each of the others was left out. Empty files are neither."""
    documents: list[Document] = []
    skipped: list[str] = []
    room = MAX_CORPUS_BYTES
    for name, path in files:
        try:
            with path.open("rb") as file:
                head = file.read(8192)
                if b"\0" in head:
                    skipped.append(f"{name}: binary, it holds a zero byte")
                    continue
                text = head + file.read(max(0, room + 1 - len(head)))
        except OSError as error:
            skipped.append(f"{name}: {error.strerror or error}")
            continue
        room -= len(text)
        if room < 0:
            raise CorpusError(
                f"corpus {source} is larger than {MAX_CORPUS_BYTES:,} bytes; choose a part of it"
            )
        if text:
            documents.append(Document(name, text))
    return documents, skipped


# -- splitting -----------------------------------------------------------------------------------------------


def _split(documents: Sequence[Document], holdout: float) -> tuple[bytearray, bytearray]:
    """Training and held-out text.

    Of many files some are held out whole, in the order of their names' hashes, so that peers whose files
    differ a little still hold out nearly the same ones. A file that no longer fits is passed over.
    """
    total = sum(len(document.text) for document in documents)
    if len(documents) < FILES_TO_SPLIT:
        text = _join(documents)
        cut = len(text) - int(holdout * total)
        return text[:cut], text[cut:]
    heldout: set[str] = set()
    room = int(holdout * total)
    for document in sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest()):
        if len(document.text) <= room:
            heldout.add(document.name)
            room -= len(document.text)
    return (
        _join([document for document in documents if document.name not in heldout]),
        _join([document for document in documents if document.name in heldout]),
    )


def _join(documents: Iterable[Document]) -> bytearray:
    # A line end between files: the last line of one must not run into the first of the next.
    return bytearray(b"\n").join(document.text for document in documents)


def _as_tensor(text: bytearray) -> Tensor:
    return torch.frombuffer(text, dtype=torch.uint8)
