"""Plays every hostile behaviour against a live swarm of four real peers, and prints how it was met.

    python -m tests.security [--json] [--only NAME,…] [--peers 4] [--seconds 5]

One swarm bears them all, one after the other. Of each it is looked at that it got nothing (its own claim,
see `behaviours`), at the rate of steps, at the growth of every victim's memory, and whether honest peers ever
differed in a byte. Attackers share this machine's cores with their victims, which a hostile machine of its
own would not: so the rate is held against that with somebody honest in the attacker's place, who enters with
an invite and looks around as often (for strangers before and after, and the mean of these), or is a volunteer
like the others (for liars); a lying donor against an honest one that gives the state to as many. Both run at
a lower priority. A flood still takes a core that its victims would train on: what it took beyond the honest
one is measured, and the bound is held against what it left; both shares are told. Exit status 1: one got what
it wanted, or missed a bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.security.behaviours import BEHAVIOURS, Behaviour, Field
from tests.security.stage import swarm

RATE_SHARE = 0.8
GROWTH_MEGABYTES = 64.0
SETTLE_SECONDS = 1.0
"""At most; half of the time that floods last, where that is less."""


@dataclass(frozen=True)
class Outcome:
    """How one behaviour was met."""

    name: str
    met: bool
    """It was refused, or survived."""
    seen: str
    rate_before: float
    """Steps per second."""
    rate_share: float
    """Of that, while it went on."""
    attacker_cores: float
    """What the attacker took of this machine's processors beyond what somebody honest takes there."""
    rate_share_of_its_own: float
    """`rate_share`, had the attacker computed elsewhere: of what it left to the swarm of this machine."""
    growth_megabytes: float
    """Of the victim that grew most, with its daemon."""
    wrong_bytes: int
    """Steps at which honest peers differed, so far."""
    seconds: float


def play(field: Field, behaviour: Behaviour) -> Outcome:
    """Let it loose, for as long as its rate beforehand is taken, or longer."""
    stage, settle = field.stage, min(SETTLE_SECONDS, field.seconds / 2)
    if behaviour.lie:
        name = f"liar-{len(field.liars) + 1}"
        orders = stage.liar(name)
        assert not orders.exists()
        field.liars.append(name)
    stage.watch(settle)
    before, usual_cores = rate_of_honest_ones(field, behaviour)
    memory, began, computed = stage.megabytes(), time.time(), computed_seconds()
    try:
        seen, met = asyncio.run(behaviour.play(field)), True
        while not behaviour.lie and time.time() < began + field.seconds:
            asyncio.run(behaviour.play(field))
    except Exception as error:
        seen, met = f"{type(error).__name__}: {error}".splitlines()[0][:300], False
        traceback.print_exc()
    ended = time.time()
    cores = (computed_seconds() - computed) / (ended - began)
    stage.watch(settle)
    during = stage.steps_per_second(began, ended)
    after = stage.megabytes()
    if behaviour.lie:
        stage.part(field.liars[-1])
    else:
        # Whatever else this machine does may have changed meanwhile: the mean of before and after counts.
        again, cores_again = rate_of_honest_ones(field, behaviour)
        before, usual_cores = (before + again) / 2, (usual_cores + cores_again) / 2
    # A liar computes as it did before it lied, and what a part that ended took is of its whole life.
    taken = 0.0 if behaviour.lie else max(0.0, cores - usual_cores)
    share = during / before if before else 0.0
    return Outcome(
        name=behaviour.name,
        met=met,
        seen=seen,
        rate_before=before,
        rate_share=share,
        attacker_cores=taken,
        rate_share_of_its_own=share / max(1 - taken / (os.cpu_count() or 1), 0.1),
        growth_megabytes=max(after[name] - memory[name] for name in memory),
        wrong_bytes=stage.wrong_bytes(),
        seconds=ended - began,
    )


def rate_of_honest_ones(field: Field, behaviour: Behaviour) -> tuple[float, float]:
    """Steps per second while somebody honest does in the attacker's place what everybody may, and the cores
    that this takes."""
    began, computed = time.time(), computed_seconds()
    asyncio.run(behaviour.honest(field))
    ended = time.time()
    cores = (computed_seconds() - computed) / (ended - began)
    field.stage.look()
    return field.stage.steps_per_second(began, ended), cores


def computed_seconds() -> float:
    """Of a core, by this process and by its daemons that have ended; what an attacker is made of."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def line(outcome: Outcome) -> str:
    return (
        f"{'met ' if outcome.met else 'FAIL'} {outcome.name:<32} rate {outcome.rate_share:5.0%} of "
        f"{outcome.rate_before:5.1f}/s, {outcome.rate_share_of_its_own:4.0%} of what its "
        f"{outcome.attacker_cores:.1f} cores left, memory {outcome.growth_megabytes:+6.1f} MB, "
        f"wrong bytes {outcome.wrong_bytes}: {outcome.seen}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.security", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--only", default="", help="these behaviours, with commas")
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0, help="for which floods last")
    given = parser.parse_args()
    names = [name.strip() for name in given.only.split(",") if name.strip()] or list(BEHAVIOURS)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, swarm(Path(folder), given.peers) as stage:
        os.nice(10)
        field = Field(stage, given.seconds)
        for name in names:
            outcomes.append(play(field, BEHAVIOURS[name]))
            print(line(outcomes[-1]), flush=True)
    met = sum(outcome.met for outcome in outcomes)
    slow = [outcome.name for outcome in outcomes if outcome.rate_share_of_its_own < RATE_SHARE]
    grown = [outcome.name for outcome in outcomes if outcome.growth_megabytes > GROWTH_MEGABYTES]
    wrong = max((outcome.wrong_bytes for outcome in outcomes), default=0)
    print(
        f"{met} of {len(outcomes)} refused or survived; wrong bytes applied: {wrong}; step rate below "
        f"{RATE_SHARE:.0%} during {len(slow)}: {', '.join(slow) or 'none'}; memory grew by more than "
        f"{GROWTH_MEGABYTES:.0f} MB during {len(grown)}: {', '.join(grown) or 'none'}"
    )
    if given.json:
        print(json.dumps({"met": met, "of": len(outcomes), "outcomes": [asdict(each) for each in outcomes]}))
    return int(met < len(outcomes) or wrong > 0 or bool(slow) or bool(grown))


if __name__ == "__main__":
    sys.exit(main())
