"""A crash at every message boundary of one whole round, one story each.

A calm story is played once to learn at which moments each peer sends and reads during step `STEP`: before and
after each message that leaves it, before and after each that reaches it. Then it is played again for every
such moment of every peer, and there that peer's process ends.
"""

from __future__ import annotations

from dataclasses import replace

from p2ptrain.records import PeerId
from tests.simulation.sim import Simulation
from tests.simulation.story import Story

STEP = 2
SEEDS = (1, 2)
CALM = Story(peers=3, target=8, latency=(0.005, 0.03), chunk_values=2, seconds=3.0)
VARIANTS = {
    "stays away": CALM,
    "comes back": replace(CALM, restarts=True, forgets=False),
    "comes back without its log": replace(CALM, restarts=True),
    "comes back, leased": replace(CALM, restarts=True, leased=True),
    "stays away, majority": replace(CALM, quorum="majority"),
    "comes back, majority": replace(CALM, restarts=True, forgets=False, quorum="majority"),
}


def boundaries(seed: int, story: Story) -> list[tuple[PeerId, int]]:
    """Every moment of every peer in the round of `STEP`."""
    sim = Simulation(seed, story, doom=(PeerId("nobody"), -1)).run()
    return [
        (peer, moment)
        for peer, steps in sorted(sim.crossings.items())
        for moment, step in enumerate(steps)
        if step == STEP
    ]
