"""How often peers look who is there, as the swarm grows. That they do is in `swarm/`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.protocol.presence import (
    KEEPER_BYTES_PER_SECOND,
    PRESENCE_SECONDS,
    RECORD_BYTES,
    RUNGS,
    look_seconds,
    milestone,
    standing,
)
from p2ptrain.records import Milestone, Position


@pytest.mark.parametrize("others", [0, 3, 24])
def test_peers_of_a_small_swarm_look_whenever_they_publish(others: int) -> None:
    assert look_seconds(others, urgent=False) == PRESENCE_SECONDS


@pytest.mark.parametrize("peers", [40, 64, 256, 1024])
def test_keepers_send_no_more_for_all_looks_when_the_swarm_grows(peers: int) -> None:
    looks_per_second = peers / look_seconds(peers - 1, urgent=False)
    assert looks_per_second * (peers - 1) * RECORD_BYTES == pytest.approx(KEEPER_BYTES_PER_SECOND)


@given(st.integers(0, 10**6), st.integers(0, 15), st.integers(1, 40))
def test_two_peers_that_are_some_steps_apart_speak_of_a_common_one(
    first: int, apart: int, passed: int
) -> None:
    """Unless a multiple of 64 has come between them, of which only one of them can speak."""

    def after(steps: range) -> set[int]:
        told: tuple[Milestone, ...] = ()
        for step in steps:
            told = standing(told, milestone(Position(step=step, lineage="1" * 64, weight=0), "2" * 64))
        assert len(told) <= len(RUNGS)
        assert told[-1].step == steps[-1]
        return {each.step for each in told}

    begin = first - first % 64
    one, other = after(range(begin, first + passed)), after(range(begin, first + passed + apart))
    last, later = first + passed - 1, first + passed + apart - 1
    assert one & other or last // 64 != later // 64


def test_leader_looks_whenever_it_publishes_however_many_others_there_are() -> None:
    assert look_seconds(1000, urgent=True) == PRESENCE_SECONDS
