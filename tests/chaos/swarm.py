"""A swarm in the lab: a bootstrap and peers as real commands, each on a host of its own, and what they tell.

`Swarm` is a rehearsal (`peers.rehearsal`) that breaks no silence: every wait has a deadline and says what it
waited for. A `with` block that ends without an error asks everybody to leave and holds I1 to I6 against what
they wrote, what they left, and what their metrics said. Not covered: the faults themselves; `lab` has those.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from p2ptrain.config import PeerConfig, RunConfig
from p2ptrain.swarm.access import decode, encode
from p2ptrain.tasks import build_task
from peers.chronicle import Record, moment
from peers.ledger import Ledger
from peers.rehearsal import Child, Rehearsal
from tests.chaos.audit import audit
from tests.chaos.lab import Lab

LOOK_SECONDS = 0.05
START_SECONDS = 60.0
"""For a process to be ready, on a busy machine."""
GONE_SECONDS = 5.0
"""After its end, for the kernel to take a process away."""
METRICS_PORT = 9100
"""On each peer's own loopback."""


class Failed(Exception):
    """The swarm did not do what the row demands; the message says what was expected and what was seen."""


class Swarm:
    """Real processes in a lab; see the module. A context manager, in which all peers train together."""

    def __init__(
        self,
        lab: Lab,
        run: RunConfig,
        *,
        peers: int,
        peer_file: Mapping[str, Any],
        tells: str | None,
        forks: bool,
    ) -> None:
        """`tells`: the beginning of the metric that must have risen on some peer since all trained (I6);
        None if no metric is there for this fault. `forks`: the fault may part the log for a while."""
        self.lab, self.run = lab, run
        self.told: dict[str, list[Record]] = {}
        """By peer, all that its journal has said."""
        self.kills = 0
        self.tells, self.forks = tells, forks
        self._ledger = Ledger(run.target_batch_size)
        self._settings = {
            "eval_every_steps": 0,
            "metrics_port": METRICS_PORT,
            **peer_file,
        }
        self.stage = Rehearsal(run, lab.folder, self._heard)
        self.states_compared = 0
        """Once it has ended."""
        self._everyone = [f"peer-{number + 1}" for number in range(peers)]
        self._inside: dict[str, Sequence[str]] = {}
        self._stack = ExitStack()
        self._seen: dict[int, psutil.Process] = {}
        self._counted: dict[tuple[str, int | None], float] = {}  # what `tells` says, by peer and process
        self._before: dict[tuple[str, int | None], float] = {}
        self._looked_at = 0.0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._end)
            stack.enter_context(self.stage)
            self.start_bootstrap()
            for name in self._everyone:
                self.add(name)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if error is None:
                self._finish()

    def _end(self) -> None:
        """Nothing that was ever seen is there afterwards."""
        for process in self._seen.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._seen.values(), timeout=GONE_SECONDS)

    # -- who is there ----------------------------------------------------------------------------------------

    @property
    def peers(self) -> dict[str, Child]:
        return self.stage.peers

    @property
    def bootstrap(self) -> Child:
        return self.stage.bootstrap

    def start_bootstrap(self) -> None:
        """The first time, or again on the same host."""
        ready = len(self.stage.invites())
        if self.bootstrap.pid is None:
            listen, inside = self.lab.place("bootstrap")
            self.stage.make_bootstrap(listen, (*inside, *self.environment()))
        self.bootstrap.start()
        self.wait(lambda: len(self.stage.invites()) > ready, "the bootstrap is ready", START_SECONDS)

    def place(self, name: str, *, behind_nat: bool = False) -> tuple[str, Sequence[str]]:
        """(address to listen on, words before a command) on that name's host, which is made the first
        time."""
        return (self.lab.place_behind_nat if behind_nat else self.lab.place)(name)

    def add(
        self,
        name: str,
        *,
        inside: Sequence[str] = (),
        through: Sequence[str] = (),
        invite: str = "",
        behind_nat: bool = False,
        start: bool = True,
        **settings: Any,
    ) -> Child:
        """A peer on a new host. `inside`: words before the command that puts it there, such as
        `Group.inside`; `through`: words right before it, such as `victims.rogue`; `settings`: of its peer
        file."""
        listen, there = self.place(name, behind_nat=behind_nat)
        child = self.stage.make_peer(
            name,
            PeerConfig(**{**self._settings, "listen": (listen,), **settings}),
            listen,
            inside=(*inside, *there, *self.environment(), *through),
            invite=invite,
        )
        self.told[name] = []
        if start:
            child.start()
        return child

    def invite(self, name: str) -> str:
        """An invite that leads to that peer, as the bootstrap's does to the bootstrap."""
        peer = self.last(name, "joined")["peer"]
        address = f"/ip4/{self.lab.address(name)}/tcp/31337/p2p/{peer}"
        return encode(decode(self.stage.invites()[-1]).model_copy(update={"addresses": (address,)}))

    def living(self) -> list[str]:
        """Peers whose process runs."""
        return [name for name, child in self.peers.items() if child.running]

    def kill(self, name: str) -> None:
        """SIGKILL, a peer's or the bootstrap's."""
        self.count()  # what its metrics said so far
        self.kills += 1
        self._child(name).kill()
        self.stage.look()

    def disown(self, name: str) -> None:
        """End that peer, and forget all that it told: a liar's word is no evidence."""
        self.kill(name)
        self.told.pop(name)
        self.stage.forget(name)

    def restart(self, name: str) -> None:
        """Start it again, with all that it kept on disk."""
        if name == "bootstrap":
            self.start_bootstrap()
        else:
            self._child(name).start()

    def _child(self, name: str) -> Child:
        return self.bootstrap if name == "bootstrap" else self.peers[name]

    def environment(self) -> tuple[str, ...]:
        """Words before a command, behind those of its host: its temporary files are in this lab's folder."""
        folder = self.lab.folder / "t"
        folder.mkdir(exist_ok=True)
        return ("env", f"TMPDIR={folder}")

    # -- waiting ---------------------------------------------------------------------------------------------

    def wait(self, until: Callable[[], Any], what: str, seconds: float) -> float:
        """Look on until it holds; the seconds that it took. Raises Failed after that time, and when a
        process ends that was not meant to."""
        began = time.monotonic()
        while True:
            self.look()
            if until():
                return time.monotonic() - began
            if time.monotonic() - began > seconds:
                raise Failed(f"not within {seconds:g} s: {what}; {self.summary()}")
            time.sleep(LOOK_SECONDS)

    def watch(self, seconds: float) -> None:
        """Look on for so long."""
        began = time.monotonic()
        self.wait(lambda: time.monotonic() - began >= seconds, "the time is over", seconds + 60)

    def look(self) -> None:
        """Read what there is to read. Raises Failed if a process has ended that was not meant to."""
        if self.stage.interrupts.count:
            raise KeyboardInterrupt
        self.stage.look()
        for child in (self.bootstrap, *self.peers.values()):
            if child.status is not None and not child.awaited:
                raise Failed(str(child.fault()))
        if time.monotonic() - self._looked_at > 1:
            self._looked_at = time.monotonic()
            for child in (self.bootstrap, *self.peers.values()):
                for process in child.family():
                    self._seen[process.pid] = process

    def together(self, names: Sequence[str] = (), seconds: float = START_SECONDS) -> float:
        """Wait until these peers (none named: all that run) have committed a round of just so many; how
        long it took."""
        everyone = list(names) or self.living()
        since = time.time()

        def one_round() -> bool:
            last = [self.commits(name, since)[-1:] for name in everyone]
            rounds = {(each[0]["step"], each[0]["lineage"]) for each in last if each}
            return (
                all(last)
                and all(each[0]["peers"] == len(everyone) for each in last)
                and max(step for step, _ in rounds) - min(step for step, _ in rounds) <= 1
            )

        took = self.wait(one_round, f"a round of {', '.join(everyone)}", seconds)
        if not self._before:
            self._before = self.count()
        return took

    def wait_steps(self, steps: int, seconds: float, by: Sequence[str] = ()) -> float:
        """Wait until one of these peers (none named: any) has committed so many more; how long it took."""
        target = self.step(by) + steps
        return self.wait(
            lambda: self.step(by) >= target, f"step {target} by {', '.join(by) or 'anybody'}", seconds
        )

    # -- what they tell --------------------------------------------------------------------------------------

    def events(self, name: str, event: str, since: float = 0.0) -> list[Record]:
        """Of that peer, from that moment (Unix time) on."""
        return [record for record in self.told[name] if record["event"] == event and moment(record) >= since]

    def last(self, name: str, event: str) -> Record:
        """Raises Failed if there was none."""
        if not (found := self.events(name, event)):
            raise Failed(f"{name} told of no {event}; {self.summary()}")
        return found[-1]

    def commits(self, name: str, since: float = 0.0) -> list[Record]:
        """Rounds that this peer committed."""
        return self.events(name, "round_committed", since)

    def step(self, names: Sequence[str] = ()) -> int:
        """The furthest of these peers (none named: of all)."""
        return max((self.stage.chronicle.peers[name].step for name in names or self.peers), default=0)

    def commit_times(self, since: float, until: float, names: Sequence[str] = ()) -> list[float]:
        """When each entry was first committed by one of these peers (none named: all), in order."""
        first: dict[tuple[int, str], float] = {}
        for name in names or self.told:
            for record in self.commits(name, since):
                key = (record["step"], record["lineage"])
                first[key] = min(first.get(key, float("inf")), moment(record))
        return sorted(at for at in first.values() if at <= until)

    def rate(self, since: float, until: float, names: Sequence[str] = ()) -> float:
        """Commits per second in that time."""
        return len(self.commit_times(since, until, names)) / (until - since)

    def pace(self, seconds: float) -> float:
        """Commits per second over the next so many: the fault-free run to compare with."""
        since = time.time()
        self.watch(seconds)
        rate = self.rate(since, time.time())
        if not rate:
            raise Failed(f"no commit in {seconds:g} s without any fault; {self.summary()}")
        return rate

    def samples(self, since: float = 0.0) -> dict[str, int]:
        """Samples of each peer in committed rounds."""
        return {name: sum(r["mine"] for r in self.commits(name, since)) for name in self.told}

    def given(self, names: Sequence[str], since: float, until: float) -> int:
        """Samples that these peers gave to rounds committed in that time."""
        return sum(r["mine"] for name in names for r in self.commits(name, since) if moment(r) <= until)

    def summary(self) -> str:
        """Where everybody is, in a line."""
        where = [
            f"{name} {story.doing} at step {story.step}"
            + ("" if self.peers[name].running else " (not running)")
            for name, story in self.stage.chronicle.peers.items()
        ]
        return "; ".join(where) or "no peer yet"

    def metrics(self, name: str) -> dict[str, float]:
        """Every series of that peer's page. Raises OSError if it does not answer."""
        return self.lab.within(name, lambda: _scrape(f"http://127.0.0.1:{METRICS_PORT}/metrics"))

    def values(self) -> int:
        """Values of the model, and so of a gradient."""
        model = build_task(self.run).build_model(0)
        return sum(parameter.numel() for parameter in model.parameters())

    def run_command(self, name: str, *words: str) -> str:
        """What `p2ptrain` with these words says on that peer's host, within 60 s, on stdout and stderr."""
        command = [
            *self.lab.hosts.hosts[name].inside,
            str(Path(sys.executable).with_name("p2ptrain")),
            *words,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    def memory_slopes(self, seconds: float, *, settle_seconds: float) -> dict[str, float]:
        """Growth of each process's memory in MB per minute, over so many seconds; those at first do not
        count."""
        points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        began = time.monotonic()
        while (now := time.monotonic() - began) < seconds:
            self.watch(1)
            for child in (self.bootstrap, *self.peers.values()):
                for number, process in enumerate(child.family()):
                    with suppress(psutil.NoSuchProcess):
                        if now >= settle_seconds:
                            owner = child.name if number == 0 else f"{child.name} p2pd"
                            points[owner].append((now, process.memory_info().rss / 1e6))
        return {
            name: 60 * statistics.linear_regression(*zip(*line, strict=True)).slope
            for name, line in points.items()
            if len(line) >= 3
        }

    # -- the invariants --------------------------------------------------------------------------------------

    def _heard(self, name: str, record: Record) -> None:
        self.told[name].append(record)
        self._ledger.observe(name, record)

    def count(self) -> dict[tuple[str, int | None], float]:
        """The most that the metric `tells` has said so far on every peer, now included: for one that falls
        again, call it while the fault lasts."""
        for name in self.living():
            with suppress(OSError):
                if self.tells is not None:
                    series = self.metrics(name)
                    total = sum(value for key, value in series.items() if key.startswith(self.tells))
                    key = name, self.peers[name].pid
                    self._counted[key] = max(total, self._counted.get(key, 0.0))
        return dict(self._counted)

    def _finish(self) -> None:
        """All leave; then I1 to I6."""
        self.look()
        counted = self.count()
        self.stage.leave()
        problems = [self.stage.problem] if self.stage.problem else []
        found = audit(self.told, forks=self.forks)
        self.states_compared = found.states_compared
        problems += found.problems
        problems += [f"I1: {difference}" for difference in self.stage.chronicle.differences()]
        if len([name for name in self.told if self.commits(name)]) > 1 and not found.states_compared:
            problems.append("I1: no two peers ever hashed one state, so nothing was compared")
        problems += self._left_over()
        if self.tells is not None:
            rose = sum(max(0.0, value - self._before.get(key, 0.0)) for key, value in counted.items())
            if not rose:
                problems.append(
                    f"I6: the metric {self.tells} rose on no peer, so it did not tell of the fault"
                )
        if problems:
            raise Failed("; ".join(problems[:4]))

    def _left_over(self) -> list[str]:
        """I4: what is still there after the end."""
        problems = []
        _, alive = psutil.wait_procs(self._seen.values(), timeout=GONE_SECONDS)
        if alive or (others := self.lab.processes()):
            left = [process.pid for process in alive] or others
            problems.append(f"I4: {len(left)} processes outlived the swarm, and with them their sockets")
        # Nobody can clear up after a process that is killed but itself, started again.
        folders = list((self.lab.folder / "t").iterdir())
        if len(folders) > self.kills:
            problems.append(
                f"I4: {len(folders)} temporary folders are left and {self.kills} processes were killed: "
                f"{', '.join(folder.name for folder in folders[:3])}"
            )
        return problems


_SERIES = re.compile(r"^([a-zA-Z_:][^ ]*(?:\{.*\})?) ([^ ]+)$", re.MULTILINE)


def _scrape(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=5) as page:
        return {name: float(value) for name, value in _SERIES.findall(page.read().decode())}
