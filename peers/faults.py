"""What happens to a rehearsal swarm, when and to whom: decided here, done by `chaos`.

A `Storm` draws faults at exponential intervals from one seed, so that the same seed and the same story give
the same faults. It is told what became of the peers, and says what is due; time is an argument. No peer is
exempt, the bootstrap neither, and each is struck as often as another. Only the last peer that trains is left
in peace until another does: with it the state would be gone.

Not covered: a fault within a chosen phase of a round. With many faults, every phase has its turn.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto

from p2ptrain.errors import ConfigError

BOOTSTRAP = "bootstrap"
NO_KIND = "none"


class Kind(StrEnum):
    """What can be done to a swarm."""

    KILL = "kill"
    """`kill -9` of a peer, which is started again."""
    PAUSE = "pause"
    """A peer and its libp2p daemon are stopped for a while (SIGSTOP), as a suspended machine is."""
    PARTITION = "partition"
    """The network falls into two parts for a while."""
    LEAVE = "leave"
    """A peer is asked to leave (SIGTERM), and comes back."""
    BOOTSTRAP = "bootstrap"
    """`kill -9` of the bootstrap, which is started again."""
    SPAWN = "spawn"
    """Another peer comes."""
    CROWD = "crowd"
    """All further peers that there may be come at once, and compute on processors of their own."""


def parse_kinds(text: str) -> tuple[Kind, ...]:
    """Kinds from a list with commas, each once; none from `none`. Raises ConfigError."""
    words = [word.strip() for word in text.split(",")]
    if words == [NO_KIND]:
        return ()
    if unknown := [word for word in words if word not in set(Kind)]:
        raise ConfigError(
            f"there is no fault {unknown[0]!r}; --faults takes {', '.join(Kind)}, with commas, or {NO_KIND}"
        )
    return tuple(dict.fromkeys(Kind(word) for word in words))


def parse_rate(text: str) -> float:
    """Events per second from text like `60/h`, `30/min` or `0.5/s`. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)/(h|min|s)", text.strip())
    rate = float(found[1]) / {"h": 3600, "min": 60, "s": 1}[found[2]] if found else 0.0
    if not 0 < rate <= 10:
        raise ConfigError(
            f"--rate must be a number of faults per h, min or s, such as 60/h, at most 10/s, not {text!r}"
        )
    return rate


@dataclass(frozen=True)
class Plan:
    """What kind of storm it is."""

    kinds: tuple[Kind, ...]
    rate: float
    """Faults per second, on the average."""
    absence_seconds: float
    """From a peer's end until it is started again."""
    silence_seconds: float
    """The run's. Pauses last 0.5 to 3 times as long and partitions 1 to 4 times: some are noticed."""
    max_peers: int
    """Beyond them, none comes."""
    seed: int


@dataclass(frozen=True)
class Strike:
    """Do it now."""

    kind: Kind
    on: tuple[str, ...]
    """Whom; one name, but for a crowd all that come, and for a partition the side without the bootstrap."""


@dataclass(frozen=True)
class Mend:
    """Undo it now: start the process, let it go on, join the network again."""

    kind: Kind
    on: tuple[str, ...]


@dataclass(frozen=True)
class Recovered:
    """What was struck takes part again."""

    kind: Kind
    on: tuple[str, ...]
    seconds: float
    """From the first attempt to mend it."""


class Condition(Enum):
    """How a peer is, as far as this process knows."""

    ARRIVING = auto()
    """It runs, but has been in no round since it was last away."""
    TRAINING = auto()
    AWAY = auto()
    """It is stopped, was killed, or is leaving."""


@dataclass
class _Fault:
    kind: Kind
    on: tuple[str, ...]
    mend_at: float | None
    """When to mend it; None if that is done, or waits for the end of a process."""
    mended_at: float | None = None
    """When it was mended first."""
    seen: dict[str, set[bool]] = field(default_factory=dict)
    """Lineage → the sides of a healed partition that have it: whether they are `on` or not."""


class Storm:
    """Decides what happens next. Times are seconds on any one clock that goes forward."""

    def __init__(self, plan: Plan, peers: Iterable[str], now: float) -> None:
        """All peers are in training, and the bootstrap is ready."""
        self.conditions = dict.fromkeys(peers, Condition.TRAINING)
        self.failed_starts = 0
        """How often a peer that was to come back ended before it was in a round."""
        self._plan = plan
        self._random = random.Random(plan.seed)  # noqa: S311 - a seeded schedule, no secret
        self._faults: dict[str, _Fault] = {}  # by peer, or by kind for what strikes none
        self._calm = False
        self._next_at = now + self._gap()

    @property
    def over(self) -> bool:
        """Whether all have recovered from everything."""
        return not self._faults

    @property
    def unrecovered(self) -> list[str]:
        """What has not, in words."""
        return [f"{'+'.join(fault.on)} ({fault.kind})" for fault in self._faults.values()]

    def calm(self, now: float) -> None:
        """No further fault; what is broken is mended at once."""
        self._calm = True
        for fault in self._faults.values():
            if fault.mend_at is not None:
                fault.mend_at = now

    def due(self, now: float) -> list[Strike | Mend]:
        """What is to be done now, in this order; it counts as done."""
        deeds: list[Strike | Mend] = []
        for fault in self._faults.values():
            if fault.mend_at is not None and fault.mend_at <= now:
                fault.mend_at = None
                fault.mended_at = now if fault.mended_at is None else fault.mended_at
                if fault.kind not in (Kind.PARTITION, Kind.BOOTSTRAP):
                    self.conditions[fault.on[0]] = Condition.ARRIVING
                deeds.append(Mend(fault.kind, fault.on))
        if not self._calm and now >= self._next_at:
            victims = {kind: self._victims(kind) for kind in self._plan.kinds}
            if any(victims.values()):
                # None made up for, or those that had to wait would come all at once.
                self._next_at = now + self._gap()
                # By the number of victims, or the bootstrap would be killed as often as all peers together.
                (kind,) = self._random.choices(list(victims), [len(each) for each in victims.values()])
                deeds.append(self._strike(kind, victims[kind], now))
        return deeds

    def committed(self, name: str, lineage: str, at: float) -> list[Recovered]:
        """That peer took part in a round at that time; what has recovered thereby."""
        recovered = []
        own = self._faults.get(name)
        if own is not None and own.mended_at is not None and own.mend_at is None and at >= own.mended_at:
            self.conditions[name] = Condition.TRAINING
            recovered.append(self._close(name, at))
        cut = self._faults.get(Kind.PARTITION)
        if cut is not None and cut.mended_at is not None and at >= cut.mended_at:
            sides = cut.seen.setdefault(lineage, set())
            sides.add(name in cut.on)
            if len(sides) == 2:
                recovered.append(self._close(Kind.PARTITION, at))
        return recovered

    def ended(self, name: str, now: float) -> None:
        """That process, of a peer or the bootstrap, has ended and was not killed by a strike."""
        key = Kind.BOOTSTRAP if name == BOOTSTRAP else name
        if key not in self._faults:  # a crash
            self._faults[key] = _Fault(Kind.BOOTSTRAP if name == BOOTSTRAP else Kind.KILL, (name,), None)
        fault = self._faults[key]
        if fault.mend_at is not None:
            return
        if fault.kind is Kind.PAUSE:  # it does not come back by itself
            fault.kind = Kind.KILL
        self.failed_starts += fault.mended_at is not None
        fault.mend_at = now + self._plan.absence_seconds
        if name in self.conditions:
            self.conditions[name] = Condition.AWAY

    def ready(self, now: float) -> list[Recovered]:
        """The bootstrap can be entered by again."""
        fault = self._faults.get(Kind.BOOTSTRAP)
        return [self._close(Kind.BOOTSTRAP, now)] if fault is not None and fault.mended_at is not None else []

    # -- choosing --------------------------------------------------------------------------------------------

    def _gap(self) -> float:
        return self._random.expovariate(self._plan.rate)

    def _victims(self, kind: Kind) -> list[str]:
        """Who may be struck so, now."""
        up = [name for name, condition in self.conditions.items() if condition is not Condition.AWAY]
        training = [name for name in up if self.conditions[name] is Condition.TRAINING]
        match kind:
            case Kind.BOOTSTRAP:
                return [] if kind in self._faults else [BOOTSTRAP]
            case Kind.SPAWN | Kind.CROWD:
                count = len(self.conditions)
                most = min(count + 1, self._plan.max_peers) if kind is Kind.SPAWN else self._plan.max_peers
                return [f"peer-{number}" for number in range(count + 1, most + 1)]
            case Kind.PARTITION:
                return training if kind not in self._faults and len(training) > 1 else []
            case Kind.KILL | Kind.PAUSE | Kind.LEAVE:
                return [name for name in up if set(training) - {name}]

    def _strike(self, kind: Kind, victims: list[str], now: float) -> Strike:
        silence, draw = self._plan.silence_seconds, self._random
        if kind is Kind.PARTITION:
            # Each side keeps one that has the state.
            draw.shuffle(victims)
            there, here, *_ = victims
            others = [name for name in self.conditions if name not in (there, here)]
            side = tuple(sorted([there, *(name for name in others if draw.random() < 0.5)]))
            self._faults[kind] = _Fault(kind, side, now + draw.uniform(1, 4) * silence)
            return Strike(kind, side)
        if kind in (Kind.SPAWN, Kind.CROWD):
            for name in victims:
                self._faults[name] = _Fault(Kind.SPAWN, (name,), None, now)
                self.conditions[name] = Condition.ARRIVING
            return Strike(kind, tuple(victims))
        name = draw.choice(victims)
        key = kind if kind is Kind.BOOTSTRAP else name
        match kind:
            case Kind.KILL | Kind.BOOTSTRAP:
                self._faults[key] = _Fault(kind, (name,), now + self._plan.absence_seconds)
            case Kind.PAUSE:
                self._faults[key] = _Fault(kind, (name,), now + draw.uniform(0.5, 3) * silence)
            case _:
                self._faults[key] = _Fault(kind, (name,), None)
        if kind is not Kind.BOOTSTRAP:
            self.conditions[name] = Condition.AWAY
        return Strike(kind, (name,))

    def _close(self, key: str, at: float) -> Recovered:
        fault = self._faults.pop(key)
        assert fault.mended_at is not None
        return Recovered(fault.kind, fault.on, at - fault.mended_at)
