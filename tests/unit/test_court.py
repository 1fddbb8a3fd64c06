"""What was pledged to all alike, and what it proves when two of them were told different things."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from p2ptrain.court import Convicted, Court, Told
from p2ptrain.errors import BadMessage, Refused
from p2ptrain.protocol.audit import convicted_of_two_stories, frozen
from p2ptrain.records import (
    Accusation,
    Averaged,
    Ballot,
    Change,
    Chunk,
    Commitment,
    Freeze,
    GetPledges,
    GetProof,
    PeerId,
    Pledge,
    Pledges,
    Refusal,
    Terms,
    TwoStories,
)
from p2ptrain.swarm.identity import of_seed, verify

RUN = "f" * 64
KEYS = {key.peer_id: key for key in (of_seed(bytes([number]) * 32) for number in range(3))}
ANNA, BERT, CARA = sorted(KEYS)


class Nearby:
    """One peer's end of a network that only signs and asks."""

    def __init__(self, peer: PeerId) -> None:
        self.peer_id = peer
        self.courts: dict[PeerId, Court] = {}
        self.asked: list[Any] = []

    def sign(self, claim: bytes) -> str:
        return KEYS[self.peer_id].sign(claim).hex()

    def signed(self, peer: PeerId, claim: bytes, signature: str) -> bool:
        return verify(peer, claim, bytes.fromhex(signature))

    async def request(self, to: PeerId, request: Any, **_: Any) -> Any:
        self.asked.append(request)
        reply, payload = self.courts[to].answer(request)
        if isinstance(reply, Refusal):
            raise Refused(reply.reason)
        return reply, bytes(payload)


def freeze(**changes: Any) -> Freeze:
    fields: dict[str, Any] = {
        "step": 3,
        "parent": "e" * 64,
        "ballot": Ballot(number=1, leader=ANNA),
        "roster": (ANNA, BERT, CARA),
        "spans": (0, 4, 8, 10),
        "finishing": (),
        "cutoff_seconds": 0.0,
        "deadline_seconds": 5.0,
    }
    return Freeze(**fields | changes)


def told(me: PeerId, by_leader: Freeze | None = None, incarnation: str = "i") -> Told:
    """What `me` was told in the attempt that Anna leads."""
    signed = Told(by_leader or freeze(), Nearby(ANNA), RUN, incarnation).freeze
    return Told(signed, Nearby(me), RUN, incarnation)


def header(of: Told, number: int = 0, **fields: Any) -> Chunk:
    of_attempt = {"step": 3, "parent": "e" * 64, "ballot": of.freeze.ballot, "freeze": of.frozen}
    signed = {} if number else {"called": of.freeze.signature, "caller": of.freeze.caller}
    return Chunk(**of_attempt | signed | {"number": number, "samples": 1} | fields)


SHORTER = freeze(roster=(BERT, CARA), spans=(0, 4, 10))

# -- the freeze ----------------------------------------------------------------------------------------------


def test_digest_of_a_freeze_binds_what_all_are_told_and_nothing_else() -> None:
    terms = Terms(
        peer=ANNA, revision=1, signature="0" * 128, changes=(Change(step=3, key="optimizer.lr", value=1.0),)
    )
    alike = freeze(finishing=(BERT,), cutoff_seconds=1.0, deadline_seconds=9.0, signature="0" * 128)
    assert frozen(alike) == frozen(freeze())
    others = [
        freeze(step=4),
        freeze(parent="d" * 64),
        freeze(ballot=Ballot(number=2, leader=ANNA)),
        freeze(roster=(ANNA, BERT, PeerId("dora"))),
        freeze(spans=(0, 4, 7, 10)),
        freeze(terms=terms),
    ]
    assert len({frozen(each) for each in [freeze(), *others]}) == len(others) + 1


def test_leader_that_called_to_two_freezes_is_convicted_by_the_first_chunk() -> None:
    mine, theirs = told(BERT), told(CARA, SHORTER)
    assert mine.is_called()
    proof = mine.contradicted_by(header(theirs))
    assert proof is not None
    assert convicted_of_two_stories(proof, run=RUN, signed=Nearby(CARA).signed) == ANNA
    assert proof == TwoStories.model_validate_json(proof.model_dump_json())


@pytest.mark.parametrize(
    "changes", [{"called": None}, {"called": "0" * 128}, {"freeze": "0" * 64}], ids=["none", "other", "made"]
)
def test_freeze_that_the_leader_has_not_signed_proves_nothing(changes: dict[str, Any]) -> None:
    with pytest.raises(BadMessage, match="has not called"):
        told(BERT).contradicted_by(header(told(CARA, SHORTER), **changes))


def test_leader_that_has_restarted_and_used_a_ballot_again_is_not_convicted() -> None:
    assert told(BERT).contradicted_by(header(told(CARA, SHORTER, "ii"))) is None
    with pytest.raises(BadMessage, match="has not called"):  # its word for one life is none for another
        told(BERT).contradicted_by(header(told(CARA, SHORTER), caller="ii"))


def test_call_is_good_by_its_leaders_signature_only() -> None:
    nearby = Nearby(BERT)
    assert not Told(freeze(), nearby, RUN, "i").is_called()
    forged = Told(freeze(ballot=Ballot(number=1, leader=CARA)), Nearby(CARA), RUN, "i").freeze
    assert not Told(freeze(signature=forged.signature, caller="i"), nearby, RUN, "i").is_called()
    other_run = Told(freeze(), Nearby(ANNA), "0" * 64, "i").freeze
    assert not Told(other_run, nearby, RUN, "i").is_called()


# -- means ---------------------------------------------------------------------------------------------------


def mean(of: Told, rank: int, digest: str) -> Averaged:
    """The last averaged chunk by Cara or whoever has that rank, pledged with that digest."""
    peer = of.freeze.roster[rank]
    signer = Told(of.freeze, Nearby(peer), RUN, "i")
    named = {"step": 3, "parent": "e" * 64, "ballot": of.freeze.ballot, "freeze": of.frozen}
    return Averaged(**named, number=0, samples=(1, 1, 1), squared_norm=1.0, **signer.pledge(rank, digest))


def heard(me: PeerId, digest: str, **changes: Any) -> Told:
    """What `me` was told, Cara's mean among it; `changes`: of that."""
    of = told(me)
    of.pledged(2, mean(of, 2, digest).model_copy(update=changes))
    of.hold(["a" * 64, "b" * 64, digest])
    return of


def test_reducer_that_pledged_two_means_is_convicted() -> None:
    (proof,), odd = heard(ANNA, "c" * 64).contradictions(heard(BERT, "d" * 64).shown(0))
    assert convicted_of_two_stories(proof, run=RUN, signed=Nearby(ANNA).signed) == CARA
    assert odd == []


def test_equal_means_and_made_up_ones_prove_nothing() -> None:
    mine, same = heard(ANNA, "c" * 64), heard(BERT, "c" * 64).shown(0)
    assert mine.contradictions(same) == ([], [])
    made = Pledges(means=tuple(each.model_copy(update={"digest": "0" * 64}) for each in same.means))
    assert mine.contradictions(made) == ([], [])
    assert mine.shown(3).means == ()


def test_reducer_that_restarted_or_sent_what_it_did_not_sign_for_has_offended_and_not_more() -> None:
    theirs = heard(BERT, "d" * 64).shown(0)
    unlike = told(ANNA)
    unlike.pledged(2, mean(unlike, 2, "c" * 64))
    unlike.hold(["a" * 64, "b" * 64, "9" * 64])  # what came is something else
    assert unlike.contradictions(theirs) == ([], [CARA])
    again = Told(told(ANNA).freeze, Nearby(CARA), RUN, "ii")
    restarted = heard(ANNA, "c" * 64, **again.pledge(2, "c" * 64))
    assert restarted.contradictions(theirs) == ([], [CARA])


def test_last_chunk_of_a_mean_must_be_pledged() -> None:
    with pytest.raises(BadMessage, match="has not signed"):
        heard(ANNA, "c" * 64, pledge=None)


# -- the court -----------------------------------------------------------------------------------------------


class Hall:
    """The courts of all three, what they were told to do, and whom they complained of."""

    def __init__(self) -> None:
        self.tasks: list[Coroutine[Any, Any, None]] = []
        self.found: dict[PeerId, list[Convicted]] = {peer: [] for peer in KEYS}
        self.told: list[Accusation] = []
        self.offences: list[tuple[PeerId, PeerId]] = []
        self.nearby = {peer: Nearby(peer) for peer in KEYS}
        self.courts = {peer: self._court(peer) for peer in KEYS}
        for nearby in self.nearby.values():
            nearby.courts = self.courts

    def _court(self, peer: PeerId) -> Court:
        def convicted(found: Convicted, told: Accusation) -> None:
            self.found[peer].append(found)
            self.told.append(told)

        offended: Callable[[PeerId, str], None] = lambda who, why: self.offences.append((peer, who))  # noqa: E731
        return Court(self.nearby[peer], RUN, self.tasks.append, convicted, offended)  # type: ignore[arg-type]

    def settle(self) -> None:
        while self.tasks:
            asyncio.run(self.tasks.pop())


def two_stories(step: int = 3) -> TwoStories:
    """Anna's."""
    called, other = told(BERT, freeze(step=step)), told(CARA, freeze(step=step, spans=(0, 1, 2, 10)))
    proof = called.contradicted_by(header(other, step=step))
    assert proof is not None
    return proof


def test_proof_convinces_who_is_told_of_it_once() -> None:
    hall = Hall()
    hall.courts[BERT].proven(two_stories(), b"")
    hall.courts[BERT].proven(two_stories(), b"")
    (told_all,) = hall.told
    for _ in range(2):
        hall.courts[CARA].accused(BERT, told_all)
        hall.settle()
    hall.courts[ANNA].accused(BERT, told_all)  # whom it is about has nothing to judge
    hall.settle()
    assert {peer: [each.peer for each in found] for peer, found in hall.found.items()} == {
        BERT: [ANNA],
        CARA: [ANNA],
        ANNA: [],
    }
    assert len(hall.nearby[CARA].asked) == 1
    assert hall.courts[CARA].accusations() == [told_all]
    assert not hall.offences


def test_accusation_without_its_proof_falls_back_on_the_accuser() -> None:
    hall = Hall()
    hall.courts[BERT].proven(two_stories(), b"")
    (told_all,) = hall.told
    hall.courts[CARA].accused(BERT, told_all.model_copy(update={"against": BERT}))
    hall.settle()
    hall.courts[CARA].accused(BERT, told_all.model_copy(update={"step": 1}))
    hall.settle()
    assert hall.offences == [(CARA, BERT)] * 2
    hall.courts[CARA].accused(BERT, told_all.model_copy(update={"proof": "0" * 64}))
    hall.settle()  # it may have dropped it
    assert hall.offences == [(CARA, BERT)] * 2
    assert not hall.found[CARA]


def test_attempt_that_ended_in_two_stories_is_looked_into_by_its_members() -> None:
    hall = Hall()
    for peer, digest in ((ANNA, "c" * 64), (BERT, "d" * 64)):
        of = hall.courts[peer].begin(told(peer).freeze, "i")
        of.pledged(2, mean(of, 2, digest))
        of.hold(["a" * 64, "b" * 64, digest])
    of = hall.courts[ANNA]._told["e" * 64, Ballot(number=1, leader=ANNA)]
    hall.courts[ANNA].compare(of)
    hall.settle()
    (found,) = hall.found[ANNA]
    assert (found.peer, found.false_sum, found.step) == (CARA, False, 3)
    assert not hall.offences


def test_court_remembers_a_few_attempts_and_answers_about_no_other() -> None:
    court = Hall().courts[BERT]
    for number in range(1, 10):
        court.begin(told(BERT, freeze(ballot=Ballot(number=number, leader=ANNA))).freeze, "i")

    def answer(number: int) -> Any:
        ballot = Ballot(number=number, leader=ANNA)
        return court.answer(GetPledges(step=3, parent="e" * 64, ballot=ballot))[0]

    assert [type(answer(number)) for number in (1, 5, 6, 9)] == [Refusal, Refusal, Pledges, Pledges]
    assert isinstance(court.answer(GetProof(proof="0" * 64))[0], Refusal)


def test_story_of_one_kind_does_not_contradict_another() -> None:
    proof = two_stories()
    commitment = Commitment(
        run=RUN,
        step=3,
        parent="e" * 64,
        ballot=Ballot(number=1, leader=ANNA),
        member=ANNA,
        incarnation="",
        reducer=BERT,
        samples=1,
        root="0" * 64,
    )
    assert isinstance(proof.one, Pledge)
    for changes in ({"other": commitment}, {"one": proof.other}, {"one_signature": proof.other_signature}):
        with pytest.raises(BadMessage):
            convicted_of_two_stories(proof.model_copy(update=changes), run=RUN, signed=Nearby(CARA).signed)
