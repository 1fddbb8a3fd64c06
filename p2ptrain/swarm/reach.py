"""Whether other peers can open connections to this one, and the way around it if they cannot.

Whoever is hidden by a router or a firewall still opens connections to all that are not, and two-way streams
run over those. Two hidden peers meet at a relay: a peer that both are connected to, and that passes their
encrypted bytes on. What is asked and answered, and the addresses in it, are here; `libp2p` does the dialling.

A peer dials back only to the very address that it was asked from, so that nobody can have it knock on a third
one's door.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import base58

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
    return transport + _P2P + bytes([len(raw)]) + raw + _CIRCUIT


@dataclass(frozen=True)
class Reach:
    """What this peer has been told of itself."""

    reachable: bool | None = None
    """None: nobody could say."""
    address: str = ""
    """Where it was dialled."""
    detail: str = ""
    """Why that failed, in libp2p's words."""
    relays: frozenset[PeerId] = frozenset()
    """Who passes on what hidden peers have for each other."""

    @property
    def hidden(self) -> bool:
        """Known not to be reachable."""
        return self.reachable is False


def judged(answers: dict[PeerId, Dialled]) -> Reach:
    """What the answers of several peers come to: one that got through proves it; without any that tried,
    nothing is known."""
    relays = frozenset(peer for peer, answer in answers.items() if answer.relays)
    tried = [answer for answer in answers.values() if answer.reachable is not None]
    if not tried:
        return Reach(relays=relays)
    best = max(tried, key=lambda answer: bool(answer.reachable))
    return Reach(bool(best.reachable), best.address, best.detail, relays)


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
