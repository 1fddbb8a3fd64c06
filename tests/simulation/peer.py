"""The rim around one production machine: fake work, fake sums, a log in memory, and its own misfortune.

A contribution is a tuple of sample ids, the "averaged bytes" are the text that lists which contributions went
in. Everything that decides is `p2ptrain.protocol`.
"""

from __future__ import annotations

import zlib
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from p2ptrain.errors import BadMessage
from p2ptrain.events import AbortCause
from p2ptrain.protocol.audit import frozen
from p2ptrain.protocol.leader import Phase
from p2ptrain.protocol.ledger import Leases, Ranges, lease, numbers
from p2ptrain.protocol.lineage import digest_of, heavier
from p2ptrain.protocol.member import Stage
from p2ptrain.protocol.reduction import Reduction
from p2ptrain.protocol.round import Apply, Begin, Cancel, CatchUp, Effect, Send
from p2ptrain.records import (
    Answer,
    Ask,
    Averaged,
    Ballot,
    Chunk,
    Commit,
    Done,
    EntryHeader,
    Failed,
    Freeze,
    Message,
    PeerId,
    Position,
    Report,
)
from tests.simulation import lies
from tests.simulation.audits import LIE, Audits, Proof
from tests.simulation.invariants import Violation, computed_at

if TYPE_CHECKING:
    from tests.simulation.sim import Simulation

Log = list[tuple[EntryHeader, str]]

PRESENCE_SECONDS = 2.0
PRESENCE_LASTS_SECONDS = 15.0
FETCH_SECONDS = 1.0
DATA, REQUESTS = "data", "requests"
MAX_EARLY = 200


class Stopped(Exception):
    """The process ends at this point of its program."""


@dataclass(frozen=True)
class Fetch:
    """A peer that catches up asks a donor for everything."""

    number: int


@dataclass(frozen=True)
class Fetched:
    number: int
    log: tuple[tuple[EntryHeader, str], ...]


@dataclass(frozen=True)
class Frame:
    """What travels on the data lane; `lie` says how it breaks the contract, if it does."""

    header: Chunk | Averaged
    payload: tuple[str, ...] | str
    lie: str = ""


class Name(NamedTuple):
    """How a frame says to which attempt it belongs."""

    step: int
    parent: str
    ballot: Ballot
    freeze: str
    """Its digest."""


@dataclass
class Attempt:
    name: Name
    freeze: Freeze
    leases: Leases | None
    reduction: Reduction
    sealed: float | None = None
    """When this peer brought its contribution."""
    failed: bool = False
    """It was given up, which is told once, however often the same bad frame comes again."""
    contributions: dict[PeerId, tuple[str, ...]] = field(default_factory=dict)
    averaged: dict[tuple[int, int], str] = field(default_factory=dict)
    sent: dict[PeerId, list[Frame]] = field(default_factory=lambda: defaultdict(list))


def belongs(header: Chunk | Averaged, attempt: Attempt) -> bool:
    return (header.step, header.parent, header.ballot, header.freeze) == attempt.name


class Peer:
    """One incarnation of a peer. Whatever happens to it comes through `do`."""

    def __init__(self, sim: Simulation, name: PeerId, incarnation: int, log: Log) -> None:
        self.sim, self.name, self.incarnation = sim, name, str(incarnation)
        self.alive, self.paused, self.hung = True, False, False
        self.born = sim.network.now
        self.inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        """What happens while the process stands still; its timers are among it."""
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
        self.lease: Ranges = ()
        """Where samples are leased: what this peer draws from."""
        self.skipped: list[int] = []
        """Numbers of leased samples whose gradient was not finite."""
        self.attempt: Attempt | None = None
        self.applying = False
        self.early: deque[tuple[PeerId, Frame]] = deque(maxlen=MAX_EARLY)
        self.fetching = 0
        self.left = -1.0
        """When it last went outside: whatever it held then, it has dropped."""
        self.alarm = float("inf")
        self.batch = min(sim.chance.choice([2, 4, 4, 8]), sim.rules.target_batch_size)
        self.pace = sim.chance.choice([0.1, 0.2, 0.3]) * (10 if sim.story.slow and name == "p0" else 1)
        self.audits = Audits(self) if sim.story.audited else None
        self.lies: list[str] = []
        """What it will say that is not so, each once, at the first occasion."""

    # -- life ------------------------------------------------------------------------------------------------

    def do(self, act: Callable[..., None], *args: Any) -> None:
        """One event of this process: it waits while the process stands still, and may be its last."""
        if not self.alive or self.hung:
            return
        if self.paused:
            self.inbox.append((act, args))
            return
        try:
            act(*args)
        except Stopped:
            self.sim.fell(self)
            return
        self.sim.invariants.after(self)

    def later(self, seconds: float, act: Callable[..., None], *args: Any) -> None:
        self.sim.network.after(seconds, partial(self.do, act, *args))

    def start(self) -> None:
        net = self.sim.network
        net.attach(self.name, partial(self.do, self.take), partial(self.do, self.on_link))
        self.machine.informed(self.sim.present(self), net.now)
        self.carry_out(self.machine.advance(self.position, self.last, net.now, settled=False))
        self.work()
        self.publish()

    @property
    def last(self) -> EntryHeader | None:
        return self.log[-1][0] if self.log else None

    def publish(self) -> None:
        if self.audits is not None:
            self.audits.tell()
        shown = self.boast(self.position)
        self.sim.presence[self.name] = (shown, self.sim.network.now + PRESENCE_LASTS_SECONDS)
        self.carry_out(self.machine.informed(self.sim.present(self), self.sim.network.now))
        self.later(PRESENCE_SECONDS, self.publish)

    def die(self) -> None:
        self.alive = False
        self.sim.network.detach(self.name)

    def resume(self) -> None:
        if not self.paused:
            return
        self.sim.note(self.name, "goes on")
        self.paused = False
        while self.inbox and not self.paused:
            act, args = self.inbox.popleft()
            self.do(act, *args)

    # -- work ------------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Start a micro-batch, unless one runs or an attempt goes on; say how far this peer is."""
        self.keep_lease(self.machine.leases())
        full = len(self.samples) >= self.sim.rules.target_batch_size
        if not full and not self.to_draw() and self.attempt is None:
            self.forget_samples()  # too many of them were not finite
            self.keep_lease(self.machine.leases())
        full = full or not self.to_draw()
        idle = self.batch_at is None and self.attempt is None and not full
        if idle and self.machine.stage is not Stage.OUTSIDE:
            self.batch_at = self.position
            self.later(self.pace * self.sim.chance.uniform(0.9, 1.2), self.worked, self.lease)
        in_flight = self.batch if self.batch_at == self.position else 0
        now = self.sim.network.now
        self.carry_out(self.machine.progressed(len(self.samples), in_flight, self.pace, self.pace, None, now))

    def to_draw(self) -> int:
        """How many samples it may still begin."""
        if not self.sim.rules.leased:
            return self.batch
        return min(self.batch, sum(stop - start for start, stop in self.lease) - self.drawn)

    def keep_lease(self, leases: Leases | None) -> None:
        """Go by the lease that holds now; what was computed on another is lost."""
        held = () if leases is None else lease(leases, self.name)
        if held != self.lease:
            self.forget_samples()
            self.lease = held

    def forget_samples(self) -> None:
        self.samples, self.late, self.skipped = [], [], []
        if self.sim.rules.leased:
            self.drawn, self.lease = 0, ()

    def worked(self, leased: Ranges) -> None:
        began, self.batch_at = self.batch_at, None
        if began is not None and began == self.position and leased == self.lease:
            origin = f"{computed_at(began.step, began.lineage)}/{self.name}/{self.incarnation}"
            count = self.to_draw()
            drawn = list(range(self.drawn, self.drawn + count))
            if self.sim.rules.leased:
                drawn = numbers(self.lease, self.drawn, count)
            ids = [f"{origin}/{number}" for number in drawn]
            self.drawn += count
            if self.lease and self.sim.chance.random() < self.sim.story.skips:
                self.sim.happened["skipped"] += 1
                self.skipped += drawn
            elif self.attempt is None or self.attempt.sealed is None:
                self.samples += ids
            else:
                self.late += ids
        if self.attempt is not None:
            self.seal(self.attempt)
        self.work()

    # -- one attempt -----------------------------------------------------------------------------------------

    def begin(self, freeze: Freeze) -> None:
        leases = self.machine.leases(freeze.ballot.leader)
        most = self.sim.rules.most_samples
        reduction = Reduction(freeze, self.name, self.sim.story.chunk_values, most, leases)
        name = Name(freeze.step, freeze.parent, freeze.ballot, frozen(freeze))
        attempt = Attempt(name, freeze, leases, reduction)
        self.attempt = attempt
        self.sim.invariants.began((freeze.parent, freeze.ballot), name.freeze)
        self.later(freeze.deadline_seconds, self.give_up, attempt, AbortCause.DEADLINE)
        if self.name in freeze.finishing and self.batch_at == self.position:
            self.later(freeze.cutoff_seconds, self.seal, attempt)
        else:
            self.seal(attempt)
        early, self.early = self.early, deque(maxlen=MAX_EARLY)
        for sender, frame in early:
            self.sim.happened["frame before its freeze"] += 1
            self.on_data(sender, frame)

    def give_up(self, attempt: Attempt, cause: AbortCause, suspects: list[PeerId] | None = None) -> None:
        if self.attempt is attempt and not attempt.reduction.complete and not attempt.failed:
            attempt.failed = True
            blamed = attempt.reduction.suspects() if suspects is None else suspects
            self.carry_out(self.machine.failed(attempt.freeze.ballot, blamed, cause, self.sim.network.now))

    def seal(self, attempt: Attempt) -> None:
        if self.attempt is not attempt or attempt.sealed is not None:
            return
        attempt.sealed = self.sim.network.now
        self.keep_lease(attempt.leases)
        freeze, mine, skipped = attempt.freeze, tuple(self.samples), tuple(self.skipped)
        self.sim.invariants.skipped[(freeze.parent, freeze.ballot), self.name] = skipped
        self.sim.invariants.sealed[(freeze.parent, freeze.ballot), self.name] = len(mine)
        name, counts = attempt.name._asdict(), {"samples": len(mine), "skipped": len(skipped)}
        most = max(attempt.reduction.chunks) if mine else 1
        frames = [Frame(Chunk(**name, **counts, number=number), mine) for number in range(most)]
        for chunks, reducer in zip(attempt.reduction.chunks, freeze.roster, strict=True):
            for frame in frames[:chunks]:
                self.send_data(attempt, reducer, frame)

    def send_data(self, attempt: Attempt, to: PeerId, frame: Frame) -> None:
        if to == self.name:
            self.on_data(self.name, frame)
            return
        if self.lies:
            frame = self.bend(frame, attempt.sent[to])
        attempt.sent[to].append(frame)
        self.send(to, frame, DATA)

    def on_data(self, sender: PeerId, frame: Frame) -> None:
        attempt, header = self.attempt, frame.header
        if attempt is None or not belongs(header, attempt):
            if header.step in (self.position.step, self.position.step + 1):
                self.early.append((sender, frame))
            return
        reduction, freeze = attempt.reduction, attempt.freeze
        try:
            if isinstance(header, Chunk):
                taken = reduction.accept(sender, header)
            else:
                taken = reduction.receive(sender, header)
        except BadMessage as fault:
            # Only who restarts inside an attempt, or lies, contradicts what it said before.
            if not frame.lie and not self.sim.invariants.reborn(
                freeze.roster, (freeze.parent, freeze.ballot)
            ):
                raise Violation(f"I5: {self.name} refuses what an honest peer sent: {fault}") from fault
            self.sim.happened[f"refused {frame.lie or 'a stranger'}"] += 1
            self.give_up(attempt, AbortCause.BAD_CHUNK, [sender])
            return
        if taken and frame.lie not in ("", "two faces"):
            raise Violation(f"I5: {self.name} took {header}, a lie about {frame.lie}, from {sender}")
        if isinstance(header, Chunk):
            if taken:
                attempt.contributions[sender] = frame.payload  # type: ignore[assignment]
            for number in reduction.ready():
                self.average(attempt, number)
            return
        if taken:
            attempt.averaged[(freeze.roster.index(sender), header.number)] = str(frame.payload)
            if reduction.complete:
                self.hold(attempt)

    def hold(self, attempt: Attempt) -> None:
        content = [attempt.averaged[key] for key in sorted(attempt.averaged)]
        header = attempt.reduction.header(digest_of(text.encode() for text in content))
        if len({text.rstrip("!" + LIE) for text in content}) != 1:
            raise Violation(f"I4: {self.name} holds spans of different contributions: {sorted(set(content))}")
        self.sim.invariants.contents[header.digest] = max(content, key=len)
        self.sim.invariants.held(self, header)
        now = self.sim.network.now
        self.machine.sent_at(1.0 + zlib.crc32(f"{self.name}{header.digest}".encode()) % 1000)
        self.carry_out(self.machine.held(header, now - (attempt.sealed or now), now))

    def average(self, attempt: Attempt, number: int) -> None:
        roster, reduction = attempt.freeze.roster, attempt.reduction
        if not reduction.contributors():
            self.give_up(attempt, AbortCause.BAD_CHUNK, [])
            return
        content = ";".join(",".join(attempt.contributions[roster[rank]]) for rank in reduction.contributors())
        if "sum" in self.lies:  # from now on in each round
            self.sim.happened["lie sum"] += 1
            self.sim.liars.add(self.name)
            content += LIE
        header = Averaged(
            **attempt.name._asdict(),
            number=number,
            samples=reduction.samples,
            skipped=reduction.skipped,
            squared_norm=1.0 if number == reduction.chunks[reduction.rank] - 1 else None,
        )
        frame = Frame(header, content)
        for peer in roster:
            if peer != self.name:
                self.send_data(attempt, peer, frame)
        self.send_data(attempt, self.name, frame)

    # -- effects and events ----------------------------------------------------------------------------------

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            self.sim.note(self.name, effect)
            match effect:
                case Send(to, message):
                    self.speak(to, message)
                case Begin(freeze):
                    self.begin(freeze)
                case Cancel(ballot, cause, _):
                    self.sim.happened[f"abort {cause.value}"] += 1
                    if self.attempt is not None and self.attempt.freeze.ballot == ballot:
                        self.attempt = None
                    self.samples += self.late
                    self.late = []
                    self.later(0.0, self.work)
                case Apply(header, newcomers):
                    self.sim.invariants.declared(self, header)
                    if self.audits is not None and self.attempt is not None:
                        self.audits.committed(header, self.attempt)
                    self.attempt, self.applying = None, True
                    self.later(self.sim.chance.uniform(0.001, 0.02), self.apply, header, newcomers)
                case CatchUp(undo=int() as step):
                    assert self.audits is not None
                    self.attempt, self.left, self.applying = None, self.sim.network.now, True
                    self.later(self.sim.chance.uniform(0.001, 0.02), self.audits.undone, step)
                case CatchUp(donor, _):
                    self.attempt, self.left = None, self.sim.network.now
                    self.fetch(donor)
                case _:
                    self.sim.happened[type(effect).__name__] += 1
        due = self.machine.deadline()
        if due < self.alarm:
            self.alarm = due
            self.sim.network.at(max(due, self.sim.network.now), partial(self.do, self.wake))

    def speak(self, to: PeerId, message: Message) -> None:
        """Send a control message: where a leader may fall, and where a liar boasts."""
        sim = self.sim
        if sim.falls:
            match message:
                case Ask(ballot=Ballot()) if sim.falls_now(self, "asking", 0.3):
                    raise Stopped
                case Commit(position=position):
                    header = sim.invariants.leading_to(position)
                    if header.ballot.leader == self.name:
                        if not sim.told(header) and sim.falls_now(self, "all done"):
                            raise Stopped
                        if sim.told(header) and sim.falls_now(self, "half told"):
                            raise Stopped
                case _:
                    pass
        if self.lies and isinstance(message, Answer) and message.question is None:
            message = message.model_copy(update={"position": self.boast(message.position)})
        elif self.lies and isinstance(message, Report) and self.tell("report"):
            message = message.model_copy(update={"samples": sim.rules.most_samples + 1})
        sim.invariants.said(self, message)
        self.send(to, message)
        if sim.story.duplicates and sim.chance.random() < sim.story.duplicates:
            sim.happened["fault duplicate"] += 1
            self.later(sim.chance.choice([0.0, sim.chance.random()]), self.send, to, message)

    def send(self, to: PeerId, message: object, lane: str = "control") -> None:
        self.sim.cross(self)
        self.sim.network.send(self.name, to, message, lane)
        self.sim.cross(self)

    def take(self, sender: PeerId, message: object) -> None:
        """Something has arrived."""
        self.sim.cross(self)
        match message:
            case Frame():
                self.on_data(sender, message)
            case Fetch(number):
                if self.sim.donor_dies(self):
                    raise Stopped
                self.send(sender, Fetched(number, self.donated()), REQUESTS)
            case Fetched(number, log):
                if number == self.fetching:
                    self.fetched(sender, log)
            case Proof():
                assert self.audits is not None
                self.audits.proven(message)
            case _:
                if self.sim.falls and self.machine.leader is not None and self.falls_before(message):
                    return
                self.carry_out(self.machine.received(sender, message, self.sim.network.now))  # type: ignore[arg-type]
        self.sim.cross(self)

    def falls_before(self, message: object) -> bool:
        """Whether this leader falls before it reads the message. It stands still and reads it later, or it
        dies of it."""
        leader = self.machine.leader
        assert leader is not None
        match leader.phase, message:
            case Phase.ASKING, Answer(question=Ballot()):
                phase = "asking"
            case Phase.COLLECTING, Report():
                phase = "collecting"
            case Phase.REDUCING, Done() | Failed():
                phase = "reducing"
            case _:
                return False
        if not self.sim.falls_now(self, phase):
            return False
        if not self.sim.story.leader_pauses:
            raise Stopped
        self.sim.pause(self)
        return False

    def wake(self) -> None:
        self.alarm = float("inf")
        self.carry_out(self.machine.tick(self.sim.network.now))
        if self.sim.rules.leased and self.batch_at is None and self.attempt is None:
            self.work()  # who leads now has a lease

    def on_link(self, peer: PeerId, up: bool) -> None:
        self.sim.note(self.name, f"link to {peer} {'reset' if up else 'lost'}")
        self.sim.happened["link reset" if up else "link lost"] += 1
        self.carry_out(self.machine.linked(peer, up, self.sim.network.now))
        if up and self.attempt is not None:
            for frame in list(self.attempt.sent.get(peer, ())):
                self.send(peer, frame, DATA)

    # -- the log ---------------------------------------------------------------------------------------------

    def apply(self, header: EntryHeader, newcomers: tuple[PeerId, ...]) -> None:
        self.applying = False
        self.adopt([*self.log, (header, self.sim.invariants.contents[header.digest])])
        now = self.sim.network.now
        self.carry_out(self.machine.advance(self.position, self.last, now, newcomers=newcomers, settled=True))
        if self.audits is not None:
            self.audits.look_for_lies()
        self.work()

    def go_back(self, step: int, above: Ballot) -> None:
        """Undo the entry of that step and all after it."""
        self.applying = False
        self.log = self.log[:step]
        self.position = self.sim.positions(self.log)
        self.sim.invariants.undone(self)
        self.forget_samples()
        now = self.sim.network.now
        self.carry_out(self.machine.advance(self.position, self.last, now, settled=False, above=above))
        self.work()

    def adopt(self, log: Log) -> None:
        before = self.position
        shared = min(len(log), len(self.log))
        while shared and log[shared - 1] != self.log[shared - 1]:
            shared -= 1  # equal entries have equal parents, so the newest common one settles it
        if shared < len(self.log):
            self.sim.happened["rollbacks"] += 1
        after = self.sim.positions(log)
        self.sim.invariants.rose(self, before, after)
        for index in range(shared, len(log)):
            self.sim.invariants.applied(log[: index + 1])
        self.log, self.position = log, after
        self.forget_samples()

    def fetch(self, donor: PeerId) -> None:
        """State transfer: one message there, one back, with a deadline."""
        self.fetching = self.sim.serial()
        self.send(donor, Fetch(self.fetching), REQUESTS)
        self.later(FETCH_SECONDS, self.fetch_overdue, donor, self.fetching)

    def fetch_overdue(self, donor: PeerId, number: int) -> None:
        if self.fetching == number:
            self.no_help(donor)

    def fetched(self, donor: PeerId, log: tuple[tuple[EntryHeader, str], ...]) -> None:
        theirs = self.sim.verified(log)
        if theirs is None:
            self.sim.happened["refused a donor's log"] += 1
            self.carry_out(self.machine.offended(donor, self.sim.network.now))
            self.no_help(donor)
        elif self.audits is not None and self.audits.lie_in(list(log)) is not None:
            self.audits.tell()  # the donor, too
            self.no_help(donor)
        elif not heavier(theirs, self.position):
            self.machine.known[donor] = theirs
            self.no_help(donor)
        else:
            self.machine.known[donor] = theirs
            self.adopt(list(log))
            self.back_in()

    def no_help(self, donor: PeerId) -> None:
        self.machine.unhelpful(donor)
        self.back_in()

    def back_in(self) -> None:
        self.fetching = 0
        if self.sim.rules.leased:
            self.forget_samples()  # another incarnation begins its lease anew
            self.batch_at = None
        self.carry_out(self.machine.advance(self.position, self.last, self.sim.network.now, settled=False))
        if self.audits is not None:
            self.audits.look_for_lies()
        self.work()

    # -- lies ------------------------------------------------------------------------------------------------

    def bend(self, frame: Frame, before: list[Frame]) -> Frame:
        """The frame, or one that breaks the contract; `before` went to the same peer."""
        header = frame.header
        if self.sim.chance.random() < 0.5:
            return frame  # a lie that contradicts something honest comes later
        if isinstance(header, Chunk):
            if not self.tell("chunk"):
                return frame
            committed = any(isinstance(one.header, Chunk) and not one.lie for one in before)
            ways = lies.about_a_chunk(header, self.sim.rules.most_samples, already_counted=committed)
        elif self.tell("two faces"):
            return Frame(header, f"{frame.payload}!", "two faces")
        elif self.tell("mean"):
            ways = lies.about_a_mean(header)
        else:
            return frame
        lie = self.sim.chance.choice(sorted(ways))
        return Frame(header.model_copy(update=ways[lie]), frame.payload, lie)

    def boast(self, position: Position) -> Position:
        if not self.lies or not self.tell("boast"):
            return position
        return position.model_copy(update={"weight": position.weight + 1000, "step": position.step + 5})

    def donated(self) -> tuple[tuple[EntryHeader, str], ...]:
        """The log, or one that does not hold."""
        log = tuple(self.log)
        if not log or not self.lies or not self.tell("donor"):
            return log
        return self.sim.chance.choice(lies.about_a_log(log))

    def tell(self, lie: str) -> bool:
        if lie not in self.lies:
            return False
        self.lies.remove(lie)
        self.sim.happened[f"lie {lie}"] += 1
        self.sim.liars.add(self.name)
        self.sim.note(self.name, f"lies: {lie}")
        return True
