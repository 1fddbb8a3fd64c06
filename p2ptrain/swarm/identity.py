"""Who a peer is: an Ed25519 key in a file, and the libp2p peer id that contains its public half.

Because the id contains the key, whoever knows a peer id can check that peer's signatures with nothing else at
hand. The file is the key in libp2p's own protobuf form, so that the daemon can read it too.

Not covered: RSA and secp256k1 identities, such as hivemind makes; the file is not encrypted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from p2ptrain.errors import LocalFault, StorageError
from p2ptrain.records import PeerId

SIGNATURE_BYTES = 64
MAX_ID_CHARACTERS = 128

# Protobuf `PrivateKey {type: Ed25519, data: 64 bytes}`: the seed, then the public key again.
_PRIVATE_HEAD = bytes.fromhex("08011240")
_FILE_BYTES = len(_PRIVATE_HEAD) + 64
# Multihash "identity, 36 bytes" of protobuf `PublicKey {type: Ed25519, data: 32 bytes}`.
_PUBLIC_HEAD = bytes.fromhex("002408011220")


@dataclass(frozen=True)
class Identity:
    """A peer's key. Its `repr` shows the peer id only."""

    peer_id: PeerId
    _key: Ed25519PrivateKey

    def sign(self, message: bytes) -> bytes:
        """The 64 bytes that `verify` accepts for this peer and this message."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"


def load_or_create(path: Path) -> Identity:
    """The identity in this file; a new one, readable by its owner only, if there is no such file.

    Raises LocalFault if the file holds something else, StorageError if it cannot be read or written.
    """
    try:
        try:
            return _parse(path.read_bytes(), path)
        except FileNotFoundError:
            return _create(path)
    except OSError as error:
        raise StorageError(
            f"the identity file {path} cannot be read or made: {error.strerror}; "
            "check the folder's permissions and free space, or name another file"
        ) from error


def load(path: Path) -> Identity:
    """The identity in this file. Raises LocalFault if it holds something else, StorageError if there is none
    or it cannot be read."""
    try:
        return _parse(path.read_bytes(), path)
    except OSError as error:
        raise StorageError(
            f"the identity file {path} cannot be read: {error.strerror}; name the file or the folder of a "
            "peer that has run"
        ) from error


def store(identity: Identity, path: Path) -> None:
    """Write the identity to a file that is not there yet, readable by its owner only. Raises StorageError."""
    try:
        _write(identity._key, path)
    except FileExistsError:
        raise StorageError(
            f"{path} is there already, and a key that is overwritten is lost; move it away first"
        ) from None
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; name another place") from error


def of_seed(seed: bytes) -> Identity:
    """The identity whose private key is these 32 bytes."""
    return _identity(Ed25519PrivateKey.from_private_bytes(seed))


def verify(peer: str, message: bytes, signature: bytes) -> bool:
    """Whether the peer of this id signed this message; False, not an error, for any damage or kind of id."""
    if len(peer) > MAX_ID_CHARACTERS:  # a stranger wrote it, and to decode takes the square of its length
        return False
    try:
        raw = base58.b58decode(peer)
        if len(raw) != len(_PUBLIC_HEAD) + 32 or not raw.startswith(_PUBLIC_HEAD):
            return False
        Ed25519PublicKey.from_public_bytes(raw[len(_PUBLIC_HEAD) :]).verify(signature, message)
    except (ValueError, InvalidSignature):
        return False
    return True


def _create(path: Path) -> Identity:
    key = Ed25519PrivateKey.generate()
    _write(key, path)
    return _identity(key)


def _write(key: Ed25519PrivateKey, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # O_EXCL: of two peers that start at once, one makes the file and the other reads it or fails.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_PRIVATE_HEAD + key.private_bytes_raw() + key.public_key().public_bytes_raw())
    except OSError:
        path.unlink()  # on a full disk: half a key would be refused for ever
        raise


def _parse(content: bytes, path: Path) -> Identity:
    remedy = "put the right file there, or move it away and a new identity will be made"
    if len(content) != _FILE_BYTES or not content.startswith(_PRIVATE_HEAD):
        raise LocalFault(
            f"the identity file {path} should hold an Ed25519 key in libp2p form ({_FILE_BYTES} bytes), "
            f"but holds {len(content)} bytes of something else; {remedy}"
        )
    seed, public = content[len(_PRIVATE_HEAD) :][:32], content[-32:]
    key = Ed25519PrivateKey.from_private_bytes(seed)
    if key.public_key().public_bytes_raw() != public:
        raise LocalFault(
            f"the identity file {path} is damaged: its two halves do not belong together; {remedy}"
        )
    return _identity(key)


def _identity(key: Ed25519PrivateKey) -> Identity:
    return Identity(peer_id_of(key.public_key().public_bytes_raw()), key)


def peer_id_of(public: bytes) -> PeerId:
    """The peer id of a raw Ed25519 public key, 32 bytes."""
    return PeerId(base58.b58encode(_PUBLIC_HEAD + public).decode())
