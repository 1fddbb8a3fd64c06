"""How rounds grow from 4 to 1024 peers, simulated with the machines that a real peer runs.

    python tests/benchmarks/scale.py [--peers 4 16 64 256 1024] [--uplink 20] [--downlink 100] [--rtt 50]

Every peer is a production `Member` (and `Leader`, when it is its turn) with a production `Reduction`; control
messages are packed and parsed as on a stream, so their sizes are real and their bounds hold. Time is virtual.
A link sends one frame after the other, control messages first; what arrives queues for the receiver's
downlink. Of tensors only the sizes exist. Each peer computes micro-batches of about the same length all the
time, as in training, and looks up who is there as often as the trainer does. The swarm has grown before: all
were on the roster of one entry.

Figures are of the rounds after the first: the median over these, and the mean or most over peers.

Not covered: TCP's slow start and its losses, how long encoding and adding take, faults (`tests/simulation`
has those), and which way a DHT look-up takes; its answers are counted, and cost no time here.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import resource
import statistics
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from p2ptrain.protocol.audit import frozen
from p2ptrain.protocol.lineage import advance, genesis
from p2ptrain.protocol.member import Member, Stage
from p2ptrain.protocol.presence import PRESENCE_SECONDS, look_seconds
from p2ptrain.protocol.reduction import Reduction
from p2ptrain.protocol.round import Apply, Begin, Cancel, CatchUp, Effect, Rules, Send
from p2ptrain.protocol.spans import chunk_ranges, moved_bytes, share_out
from p2ptrain.records import (
    Averaged,
    Ballot,
    Call,
    Chunk,
    Direct,
    EntryHeader,
    Freeze,
    Message,
    PeerId,
    Position,
    Presence,
)
from p2ptrain.swarm.clock import EventQueue
from p2ptrain.swarm.frames import LENGTHS_BYTES, pack, parse

GENESIS = genesis("f" * 64, "0" * 64)
SIGNATURE = "0" * 128
"""For its size: nobody looks at it here."""
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
BYTES_PER_VALUE = 2
"""fp16."""
CHUNK_VALUES = 131_072
MICRO_BATCH = 8
BATCH_SECONDS = 2.0
BATCHES_PER_STEP = 5
"""So a step computes for some 10 s on each peer."""
APPLY_SECONDS = 0.05
WARM_ROUNDS = 1
SEAL_BYTES = 110
"""A signature and an expiry around each presence record."""
REPLICAS = 8
"""DHT nodes that keep the presence records, as in `swarm.libp2p`; a look hears all of them."""
MAX_EVENTS = 100_000_000
MOST_SECONDS = 600.0
"""Of virtual time, for a round on average."""


@dataclass
class Link:
    """One direction of a peer's link: frames one after the other, control before tensors."""

    bytes_per_second: float
    _control_until: float = 0.0
    _tensors_until: float = 0.0

    def carry(self, size: int, now: float, control: bool) -> float:
        """When it begins to carry what is there now; it ends `size / bytes_per_second` later."""
        seconds = size / self.bytes_per_second
        if control:
            begins = max(now, self._control_until)
            self._control_until = begins + seconds
            self._tensors_until = max(begins, self._tensors_until) + seconds
        else:
            begins = max(now, self._tensors_until)
            self._tensors_until = begins + seconds
        return begins


@dataclass
class Tally:
    """What was sent since the last committed round."""

    messages: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    largest: Counter[str] = field(default_factory=Counter)
    control_out: Counter[PeerId] = field(default_factory=Counter)
    control_in: Counter[PeerId] = field(default_factory=Counter)
    control_messages: Counter[PeerId] = field(default_factory=Counter)
    """Sent and received."""
    frames: Counter[PeerId] = field(default_factory=Counter)
    """Sent."""
    decided_seconds: defaultdict[PeerId, float] = field(default_factory=lambda: defaultdict(float))
    """Of real time, in the machine."""
    looks: int = 0
    began: float = 0.0


@dataclass
class Times:
    """Virtual times of one round."""

    frozen: float
    told: float = 0.0
    sealed: float = 0.0
    held: float = 0.0
    applied: float = 0.0


class Swarm:
    """All peers, their links and the clock."""

    def __init__(self, count: int, values: int, uplink: float, downlink: float, rtt: float) -> None:
        """Links in bytes per second, the round trip in seconds."""
        chance = random.Random(f"scale {count}")
        self.clock = EventQueue()
        self.values, self.uplink, self.rtt = values, uplink, rtt
        self.rules = Rules(
            target_batch_size=count * MICRO_BATCH * BATCHES_PER_STEP,
            min_peers=1,
            max_peers=count,
            values=values,
            encoded_bytes=BYTES_PER_VALUE * values,
            heartbeat_seconds=1.0,
            silence_seconds=5.0,
            silence_most_seconds=60.0,
            attempt_most_seconds=3600.0,
        )
        names = sorted(PeerId("12D3KooW" + "".join(chance.choices(BASE58, k=44))) for _ in range(count))
        self.last = EntryHeader(
            step=0,
            parent=GENESIS.lineage,
            ballot=Ballot(number=1, leader=names[0]),
            roster=tuple(names),
            samples=(MICRO_BATCH * BATCHES_PER_STEP,) * count,
            spans=share_out(values, [1.0] * count),
            squared_norms=(1 / 3,) * count,
            digest="0" * 64,
        )
        self.position = advance(GENESIS, self.last)
        self.peers = {name: Peer(self, name, chance, uplink, downlink) for name in names}
        self.tally = Tally()
        self.rounds: list[dict[str, Any]] = []
        self.times: dict[int, Times] = {}
        self.aborts = self.catch_ups = 0
        self.pairs: set[tuple[PeerId, PeerId]] = set()
        """Whoever had a chunk for whom."""
        self._packed: deque[tuple[Message, int, Message]] = deque(maxlen=4)

    # -- what travels ----------------------------------------------------------------------------------------

    def tell(self, sender: Peer, to: PeerId, message: Message) -> None:
        """A control message, through the frames that a stream would carry."""
        size, parsed = self._through_a_stream(message)
        tally = self.tally
        tally.messages[message.kind] += 1
        tally.sizes[message.kind] += size
        tally.largest[message.kind] = max(tally.largest[message.kind], size)
        tally.control_out[sender.name] += size
        tally.control_in[to] += size
        tally.control_messages[sender.name] += 1
        tally.control_messages[to] += 1
        begins = sender.up.carry(size, self.clock.now, True)
        left = begins + size / sender.up.bytes_per_second
        arrive = partial(self.peers[to].hear, sender.name, parsed)
        self.clock.call_at(
            begins + self.rtt / 2, self._reach, self.peers[to], size, left + self.rtt / 2, arrive
        )

    def _through_a_stream(self, message: Message) -> tuple[int, Message]:
        """The bytes of its frame, and what comes out. A commit is one message for all: it is packed once."""
        for known, size, parsed in self._packed:
            if known is message:
                return size, parsed
        frame = pack(message)
        parsed = cast(Message, parse(frame[LENGTHS_BYTES:]))
        self._packed.append((message, len(frame), parsed))
        return len(frame), parsed

    def pass_on(
        self, sender: Peer, to: PeerId, header: Chunk | Averaged, header_bytes: int, size: int
    ) -> None:
        """A frame of the data plane; of its payload there is only the size."""
        whole, tally = header_bytes + size, self.tally
        tally.messages[header.kind] += 1
        tally.sizes[header.kind] += whole
        tally.sizes[f"{header.kind} headers"] += header_bytes
        tally.largest[f"{header.kind} headers"] = max(tally.largest[f"{header.kind} headers"], header_bytes)
        tally.frames[sender.name] += 1
        self.pairs.add((sender.name, to))
        sender.outbox.append((self.clock.now, to, header, whole))
        if not sender.sending:
            self._send_next(sender)

    def _send_next(self, sender: Peer) -> None:
        """The next tensor frame leaves as soon as the link is free; only that one is on the clock's list."""
        sender.sending = bool(sender.outbox)
        if sender.sending:
            ready_at, to, header, size = sender.outbox.popleft()
            begins = sender.up.carry(size, ready_at, False)
            self.clock.call_at(begins + self.rtt / 2, self._sent, sender, to, header, size, begins)

    def _sent(self, sender: Peer, to: PeerId, header: Chunk | Averaged, size: int, began: float) -> None:
        last = began + size / sender.up.bytes_per_second + self.rtt / 2
        receiver = self.peers[to]
        begins = receiver.down.carry(size, self.clock.now, False)
        ends = max(last, begins + size / receiver.down.bytes_per_second)
        self.clock.call_at(ends, receiver.take, sender.name, header)
        self._send_next(sender)

    def _reach(self, to: Peer, size: int, last: float, arrive: Callable[[], None]) -> None:
        """The first byte of a message is at the receiver's downlink, and the last one not before `last`."""
        begins = to.down.carry(size, self.clock.now, True)
        self.clock.call_at(max(last, begins + size / to.down.bytes_per_second), arrive)

    # -- the story -------------------------------------------------------------------------------------------

    def run(self, rounds: int) -> None:
        for peer in self.peers.values():
            peer.start()
        most = MOST_SECONDS * rounds
        self.clock.run(lambda: len(self.rounds) >= rounds or self.clock.now > most, MAX_EVENTS)

    def frozen(self, step: int) -> None:
        """A leader says so; of several attempts the last one counts."""
        times = self.times.get(step)
        if times is None or times.frozen < self.clock.now:
            self.times[step] = Times(self.clock.now)

    def present(self) -> dict[PeerId, Position]:
        return {name: peer.position for name, peer in self.peers.items()}

    def applied(self, header: EntryHeader) -> None:
        """One more peer has applied the entry; with the last one the round is over."""
        times, now = self.times[header.step], self.clock.now
        times.applied = now
        if any(peer.position.step <= header.step for peer in self.peers.values()):
            return
        tally, leader, count = self.tally, header.ballot.leader, len(self.peers)
        seconds = now - tally.began
        kinds = sorted(kind for kind in tally.sizes if kind not in ("chunk", "averaged") and " " not in kind)
        records = (count - 1) * PRESENCE_BYTES
        moved = moved_bytes(count, self.rules.encoded_bytes) / self.uplink
        self.rounds.append(
            {
                "step_seconds": seconds,
                "round_seconds": times.applied - times.frozen - (times.sealed - times.told) - APPLY_SECONDS,
                "optimum_seconds": moved + 3 * self.rtt,
                "freeze_seconds": times.told - times.frozen,
                "finishing_seconds": times.sealed - times.told,
                "reduce_seconds": times.held - times.sealed,
                "commit_seconds": times.applied - times.held - APPLY_SECONDS,
                "control": {
                    kind: {
                        "messages_per_peer": tally.messages[kind] / count,
                        "bytes_per_peer": tally.sizes[kind] / count,
                        "largest_bytes": tally.largest[kind],
                    }
                    for kind in kinds
                },
                "control_messages_per_peer": sum(tally.messages[kind] for kind in kinds) / count,
                "control_bytes_per_peer": sum(tally.sizes[kind] for kind in kinds) / count,
                "leader": {
                    "messages": tally.control_messages[leader],
                    "sent_bytes": tally.control_out[leader],
                    "received_bytes": tally.control_in[leader],
                    "sent_bytes_per_second": tally.control_out[leader] / seconds,
                    "deciding_seconds": tally.decided_seconds[leader],
                },
                "member_deciding_seconds": (
                    sum(tally.decided_seconds.values()) - tally.decided_seconds[leader]
                )
                / max(count - 1, 1),
                "data": {
                    "frames_per_peer": sum(tally.frames.values()) / count,
                    "bytes_per_peer": (tally.sizes["chunk"] + tally.sizes["averaged"]) / count,
                    "header_bytes_per_peer": (tally.sizes["chunk headers"] + tally.sizes["averaged headers"])
                    / count,
                    "largest_header_bytes": max(
                        tally.largest["chunk headers"], tally.largest["averaged headers"]
                    ),
                },
                "entry_header_bytes": len(header.model_dump_json()),
                "looks": tally.looks,
                "look_bytes_per_peer": tally.looks / count * REPLICAS * records,
                "keeper_sent_bytes_per_second": tally.looks * records / seconds,
            }
        )
        self.tally = Tally(began=now)
        told = {what: self.rounds[-1][what] for what in ("round_seconds", "control_bytes_per_peer")}
        print(f"{count} peers, step {header.step}: {told}", file=sys.stderr, flush=True)


class Peer:
    """The rim around one machine: computing, applying, and the sizes of chunks."""

    def __init__(self, swarm: Swarm, name: PeerId, chance: random.Random, uplink: float, downlink: float):
        self.swarm, self.name, self.clock = swarm, name, swarm.clock
        self.up, self.down = Link(uplink), Link(downlink)
        self.machine = Member(name, f"{chance.getrandbits(64):016x}", swarm.rules)
        self.position = swarm.position
        self.offset = chance.random()
        self.batch_seconds = BATCH_SECONDS * chance.uniform(0.95, 1.05)
        self.samples = 0
        self.batch_step: int | None = None
        """At which step the micro-batch under way began; None while there is none."""
        self.batch_ends = 0.0
        self.reduction: Reduction | None = None
        self.sealed: float | None = None
        self.frozen = ""
        """Digest of the freeze."""
        self.early: list[tuple[PeerId, Chunk | Averaged]] = []
        self.alarm = float("inf")
        self.looked_at = 0.0
        self.outbox: deque[tuple[float, PeerId, Chunk | Averaged, int]] = deque()
        """Tensor frames that wait for the uplink, each since when."""
        self.sending = False

    def start(self) -> None:
        self.look()
        last = self.swarm.last
        self._do(partial(self.machine.advance, settled=True), self.position, last, self.clock.now)
        self.work()
        self.clock.call_at(PRESENCE_SECONDS * (1 + self.offset), self.look_if_due)

    def look_if_due(self) -> None:
        due = look_seconds(len(self.machine.known), urgent=self.machine.following == self.name)
        if self.clock.now - self.looked_at >= due:
            self.look()
        self.clock.call_at(self.clock.now + PRESENCE_SECONDS, self.look_if_due)

    def look(self) -> None:
        self.looked_at = self.clock.now
        self.swarm.tally.looks += 1
        self._do(self.machine.informed, self.swarm.present(), self.clock.now)

    # -- computing -------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Begin a micro-batch, unless one is under way or an attempt takes what there is."""
        full = self.samples >= self.swarm.rules.target_batch_size
        if self.batch_step is None and self.reduction is None and not full:
            self.batch_step = self.position.step
            self.batch_ends = self.clock.now + self.batch_seconds
            self.clock.call_at(self.batch_ends, self.worked)
            self.report()

    def worked(self) -> None:
        step, self.batch_step = self.batch_step, None
        if step == self.position.step and self.sealed is None:
            self.samples += MICRO_BATCH
            self.report()
        if self.reduction is not None:
            self.seal(self.reduction)
        self.work()

    def report(self) -> None:
        counts = self.batch_step == self.position.step
        self._do(
            self.machine.progressed,
            self.samples,
            MICRO_BATCH if counts else 0,
            self.batch_ends - self.clock.now if counts else 0.0,
            self.batch_seconds,
            self.position.lineage,  # equal on all, as state digests are
            self.clock.now,
        )

    # -- one attempt -----------------------------------------------------------------------------------------

    def begin(self, freeze: Freeze) -> None:
        rules = self.swarm.rules
        self.reduction = Reduction(freeze, self.name, CHUNK_VALUES, rules.most_samples)
        self.sealed, self.frozen = None, frozen(freeze)
        times = self.swarm.times[freeze.step]
        times.told = max(times.told, self.clock.now)
        if self.name in freeze.finishing and self.batch_step == self.position.step:
            self.clock.call_at(self.clock.now + freeze.cutoff_seconds, self.seal, self.reduction)
        else:
            self.seal(self.reduction)
        early, self.early = self.early, []
        for sender, header in early:
            self.take(sender, header)

    def seal(self, reduction: Reduction) -> None:
        """Send every reducer its span, a chunk for each in turn."""
        if self.reduction is not reduction or self.sealed is not None:
            return
        self.sealed = self.clock.now
        freeze, rank = reduction.freeze, reduction.rank
        times = self.swarm.times[freeze.step]
        times.sealed = max(times.sealed, self.clock.now)
        ranges = [
            chunk_ranges(*span, CHUNK_VALUES) for span in zip(freeze.spans, freeze.spans[1:], strict=False)
        ]
        for number in range(max(map(len, ranges))):
            header = Chunk(
                step=freeze.step,
                parent=freeze.parent,
                ballot=freeze.ballot,
                freeze=self.frozen,
                called=None if number else SIGNATURE,
                number=number,
                samples=self.samples,
            )
            header_bytes = len(pack(header, BYTES_PER_VALUE * CHUNK_VALUES))
            for other in (*range(rank + 1, len(ranges)), *range(rank + 1)):
                if number >= len(ranges[other]):
                    continue
                start, stop = ranges[other][number]
                size = BYTES_PER_VALUE * (stop - start)
                if other == rank:
                    self.take(self.name, header)
                else:
                    self.swarm.pass_on(self, freeze.roster[other], header, header_bytes, size)

    def take(self, sender: PeerId, header: Chunk | Averaged) -> None:
        reduction = self.reduction
        if (
            reduction is None
            or header.ballot != reduction.freeze.ballot
            or header.step != reduction.freeze.step
        ):
            if header.step >= self.position.step:
                self.early.append((sender, header))
            return
        if isinstance(header, Averaged):
            reduction.receive(sender, header)
        else:
            reduction.accept(sender, header)
            for number in reduction.ready():
                self.average(reduction, number)
        if reduction.complete and self.machine.stage is Stage.REDUCING:
            self.hold(reduction)

    def average(self, reduction: Reduction, number: int) -> None:
        freeze, rank = reduction.freeze, reduction.rank
        last = number == reduction.chunks[rank] - 1
        header = Averaged(
            step=freeze.step,
            parent=freeze.parent,
            ballot=freeze.ballot,
            freeze=self.frozen,
            called=None if number else SIGNATURE,
            pledge=SIGNATURE if last else None,
            number=number,
            samples=reduction.samples,
            squared_norm=1 / 3 if last else None,
        )
        start, stop = chunk_ranges(freeze.spans[rank], freeze.spans[rank + 1], CHUNK_VALUES)[number]
        size = BYTES_PER_VALUE * (stop - start)
        header_bytes = len(pack(header, size))
        for peer in (*freeze.roster[rank + 1 :], *freeze.roster[:rank]):
            self.swarm.pass_on(self, peer, header, header_bytes, size)
        reduction.receive(self.name, header)

    def hold(self, reduction: Reduction) -> None:
        now, freeze = self.clock.now, reduction.freeze
        assert self.sealed is not None
        times = self.swarm.times[freeze.step]
        times.held = max(times.held, now)
        self.machine.sent_at(self.up.bytes_per_second)  # measured while it has something to send
        self._do(self.machine.held, reduction.header(self.position.lineage), now - self.sealed, now)

    # -- effects and events ----------------------------------------------------------------------------------

    def hear(self, sender: PeerId, message: Message) -> None:
        self._do(self.machine.received, sender, message, self.clock.now)

    def _do(self, event: Callable[..., list[Effect]], *arguments: Any) -> None:
        began = time.perf_counter()
        effects = event(*arguments)
        self.swarm.tally.decided_seconds[self.name] += time.perf_counter() - began
        for effect in effects:
            match effect:
                case Send(to, message):
                    if isinstance(message, Call):
                        self.swarm.frozen(message.step)
                        message = message.model_copy(update={"signature": SIGNATURE})
                    self.swarm.tell(self, to, message)
                case Begin(freeze):
                    if freeze.ballot.leader == self.name:
                        self.swarm.frozen(freeze.step)
                    self.begin(freeze)
                case Cancel():
                    self.swarm.aborts += 1
                    self.reduction, self.sealed = None, None
                    self.work()
                case Apply(header, newcomers):
                    self.clock.call_at(self.clock.now + APPLY_SECONDS, self.apply, header, newcomers)
                case CatchUp():
                    self.swarm.catch_ups += 1
                case _:
                    pass
        due = self.machine.deadline()
        if due < self.alarm:
            self.alarm = due
            self.clock.call_at(max(due, self.clock.now), self.wake)

    def wake(self) -> None:
        self.alarm = float("inf")
        self._do(self.machine.tick, self.clock.now)

    def apply(self, header: EntryHeader, newcomers: tuple[PeerId, ...]) -> None:
        self.position = advance(self.position, header)
        self.samples, self.reduction, self.sealed = 0, None, None
        self._do(
            partial(self.machine.advance, newcomers=newcomers, settled=True),
            self.position,
            header,
            self.clock.now,
        )
        self.work()
        self.swarm.applied(header)


def presence_bytes() -> int:
    """Of a usual presence record, as it is kept and handed out."""
    peer = PeerId("12D3KooW" + "x" * 44)
    return SEAL_BYTES + len(
        Presence(
            peer=peer,
            role="train",
            name="a volunteer",
            protocol=10,
            fingerprint="0" * 64,
            incarnation="0" * 16,
            position=Position(step=10_000, lineage="0" * 64, weight=10_000_000),
            metrics_port=9100,
            direct=Direct(hosts=("203.0.113.77",), port=40_000, certificate="0" * 64),
        ).model_dump_json()
    )


PRESENCE_BYTES = presence_bytes()


def median(rounds: list[Any]) -> Any:
    """Of each figure, over the rounds."""
    if isinstance(rounds[0], dict):
        keys = dict.fromkeys(key for one in rounds for key in one)
        return {key: median([one[key] for one in rounds if key in one]) for key in keys}
    middle = statistics.median(rounds)
    return round(middle, 3) if middle < 1000 else round(middle)


def measure(
    count: int, values: int, uplink: float, downlink: float, rtt: float, rounds: int
) -> dict[str, Any]:
    """Links in Mbit/s and ms."""
    began = time.perf_counter()
    swarm = Swarm(count, values, uplink * 125_000, downlink * 125_000, rtt / 1000)
    gc.disable()  # nothing here is a cycle that would be garbage
    try:
        swarm.run(WARM_ROUNDS + rounds)
    finally:
        gc.enable()
    measured = swarm.rounds[WARM_ROUNDS:]
    return {
        "peers": count,
        "rounds": len(measured),
        **(median(measured) if measured else {}),
        "data_connections_per_peer": len({frozenset(pair) for pair in swarm.pairs}) * 2 / count,
        "aborts": swarm.aborts,
        "catch_ups": swarm.catch_ups,
        "took_seconds": round(time.perf_counter() - began, 1),
        "peak_memory_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--peers", type=int, nargs="+", default=[4, 16, 64, 256, 1024])
    parser.add_argument("--values", type=int, default=10_000_000)
    parser.add_argument("--uplink", type=float, default=20.0, help="Mbit/s")
    parser.add_argument("--downlink", type=float, default=100.0, help="Mbit/s")
    parser.add_argument("--rtt", type=float, default=50.0, help="ms")
    parser.add_argument("--rounds", type=int, default=2, help="to measure, after one more")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = []
    for count in options.peers:
        result = measure(count, options.values, options.uplink, options.downlink, options.rtt, options.rounds)
        results.append(result)
        if not options.json:
            print(json.dumps(result, indent=1))
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
