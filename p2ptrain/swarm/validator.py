"""Which records this node keeps in the DHT for others: few, small, short-lived, and signed by their authors.

A record is stored under one of the run's keys with its author's peer id as subkey. Its value is the author's
signature and then the record as JSON; the signature binds key, author, expiry and text, so a record can
neither be moved nor prolonged. Peer ids cost nothing, so nodes keep only what somebody invited wrote, and
look at no more of what strangers send than their budget allows. Who reads a record still parses it.

Not covered: whoever has an invite for any number of peers can fill the `MAX_AUTHORS` places of a key; then
nodes refuse further authors, and peers know each other by the messages they exchange.
"""

from __future__ import annotations

import functools
import struct
import time
from collections.abc import Callable, Collection
from typing import Any, Protocol

import msgpack

from p2ptrain.swarm.identity import MAX_ID_CHARACTERS, SIGNATURE_BYTES, Identity, verify

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


class Budgets:
    """So much per second for each of many, and several seconds' worth at once."""

    def __init__(self, per_second: float, most: float) -> None:
        """`most`: what somebody who has long asked for nothing may have at once."""
        self._per_second, self._most = per_second, most
        self._left: dict[object, tuple[float, float]] = {}  # what, and when that was

    def allow(self, who: object, amount: float, now: float) -> bool:
        """Whether there is so much for them; then it is spent. What is refused costs them nothing."""
        left = self._has(who, now)
        if amount > left:
            return False
        self._spend(who, left - amount, now)
        return True

    def wait_seconds(self, who: object, amount: float, now: float) -> float:
        """Spend it in any case; how long whoever wanted it has to wait until it is paid off."""
        left = self._has(who, now) - amount
        self._spend(who, left, now)
        return max(0.0, -left / self._per_second)

    def _has(self, who: object, now: float) -> float:
        left, at = self._left.get(who, (self._most, now))
        return min(self._most, left + (now - at) * self._per_second)

    def _spend(self, who: object, left: float, now: float) -> None:
        if who not in self._left and len(self._left) >= MAX_AUTHORS:
            full = [each for each in self._left if self._has(each, now) >= self._most]
            for each in full or [next(iter(self._left))]:
                del self._left[each]
        self._left[who] = left, now


class RecordValidator:
    """hivemind calls this for each record it is asked to store and each that another node returns."""

    priority = 0

    def __init__(
        self,
        keys: Collection[bytes],
        clock: Callable[[], float] = time.time,
        admits: Callable[[str, bytes], bool] = lambda author, text: True,
    ) -> None:
        """`keys`: DHT ids; under others nothing is kept. `clock`: seconds since 1970, as the DHT has it.
        `admits`: whether the author may have written that text here, for what can be seen in it."""
        self._authors: dict[bytes, dict[str, float]] = {key: {} for key in keys}
        self._admits = admits
        self._clock = clock
        self.refused = 0

    def knows(self, author: str) -> bool:
        """Whether a record of that peer's is here, and so it was invited."""
        return any(author in authors for authors in self._authors.values())

    def validate(self, record: DHTRecord) -> bool:
        valid = self._is_valid(record)
        self.refused += not valid
        return valid

    def _is_valid(self, record: DHTRecord) -> bool:
        now = self._clock()
        authors = self._authors.get(record.key)
        author = _unpack(record.subkey, str)
        if (
            authors is None
            or author is None
            or len(author) > MAX_ID_CHARACTERS
            or len(record.value) > MAX_RECORD_BYTES + 256
        ):
            return False
        if not record.expiration_time <= now + MAX_TTL_SECONDS + MAX_CLOCK_SKEW_SECONDS:
            return False
        text = _text(record.key, author, record.value, record.expiration_time)
        if text is None or not self._admits(author, text):
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
