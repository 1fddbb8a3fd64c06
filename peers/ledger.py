"""What a swarm under faults did, in figures: rounds, samples, participation, and how soon it went on.

A `Ledger` is told what the journals say and what was done to whom, all in Unix time of one machine. It counts
a round once, whichever peers tell of it.

Not covered: what a killed peer held is nowhere written; it is estimated from the pace of its last round. An
attempt of which only peers knew that were killed in it. What is being computed when the rehearsal ends.
"""

from __future__ import annotations

import math
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
    """Peers that were there when the first one told of it."""
    told: int = 0
    """Samples by peers whose journals tell of this round."""
    held_by: set[str] = field(default_factory=set)
    """Whose journals tell of it, and who were not killed since."""


@dataclass
class _Life:
    """A peer between two faults."""

    live: bool = False
    caught_up_by: str = "log"
    since: float | None = None
    """When it began to compute for the round under way."""
    pace: float = 0.0
    """Samples per second in its last round, also of a former life."""
    committed_step: int | None = None
    """Of its last round."""

    @property
    def trains(self) -> bool:
        """Whether it is there and was in a round."""
        return self.live and self.committed_step is not None


@dataclass(frozen=True)
class _Told:
    """A peer took part in a committed round."""

    at: float
    name: str
    step: int


@dataclass(frozen=True)
class _GivenUp:
    """A peer could not bring what it had for a round into it."""

    at: float
    name: str
    step: int
    samples: int


@dataclass(frozen=True)
class _Kill:
    """Of a peer that trained."""

    at: float
    name: str
    survivors: frozenset[str]
    """Who else trained."""


@dataclass
class Ledger:
    """Figures of one rehearsal."""

    target_batch_size: int
    rollbacks: int = 0
    _aborts: set[tuple[int, int]] = field(default_factory=set)
    """(step, attempt)."""
    _commits: dict[tuple[int, str], _Commit] = field(default_factory=dict)  # by step and lineage
    _committed_attempts: set[tuple[int, int]] = field(default_factory=set)
    _wasted: Counter[str] = field(default_factory=Counter)
    _given_up: list[_GivenUp] = field(default_factory=list)
    _held: float = 0.0
    _told: list[_Told] = field(default_factory=list)
    _kills: list[_Kill] = field(default_factory=list)
    _lives: dict[str, _Life] = field(default_factory=dict)

    # -- listening -------------------------------------------------------------------------------------------

    def observe(self, name: str, record: Record) -> None:
        """The next line of that peer's journal."""
        at = moment(record)
        life = self._lives.setdefault(name, _Life())
        match record:
            case {"event": "joined"}:
                life.live, life.since = True, at
            case {"event": "caught_up", "how": how}:
                life.since = at
                if how == "snapshot":
                    life.caught_up_by = how
            case {"event": "round_aborted", "step": step, "attempt": attempt}:
                self._aborts.add((step, attempt))
            case {"event": "rolled_back"}:
                self.rollbacks += 1
            case {"event": "samples_wasted", "step": step, "samples": samples, "cause": cause}:
                self._wasted[cause] += samples
                # Of a step that it took part in, it is a micro-batch that ended after the round.
                if life.committed_step is None or step > life.committed_step:
                    self._given_up.append(_GivenUp(at, name, step, samples))
            case {"event": "round_committed"}:
                self._committed(name, life, at, record)

    def _committed(self, name: str, life: _Life, at: float, record: Record) -> None:
        key = (record["step"], record["lineage"])
        if key not in self._commits:
            live = sum(each.live for each in self._lives.values())
            self._commits[key] = _Commit(at, record["samples"], record["peers"], live)
        self._commits[key].told += record["mine"]
        self._commits[key].held_by.add(name)
        self._committed_attempts.add((record["step"], record["attempt"]))
        self._told.append(_Told(at, name, record["step"]))
        life.since, life.committed_step = at, record["step"]
        if record["mine"]:
            life.pace = record["mine"] / max(record["accumulate_seconds"], 0.001)

    def gone(self, name: str, at: float, *, killed: bool = False) -> None:
        """That peer, or the bootstrap, was taken out of the swarm; what a `killed` one had is lost.

        Its journal is to be read before, up to its end.
        """
        life = self._lives.get(name, _Life())
        if killed and life.live and life.since is not None:
            self._held += min(life.pace * max(at - life.since, 0.0), self.target_batch_size)
        if killed and life.trains:
            others = frozenset(other for other, each in self._lives.items() if each.trains and other != name)
            self._kills.append(_Kill(at, name, others))
        if killed:
            for commit in self._commits.values():
                commit.held_by.discard(name)
        life.live = False

    def restarted(self, name: str) -> None:
        """That peer's process was started."""
        self._lives[name] = _Life(pace=self._lives[name].pace if name in self._lives else 0.0)

    def went_on(self, name: str) -> None:
        """That peer was stopped, and is no longer."""
        self._lives.setdefault(name, _Life()).live = True

    # -- telling ---------------------------------------------------------------------------------------------

    @property
    def committed(self) -> int:
        """Rounds that led to a step, on whatever lineage."""
        return len(self._commits)

    @property
    def attempted(self) -> int:
        """Attempts that any peer tells of: those that led to a step, and those that were given up by all.

        Two sides of a cut may give up attempts of one number at one step: they count as one.
        """
        return len(self._commits) + len(self._aborts - self._committed_attempts)

    @property
    def lineages(self) -> int:
        """The most that there were of one step; 1 if the log never parted."""
        return max(Counter(step for step, _ in self._commits).values(), default=0)

    @property
    def died_out(self) -> int:
        """Of `lineages`, those that nobody rolled back from: all who had committed them were killed."""
        lineages = Counter(step for step, _ in self._commits)
        dead = Counter(step for (step, _), commit in self._commits.items() if not commit.held_by)
        return max((min(count, lineages[step] - 1) for step, count in dead.items()), default=0)

    @property
    def last_commit_at(self) -> float:
        """Unix time; 0 if there was none."""
        return max((commit.at for commit in self._commits.values()), default=0.0)

    def caught_up_by(self, name: str) -> str:
        """How that peer got to the swarm's step since its last start: `log` or `snapshot`."""
        return self._lives[name].caught_up_by

    def took_part(self, names: Iterable[str], since: float) -> float | None:
        """When the last of these had been in a round since then; None if one of them was in none."""
        firsts = {
            name: [told.at for told in self._told if told.name == name and told.at > since] for name in names
        }
        return max(map(min, firsts.values())) if all(firsts.values()) else None

    def samples_per_second(self, since: float, until: float) -> float:
        """In the rounds committed in that time, on whatever lineage."""
        samples = sum(commit.samples for commit in self._commits.values() if since < commit.at <= until)
        return samples / max(until - since, 0.001)

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
        """From each kill of a peer that trained to the next commit by another one."""
        return spread(after.at - kill.at for kill in self._kills if (after := self._after(kill)) is not None)

    def survivors_gave_up(self) -> int:
        """Samples that the peers which trained when one was killed could not bring into the next round.

        Where peers are also stopped or cut off, what these give up may be among them.
        """
        given_up = {
            each
            for kill in self._kills
            if (after := self._after(kill)) is not None
            for each in self._given_up
            if each.at > kill.at and each.step == after.step and each.name in kill.survivors
        }
        return sum(each.samples for each in given_up)

    def _after(self, kill: _Kill) -> _Told | None:
        later = (told for told in self._told if told.name != kill.name and told.at > kill.at)
        return min(later, key=lambda told: told.at, default=None)

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


def loss_at(samples: int, curve: Sequence[tuple[int, float]]) -> float | None:
    """The loss after so many samples on a curve of (samples, loss); None beyond its ends.

    Between two points it falls with the logarithm of the samples, as losses do; a straight line lies above.
    """
    for (before, high), (after, low) in pairwise(curve):
        if before <= samples <= after and 0 < before < after:
            return high + (low - high) * math.log(samples / before) / math.log(after / before)
    return None


def slope_per_minute(points: Sequence[tuple[float, float]]) -> float | None:
    """Least squares over (seconds, value) after the warm-up; None if that is too short a time."""
    if not points:
        return None
    late = [point for point in points if point[0] - points[0][0] >= WARM_UP_SECONDS]
    if len(late) < 3 or late[-1][0] - late[0][0] < SLOPE_SECONDS:
        return None
    times, values = zip(*late, strict=True)
    return 60 * statistics.linear_regression(times, values).slope
