"""Who was there lately is kept, bounded, and found by the end of an id."""

from __future__ import annotations

from pathlib import Path

import pytest
from organizer import NOW, invite

from p2ptrain import PROTOCOL_VERSION
from p2ptrain.errors import ConfigError
from p2ptrain.records import PeerId, Presence
from p2ptrain.swarm.identity import of_seed
from peers import present
from peers.present import KEPT_SECONDS, Seen, merged, resolve

ALICE, BOB = (of_seed(bytes([number]) * 32).peer_id for number in (1, 2))


def record(peer: PeerId, name: str = "lab") -> Presence:
    return Presence(
        peer=peer, role="train", name=name, protocol=PROTOCOL_VERSION, fingerprint="0" * 64,
        incarnation="i", position=None, access=invite(serial=7).shown_by(peer),
    )  # fmt: skip


def test_latest_are_first_each_once_and_who_was_away_for_long_is_forgotten(tmp_path: Path) -> None:
    seen = merged([], [record(ALICE)], NOW)
    seen = merged(seen, [record(BOB, "home")], NOW + 10)
    assert [(each.peer, each.name, each.invite, each.at) for each in seen] == [
        (BOB, "home", 7, NOW + 10),
        (ALICE, "lab", 7, NOW),
    ]
    seen = merged(seen, [record(ALICE)], NOW + KEPT_SECONDS + 10)
    assert [each.peer for each in seen] == [ALICE]
    present.write(tmp_path, seen)
    assert present.read(tmp_path) == seen


def test_no_more_are_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(present, "MAX_SEEN", 1)
    assert [each.peer for each in merged(merged([], [record(ALICE)], NOW), [record(BOB)], NOW + 1)] == [BOB]


def test_file_that_is_missing_or_damaged_is_nobody(tmp_path: Path) -> None:
    assert present.read(tmp_path) == []
    (tmp_path / present.PRESENT).write_text("{")
    assert present.read(tmp_path) == []


def test_peer_is_found_by_the_end_of_its_id_or_all_of_it_and_else_it_is_said_who_is_there() -> None:
    seen = [Seen(peer=each, name="", role="train", invite=None, at=NOW) for each in (ALICE, BOB)]
    assert resolve(f"…{BOB[-8:]}", seen) == BOB
    assert resolve(ALICE, []) == ALICE
    for word in ("", "…", "nobody", "not an id" * 8):
        with pytest.raises(ConfigError, match="has seen no peer"):
            resolve(word, seen)
    alike = [each.model_copy(update={"peer": f"{number}same"}) for number, each in enumerate(seen)]
    with pytest.raises(ConfigError, match="2 peers have ids that end in same: 0same, 1same"):
        resolve("same", alike)
