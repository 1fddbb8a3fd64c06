"""What travels between peers: ids, control messages, chunk headers, signed records.

Every type here is frozen and strict, unknown keys are refused and every text, number and list is bounded,
because each of them may have been written by a stranger. Tensors are not here: they travel as raw bytes
beside a header. Digests are lower-case hex SHA-256.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, NewType

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    model_serializer,
    model_validator,
)

from p2ptrain.config import RunId

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58: the hash of, or the very, public key that the transport authenticated."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Id = Annotated[PeerId, Field(min_length=1, max_length=128)]
Step = Annotated[int, Field(ge=0, lt=2**53)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Seconds = Annotated[float, Field(ge=0.0, le=86_400.0, allow_inf_nan=False)]
SquaredNorm = Annotated[float, Field(ge=0.0)]
BytesPerSecond = Annotated[float, Field(ge=0.0, le=1e15, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=300)]
Incarnation = Annotated[str, Field(max_length=32)]
"""Changes whenever a peer has lost what it held in memory: at its start, and at each catch-up."""

Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
"""Ed25519, in hex."""
Serial = Annotated[int, Field(ge=0, lt=2**31)]
Moment = Annotated[int, Field(ge=0, lt=2**40)]
"""Seconds since 1970, by whose clock it may be."""

MAX_ROSTER = 1024
MAX_AUDITED = 128
"""Members of a round that is audited: what reducers sign must fit into the header of a chunk."""
MAX_PLEDGES = 256
"""In one answer."""
MAX_HEADER_BYTES = 256 * 1024
MAX_HELLO_BYTES = 4096
"""Of the first frame on a stream: until then anybody may have opened it."""
MAX_REVOKED = 256
"""So that all fit into one DHT record."""
MAX_KICKED = 24
"""So that these do, too."""
MAX_PROBE_BYTES = 4 * 2**20
MAX_REASON = 80
MAX_CHANGES = 16
"""To the run file, at one time; they travel in every entry."""


class Record(BaseModel):
    """Base of everything that travels."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


# -- where a replica stands ----------------------------------------------------------------------------------


class Position(Record):
    """Where a replica stands in the log: the step it would take next, its lineage, and the samples behind
    it."""

    step: Step
    lineage: Digest
    weight: Count


class Ballot(Record):
    """The right to run an attempt. Ballots are totally ordered by (number, leader); a member obeys the
    highest."""

    number: Annotated[int, Field(ge=0, lt=2**31)]
    leader: Id

    def __lt__(self, other: Ballot) -> bool:
        return (self.number, self.leader) < (other.number, other.leader)

    def __le__(self, other: Ballot) -> bool:
        return (self.number, self.leader) <= (other.number, other.leader)


# -- what the organizer says to all -------------------------------------------------------------------------


class Decree(Record):
    """What the organizer says to all: signed with the organizer's key, for one run, passed on by any peer.

    `gate.signed` makes one. Of each kind the one of the highest revision holds, and says all there is to say.
    """

    kind: str
    peer: Id
    """Who passes it on."""
    revision: Count
    signature: Signature
    """Of the kind, the run's id and all that is said here but by `peer`."""


LiveKey = Literal["optimizer.lr", "optimizer.weight_decay", "optimizer.clip_norm", "target_batch_size"]
"""Keys of the run file that may change while the run goes on: nothing in a replica depends on their past."""


class Change(Record):
    """One key of the run file that has another value from a step on."""

    step: Step
    key: LiveKey
    value: Annotated[float, Field(ge=0, le=1e9)]


class Terms(Decree):
    """What the organizer has changed in the run since it began; see `protocol.terms`."""

    kind: Literal["terms"] = "terms"
    changes: Annotated[tuple[Change, ...], Field(max_length=MAX_CHANGES)] = ()
    stop: Step | None = None
    """The run is over at this step; None: as the run file says."""
    paused: Annotated[str, Field(max_length=MAX_REASON, pattern=r"^[ !#-\[\]-~]*$")] | None = None
    """Nobody shall train from `paused_from` on, and why; None: all shall."""
    paused_from: Step = 0


class DataPosition(Record):
    """Which samples have been taken out of the data: all below `next`, except those in `returned`."""

    next: Count
    returned: Annotated[tuple[tuple[Count, Count], ...], Field(max_length=MAX_ROSTER + 1)]
    """Ranges, each up to before its second number, that were leased and not brought in; rising and apart."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> DataPosition:
        bounds = [bound for pair in self.returned for bound in pair] + [self.next]
        if self.returned and any(low >= high for low, high in pairwise(bounds)):
            raise ValueError(f"the returned ranges must rise, and end before {self.next}")
        return self


class EntryHeader(Record):
    """What a committed round produced, except the averaged bytes themselves, which `digest` binds.

    Every member that holds the averaged bytes derives this same header from the freeze and the chunks alone,
    so whoever ends up committing the attempt commits the same entry.
    """

    step: Step
    parent: Digest
    ballot: Ballot
    roster: Annotated[tuple[Id, ...], Field(min_length=1, max_length=MAX_ROSTER)]
    samples: Annotated[tuple[Count, ...], Field(min_length=1, max_length=MAX_ROSTER)]
    spans: Annotated[tuple[Count, ...], Field(min_length=2, max_length=MAX_ROSTER + 1)]
    """Boundaries in values: roster member i averaged [spans[i], spans[i+1])."""
    squared_norms: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1, max_length=MAX_ROSTER)
    ]
    """Of each decoded span, in float64, as its reducer measured it: the clip factor comes from these
    alone."""
    digest: Digest
    """SHA-256 over the digests of the entry's encoded chunks, in order."""
    terms: Terms | None = None
    """Under which it is applied; None: as the run file says."""
    skipped: Annotated[tuple[Count, ...], Field(max_length=MAX_ROSTER)] = ()
    """Where samples are leased: how many each member took out of the data besides those that it brings, since
    their gradient was not finite. Empty: none did."""
    data: DataPosition | None = None
    """Where samples are leased: how the data stands after this entry."""

    @property
    def total_samples(self) -> int:
        return sum(self.samples)

    @model_validator(mode="after")
    def _lengths_agree(self) -> EntryHeader:
        members = len(self.roster)
        if not (len(self.samples) == len(self.squared_norms) == len(self.spans) - 1 == members):
            raise ValueError(f"samples, squared_norms and spans must fit the roster of {members}")
        if len(self.skipped) not in (0, members):
            raise ValueError(f"skipped must fit the roster of {members}")
        return self


# -- control messages: leader <-> members --------------------------------------------------------------------


class Report(Record):
    """member → leader: how far I am with this step. Sent after every micro-batch, and as a heartbeat."""

    kind: Literal["report"] = "report"
    incarnation: Incarnation
    position: Position
    samples: Count
    in_flight: Count
    """Samples of the micro-batch that is being computed now; 0 when idle."""
    finish_seconds: Seconds
    """Expected time from sending this until the micro-batch in flight is done."""
    batch_seconds: Seconds
    """What one micro-batch takes this peer, measured; 0 before the first."""
    rate: BytesPerSecond = 0.0
    """At which it sends in rounds while it has something to send, measured; 0 before the first."""
    reduces: bool = True
    """Whether it will add up others' gradients; if not, as long as somebody else does."""
    state_digest: Digest | None = None
    """Digest of the parameters at `position`, once known."""


class Freeze(Record):
    """One attempt, as each of its members knows it. It travels as a `Call`."""

    kind: Literal["freeze"] = "freeze"
    step: Step
    parent: Digest
    ballot: Ballot
    roster: Annotated[tuple[Id, ...], Field(min_length=1, max_length=MAX_ROSTER)]
    spans: Annotated[tuple[Count, ...], Field(min_length=2, max_length=MAX_ROSTER + 1)]
    """Boundaries of the spans in values: roster member i reduces [spans[i], spans[i+1])."""
    finishing: Annotated[tuple[Id, ...], Field(max_length=MAX_ROSTER)]
    """Members that finish their micro-batch in flight first; the others bring what they have now. A member
    knows of itself only."""
    cutoff_seconds: Seconds
    """A finishing member waits for its micro-batch no longer than this."""
    deadline_seconds: Seconds
    """After this time (from arrival) an attempt that still misses chunks has failed."""
    terms: Terms | None = None
    """Under which the entry will be applied."""
    signature: Signature | None = None
    """The leader's, of its `Pledge` that the freeze is this; None before it has signed."""
    caller: Incarnation = ""
    """The leader's, as in that."""

    @model_validator(mode="after")
    def _lengths_agree(self) -> Freeze:
        if len(self.spans) - 1 != len(self.roster):
            raise ValueError(f"spans must fit the roster of {len(self.roster)}")
        return self


class Call(Record):
    """leader → member: an attempt begins, and you are on its roster; reduce now.

    A freeze without what the member has already: that is most of it, and with a whole roster for each of its
    members a leader would send as their square.
    """

    kind: Literal["call"] = "call"
    step: Step
    parent: Digest
    ballot: Ballot
    left: Annotated[tuple[Count, ...], Field(max_length=MAX_ROSTER)]
    """Ranks, on the roster of the last entry, of those who are not on this one."""
    came: Annotated[tuple[Id, ...], Field(max_length=MAX_ROSTER)]
    """Who is on this roster, and was not on that."""
    levels: Annotated[str, Field(min_length=1, max_length=MAX_ROSTER)]
    """The members' rates, a letter each, in roster order: from these follow the spans."""
    incarnation: Incarnation
    """Whom this attempt counts on: a later incarnation of the member would bring other samples."""
    finishing: bool
    """Finish the micro-batch in flight first; else bring what is there now."""
    cutoff_seconds: Seconds
    deadline_seconds: Seconds
    terms: Terms | None = None
    signature: Signature | None = None
    """The caller's, of its `Pledge` that all on the roster are called to this freeze."""
    caller: Incarnation = ""
    """The caller's own, as in that."""


class Done(Record):
    """member → leader: I hold every span; with them I would get there."""

    kind: Literal["done"] = "done"
    ballot: Ballot
    position: Position
    """After the entry. Its lineage binds the whole header."""


class Failed(Record):
    """member → leader: this attempt cannot end here, and `suspects` are the peers I waited for in vain."""

    kind: Literal["failed"] = "failed"
    step: Step
    ballot: Ballot
    suspects: Annotated[tuple[Id, ...], Field(max_length=MAX_ROSTER)]
    cause: Text


class Commit(Record):
    """leader → members and newcomers: the attempt is committed, apply it."""

    kind: Literal["commit"] = "commit"
    position: Position
    """After the entry; its lineage tells who holds the entry that this is the one."""
    newcomers: Annotated[tuple[Id, ...], Field(max_length=MAX_ROSTER)] = ()
    """Peers that reported at this step too late for its roster: the next leader expects them."""


class Abort(Record):
    """leader → members: nobody steps on this attempt; contributions are kept."""

    kind: Literal["abort"] = "abort"
    step: Step
    ballot: Ballot
    cause: Text
    dropped: Annotated[tuple[Id, ...], Field(max_length=MAX_ROSTER)] = ()


class Ask(Record):
    """any → any: where do you stand? With a ballot it is also a take-over: the answer is a promise (I7)."""

    kind: Literal["ask"] = "ask"
    position: Position
    ballot: Ballot | None = None


class Answer(Record):
    """any → any: where I stand. Also the leader's heartbeat."""

    kind: Literal["answer"] = "answer"
    incarnation: Incarnation
    position: Position
    ballot: Ballot | None
    """The highest ballot this peer has obeyed or promised to obey at its step."""
    joined: Ballot | None
    """The last attempt at its step that this peer, in this incarnation, took part in."""
    leader: Id
    """Whom this peer takes for the leader of its step; itself, if it leads."""
    question: Ballot | None = None
    """The take-over ballot that this answers, if it answers one."""
    held: Position | None = None
    """Where the attempt it joined would lead, if it holds every span of that."""


class Resync(Record):
    """leader → member: at this step your parameters differ from the others'; take their state from
    `donor`."""

    kind: Literal["resync"] = "resync"
    position: Position
    state_digest: Digest
    """What the others have."""
    donor: Id


class Withdraw(Record):
    """any → all who may count on me: I take part in nothing until I report again; wait for me no longer."""

    kind: Literal["withdraw"] = "withdraw"


class Accusation(Record):
    """any → all it knows: I hold the proof that `against` has lied; ask me for it, and judge for yourself."""

    kind: Literal["accusation"] = "accusation"
    against: Id
    proof: Digest
    step: Step | None = None
    """Whose entry may be wrong for it; None: no entry is."""


Message = Report | Call | Done | Failed | Commit | Abort | Ask | Answer | Resync | Withdraw | Accusation

# -- the data plane ------------------------------------------------------------------------------------------


class Chunk(Record):
    """member → reducer: chunk `number` of my contribution to your span, as encoded bytes beside this
    header."""

    kind: Literal["chunk"] = "chunk"
    step: Step
    parent: Digest
    """The lineage that the attempt builds on: after a fork, another attempt may have this step and ballot."""
    ballot: Ballot
    freeze: Digest
    """To which freeze I was called, see `protocol.audit.frozen`: with another one, this chunk is none of
    yours."""
    called: Signature | None = None
    """The leader's, of its `Pledge` that it is this one; on the first chunk."""
    caller: Incarnation = ""
    """The leader's, as in that; beside it."""
    number: Count
    samples: Count
    """My sample count; the same in every chunk of an attempt. 0 samples: one chunk with no bytes stands for
    all."""
    skipped: Count = 0
    """Samples of my lease that I leave out, since their gradient is not finite; in every chunk, too."""
    signature: Signature | None = None
    """Of my `Commitment` to this reducer; on the last chunk only, and only where the run is audited."""
    incarnation: Incarnation = ""
    """As in that; beside the signature."""


class Averaged(Record):
    """reducer → members: chunk `number` of the mean of my span; the same bytes to everyone."""

    kind: Literal["averaged"] = "averaged"
    step: Step
    parent: Digest
    ballot: Ballot
    freeze: Digest
    called: Signature | None = None
    caller: Incarnation = ""
    """As in a `Chunk`."""
    number: Count
    samples: Annotated[tuple[Count, ...], Field(min_length=1, max_length=MAX_ROSTER)]
    """The sample counts that this mean was divided by, in roster order."""
    skipped: Annotated[tuple[Count, ...], Field(max_length=MAX_ROSTER)] = ()
    """What the members skipped, likewise; empty if none did."""
    squared_norm: Annotated[float, Field(ge=0)] | None = None
    """Of the decoded span, in float64; on the last chunk only."""
    spread: tuple[SquaredNorm, SquaredNorm] | None = None
    """Squared norms in the span: of the members' mean gradients, weighted by samples, and of the mean of
    these, as they arrived here, before any rule (see `gradients.noise`). On the last chunk only; None where
    it says nothing. For figures alone: nobody can check it, and no state follows from it."""
    inputs: Annotated[tuple[Digest, ...], Field(max_length=MAX_AUDITED)] | None = None
    """The root of what each member sent me, in roster order; on the last chunk, where the run is audited."""
    signature: Signature | None = None
    """Of my `Statement`; beside the inputs."""
    pledge: Signature | None = None
    """Of my `Pledge` that the span's mean is this; on the last chunk."""
    incarnation: Incarnation = ""
    """As in that; beside it."""


# -- what peers sign in an attempt ---------------------------------------------------------------------------


class Pledge(Record):
    """What one peer says in an attempt to all of its members alike. It signs this, and whoever holds two that
    differ in nothing but the digest can prove that it lies."""

    run: Digest
    """The run's fingerprint."""
    step: Step
    parent: Digest
    ballot: Ballot
    peer: Id
    """Who says so: the ballot's leader of the freeze, a reducer of its span's mean."""
    about: Literal["freeze", "mean"]
    incarnation: Incarnation
    """Who restarts may use a ballot again, or average again, over other samples."""
    digest: Digest


class MeanPledge(Record):
    """What a reducer's pledge was, for whoever has the freeze."""

    rank: Annotated[int, Field(ge=0, lt=MAX_ROSTER)]
    incarnation: Incarnation
    digest: Digest
    """BLAKE3 over the BLAKE3 of each of the span's averaged chunks, in order."""
    signature: Signature


class Commitment(Record):
    """What a member has sent to one reducer. It signs this, and cannot say later that it was something
    else."""

    run: Digest
    """The run's fingerprint."""
    step: Step
    parent: Digest
    ballot: Ballot
    member: Id
    incarnation: Incarnation
    reducer: Id
    samples: Count
    root: Digest
    """BLAKE3 over the BLAKE3 of each encoded chunk, in order; of none, if it brought no samples."""


class Statement(Record):
    """What a reducer has made of what it was sent. It signs this, and whoever has the chunks can tell whether
    the one follows from the other."""

    run: Digest
    step: Step
    parent: Digest
    ballot: Ballot
    roster: Annotated[tuple[Id, ...], Field(min_length=1, max_length=MAX_AUDITED)]
    samples: Annotated[tuple[Count, ...], Field(min_length=1, max_length=MAX_AUDITED)]
    spans: Annotated[tuple[Count, ...], Field(min_length=2, max_length=MAX_AUDITED + 1)]
    rank: Annotated[int, Field(ge=0, lt=MAX_AUDITED)]
    """Of the reducer in the roster: it signs, and it averaged [spans[rank], spans[rank + 1])."""
    inputs: Annotated[tuple[Digest, ...], Field(min_length=1, max_length=MAX_AUDITED)]
    """The root of each member's chunks, as in its `Commitment`."""
    output: Digest
    """The same of the averaged chunks."""

    @property
    def reducer(self) -> PeerId:
        return self.roster[self.rank]

    @model_validator(mode="after")
    def _lengths_agree(self) -> Statement:
        members = len(self.roster)
        fit = len(self.samples) == len(self.inputs) == len(self.spans) - 1 == members
        if not fit or self.rank >= members or list(self.spans) != sorted(self.spans):
            raise ValueError(f"rank, samples, inputs and spans must fit the roster of {members}")
        return self


# -- who is let in -------------------------------------------------------------------------------------------

Permission = Literal["train", "serve", "watch"]
"""`train`: everything. `serve`: to be given the state. `watch`: to be told where the run stands."""


class Grant(Record):
    """What an organizer signs: whoever has the secret half of `key` may take part in this run until then."""

    run_id: RunId
    run_digest: Digest
    organizer: Id
    """The organizer's public key, written as the peer id that it would have."""
    key: Id
    """This invite's own public key, written likewise. Its secret half is in the invite and never travels."""
    role: Permission
    serial: Serial
    """Which of the organizer's invites this is."""
    name: Annotated[str, Field(max_length=64)] = ""
    """The organizer's note, such as whom it is for."""
    issued: Moment
    expires: Moment | None
    """By when whoever came by it is put out again; None: never."""
    uses: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """For so many peers: it lets nobody in by itself, but the bootstrap gives so many who show
    it a grant of their own (`Redeem`), whose `key` is the peer's own id. None: for any number."""

    @model_serializer(mode="wrap")
    def _as_before_there_were_limits(self, plain: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Where there is none: invites of before, and their signatures, stay good."""
        content: dict[str, object] = plain(self)
        if self.uses is None:
            del content["uses"]
        return content


class Pass(Record):
    """What a peer shows at every door: a grant, signed by the organizer, and the proof that it is this
    peer's."""

    grant: Grant
    signature: Signature
    """Of the grant, by the organizer."""
    proof: Signature
    """Of that signature and the peer's id, by the grant's key: in another peer's hands a pass is void."""


# -- state transfer: one request, one reply ------------------------------------------------------------------


class GetRun(Record):
    """What run is this? The reply's payload is the run file as canonical JSON."""

    kind: Literal["get_run"] = "get_run"


class GetEntry(Record):
    """The entry that was committed at `step`; the reply's payload is its encoded bytes, if they are
    wanted."""

    kind: Literal["get_entry"] = "get_entry"
    step: Step
    with_payload: bool = True


class GetLineage(Record):
    """Which lineage did you have at `step`? Tells whether two logs have parted, also where entries are
    gone."""

    kind: Literal["get_lineage"] = "get_lineage"
    step: Step


class GetManifest(Record):
    """The snapshot you would give me. A joiner names a step, the same to several donors: equal states are
    equal bytes, so it can take its pieces from all of them."""

    kind: Literal["get_manifest"] = "get_manifest"
    weight: Count = 0
    """One with fewer samples behind it is of no use to me."""
    step: Step | None = None
    """The one at this step, which may be a little ahead; None: whichever you have, or can have now."""
    exactly: bool = False
    """At that step and no other; else one that you have at hand is as welcome."""


class GetPiece(Record):
    """Piece `number` of the snapshot whose state digest is `state_digest`."""

    kind: Literal["get_piece"] = "get_piece"
    state_digest: Digest
    number: Count


class Redeem(Record):
    """To the bootstrap: give me a grant of my own for this one, which is for a few peers, or by a key of the
    organizer's that has been replaced."""

    kind: Literal["redeem"] = "redeem"
    access: Pass


class Redeemed(Record):
    """Yours alone."""

    kind: Literal["redeemed"] = "redeemed"
    grant: Grant
    signature: Signature
    """Of the grant, by the organizer."""


class GetMetrics(Record):
    """How are you, in Prometheus text? The payload is the page that you serve on your own machine."""

    kind: Literal["get_metrics"] = "get_metrics"


class GetEvents(Record):
    """What happened to you since? The payload is as `telemetry.feed` has it."""

    kind: Literal["get_events"] = "get_events"
    life: Annotated[str, Field(max_length=32)] = ""
    """Which of your lives `after` counts the events of."""
    after: Count = 0
    wait_seconds: Annotated[float, Field(ge=0, le=30)] = 0.0
    """Answer once there is something, or after this time."""


class Probe(Record):
    """How fast is the way between us? Send so many bytes of nothing; or, `back`, ask me for them, and tell
    how long that took."""

    kind: Literal["probe"] = "probe"
    size_bytes: Annotated[int, Field(ge=1, le=MAX_PROBE_BYTES)]
    back: bool = False


class Probed(Record):
    """They took so long to come."""

    kind: Literal["probed"] = "probed"
    seconds: Seconds


class GetInput(Record):
    """What did `member` send to the reducer at `rank` in that attempt? The member itself answers with the
    bytes of chunk `number`, which was drawn for an audit, the reducer with what the member has signed."""

    kind: Literal["get_input"] = "get_input"
    step: Step
    parent: Digest
    ballot: Ballot
    rank: Annotated[int, Field(ge=0, lt=MAX_AUDITED)]
    number: Count
    member: Id


class GetPledges(Record):
    """What have the reducers of that attempt, from rank `first` on, pledged to you?"""

    kind: Literal["get_pledges"] = "get_pledges"
    step: Step
    parent: Digest
    ballot: Ballot
    first: Annotated[int, Field(ge=0, lt=MAX_ROSTER)] = 0


class GetProof(Record):
    """The proof with this digest, of which you have told me."""

    kind: Literal["get_proof"] = "get_proof"
    proof: Digest


class Input(Record):
    """What a member has signed. From the member itself, the payload is the BLAKE3 of each of its chunks for
    that reducer (32 bytes each), and then the chunk that was asked for."""

    kind: Literal["input"] = "input"
    commitment: Commitment
    signature: Signature


class FalseSum(Record):
    """Proof that a reducer has lied: what it signed as the average does not follow from what it signed as
    its inputs. The payload is, for each member that brought samples, the digests and the chunk as in an
    `Input`, and then the same of the averaged chunk."""

    kind: Literal["false_sum"] = "false_sum"
    statement: Statement
    signature: Signature
    number: Count
    """Of the chunk."""
    last: EntryHeader | None
    """The entry before, which the rule of aggregation may follow; the statement's parent binds it."""


class TwoStories(Record):
    """Proof that a peer has lied: it signed two things of one and the same contribution, freeze or mean."""

    kind: Literal["two_stories"] = "two_stories"
    one: Commitment | Pledge
    one_signature: Signature
    other: Commitment | Pledge
    other_signature: Signature


Proof = FalseSum | TwoStories


class Pledges(Record):
    """Those that were asked for, as they came here; there may be more from the last rank on."""

    kind: Literal["pledges"] = "pledges"
    means: Annotated[tuple[MeanPledge, ...], Field(max_length=MAX_PLEDGES)]


class Piece(Record):
    """The payload beside this is what was asked for."""

    kind: Literal["piece"] = "piece"


class EntryReply(Record):
    """An entry's header; its bytes are the payload."""

    kind: Literal["entry"] = "entry"
    header: EntryHeader


class Lineage(Record):
    """The lineage at that step; None if this peer never knew it, or no longer does."""

    kind: Literal["lineage"] = "lineage"
    lineage: Digest | None


class Manifest(Record):
    """A snapshot: where it stands, and the SHA-256 of each of its pieces."""

    kind: Literal["manifest"] = "manifest"
    position: Position
    state_digest: Digest
    size_bytes: Count
    piece_bytes: Annotated[int, Field(ge=1, le=64 * 2**20)]
    pieces: Annotated[tuple[Digest, ...], Field(min_length=1, max_length=3000)]
    last: EntryHeader | None
    """The entry that led to this state; None at step 0."""


class Later(Record):
    """Not now, but ask again: for the snapshot at this step, or for the same in so many seconds."""

    kind: Literal["later"] = "later"
    step: Step | None = None
    seconds: Seconds = 0.0


class Refusal(Record):
    """No, and why."""

    kind: Literal["refusal"] = "refusal"
    reason: Text
    uninvited: bool = False
    """Whether the reason is the invite that was shown, or that none was."""


# -- greetings ----------------------------------------------------------------------------------------------


class Hello(Record):
    """First frame on every stream: which run its sender trains. Different fingerprints never meet."""

    kind: Literal["hello"] = "hello"
    protocol: Count
    fingerprint: Digest
    """Of the run; see `config.fingerprint`."""
    access: Pass | None = None


class Greeting(Record):
    """First frame on every TLS connection, both ways: who speaks to whom. The certificate proves `sender`,
    and `to` keeps a third peer from passing our connection on as its own."""

    kind: Literal["greeting"] = "greeting"
    protocol: Count
    fingerprint: Digest
    """Of the run; see `config.fingerprint`."""
    sender: Id
    to: Id
    access: Pass | None = None


# -- am I reachable: asked on a stream of its own, see `swarm.reach` -----------------------------------------


class DialBack(Record):
    """Please dial me at the address that you see me at, on this port, over a new connection."""

    kind: Literal["dial_back"] = "dial_back"
    port: Annotated[int, Field(ge=1, le=65535)]


class Dialled(Record):
    """What came of it."""

    kind: Literal["dialled"] = "dialled"
    reachable: bool | None
    """None: it was not tried."""
    address: Annotated[str, Field(max_length=256)] = ""
    detail: Text = ""
    """Why it failed, or was not tried."""


Watching = GetMetrics | GetEvents
"""What those ask who take no part; they need not know the model's fingerprint."""
Request = (
    GetRun
    | GetEntry
    | GetLineage
    | GetManifest
    | GetPiece
    | Redeem
    | Probe
    | Watching
    | GetInput
    | GetPledges
    | GetProof
)
Reply = (
    Piece
    | EntryReply
    | Lineage
    | Manifest
    | Later
    | Redeemed
    | Probed
    | Input
    | Pledges
    | FalseSum
    | TwoStories
    | Refusal
)
Wire = Annotated[
    Message | Chunk | Averaged | Request | Reply | Hello | Greeting | DialBack | Dialled,
    Field(discriminator="kind"),
]
WIRE: TypeAdapter[Wire] = TypeAdapter(Wire)

# -- signed DHT records --------------------------------------------------------------------------------------

Role = Literal["train", "bootstrap", "monitor"]


class Direct(Record):
    """Where a peer takes chunks over TLS, and by which certificate it is known there."""

    hosts: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[0-9A-Fa-f.:]{2,45}$")], ...], Field(min_length=1, max_length=8)
    ]
    """IP addresses, not names: a stranger shall not have us look things up."""
    port: Annotated[int, Field(ge=1, le=65535)]
    certificate: Digest
    """SHA-256 of the certificate in DER form. The peer makes a new one at each start."""


class Milestone(Record):
    """Which state a peer had at a step, by the first digits of what names it."""

    step: Step
    lineage: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    state: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Of the state digest."""


class Presence(Record):
    """A peer's short-lived, signed statement of itself, under the run's presence key."""

    kind: Literal["presence"] = "presence"
    peer: Id
    role: Role
    name: Annotated[str, Field(max_length=64)]
    protocol: Count
    fingerprint: Digest
    incarnation: Incarnation
    position: Position | None
    """None for peers that hold no replica."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    extra: Annotated[str, Field(max_length=200)] = ""
    """The task's own note, such as the corpus digest."""
    milestones: Annotated[tuple[Milestone, ...], Field(max_length=8)] = ()
    """Of its last steps, see `protocol.presence`: so that no donor can give a newcomer another state."""
    direct: Direct | None = None
    """None: chunks go over libp2p only."""
    access: Pass | None = None
    """Put there by the carrier."""


class RoundRecord(Record):
    """The leader's signed statement of the last commit, under the run's round key."""

    kind: Literal["round"] = "round"
    peer: Id
    position: Position
    roster_size: Annotated[int, Field(ge=1, le=MAX_ROSTER)]
    access: Pass | None = None
    """Put there by the carrier."""


class Revocations(Decree):
    """The invites that the organizer has taken back."""

    kind: Literal["revocations"] = "revocations"
    serials: Annotated[tuple[Serial, ...], Field(max_length=MAX_REVOKED)]


class Kick(Record):
    """One peer that is put out, whatever invite it shows."""

    who: Annotated[PeerId, Field(min_length=1, max_length=64)]
    until: Moment | None
    """None: it may not come back."""
    reason: Annotated[str, Field(max_length=40, pattern=r"^[ !#-\[\]-~]*$")] = ""


class Kicks(Decree):
    """The peers that the organizer has put out."""

    kind: Literal["kicks"] = "kicks"
    kicks: Annotated[tuple[Kick, ...], Field(max_length=MAX_KICKED)]


class Succession(Decree):
    """The organizer has another key from now on. The old one signs this, so that all who trust it follow; the
    new one, too, so that those who trust that one bear with those who have not followed yet."""

    kind: Literal["succession"] = "succession"
    predecessor: Id
    successor: Id
    ends: Moment
    """When passes by the old key end."""
    accepted: Signature
    """Of the same as `signature`, by the successor."""


DECREES = ("succession", "revocations", "kicks", "terms")
"""Their kinds."""

SignedRecord = Annotated[
    Presence | RoundRecord | Revocations | Kicks | Succession | Terms, Field(discriminator="kind")
]
SIGNED: TypeAdapter[SignedRecord] = TypeAdapter(SignedRecord)
