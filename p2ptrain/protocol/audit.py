"""Who looks over which reducer's shoulder, and what proves a lie: pure decisions.

A member signs what it sends to each reducer (`Commitment`); a reducer signs what it made of which inputs
(`Statement`), and a member holds no span whose reducer names other inputs of its own than it has sent. After
the next entry, for each span one of its chunks and one auditor are drawn: the auditor asks the members for
their inputs to that chunk, which the reducer's own signature binds, and does the sum again. Every rule of
aggregation rounds alike on every kernel (ADR 17), so a difference is a lie, and the signed statement with the
inputs proves it to anyone.

The draw comes from what the *other* reducers make in the next round: when a reducer lies, nobody can know
that, and by what it does later it can turn it no more.

Not covered: who keeps back the inputs that it has signed for is counted by whoever asked, as there is no
proof of silence; a round with one reducer only, whose draw it can foresee; and codecs with feedback, as what
a reducer owes would be an input that nobody has signed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blake3 import blake3

from p2ptrain.errors import BadMessage
from p2ptrain.protocol.lineage import advance, digest_of, joint_digest
from p2ptrain.protocol.spans import chunk_ranges
from p2ptrain.records import (
    Commitment,
    EntryHeader,
    FalseSum,
    Freeze,
    PeerId,
    Pledge,
    Position,
    Statement,
    TwoStories,
)

KEPT_ROUNDS = 64
KEPT_BYTES = 64 * 2**20
"""A drawn chunk is kept by whoever sent it for so many rounds, or so many bytes of such chunks; but for two
rounds in any case."""
DIGEST_BYTES = 32
Digests = Sequence[bytes]
"""BLAKE3 of each encoded chunk of one member's contribution to one span, or of that span's averages."""
Signed = Callable[[PeerId, bytes, str], bool]
"""Whether that peer has signed these bytes."""


def claim(what: Commitment | Pledge | Statement) -> bytes:
    """The bytes that are signed: no other kind of record, and no other content, has the same."""
    kind = type(what).__name__.lower().encode()
    content = json.dumps(what.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return b"p2ptrain " + kind + b"\0" + content.encode()


# -- the draw ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """`auditor` does the sum of chunk `number` of the span at `rank` again."""

    rank: int
    number: int
    auditor: PeerId


def draws(
    header: EntryHeader,
    chunks: Sequence[int],
    following: EntryHeader,
    digests: Sequence[Digests],
    share: float,
) -> list[Draw]:
    """What is audited of entry `header`, once entry `following` is committed; the same for all who hold both.

    `chunks`: of each span of `header`; `digests`: of the averaged chunks of `following`, by rank. A span is
    audited with the chance `share`. Whoever is on one of the two rosters only cannot know what to do, so it
    is drawn for nothing.
    """
    if following.step != header.step + 1:
        raise ValueError(f"entry {following.step} does not follow entry {header.step}")
    both = [peer for peer in header.roster if peer in following.roster]
    found = []
    for rank, (reducer, count) in enumerate(zip(header.roster, chunks, strict=True)):
        auditors = [peer for peer in both if peer != reducer]
        if not count or not auditors:
            continue
        theirs = (
            digest
            for peer, made in zip(following.roster, digests, strict=True)
            if peer != reducer
            for digest in made
        )
        chance = bytes.fromhex(
            digest_of([following.parent.encode(), rank.to_bytes(2), joint_digest(theirs).encode()])
        )
        if int.from_bytes(chance[:8]) < share * 2**64:
            number = int.from_bytes(chance[8:16]) % count
            found.append(Draw(rank, number, auditors[int.from_bytes(chance[16:24]) % len(auditors)]))
    return found


# -- what an auditor is shown --------------------------------------------------------------------------------


def is_part(root: str, number: int, digests: Digests, chunk: bytes | memoryview) -> bool:
    """Whether the chunk is number `number` of those that the root binds."""
    if number >= len(digests) or joint_digest(digests) != root:
        return False
    return blake3(chunk).digest() == digests[number]


def split(digests: bytes | memoryview) -> list[bytes]:
    """Digests, from one after the other."""
    return [bytes(digests[at : at + DIGEST_BYTES]) for at in range(0, len(digests), DIGEST_BYTES)]


Story = Commitment | Pledge
TOLD = {Commitment: {"samples", "root"}, Pledge: {"digest"}}
"""What each says; the rest names what it says it of."""


def same_subject(one: Story, other: Story) -> bool:
    """Whether both speak of one and the same: an honest peer signs that once, whatever happens to it."""
    told = TOLD[type(one)]
    return type(one) is type(other) and one.model_dump(exclude=told) == other.model_dump(exclude=told)


def teller(story: Story) -> PeerId:
    """Who signs it."""
    return story.member if isinstance(story, Commitment) else story.peer


def frozen(freeze: Freeze) -> str:
    """Digest of what a leader tells all members of an attempt alike: who is on its roster, who reduces what,
    and under which terms. When each of them is to be done is between the two."""
    common = {"step", "parent", "ballot", "roster", "spans", "terms"}
    content = json.dumps(
        freeze.model_dump(mode="json", include=common), sort_keys=True, separators=(",", ":")
    )
    return digest_of([b"p2ptrain freeze", content.encode()])


# -- proofs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exhibit:
    """One chunk of a `FalseSum`, and the digests of all that belong to the same root."""

    digests: Digests
    chunk: bytes | memoryview


def exhibits(
    proof: FalseSum, payload: bytes | memoryview, chunk_values: int, encoded_bytes: Callable[[int], int]
) -> tuple[list[Exhibit], Exhibit]:
    """The inputs of those who brought samples, in roster order, and the output. Raises BadMessage unless the
    payload is of that size."""
    ranges = drawn_span(proof.statement, chunk_values)
    if proof.number >= len(ranges):
        raise BadMessage(f"a proof about chunk {proof.number} of a span of {len(ranges)}")
    start, stop = ranges[proof.number]
    head, size = DIGEST_BYTES * len(ranges), encoded_bytes(stop - start)
    count = sum(samples > 0 for samples in proof.statement.samples) + 1
    if count == 1 or len(payload) != count * (head + size):
        raise BadMessage(f"a proof with {len(payload)} bytes of chunks; expected {count * (head + size)}")
    view, found = memoryview(payload), []
    for at in range(0, len(payload), head + size):
        found.append(Exhibit(split(view[at : at + head]), view[at + head : at + head + size]))
    return found[:-1], found[-1]


def drawn_span(statement: Statement, chunk_values: int) -> list[tuple[int, int]]:
    """The chunks of the span that the statement is about."""
    start, stop = statement.spans[statement.rank :][:2]
    return chunk_ranges(start, stop, chunk_values)


def convicted_of_false_sum(
    proof: FalseSum,
    inputs: Sequence[Exhibit],
    output: Exhibit,
    *,
    run: str,
    signed: Signed,
    again: bytes | None,
) -> PeerId:
    """The reducer that has lied. Raises BadMessage if this does not prove it.

    `again`: the encoded average of the inputs, as it should be; None if they have none.
    """
    statement = proof.statement
    if statement.run != run or not signed(statement.reducer, claim(statement), proof.signature):
        raise BadMessage("a proof whose statement the reducer has not signed for this run")
    if not _is_before(statement, proof.last):
        raise BadMessage("a proof with another entry before the attempt than its statement builds on")
    brought = [root for root, count in zip(statement.inputs, statement.samples, strict=True) if count]
    parts = [*zip(brought, inputs, strict=True), (statement.output, output)]
    if not all(is_part(root, proof.number, part.digests, part.chunk) for root, part in parts):
        raise BadMessage("a proof with other chunks than its statement binds")
    if again == bytes(output.chunk):
        raise BadMessage("a proof against a reducer whose sum is right")
    return statement.reducer


def _is_before(statement: Statement, last: EntryHeader | None) -> bool:
    """Whether that entry led to where the attempt began."""
    if last is None or last.step + 1 != statement.step:
        return last is None and statement.step == 0
    here = Position(step=last.step, lineage=last.parent, weight=0)
    return advance(here, last).lineage == statement.parent


def convicted_of_two_stories(proof: TwoStories, *, run: str, signed: Signed) -> PeerId:
    """The peer that has lied. Raises BadMessage if this does not prove it."""
    one, other = proof.one, proof.other
    if one.run != run or one == other or not same_subject(one, other):
        raise BadMessage("a proof by two stories that do not contradict each other")
    peer = teller(one)
    if not (
        signed(peer, claim(one), proof.one_signature) and signed(peer, claim(other), proof.other_signature)
    ):
        raise BadMessage("a proof by stories that the peer has not signed")
    return peer
