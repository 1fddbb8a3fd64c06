"""The digest chain that says which log led to a state, and which of two logs survives.

`genesis` binds the run and the initial parameters, `advance` binds one committed entry to its parent. Equal
lineage therefore means the same entries from the same start, and since apply is deterministic, the same
parameters (I2).
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from blake3 import blake3

from p2ptrain.records import EntryHeader, Position


def digest_of(parts: Iterable[bytes | memoryview]) -> str:
    """BLAKE3 over the BLAKE3 of each part: parts cannot run into each other."""
    return joint_digest(blake3(part).digest() for part in parts)


def joint_digest(digests: Iterable[bytes]) -> str:
    """The same, of parts whose digests are known already."""
    return blake3(b"".join(digests)).hexdigest()


def genesis(run_fingerprint: str, state_digest: str) -> Position:
    """Step 0 of a run: no entry, no samples behind it."""
    lineage = digest_of([b"p2ptrain genesis", run_fingerprint.encode(), state_digest.encode()])
    return Position(step=0, lineage=lineage, weight=0)


def canonical(header: EntryHeader) -> bytes:
    """The header's bytes as the lineage hashes them: sorted keys, no spaces, shortest round-trip floats. Of
    its terms all counts but who had passed them on."""
    without = {"terms"} if header.terms is None else {"terms": {"peer"}}
    plain = header.model_dump(mode="json", exclude=without)
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()


def advance(position: Position, header: EntryHeader) -> Position:
    """Where a replica at `position` stands after applying the entry."""
    if (header.step, header.parent) != (position.step, position.lineage):
        raise ValueError(
            f"entry {header.step} of parent {header.parent[:8]} does not follow "
            f"step {position.step} of lineage {position.lineage[:8]}"
        )
    return Position(
        step=position.step + 1,
        lineage=digest_of([position.lineage.encode(), canonical(header)]),
        weight=position.weight + header.total_samples,
    )


def heavier(a: Position, b: Position) -> bool:
    """Whether lineage `a` outweighs `b` (I8): more samples, then more steps; the digest settles a tie."""
    return (a.weight, a.step, a.lineage) > (b.weight, b.step, b.lineage)
