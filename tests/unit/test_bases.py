"""Which states a replica can go back to, as time passes."""

from __future__ import annotations

from p2ptrain.records import Position
from p2ptrain.replica.bases import PERIOD_SECONDS, SETTLED_SECONDS, Bases
from p2ptrain.replica.snapshot import Snapshot


def state(step: int) -> Snapshot:
    return Snapshot(Position(step=step, lineage="1" * 64, weight=step), None, "2" * 64, b"")


def steps(bases: Bases) -> list[int]:
    return [position.step for position in bases.positions]


def test_first_state_is_kept_at_once_and_the_next_after_its_period() -> None:
    bases = Bases()
    assert bases.due(0.0)
    bases.keep(state(0), 0.0)
    assert not bases.due(PERIOD_SECONDS - 1)
    assert bases.due(PERIOD_SECONDS)


def test_older_state_goes_when_the_newer_one_has_stood_for_long_enough() -> None:
    bases = Bases()
    bases.keep(state(0), 0.0)
    bases.keep(state(9), PERIOD_SECONDS)
    assert not bases.due(PERIOD_SECONDS + SETTLED_SECONDS - 1)
    assert steps(bases) == [0, 9]
    assert not bases.due(PERIOD_SECONDS + SETTLED_SECONDS)
    assert steps(bases) == [9]


def test_newest_state_before_a_lie_is_gone_back_to_and_what_came_after_it_is_forgotten() -> None:
    bases = Bases()
    bases.keep(state(0), 0.0)
    bases.keep(state(9), PERIOD_SECONDS)
    for step, base in ((12, 9), (9, 9), (8, 0)):
        found = bases.before(step)
        assert found is not None
        assert found.position.step == base
    assert steps(bases) == [0]


def test_nothing_is_gone_back_to_when_the_lie_is_older_than_what_is_kept() -> None:
    bases = Bases()
    bases.keep(state(9), 0.0)
    assert bases.before(8) is None
    bases.keep(state(12), 0.0)
    bases.clear()
    assert bases.before(100) is None
