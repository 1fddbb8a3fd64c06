"""The leader of one step: gathers reports, freezes an attempt, commits or aborts it.

    ASKING ──all answered──▶ COLLECTING ──batch full──▶ REDUCING ──all Done, one header──▶ committed
                                 ▲                         │
                                 └──────── aborted ────────┘

A leader whom the last entry appointed starts COLLECTING. One that takes over starts ASKING (I7): its
question, with a higher ballot, is a promise by each who answers to leave lower ballots alone. If anyone
applied the entry, it is committed; if all who still hold the attempt are Done on one header, it is committed
now; else it is aborted, and a new attempt follows. A leader commits only when everyone on its roster is Done
with the same header: each names where that leads, and a lineage binds the header it ends with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from math import inf

from p2ptrain.events import AbortCause
from p2ptrain.protocol import progress
from p2ptrain.protocol.deadlines import Deadlines
from p2ptrain.protocol.roster import call_for
from p2ptrain.protocol.round import Distrusted, Effect, Rules, Send, Waiting
from p2ptrain.protocol.spans import levels, share_out, shares
from p2ptrain.protocol.speeds import Speeds
from p2ptrain.protocol.terms import most_samples
from p2ptrain.records import (
    Abort,
    Answer,
    Ask,
    Ballot,
    Call,
    Commit,
    Done,
    EntryHeader,
    Failed,
    Freeze,
    PeerId,
    Position,
    Report,
    Resync,
    Terms,
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
    incarnations: dict[PeerId, str]
    """Whom of each member it counts on: a later one brings other samples."""
    calls: dict[PeerId, Call]
    deadline: float
    done: dict[PeerId, Position] = field(default_factory=dict)
    accused_by: dict[PeerId, tuple[PeerId, ...]] = field(default_factory=dict)
    cause: AbortCause = AbortCause.DEADLINE


@dataclass(frozen=True)
class _Known:
    report: Report
    at: float

    @cached_property
    def pace(self) -> progress.Pace:
        return progress.Pace(
            samples=self.report.samples,
            in_flight=self.report.in_flight,
            finish_at=self.at + self.report.finish_seconds,
            batch_seconds=self.report.batch_seconds,
        )


class Leader:
    """Leads `position.step` for as long as nobody with a higher ballot does. See the module's diagram."""

    def __init__(
        self,
        me: PeerId,
        rules: Rules,
        position: Position,
        last: EntryHeader | None,
        deadlines: Deadlines,
        *,
        expected: Iterable[PeerId],
        terms: Terms | None = None,
        lease_size: int = 0,
        speeds: Speeds | None = None,
        began: float = 0.0,
    ) -> None:
        """`last` is the entry that led to `position`: under a majority's rule its roster has the say.
        `terms`: what its entry shall be applied under; the rules are those of this step already.
        `lease_size`: samples in each lease, where they are leased. `speeds`: what members have brought so
        far, if that is known, and `began` when this step did."""
        self.me = me
        self.rules = rules
        self.terms = terms
        self.position = position
        self.last = last
        self.lessees = frozenset(last.roster if last is not None else ())
        """Who has a lease, where samples are leased, besides this leader."""
        self.lease_size = lease_size
        self.electorate = frozenset(last.roster if last is not None and rules.quorum == "majority" else ())
        self.phase = Phase.COLLECTING
        self.number = 0
        self.attempt: Attempt | None = None
        self.reports: dict[PeerId, _Known] = {}
        self.expected: set[PeerId] = set(expected)
        self.newcomers: set[PeerId] = set()
        self.dropped: set[PeerId] = set()
        self.digests: dict[PeerId, str] = {}
        self._most_samples = most_samples(rules, terms)
        self._deadlines = deadlines
        self._speeds, self._began = speeds or Speeds(), began
        self._counts_from = inf
        """When the next of the claims counts that cannot be true yet."""
        self._hold_until = -inf
        self._reason = ""
        self._first = self.ballot
        self._aborted: dict[Ballot, Abort] = {}
        self._asked: set[PeerId] = set()
        self._answers: dict[PeerId, Answer] = {}
        self._ask_deadline = inf

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
            case Phase.COLLECTING if self.expected and self._hold_until > -inf:
                return min(self._hold_until, self._counts_from)
            case Phase.COLLECTING:
                return self._counts_from
            case _:
                return inf

    def audience(self) -> set[PeerId]:
        """Whom this leader keeps posted."""
        roster = set(self.attempt.freeze.roster) if self.attempt else set()
        return (roster | set(self.reports) | self.expected | self.newcomers) - {self.me}

    @property
    def asked(self) -> set[PeerId]:
        """From whom an answer is due."""
        return self._asked - self._answers.keys() if self.phase is Phase.ASKING else set()

    def superseded_by(self, ballot: Ballot) -> bool:
        """Whether somebody else has taken over since this leader began."""
        return ballot.leader != self.me and self._first < ballot

    def quorate(self, peers: Iterable[PeerId]) -> bool:
        """Whether these may decide: more than half of the last roster, where the run asks for it."""
        return not self.electorate or 2 * len(self.electorate & set(peers)) > len(self.electorate)

    def stood_still(self, now: float) -> None:
        """What was due while this process did nothing may have come: look before judging."""
        self._ask_deadline = max(self._ask_deadline, now + self.rules.heartbeat_seconds)
        if self.attempt is not None:
            self.attempt.deadline = max(self.attempt.deadline, now + self.rules.heartbeat_seconds)

    # -- taking over -----------------------------------------------------------------------------------------

    def ask(self, peers: Iterable[PeerId], above: Ballot | None, now: float) -> list[Effect]:
        """Take over from whoever led with a ballot up to `above`: first hear how things stand."""
        self.phase = Phase.ASKING
        self.number = (above.number if above else 0) + 1
        self._first = self.ballot
        self._asked = set(peers) - {self.me}
        self._answers = {}
        self._ask_deadline = now + self._deadlines.silence_seconds(self._asked)
        question = Ask(position=self.position, ballot=self.ballot)
        return [Send(peer, question) for peer in sorted(self._asked)]

    def answer(self, sender: PeerId, answer: Answer) -> None:
        """A promise came in; `settled` tells when to conclude."""
        self._answers[sender] = answer

    def settled(self) -> bool:
        return (
            self.phase is Phase.ASKING
            and self._asked <= set(self._answers)
            and self.quorate({self.me, *self._answers})
        )

    def conclude(self, mine: Answer, members: Iterable[PeerId], now: float) -> list[Effect]:
        """All answers are in, or their time is up: commit what may have been committed, else start afresh.

        `mine` is this peer's own answer, `members` are those of the attempt that it holds. Whoever holds an
        attempt has heard from its whole roster, so all of them had joined it; one that answers without having
        joined it has restarted and no longer counts.
        Answers of peers that have applied the entry never get here: the member acts on those at once.
        """
        if not self.quorate(here := {self.me, *self._answers}):
            self._ask_deadline = now + self._deadlines.silence_seconds(self.electorate)
            silent = (self._asked | self.electorate) - here
            again = [effect for peer in sorted(silent) for effect in self.again(peer)]
            return [*again, *self._wait(self._short_of(here))]
        self.phase = Phase.COLLECTING
        asked, self._asked = self._asked, set()
        self._expect(self._answers, now)
        answers = {self.me: mine, **self._answers}
        ballots = [a.joined for a in answers.values() if a.joined is not None and a.held is not None]
        if not ballots:
            return self.consider(now)
        ballot = max(ballots)
        joined = {peer: a for peer, a in answers.items() if a.joined is not None and ballot <= a.joined}
        held = {peer: a.held for peer, a in joined.items() if a.joined == ballot and a.held is not None}
        if len(held) == len(joined) and len(set(held.values())) == 1:
            return self._commit(next(iter(held.values())), asked | set(members))
        undo = Abort(step=self.position.step, ballot=ballot, cause=AbortCause.LEADER_LOST.value)
        return [Send(peer, undo) for peer in sorted(held)]

    def holders(self, position: Position) -> list[PeerId]:
        """Who has told this leader that it holds what leads there."""
        told = {peer: answer.held for peer, answer in self._answers.items()}
        done = self.attempt.done if self.attempt is not None else {}
        return sorted(peer for peer, held in {**told, **done}.items() if held == position)

    # -- collecting ------------------------------------------------------------------------------------------

    def report(self, sender: PeerId, report: Report, now: float) -> list[Effect]:
        """A member says how far it is."""
        if sender in self.dropped:
            return []  # out until the next step, however often it knocks
        if report.samples + report.in_flight > self._most_samples:
            return self._distrust(sender, report, now)
        if self.rules.leased and sender not in self.lessees | {self.me}:
            # It may have led before, and holds what it has of that lease for its own.
            report = report.model_copy(update={"samples": 0, "in_flight": 0})
        if self.phase is Phase.REDUCING and self.attempt:
            freeze = self.attempt.freeze
            if sender not in freeze.roster:
                self.newcomers.add(sender)
            elif report.incarnation != self.attempt.incarnations[sender]:
                # It has restarted: what it brought and held is gone, unless it was Done.
                if sender not in self.attempt.done:
                    return [*self._abort(AbortCause.PEER_LOST, (), now), *self.report(sender, report, now)]
                self.newcomers.add(sender)
        self.reports[sender] = _Known(report, now)
        self.expected.discard(sender)
        if report.state_digest is not None:
            self.digests[sender] = report.state_digest
            if len(set(self.digests.values())) > 1:
                return [*self._resync(now), *self.consider(now)]
        return self.consider(now)

    def _distrust(self, sender: PeerId, report: Report, now: float) -> list[Effect]:
        """A claim that would fill the batch at once, and own the average."""
        reason = (
            f"it reports {report.samples} samples and {report.in_flight} in flight; "
            f"a peer brings at most {self._most_samples} to a step"
        )
        self.dropped.add(sender)
        self.reports.pop(sender, None)
        self.expected.discard(sender)
        return [Distrusted(sender, reason), *self.consider(now)]

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
        self._counts_from = inf
        if self.expected and now < self._hold_until:
            return []
        paces = {peer: known.pace for peer, known in self._eligible(now)}
        if len(paces) < self.rules.min_peers or not self.quorate(paces):
            self.dropped.clear()  # without them there would be no step at all
        if not self.quorate(paces):
            return self._wait(self._short_of(paces))
        target = self.rules.target_batch_size
        if self.rules.leased and not self.lessees & paces.keys():
            target = 1  # nobody but the leader has a lease: whatever it has makes an entry that gives all one
        elif self.lease_size:
            # The target may have grown since these leases were made.
            holders = (self.lessees | {self.me}) & (paces.keys() | self.expected)
            target = min(target, self.lease_size * len(holders))
        match progress.decide(paces, len(self.expected), target, self.rules.min_peers, now):
            case progress.Filling(reason):
                return self._wait(reason)
            case progress.Full() as full:
                return self._freeze(sorted(paces), full, now)

    def _wait(self, reason: str) -> list[Effect]:
        if reason == self._reason:
            return []
        self._reason = reason
        return [Waiting(reason)]

    def _short_of(self, peers: Iterable[PeerId]) -> str:
        size = len(self.electorate)
        here = len(self.electorate & set(peers))
        return f"{here} of the last round's {size} peers are here, and the quorum is {size // 2 + 1}"

    def _eligible(self, now: float) -> list[tuple[PeerId, _Known]]:
        """At most `max_peers` members: those that have the say first, then those that bring most; ties by
        peer id. Not those who claim more than they can have computed by now, until they can."""
        reports = {}
        for peer, known in self.reports.items():
            claim = known.report.samples + known.report.in_flight
            at = self._speeds.counts_from(peer, claim, self._began) if peer != self.me else now
            if at <= now:
                reports[peer] = known
            else:
                self._counts_from = min(self._counts_from, at)
        if len(reports) <= self.rules.max_peers:
            return list(reports.items())
        ranked = sorted(
            reports.items(),
            key=lambda item: (
                item[0] not in self.electorate,
                -(item[1].report.samples + item[1].report.in_flight),
                item[0],
            ),
        )
        return ranked[: self.rules.max_peers]

    def _freeze(self, roster: list[PeerId], full: progress.Full, now: float) -> list[Effect]:
        self.number += 1
        deadline_seconds = full.cutoff_seconds + self._deadlines.reduce_seconds(len(roster))
        reports = [self.reports[peer].report for peer in roster]
        paces = levels([report.rate if report.reduces else None for report in reports])
        freeze = Freeze(
            step=self.position.step,
            parent=self.position.lineage,
            ballot=self.ballot,
            roster=tuple(roster),
            spans=share_out(self.rules.values, shares(paces)),
            finishing=full.finishing,
            cutoff_seconds=full.cutoff_seconds,
            deadline_seconds=deadline_seconds,
            terms=self.terms,
        )
        incarnations = {peer: self.reports[peer].report.incarnation for peer in roster}
        calls = {
            peer: call_for(peer, freeze, paces, incarnation, self.last)
            for peer, incarnation in incarnations.items()
        }
        # The leader gives the members time to name who is missing before it decides itself.
        deadline = now + deadline_seconds + 2 * self.rules.heartbeat_seconds
        self.attempt = Attempt(freeze, incarnations, calls, deadline)
        self.phase = Phase.REDUCING
        self._reason = ""
        return [Send(peer, call) for peer, call in calls.items()]

    # -- reducing --------------------------------------------------------------------------------------------

    def done(self, sender: PeerId, done: Done, now: float) -> list[Effect]:
        """A member holds every span."""
        attempt = self.attempt
        if self.phase is not Phase.REDUCING or attempt is None or done.ballot != attempt.freeze.ballot:
            return self._repeat_abort(sender, done.ballot)
        if sender not in attempt.incarnations:
            return []
        attempt.done[sender] = done.position
        if len(attempt.done) < len(attempt.freeze.roster):
            return []
        votes = Counter(attempt.done.values())
        if len(votes) == 1:
            return self._commit(done.position, attempt.freeze.roster)
        believed, _ = max(votes.items(), key=lambda item: (item[1], item[0].lineage, item[0].weight))
        odd = [peer for peer, held in attempt.done.items() if held != believed]
        return self._abort(AbortCause.DIGEST_MISMATCH, odd, now)

    def failed(self, sender: PeerId, failed: Failed, now: float) -> list[Effect]:
        """A member cannot finish this attempt; wait a moment for the others' testimony, then judge."""
        attempt = self.attempt
        if self.phase is not Phase.REDUCING or attempt is None or failed.ballot != attempt.freeze.ballot:
            return self._repeat_abort(sender, failed.ballot)
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
        if self.phase is Phase.COLLECTING:
            if now >= self._hold_until:
                self._hold_until = -inf
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
            return [Send(peer, self.attempt.calls[peer])]
        if self.phase is Phase.ASKING and peer in (self._asked | self.electorate) - self._answers.keys():
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
        self._aborted[freeze.ballot] = abort
        return [Send(peer, abort) for peer in freeze.roster]

    def _repeat_abort(self, sender: PeerId, ballot: Ballot) -> list[Effect]:
        """Who still speaks of an attempt that is over has not heard of its end."""
        abort = self._aborted.get(ballot)
        return [Send(sender, abort)] if abort is not None and self.phase is not Phase.ENDED else []

    def _commit(self, position: Position, members: Iterable[PeerId]) -> list[Effect]:
        self.phase = Phase.ENDED
        commit = Commit(position=position, newcomers=tuple(sorted(self.newcomers)))
        # The leader itself comes last: what it applies, it has first told the others.
        others = sorted((set(members) | self.audience()) - {self.me})
        return [Send(peer, commit) for peer in (*others, self.me)]


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
