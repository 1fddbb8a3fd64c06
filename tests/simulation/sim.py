"""A swarm of the production state machines on a virtual network, with seeded faults and checked invariants.

Everything that decides is `p2ptrain.protocol`; only the tensors are replaced: a contribution is a set of
sample ids, the "averaged bytes" are the text that lists which contributions went in. One `Simulation(seed)`
is one story; the same seed tells the same story, and `play` says how it ended.

Not covered: the rim (`allreduce`, `trainer`, the carriers), diverged tensors, and peers that lie.
"""

from __future__ import annotations

import gc
import random
import re
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from p2ptrain.errors import BadMessage
from p2ptrain.events import AbortCause
from p2ptrain.protocol.lineage import advance, digest_of, genesis, heavier
from p2ptrain.protocol.member import Member, Stage
from p2ptrain.protocol.reduction import Reduction
from p2ptrain.protocol.round import Apply, Begin, Cancel, CatchUp, Effect, Rules, Send
from p2ptrain.records import (
    Answer,
    Averaged,
    Ballot,
    Chunk,
    Commit,
    Done,
    EntryHeader,
    Freeze,
    Message,
    PeerId,
    Position,
)
from p2ptrain.swarm.network import Network

GENESIS = genesis("f" * 64, "0" * 64)
VALUES, CHUNK_VALUES = 12, 2
PRESENCE_SECONDS = 2.0
FETCH_SECONDS = 1.0
TRANSCRIPT_LINES = 4000
TAIL_LINES = 60


@dataclass(frozen=True)
class Story:
    """What happens to a swarm, drawn from a seed."""

    peers: int
    target: int
    latency: tuple[float, float]
    loss: float
    crashes: int
    restarts: bool
    joins: int
    pauses: int
    hangs: int
    partitions: int
    slow: bool
    seconds: float = 15.0
    patience_seconds: float = 120.0
    """By then each survivor must have gone on by three steps."""

    @staticmethod
    def draw(chance: random.Random) -> Story:
        return Story(
            peers=chance.choice([1, 2, 2, 3, 3, 4, 5]),
            target=chance.choice([4, 8, 16, 30]),
            latency=chance.choice([(0.001, 0.002), (0.005, 0.05), (0.02, 0.3)]),
            loss=chance.choice([0.0, 0.0, 0.002, 0.02]),
            crashes=chance.choice([0, 1, 1, 2, 3]),
            restarts=chance.random() < 0.6,
            joins=chance.choice([0, 0, 1, 2]),
            pauses=chance.choice([0, 0, 0, 1]),
            hangs=chance.choice([0, 0, 0, 0, 0, 1]),
            partitions=chance.choice([0, 0, 0, 1]),
            slow=chance.random() < 0.25,
        )

    @property
    def may_fork(self) -> bool:
        """Only a peer that lives and is taken for gone can make two lineages; they must become one again."""
        return bool(self.partitions or self.pauses)


@dataclass(frozen=True)
class Fetch:
    """A peer that catches up asks a donor for everything."""

    number: int


@dataclass(frozen=True)
class Fetched:
    number: int
    log: tuple[tuple[EntryHeader, str], ...]


@dataclass
class Attempt:
    freeze: Freeze
    reduction: Reduction
    sealed: bool = False
    contributions: dict[PeerId, tuple[str, ...]] = field(default_factory=dict)
    averaged: dict[tuple[int, int], str] = field(default_factory=dict)
    sent: dict[PeerId, list[tuple[Chunk | Averaged, object]]] = field(
        default_factory=lambda: defaultdict(list)
    )


class Violation(AssertionError):
    """An invariant does not hold."""


class Peer:
    """The rim around one machine: fake work, fake sums, a log in memory."""

    def __init__(
        self, sim: Simulation, name: PeerId, incarnation: int, log: list[tuple[EntryHeader, str]]
    ) -> None:
        self.sim, self.name, self.incarnation = sim, name, str(incarnation)
        self.alive, self.paused, self.hung = True, False, False
        self.born = sim.network.now
        self.inbox: deque[tuple[PeerId, object]] = deque()
        self.log = list(log)
        self.position = sim.positions(self.log)
        self.machine = sim.machine(name, self.incarnation, sim.rules)
        self.samples: list[str] = []
        self.late: list[str] = []
        self.promised: tuple[str, Ballot] | None = None
        """The lineage and ballot of the last promise to a successor that this peer gave without holding."""
        self.batch_at: Position | None = None
        """Where the micro-batch in flight began; None while there is none."""
        self.drawn = 0
        self.attempt: Attempt | None = None
        self.early: deque[tuple[PeerId, Chunk | Averaged, object]] = deque(maxlen=200)
        self.fetching = 0
        self.alarm = float("inf")
        self.batch = sim.chance.choice([2, 4, 4, 8])
        self.pace = sim.chance.choice([0.1, 0.1, 0.2]) * (10 if sim.story.slow and name == "p0" else 1)

    # -- life ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        net = self.sim.network
        net.attach(self.name, self.receive, self.on_link)
        self.machine.informed(self.sim.present(self), net.now)
        self.carry_out(self.machine.advance(self.position, self.last, net.now, settled=False))
        self.work()
        self.publish()

    @property
    def last(self) -> EntryHeader | None:
        return self.log[-1][0] if self.log else None

    def publish(self) -> None:
        if self.alive:
            if not self.paused:
                self.sim.presence[self.name] = (self.position, self.sim.network.now + 15.0)
                self.carry_out(self.machine.informed(self.sim.present(self), self.sim.network.now))
            self.sim.network.after(PRESENCE_SECONDS, self.publish)

    def crash(self) -> None:
        self.sim.trace(self.name, "crash")
        self.alive = False
        self.sim.network.detach(self.name)

    def resume(self) -> None:
        self.paused = self.hung
        while self.inbox and not self.paused:
            self.receive(*self.inbox.popleft())
        self.wake()

    # -- work ------------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Start a micro-batch, unless one runs or an attempt goes on; say how far this peer is."""
        if not self.alive:
            return
        if self.batch_at is None and self.attempt is None and self.machine.stage is not Stage.OUTSIDE:
            self.batch_at = self.position
            took = self.pace * self.sim.chance.uniform(0.9, 1.2)
            self.sim.network.after(took, self.worked)
        self.report()

    def worked(self) -> None:
        if not self.alive:
            return
        if self.paused:
            self.sim.network.after(0.1, self.worked)
            return
        began, self.batch_at = self.batch_at, None
        if began == self.position:
            ids = [f"{began.step}/{self.name}/{self.incarnation}/{self.drawn + i}" for i in range(self.batch)]
            self.drawn += self.batch
            if self.attempt is None or not self.attempt.sealed:
                self.samples += ids
            else:
                self.late += ids
        if self.attempt is not None:
            self.seal()
        self.work()

    def report(self) -> None:
        in_flight = self.batch if self.batch_at == self.position else 0
        now = self.sim.network.now
        self.carry_out(self.machine.progressed(len(self.samples), in_flight, self.pace, self.pace, None, now))

    # -- one attempt -----------------------------------------------------------------------------------------

    def begin(self, freeze: Freeze) -> None:
        net = self.sim.network
        attempt = Attempt(freeze, Reduction(freeze, self.name, CHUNK_VALUES))
        self.attempt = attempt
        self.sim.frozen.setdefault((freeze.parent, freeze.ballot), net.now)
        net.after(freeze.deadline_seconds, lambda: self.overdue(attempt, AbortCause.DEADLINE))
        if self.name in freeze.finishing and self.batch_at == self.position:
            net.after(freeze.cutoff_seconds, lambda: self.seal(attempt))
        else:
            self.seal(attempt)
        early, self.early = self.early, deque(maxlen=200)
        for message in early:
            self.on_data(*message)

    def overdue(self, attempt: Attempt, cause: AbortCause, suspects: list[PeerId] | None = None) -> None:
        if self.alive and self.attempt is attempt and not attempt.reduction.complete:
            blamed = attempt.reduction.suspects() if suspects is None else suspects
            self.carry_out(self.machine.failed(attempt.freeze.ballot, blamed, cause, self.sim.network.now))

    def seal(self, attempt: Attempt | None = None) -> None:
        attempt = attempt or self.attempt
        if not self.alive or attempt is None or self.attempt is not attempt or attempt.sealed:
            return
        attempt.sealed = True
        mine = tuple(self.samples)
        for rank, reducer in enumerate(attempt.freeze.roster):
            for number in range(
                attempt.reduction.chunks[rank] if mine else min(1, attempt.reduction.chunks[rank])
            ):
                header = Chunk(
                    step=attempt.freeze.step, ballot=attempt.freeze.ballot, number=number, samples=len(mine)
                )
                self.send_data(attempt, reducer, header, mine)

    def send_data(self, attempt: Attempt, to: PeerId, header: Chunk | Averaged, payload: object) -> None:
        if to == self.name:
            self.on_data(self.name, header, payload)
        else:
            attempt.sent[to].append((header, payload))
            self.sim.network.send(self.name, to, (header, payload))

    def on_data(self, sender: PeerId, header: Chunk | Averaged, payload: object) -> None:
        attempt = self.attempt
        if attempt is None or header.ballot != attempt.freeze.ballot or header.step != attempt.freeze.step:
            current = self.machine.position
            if current is not None and header.step in (current.step, current.step + 1):
                self.early.append((sender, header, payload))
            return
        try:
            if isinstance(header, Chunk):
                if attempt.reduction.accept(sender, header):
                    attempt.contributions[sender] = payload  # type: ignore[assignment]
                for number in attempt.reduction.ready():
                    self.average(attempt, number)
                return
            if attempt.reduction.receive(sender, header):
                attempt.averaged[(attempt.freeze.roster.index(sender), header.number)] = str(payload)
        except BadMessage as fault:
            # Only who restarts inside an attempt has reason to contradict what it said before.
            if not self.sim.reborn(attempt.freeze.roster, attempt.freeze.parent, attempt.freeze.ballot):
                raise Violation(f"{self.name}: {fault}") from fault
            self.overdue(attempt, AbortCause.BAD_CHUNK, [sender])
            return
        if attempt.reduction.complete:
            content = [attempt.averaged[key] for key in sorted(attempt.averaged)]
            header_ = attempt.reduction.header(digest_of(text.encode() for text in content))
            self.sim.contents[header_.digest] = content[0]
            if len(set(content)) != 1:  # one story per step: all spans hold the same contributions
                raise Violation(f"spans of one attempt differ: {content}")
            self.sim.holders[attempt.freeze.parent, attempt.freeze.ballot].add(self.name)
            self.carry_out(self.machine.held(header_, self.sim.network.now))

    def average(self, attempt: Attempt, number: int) -> None:
        roster = attempt.freeze.roster
        if not attempt.reduction.contributors():
            self.overdue(attempt, AbortCause.BAD_CHUNK, [])
            return
        content = ";".join(
            ",".join(attempt.contributions[roster[rank]]) for rank in attempt.reduction.contributors()
        )
        last = number == attempt.reduction.chunks[attempt.reduction.rank] - 1
        header = Averaged(
            step=attempt.freeze.step,
            ballot=attempt.freeze.ballot,
            number=number,
            samples=attempt.reduction.samples,
            squared_norm=1.0 if last else None,
        )
        for peer in roster:
            if peer != self.name:
                self.send_data(attempt, peer, header, content)
        self.send_data(attempt, self.name, header, content)

    # -- effects and events ----------------------------------------------------------------------------------

    def carry_out(self, effects: list[Effect]) -> None:
        net = self.sim.network
        for effect in effects:
            self.sim.trace(self.name, effect)
            match effect:
                case Send(to, message):
                    self.sim.said(self, message)
                    net.send(self.name, to, message)
                case Begin(freeze):
                    self.begin(freeze)
                case Cancel(ballot, cause, _):
                    self.sim.aborts[cause] += 1
                    if self.attempt is not None and self.attempt.freeze.ballot == ballot:
                        self.attempt = None
                    self.samples += self.late
                    self.late = []
                    net.after(0.0, self.work)
                case Apply(header, newcomers):
                    self.attempt = None
                    net.after(self.sim.chance.uniform(0.001, 0.02), partial(self.apply, header, newcomers))
                case CatchUp(donor, _):
                    self.attempt = None
                    self.fetch(donor)
                case _:
                    pass
        self.sim.check(self)
        self.arm()

    def arm(self) -> None:
        due = self.machine.deadline()
        if due < self.alarm and due != float("inf"):
            self.alarm = due
            self.sim.network.at(max(due, self.sim.network.now), self.wake)

    def wake(self) -> None:
        self.alarm = float("inf")
        if self.alive and not self.paused:
            self.carry_out(self.machine.tick(self.sim.network.now))

    def receive(self, sender: PeerId, message: object) -> None:
        if not self.alive or self.hung:
            return
        if self.paused:
            self.inbox.append((sender, message))
            return
        match message:
            case (Chunk() | Averaged()) as header, payload:
                self.on_data(sender, header, payload)
            case Fetch(number):
                self.sim.network.send(self.name, sender, Fetched(number, tuple(self.log)))
            case Fetched(number, log):
                if number == self.fetching:
                    self.fetched(sender, list(log))
            case _:
                self.carry_out(self.machine.received(sender, message, self.sim.network.now))  # type: ignore[arg-type]

    def on_link(self, peer: PeerId, up: bool) -> None:
        if not self.alive or self.paused:
            return
        self.sim.trace(self.name, f"link to {peer} {'reset' if up else 'lost'}")
        self.carry_out(self.machine.linked(peer, up, self.sim.network.now))
        if up and self.attempt is not None:
            for header, payload in list(self.attempt.sent.get(peer, ())):
                self.sim.network.send(self.name, peer, (header, payload))

    def apply(self, header: EntryHeader, newcomers: tuple[PeerId, ...]) -> None:
        if not self.alive:
            return
        self.adopt([*self.log, (header, self.sim.contents[header.digest])])
        self.carry_out(
            self.machine.advance(
                self.position, self.last, self.sim.network.now, newcomers=newcomers, settled=True
            )
        )
        self.work()

    def adopt(self, log: list[tuple[EntryHeader, str]]) -> None:
        before = self.position
        shared = min(len(log), len(self.log))
        while shared and log[shared - 1] != self.log[shared - 1]:
            shared -= 1  # equal entries have equal parents, so the newest common one settles it
        if shared < len(self.log):
            self.sim.rollbacks += 1
        after = self.sim.positions(log)
        if not heavier(after, before):
            raise Violation(f"I3/I8: {self.name} went from {before} to {after}")
        for index in range(shared, len(log)):
            self.sim.committed(log[: index + 1])
        self.log, self.position = log, after
        self.samples, self.late = [], []

    def fetch(self, donor: PeerId) -> None:
        """State transfer: one message there, one back, with a deadline."""
        self.fetching = self.sim.serial()
        number = self.fetching
        self.sim.network.send(self.name, donor, Fetch(number))

        def give_up() -> None:
            if self.alive and self.fetching == number:
                self.fetching = 0
                self.machine.unhelpful(donor)
                self.back_in()

        self.sim.network.after(FETCH_SECONDS, give_up)

    def fetched(self, donor: PeerId, log: list[tuple[EntryHeader, str]]) -> None:
        self.fetching = 0
        theirs = self.sim.positions(log)
        self.machine.known[donor] = theirs
        if heavier(theirs, self.position):
            self.adopt(log)
        else:
            self.machine.unhelpful(donor)
        self.back_in()

    def back_in(self) -> None:
        self.carry_out(self.machine.advance(self.position, self.last, self.sim.network.now, settled=False))
        self.work()


class Simulation:
    """One seeded story of a swarm; `run` raises Violation with the seed if an invariant breaks."""

    def __init__(self, seed: int, story: Story | None = None, *, machine: type[Member] = Member) -> None:
        self.seed = seed
        self.machine = machine
        self.chance = random.Random(f"story {seed}")
        self.story = story or Story.draw(self.chance)
        self.network = Network(seed, latency=self.story.latency, loss=self.story.loss)
        self.rules = Rules(
            target_batch_size=self.story.target,
            min_peers=1,
            max_peers=64,
            values=VALUES,
            heartbeat_seconds=0.5,
            silence_seconds=2.0,
        )
        self.peers: dict[PeerId, Peer] = {}
        self.presence: dict[PeerId, tuple[Position, float]] = {}
        self.aborts: Counter[AbortCause] = Counter()
        self.children: dict[str, set[str]] = defaultdict(set)
        self.states: dict[str, str] = {}
        self.contents: dict[str, str] = {}
        self._positions: dict[str, Position] = {}
        self.frozen: dict[tuple[str, Ballot], float] = {}
        """When the first member began each attempt, by the lineage that it builds on and its ballot."""
        self.holders: dict[tuple[str, Ballot], set[PeerId]] = defaultdict(set)
        """Who has ever held every span of an attempt."""
        self.declared: set[tuple[str, Ballot]] = set()
        """Attempts that somebody has called committed."""
        self.entries: dict[str, EntryHeader] = {}
        self.heights: dict[PeerId, Position] = {}
        self.transcript: deque[tuple[float, PeerId, object]] = deque(maxlen=TRANSCRIPT_LINES)
        self.rollbacks = 0
        self.forks = 0
        self._serial = 0

    def trace(self, peer: PeerId, what: object) -> None:
        """One line of the transcript; the last few thousand are kept for the story of a failing seed."""
        self.transcript.append((self.network.now, peer, what))

    def lines(self) -> Iterator[str]:
        """The transcript for people: what each peer did, and when."""
        for when, peer, what in self.transcript:
            yield f"{when:9.3f} {peer:>3} {shown(what)}"

    def serial(self) -> int:
        self._serial += 1
        return self._serial

    def positions(self, log: list[tuple[EntryHeader, str]]) -> Position:
        """Where a log leads; cached by its last header, whose parent binds all before it."""
        if not log:
            return GENESIS
        header = log[-1][0]
        key = f"{header.parent}{header.digest}{header.ballot.number}{header.ballot.leader}"
        if key not in self._positions:
            before = self.positions(log[:-1])
            self._positions[key] = advance(before, header)
        return self._positions[key]

    def present(self, asker: Peer) -> dict[PeerId, Position]:
        now = self.network.now
        return {
            name: position
            for name, (position, expires) in self.presence.items()
            if name != asker.name and expires > now and self.network.reachable(asker.name, name)
        }

    # -- invariants ------------------------------------------------------------------------------------------

    def committed(self, log: list[tuple[EntryHeader, str]]) -> None:
        """An entry is applied somewhere: I1, I2, I4."""
        header, content = log[-1]
        lineage = self.positions(log).lineage
        if self.states.setdefault(lineage, content) != content:
            raise Violation(f"I2: lineage {lineage[:8]} has two contents")
        siblings = self.children[header.parent]
        if siblings and lineage not in siblings:
            self.forks += 1
            bearers = sorted({peer for sibling in siblings for peer in self.bearers(sibling)})
            if bearers and not self.story.may_fork:
                raise Violation(f"I1: step {header.step} was committed again while {bearers} had it")
        siblings.add(lineage)
        self.entries[lineage] = header
        ids = [one for group in content.split(";") for one in group.split(",") if one]
        if len(ids) != len(set(ids)) or len(ids) != header.total_samples:
            raise Violation(f"I4: entry {header.step} counts {header.total_samples} samples of {sorted(ids)}")
        if any(int(one.split("/")[0]) != header.step for one in ids):
            raise Violation(f"I4: entry {header.step} holds samples of another step: {ids}")

    def bearers(self, lineage: str) -> list[PeerId]:
        """Who keeps the entry that led to `lineage` from being lost: while one lives there is no other.

        That is whoever has applied it (except for the moment until the others know that it is back), and
        whoever is about to: a member of its roster, for it was committed because all of them held it.
        """
        header = self.entries[lineage]
        members = set(header.roster) - self.reborn(header.roster, header.parent, header.ballot)
        bearers = []
        for peer in self.survivors():
            if len(peer.log) > header.step:
                known = self.network.now - peer.born > 2 * PRESENCE_SECONDS
                if known and self.positions(peer.log[: header.step + 1]).lineage == lineage:
                    bearers.append(peer.name)
            elif peer.name in members and peer.position.lineage == header.parent:
                bearers.append(peer.name)
        return bearers

    def reborn(self, roster: tuple[PeerId, ...], parent: str, ballot: Ballot) -> set[PeerId]:
        """Those on the roster that have died, or have started anew, since the attempt began."""
        began = self.frozen[parent, ballot]
        return {peer for peer in roster if not self.peers[peer].alive or self.peers[peer].born > began}

    def said(self, peer: Peer, message: Message) -> None:
        """A peer speaks: it commits only what all hold (I1), and it keeps its promises (I7)."""
        match message:
            case Commit(header=header) if (header.parent, header.ballot) not in self.declared:
                self.declared.add((header.parent, header.ballot))
                missing = set(header.roster) - self.holders[header.parent, header.ballot]
                gone = self.reborn(header.roster, header.parent, header.ballot)
                if peer.name != header.ballot.leader or peer.name in gone:
                    # A successor decides with those that live and answer.
                    missing = set() if self.story.may_fork else missing - gone - self.hung()
                if missing:
                    raise Violation(
                        f"I1: {peer.name} commits step {header.step}, which {missing} does not hold"
                    )
            case Answer(question=Ballot() as ballot, held=None):
                peer.promised = (message.position.lineage, ballot)
            case Done(header=header) if peer.promised is not None:
                lineage, ballot = peer.promised
                if header.parent == lineage and header.ballot < ballot:
                    raise Violation(f"I7: {peer.name} is Done with {header.ballot} after promising {ballot}")
            case _:
                pass

    def check(self, peer: Peer) -> None:
        """After every event: I3."""
        before, after = self.heights.get(peer.name), peer.position
        if before is after:
            return
        if before is not None and heavier(before, after) and peer.alive:
            raise Violation(f"I3: {peer.name} fell from {before} to {after}")
        self.heights[peer.name] = after

    # -- the story -------------------------------------------------------------------------------------------

    def spawn(self, name: PeerId, log: list[tuple[EntryHeader, str]] | None = None) -> None:
        self.heights.pop(name, None)
        peer = Peer(self, name, self.serial(), log or [])
        self.peers[name] = peer
        peer.start()

    def schedule(self) -> None:
        story, chance, net = self.story, self.chance, self.network
        for index in range(story.peers):
            net.at(chance.uniform(0, 0.5), partial(self.spawn, PeerId(f"p{index}")))
        for index in range(story.joins):
            net.at(chance.uniform(2, story.seconds / 2), partial(self.spawn, PeerId(f"j{index}")))
        for _ in range(story.crashes):
            net.at(chance.uniform(1, story.seconds / 2), self.crash_one)
        for _ in range(story.pauses):
            net.at(chance.uniform(1, story.seconds / 2), self.pause_one)
        for _ in range(story.hangs):
            net.at(chance.uniform(1, story.seconds / 2), self.hang_one)
        for _ in range(story.partitions):
            at = chance.uniform(1, story.seconds / 3)
            net.at(at, self.split)
            net.at(at + chance.uniform(1, 6), net.heal)

    def survivors(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if peer.alive and not peer.hung]

    def hung(self) -> set[PeerId]:
        return {peer.name for peer in self.peers.values() if peer.hung}

    def crash_one(self) -> None:
        if not self.survivors():
            return
        peer = self.chance.choice(self.survivors())
        peer.crash()
        if self.story.restarts:
            kept = self.chance.choice([0, len(peer.log) // 2, max(len(peer.log) - 1, 0), len(peer.log)])
            back = self.chance.uniform(0.1, 6.0)
            self.network.after(back, lambda: self.spawn(peer.name, peer.log[:kept]))

    def hang_one(self) -> None:
        """The machine is there and says nothing any more: no link breaks, so only silence tells."""
        if self.survivors():
            peer = self.chance.choice(self.survivors())
            self.trace(peer.name, "hangs")
            peer.paused = peer.hung = True

    def pause_one(self) -> None:
        if self.survivors():
            peer = self.chance.choice(self.survivors())
            self.trace(peer.name, "pauses")
            peer.paused = True
            self.network.after(self.chance.uniform(0.5, 6.0), peer.resume)

    def split(self) -> None:
        names = sorted(self.peers)
        self.chance.shuffle(names)
        cut = self.chance.randrange(len(names) + 1)
        self.network.partition([set(names[:cut]), set(names[cut:])])

    def run(self) -> Simulation:
        """Play the story, then demand that the survivors agree and go on (liveness, I6, I7)."""
        self.schedule()
        self.network.run(until=self.story.seconds, max_events=400_000)
        alive = self.survivors()
        if not alive:
            return self
        start = max((peer.position for peer in alive), key=lambda p: (p.weight, p.step, p.lineage))
        goal, patience = start.step + 3, self.network.now + self.story.patience_seconds
        while any(peer.position.step < goal for peer in alive):
            if self.network.now >= patience:
                late = {peer.name: peer.position.step for peer in alive}
                raise Violation(f"stuck: the swarm stood at step {start.step}, and now {late}")
            self.network.run(until=self.network.now + 1.0, max_events=400_000)
        # The last entries may still be on their way; what was settled a few steps ago must be one lineage.
        depth = min(len(peer.log) for peer in alive) - 2
        if depth > 0 and len({self.positions(peer.log[:depth]).lineage for peer in alive}) != 1:
            raise Violation(f"survivors disagree at step {depth}: {[peer.name for peer in alive]}")
        return self


# -- telling it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ending:
    """How one story ended. `broke` is None, or the invariant that did not hold and what led there."""

    seed: int
    broke: str | None
    happened: Counter[str]
    """How often what happened: steps, forks, rollbacks, and aborts by their cause."""


def play(seed: int, machine: type[Member] = Member, story: Story | None = None) -> Ending:
    """Play one story to its end; whatever goes wrong is told, never raised."""
    sim = Simulation(seed, story, machine=machine)
    # A story makes many cycles and ends soon: the collector would take a sixth of the time, and find little.
    gc.disable()
    try:
        sim.run()
        broke = None
    except Violation as violation:
        broke = str(violation)
    except Exception:
        broke = traceback.format_exc()
    finally:
        gc.enable()
    happened = Counter({f"abort {cause.value}": count for cause, count in sim.aborts.items()})
    happened += Counter(
        steps=max((peer.position.step for peer in sim.survivors()), default=0),
        forks=sim.forks,
        rollbacks=sim.rollbacks,
    )
    if broke is not None:
        tail = "\n".join(list(sim.lines())[-TAIL_LINES:])
        broke = f"seed {seed}: {broke}\n{tail}\nreplay: python -m tests.simulation {seed}"
    return Ending(seed, broke, happened)


SHORTER = [
    (r"kind='\w+', |, \w+=None|, \w+=\(\)|, spans=\([\d, ]*\)|, squared_norms=\([\d., ]*\)", ""),
    (r"'([0-9a-f]{6})[0-9a-f]{58}'", r"\1"),
    (r"Position\(step=(\d+), lineage=(\w+), weight=(\d+)\)", r"\1/\2/\3"),
    (r"Ballot\(number=(\d+), leader='(\w+)'\)", r"\1·\2"),
    (r"EntryHeader\(step=(\d+), parent=(\w+), ballot=(\S+), roster=\(", r"Entry(\1 of \2 by \3, ("),
]


def shown(what: object) -> str:
    """An effect or an event on one line: positions as step/lineage/weight, ballots as number·leader."""
    text = what if isinstance(what, str) else repr(what)
    if isinstance(what, Send):
        text = f"→ {what.to} {what.message!r}"
    for long, short in SHORTER:
        text = re.sub(long, short, text)
    return text
