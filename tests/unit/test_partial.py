"""Pieces of an interrupted download on disk: found again, never believed, and never in the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2ptrain.records import Manifest, Position
from p2ptrain.replica.partial import MANIFEST, Partial


def manifest(state: str = "2") -> Manifest:
    return Manifest(
        position=Position(step=40, lineage="1" * 64, weight=900),
        state_digest=state * 64,
        size_bytes=10,
        piece_bytes=4,
        pieces=(state * 64,) * 3,
        last=None,
    )


def begun(folder: Path, state: str = "2") -> Partial:
    partial = Partial(folder)
    partial.begin(manifest(state))
    return partial


def test_pieces_are_found_by_the_next_process(tmp_path: Path) -> None:
    first = begun(tmp_path / "partial")
    first.keep(0, b"abcd")
    first.keep(2, b"ij")
    again = Partial(tmp_path / "partial")
    assert again.manifest() == manifest()
    again.begin(manifest())
    assert sorted(again.pieces()) == [(0, b"abcd"), (2, b"ij")]


def test_pieces_of_another_snapshot_are_deleted_when_a_download_begins(tmp_path: Path) -> None:
    begun(tmp_path).keep(0, b"abcd")
    other = begun(tmp_path, "3")
    assert list(other.pieces()) == []
    assert [each.name for each in tmp_path.iterdir()] == ["3" * 64]


def test_nothing_is_left_when_the_download_is_over_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    partial = begun(tmp_path)
    partial.keep(0, b"abcd")
    partial.clear()
    assert partial.manifest() is None
    partial.keep(1, b"efgh")  # late; it goes nowhere
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("content", ["", "{}", "not json", manifest("3").model_dump_json()])
def test_damaged_manifest_counts_as_none(tmp_path: Path, content: str) -> None:
    begun(tmp_path).keep(0, b"abcd")
    (tmp_path / ("2" * 64) / MANIFEST).write_text(content)
    assert Partial(tmp_path).manifest() is None
    assert list(begun(tmp_path).pieces()) == []


def test_download_goes_on_when_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("where a folder should be")
    partial = begun(tmp_path / "file")
    partial.keep(0, b"abcd")
    assert list(partial.pieces()) == []
    assert partial.manifest() is None


def test_pieces_make_room_when_one_of_them_cannot_be_written(tmp_path: Path) -> None:
    partial = begun(tmp_path)
    partial.keep(0, b"abcd")
    (tmp_path / ("2" * 64) / "1.piece").mkdir()  # as good as a full disk
    partial.keep(1, b"efgh")
    partial.keep(2, b"ij")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_kept_when_there_is_no_folder() -> None:
    partial = Partial(None)
    partial.begin(manifest())
    partial.keep(0, b"abcd")
    assert partial.manifest() is None
    assert list(partial.pieces()) == []
    partial.clear()
