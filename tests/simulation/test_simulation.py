"""The round holds its invariants in two thousand seeded stories; the harness notices when it would not."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest

from p2ptrain.protocol.member import Member, Stage
from p2ptrain.protocol.round import Cancel, Effect
from p2ptrain.records import Ask, Done, Message, PeerId, Position
from tests.simulation.sim import Ending, Simulation, Story, play

SEEDS = 2_000
WORKERS = 2
FAILED_ONCE = (21, 36, 41, 72, 85, 114, 143, 356, 444, 1471, 1634)
"""Seeds whose stories found a bug when the machines, or this harness, were new; they tell others by now."""


@pytest.mark.swarm
def test_invariants_hold_in_two_thousand_seeded_stories() -> None:
    happened: Counter[str] = Counter()
    broken: list[str] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        endings: list[Ending] = list(pool.map(play, range(SEEDS), chunksize=25))
    for ending in endings:
        happened += ending.happened
        if ending.broke is not None:
            broken.append(ending.broke)
    if broken:
        pytest.fail(f"{len(broken)} of {SEEDS} stories broke; the first:\n{broken[0]}", pytrace=False)
    # Stories in which nothing happens would hold every invariant, too.
    for event in ("steps", "forks", "rollbacks", "abort peer_lost", "abort leader_lost", "abort superseded"):
        assert happened[event] > SEEDS // 50, happened


@pytest.mark.parametrize("seed", FAILED_ONCE)
def test_invariants_hold_in_a_story_that_once_broke_them(seed: int) -> None:
    broke = play(seed).broke
    assert broke is None, broke


def test_story_is_the_same_when_its_seed_is() -> None:
    first, second, other = (list(Simulation(seed).run().lines()) for seed in (7, 7, 8))
    assert first == second != other
    assert len(first) > 100


# -- the proof of the proof: machines that break the rules, and what the harness says ------------------------


class CommitsTooSoon(Member):
    """Commits, as a leader, as soon as the first member is Done."""

    def _receive(self, sender: PeerId, message: Message, now: float) -> list[Effect]:
        attempt = self.leader.attempt if self.leader is not None else None
        if attempt is not None and isinstance(message, Done):
            for peer in attempt.freeze.roster if message.header.ballot == attempt.freeze.ballot else ():
                attempt.done.setdefault(peer, message.header)
        return super()._receive(sender, message, now)


class BreaksItsPromise(Member):
    """Tells a successor that it does not hold the entry, and goes on receiving it for the old leader."""

    def _on_ask(self, sender: PeerId, ask: Ask, now: float) -> list[Effect]:
        stage, freeze = self.stage, self.freeze
        effects = super()._on_ask(sender, ask, now)
        if stage is Stage.REDUCING and self.stage is Stage.ACCUMULATING and freeze is not None:
            self.stage, self.freeze, self.following = stage, freeze, freeze.ballot.leader
            effects = [effect for effect in effects if not isinstance(effect, Cancel)]
        return effects


class AsksNobody(Member):
    """Takes over without hearing how things stand."""

    def _take_over(self, now: float, *, quietly: bool = False) -> list[Effect]:
        effects = super()._take_over(now, quietly=quietly)
        return [*effects, *self._conclude(now)] if self.leader is not None else effects


class MindsNoSilence(Member):
    """Waits for ever for a machine whose connection stands and that says nothing."""

    def _notice_silence(self, now: float) -> list[Effect]:
        return []


class LooksForNobody(Member):
    """Never asks the peers that the DHT shows."""

    def informed(self, present: Mapping[PeerId, Position], now: float) -> list[Effect]:
        return []


CALM = Story(
    peers=4,
    target=16,
    latency=(0.02, 0.3),
    loss=0.0,
    crashes=0,
    restarts=False,
    joins=0,
    pauses=0,
    hangs=0,
    partitions=0,
    slow=False,
)
PAUSES, HANGS = replace(CALM, pauses=8), replace(CALM, hangs=1)
CRASHES, RESTARTS = replace(CALM, peers=5, crashes=4), replace(CALM, crashes=1, restarts=True)


@pytest.mark.parametrize(
    ("machine", "story", "complaint"),
    [
        (CommitsTooSoon, CALM, "I1"),
        (BreaksItsPromise, PAUSES, "I7"),
        (AsksNobody, CRASHES, "I1"),
        (MindsNoSilence, HANGS, "stuck"),
        (LooksForNobody, RESTARTS, "disagree"),
    ],
)
def test_harness_complains_when_a_machine_breaks_the_rules(
    machine: type[Member], story: Story, complaint: str
) -> None:
    told = (play(seed, machine, story).broke for seed in range(150))
    assert any(complaint in broke for broke in told if broke is not None)


@pytest.mark.parametrize("story", [CALM, PAUSES, HANGS, CRASHES, RESTARTS])
def test_harness_is_silent_when_the_machine_keeps_the_rules(story: Story) -> None:
    assert [play(seed, story=story).broke for seed in range(10)] == [None] * 10
