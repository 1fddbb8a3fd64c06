"""A replica's whole state as bytes, in pieces that a joiner can fetch from several peers and verify.

The bytes (the *blob*) are a safetensors file: parameters as `model.<name>`, optimizer tensors as
`optimizer.<name>`, and the optimizer's scalars as text in its metadata. safetensors holds shapes and raw
numbers and can run nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from p2ptrain.errors import BadMessage
from p2ptrain.records import EntryHeader, Manifest, Position

METADATA, FORMAT = "p2ptrain", "p2ptrain-state-1"
PIECE_BYTES = 2**20
MAX_PIECES = 3000  # as in records.Manifest


# -- the state and its bytes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What the log has led to: all that the next `apply` depends on, besides the position."""

    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    scalars: Mapping[str, float]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under the names they have in the blob."""
        return {f"model.{name}": tensor for name, tensor in self.parameters.items()} | {
            f"optimizer.{name}": tensor for name, tensor in self.optimizer.items()
        }

    def digest(self) -> str:
        """SHA-256 over every tensor's name, shape and bytes in order of names, then the scalars."""
        tensors = self.tensors()
        return _digest(
            {name: list(tensor.shape) for name, tensor in tensors.items()},
            lambda name: tensors[name].detach().reshape(-1).numpy().data,
            "\n".join(_scalar_lines(self.scalars)),
        )


def _digest(shapes: Mapping[str, list[int]], values: Callable[[str], memoryview], scalars: str) -> str:
    sha = hashlib.sha256()
    for name, shape in sorted(shapes.items()):
        sha.update(json.dumps([name, shape]).encode() + b"\n")
        sha.update(values(name))
    sha.update(scalars.encode())
    return sha.hexdigest()


def pack(state: State) -> bytes:
    """The blob of a state. Equal states give equal bytes, so a joiner can mix pieces of several peers."""
    tensors = {name: tensor.detach() for name, tensor in state.tensors().items()}
    # One entry of metadata, because safetensors writes several in any order.
    return save_safetensors(tensors, {METADATA: "\n".join((FORMAT, *_scalar_lines(state.scalars)))})


def unpack(blob: bytes) -> State:
    """The state in a blob, names and shapes unchecked. Raises BadMessage if it is not a blob of ours."""
    try:
        tensors = load_safetensors(blob)
        header_bytes = int.from_bytes(blob[:8], "little")
        metadata = json.loads(blob[8 : 8 + header_bytes])["__metadata__"]
        found, *lines = metadata[METADATA].split("\n")
        if found != FORMAT:
            raise ValueError(f"its format is {found[:40]!r}, not {FORMAT}")
        if strays := [name for name in tensors if not name.startswith(("model.", "optimizer."))]:
            raise ValueError(f"it holds {strays[0][:40]!r}")
        scalars = {name: float.fromhex(value) for name, value in (line.split("=") for line in lines)}
    # KeyError is also what safetensors raises for a dtype that torch lacks.
    except (SafetensorError, KeyError, ValueError, OverflowError) as error:
        raise BadMessage(f"a state must be a safetensors file of ours: {error}") from error
    return State(
        parameters=_under("model.", tensors), optimizer=_under("optimizer.", tensors), scalars=scalars
    )


# A blob that this process has packed is read in place: memory that every checkpoint takes for a moment is
# memory that the process keeps.


def _header(blob: bytes) -> tuple[dict[str, Any], memoryview]:
    """What a blob of ours says of each tensor, its metadata among it, and the bytes that offsets count in."""
    begin = 8 + int.from_bytes(blob[:8], "little")
    return json.loads(blob[8:begin]), memoryview(blob)[begin:]


def state_digest_of(blob: bytes) -> str:
    """What `State.digest` says of the state in a blob of ours."""
    notes, content = _header(blob)
    _, _, scalars = notes.pop("__metadata__")[METADATA].partition("\n")
    shapes = {name: note["shape"] for name, note in notes.items()}
    return _digest(shapes, lambda name: content[slice(*notes[name]["data_offsets"])], scalars)


def parameters_alone(blob: bytes) -> bytes:
    """The parameters in a blob of ours as a safetensors file of their own, under the model's own names."""
    notes, content = _header(blob)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts = []
    end = 0
    for name, note in notes.items():
        if name.startswith("model."):
            parts.append(content[slice(*note["data_offsets"])])
            begin, end = end, end + len(parts[-1])
            header[name.removeprefix("model.")] = note | {"data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that the values begin at a multiple of 8
    return b"".join((len(head).to_bytes(8, "little"), head, *parts))


def _scalar_lines(scalars: Mapping[str, float]) -> list[str]:
    return [f"{name}={value.hex()}" for name, value in sorted(scalars.items())]  # hexadecimal is exact


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


# -- giving it -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """The state at a committed step: `last` is the entry that led there, None at step 0."""

    position: Position
    last: EntryHeader | None
    state_digest: str
    blob: bytes

    def manifest(self) -> Manifest:
        """What a joiner must know to fetch this from anyone who has it."""
        return Manifest(
            position=self.position,
            state_digest=self.state_digest,
            size_bytes=len(self.blob),
            piece_bytes=self.piece_bytes,
            pieces=self._piece_digests,
            last=self.last,
        )

    def piece(self, number: int) -> memoryview:
        """Raises IndexError if there is no such piece."""
        if not 0 <= number < len(self._piece_digests):
            raise IndexError(f"there is no piece {number}; this snapshot has {len(self._piece_digests)}")
        return memoryview(self.blob)[number * self.piece_bytes : (number + 1) * self.piece_bytes]

    @property
    def piece_bytes(self) -> int:
        """`PIECE_BYTES`, or as many times that as it takes for the manifest to stay within `MAX_PIECES`."""
        return PIECE_BYTES * max(1, -(-len(self.blob) // (PIECE_BYTES * MAX_PIECES)))

    @cached_property
    def _piece_digests(self) -> tuple[str, ...]:
        view = memoryview(self.blob)
        starts = range(0, len(view), self.piece_bytes)
        return tuple(hashlib.sha256(view[at : at + self.piece_bytes]).hexdigest() for at in starts)


@dataclass(frozen=True)
class Packed:
    """A snapshot before it is hashed: copying the state holds up training, hashing the copy does not."""

    position: Position
    last: EntryHeader | None
    state_digest: str | None
    """None if it was not known yet."""
    blob: bytes

    def snapshot(self) -> Snapshot:
        """The same with all its digests."""
        digest = self.state_digest or state_digest_of(self.blob)
        snapshot = Snapshot(self.position, self.last, digest, self.blob)
        snapshot.manifest()  # hashes the pieces, once
        return snapshot


# -- getting it ----------------------------------------------------------------------------------------------


class Assembly:
    """A snapshot being put together from pieces, in any order and from any peer.

    It holds as much as the manifest announces: compare `size_bytes` with `Replica.max_state_bytes` first.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Raises BadMessage if the manifest contradicts itself."""
        expected = -(-manifest.size_bytes // manifest.piece_bytes)
        if len(manifest.pieces) != expected:
            raise BadMessage(
                f"a snapshot of {manifest.size_bytes} bytes has {expected} pieces of {manifest.piece_bytes}, "
                f"not {len(manifest.pieces)}"
            )
        self.manifest = manifest
        self._pieces: dict[int, bytes] = {}

    def missing(self) -> list[int]:
        """Numbers of the pieces that are not here yet, in rising order."""
        return [number for number in range(len(self.manifest.pieces)) if number not in self._pieces]

    def add(self, number: int, data: bytes) -> None:
        """Take piece `number` in. Raises BadMessage, and changes nothing, if it is not the manifest's."""
        manifest = self.manifest
        if not 0 <= number < len(manifest.pieces):
            raise BadMessage(f"there is no piece {number}; this snapshot has {len(manifest.pieces)}")
        expected = min(manifest.piece_bytes, manifest.size_bytes - number * manifest.piece_bytes)
        if len(data) != expected:
            raise BadMessage(f"piece {number} of a snapshot must have {expected} bytes, not {len(data)}")
        digest = hashlib.sha256(data).hexdigest()
        if digest != manifest.pieces[number]:
            raise BadMessage(
                f"piece {number} of a snapshot has digest {digest[:8]}, its manifest says "
                f"{manifest.pieces[number][:8]}; ask another peer for it"
            )
        self._pieces[number] = data

    def blob(self) -> bytes:
        """The bytes of the snapshot. Raises ValueError while pieces are missing."""
        if missing := self.missing():
            raise ValueError(f"{len(missing)} of {len(self.manifest.pieces)} pieces are missing")
        return b"".join(self._pieces[number] for number in range(len(self._pieces)))

    def snapshot(self) -> Snapshot:
        """The same as a snapshot, to load and to give on."""
        manifest = self.manifest
        return Snapshot(manifest.position, manifest.last, manifest.state_digest, self.blob())
