"""The organizer's book: invites are made, listed and revoked in a folder, with nothing on the net.

Not covered: what the swarm makes of them, see `tests/swarm/test_invites.py`.
"""

from __future__ import annotations

import json
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from organizer import NOBODY, NOW

from p2ptrain.config import RunConfig, commented_toml, run_digest
from p2ptrain.errors import ConfigError, StorageError
from p2ptrain.records import MAX_REVOKED
from p2ptrain.swarm.access import decode
from p2ptrain.swarm.gate import Gate
from p2ptrain.swarm.identity import load_or_create, of_seed
from peers import cli, invites, present
from peers.decreed import LOG
from peers.invites import (
    BOOK,
    NEXT,
    ORGANIZER,
    Book,
    create,
    kick,
    lift,
    open_book,
    parse_ttl,
    read,
    redeem,
    revoke,
    rotate,
)
from peers.present import Seen

RUN = RunConfig(run_id="lab")
BERT, CARL = (of_seed(bytes([number]) * 32).peer_id for number in (2, 3))
ADDRESS = f"/ip4/127.0.0.1/tcp/31337/p2p/{NOBODY}"


def opened(folder: Path, run: RunConfig = RUN, public: bool | None = None, address: str = ADDRESS) -> Book:
    """The book after a bootstrap's start in that folder."""
    return open_book(folder, run, [address], public, NOW)


def command(*words: str) -> int:
    """The exit status of `p2ptrain` with these words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["p2ptrain", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


def test_bootstrap_keeps_its_link_and_gives_it_the_new_address_when_it_starts_again(tmp_path: Path) -> None:
    first = opened(tmp_path).link(RUN)
    moved = ADDRESS.replace("127.0.0.1", "10.0.0.7")
    again = opened(tmp_path, address=moved).link(RUN)
    assert first is not None
    assert again is not None
    before, after = decode(first.line), decode(again.line)
    assert (after.grant, after.secret, after.addresses) == (before.grant, before.secret, (moved,))
    assert (before.grant.expires, before.grant.role, before.grant.run_digest) == (
        None,
        "train",
        run_digest(RUN),
    )


def test_bootstrap_makes_another_link_when_its_run_file_has_changed(tmp_path: Path) -> None:
    opened(tmp_path)
    other = RunConfig(run_id="lab", seed=9)
    link = opened(tmp_path, other).link(other)
    assert link is not None
    assert (link.grant.serial, link.grant.run_digest) == (2, run_digest(other))


def test_private_run_has_no_link_stays_private_and_takes_back_the_one_it_had(tmp_path: Path) -> None:
    opened(tmp_path)
    assert opened(tmp_path, public=False).link(RUN) is None
    book = opened(tmp_path)
    assert (book.link(RUN), book.public) == (None, False)
    assert book.revocations is not None
    assert book.revocations.serials == (1,)
    again = opened(tmp_path, public=True).link(RUN)
    assert again is not None
    assert again.grant.serial == 2


def test_created_invite_is_signed_by_the_key_in_the_folder_and_numbered(tmp_path: Path) -> None:
    opened(tmp_path)
    made = [create(tmp_path, RUN, "train", 60, name, NOW) for name in ("one", "two")]
    organizer = load_or_create(tmp_path / ORGANIZER).peer_id
    assert [invite.grant.organizer for invite in made] == [organizer] * 2
    assert [(i.grant.serial, i.grant.name, i.grant.expires) for i in made] == [
        (2, "one", NOW + 60),
        (3, "two", NOW + 60),
    ]
    assert made[0].grant.key != made[1].grant.key
    assert [decode(each.line) for each in read(tmp_path).invites[1:]] == made
    assert stat.S_IMODE((tmp_path / BOOK).stat().st_mode) == 0o600


def test_revoked_invite_is_on_a_list_that_peers_heed_and_stays_on_it(tmp_path: Path) -> None:
    opened(tmp_path)
    made = create(tmp_path, RUN, "train", None, "", NOW)
    revoke(tmp_path, [made.grant.serial])
    book = revoke(tmp_path, [1])
    assert book == read(tmp_path)
    assert book.revocations is not None
    assert (book.revocations.revision, book.revocations.serials) == (2, (1, 2))
    gate = Gate(made.shown_by(BERT), BERT, lambda: NOW)
    assert gate.learn(book.revocations)
    assert "revoked" in gate.own_flaw()


def test_nothing_is_revoked_when_a_number_is_unknown_or_there_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path)
    with pytest.raises(ConfigError, match="there is no invite number 9"):
        revoke(tmp_path, [1, 9])
    create(tmp_path, RUN, "train", None, "", NOW)
    assert MAX_REVOKED > 2
    monkeypatch.setattr(invites, "MAX_REVOKED", 1)
    with pytest.raises(ConfigError, match="at most 1 fit"):
        revoke(tmp_path, [1, 2])
    assert read(tmp_path).revocations is None
    assert not any(each.revoked for each in read(tmp_path).invites)


def test_kicked_peers_are_on_a_list_that_peers_heed_until_their_time_is_over(tmp_path: Path) -> None:
    opened(tmp_path)
    kick(tmp_path, BERT, NOW + 60, "it stalls", NOW)
    kick(tmp_path, CARL, None, "", NOW)
    book = read(tmp_path)
    assert book.kicks is not None
    gate = Gate(decode(book.invites[0].line).shown_by(BERT), BERT, lambda: NOW)
    assert all(gate.learn(decree) for decree in book.decrees)
    assert gate.own_flaw().endswith(": it stalls")
    assert [each.who for each in lift(tmp_path, CARL, NOW + 61)] == []
    kicks = read(tmp_path).kicks
    assert kicks is not None
    assert (kicks.revision, kicks.kicks) == (3, ())


def test_nobody_is_kicked_when_there_is_no_room_the_reason_is_too_long_or_there_is_nothing_to_lift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path)
    monkeypatch.setattr(invites, "MAX_KICKED", 1)
    kick(tmp_path, BERT, None, "", NOW)
    with pytest.raises(ConfigError, match="at most 1 fit"):
        kick(tmp_path, CARL, None, "", NOW)
    with pytest.raises(ConfigError, match="at most 40 characters"):
        kick(tmp_path, BERT, None, "é", NOW)
    with pytest.raises(ConfigError, match="nothing to lift"):
        lift(tmp_path, CARL, NOW)


def test_decrees_are_signed_anew_when_the_folder_serves_a_run_of_another_name(tmp_path: Path) -> None:
    opened(tmp_path)
    revoke(tmp_path, [1])
    kick(tmp_path, BERT, None, "", NOW)
    other = RunConfig(run_id="other")
    book = opened(tmp_path, other)
    link = book.link(other)
    assert link is not None
    gate = Gate(decode(link.line).shown_by(BERT), BERT, lambda: NOW)
    assert all(gate.learn(decree) for decree in book.decrees)
    assert (tuple(gate.revoked), [each.who for each in gate.kicks]) == ((1,), [BERT])


def test_invite_for_a_few_peers_is_redeemed_by_so_many_and_by_each_as_often_as_it_likes(
    tmp_path: Path,
) -> None:
    opened(tmp_path)
    limited = create(tmp_path, RUN, "train", None, "", NOW, uses=1)
    for _ in range(2):
        own = redeem(tmp_path, limited.grant, BERT)
        assert (own.grant.key, own.grant.uses, own.grant.serial) == (BERT, None, limited.grant.serial)
    with pytest.raises(ConfigError, match="was for 1 peer, and so many have come by it"):
        redeem(tmp_path, limited.grant, CARL)
    with pytest.raises(ConfigError, match="good as it is"):
        redeem(tmp_path, decode(read(tmp_path).invites[0].line).grant, CARL)
    revoke(tmp_path, [limited.grant.serial])
    with pytest.raises(ConfigError, match="no longer, in the organizer's book"):
        redeem(tmp_path, limited.grant, BERT)


def test_rotation_ends_all_invites_and_keeps_whom_it_is_told_to(tmp_path: Path) -> None:
    opened(tmp_path)
    before = decode(read(tmp_path).invites[0].line)
    kick(tmp_path, CARL, None, "", NOW)
    old = load_or_create(tmp_path / ORGANIZER).peer_id
    book = rotate(tmp_path, RUN, [BERT], NOW + 60, NOW)
    new = load_or_create(tmp_path / ORGANIZER).peer_id
    assert new != old
    assert {path.name for path in tmp_path.iterdir()} == {BOOK, LOG, "invites.lock", ORGANIZER}
    link = book.link(RUN)
    assert link is not None
    assert (link.grant.organizer, link.grant.serial, book.holds(before.grant)) == (new, 2, False)
    gate = Gate(before.shown_by(BERT), BERT, lambda: NOW)
    assert all(gate.learn(decree) for decree in book.decrees)
    assert (gate.organizer, [each.who for each in gate.kicks]) == (new, [CARL])
    assert redeem(tmp_path, before.grant, BERT).grant.organizer == new
    with pytest.raises(ConfigError, match="a key that the organizer has replaced"):
        redeem(tmp_path, before.grant, CARL)
    assert opened(tmp_path).link(RUN) == link
    with pytest.raises(ConfigError, match="hold for another 60 s"):
        rotate(tmp_path, RUN, [], NOW + 60, NOW)
    assert create(tmp_path, RUN, "train", None, "", NOW).grant.organizer == new


def test_rotation_is_ended_by_the_next_command_when_its_process_died_before_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(invites, "_succeeded", lambda folder, book: load_or_create(folder / ORGANIZER))
        book = rotate(tmp_path, RUN, [], NOW + 60, NOW)
    assert book.succession is not None
    assert (tmp_path / NEXT).exists()
    assert create(tmp_path, RUN, "train", None, "", NOW).grant.organizer == book.succession.successor
    assert not (tmp_path / NEXT).exists()


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("5m", 300), ("24h", 86_400), ("7d", 604_800), ("never", None)]
)
def test_ttl_is_read(text: str, seconds: int | None) -> None:
    assert parse_ttl(text) == seconds


@pytest.mark.parametrize("text", ["", "0h", "-1h", "24", "1.5h", "h", "24 h", "1w"])
def test_ttl_is_refused_with_an_example_when_it_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a time such as 30m, 24h or 7d, or never"):
        parse_ttl(text)


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def run_toml(tmp_path: Path) -> str:
    path = tmp_path / "run.toml"
    path.write_text(commented_toml(RUN))
    return str(path)


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_command_creates_lists_and_revokes(
    tmp_path: Path, run_toml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(tmp_path)
    where = (run_toml, "--data-dir", str(tmp_path), "--json")
    assert command("invite", "create", *where, "--role", "watch", "--ttl", "24h", "--name", "lab") == 0
    made = result(capsys)
    grant = decode(made["invite"]).grant
    assert (grant.role, grant.name, grant.serial, grant.expires) == ("watch", "lab", 2, grant.issued + 86_400)
    assert command("invite", "revoke", *where, "1") == 0
    assert result(capsys) == {"revoked": [1]}
    assert command("invite", "list", *where) == 0
    rows = result(capsys)["invites"]
    assert [(row["number"], row["name"], row["state"]) for row in rows] == [
        (1, "link", "revoked"),
        (2, "lab", "valid"),
    ]
    assert command("invite", "list", *where[:-1]) == 0
    assert "2 (lab), role watch, until " in capsys.readouterr().out
    assert command("invite", "create", *where[:-1]) == 0
    assert "    p2ptrain join p2ptrain:" in capsys.readouterr().out


def test_command_kicks_whom_the_end_of_an_id_names_and_lets_it_come_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(tmp_path)
    there = Seen(peer=BERT, name="bert", role="train", invite=1, at=NOW)
    present.write(tmp_path, [there])
    where = ("--data-dir", str(tmp_path))
    assert command("run", "kick", f"…{BERT[-8:]}", *where, "--ban", "--reason", "it stalls", "--json") == 0
    assert result(capsys) == {
        "peer": BERT, "kicks": [{"who": BERT, "until": None, "reason": "it stalls"}]
    }  # fmt: skip
    assert command("run", "kick", CARL, *where) == 0
    assert "is put out for 1h" in capsys.readouterr().out
    assert command("run", "kick", BERT[-8:], *where) == 0
    assert "came by invite 1" in capsys.readouterr().out
    assert command("run", "kick", BERT[-8:], *where, "--lift", "--json") == 0
    assert [each["who"] for each in result(capsys)["kicks"]] == [CARL]
    assert command("run", "kick", "nobody", *where) == ConfigError.exit_code
    assert f"but …{BERT[-8:]} bert" in capsys.readouterr().err


def test_command_rotates_keeps_who_is_there_and_prints_the_new_link(
    tmp_path: Path, run_toml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(tmp_path)
    now = int(time.time())
    there = [
        Seen(peer=peer, name="", role=role, invite=1, at=at)
        for peer, role, at in ((BERT, "train", now), (CARL, "train", now - 3600), (NOBODY, "bootstrap", now))
    ]
    present.write(tmp_path, there)
    where = (run_toml, "--data-dir", str(tmp_path))
    assert command("invite", "rotate", *where, "--grace", "1s", "--json") == 0
    told = result(capsys)
    assert (told["kept"], told["organizer"]) == ([BERT], load_or_create(tmp_path / ORGANIZER).peer_id)
    assert decode(told["invite"]).grant.organizer == told["organizer"]
    assert command("invite", "list", *where) == 0
    assert "1 (link), role train, for ever: of the organizer's old key" in capsys.readouterr().out
    for words in (("--keep", BERT, "--nobody"), ("--grace", "soon"), ("--keep", "unknown")):
        assert command("invite", "rotate", *where, *words) == ConfigError.exit_code


def test_command_shows_a_qr_code_and_how_often_an_invite_was_used(
    tmp_path: Path, run_toml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(tmp_path)
    where = (run_toml, "--data-dir", str(tmp_path))
    assert command("invite", "create", *where, "--uses", "3", "--qr") == 0
    shown = capsys.readouterr().out
    assert ", for 3 peers" in shown
    picture = [line for line in shown.splitlines() if set("█▀▄") & set(line)]
    assert len(picture) > 50
    redeem(tmp_path, decode(read(tmp_path).invites[-1].line).grant, BERT)
    assert command("invite", "list", *where) == 0
    assert "for 3 peers, used by 1: valid" in capsys.readouterr().out


def test_command_says_which_runs_there_are_when_none_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert command("run", "kick", BERT) == ConfigError.exit_code
    assert "0 runs have been opened" in capsys.readouterr().err
    for name in ("one", "two"):
        folder = tmp_path / "p2ptrain" / name
        folder.mkdir(parents=True)
        opened(folder, RunConfig(run_id=name))
    assert command("run", "kick", BERT) == ConfigError.exit_code
    assert "2 runs have been opened on this machine by this user: one, two" in capsys.readouterr().err
    assert command("run", "kick", BERT, "--run", "two") == 0
    assert read(folder).kicks is not None


@pytest.mark.parametrize("words", [("create",), ("revoke", "1")])
def test_command_says_what_to_start_first_when_there_is_no_key(
    words: tuple[str, ...], tmp_path: Path, run_toml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("invite", words[0], run_toml, *words[1:], "--data-dir", str(tmp_path)) == 2
    assert "start `p2ptrain bootstrap`" in capsys.readouterr().err
    assert not (tmp_path / ORGANIZER).exists()


def test_command_ends_in_a_sentence_when_the_book_is_damaged(
    tmp_path: Path, run_toml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(tmp_path)
    (tmp_path / BOOK).write_text('{"invites": [{"line"')
    assert command("invite", "list", run_toml, "--data-dir", str(tmp_path)) == StorageError.exit_code
    assert "invites.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["link", "x" * 65, "two\nlines"])
def test_command_refuses_a_name_that_would_mislead(
    name: str, tmp_path: Path, run_toml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(tmp_path)
    where = (run_toml, "--data-dir", str(tmp_path))
    assert command("invite", "create", *where, "--name", name) == ConfigError.exit_code
    assert "printable" in capsys.readouterr().err
