"""The leader of one step: gathers reports, freezes an attempt, commits or aborts it.

    ASKING ──all answered──▶ COLLECTING ──batch full──▶ REDUCING ──all Done, one header──▶ committed
                                 ▲                         │
                                 └──────── aborted ────────┘

A leader whom the last entry appointed starts COLLECTING. One that takes over starts ASKING (I7): its
question, with a higher ballot, is a promise by each who answers to leave lower ballots alone. If anyone
applied the entry, it is committed; if all who still hold the attempt are Done on one header, it is committed
now; else it is aborted, and a new attempt follows. A leader commits only when everyone on its roster is Done
with the same header.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from p2ptrain.events import AbortCause
from p2ptrain.protocol import progress
from p2ptrain.protocol.round import Effect, Rules, Send, Waiting
from p2ptrain.protocol.spans import share_out
from p2ptrain.records import (
    Abort,
    Answer,
    Ask,
    Ballot,
    Commit,
    EntryHeader,
    Failed,
    Freeze,
    PeerId,
    Position,
    Report,
    Resync,
)


class Phase(Enum):
    ASKING = auto()
    COLLECTING = auto()
    REDUCING = auto()
    ENDED = auto()


@dataclass
class Attempt:
    """One try at the round."""

    freeze: Freeze
    deadline: float
    done: dict[PeerId, EntryHeader] = field(default_factory=dict)
    accused_by: dict[PeerId, tuple[PeerId, ...]] = field(default_factory=dict)
    cause: AbortCause = AbortCause.DEADLINE


@dataclass(frozen=True)
class _Known:
    report: Report
    at: float


class Leader:
    """Leads `position.step` for as long as nobody with a higher ballot does. See the module's diagram."""

    def __init__(self, me: PeerId, rules: Rules, position: Position, *, expected: Iterable[PeerId]) -> None:
        self.me = me
        self.rules = rules
        self.position = position
        self.phase = Phase.COLLECTING
        self.number = 0
        self.attempt: Attempt | None = None
        self.reports: dict[PeerId, _Known] = {}
        self.expected: set[PeerId] = set(expected)
        self.newcomers: set[PeerId] = set()
        self.dropped: set[PeerId] = set()
        self.digests: dict[PeerId, str] = {}
        self.attempt_seconds = 0.0
        self._hold_until = float("-inf")
        self._began = 0.0
        self._reason = ""
        self._asked: set[PeerId] = set()
        self._answers: dict[PeerId, Answer] = {}
        self._ask_deadline = float("inf")

    @property
    def ballot(self) -> Ballot:
        return Ballot(number=self.number, leader=self.me)

    def deadline(self) -> float:
        """When `tick` has something to decide."""
        match self.phase:
            case Phase.ASKING:
                return self._ask_deadline
            case Phase.REDUCING if self.attempt is not None:
                return self.attempt.deadline
            case Phase.COLLECTING if self.expected and self._hold_until > float("-inf"):
                return self._hold_until
            case _:
                return float("inf")

    def audience(self) -> set[PeerId]:
        """Whom this leader keeps posted."""
        roster = set(self.attempt.freeze.roster) if self.attempt else set()
        return (roster | set(self.reports) | self.expected | self.newcomers) - {self.me}

    # -- taking over -----------------------------------------------------------------------------------------

    def ask(self, peers: Iterable[PeerId], above: Ballot | None, now: float) -> list[Effect]:
        """Take over from whoever led with a ballot up to `above`: first hear how things stand."""
        self.phase = Phase.ASKING
        self.number = (above.number if above else 0) + 1
        self._asked = set(peers) - {self.me}
        self._answers = {}
        self._ask_deadline = now + self.rules.silence_seconds
        question = Ask(position=self.position, ballot=self.ballot)
        return [Send(peer, question) for peer in sorted(self._asked)]

    def answer(self, sender: PeerId, answer: Answer) -> None:
        """A promise came in; `settled` tells when to conclude."""
        self._answers[sender] = answer

    def settled(self) -> bool:
        return self.phase is Phase.ASKING and self._asked <= set(self._answers)

    def conclude(self, mine: Answer, now: float) -> list[Effect]:
        """All answers are in, or their time is up: commit what may have been committed, else start afresh.

        `mine` is this peer's own answer. Whoever holds an attempt has heard from its whole roster, so all of
        them had joined it; one that answers without having joined it has restarted and no longer counts.
        Answers of peers that have applied the entry never get here: the member acts on those at once.
        """
        self.phase = Phase.COLLECTING
        self._asked = set()
        self._expect(self._answers, now)
        answers = {self.me: mine, **self._answers}
        header = max((a.held for a in answers.values() if a.held), key=lambda h: h.ballot, default=None)
        if header is None:
            return self.consider(now)
        joined = {
            peer: a for peer, a in answers.items() if a.joined is not None and header.ballot <= a.joined
        }
        if all(a.held == header for a in joined.values()):
            return self._commit(header)
        undo = Abort(step=header.step, ballot=header.ballot, cause=AbortCause.LEADER_LOST.value)
        return [Send(peer, undo) for peer, a in sorted(joined.items()) if a.held == header]

    # -- collecting ------------------------------------------------------------------------------------------

    def report(self, sender: PeerId, report: Report, now: float) -> list[Effect]:
        """A member says how far it is."""
        if sender in self.dropped:
            return []  # out until the next step, however often it knocks
        if self.phase is Phase.REDUCING and self.attempt and sender not in self.attempt.freeze.roster:
            self.newcomers.add(sender)
        self.reports[sender] = _Known(report, now)
        self.expected.discard(sender)
        if report.state_digest is not None:
            self.digests[sender] = report.state_digest
            if len(set(self.digests.values())) > 1:
                return [*self._resync(now), *self.consider(now)]
        return self.consider(now)

    def _resync(self, now: float) -> list[Effect]:
        """Equal lineages show different states: those unlike the most (the leader's own word settles a tie)
        are out of this step and take the others' state."""
        votes = Counter(self.digests.values())
        believed = max(votes, key=lambda digest: (votes[digest], digest == self.digests.get(self.me), digest))
        sound = sorted(peer for peer, digest in self.digests.items() if digest == believed)
        odd = sorted(peer for peer, digest in self.digests.items() if digest != believed)
        donor = self.me if self.me in sound else sound[0]
        effects: list[Effect] = []
        if self.phase is Phase.REDUCING and self.attempt and set(odd) & set(self.attempt.freeze.roster):
            effects += self._abort(AbortCause.DIGEST_MISMATCH, odd, now)
        for peer in odd:
            del self.digests[peer]
            self.reports.pop(peer, None)
            self.expected.discard(peer)
            self.dropped.add(peer)
        order = Resync(position=self.position, state_digest=believed, donor=donor)
        return [*effects, *(Send(peer, order) for peer in odd)]

    def include(self, report: Report, now: float) -> None:
        """The leader is a member from the start, also before it has anything to report."""
        self.reports[self.me] = _Known(report, now)

    def welcome(self, newcomer: PeerId, now: float) -> None:
        """A peer will soon stand here, too. Meanwhile the members go on accumulating."""
        if self.phase is Phase.COLLECTING and newcomer not in self.reports and newcomer not in self.dropped:
            self._expect({*self.expected, newcomer}, now)

    def _expect(self, peers: Iterable[PeerId], now: float) -> None:
        """These will report within a few round trips: hold the freeze for them, but not for long. Without it,
        a leader that could fill the batch by itself would do so, and what the others have would be lost."""
        self.expected = set(peers)
        self._hold_until = now + self.rules.heartbeat_seconds

    def consider(self, now: float) -> list[Effect]:
        """Freeze, if the batch is full."""
        if self.phase is not Phase.COLLECTING:
            return []
        paces = {
            peer: progress.Pace(
                samples=known.report.samples,
                in_flight=known.report.in_flight,
                finish_at=known.at + known.report.finish_seconds,
                batch_seconds=known.report.batch_seconds,
            )
            for peer, known in self._eligible()
        }
        if self.expected and now < self._hold_until:
            return []
        match progress.decide(
            paces, len(self.expected), self.rules.target_batch_size, self.rules.min_peers, now
        ):
            case progress.Filling(reason):
                if reason == self._reason:
                    return []
                self._reason = reason
                return [Waiting(reason)]
            case progress.Full() as full:
                return self._freeze(sorted(paces), full, now)

    def _eligible(self) -> list[tuple[PeerId, _Known]]:
        """At most `max_peers` members, those that bring most first; ties by peer id."""
        ranked = sorted(
            self.reports.items(),
            key=lambda item: (-(item[1].report.samples + item[1].report.in_flight), item[0]),
        )
        return ranked[: self.rules.max_peers]

    def _freeze(self, roster: list[PeerId], full: progress.Full, now: float) -> list[Effect]:
        self.number += 1
        deadline_seconds = full.cutoff_seconds + reduce_seconds(self.rules, self.attempt_seconds)
        freeze = Freeze(
            step=self.position.step,
            parent=self.position.lineage,
            ballot=self.ballot,
            roster=tuple(roster),
            spans=share_out(self.rules.values, [1.0] * len(roster)),
            finishing=full.finishing,
            cutoff_seconds=full.cutoff_seconds,
            deadline_seconds=deadline_seconds,
        )
        # The leader gives the members time to name who is missing before it decides itself.
        self.attempt = Attempt(freeze, deadline=now + deadline_seconds + 2 * self.rules.heartbeat_seconds)
        self.phase = Phase.REDUCING
        self._reason = ""
        self._began = now
        return [Send(peer, freeze) for peer in roster]

    # -- reducing --------------------------------------------------------------------------------------------

    def done(self, sender: PeerId, header: EntryHeader, now: float) -> list[Effect]:
        """A member holds every span."""
        attempt = self.attempt
        if self.phase is not Phase.REDUCING or attempt is None or header.ballot != attempt.freeze.ballot:
            return []
        if sender not in attempt.freeze.roster:
            return []
        attempt.done[sender] = header
        if len(attempt.done) < len(attempt.freeze.roster):
            return []
        headers = Counter(held.model_dump_json() for held in attempt.done.values())
        if len(headers) == 1:
            self.attempt_seconds = now - self._began
            return self._commit(header)
        believed, _ = max(headers.items(), key=lambda item: (item[1], item[0]))
        odd = [peer for peer, held in attempt.done.items() if held.model_dump_json() != believed]
        return self._abort(AbortCause.DIGEST_MISMATCH, odd, now)

    def failed(self, sender: PeerId, failed: Failed, now: float) -> list[Effect]:
        """A member cannot finish this attempt; wait a moment for the others' testimony, then judge."""
        attempt = self.attempt
        if self.phase is not Phase.REDUCING or attempt is None or failed.ballot != attempt.freeze.ballot:
            return []
        if not attempt.accused_by:
            attempt.cause = cause_of(failed.cause)
        attempt.accused_by[sender] = tuple(peer for peer in failed.suspects if peer != sender)
        attempt.deadline = min(attempt.deadline, now + self.rules.heartbeat_seconds)
        if set(attempt.freeze.roster) <= attempt.accused_by.keys() | attempt.done.keys():
            return self.tick(now)
        return []

    def lost(self, peer: PeerId, now: float) -> list[Effect]:
        """The peer is gone, as far as this leader can tell."""
        self.expected.discard(peer)
        self.newcomers.discard(peer)
        self.reports.pop(peer, None)
        self._asked.discard(peer)
        attempt = self.attempt
        if self.phase is Phase.REDUCING and attempt and peer in attempt.freeze.roster:
            if peer in attempt.done:
                return []  # it holds every span; whoever misses one of its chunks will say so
            return self._abort(AbortCause.PEER_LOST, [peer], now)
        return self.consider(now)

    def tick(self, now: float) -> list[Effect]:
        """Whatever was due has not come."""
        if self.phase is Phase.COLLECTING and now >= self._hold_until:
            self._hold_until = float("-inf")
            return self.consider(now)
        attempt = self.attempt
        if self.phase is not Phase.REDUCING or attempt is None:
            return []
        silent = set(attempt.freeze.roster) - attempt.done.keys() - attempt.accused_by.keys() - {self.me}
        if not attempt.accused_by:
            return self._abort(AbortCause.DEADLINE, silent, now)
        # Nobody is dropped for being accused by peers that are themselves silent or by a single grudge when
        # others accuse somebody else more: one broken link costs one peer, not two.
        return self._abort(attempt.cause, silent or blame(attempt.accused_by, self.me), now)

    def again(self, peer: PeerId) -> list[Effect]:
        """The link to a member was reset: repeat what it may have missed."""
        if self.phase is Phase.REDUCING and self.attempt and peer in self.attempt.freeze.roster:
            return [Send(peer, self.attempt.freeze)]
        if self.phase is Phase.ASKING and peer in self._asked and peer not in self._answers:
            return [Send(peer, Ask(position=self.position, ballot=self.ballot))]
        return []

    def _abort(self, cause: AbortCause, dropped: Iterable[PeerId], now: float) -> list[Effect]:
        assert self.attempt is not None
        freeze = self.attempt.freeze
        gone = sorted(set(dropped) - {self.me})
        self.dropped |= set(gone)
        self.attempt = None
        self.phase = Phase.COLLECTING
        # Those that remain answer the abort with a fresh report; the next attempt stands on these, not on old
        # ones.
        remaining = (set(self.reports) | set(freeze.roster)) - self.dropped
        self._expect((self.expected | remaining) - self.dropped, now)
        self.reports = {}
        abort = Abort(step=freeze.step, ballot=freeze.ballot, cause=cause.value, dropped=tuple(gone))
        return [Send(peer, abort) for peer in freeze.roster]

    def _commit(self, header: EntryHeader) -> list[Effect]:
        self.phase = Phase.ENDED
        commit = Commit(header=header, newcomers=tuple(sorted(self.newcomers)))
        # The leader itself comes last: what it applies, it has first told the others.
        others = sorted((set(header.roster) | self.audience()) - {self.me})
        return [Send(peer, commit) for peer in (*others, self.me)]


def reduce_seconds(rules: Rules, measured_seconds: float) -> float:
    """How long an attempt may take: four times the last one, or what a 2 Mbit/s link needs; never less than
    silence.

    An fp32 value is 4 bytes each way, hence the 32 bits.
    """
    slowest = 2 * rules.values * 32 / 2e6
    return max(rules.silence_seconds, 4 * measured_seconds if measured_seconds else slowest)


def cause_of(text: str) -> AbortCause:
    """A member's stated cause; what it does not know how to name is a bad chunk."""
    try:
        return AbortCause(text)
    except ValueError:
        return AbortCause.BAD_CHUNK


def blame(accused_by: dict[PeerId, tuple[PeerId, ...]], me: PeerId) -> list[PeerId]:
    """Whom to drop: everyone whom a majority of the accusers names, else the one named most; never the
    judge."""
    votes = Counter(suspect for suspects in accused_by.values() for suspect in set(suspects))
    votes.pop(me, None)
    if not votes:
        return []
    by_majority = [peer for peer, count in votes.items() if 2 * count > len(accused_by) and count > 1]
    most = max(votes.items(), key=lambda item: (item[1], item[0]))[0]
    return sorted(by_majority) or [most]
