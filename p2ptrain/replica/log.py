"""The entries of the last rounds, kept for peers that were away, and the lineage of every step passed.

An entry's payload is the averaged gradient as its reducers encoded it: span after span in roster order, each
cut into chunks of the run's `chunk_values`. Everything that a peer must check before it may believe a payload
is here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from p2ptrain.errors import BadMessage
from p2ptrain.gradients.codecs import Buffer, Codec
from p2ptrain.protocol.lineage import advance, digest_of
from p2ptrain.protocol.spans import chunk_ranges
from p2ptrain.records import EntryHeader, Position

MAX_LINEAGES = 1_000_000
KEPT_LINEAGES = 100_000
"""In a checkpoint: 3 MB at most."""
DIGEST_BYTES = 32


@dataclass(frozen=True)
class Entry:
    """A committed round: `header.digest` binds the payload, and the lineage binds the header."""

    header: EntryHeader
    payload: Buffer


def entry_ranges(spans: Sequence[int], numel: int, chunk_values: int) -> list[tuple[int, int]]:
    """The range of values of each chunk of an entry over `numel` values, in payload order.

    Raises BadMessage if the spans do not cover exactly these values in rising order.
    """
    if spans[0] != 0 or spans[-1] != numel or any(start > stop for start, stop in pairwise(spans)):
        raise BadMessage(f"the spans of an entry must rise from 0 to {numel} values, not {tuple(spans)}")
    return [chunk for start, stop in pairwise(spans) for chunk in chunk_ranges(start, stop, chunk_values)]


def payload_chunks(
    payload: Buffer, ranges: Sequence[tuple[int, int]], codec: Codec
) -> Iterator[tuple[int, int, memoryview]]:
    """(start, stop, encoded bytes) of each chunk. Raises BadMessage, first of all, if the payload has another
    size."""
    expected = sum(codec.encoded_bytes(stop - start) for start, stop in ranges)
    if len(payload) != expected:
        raise BadMessage(
            f"the payload of an entry must have {expected} bytes in {codec.name}, not {len(payload)}"
        )
    view, at = memoryview(payload), 0
    for start, stop in ranges:
        size = codec.encoded_bytes(stop - start)
        yield start, stop, view[at : at + size]
        at += size


def entry_digest(chunks: Iterable[bytes | memoryview]) -> str:
    """What `EntryHeader.digest` must be for these encoded chunks, in order."""
    return digest_of(chunks)


def payload_digest(entry: Entry, codec: Codec, chunk_values: int, numel: int) -> str:
    """The same, from a payload. Raises BadMessage if it is not the payload of its header's spans."""
    ranges = entry_ranges(entry.header.spans, numel, chunk_values)
    return entry_digest(chunk for _, _, chunk in payload_chunks(entry.payload, ranges, codec))


def verify_entry(entry: Entry, codec: Codec, chunk_values: int, numel: int) -> None:
    """Raises BadMessage unless the payload is the one that the header was committed with."""
    digest = payload_digest(entry, codec, chunk_values, numel)
    if digest != entry.header.digest:
        raise BadMessage(
            f"the payload of entry {entry.header.step} has digest {digest[:8]}, its header says "
            f"{entry.header.digest[:8]}; ask another peer for it"
        )


class EntryLog:
    """Consecutive entries up to where a replica stands; the oldest are dropped beyond `max_bytes` of payload.

    The newest entry always stays, however large, and so do, within a bound, those that a joiner will need who
    is still downloading the snapshot before them (`hold`). Lineages stay after their entries went, for the
    last `MAX_LINEAGES` steps: they tell whether another peer's state lies behind ours.
    """

    def __init__(self, max_bytes: int, position: Position, lineages: bytes = b"") -> None:
        """`lineages`: of the steps up to `position`, as a checkpoint kept them; without, only of that one."""
        self._max_bytes = max_bytes
        self.restart(position)
        if lineages.endswith(bytes.fromhex(position.lineage)) and len(lineages) % DIGEST_BYTES == 0:
            self._first_lineage = position.step + 1 - len(lineages) // DIGEST_BYTES
            self._lineages = bytearray(lineages)

    def restart(self, position: Position) -> None:
        """Forget everything; the next entry must follow `position` (after a snapshot was loaded)."""
        self._entries: deque[Entry] = deque()
        self._bytes = 0
        self.hold(None)
        self._first_lineage = position.step
        self._lineages = bytearray.fromhex(position.lineage)

    @property
    def step(self) -> int:
        """The step that the next entry must have."""
        return self._first_lineage + len(self._lineages) // DIGEST_BYTES - 1

    @property
    def oldest(self) -> int | None:
        """Step of the oldest entry that is still here."""
        return self._entries[0].header.step if self._entries else None

    @property
    def newest(self) -> int | None:
        """Step of the newest entry."""
        return self._entries[-1].header.step if self._entries else None

    @property
    def payload_bytes(self) -> int:
        """Size of all entries here."""
        return self._bytes

    def append(self, entry: Entry) -> None:
        """Raises ValueError if the entry does not follow the newest one."""
        here = Position(step=self.step, lineage=self.lineage_at(self.step) or "", weight=0)
        self._lineages += bytes.fromhex(advance(here, entry.header).lineage)
        self._entries.append(entry)
        self._bytes += len(entry.payload)
        while len(self._entries) > 1 and self._bytes > self._max_bytes + self._held_bytes():
            self._bytes -= len(self._entries.popleft().payload)
        surplus = len(self._lineages) // DIGEST_BYTES - MAX_LINEAGES
        if surplus > 0:
            del self._lineages[: surplus * DIGEST_BYTES]
            self._first_lineage += surplus

    def hold(self, step: int | None, extra_bytes: int = 0) -> None:
        """Entries from `step` on stay until further notice, though they take up to `extra_bytes` beyond the
        limit: else a download that is slower than the log is long would never lead anywhere. None: no more.
        """
        self._held_from, self._extra_bytes = step, extra_bytes

    def _held_bytes(self) -> int:
        held = self._held_from is not None and (self.oldest or 0) >= self._held_from
        return self._extra_bytes if held else 0

    def get(self, step: int) -> Entry | None:
        """The entry that led from `step` to `step + 1`, if it is still here."""
        if self.oldest is None or not 0 <= step - self.oldest < len(self._entries):
            return None
        return self._entries[step - self.oldest]

    def lineages(self, position: Position) -> bytes:
        """Of the last `KEPT_LINEAGES` steps up to that one, oldest first; only its own if it is not of this
        log."""
        if self.lineage_at(position.step) != position.lineage:
            return bytes.fromhex(position.lineage)
        stop = (position.step - self._first_lineage + 1) * DIGEST_BYTES
        return bytes(self._lineages[max(stop - KEPT_LINEAGES * DIGEST_BYTES, 0) : stop])

    def lineage_at(self, step: int) -> str | None:
        """Lineage digest of the state at `step`, if this log knows it."""
        if not self._first_lineage <= step <= self.step:
            return None
        at = (step - self._first_lineage) * DIGEST_BYTES
        return self._lineages[at : at + DIGEST_BYTES].hex()

    def truncate_after(self, step: int) -> None:
        """Go back to the state at `step`: forget entry `step` and all after it.

        Raises ValueError if this log does not know the lineage of that state.
        """
        if self.lineage_at(step) is None:
            raise ValueError(
                f"cannot go back to step {step}: the log knows {self._first_lineage} to {self.step}"
            )
        while self._entries and self._entries[-1].header.step >= step:
            self._bytes -= len(self._entries.pop().payload)
        del self._lineages[(step - self._first_lineage + 1) * DIGEST_BYTES :]
