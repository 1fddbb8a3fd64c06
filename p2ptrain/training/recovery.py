"""How a peer gets to where the swarm is: from a donor when it is behind, and back when a lie led here.

What there is to fetch, and from whom, is `replica.transfer`'s to find out. Here is when, what is told of it,
and which lies are known: a log with one of them in it is void (ADR 32).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from p2ptrain import events
from p2ptrain.allreduce import Behind, Rounds
from p2ptrain.court import Convicted
from p2ptrain.errors import BadMessage, PeerFault, Unreachable
from p2ptrain.gradients.codecs import codec_named
from p2ptrain.records import Ballot, PeerId, Position
from p2ptrain.replica.bases import Bases
from p2ptrain.replica.checkpoint import discard_after
from p2ptrain.replica.joining import Progress
from p2ptrain.replica.log import EntryLog
from p2ptrain.replica.partial import Partial
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.snapshot import Snapshot
from p2ptrain.replica.transfer import Arrival, CatchUp
from p2ptrain.swarm.port import Swarm
from p2ptrain.training.conduct import Conduct
from p2ptrain.training.hands import Hands, now

CATCHING_UP_SECONDS = 5.0
"""Between two lines about how far a catch-up is; one that takes less is told of when it is done."""
RETRY_SECONDS = 0.3
"""Before the next donor is asked, or this one again, when one could not be reached."""


class Recovery:
    """Moves the replica and its log by other means than the next entry."""

    def __init__(
        self,
        swarm: Swarm,
        replica: Replica,
        log: EntryLog,
        rounds: Rounds,
        conduct: Conduct,
        hands: Hands,
        *,
        partial: Path | None,
        checkpoints: Path | None,
    ) -> None:
        """`partial`: the folder for a snapshot that is being downloaded, `checkpoints` that for checkpoints;
        None for none."""
        self._replica, self._log, self._rounds, self._hands = replica, log, rounds, hands
        self._conduct, self._checkpoints = conduct, checkpoints
        self.progress: Progress | None = None
        """How far the catch-up under way is; None while there is none, and before it has begun to receive."""
        self._told_at = 0.0
        self._bases = Bases()
        self._lies: list[Convicted] = []
        """Those of reducers."""
        self._looked_for: tuple[Convicted, ...] = ()
        """Those that were looked for in the log of whoever gave the last snapshot."""
        self.transfer = CatchUp(
            swarm,
            replica,
            log,
            codec_named(replica.run.codec),
            hands.compute,
            hands.aside,
            Partial(partial),
            self._watch,
            self._donor_failed,
            self._lies,
            rounds.accuse,
        )

    async def keep_base(self) -> None:
        """Where this peer could go back to, if the run is audited and it is time."""
        if self._rounds.auditor is not None and self._bases.due(now()):
            snapshot = await self._hands.compute(self._replica.packed)
            self._bases.keep(await self._hands.aside(snapshot.snapshot), now())

    async def catch_up(self, behind: Behind) -> Ballot | None:
        """Get to where the swarm is, as far as the donor can help: if it cannot, the machine names the next
        one. Returns the ballot above which attempts at the next step go on, if that was undone here."""
        if behind.undo is not None and (base := self._bases.before(behind.undo)) is not None:
            return await self._undo(behind.undo, base)
        await self._fetch(behind)
        await self.keep_base()
        return None

    def heard_of(self, lie: Convicted) -> None:
        """It is proven; go back if it led here."""
        self._lies.append(lie)
        self.look_for_lies()

    def look_for_lies(self) -> None:
        """Go back if an entry of this log is proven to be a lie."""
        first = min(filter(self._is_in_log, self._lies), key=lambda lie: lie.step, default=None)
        if first is not None:
            later = (self._log.lineage_at(at) for at in range(first.step + 1, self._log.step + 1))
            self._rounds.undo(first.step, [lineage for lineage in later if lineage is not None])

    def _is_in_log(self, lie: Convicted) -> bool:
        void = self._rounds.auditor.led_to(lie) if self._rounds.auditor is not None else None
        if void is not None:
            return self._log.lineage_at(lie.step + 1) == void
        # Fetched or replayed, then, or before this peer came: who does not know takes the state of a donor
        # whose log has been looked at.
        if (entry := self._log.get(lie.step)) is not None:
            return (entry.header.parent, entry.header.ballot) == (lie.parent, lie.ballot)
        came_later = self._log.lineage_at(lie.step) is None and lie.step < self._log.step
        return came_later and lie not in self._looked_for

    async def _undo(self, step: int, base: Snapshot) -> Ballot | None:
        """Go back to the state at `step`, or as near to it as what is kept here leads: from that base."""
        before, replica = self._replica.position, self._replica
        await self._hands.compute(replica.load_state, base)
        while (entry := self._log.get(replica.position.step)) and entry.header.step < step:
            await self._hands.compute(replica.apply, entry)
        after = replica.position
        self._log.truncate_after(after.step)
        if self._checkpoints is not None:
            await self._hands.aside(discard_after, self._checkpoints, after.step)
        lie = self._tell_undone(before, step)
        return lie.ballot if after.step == step else None

    def _tell_undone(self, before: Position, step: int) -> Convicted:
        """This replica stands before the lie of that step again; whose it was."""
        lie = next(lie for lie in self._lies if lie.step == step)
        self._rolled_back(before, max(before.weight - self._replica.position.weight, 0), lie.peer)
        return lie

    def _rolled_back(self, before: Position, samples_lost: int, liar: PeerId | None = None) -> None:
        after = self._replica.position
        self._hands.observe(
            events.RolledBack(
                from_step=before.step,
                to_step=after.step,
                samples_lost=samples_lost,
                lineage=after.lineage,
                liar=liar,
            )
        )

    async def _fetch(self, behind: Behind) -> None:
        before, began = self._replica.position, now()
        self._told_at = began
        member = self._rounds.member
        others = {peer: at for peer, at in member.known.items() if peer not in member.lost}
        donor, claimed, lies = behind.donor, behind.position, tuple(self._lies)
        if behind.undo is not None:
            # What is here is void, and came before there was a state of this peer's own to go back to.
            if not others:
                self._lies.clear()  # nobody is left who has anything better
            donor, claimed = max(others.items(), key=lambda each: each[1].step, default=(donor, claimed))
        try:
            arrival = await self.transfer.from_donor(
                donor, claimed, others, afresh=behind.afresh, void=behind.undo is not None
            )
        except PeerFault as fault:
            self._hands.observe(events.CatchUpFailed(from_step=before.step, donor=donor, reason=str(fault)))
            self._rounds.unhelpful(donor)
            if isinstance(fault, Unreachable):
                await asyncio.sleep(RETRY_SECONDS)  # its link may be on its way up; nobody waits for us
        else:
            self._tell_arrival(before, arrival, now() - began)
            if arrival.how is events.CatchUpBy.SNAPSHOT:
                self._bases.clear()
                self._looked_for = lies
            if behind.undo is not None:
                self._tell_undone(before, behind.undo)
        finally:
            self.progress = None

    def _tell_arrival(self, before: Position, arrival: Arrival, seconds: float) -> None:
        if arrival.given_up is not None:
            self._rolled_back(before, arrival.given_up)
        self._hands.observe(
            events.CaughtUp(
                from_step=before.step,
                to_step=self._replica.position.step,
                how=arrival.how,
                received_bytes=arrival.received_bytes,
                seconds=seconds,
                donors=arrival.donors,
                resumed_bytes=arrival.resumed_bytes,
            )
        )

    def _watch(self, progress: Progress) -> None:
        self.progress = progress
        if now() - self._told_at >= CATCHING_UP_SECONDS:
            self._told_at = now()
            self._hands.observe(
                events.CatchingUp(
                    step=self._replica.position.step,
                    what=progress.what,
                    done=progress.done,
                    total=progress.total,
                    done_bytes=progress.done_bytes,
                    total_bytes=progress.total_bytes,
                    bytes_per_second=progress.bytes_per_second,
                    eta_seconds=progress.eta_seconds,
                    donors=progress.donors,
                )
            )

    def _donor_failed(self, donor: PeerId, fault: PeerFault) -> None:
        bad = isinstance(fault, BadMessage)
        self._conduct.gave_badly(donor, str(fault), bad=bad)
        if bad:
            self._rounds.offended(donor)
