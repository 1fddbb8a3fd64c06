"""A swarm without its network: the replicas of a run in one process, round after round.

Everything that a number passes through is what a volunteer runs: `Engine`, the strategy's `Contributor`,
codecs, `average_chunk` in roster order, error feedback, `Replica.apply`. What is left out is everything else:
leaders, messages, deadlines. So a round here is the round of a swarm whose members brought as many samples,
bit for bit, header included (T18: `tests/swarm/test_simulated.py`).

Not covered: leased data, `delay`, `audit`, and a roster that changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from p2ptrain.config import RunConfig, fingerprint
from p2ptrain.errors import P2PTrainError
from p2ptrain.events import PartsUnited
from p2ptrain.gradients.accumulator import Sent
from p2ptrain.gradients.aggregation import AGGREGATIONS
from p2ptrain.gradients.codecs import LARGEST, codec_named
from p2ptrain.gradients.devices import CPU
from p2ptrain.gradients.engine import Engine, chance_of
from p2ptrain.gradients.feedback import Owed
from p2ptrain.gradients.likeness import Likeness
from p2ptrain.gradients.noise import UNMEASURED, Spread
from p2ptrain.gradients.reducing import Rule, Scratch, Spoilt, average_chunk
from p2ptrain.protocol.lineage import joint_digest
from p2ptrain.protocol.spans import balanced, chunk_ranges, share_out
from p2ptrain.records import Ballot, EntryHeader, PeerId
from p2ptrain.replica.apart import Agreement, LocalStrategy, agreement
from p2ptrain.replica.flat import parameter_table
from p2ptrain.replica.log import Entry
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.strategy import Gathered, Round, Told, probe_by
from p2ptrain.replica.subspaces import Cohesion
from p2ptrain.tasks import Task, build_model


class Diverged(P2PTrainError):
    """A number is not finite any more, or so large that no peer would take it: training has failed."""


class Member:
    """One peer: its replica, and what it has gathered for the next round."""

    def __init__(self, run: RunConfig, task: Task, name: PeerId, micro_batch_size: int) -> None:
        model, base_digest = build_model(task, run)
        self.name = name
        self.replica = Replica(model, run, fingerprint(run, parameter_table(model), base_digest), base_digest)
        self.engine = Engine(model, self.replica.gradient, CPU, micro_batch_size)
        self.probe_loss = probe_by(self.engine, task.batch, task.loss_sum)
        self._contributor = self.replica.contributor(name, self.probe_loss)
        self.micro_batch_size = micro_batch_size
        self.owed = Owed(codec_named(run.codec))
        self.sent: list[Sent] = []
        self._run, self._task = run, task

    @property
    def gathered(self) -> Gathered:
        """For the next round."""
        return self._contributor.gathered

    def gather(self, samples: int) -> None:
        """Compute so many samples of the step that the replica is at; none, if this peer owns no part of the
        model. Raises Diverged."""
        step, done = self.replica.position.step, 0
        samples = samples if self.gathered.room else 0
        while done < samples:
            count = min(self.micro_batch_size, self.gathered.room, samples - done)
            loss = self.engine.gradients(
                partial(self._task.batch, step, self.name),
                self._task.loss_sum,
                done,
                count,
                chance_of(self._run.seed, step, self.name, done),
            )
            if not self.gathered.add(self.replica.gradient, count, loss):
                raise Diverged(f"a gradient of step {step} is not finite")
            done += count
        self.gathered.gather()
        self.sent = []
        # What is not finite brings no samples where peers train apart.
        if self.gathered.samples < samples or not float(self.gathered.total.abs().max()) <= LARGEST:
            raise Diverged(f"what a peer brings to step {step} is not finite")

    def apply(self, entry: Entry, owed: Owed) -> Told:
        """The round is committed; `owed` is what this peer kept as a reducer. Returns what it tells."""
        self.owed = owed
        return self._contributor.take(Round(entry, self.sent))


class Simulation:
    """The replicas of a run whose members are always the same, in roster order."""

    def __init__(
        self,
        run: RunConfig,
        task: Task,
        roster: Sequence[str],
        micro_batch_size: int,
        barrier_every: int = 0,
    ) -> None:
        """All at step 0; each computes `micro_batch_size` samples at once. With strategy `local` the
        averaging barrier is measured every so many rounds; 0: never."""
        if run.delay or run.audit or run.data == "leased" or run.local.warmup_rounds:
            raise ValueError("delay, audit, leased data and a warm-up cannot be simulated")
        if list(roster) != sorted(set(roster)):
            raise ValueError(f"a roster is sorted and names each peer once, not {list(roster)}")
        self.run = run
        self._task = task
        self.members = [Member(run, task, PeerId(name), micro_batch_size) for name in roster]
        self._codec = codec_named(run.codec)
        self._aggregation = AGGREGATIONS[run.aggregation]
        self._scratch = Scratch()
        self.cohesions: list[Cohesion] = []
        """With strategy `partition`: of each round that was measured."""
        self.agreements: list[Agreement] = []
        """With strategy `local`: of each round."""
        self.barriers: list[float] = []
        """With strategy `local`, of the rounds that were measured: loss of the copies' average, on samples
        that nobody trains on, less the mean loss of the copies. Below zero averaging helped."""
        self._barrier_every = barrier_every

    @property
    def replica(self) -> Replica:
        """One of them; they are all equal, but for what the models that train apart are at."""
        return self.members[0].replica

    @property
    def encoded_bytes(self) -> int:
        """Of one gradient, or one change, as it travels."""
        ranges = chunk_ranges(0, self.replica.values, self.run.chunk_values)
        return sum(self._codec.encoded_bytes(stop - start) for start, stop in ranges)

    def evaluate(self) -> dict[str, float]:
        """Held-out figures of the replicas as they stand."""
        first = self.members[0]
        return first.engine.judge(self._task.evaluate)

    def round(
        self, samples: Sequence[int], spans: Sequence[int] | None = None, ballot: Ballot | None = None
    ) -> EntryHeader:
        """One committed round, to which the members brought so many samples each; its header.

        `spans` are those of peers that are equally fast, and `ballot` the first, unless they are given.
        Raises Diverged.
        """
        for member, count in zip(self.members, samples, strict=True):
            member.gather(count)
        entry, owed, spread = self._entry([member.gathered.samples for member in self.members], spans, ballot)
        if isinstance(strategy := self.replica.strategy, LocalStrategy):
            self._compare(strategy, entry, spread)
        first, *_ = [member.apply(entry, kept) for member, kept in zip(self.members, owed, strict=True)]
        for event in first.events:
            if isinstance(event, PartsUnited) and event.union_change is not None:
                assert event.parts_change is not None
                self.cohesions.append(Cohesion(event.union_change, event.parts_change))
        return entry.header

    def _compare(self, strategy: LocalStrategy, entry: Entry, spread: Spread | None) -> None:
        """How the copies that the entry averages, and that the members still have, are to each other."""
        header, first = entry.header, self.members[0]
        self.agreements.append(agreement(header, spread, strategy.factor(header)))
        if self._barrier_every and (header.step + 1) % self._barrier_every == 0:
            copies = [member.probe_loss(header.step) for member in self.members]
            strategy.show_average(self.replica.mean_of(entry), header)
            self.barriers.append(first.probe_loss(header.step) - math.fsum(copies) / len(copies))

    def _entry(
        self, samples: Sequence[int], spans: Sequence[int] | None, ballot: Ballot | None
    ) -> tuple[Entry, list[Owed], Spread | None]:
        """What `allreduce.Attempt` does on as many machines: each member reduces its span, chunk by chunk."""
        position, last = self.replica.position, self.replica.last
        spans = spans or share_out(self.replica.values, balanced([0.0 for _ in self.members]))
        ranks = [rank for rank, count in enumerate(samples) if count]
        counts = [samples[rank] for rank in ranks]
        usual = math.sqrt(math.fsum(last.squared_norms)) if last is not None else 0.0
        chunks: list[memoryview] = []
        digests: list[bytes] = []
        norms: list[float] = []
        owed: list[Owed] = []
        likeness = Likeness()  # one for all reducers: what it holds adds up
        for member, (start, stop) in zip(self.members, pairwise(spans), strict=True):
            kept = member.owed.moved(start, stop)
            rule = Rule(self._codec, self._aggregation, usual, kept, likeness, last=last)
            norm = 0.0
            for at, end in chunk_ranges(start, stop, self.run.chunk_values):
                parts = [self._codec.encode(self.members[rank].gathered.total[at:end]) for rank in ranks]
                if self._codec.feedback:
                    for rank, part in zip(ranks, parts, strict=True):
                        self.members[rank].sent.append((at, end, part))
                place = memoryview(bytearray(self._codec.encoded_bytes(end - at)))
                try:
                    squared, digest, _ = average_chunk(
                        rule, self._scratch, ranks, parts, counts, at, end - at, place
                    )
                except Spoilt as fault:
                    raise Diverged(f"a contribution to step {position.step} is {fault}") from fault
                norm += squared
                chunks.append(place)
                digests.append(digest)
            norms.append(norm)
            owed.append(kept)
        header = EntryHeader(
            step=position.step,
            parent=position.lineage,
            ballot=ballot or Ballot(number=0, leader=self.members[0].name),
            roster=tuple(member.name for member in self.members),
            samples=tuple(samples),
            spans=tuple(spans),
            squared_norms=tuple(norms),
            digest=joint_digest(digests),
        )
        spread = None if self._codec.name in UNMEASURED else likeness.spread()
        return Entry(header, b"".join(chunks)), owed, spread
