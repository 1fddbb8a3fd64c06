"""`p2ptrain chaos`: a rehearsal swarm on this machine goes through faults, and a receipt says how it fared.

`faults` decides what happens, `ledger` counts, `rehearsal` has the processes; here one is done to the other.

Not covered: faults of machines, such as a full disk, lost packets, or a clock that jumps. All peers share the
processors of this machine, so a start takes time from those who train; only a crowd gets half of them.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]
from rich.console import Console

from p2ptrain.config import PeerConfig, RunConfig, run_digest
from p2ptrain.errors import ConfigError, Unreachable
from p2ptrain.events import duration
from peers.chaos_receipt import Crowd, Heldout, Receipt, Twin, beside_twin
from peers.chronicle import Record, moment
from peers.display import display
from peers.faults import BOOTSTRAP, NO_KIND, Kind, Mend, Plan, Recovered, Storm, Strike
from peers.ledger import Ledger, slope_per_minute, spread
from peers.passes import Passes
from peers.rehearsal import (
    LOOK_SECONDS,
    PATIENCE_SECONDS,
    Child,
    Rehearsal,
    RehearsalFailed,
    new_folder,
    peer_config,
)
from peers.sites import Site, half, site

EVAL_EVERY_STEPS = 20
CHECKPOINT_EVERY_STEPS = 10
"""Often, so that a restarted peer need not go back far: whether it can replay is up to `log_megabytes`."""
MEMORY_SECONDS = 2.0
"""Between two looks at the memory of all processes."""
GONE_SECONDS = 5.0
"""After the end, for the kernel to take away what was left."""


@dataclass(frozen=True)
class Options:
    """What the caller wants the swarm to go through."""

    run: RunConfig
    peers: int
    max_peers: int
    seconds: float
    """How long faults go on, from the first round with all peers in it."""
    kinds: tuple[Kind, ...]
    rate: float
    """Faults per second."""
    seed: int
    absence_seconds: float
    log_megabytes: int
    """As in a peer file."""
    megabits: float | None
    """Per second that each host may send and receive, None for what the machine can."""
    twin: Twin | None
    peer: PeerConfig
    """What the peers' own files say, but for what two on one machine cannot share."""


def chaos(options: Options, console: Console) -> Receipt:
    """Play it from the first process to the last, and tell it on the console meanwhile.

    Raises RehearsalFailed if the swarm did not even begin, ConfigError for a text that is not named or a twin
    of another run, and LocalFault where the network cannot be parted.
    """
    if options.twin is not None and options.twin.run_digest != run_digest(options.run):
        raise ConfigError("--twin must be the receipt of the same run; this one is of another run file")
    with site(apart=Kind.PARTITION in options.kinds, megabits=options.megabits) as where:
        return _Chaos(options, where, console).play()


class _Over(Exception):
    """Ctrl-C, or the run is complete: there is nothing more to put the swarm through."""


class _Chaos:
    """The rehearsal, the storm, and what is counted."""

    def __init__(self, options: Options, where: Site, console: Console) -> None:
        self._options, self._where, self._console = options, where, console
        self._config = peer_config(options.run, options.peers, options.peer).model_copy(
            update={
                "log_megabytes": options.log_megabytes,
                "eval_every_steps": EVAL_EVERY_STEPS,
                "checkpoint_every_steps": CHECKPOINT_EVERY_STEPS,
            }
        )
        self._stage = Rehearsal(options.run, new_folder("chaos"), self._heard)
        self._ledger = Ledger(options.run.target_batch_size)
        self._passes = Passes()
        self._storm: Storm | None = None
        self._began = self._struck_at = time.time()
        self._ended: float | None = None
        self._used = 0
        self._crowd: Strike | None = None
        self._crowd_at = 0.0
        self._faults: Counter[str] = Counter()
        self._down: set[str] = set()  # whose end is known
        self._ready_before = 0  # how often the bootstrap was ready before its last start
        self._rejoins: dict[str, list[float]] = {"log": [], "snapshot": []}
        self._problems: list[str] = []
        self._memory: dict[tuple[str, int], list[tuple[float, float]]] = {}  # by name and process, in MB
        self._memory_at = 0.0
        self._seen: dict[int, psutil.Process] = {}

    def play(self) -> Receipt:
        """From the first process to the last; all have ended when it returns or raises."""
        stage, title = self._stage, f"p2ptrain chaos: {self._options.run.run_id}"
        with stage, display(self._console, stage.chronicle, self._began, None, title) as stage.display:
            try:
                self._begin()
                self._rage()
                self._calm()
            except _Over:
                self._undo()
            # What is left undone from here on is not the faults' doing.
            self._ended, self._used = time.time(), sum(stage.chronicle.rounds().values())
            interrupted = bool(stage.interrupts.count)
            stage.leave()
            self._count_processes(time.time())
        _, left = psutil.wait_procs(list(self._seen.values()), timeout=GONE_SECONDS)
        return self._receipt(self._ended, interrupted, len(left))

    # -- the three acts --------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Until all peers have been in one round."""
        stage, everyone = self._stage, self._options.peers
        listen, inside = self._where.place(BOOTSTRAP)
        stage.make_bootstrap(listen, (*inside, *self._processors(BOOTSTRAP))).start()
        if not self._watch(lambda: bool(stage.invites()), PATIENCE_SECONDS):
            raise RehearsalFailed(
                f"the bootstrap was not ready after {PATIENCE_SECONDS:.0f} s: {stage.bootstrap.last_words()}"
            )
        stage.note(f"the bootstrap is ready; everything is kept in {stage.folder}")
        for number in range(everyone):
            self._start_another(f"peer-{number + 1}")
        if not self._watch(lambda: stage.chronicle.roster_size >= everyone, PATIENCE_SECONDS):
            raise RehearsalFailed(
                f"there was no round with all {everyone} peers within {PATIENCE_SECONDS:.0f} s; "
                f"is this machine overloaded? The logs are in {stage.folder}"
            )

    def _rage(self) -> None:
        """Faults, until their time is over."""
        options = self._options
        plan = Plan(
            kinds=options.kinds,
            rate=options.rate,
            absence_seconds=options.absence_seconds,
            silence_seconds=options.run.silence_seconds,
            max_peers=options.max_peers,
            seed=options.seed,
        )
        self._began = self._struck_at = time.time()
        self._storm = Storm(plan, self._stage.peers, self._began)
        names = ", ".join(options.kinds) or NO_KIND
        self._stage.note(
            f"all {options.peers} peers train; for {duration(options.seconds)} there are faults "
            f"({names}; seed {options.seed})"
        )
        self._watch(lambda: False, options.seconds)

    def _calm(self) -> None:
        """No more faults, until all have recovered."""
        storm, ledger = self._storm, self._ledger
        assert storm is not None
        storm.calm(time.time())
        self._stage.note("no more faults; whoever is away comes back")
        if not self._watch(lambda: storm.over and ledger.last_commit_at > self._struck_at, PATIENCE_SECONDS):
            who = ", ".join(storm.unrecovered) or "nobody committed a round"
            self._problems.append(f"not recovered {PATIENCE_SECONDS:.0f} s after the last fault: {who}")

    def _undo(self) -> None:
        """What is stopped or apart could not even leave."""
        self._where.heal()
        for child in self._stage.peers.values():
            child.go_on()

    # -- watching --------------------------------------------------------------------------------------------

    def _watch(self, until: Callable[[], bool], seconds: float) -> bool:
        """Look on, and do what is due, until a condition holds or the time is over; False for the latter.

        Raises _Over after Ctrl-C and when the run is complete; before the storm, RehearsalFailed if a process
        has broken.
        """
        deadline = time.monotonic() + seconds
        while not until():
            if self._stage.interrupts.count:
                self._stage.note("Ctrl-C: once more to stop now")
                raise _Over
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOOK_SECONDS)
            self._stage.look()
            now = time.time()
            self._notice_ends(now)
            if now - self._memory_at >= MEMORY_SECONDS:
                self._count_processes(now)
            if self._storm is not None:
                self._notice_bootstrap(self._storm, now)
                for deed in self._storm.due(now):
                    self._do(deed)
        return True

    def _heard(self, name: str, record: Record) -> None:
        """The next line of a peer's journal."""
        if self._ended is not None:
            return
        self._ledger.observe(name, record)
        self._passes.observe(record)
        if self._storm is not None and record["event"] == "round_committed":
            for recovered in self._storm.committed(name, record["lineage"], moment(record)):
                self._recovered(recovered)

    def _notice_ends(self, now: float) -> None:
        stage = self._stage
        for child in (stage.bootstrap, *stage.peers.values()):
            if child.status is None or child.name in self._down:
                continue
            if self._storm is None:
                raise child.fault()
            self._down.add(child.name)
            stage.look()
            self._ledger.gone(child.name, now)
            self._judge_end(child)
            self._storm.ended(child.name, now)

    def _judge_end(self, child: Child) -> None:
        stage = self._stage
        if child.awaited and child.status in (0, -signal.SIGTERM):
            stage.note(f"{child.name} has left")
        elif child.status == 0 and child.name in stage.peers:
            stage.note(f"{child.name} has completed the run")
            raise _Over
        elif child.status == Unreachable.exit_code:
            stage.note(f"{child.name} found no way in, and will try again: {child.fault()}")
        else:
            self._problems.append(str(child.fault()))
            stage.note(self._problems[-1])

    def _notice_bootstrap(self, storm: Storm, now: float) -> None:
        if len(self._stage.invites()) > self._ready_before:
            for recovered in storm.ready(now):
                self._recovered(recovered)

    def _count_processes(self, now: float) -> None:
        """Remember every process that there is, and how much memory it has."""
        self._memory_at = now
        names = {child.pid: child.name for child in (self._stage.bootstrap, *self._stage.peers.values())}
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(os.getpid()).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    # A daemon's parent is its peer.
                    owner = names.get(process.pid) or f"{names.get(process.ppid(), 'another')} p2pd"
                    self._seen[process.pid] = process
                    points = self._memory.setdefault((owner, process.pid), [])
                    points.append((now, process.memory_info().rss / 1e6))

    # -- doing -----------------------------------------------------------------------------------------------

    def _start_another(self, name: str) -> None:
        listen, inside = self._where.place(name)
        inside = (*inside, *self._processors(name))
        self._stage.make_peer(name, self._config, listen, inside).start()
        self._ledger.restarted(name)

    def _processors(self, name: str) -> tuple[str, ...]:
        """Words that keep a process off the crowd's processors, or on them.

        In life, newcomers load their modules on machines of their own.
        """
        if Kind.CROWD not in self._options.kinds:
            return ()
        return half(second=self._crowd is not None and name in self._crowd.on)

    def _do(self, deed: Strike | Mend) -> None:
        match deed:
            case Strike():
                self._faults[deed.kind] += 1
                self._struck_at = time.time()
                if deed.kind is Kind.CROWD:
                    self._crowd, self._crowd_at = deed, self._struck_at
                self._strike(deed.kind, deed.on)
            case Mend():
                self._mend(deed.kind, deed.on)

    def _strike(self, kind: Kind, on: tuple[str, ...]) -> None:
        stage, name, at = self._stage, on[0], time.time()
        match kind:
            case Kind.KILL | Kind.BOOTSTRAP:
                child = stage.peers.get(name, stage.bootstrap)
                self._down.add(name)
                child.kill()
                self._told(name, "killed", f"{name} is killed (SIGKILL)")  # and its last lines are read
                self._ledger.gone(name, at, killed=True)
            case Kind.LEAVE:
                stage.peers[name].leave()
                self._ledger.gone(name, at)
                self._told(name, "leaving", f"{name} is asked to leave (SIGTERM)")
            case Kind.PAUSE:
                stage.peers[name].stop()
                self._ledger.gone(name, at)
                self._told(name, "paused", f"{name} is stopped (SIGSTOP)")
            case Kind.PARTITION:
                self._where.part(on)
                stage.note(f"the network is cut: {', '.join(on)} on one side")
            case Kind.SPAWN | Kind.CROWD:
                for each in on:
                    self._start_another(each)
                stage.note(f"{name} comes" if len(on) == 1 else f"{name} to {on[-1]} come at once")

    def _mend(self, kind: Kind, on: tuple[str, ...]) -> None:
        stage, name, at = self._stage, on[0], time.time()
        match kind:
            case Kind.BOOTSTRAP:
                self._ready_before = len(stage.invites())
                stage.bootstrap.start()
                self._down.discard(name)
                stage.note("the bootstrap is started again")
            case Kind.PAUSE:
                stage.peers[name].go_on()
                self._ledger.went_on(name)
                self._told(name, "waking", f"{name} goes on (SIGCONT)")
            case Kind.PARTITION:
                self._where.heal()
                stage.note("the network is whole again")
            case Kind.KILL | Kind.LEAVE | Kind.SPAWN | Kind.CROWD:
                stage.chronicle.restarted(name, at)
                self._ledger.restarted(name)
                stage.peers[name].start()
                self._down.discard(name)
                stage.note(f"{name} is started again")

    def _told(self, name: str, doing: str, text: str) -> None:
        if name in self._stage.chronicle.peers:
            self._stage.chronicle.peers[name].doing = doing
        self._stage.note(text)

    def _recovered(self, recovered: Recovered) -> None:
        """Not shown at once: this may be in the middle of a look."""
        after, name = duration(recovered.seconds), recovered.on[0]
        match recovered.kind:
            case Kind.KILL | Kind.LEAVE:  # the chronicle tells of it
                self._rejoins[self._ledger.caught_up_by(name)].append(recovered.seconds)
                return
            case Kind.SPAWN | Kind.CROWD:
                self._rejoins[self._ledger.caught_up_by(name)].append(recovered.seconds)
                text = f"{name} takes part, {after} after its start"
            case Kind.PAUSE:
                text = f"{name} takes part again, {after} after it went on"
            case Kind.BOOTSTRAP:
                text = f"the bootstrap is ready again, {after} after its start"
            case Kind.PARTITION:
                text = f"both sides were in one round, {after} after the network was whole"
        self._stage.chronicle.note(time.time(), text)

    # -- telling ---------------------------------------------------------------------------------------------

    def _receipt(self, ended: float, interrupted: bool, left_over: int) -> Receipt:
        ledger, chronicle, storm = self._ledger, self._stage.chronicle, self._storm
        heldout, twin = self._heldout(), self._options.twin
        # Interrupted, the two sides of a cut may still be apart.
        differences = chronicle.faults if interrupted else chronicle.differences()
        left = f"{left_over} processes outlived the rehearsal" if left_over else ""
        part = ledger.participation(self._began, ended)
        samples, data = ledger.samples(self._used), self._passes.account(chronicle.held())
        miscounted = data is not None and (data.repeated or data.lost > samples.lost)
        unfair = f"the ledger of samples is wrong: {data}" if miscounted else ""
        return Receipt(
            seconds=round(ended - self._began, 1),
            run_digest=run_digest(self._options.run),
            seed=self._options.seed,
            peers=len(self._stage.peers),
            faults={kind: self._faults[kind] for kind in self._options.kinds},
            failed_starts=storm.failed_starts if storm is not None else 0,
            steps=chronicle.steps,
            rounds_attempted=ledger.attempted,
            rounds_committed=ledger.committed,
            samples=samples,
            data=data,
            participation=None if part is None else round(part, 3),
            resume_seconds=ledger.resumed(),
            survivors_gave_up=ledger.survivors_gave_up(),
            rejoin_by_replay_seconds=spread(self._rejoins["log"]),
            rejoin_by_snapshot_seconds=spread(self._rejoins["snapshot"]),
            crowd=self._crowd_figures(ended),
            longest_gap_seconds=round(ledger.longest_gap_seconds(self._began, ended), 2),
            lineages=ledger.lineages,
            died_out=ledger.died_out,
            rollbacks=ledger.rollbacks,
            states_compared=chronicle.compared,
            digests_equal=not differences,
            heldout=heldout,
            beside_twin=beside_twin(heldout, twin.heldout) if twin is not None else None,
            memory_mb_per_minute=self._slopes(),
            left_over=left_over,
            interrupted=interrupted,
            folder=str(self._stage.folder),
            problem="; ".join(
                filter(None, [*differences[:3], *self._problems[:3], self._stage.problem, left, unfair])
            ),
        )

    def _heldout(self) -> list[Heldout]:
        """Once per step, in their order; where logs had parted, what was measured last."""
        rounds, points = self._stage.chronicle.rounds(), []
        losses = {figures.step: figures.loss for figures in self._stage.chronicle.heldout}
        for step, loss in sorted(losses.items()):
            before = sum(samples for each, samples in rounds.items() if each < step)
            points.append(Heldout(step, before, loss))
        return points

    def _crowd_figures(self, ended: float) -> Crowd | None:
        if self._crowd is None:
            return None
        ledger, at, names = self._ledger, self._crowd_at, self._crowd.on
        all_in = ledger.took_part(names, at)
        return Crowd(
            joiners=len(names),
            all_in_seconds=None if all_in is None else round(all_in - at, 2),
            samples_per_second_before=round(ledger.samples_per_second(self._began, at), 1),
            samples_per_second_meanwhile=round(ledger.samples_per_second(at, all_in or ended), 1),
        )

    def _slopes(self) -> dict[str, float]:
        slopes = {}
        for (name, _), points in sorted(self._memory.items(), key=lambda life: len(life[1])):
            if (slope := slope_per_minute(points)) is not None:
                slopes[name] = round(slope, 2)
        return dict(sorted(slopes.items()))
