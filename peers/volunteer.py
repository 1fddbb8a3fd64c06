"""The volunteer's peer: everything that `p2ptrain join` puts together, and takes apart again in order.

It needs nothing but an invite. The run file comes from the swarm and is checked against the invite's digest;
the task, the model and the replica are built from it; the newest own checkpoint is where it starts from,
unless the swarm has more behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console

from p2ptrain import PROTOCOL_VERSION, __version__, events
from p2ptrain.config import (
    PeerConfig,
    RunConfig,
    check_together,
    difference,
    fingerprint,
    parse_run,
    run_digest,
)
from p2ptrain.errors import IncompatibleRun, InviteError, OtherVersion, PeerFault, Uninvited, Unreachable
from p2ptrain.records import GetRun, PeerId, Presence
from p2ptrain.replica.checkpoint import latest, load, restore
from p2ptrain.replica.donor import Compute
from p2ptrain.replica.flat import parameter_table
from p2ptrain.replica.replica import Replica
from p2ptrain.swarm.access import ASK, Invite, encode
from p2ptrain.swarm.gate import Gate
from p2ptrain.swarm.libp2p import Libp2pSwarm
from p2ptrain.swarm.port import Swarm
from p2ptrain.swarm.throttle import Throttle
from p2ptrain.tasks import build_model, build_task
from p2ptrain.telemetry.feed import Feed
from p2ptrain.telemetry.health import HealthServer, cannot_listen, is_loopback
from p2ptrain.telemetry.journal import Journal
from p2ptrain.telemetry.logs import tell
from p2ptrain.telemetry.metrics import Extent, LogCounter, Metrics, watch_event_loop
from p2ptrain.telemetry.trackers import Tracking, open_tracker
from p2ptrain.trainer import Peer, train
from peers import doctor
from peers.admission import admit, stay_admitted
from peers.daemon import ControlServer, Daemon, state
from peers.engines import build_engine
from peers.monitor import Monitor, alongside
from peers.monitor_pages import Pages
from peers.panel import Below
from peers.places import data_folder
from peers.replaying import address as url
from peers.signals import Stop, Stopped, heeding

logger = logging.getLogger("p2ptrain")

RUN_FILE_SECONDS = 6.0
"""For one answer; a run file is a few kilobytes."""
RUN_FILE_PAUSES_SECONDS = (0.5, 1.0)
"""Before the second and the third time of asking."""
PANEL_SECONDS = 0.5
GATE_SECONDS = 1.0
"""Between two looks whether our invite still holds."""
COMPUTE_NICE = 10
"""How far training stands back behind rounds, and behind whatever else this machine does."""
FINISH_SECONDS = 4.0
"""How long a stopping peer waits for the round that is under way."""


@dataclass(frozen=True)
class Receipt:
    """What a volunteer gets to see at the end, and what `--json` prints."""

    run_id: str
    peer: str
    step: int
    lineage: str
    state_digest: str
    seconds: float
    """Since the command began."""
    rounds: int
    samples: int
    tokens: int
    share: float | None
    """Of all samples in those rounds; None if there were none."""
    first_loss: float | None
    """Of this peer's own samples, in its first round and its last."""
    last_loss: float | None
    heldout_loss: float | None
    checkpoint: str | None


def receipt_lines(receipt: Receipt) -> list[str]:
    """The same for people."""
    spent = events.duration(receipt.seconds)
    given = f"Thank you. In {spent} you gave {receipt.samples:,} samples in {receipt.rounds:,} rounds"
    more = [f"{receipt.tokens:,} tokens"] if receipt.tokens > receipt.samples else []
    more += [f"{receipt.share:.0%} of all"] if receipt.share is not None else []
    lines = ["", f"{given}: {', '.join(more)}." if more else f"{given}."]
    if receipt.first_loss is not None and receipt.last_loss is not None:
        heldout = "" if receipt.heldout_loss is None else f"; held out {receipt.heldout_loss:.3f}"
        lines.append(
            f"Training loss: {receipt.first_loss:.3f} at first, {receipt.last_loss:.3f} now{heldout}."
        )
    if receipt.checkpoint:
        lines.append(f"Your copy of the model, at step {receipt.step:,}: {receipt.checkpoint}")
    return lines


async def volunteer(
    invite: Invite, config: PeerConfig, own_run: RunConfig | None, until_step: int, *, demanding: bool = True
) -> Receipt:
    """Join the run that the invite names and train until `until_step` (0: the run's end) or until stopped.

    `own_run` is what the caller believes the run to be, if anything: the swarm's must be equal. `demanding`:
    take part only if this machine has the memory and the disk for it. Raises P2PTrainError with one sentence
    for whatever keeps this peer from taking part, and Stopped if a first signal comes before it trains. Then
    a thread may still be building what nobody waits for any more, and cannot be stopped.
    """
    folder = data_folder(config, invite.run_id)
    torch.set_num_threads(config.threads)
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(Journal(folder / "journal.jsonl"))
        observers: list[Callable[[events.Event], None]] = [journal.write, _tell]

        def observe(event: events.Event) -> None:
            for observer in observers:
                observer(event)

        swarm = Libp2pSwarm(
            folder / "identity.key",
            invite.run_id,
            initial_peers=invite.addresses,
            invite=invite,
            listen=config.listen,
            announce=config.announce,
            data_port=config.data_port,
            relay_for=config.relay_for,
            throttle=Throttle(config.limits.upload_mbit * 1e6 / 8, config.limits.download_mbit * 1e6 / 8),
            on_event=observe,
        )
        stop = stack.enter_context(Stop())
        daemon = Daemon(folder, invite.run_id, stop, observe, config.limits)
        observers.append(daemon.observe)
        addresses = len(invite.addresses)
        logger.info("looking for the swarm of %s, by %d addresses", invite.run_id, addresses)
        async with heeding(stop) as over, ControlServer(folder, invite.run_id, daemon.answer), swarm:
            await admit(swarm, invite, folder)
            logger.info("the swarm is found; asking for the run file")
            run = await fetch_run(swarm, invite)
            if own_run is not None and (differing := difference(own_run, run)):
                raise IncompatibleRun(
                    f"this is another run than the one in the swarm: {'; '.join(differing)}; "
                    "join without --run to take the swarm's, or ask the organizer for the right invite"
                )
            check_together(run, config)
            compute = threads(stack, "compute", 1, _give_way)
            aside = threads(stack, "aside", 2, _give_way)
            work = threads(stack, "reduce", 1)
            logger.info("reading the text and building the model")
            replica, task, print_ = await compute(partial(_build, run, config, demanding=demanding))
            await _refuse_to_train_apart(swarm, run, replica)  # while it sees those of any fingerprint
            checkpoints = folder / "checkpoints"
            lineages = b""
            if (newest := latest(checkpoints)) is not None:
                logger.info("going on from the checkpoint %s", newest.name)
                checkpoint = await compute(partial(load, newest))
                await compute(partial(restore, replica, checkpoint))
                lineages = checkpoint.lineages
            engine, chosen = await compute(partial(build_engine, run, config, task, replica))
            observe(chosen)
            swarm.adopt(print_)
            tracker = await aside(partial(open_tracker, config.tracker, run, swarm.peer_id[-8:], folder))
            observers.append(stack.enter_context(Tracking(tracker)).observe)
            metrics = Metrics(
                run.run_id,
                print_,
                sample_tokens=run.task.tokens_per_sample,
                about={"device": config.device, "reduces": str(config.reduces).lower()},
            )
            stack.enter_context(_counted_logs(metrics))
            metrics.read_traffic = lambda: swarm.traffic
            metrics.read_carriers = lambda: swarm.carriers
            metrics.read_journal_lost = lambda: journal.lost
            observers.append(metrics.observe)
            peer = Peer(
                swarm,
                run,
                config,
                task,
                replica,
                engine,
                fingerprint=print_,
                incarnation=secrets.token_hex(8),
                compute=compute,
                aside=aside,
                work=work,
                observe=observe,
                checkpoints=checkpoints,
                lineages=lineages,
                partial=folder / "partial",
            )
            await daemon.look()  # a machine that shall not train does not begin to
            daemon.attach(peer, swarm)
            feed = Feed(daemon.told, metrics.page)
            observers.append(feed.observe)
            peer.watched = feed.answer
            metrics.read_state = lambda: state(peer)
            metrics.connected_peers.set_function(swarm.connected_peers)
            metrics.hidden.set_function(lambda: swarm.reach.hidden)
            metrics.read_links = swarm.links
            metrics.dht_contacts.set_function(swarm.dht_contacts)
            metrics.clock_offset_seconds.set_function(
                lambda: math.nan if (skew := swarm.clock_skew_seconds) is None else skew
            )
            swarm.asked_dht = metrics.asked_dht
            peer.batches.took = metrics.micro_batch_seconds.observe
            metrics.read_donated = lambda: peer.donor.served_bytes
            _export_catch_up(metrics, peer)
            pages = _pages(peer, swarm, invite, metrics, feed)
            staying = stay_admitted(swarm, invite, folder)
            lag = watch_event_loop(metrics.event_loop_lag_seconds.observe)
            async with (
                pages as served,
                peer,
                _beside(lag),
                _beside(daemon.keep_time()),
                _beside(staying),
                _panel(daemon),
            ):
                peer.attendance.metrics_port = served.port
                here = url(config.metrics_host, served.port)
                logger.info("metrics: %smetrics; data: %s", here, folder)
                if config.page:
                    daemon.page = here
                    logger.info("the run is to be seen at %s", here)
                assert swarm.gate is not None
                over()  # from here on, the round under way is finished first
                put_out = await _train_until_stopped(peer, run, until_step, stop, swarm.gate)
                if not (stop.reason or put_out):
                    await peer.see_off(FINISH_SECONDS)
                peer.give_up()
                await peer.attendance.leave()
                path = await peer.upkeep.save()
                observe(
                    events.Leaving(
                        step=replica.position.step,
                        reason=put_out or stop.reason or "the run is complete",
                        rounds=peer.rounds_joined,
                        samples=peer.samples_given,
                    )
                )
                if put_out:
                    raise InviteError(
                        f"the others no longer let this peer in: {put_out}; {ASK}, and join with it to go on "
                        "from the checkpoint that was kept"
                    )
                standing = daemon.standing
                return Receipt(
                    run_id=run.run_id,
                    peer=swarm.peer_id,
                    step=replica.position.step,
                    lineage=replica.position.lineage,
                    state_digest=await aside(replica.compute_state_digest),
                    seconds=daemon.seconds,
                    rounds=peer.rounds_joined,
                    samples=peer.samples_given,
                    tokens=peer.samples_given * run.task.tokens_per_sample,
                    share=standing.samples / standing.samples_of_all if standing.samples_of_all else None,
                    first_loss=standing.first_loss,
                    last_loss=standing.losses[-1] if standing.losses else None,
                    heldout_loss=peer.upkeep.heldout.get("loss"),
                    checkpoint=str(path) if path else None,
                )


async def fetch_run(swarm: Libp2pSwarm, invite: Invite) -> RunConfig:
    """The run file, from whichever of the invite's peers gives the right one first."""
    reasons: list[str] = []
    uninvited: Uninvited | None = None
    for address in invite.addresses:
        peer = PeerId(address.rsplit("/p2p/", 1)[1])
        try:
            run = await _run_of(swarm, peer)
            if (digest := run_digest(run)) == invite.run_digest:
                return run
            reasons.append(
                f"{events.short(peer)} trains a run with digest {digest[:8]}, not {invite.run_digest[:8]}"
            )
        except OtherVersion as fault:
            raise IncompatibleRun(f"{fault}; {upgrade(fault.theirs)}") from None
        except PeerFault as fault:
            uninvited = fault if isinstance(fault, Uninvited) else uninvited
            reasons.append(f"{events.short(peer)}: {fault}")
    if uninvited is not None:
        raise InviteError(f"{uninvited}; {ASK}")
    raise Unreachable(
        f"none of the invite's peers gave the run file of {invite.run_id} ({'; '.join(reasons)}); "
        "check that the bootstrap is running, or ask the organizer for a new invite"
    )


def upgrade(theirs: int) -> str:
    """What to do where the others speak this other version of the protocol."""
    if theirs > PROTOCOL_VERSION:
        return f"this p2ptrain ({__version__}) is too old: pip install --upgrade p2ptrain"
    return f"this p2ptrain ({__version__}) is too new for them; ask the organizer which version to install"


async def _refuse_to_train_apart(swarm: Libp2pSwarm, run: RunConfig, replica: Replica) -> None:
    """Raises IncompatibleRun, saying in what, if whoever trains under this run's name trains something else.

    Peers of another fingerprint never meet, so this one would train alone beside them and not know it.
    """
    others = [record for record in await swarm.lookup("presence") if isinstance(record, Presence)]
    strangers = [each for each in others if each.role == "train" and each.peer != swarm.peer_id]
    if not strangers or any(each.fingerprint == replica.fingerprint for each in strangers):
        return
    other = strangers[0]
    if other.protocol != PROTOCOL_VERSION:
        why = f"protocol: {PROTOCOL_VERSION} here, {other.protocol} there; {upgrade(other.protocol)}"
    else:
        why = "the shapes of the model's parameters; use the same version of p2ptrain"
        if replica.base_digest and not other.extra.startswith(replica.base_note):
            why = (
                f"the model that the adapters are for, {replica.base_note[:21]} here, "
                f"{events.clean(other.extra[:21])} there; take the same weights as the swarm's, to the bit "
                "(`model` in the peer file names their folder)"
            )
        with contextlib.suppress(PeerFault):
            if differing := difference(run, await _run_of(swarm, other.peer)):
                why = f"{'; '.join(differing)}; ask the organizer which is right"
    raise IncompatibleRun(
        f"peer {events.short(other.peer)} trains {run.run_id!r} as well, but they differ in {why}"
    )


async def _run_of(swarm: Swarm, peer: PeerId) -> RunConfig:
    """The run that this peer trains. Raises PeerFault."""
    for pause in RUN_FILE_PAUSES_SECONDS:
        try:
            return await _ask_run(swarm, peer)
        except Unreachable:
            await asyncio.sleep(pause)  # a stream may break while both ends are well
    return await _ask_run(swarm, peer)


async def _ask_run(swarm: Swarm, peer: PeerId) -> RunConfig:
    _, payload = await swarm.request(peer, GetRun(), timeout_seconds=RUN_FILE_SECONDS, max_bytes=64 * 1024)
    return parse_run(payload)


def _build(run: RunConfig, config: PeerConfig, *, demanding: bool) -> tuple[Replica, Any, str]:
    task = build_task(run, config)
    model, base_digest = build_model(task, run)
    if demanding:  # before most of the memory is taken: the model itself is a ninth of it
        doctor.insist(doctor.look_at_needs(config, sum(each.numel() for each in model.parameters())))
    print_ = fingerprint(run, parameter_table(model), base_digest)
    return Replica(model, run, print_, base_digest), task, print_


def _give_way() -> None:
    """From now on this thread takes what processor time the others leave: where there is little, a round that
    all wait for comes before a micro-batch that nobody does. Linux alone has priorities of threads."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        nice = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, min(nice + COMPUTE_NICE, 19))


def threads(
    stack: contextlib.ExitStack, name: str, count: int, begin: Callable[[], None] = lambda: None
) -> Compute:
    """So many threads, until the stack ends, to run functions on; each thread starts with `begin`. They are
    waited for, unless it ends with Stopped."""
    executor = ThreadPoolExecutor(count, thread_name_prefix=name, initializer=begin)

    def end(kind: type[BaseException] | None, *_: object) -> None:
        executor.shutdown(wait=kind is not Stopped, cancel_futures=True)

    stack.push(end)

    async def call(function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)

    return call


async def _train_until_stopped(peer: Peer, run: RunConfig, until_step: int, stop: Stop, gate: Gate) -> str:
    """Train; a first signal lets the round under way finish, a second one does not.

    Returns why the others let this peer in no more, if that was the end of it.
    """
    if until_step:
        run = run.model_copy(update={"total_steps": min(until_step, run.total_steps)})
    peer.leaving = stop.finishing
    training = asyncio.create_task(train(peer, run), name="train")
    stopping = asyncio.create_task(stop.first(), name="stop")
    ending = asyncio.create_task(_put_out(gate), name="invite")
    try:
        await asyncio.wait({training, stopping, ending}, return_when=asyncio.FIRST_COMPLETED)
        put_out = ending.result() if ending.done() and not training.done() else ""
        if not training.done():
            peer.leaving = True
        if stopping.done() and not training.done():
            logger.info("finishing the round, then leaving; once more to stop now")
            second = asyncio.create_task(stop.second(), name="stop now")
            await asyncio.wait(
                {training, second}, timeout=FINISH_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            second.cancel()
    finally:
        stopping.cancel()
        ending.cancel()
        if not training.done():
            training.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await training
    return put_out


async def _put_out(gate: Gate) -> str:
    """Why others let this peer in no more, once they do not."""
    while True:
        if flaw := gate.own_flaw():
            return flaw
        await asyncio.sleep(GATE_SECONDS)


def _pages(
    peer: Peer, swarm: Libp2pSwarm, invite: Invite, metrics: Metrics, feed: Feed
) -> contextlib.AbstractAsyncContextManager[HealthServer | Pages]:
    """Metrics and health, and with them the page of the run where this peer's owner wishes it."""
    config = peer.config
    if not config.page:
        return HealthServer(
            metrics.page,
            lambda: _failed_checks(peer),
            host=config.metrics_host,
            port=config.metrics_port,
            answered=metrics.answered_http,
        )
    folder = data_folder(config, peer.run.run_id)
    watcher = Monitor(invite, folder)
    watcher.within(swarm, peer.run, feed)
    public = not is_loopback(config.metrics_host)
    source = replace(
        watcher.source("" if public else encode(invite)),
        metrics=feed.page,
        failed_checks=lambda: _failed_checks(peer),
        answered=metrics.answered_http,
    )
    pages = Pages(source, config.metrics_host, config.metrics_port, public=public, fault=cannot_listen)
    return alongside(watcher, pages)


def _failed_checks(peer: Peer) -> list[str]:
    return [] if peer.rounds_joined else ["no round joined yet"]


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Something that goes on for as long as this is entered."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()


@contextlib.contextmanager
def _counted_logs(metrics: Metrics) -> Iterator[None]:
    counter, root = LogCounter(metrics.log_messages), logging.getLogger()
    root.addHandler(counter)
    try:
        yield
    finally:
        root.removeHandler(counter)


def _export_catch_up(metrics: Metrics, peer: Peer) -> None:
    def reading(name: str) -> Callable[[], float]:
        return lambda: float(getattr(peer.catching_up, name, 0))

    metrics.catch_up_parts.labels(Extent.DONE).set_function(reading("done"))
    metrics.catch_up_parts.labels(Extent.ALL).set_function(reading("total"))
    metrics.catch_up_bytes.labels(Extent.DONE).set_function(reading("done_bytes"))
    metrics.catch_up_bytes.labels(Extent.ALL).set_function(reading("total_bytes"))


@contextlib.asynccontextmanager
async def _panel(daemon: Daemon) -> AsyncIterator[None]:
    """On a terminal, how the peer stands, below its log; elsewhere the log is all."""
    if not sys.stderr.isatty():
        yield
        return
    with Below(Console(stderr=True)) as panel:
        drawing = asyncio.create_task(_draw(panel, daemon), name="panel")
        try:
            yield
        finally:
            drawing.cancel()


async def _draw(panel: Below, daemon: Daemon) -> None:
    while True:
        panel.show(daemon.answer({"ask": "status"}), time.time())
        await asyncio.sleep(PANEL_SECONDS)


def _tell(event: events.Event) -> None:
    if isinstance(event, events.CatchingUp) and sys.stderr.isatty():
        return  # it is on the panel
    tell(logger, event)
