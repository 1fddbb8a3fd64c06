"""The search for a micro-batch size, on devices that are a table: samples at once → seconds, or no memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.gradients.micro_batch import LONGEST_SECONDS, Trial, best_size, measure_sizes, next_size


class FakeDevice:
    """Takes `launch + size × each` seconds for a pass, and has memory for `room` samples."""

    def __init__(self, launch: float, each: float, room: int = 10**9) -> None:
        self.launch, self.each, self.room = launch, each, room
        self.clock, self.runs = 0.0, 0

    def run(self, size: int) -> bool:
        self.runs += 1
        if size > self.room:
            return False
        self.clock += self.launch + size * self.each
        return True

    def search(self, most: int) -> list[Trial]:
        return measure_sizes(self.run, most, lambda: self.clock)


def test_search_stops_where_twice_as_many_are_no_faster() -> None:
    device = FakeDevice(launch=0.010, each=0.001)
    trials = device.search(most=65_536)
    assert [trial.size for trial in trials] == [2**k for k in range(len(trials))]
    assert best_size(trials) == 256  # (10 + 256) / 256 ms is within 5 % of the best seen
    assert trials[-1].size == 1024


def test_smallest_size_is_taken_when_none_is_faster() -> None:
    trials = FakeDevice(launch=0.0, each=0.1).search(most=64)
    assert [trial.size for trial in trials] == [1, 2, 4]
    assert best_size(trials) == 1


def test_size_before_is_taken_when_memory_ends() -> None:
    trials = FakeDevice(launch=1.0, each=0.001, room=37).search(most=4096)
    assert trials[-1] == Trial(64, None)
    assert best_size(trials) == 32


def test_search_ends_with_a_size_that_is_no_power_of_two_when_that_is_the_most() -> None:
    trials = FakeDevice(launch=1.0, each=0.001).search(most=12)
    assert [trial.size for trial in trials] == [1, 2, 4, 8, 12]
    assert best_size(trials) == 12


def test_search_ends_when_a_pass_takes_long() -> None:
    device = FakeDevice(launch=0.9, each=0.2)
    assert device.search(most=4096)[-1].size == 8
    slow = FakeDevice(launch=0.0, each=10 * LONGEST_SECONDS)
    assert [trial.size for trial in slow.search(most=4096)] == [1]
    assert slow.runs == 1  # no second look at what takes so long


def test_no_size_fits_when_one_sample_is_too_many() -> None:
    trials = FakeDevice(launch=1.0, each=1.0, room=0).search(most=8)
    assert trials == [Trial(1, None)]
    with pytest.raises(ValueError, match="no size"):
        best_size(trials)


@given(
    seconds=st.lists(st.floats(1e-4, 10) | st.none(), min_size=20, max_size=20),
    most=st.integers(1, 65_536),
)
def test_search_ends_and_answers_with_what_was_tried_whatever_the_device_does(
    seconds: list[float | None], most: int
) -> None:
    trials: list[Trial] = []
    while (size := next_size(trials, most)) is not None:
        assert size <= most
        trials.append(Trial(size, seconds[len(trials)]))
    if trials[0].seconds is not None:
        assert best_size(trials) in {trial.size for trial in trials if trial.seconds is not None}
