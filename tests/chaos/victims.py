"""Peers of a swarm that are rogues, and what a swarm does when one of them kills itself.

    python -m tests.chaos.victims --times 20 --json     # as root: the figure for kill -9 at any phase

A victim trains like any other until it gets its orders. `strike` measures what the others did then: how soon
each of them committed a round again, and whether the samples that it had for the step under way were in one.

Not covered: the samples of the victim itself; they may be lost with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from peers.chronicle import moment
from tests.chaos.rows import Failed, Form, Trial
from tests.chaos.swarm import Swarm

ROOT = Path(__file__).parents[2]
SAYS = "rogue: "
"""As in `rogue`, which is imported by its own process only: it brings torch and hivemind."""
STRUCK_SECONDS = 90.0
"""Until a victim has come to the point where it is to die; for a leader's death it must lead first."""
RESUME_SECONDS = 60.0
"""Then the swarm counts as dead."""

EVERYWHERE = (
    ("accumulating",),
    ("leading",),
    ("leading", "1"),
    ("frozen",),
    ("sending", "1"),
    ("sending", "3"),
    ("reducing", "1"),
    ("done",),
    ("committing", "0"),
    ("committing", "1"),
    ("applying",),
)
"""Each place to die in a round, as leader and as follower."""


def rogue(*options: str) -> tuple[str, ...]:
    """Words before a peer's command that make a rogue of it."""
    return ("env", f"PYTHONPATH={ROOT}", sys.executable, "-P", "-m", "tests.chaos.rogue", *options)


def lies(swarm: Swarm, name: str) -> list[dict[str, Any]]:
    """What the rogue says that it did, in all its lives."""
    log = swarm.peers[name].log
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [json.loads(line.removeprefix(SAYS)) for line in lines if line.startswith(SAYS)]


class Victim:
    """A peer that will kill itself where it is told to."""

    def __init__(self, swarm: Swarm, name: str = "victim", **settings: Any) -> None:
        """It behaves. It is started, unless `settings` say `start=False`: then with its first order."""
        self.name, self._swarm = name, swarm
        self._orders = swarm.lab.folder / f"orders-{name}"
        swarm.add(name, through=rogue("--orders", str(self._orders)), **settings)

    def order(self, *words: str) -> None:
        """Have it strike: `--die accumulating`."""
        draft = self._orders.with_suffix(".draft")
        draft.write_text(" ".join(words))
        draft.rename(self._orders)

    def die(self, phase: str, number: str = "") -> dict[str, Any]:
        """Have it kill itself in that phase; what it said last."""
        swarm, child = self._swarm, self._swarm.peers[self.name]
        before = len(lies(swarm, self.name))
        child.awaited = True
        swarm.kills += 1
        started = child.pid is not None
        self.order("--die", phase, *(("--number", number) if number else ()))
        if not started:
            child.start()
            child.awaited = True
        swarm.wait(lambda: child.status is not None, f"{self.name} dies {phase}", STRUCK_SECONDS)
        if child.status != -9 or len(told := lies(swarm, self.name)) == before:
            raise Failed(f"{self.name} should have killed itself {phase}: {child.last_words()}")
        return told[-1]

    def restart(self) -> None:
        """Start it again, with what it kept on disk; it behaves."""
        self._orders.unlink(missing_ok=True)
        self._swarm.restart(self.name)


@dataclass(frozen=True)
class Death:
    """What came of one."""

    phase: str
    step: int
    """That was under way."""
    commit_seconds: float
    """Until the last survivor had committed a round again, maybe the one that the victim died in."""
    resume_seconds: float
    """Until the last survivor had committed a round without the victim."""
    lost_samples: int
    """That survivors had for that step, and that no round counted."""
    survivors: int


def first_commits(
    swarm: Swarm, names: Sequence[str], at: float, seconds: float, step: int = 0, most: int = 1000
) -> float:
    """Wait until each of these has committed a round after that time, of that step or later and with at most
    so many peers; how long after it the last of them did. Raises Failed after so many seconds."""

    def first(name: str) -> float | None:
        rounds = (each for each in swarm.commits(name, at) if each["step"] >= step and each["peers"] <= most)
        return next(map(moment, rounds), None)

    swarm.wait(
        lambda: all(first(name) for name in names),
        f"{', '.join(names)} commit a round of at most {most} again, of step {step} or later",
        seconds,
    )
    return round(max(first(name) or at for name in names) - at, 2)


def lost_samples(swarm: Swarm, names: Sequence[str], since: float) -> int:
    """Samples that these peers had for the step where they stood and that no round counted, since that time.
    A micro-batch that ends when its step is over was never part of it."""
    lost = 0
    for name in names:
        at = 0
        for record in swarm.told[name]:
            match record:
                case {"event": "round_committed", "step": step}:
                    at = step + 1
                case {"event": "caught_up", "to_step": step}:
                    at = step
                case {"event": "samples_wasted", "step": step, "samples": samples}:
                    lost += samples if step == at and moment(record) >= since else 0
    return lost


def strike(swarm: Swarm, victim: Victim, *phase: str) -> Death:
    """Have the victim die there, and see the others go on."""
    survivors = [name for name in swarm.living() if name != victim.name]
    told = victim.die(*phase)
    at, step = told["time"], told["step"]

    committed = first_commits(swarm, survivors, at, RESUME_SECONDS, step)
    resumed = first_commits(swarm, survivors, at, RESUME_SECONDS, step, len(survivors))
    lost = lost_samples(swarm, survivors, at)
    return Death(" ".join(phase), step, committed, resumed, lost, len(survivors))


def deaths(
    swarm: Swarm, victim: Victim, phases: Sequence[tuple[str, ...]]
) -> tuple[list[Death], list[float]]:
    """One after the other, each with all in a round before; also how long the victim took to be back."""
    found, back = [], []
    for phase in phases:
        found.append(strike(swarm, victim, *phase))
        victim.restart()
        back.append(swarm.together())
    return found, back


def longest_gap(swarm: Swarm, since: float, until: float, names: Sequence[str] = ()) -> float:
    """Seconds between two commits of these peers (none named: of anybody) in that time; both ends count."""
    times = [since, *swarm.commit_times(since, until, names), until]
    return max(after - before for before, after in pairwise(times))


# -- the figure ----------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.victims", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--times", type=int, default=20, help="deaths, each in the next place to die")
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="deaths-"))
    phases = [EVERYWHERE[number % len(EVERYWHERE)] for number in range(given.times)]
    with Trial(folder, given.seed, Form.GATE).swarm(peers=given.peers - 1) as swarm:
        victim = Victim(swarm)
        swarm.together()
        found, back = deaths(swarm, victim, phases)
    for death in found:
        print(
            f"{death.phase:<14} next commit after {death.commit_seconds:5.2f} s, without the victim after "
            f"{death.resume_seconds:5.2f} s; {death.lost_samples} samples of survivors lost"
        )
    commits = [death.commit_seconds for death in found]
    resumed = [death.resume_seconds for death in found]
    report = {
        "deaths": [dataclasses.asdict(death) for death in found],
        "median_commit_seconds": statistics.median(commits),
        "worst_commit_seconds": max(commits),
        "median_resume_seconds": statistics.median(resumed),
        "worst_resume_seconds": max(resumed),
        "survivors_samples_lost": sum(death.lost_samples for death in found),
        "median_back_seconds": round(statistics.median(back), 2),
        "states_compared": swarm.states_compared,
    }
    print(json.dumps(report) if given.json else f"median {report['median_resume_seconds']:.2f} s")
    folder.rmdir()


if __name__ == "__main__":
    main()
