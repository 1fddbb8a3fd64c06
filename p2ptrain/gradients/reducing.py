"""The numeric work of a round, one chunk at a time: what may run on a thread beside the event loop.

Each function goes once over one chunk while it is in the cache: decodes, adds, encodes and hashes it there.
They keep nothing between calls but the memory that they decode into: fresh memory costs more to get than a
chunk to add.

Not covered: which chunks are here, and in what order they are taken; see `protocol.reduction`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from p2ptrain.errors import BadMessage
from p2ptrain.gradients.aggregation import (
    OUTSIZED,
    Aggregation,
    about_squared_norm,
    for_chunk,
    outsized,
    squared_norm,
)
from p2ptrain.gradients.codecs import Buffer, Codec
from p2ptrain.gradients.feedback import Owed
from p2ptrain.gradients.likeness import Likeness
from p2ptrain.records import EntryHeader

MAX_SPARE = 64
"""Pieces of memory for chunks that are kept for the next ones, half a megabyte each with fp32."""


class Spoilt(BadMessage):
    """One part of a chunk cannot go into its mean; `index` says which, `finite` whether its numbers are."""

    def __init__(self, index: int, why: str, *, finite: bool) -> None:
        super().__init__(why)
        self.index, self.finite = index, finite


class Scratch(threading.local):
    """Memory that is used again and again: the first touch of a fresh page costs as much as a copy of it.

    Each thread has its own: two of them decode two chunks at once.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._spare: list[memoryview] = []

    def take(self, index: int, count: int) -> Tensor:
        """Memory for `count` values, float32, with anything in it; for the same index, the same."""
        while len(self._kept) <= index:
            self._kept.append(torch.empty(0))
        kept = self._kept[index]
        if kept.numel() < count:
            kept = self._kept[index] = torch.empty(count)
        return kept if kept.numel() == count else kept[:count]

    def lend(self, size_bytes: int) -> memoryview:
        """Memory for so many bytes, with anything in it, until it is given back, if ever."""
        while self._spare:
            if (memory := self._spare.pop()).nbytes == size_bytes:
                return memory
        return np.empty(size_bytes, np.uint8).data

    def give_back(self, memory: memoryview) -> None:
        """What was lent, and nobody uses any more."""
        if len(self._spare) < MAX_SPARE:
            self._spare.append(memory)


@dataclass(frozen=True)
class Rule:
    """How a reducer makes one gradient of the members' in all chunks of an attempt, and what it notes."""

    codec: Codec
    aggregation: Aggregation
    usual_norm: float
    """Of the last averaged gradient, 0 if there was none."""
    owed: Owed
    likeness: Likeness
    audited: bool = False
    """Whether the parts are hashed, too."""
    last: EntryHeader | None = None
    """The entry before, which some rules follow."""


def average_chunk(
    rule: Rule,
    scratch: Scratch,
    ranks: Sequence[int],
    parts: Sequence[Buffer],
    samples: Sequence[int],
    start: int,
    count: int,
    place: memoryview,
) -> tuple[float, bytes, list[bytes]]:
    """Write what the rule makes of the encoded parts into `place`, encoded; returns its squared norm, as
    everyone will decode it, its digest, and where the run is audited those of the parts.

    `ranks`, `parts` and `samples` (> 0) are those of the members that brought samples, in roster order, and
    the chunk is of the `count` values from `start` on. Raises Spoilt.
    """
    totals = []
    for index, part in enumerate(parts):
        total = scratch.take(index, count)
        try:
            rule.codec.decode(part, total)
        except BadMessage as fault:
            raise Spoilt(index, str(fault), finite=False) from None
        totals.append(total)
    squares = [about_squared_norm(total) for total in totals]
    if (odd := outsized(squares, samples, rule.usual_norm)) is not None:
        raise Spoilt(odd, f"over {OUTSIZED:,.0f} times as long as the others'", finite=True)
    rule.likeness.add(ranks, totals, samples, squares)
    mean = for_chunk(rule.aggregation, rule.last, start, start + count)(totals, samples)
    encoded, decoded = rule.owed.encode(start, mean, scratch.take(len(parts), count))
    place[:] = encoded
    hashed = [blake3(part).digest() for part in parts] if rule.audited else []
    return squared_norm(decoded), blake3(place).digest(), hashed


def sum_again(
    codec: Codec,
    aggregation: Aggregation,
    scratch: Scratch,
    parts: Sequence[Buffer],
    samples: Sequence[int],
    count: int,
) -> bytes | None:
    """What `average_chunk` must have made of these encoded parts, with a codec that keeps nothing, and the
    rule `for_chunk`; None if one of them cannot be decoded, and so nothing may have been made of them."""
    totals = [scratch.take(index, count) for index in range(len(parts))]
    try:
        for part, total in zip(parts, totals, strict=True):
            codec.decode(part, total)
    except BadMessage:
        return None
    return bytes(codec.encode(aggregation(totals, samples)))


def encode_chunk(codec: Codec, values: Tensor) -> tuple[Buffer, bytes]:
    """The values, encoded, and the digest of that."""
    encoded = codec.encode(values)
    return encoded, blake3(encoded).digest()


def check_chunk(
    codec: Codec, scratch: Scratch, encoded: Buffer, count: int, place: memoryview | None
) -> tuple[bytes, float]:
    """The digest of an encoded mean of `count` values, which is copied to `place` if there is one, and about
    its squared norm.

    Raises BadMessage if it cannot be decoded: after the commit it would be too late to refuse.
    """
    mean = scratch.take(0, count)
    codec.decode(encoded, mean)
    if place is not None:
        place[:] = encoded
    return blake3(encoded).digest(), about_squared_norm(mean)
