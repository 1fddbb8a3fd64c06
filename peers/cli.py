"""The command `p2ptrain`. Verbs import what they need when they run, so that help and small verbs answer at
once."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import sys
import time
from collections.abc import Coroutine
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from p2ptrain.errors import P2PTrainError
from peers import (
    adapters_cli,
    batch_cli,
    config_cli,
    control_cli,
    experiment_cli,
    identity_cli,
    invite_cli,
    monitor_cli,
    run_cli,
    service_cli,
)
from peers.lasting import lasting_imports
from peers.verbs import needed

if TYPE_CHECKING:  # the verbs import it when they run
    from p2ptrain.config import PeerConfig

app = typer.Typer(
    name="p2ptrain",
    help="Train one model together, over the internet, with nothing in the middle.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(adapters_cli.app, name="adapters")
app.add_typer(config_cli.app, name="config")
app.add_typer(batch_cli.app, name="batch")
app.add_typer(experiment_cli.app, name="experiment")
app.add_typer(invite_cli.app, name="invite")
app.add_typer(run_cli.app, name="run")
app.add_typer(identity_cli.app, name="identity")
app.add_typer(service_cli.app, name="service")
control_cli.add_to(app)


class LogFormat(StrEnum):
    """How what happens is told on stderr."""

    TEXT = "text"
    JSON = "json"


_log_format = LogFormat.TEXT


@app.callback()
def before_the_verb(
    log_format: Annotated[
        LogFormat, typer.Option(help="How roles tell what happens on stderr; json: one object a line.")
    ] = LogFormat.TEXT,
) -> None:
    """Train one model together, over the internet, with nothing in the middle."""
    global _log_format
    _log_format = log_format


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of output.")]
_LIMIT = "Most {}, in place of what the peer file says."
OwnPlaces = Annotated[
    Path | None,
    typer.Option("--peer", help="Peer file: where model, tokenizer and data are that the run only names."),
]
PeerFile = Annotated[
    Path | None,
    typer.Option("--peer", help="Peer file, as for join; addresses, ports and folders in it do not count."),
]
Corpus = Annotated[str, typer.Option(help="The text, if the run file names another than stdlib.")]


@app.command()
def join(
    invite: Annotated[str, typer.Argument(help="The one line that the organizer gave you.")],
    peer: Annotated[Path | None, typer.Option(help="Peer file: how this machine takes part.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="The run file as you know it; refuse to join if the swarm's differs.")
    ] = None,
    until_step: Annotated[int, typer.Option(min=0, help="Leave at this step; 0: stay to the end.")] = 0,
    data_dir: Annotated[str, typer.Option(help="Folder for this peer's key, checkpoints and journal.")] = "",
    threads: Annotated[int | None, typer.Option(help=_LIMIT.format("CPU threads"))] = None,
    memory_megabytes: Annotated[int | None, typer.Option(help=_LIMIT.format("memory"))] = None,
    upload_mbit: Annotated[float | None, typer.Option(help=_LIMIT.format("Mbit/s sent"))] = None,
    download_mbit: Annotated[float | None, typer.Option(help=_LIMIT.format("Mbit/s received"))] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(help='When to train: "22:00-07:00", "sat,sun 00:00-24:00"; may be repeated.'),
    ] = None,
    on_battery: Annotated[
        bool | None,
        typer.Option("--on-battery/--no-on-battery", help="Train on battery, too.", show_default=False),
    ] = None,
    only_when_idle: Annotated[
        bool | None,
        typer.Option("--only-when-idle/--always", help="Pause while somebody uses it.", show_default=False),
    ] = None,
    other_cpu_percent: Annotated[
        float | None, typer.Option(help="Pause while other programs take more of the processors.")
    ] = None,
    temperature_celsius: Annotated[
        float | None, typer.Option(help="Pause while the processor is hotter.")
    ] = None,
    page: Annotated[
        bool | None,
        typer.Option(
            "--page/--no-page", help="Serve the web page of the run, on this machine.", show_default=False
        ),
    ] = None,
    no_doctor: Annotated[
        bool, typer.Option("--no-doctor", help="Do not look first whether this machine will do.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train with the swarm that INVITE leads to."""
    from p2ptrain.config import PeerConfig, load_peer, load_run, with_settings
    from p2ptrain.swarm.access import check, decode

    check(entrance := decode(invite), time.time(), role="train")
    config = load_peer(peer) if peer else PeerConfig()
    if data_dir:
        config = config.model_copy(update={"data_dir": data_dir})
    options = {
        "threads": threads,
        "page": page,
        "limits.memory_megabytes": memory_megabytes,
        "limits.upload_mbit": upload_mbit,
        "limits.download_mbit": download_mbit,
        "limits.schedule": schedule,
        "limits.on_battery": None if on_battery is None else ("train" if on_battery else "pause"),
        "limits.only_when_idle": only_when_idle,
        "limits.other_cpu_percent": other_cpu_percent,
        "limits.temperature_celsius": temperature_celsius,
    }
    given = {key: value for key, value in options.items() if value is not None}
    config = with_settings(config, given, "the options")
    own_run = load_run(run) if run else None
    if not no_doctor:
        with lasting_imports():
            from peers import doctor as doctor_role

        doctor_role.insist(doctor_role.look_over(config))
    _begin_log()
    logging.getLogger("p2ptrain").info("loading what trains, which takes a few seconds")
    from peers.signals import Stopped

    with lasting_imports():
        from peers.volunteer import receipt_lines, volunteer

    try:
        receipt = _run(volunteer(entrance, config, own_run, until_step, demanding=not no_doctor))
    except Stopped as stopped:
        if as_json:
            typer.echo(json.dumps({"run_id": entrance.run_id, "stopped": str(stopped)}))
        else:
            typer.echo(f"Stopped by {stopped} before it trained: join again whenever you like.")
        _end_now()
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(receipt)))
    else:
        typer.echo("\n".join(receipt_lines(receipt)))


@app.command()
def bootstrap(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file.")],
    listen: Annotated[str, typer.Option(help="Address to listen on.")] = "/ip4/0.0.0.0/tcp/31337",
    announce: Annotated[
        list[str] | None, typer.Option(help="Address that others should use; may be repeated.")
    ] = None,
    public: Annotated[
        bool | None,
        typer.Option(
            "--public/--private",
            help="Print an invite for everybody, or make one for each with `p2ptrain invite`; at first "
            "public, later as it was.",
            show_default=False,
        ),
    ] = None,
    relay_for: Annotated[
        int,
        typer.Option(min=0, max=128, help="Pass traffic on between so many peers behind NAT; 0: none."),
    ] = 64,
    entrance: Annotated[
        list[str] | None,
        typer.Option(help="Address of a second bootstrap, for invites to name; may be repeated."),
    ] = None,
    beside: Annotated[
        str, typer.Option(metavar="INVITE", help="Be a second bootstrap, beside the one that made INVITE.")
    ] = "",
    qr: Annotated[bool, typer.Option("--qr", help="Show the invite as a QR code as well.")] = False,
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="Serve the web page of the run, with health and metrics.")
    ] = True,
    page_host: Annotated[str, typer.Option(help="Address to serve it on.")] = "127.0.0.1",
    page_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port of it.", show_default="9412, or any if that is taken"),
    ] = None,
    data_dir: Annotated[str, typer.Option(help="Folder for the bootstrap's and the organizer's key.")] = "",
    as_json: Json = False,
) -> None:
    """Open a run for others: keep an address, hand out the run file, print the invite.

    With --beside, be another way into it, on another machine, for when the first one is gone.
    """
    from p2ptrain.config import load_run
    from p2ptrain.errors import ConfigError
    from p2ptrain.swarm.access import ENTRANCE, check, decode
    from peers.invite_cli import qr_code
    from peers.places import user_data

    run = load_run(run_file)
    folder = Path(data_dir) if data_dir else user_data() / run.run_id
    if wrong := [each for each in entrance or () if not re.fullmatch(ENTRANCE, each)]:
        raise ConfigError(
            f"--entrance {wrong[0]!r}: expected an address such as /ip4/203.0.113.7/tcp/31337/p2p/12D3KooW…, "
            "as a second bootstrap prints it"
        )
    with lasting_imports():
        from peers import bootstrap as role

    place = role.Place(page_host, page_port) if page else None
    if beside:
        check(invite := decode(beside), time.time())
        folder = folder if data_dir else folder / "second"
        addresses = tuple(announce or ())
        other = role.second(
            run,
            listen,
            addresses,
            folder,
            invite,
            lambda found, seen_at: role.print_entrances(found, seen_at, as_json, _say),
            relay_for=relay_for,
            page=place,
        )
        told = _run(other)
        if as_json:
            typer.echo(json.dumps(told))
        return

    summary = _run(
        role.bootstrap(
            run,
            listen,
            tuple(announce or ()),
            folder,
            public,
            lambda line, seen_at: role.print_invite(line, seen_at, as_json, _say, qr_code if qr else None),
            relay_for=relay_for,
            page=place,
            entrances=tuple(entrance or ())[:4],
        )
    )
    if as_json:
        typer.echo(json.dumps(summary))


@app.command()
def demo(
    peers: Annotated[int, typer.Option(min=1, max=16, help="How many peers train.")] = 2,
    seconds: Annotated[float, typer.Option(min=5, help="How long, from the start of the command.")] = 180,
    run: Annotated[Path | None, typer.Option(help="Run file; the default is a small language model.")] = None,
    peer: PeerFile = None,
    corpus: Corpus = "",
    listen: Annotated[
        str, typer.Option(help="Address to listen on; the default is for this machine only.")
    ] = "/ip4/127.0.0.1/tcp/0",
    no_kill: Annotated[bool, typer.Option("--no-kill", help="Kill no peer half-way.")] = False,
    as_json: Json = False,
) -> None:
    """Watch real peers train one model together on this machine, one of them being killed and coming back.

    Exit status 1: a process broke, or the peers did not end up identical; above that: that of a process that
    could not begin.
    """
    from rich.console import Console

    from p2ptrain.config import RunConfig, load_run
    from peers import demo as role
    from peers.rehearsal import RehearsalFailed

    settings = load_run(run) if run else RunConfig()
    options = role.Options(settings, peers, seconds, listen, not no_kill, _peer(peer, corpus))
    receipt = role.demo(options, Console(highlight=False))
    typer.echo("\n" + "\n".join(role.receipt_lines(receipt, options)))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(receipt)))
    if receipt.problem:
        raise RehearsalFailed(receipt.problem)


@app.command()
def chaos(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN.toml", help="Run file; the default is a small model.")
    ] = None,
    peers: Annotated[int, typer.Option(min=2, max=16, help="How many peers train.")] = 4,
    faults: Annotated[
        str,
        typer.Option(
            help="Any of kill, pause, leave, bootstrap, spawn, crowd, partition (needs root), with commas; "
            "or none."
        ),
    ] = "kill,pause",
    rate: Annotated[
        str, typer.Option(help="Faults per h, min or s; the intervals are exponential, from the seed.")
    ] = "60/h",
    seconds: Annotated[
        float, typer.Option(min=1, help="How long, from the first round with all peers in it.")
    ] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Draws when, what and whom.")] = 0,
    absence: Annotated[
        float, typer.Option(min=0, help="Seconds until a peer that was killed or left is started again.")
    ] = 2,
    max_peers: Annotated[int, typer.Option(min=2, max=32, help="How many spawn and crowd make of them.")] = 8,
    log_megabytes: Annotated[
        int, typer.Option(min=1, help="What each peer keeps for those who were away; little: by snapshot.")
    ] = 64,
    megabits: Annotated[
        float | None,
        typer.Option(min=0.1, max=1000, help="Per second, for each to send and to receive (needs root)."),
    ] = None,
    twin: Annotated[
        Path | None, typer.Option(help="Receipt of the same run with --faults none, to compare losses with.")
    ] = None,
    peer: PeerFile = None,
    corpus: Corpus = "",
    as_json: Json = False,
) -> None:
    """Put a rehearsal swarm on this machine through faults, and print how it fared.

    No process is exempt; whoever is killed comes back. Ctrl-C ends it with the receipt so far. Exit status 1:
    replicas differed, nobody trained after the last fault, or something was left over.
    """
    from rich.console import Console

    from p2ptrain.config import RunConfig, load_run
    from p2ptrain.errors import ConfigError
    from peers import chaos as role
    from peers import chaos_receipt
    from peers.faults import parse_kinds, parse_rate
    from peers.rehearsal import RehearsalFailed

    if max_peers < peers:
        raise ConfigError(f"--max-peers ({max_peers}) is less than --peers ({peers}); raise it")
    # Steps that take as long as those of a larger model; in a faster swarm newcomers are late for ever.
    settings = load_run(run) if run else RunConfig(run_id="rehearsal", target_batch_size=256)
    options = role.Options(
        run=settings,
        peers=peers,
        max_peers=max_peers,
        seconds=seconds,
        kinds=parse_kinds(faults),
        rate=parse_rate(rate),
        seed=seed,
        absence_seconds=absence,
        log_megabytes=log_megabytes,
        megabits=megabits,
        twin=chaos_receipt.read_twin(twin) if twin else None,
        peer=_peer(peer, corpus),
    )
    receipt = role.chaos(options, Console(highlight=False))
    typer.echo("\n" + "\n".join(chaos_receipt.receipt_lines(receipt)))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(receipt)))
    if receipt.problem:
        raise RehearsalFailed(receipt.problem)


@app.command()
def doctor(
    invite: Annotated[
        str, typer.Argument(help="Look at the way into this run, too; without it, at this machine only.")
    ] = "",
    peer: Annotated[Path | None, typer.Option(help="Peer file: how this machine would take part.")] = None,
    as_json: Json = False,
) -> None:
    """Say whether this machine can take part, and if not, the cause and what to do.

    Exit status 0: it can; else that of the first cause, as `join` would end with it.
    """
    from p2ptrain.config import PeerConfig, load_peer
    from p2ptrain.swarm.access import decode
    from peers import doctor as role

    entrance = decode(invite) if invite else None
    config = load_peer(peer) if peer else PeerConfig()
    checks = _run(
        role.examine(
            entrance,
            config,
            lambda check: _say("\n".join(role.lines(check))),
            lambda what: print(f"{what} …", file=sys.stderr, flush=True),
        )
    )
    code = role.exit_code(checks)
    _say("this machine can take part" if not code else "this machine cannot take part as it is")
    if as_json:
        typer.echo(json.dumps(role.plain(checks)))
    raise typer.Exit(code)


@app.command()
def plan(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file.")],
    peers: Annotated[int, typer.Option(min=1, help="How many peers train.")] = 4,
    uplink: Annotated[str, typer.Option(help="What each sends at, such as 20Mbit.")] = "20Mbit",
    downlink: Annotated[str, typer.Option(help="What each receives at.")] = "100Mbit",
    rtt: Annotated[float, typer.Option(min=0, max=10_000, help="Round trip between two peers, in ms.")] = 50,
    tokens_per_second: Annotated[
        float, typer.Option(min=0, help="What one peer computes; 0: measured on this machine.")
    ] = 0,
    peer: PeerFile = None,
    corpus: Corpus = "",
    as_json: Json = False,
) -> None:
    """Predict what a step, a day and joining cost over given links, and say what to change."""
    from p2ptrain.config import load_run
    from p2ptrain.protocol.forecast import Links
    from peers import plan as role

    run = load_run(run_file)
    links = Links(role.parse_rate(uplink), role.parse_rate(downlink), rtt / 1000)
    result = role.plan(run, peers, links, tokens_per_second, _peer(peer, corpus))
    typer.echo("\n".join(role.plan_lines(result, run)))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))


@app.command()
def bench(
    peers: Annotated[int, typer.Option(min=2, max=16, help="How many peers, as processes on loopback.")] = 2,
    megabytes: Annotated[
        float, typer.Option(min=0.1, max=1000, help="Size of the gradient that they average, as float32.")
    ] = 32,
    codecs: Annotated[str, typer.Option(help="Only these, with commas, and fp16, the default one.")] = "",
    as_json: Json = False,
) -> None:
    """Measure what this machine reaches, in rounds by codec over TLS, and what it would mean at home links.

    Takes a minute or two, of all cores. Ctrl-C ends it.
    """
    from peers import bench as role

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    report = role.bench(peers, megabytes, role.parse_codecs(codecs), tell)
    typer.echo("\n".join(role.report_lines(report)))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report)))


@app.command(hidden=True)
def bench_peer(number: int, folder: Path, peers: int, values: int, codecs: str, links: str) -> None:
    """One of the peers of `bench`, which starts it."""
    from p2ptrain.protocol.forecast import Links
    from peers import bench_peer as role

    home = [Links(**each) for each in json.loads(links)]
    _run(role.take_part(folder, number, peers, values, codecs.split(","), home))


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What the model goes on from.")],
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A checkpoint, or a folder of them: then the newest.")
    ] = None,
    router: Annotated[
        Path | None,
        typer.Option(
            help="Instead: what `adapters route train` wrote; it chooses the adapter by the prompt."
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=1, max=100_000, help="How many bytes or tokens it adds.")] = 300,
    temperature: Annotated[
        float, typer.Option(min=0, max=10, help="0: the likeliest only; 1: as learned.")
    ] = 0.7,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    peer: OwnPlaces = None,
    as_json: Json = False,
) -> None:
    """Let the model of a checkpoint write, or a base with the adapter that a router chooses."""
    if (checkpoint is None) == (router is None):
        from p2ptrain.errors import ConfigError

        raise ConfigError("give a checkpoint to write with, or else --router and its folder")
    if router is not None:
        from p2ptrain.adapters.routing import write

        written = write(router, prompt, length, temperature, seed)
        if as_json:
            typer.echo(json.dumps({"router": str(router), **dataclasses.asdict(written)}))
        else:
            typer.echo(f"by {written.choice} (confidence {written.confidence:.2f})", err=True)
            typer.echo(written.text)
        return
    assert checkpoint is not None
    from peers import models

    text = models.generate(checkpoint, prompt, length, temperature, seed, _peer(peer))
    typer.echo(json.dumps({"checkpoint": str(checkpoint), "text": text}) if as_json else text)


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a folder of them: then the newest.")],
    peer: OwnPlaces = None,
    corpus: Annotated[str, typer.Option(help="The data, if the run file gives it only a name.")] = "",
    as_json: Json = False,
) -> None:
    """Measure the model of a checkpoint on held-out data."""
    from peers import exporting

    measured = exporting.evaluate(checkpoint, _peer(peer, corpus))
    _say(f"{measured.run_id} at step {measured.step:,}, on {measured.data or 'its own data'}")
    for name, value in measured.figures.items():
        _say(f"  {name:<22} {value:.5g}")
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(measured)))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a folder of them: then the newest.")],
    to: Annotated[Path, typer.Option("--to", help="A new folder.")],
    peer: OwnPlaces = None,
    as_json: Json = False,
) -> None:
    """Write the model of a checkpoint as a folder for use elsewhere, with a model card.

    A causal_lm becomes one that the Hugging Face libraries load by from_pretrained.
    """
    from peers import exporting

    names = exporting.export(checkpoint, to, _peer(peer))
    typer.echo(json.dumps({"folder": str(to), "files": names}) if as_json else f"{to}: {', '.join(names)}")


def _peer(path: Path | None, corpus: str = "") -> PeerConfig:
    """What the peer file says, if there is one, with the text that an option names."""
    from p2ptrain.config import PeerConfig, load_peer

    settings = load_peer(path) if path else PeerConfig()
    return PeerConfig(**settings.model_dump(exclude_unset=True) | {"corpus": corpus}) if corpus else settings


@app.command()
def verify(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="A checkpoint, or a folder of them: then the newest.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Another, or INVITE or INVITE#PEER_ID: a live peer.")],
    peer: OwnPlaces = None,
    as_json: Json = False,
) -> None:
    """Say whether checkpoint A is the same as B, bit for bit, or where they first differ.

    A live peer may have gone on since: then its log must lead through A's state. Exit status 0: equal, or
    contained in the peer's log; 1: different; 4: the peer cannot be reached, or its log does not tell.
    """
    from p2ptrain.swarm.access import PREFIX, check, decode
    from peers import models

    if b.lstrip().startswith(PREFIX):
        invite, _, other = b.partition("#")
        check(entrance := decode(invite), time.time())
        verdict = _run(models.verify_live(a, entrance, other.strip(), _peer(peer)))
    else:
        verdict = models.verify(a, Path(b))
    typer.echo(f"{verdict.verdict}: {verdict.explanation}")
    if as_json:
        plain = {"first": verdict.first.model_dump(), "second": verdict.second.model_dump()}
        typer.echo(json.dumps(dataclasses.asdict(verdict) | plain))
    if verdict.verdict == "different":
        raise typer.Exit(1)


def _say(text: str) -> None:
    print(text, flush=True)


class _ToStderr(logging.Handler):
    """Writes to what `sys.stderr` is at the moment: a progress bar takes its place while it is there."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # as handlers do: a log that cannot be written ends nothing
            self.handleError(record)


def _run(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a role on uvloop, telling its story on stderr."""
    import asyncio

    try:
        import uvloop
    except ImportError:  # there is none for Windows
        factory = None
    else:
        factory = uvloop.new_event_loop
    _begin_log()
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def _end_now() -> NoReturn:
    """End, and wait for no thread: one that builds a model, or reads a dataset, cannot be stopped."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _begin_log() -> None:
    handler = _ToStderr()
    if _log_format is LogFormat.JSON:
        from p2ptrain.telemetry.logs import JsonLines

        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


monitor_cli.add_to(app, _run)


def main() -> None:
    """Entry point: a mistake, or a fault of a peer or the network, is one sentence and its exit code."""
    try:
        needed(app, sys.argv[1:])(prog_name="p2ptrain")
    except (P2PTrainError, BaseExceptionGroup) as error:
        fault = _fault_in(error)
        if fault is None:
            raise
        print(f"p2ptrain: {fault}", file=sys.stderr)
        sys.exit(fault.exit_code)


def _fault_in(error: BaseException) -> P2PTrainError | None:
    """The fault itself, also when task groups have wrapped it; None if there is something else in it."""
    if isinstance(error, P2PTrainError):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = [_fault_in(inner) for inner in error.exceptions]
        return None if None in found else found[0]
    return None
