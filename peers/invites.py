"""The organizer's book of invites: a file beside the organizer's key, in the bootstrap's data folder.

Invites are made, listed and revoked, and peers are kicked, here with nothing on the net. The bootstrap makes
key and book at its first start; while it runs it reads the book again and again, and tells the swarm what has
been decreed.

Not covered: a book that is lost. Its invites stay valid then, and new ones might be given their numbers.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from p2ptrain.config import RunConfig, canonical_json, run_digest
from p2ptrain.errors import ConfigError, StorageError
from p2ptrain.events import clean, counted
from p2ptrain.protocol.terms import in_force
from p2ptrain.records import (
    MAX_KICKED,
    MAX_REVOKED,
    Decree,
    Grant,
    Kick,
    Kicks,
    PeerId,
    Permission,
    Redeemed,
    Revocations,
    Succession,
    Terms,
)
from p2ptrain.swarm import gate
from p2ptrain.swarm.access import Invite, decode, encode, issue, redeemed
from p2ptrain.swarm.identity import Identity, load_or_create
from peers import decreed
from peers.durations import parse_seconds

ORGANIZER = "organizer.key"
NEXT = "organizer.key.next"
"""While one takes the other's place."""
LOCK = "invites.lock"
BOOK = "invites.json"
LINK = "link"
"""Name of the invite that a public run's bootstrap prints."""


class Issued(BaseModel):
    """One invite, and whether it has been taken back."""

    model_config = ConfigDict(strict=True, extra="forbid")

    line: str
    revoked: bool = False
    used_by: list[str] = []
    """Who came by it, if it is for a few peers: each has a grant of its own."""

    @property
    def grant(self) -> Grant:
        return decode(self.line).grant


class Book(BaseModel):
    """All that the organizer has given out."""

    model_config = ConfigDict(strict=True, extra="forbid")

    public: bool = True
    """Whether the bootstrap prints an invite for everybody."""
    addresses: list[str] = []
    """Where the bootstrap was to be found at its last start."""
    invites: list[Issued] = []
    run_id: str = ""
    """What decrees are bound to; empty in a book that no bootstrap has opened since they are."""
    revocations: Revocations | None = None
    kicks: Kicks | None = None
    succession: Succession | None = None
    terms: Terms | None = None
    """As the organizer has signed them."""
    kept: list[str] = []
    """Peers that follow the organizer to its present key."""
    run_json: str = ""
    """The run file, as canonical JSON; empty until a bootstrap has been started with it."""

    @property
    def decrees(self) -> list[Decree]:
        """What the swarm is to know."""
        said = (self.succession, self.revocations, self.kicks, self.terms)
        return [each for each in said if each is not None]

    def holds(self, grant: Grant) -> bool:
        """Whether it is by the organizer's present key."""
        return self.succession is None or grant.organizer == self.succession.successor

    def link(self, run: RunConfig) -> Issued | None:
        """The unlimited invite that this run's bootstrap prints, if there is one."""
        digest = run_digest(run)
        for each in self.invites:
            grant = each.grant
            if (grant.name, grant.run_digest, each.revoked) == (LINK, digest, False) and self.holds(grant):
                return each
        return None


# -- for the bootstrap ---------------------------------------------------------------------------------------


def open_book(folder: Path, run: RunConfig, addresses: Sequence[str], public: bool | None, now: int) -> Book:
    """The book at a bootstrap's start: it has these addresses and, if the run is public, its link.

    `public`: None: as it was, at first True. What was public and no longer is loses its link.
    """
    with _edited(folder) as book:
        organizer = _succeeded(folder, book)
        book.public = book.public if public is None else public
        book.addresses = list(addresses)
        if book.run_id != run.run_id:
            _renew(organizer, book, run.run_id)
        book.run_json = canonical_json(run)
        link = book.link(run)
        if link is not None and not book.public:
            _revoke(organizer, book, [link.grant.serial])
        elif link is not None:
            link.line = encode(decode(link.line).model_copy(update={"addresses": tuple(addresses)}))
        elif book.public:
            _issue(organizer, book, run, "train", None, LINK, now)
        return book


def own_invite(folder: Path, run: RunConfig, me: PeerId, now: int) -> Invite:
    """What the bootstrap itself, peer `me`, shows to others; it is in no book, and nobody enters by it."""
    return issue(
        _succeeded(folder, read(folder)),
        run_id=run.run_id,
        run_digest=run_digest(run),
        addresses=[f"/ip4/127.0.0.1/tcp/1/p2p/{me}"],
        role="watch",
        serial=0,
        issued=now,
        expires=None,
        name="bootstrap",
    )


# -- for the organizer ---------------------------------------------------------------------------------------


def create(
    folder: Path,
    run: RunConfig,
    role: Permission,
    ttl: int | None,
    name: str,
    now: int,
    *,
    uses: int | None = None,
) -> Invite:
    """A new invite, valid for `ttl` seconds (None: for ever) and for so many peers (None: for any number).
    Raises ConfigError if no bootstrap was here."""
    with _edited(folder) as book:
        organizer = _organizer(folder, book)
        if not book.addresses:
            raise ConfigError(
                f"the book in {folder} has no address to invite to; start the bootstrap of {run.run_id} once"
            )
        expires = None if ttl is None else now + ttl
        return _issue(organizer, book, run, role, expires, name, now, uses=uses)


def revoke(folder: Path, serials: Sequence[int]) -> Book:
    """Take these invites back. Raises ConfigError if there is no such invite, or no room for more."""
    with _edited(folder) as book:
        _revoke(_organizer(folder, book), book, serials)
        return book


def rotate(folder: Path, run: RunConfig, kept: Collection[PeerId], ends: int, now: int) -> Book:
    """A new key for the organizer: invites by the old one lead in nobody who is not in yet, and those who are
    in stay until `ends`, or for as long as they may if they are `kept`. Raises ConfigError."""
    with _edited(folder) as book:
        old = _organizer(folder, book)
        if not book.addresses:
            raise ConfigError(
                f"the book in {folder} has no address; start the bootstrap of {run.run_id} once"
            )
        if book.succession is not None and book.succession.ends > now:
            raise ConfigError(
                f"the key was replaced a moment ago, and invites by the one before hold for another "
                f"{book.succession.ends - now} s; wait for that, or those who follow get lost"
            )
        new = load_or_create(folder / NEXT)
        revision = _next(book.succession)
        book.succession = gate.succeed(old, new, run.run_id, revision, ends)
        book.kept = sorted(kept)
        _renew(new, book, run.run_id)
        if book.public:
            _issue(new, book, run, "train", None, LINK, now)
    with _locked(folder):
        _succeeded(folder, book)
    return book


def redeem(folder: Path, grant: Grant, who: PeerId) -> Redeemed:
    """What the bearer of this grant, which the organizer has signed, is given; the use is counted, once for
    each peer. Raises ConfigError if there is none left, or nothing to give."""
    with _edited(folder) as book:
        organizer = _organizer(folder, book)
        issued = next((each for each in book.invites if each.grant.serial == grant.serial), None)
        which = f"invite number {grant.serial}"
        if issued is None or issued.revoked:
            raise ConfigError(f"{which} is not, or no longer, in the organizer's book")
        if grant.organizer != organizer.peer_id:
            if who not in book.kept:
                raise ConfigError(f"{which} is by a key that the organizer has replaced")
        elif grant.uses is None:
            raise ConfigError(f"{which} is good as it is")
        elif who not in issued.used_by:
            if len(issued.used_by) >= grant.uses:
                raise ConfigError(
                    f"{which} was for {counted(grant.uses, 'peer')}, and so many have come by it"
                )
            issued.used_by.append(who)
        return redeemed(organizer, grant, who)


def kick(folder: Path, who: PeerId, until: int | None, reason: str, now: int) -> Sequence[Kick]:
    """Put a peer out until then (None: for good); all who are out. Raises ConfigError if there is no room."""
    try:
        kick = Kick(who=who, until=until, reason=reason)
    except ValidationError:
        raise ConfigError(
            f"--reason {clean(reason, 50)}: expected at most 40 characters of ASCII, no quotes or backslashes"
        ) from None
    return _put_out(folder, who, kick, now)


def lift(folder: Path, who: PeerId, now: int) -> Sequence[Kick]:
    """Let a peer come back; all who are out still. Raises ConfigError if it was not out."""
    return _put_out(folder, who, None, now)


def decree(folder: Path, change: Callable[[RunConfig, Terms], Terms], *, dry: bool = False) -> Terms:
    """Change the run's terms and sign them; `dry`: only say what they would be. Raises ConfigError, also for
    terms under which the run would not be valid."""
    with _edited(folder) as book:
        organizer = _organizer(folder, book)
        if not book.run_json:
            raise ConfigError(f"the book in {folder} names no run yet; start its bootstrap once")
        run = RunConfig.model_validate_json(book.run_json)
        before = book.terms or Terms(peer=organizer.peer_id, revision=0, signature=gate.UNSIGNED)
        draft = change(run, before).model_copy(update={"revision": _next(book.terms)})
        after = gate.signed(organizer, book.run_id, draft)
        try:
            Terms.model_validate_json(after.model_dump_json())
            for each in after.changes:
                in_force(run, after, each.step)
        except ValueError as error:
            raise ConfigError(
                f"the run would not be valid: {_first_reason(error)}; nothing was changed"
            ) from None
        if not dry:
            book.terms = after
        return after


def read(folder: Path) -> Book:
    """The book; an empty one if there is none. Raises StorageError."""
    path = folder / BOOK
    try:
        return Book.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Book()
    except OSError as error:
        raise StorageError(f"the book of invites {path} cannot be read: {error.strerror}") from error
    except ValidationError:
        raise StorageError(
            f"the book of invites {path} is damaged; put back a copy, or move it away: then what it held can "
            "no longer be revoked"
        ) from None


def parse_ttl(text: str) -> int | None:
    """Seconds of `30m`, `24h` or `7d`; None of `never`. Raises ConfigError."""
    if text == "never":
        return None
    if (seconds := parse_seconds(text)) is None:
        raise ConfigError(f"--ttl {text!r}: expected a time such as 30m, 24h or 7d, or never")
    return seconds


# -- inside --------------------------------------------------------------------------------------------------


def _organizer(folder: Path, book: Book) -> Identity:
    """The organizer's key. Raises ConfigError if there is none."""
    path = folder / ORGANIZER
    if not path.exists():
        raise ConfigError(
            f"there is no organizer's key {path}; start `p2ptrain bootstrap` with this run file and data "
            "folder once, and it will make one"
        )
    return _succeeded(folder, book)


def _succeeded(folder: Path, book: Book) -> Identity:
    """The organizer's key, made if there is none; that of the book, if it was just being replaced."""
    path, draft = folder / ORGANIZER, folder / NEXT
    if book.succession and draft.exists() and load_or_create(draft).peer_id == book.succession.successor:
        draft.replace(path)
    return load_or_create(path)


@contextmanager
def _edited(folder: Path) -> Iterator[Book]:
    """The book, to be changed; written whole, or not at all, and by one process at a time."""
    path = folder / BOOK
    with _locked(folder):
        book = read(folder)
        before = book.model_dump_json()
        yield book
        if book.model_dump_json() == before:
            return
        draft = path.with_suffix(".draft")
        try:
            # Readable by its owner only: whoever has a line may come in by it.
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(book.model_dump_json(indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except OSError as error:
            raise StorageError(
                f"the book of invites {path} cannot be written: {error.strerror}; nothing has changed"
            ) from error
        decreed.write(folder, Book.model_validate_json(before), book, time.time())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        lock = (folder / LOCK).open("ab")
    except OSError as error:
        raise ConfigError(
            f"{folder} is no bootstrap's data folder ({error.strerror}); start `p2ptrain bootstrap` with "
            "this run file and data folder once"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _issue(
    organizer: Identity,
    book: Book,
    run: RunConfig,
    role: Permission,
    expires: int | None,
    name: str,
    now: int,
    *,
    uses: int | None = None,
) -> Invite:
    invite = issue(
        organizer,
        run_id=run.run_id,
        run_digest=run_digest(run),
        addresses=book.addresses,
        role=role,
        serial=1 + max((each.grant.serial for each in book.invites), default=0),
        issued=now,
        expires=expires,
        name=name,
        uses=uses,
    )
    book.invites.append(Issued(line=encode(invite)))
    return invite


def _revoke(organizer: Identity, book: Book, serials: Sequence[int]) -> None:
    known = {each.grant.serial: each for each in book.invites}
    for serial in serials:
        if serial not in known:
            raise ConfigError(
                f"there is no invite number {serial}; `p2ptrain invite list` shows those there are"
            )
        known[serial].revoked = True
    listed = [serial for serial, each in known.items() if each.revoked]
    if len(listed) > MAX_REVOKED:
        raise ConfigError(
            f"{len(listed)} invites would be revoked, and at most {MAX_REVOKED} fit into what peers pass on; "
            "change the run file's run_id or seed, and open a new run"
        )
    book.revocations = gate.revoke(organizer, book.run_id, _next(book.revocations), listed)


def _put_out(folder: Path, who: PeerId, kick: Kick | None, now: int) -> Sequence[Kick]:
    with _edited(folder) as book:
        organizer = _organizer(folder, book)
        if not book.run_id:
            raise ConfigError(f"the book in {folder} names no run yet; start its bootstrap once")
        before = book.kicks.kicks if book.kicks else ()
        out = [each for each in before if each.until is None or each.until > now]
        if kick is None and all(each.who != who for each in out):
            raise ConfigError(f"peer {who} is not put out, so there is nothing to lift")
        kicks = [each for each in out if each.who != who] + ([kick] if kick else [])
        if len(kicks) > MAX_KICKED:
            raise ConfigError(
                f"{len(kicks)} peers would be out, and at most {MAX_KICKED} fit into what peers pass on; "
                "lift one, or revoke the invite that they come by"
            )
        book.kicks = gate.kick(organizer, book.run_id, _next(book.kicks), kicks)
        return kicks


def _renew(organizer: Identity, book: Book, run_id: str) -> None:
    """Decree the same for this run."""
    if run_id != book.run_id:  # whose key was replaced for another run, leads in nobody here anyway
        book.run_id, book.succession, book.kept = run_id, None, []
        book.terms = None  # they name steps of the run that was
    if book.revocations is not None:
        book.revocations = gate.revoke(organizer, run_id, _next(book.revocations), book.revocations.serials)
    if book.kicks is not None:
        book.kicks = gate.kick(organizer, run_id, _next(book.kicks), book.kicks.kicks)
    if book.terms is not None:
        terms = book.terms.model_copy(update={"revision": _next(book.terms)})
        book.terms = gate.signed(organizer, run_id, terms)


def _first_reason(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg']}".removeprefix(": ")
    return str(error)


def _next(before: Decree | None) -> int:
    return 1 + (before.revision if before else 0)
