"""`p2ptrain demo`: a bootstrap and some volunteers as real processes on this machine, watched from outside.

This process trains nothing. It starts the commands that anybody else would type, reads the journals that they
write, kills one volunteer half-way, starts it again, and in the end says what the journals prove. Whatever it
started ends with it, also when it is killed itself.

Not covered: anything but slowness when there are more peers than processor cores.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from p2ptrain.config import PeerConfig, RunConfig
from p2ptrain.errors import ConfigError
from peers.display import display, replica_words, sample_lines
from peers.rehearsal import (
    LOOK_SECONDS,
    PATIENCE_SECONDS,
    Child,
    Rehearsal,
    RehearsalFailed,
    new_folder,
    peer_config,
)

ABSENCE_SECONDS = 1.5
"""How long the killed peer stays away."""
SAMPLE_SECONDS = 60.0
SAMPLE_LENGTH = 300
EVAL_EVERY_STEPS = 50

_LISTEN = re.compile(r"(/ip[46]/[0-9A-Fa-f.:]+/tcp/)\d{1,5}")


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
    peer: PeerConfig
    """What the peers' own files say, but for what two on one machine cannot share."""


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

    Raises RehearsalFailed if a process broke or no step was committed, ConfigError for an address that is
    none or a text that is not named.
    """
    # The command's own imports are part of the wait, and were all computing.
    started_at = time.time() - time.process_time()
    if not _LISTEN.fullmatch(options.listen):
        raise ConfigError(
            "--listen must be an IP address and TCP port, such as /ip4/0.0.0.0/tcp/31337, "
            f"not {options.listen!r}"
        )
    config = peer_config(options.run, options.peers, options.peer)
    return _Demo(options, config, new_folder("demo"), started_at, console).play()


# -- the story -----------------------------------------------------------------------------------------------


class _Over(Exception):
    """Ctrl-C, or the run is complete: there is nothing more to watch."""


class _Demo:
    """The rehearsal, and what is to be seen in it."""

    def __init__(
        self, options: Options, config: PeerConfig, folder: Path, started_at: float, console: Console
    ) -> None:
        """`started_at` is Unix time; `folder` gets the run file and a folder for each process."""
        self._options, self._config, self._started_at = options, config, started_at
        self._end = time.monotonic() + (started_at + options.seconds - time.time())
        self._stage = Rehearsal(options.run, folder)
        self._chronicle = self._stage.chronicle
        for number in range(options.peers):
            self._chronicle.arrived(f"peer-{number + 1}")
        self._kills = 0
        title = f"p2ptrain demo: {options.run.run_id}"
        self._screen = display(console, self._chronicle, started_at, options.seconds, title)

    def play(self) -> Receipt:
        """From the first process to the last; all have ended when it returns or raises."""
        with self._stage as stage:
            with self._screen:
                stage.display = self._screen
                with suppress(_Over):
                    self._train()
                stage.leave()
                sample = self._sample()
            return self._receipt(sample)

    def _train(self) -> None:
        """Until the time is over; _Over if it is over sooner."""
        stage = self._stage
        bootstrap = stage.make_bootstrap(self._options.listen)
        bootstrap.start()
        if not self._watch(lambda: bool(stage.invites()), self._patience()):
            raise RehearsalFailed(
                f"the bootstrap was not ready after {PATIENCE_SECONDS:.0f} s: {bootstrap.last_words()}"
            )
        stage.note(f"the bootstrap is ready; everything is kept in {stage.folder}")
        stage.note(f"to be seen, while it lasts, at {stage.pages()[-1]}")
        for name in list(self._chronicle.peers):
            # One is enough to know how good the model is: it is the same on all.
            every = 0 if stage.peers else EVAL_EVERY_STEPS
            config = self._config.model_copy(update={"eval_every_steps": every})
            stage.make_peer(name, config, self._options.listen).start()
        if not self._watch(lambda: self._chronicle.first_commit_at is not None, self._patience()):
            raise RehearsalFailed(
                f"no step was committed within {PATIENCE_SECONDS:.0f} s; is this machine overloaded? "
                f"The logs are in {stage.folder}"
            )
        if self._options.kill and len(stage.peers) > 1:
            self._kill_and_bring_back(stage.peers[name])
        self._watch(lambda: False, self._end)

    def _kill_and_bring_back(self, victim: Child) -> None:
        stage, story = self._stage, self._chronicle.peers[victim.name]
        half_way = self._end - self._options.seconds / 2
        everyone = len(stage.peers)
        if not self._watch(
            lambda: time.monotonic() >= half_way and self._chronicle.roster_size == everyone, self._patience()
        ):
            stage.problem = f"there was no round with all {everyone} peers, so none of them was killed"
            return
        victim.kill()
        stage.look()  # at its last lines
        self._kills += 1
        story.doing = "killed"
        stage.note(f"{victim.name} was killed (SIGKILL) at step {story.step}; the others go on")
        self._watch(lambda: False, time.monotonic() + ABSENCE_SECONDS)
        self._chronicle.restarted(victim.name, time.time())
        victim.start()
        stage.note(f"{victim.name} is started again")
        if not self._watch(lambda: story.rejoin_seconds is not None, self._patience()):
            stage.problem = (
                f"{victim.name} was not back in a round {PATIENCE_SECONDS:.0f} s after its restart: "
                f"{victim.last_words()}"
            )

    def _patience(self) -> float:
        """Until when to wait for what must come: to the end of the demo, but never for too short a time."""
        return max(self._end, time.monotonic() + PATIENCE_SECONDS)

    def _watch(self, until: Callable[[], bool], deadline: float) -> bool:
        """Look on until a condition holds; False if the deadline, on the monotonic clock, is there before.

        Raises _Over after Ctrl-C and when a peer's run is complete, RehearsalFailed if a process has broken.
        """
        stage = self._stage
        while not until():
            if stage.interrupts.count:
                stage.note("Ctrl-C: once more to stop now")
                raise _Over
            for child in (stage.bootstrap, *stage.peers.values()):
                if child.awaited or child.status is None:
                    continue
                if child.status == 0 and child is not stage.bootstrap:
                    stage.note(f"{child.name} has completed the run")
                    raise _Over
                raise child.fault()
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOOK_SECONDS)
            stage.look()
        return True

    def _sample(self) -> str:
        """What the saved model writes, by the command that anybody would use; empty after another Ctrl-C."""
        if not (checkpoint := self._chronicle.checkpoint):
            return ""
        words = ("--prompt", prompt(self._options.run), "--length", str(SAMPLE_LENGTH), "--json")
        own = own_file(checkpoint, self._options)
        sampler = self._stage.child("generate", "generate", checkpoint, *words, *own)
        sampler.start()
        hurried = self._stage.wait(lambda: not sampler.running, SAMPLE_SECONDS)
        if sampler.status == 0:
            return str(json.loads(sampler.output.read_text().splitlines()[-1])["text"])
        if not hurried:
            self._stage.problem = f"the checkpoint gave no sample: {sampler.last_words()}"
        return ""

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
            rejoin_seconds=_rounded(chronicle.peers[f"peer-{self._options.peers}"].rejoin_seconds),
            checkpoint=chronicle.checkpoint,
            sample=sample,
            folder=str(self._stage.folder),
            problem="; ".join([*differences[:3], *filter(None, [self._stage.problem])]),
        )


def prompt(run: RunConfig) -> str:
    """Something that the model may know how to go on from."""
    return "The " if "corpus" in run.task.names else "def "


def own_file(checkpoint: str, options: Options) -> tuple[str, ...]:
    """The words that let a command about this checkpoint have what the run only names."""
    said = options.peer.model_fields_set & {"corpus", "model", "tokenizer", "allow_tasks"}
    return ("--peer", str(Path(checkpoint).parents[1] / "peer.toml")) if said else ()


def receipt_lines(receipt: Receipt, options: Options) -> list[str]:
    """The receipt for people, and what they can do next."""
    facts = {
        "steps": f"{receipt.steps:,} committed from {receipt.samples:,} samples; {receipt.aborted} aborted",
        "first step": _after(receipt.first_step_seconds, "after the start of the command"),
        "held-out loss": _loss_words(receipt),
        "replicas": replica_words(receipt.digests_equal, receipt.states_compared),
    }
    if receipt.kills:
        facts["killed peer"] = _after(receipt.rejoin_seconds, "from its restart until it was back in a round")
    lines = [f"{name:<14} {fact}" for name, fact in facts.items()]
    if receipt.sample:
        lines += ["", "the model writes:", *(f"  {line}" for line in sample_lines(receipt.sample, 12))]
    if receipt.checkpoint:
        own = own_file(receipt.checkpoint, options)
        generate = ("p2ptrain", "generate", receipt.checkpoint, "--prompt", prompt(options.run), *own)
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
        if own:
            lines.append("  (both with a peer file that says where that machine has what the run only names)")
        if "/127." in options.listen or "/::1/" in options.listen:
            lines.append("  (the demo itself listened on this machine only, so nobody else could join it)")
    return lines


def _loss_words(receipt: Receipt) -> str:
    if receipt.heldout_loss_first is None or receipt.heldout_loss_last is None:
        return "not measured: there were too few steps"
    first, last, bits = receipt.heldout_loss_first, receipt.heldout_loss_last, receipt.heldout_bits_per_byte
    words = f"{first:.3f} at first, {last:.3f} at last, in nats"
    if bits is None or receipt.zlib_bits_per_byte is None:
        return words
    return f"{words} per byte ({bits:.2f} bits; zlib -9 takes {receipt.zlib_bits_per_byte:.2f})"


def _after(seconds: float | None, what: str) -> str:
    return "never" if seconds is None else f"{seconds:.1f} s {what}"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)
