"""Draws, and what proves a lie: held against every way to bend a proof that is not one.

The sums that proofs are about are whole bytes here; what a real rule makes of real chunks is in
`tests/swarm/test_audit_stories.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.errors import BadMessage
from p2ptrain.protocol.audit import (
    claim,
    convicted_of_false_sum,
    convicted_of_two_stories,
    draws,
    exhibits,
    is_part,
    same_subject,
)
from p2ptrain.protocol.lineage import advance, joint_digest
from p2ptrain.records import (
    Ballot,
    Commitment,
    EntryHeader,
    FalseSum,
    PeerId,
    Position,
    Statement,
    TwoStories,
)

ANNA, BERT, CARA, DORA = (PeerId(name) for name in ("anna", "bert", "cara", "dora"))
RUN, CHUNK_VALUES = "f" * 64, 4


def signature_of(peer: PeerId, content: bytes) -> str:
    return blake3(peer.encode() + content).hexdigest() * 2


def signed(peer: PeerId, content: bytes, signature: str) -> bool:
    return signature == signature_of(peer, content)


def entry(step: int, roster: tuple[PeerId, ...], parent: str = "a" * 64) -> EntryHeader:
    return EntryHeader(
        step=step,
        parent=parent,
        ballot=Ballot(number=1, leader=roster[0]),
        roster=roster,
        samples=(1,) * len(roster),
        spans=tuple(8 * at for at in range(len(roster) + 1)),
        squared_norms=(1.0,) * len(roster),
        digest="d" * 64,
    )


# -- the draw ------------------------------------------------------------------------------------------------

ROSTER = (ANNA, BERT, CARA, DORA)


def made(seed: int, members: int = 4) -> list[list[bytes]]:
    return [[blake3(f"{seed} {rank} {at}".encode()).digest() for at in range(2)] for rank in range(members)]


@given(st.integers(0, 2**32), st.lists(st.integers(0, 5), min_size=4, max_size=4), st.floats(0, 1))
def test_draw_names_a_chunk_that_is_there_and_an_auditor_that_knows_both_rounds(
    seed: int, chunks: list[int], share: float
) -> None:
    following = entry(6, (ANNA, BERT, CARA), f"{seed:064x}")
    drawn = draws(entry(5, ROSTER), chunks, following, made(seed, 3), share)
    assert drawn == draws(entry(5, ROSTER), chunks, following, made(seed, 3), share)
    assert len({draw.rank for draw in drawn}) == len(drawn)
    for draw in drawn:
        assert draw.number < chunks[draw.rank]
        assert draw.auditor in {ANNA, BERT, CARA} - {ROSTER[draw.rank]}


def test_spans_are_audited_as_often_as_the_run_says_and_by_all_alike() -> None:
    counts: Counter[tuple[int, int, PeerId]] = Counter()
    for seed in range(4000):
        for draw in draws(entry(5, ROSTER), [2] * 4, entry(6, ROSTER), made(seed), 0.25):
            counts[draw.rank, draw.number, draw.auditor] += 1
    assert len(counts) == 4 * 2 * 3
    assert all(110 < count < 230 for count in counts.values())  # 167 expected, 13 is one deviation


def test_reducer_cannot_turn_its_own_draw_by_what_it_makes_in_the_next_round() -> None:
    def of_bert(seed: int) -> set[object]:
        digests = made(1)
        digests[1] = made(seed)[1]
        return {
            draw
            for draw in draws(entry(5, ROSTER), [9] * 4, entry(6, ROSTER), digests, 1.0)
            if draw.rank == 1
        }

    assert len({frozenset(of_bert(seed)) for seed in range(20)}) == 1


def test_entry_that_does_not_follow_draws_nothing() -> None:
    with pytest.raises(ValueError, match="does not follow"):
        draws(entry(5, ROSTER), [1] * 4, entry(7, ROSTER), made(0), 1.0)


# -- a reducer's lie -----------------------------------------------------------------------------------------


def digests_of(chunks: list[bytes]) -> list[bytes]:
    return [blake3(chunk).digest() for chunk in chunks]


LAST = entry(4, (ANNA, BERT, CARA))


@dataclass
class Case:
    """Bert averaged two chunks; Cara brought nothing. A chunk of n values is n bytes, a sum their sum."""

    inputs: tuple[list[bytes], ...] = ([b"aaaa", b"bb"], [b"cccc", b"dd"], [])
    outputs: tuple[bytes, ...] = (b"cccc", b"ee")
    number: int = 1

    def statement(self) -> Statement:
        return Statement(
            run=RUN,
            step=5,
            parent=advance(Position(step=4, lineage=LAST.parent, weight=0), LAST).lineage,
            ballot=Ballot(number=1, leader=ANNA),
            roster=(ANNA, BERT, CARA),
            samples=tuple(int(bool(chunks)) for chunks in self.inputs),
            spans=(0, 8, 14, 20),
            rank=1,
            inputs=tuple(joint_digest(digests_of(chunks)) for chunks in self.inputs),
            output=joint_digest(digests_of(list(self.outputs))),
        )

    def proof(self) -> tuple[FalseSum, bytes]:
        statement = self.statement()
        proof = FalseSum(
            statement=statement,
            signature=signature_of(BERT, claim(statement)),
            number=self.number,
            last=LAST,
        )
        shown = [*(chunks for chunks in self.inputs if chunks), list(self.outputs)]
        payload = b"".join(b"".join(digests_of(chunks)) + chunks[self.number] for chunks in shown)
        return proof, payload


def judged(proof: FalseSum, payload: bytes, again: bytes | None, run: str = RUN) -> PeerId:
    inputs, output = exhibits(proof, payload, CHUNK_VALUES, lambda values: values)
    return convicted_of_false_sum(proof, inputs, output, run=run, signed=signed, again=again)


@pytest.mark.parametrize("again", [b"dd", None])
def test_reducer_is_convicted_when_its_output_does_not_follow_from_its_inputs(again: bytes | None) -> None:
    assert judged(*Case().proof(), again) == BERT


def test_nobody_is_convicted_when_the_sum_is_right() -> None:
    with pytest.raises(BadMessage, match="right"):
        judged(*Case().proof(), b"ee")


def test_nobody_is_convicted_by_a_statement_of_another_run_or_that_somebody_else_signed() -> None:
    proof, payload = Case().proof()
    with pytest.raises(BadMessage, match="signed for this run"):
        judged(proof, payload, b"dd", run="e" * 64)
    forged = proof.model_copy(update={"signature": signature_of(ANNA, claim(proof.statement))})
    with pytest.raises(BadMessage, match="signed for this run"):
        judged(forged, payload, b"dd")


def test_nobody_is_convicted_by_another_entry_before_than_the_attempt_builds_on() -> None:
    """Some rules follow it: with another one, a right sum would look wrong."""
    proof, payload = Case().proof()
    for last in (None, entry(3, (ANNA, BERT)), LAST.model_copy(update={"squared_norms": (1.0, 1.0, 2.0)})):
        with pytest.raises(BadMessage, match="builds on"):
            judged(proof.model_copy(update={"last": last}), payload, b"dd")


@given(st.data())
def test_nobody_is_convicted_by_a_payload_that_was_changed_anywhere(data: st.DataObject) -> None:
    proof, payload = Case().proof()
    at = data.draw(st.integers(0, len(payload) - 1))
    changed = bytearray(payload)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(BadMessage):
        judged(proof, bytes(changed), b"dd")


@given(st.integers(0, 400), st.integers(0, 5))
def test_payload_of_another_size_or_about_another_chunk_is_refused(size: int, number: int) -> None:
    proof, payload = Case().proof()
    if (size, number) != (len(payload), 1):
        with pytest.raises(BadMessage):
            judged(proof.model_copy(update={"number": number}), payload[:size].ljust(size, b"x"), b"dd")


def test_statement_must_fit_its_roster() -> None:
    good = Case().statement().model_dump()
    for bad in ({"rank": 3}, {"samples": (1, 1)}, {"inputs": ("a" * 64,)}, {"spans": (0, 8, 4, 20)}):
        with pytest.raises(ValueError, match="must fit"):
            Statement.model_validate(good | bad)


def test_chunk_is_part_of_its_root_only() -> None:
    chunks = [b"one", b"two"]
    root = joint_digest(digests_of(chunks))
    assert is_part(root, 1, digests_of(chunks), b"two")
    assert not is_part(root, 0, digests_of(chunks), b"two")
    assert not is_part(root, 2, digests_of(chunks), b"two")
    assert not is_part(root, 1, digests_of([b"one", b"six"]), b"six")


# -- a member's two stories ----------------------------------------------------------------------------------


def commitment(**changed: object) -> Commitment:
    told = Commitment(
        run=RUN,
        step=5,
        parent="a" * 64,
        ballot=Ballot(number=1, leader=ANNA),
        member=CARA,
        incarnation="cara 1.1",
        reducer=BERT,
        samples=3,
        root="b" * 64,
    )
    return told.model_copy(update=changed)


def stories(one: Commitment, other: Commitment, by: PeerId = CARA) -> TwoStories:
    return TwoStories(
        one=one,
        one_signature=signature_of(CARA, claim(one)),
        other=other,
        other_signature=signature_of(by, claim(other)),
    )


@pytest.mark.parametrize("changed", [{"root": "c" * 64}, {"samples": 4}])
def test_member_is_convicted_when_it_signed_two_things_of_one_contribution(
    changed: dict[str, object],
) -> None:
    proof = stories(commitment(), commitment(**changed))
    assert convicted_of_two_stories(proof, run=RUN, signed=signed) == CARA


@pytest.mark.parametrize(
    "changed",
    [
        {"step": 6},
        {"parent": "b" * 64},
        {"ballot": Ballot(number=2, leader=ANNA)},
        {"incarnation": "cara 2.1"},
        {"reducer": ANNA},
        {},
    ],
)
def test_nobody_is_convicted_by_two_contributions_or_one_that_was_said_twice(
    changed: dict[str, object],
) -> None:
    """A peer that has restarted within an attempt brings other samples, and that is no lie."""
    other = commitment(root="c" * 64, **changed) if changed else commitment()
    with pytest.raises(BadMessage, match="contradict"):
        convicted_of_two_stories(stories(commitment(), other), run=RUN, signed=signed)


def test_nobody_is_convicted_by_a_story_that_somebody_else_signed_or_of_another_run() -> None:
    other = commitment(root="c" * 64)
    with pytest.raises(BadMessage, match="not signed"):
        convicted_of_two_stories(stories(commitment(), other, by=BERT), run=RUN, signed=signed)
    with pytest.raises(BadMessage, match="contradict"):
        convicted_of_two_stories(stories(commitment(), other), run="e" * 64, signed=signed)


def test_commitment_and_statement_of_the_same_content_are_signed_differently() -> None:
    assert not claim(commitment()).startswith(claim(Case().statement())[:20])
    assert same_subject(commitment(), commitment(samples=9))
