"""The organizer's bootstrap peer: a well-known address, the run file for whoever has an invite, and a DHT
node.

It trains nothing and decides nothing. If it dies, the swarm goes on, and newcomers can enter by any other
peer whose address they have. Started again, it has the same identity and port, and lets newcomers in once
the swarm has found back to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from p2ptrain import PROTOCOL_VERSION
from p2ptrain.config import RunConfig, canonical_json, run_digest
from p2ptrain.errors import ConfigError, IncompatibleRun, P2PTrainError, PortBusy, StorageError
from p2ptrain.events import clean, short
from p2ptrain.records import (
    GetRun,
    Pass,
    PeerId,
    Piece,
    Presence,
    Probe,
    Redeem,
    Refusal,
    Reply,
    Request,
)
from p2ptrain.swarm.access import Invite
from p2ptrain.swarm.identity import load_or_create
from p2ptrain.swarm.libp2p import Libp2pSwarm
from p2ptrain.swarm.port import Buffer
from p2ptrain.telemetry.health import is_loopback
from p2ptrain.telemetry.logs import tell
from peers import invites, present
from peers.monitor import Monitor, alongside
from peers.monitor_pages import BOOTSTRAP_PORT, Pages
from peers.places import made
from peers.replaying import address
from peers.signals import Stop
from peers.speed import Prober

logger = logging.getLogger("p2ptrain")

DEFAULT_LISTEN = "/ip4/0.0.0.0/tcp/31337"
PRESENCE_SECONDS = 10.0
SETTLE_SECONDS = 6.0
"""After a restart: by then the peers have found back, and a newcomer that had come before them would have
found nobody and begun a log of its own."""
MAX_ADDRESSES = 8
"""In an invite."""
LOOK_SECONDS = 0.5
BOOK_SECONDS = 2.0
"""Between two looks at what the organizer has decreed."""

Ready = Callable[[str | None, str], None]


@dataclass(frozen=True)
class Place:
    """Where the page is served; port None: the usual one, or any if that is taken."""

    host: str = "127.0.0.1"
    port: int | None = None


class _RunFile(Prober):
    """Answers what a bootstrap peer is asked: what run is this, may I come by this invite, and how fast is
    the way here?"""

    def __init__(self, swarm: Libp2pSwarm, run: RunConfig, redeem: Callable[[PeerId, Pass], Reply]) -> None:
        super().__init__(swarm)
        self._redeem = redeem
        self._run_json = canonical_json(run).encode()
        self.open = asyncio.Event()
        """Whether newcomers may come in; those who ask before wait."""

    async def on_request(self, sender: PeerId, request: Request) -> tuple[Reply, Buffer]:
        match request:
            case GetRun():
                await self.open.wait()
                return Piece(), self._run_json
            case Redeem():
                return self._redeem(sender, request.access), b""
            case Probe():
                return await self.answer(sender, request)
            case _:
                return Refusal(reason="this is a bootstrap peer: it holds no state"), b""


async def bootstrap(
    run: RunConfig,
    listen: str,
    announce: tuple[str, ...],
    folder: Path,
    public: bool | None,
    ready: Ready,
    *,
    relay_for: int,
    entrances: Sequence[str] = (),
    page: Place | None = None,
) -> dict[str, object]:
    """Serve the run until a signal comes; `ready` is given the invite once peers can enter, None if the run
    is not `public` (None: as at the last start, at first True), and the address of the page, which is empty
    without `page`. `relay_for`: so many hidden peers meet here; `entrances`: other bootstraps' addresses,
    which invites name as well."""
    key = made(folder) / "bootstrap.key"
    restarted = key.exists()
    swarm = Libp2pSwarm(
        key,
        run.run_id,
        listen=(listen,),
        announce=announce,
        invite=_own_invite(folder, run, load_or_create(key).peer_id),
        redeems=True,
        relay_for=relay_for,
        on_event=partial(tell, logger),
    )
    with Stop() as stop:
        async with swarm:
            run_file = _RunFile(swarm, run, partial(_redeem, swarm, folder))
            swarm.serve(run_file)
            own = _entrances(swarm.visible_addresses())
            addresses = [*own[: MAX_ADDRESSES - len(entrances)], *entrances]
            book = invites.open_book(folder, run, addresses, public, int(time.time()))
            link = book.link(run)
            invite = link.line if link else None
            _heed(swarm, book, folder, run)
            patience = SETTLE_SECONDS if restarted else 0.0
            mine = _own_invite(folder, run, swarm.peer_id)
            async with _page(page, swarm, run, mine, folder, run_file, invite or "") as seen_at:
                ready(invite, seen_at)
                await _serve(
                    stop,
                    _keep_present(swarm, run),
                    _keep_seeing(swarm, folder),
                    _let_in(swarm, run_file, patience),
                    _keep_reading(swarm, folder, run),
                )
            logger.info("leaving (%s); the swarm goes on without its bootstrap", stop.reason)
            return {"run_id": run.run_id, "peer": swarm.peer_id, "invite": invite}


async def second(
    run: RunConfig,
    listen: str,
    announce: tuple[str, ...],
    folder: Path,
    invite: Invite,
    ready: Callable[[list[str], str], None],
    *,
    relay_for: int,
    page: Place | None = None,
) -> dict[str, object]:
    """Be another way into a run that a bootstrap has opened: with its run file and an invite, and no key of
    the organizer's. `ready` is given this one's addresses, and the page's. Raises IncompatibleRun for another
    run's file."""
    if (digest := run_digest(run)) != invite.run_digest:
        raise IncompatibleRun(
            f"the run file has digest {digest[:8]}, and the invite leads to {invite.run_id} with digest "
            f"{invite.run_digest[:8]}; take the run file that its bootstrap has"
        )
    swarm = Libp2pSwarm(
        made(folder) / "bootstrap.key",
        run.run_id,
        initial_peers=invite.addresses,
        listen=(listen,),
        announce=announce,
        invite=invite,
        relay_for=relay_for,
        on_event=lambda event: logger.log(event.level, event.sentence()),
    )
    with Stop() as stop:
        async with swarm:
            run_file = _RunFile(swarm, run, _only_at_the_first)
            run_file.open.set()
            swarm.serve(run_file)
            addresses = _entrances(swarm.visible_addresses())
            async with _page(page, swarm, run, invite, folder, run_file, "") as seen_at:
                ready(addresses, seen_at)
                await _serve(stop, _keep_present(swarm, run))
            logger.info("leaving (%s)", stop.reason)
            return {"run_id": run.run_id, "peer": swarm.peer_id, "addresses": addresses}


@contextlib.asynccontextmanager
async def _page(
    place: Place | None,
    swarm: Libp2pSwarm,
    run: RunConfig,
    invite: Invite,
    folder: Path,
    run_file: _RunFile,
    share: str,
) -> AsyncIterator[str]:
    """The page of the run, with health and metrics, while entered; its address. `invite` is ours, `share`
    what the page lets others in with."""
    if place is None:
        yield ""
        return
    watcher = Monitor(invite, folder)
    watcher.within(swarm, run)
    public = not is_loopback(place.host)
    shut = ["newcomers wait until the swarm has found back to this bootstrap"]
    source = replace(
        watcher.source("" if public else share),
        failed_checks=lambda: [] if run_file.open.is_set() else shut,
    )
    port = _free(place)
    async with alongside(watcher, Pages(source, place.host, port, public=public, fault=_page_fault)) as pages:
        yield address(place.host, pages.port)


def _free(place: Place) -> int:
    """The port to serve on; 0 for any."""
    if place.port is not None:
        return place.port
    with socket.socket(socket.AF_INET6 if ":" in place.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((place.host, BOOTSTRAP_PORT))
        except OSError:
            return 0
    return BOOTSTRAP_PORT


def _page_fault(host: str, port: int, error: OSError) -> ConfigError | PortBusy:
    if error.errno == errno.EADDRINUSE:
        return PortBusy(
            f"port {port} on {host} is taken by another process; choose another --page-port, 0 for any, or "
            "--no-page"
        )
    return ConfigError(
        f"cannot serve the page on {host} port {port} ({error.strerror or error}); choose another "
        "--page-host or --page-port, or --no-page"
    )


async def _serve(stop: Stop, *work: Coroutine[Any, Any, None]) -> None:
    """All of this, until a signal comes."""
    beside = [asyncio.create_task(each) for each in work]
    try:
        await stop.first()
    finally:
        for task in beside:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _only_at_the_first(sender: PeerId, access: Pass) -> Reply:
    return Refusal(reason="invites for so many peers are redeemed at the organizer's own bootstrap")


def _entrances(addresses: list[str]) -> list[str]:
    """At most 8 addresses for the invite, those that others can reach first: loopback is for this machine
    only."""
    return sorted(addresses, key=lambda address: address.startswith(("/ip4/127.", "/ip6/::1")))[
        :MAX_ADDRESSES
    ]


async def _keep_present(swarm: Libp2pSwarm, run: RunConfig) -> None:
    incarnation = secrets.token_hex(8)
    while True:
        record = Presence(
            peer=swarm.peer_id,
            role="bootstrap",
            name="bootstrap",
            protocol=PROTOCOL_VERSION,
            fingerprint=run_digest(run),
            incarnation=incarnation,
            position=None,
        )
        await swarm.publish(record, ttl_seconds=3 * PRESENCE_SECONDS)
        await asyncio.sleep(PRESENCE_SECONDS)


async def _keep_seeing(swarm: Libp2pSwarm, folder: Path) -> None:
    """Write down who is there, for the organizer's commands."""
    seen = present.read(folder)
    while True:
        there = [each for each in await swarm.lookup("presence") if isinstance(each, Presence)]
        seen = present.merged(seen, there, int(time.time()))
        try:
            present.write(folder, seen)
        except StorageError as fault:
            logger.warning("%s", fault)
        await asyncio.sleep(PRESENCE_SECONDS)


async def _keep_reading(swarm: Libp2pSwarm, folder: Path, run: RunConfig) -> None:
    """Have the swarm know what the organizer decrees meanwhile."""
    while True:
        await asyncio.sleep(BOOK_SECONDS)
        try:
            _heed(swarm, invites.read(folder), folder, run)
        except StorageError as fault:
            logger.warning("what was decreed is not known: %s", fault)


def _heed(swarm: Libp2pSwarm, book: invites.Book, folder: Path, run: RunConfig) -> None:
    gate = swarm.gate
    assert gate is not None
    for decree in book.decrees:
        gate.learn(decree)
    if gate.has_to_redeem:  # the organizer has another key, and it is here
        gate.own = _own_invite(folder, run, swarm.peer_id).shown_by(swarm.peer_id)


def _own_invite(folder: Path, run: RunConfig, me: PeerId) -> Invite:
    return invites.own_invite(folder, run, me, int(time.time()))


def _redeem(swarm: Libp2pSwarm, folder: Path, sender: PeerId, shown: Pass) -> Reply:
    """A grant of the sender's own, or why not."""
    assert swarm.gate is not None
    if flaw := swarm.gate.flaw(sender, shown):
        return Refusal(reason=clean(flaw, 300), uninvited=True)
    try:
        return invites.redeem(folder, shown.grant, sender)
    except P2PTrainError as fault:
        logger.info("peer %s is given no pass: %s", short(sender), fault)
        return Refusal(reason=clean(str(fault), 300), uninvited=True)


async def _let_in(swarm: Libp2pSwarm, run_file: _RunFile, patience_seconds: float) -> None:
    """Open the door once somebody is there who trains, or after that time."""
    deadline = asyncio.get_running_loop().time() + patience_seconds
    while asyncio.get_running_loop().time() < deadline:
        there = await swarm.lookup("presence")
        if any(isinstance(record, Presence) and record.role == "train" for record in there):
            break
        await asyncio.sleep(LOOK_SECONDS)
    run_file.open.set()


def print_entrances(addresses: list[str], seen_at: str, as_json: bool, say: Callable[[str], None]) -> None:
    """What the organizer's own bootstrap is started with, to name this one in its invites."""
    if as_json:
        say(json.dumps({"event": "ready", "addresses": addresses, "page": seen_at}))
        return
    say("To have invites lead here, too, start the first bootstrap with these options:\n")
    say("    " + " ".join(f"--entrance {address}" for address in addresses) + "\n")
    _say_where(seen_at, say)


def print_invite(
    invite: str | None,
    seen_at: str,
    as_json: bool,
    say: Callable[[str], None],
    picture: Callable[[str], str] | None = None,
) -> None:
    """What the organizer hands on, and where the run is to be seen; `picture` draws the invite as a QR
    code."""
    if as_json:
        say(json.dumps({"event": "ready", "invite": invite, "page": seen_at}))
        return
    if invite is None:
        say("The run is private: `p2ptrain invite create` with the same run file lets somebody in.\n")
    else:
        say("To let somebody in, send this command:\n")
        say(f"    p2ptrain join {invite}\n")
        if picture is not None:
            say(picture(invite))
    _say_where(seen_at, say)


def _say_where(seen_at: str, say: Callable[[str], None]) -> None:
    if seen_at:
        say(f"The run is to be seen at {seen_at}; Prometheus finds its peers at {seen_at}api/v1/sd\n")
