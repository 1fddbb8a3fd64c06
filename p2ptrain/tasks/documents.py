"""Text for language models, from this machine or the Hugging Face hub, as windows of tokens in an order that
is a pure function of (seed, step, peer, number): nothing needs saving, and a peer that comes back goes on
with exactly the windows that it would have had.

- Text files: a window begins at a byte that is drawn for it.
- JSON lines: documents are drawn for a (step, peer) one after another from all rows.
- Parquet, and datasets from the hub, which are too large to draw rows from: for 16 steps of a peer one shard
  is drawn, a row group where the files have them, and each of these steps takes its rows in its own order.
  There is no shuffle buffer: what is in one when a stream stops is lost, or seen twice.

Documents are packed: put one after another, each closed by the tokenizer's end token, and cut into windows.
A window that no longer fits a document goes on with the next one.

Not covered: reading ahead (a new shard is fetched while the peer's first micro-batch waits for it), and
shards that cannot be split and have more rows than memory has room for.
"""

from __future__ import annotations

import hashlib
import logging
import math
from array import array
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from p2ptrain.config import CausalLmTask
from p2ptrain.errors import CorpusError, P2PTrainError
from p2ptrain.tasks.corpus import load_corpus, text_files
from p2ptrain.tasks.draws import draws
from p2ptrain.tasks.extras import needs
from p2ptrain.tasks.tokens import ByteTokenizer, Tokenizer, brief

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 8
"""Text that is read for one token at first; where that gives too few, it is doubled."""
SHARD_STEPS = 16
"""Steps for which a peer stays with one shard, so that it need not fetch one for each."""
SHARDS_KEPT = 2
FILES_KEPT = 32
"""Whose row groups are known; learning them takes a request or two."""
MAX_SHARD_ROWS = 250_000
MAX_TOKENS = 2**29
"""That are held in memory where samples are numbered; 2 GB."""
TOLD_TOKENS = 5_000_000
"""Between two lines about how far reading is."""
PIECE_BYTES = 2**20
"""Of plain text that become tokens at once: as Python's numbers these take forty times their place."""
DOCUMENTS_WITHOUT_A_WINDOW = 100_000
"""So many documents, and no window is full yet: they must be empty."""

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)


class Source(Protocol):
    """Where the windows of a run come from: int64 [context + 1] each."""

    note: str

    def windows(self, step: int, peer: str) -> Iterator[Tensor]:
        """Those that `peer` draws for `step`, without end."""
        ...

    def heldout(self) -> Iterator[Tensor]:
        """Those that are never trained on, the same ones in the same order every time; may end."""
        ...

    def everything(self) -> Iterator[list[int]] | None:
        """The tokens of all that is trained on, once, in pieces; None for a stream, whose end nobody here has
        seen."""
        ...


class Documents:
    """The windows of one run, as this peer has them."""

    def __init__(self, settings: CausalLmTask, tokenizer: Tokenizer, seed: int, corpus: str) -> None:
        """Open the run's dataset, or what the peer file names in its place. Raises CorpusError."""
        self._source = open_source(settings, tokenizer, seed, corpus)
        self._drawing: Iterator[Tensor] = iter(())
        self._at = (-1, "", 0)
        """Step, peer and number of the window that `_drawing` gives next."""
        self._heldout: list[Tensor] = []
        self._context = settings.context

    @property
    def note(self) -> str:
        return f"data {self._source.note}"

    def samples(self, step: int, peer: str, first: int, count: int) -> list[Tensor]:
        """int64 [context + 1] each: samples `first … first + count - 1` that `peer` draws for `step`.

        Numbers in order cost what they are; going back costs all that were before them. Raises CorpusError.
        """
        if (step, peer) != self._at[:2] or first < self._at[2]:
            self._drawing, self._at = self._source.windows(step, peer), (step, peer, 0)
        drawn = list(islice(self._drawing, first - self._at[2], first - self._at[2] + count))
        self._at = (step, peer, first + count)
        return drawn

    @property
    def size(self) -> int:
        """How many windows there are side by side; 0 for a stream. The first call reads all of the text."""
        return max(len(self._tokens) - 1, 0) // self._context

    def numbered(self, numbers: Sequence[int]) -> Tensor:
        """int64 [len(numbers), context + 1]: these windows; the last token of each begins the next."""
        starts = torch.tensor(numbers, dtype=torch.int64) * self._context
        return self._tokens[starts[:, None] + torch.arange(self._context + 1)].long()

    @cached_property
    def _tokens(self) -> Tensor:
        """int32 [tokens]: all that is trained on, one document after another. Raises CorpusError."""
        tokens = array("i")
        told = TOLD_TOKENS
        for piece in self._source.everything() or ():
            tokens.extend(piece)
            if len(tokens) > MAX_TOKENS:
                raise CorpusError(
                    f"the text has more than {MAX_TOKENS:,} tokens, the most that are kept in memory to be "
                    'numbered; choose a part of it, or set data to "drawn" in the run file'
                )
            if len(tokens) >= told:
                logger.info("numbering the text: %d million tokens so far", len(tokens) // 10**6)
                told = len(tokens) + TOLD_TOKENS
        return torch.frombuffer(tokens, dtype=torch.int32) if tokens else torch.empty(0, dtype=torch.int32)

    def heldout(self, most: int) -> list[Tensor]:
        """The first `most` held-out windows; there may be fewer, but one. Raises CorpusError."""
        if not self._heldout:
            self._heldout = list(islice(self._source.heldout(), most))
        if not self._heldout:
            raise CorpusError(
                "the held-out text is shorter than one sample; choose more text, a larger task.holdout or a "
                "smaller task.context"
            )
        return self._heldout


def open_source(settings: CausalLmTask, tokenizer: Tokenizer, seed: int, corpus: str) -> Source:
    if not corpus and "/" in settings.dataset:
        return _from_hub(settings, tokenizer, seed)
    path = Path(corpus).expanduser()
    if not corpus or corpus == "stdlib" or not path.exists():
        return Text(settings, tokenizer, seed, corpus or settings.dataset)
    if files := _ending(path, PARQUET):
        return _from_parquet(settings, tokenizer, seed, files)
    if files := _ending(path, (*JSON_LINES, ".json") if path.is_file() else JSON_LINES):
        return _from_json(settings, tokenizer, seed, files)
    return Text(settings, tokenizer, seed, corpus)


# -- text files ----------------------------------------------------------------------------------------------


class Text:
    """Plain text: each window begins at a drawn byte, wherever that is."""

    def __init__(self, settings: CausalLmTask, tokenizer: Tokenizer, seed: int, source: str) -> None:
        """See `load_corpus`. Raises CorpusError."""
        corpus = load_corpus(source, holdout=settings.holdout, context=settings.context)
        self._train, self._heldout = corpus.train, corpus.heldout
        self.note = corpus.digest[:16]
        self._seed, self._tokenizer, self._length = seed, tokenizer, settings.context + 1
        exactly = isinstance(tokenizer, ByteTokenizer)
        self._first_bytes = self._length if exactly else BYTES_PER_TOKEN * self._length

    def windows(self, step: int, peer: str) -> Iterator[Tensor]:
        room = len(self._train) - self._length + 1
        for number in count():
            yield self._window(self._train, draws(self._seed, step, peer, number, 1)[0] % room)

    def heldout(self) -> Iterator[Tensor]:
        room, evenly = len(self._heldout) - self._length + 1, 32
        for number in range(evenly):
            yield self._window(self._heldout, number * (room - 1) // (evenly - 1))

    def everything(self) -> Iterator[list[int]]:
        """Pieces end where a line does, if one does: tokens reach over no end of a piece."""
        decoder = getincrementaldecoder("utf-8")("replace")
        start = 0
        while start < len(self._train):
            piece = self._train[start : start + PIECE_BYTES].numpy().tobytes()
            if start + len(piece) < len(self._train):
                piece = piece[: piece.rfind(b"\n") + 1] or piece
            start += len(piece)
            yield self._tokenizer.encode(decoder.decode(piece, start == len(self._train)))
        if self._tokenizer.end is not None:
            yield [self._tokenizer.end]

    def _window(self, text: Tensor, start: int) -> Tensor:
        if isinstance(self._tokenizer, ByteTokenizer):
            return text[start : start + self._length].long()
        size = self._first_bytes
        while True:
            start = max(0, min(start, len(text) - size))
            piece = text[start : start + size].numpy().tobytes()
            # No character begins with its second byte.
            tokens = self._tokenizer.encode(piece.lstrip(CONTINUATION).decode(errors="replace"))
            if len(tokens) >= self._length:
                return torch.tensor(tokens[: self._length], dtype=torch.int64)
            if size >= len(text):
                raise CorpusError(
                    f"the text has {len(tokens)} tokens, but a sample of task.context {self._length - 1} "
                    f"takes {self._length}; choose more text"
                )
            size *= 2


CONTINUATION = bytes(range(0x80, 0xC0))
"""Bytes of UTF-8 that do not begin a character."""

# -- documents -----------------------------------------------------------------------------------------------


def ended(document: str, tokenizer: Tokenizer) -> list[int]:
    """Its tokens, and the one that closes it."""
    return tokenizer.encode(document) + ([] if tokenizer.end is None else [tokenizer.end])


def packed(documents: Iterable[str], tokenizer: Tokenizer, length: int) -> Iterator[Tensor]:
    """int64 [length] each: the documents' tokens, one after another. What fills no window is left out.

    Raises CorpusError if nothing comes of very many documents.
    """
    waiting: list[int] = []
    empty = 0
    for document in documents:
        waiting += ended(document, tokenizer)
        start = 0
        while len(waiting) - start >= length:
            yield torch.tensor(waiting[start : start + length], dtype=torch.int64)
            start += length
        waiting, empty = waiting[start:], 0 if start else empty + 1
        if empty > DOCUMENTS_WITHOUT_A_WINDOW:
            raise CorpusError(f"{empty:,} documents in a row hold too little text for one sample")


class Rows:
    """Rows that can be read in any order; the last ones are held out."""

    def __init__(
        self, rows: Any, settings: CausalLmTask, tokenizer: Tokenizer, seed: int, where: str, note: str
    ) -> None:
        """`rows` is a `datasets.Dataset`. Raises CorpusError."""
        _check_column(rows, settings.column, where)
        held = max(1, int(settings.holdout * len(rows)))
        if len(rows) <= held:
            raise CorpusError(
                f"{where} has {len(rows)} rows, of which some must be held out; choose more text"
            )
        self._rows, self._column, self._train = rows, settings.column, len(rows) - held
        self._tokenizer, self._seed, self._length = tokenizer, seed, settings.context + 1
        self.note = note

    def windows(self, step: int, peer: str) -> Iterator[Tensor]:
        drawn = (draws(self._seed, step, peer, number, 1)[0] % self._train for number in count())
        return packed(map(self._document, drawn), self._tokenizer, self._length)

    def heldout(self) -> Iterator[Tensor]:
        held = map(self._document, range(self._train, len(self._rows)))
        return packed(held, self._tokenizer, self._length)

    def everything(self) -> Iterator[list[int]]:
        for number in range(self._train):
            yield ended(self._document(number), self._tokenizer)

    def _document(self, number: int) -> str:
        return self._rows[number][self._column] or ""


class Shards:
    """Files of which each is read in parts; of every part the last rows are held out."""

    def __init__(
        self,
        stream: Any,
        settings: CausalLmTask,
        tokenizer: Tokenizer,
        seed: int,
        where: str,
        note: str,
        *,
        ends: bool,
    ) -> None:
        """`stream` is a `datasets.IterableDataset`; `ends` says whether all of it may be read. Raises
        CorpusError."""
        with _reading(where):
            if stream.column_names is None:  # known only once something was read
                stream = stream._resolve_features()
        _check_column(stream, settings.column, where)
        self._stream, self._where, self._ends = stream, where, ends
        self._column, self._holdout = settings.column, settings.holdout
        self._tokenizer, self._seed, self._length = tokenizer, seed, settings.context + 1
        self._files: dict[int, Any] = {}
        self._read: dict[tuple[int, int], Any] = {}
        self.note = note

    def windows(self, step: int, peer: str) -> Iterator[Tensor]:
        return packed(self._documents(step, peer), self._tokenizer, self._length)

    def heldout(self) -> Iterator[Tensor]:
        return packed(self._heldout_documents(), self._tokenizer, self._length)

    def everything(self) -> Iterator[list[int]] | None:
        return self._all_trained() if self._ends else None

    def _all_trained(self) -> Iterator[list[int]]:
        for file in range(self._stream.num_shards):
            for part in range(self._parts(file)):
                rows = self._rows(file, part)
                for number in range(len(rows) - self._held(len(rows))):
                    yield ended(rows[number].as_py() or "", self._tokenizer)

    def _documents(self, step: int, peer: str) -> Iterator[str]:
        for turn in count():
            file, part = draws(self._seed, step // SHARD_STEPS, f"{peer}/shard", 2 * turn, 2)
            file %= self._stream.num_shards
            rows = self._rows(file, part % self._parts(file))
            train = len(rows) - self._held(len(rows))
            # Each row once, in an order that needs no list: steps of a stride that has no divisor in common.
            start, stride = draws(self._seed, step, peer, 2 * turn, 2)
            while train and math.gcd(stride, train) > 1:
                stride += 1
            for number in range(train):
                yield rows[(start + number * stride) % train].as_py() or ""

    def _heldout_documents(self) -> Iterator[str]:
        """The first part of every file, then the second of those that have one, and so on."""
        for part in count():
            having = (file for file in range(self._stream.num_shards) if part < self._parts(file))
            none = True
            for file in having:
                none = False
                rows = self._rows(file, part)
                for number in range(len(rows) - self._held(len(rows)), len(rows)):
                    yield rows[number].as_py() or ""
            if none:
                return

    def _held(self, rows: int) -> int:
        return max(1, int(self._holdout * rows)) if rows > 1 else 0

    def _parts(self, file: int) -> int:
        """Row groups of that file, or 1 if it cannot be split."""
        return int(self._file(file).num_shards)

    def _file(self, number: int) -> Any:
        if number not in self._files:
            with _reading(self._where):
                whole = self._stream.shard(self._stream.num_shards, number)
                _keep(self._files, number, whole.reshard(), FILES_KEPT)
        return self._files[number]

    def _rows(self, file: int, part: int) -> Any:
        """The text of that part: a `pyarrow.ChunkedArray` of strings."""
        if (file, part) not in self._read:
            _keep(self._read, (file, part), self._fetched(file, part), SHARDS_KEPT)
        return self._read[file, part]

    def _fetched(self, file: int, part: int) -> Any:
        import pyarrow

        chunks: list[Any] = []
        rows = 0
        with _reading(self._where):
            shard = self._file(file).shard(self._parts(file), part).with_format("arrow")
            for table in shard.iter(batch_size=10_000):
                chunks += table.column(self._column).chunks
                rows += table.num_rows
                if rows > MAX_SHARD_ROWS:
                    raise CorpusError(
                        f"{self._where} has more than {MAX_SHARD_ROWS:,} rows in a piece that cannot be read "
                        "in parts; choose one in Parquet with smaller row groups, or have it as JSON lines "
                        "and name that as corpus in the peer file"
                    )
        return pyarrow.chunked_array(chunks, type=pyarrow.string() if not chunks else None)


def _keep(kept: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Put it in, and take out what has been there longest."""
    kept[key] = value
    if len(kept) > most:
        del kept[next(iter(kept))]


# -- opening -------------------------------------------------------------------------------------------------


def _ending(path: Path, endings: tuple[str, ...]) -> list[Path]:
    """The file, or the folder's files in order of their names, whose names end so."""
    files = [path] if path.is_file() else [each for _, each in text_files(path)]
    return [each for each in files if each.name.lower().endswith(endings)]


def _from_json(settings: CausalLmTask, tokenizer: Tokenizer, seed: int, files: list[Path]) -> Source:
    where = _named(files)
    with needs("hf"):
        from datasets import load_dataset
    with _reading(where):
        # Makes a copy that can be read in any order, once, in the libraries' own cache.
        rows = load_dataset("json", data_files=[str(each) for each in files], split="train")
    return Rows(rows, settings, tokenizer, seed, where, _digest(files, settings.exact))


def _from_parquet(settings: CausalLmTask, tokenizer: Tokenizer, seed: int, files: list[Path]) -> Source:
    where = _named(files)
    with needs("hf"):
        from datasets import load_dataset
    with _reading(where):
        stream = load_dataset(
            "parquet", data_files=[str(each) for each in files], split="train", streaming=True
        )
    return Shards(stream, settings, tokenizer, seed, where, _digest(files, settings.exact), ends=True)


def _from_hub(settings: CausalLmTask, tokenizer: Tokenizer, seed: int) -> Source:
    where = f"the dataset {settings.dataset}"
    with needs("hf"):
        from datasets import load_dataset
    with _reading(where):
        stream = load_dataset(
            # So spelled, it cannot be a folder that happens to have this name here.
            f"hf://datasets/{settings.dataset}",
            settings.subset or None,
            split=settings.split,
            revision=settings.dataset_revision,
            streaming=True,
        )
    said = (settings.dataset, settings.dataset_revision, settings.subset, settings.split, settings.column)
    note = hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]
    return Shards(stream, settings, tokenizer, seed, where, note, ends=False)


def _named(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"


def _digest(files: list[Path], exact: bool) -> str:
    """Names the files: by their content if that must be the same everywhere, else by what is quickly read."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\n{path.stat().st_size}\n".encode())
        if exact:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _check_column(table: Any, column: str, where: str) -> None:
    if column not in table.column_names:
        raise CorpusError(
            f"{where} has no column {column!r}, only {', '.join(table.column_names[:20])}; set task.column "
            "in the run file to the one that holds the text"
        )
    kind = getattr(table.features[column], "dtype", "something else")
    if kind not in ("string", "large_string"):
        raise CorpusError(f"column {column!r} of {where} holds {kind}, not text; choose another task.column")


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Whatever a file of somebody else's, the hub or the network does becomes a sentence."""
    try:
        yield
    except P2PTrainError:
        raise
    except Exception as error:  # of network, hub, disk or format, in four libraries' kinds
        raise CorpusError(
            f"{where} cannot be read ({brief(error)}); check its name, the files and the network, then "
            "start this peer again: it goes on with the samples that come next"
        ) from error
