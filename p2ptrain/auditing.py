"""Audits, carried out: what a peer signs and keeps of each attempt, and the sums that it does again.

`Evidence` is one attempt's: digests of what this peer sent, what the others have signed. `Auditor` is told of
each committed one, does what `protocol.audit` has drawn, answers other auditors, and does the sums that
proofs are about. All of this happens beside the next step, in the way of nobody; only to hash and to sign
what is sent, and to check the signatures before a span counts as held, belongs to the round itself.

Not covered: what becomes of a proof, see `court`.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from p2ptrain.court import ANSWER_SECONDS, AttemptKey, Convicted, Court
from p2ptrain.errors import BadMessage, PeerFault, Refused, Unreachable
from p2ptrain.gradients.aggregation import Aggregation, for_chunk
from p2ptrain.gradients.codecs import Buffer, Codec
from p2ptrain.gradients.reducing import Scratch, sum_again
from p2ptrain.protocol.audit import (
    DIGEST_BYTES,
    KEPT_BYTES,
    KEPT_ROUNDS,
    Draw,
    claim,
    convicted_of_false_sum,
    drawn_span,
    draws,
    exhibits,
    is_part,
    same_subject,
    split,
)
from p2ptrain.protocol.lineage import advance, joint_digest
from p2ptrain.protocol.spans import chunk_count, chunk_ranges
from p2ptrain.records import (
    Averaged,
    Chunk,
    Commitment,
    EntryHeader,
    FalseSum,
    Freeze,
    GetInput,
    Input,
    PeerId,
    Position,
    Refusal,
    Reply,
    Signature,
    Statement,
    TwoStories,
)
from p2ptrain.swarm.port import Swarm

KNOWN_ENTRIES = 1000
"""Committed attempts of which it is known where they led: a lie is proven long before."""
MOST_AT_ONCE = 4
"""Audits of one peer; where steps are so fast that they pile up, some are left out."""
EVASIONS = 8
"""So many more refusals than answers of a peer are an offence."""
TRIES_AFTER_SECONDS = (0.0, 1.0, 4.0)
"""Who is asked for an input may not know yet that it was drawn."""


class Evidence:
    """What this peer has sent, was told and has signed in one attempt."""

    def __init__(
        self,
        freeze: Freeze,
        swarm: Swarm,
        run: str,
        incarnation: str,
        chunks: Sequence[int],
        last: EntryHeader | None,
    ) -> None:
        """`run`: the fingerprint; `chunks`: of each span, by rank; `last`: the entry before, if any."""
        self.last = last
        self.freeze, self.chunks = freeze, chunks
        self.kept_bytes = 0
        self.inputs: list[list[bytes]] = [[] for _ in freeze.roster]
        """As a reducer: digests of each member's chunks for my span."""
        self.samples = 0
        self.statements: dict[int, tuple[Statement, Signature]] = {}
        self._swarm, self._run, self._incarnation = swarm, run, incarnation
        self._mine = freeze.roster.index(swarm.peer_id)
        self._sent: list[list[bytes]] = [[] for _ in freeze.roster]
        self._encoded: dict[tuple[int, int], Buffer] = {}
        self._signed: dict[int, tuple[Signature, str]] = {}
        """Member's rank → its signature and incarnation, as it came with its last chunk for me."""

    @property
    def key(self) -> AttemptKey:
        return self.freeze.parent, self.freeze.ballot

    # -- as a member -----------------------------------------------------------------------------------------

    def sends(self, rank: int, number: int, encoded: Buffer, digest: bytes) -> None:
        """This chunk goes to that reducer; in order."""
        self._encoded[rank, number] = encoded
        self._sent[rank].append(digest)

    def signature(self, rank: int, samples: int) -> dict[str, str]:
        """For the header of the last chunk to that reducer."""
        commitment = self._commitment(self._mine, rank, samples, self._incarnation, self._sent[rank])
        return {"signature": self._swarm.sign(claim(commitment)), "incarnation": self._incarnation}

    def keep(self, drawn: Sequence[Draw]) -> None:
        """Of all that was sent, only this will be asked for."""
        keys = [(draw.rank, draw.number) for draw in drawn]
        # Copied: with fp32 these are views of the gradient, which will be used again.
        self._encoded = {key: bytes(self._encoded[key]) for key in keys if key in self._encoded}
        self.kept_bytes = sum(map(len, self._encoded.values()))

    def shown(self, rank: int, number: int) -> tuple[Input, bytes] | None:
        """What an auditor of that span asks of me; None if this chunk was not drawn, or I brought nothing."""
        chunk = self._encoded.get((rank, number))
        if chunk is None:
            return None
        commitment = self._commitment(self._mine, rank, self.samples, self._incarnation, self._sent[rank])
        signature = self._swarm.sign(claim(commitment))
        return Input(commitment=commitment, signature=signature), b"".join((*self._sent[rank], chunk))

    # -- as a reducer ----------------------------------------------------------------------------------------

    def told(self, rank: int, chunk: Chunk) -> None:
        """The member at that rank has sent its last chunk for my span, and signed for all of them."""
        if chunk.signature is not None:
            self._signed[rank] = chunk.signature, chunk.incarnation

    def concluded(self, samples: Sequence[int], outputs: Sequence[bytes]) -> dict[str, Any]:
        """For the header of the last averaged chunk: what it was made of, and my signature. Raises
        BadInput if a member has not signed what it sent."""
        for rank, count in enumerate(samples):
            if rank != self._mine and self._promise(rank, count) is None:
                raise BadInput(self.freeze.roster[rank])
        statement = self._statement(
            self._mine, samples, [joint_digest(each) for each in self.inputs], joint_digest(outputs)
        )
        signature = self._swarm.sign(claim(statement))
        self.statements[self._mine] = statement, signature
        return {"inputs": statement.inputs, "signature": signature}

    def promise(self, member: PeerId) -> Input | None:
        """What that member has signed of what it sent me."""
        rank = self.freeze.roster.index(member) if member in self.freeze.roster else -1
        known = self.statements.get(self._mine)
        return self._promise(rank, known[0].samples[rank]) if rank >= 0 and known is not None else None

    def _promise(self, rank: int, samples: int) -> Input | None:
        signature, incarnation = self._signed.get(rank, ("", ""))
        commitment = self._commitment(rank, self._mine, samples, incarnation, self.inputs[rank])
        if not signature or not self._swarm.signed(commitment.member, claim(commitment), signature):
            return None
        return Input(commitment=commitment, signature=signature)

    # -- as a receiver ---------------------------------------------------------------------------------------

    def concludes(self, rank: int, averaged: Averaged) -> None:
        """A reducer's last averaged chunk is here. Raises BadMessage if it states nothing."""
        roster = self.freeze.roster
        if averaged.inputs is None or averaged.signature is None or len(averaged.inputs) != len(roster):
            raise BadMessage(f"{roster[rank][-8:]} has not signed what its span was made of")
        statement = self._statement(rank, averaged.samples, averaged.inputs, "0" * 64)
        self.statements[rank] = statement, averaged.signature

    def check(self, rank: int, outputs: Sequence[bytes]) -> None:
        """All of that span is here. Raises BadMessage unless its reducer has signed for just this, and for
        what I have sent it."""
        statement, signature = self.statements[rank]
        statement = statement.model_copy(update={"output": joint_digest(outputs)})
        self.statements[rank] = statement, signature
        mine = joint_digest(self._sent[rank])
        if (statement.inputs[self._mine], statement.samples[self._mine]) != (mine, self.samples):
            raise BadMessage(f"{statement.reducer[-8:]} averaged another gradient for mine")
        if not self._swarm.signed(statement.reducer, claim(statement), signature):
            raise BadMessage(f"{statement.reducer[-8:]} has not signed for the span that it sent")

    # -- inside ----------------------------------------------------------------------------------------------

    def _commitment(
        self, member: int, reducer: int, samples: int, incarnation: str, digests: Sequence[bytes]
    ) -> Commitment:
        freeze = self.freeze
        return Commitment(
            run=self._run,
            step=freeze.step,
            parent=freeze.parent,
            ballot=freeze.ballot,
            member=freeze.roster[member],
            incarnation=incarnation,
            reducer=freeze.roster[reducer],
            samples=samples,
            root=joint_digest(digests),
        )

    def _statement(self, rank: int, samples: Sequence[int], inputs: Sequence[str], output: str) -> Statement:
        freeze = self.freeze
        return Statement(
            run=self._run,
            step=freeze.step,
            parent=freeze.parent,
            ballot=freeze.ballot,
            roster=freeze.roster,
            samples=tuple(samples),
            spans=freeze.spans,
            rank=rank,
            inputs=tuple(inputs),
            output=output,
        )


class BadInput(BadMessage):
    """A member has not signed what it sent."""

    def __init__(self, member: PeerId) -> None:
        super().__init__(f"{member[-8:]} has not signed for the gradient that it sent")
        self.member = member


# -- the auditor ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Round:
    """A committed attempt, until it is known what of it is audited."""

    evidence: Evidence
    header: EntryHeader
    payload: Buffer
    digests: list[list[bytes]]
    """Of the averaged chunks, by rank."""


@dataclass(frozen=True)
class Audit:
    """How a run is audited."""

    run: str
    """Its fingerprint, to which all signatures are bound."""
    share: float
    """The chance that a span of an entry is audited."""
    values: int
    """Of the averaged vector."""
    most_members: int


class Auditor:
    """What one peer does for the audits of its run, and what it knows of lies."""

    def __init__(
        self,
        swarm: Swarm,
        audit: Audit,
        codec: Codec,
        aggregation: Aggregation,
        chunk_values: int,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        work: Callable[..., Awaitable[Any]],
        court: Court,
        on_offence: Callable[[PeerId, str], None],
    ) -> None:
        """`court` is shown every proof, and has those about sums judged here; `on_offence` is told who would
        not show what it has signed for."""
        self.audits = 0
        """Sums done again."""
        self._audit_of, self._swarm, self._codec = audit, swarm, codec
        self._aggregation, self._chunk_values = aggregation, chunk_values
        self._spawn, self._work, self._scratch = spawn, work, Scratch()
        self._court, self._on_offence = court, on_offence
        court.judge_sum = self.judge
        whole_span = DIGEST_BYTES * chunk_count(0, audit.values, chunk_values)
        court.largest_proof_bytes = (audit.most_members + 1) * (
            codec.encoded_bytes(chunk_values) + whole_span
        )
        self._last: _Round | None = None
        self._kept_bytes = self._busy = 0
        self._evasive: Counter[PeerId] = Counter()
        self._kept: OrderedDict[AttemptKey, Evidence] = OrderedDict()
        self._led_to: OrderedDict[AttemptKey, str] = OrderedDict()

    def begin(self, freeze: Freeze, incarnation: str, last: EntryHeader | None) -> Evidence:
        """Where the evidence of that attempt is gathered."""
        chunks = [chunk_count(start, stop, self._chunk_values) for start, stop in pairwise(freeze.spans)]
        return Evidence(freeze, self._swarm, self._audit_of.run, incarnation, chunks, last)

    # -- after each commit -----------------------------------------------------------------------------------

    def committed(
        self, evidence: Evidence, header: EntryHeader, payload: Buffer, digests: list[list[bytes]]
    ) -> None:
        """One more entry of this peer's; what is audited of the one before is known now."""
        before, self._last = self._last, _Round(evidence, header, payload, digests)
        self._kept[evidence.key] = evidence
        parent = Position(step=header.step, lineage=header.parent, weight=0)
        self._led_to[evidence.key] = advance(parent, header).lineage
        while len(self._led_to) > KNOWN_ENTRIES:
            self._led_to.popitem(last=False)
        if before is None:
            return
        drawn: list[Draw] = []
        if self._led_to.get(before.evidence.key) == header.parent:
            drawn = draws(before.header, before.evidence.chunks, header, digests, self._audit_of.share)
        before.evidence.keep(drawn)
        self._kept_bytes += before.evidence.kept_bytes
        while len(self._kept) > 3 and (len(self._kept) > KEPT_ROUNDS or self._kept_bytes > KEPT_BYTES):
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.kept_bytes
        for draw in drawn:
            if draw.auditor == self._swarm.peer_id and self._busy < MOST_AT_ONCE:
                self._spawn(self._audit(before, draw))

    async def _audit(self, done: _Round, draw: Draw) -> None:
        self._busy += 1
        try:
            await self._look_at(done, draw)
        finally:
            self._busy -= 1

    async def _look_at(self, done: _Round, draw: Draw) -> None:
        statement, signature = done.evidence.statements[draw.rank]
        try:
            shown = [
                await self._input(done.evidence, statement, member, draw)
                for member, samples in enumerate(statement.samples)
                if samples
            ]
        except Unreachable:
            return  # it has left, or the network has failed: neither is a lie
        except Lied as lie:
            self._court.proven(lie.proof, b"")
            return
        except PeerFault:
            return  # it was counted, and told of
        start, stop = drawn_span(statement, self._chunk_values)[draw.number]
        output = self._averaged(done, draw)
        samples = [count for count in statement.samples if count]
        chunks = [each[-self._codec.encoded_bytes(stop - start) :] for each in shown]
        last = done.evidence.last
        again = await self._sum_again(chunks, samples, start, stop, last)
        self.audits += 1
        if again != output:
            proof = FalseSum(statement=statement, signature=signature, number=draw.number, last=last)
            self._court.proven(proof, b"".join((*shown, *done.digests[draw.rank], output)))

    async def _sum_again(
        self,
        chunks: Sequence[Buffer],
        samples: Sequence[int],
        start: int,
        stop: int,
        last: EntryHeader | None,
    ) -> bytes | None:
        rule = for_chunk(self._aggregation, last, start, stop)
        again: bytes | None = await self._work(
            sum_again, self._codec, rule, self._scratch, chunks, samples, stop - start
        )
        return again

    async def _input(self, evidence: Evidence, statement: Statement, member: int, draw: Draw) -> Buffer:
        """What the member sent to that span: digests, then the chunk. Raises PeerFault."""
        peer = statement.roster[member]
        chunks = evidence.chunks[draw.rank]
        if peer == self._swarm.peer_id:
            mine = evidence.shown(draw.rank, draw.number)
            assert mine is not None
            return mine[1]
        try:
            told, payload = await self._ask(evidence, peer, peer, draw)
        except Refused as fault:
            self._evaded(peer, str(fault))
            raise
        except BadMessage as fault:
            self._on_offence(peer, f"it does not show what it sent in an audited round: {fault}")
            raise
        self._evasive[peer] = max(self._evasive[peer] - 1, 0)
        head = DIGEST_BYTES * chunks
        if is_part(statement.inputs[member], draw.number, split(payload[:head]), payload[head:]):
            return payload
        expected = told.commitment.model_copy(
            update={"samples": statement.samples[member], "root": statement.inputs[member]}
        )
        if not self._swarm.signed(peer, claim(told.commitment), told.signature):
            self._on_offence(peer, "it shows something else than it sent in an audited round")
            raise BadMessage("an input without a signature")
        if told.commitment == expected:
            self._on_offence(peer, "it shows something else than it signed in an audited round")
            raise BadMessage("an input that was not signed for")
        # Either it has told two stories, or the reducer has made up what it says it was sent.
        reducer = statement.reducer
        try:
            promised, _ = await self._ask(evidence, reducer, peer, draw)
        except (Refused, BadMessage):
            promised = None
        if promised is not None and self._swarm.signed(peer, claim(promised.commitment), promised.signature):
            if promised.commitment != told.commitment and same_subject(promised.commitment, told.commitment):
                raise Lied(
                    TwoStories(
                        one=promised.commitment,
                        one_signature=promised.signature,
                        other=told.commitment,
                        other_signature=told.signature,
                    )
                )
            self._on_offence(peer, "it signed for another round than the one that is audited")
        else:
            self._on_offence(reducer, f"it cannot show that {peer[-8:]} has signed for what it averaged")
        raise BadMessage("an input that the reducer does not know")

    def _evaded(self, peer: PeerId, why: str) -> None:
        """It may have restarted, or steps were too fast for it to keep what it sent. Not every time."""
        if len(self._evasive) > self._audit_of.most_members:
            self._evasive.clear()
        self._evasive[peer] += 1
        if self._evasive[peer] == EVASIONS:
            self._evasive[peer] = 0
            self._on_offence(peer, f"it hardly ever shows what it sent in audited rounds: {why}")

    async def _ask(self, evidence: Evidence, whom: PeerId, about: PeerId, draw: Draw) -> tuple[Input, bytes]:
        """The answer of a member about itself, or of the reducer about a member. Raises PeerFault."""
        freeze = evidence.freeze
        wanted = GetInput(
            step=freeze.step,
            parent=freeze.parent,
            ballot=freeze.ballot,
            rank=draw.rank,
            number=draw.number,
            member=about,
        )
        most = DIGEST_BYTES * evidence.chunks[draw.rank] + self._codec.encoded_bytes(self._chunk_values)
        refused: Refused | None = None
        for seconds in TRIES_AFTER_SECONDS:
            await asyncio.sleep(seconds)
            try:
                reply, payload = await self._swarm.request(
                    whom, wanted, timeout_seconds=ANSWER_SECONDS, max_bytes=most
                )
            except Refused as fault:
                refused = fault
                continue
            if not isinstance(reply, Input):
                raise BadMessage(f"{whom[-8:]} answered a request for an input with {reply.kind}")
            return reply, payload
        assert refused is not None
        raise refused

    def _averaged(self, done: _Round, draw: Draw) -> bytes:
        """The chunk that is audited, as the entry has it."""
        spans = done.header.spans[: draw.rank + 2]
        sizes = [
            [
                self._codec.encoded_bytes(last - first)
                for first, last in chunk_ranges(start, stop, self._chunk_values)
            ]
            for start, stop in pairwise(spans)
        ]
        at = sum(map(sum, sizes[:-1])) + sum(sizes[-1][: draw.number])
        return bytes(memoryview(done.payload)[at : at + sizes[-1][draw.number]])

    # -- what others ask -------------------------------------------------------------------------------------

    def answer(self, request: GetInput) -> tuple[Reply, Buffer]:
        """The reply and its payload."""
        evidence = self._kept.get((request.parent, request.ballot))
        if evidence is None or request.rank >= len(evidence.chunks):
            return Refusal(reason="I know nothing of that round any more"), b""
        if request.member == self._swarm.peer_id:
            shown = evidence.shown(request.rank, request.number)
            return shown or (Refusal(reason="that chunk was not drawn for an audit"), b"")
        return evidence.promise(request.member) or Refusal(reason="I have no word of that peer"), b""

    def led_to(self, found: Convicted) -> str | None:
        """The lineage with that lie in it, if it was committed here."""
        return self._led_to.get((found.parent, found.ballot)) if found.false_sum else None

    # -- proofs ----------------------------------------------------------------------------------------------

    async def judge(self, proof: FalseSum, payload: bytes) -> PeerId:
        """Whom it convicts. Raises BadMessage if nobody."""
        inputs, output = exhibits(proof, payload, self._chunk_values, self._codec.encoded_bytes)
        start, stop = drawn_span(proof.statement, self._chunk_values)[proof.number]
        samples = [count for count in proof.statement.samples if count]
        again = await self._sum_again([each.chunk for each in inputs], samples, start, stop, proof.last)
        return convicted_of_false_sum(
            proof, inputs, output, run=self._audit_of.run, signed=self._swarm.signed, again=again
        )


class Lied(PeerFault):
    """A member was caught, by what it has signed."""

    def __init__(self, proof: TwoStories) -> None:
        super().__init__("a member told two stories")
        self.proof = proof
