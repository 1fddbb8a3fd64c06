"""A swarm of the production state machines on a virtual network, with seeded faults and checked invariants.

One `Simulation(seed)` is one story; the same seed tells the same story, and `play` says how it ended.

Not covered: the rim (`allreduce`, `trainer`, the carriers), diverged tensors, a lie that nobody could know.
"""

from __future__ import annotations

import gc
import random
import traceback
from collections import Counter, deque
from dataclasses import dataclass
from functools import partial

from p2ptrain.protocol.lineage import genesis
from p2ptrain.protocol.member import Member
from p2ptrain.protocol.round import Rules
from p2ptrain.records import EntryHeader, PeerId, Position
from p2ptrain.swarm.network import Network
from tests.simulation.invariants import Invariants, Violation, destination
from tests.simulation.peer import Log, Peer, Stopped
from tests.simulation.story import Story
from tests.simulation.transcript import Transcript

GENESIS = genesis("f" * 64, "0" * 64)
VALUES = 12
MAX_EVENTS = 400_000
TAIL_LINES = 60
LIES_EACH = 3


def rules_of(story: Story) -> Rules:
    """What all machines of the story go by."""
    return Rules(
        target_batch_size=story.target,
        min_peers=1,
        max_peers=64,
        values=VALUES,
        encoded_bytes=4 * VALUES,
        heartbeat_seconds=0.5,
        silence_seconds=2.0,
        silence_most_seconds=60.0,
        attempt_most_seconds=3600.0,
        quorum=story.quorum,
        leased=story.leased,
    )


class Simulation:
    """One seeded story of a swarm; `run` raises Violation if an invariant breaks.

    `doom` names one peer and one of the moments at which it sends or has sent, reads or has read something:
    there its process ends.
    """

    def __init__(
        self,
        seed: int,
        story: Story | None = None,
        *,
        machine: type[Member] = Member,
        doom: tuple[PeerId, int] | None = None,
    ) -> None:
        self.seed = seed
        self.machine = machine
        self.chance = random.Random(f"story {seed}")
        self.story = story or Story.draw(random.Random(f"draw {seed}"))
        self.network = Network(seed, latency=self.story.latency, loss=self.story.loss)
        self.rules = rules_of(self.story)
        self.majority = self.rules.quorum == "majority"
        self.peers: dict[PeerId, Peer] = {}
        self.presence: dict[PeerId, tuple[Position, float]] = {}
        self.invariants = Invariants(self)
        self.happened: Counter[str] = Counter()
        """How often what happened: faults as `fault …`, aborts by cause, what the protocol answered."""
        self.transcript = Transcript()
        self.convicted: set[PeerId] = set()
        """Of whom somebody has proven that it lies; it is on its own from then on."""
        self.liars: set[PeerId] = set()
        """Who has lied: the others may have stopped to listen to it."""
        self.falls: list[str] = []
        """The phases in which a leader will fall, the next one first."""
        self.crossings: dict[PeerId, list[int]] = {}
        """At which step each peer was at each of its moments, if somebody wants to know."""
        self._doom = doom
        self._moments: Counter[PeerId] = Counter()
        self._donors_die = self.story.donors_die
        self._told: set[EntryHeader] = set()
        self._positions: dict[tuple[str, str, int, str], Position] = {}
        self._serial = 0

    def note(self, who: PeerId | str, what: object) -> None:
        self.transcript.note(self.network.now, who, what)

    def serial(self) -> int:
        self._serial += 1
        return self._serial

    # -- what only the narrator knows ------------------------------------------------------------------------

    def positions(self, log: Log) -> Position:
        """Where a log leads."""
        if not log:
            return GENESIS
        header = log[-1][0]
        key = (header.parent, header.digest, header.ballot.number, header.ballot.leader)
        if key not in self._positions:
            self._positions[key] = destination(self.positions(log[:-1]), header)
        return self._positions[key]

    def verified(self, log: tuple[tuple[EntryHeader, str], ...]) -> Position | None:
        """Where a fetched log leads, None if it does not hold; the rim checks as much when it replays."""
        position, contents = GENESIS, self.invariants.contents
        for header, content in log:
            if contents.get(header.digest) != content or header.parent != position.lineage:
                return None
            key = (header.parent, header.digest, header.ballot.number, header.ballot.leader)
            position = self._positions.get(key) or destination(position, header)
        return position

    def present(self, asker: Peer) -> dict[PeerId, Position]:
        """What the DHT shows this peer."""
        now = self.network.now
        return {
            name: position
            for name, (position, expires) in self.presence.items()
            if name != asker.name and expires > now and self.network.reachable(asker.name, name)
        }

    def survivors(self) -> list[Peer]:
        """Those that live, and are not left out by all."""
        peers = self.peers.values()
        return [peer for peer in peers if peer.alive and not peer.hung and peer.name not in self.convicted]

    def hung(self) -> set[PeerId]:
        return {peer.name for peer in self.peers.values() if peer.hung}

    # -- faults ----------------------------------------------------------------------------------------------

    def cross(self, peer: Peer) -> None:
        """The peer is about to send or read something, or has just done so."""
        if self._doom is None:
            return
        moment = self._moments[peer.name]
        self._moments[peer.name] += 1
        self.crossings.setdefault(peer.name, []).append(peer.position.step)
        if self._doom == (peer.name, moment):
            self._doom = (peer.name, -1)
            self.happened["fault crash at a boundary"] += 1
            raise Stopped

    def falls_now(self, peer: Peer, phase: str, chance: float = 0.6) -> bool:
        """Whether this leader falls in this phase, here and now."""
        if not self.falls or self.falls[0] != phase or self.chance.random() >= chance:
            return False
        self.falls.pop(0)
        how = "pauses" if self.story.leader_pauses and phase not in ("all done", "half told") else "dies"
        self.happened[f"fault leader {how} {phase}"] += 1
        self.note(peer.name, f"falls while {phase}")
        return True

    def told(self, header: EntryHeader) -> bool:
        """Whether anybody has been sent this commit before."""
        if header in self._told:
            return True
        self._told.add(header)
        return False

    def donor_dies(self, peer: Peer) -> bool:
        if not self._donors_die:
            return False
        self._donors_die -= 1
        self.happened["fault donor dies"] += 1
        return True

    def fell(self, peer: Peer) -> None:
        """A process ends; it comes back, if the story says so, with what it has not forgotten."""
        self.note(peer.name, "crashes")
        peer.die()
        if self.story.restarts:
            length = len(peer.log)
            kept = self.chance.choice([0, length // 2, max(length - 1, 0), length])
            log = peer.log[:kept] if self.story.forgets else peer.log
            self.network.after(self.chance.uniform(0.1, 6.0), partial(self.spawn, peer.name, log))

    def crash_one(self) -> None:
        if self.survivors():
            self.happened["fault crash"] += 1
            self.fell(self.chance.choice(self.survivors()))

    def leave_one(self) -> None:
        """A peer says nothing to the others, but it takes its name off the DHT."""
        if len(self.survivors()) > 1:
            peer = self.chance.choice(self.survivors())
            self.happened["fault leave"] += 1
            self.note(peer.name, "leaves")
            self.presence.pop(peer.name, None)
            peer.die()

    def hang_one(self) -> None:
        """The machine is there and says nothing any more: no link breaks, so only silence tells."""
        if self.survivors():
            peer = self.chance.choice(self.survivors())
            self.happened["fault hang"] += 1
            self.note(peer.name, "hangs")
            peer.hung = True

    def pause_one(self) -> None:
        if self.survivors():
            self.pause(self.chance.choice(self.survivors()))

    def pause(self, peer: Peer) -> None:
        """The process stands still; clocks, links and the others go on."""
        self.happened["fault pause"] += 1
        self.note(peer.name, "stands still")
        peer.paused = True
        self.network.after(self.chance.uniform(0.5, 6.0), peer.resume)

    def split(self) -> None:
        names = sorted(self.peers)
        self.chance.shuffle(names)
        cut = self.chance.randrange(len(names) + 1)
        self.happened["fault partition"] += 1
        self.note("net", f"parts {names[:cut]} from {names[cut:]}")
        self.network.partition([set(names[:cut]), set(names[cut:])])

    def cut_pair(self) -> None:
        if len(self.peers) > 1:
            one, other = self.chance.sample(sorted(self.peers), 2)
            one_way = self.chance.random() < 0.6
            self.happened["fault one-way cut" if one_way else "fault cut"] += 1
            self.note("net", f"cut from {one} to {other}{'' if one_way else ' and back'}")
            self.network.cut(one, other, one_way=one_way)

    def heal(self) -> None:
        self.note("net", "heals")
        self.happened["heal"] += 1
        self.network.heal()

    def lie_one(self, lie: str) -> None:
        if self.survivors():
            self.chance.choice(self.survivors()).lies += [lie] * self.chance.randint(1, LIES_EACH)

    # -- the story -------------------------------------------------------------------------------------------

    def spawn(self, name: PeerId, log: Log | None = None) -> None:
        if name in self.peers and self.peers[name].alive:
            return
        if name in self.peers:
            self.happened["fault restart"] += 1
        elif name.startswith("j"):
            self.happened["fault join"] += 1
        peer = Peer(self, name, self.serial(), log or [])
        self.note(name, f"starts at step {peer.position.step}")
        self.peers[name] = peer
        self.invariants.born(peer)
        peer.do(peer.start)

    def schedule(self) -> None:
        story, chance, net = self.story, self.chance, self.network
        early, middle = 0.6, story.seconds * 0.6
        for index in range(story.peers):
            net.at(chance.uniform(0, 0.5), partial(self.spawn, PeerId(f"p{index}")))
        for index in range(story.joins):
            net.at(chance.uniform(1, middle), partial(self.spawn, PeerId(f"j{index}")))
        for count, fault in (
            (story.crashes, self.crash_one),
            (story.leaves, self.leave_one),
            (story.pauses, self.pause_one),
            (story.hangs, self.hang_one),
        ):
            for _ in range(count):
                net.at(chance.uniform(early, middle), fault)
        for count, fault in ((story.partitions, self.split), (story.cuts, self.cut_pair)):
            for _ in range(count):
                at = chance.uniform(early, middle)
                net.at(at, fault)
                net.at(at + chance.uniform(0.5, 5), self.heal)
        if story.leader_falls:
            net.at(chance.uniform(early, middle / 2), lambda: self.falls.extend(story.leader_falls))
        for lie in story.liars:
            net.at(chance.uniform(early, middle), partial(self.lie_one, lie))
        if story.slow_link:
            net.slow(PeerId("p0"), 4.0)

    def run(self) -> Simulation:
        """Play the story, then demand that the survivors agree and go on (liveness, I6, I7)."""
        self.schedule()
        self.network.run(until=self.story.seconds, max_events=MAX_EVENTS)
        self.falls.clear()
        self.network.heal()
        while any(peer.paused for peer in self.peers.values() if peer.alive and not peer.hung):
            self.network.run(until=self.network.now + 1.0, max_events=MAX_EVENTS)
        start = max((peer.position for peer in self.survivors()), key=height, default=GENESIS)
        patience = self.network.now + self.story.patience_seconds
        # Who crashed late may still be about to come back, and two sides to find each other again.
        lies = ""
        while True:
            steps = {peer.name: peer.position.step for peer in self.survivors()}
            gone_on = all(step >= start.step + 3 for step in steps.values())
            if gone_on and self.invariants.survivors_agree() and not (lies := self.invariants.standing()):
                break
            if self.network.now >= patience:
                state = "stuck" if not gone_on else lies or "survivors disagree"
                raise Violation(f"{state}: the swarm stood at step {start.step}, and now {steps}")
            self.network.run(until=self.network.now + 0.5, max_events=MAX_EVENTS)
        return self


def height(position: Position) -> tuple[int, int, str]:
    return position.weight, position.step, position.lineage


# -- how it ended --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ending:
    """How one story ended. `broke` is None, or the invariant that did not hold and what led there."""

    seed: int
    broke: str | None
    happened: Counter[str]
    """How often what happened, see `Simulation.happened`."""


def play(
    seed: int,
    machine: type[Member] = Member,
    story: Story | None = None,
    doom: tuple[PeerId, int] | None = None,
) -> Ending:
    """Play one story to its end; whatever goes wrong is told, never raised."""
    sim = Simulation(seed, story, machine=machine, doom=doom)
    # A story makes many cycles and ends soon: the collector would take a sixth of the time, and find little.
    gc.disable()
    try:
        sim.run()
        broke = None
    except Violation as violation:
        broke = str(violation)
    except Exception:
        broke = traceback.format_exc()
    finally:
        gc.enable()
    happened = sim.happened + Counter(
        stories=1,
        steps=max((peer.position.step for peer in sim.survivors()), default=0),
        forks=sim.invariants.forks,
        lost=sim.network.lost,
    )
    if broke is not None:
        broke = told(sim, broke, drawn=story is None and doom is None)
    return Ending(seed, broke, happened)


def play_many(seeds: range) -> tuple[Counter[str], list[str]]:
    """What happened in all of these stories, and what broke."""
    endings = [play(seed) for seed in seeds]
    happened = sum((ending.happened for ending in endings), Counter[str]())
    return happened, [ending.broke for ending in endings if ending.broke is not None]


def told(sim: Simulation, broke: str, *, drawn: bool) -> str:
    """What broke, the end of the transcript, how to replay it and how to keep it."""
    lines = "\n".join(deque(sim.transcript.lines(), maxlen=TAIL_LINES))
    replay = f"replay: python -m tests.simulation {sim.seed}\n" if drawn else ""
    keep = f"keep (tests/simulation/kept.py): ({sim.seed}, {sim.story})"
    return f"seed {sim.seed}: {broke}\n{lines}\n{replay}{keep}"
