"""Whom proofs convict: what peers have signed to all alike, and what comes of it when two of them were told
different things.

`Told` is one attempt's: the freeze that its leader has pledged to this peer, and the means that its reducers
have. `Court` holds proofs: those that this peer has come by, and those that others show it, which it judges
for itself. A lie that it has proven is told to all, and costs the liar its place with everybody.

Not covered: what a conviction does to the swarm, see `protocol.member`; how a false sum is found, see
`auditing`; a leader whose freezes share no member: nobody of one hears of the other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, assert_never

from blake3 import blake3

from p2ptrain.errors import BadMessage, PeerFault, Refused, Unreachable
from p2ptrain.protocol.audit import claim, convicted_of_two_stories, frozen, teller
from p2ptrain.records import (
    MAX_PLEDGES,
    Accusation,
    Averaged,
    Ballot,
    Chunk,
    Commitment,
    FalseSum,
    Freeze,
    GetPledges,
    GetProof,
    MeanPledge,
    PeerId,
    Pledge,
    Pledges,
    Proof,
    Refusal,
    Reply,
    Signature,
    TwoStories,
)
from p2ptrain.swarm.port import Buffer, Swarm

MAX_PROOFS = 16
"""More liars than that are convicted, too, and nobody is told of them by this peer."""
KEPT_ATTEMPTS = 4
"""Of which it is known what was pledged in them: others may take some time to ask."""
COMPARED_WITH = 8
"""Members whose pledges are looked at once an attempt has ended in two stories."""
ANSWER_SECONDS = 30.0
"""An input, a proof or pledges must be here by then: a few chunks, beside a round."""

AttemptKey = tuple[str, Ballot]
"""The lineage that an attempt builds on, and its ballot."""


# -- one attempt ---------------------------------------------------------------------------------------------


class Told:
    """What leader and reducers have told this peer in one attempt, and signed."""

    def __init__(self, freeze: Freeze, swarm: Swarm, run: str, incarnation: str) -> None:
        """`run`: the fingerprint. A freeze of this peer's own is signed here."""
        self._swarm, self._run, self._incarnation = swarm, run, incarnation
        self.frozen = frozen(freeze)
        if freeze.ballot.leader == swarm.peer_id:
            freeze = freeze.model_copy(update=call(freeze, swarm, run, incarnation))
        self.freeze = freeze
        self._means: dict[int, MeanPledge] = {}

    @property
    def key(self) -> AttemptKey:
        return self.freeze.parent, self.freeze.ballot

    # -- the freeze ------------------------------------------------------------------------------------------

    def is_called(self) -> bool:
        """Whether the leader has signed that the freeze is this."""
        return self._has_called(self.freeze.caller, self.frozen, self.freeze.signature)

    def contradicted_by(self, header: Chunk | Averaged) -> TwoStories | None:
        """The proof that the leader has called the sender to another freeze than this peer; None if it has
        done so in another life, as it says: then it may have forgotten. Raises BadMessage if it has not."""
        if not self._has_called(header.caller, header.freeze, header.called):
            raise BadMessage("it sends for a freeze to which the leader has not called")
        if header.caller != self.freeze.caller:
            return None
        assert self.freeze.signature is not None
        assert header.called is not None
        return TwoStories(
            one=self._called_to(header.caller, self.frozen),
            one_signature=self.freeze.signature,
            other=self._called_to(header.caller, header.freeze),
            other_signature=header.called,
        )

    def _called_to(self, caller: str, digest: str) -> Pledge:
        return _pledge(self._run, self.freeze, self.freeze.ballot.leader, "freeze", caller, digest)

    def _has_called(self, caller: str, digest: str, signature: Signature | None) -> bool:
        if signature is None:
            return False
        pledge = self._called_to(caller, digest)
        return self._swarm.signed(self.freeze.ballot.leader, claim(pledge), signature)

    # -- means -----------------------------------------------------------------------------------------------

    def pledge(self, rank: int, digest: str) -> dict[str, str]:
        """As a reducer, for the header of the last averaged chunk."""
        signature = self._swarm.sign(claim(self._mean(rank, self._incarnation, digest)))
        self._means[rank] = MeanPledge(
            rank=rank, incarnation=self._incarnation, digest=digest, signature=signature
        )
        return {"pledge": signature, "incarnation": self._incarnation}

    def pledged(self, rank: int, averaged: Averaged) -> None:
        """A reducer's last averaged chunk is here. Raises BadMessage if it has signed nothing."""
        if averaged.pledge is None:
            raise BadMessage(f"{self.freeze.roster[rank][-8:]} has not signed for the mean of its span")
        self._means[rank] = MeanPledge(
            rank=rank, incarnation=averaged.incarnation, digest="0" * 64, signature=averaged.pledge
        )

    def hold(self, roots: Sequence[str]) -> None:
        """All is here; the root of each span's mean, by rank. Whether they are what was signed is looked at
        when somebody holds something else: that would cost as many signatures as there are members."""
        for rank, mean in self._means.items():
            self._means[rank] = mean.model_copy(update={"digest": roots[rank]})

    def shown(self, first: int) -> Pledges:
        """To who asks."""
        known = [self._means[rank] for rank in sorted(self._means) if rank >= first]
        return Pledges(means=tuple(known[:MAX_PLEDGES]))

    def contradictions(self, shown: Pledges) -> tuple[list[TwoStories], list[PeerId]]:
        """Proofs against reducers that have pledged another mean to somebody else, and those who have broken
        their word without a proof for others: what they sent to me is not what they signed for, or they have
        restarted in between, as they say."""
        proofs, odd = [], []
        for theirs in shown.means:
            mine = self._means.get(theirs.rank)
            if mine is None or mine.digest == theirs.digest:
                continue
            one = self._mean(mine.rank, mine.incarnation, mine.digest)
            other = self._mean(theirs.rank, theirs.incarnation, theirs.digest)
            if not self._swarm.signed(other.peer, claim(other), theirs.signature):
                continue  # nobody's fault but that of whoever passes it on
            if mine.incarnation != theirs.incarnation or not self._swarm.signed(
                one.peer, claim(one), mine.signature
            ):
                odd.append(one.peer)
                continue
            proofs.append(
                TwoStories(
                    one=one, one_signature=mine.signature, other=other, other_signature=theirs.signature
                )
            )
        return proofs, odd

    # -- inside ----------------------------------------------------------------------------------------------

    def _mean(self, rank: int, incarnation: str, digest: str) -> Pledge:
        return _pledge(self._run, self.freeze, self.freeze.roster[rank], "mean", incarnation, digest)


def call(freeze: Freeze, swarm: Swarm, run: str, incarnation: str) -> dict[str, str]:
    """As its leader, for freeze and calls: this peer's word that it calls all to this one."""
    pledge = _pledge(run, freeze, swarm.peer_id, "freeze", incarnation, frozen(freeze))
    return {"signature": swarm.sign(claim(pledge)), "caller": incarnation}


def _pledge(
    run: str,
    freeze: Freeze,
    peer: PeerId,
    about: Literal["freeze", "mean"],
    incarnation: str,
    digest: str,
) -> Pledge:
    return Pledge(
        run=run,
        step=freeze.step,
        parent=freeze.parent,
        ballot=freeze.ballot,
        peer=peer,
        about=about,
        incarnation=incarnation,
        digest=digest,
    )


# -- the court -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Convicted:
    """It is proven that the peer has lied, in an attempt at `step` that built on `parent`."""

    peer: PeerId
    step: int
    parent: str
    ballot: Ballot
    reason: str
    false_sum: bool
    """Whether an entry may be wrong for it."""
    again: bool = False
    """It was convicted before, of something that happened later."""


class Court:
    """The proofs that one peer knows, and whom they convict."""

    def __init__(
        self,
        swarm: Swarm,
        run: str,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        on_convicted: Callable[[Convicted, Accusation], None],
        on_offence: Callable[[PeerId, str], None],
    ) -> None:
        """`run`: the fingerprint, to which all signatures are bound. `on_convicted` is told whom a proof
        convicts, and what to tell the others; `on_offence` what a peer did without a proof for others."""
        self.convicted: dict[PeerId, Convicted] = {}
        self.judge_sum: Callable[[FalseSum, bytes], Awaitable[PeerId]] | None = None
        """Whom a false sum convicts; None where sums are not audited."""
        self.largest_proof_bytes = 0
        """Of its payload."""
        self._swarm, self._run, self._spawn = swarm, run, spawn
        self._on_convicted, self._on_offence = on_convicted, on_offence
        self._accusations: dict[PeerId, Accusation] = {}
        self._proofs: dict[str, tuple[Proof, bytes]] = {}
        self._hearing: set[PeerId] = set()
        self._told: OrderedDict[AttemptKey, Told] = OrderedDict()

    # -- attempts --------------------------------------------------------------------------------------------

    def begin(self, freeze: Freeze, incarnation: str) -> Told:
        """Where it is kept what this peer is told in that attempt."""
        told = self._told[freeze.parent, freeze.ballot] = Told(freeze, self._swarm, self._run, incarnation)
        while len(self._told) > KEPT_ATTEMPTS:
            self._told.popitem(last=False)
        return told

    def call(self, freeze: Freeze, incarnation: str) -> dict[str, str]:
        """As its leader: see `call`."""
        return call(freeze, self._swarm, self._run, incarnation)

    def compare(self, told: Told) -> None:
        """Not all held the same in that attempt: find out who has told two stories."""
        others = [peer for peer in told.freeze.roster if peer != self._swarm.peer_id]
        # Each in an order of its own, so that in a large swarm they do not all ask the same few.
        others.sort(key=lambda peer: blake3(f"{self._swarm.peer_id} {peer}".encode()).digest())
        for peer in others[:COMPARED_WITH]:
            self._spawn(self._compare(told, peer))

    async def _compare(self, told: Told, peer: PeerId) -> None:
        freeze = told.freeze
        for first in range(0, len(freeze.roster), MAX_PLEDGES):
            wanted = GetPledges(step=freeze.step, parent=freeze.parent, ballot=freeze.ballot, first=first)
            try:
                shown, _ = await self._swarm.request(
                    peer, wanted, timeout_seconds=ANSWER_SECONDS, max_bytes=0
                )
            except PeerFault:
                return  # another one may know
            if not isinstance(shown, Pledges):
                self._on_offence(peer, f"it answered a request for pledges with {shown.kind}")
                return
            proofs, odd = told.contradictions(shown)
            for proof in proofs:
                self.proven(proof, b"")
            for reducer in odd:
                self._on_offence(reducer, "the mean that it sent is not what it has signed for")

    # -- what others ask -------------------------------------------------------------------------------------

    def answer(self, request: GetPledges | GetProof) -> tuple[Reply, Buffer]:
        """The reply and its payload."""
        if isinstance(request, GetProof):
            proof, payload = self._proofs.get(request.proof, (None, b""))
            return proof or Refusal(reason="I hold no such proof"), payload
        told = self._told.get((request.parent, request.ballot))
        if told is None:
            return Refusal(reason="I know nothing of that attempt any more"), b""
        return told.shown(request.first), b""

    def accusations(self) -> list[Accusation]:
        """Of all whose proof is here."""
        return list(self._accusations.values())

    # -- proofs ----------------------------------------------------------------------------------------------

    def accused(self, sender: PeerId, told: Accusation) -> None:
        """Somebody says that it holds a proof: have it shown, one at a time."""
        if self._is_news(told.against, told.step) and sender not in self._hearing:
            self._hearing.add(sender)
            self._spawn(self._hear(sender, told))

    def _is_news(self, peer: PeerId, false_sum_at: int | None) -> bool:
        """Whether that would change anything: it is not convicted yet, or only of what came later."""
        if peer == self._swarm.peer_id:
            return False
        known = self.convicted.get(peer)
        if known is None:
            return True
        return false_sum_at is not None and (not known.false_sum or false_sum_at < known.step)

    async def _hear(self, sender: PeerId, told: Accusation) -> None:
        try:
            proof, payload = await self._swarm.request(
                sender,
                GetProof(proof=told.proof),
                timeout_seconds=ANSWER_SECONDS,
                max_bytes=self.largest_proof_bytes,
            )
            if not isinstance(proof, FalseSum | TwoStories):
                raise BadMessage(f"{sender[-8:]} answered a request for a proof with {proof.kind}")
            peer = await self.judge(proof, payload)
            if (peer, _false_sum_at(proof)) != (told.against, told.step):
                raise BadMessage(f"it accused {told.against[-8:]}, and shows a proof of something else")
            self.proven(proof, payload)
        except (Unreachable, Refused):
            pass
        except BadMessage as fault:
            self._on_offence(sender, f"it accused a peer without proof: {fault}")
        finally:
            self._hearing.discard(sender)

    async def judge(self, proof: Proof, payload: bytes) -> PeerId:
        """Whom it convicts. Raises BadMessage if nobody."""
        if isinstance(proof, TwoStories):
            return convicted_of_two_stories(proof, run=self._run, signed=self._swarm.signed)
        if self.judge_sum is None:
            raise BadMessage("a proof about a sum, in a run that audits none")
        return await self.judge_sum(proof, payload)

    def proven(self, proof: Proof, payload: bytes) -> None:
        """It holds: everyone shall know."""
        match proof:
            case FalseSum(statement=of):
                peer, reason = of.reducer, "the mean that it sent does not follow from what it was sent"
            case TwoStories(one=of):
                peer, reason = teller(of), _reason(of)
            case _:
                assert_never(proof)
        false_sum_at = _false_sum_at(proof)
        if not self._is_news(peer, false_sum_at):
            return
        found = Convicted(peer, of.step, of.parent, of.ballot, reason, false_sum_at is not None)
        found = replace(found, again=peer in self.convicted)
        self.convicted[peer] = found
        digest = blake3(proof.model_dump_json().encode() + payload).hexdigest()
        told = Accusation(against=peer, proof=digest, step=false_sum_at)
        before = self._accusations.pop(peer, None)
        if before is not None:
            self._proofs.pop(before.proof, None)
        if len(self._proofs) < MAX_PROOFS:
            self._proofs[digest] = proof, payload
            self._accusations[peer] = told
        self._on_convicted(found, told)


def _false_sum_at(proof: Proof) -> int | None:
    """Whose entry may be wrong."""
    return proof.statement.step if isinstance(proof, FalseSum) else None


def _reason(story: Commitment | Pledge) -> str:
    if isinstance(story, Commitment):
        return "it signed two different gradients for one round"
    if story.about == "freeze":
        return "as leader it called to one attempt with two different freezes"
    return "it signed two different means of one span"
