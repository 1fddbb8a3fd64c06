"""What other peers did, as this one saw it: told as it happens, and remembered for when they are left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import assert_never

from p2ptrain import events
from p2ptrain.allreduce import Faulted, Gone
from p2ptrain.court import Convicted
from p2ptrain.gradients.likeness import StoodOut
from p2ptrain.protocol.round import Benched, Distrusted, Diverged
from p2ptrain.records import PeerId
from p2ptrain.training.hands import now

MAX_HELD_AGAINST = 1024
"""Peers of whom it is known what they did last."""

Noted = Diverged | Faulted | Distrusted | Benched | Convicted | StoodOut | Gone
"""What a round may note about others."""


class Conduct:
    """Who is left out, and why. It decides nothing: that is for `Member` and the court."""

    def __init__(self, observe: Callable[[events.Event], None]) -> None:
        self._observe = observe
        self._held_against: dict[PeerId, str] = {}
        self._left_out: dict[PeerId, tuple[float, str]] = {}

    @property
    def left_out(self) -> dict[PeerId, str]:
        """Whom this peer does not hear at present, and why."""
        return {peer: reason for peer, (until, reason) in self._left_out.items() if until > now()}

    def noted(self, note: Noted, step: int) -> None:
        """A round, on the way to the step after this one, noted that."""
        match note:
            case Diverged(at, ours, theirs):
                self._observe(events.ReplicaDiverged(step=at, ours=ours, theirs=theirs))
            case Faulted(suspects, cause, detail):
                late = cause is events.AbortCause.DEADLINE
                for peer in suspects:
                    self._faulted(peer, detail, bad=not late)
                    self.hold_against(peer, detail)
            case Distrusted(peer, reason):
                self.hold_against(peer, reason)
                self._faulted(peer, reason, bad=True)
            case Benched(peer, offences, seconds):
                reason = self._held_against.pop(peer, "it sent what cannot be")
                self._leave_out(peer, seconds, reason)
                self._observe(
                    events.PeerBenched(peer=peer, offences=offences, seconds=seconds, reason=reason)
                )
            case Convicted(peer, at, reason=reason):
                if not note.again:
                    self._leave_out(peer, math.inf, reason)
                    self._observe(events.PeerConvicted(step=at, peer=peer, reason=reason))
            case StoodOut(peer, rounds):
                self._observe(events.PeerStoodOut(step=step, peer=peer, rounds=rounds))
            case Gone(peer):
                self._faulted(peer, "", bad=False)
            case _:
                assert_never(note)

    def gave_badly(self, donor: PeerId, detail: str, *, bad: bool) -> None:
        """What a donor gave was bad, or it gave nothing."""
        self._faulted(donor, detail, bad=bad)
        if bad:
            self.hold_against(donor, detail)

    def hold_against(self, peer: PeerId, reason: str) -> None:
        """For the day on which it is left out."""
        if len(self._held_against) >= MAX_HELD_AGAINST:
            self._held_against.clear()
        self._held_against[peer] = reason

    def _faulted(self, peer: PeerId, detail: str, *, bad: bool) -> None:
        cause = events.FaultCause.BAD_MESSAGE if bad else events.FaultCause.UNREACHABLE
        self._observe(events.PeerFaulted(peer=peer, cause=cause, detail=detail))

    def _leave_out(self, peer: PeerId, seconds: float, reason: str) -> None:
        self._left_out = {each: held for each, held in self._left_out.items() if held[0] > now()}
        self._left_out[peer] = now() + seconds, reason
