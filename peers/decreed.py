"""What an organizer has said to a run so far: a line of JSON for each change of the book, with the time, in
the bootstrap's folder. The book itself holds only what is true now.

Not covered: proof. Who may write to the folder may write here; what peers were told is signed, and in their
journals.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2ptrain.config import RunConfig, run_digest
from p2ptrain.events import clean, counted, short
from p2ptrain.protocol.terms import in_words
from p2ptrain.records import PeerId
from p2ptrain.telemetry.journal import Journal, read_journal, shown_moment

if TYPE_CHECKING:  # which writes down here what it has become
    from peers.invites import Book

LOG = "decreed.jsonl"


def write(folder: Path, before: Book, after: Book, now: float) -> None:
    """Add what has changed between the two, if it is anything that was said."""
    if said := list(changes(before, after)):
        with Journal(folder / LOG) as journal:
            journal.append({"time": shown_moment(now), "run_id": after.run_id, "said": said})


def read(folder: Path) -> list[dict[str, Any]]:
    """All of it, the oldest first."""
    return list(read_journal(folder / LOG))


def lines(records: list[dict[str, Any]]) -> Iterator[str]:
    """The same for people."""
    for each in records:
        for said in each.get("said", ()):
            yield f"{clean(str(each.get('time')), 40)}  {clean(str(said))}"


def changes(before: Book, after: Book) -> Iterator[str]:
    """In words."""
    if (after.run_id, after.run_json) != (before.run_id, before.run_json) and after.run_json:
        yield f"opened {after.run_id}, digest {_digest(after)[:12]}"
    known = {each.grant.serial: each for each in before.invites}
    for issued in after.invites:
        grant, was = issued.grant, known.get(issued.grant.serial)
        what = f"invite {grant.serial}"
        if was is None:
            uses = "" if grant.uses is None else f", for {counted(grant.uses, 'peer')}"
            yield f"{what} made, role {grant.role}, name {json.dumps(grant.name)}{uses}"
        if issued.revoked and not (was is not None and was.revoked):
            yield f"{what} revoked"
        for peer in issued.used_by[0 if was is None else len(was.used_by) :]:
            yield f"{what} used by {short(PeerId(peer))}"
    out_before = {} if before.kicks is None else {each.who: each for each in before.kicks.kicks}
    out = {} if after.kicks is None else {each.who: each for each in after.kicks.kicks}
    for who, kick in out.items():
        if out_before.get(who) != kick:
            until = "for good" if kick.until is None else f"until {shown_moment(kick.until)}"
            yield f"{short(who)} put out {until}" + (f": {kick.reason}" if kick.reason else "")
    for who in out_before.keys() - out.keys():
        yield f"{short(who)} may come back"
    then = [] if before.terms is None else in_words(before.terms)
    now = [] if after.terms is None else in_words(after.terms)
    revision = 0 if after.terms is None else after.terms.revision
    yield from (f"revision {revision}: + {line}" for line in now if line not in then)
    yield from (f"revision {revision}: - {line}" for line in then if line not in now)
    if after.succession is not None and after.succession != before.succession:
        yield f"another key, {short(after.succession.successor)}"


def _digest(book: Book) -> str:
    return run_digest(RunConfig.model_validate_json(book.run_json))
