import hashlib
import logging
import os
import time
import zlib
from pathlib import Path

import pytest
import torch

from p2ptrain.errors import CorpusError
from p2ptrain.tasks import corpus as module
from p2ptrain.tasks.corpus import Corpus, load_corpus, zlib_bits_per_byte


def read(source: Path | str, holdout: float = 0.1, context: int = 8) -> Corpus:
    return load_corpus(str(source), holdout=holdout, context=context)


def text_of(part: torch.Tensor) -> bytes:
    return part.numpy().tobytes()


def write_folder(folder: Path, count: int) -> Path:
    """`count` files, each of 100 lines that no other file has."""
    for number in range(count):
        path = folder / f"part{number % 3}" / f"file{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"file {number} line {line}\n" for line in range(100)))
    return folder


# -- the standard library ------------------------------------------------------------------------------------


def test_stdlib_is_megabytes_of_python_with_a_twentieth_held_out():
    corpus = read("stdlib", holdout=0.05, context=128)
    total = len(corpus.train) + len(corpus.heldout)
    assert total > 3_000_000
    assert 0.03 < len(corpus.heldout) / total <= 0.05
    assert corpus.train.dtype == corpus.heldout.dtype == torch.uint8
    assert b"def __init__(self" in text_of(corpus.train)
    assert corpus.skipped == ()


def test_stdlib_loads_in_less_than_a_third_of_a_second_of_computing():
    began = time.process_time()
    read("stdlib", holdout=0.05, context=128)
    assert time.process_time() - began < 0.3


def test_stdlib_leaves_out_how_this_machine_built_its_python():
    corpus = read("stdlib")
    for part in (corpus.train, corpus.heldout):
        assert b"\nbuild_time_vars = {" not in text_of(part)


# -- splitting -----------------------------------------------------------------------------------------------


def test_split_holds_out_whole_files_when_there_are_many(tmp_path):
    corpus = read(write_folder(tmp_path, 60))
    train, heldout = text_of(corpus.train), text_of(corpus.heldout)
    assert 0.05 < len(heldout) / (len(train) + len(heldout)) <= 0.1
    for number in range(60):
        lines = [f"file {number} line {line}\n".encode() for line in range(100)]
        inside = {line in train for line in lines} | {line not in heldout for line in lines}
        assert len(inside) == 1, f"file {number} lies on both sides"


def test_split_holds_out_the_last_part_when_files_are_few(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(1, 201)))
    corpus = read(path)
    assert text_of(corpus.train) == bytes(range(1, 181))
    assert text_of(corpus.heldout) == bytes(range(181, 201))


def test_split_passes_over_a_file_too_large_for_the_heldout_share(tmp_path):
    write_folder(tmp_path, 30)
    for path in sorted(
        tmp_path.rglob("*.txt"), key=lambda path: hashlib.sha256(name(tmp_path, path)).digest()
    )[:1]:
        path.write_bytes(b"giant\n" * 100_000)
    corpus = read(tmp_path, holdout=0.01)
    assert b"giant" not in text_of(corpus.heldout)
    assert len(corpus.heldout) > 0


def name(folder: Path, path: Path) -> bytes:
    return path.relative_to(folder).as_posix().encode()


def test_files_stay_apart_when_joined(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second" * 50)
    assert text_of(read(tmp_path).train).startswith(b"first\nsecond")


# -- the digest ----------------------------------------------------------------------------------------------


def test_digest_is_the_same_when_files_were_written_in_another_order(tmp_path):
    here, there = write_folder(tmp_path / "here", 30), tmp_path / "there"
    for path in sorted(here.rglob("*.txt"), reverse=True):
        copy = there / path.relative_to(here)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    assert read(here).digest == read(there).digest


@pytest.mark.parametrize("which", [0, -1])
def test_digest_changes_when_one_byte_of_either_part_does(tmp_path, which):
    path = tmp_path / "text.txt"
    text = bytearray(b"some text " * 50)
    path.write_bytes(text)
    before = read(path).digest
    text[which] ^= 1
    path.write_bytes(text)
    assert read(path).digest != before


def test_digest_changes_when_the_split_moves(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"some text " * 50)
    assert read(path, holdout=0.1).digest != read(path, holdout=0.2).digest


# -- what is left out ----------------------------------------------------------------------------------------


def test_binary_and_unreadable_files_are_left_out_and_reported(tmp_path, caplog, monkeypatch):
    (tmp_path / "text.txt").write_text("plain text " * 50)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0 secret")
    (tmp_path / "locked.txt").write_text("locked")
    plain_open = Path.open

    def open_but_not_locked(path: Path, *arguments: str) -> object:
        if path.name == "locked.txt":  # permissions would not stop a test that runs as root
            raise PermissionError(13, "Permission denied")
        return plain_open(path, *arguments)

    monkeypatch.setattr(Path, "open", open_but_not_locked)
    with caplog.at_level(logging.WARNING):
        corpus = read(tmp_path)
    assert corpus.skipped == ("image.png: binary, it holds a zero byte", "locked.txt: Permission denied")
    assert b"secret" not in text_of(corpus.train) + text_of(corpus.heldout)
    assert "2 files left out, the first is image.png" in caplog.text


def test_hidden_and_special_files_are_no_part_of_a_folder(tmp_path):
    (tmp_path / "text.txt").write_text("plain text " * 50)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / ".notes").write_text("hidden")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    corpus = read(tmp_path)
    assert len(corpus.train) + len(corpus.heldout) == 550
    assert corpus.skipped == ()


# -- errors --------------------------------------------------------------------------------------------------


def test_a_missing_corpus_is_refused_with_where_and_what_to_do(tmp_path):
    with pytest.raises(CorpusError, match=r"there is none at .*nowhere; correct `corpus` in the peer file"):
        read(tmp_path / "nowhere")


def test_an_empty_corpus_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="holds no text: it is empty; choose"):
        read(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(CorpusError, match="holds no text: it is empty; choose"):
        read(tmp_path / "empty.txt")


def test_a_binary_file_is_refused_when_it_is_all_there_is(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\0" * 1000)
    with pytest.raises(CorpusError, match=r"1 files were left out, the first is model.bin: binary"):
        read(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("size", "holdout", "part"), [(100, 0.05, "5 bytes of held-out"), (12, 0.5, "6 bytes of training")]
)
def test_a_corpus_smaller_than_one_sample_is_refused(tmp_path, size, holdout, part):
    (tmp_path / "short.txt").write_bytes(b"x" * size)
    with pytest.raises(
        CorpusError, match=rf"leaves {part} text .*a sample of task.context 8 takes 9; choose more"
    ):
        read(tmp_path / "short.txt", holdout=holdout)


def test_a_corpus_of_exactly_one_sample_a_part_is_taken(tmp_path):
    (tmp_path / "short.txt").write_bytes(b"x" * 18)
    corpus = read(tmp_path / "short.txt", holdout=0.5)
    assert len(corpus.train) == len(corpus.heldout) == 9


def test_a_corpus_beyond_the_bounds_is_refused(tmp_path, monkeypatch):
    write_folder(tmp_path, 5)
    monkeypatch.setattr(module, "MAX_CORPUS_BYTES", 5_000)
    with pytest.raises(CorpusError, match="larger than 5,000 bytes; choose a part of it"):
        read(tmp_path)
    monkeypatch.setattr(module, "MAX_CORPUS_FILES", 4)
    with pytest.raises(CorpusError, match="more than 4 files; choose a part of it"):
        read(tmp_path)


# -- the yardstick -------------------------------------------------------------------------------------------


def test_zlib_bits_per_byte_counts_what_zlib_writes():
    text = b"import os\nimport sys\n" * 40
    part = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    assert zlib_bits_per_byte(part) == 8 * len(zlib.compress(text, 9)) / len(text)


def test_zlib_bits_per_byte_is_about_eight_when_the_text_is_noise():
    noise = torch.randint(256, (50_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert zlib_bits_per_byte(noise) == pytest.approx(8, abs=0.01)
