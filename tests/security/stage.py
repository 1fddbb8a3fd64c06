"""A live swarm of real processes that hostile ones are let loose on, and what is measured while they are.

The swarm is a private run: a bootstrap, and honest peers that came by invites. Whoever attacks does so from
the process of the tests, as a node of its own on libp2p, or as a volunteer that lies (`tests.chaos.rogue`).
Not covered: an attacker on the way between two peers, and one with more bandwidth than its victims.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from p2ptrain.records import PeerId
from p2ptrain.swarm.access import Invite, decode, encode
from p2ptrain.swarm.identity import Identity, load_or_create
from peers import control
from peers.chronicle import Record, Tail, moment
from peers.invites import ORGANIZER
from tests.swarm.processes import Crew, Process, crew, run_file, until

LISTEN = "/ip4/127.0.0.1/tcp/0"
READY_SECONDS = 120.0
TARGET_BATCH_SIZE = 64


class Stage:
    """The swarm, from its first round on."""

    def __init__(self, people: Crew, peers: int) -> None:
        self.people, self.folder = people, people.folder
        self.run_id = "fortress"
        self.run = run_file(self.folder, self.run_id, 10_000_000, TARGET_BATCH_SIZE)
        self.processes: dict[str, Process] = {}
        self.told: dict[str, list[Record]] = {}
        self.tails: dict[str, Tail] = {}
        self.bootstrap, _ = people.bootstrap(self.run, LISTEN, "--private", data_dir="organizer")
        self.invite = self.created("--name", "honest")
        self.honest = [f"peer-{number + 1}" for number in range(peers)]
        for name in self.honest:
            self.join(name, encode(self.invite))
        self.wait_rounds(self.honest, 3)

    # -- who is there ----------------------------------------------------------------------------------------

    @property
    def organizer(self) -> Identity:
        return load_or_create(self.folder / "organizer" / ORGANIZER)

    def command(self, *words: str) -> dict[str, Any]:
        """What the organizer's command with `--json` prints."""
        process = self.people.start(*words, "--data-dir", str(self.folder / "organizer"), "--json")
        assert process.end(60) == 0, process
        return process.result()

    def created(self, *words: str) -> Invite:
        return decode(str(self.command("invite", "create", str(self.run), *words)["invite"]))

    def join(self, name: str, invite: str, *, through: Sequence[str] = ()) -> Process:
        """A volunteer; `through`: words before the command, such as those of a rogue."""
        process = self.people.join(invite, name, inside=through)
        self.processes[name] = process
        self.told[name] = []
        self.tails[name] = Tail(self.folder / name / "journal.jsonl")
        return process

    def liar(self, name: str) -> Path:
        """A volunteer that behaves until its orders are there; where they go."""
        orders = self.folder / f"{name}.orders"
        rogue = (sys.executable, "-m", "tests.chaos.rogue", "--orders", str(orders))
        self.join(name, encode(self.invite), through=rogue)
        self.wait_rounds([name], 2)
        return orders

    def part(self, name: str) -> None:
        """End it; what a liar told is no evidence."""
        self.processes.pop(name).kill()
        self.told.pop(name)
        self.tails.pop(name).close()

    def status(self, name: str) -> dict[str, Any]:
        return control.ask(self.folder / name, {"ask": "status"})

    def peer_id(self, name: str) -> PeerId:
        return PeerId(self.status(name)["peer"])

    # -- what they tell --------------------------------------------------------------------------------------

    def look(self) -> None:
        """Read what there is to read. Fails if an honest process has ended."""
        for name, tail in self.tails.items():
            self.told[name] += tail.read()
        for name, process in [*self.processes.items(), ("bootstrap", self.bootstrap)]:
            ended = process.process.poll() is not None
            assert not (ended and name in (*self.honest, "bootstrap")), f"{name} ended: {process}"

    def watch(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.look()
            time.sleep(0.1)

    def wait_rounds(self, names: Sequence[str], count: int) -> None:
        """Until each of these has committed so many more."""
        self.look()
        before = {name: len(self.commits(name)) for name in names}

        def there() -> bool:
            self.look()
            return all(len(self.commits(name)) >= before[name] + count for name in names)

        until(there, lambda: f"{count} rounds of {names}: {self.processes[names[0]]}", READY_SECONDS)

    def wait_for(self, name: str, event: str) -> Record:
        """That event of this peer."""

        def told() -> list[Record]:
            self.look()
            return [record for record in self.told[name] if record["event"] == event]

        found: list[Record] = until(told, lambda: f"{event}: {self.processes[name]}", READY_SECONDS)
        return found[-1]

    def commits(self, name: str) -> list[Record]:
        return [record for record in self.told[name] if record["event"] == "round_committed"]

    def events(self, event: str, since: float) -> list[Record]:
        """Of the honest peers."""
        told = [record for name in self.honest for record in self.told[name] if record["event"] == event]
        return [record for record in told if moment(record) >= since]

    def steps_per_second(self, since: float, until_: float) -> float:
        """Committed entries, as the honest peers saw them."""
        entries = {
            (record["step"], record["lineage"])
            for name in self.honest
            for record in self.commits(name)
            if since <= moment(record) < until_
        }
        return len(entries) / (until_ - since)

    def megabytes(self) -> dict[str, float]:
        """Resident memory of each honest peer and of the bootstrap, with their daemons."""
        found = {}
        for name, process in [*((n, self.processes[n]) for n in self.honest), ("bootstrap", self.bootstrap)]:
            total = 0.0
            with suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.process.pid)
                for each in (family, *family.children(recursive=True)):
                    with suppress(psutil.NoSuchProcess):
                        total += each.memory_info().rss / 1e6
            found[name] = total
        return found

    def wrong_bytes(self) -> int:
        """Steps at which two honest peers were at one position and did not have the same bytes, or went on
        from one entry to different ones."""
        self.look()
        lineages: dict[int, set[str]] = {}
        digests: dict[tuple[int, str], set[str]] = {}
        for name in self.honest:
            for record in self.told[name]:
                if record["event"] == "round_committed":
                    lineages.setdefault(record["step"], set()).add(record["lineage"])
                elif record["event"] == "state_hashed":
                    where = record["step"], record["lineage"]
                    digests.setdefault(where, set()).add(record["state_digest"])
        return sum(len(each) > 1 for each in (*lineages.values(), *digests.values()))

    def largest_norm(self, since: float) -> float:
        """Of the averaged gradients that were applied since then."""
        return max((record["gradient_norm"] for record in self.events("round_committed", since)), default=0.0)

    def lied(self, name: str) -> list[dict[str, Any]]:
        """What a liar says that it did."""
        lines = self.processes[name].errors.read_text().splitlines()
        return [json.loads(line.removeprefix("rogue: ")) for line in lines if line.startswith("rogue: ")]


@contextmanager
def swarm(folder: Path, peers: int) -> Iterator[Stage]:
    """All of it is gone afterwards."""
    with crew(folder) as people:
        stage = Stage(people, peers)
        try:
            yield stage
        finally:
            for tail in stage.tails.values():
                tail.close()
