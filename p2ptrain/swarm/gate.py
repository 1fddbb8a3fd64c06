"""Who is let in: every peer asks this of every other, before anything but a greeting is said.

A peer trusts one organizer, the one whose key is in its own invite, and checks by that key alone: no server
is asked. What another peer shows is bound to its peer id, which the transport has authenticated, so a pass
that was overheard or handed on is void. An invite that ends, by its date or by being revoked, ends for
whoever came by it, too.

Not covered: a peer that has never heard of a revocation lets its bearer in until it does; and whoever has the
line of an invite can come by it, under as many peer ids as they like.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Collection
from typing import assert_never

from p2ptrain.events import short
from p2ptrain.records import (
    GetEntry,
    GetLineage,
    GetManifest,
    GetPiece,
    GetRun,
    Pass,
    PeerId,
    Permission,
    Request,
    Revocations,
)
from p2ptrain.swarm.access import Invite, ended, is_borne_by, is_signed
from p2ptrain.swarm.identity import Identity, verify

MAX_PASSES = 2048
"""Whose signatures are remembered: a peer shows its pass on every stream."""


class Gate:
    """One peer's judgement of whoever knocks. It learns of revocations, and forgets none."""

    def __init__(self, invite: Invite, me: PeerId, clock: Callable[[], float] = time.time) -> None:
        """`me`: who came by this invite. `clock`: seconds since 1970."""
        self.own = invite.shown_by(me)
        self.revocations: Revocations | None = None
        """The newest list that came by, as the organizer signed it."""
        self._me = me
        self._clock = clock

    def flaw(self, peer: PeerId, shown: Pass | None, *, any_run: bool = False) -> str:
        """Why this peer, showing this, is not let in, as a sentence without its end; empty if it is.

        `any_run`: let in whoever the organizer has invited to any run.
        """
        if shown is None:
            return "no invite was shown"
        ours, grant = self.own.grant, shown.grant
        if grant.organizer != ours.organizer:
            theirs = short(grant.organizer)
            return f"the invite shown is by organizer {theirs} and not by {short(ours.organizer)}"
        if forged := _forged(peer, shown):
            return forged
        which = f"the invite shown (number {grant.serial})"
        if not any_run and grant.run_digest != ours.run_digest:
            return f"{which} is to run {grant.run_digest[:12]}… and not to {ours.run_digest[:12]}…"
        if self.revocations is not None and grant.serial in self.revocations.serials:
            return f"{which} has been revoked by the organizer"
        if late := ended(grant, self._clock()):
            return f"{which} {late}"
        return ""

    def own_flaw(self) -> str:
        """Why others do not let us in any more; empty if they do, as far as we know."""
        return self.flaw(self._me, self.own)

    def learn(self, told: Revocations) -> bool:
        """Heed this list if the organizer signed it and none newer is known; whether the organizer did."""
        if not _is_of_organizer(told, self.own.grant.organizer):
            return False
        if self.revocations is None or told.revision > self.revocations.revision:
            self.revocations = told
        return True


def permits(role: Permission, request: Request | None) -> bool:
    """Whether this role may ask that; None: take part in rounds."""
    match request:
        case None:
            return role == "train"
        case GetPiece():
            return role != "watch"
        case GetEntry():
            return role != "watch" or not request.with_payload
        case GetRun() | GetLineage() | GetManifest():
            return True
        case _:
            assert_never(request)


def revoke(organizer: Identity, revision: int, serials: Collection[int]) -> Revocations:
    """The list that takes back these invites; the organizer numbers the lists."""
    listed = tuple(sorted(serials))
    signature = organizer.sign(_decree(revision, listed)).hex()
    return Revocations(peer=organizer.peer_id, revision=revision, serials=listed, signature=signature)


@functools.lru_cache(maxsize=MAX_PASSES)
def _forged(peer: PeerId, shown: Pass) -> str:
    if not is_signed(shown.grant, shown.signature):
        return "the invite shown is not as its organizer signed it"
    if not is_borne_by(shown, peer):
        return "the invite shown was given to another peer"
    return ""


@functools.lru_cache(maxsize=MAX_PASSES)
def _is_of_organizer(told: Revocations, organizer: PeerId) -> bool:
    return verify(organizer, _decree(told.revision, told.serials), bytes.fromhex(told.signature))


def _decree(revision: int, serials: tuple[int, ...]) -> bytes:
    return b"p2ptrain revocations\0" + json.dumps([revision, *serials]).encode()
