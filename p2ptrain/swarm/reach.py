"""Whether other peers can open connections to this one, and the way around it if they cannot.

Whoever is hidden by a router or a firewall still opens connections to all that are not, and two-way streams
run over those. Two hidden peers meet at a relay: a peer that both are connected to, and that passes their
encrypted bytes on. What is asked and answered, and the addresses in it, are here; `libp2p` does the dialling.

A peer dials back only to the very address that it was asked from, so that nobody can have it knock on a third
one's door.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

import base58

from p2ptrain.errors import BadMessage
from p2ptrain.records import Dialled, PeerId

PROTOCOL = "/p2ptrain/1/reach"
"""Of the stream with the question: `DialBack` one way, `Dialled` the other."""

DIAL_SECONDS = 3.0
"""For a dial back: three tries of a TCP that loses packets."""
ANSWER_SECONDS = 8.0
"""For the answer: the one who is asked has to start a daemon first, and may be busy with others."""
MAX_DIALS = 4
"""At one time; a daemon each."""
PAUSE_SECONDS = 4.0
"""Between two questions of one peer."""
MAX_REMEMBERED = 1024

HOP = "/libp2p/circuit/relay/0.2.0/hop"
"""Protocol of a stream to a relay (circuit relay v2)."""
RESERVE = b"\x02\x08\x00"
"""The request to be reachable by way of it: its length, and that its type (field 1) is 0."""
MAX_ANSWER_BYTES = 4096
MAX_RELAYS = 8
"""That one peer asks."""
ENOUGH_BYTES = 2**30
"""A relay that passes less is for saying hello, not for gradients."""
UNLIMITED = 2**63
_LIMIT, _STATUS, _LIMIT_DATA, _OK = 4, 5, 2, 100
"""Fields of the answer, and of the limit in it; the status that is a yes."""

OTHER_IDENTITY = "peer id mismatch"
"""Part of what libp2p says when somebody else answers at the address."""

_TCP = re.compile(r"(/ip[46]/[0-9A-Fa-f.:]+)/tcp/(\d{1,5})")
_P2P, _CIRCUIT = b"\xa5\x03", b"\xa2\x02"
"""Codes 421 and 290 of multiaddresses, as varints."""


def target(observed: str, port: int) -> str | None:
    """Where to dial back to: the IP address that the question came from, at the port it names; None if it
    came by way of a relay, or over anything but TCP."""
    parts = _TCP.fullmatch(observed)
    return f"{parts[1]}/tcp/{port}" if parts is not None else None


def port_of(address: str) -> int | None:
    """The TCP port in a multiaddress."""
    parts = _TCP.match(address)
    return int(parts[2]) if parts is not None else None


def is_relayed(address: str) -> bool:
    """Whether a connection with this remote address goes by way of a relay."""
    return "/p2p-circuit" in address


def circuit(transport: bytes, relay: PeerId) -> bytes:
    """The binary multiaddress that leads through a relay at `transport`. hivemind's writer does not know
    it."""
    raw = base58.b58decode(relay)
    return bytes(transport + _P2P + bytes([len(raw)]) + raw + _CIRCUIT)


@dataclass(frozen=True)
class Reach:
    """What this peer has been told of itself."""

    reachable: bool | None = None
    """None: nobody could say."""
    address: str = ""
    """Where it was dialled."""
    detail: str = ""
    """Why that failed, in libp2p's words."""

    @property
    def hidden(self) -> bool:
        """Known not to be reachable."""
        return self.reachable is False


def judged(answers: Sequence[Dialled]) -> Reach:
    """What the answers of several peers come to: one that got through proves it; without any that tried,
    nothing is known."""
    tried = [answer for answer in answers if answer.reachable is not None]
    best = max(tried, key=lambda answer: bool(answer.reachable), default=None)
    return Reach() if best is None else Reach(best.reachable, best.address, best.detail)


def candidates(
    connections: Sequence[tuple[PeerId, str]], first: Sequence[PeerId]
) -> list[tuple[PeerId, str]]:
    """Whom to ask for a relay: some of those that are connected directly, `first` ones before others."""
    direct = {peer: address for peer, address in connections if _TCP.fullmatch(address)}
    ranked = sorted(direct.items(), key=lambda each: (each[0] not in first, each[0]))
    return ranked[:MAX_RELAYS]


def granted(answer: bytes) -> int:
    """The bytes that a relay passes on, each way of a connection, from its answer to `RESERVE`; 0 if it said
    no. Raises BadMessage."""
    try:
        fields = _fields(answer)
        most = _fields(fields.get(_LIMIT, b"")).get(_LIMIT_DATA, UNLIMITED)
    except (ValueError, IndexError) as error:
        raise BadMessage(f"a relay's answer that is none: {error}") from None
    return most if fields.get(_STATUS) == _OK and isinstance(most, int) else 0


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """One protobuf message, with its length before it. Raises BadMessage, EOFError or OSError."""
    size = 0
    for shift in (0, 7):
        [byte] = await reader.readexactly(1)
        size |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    else:
        raise BadMessage(f"an answer of 16 KiB or more; at most {MAX_ANSWER_BYTES} bytes are taken")
    if size > MAX_ANSWER_BYTES:
        raise BadMessage(f"an answer of {size} bytes; at most {MAX_ANSWER_BYTES} are taken")
    return await reader.readexactly(size)


def _fields(message: bytes | int) -> dict[int, bytes | int]:
    """Number → value of a protobuf message that has no other fields than numbers and bytes."""
    if isinstance(message, int):
        raise ValueError("a number where a message was expected")
    found: dict[int, bytes | int] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        value, at = _varint(message, at)
        if tag & 7 == 2:
            if at + value > len(message):
                raise ValueError("a field that is cut short")
            found[tag >> 3], at = message[at : at + value], at + value
        elif tag & 7 == 0:
            found[tag >> 3] = value
        else:
            raise ValueError(f"a field of wire type {tag & 7}")
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (message[at] & 0x7F) << shift
        at += 1
        if message[at - 1] < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")


class Doorkeeper:
    """Whom to dial back to now: few at a time, and each not too often."""

    def __init__(self) -> None:
        self._dialling = 0
        self._asked: dict[PeerId, float] = {}

    def admits(self, peer: PeerId, now: float) -> bool:
        """Whether to dial; if so, call `done` afterwards."""
        if self._dialling >= MAX_DIALS or now - self._asked.get(peer, -PAUSE_SECONDS) < PAUSE_SECONDS:
            return False
        if len(self._asked) >= MAX_REMEMBERED:
            self._asked.clear()
        self._asked[peer] = now
        self._dialling += 1
        return True

    def done(self) -> None:
        self._dialling -= 1
