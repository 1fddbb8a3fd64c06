"""What happened in a peer: one frozen value for everything worth telling, keeping or counting.

The same value becomes the volunteer's sentence (`sentence`, logged at `level`), a line of the journal
(`to_dict`) and a change of the metrics (`telemetry.metrics.Metrics.observe`), so the three never tell
different stories. Event names, fields and enum values are read by other programs: add to them, never rename.

Steps are log positions, as in `records`: the round of step s commits entry s and leads to step s + 1.
Durations are seconds. Text that came from a peer is shown printable and short, whatever the peer sent.
"""

from __future__ import annotations

import logging
import math
import types
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:  # or whoever shows a sentence would load what checks messages
    from p2ptrain.records import PeerId

# -- the words events use ------------------------------------------------------------------------------------


class AbortCause(StrEnum):
    """Why an attempt ended without a step; every abort has exactly one."""

    PEER_LOST = "peer_lost"
    LEADER_LOST = "leader_lost"
    DEADLINE = "deadline"
    NONFINITE = "nonfinite"
    BAD_CHUNK = "bad_chunk"
    DIGEST_MISMATCH = "digest_mismatch"
    TOO_FEW_PEERS = "too_few_peers"
    SUPERSEDED = "superseded"


class FaultCause(StrEnum):
    """What a peer did wrong: the leaves of `errors.PeerFault`."""

    UNREACHABLE = "unreachable"
    BAD_MESSAGE = "bad_message"
    REFUSED = "refused"


class Carrier(StrEnum):
    """What carries chunks between two peers."""

    TLS = "tls"
    LIBP2P = "libp2p"


class WasteCause(StrEnum):
    """Why samples that this peer computed were not counted in any entry."""

    BEHIND = "behind"
    LATE = "late"
    NONFINITE = "nonfinite"
    NO_LEASE = "no_lease"
    NO_PART = "no_part"
    ROLLED_BACK = "rolled_back"
    LEAVING = "leaving"


class PauseReason(StrEnum):
    """Why a peer takes part in nothing for now."""

    USER = "user"
    SCHEDULE = "schedule"
    BATTERY = "battery"
    ACTIVITY = "activity"
    OTHER_CPU = "other_cpu"
    TEMPERATURE = "temperature"
    ORGANIZER = "organizer"


class CatchUpBy(StrEnum):
    """How a replica reached the swarm's step."""

    SNAPSHOT = "snapshot"
    LOG = "log"


_ABORTED_BECAUSE = {
    AbortCause.PEER_LOST: "a peer was lost",
    AbortCause.LEADER_LOST: "the leader was lost",
    AbortCause.DEADLINE: "time ran out",
    AbortCause.NONFINITE: "a contribution was not finite",
    AbortCause.BAD_CHUNK: "a chunk broke its contract",
    AbortCause.DIGEST_MISMATCH: "members held different averages",
    AbortCause.TOO_FEW_PEERS: "too few peers were left",
    AbortCause.SUPERSEDED: "a newer attempt took its place",
}

_WASTED_BECAUSE = {
    WasteCause.BEHIND: "the swarm stepped without this peer",
    WasteCause.LATE: "the step was full before they were done",
    WasteCause.NONFINITE: "their gradient was not finite; if that goes on, look at your data, or set "
    'precision = "fp32" in the peer file',
    WasteCause.NO_LEASE: "another peer leads this step now, and the lease went to it",
    WasteCause.NO_PART: "there is somebody again who owns the part of the model that they were for",
    WasteCause.ROLLED_BACK: "a heavier lineage replaced the one they went into",
    WasteCause.LEAVING: "this peer left before the round",
}

_PAUSED_BECAUSE = {
    PauseReason.USER: "you asked for it",
    PauseReason.SCHEDULE: "it is outside of its hours",
    PauseReason.BATTERY: "the machine runs on battery",
    PauseReason.ACTIVITY: "somebody uses the machine",
    PauseReason.OTHER_CPU: "other programs need the processors",
    PauseReason.TEMPERATURE: "the processor is too hot",
    PauseReason.ORGANIZER: "the organizer has paused the run",
}

_FAULT_WAS = {
    FaultCause.UNREACHABLE: "could not be reached",
    FaultCause.BAD_MESSAGE: "sent something out of contract",
    FaultCause.REFUSED: "refused",
}

# -- events --------------------------------------------------------------------------------------------------


class _Happened(ABC):
    """What all events share; `Event` below is the closed list of them."""

    event: ClassVar[str]
    level: ClassVar[int] = logging.INFO
    """WARNING only where a human could act."""

    @abstractmethod
    def sentence(self) -> str:
        """The event as one line for a person."""

    def to_dict(self) -> dict[str, Any]:
        """The event for strict JSON: its name under `event`, then its fields; a number not finite is None."""
        fields = asdict(self)  # type: ignore[call-overload]  # every subclass is a dataclass
        return {"event": self.event, **{name: _plain(value) for name, value in fields.items()}}


@dataclass(frozen=True, kw_only=True)
class Joined(_Happened):
    """This peer is on the net and about to find out where the swarm stands."""

    event: ClassVar[str] = "joined"
    run_id: str
    peer: PeerId
    name: str
    others: int
    """Peers of this run seen in the DHT, without this one."""

    def sentence(self) -> str:
        known_as = f" ({clean(self.name)})" if self.name else ""
        others = counted(self.others, "other peer")
        return f"joined {self.run_id} as {short(self.peer)}{known_as}; {others} there"


@dataclass(frozen=True, kw_only=True)
class Leaving(_Happened):
    """This peer takes part in no further round."""

    event: ClassVar[str] = "leaving"
    step: int
    reason: str
    rounds: int
    """Committed rounds that this process took part in."""
    samples: int
    """Samples that it gave to them."""

    def sentence(self) -> str:
        given = f"gave {counted(self.samples, 'sample')} in {counted(self.rounds, 'round')}"
        return f"step {self.step}: leaving ({clean(self.reason)}); {given}"


@dataclass(frozen=True, kw_only=True)
class WaitingChanged(_Happened):
    """What this peer waits for is now something else; an empty reason means that it waits no longer."""

    event: ClassVar[str] = "waiting_changed"
    reason: str

    def sentence(self) -> str:
        return f"waiting: {clean(self.reason)}" if self.reason else "no longer waiting"


@dataclass(frozen=True, kw_only=True)
class Paused(_Happened):
    """This peer begins no micro-batch while any of these holds; told again whenever they change."""

    event: ClassVar[str] = "paused"
    reasons: tuple[PauseReason, ...]
    """All that hold now."""
    seconds: float | None
    """Until the last of them will have ended by itself; None: not before something happens."""

    def sentence(self) -> str:
        until = "" if self.seconds is None else f", for {duration(self.seconds)}"
        return f"paused{until}: {' and '.join(paused_because(each) for each in self.reasons)}"


@dataclass(frozen=True, kw_only=True)
class Resumed(_Happened):
    """No reason to pause holds any more."""

    event: ClassVar[str] = "resumed"
    reasons: tuple[PauseReason, ...]
    """Those that held last."""
    seconds: float
    """For how long this peer was paused."""

    def sentence(self) -> str:
        return f"training again, after a pause of {duration(self.seconds)}"


@dataclass(frozen=True, kw_only=True)
class DeadlinesChanged(_Happened):
    """What this peer has measured leads to other deadlines than before."""

    event: ClassVar[str] = "deadlines_changed"
    silence_seconds: float
    """Of those that are waited for now, the most patient one: then a peer that says nothing is gone."""
    reduce_seconds: float
    """For a reduction among as many peers as in the last round."""
    dial_seconds: float
    """For a peer to answer again after its link broke."""
    request_seconds: float
    """For a donor to send one megabyte."""

    def sentence(self) -> str:
        return (
            f"deadlines: silence {duration(self.silence_seconds)}, "
            f"averaging {duration(self.reduce_seconds)}, "
            f"dialling {duration(self.dial_seconds)}, a megabyte {duration(self.request_seconds)}"
        )


@dataclass(frozen=True, kw_only=True)
class RoundCommitted(_Happened):
    """Entry `step` was committed and applied here."""

    event: ClassVar[str] = "round_committed"
    step: int
    attempt: int
    """Number of the ballot that was committed."""
    samples: int
    """Of the whole roster."""
    mine: int
    """Of them, this peer's."""
    peers: int
    """On the roster."""
    loss: float | None
    """Mean training loss over `mine`, in nats; None if there were none."""
    gradient_norm: float
    """Of the averaged gradient, before clipping."""
    learning_rate: float
    compute_seconds: float
    """Of the micro-batches that this peer finished since the step before."""
    accumulate_seconds: float
    """From the previous step until the freeze; earlier attempts at this step included."""
    reduce_seconds: float
    """From the freeze until this peer held every span."""
    commit_seconds: float
    """From then until the commit arrived."""
    apply_seconds: float
    """From then until the replica stood at step + 1."""
    lineage: str
    """After the entry."""
    digest: str
    """The entry's own."""
    parent: str = ""
    """The lineage before it."""
    taken: tuple[tuple[int, int], ...] = ()
    """Where samples are leased: the ranges of numbers that it took out of the data, and how all stand after
    it."""
    unique: int = 0
    """Samples that count."""
    lost: int = 0
    """That never will: their gradient was not finite."""
    repeated: int = 0
    """That count twice."""
    returned: int = 0
    """That were leased and not brought in: they come next."""
    noise_scale: float | None = None
    """Samples beyond which a larger batch hardly improves a step, by the last rounds; None while unknown."""
    signal_norm_squared: float | None = None
    """Of the gradient without noise, over the last rounds."""
    noise_excess: float | None = None
    """Noise between peers over that within this one: 1 where all draw from the same data, less where they
    draw the same samples, more where data differ."""
    clipped: bool | None = None
    """Whether the averaged gradient was shortened to `clip_norm`; None with strategies that shorten none."""

    @property
    def seconds(self) -> float:
        """What the round cost: from the freeze until the entry was applied."""
        return self.reduce_seconds + self.commit_seconds + self.apply_seconds

    def sentence(self) -> str:
        averaged = f"averaged {counted(self.samples, 'sample')} from {counted(self.peers, 'peer')}"
        return f"step {self.step}: {averaged} in {duration(self.seconds)}; you gave {self.mine:,}"


@dataclass(frozen=True, kw_only=True)
class StateHashed(_Happened):
    """The replica's state at `step` was hashed: equal lineages must show equal digests (I2)."""

    event: ClassVar[str] = "state_hashed"
    level: ClassVar[int] = logging.DEBUG
    step: int
    lineage: str
    state_digest: str

    def sentence(self) -> str:
        return f"step {self.step}: lineage {self.lineage[:8]}, state {self.state_digest[:8]}"


@dataclass(frozen=True, kw_only=True)
class RoundAborted(_Happened):
    """An attempt ended without a step; nobody stepped, and contributions are kept."""

    event: ClassVar[str] = "round_aborted"
    step: int
    attempt: int
    cause: AbortCause
    dropped: tuple[PeerId, ...]
    """Left out of the next attempt."""
    seconds: float
    """From the freeze until the abort."""

    def sentence(self) -> str:
        out = f"; without {_names(self.dropped)} from here" if self.dropped else ""
        return (
            f"step {self.step}: attempt {self.attempt} aborted after {duration(self.seconds)}, "
            f"{_ABORTED_BECAUSE[self.cause]}{out}; contributions are kept"
        )


@dataclass(frozen=True, kw_only=True)
class LeaderTookOver(_Happened):
    """`leader` leads this step now, because all before it in the order are gone."""

    event: ClassVar[str] = "leader_took_over"
    step: int
    attempt: int
    leader: PeerId

    def sentence(self) -> str:
        return f"step {self.step}: {short(self.leader)} takes the lead (attempt {self.attempt})"


@dataclass(frozen=True, kw_only=True)
class SamplesWasted(_Happened):
    """Samples that this peer computed will not be counted."""

    event: ClassVar[str] = "samples_wasted"
    step: int
    samples: int
    cause: WasteCause

    def sentence(self) -> str:
        lost = f"{counted(self.samples, 'sample')} of yours did not count"
        return f"step {self.step}: {lost}, {_WASTED_BECAUSE[self.cause]}"


@dataclass(frozen=True, kw_only=True)
class DeviceChosen(_Happened):
    """What this peer computes on."""

    event: ClassVar[str] = "device_chosen"
    device: str
    """As torch spells it, and what its maker calls it."""
    precision: str
    samples: int
    """At once."""
    samples_per_second: float | None = None
    """As measured with so many; None if nothing was."""
    flaw: str = ""
    """Why another device, that would have been taken, does not compute."""

    def sentence(self) -> str:
        pace = "" if self.samples_per_second is None else f", {self.samples_per_second:,.1f} a second"
        but = f"; {clean(self.flaw)}" if self.flaw else ""
        at_once = counted(self.samples, "sample")
        return f"computing on {clean(self.device)} in {self.precision}, {at_once} at once{pace}{but}"


@dataclass(frozen=True, kw_only=True)
class MicroBatchShrunk(_Happened):
    """The memory did not suffice for a micro-batch; it was computed in smaller ones, and all its samples
    count."""

    event: ClassVar[str] = "micro_batch_shrunk"
    level: ClassVar[int] = logging.WARNING
    step: int
    device: str
    from_samples: int
    to_samples: int

    def sentence(self) -> str:
        return (
            f"step {self.step}: the memory of {self.device} did not suffice for "
            f"{counted(self.from_samples, 'sample')} at once; from now on {self.to_samples} (close what else "
            "uses it, or set micro_batch_size in the peer file)"
        )


@dataclass(frozen=True, kw_only=True)
class CatchingUp(_Happened):
    """How far a catch-up is that takes more than a moment."""

    event: ClassVar[str] = "catching_up"
    step: int
    what: str
    """`pieces` of a snapshot, or `entries` of the log."""
    done: int
    total: int
    done_bytes: int
    total_bytes: int
    bytes_per_second: float
    eta_seconds: float | None
    """Until all of these are here; None while unknown."""
    donors: int

    def sentence(self) -> str:
        size = f"{self.done_bytes / 1e6:,.1f} of {self.total_bytes / 1e6:,.1f} MB"
        pace = f"{counted(self.donors, 'donor')}, {self.bytes_per_second / 1e6:,.1f} MB/s"
        left = "" if self.eta_seconds is None else f", {duration(self.eta_seconds)} left"
        return f"catching up: {self.done:,} of {self.total:,} {clean(self.what)}, {size} ({pace}{left})"


@dataclass(frozen=True, kw_only=True)
class CaughtUp(_Happened):
    """The replica adopted the swarm's state."""

    event: ClassVar[str] = "caught_up"
    from_step: int
    to_step: int
    how: CatchUpBy
    received_bytes: int
    seconds: float
    donors: int = 1
    """How many gave something."""
    resumed_bytes: int = 0
    """Of the snapshot, what an interrupted download had left on disk."""

    def sentence(self) -> str:
        donors = "" if self.donors == 1 else f" from {self.donors} donors"
        here = f" beside {self.resumed_bytes / 1e6:,.1f} MB from before" if self.resumed_bytes else ""
        received = f"{self.received_bytes / 1e6:,.1f} MB{donors} in {duration(self.seconds)}{here}"
        return f"caught up from step {self.from_step} to {self.to_step} by {self.how.value} ({received})"


@dataclass(frozen=True, kw_only=True)
class CatchUpFailed(_Happened):
    """A donor could not bring the replica to the swarm's state; another will be asked."""

    event: ClassVar[str] = "catch_up_failed"
    from_step: int
    donor: PeerId
    reason: str

    def sentence(self) -> str:
        return f"could not catch up from step {self.from_step} with {short(self.donor)}: {clean(self.reason)}"


@dataclass(frozen=True, kw_only=True)
class RolledBack(_Happened):
    """This replica went back: to a heavier lineage, or before a lie that was proven (I3)."""

    event: ClassVar[str] = "rolled_back"
    level: ClassVar[int] = logging.WARNING
    from_step: int
    to_step: int
    samples_lost: int
    """Of the whole swarm, behind the entries that were given up."""
    lineage: str
    """The one adopted."""
    liar: PeerId | None = None
    """Whose lie was in the entries that were given up, if one was."""

    def sentence(self) -> str:
        given_up = f"{counted(self.samples_lost, 'sample')} given up "
        if self.liar is None:
            given_up += f"for the heavier lineage {self.lineage[:8]}"
        else:
            given_up += f"because of the lie of peer {short(self.liar)}"
        return f"rolled back from step {self.from_step} to {self.to_step}: {given_up}"


@dataclass(frozen=True, kw_only=True)
class ReplicaDiverged(_Happened):
    """At one and the same lineage, this replica's state digest is not the swarm's: I2 is broken."""

    event: ClassVar[str] = "replica_diverged"
    level: ClassVar[int] = logging.WARNING
    step: int
    ours: str
    theirs: str

    def sentence(self) -> str:
        digests = f"state digest {self.ours[:8]} here, {self.theirs[:8]} in the swarm"
        return (
            f"step {self.step}: this replica differs from the swarm's ({digests}); fetching the swarm's state"
        )


@dataclass(frozen=True, kw_only=True)
class Evaluated(_Happened):
    """The model at `step` on held-out data."""

    event: ClassVar[str] = "evaluated"
    step: int
    loss: float
    """Mean over the held-out samples, in nats."""
    bits_per_byte: float | None
    """None for tasks that do not count bytes."""
    seconds: float
    zlib_bits_per_byte: float | None = None
    """What `zlib -9` takes for the same text, to compare with; None where there is no such figure."""
    accuracy: float | None = None
    """Share of the held-out samples that is named rightly; None for tasks that name nothing."""

    def sentence(self) -> str:
        bits = "" if self.bits_per_byte is None else f" ({self.bits_per_byte:.2f} bits per byte)"
        right = "" if self.accuracy is None else f" ({self.accuracy:.1%} right)"
        return f"step {self.step}: held-out loss {self.loss:.3f}{bits}{right}"


@dataclass(frozen=True, kw_only=True)
class CopiesAveraged(_Happened):
    """Strategy `local`: round `step` made one of the copies that peers had trained apart."""

    event: ClassVar[str] = "copies_averaged"
    level: ClassVar[int] = logging.DEBUG
    step: int
    change_norm: float
    """Of the mean change, which the outer step then takes (the pseudo-gradient)."""
    cosine: float | None
    """Mean cosine between two peers' changes; None if that cannot be told."""
    consensus_distance: float | None
    """How far copies were from their average: the root of the mean squared distance."""
    own_loss: float | None = None
    """On the probe batch, which is the same for all: of this peer's copy. In nats; None in most rounds."""
    average_loss: float | None = None
    """On the same batch: of the average of all copies, before the outer step."""

    @property
    def barrier(self) -> float | None:
        """The average's loss less this copy's; its mean over all peers is the averaging barrier, and below
        zero it helps to average."""
        if self.own_loss is None or self.average_loss is None:
            return None
        return self.average_loss - self.own_loss

    def sentence(self) -> str:
        alike = "" if self.cosine is None else f", at a cosine of {self.cosine:.2f}"
        text = f"step {self.step}: the copies' mean change is {self.change_norm:.3g} long{alike}"
        if self.barrier is None:
            return text
        return f"{text}; on the probe batch averaging changed the loss by {self.barrier:+.4f}"


@dataclass(frozen=True, kw_only=True)
class PartsUnited(_Happened):
    """Strategy `partition`: entry `step` put together what peers did to the parts of the model that they own.
    Told when that was measured, or its factor changes. What it tells of the loss is of the entry before it,
    in nats, on samples that nobody trains on."""

    event: ClassVar[str] = "parts_united"
    step: int
    owners: int
    gamma: float
    """By which the union of all changes was multiplied."""
    union_change: float | None
    """Of the loss by the union as it was, not multiplied by anything; None unless all owners measured."""
    parts_change: float | None
    """Σ of what each part alone did to it."""

    @property
    def defect(self) -> float | None:
        """The cohesion defect: what parts lose by not knowing of each other; below zero they gain by it."""
        if self.union_change is None or self.parts_change is None:
            return None
        return self.union_change - self.parts_change

    def sentence(self) -> str:
        text = f"step {self.step}: {self.owners} parts were put together, times {self.gamma:.3g}"
        if self.defect is None:
            return text
        return (
            f"{text}; in the step before, the parts alone changed the loss by {self.parts_change:+.4f}, "
            f"together by {self.union_change:+.4f}: a cohesion defect of {self.defect:+.4f}"
        )


@dataclass(frozen=True, kw_only=True)
class GainsEaten(_Happened):
    """Strategy `partition`: over the last `rounds`, more than half of what the parts gained alone was lost as
    they were put together. Told again only after it was over."""

    event: ClassVar[str] = "gains_eaten"
    level: ClassVar[int] = logging.WARNING
    step: int
    rounds: int
    parts_change: float
    """Of the loss, in nats, by each part alone: Σ over parts and rounds."""
    defect: float
    """What of that was lost, likewise."""

    def sentence(self) -> str:
        return (
            f"step {self.step}: the parts that peers train apart undo each other's work: alone they changed "
            f"the loss by {self.parts_change:+.4f} in {self.rounds} rounds, and together it was "
            f"{self.defect:.4f} worse than that; a lower target_batch_size, which leaves fewer steps "
            'between rounds, by = "tensor" or a lower learning rate helps'
        )


@dataclass(frozen=True, kw_only=True)
class Previewed(_Happened):
    """The model at `step` was asked for a sample."""

    event: ClassVar[str] = "previewed"
    step: int
    text: str

    def sentence(self) -> str:
        return f"step {self.step}: the model writes {clean(repr(self.text))}"


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(_Happened):
    """A checkpoint of `step` is on disk, whole."""

    event: ClassVar[str] = "checkpoint_saved"
    step: int
    path: str
    size_bytes: int
    seconds: float

    def sentence(self) -> str:
        size = f"{self.size_bytes / 1e6:,.1f} MB in {duration(self.seconds)}"
        return f"step {self.step}: checkpoint saved to {clean(self.path)} ({size})"


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed(_Happened):
    """No checkpoint of `step` was written; earlier ones are untouched and training goes on."""

    event: ClassVar[str] = "checkpoint_failed"
    level: ClassVar[int] = logging.WARNING
    step: int
    reason: str

    def sentence(self) -> str:
        return f"step {self.step}: checkpoint not saved, training goes on: {clean(self.reason)}"


@dataclass(frozen=True, kw_only=True)
class PeerFaulted(_Happened):
    """A peer or the way to it did not do what was asked; this was survived."""

    event: ClassVar[str] = "peer_faulted"
    peer: PeerId
    cause: FaultCause
    detail: str

    def sentence(self) -> str:
        detail = f": {clean(self.detail)}" if self.detail else ""
        return f"peer {short(self.peer)} {_FAULT_WAS[self.cause]}{detail}"


@dataclass(frozen=True, kw_only=True)
class PeerBenched(_Happened):
    """A peer has broken the contract so often that it is neither heard nor believed for a while."""

    event: ClassVar[str] = "peer_benched"
    level: ClassVar[int] = logging.WARNING
    peer: PeerId
    offences: int
    seconds: float
    reason: str
    """What the last of these was."""

    def sentence(self) -> str:
        return (
            f"peer {short(self.peer)} is left out for {duration(self.seconds)}: "
            f"it broke the contract {self.offences} times, the last time as {clean(self.reason, 400)}"
        )


@dataclass(frozen=True, kw_only=True)
class PeerKicked(_Happened):
    """The organizer has put a peer out, and nobody deals with it."""

    event: ClassVar[str] = "peer_kicked"
    level: ClassVar[int] = logging.WARNING
    peer: PeerId
    seconds: float | None
    """For which it is out yet; None: for good."""
    reason: str

    def sentence(self) -> str:
        until = "for good" if self.seconds is None else f"for {duration(self.seconds)}"
        reason = f": {clean(self.reason)}" if self.reason else ""
        return f"the organizer has put out peer {short(self.peer)} {until}{reason}"


@dataclass(frozen=True, kw_only=True)
class TermsHeard(_Happened):
    """The organizer has changed something in the run, and this peer has heard of it."""

    event: ClassVar[str] = "terms_heard"
    revision: int
    says: tuple[str, ...]
    """All that is other than in the run file."""

    def sentence(self) -> str:
        return f"the organizer says (revision {self.revision}): {clean('; '.join(self.says), 1000)}"


@dataclass(frozen=True, kw_only=True)
class TermsApplied(_Happened):
    """The state is one under changed terms now, as on every other peer that is there. Who has caught up tells
    it of where it has come to."""

    event: ClassVar[str] = "terms_applied"
    step: int
    changes: tuple[str, ...]

    def sentence(self) -> str:
        return f"step {self.step}: as the organizer says, {clean(', '.join(self.changes), 1000)}"


@dataclass(frozen=True, kw_only=True)
class PeerConvicted(_Happened):
    """It is proven, by what the peer has signed, that it lied; whoever sees the proof hears it no more."""

    event: ClassVar[str] = "peer_convicted"
    level: ClassVar[int] = logging.WARNING
    step: int
    """Of the lie."""
    peer: PeerId
    reason: str

    def sentence(self) -> str:
        return (
            f"peer {short(self.peer)} is proven to have lied in step {self.step}: {clean(self.reason, 400)}"
        )


@dataclass(frozen=True, kw_only=True)
class CarrierChanged(_Happened):
    """Chunks to and from a peer go another way from now on."""

    event: ClassVar[str] = "carrier_changed"
    peer: PeerId
    carrier: Carrier
    reason: str
    """Why no longer, or not, over TLS; empty if it is."""

    def sentence(self) -> str:
        if self.carrier is Carrier.TLS:
            return f"chunks to and from peer {short(self.peer)} go over a TLS connection"
        reason = clean(self.reason, 400)
        return f"chunks to and from peer {short(self.peer)} go over libp2p, more slowly: {reason}"


@dataclass(frozen=True, kw_only=True)
class PeerStoodOut(_Happened):
    """A peer's gradients are unlike the others', as this peer sees them: it lies, or its machine errs."""

    event: ClassVar[str] = "peer_stood_out"
    level: ClassVar[int] = logging.WARNING
    step: int
    """Of the last of these rounds."""
    peer: PeerId
    rounds: int
    """In which it stood out since it was last named, less those in which it did not."""

    def sentence(self) -> str:
        return (
            f"step {self.step}: the gradients of {short(self.peer)} are unlike the others', "
            f"in {counted(self.rounds, 'round')} more"
        )


@dataclass(frozen=True, kw_only=True)
class DataUnlike(_Happened):
    """A peer's gradients are off the others' by more than chance explains, in the span that this peer adds
    up: it trains on other data, or on far noisier ones. Told again only after it was over."""

    event: ClassVar[str] = "data_unlike"
    level: ClassVar[int] = logging.WARNING
    step: int
    peer: PeerId
    noise_excess: float
    """How many times farther off, squared, than chance explains."""

    def sentence(self) -> str:
        return (
            f"step {self.step}: {short(self.peer)} seems to train on other data than the others; its "
            f"gradients are off theirs by {self.noise_excess:.1f} times what chance explains"
        )


@dataclass(frozen=True, kw_only=True)
class DataDuplicated(_Happened):
    """The peers' gradients are more alike than those of independent samples: several peers are worth one.
    Told again only after it was over."""

    event: ClassVar[str] = "data_duplicated"
    level: ClassVar[int] = logging.WARNING
    step: int
    noise_excess: float | None
    """Noise between peers over that within this one; None if they bring the very same gradients."""

    def sentence(self) -> str:
        share = (
            "none at all"
            if self.noise_excess is None
            else f"{self.noise_excess:.0%} of that within this peer"
        )
        return (
            f"step {self.step}: peers seem to compute on the same samples (noise between them: {share}); "
            "draw them by peer, not by step alone"
        )


@dataclass(frozen=True, kw_only=True)
class ReachChanged(_Happened):
    """A peer has dialled this one back, with another result than before."""

    event: ClassVar[str] = "reach_changed"
    reachable: bool
    address: str
    """Where it was dialled."""
    relays: int
    """Peers that pass on what hidden peers have for each other."""

    def sentence(self) -> str:
        if self.reachable:
            return f"other peers can open connections to this one at {clean(self.address)}"
        way = "by way of a relay" if self.relays else "not at all"
        return (
            f"behind NAT or a firewall: nobody can open a connection to this peer at {clean(self.address)}; "
            f"it opens them itself, and reaches peers that are hidden, too, {way}"
        )


@dataclass(frozen=True, kw_only=True)
class DaemonRestarted(_Happened):
    """The libp2p daemon had died and runs again, under the same peer id."""

    event: ClassVar[str] = "daemon_restarted"
    seconds: float
    """Without network."""

    def sentence(self) -> str:
        return f"the libp2p daemon died and was started again; {duration(self.seconds)} without network"


Event = (
    Joined
    | Leaving
    | WaitingChanged
    | Paused
    | Resumed
    | DeadlinesChanged
    | RoundCommitted
    | StateHashed
    | RoundAborted
    | LeaderTookOver
    | SamplesWasted
    | DeviceChosen
    | MicroBatchShrunk
    | CatchingUp
    | CaughtUp
    | CatchUpFailed
    | RolledBack
    | ReplicaDiverged
    | Evaluated
    | CopiesAveraged
    | PartsUnited
    | GainsEaten
    | Previewed
    | CheckpointSaved
    | CheckpointFailed
    | PeerFaulted
    | PeerBenched
    | PeerKicked
    | TermsHeard
    | TermsApplied
    | PeerConvicted
    | CarrierChanged
    | PeerStoodOut
    | DataUnlike
    | DataDuplicated
    | ReachChanged
    | DaemonRestarted
)

# -- events from a journal -----------------------------------------------------------------------------------


def from_dict(record: Mapping[str, Any]) -> Event | None:
    """The event that `to_dict` made this of. None if there is none such: a newer version wrote it, or it is
    damaged."""
    kind = _BY_NAME.get(str(record.get("event")))
    if kind is None:
        return None
    hints = get_type_hints(kind, localns={"PeerId": str})
    known = [field.name for field in fields(kind) if field.name in record]
    try:
        event: Event = kind(**{name: _read(record[name], hints[name]) for name in known})
    except (TypeError, ValueError):
        return None
    return event


def _read(value: Any, hint: Any) -> Any:
    """What `_plain` made this value of. Raises TypeError or ValueError."""
    if get_origin(hint) is types.UnionType:
        inner, _ = get_args(hint)  # always with None
        return None if value is None else _read(value, inner)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise TypeError
        return tuple(_read(each, get_args(hint)[0]) for each in value)
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise TypeError
        return math.nan if value is None else float(value)
    if issubclass(hint, StrEnum):
        return hint(value)
    if type(value) is not hint:
        raise TypeError
    return value


_BY_NAME: dict[str, Any] = {kind.event: kind for kind in get_args(Event)}

# -- how numbers, peers and strangers' words are shown -------------------------------------------------------


def paused_because(reason: PauseReason) -> str:
    """The reason in words, for whoever owns the machine."""
    return _PAUSED_BECAUSE[reason]


def short(peer: PeerId) -> str:
    """A peer id as people see it: its last 8 characters, the first ones being alike in all of them."""
    return f"…{clean(peer[-8:])}"


def clean(text: str, limit: int = 200) -> str:
    """`text` on one printable line of at most `limit` characters: it may be a stranger's."""
    shown = "".join(character if character.isprintable() else "�" for character in text[: limit + 1])
    return shown if len(text) <= limit else f"{shown[: limit - 1]}…"


def duration(seconds: float) -> str:
    """Seconds to about two digits: 38 ms, 3.2 s, 4 min 10 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24:,} d {hours % 24} h"


def counted(number: int, thing: str) -> str:
    """So many of a thing, in words."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def _names(peers: Sequence[PeerId]) -> str:
    """The first three by name; a roster can have hundreds."""
    named = ", ".join(short(peer) for peer in peers[:3])
    return named if len(peers) <= 3 else f"{named} and {len(peers) - 3} more"


def _plain(value: Any) -> Any:
    match value:
        case StrEnum():
            return value.value
        case float() if not math.isfinite(value):
            return None
        case tuple():
            return [_plain(item) for item in value]
        case _:
            return value
