"""The account of leased samples that is added up from journals: it finds what the protocol must never do."""

from __future__ import annotations

from typing import Any

import pytest

from peers.passes import Data, Passes


def told(step: int, *taken: tuple[int, int], side: str = "", **fields: Any) -> dict[str, Any]:
    """A round that leads from the state `step` to the next; a `side` parts from the others there."""
    return {
        "event": "round_committed",
        "step": step,
        "parent": f"{step}",
        "lineage": f"{step + 1}{side}",
        "taken": [list(each) for each in taken],
        "lost": 0,
        "returned": 0,
    } | fields


def account(*records: dict[str, Any], held: str = "3") -> Data | None:
    passes = Passes()
    for record in records:
        passes.observe(record)
    return passes.account({held})


def test_samples_count_once_whoever_tells_of_a_round() -> None:
    rounds = [told(0, (0, 8)), told(1, (8, 12), (20, 24), returned=8), told(2, (12, 20))]
    assert account(*rounds, *rounds) == Data(unique=24, repeated=0, lost=0, returned=0)


def test_what_was_given_back_is_not_lost() -> None:
    assert account(told(2, (8, 12), (20, 24), returned=16)) == Data(8, 0, 0, 16)


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ([told(1, (0, 8)), told(2, (4, 12))], Data(unique=12, repeated=4, lost=0, returned=0)),
        ([told(1, (0, 8)), told(2, (2, 6), (8, 9))], Data(unique=9, repeated=4, lost=0, returned=0)),
        ([told(1, (0, 8)), told(2, (12, 16))], Data(unique=12, repeated=0, lost=4, returned=0)),
        ([told(1, (0, 8)), told(2, (8, 16), lost=4)], Data(unique=12, repeated=0, lost=4, returned=0)),
    ],
    ids=["overlap", "within", "forgotten", "skipped"],
)
def test_account_tells_what_was_repeated_and_lost(rounds: list[dict[str, Any]], expected: Data) -> None:
    assert account(*rounds) == expected


def test_rounds_that_were_rolled_back_do_not_count() -> None:
    assert account(told(1, (0, 8)), told(2, (8, 16), side="b"), told(2, (8, 12))) == Data(12, 0, 0, 0)


def test_there_is_no_account_where_samples_are_drawn() -> None:
    assert account(told(2)) is None
    assert account({"event": "round_aborted"}) is None
