"""What a swarm under faults did, in figures: rounds, samples, participation, and how soon it went on.

A `Ledger` is told what the journals say and what was done to whom, all in Unix time of one machine. It counts
a round once, whichever peers tell of it.

Not covered: what a killed peer held is nowhere written. It is estimated from the pace of its rounds before.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from peers.chronicle import Record, moment

WARM_UP_SECONDS = 60.0
"""A process's memory grows at first: imports, buffers, the first rounds."""
SLOPE_SECONDS = 60.0
"""After the warm-up; over less, a slope says nothing."""


@dataclass(frozen=True)
class Spread:
    """Several durations in seconds; the figures are None if there were none."""

    count: int
    median: float | None
    worst: float | None


@dataclass(frozen=True)
class Samples:
    """What became of the samples that all peers computed."""

    computed: int
    """The sum of the others."""
    used: int
    """In committed rounds that count."""
    wasted: dict[str, int]
    """By cause."""
    lost: int
    """Held by peers when they were killed; estimated."""


@dataclass
class _Commit:
    at: float
    samples: int
    roster: int
    live: int
    """Peers that were there, when it was committed first."""
    told: int = 0
    """Samples by peers whose journals tell of this round."""


@dataclass
class _Life:
    """A peer between two faults."""

    live: bool = False
    caught_up_by: str = "log"
    committed_at: float | None = None
    pace: float = 0.0
    """Samples per second in its last round."""


@dataclass(frozen=True)
class _Kill:
    at: float
    name: str


@dataclass
class Ledger:
    """Figures of one rehearsal."""

    target_batch_size: int
    rollbacks: int = 0
    aborts: set[tuple[int, int]] = field(default_factory=set)
    """(step, attempt)."""
    _commits: dict[tuple[int, str], _Commit] = field(default_factory=dict)  # by step and lineage
    _attempts: set[tuple[int, int]] = field(default_factory=set)
    _wasted: Counter[str] = field(default_factory=Counter)
    _held: float = 0.0
    _told: list[tuple[float, str]] = field(default_factory=list)  # when which peer took part in a commit
    _kills: list[_Kill] = field(default_factory=list)
    _lives: dict[str, _Life] = field(default_factory=dict)

    # -- listening -------------------------------------------------------------------------------------------

    def observe(self, name: str, record: Record) -> None:
        """The next line of that peer's journal."""
        at = moment(record)
        life = self._lives.setdefault(name, _Life())
        match record:
            case {"event": "joined"}:
                life.live = True
            case {"event": "caught_up", "how": "snapshot"}:
                life.caught_up_by = "snapshot"
            case {"event": "round_aborted", "step": step, "attempt": attempt}:
                self.aborts.add((step, attempt))
            case {"event": "rolled_back"}:
                self.rollbacks += 1
            case {"event": "samples_wasted", "samples": samples, "cause": cause}:
                self._wasted[cause] += samples
            case {"event": "round_committed"}:
                self._committed(name, life, at, record)

    def _committed(self, name: str, life: _Life, at: float, record: Record) -> None:
        key = (record["step"], record["lineage"])
        if key not in self._commits:
            live = sum(each.live for each in self._lives.values())
            self._commits[key] = _Commit(at, record["samples"], record["peers"], live)
        self._commits[key].told += record["mine"]
        self._attempts.add((record["step"], record["attempt"]))
        life.committed_at = at
        life.pace = record["mine"] / max(record["accumulate_seconds"], 0.001)
        self._told.append((at, name))

    def gone(self, name: str, at: float, *, killed: bool = False) -> None:
        """That peer, or the bootstrap, was taken out of the swarm; what a `killed` one had is lost.

        Its journal is to be read before, up to its end.
        """
        life = self._lives.get(name, _Life())
        if killed and life.live and life.committed_at is not None:
            self._held += min(life.pace * max(at - life.committed_at, 0.0), self.target_batch_size)
        if killed:
            self._kills.append(_Kill(at, name))
        life.live = False

    def restarted(self, name: str) -> None:
        """That peer's process was started."""
        self._lives[name] = _Life()

    def went_on(self, name: str) -> None:
        """That peer was stopped, and is no longer."""
        self._lives.setdefault(name, _Life()).live = True

    # -- telling ---------------------------------------------------------------------------------------------

    @property
    def committed(self) -> int:
        """Attempts that led to a step, on whatever lineage."""
        return len(self._attempts)

    @property
    def attempted(self) -> int:
        """Attempts that any peer tells of."""
        return len(self._attempts | self.aborts)

    @property
    def lineages(self) -> int:
        """The most that there were of one step; 1 if the log never parted."""
        return max(Counter(step for step, _ in self._commits).values(), default=0)

    @property
    def last_commit_at(self) -> float:
        """Unix time; 0 if there was none."""
        return max((commit.at for commit in self._commits.values()), default=0.0)

    def caught_up_by(self, name: str) -> str:
        """How that peer got to the swarm's step since its last start: `log` or `snapshot`."""
        return self._lives[name].caught_up_by

    def samples(self, used: int) -> Samples:
        """The ledger of samples; `used` are those in rounds that still count."""
        wasted = dict(self._wasted)
        if rolled_back := sum(commit.samples for commit in self._commits.values()) - used:
            wasted["rolled_back"] = rolled_back
        # What a peer gave to a round that was committed right after its death was not lost.
        given = sum(commit.samples - commit.told for commit in self._commits.values())
        lost = max(0, round(self._held) - given)
        return Samples(used + sum(wasted.values()) + lost, used, wasted, lost)

    def participation(self, since: float, until: float) -> float | None:
        """Mean over the rounds committed in that time of roster size per live peer, at most 1 each.

        A peer is live from when it is on the net until it is struck.
        """
        shares = [
            min(1.0, commit.roster / max(commit.live, 1))
            for commit in self._commits.values()
            if since <= commit.at <= until
        ]
        return statistics.fmean(shares) if shares else None

    def resumed(self) -> Spread:
        """From each kill to the next commit by another peer; kills that nobody survived are left out."""
        after = (
            min((at for at, name in self._told if name != kill.name and at > kill.at), default=None)
            for kill in self._kills
        )
        return spread(at - kill.at for at, kill in zip(after, self._kills, strict=True) if at is not None)

    def longest_gap_seconds(self, since: float, until: float) -> float:
        """The longest time without a commit; both ends count."""
        times = sorted(commit.at for commit in self._commits.values() if since < commit.at < until)
        return max(after - before for before, after in pairwise([since, *times, until]))


def spread(durations: Iterable[float]) -> Spread:
    """Rounded to hundredths."""
    values = list(durations)
    if not values:
        return Spread(0, None, None)
    return Spread(len(values), round(statistics.median(values), 2), round(max(values), 2))


def slope_per_minute(points: Sequence[tuple[float, float]]) -> float | None:
    """Least squares over (seconds, value) after the warm-up; None if that is too short a time."""
    if not points:
        return None
    late = [point for point in points if point[0] - points[0][0] >= WARM_UP_SECONDS]
    if len(late) < 3 or late[-1][0] - late[0][0] < SLOPE_SECONDS:
        return None
    times, values = zip(*late, strict=True)
    return 60 * statistics.linear_regression(times, values).slope
