"""Who is there, by the DHT: this peer says that it is, and looks for the others.

Beside that it says why nothing moves, once it has not for a while, and how long this peer waits for others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from p2ptrain import PROTOCOL_VERSION, events
from p2ptrain.allreduce import Rounds
from p2ptrain.config import RunConfig
from p2ptrain.errors import IncompatibleRun
from p2ptrain.protocol.presence import PRESENCE_SECONDS, look_seconds, milestone, standing
from p2ptrain.records import Milestone, Presence, RoundRecord
from p2ptrain.replica.joining import outvoted
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.transfer import CatchUp
from p2ptrain.swarm.port import Swarm
from p2ptrain.training.hands import Hands, now

LEAVE_SECONDS = 1.0
"""That the last record may take: whoever has pressed Ctrl-C waits."""


class Attendance:
    """This peer's presence record, and what it makes of the others'."""

    def __init__(
        self,
        run: RunConfig,
        swarm: Swarm,
        replica: Replica,
        rounds: Rounds,
        transfer: CatchUp,
        hands: Hands,
        *,
        name: str,
        note: str,
        fingerprint: str,
        incarnation: str,
        in_time: Callable[[], bool],
    ) -> None:
        """`note`: the task's, about this peer's data; `in_time`: whether this peer takes part in the round
        under way."""
        self._run_id, self._swarm, self._replica, self._rounds = run.run_id, swarm, replica, rounds
        self._transfer, self._hands, self._in_time = transfer, hands, in_time
        self._name, self._note = name, replica.base_note + note
        self._fingerprint, self._incarnation = fingerprint, incarnation
        self.metrics_port = 0
        """For the record; 0: none."""
        self.leader_waits = ""
        """What this peer waits for as a leader."""
        self._milestones: tuple[Milestone, ...] = ()
        """Which states the replica had at some of its last steps."""
        self._round_published = self._looked_at = float("-inf")
        self._left = False
        self._waiting_told = ""
        self._deadlines_told: dict[str, float] = {}

    async def arrive(self, shared_note: str) -> None:
        """Say that this peer is here, and see who else is: so of two newcomers one sees the other. Raises
        IncompatibleRun if what others say of their data does not begin with `shared_note`. From then on the
        record is kept up."""
        await self._publish()
        others = await self._look()
        self._hands.observe(
            events.Joined(run_id=self._run_id, peer=self._swarm.peer_id, name=self._name, others=len(others))
        )
        shared = self._replica.base_note + shared_note
        if strange := {other.extra for other in others if not other.extra.startswith(shared)}:
            raise IncompatibleRun(
                f"this run wants the same on every peer: here it is {shared!r}, "
                f"in the swarm {', '.join(sorted(map(repr, strange))[:3])}; "
                "use the same Python version, or the same files"
            )
        self._hands.spawn(self._keep_up())

    async def leave(self) -> None:
        """Say that this peer has no state to give any more: newcomers would ask it in vain until its record
        ends."""
        self._left = True
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._publish()
        except TimeoutError:
            return  # then the record ends by itself

    def stood(self, state_digest: str) -> None:
        """That is the digest of the state that the replica has now."""
        self._milestones = standing(self._milestones, milestone(self._replica.position, state_digest))

    def moved(self) -> None:
        """The replica has come to where it is by another way than its last steps."""
        self._milestones = ()

    def committed(self, began: float, roster_size: int) -> None:
        """This peer led a round, and began to apply it at that loop time: tell monitors and newcomers where
        the swarm stands, if that was not done just now."""
        if began - self._round_published > PRESENCE_SECONDS:
            self._round_published = began
            self._hands.spawn(self._publish_round(roster_size))

    async def _keep_up(self) -> None:
        step = self._replica.position.step
        while True:
            await asyncio.sleep(PRESENCE_SECONDS)
            await self._publish()
            member = self._rounds.member
            urgent = member.following == self._swarm.peer_id or not self._in_time()
            if now() - self._looked_at >= look_seconds(len(member.known), urgent=urgent):
                await self._look()
            waits = step == self._replica.position.step and not member.withdrawn
            self._tell_waiting(stands_still=waits)
            self._tell_deadlines()
            step = self._replica.position.step

    async def _publish(self) -> None:
        record = Presence(
            peer=self._swarm.peer_id,
            role="train",
            name=self._name,
            protocol=PROTOCOL_VERSION,
            fingerprint=self._fingerprint,
            incarnation=self._incarnation,
            position=None if self._left else self._replica.position,
            metrics_port=self.metrics_port,
            extra=self._note,
            milestones=self._milestones,
        )
        await self._swarm.publish(record, ttl_seconds=5 * PRESENCE_SECONDS)

    async def _look(self) -> list[Presence]:
        """Who else is there. Most of them may say that a state of ours is none of theirs."""
        self._looked_at = now()
        me = self._swarm.peer_id
        others = [
            record
            for record in await self._swarm.lookup("presence")
            if isinstance(record, Presence) and record.role == "train" and record.peer != me
            if record.position is not None  # else it leaves
        ]
        self._rounds.informed({other.peer: other.position for other in others if other.position is not None})
        odd = outvoted(self._milestones, {other.peer: other.milestones for other in others})
        if odd is not None:
            self._milestones = ()
            self._transfer.was_misled()
            self._rounds.outvoted(odd.mine.step, odd.mine.state, odd.theirs, odd.donor)
        return others

    async def _publish_round(self, roster_size: int) -> None:
        record = RoundRecord(
            peer=self._swarm.peer_id, position=self._replica.position, roster_size=roster_size
        )
        await self._swarm.publish(record, ttl_seconds=5 * PRESENCE_SECONDS)

    def _tell_waiting(self, *, stands_still: bool) -> None:
        """Again when the reason changes."""
        member = self._rounds.member
        if not stands_still:
            reason = ""
        elif member.following == self._swarm.peer_id:
            reason = self.leader_waits
        else:
            reason = f"{events.short(member.following)} leads step {self._replica.position.step}"
        if reason != self._waiting_told:
            self._waiting_told = reason
            self._hands.observe(events.WaitingChanged(reason=reason))

    def _tell_deadlines(self) -> None:
        """Again when one has changed by a quarter."""
        silence, reduce = self._rounds.member.waits()
        current = {
            "silence_seconds": silence,
            "reduce_seconds": reduce,
            "dial_seconds": self._swarm.dial_seconds,
            "request_seconds": self._transfer.request_seconds(2**20),
        }
        told = {name: self._deadlines_told.get(name, 0.0) for name in current}
        if any(abs(value - told[name]) > 0.25 * told[name] for name, value in current.items()):
            self._deadlines_told = current
            self._hands.observe(events.DeadlinesChanged(**current))
