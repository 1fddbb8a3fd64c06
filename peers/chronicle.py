"""What the journals of several peers tell when they are read together, while they are being written.

`Tail` follows one journal, `Chronicle` puts what all of them say into one story: how far the swarm is, how
each peer fares, and whether equal lineages had equal state digests on all of them (I2). Both know journals
only, no processes.
"""

from __future__ import annotations

import io
import json
import os
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from p2ptrain.events import clean, duration, short

Record = Mapping[str, Any]
"""One line of a journal: `time`, `event`, and that event's fields."""


def moment(record: Record) -> float:
    """When it was written, in Unix time."""
    return datetime.fromisoformat(record["time"]).timestamp()


class Tail:
    """Gives each line of a growing journal once, also when it is rotated meanwhile."""

    def __init__(self, path: Path) -> None:
        """The file need not be there yet."""
        self._path = path
        self._file: io.BufferedReader | None = None
        self._read_bytes = 0

    def read(self) -> list[Record]:
        """All whole lines since the last call. A torn one is left: its writer completes it or cuts it off."""
        records: list[Record] = []
        while True:
            if self._file is None:
                try:
                    self._file, self._read_bytes = self._path.open("rb"), 0
                except FileNotFoundError:
                    return records
            # Asked before reading, or lines written between the two would be missed.
            rotated = self._was_rotated(self._file)
            records += self._whole_lines(self._file)
            if not rotated:
                return records
            self.close()

    def close(self) -> None:
        """Release the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _was_rotated(self, file: io.BufferedReader) -> bool:
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(file.fileno()))
        except FileNotFoundError:
            return False  # the old file is gone and the new one not there yet

    def _whole_lines(self, file: io.BufferedReader) -> list[Record]:
        file.seek(self._read_bytes)
        fresh = file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


@dataclass
class PeerStory:
    """One peer, as its own journal tells it."""

    name: str
    doing: str = "starting"
    step: int = 0
    samples: int = 0
    """That it gave to committed rounds, in all its lives."""
    checkpoint: str = ""
    """Path of its newest."""
    checkpoint_step: int = -1
    lineages: dict[int, str] = field(default_factory=dict)
    """Step → lineage wherever it hashed its state, on the log that it has now."""
    restarted_at: float | None = None
    """Unix time of its last restart."""
    rejoin_seconds: float | None = None
    """From then until it had committed a round again."""


@dataclass(frozen=True)
class Heldout:
    """How good the model was at `step` on text it never saw."""

    step: int
    loss: float
    """Nats per byte."""
    bits_per_byte: float | None
    zlib_bits_per_byte: float | None


class Chronicle:
    """One story out of several peers' journals."""

    def __init__(self, names: Iterable[str]) -> None:
        self.peers = {name: PeerStory(name) for name in names}
        self.aborted: set[tuple[int, int]] = set()
        """(step, attempt)."""
        self.heldout: list[Heldout] = []
        self.preview = ""
        self.first_commit_at: float | None = None
        """Unix time."""
        self.roster_size = 0
        """Peers in the last committed round."""
        self.notes: list[tuple[float, str]] = []
        """What a person should hear of, oldest first: (Unix time, a few words)."""
        self.last_rounds: deque[str] = deque(maxlen=8)
        """The last few committed rounds, a line each."""
        self._rounds: dict[int, dict[str, int]] = {}  # step → lineage after it → samples of the whole roster
        self._losses: dict[int, tuple[float, int]] = {}
        self._digests: dict[str, tuple[str, str]] = {}  # lineage → digest, and who hashed it first
        self._compared: set[str] = set()
        self.faults: list[str] = []
        """Where I2 was broken, a line each."""

    # -- listening -------------------------------------------------------------------------------------------

    def arrived(self, name: str) -> None:
        """There is another peer; nothing happens if it was there."""
        self.peers.setdefault(name, PeerStory(name))

    def note(self, at: float, text: str) -> None:
        """Something happened that no journal tells."""
        self.notes.append((at, text))

    def restarted(self, name: str, at: float) -> None:
        """That peer's process was started again at this Unix time."""
        peer = self.peers[name]
        peer.doing, peer.restarted_at, peer.rejoin_seconds = "starting again", at, None
        peer.lineages.clear()  # what it had not saved is lost

    def observe(self, name: str, record: Record) -> None:
        """The next line of that peer's journal."""
        peer, at = self.peers[name], moment(record)
        match record:
            case {"event": "joined"}:
                peer.doing = "looking for the others"
            case {"event": "round_committed"}:
                self._committed(peer, at, record)
            case {"event": "state_hashed", "step": step, "lineage": lineage, "state_digest": digest}:
                peer.step, peer.lineages[step] = step, lineage
                self._hashed(peer, step, lineage, digest)
            case {"event": "round_aborted", "step": step, "attempt": attempt, "cause": cause}:
                if (step, attempt) not in self.aborted:
                    self.aborted.add((step, attempt))
                    why = cause.replace("_", " ")
                    self.note(at, f"attempt {attempt} at step {step} aborted ({why}); nobody stepped")
            case {"event": "leader_took_over", "step": step}:
                self.note(at, f"{name} took the lead at step {step}")
            case {"event": "caught_up", "from_step": start, "to_step": end, "how": how, "seconds": seconds}:
                if how == "snapshot":
                    peer.lineages.clear()  # nothing tells whether its log led through them
                # To be a few entries behind for a moment is nothing.
                if seconds >= 1 or (peer.doing != "training" and end - start >= 10):
                    way = f"by {how} in {duration(seconds)}"
                    self.note(at, f"{name} caught up from step {start} to {end} {way}")
            case {"event": "catch_up_failed", "reason": reason}:
                self.note(at, f"{name} could not catch up: {clean(reason)}")
            case {"event": "rolled_back", "from_step": start, "to_step": end}:
                peer.lineages.clear()
                self.note(at, f"{name} rolled back from step {start} to {end}, onto the heavier lineage")
            case {"event": "replica_diverged", "step": step}:
                self.faults.append(f"{name} was told at step {step} that its state differs")
            case {"event": "evaluated"}:
                figures = (record[key] for key in ("step", "loss", "bits_per_byte", "zlib_bits_per_byte"))
                self.heldout.append(Heldout(*figures))
            case {"event": "previewed", "text": text}:
                self.preview = text
            case {"event": "checkpoint_saved", "step": step, "path": path}:
                peer.checkpoint, peer.checkpoint_step = path, step
            case {"event": "checkpoint_failed", "reason": reason}:
                self.note(at, f"{name} could not save a checkpoint: {clean(reason)}")
            case {"event": "peer_benched", "peer": other, "reason": reason}:
                self.note(at, f"{name} leaves out {short(other)}: {clean(reason)}")
            case {"event": "peer_convicted", "peer": other, "reason": reason}:
                self.note(at, f"{name} holds proof that {short(other)} lied: {clean(reason)}")
            case {"event": "peer_stood_out", "peer": other}:
                self.note(at, f"{name} finds the gradients of {short(other)} unlike the others'")
            case {"event": "daemon_restarted", "seconds": seconds}:
                self.note(at, f"{name} lost its libp2p daemon and started another in {duration(seconds)}")
            case {"event": "leaving"}:
                peer.doing = "left"

    def _committed(self, peer: PeerStory, at: float, record: Record) -> None:
        step, mine = record["step"], record["mine"]
        peer.doing, peer.step = "training", step + 1
        peer.samples += mine
        self.roster_size = record["peers"]
        if self.first_commit_at is None:
            self.first_commit_at = at
        if peer.restarted_at is not None and peer.rejoin_seconds is None and at >= peer.restarted_at:
            peer.rejoin_seconds = at - peer.restarted_at
            back = f"{peer.name} is back in a round, {duration(peer.rejoin_seconds)} after its restart"
            self.note(at, back)
        if step not in self._rounds:
            costs = duration(record["reduce_seconds"] + record["commit_seconds"] + record["apply_seconds"])
            averaged = f"{record['samples']} samples of {record['peers']} averaged in {costs}"
            self.last_rounds.append(f"step {step}: {averaged}")
        self._rounds.setdefault(step, {})[record["lineage"]] = record["samples"]
        if record["loss"] is not None:
            total, count = self._losses.get(step, (0.0, 0))
            self._losses[step] = (total + mine * record["loss"], count + mine)

    def _hashed(self, peer: PeerStory, step: int, lineage: str, digest: str) -> None:
        known, first = self._digests.setdefault(lineage, (digest, peer.name))
        if first != peer.name:
            self._compared.add(lineage)
        if digest != known:
            self.faults.append(
                f"at step {step} and lineage {lineage[:8]} the state of {first} was {known[:8]} "
                f"and that of {peer.name} {digest[:8]}"
            )

    # -- telling ---------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Committed steps on the log that lives."""
        return max((peer.step for peer in self.peers.values()), default=0)

    def rounds(self) -> dict[int, int]:
        """Step → samples of the whole roster, for each committed round with one of these peers in it."""
        held = self.held()
        return {
            # Where logs had parted, the round that somebody still has, if one of these peers knows.
            step: next((found[lineage] for lineage in found if lineage in held), max(found.values()))
            for step, found in self._rounds.items()
            if step < self.steps
        }

    def held(self) -> set[str]:
        """Lineages that somebody's log went through, as far as journals tell."""
        return {lineage for peer in self.peers.values() for lineage in peer.lineages.values()}

    @property
    def compared(self) -> int:
        """States that more than one peer hashed."""
        return len(self._compared)

    @property
    def checkpoint(self) -> str:
        """Path of the newest one of all peers; empty if there is none."""
        return max(self.peers.values(), key=lambda peer: peer.checkpoint_step).checkpoint

    def losses(self) -> list[float]:
        """Mean training loss of each committed round, in nats, in order of steps."""
        return [total / count for _, (total, count) in sorted(self._losses.items()) if count]

    def differences(self) -> list[str]:
        """Where the replicas were not identical; empty is what I2 promises.

        Two ways there are: one lineage with several state digests, and two logs that peers still hold apart.
        """
        apart = []
        first, *others = self.peers.values()
        for other in others:
            for step in sorted(first.lineages.keys() & other.lineages.keys()):
                if first.lineages[step] != other.lineages[step]:
                    apart.append(f"from step {step} on {first.name} and {other.name} hold different logs")
                    break
        return [*self.faults, *apart]
