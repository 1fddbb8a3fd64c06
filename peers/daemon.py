"""What a running peer answers to `p2ptrain status`, `pause`, `resume`, `finish` and `leave`, and the socket
that it answers on.

The socket shares the event loop with training, so whoever uses it can cost it little: a request is one short
line, there is one on a connection, and a connection is cut after seconds. The data folder belongs to the
process that has its lock; a socket that a dead one left is replaced.

Not covered: a data folder where no socket or lock can be made. Its peer trains, and cannot be asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import math
import os
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from p2ptrain import __version__, events
from p2ptrain.config import Limits
from p2ptrain.errors import ConfigError, P2PTrainError, PortBusy
from p2ptrain.protocol.member import Stage
from p2ptrain.swarm.libp2p import Libp2pSwarm
from p2ptrain.telemetry.feed import STATUS
from p2ptrain.telemetry.metrics import PeerState
from p2ptrain.trainer import Peer
from peers.control import LOCK, MAX_PATH_BYTES, MAX_REQUEST_BYTES, SOCKET, link_name, running_folder
from peers.limits import NONE, closed_seconds, decide, resumes_when
from peers.pauses import Pauses, told
from peers.readings import Reader
from peers.signals import Stop

logger = logging.getLogger("p2ptrain")

REQUEST_SECONDS = 2.0
MAX_CONNECTIONS = 8
TICK_SECONDS = 0.5
"""Between two looks whether a pause has ended."""
LOOK_SECONDS = 5.0
"""Between two looks at the machine."""
MOST_SECONDS = 366 * 86_400
RATE_SECONDS = 60.0
"""Over which rates are means, or over the time since the start."""
RATE_POINTS = 512
LOSSES = 48

Answers = Callable[[dict[str, Any]], dict[str, Any]]

# -- what is answered ----------------------------------------------------------------------------------------


@dataclass
class Standing:
    """What the events of a peer say about how it stands now."""

    waiting: str = ""
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=LOSSES))
    """Of this peer's samples in the last rounds."""
    first_loss: float | None = None
    heldout_loss: float | None = None
    bits_per_byte: float | None = None
    roster: int = 0
    noise_scale: float | None = None
    noise_excess: float | None = None
    deadlines: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    """Given by this peer, and by all, since its start."""
    samples_of_all: int = 0

    def observe(self, event: events.Event) -> None:
        """Fold in what happened."""
        match event:
            case events.WaitingChanged(reason=reason):
                self.waiting = reason
            case events.DeadlinesChanged():
                self.deadlines = asdict(event)
            case events.Evaluated():
                self.heldout_loss, self.bits_per_byte = event.loss, event.bits_per_byte
            case events.RoundCommitted():
                if event.loss is not None:
                    self.losses.append(event.loss)
                    self.first_loss = event.loss if self.first_loss is None else self.first_loss
                self.roster = event.peers
                self.noise_scale, self.noise_excess = event.noise_scale, event.noise_excess
                self.samples += event.mine
                self.samples_of_all += event.samples
            case _:
                pass


class Rates:
    """How fast counters rise, from what they were at some moments of the last minute."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, tuple[int, ...]]] = deque(maxlen=RATE_POINTS)

    def add(self, now: float, *counters: int) -> list[float]:
        """They stand at this now; returns how much each rises per second."""
        points = self._points
        points.append((now, counters))
        while len(points) > 2 and points[1][0] <= now - RATE_SECONDS:
            points.popleft()
        began, before = points[0]
        seconds = now - began
        return [(a - b) / seconds if seconds > 0 else 0.0 for a, b in zip(counters, before, strict=True)]


class Daemon:
    """A peer, from when its command starts until it ends, to whoever asks on this machine."""

    def __init__(
        self,
        folder: Path,
        run_id: str,
        stop: Stop,
        observe: Callable[[events.Event], None],
        limits: Limits,
    ) -> None:
        self._folder, self._run_id, self._stop, self._observe = folder, run_id, stop, observe
        self._limits, self._reader, self._strain = limits, Reader(limits), NONE
        self._began = time.time()
        self._standing, self._rates = Standing(), Rates()
        self._pauses = Pauses()
        self.page = ""
        """Where the page of the run is to be seen, if this peer serves it."""
        self._peer: Peer | None = None
        self._swarm: Libp2pSwarm | None = None

    @property
    def standing(self) -> Standing:
        """What the peer's events have said."""
        return self._standing

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return time.time() - self._began

    def attach(self, peer: Peer, swarm: Libp2pSwarm) -> None:
        """From now on there is a peer to ask about; what was asked of it before holds."""
        self._peer, self._swarm = peer, swarm
        peer.paused = bool(self._pauses)
        if swarm.gate is not None:
            peer.rounds.lawful = swarm.gate.lawful

    def observe(self, event: events.Event) -> None:
        """Take note of what happened."""
        self._standing.observe(event)
        if isinstance(event, events.RoundCommitted):
            self._rate()

    async def keep_time(self) -> None:
        """End pauses that are over, and heed the machine's limits. Runs until it is cancelled."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._set(self._pauses.at(time.time()))
            self._heed_organizer()
            if time.monotonic() - looked >= LOOK_SECONDS:
                await self.look()
                looked = time.monotonic()

    def _heed_organizer(self) -> None:
        peer, gate = self._peer, self._swarm.gate if self._swarm is not None else None
        if peer is None or gate is None or (terms := gate.terms) is None:
            return
        peer.heed(terms)
        organizer = events.PauseReason.ORGANIZER
        if terms.paused is None or peer.replica.position.step < terms.paused_from:
            self._set(self._pauses.remove(organizer))
        elif not self._pauses.has(organizer):
            self._set(self._pauses.add(organizer, time.time()))
            peer.upkeep.save_soon()

    async def look(self) -> None:
        """Pause or go on, as the machine's limits say now."""
        readings = await asyncio.to_thread(self._reader.read)
        now = time.time()
        self._strain = decide(self._limits, readings, self._strain, now)
        pauses = self._pauses.at(now)
        for reason, standing in self._strain.items():
            if not standing.holds:
                pauses = pauses.remove(reason)
            elif not pauses.has(reason):
                closed = closed_seconds(self._limits, readings)
                by_itself = reason is events.PauseReason.SCHEDULE and closed
                pauses = pauses.add(reason, now, closed if by_itself else math.inf)
        self._set(pauses)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked. Raises ConfigError if it is nothing that can be."""
        now = time.time()
        match request:
            case {"ask": "status"}:
                return self._status()
            case {"ask": "pause"} if self._stop.reason:
                raise ConfigError("the peer is about to leave, and takes part in nothing then")
            case {"ask": "pause", "seconds": None}:
                self._set(self._pauses.add(events.PauseReason.USER, now))
            case {"ask": "pause", "seconds": int(seconds)} if 0 < seconds <= MOST_SECONDS:
                self._set(self._pauses.add(events.PauseReason.USER, now, seconds))
            case {"ask": "resume"}:
                self._set(self._pauses.remove(events.PauseReason.USER))
            case {"ask": "finish"} if self._pauses:
                self._stop.ask("p2ptrain finish")  # its step might never be done without it
            case {"ask": "finish"}:
                self._stop.finish()
                if self._peer is not None:
                    self._peer.leaving = True
            case {"ask": "leave"}:
                self._stop.ask("p2ptrain leave")
            case _:
                raise ConfigError(
                    f"the running peer (p2ptrain {__version__}) does not know this request; use its version "
                    f"of p2ptrain, and pauses of at most {MOST_SECONDS // 86_400} days"
                )
        return {"run_id": self._run_id, "state": self._state(), "pauses": self._shown_pauses()}

    def _set(self, pauses: Pauses) -> None:
        before, self._pauses = self._pauses, pauses
        if self._peer is not None:
            self._peer.paused = bool(pauses)
        if (event := told(before, pauses, time.time())) is not None:
            self._observe(event)

    def _state(self) -> PeerState:
        if self._stop.reason:
            return PeerState.LEAVING
        return PeerState.JOINING if self._peer is None else state(self._peer)

    def _shown_pauses(self) -> list[dict[str, Any]]:
        return [
            {
                "reason": pause.reason.value,
                "because": self._because(pause.reason),
                "resumes": resumes_when(pause.reason, self._limits),
                "since": pause.since,
                "until": None if math.isinf(pause.until) else pause.until,
            }
            for pause in self._pauses.holding
        ]

    def _because(self, reason: events.PauseReason) -> str:
        gate = self._swarm.gate if self._swarm is not None else None
        said = gate.terms.paused if gate is not None and gate.terms is not None else None
        by_organizer = reason is events.PauseReason.ORGANIZER and said
        return events.paused_because(reason) + (f" ({said})" if by_organizer else "")

    def _moved(self) -> tuple[int, int]:
        """Bytes sent and received, over all lanes."""
        lanes = self._swarm.traffic.values() if self._swarm is not None else ()
        return sum(lane[0] for lane in lanes), sum(lane[1] for lane in lanes)

    def _rate(self) -> list[float]:
        """Samples of this peer and of all, bytes sent and received, per second."""
        standing = self._standing
        return self._rates.add(time.time(), standing.samples, standing.samples_of_all, *self._moved())

    def _status(self) -> dict[str, Any]:
        peer, swarm, standing = self._peer, self._swarm, self._standing
        status: dict[str, Any] = {
            "version": __version__,
            "pid": os.getpid(),
            "run_id": self._run_id,
            "data_dir": str(self._folder),
            "seconds": self.seconds,
            "state": self._state(),
            "pauses": self._shown_pauses(),
        }
        if peer is None or swarm is None:
            return status
        position, catching_up, member = peer.replica.position, peer.catching_up, peer.rounds.member
        mine, all_, sent_rate, received_rate = self._rate()
        sent, received = self._moved()
        return status | {
            "peer": peer.swarm.peer_id,
            "name": peer.config.name,
            "step": position.step,
            "total_steps": peer.run.total_steps,
            "lineage": position.lineage,
            "aside": member.withdrawn,
            "leader": member.following,
            "waiting": standing.waiting,
            "left_out": peer.left_out,
            "catching_up": None
            if catching_up is None
            else asdict(catching_up) | {"eta_seconds": catching_up.eta_seconds},
            "batch": {"mine": peer.gathered.samples, "target": peer.run.target_batch_size},
            "rounds": peer.rounds_joined,
            "samples": peer.samples_given,
            "data": None if peer.data is None else asdict(peer.data),
            "loss": standing.losses[-1] if standing.losses else None,
            "losses": list(standing.losses),
            "heldout_loss": standing.heldout_loss,
            "bits_per_byte": standing.bits_per_byte,
            "samples_per_second": mine,
            "swarm_samples_per_second": all_,
            "roster": standing.roster,
            "target_batch_size": peer.run.target_batch_size,
            "delay": peer.run.delay,
            "noise_scale": standing.noise_scale,
            "noise_excess": standing.noise_excess,
            "connected": swarm.connected_peers(),
            "links": dict(swarm.links()),
            "carriers": {other: carrier.value for other, carrier in swarm.carrier_of.items()},
            "hidden": swarm.reach.hidden,
            "sent_bytes": sent,
            "received_bytes": received,
            "sent_bytes_per_second": sent_rate,
            "received_bytes_per_second": received_rate,
            "deadlines": standing.deadlines,
            "metrics_port": peer.attendance.metrics_port,
            "page": self.page,
        }

    def told(self) -> dict[str, Any]:
        """How the peer stands, as whoever watches the run may know; see `telemetry.feed.STATUS`."""
        status = self._status()
        links = status.get("links", {})
        common = {name: status[name] for name in STATUS if name in status}
        more = {
            "pauses": [pause["because"] for pause in status["pauses"]],
            "direct": links.get("direct", 0),
            "relay": links.get("relay", 0),
            "device": self._peer.config.device if self._peer is not None else "",
        }
        return common | more


def state(peer: Peer) -> PeerState:
    """What the peer is busy with."""
    if peer.leaving:
        return PeerState.LEAVING
    if peer.paused:
        return PeerState.PAUSED
    match peer.rounds.member.stage:
        case Stage.OUTSIDE:
            return PeerState.CATCHING_UP
        case Stage.ACCUMULATING:
            return PeerState.ACCUMULATING
        case Stage.REDUCING | Stage.HELD:
            return PeerState.AVERAGING


# -- the socket ----------------------------------------------------------------------------------------------


class ControlServer:
    """Answers on the socket of a data folder while entered. Entering raises PortBusy if another process has
    the folder."""

    def __init__(self, folder: Path, run_id: str, answers: Answers) -> None:
        self._folder = folder.absolute()
        self._link = running_folder() / link_name(run_id, self._folder)
        self._answers = answers
        self._open: set[asyncio.Task[None]] = set()
        self._end = contextlib.ExitStack()

    async def __aenter__(self) -> Self:
        try:
            self._end.enter_context(_locked(self._folder))
            listener = self._listener()
            server = await asyncio.start_unix_server(self._serve, sock=listener, limit=MAX_REQUEST_BYTES)
            self._end.callback(server.close)
            self._announce()
        except OSError as error:
            logger.warning(
                "`p2ptrain status`, `pause` and the like will not find this peer: in its folder %s there can "
                "be no socket (%s)",
                self._folder,
                error.strerror or error,
            )
        except BaseException:
            self._end.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._open:
            connection.cancel()
        self._end.close()

    def _listener(self) -> socket.socket:
        path = place = self._folder / SOCKET
        place.unlink(missing_ok=True)  # its process is dead, or would have the lock
        self._end.callback(place.unlink, missing_ok=True)
        if len(os.fsencode(place)) > MAX_PATH_BYTES:
            short = self._end.enter_context(tempfile.TemporaryDirectory(prefix="p2ptrain-"))
            path = Path(short) / SOCKET
            place.symlink_to(path)
        listener = self._end.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(path))
        path.chmod(0o600)  # before it listens: until then nobody can connect
        listener.listen(MAX_CONNECTIONS)
        listener.setblocking(False)
        return listener

    def _announce(self) -> None:
        """Leave a link to the folder where commands look for it; without it they have to be told."""
        with contextlib.suppress(OSError):
            self._link.parent.mkdir(parents=True, exist_ok=True)
            self._link.unlink(missing_ok=True)
            self._link.symlink_to(self._folder)
            self._end.callback(self._link.unlink, missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            if len(self._open) >= MAX_CONNECTIONS:
                return
            self._open.add(task)
            async with asyncio.timeout(REQUEST_SECONDS):
                if line := await reader.readline():
                    writer.write(json.dumps(self._reply(line)).encode() + b"\n")
                    writer.close()
                    await writer.wait_closed()
        except (TimeoutError, OSError, ValueError):
            pass  # too slow, gone, or too long: nothing that training should hear of
        finally:
            self._open.discard(task)
            writer.transport.abort()

    def _reply(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            return self._answers(request if isinstance(request, dict) else {})
        except (ValueError, RecursionError):
            return {"error": "the request is no JSON object"}
        except P2PTrainError as fault:
            return {"error": str(fault)}


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder is this process's own. Raises PortBusy, OSError."""
    with (folder / LOCK).open("a+b") as lock:
        _lock(lock, folder)
        lock.truncate(0)
        lock.write(b"%d" % os.getpid())
        lock.flush()
        yield


def _lock(lock: IO[bytes], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read(20).decode(errors="replace")
        raise PortBusy(
            f"another peer runs with the data folder {folder}, as process {owner}; end it with "
            f"`p2ptrain leave --data-dir {folder}`, or give this one a folder of its own with --data-dir"
        ) from None
