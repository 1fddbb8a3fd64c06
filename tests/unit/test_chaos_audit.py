"""The audit of journals: each invariant that it holds, kept and broken."""

from __future__ import annotations

from typing import Any

from tests.chaos.audit import Audit, audit


def joined() -> dict[str, Any]:
    return {"event": "joined"}


def committed(step: int, lineage: str, mine: int = 4, samples: int = 8, **changes: Any) -> dict[str, Any]:
    whole = {"event": "round_committed", "step": step, "lineage": lineage, "mine": mine, "samples": samples}
    return {**whole, "peers": 2, "digest": f"d-{lineage}", "loss": 1.0, "gradient_norm": 1.0, **changes}


def hashed(step: int, lineage: str, digest: str) -> dict[str, Any]:
    return {"event": "state_hashed", "step": step, "lineage": lineage, "state_digest": digest}


def caught_up(start: int, end: int) -> dict[str, Any]:
    return {"event": "caught_up", "from_step": start, "to_step": end}


def rolled_back(start: int, end: int, lineage: str) -> dict[str, Any]:
    return {"event": "rolled_back", "from_step": start, "to_step": end, "lineage": lineage}


def problems(a: list[dict[str, Any]], b: list[dict[str, Any]], *, forks: bool = False) -> list[str]:
    return audit({"a": a, "b": b}, forks=forks).problems


def test_nothing_is_wrong_with_two_peers_on_one_log() -> None:
    story = [joined(), committed(0, "x"), hashed(1, "x", "s"), committed(1, "y"), hashed(2, "y", "t")]
    assert audit({"a": story, "b": story}, forks=False) == Audit(states_compared=2)


def test_one_lineage_with_two_states_is_found() -> None:
    (problem,) = problems([hashed(3, "x", "s")], [hashed(3, "x", "t")])
    assert problem == "I1: at step 3 and lineage x a had state_digest s and b t"


def test_step_on_two_lineages_is_found_unless_the_swarm_may_have_parted() -> None:
    a, b = [joined(), committed(0, "x", samples=9)], [joined(), committed(0, "y", samples=9)]
    (problem,) = problems(a, b)
    assert problem.startswith("I1: step 0 was committed on 2 lineages")
    assert problems(a, b, forks=True) == []


def test_step_that_goes_back_without_a_rollback_is_found() -> None:
    told = [joined(), committed(5, "x", samples=9), caught_up(6, 4)]
    assert problems(told, []) == ["I2: a went from step 6 to 4 and logged no rollback"]
    assert problems([*told[:2], rolled_back(6, 4, "z"), caught_up(6, 4)], []) == []
    assert problems([*told[:2], joined(), caught_up(0, 4)], []) == [], "a restart begins anew"


def test_step_that_is_committed_twice_is_found() -> None:
    told = [joined(), committed(5, "x", samples=9), committed(5, "y", samples=9)]
    assert "I2: a committed step 5 when it was at step 6" in problems(told, [], forks=True)


def test_rollback_to_a_lighter_lineage_is_found() -> None:
    common = [joined(), committed(0, "root")]
    heavy = [*common, committed(1, "heavy", samples=30, peers=3)]
    light = [*common, committed(1, "light", samples=20, peers=3)]
    assert problems([*light, rolled_back(2, 2, "heavy")], heavy, forks=True) == []
    (problem,) = problems([*heavy, rolled_back(2, 2, "light")], light, forks=True)
    assert problem == "I2: a gave up 30 samples of lineage heavy for 20 of light"


def test_rollback_of_which_the_journals_do_not_tell_both_weights_is_not_weighed() -> None:
    story = {"a": [joined(), committed(5, "x", samples=9), rolled_back(6, 7, "unknown")]}
    found = audit(story, forks=True)
    assert (found.problems, found.rollbacks, found.rollbacks_weighed) == ([], 1, 0)


def test_samples_that_do_not_add_up_are_found() -> None:
    (problem,) = problems([joined(), committed(0, "x", mine=5)], [joined(), committed(0, "x", mine=4)])
    assert problem == "I3: 2 of the 2 peers of step 0 gave 9 samples; 8 were counted"
    assert problems([joined(), committed(0, "x", mine=5)], []) == [], "the other's journal may be lost"


def test_samples_counted_twice_in_one_life_are_found() -> None:
    told = [joined(), committed(0, "x"), committed(0, "x")]
    assert "I3: a counted its samples of step 0 twice" in problems(told, [])


def test_same_entry_in_two_lives_counts_its_samples_once() -> None:
    """Who comes back with nothing, alone and as before, takes the same step to the same bytes."""
    told = [joined(), committed(0, "x", mine=8, peers=1), joined(), committed(0, "x", mine=8, peers=1)]
    assert problems(told, []) == []
    (problem,) = problems([*told[:3], committed(0, "x", mine=4, peers=1)], [])
    assert problem == "I3: 1 of the 1 peers of step 0 gave 12 samples; 8 were counted"


def test_what_is_not_finite_is_found() -> None:
    assert problems([joined(), committed(0, "x", samples=9, gradient_norm=None)], [])[0].startswith("I5")
    assert problems([joined(), committed(0, "x", samples=9, loss=None)], [])[0].startswith("I5")
    assert problems([joined(), committed(0, "x", mine=0, samples=9, loss=None)], []) == []
    assert problems([{"event": "evaluated", "step": 3, "loss": None}], [])[0].startswith("I5")
