"""I1 to I8, held against what the peers of one story say and do.

`Invariants` is told of each effect, each entry that is applied and the end of each event, and raises
`Violation`. It knows more than any peer: who ever held what, who has died, what every sample was. What it may
not do is believe a machine.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import lru_cache
from typing import TYPE_CHECKING

from p2ptrain.protocol.ledger import follows
from p2ptrain.protocol.lineage import advance, heavier
from p2ptrain.protocol.member import Stage
from p2ptrain.records import Answer, Ballot, Commit, Done, EntryHeader, Message, PeerId, Position

if TYPE_CHECKING:
    from tests.simulation.peer import Log, Peer
    from tests.simulation.sim import Simulation

KNOWN_AFTER_SECONDS = 4.0
"""Two presence records: until then, the others need not know that a peer has come back."""

MARKS = "!~"
"""At the end of a mean that is not what it should be."""

AttemptName = tuple[str, Ballot]
"""The lineage that an attempt builds on, and its ballot."""


def computed_at(step: int, lineage: str) -> str:
    """How a sample's id says for which parameters it was computed."""
    return f"{step}@{lineage[:6]}"


@lru_cache(maxsize=256)
def destination(position: Position, header: EntryHeader) -> Position:
    """Where the entry leads, which is asked for each member that holds it."""
    return advance(position, header)


class Violation(AssertionError):
    """An invariant does not hold."""


class Invariants:
    """What has happened in one story, as far as I1 to I8 speak of it."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.forks = 0
        self.contents: dict[str, str] = {}
        """What an entry is made of, by its digest: each contributor's samples, `,` and `;` between them."""
        self.frozen: dict[AttemptName, float] = {}
        """When the first member began each attempt."""
        self._freezes: dict[tuple[AttemptName, str], str] = {}
        """Which freeze that was, by its digest, in which life of its leader."""
        self.sealed: dict[tuple[AttemptName, PeerId], int] = {}
        """How many samples each member brought to an attempt."""
        self.skipped: dict[tuple[AttemptName, PeerId], tuple[int, ...]] = {}
        """The leased samples that it took out of the data besides, by their numbers."""
        self._taken: dict[str, frozenset[int]] = {}
        """The leased samples that all entries up to a lineage have taken out of the data."""
        self._holders: dict[tuple[AttemptName, str], set[PeerId]] = defaultdict(set)
        """Who has ever held every span of an attempt, by the digest of what was held."""
        self._leading: dict[str, EntryHeader] = {}
        """The entry that was held, by the lineage it leads to."""
        self._declared: set[tuple[AttemptName, str]] = set()
        self._children: dict[str, set[str]] = defaultdict(set)
        self._states: dict[str, str] = {}
        self._entries: dict[str, EntryHeader] = {}
        self._heights: dict[PeerId, Position] = {}

    # -- what is told ----------------------------------------------------------------------------------------

    def born(self, peer: Peer) -> None:
        self._heights[peer.name] = peer.position

    def began(self, attempt: AttemptName, freeze: str) -> None:
        """A member begins it: its leader has called everybody to the same, or would be proven to lie."""
        self.frozen.setdefault(attempt, self.sim.network.now)
        leader = self.sim.peers[attempt[1].leader]
        life = f"{leader.incarnation} {leader.machine.incarnation}"
        if self._freezes.setdefault((attempt, life), freeze) != freeze:
            raise Violation(f"I2: {attempt[1].leader} called to two freezes by ballot {attempt[1].number}")

    def held(self, peer: Peer, header: EntryHeader) -> None:
        """The peer holds every span."""
        self._leading[destination(peer.position, header).lineage] = header
        self._holders[(header.parent, header.ballot), header.digest].add(peer.name)

    def said(self, peer: Peer, message: Message) -> None:
        """A peer speaks: it commits only what all hold (I1), and it keeps its promises (I7)."""
        match message:
            case Commit(position=position):
                self.declared(peer, self.leading_to(position))
            case Answer(question=Ballot() as ballot, held=None):
                peer.promised = (message.position.lineage, ballot)
            case Done(position=position) if peer.promised is not None:
                lineage, ballot = peer.promised
                header = self.leading_to(position)
                if header.parent == lineage and header.ballot < ballot:
                    raise Violation(f"I7: {peer.name} is Done with {header.ballot} after promising {ballot}")
            case _:
                pass

    def leading_to(self, position: Position) -> EntryHeader:
        """The header of the entry that leads there: somebody has held it, or it would be made up."""
        if (header := self._leading.get(position.lineage)) is None:
            raise Violation(f"I1: {position} is spoken of, and nobody has ever held what leads there")
        return header

    def declared(self, peer: Peer, header: EntryHeader) -> None:
        """The first peer that calls an attempt committed has to be right (I1); later ones repeat it."""
        attempt = (header.parent, header.ballot)
        if (attempt, header.digest) in self._declared:
            return
        self._declared.add((attempt, header.digest))
        missing = set(header.roster) - self._holders[attempt, header.digest]
        gone = self._dropped(header.roster, attempt)
        if peer.name in gone or peer.machine.ballot != header.ballot:
            # A successor, of others or of itself, decides with those that live and answer.
            missing = set() if self.sim.story.may_fork else missing - gone - self.sim.hung()
        if missing:
            raise Violation(f"I1: {peer.name} commits step {header.step}, which {missing} does not hold")
        for name, samples in zip(header.roster, header.samples, strict=True):
            if samples != self.sealed.get((attempt, name), samples) and name not in gone:
                raise Violation(
                    f"I4: {name} brought {self.sealed[attempt, name]} samples, and {samples} are counted"
                )

    def applied(self, log: Log) -> None:
        """An entry is applied somewhere: I1, I2, I4."""
        header, content = log[-1]
        lineage = self.sim.positions(log).lineage
        if ((header.parent, header.ballot), header.digest) not in self._declared:
            raise Violation(f"I1: step {header.step} is taken, and nobody has committed it")
        if self._states.setdefault(lineage, content) != content:
            raise Violation(f"I2: lineage {lineage[:8]} has two contents")
        siblings = self._children[header.parent]
        if siblings and lineage not in siblings:
            self.forks += 1
            if self.sim.majority and header.step and not self._few_remember(siblings):
                raise Violation(f"fork: step {header.step} was committed twice under a majority's rule")
            bearers = sorted({peer for sibling in siblings for peer in self._bearers(sibling)})
            alone = header.ballot.leader in self.sim.liars
            # Some may not have heard yet that what they stand on is being undone.
            excused = alone or (self.sim.story.audited and self.sim.liars)
            if bearers and not excused and not self.sim.story.may_fork:
                raise Violation(f"I1: step {header.step} was committed again while {bearers} had it")
        siblings.add(lineage)
        if lineage not in self._entries:
            self._entries[lineage] = header
            self._count(header, content)
            if self.sim.rules.leased:
                self._taken[lineage] = self._take(log[:-1], header, content)

    def rose(self, peer: Peer, before: Position, after: Position) -> None:
        """A replica changes its place in the log: only upwards (I3, I8)."""
        if not heavier(after, before):
            raise Violation(f"I3/I8: {peer.name} went from {before} to {after}")

    def undone(self, peer: Peer) -> None:
        """It went back before a lie that is proven (ADR 32)."""
        self._heights[peer.name] = peer.position

    def standing(self) -> str:
        """What of the lies of reducers is not as it should be at the end: each that lied is known to all, and
        nobody stands on what was proven."""
        if not self.sim.story.audited:
            return ""
        for peer in self.sim.survivors():
            assert peer.audits is not None
            if unknown := {each for each in self.sim.liars if each not in peer.audits.proofs}:
                return f"a lie stays: {peer.name} does not know that {sorted(unknown)} lied"
            if lie := peer.audits.lie_in(peer.log):
                return f"a lie stays: {peer.name} stands on that of step {lie.step}"
        return ""

    def after(self, peer: Peer) -> None:
        """At the end of each event of a peer: where it stands (I3), and what it waits for (I6)."""
        before, position = self._heights[peer.name], peer.position
        if before is not position:
            if heavier(before, position):
                raise Violation(f"I3: {peer.name} fell from {before} to {position}")
            self._heights[peer.name] = position
        machine = peer.machine
        if machine.stage is Stage.OUTSIDE:
            if not (peer.fetching or peer.applying):
                raise Violation(f"I6: {peer.name} is outside and nothing will bring it back")
            return
        if machine.position is not position:
            raise Violation(f"I1: {peer.name} stands at {position}, its machine at {machine.position}")
        if machine.deadline() == float("inf"):
            raise Violation(f"I6: {peer.name} waits without a deadline")
        mine = peer.attempt.freeze if peer.attempt is not None else None
        if machine.freeze is not mine:
            raise Violation(f"I6: {peer.name} works on {mine}, its machine on {machine.freeze}")

    def survivors_agree(self) -> bool:
        """At the end (I7): what was settled a few steps ago is one lineage; the newest may be on its way."""
        alive = self.sim.survivors()
        depth = min((len(peer.log) for peer in alive), default=0) - 2
        return depth <= 0 or len({self.sim.positions(peer.log[:depth]).lineage for peer in alive}) == 1

    # -- inside ----------------------------------------------------------------------------------------------

    def _count(self, header: EntryHeader, content: str) -> None:
        """A sample counts once, and at the step and lineage that it was computed for (I4)."""
        ids = [one for group in content.rstrip(MARKS).split(";") for one in group.split(",") if one]
        if len(ids) != len(set(ids)) or len(ids) != header.total_samples:
            raise Violation(f"I4: entry {header.step} counts {header.total_samples} samples of {sorted(ids)}")
        per_peer: Counter[str] = Counter()
        for one in ids:
            where, name, _ = one.split("/", 2)
            per_peer[name] += 1
            if where != computed_at(header.step, header.parent):
                raise Violation(f"I4: entry {header.step} holds a sample of elsewhere: {one}")
        if per_peer != Counter({name: n for name, n in zip(header.roster, header.samples, strict=True) if n}):
            raise Violation(f"I4: entry {header.step} counts {header.samples} samples of {per_peer}")

    def _take(self, before: Log, header: EntryHeader, content: str) -> frozenset[int]:
        """Of leased samples none is taken twice in a lineage, and each that comes before the next one is
        taken or will be given out again: none that a dead peer held is lost (I4)."""
        attempt = (header.parent, header.ballot)
        ids = [one for group in content.rstrip(MARKS).split(";") for one in group.split(",") if one]
        counted = [int(one.rpartition("/")[2]) for one in ids]
        skipped = [
            number
            for peer, count in zip(header.roster, header.skipped, strict=False)
            for number in self.skipped[attempt, peer][:count]
        ]
        earlier = self._taken.get(header.parent, frozenset())
        taken = earlier.union(counted, skipped)
        if len(taken) != len(earlier) + len(counted) + len(skipped):
            raise Violation(f"I4: entry {header.step} counts samples again: {sorted(earlier & {*counted})}")
        data = header.data
        if data is None:
            raise Violation(f"I4: entry {header.step} does not say where the data stands")
        returned = {number for start, stop in data.returned for number in range(start, stop)}
        if taken | returned != set(range(data.next)) or taken & returned:
            raise Violation(f"I4: {data} after entry {header.step}, which leaves {sorted(taken)} taken")
        try:
            follows(before[-1][0] if before else None, header, self.sim.rules.target_batch_size)
        except ValueError as error:
            raise Violation(f"I4: entry {header.step} would not be applied: {error}") from error
        return taken

    def _few_remember(self, siblings: set[str]) -> bool:
        """Whether half of those who had the say have forgotten what they held for each of these entries, so
        that no majority of them knows better. Before the first step nobody has the say."""
        for sibling in siblings:
            header = self._entries[sibling]
            electorate = self._entries[header.parent].roster
            forgetful = self._dropped(electorate, (header.parent, header.ballot))
            if 2 * len(forgetful) < len(electorate):
                return False
        return True

    def _bearers(self, lineage: str) -> list[PeerId]:
        """Who keeps the entry that led to `lineage` from being lost: while one lives there is no other.

        That is whoever has applied it (except for the moment until the others know that it is there), and
        whoever is about to: a member of its roster, for it was committed because all of them held it. A liar
        may have been benched: then it is not heard, and goes on by itself.
        """
        header = self._entries[lineage]
        members = set(header.roster) - self._dropped(header.roster, (header.parent, header.ballot))
        bearers = []
        for peer in self.sim.survivors():
            if peer.name in self.sim.liars:
                continue
            if len(peer.log) > header.step:
                known = self.sim.network.now - max(peer.born, peer.left) > KNOWN_AFTER_SECONDS
                if known and self.sim.positions(peer.log[: header.step + 1]).lineage == lineage:
                    bearers.append(peer.name)
            elif peer.name in members and peer.position.lineage == header.parent:
                bearers.append(peer.name)
        return bearers

    def reborn(self, roster: tuple[PeerId, ...], attempt: AttemptName) -> set[PeerId]:
        """Those on the roster that have died, or have started anew, since the attempt began."""
        began, peers = self.frozen[attempt], self.sim.peers
        return {peer for peer in roster if not peers[peer].alive or peers[peer].born > began}

    def _dropped(self, roster: tuple[PeerId, ...], attempt: AttemptName) -> set[PeerId]:
        """Those, and who has dropped what it held to look for a heavier state."""
        began = self.frozen[attempt]
        left = {peer for peer in roster if self.sim.peers[peer].left > began}
        return left | self.reborn(roster, attempt)
