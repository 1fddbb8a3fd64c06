"""The invite: one line of text that an organizer hands to volunteers, and all they need to find a run and be
let in.

    p2ptrain:<base64url of: compact JSON, then its CRC-32>

The envelope (prefix, base64url without padding, little-endian CRC-32 at the end) stays the same in every
version, so an older p2ptrain can tell a newer invite from a damaged one. What the JSON holds may change with
its `version`. The CRC is there for slips of the hand: it finds every burst of damage up to 32 bits, and so
every changed character.

What an invite allows is its grant, which the organizer has signed; `gate` checks it at every peer. Beside it
are the secret by which a peer proves that the grant is its own, and addresses to enter by. These are not
signed, so that an invite can be given other ones when its bootstrap is gone: each names the peer id which the
connection must prove, and whoever answers there must show a pass by the same organizer.

Not covered: whoever has the line has the invite, and may pass it on.
"""

from __future__ import annotations

import base64
import secrets
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from p2ptrain.errors import InviteError
from p2ptrain.events import clean
from p2ptrain.records import Grant, Pass, PeerId, Permission, Record, Redeemed, Signature
from p2ptrain.swarm.identity import Identity, of_seed, verify
from p2ptrain.swarm.validator import MAX_CLOCK_SKEW_SECONDS

PREFIX = "p2ptrain:"
VERSION = 2
MAX_INVITE_CHARACTERS = 16 * 1024
"""Of an invite without its white space. Version 2 needs at most a third; later versions shall fit as well."""

_SEGMENTS = r"(/[A-Za-z0-9.:%_-]+)"
ENTRANCE = rf"^{_SEGMENTS}+/p2p/[1-9A-HJ-NP-Za-km-z]{{32,64}}{_SEGMENTS}*$"
"""An address with the id of who is there."""
PeerAddress = Annotated[str, Field(pattern=ENTRANCE, max_length=256)]
ASK = "ask the organizer for another one"


class Invite(Record):
    """Where a run is to be found, and the right to take part in it."""

    version: Literal[2] = 2
    grant: Grant
    signature: Signature
    """Of the grant, by the organizer."""
    secret: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    """The secret half of the grant's key."""
    addresses: Annotated[tuple[PeerAddress, ...], Field(min_length=1, max_length=8)]
    """Multiaddresses of peers to enter by, each with the peer's id: `/ip4/…/tcp/…/p2p/12D3Koo…`."""

    @property
    def run_id(self) -> str:
        return self.grant.run_id

    @property
    def run_digest(self) -> str:
        """`config.run_digest` of the run: what the first peer reached sends must have it."""
        return self.grant.run_digest

    def shown_by(self, peer: PeerId) -> Pass:
        """The pass that this peer may show: bound to its id, so that who sees it has no use for it."""
        proof = of_seed(bytes.fromhex(self.secret)).sign(_claim(self.signature, peer))
        return Pass(grant=self.grant, signature=self.signature, proof=proof.hex())


class _AnyVersion(BaseModel):
    """The one thing that every version's JSON holds."""

    version: Annotated[int, Field(strict=True, ge=1, lt=2**31)]


# -- made by the organizer -----------------------------------------------------------------------------------


def issue(
    organizer: Identity,
    *,
    run_id: str,
    run_digest: str,
    addresses: Sequence[str],
    role: Permission,
    serial: int,
    issued: int,
    expires: int | None,
    name: str = "",
    uses: int | None = None,
) -> Invite:
    """A new invite, signed with the organizer's key and nothing else: no server has to know of it."""
    seed = secrets.token_bytes(32)
    grant = Grant(
        run_id=run_id,
        run_digest=run_digest,
        organizer=organizer.peer_id,
        key=of_seed(seed).peer_id,
        role=role,
        serial=serial,
        name=name,
        issued=issued,
        expires=expires,
        uses=uses,
    )
    signature = organizer.sign(_charter(grant)).hex()
    return Invite(grant=grant, signature=signature, secret=seed.hex(), addresses=tuple(addresses))


def redeemed(organizer: Identity, grant: Grant, peer: PeerId) -> Redeemed:
    """What that grant allows, to this peer alone, and signed with the organizer's key of now."""
    own = grant.model_copy(update={"organizer": organizer.peer_id, "key": peer, "uses": None})
    return Redeemed(grant=own, signature=organizer.sign(_charter(own)).hex())


def pass_of(own: Redeemed, identity: Identity) -> Pass:
    """What the peer that this was given to shows."""
    proof = identity.sign(_claim(own.signature, identity.peer_id))
    return Pass(grant=own.grant, signature=own.signature, proof=proof.hex())


# -- checked by everybody ------------------------------------------------------------------------------------


def is_signed(grant: Grant, signature: str) -> bool:
    """Whether the organizer that the grant names has signed all of it."""
    return verify(grant.organizer, _charter(grant), bytes.fromhex(signature))


def is_borne_by(shown: Pass, peer: PeerId) -> bool:
    """Whether the pass was made for this peer by somebody who had the invite."""
    return verify(shown.grant.key, _claim(shown.signature, peer), bytes.fromhex(shown.proof))


def untimely(grant: Grant, now: float) -> str:
    """Why the grant does not hold at this time, as the end of "the invite …"; empty if it does."""
    if grant.issued > now + MAX_CLOCK_SKEW_SECONDS:
        return f"is not valid before {as_date(grant.issued)}, and it is {as_date(now)} by the clock here"
    return ended(grant, now)


def ended(grant: Grant, now: float) -> str:
    """The same, but for when it began: a clock that is set back shall put nobody out who is in."""
    if grant.expires is not None and now >= grant.expires:
        return f"expired at {as_date(grant.expires)}, and it is {as_date(now)} by the clock here"
    return ""


def check(invite: Invite, now: float, *, role: Permission = "watch") -> None:
    """Raises InviteError unless the invite holds at this time and allows what this role does."""
    if flaw := untimely(invite.grant, now):
        raise InviteError(f"this invite {flaw}; if that is the wrong time, set the clock, else {ASK}")
    if role == "train" and invite.grant.role != "train":
        raise InviteError(
            f"this invite is for role {invite.grant.role!r} and not for 'train'; ask the organizer for one "
            "that is"
        )


def as_date(moment: float) -> str:
    """A time as people read it."""
    moment = min(moment, 253_402_300_799)  # the last second that has a date here; a `Moment` may be later
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _charter(grant: Grant) -> bytes:
    """What the organizer signs."""
    return b"p2ptrain grant\0" + grant.model_dump_json().encode()


def _claim(signature: str, peer: str) -> bytes:
    """What the grant's key signs."""
    return b"p2ptrain pass\0" + bytes.fromhex(signature) + peer.encode()


# -- the line ------------------------------------------------------------------------------------------------


def encode(invite: Invite) -> str:
    """The invite as one line, of nothing but `A-Z a-z 0-9 - _ :`."""
    return _wrapped(invite.model_dump_json().encode())


def decode(text: str) -> Invite:
    """The invite in `text`, whatever white space a mail or chat put around or into it. Raises InviteError.

    Its organizer has signed it. Whether it holds now is for `check`, and for the peers to say.
    """
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
        if version != VERSION:
            remedy = "upgrade p2ptrain" if version > VERSION else ASK
            raise InviteError(f"this invite is of version {version} and not {VERSION}; {remedy}")
        invite = Invite.model_validate_json(body)
    except ValidationError as error:
        raise InviteError(f"this invite {_flaw(error)}; {ASK}") from None
    signed = is_signed(invite.grant, invite.signature)
    if not signed or of_seed(bytes.fromhex(invite.secret)).peer_id != invite.grant.key:
        raise InviteError(
            f"this invite to {invite.run_id!r} is not as its organizer signed it: somebody has changed it; "
            f"{ASK}"
        )
    return invite


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
        case (*_, str(key)), _:
            return f"was not made by p2ptrain: its {clean(key, 40)!r} is not valid"
        case _:
            return "was not made by p2ptrain: it holds no JSON of ours"
