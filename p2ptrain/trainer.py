"""The main loop, and the peer it drives: accumulate a large batch, average it, take one synchronized step;
repeat.

`train` reads like the design card. `Peer` holds what one peer is made of and turns each line of the loop into
calls: gradients on the compute thread, rounds through `allreduce`, state through `replica`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, assert_never

import torch

from p2ptrain import PROTOCOL_VERSION, events
from p2ptrain.allreduce import (
    Aborted,
    Attempt,
    Behind,
    Committed,
    Contribution,
    Faulted,
    Gone,
    Note,
    Outcome,
    Rounds,
    at_once,
)
from p2ptrain.auditing import Audit
from p2ptrain.config import PeerConfig, RunConfig, canonical_json
from p2ptrain.court import Convicted
from p2ptrain.errors import BadMessage, DeviceError, IncompatibleRun, LocalFault, PeerFault
from p2ptrain.gradients.aggregation import AGGREGATIONS
from p2ptrain.gradients.codecs import codec_named
from p2ptrain.gradients.engine import Engine, chance_of
from p2ptrain.gradients.likeness import StoodOut
from p2ptrain.gradients.noise import Unlike
from p2ptrain.protocol.ledger import Account, Ranges, account, follows, lease, numbers, shuffled
from p2ptrain.protocol.member import Member
from p2ptrain.protocol.presence import PRESENCE_SECONDS, look_seconds, milestone, standing
from p2ptrain.protocol.round import Benched, Distrusted, Diverged, TookOver, Waiting
from p2ptrain.protocol.terms import due, in_force, in_words, revision, rules_of, total_steps
from p2ptrain.records import (
    Ballot,
    Change,
    EntryHeader,
    Milestone,
    PeerId,
    Position,
    Presence,
    Reply,
    Request,
    RoundRecord,
    Terms,
    Watching,
)
from p2ptrain.replica.bases import Bases
from p2ptrain.replica.checkpoint import discard_after, save
from p2ptrain.replica.donor import Compute, Donor
from p2ptrain.replica.joining import Progress, outvoted, sent_in_round
from p2ptrain.replica.log import EntryLog
from p2ptrain.replica.partial import Partial
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.schedule import learning_rate
from p2ptrain.replica.snapshot import Snapshot
from p2ptrain.replica.strategy import Contributor, Gathered, Round, Told, probe_by
from p2ptrain.replica.transfer import CatchUp
from p2ptrain.swarm.port import Buffer, Swarm
from p2ptrain.tasks import Numbered, Task

SEE_OFF_SECONDS = 0.05
"""How often a peer that is about to leave looks whether all are where it is."""
CATCHING_UP_SECONDS = 5.0
"""Between two lines about how far a catch-up is; one that takes less is told of when it is done."""
MAX_HELD_AGAINST = 1024
"""Peers of whom it is known what they did last."""
PAUSE_SECONDS = 0.2
"""How often a paused peer looks whether it still is."""
PREVIEW_SECONDS = 15.0
"""Between two samples of what the model writes: enough to watch it learn, at a few per cent of the time."""
PREVIEW_LENGTH = 100
"""In the task's units: for text, characters. Others wait for this peer meanwhile."""
MOST_NONFINITE = 20
"""Micro-batches without a finite gradient in a row, after which this peer gives up: nothing it computes
counts."""


def fitting_batch_size(size: int, brought: int, most: int) -> int:
    """Samples in the next micro-batch, after a step to which this peer brought so many: half of them, if its
    micro-batches outlast the step and nothing it computes counts; twice as many, up to what the device is
    given at once, where several fit into one."""
    if not brought:
        return max(size // 2, 1)
    return min(2 * size if brought >= 4 * size else size, most)


def _changes_of(replica: Replica) -> list[Change]:
    last = replica.last
    return [] if last is None else due(last.terms, last.step)


def base_note(replica: Replica) -> str:
    """How the presence of a peer that trains adapters begins: with what they are for."""
    return f"base {replica.base_digest[:16]}, " if replica.base_digest else ""


def _numbered(run: RunConfig, task: Task) -> Numbered:
    """The task, as what samples are leased from. Raises LocalFault if they cannot be."""
    if not isinstance(task, Numbered) or not task.size:
        raise LocalFault(
            f"run {run.run_id} leases samples by their number, and its task has none that are numbered; "
            'set data to "drawn" in the run file'
        )
    return task


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
        self.engine = engine
        self.leaving = False
        """Leave once the step under way is done."""
        self.paused = False
        """Begin no micro-batch. What is computed goes into the round under way; then this peer stands
        aside."""
        self.rounds_joined = 0
        self.samples_given = 0
        self.state_digest: str | None = None
        self._changes = _changes_of(replica)
        """By the organizer, that the last entry was applied under."""
        self._bases = Bases()
        self._held_against: dict[PeerId, str] = {}
        self._left_out: dict[PeerId, tuple[float, str]] = {}
        self._lies: list[Convicted] = []
        """Those of reducers: a log with one of these in it is void."""
        self._looked_for: tuple[Convicted, ...] = ()
        """Those that were looked for in the log of whoever gave the last snapshot."""
        self._milestones: tuple[Milestone, ...] = ()
        """Which states it had at some of its last steps, for its presence record."""
        self._leader_waits = self._waiting_told = ""
        self._deadlines_told: dict[str, float] = {}
        self.heldout: dict[str, float] = {}
        self.batch_took: Callable[[float], object] = lambda seconds: None
        """Told how long each micro-batch took."""
        self.watched: Callable[[PeerId, Request], Awaitable[tuple[Reply, Buffer]]] | None = None
        """Answers those who watch; without it they are refused."""
        self.catching_up: Progress | None = None
        """How far the catch-up under way is; None while there is none, and before it has begun to receive."""
        self._caught_up_told = 0.0
        self.log = EntryLog(config.log_megabytes * 2**20, replica.position, lineages)
        self._fingerprint, self._incarnation = fingerprint, incarnation
        self._compute, self._aside, self._observe = compute, aside, observe
        self._checkpoints = checkpoints
        self.metrics_port = 0
        self._codec = codec_named(run.codec)
        self._probe = probe_by(engine, task.batch, task.loss_sum)
        self._strategy, self._contributor = replica.strategy, self._new_contributor()
        upload_bytes_per_second = config.donor_upload_mbit * 1e6 / 8
        self.donor = Donor(canonical_json(run), replica, self.log, compute, aside, upload_bytes_per_second)
        self._numbered: Numbered | None = None
        """What samples are leased from, once this peer has arrived; None: they are drawn."""
        member = Member(
            swarm.peer_id,
            incarnation,
            rules_of(run, replica.values, self._codec.encoded_bytes(replica.values)),
            reduces=config.reduces,
            most_rate=config.limits.bytes_per_second,
        )
        self.rounds = Rounds(
            swarm,
            member,
            self._codec,
            AGGREGATIONS[run.aggregation],
            run.chunk_values,
            self._answer,
            self._spawn,
            self._noted,
            fingerprint,
            work,
            Audit(fingerprint, run.audit, replica.numel, run.max_peers) if run.audit else None,
        )
        self._catch_up = CatchUp(
            swarm,
            replica,
            self.log,
            self._codec,
            compute,
            aside,
            Partial(partial),
            self._watch_catch_up,
            self._donor_failed,
            self._lies,
            self.rounds.accuse,
        )
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()
        self._batch: asyncio.Future[tuple[float, float]] | None = None
        self._batch_step = 0
        self._void_batch: asyncio.Future[tuple[float, float]] | None = None
        """The micro-batch that was under way when this peer had to catch up."""
        self._most_samples = self._batch_size = self._batch_count = engine.most_samples
        """What the engine takes at once, the size of the next micro-batch, and of the one under way."""
        self._nonfinite = 0
        """Micro-batches in a row without a finite gradient."""
        self._batch_began = self._batch_seconds = 0.0
        self._drawn = 0
        """Samples drawn while the replica stands where it does."""
        self._lease: Ranges = ()
        """Where samples are leased, they are the first of these."""
        self._skipped = self._skipped_for_good = 0
        """Of them, those whose gradient was not finite; and those before the last one that counts, as of a
        peer that trains apart only full inner batches do."""
        self._compute_seconds = 0.0
        """Of the micro-batches that ended since the last step."""
        self._in_time = False
        """Whether this peer took part in the commit that led here, and so is in time for the next one."""
        self._step_began = 0.0
        self._round_published = float("-inf")
        self._previewed = self._looked_at = float("-inf")
        self._digesting: asyncio.Task[None] | None = None
        self._saving = asyncio.Lock()

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
        if self._batch is not None:
            await asyncio.wait([self._batch])
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

    # -- the lines of the loop -------------------------------------------------------------------------------

    async def arrive(self) -> None:
        """Say that this peer is here, see who else is, and take their state if it has more behind it."""
        if self.run.data == "leased":
            self._numbered = await self._aside(_numbered, self.run, self.task)  # may read all of the data
        others = await self._announce()
        self._observe(
            events.Joined(
                run_id=self.run.run_id, peer=self.swarm.peer_id, name=self.config.name, others=len(others)
            )
        )
        shared = base_note(self.replica) + self.task.shared_note
        if strange := {other.extra for other in others if not other.extra.startswith(shared)}:
            raise IncompatibleRun(
                f"this run wants the same on every peer: here it is {shared!r}, "
                f"in the swarm {', '.join(sorted(map(repr, strange))[:3])}; "
                "use the same Python version, or the same files"
            )
        self._spawn(self._keep_present())
        await self._keep_base()
        self._start_step((), settled=False)

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

    def ends_at(self, run: RunConfig) -> int:
        """The step at which the run is over, as far as this peer has heard."""
        return total_steps(run, self.rounds.member.next_terms)

    @property
    def samples_now(self) -> int:
        """What this peer has computed for the step under way."""
        return self.gathered.samples

    @property
    def stands_aside(self) -> bool:
        """Whether it is paused, and nothing of it is awaited by a round."""
        return self.paused and not self.gathered.samples and self.rounds.attempt is None

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
        if not self._in_time and self.rounds.member.following != self.swarm.peer_id:
            # A micro-batch begun now might end only after the swarm has stepped. The leader admits this peer
            # with the next commit: in a fast swarm that is at once, in a slow one there is time to work after
            # all.
            self._report()
            await self.rounds.changed(self.run.heartbeat_seconds)
        while not isinstance(self.rounds.outcome, Behind):
            if isinstance(aborted := self.rounds.outcome, Aborted):
                self.rounds.outcome = None
                self._aborted(aborted)
            attempt = self.rounds.attempt
            await self._keep_lease(attempt)
            await self._keep_part(attempt)
            patience = None if attempt is None else self._patience(attempt)
            if patience is not None and patience <= 0:
                break
            if self._batch is None:
                full = self.gathered.samples >= self.rounds.member.target_batch_size
                if not full and not self._to_draw() and 2 * self._skipped > self._drawn:
                    await self._begin_lease()  # too many were not finite: without this, nobody might go on
                if self.paused or full or not self._to_draw():
                    # Paused, no lease, or the whole batch by itself: more would make a step of another size.
                    await self.rounds.changed(self.run.heartbeat_seconds)
                    continue
                self._begin_batch()
            if await self._batch_ends(patience):
                await self._take_batch(self.gathered)
        if not self.gathered.gathered:
            # Not on the compute thread, where a micro-batch that came too late may be under way.
            before = self.gathered.samples
            await self._aside(self.gathered.gather)
            if lost := before - self.gathered.samples:
                cause = events.WasteCause.NONFINITE
                self._observe(
                    events.SamplesWasted(step=self.replica.position.step, samples=lost, cause=cause)
                )
        return Contribution(self.gathered.total, self.gathered.samples, self._skipped_for_good, self._lease)

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
        entry, began = committed.entry, self._now()
        header = entry.header
        rank = header.roster.index(self.swarm.peer_id)
        if not header.samples[rank]:
            await self._discard(events.WasteCause.NO_LEASE)
        mine = self.gathered.samples
        loss = self.gathered.loss_sum / mine if mine else None
        taken = self._taken(header)
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
                compute_seconds=self._compute_seconds,
                accumulate_seconds=max(committed.sealed - self._step_began, 0.0),
                reduce_seconds=committed.held - committed.sealed,
                commit_seconds=began - committed.held,
                apply_seconds=self._now() - began,
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
        if (self._lease or self._numbered is None) and had_a_part:
            self._batch_size = fitting_batch_size(self._batch_size, mine, self.engine.most_samples)
        self.donor.upload.round(
            sent_in_round(len(entry.payload), header.spans, rank), committed.held - committed.sealed
        )
        self._start_step(committed.newcomers, settled=True)
        if header.ballot.leader == self.swarm.peer_id and began - self._round_published > PRESENCE_SECONDS:
            self._round_published = began
            self._spawn(self._publish_round(len(header.roster)))

    async def catch_up(self, behind: Behind) -> None:
        """Get from a donor to where the swarm is. If it cannot help, the machine names the next one."""
        before, began = self.replica.position, self._now()
        await self._digested()
        self._waste(events.WasteCause.BEHIND)
        if behind.undo is not None and await self._undone(behind.undo):
            return
        self._caught_up_told = began
        member = self.rounds.member
        others = {peer: at for peer, at in member.known.items() if peer not in member.lost}
        donor, claimed, lies = behind.donor, behind.position, tuple(self._lies)
        if behind.undo is not None:
            # What is here is void, and came before there was a state of this peer's own to go back to.
            if not others:
                self._lies.clear()  # nobody is left who has anything better
            donor, claimed = max(others.items(), key=lambda each: each[1].step, default=(donor, claimed))
        try:
            arrival = await self._catch_up.from_donor(
                donor, claimed, others, afresh=behind.afresh, void=behind.undo is not None
            )
        except PeerFault as fault:
            self._observe(events.CatchUpFailed(from_step=before.step, donor=donor, reason=str(fault)))
            self.rounds.unhelpful(donor)
        else:
            after = self.replica.position
            if arrival.given_up is not None:
                self._observe(
                    events.RolledBack(
                        from_step=before.step,
                        to_step=after.step,
                        samples_lost=arrival.given_up,
                        lineage=after.lineage,
                    )
                )
            self._observe(
                events.CaughtUp(
                    from_step=before.step,
                    to_step=after.step,
                    how=arrival.how,
                    received_bytes=arrival.received_bytes,
                    seconds=self._now() - began,
                    donors=arrival.donors,
                    resumed_bytes=arrival.resumed_bytes,
                )
            )
            if arrival.how is events.CatchUpBy.SNAPSHOT:
                self._bases.clear()
                self._looked_for = lies
            if behind.undo is not None:
                self._tell_undone(before, behind.undo)
        finally:
            self.catching_up = None
        await self._compute(self._reset)
        await self._keep_base()
        self._start_step((), settled=False)

    async def _undone(self, step: int) -> bool:
        """Go back to the state at `step`, or as near to it as what is kept here leads; False if nothing does,
        as this peer came later."""
        if (base := self._bases.before(step)) is None:
            return False
        before = self.replica.position
        await self._compute(self.replica.load_state, base)
        while (entry := self.log.get(self.replica.position.step)) and entry.header.step < step:
            await self._compute(self.replica.apply, entry)
        after = self.replica.position
        self.log.truncate_after(after.step)
        if self._checkpoints is not None:
            await self._aside(discard_after, self._checkpoints, after.step)
        lie = self._tell_undone(before, step)
        await self._compute(self._reset)
        self._start_step((), settled=False, above=lie.ballot if after.step == step else None)
        return True

    def _tell_undone(self, before: Position, step: int) -> Convicted:
        """This replica stands before the lie of that step again; whose it was."""
        lie, after = next(lie for lie in self._lies if lie.step == step), self.replica.position
        self._observe(
            events.RolledBack(
                from_step=before.step,
                to_step=after.step,
                samples_lost=max(before.weight - after.weight, 0),
                lineage=after.lineage,
                liar=lie.peer,
            )
        )
        return lie

    async def _keep_base(self) -> None:
        """Where this peer could go back to, if the run is audited and it is time."""
        if self.rounds.auditor is not None and self._bases.due(self._now()):
            snapshot = await self._compute(self.replica.packed)
            self._bases.keep(await self._aside(snapshot.snapshot), self._now())

    async def after_step(self) -> None:
        """What is due at this step: held-out figures, a checkpoint."""
        await self._keep_base()
        step = self.replica.position.step
        if self.config.eval_every_steps and step % self.config.eval_every_steps == 0:
            await self.evaluate()
        if self.config.checkpoint_every_steps and step % self.config.checkpoint_every_steps == 0:
            self._spawn(self._save_beside())

    def give_up(self) -> None:
        """This peer leaves: what it has for the round under way will not count, and nobody waits for it."""
        self._waste(events.WasteCause.LEAVING)
        self.rounds.withdraw()

    async def see_off(self, seconds: float) -> None:
        """Stay for those who are behind and may need an entry from here, but no longer than that."""
        member, deadline = self.rounds.member, self._now() + seconds
        while self._now() < deadline:
            there = (at for peer, at in member.known.items() if peer not in member.lost)
            if all(at.step >= self.replica.position.step for at in there):
                return
            await self.rounds.changed(SEE_OFF_SECONDS)

    # -- beside the loop -------------------------------------------------------------------------------------

    async def evaluate(self) -> dict[str, float]:
        """Held-out figures of the replica as it stands."""
        began = self._now()
        figures: dict[str, float] = await self._compute(self.engine.judge, self.task.evaluate)
        self.heldout = figures
        self._observe(
            events.Evaluated(
                step=self.replica.position.step,
                loss=figures["loss"],
                bits_per_byte=figures.get("bits_per_byte"),
                seconds=self._now() - began,
                zlib_bits_per_byte=figures.get("zlib_bits_per_byte"),
                accuracy=figures.get("accuracy"),
            )
        )
        if began - self._previewed >= PREVIEW_SECONDS:
            self._previewed = began
            text = await self._compute(self._preview)
            self._observe(events.Previewed(step=self.replica.position.step, text=text))
        return figures

    def _preview(self) -> str:
        """On the compute thread; the same text on every peer at this step."""
        chance = torch.Generator().manual_seed(self.replica.position.step)
        return self.engine.judge(self.task.preview, "\n", PREVIEW_LENGTH, chance)

    async def save_checkpoint(self) -> Path | None:
        """Write the replica as it stands to the checkpoint folder; None, with a warning, if that fails."""
        if self._checkpoints is None:
            return None
        began = self._now()
        snapshot: Snapshot = await self._compute(self.replica.snapshot)
        write = partial(
            save,
            self._checkpoints,
            snapshot,
            self.run,
            {"heldout": self.heldout},
            keep=self.config.checkpoints_kept,
            lineages=self.log.lineages(snapshot.position),
            base_digest=self.replica.base_digest,
        )
        step = snapshot.position.step
        try:
            async with self._saving:
                path: Path = await self._aside(write)
        except LocalFault as fault:
            self._observe(events.CheckpointFailed(step=step, reason=str(fault)))
            return None
        self._observe(
            events.CheckpointSaved(
                step=step, path=str(path), size_bytes=len(snapshot.blob), seconds=self._now() - began
            )
        )
        return path

    def save_soon(self) -> None:
        """A checkpoint, beside whatever else this peer does."""
        self._spawn(self._save_beside())

    async def _save_beside(self) -> None:
        """The same while training goes on. On a disk too slow for the interval, checkpoints are left out."""
        if not self._saving.locked():
            await self.save_checkpoint()

    # -- micro-batches ---------------------------------------------------------------------------------------

    async def _compute_ahead(self, ahead: Gathered, most: int, joining: asyncio.Future[Outcome]) -> None:
        """Micro-batches for the next step, until the round ends: at most as many samples as are in it, or a
        slow network would make the steps larger than the run asks for. What is still computed when the round
        ends is taken by whichever step comes next."""
        most = min(most, self.rounds.member.target_batch_size)
        while not joining.done():
            if self._batch is None:
                if self.paused or ahead.samples + self._batch_size > most:
                    return
                self._begin_batch(ahead=True)
            assert self._batch is not None
            waiting: list[asyncio.Future[Any]] = [self._batch, joining]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._batch.done():
                await self._take_batch(ahead)

    def _begin_batch(self, *, ahead: bool = False) -> None:
        count = min(self._batch_size, self.gathered.room, self._to_draw())
        step = self.replica.position.step
        if count != self._batch_count:
            self._batch_seconds *= count / self._batch_count
            self._batch_count = count
        self._batch_step, self._batch_began = step, self._now()
        self._batch = asyncio.ensure_future(self._timed_gradients(step, self._drawn, count, self._lease))
        self._drawn += count
        if not ahead:
            self._report()

    async def _timed_gradients(self, step: int, first: int, count: int, held: Ranges) -> tuple[float, float]:
        """The micro-batch's Σ of losses, and when it ended: it may be taken later, with `delay`."""
        return await self._compute(self._gradients, step, first, count, held), self._now()

    def _gradients(self, step: int, first: int, count: int, held: Ranges) -> float:
        """On the compute thread: Σ of the samples' gradients into `replica.gradient`; returns Σ of their
        losses."""
        return self.engine.gradients(
            partial(self._samples, step, held),
            self.task.loss_sum,
            first,
            count,
            chance_of(self.run.seed, step, self.swarm.peer_id, first),
        )

    def _samples(self, step: int, held: Ranges, first: int, count: int) -> Any:
        """So many samples after the first ones of this step: drawn, or from that lease."""
        if (data := self._numbered) is None:
            return self.task.batch(step, self.swarm.peer_id, first, count)
        places = numbers(held, first, count)
        return data.samples([shuffled(place, data.size, self.run.seed) for place in places])

    async def _batch_ends(self, patience_seconds: float | None) -> bool:
        """Wait for the micro-batch, a change in the round, or the end of patience; True for the first of
        these."""
        assert self._batch is not None
        change = asyncio.create_task(self.rounds.changed(patience_seconds))
        waiting: list[asyncio.Future[Any]] = [self._batch, change]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            change.cancel()
        return self._batch.done()

    def _batch_counts(self, step: int) -> bool:
        """Whether the micro-batch under way may count for that step: it is not older than the run allows."""
        if self._batch is None or self._batch is self._void_batch:
            return False
        return step - self._batch_step <= self.run.delay

    async def _take_batch(self, into: Gathered) -> None:
        """Add the finished micro-batch, unless it is too old."""
        assert self._batch is not None
        ahead = into is self._contributor.ahead
        counts = self._batch_counts(self.replica.position.step + ahead)
        batch, self._batch = self._batch, None
        loss_sum, ended = await batch
        count = self._batch_count
        if not counts:
            self._observe(
                events.SamplesWasted(step=self._batch_step, samples=count, cause=events.WasteCause.BEHIND)
            )
            return
        took = ended - self._batch_began
        self._compute_seconds += took
        self.batch_took(took)
        self._batch_seconds = took if not self._batch_seconds else 0.7 * self._batch_seconds + 0.3 * took
        if (most := self.engine.most_samples) < self._most_samples:
            self._observe(
                events.MicroBatchShrunk(
                    step=self._batch_step,
                    device=self.engine.place.found.name,
                    from_samples=self._most_samples,
                    to_samples=most,
                )
            )
            self._most_samples, self._batch_size = most, min(self._batch_size, most)
        counted = into.samples
        if await self._compute(into.add, self.replica.gradient, count, loss_sum):
            self._nonfinite = 0
        else:
            self._observe(
                events.SamplesWasted(step=self._batch_step, samples=count, cause=events.WasteCause.NONFINITE)
            )
            self._skipped += count if self._lease else 0
            self._nonfinite += 1
            if self._nonfinite >= MOST_NONFINITE:
                raise DeviceError(
                    f"the gradients of {self._nonfinite} micro-batches in a row were not finite, so nothing "
                    f"that this peer computes counts; look for numbers that are not finite in its data, set "
                    'precision = "fp32" in the peer file, or tell the organizer that the learning rate is '
                    "too high"
                )
        if into.counts_each or into.samples > counted:
            self._skipped_for_good = self._skipped
        if not ahead:
            self._report()

    def _patience(self, attempt: Attempt) -> float:
        """How long the attempt lets this peer finish its micro-batch; ≤ 0: seal now."""
        if not self._batch_counts(attempt.freeze.step):
            return 0.0
        if self.swarm.peer_id not in attempt.freeze.finishing:
            return 0.0
        return attempt.began + attempt.freeze.cutoff_seconds - self._now()

    def _report(self) -> None:
        in_flight, finish = 0, 0.0
        if self._batch_counts(self.replica.position.step):
            in_flight = self._batch_count
            finish = max(self._batch_began + self._batch_seconds - self._now(), 0.0)
        self.rounds.progressed(
            self.gathered.samples, in_flight, finish, self._batch_seconds, self.state_digest
        )

    # -- which samples ---------------------------------------------------------------------------------------

    def _to_draw(self) -> int:
        """How many samples this peer may still begin in this step."""
        if not self.gathered.room:
            return 0
        if self._numbered is None:
            return self.rounds.member.target_batch_size
        return sum(stop - start for start, stop in self._lease) - self._drawn

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
            self._void_batch = self._batch
            await self._compute(begin_anew)

    async def _keep_lease(self, attempt: Attempt | None) -> None:
        """Go by the lease that this peer has now, or has in the attempt. Who has one only for leading has
        none when somebody else leads: then what was computed on it is lost."""
        held = self._lease_now() if attempt is None else attempt.lease
        if held != self._lease:
            await self._discard(events.WasteCause.NO_LEASE)
            self._void_batch, self._lease = self._batch, held
            self._drawn = self._skipped = self._skipped_for_good = 0

    async def _begin_lease(self) -> None:
        """From its first sample, as if none had been computed."""
        await self._discard(events.WasteCause.NONFINITE)
        self._drawn = self._skipped = self._skipped_for_good = 0

    def _lease_now(self) -> Ranges:
        leases = self.rounds.member.leases()
        return () if leases is None else lease(leases, self.swarm.peer_id)

    async def _discard(self, cause: events.WasteCause) -> None:
        if self.gathered.samples:
            self._waste(cause)
            await self._compute(self._reset)

    def _taken(self, header: EntryHeader) -> dict[str, Any]:
        """Where samples are leased: what the next entry takes out of the data, and how that stands then."""
        if header.data is None:
            return {}
        accounts = account(header.data, self.replica.position.weight + header.total_samples)
        taken = follows(self.replica.last, header, self.run.target_batch_size)
        return {"taken": taken, **asdict(accounts)}

    @property
    def data(self) -> Account | None:
        """What became of the samples so far; None if they are drawn."""
        last, weight = self.replica.last, self.replica.position.weight
        return None if last is None or last.data is None else account(last.data, weight)

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

    @property
    def gathered(self) -> Gathered:
        """What this peer has done for the round under way."""
        return self._contributor.gathered

    def _reset(self) -> None:
        """On the compute thread."""
        self._follow_strategy()
        self._contributor.reset()

    def _start_step(self, newcomers: Iterable[PeerId], *, settled: bool, above: Ballot | None = None) -> None:
        if not settled:
            # Even if the step is the same as before, after a catch-up that failed: its samples are drawn
            # anew, so one that comes late would count twice (I4).
            self._void_batch = self._batch
            self._milestones = ()
        self._drawn = self._skipped = self._skipped_for_good = 0
        self._compute_seconds = 0.0
        self._in_time = settled
        self._step_began = self._now()
        self._tell_changes()
        self.state_digest = None
        self.donor.arrived()  # before the next micro-batch, so that a snapshot of this step is packed first
        self._digesting = self._spawn(self._digest())
        self.rounds.advance(self.replica.position, self.replica.last, newcomers, settled=settled, above=above)
        self._look_for_lies()
        self._lease = self._lease_now()
        if self.gathered.samples:
            self._report()

    def _tell_changes(self) -> None:
        before, self._changes = self._changes, _changes_of(self.replica)
        last = self.replica.last
        new = [each for each in self._changes if each not in before]
        if last is not None and new:
            said = tuple(f"{each.key} = {each.value:g}" for each in new)
            self._observe(events.TermsApplied(step=last.step, changes=said))

    def _look_for_lies(self) -> None:
        """Go back if an entry of this log is proven to be a lie."""
        first = min(filter(self._is_in_log, self._lies), key=lambda lie: lie.step, default=None)
        if first is not None:
            later = (self.log.lineage_at(at) for at in range(first.step + 1, self.log.step + 1))
            self.rounds.undo(first.step, [lineage for lineage in later if lineage is not None])

    def _is_in_log(self, lie: Convicted) -> bool:
        void = self.rounds.auditor.led_to(lie) if self.rounds.auditor is not None else None
        if void is not None:
            return self.log.lineage_at(lie.step + 1) == void
        # Fetched or replayed, then, or before this peer came: who does not know takes the state of a donor
        # whose log has been looked at.
        if (entry := self.log.get(lie.step)) is not None:
            return (entry.header.parent, entry.header.ballot) == (lie.parent, lie.ballot)
        came_later = self.log.lineage_at(lie.step) is None and lie.step < self.log.step
        return came_later and lie not in self._looked_for

    async def _digest(self) -> None:
        """Beside the next micro-batch, which only reads what is hashed."""
        position = self.replica.position
        self.state_digest = await self._aside(self.replica.compute_state_digest)
        self._milestones = standing(self._milestones, milestone(position, self.state_digest))
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
        match note:
            case TookOver(step, ballot):
                self._observe(
                    events.LeaderTookOver(step=step, attempt=ballot.number, leader=self.swarm.peer_id)
                )
            case Waiting(reason):
                self._leader_waits = reason
            case Diverged(step, ours, theirs):
                self._observe(events.ReplicaDiverged(step=step, ours=ours, theirs=theirs))
            case Faulted(suspects, cause, detail):
                late = cause is events.AbortCause.DEADLINE
                fault = events.FaultCause.UNREACHABLE if late else events.FaultCause.BAD_MESSAGE
                for peer in suspects:
                    self._observe(events.PeerFaulted(peer=peer, cause=fault, detail=detail))
                    self._hold_against(peer, detail)
            case Distrusted(peer, reason):
                self._hold_against(peer, reason)
                self._observe(
                    events.PeerFaulted(peer=peer, cause=events.FaultCause.BAD_MESSAGE, detail=reason)
                )
            case Benched(peer, offences, seconds):
                reason = self._held_against.pop(peer, "it sent what cannot be")
                self._leave_out(peer, seconds, reason)
                self._observe(
                    events.PeerBenched(peer=peer, offences=offences, seconds=seconds, reason=reason)
                )
            case Convicted(peer, step, reason=reason):
                if not note.again:
                    self._leave_out(peer, math.inf, reason)
                    self._observe(events.PeerConvicted(step=step, peer=peer, reason=reason))
                if note.false_sum:
                    self._lies.append(note)
                    self._look_for_lies()
            case StoodOut(peer, rounds):
                step = self.replica.position.step
                self._observe(events.PeerStoodOut(step=step, peer=peer, rounds=rounds))
            case Unlike(peer, excess):
                if self._contributor.judges_data:
                    step = self.replica.position.step
                    self._observe(events.DataUnlike(step=step, peer=peer, noise_excess=excess))
            case Gone(peer):
                self._observe(events.PeerFaulted(peer=peer, cause=events.FaultCause.UNREACHABLE, detail=""))
            case _:
                assert_never(note)

    def _watch_catch_up(self, progress: Progress) -> None:
        self.catching_up = progress
        if (now := self._now()) - self._caught_up_told >= CATCHING_UP_SECONDS:
            self._caught_up_told = now
            self._observe(
                events.CatchingUp(
                    step=self.replica.position.step,
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
        cause = events.FaultCause.BAD_MESSAGE if bad else events.FaultCause.UNREACHABLE
        self._observe(events.PeerFaulted(peer=donor, cause=cause, detail=str(fault)))
        if bad:
            self._hold_against(donor, str(fault))
            self.rounds.offended(donor)

    def _leave_out(self, peer: PeerId, seconds: float, reason: str) -> None:
        self._left_out = {each: held for each, held in self._left_out.items() if held[0] > self._now()}
        self._left_out[peer] = self._now() + seconds, reason

    @property
    def left_out(self) -> dict[PeerId, str]:
        """Whom this peer does not hear at present, and why."""
        return {peer: reason for peer, (until, reason) in self._left_out.items() if until > self._now()}

    def _hold_against(self, peer: PeerId, reason: str) -> None:
        """For the day on which it is left out."""
        if len(self._held_against) >= MAX_HELD_AGAINST:
            self._held_against.clear()
        self._held_against[peer] = reason

    # -- presence --------------------------------------------------------------------------------------------

    async def _keep_present(self) -> None:
        step = self.replica.position.step
        while True:
            await asyncio.sleep(PRESENCE_SECONDS)
            await self._publish_presence()
            member = self.rounds.member
            urgent = member.following == self.swarm.peer_id or not self._in_time
            if self._now() - self._looked_at >= look_seconds(len(member.known), urgent=urgent):
                await self._look()
            waits = step == self.replica.position.step and not member.withdrawn
            self._tell_waiting(stands_still=waits)
            self._tell_deadlines()
            step = self.replica.position.step

    def _tell_waiting(self, *, stands_still: bool) -> None:
        """Say why nothing moves, once it has not for a while, and again when the reason changes."""
        member = self.rounds.member
        if not stands_still:
            reason = ""
        elif member.following == self.swarm.peer_id:
            reason = self._leader_waits
        else:
            reason = f"{events.short(member.following)} leads step {self.replica.position.step}"
        if reason != self._waiting_told:
            self._waiting_told = reason
            self._observe(events.WaitingChanged(reason=reason))

    def _tell_deadlines(self) -> None:
        """Say how long this peer waits for others, and again when that has changed by a quarter."""
        silence, reduce = self.rounds.member.waits()
        now = {
            "silence_seconds": silence,
            "reduce_seconds": reduce,
            "dial_seconds": self.swarm.dial_seconds,
            "request_seconds": self._catch_up.request_seconds(2**20),
        }
        told = self._deadlines_told
        if any(abs(value - told.get(name, 0.0)) > 0.25 * told.get(name, 0.0) for name, value in now.items()):
            self._deadlines_told = now
            self._observe(events.DeadlinesChanged(**now))

    async def _announce(self) -> list[Presence]:
        """Publish this peer's presence, then look who else is there: so of two newcomers one sees the
        other."""
        await self._publish_presence()
        return await self._look()

    async def _publish_presence(self) -> None:
        record = Presence(
            peer=self.swarm.peer_id,
            role="train",
            name=self.config.name,
            protocol=PROTOCOL_VERSION,
            fingerprint=self._fingerprint,
            incarnation=self._incarnation,
            position=self.replica.position,
            metrics_port=self.metrics_port,
            extra=base_note(self.replica) + self.task.note,
            milestones=self._milestones,
        )
        await self.swarm.publish(record, ttl_seconds=5 * PRESENCE_SECONDS)

    async def _look(self) -> list[Presence]:
        """Who else is there."""
        self._looked_at = self._now()
        others = [
            record
            for record in await self.swarm.lookup("presence")
            if isinstance(record, Presence) and record.role == "train" and record.peer != self.swarm.peer_id
        ]
        self.rounds.informed({other.peer: other.position for other in others if other.position is not None})
        odd = outvoted(self._milestones, {other.peer: other.milestones for other in others})
        if odd is not None:
            self._milestones = ()
            self._catch_up.was_misled()
            self.rounds.outvoted(odd.mine.step, odd.mine.state, odd.theirs, odd.donor)
        return others

    async def _publish_round(self, roster_size: int) -> None:
        """Tell monitors and newcomers where the swarm stands."""
        record = RoundRecord(peer=self.swarm.peer_id, position=self.replica.position, roster_size=roster_size)
        await self.swarm.publish(record, ttl_seconds=5 * PRESENCE_SECONDS)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
