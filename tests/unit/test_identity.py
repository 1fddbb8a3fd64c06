"""An identity file makes one peer id, and what it signs can be checked by that id alone."""

from __future__ import annotations

import stat
from pathlib import Path

import base58
import pytest

from p2ptrain.errors import LocalFault, StorageError
from p2ptrain.swarm.identity import load_or_create, peer_id_of, verify


def test_identity_stays_the_same_when_it_is_loaded_again(tmp_path: Path) -> None:
    made = load_or_create(tmp_path / "deep" / "folder" / "key")
    assert load_or_create(tmp_path / "deep" / "folder" / "key").peer_id == made.peer_id
    assert load_or_create(tmp_path / "other").peer_id != made.peer_id


def test_identity_file_is_for_its_owner_only_when_it_is_made(tmp_path: Path) -> None:
    load_or_create(tmp_path / "key")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_peer_id_is_libp2ps_when_the_key_is_a_known_one() -> None:
    """The Ed25519 public key among the test vectors of libp2p's specification of peer ids."""
    public = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    assert peer_id_of(public) == "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


def test_signature_is_accepted_only_for_its_message_and_its_peer(tmp_path: Path) -> None:
    alice, bob = load_or_create(tmp_path / "alice"), load_or_create(tmp_path / "bob")
    signature = alice.sign(b"message")
    assert verify(alice.peer_id, b"message", signature)
    assert not verify(alice.peer_id, b"other", signature)
    assert not verify(bob.peer_id, b"message", signature)
    assert not verify(alice.peer_id, b"message", signature[:-1])


@pytest.mark.parametrize(
    "peer",
    [
        "",
        "not base58: 0OIl",
        "QmcZf59bWwK5XFi76CZX8cbJ4BhTzzA3gU1ZjYZcYW3dwt",
        base58.b58encode(b"short").decode(),
        "é",
    ],
)
def test_verify_says_no_when_the_peer_id_is_of_another_kind_or_none(tmp_path: Path, peer: str) -> None:
    assert not verify(peer, b"message", load_or_create(tmp_path / "key").sign(b"message"))


@pytest.mark.parametrize("damage", ["empty", "truncated", "other key type", "one bit"])
def test_loading_says_what_to_do_when_the_file_is_damaged(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "key"
    load_or_create(path)
    good = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "truncated": good[:-1],
            "other key type": b"\x08\x00" + good[2:],
            "one bit": good[:-1] + bytes([good[-1] ^ 1]),
        }[damage]
    )
    with pytest.raises(LocalFault, match="move it away") as caught:
        load_or_create(path)
    assert str(path) in str(caught.value)


def test_loading_raises_storage_error_when_the_path_cannot_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be read or made"):
        load_or_create(tmp_path / "file" / "key")
    with pytest.raises(StorageError, match="cannot be read or made"):
        load_or_create(tmp_path)


def test_identity_never_shows_its_key_when_it_is_printed(tmp_path: Path) -> None:
    identity = load_or_create(tmp_path / "key")
    assert repr(identity) == f"Identity({identity.peer_id})"


def test_id_of_any_length_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a megabyte of it once took minutes."""
    monkeypatch.setattr(base58, "b58decode", lambda text: pytest.fail("it was decoded"))
    assert not verify("1" * 500_000, b"text", b"0" * 64)
