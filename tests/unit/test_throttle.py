"""Token buckets: over seconds a rate is kept to the byte, and nobody waits where there is no limit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.swarm.throttle import BURST_SECONDS, Bucket


def test_bucket_without_a_rate_lets_everything_pass() -> None:
    assert Bucket(0.0).take(10**12, now=1.0) == 0.0


def test_whoever_comes_after_a_debt_waits_until_it_is_paid() -> None:
    bucket = Bucket(1000.0)
    assert bucket.take(250, now=10.0) == 0.0  # what it holds at first
    assert bucket.take(1000, now=10.0) == pytest.approx(1.0)
    assert bucket.take(500, now=10.0) == pytest.approx(1.5)  # behind the other
    assert bucket.take(0, now=11.0) == pytest.approx(0.5)
    assert bucket.take(0, now=11.5) == 0.0


def test_time_in_which_nothing_was_sent_is_kept_for_a_moment_only() -> None:
    bucket = Bucket(1000.0)
    bucket.take(0, now=0.0)
    assert bucket.take(1000, now=1e6) == pytest.approx(1 - BURST_SECONDS)


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 2)), min_size=1, max_size=50),
    st.floats(1e3, 1e7),
)
def test_rate_is_kept_by_who_waits_as_told(frames: list[tuple[int, float]], rate: float) -> None:
    bucket, now, sent = Bucket(rate), 0.0, 0
    for size, idle in frames:
        now += idle
        now += bucket.take(size, now)
        sent += size
    assert sent <= rate * (now + BURST_SECONDS) * (1 + 1e-9) + 1
