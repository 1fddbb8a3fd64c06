"""Snapshots on disk. A checkpoint is a folder `step-00000120/` that is either whole or not there:

- `model.safetensors`: the parameters alone, under the model's own names, for use anywhere else; with payload
  `lora` the files of `adapter_files` in its place, which PEFT loads
- `state.safetensors`: the blob of the snapshot
- `run.json`: the run file
- `lineages.bin`: the lineage of each of the last steps, 32 bytes each: what this state's log went through
- `manifest.json`: position, last entry, size and SHA-256 of each of the others, and of itself

It is written beside its place, flushed to the disk and then renamed. One process writes to a folder at a
time. Checkpoints are ranked by the samples behind them, as lineages are (I8): after a rollback the abandoned
steps, though higher, do not pass for the newest.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

import p2ptrain
from p2ptrain.config import RunConfig, difference
from p2ptrain.errors import BadMessage, CheckpointError, IncompatibleRun, StorageError
from p2ptrain.records import Count, Digest, EntryHeader, Position
from p2ptrain.replica.adapter_files import ADAPTER, ADAPTER_CONFIG, NOTE, Note, adapter_files
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.snapshot import Snapshot, State, parameters_alone, unpack

MODEL, STATE, RUN, LINEAGES = "model.safetensors", "state.safetensors", "run.json", "lineages.bin"
MANIFEST = "manifest.json"
MODELS = ({MODEL}, {ADAPTER, ADAPTER_CONFIG, NOTE})
"""The files that a checkpoint has besides, one of these sets."""
FOLDER = re.compile(r"step-\d{8,16}")
MAX_MANIFEST_BYTES = 4 * 2**20


class FileNote(BaseModel):
    """What a file of the checkpoint must be."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    size_bytes: Count
    sha256: Digest


class CheckpointManifest(BaseModel):
    """The content of `manifest.json`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    format: Literal["p2ptrain-checkpoint-2"] = "p2ptrain-checkpoint-2"
    position: Position
    last: EntryHeader | None
    state_digest: Digest
    files: dict[str, FileNote]
    versions: dict[str, str]
    extra: dict[str, Any]
    digest: str = ""
    """SHA-256 over all of the above."""

    def own_digest(self) -> str:
        content = self.model_dump(mode="json", exclude={"digest"})
        return _sha256(json.dumps(content, sort_keys=True).encode())


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint whose every byte was verified."""

    path: Path
    snapshot: Snapshot
    state: State
    run: RunConfig
    lineages: bytes
    """As `EntryLog` takes them."""
    base_digest: str
    """Of the model that the parameters are adapters for; empty with payload `full`."""
    versions: Mapping[str, str]
    extra: Mapping[str, Any]


# -- writing ------------------------------------------------------------------------------------------------


def save(
    directory: Path,
    snapshot: Snapshot,
    run: RunConfig,
    extra: Mapping[str, Any],
    *,
    keep: int,
    lineages: bytes,
    base_digest: str = "",
) -> Path:
    """Write the snapshot as a checkpoint in `directory` and delete all but the `keep` newest there.

    Returns its folder. `lineages` come from `EntryLog.lineages`; `extra` is JSON. Both come back from `load`,
    with None for numbers that are not finite.
    Raises StorageError, and the checkpoints of other steps are intact, if the disk is full or cannot be
    written.
    """
    contents = {
        **_model_files(snapshot, run, base_digest),
        STATE: snapshot.blob,
        RUN: run.model_dump_json(indent=2).encode(),
        LINEAGES: lineages,
    }
    manifest = CheckpointManifest(
        position=snapshot.position,
        last=snapshot.last,
        state_digest=snapshot.state_digest,
        files={
            name: FileNote(size_bytes=len(content), sha256=_sha256(content))
            for name, content in contents.items()
        },
        versions={
            "p2ptrain": p2ptrain.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        extra=json.loads(json.dumps(dict(extra)), parse_constant=lambda _: None),
    )
    manifest = manifest.model_copy(update={"digest": manifest.own_digest()})
    contents[MANIFEST] = manifest.model_dump_json(indent=2).encode()

    target = directory / f"step-{snapshot.position.step:08d}"
    partial = _aside(target, "partial")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in (*directory.glob(".partial-*"), *directory.glob(".deleted-*")):
            shutil.rmtree(leftover)  # of a process that was killed at it
        partial.mkdir()
        for name, content in contents.items():
            _write(partial / name, content)
        _flush(partial)
        if target.exists():  # the same step again: a resumed run, or another lineage after a rollback
            _delete(target)
        partial.rename(target)
        _flush(directory)
        for surplus in _ranked(directory)[keep:]:
            if surplus != target:
                _delete(surplus)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        size = sum(len(content) for content in contents.values())
        raise StorageError(
            f"cannot write a checkpoint of {size / 1e6:.1f} MB to {directory}: {error.strerror or error}; "
            "make room there or choose another data_dir in the peer file; other checkpoints are intact"
        ) from error
    return target


def _model_files(snapshot: Snapshot, run: RunConfig, base_digest: str) -> dict[str, bytes]:
    if run.payload == "full":
        return {MODEL: parameters_alone(snapshot.blob)}
    return adapter_files(unpack(snapshot.blob).parameters, run, base_digest, snapshot.position)


def discard_after(directory: Path, step: int) -> None:
    """Delete the checkpoints of later steps: what led to them is void. Raises OSError."""
    for path in directory.glob("step-*") if directory.is_dir() else ():
        if FOLDER.fullmatch(path.name) and int(path.name.removeprefix("step-")) > step:
            _delete(path)


def _aside(folder: Path, why: str) -> Path:
    return folder.with_name(f".{why}-{folder.name}")


def _delete(folder: Path) -> None:
    """Renamed first, so that no half-deleted checkpoint can be taken for a whole one."""
    folder.rename(_aside(folder, "deleted"))
    shutil.rmtree(_aside(folder, "deleted"))


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Make the folder's own entries last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading ------------------------------------------------------------------------------------------------


def latest(directory: Path) -> Path | None:
    """The newest whole checkpoint in `directory`: the one with the most samples behind it. None if none is.

    A folder without a valid manifest, or with a file missing or of another size, is passed over. Hashes are
    for `load` to check.
    """
    ranked = _ranked(directory)
    return ranked[0] if ranked else None


def load(path: Path) -> LoadedCheckpoint:
    """Read a checkpoint and verify every byte of it.

    Raises CheckpointError that names the file and what to do if anything is missing, damaged or does not fit
    together.
    """
    manifest = _read_manifest(path)
    contents = {name: _read(path / name) for name in manifest.files}
    for name, note in manifest.files.items():
        content = contents[name]
        if len(content) != note.size_bytes or _sha256(content) != note.sha256:
            raise _damaged(
                path / name,
                f"expected {note.size_bytes} bytes of SHA-256 {note.sha256[:8]}, "
                f"found {len(content)} of {_sha256(content)[:8]}",
            )
    try:
        state = unpack(contents[STATE])
        run = RunConfig.model_validate_json(contents[RUN])
        base_digest = Note.model_validate_json(contents[NOTE]).base_digest if NOTE in contents else ""
    except (BadMessage, ValidationError) as error:
        raise _damaged(path, f"another version of p2ptrain wrote it ({error})") from error
    if state.digest() != manifest.state_digest:
        raise _damaged(
            path / STATE, f"expected state {manifest.state_digest[:8]}, found {state.digest()[:8]}"
        )
    snapshot = Snapshot(manifest.position, manifest.last, manifest.state_digest, contents[STATE])
    return LoadedCheckpoint(
        path,
        snapshot,
        state,
        run,
        contents[LINEAGES],
        base_digest,
        manifest.versions,
        manifest.extra,
    )


def restore(replica: Replica, checkpoint: LoadedCheckpoint) -> None:
    """Put the replica where the checkpoint is.

    Raises IncompatibleRun if it is of another run, CheckpointError if it does not fit the replica's model;
    nothing changed then.
    """
    if differences := difference(replica.run, checkpoint.run):
        raise IncompatibleRun(
            f"the checkpoint {checkpoint.path} is of another run ({'; '.join(differences[:3])}); "
            "choose another data_dir in the peer file, or the run file it was written with"
        )
    if replica.base_digest != checkpoint.base_digest:
        raise IncompatibleRun(
            f"the checkpoint {checkpoint.path} holds adapters for a model of digest "
            f"{checkpoint.base_digest[:8]}, but the model here is {replica.base_digest[:8]}; set `model` in "
            "the peer file to the folder of the one that they were trained for"
        )
    try:
        replica.load_state(checkpoint.snapshot)
    except BadMessage as error:
        raise _damaged(checkpoint.path, str(error)) from error


def _ranked(directory: Path) -> list[Path]:
    """Whole checkpoints, the newest first."""
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        if FOLDER.fullmatch(path.name):
            try:
                manifest = _read_manifest(path)
                whole = all(
                    (path / name).stat().st_size == note.size_bytes for name, note in manifest.files.items()
                )
            except (CheckpointError, OSError):
                continue
            if whole:
                found.append((manifest.position.weight, manifest.position.step, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _read_manifest(path: Path) -> CheckpointManifest:
    file = path / MANIFEST
    try:
        manifest = CheckpointManifest.model_validate_json(_read(file, MAX_MANIFEST_BYTES))
    except ValidationError as error:
        raise _damaged(file, f"{error.error_count()} of its fields are not as they must be") from error
    if manifest.files.keys() not in [models | {STATE, RUN, LINEAGES} for models in MODELS]:
        raise _damaged(file, f"it lists files {sorted(manifest.files)[:5]}")
    if manifest.digest != manifest.own_digest():
        raise _damaged(file, f"expected digest {manifest.digest[:8]}, found {manifest.own_digest()[:8]}")
    return manifest


def _read(path: Path, max_bytes: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(max_bytes)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not part of a whole checkpoint: {what}; delete its step folder to go on from the one "
        "before it, or without any from the swarm's state"
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# -- comparing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Where two checkpoints first differ, and what each has there."""

    where: str
    """`step`, `lineage` or `weight`; else the name of a tensor or scalar of the state."""
    index: int | None
    """For a tensor: which of its values, counted in memory order; None if one of the two lacks it."""
    a: str
    b: str

    def __str__(self) -> str:
        at = "" if self.index is None else f"[{self.index}]"
        return f"{self.where}{at}: {self.a} in the first, {self.b} in the second"


@dataclass(frozen=True)
class Comparison:
    """Where each of two checkpoints stands, and where they first differ."""

    a: Position
    b: Position
    difference: Difference | None
    """None if both hold the same state, bit for bit, and the same log led there."""

    @property
    def equal(self) -> bool:
        return self.difference is None


def compare(a: Path, b: Path) -> Comparison:
    """Where two checkpoints first differ: first by position, then tensor by tensor in order of names, bit for
    bit.

    Equal positions with different states would break I2. Raises CheckpointError if either is not whole.
    """
    one, other = load(a), load(b)
    return Comparison(one.snapshot.position, other.snapshot.position, _first_difference(one, other))


def _first_difference(a: LoadedCheckpoint, b: LoadedCheckpoint) -> Difference | None:
    here, there = a.snapshot.position, b.snapshot.position
    for field in ("step", "lineage", "weight"):
        if getattr(here, field) != getattr(there, field):
            return Difference(field, None, str(getattr(here, field)), str(getattr(there, field)))
    mine, theirs = a.state.tensors(), b.state.tensors()
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs or mine[name].shape != theirs[name].shape:
            shapes = (str(list(side[name].shape)) if name in side else "missing" for side in (mine, theirs))
            return Difference(name, None, *shapes)
        # As integers, so that 0.0 and -0.0 differ and a NaN equals itself.
        differs = mine[name].view(torch.int32) != theirs[name].view(torch.int32)
        if differs.any():
            index = int(differs.reshape(-1).byte().argmax())
            values = (repr(side[name].reshape(-1)[index].item()) for side in (mine, theirs))
            return Difference(name, index, *values)
    for name in sorted(a.state.scalars.keys() | b.state.scalars.keys()):
        if a.state.scalars.get(name) != b.state.scalars.get(name):
            return Difference(name, None, str(a.state.scalars.get(name)), str(b.state.scalars.get(name)))
    return None
