"""The decisions of joining, each a pure function or a value that is told the time.

On the joiner: whether to replay, which manifest to believe, which piece to ask of whom, whom to leave alone
for a while. On the donor: at which step to pack so that all donors pack the same, and when a piece may leave.

Not covered: whether a state follows from its lineage. The majority of donors is believed, and of all who have
signed a record of what they had at that step.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from p2ptrain.records import Manifest, Milestone, PeerId

# -- replay or snapshot --------------------------------------------------------------------------------------

REPLAY_SECONDS = 10.0
"""A replay that takes no longer than this is preferred even where a snapshot has fewer bytes: it proves every
step, and no donor has to pack anything for it."""


def replay_pays(entries: int, entry_bytes: int, snapshot_bytes: int, bytes_per_second: float) -> bool:
    """Whether to go on replaying: what is left is no more than a snapshot, or is done in a moment."""
    left = entries * entry_bytes
    return left <= snapshot_bytes or left <= bytes_per_second * REPLAY_SECONDS


# -- on which step donors meet -------------------------------------------------------------------------------

LEAD_SECONDS = 0.5
"""So far ahead donors are asked for a snapshot, so that the request reaches all of them before the step."""
MAX_LEAD_STEPS = 64


def agreed_step(here: int, step_seconds: float, ahead_seconds: float = LEAD_SECONDS) -> int:
    """The step that a donor at step `here` proposes for a snapshot: `here` itself where steps are slow.

    Where they are fast it is rounded up, so that joiners who ask at about the same time meet at one.
    `step_seconds`: what a step takes here, 0 for unknown.
    """
    lead = min(int(ahead_seconds / step_seconds), MAX_LEAD_STEPS) if step_seconds > 0 else 0
    grid = 1 << (lead.bit_length() - 1) if lead else 1
    return -(-(here + lead) // grid) * grid


def common_step(proposed: Sequence[int], extra: int) -> int:
    """The step to ask all donors for: what half of them propose, so that one cannot put it out of reach."""
    return sorted(proposed)[len(proposed) // 2] + extra


# -- which snapshot to believe -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Elected:
    """The snapshot to fetch, who has it, and who said something else of the very same position."""

    manifest: Manifest
    donors: tuple[PeerId, ...]
    outvoted: tuple[PeerId, ...]


def elect(
    offers: Mapping[PeerId, Manifest], donor: PeerId, *, fresh: bool, begun: Manifest | None = None
) -> Elected | None:
    """Which of the offered snapshots to take; None if there is none.

    `begun`, a download that was interrupted, goes first if anyone still offers just that. A peer with no
    samples behind it (`fresh`) believes the majority; one that has some goes where `donor` stands, as the
    heavier lineage demands (I8). At one position the majority tells what the state is; where two contradict
    each other, `donor` is believed, and the state digests of the next step tell.
    """
    if not offers:
        return None
    among = dict(offers)
    if begun is not None and begun in among.values():
        return Elected(begun, tuple(sorted(peer for peer, each in among.items() if each == begun)), ())
    if not fresh and donor in among:
        among = {peer: each for peer, each in among.items() if each.position == among[donor].position}
    steps = Counter(each.position.step for each in among.values())
    step = max(steps, key=lambda each: (steps[each], each))
    logs = Counter(each.position for each in among.values() if each.position.step == step)
    position = max(logs, key=lambda each: (logs[each], each.weight, each.lineage))
    states = Counter(each for each in among.values() if each.position == position)
    manifest = max(states, key=lambda each: (states[each], each == among.get(donor)))
    there = sorted(peer for peer, each in among.items() if each.position == position)
    return Elected(
        manifest,
        tuple(peer for peer in there if among[peer] == manifest),
        tuple(peer for peer in there if among[peer] != manifest),
    )


def attested(step: int, lineage: str, said: Iterable[Sequence[Milestone]]) -> str | None:
    """How the state digest at that position begins, by more than half of the signed records that speak of it;
    None if there is no such majority. `said`: the milestones in each peer's record."""
    here = step, lineage[:16]
    told = Counter(each.state for record in said for each in record if (each.step, each.lineage) == here)
    state, votes = max(told.items(), key=lambda item: item[1], default=("", 0))
    return state if 2 * votes > told.total() else None


@dataclass(frozen=True)
class Outvoted:
    """Most peers have signed for the state `theirs` where this one had `mine`; `donor` is one of them."""

    mine: Milestone
    theirs: str
    donor: PeerId


def outvoted(mine: Sequence[Milestone], said: Mapping[PeerId, Sequence[Milestone]]) -> Outvoted | None:
    """The newest of my own milestones at which most records, mine among them, speak of another state at the
    same lineage; None if there is none, as it should be."""
    for own in reversed(mine):
        believed = attested(own.step, own.lineage, [mine, *said.values()])
        if believed is not None and believed != own.state:
            theirs = own.model_copy(update={"state": believed})
            return Outvoted(own, believed, min(peer for peer, told in said.items() if theirs in told))
    return None


# -- which piece to ask of whom ------------------------------------------------------------------------------

PIECES_PER_DONOR = 2
"""Asked of one donor at once: one on its way while the next is being asked for."""
OVERDUE = 3.0
"""When nothing else is missing, a piece that takes so many times as long as the others is asked of one more:
a slow or silent one holds nobody up."""


class Errands:
    """Which pieces are missing, and whom each is asked of. The donors' bytes are somebody else's."""

    def __init__(self, missing: Iterable[int], donors: Iterable[PeerId]) -> None:
        self.missing = set(missing)
        self.donors = dict.fromkeys(donors, float("-inf"))
        """Those that still serve → not before when to ask them again."""
        self._asked: dict[int, dict[PeerId, float]] = {}
        """Piece → whom it is asked of → since when."""
        self._usual = float("inf")
        """Seconds that a piece takes."""

    def ask(self, now: float) -> list[tuple[PeerId, int]]:
        """What to ask for now, as (donor, piece)."""
        asked = []
        for _ in range(PIECES_PER_DONOR):
            for donor, not_before in self.donors.items():
                if now >= not_before and self.busy(donor) < PIECES_PER_DONOR:
                    piece = self._next(donor, now)
                    if piece is not None:
                        self._asked.setdefault(piece, {})[donor] = now
                        asked.append((donor, piece))
        return asked

    def busy(self, donor: PeerId) -> int:
        """How many pieces this donor is being asked for."""
        return sum(donor in askers for askers in self._asked.values())

    def wake_at(self, now: float) -> float:
        """When there may be something to ask for that there is not now; infinity for not before an answer."""
        overdue = (self._overdue_at(piece) for piece in self._asked)
        return min((at for at in (*self.donors.values(), *overdue) if at > now), default=float("inf"))

    def came(self, donor: PeerId, piece: int, now: float) -> None:
        """The piece is here, and is what it should be."""
        took = now - self._asked.get(piece, {}).get(donor, now)
        self._usual = took if self._usual == float("inf") else 0.8 * self._usual + 0.2 * took
        self._over(donor, piece)
        self.missing.discard(piece)

    def later(self, donor: PeerId, piece: int, not_before: float) -> None:
        """The donor is busy until then."""
        self._over(donor, piece)
        if donor in self.donors:
            self.donors[donor] = not_before

    def gone(self, donor: PeerId, piece: int) -> None:
        """The donor serves no more: it died, has dropped the snapshot, or sent something else."""
        self._over(donor, piece)
        self.donors.pop(donor, None)

    def _over(self, donor: PeerId, piece: int) -> None:
        askers = self._asked.get(piece, {})
        askers.pop(donor, None)
        if not askers:
            self._asked.pop(piece, None)

    def _next(self, donor: PeerId, now: float) -> int | None:
        untouched = self.missing - self._asked.keys()
        if untouched:
            return min(untouched)
        overdue = (piece for piece in self.missing if self._overdue_at(piece) <= now)
        return min((piece for piece in overdue if donor not in self._asked[piece]), default=None)

    def _overdue_at(self, piece: int) -> float:
        """When a second donor may be asked for this one; infinity if that has been done."""
        askers = self._asked[piece]
        return next(iter(askers.values())) + OVERDUE * self._usual if len(askers) == 1 else float("inf")


# -- whom to ask, and whom not for a while -------------------------------------------------------------------

MAX_DONORS = 8
SILENT_SECONDS = 10.0
LIAR_SECONDS = 120.0


def spread(me: PeerId, peers: Iterable[PeerId]) -> list[PeerId]:
    """The peers in an order of this joiner's own, so that many joiners do not all ask the same few."""
    return sorted(peers, key=lambda peer: sha256(f"{me} {peer}".encode()).digest())


class Bench:
    """Peers that failed as donors, and until when each is left alone."""

    def __init__(self) -> None:
        self._until: dict[PeerId, float] = {}

    def put(self, peer: PeerId, seconds: float, now: float) -> None:
        """Leave the peer alone for so long; a longer time that it was given before stays."""
        self._until = {each: until for each, until in self._until.items() if until > now}
        self._until[peer] = max(self._until.get(peer, now), now + seconds)

    def without(self, peers: Iterable[PeerId], now: float) -> list[PeerId]:
        """Those of the peers that are not on it, in their order."""
        return [peer for peer in peers if self._until.get(peer, now) <= now]


# -- when a piece may leave ----------------------------------------------------------------------------------

UPLOAD_SHARE = 0.25
"""Of what the uplink carries in a round, for all joiners together: a round beside them takes a third longer
at most, and a snapshot of three times the model arrives within a dozen rounds' transfers, from one donor."""
BURST_SECONDS = 1.0
REMEMBERED_ROUNDS = 32


class Upload:
    """A token bucket over all joiners together: when the next piece may leave this donor.

    In any time t, no more leaves than `bytes_per_second` × (t + BURST_SECONDS) and one piece. A limit of 0 is
    derived: `UPLOAD_SHARE` of the fastest of the last rounds, and none while no round has been seen.
    """

    def __init__(self, limit_bytes_per_second: float) -> None:
        self._limit = limit_bytes_per_second
        self._seen: deque[float] = deque(maxlen=REMEMBERED_ROUNDS)
        self._free_at = float("-inf")

    @property
    def bytes_per_second(self) -> float:
        """Infinity for no limit."""
        if self._limit:
            return self._limit
        return UPLOAD_SHARE * max(self._seen) if self._seen else float("inf")

    def round(self, sent_bytes: float, seconds: float) -> None:
        """In a round this peer sent so many bytes in so many seconds."""
        if sent_bytes > 0 and seconds > 0:
            self._seen.append(sent_bytes / seconds)

    def wait(self, now: float) -> float:
        """Seconds until what is asked for now may leave."""
        return max(self._free_at - now, 0.0)

    def take(self, size_bytes: int, now: float) -> float:
        """The same, and so many bytes do leave then."""
        wait = self.wait(now)
        self._free_at = max(self._free_at, now - BURST_SECONDS) + size_bytes / self.bytes_per_second
        return wait


def sent_in_round(payload_bytes: int, spans: Sequence[int], rank: int) -> float:
    """Bytes that roster member `rank` sends in a round: its gradient to the others' spans, its span's mean to
    all others."""
    mine = (spans[rank + 1] - spans[rank]) / max(spans[-1], 1)
    return payload_bytes * ((1 - mine) + mine * (len(spans) - 2))


# -- how far it is -------------------------------------------------------------------------------------------

PACE_SECONDS = 10.0


@dataclass(frozen=True)
class Progress:
    """How far a catch-up is, for whoever watches."""

    what: str
    """`pieces` of a snapshot, or `entries` of the log."""
    done: int
    total: int
    done_bytes: int
    total_bytes: int
    """Estimated, for entries."""
    bytes_per_second: float
    """Over the last `PACE_SECONDS`; 0 until known."""
    donors: int
    """How many serve."""

    @property
    def eta_seconds(self) -> float | None:
        """Until this is done, at the present pace; None while that is unknown."""
        if self.bytes_per_second <= 0:
            return None
        return (self.total_bytes - self.done_bytes) / self.bytes_per_second


class Pace:
    """How fast bytes come, over the last seconds."""

    def __init__(self, now: float) -> None:
        self._came = deque([(now, 0)])

    def add(self, size_bytes: int, now: float) -> None:
        """So many more are here."""
        self._came.append((now, self._came[-1][1] + size_bytes))
        while len(self._came) > 2 and self._came[1][0] <= now - PACE_SECONDS:
            self._came.popleft()

    def bytes_per_second(self, now: float) -> float:
        """0 until any are here."""
        (began, before), (_, last) = self._came[0], self._came[-1]
        return (last - before) / (now - began) if now > began else 0.0
