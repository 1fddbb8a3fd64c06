"""`p2ptrain demo`: a bootstrap and some volunteers as real processes on this machine, watched from outside.

This process trains nothing. It starts the commands that anybody else would type, reads the journals that they
write, kills one volunteer half-way, starts it again, and in the end says what the journals prove. Whatever it
started ends with it, also when it is killed itself.

Not covered: anything but slowness when there are more peers than processor cores.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, Self

from rich.console import Console

from p2ptrain.config import PeerConfig, RunConfig, commented_toml
from p2ptrain.errors import ConfigError, P2PTrainError
from p2ptrain.events import clean
from peers.chronicle import Chronicle, Tail
from peers.display import Lines, Screen, sample_lines
from peers.places import made, user_data

LOOK_SECONDS = 0.1
"""Between two looks at the journals and the processes."""
ABSENCE_SECONDS = 1.5
"""How long the killed peer stays away."""
PATIENCE_SECONDS = 60.0
"""For each thing that a demo must show; on a slow machine it lasts longer for that than asked for."""
LEAVE_SECONDS = 20.0
"""For the peers to finish a round, save a checkpoint and leave; what is left then is killed."""
SAMPLE_SECONDS = 60.0
SAMPLE_LENGTH = 300
EVAL_EVERY_STEPS = 50

COMPLAINT = "p2ptrain: "
"""How a command begins the one sentence about what is wrong."""

_LISTEN = re.compile(r"(/ip[46]/[0-9A-Fa-f.:]+/tcp/)\d{1,5}")


class DemoFailed(P2PTrainError):
    """Something in the demo did not go as it must."""

    def __init__(self, message: str, exit_code: int = P2PTrainError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Options:
    """What the caller wants to see."""

    run: RunConfig
    peers: int
    seconds: float
    """From the start of the command until the peers are asked to leave."""
    listen: str
    """Where the bootstrap listens; the peers take free ports of the same address."""
    kill: bool
    corpus: str = ""
    """The text of a run whose corpus is not `stdlib`, as in a peer file."""


@dataclass(frozen=True)
class Receipt:
    """What the demo showed; also what `--json` prints. Losses are in nats per byte."""

    steps: int
    """The step that the swarm reached."""
    committed: int
    """Rounds that led there, as far as one of the peers was in them."""
    aborted: int
    """Attempts that led nowhere."""
    samples: int
    """That went into the committed rounds."""
    peers: int
    first_step_seconds: float | None
    """From the start of the command to the first committed step."""
    heldout_loss_first: float | None
    heldout_loss_last: float | None
    heldout_bits_per_byte: float | None
    zlib_bits_per_byte: float | None
    digests_equal: bool
    states_compared: int
    """States that more than one peer went through; `digests_equal` speaks of these."""
    kills: int
    rejoin_seconds: float | None
    """From the killed peer's restart until it had committed a round again."""
    checkpoint: str
    sample: str
    folder: str
    problem: str
    """What did not go as it must, as a sentence; empty if all did."""


def demo(options: Options, console: Console) -> Receipt:
    """Play it from the first process to the last, and show it on the console meanwhile.

    Raises DemoFailed if a process broke or no step was committed, ConfigError for an address that is none or
    a text that is not named.
    """
    # The command's own imports are part of the wait, and were all computing.
    started_at = time.time() - time.process_time()
    if not _LISTEN.fullmatch(options.listen):
        raise ConfigError(
            "--listen must be an IP address and TCP port, such as /ip4/0.0.0.0/tcp/31337, "
            f"not {options.listen!r}"
        )
    if options.run.task.corpus != "stdlib" and not options.corpus:
        raise ConfigError(
            f"run {options.run.run_id} trains on the text {options.run.task.corpus!r}; "
            "say with --corpus which file or folder that is"
        )
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path(tempfile.mkdtemp(prefix=f"demo-{stamp}-", dir=made(user_data())))
    return _Demo(options, folder, started_at, console).play()


# -- one process ---------------------------------------------------------------------------------------------


class Child:
    """One command of ours as a process with a folder of its own; it can be started again after its end."""

    def __init__(self, name: str, folder: Path, *arguments: str) -> None:
        """The folder is made; what the process prints is kept in it, in `output` and `log`."""
        self.name, self.folder = name, made(folder)
        self.output, self.log = folder / "output", folder / "log"
        self.awaited = False
        """Whether it is supposed to end."""
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; it must not be running."""
        self.awaited = False
        # -P: nothing in the current folder may pass for one of our modules.
        command = [sys.executable, "-P", "-m", "peers.offspring", str(os.getpid()), *self._arguments]
        with self.output.open("ab") as output, self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                start_new_session=True,  # the terminal's Ctrl-C is for the demo, which knows what to do first
            )

    @property
    def status(self) -> int | None:
        """The exit status, or minus the number of the signal that ended it; None if it runs or never did."""
        return None if self._process is None else self._process.poll()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def leave(self) -> None:
        """Ask it to finish what it does and end."""
        self.awaited = True
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """End it at once."""
        self.awaited = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def fault(self) -> DemoFailed:
        """Why it ended, now that it has."""
        last, status = "".join(self._last_lines(1)), self.status or 0
        if status > 0 and last.startswith(COMPLAINT):
            return DemoFailed(f"{self.name}: {last.removeprefix(COMPLAINT)}", status)
        return DemoFailed(f"{self.name} ended by itself: {self.last_words()}")

    def last_words(self) -> str:
        """How it ended, and what it said last."""
        words = clean(" / ".join(self._last_lines(3)), 600) or "it said nothing"
        match self.status:
            case None:
                how = "it runs"
            case int(status) if status < 0:
                how = f"ended by {signal.Signals(-status).name}"
            case status:
                how = f"exit status {status}"
        return f"{how}; {words} (all of it is in {self.log})"

    def _last_lines(self, count: int) -> list[str]:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-count:]


class Interrupts:
    """While entered, Ctrl-C and SIGTERM are counted and do nothing else."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _came(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


# -- the story -----------------------------------------------------------------------------------------------


class _Over(Exception):
    """Ctrl-C, or the run is complete: there is nothing more to watch."""


class _Demo:
    """The processes, what their journals tell, and the screen."""

    def __init__(self, options: Options, folder: Path, started_at: float, console: Console) -> None:
        """`started_at` is Unix time; `folder` gets the run file and a folder for each process."""
        self._options, self._folder, self._started_at = options, folder, started_at
        self._end = time.monotonic() + (started_at + options.seconds - time.time())
        (folder / "run.toml").write_text(commented_toml(options.run))
        names = [f"peer-{number + 1}" for number in range(options.peers)]
        self._chronicle = Chronicle(names)
        self._tails = {name: Tail(folder / name / "journal.jsonl") for name in names}
        self._bootstrap = self._make_bootstrap()
        self._peers: list[Child] = []
        self._sampler: Child | None = None
        self._interrupts = Interrupts()
        self._kills = 0
        self._problem = ""
        if console.is_terminal and console.encoding.startswith("utf"):
            title = f"p2ptrain demo: {options.run.run_id}"
            self._screen: Lines | Screen = Screen(
                console, self._chronicle, started_at, options.seconds, title
            )
        else:
            self._screen = Lines(console, self._chronicle, started_at)

    def play(self) -> Receipt:
        """From the first process to the last; all have ended when it returns or raises."""
        with ExitStack() as stack:
            stack.callback(self._kill_all)
            stack.enter_context(self._interrupts)
            with self._screen:
                with suppress(_Over):
                    self._train()
                self._leave()
                sample = self._sample()
            return self._receipt(sample)

    def _train(self) -> None:
        """Until the time is over; _Over if it is over sooner."""
        self._bootstrap.start()
        if not self._watch(lambda: self._invite() != "", self._patience()):
            raise DemoFailed(
                f"the bootstrap was not ready after {PATIENCE_SECONDS:.0f} s: {self._bootstrap.last_words()}"
            )
        self._note(f"the bootstrap is ready; everything is kept in {self._folder}")
        for name in self._chronicle.peers:
            peer = self._make_peer(name)
            self._peers.append(peer)
            peer.start()
        if not self._watch(lambda: self._chronicle.first_commit_at is not None, self._patience()):
            raise DemoFailed(
                f"no step was committed within {PATIENCE_SECONDS:.0f} s; is this machine overloaded? "
                f"The logs are in {self._folder}"
            )
        if self._options.kill and len(self._peers) > 1:
            self._kill_and_bring_back(self._peers[-1])
        self._watch(lambda: False, self._end)

    def _kill_and_bring_back(self, victim: Child) -> None:
        story = self._chronicle.peers[victim.name]
        half_way = self._end - self._options.seconds / 2
        everyone = len(self._peers)
        if not self._watch(
            lambda: time.monotonic() >= half_way and self._chronicle.roster_size == everyone, self._patience()
        ):
            self._problem = f"there was no round with all {everyone} peers, so none of them was killed"
            return
        victim.kill()
        self._look()  # at its last lines
        self._kills += 1
        story.doing = "killed"
        self._note(f"{victim.name} was killed (SIGKILL) at step {story.step}; the others go on")
        self._watch(lambda: False, time.monotonic() + ABSENCE_SECONDS)
        self._chronicle.restarted(victim.name, time.time())
        victim.start()
        self._note(f"{victim.name} is started again")
        if not self._watch(lambda: story.rejoin_seconds is not None, self._patience()):
            self._problem = (
                f"{victim.name} was not back in a round {PATIENCE_SECONDS:.0f} s after its restart: "
                f"{victim.last_words()}"
            )

    def _patience(self) -> float:
        """Until when to wait for what must come: to the end of the demo, but never for too short a time."""
        return max(self._end, time.monotonic() + PATIENCE_SECONDS)

    def _leave(self) -> None:
        """The peers finish their round, save the model and go, then the bootstrap does."""
        if self._peers:
            self._note("the peers finish their round, save the model and leave")
        self._dismiss(self._peers)
        self._dismiss([self._bootstrap])

    def _dismiss(self, children: Sequence[Child]) -> None:
        """They leave, or are killed when their time is over or Ctrl-C comes."""
        leaving = [child for child in children if child.running]
        for child in leaving:
            child.leave()
        hurried = self._wait(lambda: not any(child.running for child in leaving), LEAVE_SECONDS)
        for child in leaving:
            if child.running:
                child.kill()
                if not hurried:
                    self._problem = (
                        f"{child.name} was killed: {LEAVE_SECONDS:.0f} s were not enough for it to leave"
                    )
            elif child.status not in (0, -signal.SIGTERM):  # the latter when it had hardly started
                self._problem = f"{child.name} did not leave as it should: {child.last_words()}"

    def _sample(self) -> str:
        """What the saved model writes, by the command that anybody would use; empty after another Ctrl-C."""
        if not (checkpoint := self._chronicle.checkpoint):
            return ""
        words = ("--prompt", prompt(self._options.run), "--length", str(SAMPLE_LENGTH), "--json")
        self._sampler = Child("generate", self._folder / "generate", "generate", checkpoint, *words)
        self._sampler.start()
        sampler = self._sampler
        hurried = self._wait(lambda: not sampler.running, SAMPLE_SECONDS)
        if sampler.status == 0:
            return str(json.loads(sampler.output.read_text().splitlines()[-1])["text"])
        if not hurried:
            self._problem = f"the checkpoint gave no sample: {sampler.last_words()}"
        return ""

    def _kill_all(self) -> None:
        for child in (*self._peers, self._bootstrap, self._sampler):
            if child is not None:
                child.kill()
        for tail in self._tails.values():
            tail.close()

    # -- watching --------------------------------------------------------------------------------------------

    def _watch(self, until: Callable[[], bool], deadline: float) -> bool:
        """Look on until a condition holds; False if the deadline, on the monotonic clock, is there before.

        Raises _Over after Ctrl-C and when a peer's run is complete, DemoFailed if a process has broken.
        """
        while not until():
            if self._interrupts.count:
                self._note("Ctrl-C: once more to stop now")
                raise _Over
            for child in (self._bootstrap, *self._peers):
                if child.awaited or child.status is None:
                    continue
                if child.status == 0 and child is not self._bootstrap:
                    self._note(f"{child.name} has completed the run")
                    raise _Over
                raise child.fault()
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOOK_SECONDS)
            self._look()
        return True

    def _wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Look on until a condition holds or the time is over; True if it was cut short by Ctrl-C."""
        before, deadline = self._interrupts.count, time.monotonic() + seconds
        while not until() and time.monotonic() < deadline and self._interrupts.count == before:
            time.sleep(LOOK_SECONDS)
            self._look()
        self._look()
        return self._interrupts.count > before

    def _look(self) -> None:
        for name, tail in self._tails.items():
            for record in tail.read():
                self._chronicle.observe(name, record)
        self._screen.show()

    def _note(self, text: str) -> None:
        self._chronicle.note(time.time(), text)
        self._look()

    # -- parts -----------------------------------------------------------------------------------------------

    def _make_bootstrap(self) -> Child:
        folder = self._folder / "bootstrap"
        where = ("--listen", self._options.listen, "--data-dir", str(folder))
        return Child("bootstrap", folder, "bootstrap", str(self._folder / "run.toml"), *where, "--json")

    def _make_peer(self, name: str) -> Child:
        run, folder = self._options.run, made(self._folder / name)
        config = PeerConfig(
            name=name,
            data_dir=str(folder),
            micro_batch_size=min(
                PeerConfig().micro_batch_size, -(-run.target_batch_size // self._options.peers)
            ),
            corpus=self._options.corpus and str(Path(self._options.corpus).expanduser().absolute()),
            listen=(_LISTEN.sub(r"\g<1>0", self._options.listen),),
            # One is enough to know how good the model is: it is the same on all.
            eval_every_steps=EVAL_EVERY_STEPS if not self._peers else 0,
        )
        peer_file = folder / "peer.toml"
        peer_file.write_text(commented_toml(config))
        return Child(name, folder, "join", self._invite(), "--peer", str(peer_file), "--json")

    def _invite(self) -> str:
        """The bootstrap's; empty until it is ready."""
        try:
            first, whole, _ = self._bootstrap.output.read_text().partition("\n")
        except FileNotFoundError:
            return ""
        return str(json.loads(first)["invite"]) if whole else ""

    def _receipt(self, sample: str) -> Receipt:
        chronicle, heldout = self._chronicle, self._chronicle.heldout
        differences = chronicle.differences()
        first, rounds = chronicle.first_commit_at, chronicle.rounds()
        return Receipt(
            steps=chronicle.steps,
            committed=len(rounds),
            aborted=len(chronicle.aborted),
            samples=sum(rounds.values()),
            peers=len(chronicle.peers),
            first_step_seconds=None if first is None else round(first - self._started_at, 2),
            heldout_loss_first=heldout[0].loss if heldout else None,
            heldout_loss_last=heldout[-1].loss if heldout else None,
            heldout_bits_per_byte=heldout[-1].bits_per_byte if heldout else None,
            zlib_bits_per_byte=heldout[-1].zlib_bits_per_byte if heldout else None,
            digests_equal=not differences,
            states_compared=chronicle.compared,
            kills=self._kills,
            rejoin_seconds=_rounded(self._chronicle.peers[f"peer-{self._options.peers}"].rejoin_seconds),
            checkpoint=chronicle.checkpoint,
            sample=sample,
            folder=str(self._folder),
            problem="; ".join([*differences[:3], *filter(None, [self._problem])]),
        )


def prompt(run: RunConfig) -> str:
    """Something that the model may know how to go on from."""
    return "def " if run.task.corpus == "stdlib" else "The "


def receipt_lines(receipt: Receipt, options: Options) -> list[str]:
    """The receipt for people, and what they can do next."""
    facts = {
        "steps": f"{receipt.steps:,} committed from {receipt.samples:,} samples; {receipt.aborted} aborted",
        "first step": _after(receipt.first_step_seconds, "after the start of the command"),
        "held-out loss": _loss_words(receipt),
        "replicas": _replica_words(receipt),
    }
    if receipt.kills:
        facts["killed peer"] = _after(receipt.rejoin_seconds, "from its restart until it was back in a round")
    lines = [f"{name:<14} {fact}" for name, fact in facts.items()]
    if receipt.sample:
        lines += ["", "the model writes:", *(f"  {line}" for line in sample_lines(receipt.sample, 12))]
    if receipt.checkpoint:
        generate = ("p2ptrain", "generate", receipt.checkpoint, "--prompt", prompt(options.run))
        run_file, peer = f"{receipt.folder}/run.toml", str(Path(receipt.checkpoint).parents[1])
        lines += [
            "",
            "let it write more:",
            f"  {shlex.join(generate)}",
            f"go on from step {receipt.steps:,} together with a second machine:",
            f"  here             {shlex.join(('p2ptrain', 'bootstrap', run_file))}",
            "                   which prints INVITE, one long line",
            f"  here as well     p2ptrain join INVITE --data-dir {shlex.quote(peer)}",
            "  there            p2ptrain join INVITE",
        ]
        if options.corpus:
            lines.append("  (all of them with a peer file that says where that machine has the text)")
        if "/127." in options.listen or "/::1/" in options.listen:
            lines.append("  (the demo itself listened on this machine only, so nobody else could join it)")
    return lines


def _loss_words(receipt: Receipt) -> str:
    if receipt.heldout_loss_first is None or receipt.heldout_loss_last is None:
        return "not measured: there were too few steps"
    first, last, bits = receipt.heldout_loss_first, receipt.heldout_loss_last, receipt.heldout_bits_per_byte
    words = f"{first:.3f} at first, {last:.3f} at last, in nats per byte"
    if bits is None or receipt.zlib_bits_per_byte is None:
        return words
    return f"{words} ({bits:.2f} bits; zlib -9 takes {receipt.zlib_bits_per_byte:.2f})"


def _replica_words(receipt: Receipt) -> str:
    if not receipt.digests_equal:
        return "digests equal at every step on every peer: NO"
    if not receipt.states_compared:
        return "not compared: no state was reached by more than one peer"
    return f"digests equal at every step on every peer: yes ({receipt.states_compared:,} states compared)"


def _after(seconds: float | None, what: str) -> str:
    return "never" if seconds is None else f"{seconds:.1f} s {what}"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)
