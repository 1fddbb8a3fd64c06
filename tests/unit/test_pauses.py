"""The set of reasons to pause: who is in it when, and what is told when it changes."""

from __future__ import annotations

import math
from unittest.mock import sentinel

import pytest

from p2ptrain.events import Paused, PauseReason, Resumed
from peers.durations import parse_seconds
from peers.pauses import Pause, Pauses, told

USER = PauseReason.USER
OTHER = sentinel.battery
"""Any other reason: the set does not look into it."""


def test_peer_is_paused_until_the_last_reason_is_gone() -> None:
    both = Pauses().add(USER, 100.0).add(OTHER, 110.0, 60.0)
    assert both
    assert both.remove(USER)
    assert not both.remove(USER).remove(OTHER)
    assert not Pauses().remove(USER)


def test_pause_ends_by_itself_when_its_time_is_over() -> None:
    pauses = Pauses().add(USER, 100.0, 7200.0)
    assert pauses.at(7299.9) == pauses
    assert not pauses.at(7300.0)
    assert Pauses().add(USER, 100.0).at(1e12)


def test_only_the_reason_that_is_over_ends() -> None:
    pauses = Pauses().add(USER, 100.0).add(OTHER, 110.0, 60.0)
    assert pauses.until == math.inf
    assert [pause.reason for pause in pauses.at(170.0).holding] == [USER]


def test_reason_that_comes_again_holds_for_the_new_time_and_since_the_first() -> None:
    again = Pauses().add(USER, 100.0, 60.0).add(USER, 130.0, 3600.0)
    assert again.holding == (Pause(USER, since=100.0, until=3730.0),)
    assert again.add(USER, 140.0).until == math.inf


def test_every_change_is_told_once() -> None:
    none, for_an_hour = Pauses(), Pauses().add(USER, 100.0, 3600.0)
    assert told(none, none, 100.0) is None
    assert told(for_an_hour, for_an_hour.at(200.0), 200.0) is None
    assert told(none, for_an_hour, 100.0) == Paused(reasons=(USER,), seconds=3600.0)
    assert told(for_an_hour, for_an_hour.add(USER, 200.0), 200.0) == Paused(reasons=(USER,), seconds=None)
    assert told(for_an_hour, none, 160.0) == Resumed(reasons=(USER,), seconds=60.0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("7d", 604_800)]
    + [(text, None) for text in ("", "2", "0h", "-2h", "2 h", "1h30m", "2H", "9999999999s", "never")],
)
def test_time_is_read_as_people_write_it(text: str, seconds: int | None) -> None:
    assert parse_seconds(text) == seconds
