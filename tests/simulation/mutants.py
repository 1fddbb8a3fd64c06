"""Protocols that break the rules, each in one way: the proof that the harness would notice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from p2ptrain.protocol.audit import Draw
from p2ptrain.protocol.leader import Leader
from p2ptrain.protocol.ledger import START, Leases
from p2ptrain.protocol.member import Member, Stage
from p2ptrain.protocol.reduction import Reduction
from p2ptrain.protocol.round import Apply, Cancel, Effect
from p2ptrain.records import Ask, Averaged, Call, Chunk, Done, EntryHeader, Message, PeerId, Position


class CommitsTooSoon(Member):
    """Commits, as a leader, as soon as the first member is Done."""

    def _receive(self, sender: PeerId, message: Message, now: float) -> list[Effect]:
        attempt = self.leader.attempt if self.leader is not None else None
        if attempt is not None and isinstance(message, Done):
            for peer in attempt.freeze.roster if message.ballot == attempt.freeze.ballot else ():
                attempt.done.setdefault(peer, message.position)
        return super()._receive(sender, message, now)


class StepsAlone(Member):
    """Applies what it holds, without waiting for the commit."""

    def held(self, header: EntryHeader, reduce_seconds: float, now: float) -> list[Effect]:
        effects = super().held(header, reduce_seconds, now)
        if self.stage is Stage.HELD and not any(isinstance(effect, Apply) for effect in effects):
            self.stage = Stage.OUTSIDE
            effects.append(Apply(header, ()))
        return effects


class BreaksItsPromise(Member):
    """Tells a successor that it does not hold the entry, and goes on receiving it for the old leader."""

    def _on_ask(self, sender: PeerId, ask: Ask, now: float) -> list[Effect]:
        stage, freeze = self.stage, self.freeze
        effects = super()._on_ask(sender, ask, now)
        if stage is Stage.REDUCING and self.stage is Stage.ACCUMULATING and freeze is not None:
            self.stage, self.freeze, self.following = stage, freeze, freeze.ballot.leader
            effects = [effect for effect in effects if not isinstance(effect, Cancel)]
        return effects


class ObeysAnyBallot(Member):
    """Joins an attempt also after it has promised a higher ballot, and counts itself out of none."""

    def _on_call(self, sender: PeerId, call: Call, now: float) -> list[Effect]:
        if self.ballot is not None and call.ballot < self.ballot:
            self.ballot = None
        return super()._on_call(sender, call, now)


class AsksNobody(Member):
    """Takes over without hearing how things stand."""

    def _take_over(self, now: float, *, quietly: bool = False) -> list[Effect]:
        effects = super()._take_over(now, quietly=quietly)
        return [*effects, *self._conclude(now)] if self.leader is not None else effects


class MindsNoSilence(Member):
    """Waits for ever for a machine whose connection stands and that says nothing."""

    def _notice_silence(self, now: float) -> list[Effect]:
        return []


class LooksForNobody(Member):
    """Never asks the peers that the DHT shows."""

    def informed(self, present: Mapping[PeerId, Position], now: float) -> list[Effect]:
        return []


class CountsNobody(Member):
    """Leads without a majority also where the run asks for one."""

    def _new_leader(self, expected: Iterable[PeerId]) -> Leader:
        leader = super()._new_leader(expected)
        leader.electorate = frozenset()
        return leader


class ForgetsWhatWasTaken(Member):
    """Leases as if no sample had been taken yet."""

    def leases(self, leader: PeerId | None = None) -> Leases | None:
        leases = super().leases(leader)
        return None if leases is None else replace(leases, data=START)


class LeasesToNewcomers(Member):
    """Gives peers that are on no roster the lease of somebody who is."""

    def leases(self, leader: PeerId | None = None) -> Leases | None:
        leases = super().leases(leader)
        if leases is None or self.me in leases.holders:
            return leases
        return replace(leases, holders=(self.me, *leases.holders[1:]))


def audits_nothing(*_: object) -> list[Draw]:
    """A draw that draws nobody: audits are off, and nobody notices."""
    return []


class MindsNoVoid(Member):
    """Goes to whatever weighs more, also back onto a lie that it has just undone."""

    def undo(self, step: int, void: Iterable[str]) -> list[Effect]:
        return super().undo(step, ())


class ForgetsConvicts(Member):
    """Hears who is proven to lie as it hears everybody."""

    def convicted(self, peer: PeerId, now: float) -> list[Effect]:
        return []


class BelievesAnyChunk(Reduction):
    """A reducer that checks nothing of what a member sends."""

    def accept(self, sender: PeerId, chunk: Chunk) -> bool:
        honest = chunk.model_copy(update={"number": chunk.number % max(self.chunks[self.rank], 1)})
        self._samples[self._rank(sender)] = chunk.samples
        return super().accept(sender, honest)


class BelievesAnyMean(Reduction):
    """A receiver that takes a mean for whatever roster and place it names."""

    def receive(self, reducer: PeerId, averaged: Averaged) -> bool:
        got = self._averaged[self._rank(reducer)]
        self._missing -= averaged.number not in got
        got.add(averaged.number)
        self._counts = averaged.samples, averaged.skipped
        return True


class AddsAsItComes(Reduction):
    """A reducer that adds in an order of its own and not in the roster's."""

    def contributors(self) -> list[int]:
        ranks = super().contributors()
        return ranks[self.rank % len(ranks) :] + ranks[: self.rank % len(ranks)] if ranks else ranks
