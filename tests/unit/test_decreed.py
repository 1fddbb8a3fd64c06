"""The organizer's audit log: each change of the book is one line, in words, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from organizer import NOBODY, NOW

from p2ptrain.config import RunConfig
from p2ptrain.records import Change, PeerId
from peers import cli, decreed, invites

RUN = RunConfig()
WHO = PeerId(NOBODY)
ADDRESSES = [f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}"]


def told(folder: Path) -> list[str]:
    """What was said since the last call."""
    said = [line for each in decreed.read(folder) for line in each["said"]]
    (folder / decreed.LOG).unlink(missing_ok=True)
    return said


def test_every_change_is_told_once_and_in_words(tmp_path: Path) -> None:
    invites.open_book(tmp_path, RUN, ADDRESSES, None, NOW)
    opened, link = told(tmp_path)
    assert opened.startswith(f"opened {RUN.run_id}, digest ")
    assert link == 'invite 1 made, role train, name "link"'
    invites.open_book(tmp_path, RUN, ADDRESSES, None, NOW)
    assert told(tmp_path) == [], "it was only started again"

    invite = invites.create(tmp_path, RUN, "train", 60, "lab", NOW, uses=2)
    invites.redeem(tmp_path, invite.grant, WHO)
    assert told(tmp_path) == [
        'invite 2 made, role train, name "lab", for 2 peers',
        f"invite 2 used by …{WHO[-8:]}",
    ]
    invites.revoke(tmp_path, [2])
    invites.kick(tmp_path, WHO, None, "it stalls", NOW)
    invites.lift(tmp_path, WHO, NOW)
    assert told(tmp_path) == [
        "invite 2 revoked",
        f"…{WHO[-8:]} put out for good: it stalls",
        f"…{WHO[-8:]} may come back",
    ]
    change = Change(step=500, key="optimizer.lr", value=2e-4)
    invites.decree(tmp_path, lambda _, before: before.model_copy(update={"changes": (change,)}), dry=True)
    assert told(tmp_path) == [], "it was only tried"
    invites.decree(tmp_path, lambda _, before: before.model_copy(update={"changes": (change,)}))
    (line,) = told(tmp_path)
    assert line.startswith("revision 1: + ")
    assert "optimizer.lr" in line
    assert "500" in line
    invites.decree(tmp_path, lambda _, before: before.model_copy(update={"changes": ()}))
    assert told(tmp_path) == [
        "revision 2: + all is as the run file says",
        line.replace("revision 1: +", "revision 2: -"),
    ]


def test_command_tells_it_with_the_time_also_when_the_last_line_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    invites.open_book(tmp_path, RUN, ADDRESSES, None, NOW)
    with (tmp_path / decreed.LOG).open("a") as torn:
        torn.write('{"time": "20')

    def shown(*words: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["p2ptrain", "run", "log", "--data-dir", str(tmp_path), *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return capsys.readouterr().out.splitlines()

    first, second = shown()
    assert "Z  opened " in first
    assert 'name "link"' in second
    (record,) = map(json.loads, shown("--json"))
    assert record["run_id"] == RUN.run_id
