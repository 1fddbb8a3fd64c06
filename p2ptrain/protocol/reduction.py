"""Which chunks of one attempt are here: the reducer's and the receiver's bookkeeping, without the bytes.

As a reducer, a peer waits until chunk *k* of its span has come from every member and then averages it, in
roster order. As a receiver, it waits for every averaged chunk of every span. What breaks the contract raises
`BadMessage`, and `suspects` names whom this peer itself waits for: never somebody who may only be waiting for
a third.
"""

from __future__ import annotations

from p2ptrain.errors import BadMessage
from p2ptrain.protocol.ledger import Leases, after, counts
from p2ptrain.protocol.spans import chunk_count
from p2ptrain.records import Averaged, Chunk, EntryHeader, Freeze, PeerId


class Reduction:
    """One peer's view of one attempt. Chunks are named (span, number), spans by their place in the roster."""

    def __init__(
        self,
        freeze: Freeze,
        me: PeerId,
        chunk_values: int,
        most_samples: int,
        leases: Leases | None = None,
    ) -> None:
        """`most_samples`: who claims more lies, and would own the average; where samples are leased,
        nobody brings more than its lease, and who has none brings nothing."""
        self.freeze = freeze
        self._leases = leases
        holders = freeze.roster if leases is None else leases.holders
        most = most_samples if leases is None else leases.size
        self._most = [most if peer in holders else 0 for peer in freeze.roster]
        self.rank = freeze.roster.index(me)
        self.chunks = [
            chunk_count(start, stop, chunk_values)
            for start, stop in zip(freeze.spans, freeze.spans[1:], strict=False)
        ]
        members = len(freeze.roster)
        self._rank_of = {peer: rank for rank, peer in enumerate(freeze.roster)}
        self._samples: list[int | None] = [None] * members
        self._skipped = [0] * members
        self._got: list[set[int]] = [set() for _ in range(members)]
        self._arrived = [0] * self.chunks[self.rank]
        """Members that brought each chunk of my span; those that bring no sample are counted apart."""
        self._empty = 0
        self._next = 0
        self._averaged: list[set[int]] = [set() for _ in range(members)]
        self._missing = sum(self.chunks)
        """Averaged chunks that are not here."""
        self._norms: list[float | None] = [0.0 if count == 0 else None for count in self.chunks]
        self._spreads: list[tuple[float, float] | None] = [
            (0.0, 0.0) if count == 0 else None for count in self.chunks
        ]
        self._counts: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        """What all have brought and skipped, as the reducers say."""

    @property
    def samples(self) -> tuple[int, ...]:
        """The members' sample counts in roster order, once each has said its own; absent ones count 0 so
        far."""
        return tuple(count or 0 for count in self._samples)

    @property
    def skipped(self) -> tuple[int, ...]:
        """What they left out, likewise; empty if none did."""
        return tuple(self._skipped) if any(self._skipped) else ()

    def accept(self, sender: PeerId, chunk: Chunk) -> bool:
        """Take note of a member's chunk for my span; False if it was here already. A member with no samples
        sends one empty chunk that stands for all."""
        rank = self._rank(sender)
        if chunk.number >= self.chunks[self.rank]:
            raise BadMessage(
                f"chunk {chunk.number} of a span of {self.chunks[self.rank]} chunks from {sender[-8:]}"
            )
        if chunk.samples + chunk.skipped > self._most[rank]:
            claim = f"{chunk.samples + chunk.skipped} samples"
            raise BadMessage(f"{sender[-8:]} claims {claim}; a peer brings at most {self._most[rank]}")
        if chunk.skipped and self._leases is None:
            raise BadMessage(f"{sender[-8:]} skips {chunk.skipped} samples, and this run leases none")
        if self._samples[rank] not in (None, chunk.samples):
            raise BadMessage(f"{sender[-8:]} claims {chunk.samples} samples after {self._samples[rank]}")
        if self._samples[rank] is not None and self._skipped[rank] != chunk.skipped:
            raise BadMessage(f"{sender[-8:]} skips {chunk.skipped} samples after {self._skipped[rank]}")
        if chunk.number in self._got[rank]:
            return False
        if not chunk.samples:
            self._empty += self._samples[rank] is None
        else:
            self._arrived[chunk.number] += 1
        self._samples[rank], self._skipped[rank] = chunk.samples, chunk.skipped
        self._got[rank].add(chunk.number)
        return True

    def ready(self) -> list[int]:
        """The chunks of my span that became complete since the last call, in order."""
        complete, members = [], len(self._samples)
        while self._next < len(self._arrived) and self._arrived[self._next] + self._empty == members:
            complete.append(self._next)
            self._next += 1
        return complete

    @property
    def averaged_over(self) -> tuple[int, ...]:
        """The sample counts that the averages here were divided by; none so far: empty."""
        return self._counts[0] if self._counts is not None else ()

    def contributors(self) -> list[int]:
        """Ranks of the members that bring samples, in roster order."""
        return [rank for rank, count in enumerate(self._samples) if count]

    def receive(self, reducer: PeerId, averaged: Averaged) -> bool:
        """Take note of an averaged chunk of the reducer's span; False if it was here already."""
        rank = self._rank(reducer)
        last = self.chunks[rank] - 1
        if averaged.number > last:
            raise BadMessage(f"averaged chunk {averaged.number} of a span of {last + 1} from {reducer[-8:]}")
        said = averaged.samples, averaged.skipped
        if said != self._counts:
            self._check_counts(reducer, *said)
        if (averaged.squared_norm is not None) != (averaged.number == last):
            raise BadMessage(
                f"the norm belongs on the last chunk of a span; {reducer[-8:]} sent it otherwise"
            )
        if averaged.number in self._averaged[rank]:
            return False
        self._counts = said
        self._averaged[rank].add(averaged.number)
        self._missing -= 1
        if averaged.squared_norm is not None:
            self._norms[rank] = averaged.squared_norm
            self._spreads[rank] = averaged.spread
        return True

    @property
    def complete(self) -> bool:
        """Every averaged chunk of every span is here."""
        return not self._missing

    def header(self, digest: str) -> EntryHeader:
        """The entry that this attempt would commit; `digest` is over its encoded chunks in order."""
        assert self.complete
        assert self._counts is not None
        samples, skipped = self._counts
        used = counts(self.freeze.roster, samples, skipped)
        return EntryHeader(
            step=self.freeze.step,
            parent=self.freeze.parent,
            ballot=self.freeze.ballot,
            roster=self.freeze.roster,
            samples=samples,
            spans=self.freeze.spans,
            squared_norms=tuple(norm or 0.0 for norm in self._norms),
            digest=digest,
            terms=self.freeze.terms,
            skipped=skipped,
            data=None if self._leases is None else after(self._leases, used),
        )

    def spread(self) -> tuple[float, float] | None:
        """`Averaged.spread` of all spans together; None if a reducer could not tell."""
        told = [spread for spread in self._spreads if spread is not None]
        if len(told) < len(self._spreads):
            return None
        return sum(groups for groups, _ in told), sum(mean for _, mean in told)

    def suspects(self) -> list[PeerId]:
        """Whom this peer waits for: members whose chunks it lacks, or else reducers that are late with
        theirs."""
        mine = self.chunks[self.rank]
        senders = [
            peer
            for peer, count, got in zip(self.freeze.roster, self._samples, self._got, strict=True)
            if mine and count != 0 and len(got) < mine
        ]
        if senders:
            return senders
        return [
            peer
            for peer, got, count in zip(self.freeze.roster, self._averaged, self.chunks, strict=True)
            if len(got) < count
        ]

    def _check_counts(self, reducer: PeerId, samples: tuple[int, ...], skipped: tuple[int, ...]) -> None:
        members = len(self.freeze.roster)
        if len(samples) != members or sum(samples) == 0 or (skipped and len(skipped) != members):
            raise BadMessage(f"averaged chunk from {reducer[-8:]} names no samples for this roster")
        used = [sum(counts) for counts in zip(samples, skipped or (0,) * members, strict=True)]
        if any(count > most for count, most in zip(used, self._most, strict=True)):
            raise BadMessage(f"averaged chunk from {reducer[-8:]} counts more samples than a peer can bring")
        if skipped and (self._leases is None or not any(skipped)):
            raise BadMessage(f"averaged chunk from {reducer[-8:]} skips samples that it should not name")
        if self._counts is not None:
            raise BadMessage(f"{reducer[-8:]} divided by other sample counts than the reducers before it")

    def _rank(self, peer: PeerId) -> int:
        if peer not in self._rank_of:
            raise BadMessage(f"{peer[-8:]} is not on the roster of this attempt")
        return self._rank_of[peer]
