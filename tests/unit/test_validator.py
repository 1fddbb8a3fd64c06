"""The records that a node keeps for others are signed, small, short-lived and few."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgpack
import pytest

from p2ptrain.swarm import validator as rules
from p2ptrain.swarm.identity import Identity, load_or_create
from p2ptrain.swarm.validator import MAX_RECORD_BYTES, Budgets, RecordValidator, seal, unseal

KEY, OTHER_KEY, UNKNOWN_KEY = b"k" * 20, b"o" * 20, b"u" * 20
NOW = 1_000_000.0


@dataclass(frozen=True)
class Record:
    key: bytes
    subkey: bytes
    value: bytes
    expiration_time: float


@pytest.fixture
def alice(tmp_path: Path) -> Identity:
    return load_or_create(tmp_path / "alice")


@pytest.fixture
def bob(tmp_path: Path) -> Identity:
    return load_or_create(tmp_path / "bob")


@pytest.fixture
def validator() -> RecordValidator:
    return RecordValidator([KEY, OTHER_KEY], clock=lambda: NOW)


def record(author: Identity, text: bytes = b"text", expires: float = NOW + 30) -> Record:
    sealed = msgpack.packb(seal(author, KEY, text, expires))
    return Record(KEY, msgpack.packb(author.peer_id), sealed, expires)


def test_record_is_kept_and_its_text_read_when_its_author_signed_it(
    validator: RecordValidator, alice: Identity
) -> None:
    good = record(alice)
    assert validator.validate(good)
    assert unseal(msgpack.unpackb(validator.strip_value(good))) == b"text"
    assert validator.refused == 0


def test_record_is_refused_when_anything_that_the_signature_binds_was_changed(
    validator: RecordValidator, alice: Identity, bob: Identity
) -> None:
    good = record(alice)
    sealed = msgpack.unpackb(good.value)
    forged = [
        replace(good, key=OTHER_KEY),
        replace(good, subkey=msgpack.packb(bob.peer_id)),
        replace(good, expiration_time=NOW + 60),
        replace(good, value=msgpack.packb(sealed + b"!")),
        replace(good, value=msgpack.packb(bytes(64) + b"text")),
    ]
    assert not any(validator.validate(fake) for fake in forged)
    assert validator.refused == len(forged)


def test_record_is_refused_when_the_key_is_not_of_this_run(
    validator: RecordValidator, alice: Identity
) -> None:
    sealed = msgpack.packb(seal(alice, UNKNOWN_KEY, b"text", NOW + 30))
    assert not validator.validate(Record(UNKNOWN_KEY, msgpack.packb(alice.peer_id), sealed, NOW + 30))


@pytest.mark.parametrize(
    "subkey", [msgpack.packb(None), b"", msgpack.packb(7), b"\xc1", msgpack.packb("peer")]
)
def test_record_is_refused_when_it_is_under_no_peer_id(
    validator: RecordValidator, alice: Identity, subkey: bytes
) -> None:
    """hivemind packs None where there is no subkey: such a value would replace the records of all peers."""
    assert not validator.validate(replace(record(alice), subkey=subkey))


@pytest.mark.parametrize(
    "value", [b"", b"\xc1", msgpack.packb("text"), msgpack.packb(b""), msgpack.packb(b"x" * 64)]
)
def test_record_is_refused_when_its_value_is_no_signature_and_text(
    validator: RecordValidator, alice: Identity, value: bytes
) -> None:
    assert not validator.validate(replace(record(alice), value=value))


def test_record_is_refused_when_it_is_too_large(validator: RecordValidator, alice: Identity) -> None:
    assert validator.validate(record(alice, b"x" * (MAX_RECORD_BYTES - 64)))
    text, expires = b"x" * (MAX_RECORD_BYTES - 63), NOW + 30
    with pytest.raises(ValueError, match="at most"):
        seal(alice, KEY, text, expires)
    signature = alice.sign(rules._bound(KEY, text, expires))
    fake = Record(KEY, msgpack.packb(alice.peer_id), msgpack.packb(signature + text), expires)
    assert not validator.validate(fake)


@pytest.mark.parametrize("expires", [NOW + 131, float("inf"), float("nan")])
def test_record_is_refused_when_it_would_live_too_long(
    validator: RecordValidator, alice: Identity, expires: float
) -> None:
    assert validator.validate(record(alice, expires=NOW + 129))  # an author's clock may be 10 s ahead
    assert not validator.validate(record(alice, expires=expires))


def test_further_authors_are_refused_when_a_key_is_full_of_live_records(
    alice: Identity, bob: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "MAX_AUTHORS", 1)
    now = NOW
    validator = RecordValidator([KEY], clock=lambda: now)
    assert validator.validate(record(alice))
    assert not validator.validate(record(bob))
    assert validator.validate(record(alice, b"newer"))
    now = NOW + 31
    assert validator.validate(record(bob, expires=NOW + 60))


def test_record_is_kept_only_of_those_who_may_have_written_it(alice: Identity, bob: Identity) -> None:
    validator = RecordValidator(
        [KEY], clock=lambda: NOW, admits=lambda author, text: (author, text) == (alice.peer_id, b"text")
    )
    assert validator.validate(record(alice))
    assert not validator.validate(record(alice, b"another"))
    assert not validator.validate(record(bob))
    assert validator.knows(alice.peer_id)
    assert not validator.knows(bob.peer_id)


def test_author_whose_name_is_no_id_is_refused_before_anything_is_decoded(
    validator: RecordValidator, alice: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "verify", lambda *claimed: pytest.fail("it was looked at"))
    assert not validator.validate(replace(record(alice), subkey=msgpack.packb("1" * 129)))


# -- budgets -------------------------------------------------------------------------------------------------


def test_each_may_spend_what_has_come_in_and_no_more_than_the_most_at_once() -> None:
    budgets = Budgets(per_second=10, most=20)
    assert budgets.allow("alice", 20, 100.0)
    assert not budgets.allow("alice", 1, 100.0)
    assert budgets.allow("bob", 20, 100.0)
    assert budgets.allow("alice", 10, 101.0)
    assert not budgets.allow("alice", 21, 1000.0)
    assert budgets.allow("alice", 20, 1000.0)


def test_who_spends_more_than_it_has_waits_until_that_is_paid_off() -> None:
    budgets = Budgets(per_second=10, most=20)
    assert budgets.wait_seconds("alice", 20, 100.0) == 0
    assert budgets.wait_seconds("alice", 5, 100.0) == 0.5
    assert budgets.wait_seconds("alice", 5, 100.5) == 0.5


def test_budgets_of_many_are_forgotten_full_ones_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_AUTHORS", 2)
    budgets = Budgets(per_second=10, most=20)
    budgets.allow("poor", 20, 100.0)
    budgets.allow("rich", 1, 100.0)
    budgets.allow("new", 1, 100.5)
    assert not budgets.allow("poor", 20, 100.5)
    assert len(budgets._left) == 2
