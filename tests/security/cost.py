"""What it costs a run that all its sums are audited, as JSON: the time of a step beside that of the same run
without audits.

    python -m tests.security.cost [--peers 4] [--windows 10] [--seconds 15] [--audit 1]

Two swarms of real processes train the same model from the same run file, but for `audit`. They take turns:
one trains for some seconds while every process of the other stands still, so that whatever else the machine
does falls on both. Each pair of neighbouring windows gives a ratio, and the median of these counts. Exit
status 1: the audited step took more than 3 % longer. Not covered: links slower than this machine's own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from p2ptrain.config import RunConfig, commented_toml
from peers.chronicle import Tail, moment
from tests.swarm.processes import Crew, crew, until

MOST_SHARE = 0.03
START_SECONDS = 180.0
SETTLE_SECONDS = 2.0
"""After it goes on again: links and deadlines find their pace."""


class Swarm:
    """One of the two, from its third round on."""

    def __init__(self, people: Crew, run: RunConfig, peers: int) -> None:
        self.people = people
        people.folder.mkdir(parents=True, exist_ok=True)
        file = people.folder / "run.toml"
        file.write_text(commented_toml(run))
        _, invite = people.bootstrap(file)
        names = [f"peer-{number}" for number in range(peers)]
        for name in names:
            people.join(invite, name)
        self.tails = [Tail(people.folder / name / "journal.jsonl") for name in names]
        self.commits: dict[int, float] = {}
        """Step → when the first peer had committed it, in Unix seconds."""
        until(lambda: self.look() >= 3, lambda: f"three rounds: {people.started[-1]}", START_SECONDS)

    def look(self) -> int:
        """Read what there is to read; how many steps were taken so far."""
        for tail in self.tails:
            for record in tail.read():
                if record["event"] == "round_committed":
                    self.commits.setdefault(record["step"], moment(record))
        return len(self.commits)

    def tell(self, what: signal.Signals) -> None:
        """All of its processes."""
        for process in self.people.started:
            with suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.process.pid)
                for each in (family, *family.children(recursive=True)):
                    with suppress(psutil.NoSuchProcess):
                        os.kill(each.pid, what)

    def step_seconds(self, seconds: float) -> float:
        """What a step takes, while only this swarm trains."""
        self.tell(signal.SIGCONT)
        time.sleep(SETTLE_SECONDS)
        began = time.time()
        time.sleep(seconds)
        ended = time.time()
        self.tell(signal.SIGSTOP)
        self.look()
        steps = sum(began <= at < ended for at in self.commits.values())
        assert steps, f"no step in {seconds:g} s"
        return (ended - began) / steps


@contextmanager
def swarm(folder: Path, run: RunConfig, peers: int) -> Iterator[Swarm]:
    """It stands still until it is measured, and is gone afterwards."""
    with crew(folder) as people:
        there = Swarm(people, run, peers)
        there.tell(signal.SIGSTOP)
        try:
            yield there
        finally:
            there.tell(signal.SIGCONT)
            for tail in there.tails:
                tail.close()


def measure(peers: int, windows: int, seconds: float, audit: float) -> dict[str, Any]:
    """See the module."""
    run = RunConfig(run_id="cost", total_steps=10_000_000, target_batch_size=16 * peers)
    with (
        tempfile.TemporaryDirectory() as folder,
        swarm(Path(folder) / "plain", run, peers) as plain,
        swarm(Path(folder) / "audited", run.model_copy(update={"audit": audit}), peers) as audited,
    ):
        took = [(plain.step_seconds(seconds), audited.step_seconds(seconds)) for _ in range(windows)]
    return {
        "peers": peers,
        "audit": audit,
        "step_seconds": round(statistics.median(without for without, _ in took), 4),
        "audited_step_seconds": round(statistics.median(with_audits for _, with_audits in took), 4),
        "more_time": round(statistics.median(more / less for less, more in took) - 1, 4),
        "of_each_pair": [round(more / less - 1, 3) for less, more in took],
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="What audits cost a run.")
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--windows", type=int, default=10, help="of each swarm")
    parser.add_argument("--seconds", type=float, default=15.0, help="each")
    parser.add_argument("--audit", type=float, default=1.0, help="share of the spans that are audited")
    given = parser.parse_args()
    report = measure(given.peers, given.windows, given.seconds, given.audit)
    print(json.dumps(report | {"target": f"more_time <= {MOST_SHARE}"}, indent=1))
    return int(report["more_time"] > MOST_SHARE)


if __name__ == "__main__":
    sys.exit(main())
