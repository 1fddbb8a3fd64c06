"""What a simulated peer does about lying reducers: it audits what is drawn for it, and tells what it has
proven.

A mean that is a lie ends with `LIE`, the same for all, so that nothing but an audit can tell. Draws, and what
a conviction does to a machine, are `p2ptrain.protocol`; signatures and sums are not here, a proof is a fact.

Not covered: auditors that die, whose audits nobody does; logs that do not reach back to the lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

from p2ptrain.protocol.audit import draws
from p2ptrain.records import Ballot, EntryHeader, PeerId

if TYPE_CHECKING:
    from tests.simulation.peer import Attempt, Log, Peer

LIE = "~"
SHARE = 1.0
LOOKING_SECONDS = (0.05, 2.0)
"""Until the inputs are shown, and the sum is done again."""


@dataclass(frozen=True)
class Proof:
    """That reducer has lied in that attempt. It travels, and convinces everybody."""

    against: PeerId
    step: int
    parent: str
    ballot: Ballot

    def is_about(self, header: EntryHeader) -> bool:
        return (header.step, header.parent, header.ballot) == (self.step, self.parent, self.ballot)


@dataclass(frozen=True)
class Round:
    """One that this peer has taken part in."""

    header: EntryHeader
    chunks: list[int]
    averaged: dict[tuple[int, int], str]

    def digests(self) -> list[list[bytes]]:
        return [
            [blake3(self.averaged[rank, number].encode()).digest() for number in range(count)]
            for rank, count in enumerate(self.chunks)
        ]


class Audits:
    """One peer's."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.proofs: dict[PeerId, Proof] = {}
        """Of each liar the earliest lie."""
        self.last: Round | None = None

    def committed(self, header: EntryHeader, attempt: Attempt) -> None:
        """One more round: what of the one before is mine to look at is known now."""
        done = Round(header, attempt.reduction.chunks, attempt.averaged)
        before, self.last = self.last, done
        if before is None or before.header.step + 1 != header.step:
            return
        for draw in draws(before.header, before.chunks, header, done.digests(), SHARE):
            if draw.auditor == self.peer.name:
                seconds = self.peer.sim.chance.uniform(*LOOKING_SECONDS)
                self.peer.later(seconds, self._look, before, draw.rank, draw.number)

    def _look(self, at: Round, rank: int, number: int) -> None:
        self.peer.sim.happened["audit"] += 1
        if at.averaged[rank, number].endswith(LIE):
            header = at.header
            self.proven(Proof(header.roster[rank], header.step, header.parent, header.ballot))

    def proven(self, proof: Proof) -> None:
        """It is, and all shall know."""
        known = self.proofs.get(proof.against)
        if proof.against == self.peer.name or (known is not None and known.step <= proof.step):
            return
        self.proofs[proof.against] = proof
        self.peer.sim.convicted.add(proof.against)
        self.tell()
        peer = self.peer
        peer.carry_out(peer.machine.convicted(proof.against, peer.sim.network.now))
        self.look_for_lies()

    def tell(self) -> None:
        """Everybody, again and again: a newcomer has not heard it."""
        for proof in self.proofs.values():
            for name in sorted(self.peer.sim.peers):
                if name not in (self.peer.name, proof.against):
                    self.peer.send(name, proof)

    def lie_in(self, log: Log) -> Proof | None:
        """The earliest proven one in it."""
        found = (
            proof
            for proof in self.proofs.values()
            if proof.step < len(log) and proof.is_about(log[proof.step][0])
        )
        return min(found, key=lambda proof: proof.step, default=None)

    def look_for_lies(self) -> None:
        """Go back, if this peer stands on one."""
        peer = self.peer
        if (lie := self.lie_in(peer.log)) is None or peer.applying:
            return
        void = [peer.sim.positions(peer.log[: step + 1]).lineage for step in range(lie.step, len(peer.log))]
        peer.carry_out(peer.machine.undo(lie.step, void))

    def undone(self, step: int) -> None:
        """Back before the entry of that step."""
        peer = self.peer
        lie = self.lie_in(peer.log)
        if lie is None or lie.step != step:
            return
        peer.sim.happened["undone"] += 1
        peer.go_back(step, lie.ballot)
