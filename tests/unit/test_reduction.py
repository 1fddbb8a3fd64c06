"""The bookkeeping of one attempt: what is complete, what breaks the contract, whom to blame."""

from typing import Any

import pytest

from p2ptrain.errors import BadMessage
from p2ptrain.protocol.audit import frozen
from p2ptrain.protocol.ledger import Leases
from p2ptrain.protocol.reduction import Reduction
from p2ptrain.records import Averaged, Ballot, Chunk, DataPosition, Freeze, PeerId

A, B, C = (PeerId(name) for name in "ABC")
BALLOT = Ballot(number=1, leader=A)
FREEZE = Freeze(
    step=3,
    parent="e" * 64,
    ballot=BALLOT,
    roster=(A, B, C),
    spans=(0, 4, 8, 10),
    finishing=(),
    cutoff_seconds=0.0,
    deadline_seconds=5.0,
)


NAMED: dict[str, Any] = {
    "step": 3,
    "parent": FREEZE.parent,
    "ballot": BALLOT,
    "freeze": frozen(FREEZE),
}
LEASES = Leases(DataPosition(next=40, returned=((20, 30),)), (B, A), size=16)
"""C is a newcomer."""


def chunk(number: int, samples: int = 4, skipped: int = 0) -> Chunk:
    return Chunk(**NAMED, number=number, samples=samples, skipped=skipped)


def mean(
    number: int, *, last: bool, samples: tuple[int, ...] = (4, 4, 4), skipped: tuple[int, ...] = ()
) -> Averaged:
    return Averaged(
        **NAMED,
        number=number,
        samples=samples,
        skipped=skipped,
        squared_norm=2.0 if last else None,
    )


def fresh(leases: Leases | None = None) -> Reduction:
    return Reduction(FREEZE, B, chunk_values=2, most_samples=16, leases=leases)


def test_chunk_is_averaged_only_when_it_is_here_from_every_member() -> None:
    reduction = fresh()
    for peer in (A, B):
        assert reduction.accept(peer, chunk(0))
        assert reduction.ready() == []
    reduction.accept(C, chunk(1))
    assert reduction.ready() == []
    reduction.accept(C, chunk(0))
    assert reduction.ready() == [0]
    assert reduction.ready() == []


def test_member_without_samples_is_not_waited_for_beyond_its_one_empty_chunk() -> None:
    reduction = fresh()
    reduction.accept(A, chunk(0, samples=0))
    for number in (0, 1):
        reduction.accept(B, chunk(number))
        reduction.accept(C, chunk(number))
    assert reduction.ready() == [0, 1]
    assert reduction.contributors() == [1, 2]


def test_duplicate_is_ignored_when_a_peer_says_everything_again() -> None:
    reduction = fresh()
    assert reduction.accept(A, chunk(0))
    assert not reduction.accept(A, chunk(0))
    assert reduction.receive(A, mean(0, last=False))
    assert not reduction.receive(A, mean(0, last=False))


def test_attempt_is_complete_with_every_span_and_makes_the_header() -> None:
    reduction = fresh()
    for reducer, count in ((A, 2), (B, 2), (C, 1)):
        assert not reduction.complete
        for number in range(count):
            reduction.receive(reducer, mean(number, last=number == count - 1))
    assert reduction.complete
    header = reduction.header("f" * 64)
    assert header.samples == (4, 4, 4)
    assert header.squared_norms == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("sender", "header"),
    [
        (PeerId("X"), chunk(0)),
        (A, chunk(2)),
        (A, chunk(0, samples=2**41)),
        (PeerId("X"), mean(0, last=False)),
        (A, mean(2, last=True)),
        (A, mean(0, last=True)),
        (A, mean(1, last=False)),
        (A, mean(0, last=False, samples=(4, 4))),
        (A, mean(0, last=False, samples=(0, 0, 0))),
    ],
)
def test_frame_is_refused_when_it_breaks_the_contract(sender: PeerId, header: Chunk | Averaged) -> None:
    reduction = fresh()
    with pytest.raises(BadMessage):
        reduction.accept(sender, header) if isinstance(header, Chunk) else reduction.receive(sender, header)


def test_peer_that_tells_two_stories_about_samples_is_refused() -> None:
    reduction = fresh()
    reduction.accept(A, chunk(0, samples=4))
    with pytest.raises(BadMessage, match="claims 5 samples after 4"):
        reduction.accept(A, chunk(1, samples=5))
    reduction.receive(A, mean(0, last=False))
    with pytest.raises(BadMessage, match="other sample counts"):
        reduction.receive(B, mean(0, last=False, samples=(4, 4, 5)))


def test_suspects_are_missing_senders_first_and_late_reducers_only_then() -> None:
    reduction = fresh()
    for peer in (A, B):
        for number in (0, 1):
            reduction.accept(peer, chunk(number))
    assert reduction.suspects() == [C]  # A's mean is missing too, but A may be waiting for C
    for number in (0, 1):
        reduction.accept(C, chunk(number))
    for reducer, count in ((B, 2), (C, 1)):
        for number in range(count):
            reduction.receive(reducer, mean(number, last=number == count - 1))
    assert reduction.suspects() == [A]


def test_claim_of_more_samples_than_a_peer_can_bring_is_refused() -> None:
    with pytest.raises(BadMessage, match=r"A claims 17 samples; a peer brings at most 16"):
        fresh().accept(A, chunk(0, samples=17))
    with pytest.raises(BadMessage, match=r"counts more samples than a peer can bring"):
        fresh().receive(A, mean(0, last=False, samples=(4, 17, 4)))


# -- samples that are leased ---------------------------------------------------------------------------------


def test_header_says_where_the_data_stands_when_samples_are_leased() -> None:
    reduction = fresh(LEASES)
    for reducer, count in ((A, 2), (B, 2), (C, 1)):
        for number in range(count):
            last = number == count - 1
            reduction.receive(reducer, mean(number, last=last, samples=(4, 12, 0), skipped=(1, 0, 0)))
    header = reduction.header("f" * 64)
    assert header.skipped == (1, 0, 0)
    assert header.data == DataPosition(next=51, returned=((42, 46),))  # B took 20 to 30 and two, A five


def test_what_is_skipped_is_told_to_all() -> None:
    reduction = fresh(LEASES)
    assert reduction.skipped == ()
    reduction.accept(A, chunk(0, samples=4, skipped=2))
    assert reduction.skipped == (2, 0, 0)


@pytest.mark.parametrize(
    ("leases", "sender", "header", "reason"),
    [
        (LEASES, C, chunk(0, samples=1), "claims 1 samples; a peer brings at most 0"),
        (LEASES, A, chunk(0, samples=16, skipped=1), "claims 17 samples; a peer brings at most 16"),
        (LEASES, B, mean(0, last=False, samples=(4, 4, 1)), "more samples than a peer can bring"),
        (LEASES, B, mean(0, last=False, samples=(4, 4, 0), skipped=(0, 13, 0)), "more samples than"),
        (LEASES, B, mean(0, last=False, samples=(4, 4, 0), skipped=(0, 0, 0)), "should not name"),
        (LEASES, B, mean(0, last=False, samples=(4, 4, 0), skipped=(1,)), "for this roster"),
        (None, A, chunk(0, samples=4, skipped=1), "this run leases none"),
        (None, B, mean(0, last=False, skipped=(1, 0, 0)), "should not name"),
    ],
)
def test_frame_is_refused_when_it_takes_what_was_not_leased(
    leases: Leases | None, sender: PeerId, header: Chunk | Averaged, reason: str
) -> None:
    reduction = fresh(leases)
    with pytest.raises(BadMessage, match=reason):
        reduction.accept(sender, header) if isinstance(header, Chunk) else reduction.receive(sender, header)


def test_peer_that_tells_two_stories_about_skipped_samples_is_refused() -> None:
    reduction = fresh(LEASES)
    reduction.accept(A, chunk(0, samples=4, skipped=1))
    with pytest.raises(BadMessage, match="skips 2 samples after 1"):
        reduction.accept(A, chunk(1, samples=4, skipped=2))
