"""A swarm on this machine to look at: a bootstrap and volunteers as real processes, and what they tell.

`demo` and `chaos` play on it. It starts the commands that anybody else would type and reads the journals that
they write. Whatever it started ends with it, also when it is killed itself.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import psutil  # type: ignore[import-untyped]

from p2ptrain.config import PeerConfig, RunConfig, check_names, commented_toml
from p2ptrain.errors import ConfigError, P2PTrainError
from p2ptrain.events import clean
from peers.chronicle import Chronicle, Record, Tail
from peers.places import made, user_data

LOOK_SECONDS = 0.1
"""Between two looks at the journals and the processes."""
PATIENCE_SECONDS = 60.0
"""For each thing that must happen; on a slow machine a rehearsal lasts longer for that than asked for."""
AT_ONCE = 8
"""Samples in a micro-batch, at most: measured sizes would differ from peer to peer and from time to time."""
LEAVE_SECONDS = 20.0
"""For the peers to finish a round, save a checkpoint and leave; what is left then is killed."""

COMPLAINT = "p2ptrain: "
"""How a command begins the one sentence about what is wrong."""

_PORT = re.compile(r"(?<=/tcp/)\d{1,5}$")


class RehearsalFailed(P2PTrainError):
    """Something did not go as it must."""

    def __init__(self, message: str, exit_code: int = P2PTrainError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Display(Protocol):
    """What `display.Lines` and `display.Screen` are."""

    def show(self) -> None: ...


def new_folder(kind: str) -> Path:
    """A fresh folder for all that one rehearsal keeps."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(tempfile.mkdtemp(prefix=f"{kind}-{stamp}-", dir=made(user_data())))


ALONE = frozenset({"name", "data_dir", "listen", "announce", "data_port", "metrics_port", "relay_for"})
"""What a peer file says for one peer on one machine: several cannot share it."""


def peer_config(run: RunConfig, peers: int, own: PeerConfig) -> PeerConfig:
    """Settings for each of so many peers of the run: those of the peer file `own`, but for what they cannot
    share, and for what would let them stand idle.

    Raises ConfigError if the run's text is not on every machine and nobody said where it is.
    """
    if (name := run.task.names.get("corpus")) and not own.corpus:
        raise ConfigError(
            f"run {run.run_id} trains on the text {name!r}; say with --corpus which file or folder that is"
        )
    check_names(run, own)
    places = {key: _absolute(getattr(own, key)) for key in ("corpus", "model", "tokenizer")}
    size = min(AT_ONCE, -(-run.target_batch_size // peers))
    return PeerConfig(
        **own.model_dump(exclude_unset=True, exclude=set(ALONE))
        | {key: place for key, place in places.items() if place}
        | {
            "micro_batch_size": size if own.micro_batch_size == "auto" else own.micro_batch_size,
            "device": "cpu" if own.device == "auto" else own.device,
            # Who starts a rehearsal wants to see it.
            "limits": own.limits.model_copy(update={"on_battery": "train"}),
        }
    )


def _absolute(place: str) -> str:
    return str(Path(place).expanduser().absolute()) if place not in ("", "stdlib") else place


# -- one process ---------------------------------------------------------------------------------------------


class Child:
    """One command of ours as a process with a folder of its own; it can be started again after its end."""

    def __init__(
        self, name: str, folder: Path, *arguments: str, inside: Sequence[str] = (), scratch: str = ""
    ) -> None:
        """The folder is made; what the process prints is kept in it, in `output` and `log`.

        `inside`: words before the command that put it elsewhere, such as `ip netns exec NAME`; `scratch`:
        the folder for what it leaves lying about when it is killed.
        """
        self.name, self.folder = name, made(folder)
        self.output, self.log = folder / "output", folder / "log"
        self.awaited = False
        """Whether it is supposed to end."""
        self._arguments, self._inside, self._scratch = arguments, inside, scratch
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; it must not be running."""
        self.awaited = False
        # -P: nothing in the current folder may pass for one of our modules.
        command = [sys.executable, "-P", "-m", "peers.offspring", str(os.getpid()), *self._arguments]
        with self.output.open("ab") as output, self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._inside, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TMPDIR": self._scratch},
                start_new_session=True,  # the terminal's Ctrl-C is for the rehearsal, which knows what to do
            )

    @property
    def pid(self) -> int | None:
        """Of the process that runs, or did last."""
        return None if self._process is None else self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status, or minus the number of the signal that ended it; None if it runs or never did."""
        return None if self._process is None else self._process.poll()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def family(self) -> list[psutil.Process]:
        """The process and its libp2p daemon, those that are there."""
        with suppress(psutil.NoSuchProcess):
            if self._process is not None and self.running:
                process = psutil.Process(self._process.pid)
                return [process, *process.children(recursive=True)]
        return []

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

    def stop(self) -> None:
        """Stop it and its daemon where they are, as a suspended machine would."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Undo `stop`; nothing happens if it was not stopped."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def fault(self) -> RehearsalFailed:
        """Why it ended, now that it has."""
        last, status = "".join(self._last_lines(1)), self.status or 0
        if status > 0 and last.startswith(COMPLAINT):
            return RehearsalFailed(f"{self.name}: {last.removeprefix(COMPLAINT)}", status)
        return RehearsalFailed(f"{self.name} ended by itself: {self.last_words()}")

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


# -- all of them ---------------------------------------------------------------------------------------------


class Rehearsal:
    """A bootstrap and peers, and the chronicle of what they tell. A context manager: all ends with it."""

    def __init__(
        self,
        run: RunConfig,
        folder: Path,
        heard: Callable[[str, Record], None] = lambda name, record: None,
    ) -> None:
        """`folder` gets the run file and a folder for each process; `heard` is given each line of a peer's
        journal once."""
        self.run, self.folder = run, folder
        self.chronicle = Chronicle(())
        self.peers: dict[str, Child] = {}
        self.interrupts = Interrupts()
        self.problem = ""
        """What did not go as it must, as a sentence; empty if all did."""
        self.display: Display | None = None
        self._heard = heard
        self._tails: dict[str, Tail] = {}
        self._children: list[Child] = []
        self._scratch = ""
        self._stack = ExitStack()
        self.bootstrap = Child("bootstrap", folder / "bootstrap")
        (folder / "run.toml").write_text(commented_toml(run))

    def __enter__(self) -> Self:
        scratch = tempfile.TemporaryDirectory(prefix=f"p2ptrain-{os.getpid()}-", ignore_cleanup_errors=True)
        self._scratch = self._stack.enter_context(scratch)
        self._stack.callback(self._end_all)
        self._stack.enter_context(self.interrupts)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _end_all(self) -> None:
        for child in self._children:
            child.kill()
        for tail in self._tails.values():
            tail.close()

    # -- making ----------------------------------------------------------------------------------------------

    def child(self, name: str, *arguments: str, inside: Sequence[str] = ()) -> Child:
        """A process that ends with the rehearsal; it is not started."""
        made_child = Child(name, self.folder / name, *arguments, inside=inside, scratch=self._scratch)
        self._children.append(made_child)
        return made_child

    def make_bootstrap(self, listen: str, inside: Sequence[str] = ()) -> Child:
        """The bootstrap, not started."""
        where = ("--listen", listen, "--data-dir", str(self.folder / "bootstrap"))
        words = ("bootstrap", str(self.folder / "run.toml"), *where, "--json")
        self.bootstrap = self.child("bootstrap", *words, inside=inside)
        return self.bootstrap

    def make_peer(
        self, name: str, config: PeerConfig, listen: str, inside: Sequence[str] = (), invite: str = ""
    ) -> Child:
        """A volunteer, not started; the bootstrap must be ready unless there is another `invite`. What
        `config` says of name, folder and address holds; else it takes any free port of `listen`."""
        folder = made(self.folder / name)
        own = {"name": name, "data_dir": str(folder), "listen": (_PORT.sub("0", listen),)}
        open_ = own.keys() - config.model_fields_set
        config = config.model_copy(update={key: own[key] for key in open_})
        peer_file = folder / "peer.toml"
        peer_file.write_text(commented_toml(config))
        words = ("join", invite or self.invites()[0], "--peer", str(peer_file), "--json")
        self.peers[name] = self.child(name, *words, inside=inside)
        self.chronicle.arrived(name)
        self._tails[name] = Tail(Path(config.data_dir) / "journal.jsonl")
        return self.peers[name]

    def forget(self, name: str) -> None:
        """That peer, which has ended, was never one of them."""
        self._tails.pop(name).close()
        self.chronicle.peers.pop(name)
        self.peers.pop(name)

    def pages(self) -> list[str]:
        """Where the bootstrap shows the run: one address for each time that it was ready."""
        return [str(line["page"]) for line in self._ready()]

    def invites(self) -> list[str]:
        """The bootstrap's: one for each time that it was ready."""
        return [str(line["invite"]) for line in self._ready()]

    def _ready(self) -> list[dict[str, Any]]:
        """What the bootstrap said each time that it was."""
        if not self.bootstrap.output.exists():
            return []
        *whole, _ = self.bootstrap.output.read_text().split("\n")
        told = [json.loads(line) for line in whole]
        return [line for line in told if line.get("event") == "ready"]

    # -- watching --------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Say something that no journal tells."""
        self.chronicle.note(time.time(), text)
        self.look()

    def look(self) -> None:
        """Read what the peers have written since, and show it."""
        for name, tail in self._tails.items():
            for record in tail.read():
                self.chronicle.observe(name, record)
                self._heard(name, record)
        if self.display is not None:
            self.display.show()

    def wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Look on until a condition holds or the time is over; True if it was cut short by Ctrl-C."""
        before, deadline = self.interrupts.count, time.monotonic() + seconds
        while not until() and time.monotonic() < deadline and self.interrupts.count == before:
            time.sleep(LOOK_SECONDS)
            self.look()
        self.look()
        return self.interrupts.count > before

    def leave(self) -> None:
        """The peers finish their round, save the model and go, then the bootstrap does."""
        if any(child.running for child in self.peers.values()):
            self.note("the peers finish their round, save the model and leave")
        self._dismiss(self.peers.values())
        self._dismiss([self.bootstrap])

    def _dismiss(self, children: Iterable[Child]) -> None:
        """They leave, or are killed when their time is over or Ctrl-C comes."""
        leaving = [child for child in children if child.running]
        for child in leaving:
            child.leave()
        hurried = self.wait(lambda: not any(child.running for child in leaving), LEAVE_SECONDS)
        for child in leaving:
            if child.running:
                child.kill()
                if not hurried:
                    self.problem = (
                        f"{child.name} was killed: {LEAVE_SECONDS:.0f} s were not enough for it to leave"
                    )
            elif child.status not in (0, -signal.SIGTERM):  # the latter when it had hardly started
                self.problem = f"{child.name} did not leave as it should: {child.last_words()}"
