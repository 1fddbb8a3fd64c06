"""The proof of the proof: protocols that break the rules, and what the harness says about them.

The drawn stories catch each of them, too, the last one after 421. Those that need luck get a story here in
which they need less of it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

import tests.simulation.audits
import tests.simulation.peer
from p2ptrain.protocol.member import Member
from p2ptrain.protocol.reduction import Reduction
from tests.simulation import mutants
from tests.simulation.sim import play
from tests.simulation.story import Story

ENOUGH = 300
CUTS = Story(cuts=3, pauses=2)
AUDITED = Story(audited=True, liars=("sum",), joins=1, loss=0.002, seconds=10.0, patience_seconds=60.0)
CRASHES = Story(crashes=2, restarts=True, loss=0.02)


def complaint(machine: type[Member] = Member, story: Story | None = None) -> str:
    """The first line of the first story that breaks."""
    for seed in range(ENOUGH):
        broke = play(seed, machine, story).broke
        if broke is not None:
            return broke.partition("\n")[0]
    return f"all of {ENOUGH} stories hold"


@pytest.mark.parametrize(
    ("machine", "story", "rules"),
    [
        (mutants.CommitsTooSoon, None, ("I1",)),
        (mutants.StepsAlone, None, ("I1",)),
        (mutants.BreaksItsPromise, CUTS, ("I7",)),
        (mutants.ObeysAnyBallot, CUTS, ("I7",)),
        (mutants.AsksNobody, CRASHES, ("I1",)),
        (mutants.MindsNoSilence, None, ("stuck",)),
        (mutants.LooksForNobody, None, ("I1", "disagree")),
        (mutants.ForgetsWhatWasTaken, Story(leased=True), ("I4",)),
        (mutants.LeasesToNewcomers, Story(leased=True, joins=2), ("I4", "I5")),
        (mutants.CountsNobody, replace(CUTS, quorum="majority", partitions=2), ("fork",)),
    ],
)
def test_harness_complains_when_a_machine_breaks_the_rules(
    machine: type[Member], story: Story | None, rules: tuple[str, ...]
) -> None:
    said = complaint(machine, story)
    assert any(rule in said for rule in rules), said


@pytest.mark.parametrize(
    ("reduction", "rule"),
    [
        (mutants.BelievesAnyChunk, "I5"),
        (mutants.BelievesAnyMean, "I5"),
        (mutants.AddsAsItComes, "I4"),
    ],
)
def test_harness_complains_when_a_reducer_breaks_the_rules(
    reduction: type[Reduction], rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tests.simulation.peer, "Reduction", reduction)
    assert rule in complaint()


def test_harness_complains_when_nothing_is_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tests.simulation.audits, "draws", mutants.audits_nothing)
    assert "a lie stays" in complaint(story=AUDITED)


@pytest.mark.parametrize(
    ("machine", "rules"),
    [(mutants.MindsNoVoid, ("stuck",)), (mutants.ForgetsConvicts, ("stuck", "a lie stays"))],
)
def test_harness_complains_when_a_machine_lives_with_a_proven_lie(
    machine: type[Member], rules: tuple[str, ...]
) -> None:
    said = complaint(machine, AUDITED)
    assert any(rule in said for rule in rules), said


@pytest.mark.parametrize("story", [Story(), CUTS, CRASHES, AUDITED])
def test_harness_is_silent_when_the_machine_keeps_the_rules(story: Story) -> None:
    assert [play(seed, story=story).broke for seed in range(10)] == [None] * 10
