"""Protocol stories as transcripts: an event per line, and under it the effects it has.

    a b stand at step 6        they just applied an entry of this roster; it is a's turn to lead
    a did 4                    the trainer's report: samples done; `a did 4, 2 more in 0.5 s`, `a did 4 as x`
      → b: …                   a message is on its way; it waits there until
    b ← a                      it arrives, the oldest first, or
    b ✕ a                      is lost
    a holds m                  every span is here, and they are the bytes m; `a misses b c`: they are not
    a arrives                  the entry is applied; `c starts at step 0 seeing a` has just come online
    a sees b at step 9         b's presence record says so
    a loses b                  the link is down; `a dies` takes a machine and all its messages off the net
    a ticks 1 s later          time passes for all, and this machine is told so
    # …                        a remark

Every machine is the production one. `tell` plays the events and compares with what the transcript says.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable
from textwrap import dedent
from typing import assert_never

from p2ptrain.events import AbortCause
from p2ptrain.protocol.lineage import advance
from p2ptrain.protocol.member import Member
from p2ptrain.protocol.roster import freeze_of
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
    Waiting,
)
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
    Withdraw,
)

RULES = Rules(
    target_batch_size=8,
    min_peers=1,
    max_peers=8,
    values=12,
    encoded_bytes=0,
    heartbeat_seconds=1.0,
    silence_seconds=3.0,
    silence_most_seconds=60.0,
    attempt_most_seconds=3600.0,
)
SAMPLES_EACH = 4
"""Of every member, in every entry of these stories."""


def tell(transcript: str, rules: Rules = RULES) -> Story:
    """Play the events of the transcript; assert that the machines answer as it says."""
    expected = dedent(transcript).strip("\n").rstrip()
    story = Story(rules)
    played: list[str] = []
    for line in expected.splitlines():
        if not line or line.startswith("#"):
            played.append(line)
        elif not line.startswith(" "):
            played.append(line)
            played += [f"  {effect}" for effect in story.play(line)]
    assert "\n".join(played) == expected
    return story


class Story:
    """Machines, what is on its way between them, and one clock."""

    def __init__(self, rules: Rules = RULES) -> None:
        self.rules = rules
        self.now = 0.0
        self.machines: dict[PeerId, Member] = {}
        self._roster: tuple[PeerId, ...] = ()
        self._applying: dict[PeerId, Apply] = {}
        self._on_the_way: dict[tuple[PeerId, PeerId], deque[Message]] = {}
        self._digests: dict[str, str] = {}
        self._entries: dict[str, str] = {}
        """How an entry is shown, by the lineage that it leads to."""
        self._events: list[tuple[re.Pattern[str], Callable[..., Iterable[Effect]]]] = [
            (re.compile(pattern), play)
            for pattern, play in (
                (r"(\w+(?: \w+)*) stand at step (\d+)", self._stand),
                (r"(\w+) starts at step (\d+)(?: seeing (\w+(?: \w+)*))?", self._start),
                (r"(\w+) sees (\w+) at step (\d+)", self._see),
                (r"(\w+) did (\d+)(?:, (\d+) more in ([\d.]+) s)?(?: as (\w+))?", self._did),
                (r"(\w+) ← (\w+)", self._receive),
                (r"(\w+) ✕ (\w+)", self._lose_message),
                (r"(\w+) holds (\w+)", self._hold),
                (r"(\w+) misses (\w+(?: \w+)*)", self._miss),
                (r"(\w+) arrives", self._arrive),
                (r"(\w+) loses (\w+)", self._lose),
                (r"(\w+) withdraws", self._withdraw),
                (r"(\w+) is back", self._come_back),
                (r"(\w+) dies", self._die),
                (r"(\w+) ticks ([\d.]+) s later", self._tick),
            )
        ]

    def play(self, line: str) -> list[str]:
        """One event; the effects it has, as a transcript shows them."""
        for pattern, play in self._events:
            if words := pattern.fullmatch(line):
                return [self._shown(effect) for effect in self._carry_out(play(*words.groups()))]
        raise AssertionError(f"no such event in a transcript: {line!r}")

    # -- events ----------------------------------------------------------------------------------------------

    def _stand(self, names: str, step: str) -> Iterable[Effect]:
        self._roster = tuple(PeerId(name) for name in names.split())
        position, last = standing_at(int(step), self._roster)
        for name in self._roster:
            self._actor = name
            self.machines[name] = Member(name, "1", self.rules)
            yield from self.machines[name].advance(position, last, self.now, settled=True)

    def _start(self, name: str, step: str, seen: str | None) -> list[Effect]:
        self._actor = PeerId(name)
        position, last = standing_at(int(step), self._roster)
        machine = self.machines[self._actor] = Member(self._actor, "1", self.rules)
        machine.informed({PeerId(other): position for other in (seen or "").split()}, self.now)
        return machine.advance(position, last, self.now, settled=False)

    def _see(self, name: str, other: str, step: str) -> list[Effect]:
        position, _ = standing_at(int(step), self._roster)
        return self._machine(name).informed({PeerId(other): position}, self.now)

    def _did(
        self, name: str, done: str, more: str | None, finish: str | None, state: str | None
    ) -> list[Effect]:
        digest = None if state is None else self._digest(state)
        return self._machine(name).progressed(
            int(done), int(more or 0), float(finish or 0), 1.0, digest, self.now
        )

    def _receive(self, name: str, sender: str) -> list[Effect]:
        message = self._on_the_way[PeerId(sender), PeerId(name)].popleft()
        return self._machine(name).received(PeerId(sender), message, self.now)

    def _lose_message(self, name: str, sender: str) -> list[Effect]:
        self._on_the_way[PeerId(sender), PeerId(name)].popleft()
        return []

    def _hold(self, name: str, content: str) -> list[Effect]:
        machine = self._machine(name)
        assert machine.freeze is not None
        assert machine.position is not None
        header = self.header(machine.freeze, content)
        self._entries[advance(machine.position, header).lineage] = self._entry(header)
        return machine.held(header, 0.0, self.now)

    def _miss(self, name: str, suspects: str) -> list[Effect]:
        machine = self._machine(name)
        assert machine.freeze is not None
        names = [PeerId(suspect) for suspect in suspects.split()]
        return machine.failed(machine.freeze.ballot, names, AbortCause.DEADLINE, self.now)

    def _arrive(self, name: str) -> list[Effect]:
        machine = self._machine(name)
        applied = self._applying.pop(machine.me)
        assert machine.position is not None
        position = advance(machine.position, applied.header)
        return machine.advance(position, applied.header, self.now, newcomers=applied.newcomers, settled=True)

    def _lose(self, name: str, other: str) -> list[Effect]:
        return self._machine(name).linked(PeerId(other), False, self.now)

    def _withdraw(self, name: str) -> list[Effect]:
        return self._machine(name).withdraw()

    def _come_back(self, name: str) -> list[Effect]:
        machine = self._machine(name)
        assert machine.position is not None
        return machine.advance(machine.position, machine.last, self.now, settled=False)

    def _die(self, name: str) -> list[Effect]:
        del self.machines[PeerId(name)]
        for sender, to in list(self._on_the_way):
            if name in (sender, to):
                del self._on_the_way[sender, to]
        return []

    def _tick(self, name: str, seconds: str) -> list[Effect]:
        self.now += float(seconds)
        return self._machine(name).tick(self.now)

    def _machine(self, name: str) -> Member:
        self._actor = PeerId(name)
        return self.machines[self._actor]

    def _carry_out(self, effects: Iterable[Effect]) -> Iterable[Effect]:
        for effect in effects:
            if isinstance(effect, Send):
                self._on_the_way.setdefault((self._actor, effect.to), deque()).append(effect.message)
            elif isinstance(effect, Apply):
                self._applying[self._actor] = effect
            yield effect

    # -- words -----------------------------------------------------------------------------------------------

    def header(self, freeze: Freeze, content: str) -> EntryHeader:
        """The entry that this attempt would commit if its averaged bytes were `content`."""
        return EntryHeader(
            step=freeze.step,
            parent=freeze.parent,
            ballot=freeze.ballot,
            roster=freeze.roster,
            samples=(SAMPLES_EACH,) * len(freeze.roster),
            spans=freeze.spans,
            squared_norms=(1.0,) * len(freeze.roster),
            digest=self._digest(content),
        )

    def _digest(self, content: str) -> str:
        digest = content.encode().hex().ljust(64, "0")
        self._digests[digest] = content
        return digest

    def _shown(self, effect: Effect) -> str:
        match effect:
            case Send(to, message):
                return f"→ {to}: {self._said(to, message)}"
            case Begin(freeze):
                return f"begins {_ballot(freeze.ballot)}"
            case Cancel(ballot, cause, dropped):
                return f"cancels {_ballot(ballot)} ({cause.value}){_names(' without ', dropped)}"
            case Apply(header, newcomers):
                return f"applies {self._entry(header)}{_names(', expecting ', newcomers)}"
            case CatchUp(donor, position, afresh):
                return f"catches up with {donor} at step {position.step}{' afresh' if afresh else ''}"
            case Diverged(_, ours, theirs):
                return f"diverged: {self._digests[ours]} here, {self._digests[theirs]} there"
            case Distrusted(peer, reason):
                return f"distrusts {peer}: {reason}"
            case Benched(peer, offences, seconds):
                return f"benches {peer} for {seconds:.0f} s after {offences} offences"
            case TookOver(_, ballot):
                return f"takes over as {_ballot(ballot)}"
            case Waiting(reason):
                return f"waits: {reason}"
            case _:
                assert_never(effect)

    def _said(self, to: PeerId, message: Message) -> str:
        match message:
            case Report():
                more = f", {message.in_flight} more" if message.in_flight else ""
                state = f" as {self._digests[message.state_digest]}" if message.state_digest else ""
                return f"report {message.samples}{more}{state}"
            case Call():
                freeze = freeze_of(to, message, self.machines[self._actor].last, self.rules.values)
                assert freeze is not None
                finishing = _names(", finishing ", freeze.finishing)
                return f"freeze {_ballot(freeze.ballot)} of{_names(' ', freeze.roster)}{finishing}"
            case Done():
                return f"done {self._led_by(message.position)}"
            case Failed():
                return (
                    f"failed {_ballot(message.ballot)} ({message.cause}){_names(' for ', message.suspects)}"
                )
            case Commit():
                return f"commit {self._led_by(message.position)}{_names(', expecting ', message.newcomers)}"
            case Abort():
                return (
                    f"abort {_ballot(message.ballot)} ({message.cause}){_names(' without ', message.dropped)}"
                )
            case Ask():
                about = f", to lead as {_ballot(message.ballot)}" if message.ballot else ""
                return f"ask from step {message.position.step}{about}"
            case Answer():
                parts = [f"answer step {message.position.step}, {message.leader} leads"]
                if message.question is not None:
                    parts.append(f"obeys {_ballot(message.question)}")
                if message.held is not None:
                    parts.append(f"holds {self._led_by(message.held)}")
                return ", ".join(parts)
            case Resync():
                return f"resync to {self._digests[message.state_digest]} from {message.donor}"
            case Withdraw():
                return "withdraw"
            case Accusation():
                return f"accusation of {message.against}"
            case _:
                assert_never(message)

    def _entry(self, header: EntryHeader) -> str:
        content = self._digests.get(header.digest, "?")
        return f"{_ballot(header.ballot)} {content}"

    def _led_by(self, position: Position) -> str:
        """The entry that leads there."""
        return self._entries.get(position.lineage, f"to step {position.step}")


def standing_at(step: int, roster: tuple[PeerId, ...]) -> tuple[Position, EntryHeader | None]:
    """A position, and the entry of that roster which led to it; the same for all who ask."""
    origin = Position(step=max(step - 1, 0), lineage="0" * 64, weight=100 * step)
    if step == 0:
        return origin, None
    last = EntryHeader(
        step=step - 1,
        parent=origin.lineage,
        ballot=Ballot(number=1, leader=roster[0]),
        roster=roster,
        samples=(SAMPLES_EACH,) * len(roster),
        spans=tuple(range(len(roster) + 1)),
        squared_norms=(1.0,) * len(roster),
        digest="e" * 64,
    )
    return advance(origin, last), last


def _ballot(ballot: Ballot) -> str:
    return f"{ballot.number}/{ballot.leader}"


def _names(before: str, peers: Iterable[PeerId]) -> str:
    names = " ".join(peers)
    return f"{before}{names}" if names else ""
