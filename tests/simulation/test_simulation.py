"""The round holds its invariants in ten thousand seeded stories, and in those that once broke them."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.simulation.kept import KEPT
from tests.simulation.sim import Simulation, play, play_many
from tests.simulation.story import LIES, PHASES, Story

STORIES = 10_000
WORKERS = 2
AT_ONCE = 50

FAULTS = (
    *("crash", "restart", "join", "leave", "pause", "hang", "partition", "cut", "one-way cut", "duplicate"),
    *(f"leader dies {phase}" for phase in PHASES),
    *(f"leader pauses {phase}" for phase in PHASES[:3]),
    "donor dies",
)
ANSWERS = (
    *("abort peer_lost", "abort leader_lost", "abort deadline", "abort superseded", "abort bad_chunk"),
    *("abort digest_mismatch", "TookOver", "forks", "rollbacks", "heal", "lost", "link reset", "link lost"),
    *("refused number", "refused count", "refused contradiction", "refused nothing", "refused roster"),
    *("skipped", "Distrusted", "refused norm", "refused a donor's log", "frame before its freeze"),
)


@pytest.mark.swarm
def test_invariants_hold_and_every_fault_is_met_in_ten_thousand_seeded_stories() -> None:
    happened: Counter[str] = Counter()
    broken: list[str] = []
    parts = [range(first, first + AT_ONCE) for first in range(0, STORIES, AT_ONCE)]
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for events, broke in pool.map(play_many, parts):
            happened += events
            broken += broke
    if broken:
        pytest.fail(f"{len(broken)} of {STORIES} stories broke; the first:\n{broken[0]}", pytrace=False)
    # Stories in which nothing happens would hold every invariant, too.
    wanted = (*(f"fault {fault}" for fault in FAULTS), *(f"lie {lie}" for lie in LIES), *ANSWERS)
    rare = {what: happened[what] for what in wanted if happened[what] < STORIES // 500}
    assert not rare, f"these hardly ever happened: {rare}, of {happened}"
    assert happened["steps"] > 10 * STORIES


@pytest.mark.parametrize(("seed", "story"), KEPT)
def test_invariants_hold_in_a_story_that_once_broke_them(seed: int, story: Story) -> None:
    broke = play(seed, story=story).broke
    assert broke is None, broke


def test_story_is_the_same_when_its_seed_is() -> None:
    first, second, other = (list(Simulation(seed).run().transcript.lines()) for seed in (7, 7, 8))
    assert first == second != other
    assert len(first) > 100
