"""Whichever peer dies, before or after whichever of its messages: the others go on."""

from __future__ import annotations

import pytest

from tests.simulation.boundaries import SEEDS, VARIANTS, boundaries
from tests.simulation.sim import play

LEAST = 100
"""Three peers with two chunks a span send and read more often than this in one round."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_swarm_goes_on_when_a_peer_crashes_at_any_message_boundary_of_a_round(
    variant: str, seed: int
) -> None:
    story = VARIANTS[variant]
    moments = boundaries(seed, story)
    assert len(moments) > LEAST
    assert len({peer for peer, _ in moments}) == story.peers
    for moment in moments:
        ending = play(seed, story=story, doom=moment)
        assert ending.broke is None, f"{variant}, crash of {moment[0]} at moment {moment[1]}: {ending.broke}"
        assert ending.happened["fault crash at a boundary"] == 1
