"""Which records this node keeps in the DHT for others: few, small, short-lived, and signed by their authors.

A record is stored under one of the run's keys with its author's peer id as subkey. Its value is the author's
signature and then the record as JSON; the signature binds key, author, expiry and text, so a record can
neither be moved nor prolonged. Who reads a record still parses it: nodes store what newer versions write.

Not covered: peer ids cost nothing, so a stranger can fill the `MAX_AUTHORS` places of a key for as long as he
pays attention; then nodes refuse further authors, and peers know each other by the messages they exchange.
"""

from __future__ import annotations

import functools
import struct
import time
from collections.abc import Callable, Collection
from typing import Any, Protocol

import msgpack

from p2ptrain.swarm.identity import SIGNATURE_BYTES, Identity, verify

MAX_RECORD_BYTES = 4096
MAX_TTL_SECONDS = 120.0
MAX_CLOCK_SKEW_SECONDS = 10.0
"""How far the author's clock may be ahead of ours."""
MAX_AUTHORS = 2048
"""Live records under one key; with the largest records these are 8 MB."""


class DHTRecord(Protocol):
    """hivemind's `DHTRecord`: one value on its way into a node's storage, or out of another's."""

    key: bytes
    subkey: bytes
    value: bytes
    expiration_time: float


class RecordValidator:
    """hivemind calls this for each record it is asked to store and each that another node returns."""

    priority = 0

    def __init__(self, keys: Collection[bytes], clock: Callable[[], float] = time.time) -> None:
        """`keys`: DHT ids; under others nothing is kept. `clock`: seconds since 1970, as the DHT has it."""
        self._authors: dict[bytes, dict[str, float]] = {key: {} for key in keys}
        self._clock = clock
        self.refused = 0

    def validate(self, record: DHTRecord) -> bool:
        valid = self._is_valid(record)
        self.refused += not valid
        return valid

    def _is_valid(self, record: DHTRecord) -> bool:
        now = self._clock()
        authors = self._authors.get(record.key)
        author = _unpack(record.subkey, str)
        if authors is None or author is None or len(record.value) > MAX_RECORD_BYTES + 256:
            return False
        if not record.expiration_time <= now + MAX_TTL_SECONDS + MAX_CLOCK_SKEW_SECONDS:
            return False
        if _text(record.key, author, record.value, record.expiration_time) is None:
            return False
        if author not in authors and len(authors) >= MAX_AUTHORS:
            for gone in [peer for peer, expires in authors.items() if expires < now]:
                del authors[gone]
            if len(authors) >= MAX_AUTHORS:
                return False
        authors[author] = max(record.expiration_time, authors.get(author, 0.0))
        return True

    def sign_value(self, record: DHTRecord) -> bytes:
        return record.value  # signed by `seal` before it came here

    def strip_value(self, record: DHTRecord) -> bytes:
        return record.value

    def merge_with(self, other: object) -> bool:
        return False


def seal(identity: Identity, key: bytes, text: bytes, expires: float) -> bytes:
    """Signature and text, to be stored under `key` and this peer's id until `expires` (since 1970)."""
    if len(text) > MAX_RECORD_BYTES - SIGNATURE_BYTES:
        raise ValueError(f"a record of {len(text)} bytes; at most {MAX_RECORD_BYTES - SIGNATURE_BYTES} fit")
    return identity.sign(_bound(key, text, expires)) + text


def unseal(sealed: bytes) -> bytes:
    """The text that was sealed. Only for values that a `RecordValidator` has let through."""
    return sealed[SIGNATURE_BYTES:]


# Every look-up brings back all records, most of them as they were a second ago.
@functools.lru_cache(maxsize=MAX_AUTHORS)
def _text(key: bytes, author: str, value: bytes, expires: float) -> bytes | None:
    """The text of a record that its author signed, else None."""
    sealed = _unpack(value, bytes)
    if sealed is None or not SIGNATURE_BYTES < len(sealed) <= MAX_RECORD_BYTES:
        return None
    text = unseal(sealed)
    return text if verify(author, _bound(key, text, expires), sealed[:SIGNATURE_BYTES]) else None


def _bound(key: bytes, text: bytes, expires: float) -> bytes:
    return b"p2ptrain record\0" + struct.pack(">20sd", key, expires) + text


def _unpack(packed: bytes, kind: type[Any]) -> Any:
    """The one `kind` in these msgpack bytes, else None: hivemind wraps subkeys and values so."""
    try:
        value = msgpack.unpackb(packed, raw=False)
    except (ValueError, msgpack.UnpackException):
        return None
    return value if isinstance(value, kind) else None
