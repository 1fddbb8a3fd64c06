"""Who was in the swarm lately, as the bootstrap saw it: a file beside the organizer's book, for the commands.

People name a peer by the end of its id, as every line about it does; this file has the whole of it, and the
number of the invite it came by. Not covered: a peer that no bootstrap was up to see.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from p2ptrain.errors import ConfigError, StorageError
from p2ptrain.events import clean, short
from p2ptrain.records import PeerId, Presence

PRESENT = "present.json"
MAX_SEEN = 2048
KEPT_SECONDS = 7 * 86_400
WHOLE_ID_CHARACTERS = 46
"""Of the shortest there are."""


class Seen(BaseModel):
    """One peer, as its last presence record told."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    peer: str
    name: str
    role: str
    invite: int | None
    """Number of the invite it showed."""
    at: int
    """When, in seconds since 1970."""
    step: int | None = None
    """Where it stood then, if it trains."""


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    seen: list[Seen]


def merged(before: Sequence[Seen], there: Iterable[Presence], now: int) -> list[Seen]:
    """Those of before and those who are there now, the latest first; who was away for long is left out."""
    latest = {each.peer: each for each in before if each.at > now - KEPT_SECONDS}
    for record in there:
        invite = record.access.grant.serial if record.access else None
        latest[record.peer] = Seen(
            peer=record.peer,
            name=record.name,
            role=record.role,
            invite=invite,
            at=now,
            step=record.position.step if record.position else None,
        )
    return sorted(latest.values(), key=lambda each: (-each.at, each.peer))[:MAX_SEEN]


def latest_step(seen: Iterable[Seen]) -> int | None:
    """The furthest that anybody was seen at; None if nobody trained."""
    return max((each.step for each in seen if each.step is not None), default=None)


def read(folder: Path) -> list[Seen]:
    """The latest first; nobody if there is no such file, or it is damaged: the bootstrap writes it anew."""
    try:
        return _File.model_validate_json((folder / PRESENT).read_bytes()).seen
    except (OSError, ValidationError):
        return []


def write(folder: Path, seen: Sequence[Seen]) -> None:
    """Whole, or not at all. Raises StorageError."""
    draft = folder / f"{PRESENT}.draft"
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(_File(seen=list(seen)).model_dump_json() + "\n")
        draft.replace(folder / PRESENT)
    except OSError as error:
        raise StorageError(f"who is there cannot be written to {draft}: {error.strerror}") from error


def resolve(word: str, seen: Sequence[Seen]) -> PeerId:
    """The peer whose id is, or ends in, this word. Raises ConfigError if there are none or several."""
    word = word.lstrip("…")
    fitting = sorted({each.peer for each in seen if word and each.peer.endswith(word)})
    if len(fitting) == 1:
        return PeerId(fitting[0])
    if len(fitting) > 1:
        several = ", ".join(fitting[:4])
        raise ConfigError(
            f"{len(fitting)} peers have ids that end in {clean(word, 60)}: {several}; name more of it"
        )
    if WHOLE_ID_CHARACTERS <= len(word) <= 64 and word.isascii() and word.isalnum():
        return PeerId(word)
    there = ", ".join(f"{short(PeerId(each.peer))} {clean(each.name, 20)}".strip() for each in seen[:8])
    raise ConfigError(
        f"the bootstrap has seen no peer whose id ends in {clean(word, 60)!r} in the last week"
        f"{f', but {there}' if there else ''}; write the id as peers' logs do, or all of it"
    )
