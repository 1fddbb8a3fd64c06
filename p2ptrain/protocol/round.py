"""The words of the round's two state machines: what goes in, what comes out, and the numbers they share.

`Member` (member.py) is one peer in the swarm; while it leads a step it holds a `Leader` (leader.py). Both are
fed events with `now` and return effects, in order, for the rim to carry out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from p2ptrain.events import AbortCause
from p2ptrain.records import Ballot, EntryHeader, Freeze, Message, PeerId, Position


@dataclass(frozen=True)
class Rules:
    """What every machine of a run goes by."""

    target_batch_size: int
    min_peers: int
    max_peers: int
    values: int
    """Length of the averaged vector."""
    encoded_bytes: int
    """What it has on the wire, in the run's codec."""
    heartbeat_seconds: float
    silence_seconds: float
    """After this long, or longer if a peer was seen to be late, one that is not heard is taken for gone."""
    silence_most_seconds: float
    attempt_most_seconds: float
    """Bounds of what `deadlines` derives."""
    quorum: Literal["any", "majority"] = "any"
    """Who may step: whoever is there, or only with more than half of the last round's roster."""
    leased: bool = False
    """Whether samples are numbered, and each counts once; see `ledger`."""
    warmup_rounds: int = 0
    warmup_batch_size: int = 0
    """The target in so many rounds at first, whatever it is afterwards."""

    @property
    def most_samples(self) -> int:
        """More than that no peer can bring: it begins no micro-batch once it has the target by itself."""
        return 2 * max(self.target_batch_size, self.warmup_batch_size)


# -- effects -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Send:
    to: PeerId
    message: Message


@dataclass(frozen=True)
class Begin:
    """Seal the contribution as the freeze says, reduce it with the roster, then report `held` or `failed`."""

    freeze: Freeze


@dataclass(frozen=True)
class Cancel:
    """The attempt is over without a step: stop its transfers, keep the contribution, go on accumulating."""

    ballot: Ballot
    cause: AbortCause
    dropped: tuple[PeerId, ...]


@dataclass(frozen=True)
class Apply:
    """Committed, and this peer holds the bytes: apply the entry, then call `advance`."""

    header: EntryHeader
    newcomers: tuple[PeerId, ...]


@dataclass(frozen=True)
class CatchUp:
    """The swarm stands elsewhere: fetch its state from `donor`, then call `advance`."""

    donor: PeerId
    position: Position
    afresh: bool = False
    """This replica is damaged: replay will not do, take a snapshot even of the same step."""
    undo: int | None = None
    """No donor is needed: go back to this step, or before it, as the entry that led on is void."""


@dataclass(frozen=True)
class Diverged:
    """For the log: at one lineage, this replica's state digest is not the others' (I2 is broken here)."""

    step: int
    ours: str
    theirs: str


@dataclass(frozen=True)
class Distrusted:
    """For the log: what a peer said cannot be, so it is left out of this step."""

    peer: PeerId
    reason: str


@dataclass(frozen=True)
class Benched:
    """For the log: a peer has broken the contract too often; for so long it is neither heard nor believed."""

    peer: PeerId
    offences: int
    seconds: float


@dataclass(frozen=True)
class TookOver:
    """For the log: this peer now leads, because everyone before it in the order is gone."""

    step: int
    ballot: Ballot


@dataclass(frozen=True)
class Waiting:
    """For the log: why this peer, leading, does not freeze. Sent when the reason changes."""

    reason: str


Effect = Send | Begin | Cancel | Apply | CatchUp | Diverged | Distrusted | Benched | TookOver | Waiting
