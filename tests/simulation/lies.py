"""What a peer may say that is not so, and that the others can know not to be so.

Not covered: lies that fit the contract, such as a wrong gradient, or a mean that is the same wrong one for
all; a reducer that names false sample counts first (the next honest one contradicts it, and is blamed).
"""

from __future__ import annotations

from typing import Any

from p2ptrain.records import Averaged, Chunk, EntryHeader

Log = tuple[tuple[EntryHeader, str], ...]


def about_a_chunk(header: Chunk, most_samples: int, *, already_counted: bool) -> dict[str, dict[str, Any]]:
    """What to change in it, by the name of the lie. `already_counted`: its samples are known."""
    ways = {"number": {"number": header.number + 1000}, "count": {"samples": most_samples + 1}}
    if already_counted:
        ways["contradiction"] = {"samples": header.samples + 1}
    return ways


def about_a_mean(header: Averaged) -> dict[str, dict[str, Any]]:
    """What to change in it, by the name of the lie."""
    return {
        "number": {"number": header.number + 1000},
        "nothing": {"samples": (0,) * len(header.samples)},
        "roster": {"samples": (*header.samples, 1)},
        "norm": {"squared_norm": 1.0 if header.squared_norm is None else None},
    }


def about_a_log(log: Log) -> list[Log]:
    """Logs whose end is not what the header says, or does not follow from what is before it."""
    header, content = log[-1]
    orphan = header.model_copy(update={"parent": "0" * 64})
    return [(*log[:-1], (header, f"{content}?")), (*log[:-1], (orphan, content))]
