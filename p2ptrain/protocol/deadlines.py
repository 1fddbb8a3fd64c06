"""How long to wait for others: every deadline of a round, from what this peer has measured of the swarm.

What was never measured gets a cautious first value, what was missed doubles, and the run's bounds hold in any
case.

Not covered: dialling, which the carrier measures itself (`swarm.lanes`), with the same `Estimate`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from p2ptrain.protocol.estimate import Estimate, clamp
from p2ptrain.protocol.round import Rules
from p2ptrain.protocol.spans import moved_bytes
from p2ptrain.records import PeerId

FIRST_BITS_PER_SECOND = 2e6
"""What a poor home link uploads; taken for the pace while nothing was measured."""
MAX_PEERS = 1024


@dataclass
class Deadlines:
    """The measurements of one peer, and the deadlines that follow from them; all in seconds."""

    rules: Rules
    _pace: Estimate = field(default_factory=lambda: Estimate(first=8 / FIRST_BITS_PER_SECOND))
    """Seconds per byte that each member has to send and to receive in a reduction."""
    _lateness: dict[PeerId, Estimate] = field(default_factory=dict)
    """By how much the gaps between a peer's signs of life exceed a heartbeat, while it is waited for."""

    # -- measured --------------------------------------------------------------------------------------------

    def heard_after(self, peer: PeerId, seconds: float) -> None:
        """That peer was heard after such a gap. One of minutes was a broken link and says less: it counts as
        twice the present silence."""
        if peer not in self._lateness and len(self._lateness) >= MAX_PEERS:
            self._lateness.clear()
        gap = min(seconds, 2 * self.silence_seconds([peer]))
        late = self._lateness.setdefault(peer, Estimate(first=0.0))
        late.observe(max(gap - self.rules.heartbeat_seconds, 0.0))

    def reduced(self, members: int, seconds: float) -> None:
        """From the sealed contribution to the last span took so long, among so many."""
        if moved := self._moved_bytes(members):
            self._pace.observe(seconds / moved)

    def overdue(self) -> None:
        """A reduction did not end within `reduce_seconds`."""
        self._pace.miss()

    # -- derived ---------------------------------------------------------------------------------------------

    def silence_seconds(self, peers: Iterable[PeerId] = ()) -> float:
        """After how long those not heard are taken for gone: the longest that any of them needs."""
        late = max((self._lateness[peer].bound for peer in peers if peer in self._lateness), default=0.0)
        rules = self.rules
        return clamp(rules.silence_seconds, 3 * rules.heartbeat_seconds + late, rules.silence_most_seconds)

    def reduce_seconds(self, members: int) -> float:
        """How long a reduction among so many may take, from its freeze and apart from unfinished work."""
        need = 2 * self._moved_bytes(members) * self._pace.bound  # twice: links are shared, and roles change
        return clamp(0.0, self.rules.silence_seconds + need, self.rules.attempt_most_seconds)

    def _moved_bytes(self, members: int) -> float:
        return moved_bytes(members, self.rules.encoded_bytes)
