"""Who is let in: every peer asks this of every other, before anything but a greeting is said.

A peer trusts one organizer, the one whose key is in its own invite, and checks by that key alone: no server
is asked. What another peer shows is bound to its peer id, which the transport has authenticated, so a pass
that was overheard or handed on is void. An invite that ends, by its date or by being revoked, ends for
whoever came by it, too.

What the organizer says later, such as which invites are taken back and which peers are put out, is a
`Decree`, signed with the same key; any peer may bring it.

An invite may be for a few peers only. Somebody has to count them, and that is the organizer's bootstrap, once
for each: it gives those who are in time a grant of their own, which binds their very peer id and which every
peer checks as it checks any other (`Redeem`).

Not covered: a peer that has never heard of a decree does not heed it until it does; and whoever has the line
of an invite for any number can come by it under as many peer ids, also when one of these has been kicked.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar, assert_never

from p2ptrain.events import short
from p2ptrain.records import (
    Decree,
    GetEntry,
    GetEvents,
    GetInput,
    GetLineage,
    GetManifest,
    GetMetrics,
    GetPiece,
    GetPledges,
    GetProof,
    GetRun,
    Kick,
    Kicks,
    Pass,
    PeerId,
    Permission,
    Probe,
    Redeem,
    Request,
    Revocations,
    Succession,
    Terms,
)
from p2ptrain.swarm.access import as_date, ended, is_borne_by, is_signed
from p2ptrain.swarm.identity import SIGNATURE_BYTES, Identity, verify

MAX_PASSES = 2048
"""Whose signatures are remembered: a peer shows its pass on every stream."""

UNSIGNED = "0" * 2 * SIGNATURE_BYTES
"""In the place of the signature of a draft."""

D = TypeVar("D", bound=Decree)


class Gate:
    """One peer's judgement of whoever knocks. It learns of decrees, and forgets none."""

    def __init__(
        self, own: Pass, me: PeerId, clock: Callable[[], float] = time.time, *, redeems: bool = False
    ) -> None:
        """`own`: what this peer, `me`, shows itself. `clock`: seconds since 1970. `redeems`: let in also
        those who can but ask for a grant of their own."""
        self.own = own
        """To be replaced by another one, when this peer is given that."""
        self.decrees: dict[str, Decree] = {}
        """Of each kind the newest that came by, as the organizer signed it."""
        self._me = me
        self._clock = clock
        self._redeems = redeems

    @property
    def succession(self) -> Succession | None:
        """What made the organizer's key the one that it is, if it has been replaced."""
        found = self.decrees.get("succession")
        return found if isinstance(found, Succession) else None

    @property
    def organizer(self) -> PeerId:
        """Whom this peer trusts."""
        return self.own.grant.organizer if self.succession is None else self.succession.successor

    @property
    def revoked(self) -> Collection[int]:
        """Numbers of the invites that hold no more."""
        found = self.decrees.get("revocations")
        return found.serials if isinstance(found, Revocations) else ()

    @property
    def kicks(self) -> Sequence[Kick]:
        """Who is put out now, and why."""
        found, now = self.decrees.get("kicks"), self._clock()
        kicks = found.kicks if isinstance(found, Kicks) else ()
        return [each for each in kicks if each.until is None or now < each.until]

    @property
    def has_to_redeem(self) -> bool:
        """Whether what this peer shows is good for no more than a grant of its own."""
        grant = self.own.grant
        return grant.uses is not None or grant.organizer != self.organizer

    @property
    def terms(self) -> Terms | None:
        """What the organizer has changed in the run."""
        found = self.decrees.get("terms")
        return found if isinstance(found, Terms) else None

    def lawful(self, terms: Terms) -> bool:
        """Whether the organizer has signed these, with the present key or one before."""
        grant, succession = self.own.grant, self.succession
        keys = {grant.organizer, self.organizer} | ({succession.predecessor} if succession else set())
        return any(_is_decreed(terms, key, grant.run_id) for key in keys)

    def flaw(self, peer: PeerId, shown: Pass | None, *, any_run: bool = False) -> str:
        """Why this peer, showing this, is not let in, as a sentence without its end; empty if it is.

        `any_run`: let in whoever the organizer has invited to any run.
        """
        if shown is None:
            return "no invite was shown"
        grant, now, succession = shown.grant, self._clock(), self.succession
        replaced = succession is not None and grant.organizer == succession.predecessor
        if grant.organizer != self.organizer and not replaced:
            theirs = short(grant.organizer)
            return f"the invite shown is by organizer {theirs} and not by {short(self.organizer)}"
        if forged := _forged(peer, shown):
            return forged
        which = f"the invite shown (number {grant.serial})"
        if not any_run and grant.run_digest != (ours := self.own.grant.run_digest):
            return f"{which} is to run {grant.run_digest[:12]}… and not to {ours[:12]}…"
        if grant.serial in self.revoked:
            return f"{which} has been revoked by the organizer"
        if late := ended(grant, now):
            return f"{which} {late}"
        if kicked := next((put_out(each) for each in self.kicks if each.who == peer), ""):
            return kicked
        if self._redeems:
            return ""
        if grant.uses is not None:
            return f"{which} is for {grant.uses} peers, and the bootstrap has not counted this one"
        if replaced and succession is not None and now >= succession.ends:
            return f"{which} is by a key of the organizer's that ended at {as_date(succession.ends)}"
        return ""

    def own_flaw(self) -> str:
        """Why others do not let us in any more; empty if they do, as far as we know."""
        return self.flaw(self._me, self.own)

    def learn(self, told: Decree) -> bool:
        """Heed this if the organizer signed it and nothing newer of its kind is known; whether the organizer
        did."""
        organizer, run_id = self.organizer, self.own.grant.run_id
        if isinstance(told, Succession):
            genuine = organizer in (told.predecessor, told.successor) and _is_accepted(told, run_id)
            # Who trusts a successor follows it no further back, and nobody follows the old key elsewhere.
            if genuine and (self.succession is None or organizer == told.predecessor):
                self.decrees["succession"] = told
            return genuine
        if not _is_decreed(told, organizer, run_id):
            return False
        known = self.decrees.get(told.kind)
        if (
            known is None
            or told.revision > known.revision
            or not _is_decreed(known, organizer, run_id)  # by the old key
        ):
            self.decrees[told.kind] = told
        return True


def put_out(kick: Kick) -> str:
    """Why that peer is not let in, as a sentence without its end."""
    until = "" if kick.until is None else f" until {as_date(kick.until)}"
    return f"the organizer has put this peer out{until}{f': {kick.reason}' if kick.reason else ''}"


def permits(role: Permission, request: Request | None) -> bool:
    """Whether this role may ask that; None: take part in rounds."""
    match request:
        case None | GetInput() | GetPledges() | GetProof():
            return role == "train"
        case GetPiece():
            return role != "watch"
        case GetEntry():
            return role != "watch" or not request.with_payload
        case GetRun() | GetLineage() | GetManifest() | Redeem() | Probe() | GetMetrics() | GetEvents():
            return True
        case _:
            assert_never(request)


def signed(organizer: Identity, run_id: str, draft: D) -> D:
    """The draft with the organizer's signature in its place."""
    return draft.model_copy(update={"signature": organizer.sign(_decree(draft, run_id)).hex()})


def revoke(organizer: Identity, run_id: str, revision: int, serials: Collection[int]) -> Revocations:
    """The list that takes back these invites; the organizer numbers the lists."""
    listed, me = tuple(sorted(serials)), organizer.peer_id
    return signed(
        organizer, run_id, Revocations(peer=me, revision=revision, serials=listed, signature=UNSIGNED)
    )


def kick(organizer: Identity, run_id: str, revision: int, kicks: Sequence[Kick]) -> Kicks:
    """The list that puts out these peers; the organizer numbers the lists."""
    draft = Kicks(peer=organizer.peer_id, revision=revision, kicks=tuple(kicks), signature=UNSIGNED)
    return signed(organizer, run_id, draft)


def succeed(old: Identity, new: Identity, run_id: str, revision: int, ends: int) -> Succession:
    """`new` is the organizer's key from now on, and passes by `old` hold until then."""
    draft = Succession(
        peer=new.peer_id,
        revision=revision,
        predecessor=old.peer_id,
        successor=new.peer_id,
        ends=ends,
        signature=UNSIGNED,
        accepted=UNSIGNED,
    )
    return signed(old, run_id, draft).model_copy(update={"accepted": new.sign(_decree(draft, run_id)).hex()})


@functools.lru_cache(maxsize=MAX_PASSES)
def _forged(peer: PeerId, shown: Pass) -> str:
    if not is_signed(shown.grant, shown.signature):
        return "the invite shown is not as its organizer signed it"
    if not is_borne_by(shown, peer):
        return "the invite shown was given to another peer"
    return ""


@functools.lru_cache(maxsize=MAX_PASSES)
def _is_decreed(told: Decree, organizer: PeerId, run_id: str) -> bool:
    return verify(organizer, _decree(told, run_id), bytes.fromhex(told.signature))


def _is_accepted(told: Succession, run_id: str) -> bool:
    accepted = verify(told.successor, _decree(told, run_id), bytes.fromhex(told.accepted))
    return accepted and _is_decreed(told, told.predecessor, run_id)


def _decree(told: Decree, run_id: str) -> bytes:
    """What the organizer signs."""
    text = told.model_dump_json(exclude={"peer", "signature", "accepted"})
    return f"p2ptrain {told.kind} of {run_id}\0{text}".encode()
