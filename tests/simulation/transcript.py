"""A story told to people: one line for each thing that a peer did or met."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator

from p2ptrain.protocol.round import Send
from p2ptrain.records import PeerId

KEPT_LINES = 4000

SHORTER = [
    (r"kind='\w+', |, \w+=None|, \w+=\(\)|, spans=\([\d, ]*\)|, squared_norms=\([\d., ]*\)", ""),
    (r"incarnation='\w+', |finish_seconds=[\d.]+, |, batch_seconds=[\d.]+", ""),
    (r"'([0-9a-f]{6})[0-9a-f]{58}'", r"\1"),
    (r"Position\(step=(\d+), lineage=(\w+), weight=(\d+)\)", r"\1/\2/\3"),
    (r"Ballot\(number=(\d+), leader='(\w+)'\)", r"\1·\2"),
    (r"EntryHeader\(step=(\d+), parent=(\w+), ballot=(\S+), roster=\(", r"Entry(\1 of \2 by \3, ("),
]


class Transcript:
    """The last `KEPT_LINES` things that happened; they become text only when somebody reads them."""

    def __init__(self) -> None:
        self._told: deque[tuple[float, str, object]] = deque(maxlen=KEPT_LINES)

    def note(self, when: float, who: PeerId | str, what: object) -> None:
        self._told.append((when, who, what))

    def lines(self) -> Iterator[str]:
        for when, who, what in self._told:
            yield f"{when:9.3f} {who:>3} {shown(what)}"


def shown(what: object) -> str:
    """An effect or an event on one line: positions as step/lineage/weight, ballots as number·leader."""
    text = what if isinstance(what, str) else repr(what)
    if isinstance(what, Send):
        text = f"→ {what.to} {what.message!r}"
    for long, short in SHORTER:
        text = re.sub(long, short, text)
    return text
