"""The invite: one line of text that an organizer hands to volunteers, and all they need to find a run.

    p2ptrain:<base64url of: compact JSON, then its CRC-32>

The envelope (prefix, base64url without padding, little-endian CRC-32 at the end) stays the same in every
version, so an older p2ptrain can tell a newer invite from a damaged one. What the JSON holds may change with
its `version`. The CRC is there for slips of the hand: it finds every burst of damage up to 32 bits, and so
every changed character. It is no seal: whoever can change an invite can make another. The run that an invite
leads to must have its `run_digest`, and each address names the peer id which the connection must prove.

Not covered yet: the organizer's signature, expiry, and who may use an invite how often.
"""

from __future__ import annotations

import base64
import zlib
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from p2ptrain.config import RunId
from p2ptrain.errors import InviteError
from p2ptrain.records import Digest, Record

PREFIX = "p2ptrain:"
VERSION = 1
MAX_INVITE_CHARACTERS = 16 * 1024
"""Of an invite without its white space. Version 1 needs at most a fifth; later versions shall fit as well."""

_SEGMENTS = r"(/[A-Za-z0-9.:%_-]+)"
PeerAddress = Annotated[
    str, Field(pattern=rf"^{_SEGMENTS}+/p2p/[1-9A-HJ-NP-Za-km-z]{{32,64}}{_SEGMENTS}*$", max_length=256)
]


class Invite(Record):
    """Where a run is to be found."""

    version: Literal[1] = 1
    run_id: RunId
    run_digest: Digest
    """`config.run_digest` of the run: what the first peer reached sends must have it."""
    addresses: Annotated[tuple[PeerAddress, ...], Field(min_length=1, max_length=8)]
    """Multiaddresses of peers to enter by, each with the peer's id: `/ip4/…/tcp/…/p2p/12D3Koo…`."""


class _AnyVersion(BaseModel):
    """The one thing that every version's JSON holds."""

    version: Annotated[int, Field(strict=True, ge=1, lt=2**31)]


def encode(invite: Invite) -> str:
    """The invite as one line, of nothing but `A-Z a-z 0-9 - _ :`."""
    return _wrapped(invite.model_dump_json().encode())


def decode(text: str) -> Invite:
    """The invite in `text`, whatever white space a mail or chat put around or into it. Raises InviteError."""
    line = "".join(text.split())
    if not line:
        raise InviteError(f"the invite is empty; paste the whole line that begins with {PREFIX}")
    if not line.startswith(PREFIX):
        raise InviteError(f"{line[:24]!r} is not how an invite begins; paste the whole line from {PREFIX} on")
    body = _body(line)
    if body is None:
        raise InviteError("this invite is damaged or cut short; copy the whole line once more")
    try:
        version = _AnyVersion.model_validate_json(body).version
        if version > VERSION:
            raise InviteError(f"this invite is of version {version}, newer than {VERSION}; upgrade p2ptrain")
        return Invite.model_validate_json(body)
    except ValidationError as error:
        raise InviteError(f"this invite {_flaw(error)}; ask the organizer for another one") from None


def _body(line: str) -> bytes | None:
    """The JSON in an invite's line; None unless every character is as it was when the invite was made."""
    if len(line) > MAX_INVITE_CHARACTERS:
        return None
    code = line.removeprefix(PREFIX)
    try:
        checked = base64.b64decode(code + "=" * (-len(code) % 4), altchars=b"-_", validate=True)
    except ValueError:
        return None
    body = checked[:-4]
    # Wrapped anew it must give the same line. This compares the checksum, and finds the damage that base64
    # hides, because it can spell some bytes in several ways.
    return body if _wrapped(body) == line else None


def _wrapped(body: bytes) -> str:
    # Little-endian as the CRC's own bit order is: so its promise about bursts holds across the seam as well.
    checked = body + zlib.crc32(body).to_bytes(4, "little")
    return PREFIX + base64.urlsafe_b64encode(checked).rstrip(b"=").decode()


def _flaw(error: ValidationError) -> str:
    """What is wrong with an intact invite, as the end of "this invite …"."""
    first = error.errors(include_url=False)[0]
    match first["loc"], first["type"]:
        case ("addresses",), "missing" | "too_short":
            return "names no address, so there is nobody to reach by it"
        case ("addresses", int(index)), _:
            return f"has an address (number {index + 1}) that is not one of a peer: /…/p2p/<peer id>"
        case (str(key), *_), _:
            return f"was not made by p2ptrain: its {key[:40]!r} is not valid"
        case _:
            return "was not made by p2ptrain: it holds no JSON of ours"
