"""Deadlines follow what was measured, within the bounds of the run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2ptrain.protocol.deadlines import Deadlines
from p2ptrain.protocol.estimate import Estimate
from p2ptrain.records import PeerId
from tests.unit.transcripts import RULES

A, B = PeerId("a"), PeerId("b")
RULE = replace(RULES, encoded_bytes=2_000_000, heartbeat_seconds=1.0, silence_seconds=5.0)


def test_estimate_is_the_first_guess_until_something_was_seen() -> None:
    estimate = Estimate(first=7.0)
    assert estimate.bound == 7.0
    estimate.observe(1.0)
    assert estimate.bound == 3.0, "a mean of 1 and, by RFC 6298, half of it as the deviation"


def test_estimate_narrows_when_the_same_is_seen_again_and_again() -> None:
    estimate = Estimate(first=7.0)
    for _ in range(50):
        estimate.observe(1.0)
    assert estimate.bound == pytest.approx(1.0, abs=0.01)


def test_estimate_doubles_with_each_miss_and_falls_back_when_it_is_seen() -> None:
    estimate = Estimate(first=2.0)
    bounds = []
    for _ in range(8):
        estimate.miss()
        bounds.append(estimate.bound)
    assert bounds == [4, 8, 16, 32, 64, 128, 128, 128]
    estimate.observe(1.0)
    assert estimate.bound == 3.0


def test_silence_is_the_runs_least_when_peers_are_in_time() -> None:
    deadlines = Deadlines(RULE)
    assert deadlines.silence_seconds([A]) == 5.0
    for _ in range(20):
        deadlines.heard_after(A, 0.4)
    assert deadlines.silence_seconds([A]) == 5.0


def test_silence_grows_with_a_peers_lateness_and_shrinks_when_it_is_in_time_again() -> None:
    deadlines = Deadlines(RULE)
    for _ in range(5):
        deadlines.heard_after(A, 4.5)
    late = deadlines.silence_seconds([A])
    assert 6.5 < late < 20
    assert deadlines.silence_seconds([B]) == 5.0, "another peer is not given more for it"
    assert deadlines.silence_seconds([B, A]) == late
    for _ in range(40):
        deadlines.heard_after(A, 0.1)
    assert deadlines.silence_seconds([A]) == 5.0


def test_silence_stays_within_the_runs_bounds_when_a_link_was_broken_for_an_hour() -> None:
    deadlines = Deadlines(replace(RULE, silence_most_seconds=20.0))
    deadlines.heard_after(A, 3600.0)
    assert deadlines.silence_seconds([A]) == 20.0


def test_reduction_is_given_what_a_poor_home_link_needs_when_nothing_was_measured() -> None:
    # 2 (n − 1) / n of 2 MB at 2 Mbit/s, twice, after the silence.
    assert Deadlines(RULE).reduce_seconds(2) == pytest.approx(5 + 2 * 8.0)
    assert Deadlines(RULE).reduce_seconds(4) == pytest.approx(5 + 2 * 12.0)
    assert Deadlines(RULE).reduce_seconds(1) == 5.0


def test_reduction_is_given_time_by_the_measured_pace_the_bytes_and_the_number_of_peers() -> None:
    deadlines = Deadlines(RULE)
    for _ in range(50):
        deadlines.reduced(2, 1.0)
    assert deadlines.reduce_seconds(2) == pytest.approx(5 + 2 * 1.0, abs=0.05)
    assert deadlines.reduce_seconds(4) == pytest.approx(5 + 2 * 1.5, abs=0.05)
    assert deadlines.reduce_seconds(64) < 5 + 2 * 2.0 + 0.1, "no peer ever moves more than twice the vector"


def test_reduction_is_given_twice_the_time_when_it_was_missed_but_never_more_than_the_run_allows() -> None:
    deadlines = Deadlines(replace(RULE, attempt_most_seconds=60.0))
    first = deadlines.reduce_seconds(2)
    deadlines.overdue()
    assert deadlines.reduce_seconds(2) - 5 == pytest.approx(2 * (first - 5))
    for _ in range(9):
        deadlines.overdue()
    assert deadlines.reduce_seconds(2) == 60.0
