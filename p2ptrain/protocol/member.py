"""One peer in the swarm: follows a leader, joins attempts, and steps in when the leader is gone.

    OUTSIDE ──advance──▶ ACCUMULATING ──freeze──▶ REDUCING ──every span here──▶ HELD ──commit──▶ OUTSIDE
                              ▲                      │                           │
                              └───────abort──────────┴───────────────────────────┘

A ballot orders attempts: a member obeys the highest it has joined or promised and answers a lower one with
it. Who has promised a successor joins nothing of an earlier leader until that one has asked, too. The
swarm being elsewhere (a later step, a heavier lineage) ends every phase with `CatchUp`; the machine is then
OUTSIDE, takes part in nothing, and comes back with `advance`. So it is after `withdraw`, by which a peer that
is paused or leaves has the others go on at once: to them it is gone until it reports again.

Not covered: whether what a peer claims is true. A position that no donor can prove is the rim's to discover.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from enum import Enum, auto
from math import inf
from typing import assert_never

from p2ptrain.events import AbortCause
from p2ptrain.protocol.deadlines import Deadlines
from p2ptrain.protocol.leader import Leader, Phase, cause_of
from p2ptrain.protocol.ledger import Leases, leases
from p2ptrain.protocol.lineage import advance, heavier
from p2ptrain.protocol.roster import freeze_of, leader_order
from p2ptrain.protocol.round import (
    Apply,
    Begin,
    Benched,
    Cancel,
    CatchUp,
    Distrusted,
    Diverged,
    Effect,
    Rules,
    Send,
    TookOver,
)
from p2ptrain.protocol.speeds import Speeds
from p2ptrain.protocol.terms import newest, revision, rules_at
from p2ptrain.records import (
    Abort,
    Accusation,
    Answer,
    Ask,
    Ballot,
    Call,
    Commit,
    Done,
    EntryHeader,
    Failed,
    Freeze,
    Message,
    PeerId,
    Position,
    Report,
    Resync,
    Terms,
    Withdraw,
)

MAX_KNOWN = 1024
"""Peers one machine keeps in mind; more are not believed."""

MAX_PASSED = 10_000
MAX_UNHELPFUL = 5
RATES_KEPT, SUDDENLY_SLOW = 4, 0.25
"""A peer sends as fast as it was last seen to, in so many rounds: in some its link was not full. But below
that share of it, the link has changed."""
OFFENCES_FORGIVEN = 2
"""A bit may flip, and a peer may restart in the middle of something."""
BENCH_SECONDS = 120.0
BENCH_MOST_SECONDS = 3600.0
"""The bench for the third offence, and for the eighth and later ones; in between it doubles."""
CONVICTED_SECONDS = 30 * 86_400.0
"""For a proven lie; a process hardly ever lives longer."""
CONTRACT = frozenset({AbortCause.BAD_CHUNK, AbortCause.NONFINITE})
"""Causes that somebody is to blame for, beyond being late or gone."""
WELCOME_STEPS = 20
"""A newcomer that missed its first round is waited for again after so many steps."""


class Stage(Enum):
    OUTSIDE = auto()
    ACCUMULATING = auto()
    REDUCING = auto()
    HELD = auto()


class Member:
    """The state machine of one peer. Every method returns the effects to carry out, in order."""

    def __init__(
        self, me: PeerId, incarnation: str, rules: Rules, *, reduces: bool = True, most_rate: float = 0.0
    ) -> None:
        """`reduces`: whether this peer adds up others' gradients, too; `most_rate`: bytes per second that its
        owner lets it send and receive, 0 for no limit."""
        self.me = me
        self.rules = rules
        self.reduces = reduces
        self.terms: Terms | None = None
        """The newest that this peer has heard of, whatever those of the last entry are."""
        self._most_rate = most_rate
        self._process = incarnation
        self._arrivals = 0
        self.stage = Stage.OUTSIDE
        self.withdrawn = False
        """OUTSIDE by its own wish, and all have been told."""
        self.position: Position | None = None
        self.last: EntryHeader | None = None
        self.passed: dict[int, str] = {}
        """Lineages of the last steps, to tell a peer that is merely behind from one on another lineage."""
        self.leader: Leader | None = None
        self.order: tuple[PeerId, ...] = ()
        self.following: PeerId = me
        self.ballot: Ballot | None = None
        self.joined: Ballot | None = None
        self.freeze: Freeze | None = None
        self.held_header: EntryHeader | None = None
        self.held_position: Position | None = None
        """Where that header leads."""
        self.deadlines = Deadlines(rules)
        self.heard: dict[PeerId, float] = {}
        self._late: set[PeerId] = set()
        self.lost: set[PeerId] = set()
        self.known: dict[PeerId, Position] = {}
        self._report: Report | None = None
        self._rates: deque[float] = deque(maxlen=RATES_KEPT)
        self._early: dict[PeerId, Report] = {}
        self._welcomed: dict[PeerId, int] = {}
        self._led = 0
        """The last ballot number that it has called to a freeze by, where it stands: none may have two."""
        self._speeds = Speeds()
        self._began: float | None = None
        """When it came to where it stands."""
        self._unhelpful: Counter[PeerId] = Counter()
        self._offences: Counter[PeerId] = Counter()
        self._benched: dict[PeerId, float] = {}
        self._unanswered: set[PeerId] = set()
        self._void: set[str] = set()
        """Lineages with an entry in them that is proven to be a lie: they have no weight."""
        self._beat_at = inf

    @property
    def incarnation(self) -> str:
        """Another one after each start and each catch-up: what was held before, this peer has dropped."""
        return f"{self._process}.{self._arrivals}"

    @property
    def next_terms(self) -> Terms | None:
        """Under which the next entry would be applied, if this peer led it."""
        return newest(self.terms, self.last.terms if self.last is not None else None)

    @property
    def target_batch_size(self) -> int:
        """Of the step under way, as far as this peer has heard."""
        step = self.position.step if self.position is not None else 0
        return rules_at(self.rules, self.next_terms, step).target_batch_size

    def waits(self) -> tuple[float, float]:
        """Seconds of silence and of a reduction after which this peer gives up at present."""
        members = len(self.last.roster) if self.last is not None else 1
        awaited = self._awaited() if self.position is not None else ()
        return self.deadlines.silence_seconds(awaited), self.deadlines.reduce_seconds(members)

    def leases(self, leader: PeerId | None = None) -> Leases | None:
        """Whose which samples are at this step, under that leader or the one that this peer follows; None if
        any peer draws any sample, or this one stands nowhere."""
        if not self.rules.leased or self.position is None:
            return None
        return leases(self.last, leader or self.following, self.rules.target_batch_size)

    # -- what the rim tells ----------------------------------------------------------------------------------

    def advance(
        self,
        position: Position,
        last: EntryHeader | None,
        now: float,
        *,
        newcomers: Iterable[PeerId] = (),
        settled: bool,
        above: Ballot | None = None,
    ) -> list[Effect]:
        """The replica now stands at `position`, where `last` led it.

        `settled` is True after a commit that this peer took part in. After a start, a resume or a catch-up it
        is False: somebody may lead this step already, so this peer asks before it would lead. After an entry
        was undone, its ballot is what later ones must be `above`: no two attempts may have one name.
        """
        same = position == self.position
        self.position, self.last = position, last
        if settled and last is not None and self._began is not None:
            self._speeds.saw(last, now - self._began)
        self._began = now
        self.withdrawn = False
        if not settled:
            self._arrivals += 1
            self.passed.clear()  # they may be of a lineage that was given up
        self.passed[position.step] = position.lineage
        self.passed.pop(position.step - MAX_PASSED, None)
        self.leader = None
        if not settled:
            ahead = [p for p, at in self.known.items() if p not in self.lost and self._outweighs(at)]
            if ahead:
                donor = min(ahead, key=lambda peer: (self._unhelpful[peer], -self.known[peer].weight, peer))
                self.stage = Stage.OUTSIDE
                return [CatchUp(donor, self.known[donor])]
        self._unhelpful.clear()
        self.stage = Stage.ACCUMULATING
        if not same:
            self.ballot = None  # a promise is for the whole step, also after a catch-up that led nowhere
            self._led = 0
        if above is not None:
            self.ballot = above
        self.joined = self.freeze = self.held_header = self.held_position = None
        self._beat_at = now + self.rules.heartbeat_seconds
        self._report = Report(
            incarnation=self.incarnation,
            position=position,
            samples=0,
            in_flight=0,
            finish_seconds=0.0,
            batch_seconds=0.0,
            rate=self._rate,
            reduces=self.reduces,
        )
        for peer in newcomers:
            self._meet(peer)
        alike = [peer for peer, at in self.known.items() if at.step <= position.step + 1]
        self.order = leader_order(position.step, last, {self.me, *alike})
        self.following = self._first_alive()
        effects: list[Effect] = []
        if self.following == self.me:
            appointed = settled and last is not None and self.order[0] == self.me
            alone = not (set(self.order) - {self.me} - self.lost)
            if appointed or alone:
                roster = set(last.roster) if last is not None else set()
                self.leader = self._new_leader(roster - {self.me} - self.lost)
                self.leader.number = max(self.ballot.number if self.ballot is not None else 0, self._led)
                self.leader.include(self._report, now)
                self._welcome(newcomers, now)
            else:
                effects += self._take_over(now, quietly=True)
        else:
            self.heard[self.following] = now
        effects += [Send(peer, self.answer()) for peer in sorted(self._unanswered)]
        self._unanswered.clear()
        early, self._early = self._early, {}
        for peer, report in early.items():
            effects += self._on_report(peer, report, now)
        return self._settle(effects, now)

    def progressed(
        self,
        samples: int,
        in_flight: int,
        finish_seconds: float,
        batch_seconds: float,
        state_digest: str | None,
        now: float,
    ) -> list[Effect]:
        """The trainer has started or finished a micro-batch, or resumed after an abort."""
        if self.position is None or self.stage is Stage.OUTSIDE:
            return []
        self._report = Report(
            incarnation=self.incarnation,
            position=self.position,
            samples=samples,
            in_flight=in_flight,
            finish_seconds=finish_seconds,
            batch_seconds=batch_seconds,
            rate=self._rate,
            reduces=self.reduces,
            state_digest=state_digest,
        )
        return self._settle(self._speak(), now)

    @property
    def _rate(self) -> float:
        measured = max(self._rates, default=self._most_rate)
        return min(measured, self._most_rate) if self._most_rate else measured

    def sent_at(self, rate: float) -> None:
        """In a round that ended, this peer sent so many bytes per second at its best."""
        if rate < SUDDENLY_SLOW * max(self._rates, default=0.0):
            self._rates.clear()
        self._rates.append(rate)

    def held(self, header: EntryHeader, reduce_seconds: float, now: float) -> list[Effect]:
        """The data plane holds every span of the attempt that `header` names, so long after this peer had
        sealed its contribution."""
        self.deadlines.reduced(len(header.roster), reduce_seconds)
        if self.stage is not Stage.REDUCING or self.freeze is None or header.ballot != self.freeze.ballot:
            return []
        self.stage = Stage.HELD
        self.held_header, self.held_position = header, advance(self._here(), header)
        return self._settle(self._speak(), now)

    def failed(
        self, ballot: Ballot, suspects: Iterable[PeerId], cause: AbortCause, now: float
    ) -> list[Effect]:
        """The data plane cannot finish the attempt; `suspects` are those it waited for in vain, or who broke
        the contract."""
        if self.stage is not Stage.REDUCING or self.freeze is None or ballot != self.freeze.ballot:
            return []
        if cause is AbortCause.DEADLINE:
            self.deadlines.overdue()
        message = Failed(
            step=self.freeze.step, ballot=ballot, suspects=tuple(sorted(suspects)), cause=cause.value
        )
        leader = self.following
        effects: list[Effect] = [Send(leader, message)]
        for peer in suspects if cause in CONTRACT else ():
            effects += self._offended(peer, now)
            if peer == leader != self.me:
                effects += self._lose(leader, now)  # it would not drop itself
        return self._settle(effects, now)

    def withdraw(self) -> list[Effect]:
        """Take part in nothing until `advance`, and have nobody wait for that. An attempt under way ends, for
        the others too if this peer was not Done."""
        if self.position is None or self.withdrawn:
            return []
        posted = {*self.order, self.following} | (self.leader.audience() if self.leader else set())
        effects = self._leave_attempt(AbortCause.SUPERSEDED)
        self.stage, self.withdrawn = Stage.OUTSIDE, True
        self.leader, self.following, self._report = None, self.me, None
        self.heard.clear()  # or the time until it is back would count as the others' silence
        self._late.clear()
        return [*effects, *(Send(peer, Withdraw()) for peer in sorted(posted - self.lost - {self.me}))]

    def offended(self, peer: PeerId, now: float) -> list[Effect]:
        """A donor sent something that it cannot have in its log or snapshot."""
        return self._settle(self._offended(peer, now), now)

    def convicted(self, peer: PeerId, now: float) -> list[Effect]:
        """It is proven, by what it has signed, that the peer lies: nobody needs to take another's word."""
        if peer == self.me:
            return []
        return self._settle(self._bench(peer, CONVICTED_SECONDS, now), now)

    def outvoted(self, step: int, ours: str, theirs: str, donor: PeerId) -> list[Effect]:
        """Most peers have signed for another state, at a lineage that this one had, too."""
        if self.position is None or self.stage is Stage.OUTSIDE:
            return []
        return [Diverged(step, ours, theirs), *self._go_outside(donor, self.position, afresh=True)]

    def undo(self, step: int, void: Iterable[str]) -> list[Effect]:
        """The entry that led on from `step` is proven to be a lie: go back, and to none of these lineages
        again."""
        if len(self._void) >= MAX_PASSED:
            self._void.clear()
        self._void.update(void)
        if self.position is None or self.stage is Stage.OUTSIDE:
            return []
        effects = self._leave_attempt(AbortCause.SUPERSEDED)
        self.stage, self.leader = Stage.OUTSIDE, None
        return [*effects, CatchUp(self.me, self.position, undo=step)]

    def unhelpful(self, donor: PeerId) -> None:
        """The donor could not bring this peer further. It is not gone for that: another is tried first, and
        what one claims is believed no more after `MAX_UNHELPFUL` times, until it says it again."""
        self._unhelpful[donor] += 1
        if self._unhelpful[donor] >= MAX_UNHELPFUL:
            del self._unhelpful[donor]
            self.known.pop(donor, None)

    def linked(self, peer: PeerId, up: bool, now: float) -> list[Effect]:
        """The link to a peer was reset (`up`) or could not be restored (not `up`)."""
        if not up:
            return self._settle(self._lose(peer, now), now)
        if self.is_benched(peer, now):
            return []
        self.lost.discard(peer)
        effects: list[Effect] = []
        if self.leader is not None:
            effects += self.leader.again(peer)
        elif peer == self.following:
            effects += self._speak()
        return self._settle(effects, now)

    def informed(self, present: Mapping[PeerId, Position], now: float) -> list[Effect]:
        """Who is there, from the DHT. Peers that seem to stand elsewhere are asked; a lone peer finds
        others."""
        effects: list[Effect] = []
        self.known = {
            peer: position
            for peer, position in sorted(present.items())[:MAX_KNOWN]
            if peer != self.me and not self.is_benched(peer, now)
        }
        mine = self.position
        if mine is None or self.stage is Stage.OUTSIDE:
            return []
        posted = self._awaited()
        for peer, position in self.known.items():
            # A presence record lags by seconds, so it only gives cause to ask.
            stranger = self.leader is not None and peer not in posted
            if stranger or self._outweighs(position) or position.lineage != self.passed.get(position.step):
                effects.append(Send(peer, Ask(position=mine)))
        return self._settle(effects, now)

    def received(self, sender: PeerId, message: Message, now: float) -> list[Effect]:
        """A control message came in."""
        return self._settle(self._receive(sender, message, now), now)

    def tick(self, now: float) -> list[Effect]:
        """Time has passed; call when `deadline()` is due."""
        effects: list[Effect] = []
        if self.stage is Stage.OUTSIDE:
            return effects
        if now >= self._beat_at:
            if now - self._beat_at > self.rules.heartbeat_seconds:
                self._stood_still(now)
            self._beat_at = now + self.rules.heartbeat_seconds
            effects += [*self._beat(), *self._speak(), *self._notice_silence(now)]
        if self.leader is not None and now >= self.leader.deadline():
            if self.leader.phase is Phase.ASKING:
                effects += self._conclude(now)
            else:
                effects += self.leader.tick(now)
        return self._settle(effects, now)

    def deadline(self) -> float:
        """When `tick` should be called, on the caller's clock."""
        if self.stage is Stage.OUTSIDE:
            return inf
        return self._beat_at if self.leader is None else min(self._beat_at, self.leader.deadline())

    def answer(self, question: Ballot | None = None) -> Answer:
        """Where this peer stands, as it tells others."""
        assert self.position is not None
        return Answer(
            incarnation=self.incarnation,
            position=self.position,
            ballot=self.ballot,
            joined=self.joined,
            leader=self.following,
            question=question,
            held=self.held_position,
        )

    # -- messages --------------------------------------------------------------------------------------------

    def _receive(self, sender: PeerId, message: Message, now: float) -> list[Effect]:
        if self.is_benched(sender, now):
            return []
        if self.withdrawn:
            return self._decline(sender, message)
        if sender != self.me:
            self._meet(sender, message.position if isinstance(message, Report | Ask | Answer) else None)
            if sender in self._late:
                self._late.discard(sender)
                self.deadlines.heard_after(sender, now - self.heard[sender])
            self.heard[sender] = now
            self.lost.discard(sender)
        if isinstance(message, Withdraw):
            return self._lose(sender, now)
        if self.position is None:
            return []
        match message:
            case Accusation():
                return []  # the rim asks for the proof, and tells what it is worth
            case Ask():
                return self._on_ask(sender, message, now)
            case Report():
                return self._on_report(sender, message, now)
            case _ if self.stage is Stage.OUTSIDE:
                return []
            case Call():
                return self._on_call(sender, message, now)
            # Who takes this peer for the leader hears that it is alive, and whom it follows itself: else, if
            # that one is gone, each would wait for another, and the first to tire of it would decide alone.
            case Done():
                return self.leader.done(sender, message, now) if self.leader else self._reply(sender)
            case Failed():
                return self.leader.failed(sender, message, now) if self.leader else self._reply(sender)
            case Commit():
                return self._on_commit(sender, message.position, message.newcomers)
            case Abort():
                return self._on_abort(sender, message)
            case Answer():
                return self._on_answer(sender, message, now)
            case Resync():
                return self._on_resync(sender, message)
            case _:
                assert_never(message)

    def _decline(self, sender: PeerId, message: Message) -> list[Effect]:
        """Who asks or follows this peer although it has withdrawn is told again, and what it has missed."""
        self.lost.discard(sender)
        if not isinstance(message, Ask | Report):
            return []
        missed = heavier(self._here(), message.position)
        return [*([Send(sender, self.answer())] if missed else []), Send(sender, Withdraw())]

    def _on_report(self, sender: PeerId, report: Report, now: float) -> list[Effect]:
        mine, theirs = self._here(), report.position
        if theirs == mine and self.stage is not Stage.OUTSIDE:
            if self.leader is not None and self.leader.phase is not Phase.ENDED:
                effects = self.leader.report(sender, report, now)
                # A claim that cannot be is an offence as any other.
                liars = [effect.peer for effect in effects if isinstance(effect, Distrusted)]
                return [*effects, *(each for peer in liars for each in self._offended(peer, now))]
            return self._reply(sender)
        if theirs.step == mine.step + 1 or self.stage is Stage.OUTSIDE:
            # It has applied what we are about to; keep its word until we get there.
            if len(self._early) < MAX_KNOWN:
                self._early[sender] = report
            return []
        if self.last is not None and (theirs.step, theirs.lineage) == (self.last.step, self.last.parent):
            self._welcome([sender], now)
            return [Send(sender, Commit(position=mine))]
        if self._outweighs(theirs):
            return [Send(sender, Ask(position=mine))]
        return [Send(sender, self.answer())]

    def _on_call(self, sender: PeerId, call: Call, now: float) -> list[Effect]:
        mine = self._here()
        if (call.step, call.parent) != (mine.step, mine.lineage) or call.ballot.leader != sender:
            return self._reply(sender)
        freeze = freeze_of(self.me, call, self.last, self.rules.values)
        if freeze is None or revision(call.terms) < revision(self.last.terms if self.last else None):
            return []
        if self.ballot is not None and (freeze.ballot < self.ballot or self.ballot.leader != sender):
            return [Send(sender, self.answer())]
        if call.incarnation != self.incarnation:
            return [Send(sender, self._report)] if self._report is not None else []
        if self.joined is not None and freeze.ballot <= self.joined:
            return self._speak() if self.stage is Stage.HELD else []
        effects = self._leave_attempt(AbortCause.SUPERSEDED)
        self._follow(sender, freeze.ballot, now)
        self.lost -= set(freeze.roster)  # the leader has just heard from all of them
        self.freeze = freeze
        self.joined = freeze.ballot
        self.stage = Stage.REDUCING
        return [*effects, Begin(freeze)]

    def _on_commit(self, sender: PeerId, position: Position, newcomers: tuple[PeerId, ...]) -> list[Effect]:
        mine = self._here()
        if self.held_header is not None and position == self.held_position:
            self.stage = Stage.OUTSIDE
            return [Apply(self.held_header, newcomers)]
        if position.step == mine.step + 1 and self._outweighs(position):
            holders = self.leader.holders(position) if self.leader is not None else []
            others = [peer for peer in holders if peer not in self.lost and peer != self.me]
            return self._go_outside(sender if sender != self.me else next(iter(others), sender), position)
        if position.step > mine.step:
            return [Send(sender, Ask(position=mine))]
        return []

    def _on_abort(self, sender: PeerId, abort: Abort) -> list[Effect]:
        if self.freeze is None or abort.ballot != self.freeze.ballot:
            return []
        # A successor that was told of a held entry counts on it, whatever the leader before it decides.
        if sender != self.following and self.ballot != abort.ballot:
            return []
        if sender not in (abort.ballot.leader, self.following):
            return []
        return self._leave_attempt(cause_of(abort.cause), abort.dropped)

    def _on_resync(self, sender: PeerId, resync: Resync) -> list[Effect]:
        mine = self._report.state_digest if self._report is not None else None
        if (
            resync.position != self.position
            or sender != self.following
            or mine in (None, resync.state_digest)
        ):
            return []
        diverged = Diverged(resync.position.step, mine, resync.state_digest)
        return [diverged, *self._go_outside(resync.donor, resync.position, afresh=True)]

    def _on_ask(self, sender: PeerId, ask: Ask, now: float) -> list[Effect]:
        mine = self._here()
        if self.stage is not Stage.OUTSIDE and self._outweighs(ask.position):
            return [Send(sender, self.answer()), *self._go_outside(sender, ask.position)]
        effects: list[Effect] = []
        question = None
        if ask.ballot is not None and ask.position == mine and ask.ballot.leader == sender:
            if self.stage is Stage.OUTSIDE:
                self._unanswered.add(sender)  # between two states: the answer comes when we have arrived
                return []
            if self.ballot is None or self.ballot < ask.ballot:
                # The promise: what is not held now, this peer will never declare held (I7).
                if self.stage is Stage.REDUCING:
                    effects += self._leave_attempt(AbortCause.LEADER_LOST)
                self._follow(sender, ask.ballot, now)
            question = ask.ballot if self.ballot == ask.ballot else None
        if sender == self.me:
            return effects
        effects.append(Send(sender, self.answer(question)))
        if question is not None and self.stage is Stage.ACCUMULATING and self._report is not None:
            effects.append(Send(sender, self._report))
        return effects

    def _on_answer(self, sender: PeerId, answer: Answer, now: float) -> list[Effect]:
        mine, theirs = self._here(), answer.position
        if theirs != mine:
            if theirs == self.held_position:
                return self._on_commit(sender, theirs, ())
            if self._outweighs(theirs):
                return self._go_outside(sender, theirs)
            # The sender believes it leads a step that is over, or trains a lineage that lost: it should know.
            return [Send(sender, self.answer())] if answer.leader == sender else []
        if self.leader is not None:
            return self._on_answer_as_leader(sender, answer, self.leader, now)
        if sender == self.following and answer.leader == self.me:
            return self._take_over(now)  # each takes the other for the leader: one has to begin
        if sender == self.following and answer.leader != sender and answer.leader not in self.lost:
            self._follow(answer.leader, answer.ballot, now)
            return self._speak()
        ballot = answer.ballot
        if ballot is not None and ballot.leader == sender and (self.ballot is None or self.ballot < ballot):
            self._follow(sender, ballot, now)
            return self._speak()
        return []

    def _on_answer_as_leader(
        self, sender: PeerId, answer: Answer, leader: Leader, now: float
    ) -> list[Effect]:
        if answer.question is not None and answer.question == leader.ballot:
            leader.answer(sender, answer)
            return self._conclude(now) if leader.settled() else []
        if answer.ballot is not None and leader.superseded_by(answer.ballot):
            effects = self._leave_attempt(AbortCause.SUPERSEDED)
            if answer.ballot.leader in self.lost:
                self.ballot = answer.ballot  # promised to somebody who is gone: ask again, above that
                return [*effects, *self._take_over(now)]
            self._follow(answer.ballot.leader, answer.ballot, now)
            return [*effects, *self._speak()]
        if answer.leader == sender and answer.ballot is None and leader.number == 0 and sender < self.me:
            self._follow(sender, None, now)  # two who have not begun: the smaller id leads
            return self._speak()
        return []

    # -- moves -----------------------------------------------------------------------------------------------

    def _here(self) -> Position:
        assert self.position is not None
        return self.position

    def _outweighs(self, position: Position) -> bool:
        """Whether this peer would go there: a void lineage has no weight, whatever is behind it."""
        return position.lineage not in self._void and heavier(position, self._here())

    def _meet(self, peer: PeerId, position: Position | None = None) -> None:
        if peer == self.me or (peer not in self.known and len(self.known) >= MAX_KNOWN):
            return
        if position is not None:
            self.known[peer] = position
        elif self.position is not None:
            self.known.setdefault(peer, self.position)

    def _welcome(self, newcomers: Iterable[PeerId], now: float) -> None:
        """As a leader, hold the freeze for peers that are one entry away. Each is granted that once in a
        while: one that is always late must not slow down everybody."""
        if self.leader is None:
            return
        step = self._here().step
        for peer in newcomers:
            if peer in self.lost or step - self._welcomed.get(peer, -WELCOME_STEPS) < WELCOME_STEPS:
                continue
            if len(self._welcomed) >= MAX_KNOWN:
                self._welcomed.clear()
            self._welcomed[peer] = step
            self.leader.welcome(peer, now)

    def _new_leader(self, expected: Iterable[PeerId]) -> Leader:
        position, terms = self._here(), self.next_terms
        rules = rules_at(self.rules, terms, position.step)
        leases = self.leases(self.me)
        return Leader(
            self.me,
            rules,
            position,
            self.last,
            self.deadlines,
            expected=expected,
            terms=terms,
            lease_size=0 if leases is None else leases.size,
            speeds=self._speeds,
            began=self._began or 0.0,
        )

    def _first_alive(self) -> PeerId:
        return next((peer for peer in self.order if peer not in self.lost), self.me)

    def _follow(self, leader: PeerId, ballot: Ballot | None, now: float) -> None:
        """Obey `leader` from now on."""
        if ballot is not None:
            self.ballot = ballot
        self.following = leader
        if leader != self.me:
            self.leader = None
            self.heard.setdefault(leader, now)
            self.heard[leader] = max(self.heard[leader], now)

    def _speak(self) -> list[Effect]:
        """Tell the leader what it must know now: that this peer is Done, or how far it is."""
        if self.stage is Stage.HELD and self.held_header is not None and self.held_position is not None:
            done = Done(ballot=self.held_header.ballot, position=self.held_position)
            return [Send(self.following, done)]
        return [Send(self.following, self._report)] if self._report is not None else []

    def _reply(self, to: PeerId) -> list[Effect]:
        return [Send(to, self.answer())] if to != self.me else []

    def _beat(self) -> list[Effect]:
        """A leader tells those who wait for it that it is alive, and where it stands; one that has taken over
        asks again who has not answered: an answer that was lost with its link must not pass for a death."""
        if self.leader is None:
            return []
        questions = [
            effect for peer in sorted(self.leader.asked - self.lost) for effect in self.leader.again(peer)
        ]
        return [
            *questions,
            *(Send(peer, self.answer()) for peer in sorted(self.leader.audience() - self.lost)),
        ]

    def _leave_attempt(self, cause: AbortCause, dropped: tuple[PeerId, ...] = ()) -> list[Effect]:
        if self.freeze is None:
            return []
        ballot = self.freeze.ballot
        self.freeze = self.held_header = self.held_position = None
        self.stage = Stage.ACCUMULATING
        return [Cancel(ballot, cause, dropped)]

    def _go_outside(self, donor: PeerId, position: Position, *, afresh: bool = False) -> list[Effect]:
        effects = self._leave_attempt(AbortCause.SUPERSEDED)
        self.stage = Stage.OUTSIDE
        self.leader = None
        return [*effects, CatchUp(donor, position, afresh)]

    def _lose(self, peer: PeerId, now: float) -> list[Effect]:
        """A peer is gone: drop it as a member, replace it as a leader."""
        if peer == self.me or peer in self.lost:
            return []
        self.lost.add(peer)
        if self.stage is Stage.OUTSIDE or self.position is None:
            return []
        if self.leader is not None:
            effects = self.leader.lost(peer, now)
            if self.leader.settled():
                effects += self._conclude(now)
            return effects
        return self._replace_leader(now) if peer == self.following else []

    def _offended(self, peer: PeerId, now: float) -> list[Effect]:
        """The peer broke the contract towards this one; nobody else's word counts for that."""
        if peer == self.me:
            return []
        if len(self._offences) >= MAX_KNOWN:
            self._offences.clear()
        self._offences[peer] += 1
        surplus = self._offences[peer] - OFFENCES_FORGIVEN
        if surplus <= 0:
            return []
        seconds = min(BENCH_SECONDS * 2 ** (surplus - 1), BENCH_MOST_SECONDS)
        return [Benched(peer, self._offences[peer], seconds), *self._bench(peer, seconds, now)]

    def _bench(self, peer: PeerId, seconds: float, now: float) -> list[Effect]:
        self._benched = {each: until for each, until in self._benched.items() if until > now}
        self._benched[peer] = max(now + seconds, self._benched.get(peer, now))
        self.known.pop(peer, None)
        return self._lose(peer, now)

    def is_benched(self, peer: PeerId, now: float) -> bool:
        """Whether this peer neither hears nor believes that one at present."""
        return self._benched.get(peer, now) > now

    def _replace_leader(self, now: float) -> list[Effect]:
        """The leader is gone: follow its successor, or be it."""
        self.following = self._first_alive()
        if self.following == self.me:
            return self._take_over(now)
        self.heard[self.following] = now
        return self._speak()

    def _take_over(self, now: float, *, quietly: bool = False) -> list[Effect]:
        """Everyone before this peer in the order is gone: hear how things stand, then lead."""
        position = self._here()
        # Its own promise, too: what it does not hold now it will never declare held.
        effects = self._leave_attempt(AbortCause.LEADER_LOST) if self.stage is Stage.REDUCING else []
        self.leader = self._new_leader(())
        peers = ({*self.order, *self.known} | set(self.freeze.roster if self.freeze else ())) - self.lost
        led = Ballot(number=self._led, leader=self.me)
        effects += self.leader.ask(peers, led if self.ballot is None else max(self.ballot, led), now)
        self.ballot = self.leader.ballot
        self.following = self.me
        if not quietly:
            effects.append(TookOver(position.step, self.ballot))
        if self.leader.settled():
            effects += self._conclude(now)
        return effects

    def _conclude(self, now: float) -> list[Effect]:
        """The take-over's answers are in."""
        assert self.leader is not None
        members = self.freeze.roster if self.freeze is not None else ()
        effects = self.leader.conclude(self.answer(), members, now)
        if self.stage is Stage.ACCUMULATING and self._report is not None:
            effects.append(Send(self.me, self._report))
        return effects

    def _stood_still(self, now: float) -> None:
        """This process did nothing for a while: that it heard nobody says nothing about the others."""
        self.heard = dict.fromkeys(self.heard, now)
        self._late.clear()
        if self.leader is not None:
            self.leader.stood_still(now)

    def _awaited(self) -> set[PeerId]:
        return self.leader.audience() if self.leader is not None else {self.following}

    def _notice_silence(self, now: float) -> list[Effect]:
        """Peers that a decision waits for and that have said nothing for too long are taken for gone."""
        effects: list[Effect] = []
        for peer in sorted(self._awaited() - {self.me} - self.lost):
            silent_seconds = now - self.heard.setdefault(peer, now)
            if silent_seconds > self.deadlines.silence_seconds([peer]):
                effects += self._lose(peer, now)
            if silent_seconds > self.rules.heartbeat_seconds:
                self._late.add(peer)
            else:
                self.deadlines.heard_after(peer, silent_seconds)
        if self.leader is None and self.following in self.lost and self.stage is not Stage.OUTSIDE:
            effects += self._replace_leader(now)
        return effects

    def _settle(self, effects: list[Effect], now: float) -> list[Effect]:
        """Deliver to this peer what it sends to itself, so that the leader is a member like any other."""
        settled: list[Effect] = []
        pending = deque(effects)
        while pending:
            effect = pending.popleft()
            if not isinstance(effect, Send):
                settled.append(effect)
                continue
            if isinstance(effect.message, Call):
                self._led = effect.message.ballot.number
            if effect.to == self.me:
                pending.extendleft(reversed(self._receive(self.me, effect.message, now)))
            else:
                settled.append(effect)
        return settled
