"""A network of plain callbacks, whose latency, losses and faults follow from a seed.

There is no asyncio in it and it is fast, so that thousands of stories of pure state machines can be played.
What a lane promises is what `port` says and no more: until `on_link` is called, what arrives on it is a
gapless beginning of what was sent on it, and whatever was lost, its sender is told so after a while.

Not covered: what a receiver's downlink can take, and routes: each pair of peers has one of its own.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Iterable

from p2ptrain.records import PeerId
from p2ptrain.swarm.clock import Cancellable, Clock, EventQueue

CONTROL = "control"
REDIAL_SECONDS = 1.0
"""A peer tries this long to reach a silent one again before it takes it for gone."""
MAX_SHOWN_CHARACTERS = 240

Receive = Callable[[PeerId, object], None]
OnLink = Callable[[PeerId, bool], None]


class _Port:
    """A peer while it is attached; when it comes back, it gets another one."""

    __slots__ = ("on_link", "receive", "sent_at")

    def __init__(self, receive: Receive, on_link: OnLink) -> None:
        self.receive, self.on_link = receive, on_link
        self.sent_at = 0.0
        """When the uplink will have sent all that is queued on it."""


class _Stream:
    """A lane from one port to another, until it breaks; after that the lane is another stream."""

    __slots__ = ("arrives_at", "broken", "end", "flight", "key", "start")

    def __init__(self, key: tuple[PeerId, PeerId, str], start: _Port, end: _Port | None) -> None:
        self.key, self.start, self.end = key, start, end
        self.flight: deque[object] = deque()
        self.arrives_at = 0.0
        """When the last message in flight will arrive: the next one must not overtake it."""
        self.broken = False


class Network:
    """Peers, the lanes between them, and what befalls both. The same seed and calls make the same story.

    `latency` is the range of seconds from which each message's delay is drawn, `loss` the probability that a
    message meets a reset of its lane, `bandwidth_bytes_per_second` what each peer can send. The other faults
    are calls: `detach` (a crash), `partition`, `cut`, `slow`.

    What meets a fault breaks its lane: all that is in flight on it is lost, and so is what follows, until the
    sender's `on_link(peer, up)` says whether the peer is there again. After a reset the receiver is told as
    well.

    `clock` keeps the time; by default the network does so, and jumps from event to event in `run`. `trace`
    holds the last `trace_lines` things that happened, as text.
    """

    def __init__(
        self,
        seed: int,
        latency: tuple[float, float] = (0.01, 0.05),
        loss: float = 0.0,
        *,
        bandwidth_bytes_per_second: float | None = None,
        clock: Clock | None = None,
        trace_lines: int = 0,
    ) -> None:
        if not 0 <= latency[0] <= latency[1]:
            raise ValueError(f"latency must be (least, most) in seconds, but is {latency}")
        if not 0 <= loss <= 1:
            raise ValueError(f"loss must be a probability, but is {loss}")
        if bandwidth_bytes_per_second is not None and bandwidth_bytes_per_second <= 0:
            raise ValueError(
                f"bandwidth must be above 0 bytes per second, but is {bandwidth_bytes_per_second}"
            )
        self.seed = seed
        self.sent = self.delivered = self.lost = 0
        """Messages so far; what is neither delivered nor lost is in flight."""
        self.sent_bytes = 0
        self.trace: deque[str] = deque(maxlen=trace_lines)
        self._own_clock = EventQueue()
        self._clock: Clock = self._own_clock if clock is None else clock
        self._chance = random.Random(f"network {seed}")  # noqa: S311 - a seeded schedule, no secret
        self._least, self._spread = latency[0], latency[1] - latency[0]
        self._loss = loss
        self._bandwidth = bandwidth_bytes_per_second
        self._ports: dict[PeerId, _Port] = {}
        self._streams: dict[tuple[PeerId, PeerId, str], _Stream] = {}
        self._group: dict[PeerId, int] = {}
        self._cuts: set[tuple[PeerId, PeerId]] = set()
        self._slowness: dict[PeerId, float] = {}

    # -- time ------------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Seconds on the network's clock; its own starts at 0."""
        return self._clock.time()

    def at(self, when: float, callback: Callable[[], object]) -> Cancellable:
        """Call `callback` at that time, unless the handle's `cancel` is called before."""
        return self._clock.call_at(when, callback)

    def after(self, delay: float, callback: Callable[[], object]) -> Cancellable:
        """Call `callback` in `delay` seconds, unless the handle's `cancel` is called before."""
        return self._clock.call_at(self._clock.time() + delay, callback)

    def run(self, until: float | Callable[[], bool], max_events: int = 1_000_000) -> bool:
        """Let things happen until a time, or until a condition holds; see `EventQueue.run`."""
        if self._clock is not self._own_clock:
            raise ValueError("this network lives on another clock; wait there instead of calling run")
        try:
            return self._own_clock.run(until, max_events)
        except Exception as error:
            error.add_note(f"in the network of seed {self.seed}")
            raise

    # -- peers -----------------------------------------------------------------------------------------------

    def attach(self, peer: PeerId, receive: Receive, on_link: OnLink) -> None:
        """Put a peer on the net; it is told of `receive(sender, message)` and `on_link(other, up)`."""
        if peer in self._ports:
            raise ValueError(f"{peer} is on this network already; detach it first")
        self._ports[peer] = _Port(receive, on_link)
        self._note("%s is there", peer)

    def detach(self, peer: PeerId) -> None:
        """Take a peer off the net at once, as a crash does; nothing happens if it is not on it.

        What it sent before still arrives. After that, whoever has a lane from or to it and can be reached
        hears `on_link(peer, up)`: down, unless a peer of that name is back by then.
        """
        if self._ports.pop(peer, None) is None:
            return
        self._note("%s is gone", peer)
        last_words: dict[PeerId, float] = {}
        broken: dict[PeerId, list[_Stream]] = {}
        for stream in list(self._streams.values()):
            source, to, _ = stream.key
            if source == peer:
                del self._streams[stream.key]
            elif to != peer:
                continue
            other = to if source == peer else source
            if other not in self._ports or not self.reachable(peer, other):
                continue  # it finds out when it next sends something
            last_words[other] = max(last_words.get(other, 0.0), stream.arrives_at if source == peer else 0.0)
            if to == peer:
                broken.setdefault(other, []).append(stream)
        for other, last in last_words.items():
            told_at = max(last, self._clock.time()) + self._delay(peer, other)
            self._break(broken.get(other, []), [(other, peer)], told_at)

    # -- messages --------------------------------------------------------------------------------------------

    def send(
        self, source: PeerId, to: PeerId, message: object, lane: str = CONTROL, size_bytes: int = 0
    ) -> float:
        """Put a message on its way. One lane keeps its order; `CONTROL` does not wait for the others' bytes.

        Returns the time when the last byte will have left the sender. What a peer sends that is not attached
        goes nowhere.
        """
        now = self._clock.time()
        start = self._ports.get(source)
        if start is None:
            return now
        self.sent += 1
        self.sent_bytes += size_bytes
        key = (source, to, lane)
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = _Stream(key, start, self._ports.get(to))
        if stream.broken:
            self._lose(stream, message)
            return now
        stream.flight.append(message)
        if not self._leads_there(stream):
            self._unreachable(stream)
            return now
        if self._loss and self._chance.random() < self._loss:
            there_and_back = self._delay(source, to) + self._delay(to, source)
            self._break([stream], [(source, to), (to, source)], now + there_and_back)
            return now
        leaves = now
        if self._bandwidth is not None and size_bytes:
            seconds = size_bytes / self._bandwidth * self._slowness.get(source, 1.0)
            if lane == CONTROL:
                leaves = now + seconds
            else:
                leaves = start.sent_at = max(now, start.sent_at) + seconds
        stream.arrives_at = max(stream.arrives_at, leaves + self._delay(source, to))
        self._clock.call_at(stream.arrives_at, self._arrive, stream)
        return leaves

    # -- faults ----------------------------------------------------------------------------------------------

    def reachable(self, a: PeerId, b: PeerId) -> bool:
        """Neither a partition nor a cut keeps `a` from `b`; whether they are attached is another matter."""
        return self._group.get(a) == self._group.get(b) and (a, b) not in self._cuts

    def partition(self, groups: Iterable[Iterable[PeerId]]) -> None:
        """From now on only peers of one group reach each other; all that are in none are one more group.

        This replaces the partition before it; cuts stay.
        """
        self._group = {peer: number for number, group in enumerate(groups) for peer in group}
        self._note("partition %s", sorted(self._group.items()))

    def cut(self, a: PeerId, b: PeerId, *, one_way: bool = False) -> None:
        """These two do not reach each other, though others may reach both. `one_way`: what `a` sends is lost,
        and `b` reaches `a` as before."""
        self._cuts |= {(a, b)} if one_way else {(a, b), (b, a)}
        self._note("cut from %s to %s" if one_way else "cut between %s and %s", a, b)

    def heal(self) -> None:
        """End the partition and all cuts."""
        self._group, self._cuts = {}, set()
        self._note("healed")

    def slow(self, peer: PeerId, factor: float) -> None:
        """Everything from and to that peer takes `factor` times as long from now on; 1 is normal."""
        self._slowness[peer] = factor
        self._note("%s is slow by %s", peer, factor)

    # -- inside ----------------------------------------------------------------------------------------------

    def _delay(self, source: PeerId, to: PeerId) -> float:
        seconds = self._least + self._spread * self._chance.random()
        if self._slowness:
            seconds *= self._slowness.get(source, 1.0) * self._slowness.get(to, 1.0)
        return seconds

    def _leads_there(self, stream: _Stream) -> bool:
        source, to, _ = stream.key
        return (
            stream.end is not None
            and stream.end is self._ports.get(to)
            and self._group.get(source) == self._group.get(to)
            and (source, to) not in self._cuts
        )

    def _arrive(self, stream: _Stream) -> None:
        if stream.broken:
            return
        if not self._leads_there(stream):
            self._unreachable(stream)
            return
        message = stream.flight.popleft()
        self.delivered += 1
        if self.trace.maxlen:
            self._note("%s → %s (%s) %s", *stream.key, _shown(message))
        assert stream.end is not None
        stream.end.receive(stream.key[0], message)

    def _unreachable(self, stream: _Stream) -> None:
        """The sender finds out: soon, if a machine is there to say that nobody listens; else by silence."""
        source, to, _ = stream.key
        silent = not self.reachable(source, to)
        seconds = REDIAL_SECONDS if silent else self._delay(source, to) + self._delay(to, source)
        ends = [(source, to)] if stream.start is self._ports.get(source) else []
        self._break([stream], ends, self._clock.time() + seconds)

    def _break(self, streams: list[_Stream], ends: list[tuple[PeerId, PeerId]], told_at: float) -> None:
        """Lose what is in flight. At `told_at` each end (peer, other) hears how it is now, if still there."""
        for stream in streams:
            stream.broken = True
            for message in stream.flight:
                self._lose(stream, message)
            stream.flight.clear()
        ports = [self._ports[peer] for peer, _ in ends]
        self._clock.call_at(told_at, self._mend, streams, ends, ports)

    def _mend(self, streams: list[_Stream], ends: list[tuple[PeerId, PeerId]], ports: list[_Port]) -> None:
        for stream in streams:
            if self._streams.get(stream.key) is stream:
                del self._streams[stream.key]
        for (peer, other), port in zip(ends, ports, strict=True):
            if self._ports.get(peer) is port:
                up = other in self._ports and self.reachable(peer, other)
                self._note("%s finds %s %s", peer, other, "up" if up else "down")
                port.on_link(other, up)

    def _lose(self, stream: _Stream, message: object) -> None:
        self.lost += 1
        if self.trace.maxlen:
            self._note("%s ✕ %s (%s) %s", *stream.key, _shown(message))

    def _note(self, text: str, *parts: object) -> None:
        if self.trace.maxlen:
            self.trace.append(f"{self.now:11.6f} {text % parts}")


def _shown(message: object) -> str:
    """A message as the trace shows it: short, and digests by their beginning."""
    text = re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1…", repr(message))
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}…"
