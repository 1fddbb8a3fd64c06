"""The main loop, and the peer it drives: accumulate a large batch, average it, take one synchronized step;
repeat.

`train` reads like the design card. `Peer` turns each line of it into calls: it puts together what a peer is
made of (`training`), and knows rounds only. What a peer does between two rounds, and what is told of one, is
for its strategy to say (`replica.strategy`); messages are `allreduce`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from p2ptrain import events
from p2ptrain.allreduce import (
    Aborted,
    Attempt,
    Behind,
    Committed,
    Contribution,
    Note,
    Outcome,
    Rounds,
    at_once,
)
from p2ptrain.auditing import Audit
from p2ptrain.config import PeerConfig, RunConfig, canonical_json
from p2ptrain.court import Convicted
from p2ptrain.gradients.aggregation import AGGREGATIONS
from p2ptrain.gradients.codecs import codec_named
from p2ptrain.gradients.engine import Engine
from p2ptrain.gradients.noise import Unlike
from p2ptrain.protocol.ledger import Account, Ranges, lease
from p2ptrain.protocol.member import Member
from p2ptrain.protocol.round import TookOver, Waiting
from p2ptrain.protocol.terms import due, in_force, in_words, revision, rules_of, total_steps
from p2ptrain.records import Ballot, Change, PeerId, Reply, Request, Terms, Watching
from p2ptrain.replica.donor import Compute, Donor
from p2ptrain.replica.joining import Progress, sent_in_round
from p2ptrain.replica.log import EntryLog
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.schedule import learning_rate
from p2ptrain.replica.strategy import Contributor, Gathered, Round, Told, probe_by
from p2ptrain.swarm.port import Buffer, Swarm
from p2ptrain.tasks import Task
from p2ptrain.training.attendance import Attendance
from p2ptrain.training.batches import Batches
from p2ptrain.training.conduct import Conduct
from p2ptrain.training.hands import Hands, now
from p2ptrain.training.recovery import Recovery
from p2ptrain.training.samples import Samples
from p2ptrain.training.upkeep import Upkeep

SEE_OFF_SECONDS = 0.05
"""How often a peer that is about to leave looks whether all are where it is."""
PAUSE_SECONDS = 0.2
"""How often a paused peer looks whether it still is."""


async def train(peer: Peer, run: RunConfig) -> None:
    """Accumulate a large batch, average it with the swarm, take one synchronized step; repeat."""
    await peer.arrive()  # start from the swarm's state, never from our own guess
    while peer.replica.position.step < peer.ends_at(run) and not peer.leaving:
        if peer.stands_aside:
            await peer.pause()  # without this peer, the others go on at once
            continue
        contribution = await peer.accumulate()  # until the swarm's batch is full
        match await peer.join_round(contribution):
            case Committed() as committed:
                await peer.apply(committed)  # everyone applies the same bytes
            case Behind() as behind:
                await peer.catch_up(behind)  # the swarm stepped without us
                continue
            case Aborted():
                continue  # nobody stepped; the contribution is kept
        await peer.after_step()


class Peer:
    """One peer of a run. Use as an async context manager around `train`; inside, it answers the swarm."""

    def __init__(
        self,
        swarm: Swarm,
        run: RunConfig,
        config: PeerConfig,
        task: Task,
        replica: Replica,
        engine: Engine,
        *,
        fingerprint: str,
        incarnation: str,
        compute: Compute,
        aside: Compute,
        work: Compute = at_once,
        observe: Callable[[events.Event], None],
        checkpoints: Path | None = None,
        partial: Path | None = None,
        lineages: bytes = b"",
    ) -> None:
        """`engine` computes on the replica's model, in micro-batches of its `most_samples`;
        `compute` runs a function on the one thread that owns the replica's tensors, `aside` on others,
        and `work` the sums of a round, on one beside the event loop;
        `observe` is told everything that happens; `checkpoints` is the folder for them, None for none, and
        `partial` the one for a snapshot that is being downloaded; `lineages` come with a checkpoint."""
        self.swarm, self.run, self.config, self.task, self.replica = swarm, run, config, task, replica
        self.leaving = False
        """Leave once the step under way is done."""
        self.paused = False
        """Begin no micro-batch. What is computed goes into the round under way; then this peer stands
        aside."""
        self.rounds_joined = 0
        self.samples_given = 0
        self.state_digest: str | None = None
        self.watched: Callable[[PeerId, Request], Awaitable[tuple[Reply, Buffer]]] | None = None
        """Answers those who watch; without it they are refused."""

        self._compute, self._aside, self._observe = compute, aside, observe
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()
        me, codec = swarm.peer_id, codec_named(run.codec)
        hands = Hands(compute, aside, self._spawn, observe)
        self._probe = probe_by(engine, task.batch, task.loss_sum)
        self._strategy, self._contributor = replica.strategy, self._new_contributor()
        self._samples = Samples(run, task, me, replica)
        self.batches = Batches(run, me, replica, engine, self._samples, task.loss_sum, hands)
        self.log = EntryLog(config.log_megabytes * 2**20, replica.position, lineages)
        upload_bytes_per_second = config.donor_upload_mbit * 1e6 / 8
        self.donor = Donor(canonical_json(run), replica, self.log, compute, aside, upload_bytes_per_second)
        member = Member(
            me,
            incarnation,
            rules_of(run, replica.values, codec.encoded_bytes(replica.values)),
            reduces=config.reduces,
            most_rate=config.limits.bytes_per_second,
        )
        self.rounds = Rounds(
            swarm,
            member,
            codec,
            AGGREGATIONS[run.aggregation],
            run.chunk_values,
            self._answer,
            self._spawn,
            self._noted,
            fingerprint,
            work,
            Audit(fingerprint, run.audit, replica.numel, run.max_peers) if run.audit else None,
        )
        self._conduct = Conduct(observe)
        self._recovery = Recovery(
            swarm,
            replica,
            self.log,
            self.rounds,
            self._conduct,
            hands,
            partial=partial,
            checkpoints=checkpoints,
        )
        self.attendance = Attendance(
            run,
            swarm,
            replica,
            self.rounds,
            self._recovery.transfer,
            hands,
            name=config.name,
            note=task.note,
            fingerprint=fingerprint,
            incarnation=incarnation,
            in_time=lambda: self._in_time,
        )
        self.upkeep = Upkeep(run, config, task, replica, engine, self.log, checkpoints, hands)

        self._changes = self._changes_now()
        """By the organizer, that the last entry was applied under."""
        self._in_time = False
        """Whether this peer took part in the commit that led here, and so is in time for the next one."""
        self._step_began = 0.0
        self._digesting: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Peer:
        await self._group.__aenter__()
        self.swarm.serve(self.rounds)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rounds.close()
        for task in self._tasks - {self._digesting}:
            task.cancel()
        await self.batches.close()
        await self._group.__aexit__(kind, error, trace)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task beside the loop. What goes wrong in it is ours, and ends the loop too."""
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answer(self, sender: PeerId, request: Request) -> tuple[Reply, Buffer]:
        if self.watched is not None and isinstance(request, Watching):
            return await self.watched(sender, request)
        return await self.donor.answer(sender, request)

    # -- how it stands, to whoever asks ----------------------------------------------------------------------

    @property
    def gathered(self) -> Gathered:
        """What this peer has done for the round under way."""
        return self._contributor.gathered

    @property
    def data(self) -> Account | None:
        """What became of the samples so far; None if they are drawn."""
        return self._samples.account

    @property
    def catching_up(self) -> Progress | None:
        """How far the catch-up under way is; None while there is none, and before it has begun to receive."""
        return self._recovery.progress

    @property
    def left_out(self) -> dict[PeerId, str]:
        """Whom this peer does not hear at present, and why."""
        return self._conduct.left_out

    @property
    def stands_aside(self) -> bool:
        """Whether it is paused, and nothing of it is awaited by a round."""
        return self.paused and not self.gathered.samples and self.rounds.attempt is None

    def ends_at(self, run: RunConfig) -> int:
        """The step at which the run is over, as far as this peer has heard."""
        return total_steps(run, self.rounds.member.next_terms)

    # -- the lines of the loop -------------------------------------------------------------------------------

    async def arrive(self) -> None:
        """Say that this peer is here, see who else is, and take their state if it has more behind it."""
        await self._samples.arrive(self._aside)
        await self.attendance.arrive(self.task.shared_note)
        await self._recovery.keep_base()
        self._start_step((), settled=False)

    async def pause(self) -> None:
        """Take part in nothing while paused, then come back as after an absence."""
        self.rounds.withdraw()
        while self.paused and not self.leaving:
            await self.rounds.changed(PAUSE_SECONDS)
        if not self.leaving:
            await self._digested()
            await self._compute(self._reset)
            self._start_step((), settled=False)

    async def accumulate(self) -> Contribution:
        """Run micro-batches until the leader freezes the round; the sum of what is done by then."""
        batches, rounds = self.batches, self.rounds
        if not self._in_time and rounds.member.following != self.swarm.peer_id:
            # A micro-batch begun now might end only after the swarm has stepped. The leader admits this peer
            # with the next commit: in a fast swarm that is at once, in a slow one there is time to work after
            # all.
            self._report()
            await rounds.changed(self.run.heartbeat_seconds)
        while not isinstance(rounds.outcome, Behind):
            if isinstance(aborted := rounds.outcome, Aborted):
                rounds.outcome = None
                self._aborted(aborted)
            attempt = rounds.attempt
            await self._keep_lease(attempt)
            await self._keep_part(attempt)
            patience = None if attempt is None else self._patience(attempt)
            if patience is not None and patience <= 0:
                break
            if batches.under_way is None:
                full = self.gathered.samples >= rounds.member.target_batch_size
                if not full and not self._most_now() and self._samples.mostly_skipped:
                    # Without this, nobody might go on.
                    await self._discard(events.WasteCause.NONFINITE)
                    self._samples.begin()
                if self.paused or full or not self._most_now():
                    # Paused, no lease, or the whole batch by itself: more would make a step of another size.
                    await rounds.changed(self.run.heartbeat_seconds)
                    continue
                batches.begin(self._most_now())
                self._report()
            ended = await batches.ends(rounds.changed(patience))
            if ended and await batches.take(self.gathered, self.replica.position.step):
                self._report()
        await self._gather()
        gathered, samples = self.gathered, self._samples
        return Contribution(gathered.total, gathered.samples, samples.skipped_for_good, samples.lease)

    async def join_round(self, contribution: Contribution) -> Outcome:
        """Average with the swarm, with `delay` computing for the next step meanwhile; whatever the outcome
        is, the caller must look at it."""
        joining = asyncio.ensure_future(self.rounds.join(contribution))
        try:
            if (ahead := self._contributor.ahead) is not None:
                await self._compute_ahead(ahead, contribution.samples, joining)
            outcome = await joining
        finally:
            joining.cancel()
        if isinstance(outcome, Aborted):
            self._aborted(outcome)
        return outcome

    async def apply(self, committed: Committed) -> None:
        """Take the synchronized step."""
        entry, began = committed.entry, now()
        header = entry.header
        rank = header.roster.index(self.swarm.peer_id)
        if not header.samples[rank]:
            await self._discard(events.WasteCause.NO_LEASE)
        mine = self.gathered.samples
        loss = self.gathered.loss_sum / mine if mine else None
        taken = self._samples.taken(header)
        self.log.append(entry)
        self.donor.appended()
        await self._digested()
        had_a_part = bool(self.gathered.room)
        told: Told = await self._compute(self._apply_now, committed)
        self._observe(
            events.RoundCommitted(
                step=header.step,
                attempt=header.ballot.number,
                samples=header.total_samples,
                mine=mine,
                peers=len(header.roster),
                loss=loss,
                gradient_norm=told.norm,
                clipped=told.clipped,
                learning_rate=learning_rate(self.replica.run_for(header), header.step),
                compute_seconds=self.batches.compute_seconds,
                accumulate_seconds=max(committed.sealed - self._step_began, 0.0),
                reduce_seconds=committed.held - committed.sealed,
                commit_seconds=began - committed.held,
                apply_seconds=now() - began,
                lineage=self.replica.position.lineage,
                digest=header.digest,
                parent=header.parent,
                **taken,
                noise_scale=told.noise.noise_scale,
                signal_norm_squared=told.noise.signal,
                noise_excess=told.noise.excess,
            )
        )
        for event in told.events:
            self._observe(event)
        self.rounds_joined += 1
        self.samples_given += mine
        if self._samples.may_be_had and had_a_part:
            self.batches.fit(mine)
        self.donor.upload.round(
            sent_in_round(len(entry.payload), header.spans, rank), committed.held - committed.sealed
        )
        self._start_step(committed.newcomers, settled=True)
        if header.ballot.leader == self.swarm.peer_id:
            self.attendance.committed(began, len(header.roster))

    async def catch_up(self, behind: Behind) -> None:
        """Get from a donor to where the swarm is, or back to before a lie."""
        await self._digested()
        self._waste(events.WasteCause.BEHIND)
        above = await self._recovery.catch_up(behind)
        await self._compute(self._reset)
        self._start_step((), settled=False, above=above)

    async def after_step(self) -> None:
        """What is due at this step: held-out figures, a checkpoint."""
        await self._recovery.keep_base()
        await self.upkeep.after_step()

    # -- what it is asked to do ------------------------------------------------------------------------------

    def heed(self, terms: Terms) -> None:
        """Go by what the organizer says from now on, if it is newer than what was said before. Terms that
        make no valid run are heeded by nobody."""
        member = self.rounds.member
        if revision(terms) <= revision(member.terms):
            return
        try:
            for change in terms.changes:
                in_force(self.run, terms, change.step)
        except ValueError:
            return
        member.terms = terms
        self._observe(events.TermsHeard(revision=terms.revision, says=tuple(in_words(terms))))

    def give_up(self) -> None:
        """This peer leaves: what it has for the round under way will not count, and nobody waits for it."""
        self._waste(events.WasteCause.LEAVING)
        self.rounds.withdraw()

    async def see_off(self, seconds: float) -> None:
        """Stay for those who are behind and may need an entry from here, but no longer than that."""
        member, deadline = self.rounds.member, now() + seconds
        while now() < deadline:
            there = (at for peer, at in member.known.items() if peer not in member.lost)
            if all(at.step >= self.replica.position.step for at in there):
                return
            await self.rounds.changed(SEE_OFF_SECONDS)

    # -- between two rounds ----------------------------------------------------------------------------------

    def _most_now(self) -> int:
        """How many samples this peer may still begin in this step, in one micro-batch."""
        return min(self.gathered.room, self._samples.left(self.rounds.member.target_batch_size))

    async def _gather(self) -> None:
        if self.gathered.gathered:
            return
        # Not on the compute thread, where a micro-batch that came too late may be under way.
        before = self.gathered.samples
        await self._aside(self.gathered.gather)
        if lost := before - self.gathered.samples:
            cause = events.WasteCause.NONFINITE
            self._observe(events.SamplesWasted(step=self.replica.position.step, samples=lost, cause=cause))

    async def _compute_ahead(self, ahead: Gathered, most: int, joining: asyncio.Future[Outcome]) -> None:
        """Micro-batches for the next step, until the round ends: at most as many samples as are in it, or a
        slow network would make the steps larger than the run asks for. What is still computed when the round
        ends is taken by whichever step comes next."""
        most = min(most, self.rounds.member.target_batch_size)
        batches = self.batches
        while not joining.done():
            if batches.under_way is None:
                if self.paused or ahead.samples + batches.size > most:
                    return
                batches.begin(self._most_now())
            if await batches.ends(asyncio.shield(joining)):
                await batches.take(ahead, self.replica.position.step + 1)

    def _patience(self, attempt: Attempt) -> float:
        """How long the attempt lets this peer finish its micro-batch; ≤ 0: seal now."""
        if not self.batches.counts_for(attempt.freeze.step):
            return 0.0
        if self.swarm.peer_id not in attempt.freeze.finishing:
            return 0.0
        return attempt.began + attempt.freeze.cutoff_seconds - now()

    def _report(self) -> None:
        in_flight, finish = self.batches.in_flight(self.replica.position.step)
        self.rounds.progressed(
            self.gathered.samples, in_flight, finish, self.batches.usual_seconds, self.state_digest
        )

    async def _keep_part(self, attempt: Attempt | None) -> None:
        """Who was not in the last round may have other things to do if nobody is left who was: then it is
        this peer that leads, or there is none of them in the attempt."""
        last = self.replica.last
        if last is None or self.swarm.peer_id in last.roster:
            return
        if attempt is None:
            orphaned = self.rounds.member.following == self.swarm.peer_id
        else:
            orphaned = set(last.roster).isdisjoint(attempt.freeze.roster)
        if (begin_anew := self._contributor.rethink(orphaned)) is not None:
            self._waste(events.WasteCause.NO_PART)
            self.batches.void()
            await self._compute(begin_anew)

    async def _keep_lease(self, attempt: Attempt | None) -> None:
        """Go by the lease that this peer has now, or has in the attempt. Who has one only for leading has
        none when somebody else leads: then what was computed on it is lost."""
        held = self._lease_now() if attempt is None else attempt.lease
        if held != self._samples.lease:
            await self._discard(events.WasteCause.NO_LEASE)
            self.batches.void()
            self._samples.begin(held)

    def _lease_now(self) -> Ranges:
        leases = self.rounds.member.leases()
        return () if leases is None else lease(leases, self.swarm.peer_id)

    async def _discard(self, cause: events.WasteCause) -> None:
        if self.gathered.samples:
            self._waste(cause)
            await self._compute(self._reset)

    # -- steps -----------------------------------------------------------------------------------------------

    def _apply_now(self, committed: Committed) -> Told:
        """On the compute thread; returns what there is to tell of the round."""
        told = self._contributor.take(Round(committed.entry, committed.sent, committed.spread))
        self._follow_strategy()
        return told

    def _follow_strategy(self) -> None:
        """Where a warm-up ends, or somebody rolls back into one, other things are brought than before; what a
        codec owed of those is not paid."""
        if self._strategy is not self.replica.strategy:
            self._strategy = self.replica.strategy
            self._contributor = self._new_contributor()

    def _new_contributor(self) -> Contributor:
        return self.replica.contributor(self.swarm.peer_id, self._probe, self.config.eval_every_steps)

    def _reset(self) -> None:
        """On the compute thread."""
        self._follow_strategy()
        self._contributor.reset()

    def _start_step(self, newcomers: Iterable[PeerId], *, settled: bool, above: Ballot | None = None) -> None:
        if not settled:
            # Even if the step is the same as before, after a catch-up that failed: its samples are drawn
            # anew.
            self.batches.void()
            self.attendance.moved()
        self.batches.compute_seconds = 0.0
        self._in_time = settled
        self._step_began = now()
        self._tell_changes()
        self.state_digest = None
        self.donor.arrived()  # before the next micro-batch, so that a snapshot of this step is packed first
        self._digesting = self._spawn(self._digest())
        self.rounds.advance(self.replica.position, self.replica.last, newcomers, settled=settled, above=above)
        self._recovery.look_for_lies()
        self._samples.begin(self._lease_now())
        if self.gathered.samples:
            self._report()

    def _changes_now(self) -> list[Change]:
        last = self.replica.last
        return [] if last is None else due(last.terms, last.step)

    def _tell_changes(self) -> None:
        before, self._changes = self._changes, self._changes_now()
        last = self.replica.last
        new = [each for each in self._changes if each not in before]
        if last is not None and new:
            said = tuple(f"{each.key} = {each.value:g}" for each in new)
            self._observe(events.TermsApplied(step=last.step, changes=said))

    async def _digest(self) -> None:
        """Beside the next micro-batch, which only reads what is hashed."""
        position = self.replica.position
        self.state_digest = await self._aside(self.replica.compute_state_digest)
        self.attendance.stood(self.state_digest)
        self._observe(
            events.StateHashed(step=position.step, lineage=position.lineage, state_digest=self.state_digest)
        )

    async def _digested(self) -> None:
        """Nothing may change the tensors while they are hashed."""
        if self._digesting is not None:
            digesting, self._digesting = self._digesting, None
            await digesting

    def _aborted(self, aborted: Aborted) -> None:
        self._observe(
            events.RoundAborted(
                step=self.replica.position.step,
                attempt=aborted.ballot.number,
                cause=aborted.cause,
                dropped=aborted.dropped,
                seconds=aborted.seconds,
            )
        )
        self._report()

    def _waste(self, cause: events.WasteCause) -> None:
        if self.gathered.samples:
            self._observe(
                events.SamplesWasted(
                    step=self.replica.position.step, samples=self.gathered.samples, cause=cause
                )
            )

    def _noted(self, note: Note) -> None:
        """What a round notes, of this peer or of others."""
        step = self.replica.position.step
        match note:
            case TookOver(at, ballot):
                leader = self.swarm.peer_id
                self._observe(events.LeaderTookOver(step=at, attempt=ballot.number, leader=leader))
            case Waiting(reason):
                self.attendance.leader_waits = reason
            case Unlike(peer, excess):
                if self._contributor.judges_data:
                    self._observe(events.DataUnlike(step=step, peer=peer, noise_excess=excess))
            case _:
                self._conduct.noted(note, step)
                if isinstance(note, Convicted) and note.false_sum:
                    self._recovery.heard_of(note)
