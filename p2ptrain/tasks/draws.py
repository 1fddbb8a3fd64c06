"""Which sample is which: numbers that look drawn, and are a pure function of what they are drawn for."""

from __future__ import annotations

import hashlib


def draws(seed: int, step: int, peer: str, first: int, count: int) -> list[int]:
    """`count` numbers in 0 … 2^64 - 1, for samples `first`, `first + 1`, … that `peer` draws for `step`.

    SHA-256 of all that names the sample: the same on every machine and in every process, and as good as
    independent for any two samples.
    """
    start = hashlib.sha256(f"{seed}/{step}/{peer}/".encode())
    drawn = []
    for number in range(first, first + count):
        digest = start.copy()
        digest.update(str(number).encode())
        drawn.append(int.from_bytes(digest.digest()[:8], "big"))
    return drawn
