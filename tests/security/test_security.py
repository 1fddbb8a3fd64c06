"""A few of the hostile behaviours, against a small live swarm; all of them are `python -m tests.security`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.security.__main__ import play
from tests.security.behaviours import BEHAVIOURS, Field
from tests.security.stage import swarm

pytestmark = [pytest.mark.security, pytest.mark.long]

SOME = ("no invite", "stolen pass", "wiping the dht", "giant lengths", "strange http")


def test_some_hostile_behaviours_get_nothing(tmp_path: Path) -> None:
    with swarm(tmp_path, peers=2) as stage:
        field = Field(stage, seconds=1.0)
        outcomes = [play(field, BEHAVIOURS[name]) for name in SOME]
    assert [outcome.name for outcome in outcomes if not outcome.met] == []
    assert [outcome.wrong_bytes for outcome in outcomes] == [0] * len(SOME)
    assert all(outcome.growth_megabytes < 64 for outcome in outcomes)


def test_there_are_thirty_behaviours_at_least() -> None:
    assert len(BEHAVIOURS) >= 30
    assert all(behaviour.what for behaviour in BEHAVIOURS.values())
