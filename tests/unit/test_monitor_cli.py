"""The mistakes one can make with `p2ptrain monitor`, and a journal that is shown again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from event_examples import COMMITTED, ONE_OF_EACH
from organizer import invite

from p2ptrain.errors import StorageError
from p2ptrain.events import Joined
from p2ptrain.records import PeerId
from p2ptrain.swarm.access import encode
from p2ptrain.telemetry.journal import Journal
from peers import cli
from peers.replaying import story


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "expected an invite"),
        (("p2ptrain:x", "--replay", "journal.jsonl"), 2, "and not both"),
        (("p2ptrain:x",), 2, "damaged or cut short"),
        ((encode(invite())[:-20],), 2, "damaged or cut short"),
        ((encode(invite(expires=1)),), 2, "expired at 1970-01-01"),
        (
            (encode(invite(expires=None)), "--share", encode(invite(expires=None, role="watch"))),
            2,
            "role 'watch'",
        ),
        (("--replay", "/nowhere/journal.jsonl"), 6, "there is no journal"),
    ],
)
def test_mistake_is_one_sentence_with_its_exit_code(
    words: tuple[str, ...],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["p2ptrain", "monitor", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code
    complaint = capsys.readouterr().err
    assert complaint.startswith("p2ptrain: ")
    assert said in complaint
    assert len(complaint.splitlines()) == 1


def test_journal_of_a_peer_tells_its_story_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    anna = PeerId("12D3KooWAnna")
    with Journal(path) as journal:
        journal.write(Joined(run_id="r", peer=anna, name="anna", others=1))
        for event in ONE_OF_EACH:
            if not isinstance(event, Joined):
                journal.write(event)
    with path.open("a") as torn:
        torn.write('{"time": "2027-01-01T00:0')
    watch, last, count = story(path)
    assert count == len(ONE_OF_EACH)
    assert last > 0
    assert list(watch.peers) == [anna]
    assert watch.peers[anna].samples == COMMITTED.mine
    assert list(watch.rows) == [COMMITTED.step]


def test_history_of_a_monitor_tells_its_story_again(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    lines = [
        {"kind": "round", "row": [41, 5.0, 10, 2, 2.5, 0.1], "by": {"anna": 10}},
        {"kind": "nonsense"},
        {"kind": 7},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    watch, last, _ = story(path)
    assert (watch.step, last, watch.peers["anna"].samples) == (42, 5.0, 10)


@pytest.mark.parametrize("text", ["", "no json\n", '{"time": 1}\n', "[]\n"])
def test_file_without_events_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(text)
    with pytest.raises(StorageError, match=r"journal\.jsonl holds no events"):
        story(path)
