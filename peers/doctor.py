"""`p2ptrain doctor`: can this machine take part, and if not, what is the cause and what to do?

Each check is a function of what was measured, and comes to one `Check`. `examine` measures: this machine
first, then, by an invite, the way into the swarm, from a peer of a new identity that leaves again. `join`
makes the quick ones of these: `look_over` before it begins, and `look_at_needs` once it knows the run.
With an invite it measures how fast this machine and its link are, and whether that makes the round.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]

from p2ptrain import PROTOCOL_VERSION, __version__
from p2ptrain.config import PeerConfig, RunConfig, check_together
from p2ptrain.errors import LocalFault, P2PTrainError, PortBusy, StorageError, Unreachable
from p2ptrain.events import duration
from p2ptrain.protocol.forecast import Forecast, Links, forecast
from p2ptrain.records import PeerId, Presence
from p2ptrain.swarm import p2pd, reach
from p2ptrain.swarm.access import Invite
from p2ptrain.swarm.validator import MAX_CLOCK_SKEW_SECONDS
from peers.places import user_data
from peers.speed import Prober, measure

if TYPE_CHECKING:
    from p2ptrain.swarm.libp2p import Libp2pSwarm

PYTHONS = ((3, 11), (3, 13))
PACKAGES = ("torch", "hivemind", "numpy", "safetensors")
FEW_FILES, ENOUGH_FILES = 256, 1024
"""Open files: a lane is one, here and in the libp2p daemon."""
PROCESS_BYTES = 600 * 10**6
"""What Python, torch and hivemind have before there is a model."""
STATE_BYTES, WORK_BYTES = 12, 24
"""Per parameter: weight and two moments; gradients, averages, and a snapshot for newcomers."""
ROOM_BYTES = 100 * 10**6
"""On disk for key and journal."""
WISE_PORT = 31337
NETWORK_SECONDS = 45.0
"""For all questions to the swarm together; each has a shorter deadline of its own."""


class Verdict(StrEnum):
    FINE = "fine"
    NOTE = "note"
    """It will do; it could be better."""
    BAD = "bad"
    """So this machine cannot take part."""


@dataclass(frozen=True)
class Check:
    """What one look came to."""

    name: str
    verdict: Verdict
    finding: str
    """The result for programs, in a word or two."""
    detail: str
    remedy: str = ""
    """One thing to do; empty if there is nothing to do."""
    exit_code: int = 0
    """Of the command, if this is bad."""


def fine(name: str, finding: str, detail: str) -> Check:
    return Check(name, Verdict.FINE, finding, detail)


def exit_code(checks: list[Check]) -> int:
    """0 if one can take part, else that of the first cause."""
    return next((check.exit_code for check in checks if check.verdict is Verdict.BAD), 0)


def lines(check: Check) -> list[str]:
    """The check as a person reads it."""
    mark = {Verdict.FINE: "ok  ", Verdict.NOTE: "note", Verdict.BAD: "BAD "}[check.verdict]
    remedy = [f"              → {check.remedy}"] if check.remedy else []
    return [f"{mark}  {check.name:<7} {check.detail}", *remedy]


class Unfit(P2PTrainError):
    """This machine cannot take part, as one of its checks has found."""

    def __init__(self, check: Check) -> None:
        super().__init__(f"{check.name}: {check.detail}; {check.remedy} (--no-doctor joins all the same)")
        self.exit_code = check.exit_code


def insist(checks: list[Check]) -> None:
    """Raises Unfit for the first cause that keeps this machine out."""
    for check in checks:
        if check.verdict is Verdict.BAD:
            raise Unfit(check)


def plain(checks: list[Check]) -> dict[str, Any]:
    """All of it for `--json`."""
    return {
        "can_take_part": not exit_code(checks),
        "exit_code": exit_code(checks),
        "checks": [asdict(check) for check in checks],
    }


# -- what the measurements mean ------------------------------------------------------------------------------


def versions(python: tuple[int, int], found: Mapping[str, str | None], daemon_fault: str) -> Check:
    """`found`: package → version, None if it is not there; `daemon_fault`: why p2pd cannot be run."""
    shown = f"p2ptrain {__version__} (protocol {PROTOCOL_VERSION}), Python {python[0]}.{python[1]}"
    least, most = PYTHONS
    if not least <= python <= most:
        wanted = f"{least[0]}.{least[1]} to {most[0]}.{most[1]}"
        return Check(
            "version", Verdict.BAD, "python", f"{shown}; {wanted} is needed", "python3.11 -m venv .venv", 1
        )
    if missing := [package for package, version in found.items() if version is None]:
        return Check(
            "version",
            Verdict.BAD,
            "missing package",
            f"{shown}, without {', '.join(missing)}",
            "pip install --force-reinstall p2ptrain",
            1,
        )
    if daemon_fault:
        return Check(
            "version", Verdict.BAD, "no daemon", daemon_fault, "pip install --force-reinstall hivemind", 1
        )
    packages = ", ".join(f"{package} {version}" for package, version in found.items())
    return fine("version", "ok", f"{shown}, {packages}")


def processor(cores: int, threads: int) -> Check:
    shown = f"{threads} of {cores} cores will compute, on the CPU"
    if threads > cores:
        return Check(
            "compute",
            Verdict.NOTE,
            "more threads than cores",
            f"{threads} threads on {cores} cores, which makes both slow",
            f"set threads = {cores} in the peer file",
        )
    return fine("compute", "ok", shown)


def needed_memory(parameters: int, config: PeerConfig) -> int:
    """Bytes that training so many parameters takes, activations apart."""
    return PROCESS_BYTES + parameters * (STATE_BYTES + WORK_BYTES) + config.log_megabytes * 10**6


def needed_disk(parameters: int, config: PeerConfig) -> int:
    """Bytes for the checkpoints that are kept, one that is being written, and a download."""
    return ROOM_BYTES + parameters * STATE_BYTES * (config.checkpoints_kept + 2)


def memory(available: int, needed: int | None) -> Check:
    """`needed`: None while it is not known what is to be trained."""
    shown = f"{_size(available)} free"
    if needed is None:
        return fine("memory", "ok", shown)
    if available < needed:
        return Check(
            "memory",
            Verdict.BAD,
            "too little",
            f"{shown}, about {_size(needed)} are needed for this run",
            "close other programs, or take a machine with more memory; limits.memory_megabytes counts, too",
            1,
        )
    return fine("memory", "ok", f"{shown}, about {_size(needed)} needed")


def disk(folder: Path, free: int, writable: bool, needed: int | None) -> Check:
    code = StorageError.exit_code
    if not writable:
        return Check(
            "disk",
            Verdict.BAD,
            "not writable",
            f"{folder} cannot be written",
            "set data_dir in the peer file to a folder of yours",
            code,
        )
    shown = f"{_size(free)} free in {folder}"
    if free < (needed or ROOM_BYTES):
        return Check(
            "disk",
            Verdict.BAD,
            "too little",
            f"{shown}, {_size(needed or ROOM_BYTES)} are needed",
            "make room there, or set data_dir in the peer file to a larger disk",
            code,
        )
    return fine("disk", "ok", shown if needed is None else f"{shown}, {_size(needed)} needed")


def open_files(soft: int, hard: int) -> Check:
    """The limit for this process, and how far it may be raised; a limit below 0 is none."""
    if soft < 0 or soft >= ENOUGH_FILES:
        return fine("files", "ok", f"{'any number of' if soft < 0 else soft} open files")
    within = ENOUGH_FILES if hard < 0 else min(hard, ENOUGH_FILES)
    bad = soft < FEW_FILES
    return Check(
        "files",
        Verdict.BAD if bad else Verdict.NOTE,
        "low limit",
        f"{soft} open files are allowed, {ENOUGH_FILES} are wise in a large swarm",
        f"ulimit -n {within}",
        1 if bad else 0,
    )


def clock(ahead_seconds: float) -> Check:
    """By how much the swarm's clock is ahead of ours."""
    where = "behind" if ahead_seconds > 0 else "ahead of"
    shown = f"{abs(ahead_seconds):.1f} s {where} the swarm's"
    if abs(ahead_seconds) > MAX_CLOCK_SKEW_SECONDS:
        return Check(
            "clock",
            Verdict.BAD,
            "wrong",
            f"{shown}; at most {MAX_CLOCK_SKEW_SECONDS:.0f} s will do",
            "sudo timedatectl set-ntp true",
            LocalFault.exit_code,
        )
    return fine("clock", "ok", shown)


def reachable(reach_: reach.Reach, relays: int, listen: str) -> Check:
    """What a peer that dialled back found; `listen` is the first address of the peer file."""
    port = reach.port_of(listen) or 0
    if reach_.reachable is None:
        return Check(
            "reach", Verdict.NOTE, "unknown", "nobody dialled back, so it is not known whether others can"
        )
    if reach_.reachable:
        return fine("reach", "public", f"others can open connections to {reach_.address}")
    if reach.OTHER_IDENTITY in reach_.detail:
        return fine("reach", "public", f"others can connect to {reach_.address}; a p2ptrain runs there")
    hidden = (
        "reaches other hidden peers by way of a relay"
        if relays
        else "cannot reach other hidden peers, since none of the invite's peers relays"
    )
    remedy = f"to be reached, forward TCP port {port or WISE_PORT} to this machine in your router"
    if not port:
        remedy += f', with listen = ["/ip4/0.0.0.0/tcp/{WISE_PORT}"] in the peer file'
    return Check(
        "reach",
        Verdict.NOTE,
        "behind NAT",
        f"behind NAT or a firewall: {reach_.address} could not be dialled ({reach_.detail}). This machine "
        f"takes part all the same: it opens the connections, and {hidden}",
        f"nothing needed; {remedy}" if relays else remedy,
    )


def speed(
    figures: Forecast,
    links: Links,
    sample_seconds: float,
    step_seconds: float | None,
    most_seconds: float,
) -> Check:
    """Whether this machine would make the round: bring a sample within a step, and send its gradient before
    an attempt is given up. `step_seconds`: what a step takes the swarm now; None if nobody trains."""
    wait = figures.transfer_seconds + figures.latency_seconds
    pace = "unknown, as nobody trains now" if step_seconds is None else duration(step_seconds)
    shown = (
        f"{1 / sample_seconds:,.1f} samples/s, {_megabits(links.uplink)} up, {_megabits(links.downlink)} "
        f"down; a round takes you {duration(wait)}, a step of the swarm is {pace}. You would make the round: "
    )
    late = step_seconds is not None and sample_seconds > step_seconds
    if not late and wait <= most_seconds:
        return fine("speed", "yes", f"{shown}yes")
    if late:
        why, remedy = (
            "a single sample takes longer than a step",
            "give it more threads, or find a smaller run",
        )
    else:
        why = f"an attempt is given up after {duration(most_seconds)}"
        remedy = "find a faster link, or a run with a codec that sends less"
    return Check("speed", Verdict.NOTE, "no", f"{shown}no, {why}", remedy)


def _megabits(bytes_per_second: float) -> str:
    return f"{bytes_per_second * 8 / 1e6:,.1f} Mbit/s"


def fault(name: str, error: P2PTrainError, remedy: str) -> Check:
    return Check(name, Verdict.BAD, type(error).__name__, str(error), remedy, error.exit_code)


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 10**9 else f"{count / 1e6:,.0f} MB"


# -- measuring -----------------------------------------------------------------------------------------------


async def examine(
    invite: Invite | None, config: PeerConfig, tell: Callable[[Check], None], doing: Callable[[str], None]
) -> list[Check]:
    """All checks, each told as soon as it is made; `doing` hears what takes a while."""
    checks: list[Check] = []

    def add(check: Check) -> None:
        checks.append(check)
        tell(check)

    for check in _of_this_machine(config):
        add(check)
    if exit_code(checks[:1]):
        return checks  # what follows would only say that it cannot be imported
    parameters = None
    if invite is not None:
        doing("asking the swarm and measuring the way there, which takes up to 20 s")
        try:
            async with asyncio.timeout(NETWORK_SECONDS):
                parameters = await _ask_swarm(invite, config, add)
        except TimeoutError:
            late = Unreachable(f"the swarm did not answer everything within {NETWORK_SECONDS:.0f} s")
            add(fault("swarm", late, "try again"))
    for check in _of_the_need(config, parameters):
        add(check)
    return checks


def look_over(config: PeerConfig) -> list[Check]:
    """What can be said of this machine within a tenth of a second, and without a question to anybody."""
    checks = _of_this_machine(config)
    return checks if exit_code(checks[:1]) else [*checks, *_of_the_need(config, None)]


def look_at_needs(config: PeerConfig, parameters: int) -> list[Check]:
    """What training so many parameters takes, and what there is of it. Of the memory, this process has
    already what it needs before there is a replica."""
    return _of_the_need(config, parameters, here_bytes=PROCESS_BYTES)


def _of_this_machine(config: PeerConfig) -> list[Check]:
    return [
        _versions(),
        processor(os.cpu_count() or 1, config.threads),
        open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
    ]


def _of_the_need(config: PeerConfig, parameters: int | None, here_bytes: int = 0) -> list[Check]:
    """`parameters`: None while it is not known what is to be trained."""
    available = psutil.virtual_memory().available
    if config.limits.memory_megabytes:
        available = min(available, config.limits.memory_megabytes * 10**6)
    if parameters is None:
        return [_disk(config, None), memory(available, None)]
    needs = needed_memory(parameters, config) - here_bytes
    return [_disk(config, needed_disk(parameters, config)), memory(available, needs)]


def _disk(config: PeerConfig, needed: int | None) -> Check:
    folder = Path(config.data_dir).expanduser() if config.data_dir else user_data()
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return disk(folder, shutil.disk_usage(there).free, os.access(there, os.W_OK), needed)


def _versions() -> Check:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    try:
        p2pd.binary()
        daemon_fault = ""
    except LocalFault as problem:
        daemon_fault = str(problem)
    return versions(sys.version_info[:2], found, daemon_fault)


async def _ask_swarm(invite: Invite, config: PeerConfig, add: Callable[[Check], None]) -> int | None:
    """The way in, the clock, the way back, and the run; its number of parameters, if it came so far."""
    from p2ptrain.swarm.libp2p import Libp2pSwarm

    with tempfile.TemporaryDirectory(prefix="p2ptrain-doctor-") as folder:

        def guest(listen: tuple[str, ...], announce: tuple[str, ...]) -> Libp2pSwarm:
            return Libp2pSwarm(
                Path(folder) / "identity.key",
                invite.run_id,
                initial_peers=invite.addresses,
                invite=invite,
                listen=listen,
                announce=announce,
                on_event=lambda event: None,
            )

        try:
            swarm = guest(config.listen, config.announce)
            try:
                await swarm.__aenter__()
            except PortBusy:
                # By our own peer, most likely: ask about its port, and listen on another.
                swarm = guest(("/ip4/0.0.0.0/tcp/0",), config.announce or config.listen)
                await swarm.__aenter__()
        except P2PTrainError as problem:
            skew = swarm.clock_skew_seconds
            if isinstance(problem, LocalFault) and skew is not None and abs(skew) > MAX_CLOCK_SKEW_SECONDS:
                add(fine("swarm", "ok", "it answers"))
                add(clock(skew))
            else:
                add(fault("swarm", problem, _way_in(problem)))
            return None
        try:
            swarm.serve(Prober(swarm))
            others = swarm.connected_peers()
            add(fine("swarm", "ok", f"run {invite.run_id} answers; {others} peers connected"))
            if (skew := swarm.clock_skew_seconds) is not None:
                add(clock(skew))
            add(reachable(swarm.reach, len(swarm.relays), config.listen[0]))
            return await _ask_run(swarm, invite, config, add)
        finally:
            await swarm.__aexit__(None, None, None)


def _way_in(problem: P2PTrainError) -> str:
    if isinstance(problem, Unreachable):
        return "ask the organizer whether the bootstrap runs, and for a new invite"
    return "see the sentence above"


async def _ask_run(
    swarm: Libp2pSwarm, invite: Invite, config: PeerConfig, add: Callable[[Check], None]
) -> int | None:
    from peers.volunteer import fetch_run

    try:
        run = await fetch_run(swarm, invite)
        check_together(run, config)
        began, before = time.monotonic(), await _furthest(swarm)
        parameters, sample_seconds = await asyncio.to_thread(_try_out, run, config)
    except P2PTrainError as problem:
        add(fault("run", problem, "see the sentence above"))
        return None
    add(fine("run", "ok", f"{run.run_id}: {parameters:,} parameters, protocol {PROTOCOL_VERSION}"))
    try:
        bootstrap = PeerId(invite.addresses[0].rsplit("/p2p/", 1)[1])
        up, down, rtt = await measure(swarm, bootstrap)
    except P2PTrainError as problem:
        add(Check("speed", Verdict.NOTE, "unknown", f"the link could not be measured: {problem}"))
        return parameters
    seconds, after = time.monotonic() - began, await _furthest(swarm)
    most = config.limits.bytes_per_second or math.inf
    links = Links(min(up, most), min(down, most), rtt)
    steps = after[1] - before[1]
    figures = _figures(run, parameters, max(after[0], 1) + 1, sample_seconds, links)
    step_seconds = seconds / steps if steps > 0 else None
    add(speed(figures, links, sample_seconds, step_seconds, run.attempt_most_seconds))
    return parameters


async def _furthest(swarm: Libp2pSwarm) -> tuple[int, int]:
    """How many train, and the step that they are at."""
    records = [each for each in await swarm.lookup("presence") if isinstance(each, Presence)]
    steps = [each.position.step for each in records if each.role == "train" and each.position is not None]
    return len(steps), max(steps, default=0)


def _try_out(run: RunConfig, config: PeerConfig) -> tuple[int, float]:
    """Parameters of the run's model, and the seconds that one sample takes here, on the CPU."""
    import torch

    from p2ptrain.tasks import build_model, build_task
    from peers.plan import MEASURED_AT_ONCE, samples_per_second

    torch.set_num_threads(config.threads)
    task = build_task(run, config)
    model, _ = build_model(task, run)
    pace = samples_per_second(task, model, min(MEASURED_AT_ONCE, run.target_batch_size))
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return sum(parameter.numel() for parameter in trained), 1 / pace


def _figures(run: RunConfig, parameters: int, peers: int, sample_seconds: float, links: Links) -> Forecast:
    from p2ptrain.gradients.codecs import codec_named
    from p2ptrain.replica.joining import MAX_DONORS, UPLOAD_SHARE

    return forecast(
        peers=peers,
        batch_size=run.target_batch_size,
        sample_seconds=sample_seconds,
        encoded_bytes=codec_named(run.codec).encoded_bytes(parameters),
        state_bytes=parameters * STATE_BYTES,
        most_donors=MAX_DONORS,
        donor_share=UPLOAD_SHARE,
        links=links,
        delay=run.delay,
    )
