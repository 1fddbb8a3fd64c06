"""Text as windows of tokens: which window is which depends on nothing but (seed, step, peer, number), so a
peer that comes back goes on exactly where it was, and held-out text is never trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from p2ptrain.config import CausalLmTask as Settings
from p2ptrain.errors import CorpusError
from p2ptrain.tasks import documents as module
from p2ptrain.tasks.documents import Documents, packed
from p2ptrain.tasks.tokens import ByteTokenizer, FolderTokenizer
from tests.unit.hub_models import documents, save_json_lines, save_shards, save_tokenizer

CONTEXT = 96
NAME = re.compile(r"document (\d+)/(\d+) ")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The libraries copy JSON lines into a cache; it is not that of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One text of each kind on this machine."""
    folder = tmp_path_factory.mktemp("texts")
    text = " ü€😀 ".join(documents(5, 80))
    (folder / "text.txt").write_text(text)
    save_shards(folder / "shards")
    return {
        "text": folder / "text.txt",
        "json": save_json_lines(folder / "rows.jsonl"),
        "parquet": folder / "shards",
    }


Open = Callable[..., Documents]


@pytest.fixture(params=["text", "json", "parquet"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opened(kind: str, places: dict[str, Path]) -> Open:
    """Opens that text as a peer does at each start."""

    def opened(**fields: Any) -> Documents:
        settings = Settings(dataset="texts", context=CONTEXT, **fields)
        return Documents(settings, ByteTokenizer(), 0, str(places[kind]))

    return opened


def written(windows: list[torch.Tensor]) -> str:
    return ByteTokenizer().decode(torch.cat(windows).tolist())


# -- which window is which -----------------------------------------------------------------------------------


def test_peer_that_starts_again_goes_on_with_the_windows_it_would_have_had(opened: Open) -> None:
    """The trap: a shuffle buffer loses what is in it when a stream stops."""
    before = opened()
    steps = {step: before.samples(step, "alice", 0, 5) for step in range(40)}
    for step in (0, 17, 39):
        again = opened().samples(step, "alice", 0, 5)
        assert all(torch.equal(a, b) for a, b in zip(steps[step], again, strict=True))


def test_micro_batches_of_any_size_give_the_same_windows(opened: Open) -> None:
    whole = opened().samples(3, "alice", 0, 9)
    text = opened()
    parts = [
        *text.samples(3, "alice", 0, 2),
        *text.samples(3, "alice", 2, 3),
        *text.samples(3, "alice", 5, 4),
    ]
    back = text.samples(3, "alice", 1, 2)
    assert torch.equal(torch.stack(whole), torch.stack(parts))
    assert torch.equal(torch.stack(whole[1:3]), torch.stack(back))
    assert whole[0].shape == (CONTEXT + 1,)
    assert whole[0].dtype == torch.int64


def test_peers_steps_and_seeds_draw_apart(opened: Open) -> None:
    text = opened()
    drawn = [text.samples(step, peer, 0, 4) for step in (0, 1, 40) for peer in ("alice", "bob")]
    assert len({written(windows) for windows in drawn}) == len(drawn)


def test_held_out_text_is_never_trained_on(opened: Open, kind: str) -> None:
    text = opened(holdout=0.2)
    trained = {window.numpy().tobytes() for step in range(60) for window in text.samples(step, "a", 0, 8)}
    held = {window.numpy().tobytes() for window in text.heldout(12)}
    assert len(held) == 12
    assert not held & trained
    if kind != "text":  # which has no documents
        of_trained, of_held = (
            set(NAME.findall(b"".join(windows).replace(b"\0", b"").decode(errors="replace")))
            for windows in (trained, held)
        )
        assert of_held
        assert not of_trained & of_held


# -- documents -----------------------------------------------------------------------------------------------


def test_documents_are_packed_one_after_another_each_with_its_end() -> None:
    windows = list(packed(["abc", "", "defgh", "ij"], ByteTokenizer(), 5))
    assert [window.tolist() for window in windows] == [
        [*b"abc", 256, 256],
        [*b"defgh"],
    ]


def test_empty_documents_are_reported_and_not_read_for_ever() -> None:
    class NoEnd(ByteTokenizer):
        end = None

    with pytest.raises(CorpusError, match="documents in a row hold too little text for one sample"):
        next(packed(iter(lambda: "", None), NoEnd(), 5))


def test_step_of_a_peer_takes_each_row_of_a_shard_once_before_the_next_shard(places: dict[str, Path]) -> None:
    settings = Settings(dataset="texts", context=CONTEXT)
    source = Documents(settings, ByteTokenizer(), 0, str(places["parquet"]))._source
    assert isinstance(source, module.Shards)

    def names(step: int) -> list[tuple[str, int]]:
        """Shard and number of the first 19 documents."""
        found = (NAME.match(text) for text in islice(source._documents(step, "alice"), 19))
        return [(each[1], int(each[2])) for each in found if each]

    assert len(set(names(0))) == 19  # of 20 rows in a group one is held out
    assert len({(shard, number // 20) for shard, number in names(0)}) == 1
    assert set(names(1)) == set(names(0))
    assert names(1) != names(0)
    assert set(names(16)) != set(names(0))


def test_all_shards_are_read_in_the_end(places: dict[str, Path]) -> None:
    text = Documents(Settings(dataset="texts", context=CONTEXT), ByteTokenizer(), 0, str(places["parquet"]))
    drawn = [window for step in range(0, 16 * 60, 16) for window in text.samples(step, "alice", 0, 8)]
    groups = {(shard, int(number) // 20) for shard, number in NAME.findall(written(drawn))}
    assert groups == {(str(shard), group) for shard in range(4) for group in range(3)}


def test_window_of_text_has_whole_characters_when_tokens_are_not_bytes(
    places: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = FolderTokenizer(save_tokenizer(tmp_path, documents(5, 20)))
    text = Documents(Settings(dataset="texts", context=CONTEXT), tokenizer, 0, str(places["text"]))
    windows = text.samples(0, "alice", 0, 200)
    assert {len(window) for window in windows} == {CONTEXT + 1}
    begun = [tokenizer.decode(window.tolist()) for window in windows]
    assert any("😀" in each for each in begun)
    assert not any(each.startswith("\ufffd") for each in begun)


def test_notes_differ_when_files_do_and_with_exact_when_a_byte_does(tmp_path: Path) -> None:
    def note(row: str, exact: bool) -> str:
        (tmp_path / "rows.jsonl").write_text(
            "".join(json.dumps({"text": row + str(k)}) + "\n" for k in range(9))
        )
        settings = Settings(dataset="texts", exact=exact)
        return Documents(settings, ByteTokenizer(), 0, str(tmp_path / "rows.jsonl")).note

    assert note("one", False) == note("two", False) != note("three", False)
    assert note("one", True) != note("two", True)


# -- windows by their number ---------------------------------------------------------------------------------


def test_numbered_windows_are_all_of_the_text_side_by_side(opened: Open, kind: str) -> None:
    text = opened()
    windows = text.numbered(range(text.size))
    assert windows.shape == (text.size, CONTEXT + 1)
    assert torch.equal(windows[1:, 0], windows[:-1, -1])
    whole = ByteTokenizer().decode(windows[:, :-1].flatten().tolist())
    names = NAME.findall(whole)
    assert len(names) == len(set(names)) == {"text": 77, "json": 48, "parquet": 4 * 3 * 19}[kind]
    assert not {window.numpy().tobytes() for window in text.heldout(12)} & {
        window.numpy().tobytes() for window in windows
    }


def test_numbers_of_windows_do_not_hang_on_how_much_text_is_read_at_once(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces end with a line, or where a character does."""
    (tmp_path / "text.txt").write_text("a line – ünïcode\n" * 200 + "😀" * 400 + "\nand the end" * 50)
    settings = Settings(dataset="texts", context=CONTEXT)
    whole = Documents(settings, ByteTokenizer(), 0, str(tmp_path / "text.txt"))
    expected = whole.numbered(range(whole.size))
    monkeypatch.setattr(module, "PIECE_BYTES", 101)
    pieces = Documents(settings, ByteTokenizer(), 0, str(tmp_path / "text.txt"))
    assert torch.equal(pieces.numbered(range(pieces.size)), expected)


def test_text_is_refused_when_it_is_too_much_to_be_numbered(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_TOKENS", 1000)
    with pytest.raises(CorpusError, match=r'more than 1,000 tokens.* set data to "drawn" in the run file'):
        _ = opened().size


# -- what is said when it will not do ------------------------------------------------------------------------


def refusal(place: Path | str, **fields: Any) -> str:
    with pytest.raises(CorpusError) as caught:
        Documents(Settings(dataset="texts", **fields), ByteTokenizer(), 0, str(place)).samples(0, "a", 0, 1)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 5
    return str(caught.value)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_column_is_named_when_it_is_missing_or_no_text(places: dict[str, Path], kind: str) -> None:
    said = refusal(places[kind], column="body")
    assert "has no column 'body', only text, " in said
    assert "set task.column in the run file" in said
    number = {"json": "number", "parquet": "token_count"}[kind]
    assert f"column {number!r} of " in (said := refusal(places[kind], column=number))
    assert "holds int64, not text" in said


def test_file_is_named_when_it_is_broken_or_missing(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing of the kind")
    assert f"{tmp_path / 'broken.parquet'} cannot be read (" in refusal(tmp_path / "broken.parquet")
    (tmp_path / "broken.jsonl").write_text('{"text": 3')
    assert f"{tmp_path / 'broken.jsonl'} cannot be read (" in refusal(tmp_path / "broken.jsonl")
    assert "there is none at" in refusal(tmp_path / "missing")


def test_shard_is_refused_when_it_is_too_large_to_hold(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SHARD_ROWS", 10)
    assert "more than 10 rows in a piece that cannot be read in parts" in refusal(places["parquet"])


def test_dataset_on_the_hub_is_named_when_there_is_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CorpusError, match=r"the dataset somebody/poems cannot be read .* network, then start"
    ):
        Documents(Settings(dataset="somebody/poems"), ByteTokenizer(), 0, "")
