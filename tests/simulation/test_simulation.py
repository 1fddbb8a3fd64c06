"""The round holds its invariants in two thousand seeded stories; the harness notices when it would not."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from p2ptrain.protocol.member import Member
from p2ptrain.protocol.round import Effect, Send
from p2ptrain.records import Done, Message, PeerId
from tests.simulation.sim import Ending, play

SEEDS = 2_000
WORKERS = 2
FAILED_ONCE = (21, 36, 41, 72, 85, 114, 356)
"""Seeds whose stories found a bug when the machines were new."""


def spoil_survives(machine: type[Member], seeds: int) -> bool:
    """Whether a spoiled machine gets through that many stories unnoticed."""
    return all(play(seed, machine).broke is None for seed in range(seeds))


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
    assert not broken, f"{len(broken)} of {SEEDS} stories broke; the first:\n{broken[0]}"
    # Stories in which nothing happens would hold every invariant, too.
    for event in ("steps", "forks", "rollbacks", "abort peer_lost", "abort leader_lost", "abort superseded"):
        assert happened[event] > SEEDS // 50, happened


@pytest.mark.parametrize("seed", FAILED_ONCE)
def test_invariants_hold_in_a_story_that_once_broke_them(seed: int) -> None:
    assert play(seed).broke is None


def test_story_is_the_same_when_its_seed_is() -> None:
    assert play(7).happened == play(7).happened != play(8).happened


class BreaksPromises(Member):
    """Declares an attempt held although it has promised a successor not to."""

    def received(self, sender: PeerId, message: Message, now: float) -> list[Effect]:
        freeze, ballot = self.freeze, self.ballot
        effects = super().received(sender, message, now)
        if freeze is not None and self.freeze is None and self.ballot != ballot and self.last is not None:
            header = self.last.model_copy(
                update={"step": freeze.step, "parent": freeze.parent, "ballot": freeze.ballot}
            )
            effects.append(Send(freeze.ballot.leader, Done(header=header)))
        return effects


class CommitsEarly(Member):
    """As a leader, commits as soon as it holds every span itself, whoever else does not."""

    def tick(self, now: float) -> list[Effect]:
        if self.leader is not None and self.leader.attempt is not None and self.held_header is not None:
            attempt = self.leader.attempt
            for peer in attempt.freeze.roster:
                attempt.done.setdefault(peer, self.held_header)
            return [*self.received(self.me, Done(header=self.held_header), now), *super().tick(now)]
        return super().tick(now)


class StepsAlone(Member):
    """Takes every silent second for the death of all others."""

    def tick(self, now: float) -> list[Effect]:
        effects = super().tick(now)
        for peer in list(self.known):
            effects += self.linked(peer, False, now)
        return effects


@pytest.mark.parametrize("machine", [BreaksPromises, CommitsEarly, StepsAlone])
def test_harness_notices_a_machine_that_breaks_the_rules(machine: type[Member]) -> None:
    assert not spoil_survives(machine, 150)
