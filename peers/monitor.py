"""`p2ptrain monitor`: sees a whole swarm and takes no part in it.

It enters by an invite (one for role `watch` will do), reads the signed records in the DHT, and follows the
events of every peer through the P2P link, so peers behind NAT are seen like others. It knows no model and
greets as one who only asks, so no peer would let it into a round. What it has seen is kept in its folder and
is there after a restart.

A bootstrap, and a peer whose owner wishes it, serve the same page from the swarm that they are in already
(`alongside`). They ask the others only while somebody looks: a page that nobody has open costs the run
nothing.

Not covered: the truth of what peers say of themselves; see `watching`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from p2ptrain import PROTOCOL_VERSION
from p2ptrain.config import RunConfig, parse_run, run_digest
from p2ptrain.errors import InviteError, PeerFault, Refused
from p2ptrain.protocol.presence import look_seconds
from p2ptrain.records import (
    GetEvents,
    GetMetrics,
    GetRun,
    PeerId,
    Presence,
    RoundRecord,
)
from p2ptrain.swarm.access import ASK, Invite
from p2ptrain.swarm.libp2p import Libp2pSwarm
from p2ptrain.telemetry.feed import MAX_ANSWER_BYTES, MAX_PAGE_BYTES, Feed, Told, read_answer
from p2ptrain.telemetry.journal import Journal, read_journal
from p2ptrain.telemetry.logs import tell
from p2ptrain.telemetry.metrics import PeerState
from p2ptrain.telemetry.relayed import Filter
from p2ptrain.telemetry.swarm_metrics import UNKNOWN, Parting, Protocol, SwarmMetrics
from peers.monitor_pages import Pages, Source, Updates
from peers.places import made
from peers.replaying import HISTORY, Options, address
from peers.signals import Stop
from peers.watching import Json, Watch

logger = logging.getLogger("p2ptrain")

LOOK_SECONDS = 2.0
FLUSH_SECONDS = 0.4
WAIT_SECONDS = 10.0
"""For which a peer holds back an answer that would be empty."""
ASK_SECONDS = 20.0
AGAIN_SECONDS = (1.0, 3.0, 10.0)
"""After a peer did not answer once, twice, more often."""
PRESENCE_SECONDS = 10.0
TOTALS_SECONDS = 30.0
SCRAPE_SECONDS = 8.0
"""Prometheus waits for 10."""
MOST_SCRAPES = 8
"""Under way at one time."""
FRESH_SECONDS = 1.0
MOST_ENTRANCES = 8
"""Peers that are asked for the run file before the next look."""
READY_SECONDS = 60.0
HISTORY_BYTES = 12 * 2**20
LINGER_SECONDS = 60.0
"""For so long after its last reader a page that only follows while it is read goes on."""
FIRST_SIGHT_SECONDS = 8.0
"""What `--json` gives the swarm to answer."""


class Monitor:
    """Watches one swarm while `watching` runs."""

    def __init__(self, invite: Invite, folder: Path | None) -> None:
        """`folder`: for key and history; with None nothing is read from disk, and nothing kept. It has yet to
        be given its way in: a `connection` of its own, or a swarm to watch `within`."""
        self.watch, self.metrics, self.updates = Watch(), SwarmMetrics(), Updates()
        self._invite, self._folder = invite, folder
        self._asked: dict[str, asyncio.Task[None]] = {}
        self._after: dict[str, tuple[str, int]] = {}
        self._filter = Filter()
        self._scrapes: dict[str, tuple[float, bytes]] = {}
        self._scraping = asyncio.Semaphore(MOST_SCRAPES)
        self._seen_at = 0.0
        self._counted: dict[str, int] = {}
        self._journal = Journal(folder / HISTORY, max_bytes=HISTORY_BYTES) if folder else None
        self._identity = (folder if folder else Path()) / "monitor.key"
        self.swarm: Libp2pSwarm | None = None
        self._embedded = False
        """Whether the swarm is another role's, which has a presence and an invite of its own."""
        self._feed: Feed | None = None
        """Of the peer that this page is a part of: it cannot be asked through the network."""
        self._read_at = float("-inf")
        self._reader_came = asyncio.Event()

    def restore(self) -> None:
        """Take in what an earlier process saw."""
        if self._folder is None:
            return
        damaged = 0
        for record in read_journal(self._folder / HISTORY):
            try:
                self.watch.restore(record)
                if record["kind"] == "totals":
                    self._after = {
                        peer: (str(life), int(after)) for peer, (life, after) in record["after"].items()
                    }
            except (KeyError, TypeError, ValueError, AttributeError):
                damaged += 1
        if damaged:
            logger.warning("%d lines of %s are damaged and left out", damaged, self._folder / HISTORY)
        self.watch.changes(time.time())

    def connection(self, identity: Path | None = None) -> Libp2pSwarm:
        """Our way into the swarm, not yet entered."""
        self.swarm = Libp2pSwarm(
            identity or self._identity,
            self._invite.run_id,
            initial_peers=self._invite.addresses,
            invite=self._invite,
            listen=("/ip4/127.0.0.1/tcp/0",),  # nobody needs to reach us
            on_event=partial(tell, logger),
        )
        return self.swarm

    def within(self, swarm: Libp2pSwarm, run: RunConfig, feed: Feed | None = None) -> None:
        """Watch from this swarm, and only while somebody reads; `feed`: of the peer that we are part of."""
        self.swarm, self.watch.run, self._embedded, self._feed = swarm, run, True, feed
        self.watch.sees_bootstraps = feed is None  # a peer is shown the records of those who train with it
        self.watch.look_away()

    def read(self) -> None:
        """Somebody reads the page."""
        self._read_at = time.monotonic()
        self._reader_came.set()

    @property
    def is_read(self) -> bool:
        """Whether what the others do is of interest now. A monitor is there for nothing else."""
        return not self._embedded or time.monotonic() - self._read_at < LINGER_SECONDS

    async def watching(self) -> NoReturn:
        """Look, ask and remember until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_looking(group))
            group.create_task(self._keep_flushing())
            if not self._embedded:
                group.create_task(self._keep_present())
            if self._feed is not None and self.swarm is not None:
                group.create_task(self._follow(self.swarm.peer_id))
        raise AssertionError("these never end by themselves")

    def close(self) -> None:
        """Write down what is known."""
        self._keep(totals=bool(self.watch.rounds_seen))
        if self._journal is not None:
            self._journal.close()

    # -- looking ---------------------------------------------------------------------------------------------

    async def _keep_looking(self, group: asyncio.TaskGroup) -> None:
        while True:
            if not self.is_read:
                self.watch.look_away()
                self._reader_came.clear()
                await self._reader_came.wait()
            began = time.monotonic()
            await self._look()
            self.metrics.refresh_seconds.set(time.monotonic() - began)
            for peer in self.watch.training:
                mine = self._feed is not None and peer.id == self.swarm_id
                if peer.id not in self._asked and peer.protocol == PROTOCOL_VERSION and not mine:
                    self._asked[peer.id] = group.create_task(self._follow(PeerId(peer.id)))
            await asyncio.sleep(max(LOOK_SECONDS, look_seconds(len(self.watch.peers), urgent=False)))

    async def _look(self) -> None:
        assert self.swarm is not None
        gate = None if self._embedded else self.swarm.gate
        if gate is not None and (flaw := gate.own_flaw()):
            raise InviteError(f"the peers no longer tell this monitor how they are: {flaw}; {ASK}")
        there = [each for each in await self.swarm.lookup("presence") if isinstance(each, Presence)]
        rounds = [each for each in await self.swarm.lookup("round") if isinstance(each, RoundRecord)]
        now = time.time()
        if there:
            self._seen_at = now
        else:
            self.metrics.refresh_failures.inc()
        self.watch.present(there, rounds, now)
        if self.watch.run is None:
            with contextlib.suppress(PeerFault):
                self.watch.run = await self._run([PeerId(each.peer) for each in there])

    async def _run(self, there: list[PeerId]) -> Any:
        """The run file, from the first of these or of the invite's peers that has the right one."""
        assert self.swarm is not None
        entrances = [PeerId(address.rsplit("/p2p/", 1)[1]) for address in self._invite.addresses]
        for peer in list(dict.fromkeys([*entrances, *there]))[:MOST_ENTRANCES]:
            with contextlib.suppress(PeerFault):
                _, payload = await self.swarm.request(peer, GetRun(), timeout_seconds=6, max_bytes=64 * 1024)
                run = parse_run(payload)
                if run_digest(run) == self._invite.run_digest:
                    return run
        return None

    async def _follow(self, peer: PeerId) -> None:
        """Ask this peer for its events while it is there; ourselves, always."""
        misses = 0
        try:
            while self._is_followed(peer):
                try:
                    told = await self._ask(peer)
                except PeerFault as fault:
                    self.metrics.ask_failures.inc()
                    misses += 1
                    if misses > 1:  # a stream may break while both ends are well
                        self.watch.failed(peer, str(fault), time.time())
                    await asyncio.sleep(AGAIN_SECONDS[min(misses, len(AGAIN_SECONDS)) - 1])
                    continue
                misses = 0
                self._after[peer] = told.life, told.next
                self.watch.told(peer, told, time.time())
        finally:
            self._asked.pop(peer, None)

    def _is_followed(self, peer: PeerId) -> bool:
        if self._feed is not None and peer == self.swarm_id:
            return True
        seen = self.watch.peers.get(peer)
        return seen is not None and seen.present

    async def _ask(self, peer: PeerId) -> Told:
        """What this peer has to tell since it last did. Raises PeerFault."""
        assert self.swarm is not None
        life, after = self._after.get(peer, ("", 0))
        question = GetEvents(life=life, after=after, wait_seconds=WAIT_SECONDS)
        if self._feed is not None and peer == self.swarm.peer_id:
            _, payload = await self._feed.answer(peer, question)
        else:
            _, payload = await self.swarm.request(
                peer, question, timeout_seconds=ASK_SECONDS, max_bytes=MAX_ANSWER_BYTES
            )
        return read_answer(payload)

    async def _keep_present(self) -> None:
        """Say that we watch: who is watched may know."""
        assert self.swarm is not None
        incarnation = secrets.token_hex(8)
        while True:
            record = Presence(
                peer=self.swarm.peer_id,
                role="monitor",
                name="monitor",
                protocol=PROTOCOL_VERSION,
                fingerprint=self._invite.run_digest,
                incarnation=incarnation,
                position=None,
            )
            await self.swarm.publish(record, ttl_seconds=3 * PRESENCE_SECONDS)
            await asyncio.sleep(PRESENCE_SECONDS)

    # -- remembering -----------------------------------------------------------------------------------------

    async def _keep_flushing(self) -> None:
        written = time.monotonic()
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            if self._feed is None and not self.is_read:
                continue  # nothing comes in
            if (changed := self.watch.changes(time.time())) is not None:
                self.updates.publish(changed)
            due = time.monotonic() - written > TOTALS_SECONDS
            written = time.monotonic() if due else written
            self._keep(totals=due)
            self._count(time.time())

    def _keep(self, *, totals: bool) -> None:
        kept, self.watch.kept = self.watch.kept, []
        if self._journal is None:
            return
        for record in kept:
            self._journal.append(record)
        if totals:
            self._journal.append({**self.watch.totals(), "after": dict(list(self._after.items())[-512:])})

    def _count(self, now: float) -> None:
        """Bring the metrics up to what is seen."""
        watch, metrics = self.watch, self.metrics
        training = watch.training
        states = [each.state if each.answered or each.paused else UNKNOWN for each in training]
        for state in (*PeerState, UNKNOWN):
            metrics.peers.labels(state).set(states.count(state))
        same = sum(each.protocol == PROTOCOL_VERSION for each in training)
        metrics.protocols.labels(Protocol.SAME).set(same)
        metrics.protocols.labels(Protocol.OTHER).set(len(training) - same)
        metrics.fingerprints.set(len({each.fingerprint for each in training}))
        metrics.lineages.set(watch.lineages())
        metrics.hidden.set(sum(bool(each.status.get("hidden")) for each in training))
        metrics.bootstraps.set(
            sum(each.present and each.role == "bootstrap" for each in watch.peers.values())
        )
        metrics.step.set(watch.step)
        metrics.last_commit.set(watch.last_commit)
        metrics.last_checkpoint.set(watch.last_checkpoint)
        metrics.refreshed.set(self._seen_at)
        tokens = 0
        if watch.run is not None:
            metrics.run.info({"run_id": watch.run.run_id, "digest": run_digest(watch.run)})
            metrics.min_peers.set(watch.run.min_peers)
            metrics.total_steps.set(watch.run.total_steps)
            tokens = watch.run.task.tokens_per_sample
        metrics.tokens_per_second.set(watch.rate(now)[0] * tokens)
        losses = [row[4] for row in list(watch.rows.values())[-1:]]
        metrics.loss.labels("train").set(losses[0] if losses and losses[0] is not None else float("nan"))
        if watch.evaluations:
            _, _, loss, bits, _ = watch.evaluations[-1]
            metrics.loss.labels("heldout").set(loss)
            metrics.bits_per_byte.set(float("nan") if bits is None else bits)
        for name, counter, total in (
            ("tokens", metrics.tokens, watch.total_samples * tokens),
            ("rounds", metrics.rounds, watch.rounds_seen),
            ("joins", metrics.joins, watch.joined),
            ("left", metrics.leaves.labels(Parting.LEFT), watch.left),
            ("lost", metrics.leaves.labels(Parting.LOST), watch.lost),
        ):
            if total > (before := self._counted.get(name, 0)):
                counter.inc(total - before)
                self._counted[name] = total

    # -- answering -------------------------------------------------------------------------------------------

    def targets(self, address: str) -> list[Json]:
        """The peers that train, for Prometheus: all at our own address, each at a path of its own."""
        run_id = self._invite.run_id
        return [
            {
                "targets": [address],
                "labels": {
                    "__metrics_path__": f"/peers/{each.id}/metrics",
                    "__meta_p2ptrain_peer_id": each.id,
                    "__meta_p2ptrain_peer_name": each.name,
                    "__meta_p2ptrain_role": each.role,
                    "__meta_p2ptrain_run": run_id,
                },
            }
            for each in sorted(self.watch.training, key=lambda each: each.id)
            if each.protocol == PROTOCOL_VERSION
        ]

    async def peer_metrics(self, peer: str) -> bytes:
        """That peer's page, checked. Raises KeyError, PeerFault."""
        if self._feed is not None and peer == self.swarm_id:
            return self._feed.page()
        if not self.watch.peers[peer].present or self.swarm is None:
            raise KeyError(peer)
        at, page = self._scrapes.get(peer, (0.0, b""))
        if time.monotonic() - at < FRESH_SECONDS:
            return page
        if self._scraping.locked():
            raise Refused(f"more than {MOST_SCRAPES} peers are being asked; ask again")
        async with self._scraping:
            _, raw = await self.swarm.request(
                PeerId(peer), GetMetrics(), timeout_seconds=SCRAPE_SECONDS, max_bytes=MAX_PAGE_BYTES
            )
            page = await asyncio.to_thread(self._filter.passed, raw)
        self._scrapes = {each: kept for each, kept in self._scrapes.items() if each in self.watch.peers}
        self._scrapes[peer] = time.monotonic(), page
        return page

    @property
    def swarm_id(self) -> str:
        """By which the swarm knows this process."""
        return "" if self.swarm is None else self.swarm.peer_id

    def failed_checks(self) -> list[str]:
        """What keeps us from being of use."""
        if time.time() - self._seen_at > READY_SECONDS:
            return ["no presence record of this run has been seen for a minute"]
        return []

    def _page(self) -> bytes:
        self.read()
        return self.metrics.page()

    def source(self, share: str) -> Source:
        """What the pages show."""
        return Source(
            state=lambda: self.watch.snapshot(time.time()),
            timeline=self.watch.timeline,
            updates=self.updates,
            targets=self.targets,
            metrics=self._page,
            peer_metrics=self.peer_metrics,
            failed_checks=self.failed_checks,
            invite=share,
            read=self.read,
        )


@contextlib.asynccontextmanager
async def alongside(watcher: Monitor, pages: Pages) -> AsyncIterator[Pages]:
    """Serve the page of a process that is there for something else. What goes wrong with watching is told,
    and is no reason for that to end."""
    with contextlib.closing(watcher):
        await asyncio.to_thread(watcher.restore)
        async with pages, _beside(watcher.watching()) as watching:
            watching.add_done_callback(_told_why)
            yield pages


def _told_why(watching: asyncio.Task[Any]) -> None:
    if not watching.cancelled() and (error := watching.exception()) is not None:
        logger.error("the page no longer follows the swarm; please report this", exc_info=error)


async def monitor(invite: Invite, options: Options, ready: Callable[[str], None]) -> Json:
    """Watch and serve until a signal comes; `ready` is given the page's address."""
    watcher = Monitor(invite, made(options.folder))
    watcher.restore()
    with Stop() as stop, contextlib.closing(watcher):
        async with (
            watcher.connection(),
            Pages(watcher.source(options.share), options.host, options.port, public=options.public) as pages,
            _beside(watcher.watching()) as watching,
            _beside(_keep_file(watcher, options, pages.port)),
        ):
            ready(address(options.host, pages.port))
            stopping = asyncio.create_task(stop.first())
            await asyncio.wait({stopping, watching}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if watching.done():
                await watching
        logger.info("no longer watching (%s)", stop.reason)
        return {"run_id": invite.run_id, "step": watcher.watch.step, "rounds": watcher.watch.rounds_seen}


async def look(invite: Invite, folder: Path) -> Json:
    """What there is to see within a few seconds, once; `folder` is for a key that is not kept."""
    watcher = Monitor(invite, None)
    async with watcher.connection(folder / "monitor.key"), _beside(watcher.watching()):
        deadline = time.monotonic() + FIRST_SIGHT_SECONDS
        while time.monotonic() < deadline:
            await asyncio.sleep(FLUSH_SECONDS)
            training = watcher.watch.training
            if (
                watcher.watch.run
                and training
                and all(each.answered for each in training)
                and watcher.watch.rows
            ):
                break
    watcher.watch.settle(time.time() + 3600)
    state = watcher.watch.snapshot(time.time())
    return {name: state[name] for name in ("now", "run", "peers", "incidents", "evaluations", "samples")}


async def _keep_file(watcher: Monitor, options: Options, port: int) -> None:
    """Keep the targets in a file, for a Prometheus without http_sd."""
    written = ""
    while options.file_sd is not None:
        ours = address(options.host, port).removeprefix("http://").rstrip("/")
        text = json.dumps(watcher.targets(ours), indent=1) + "\n"
        if text != written:
            draft = options.file_sd.with_name(options.file_sd.name + ".draft")
            try:
                draft.write_text(text)
                os.replace(draft, options.file_sd)
                written = text
            except OSError as error:
                logger.warning("cannot write %s: %s", options.file_sd, error.strerror or error)
        await asyncio.sleep(LOOK_SECONDS)


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, Any]) -> Any:
    """Something that goes on for as long as this is entered."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])
