"""How often peers look who is there, as the swarm grows. That they do is in `swarm/`."""

import pytest

from p2ptrain.protocol.presence import (
    KEEPER_BYTES_PER_SECOND,
    PRESENCE_SECONDS,
    RECORD_BYTES,
    look_seconds,
)


@pytest.mark.parametrize("others", [0, 3, 31])
def test_peers_of_a_small_swarm_look_whenever_they_publish(others: int) -> None:
    assert look_seconds(others, urgent=False) == PRESENCE_SECONDS


@pytest.mark.parametrize("peers", [40, 64, 256, 1024])
def test_keepers_send_no_more_for_all_looks_when_the_swarm_grows(peers: int) -> None:
    looks_per_second = peers / look_seconds(peers - 1, urgent=False)
    assert looks_per_second * (peers - 1) * RECORD_BYTES == pytest.approx(KEEPER_BYTES_PER_SECOND)


def test_leader_looks_whenever_it_publishes_however_many_others_there_are() -> None:
    assert look_seconds(1000, urgent=True) == PRESENCE_SECONDS
