"""The digest chain, and which of two lineages survives."""

import pytest

from p2ptrain.protocol.lineage import advance, digest_of, genesis, heavier
from p2ptrain.records import Ballot, EntryHeader, PeerId, Position

START = genesis("a" * 64, "b" * 64)


def entry(position: Position, samples: int = 4, digest: str = "c" * 64) -> EntryHeader:
    return EntryHeader(
        step=position.step,
        parent=position.lineage,
        ballot=Ballot(number=1, leader=PeerId("A")),
        roster=(PeerId("A"),),
        samples=(samples,),
        spans=(0, 10),
        squared_norms=(1.0,),
        digest=digest,
    )


def test_lineage_differs_when_the_run_or_the_initial_parameters_do() -> None:
    assert len({START.lineage, genesis("a" * 64, "c" * 64).lineage, genesis("c" * 64, "b" * 64).lineage}) == 3


def test_lineage_is_equal_only_when_every_entry_is() -> None:
    same = advance(START, entry(START))
    assert same == advance(START, entry(START))
    assert same.lineage != advance(START, entry(START, digest="d" * 64)).lineage
    assert (same.step, same.weight) == (1, 4)


def test_entry_is_refused_when_it_does_not_follow() -> None:
    after = advance(START, entry(START))
    with pytest.raises(ValueError, match="does not follow"):
        advance(after, entry(START))


def test_heavier_counts_samples_before_steps_and_is_a_total_order() -> None:
    few = Position(step=9, lineage="a" * 64, weight=10)
    many = Position(step=2, lineage="b" * 64, weight=11)
    assert heavier(many, few)
    assert not heavier(few, many)
    twin = Position(step=9, lineage="b" * 64, weight=10)
    assert heavier(twin, few) != heavier(few, twin)


def test_digest_of_parts_tells_where_parts_end() -> None:
    assert digest_of([b"ab", b"c"]) != digest_of([b"a", b"bc"])
