"""`p2ptrain status`, `top`, `pause`, `resume`, `finish`, `leave` and `logs`: for the peer that runs here.

They load what answers at once and nothing that trains. With `--json` they print one JSON object, `logs` one a
line.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from p2ptrain.errors import ConfigError, StorageError
from peers import control
from peers.durations import parse_seconds

RunId = Annotated[str, typer.Argument(metavar="RUN", help="Name of its run, where several peers run here.")]
PeerFile = Annotated[Path | None, typer.Option(help="The peer file that it was started with.")]
DataDir = Annotated[str, typer.Option(help="Its data folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

FOLLOW_SECONDS = 0.25
MOST_NEWS = 200
"""Lines of the journal that `top` takes at once."""
STATES = {
    "joining": "joining",
    "catching_up": "catching up",
    "accumulating": "training",
    "averaging": "training (averaging)",
    "paused": "paused",
    "leaving": "leaving after this round",
}


def add_to(app: typer.Typer) -> None:
    """Make these verbs the app's own."""
    for verb in (status, top, pause, resume, finish, leave, logs):
        app.command(rich_help_panel="The peer that runs on this machine")(verb)


def status(run: RunId = "", peer: PeerFile = None, data_dir: DataDir = "", as_json: Json = False) -> None:
    """Say how the running peer stands."""
    answer = control.ask(control.find(run, data_dir, peer), {"ask": "status"})
    typer.echo(json.dumps(answer) if as_json else "\n".join(status_lines(answer, time.time())))


def top(run: RunId = "", peer: PeerFile = None, data_dir: DataDir = "") -> None:
    """Watch the running peer on the whole screen; keys pause, resume, finish and leave."""
    folder = control.find(run, data_dir, peer)
    control.ask(folder, {"ask": "status"})  # whether there is one, before the screen is taken
    try:
        from peers.top import Top
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"`p2ptrain top` needs {missing.name}, which is not installed; pip install 'p2ptrain[tui]'"
        ) from None
    from peers.chronicle import Tail

    tail = Tail(folder / "journal.jsonl")
    Top(folder, lambda: list(_log_lines(tail.read()[-MOST_NEWS:], as_json=False))).run()


def pause(
    run: RunId = "",
    for_: Annotated[
        str, typer.Option("--for", help="Resume by itself after this time: 30m, 2h, 1d; else never.")
    ] = "",
    peer: PeerFile = None,
    data_dir: DataDir = "",
    as_json: Json = False,
) -> None:
    """Stop computing until `resume`; what is computed goes into the round under way, and nobody waits."""
    if (seconds := parse_seconds(for_)) is None and for_:
        raise ConfigError(f"--for {for_!r}: expected a time such as 30m, 2h or 1d")
    _order(control.find(run, data_dir, peer), {"ask": "pause", "seconds": seconds}, as_json)


def resume(run: RunId = "", peer: PeerFile = None, data_dir: DataDir = "", as_json: Json = False) -> None:
    """End a pause that you asked for."""
    _order(control.find(run, data_dir, peer), {"ask": "resume"}, as_json)


def finish(run: RunId = "", peer: PeerFile = None, data_dir: DataDir = "", as_json: Json = False) -> None:
    """Leave when the step under way is done, however long that takes."""
    _order(control.find(run, data_dir, peer), {"ask": "finish"}, as_json)


def leave(run: RunId = "", peer: PeerFile = None, data_dir: DataDir = "", as_json: Json = False) -> None:
    """Leave as by Ctrl-C: the round under way has a few seconds to end."""
    _order(control.find(run, data_dir, peer), {"ask": "leave"}, as_json)


def logs(
    run: RunId = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens next.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last events.")] = 50,
    peer: PeerFile = None,
    data_dir: DataDir = "",
    as_json: Json = False,
) -> None:
    """Tell what happened to the peer; with its data folder, also to one that runs no longer."""
    from p2ptrain.telemetry.journal import older
    from peers.chronicle import Tail

    path = control.find(run, data_dir, peer) / "journal.jsonl"
    if not path.exists():
        raise StorageError(f"there is no journal {path}; name the folder of a peer that ran")
    tail = Tail(path)
    now = tail.read()
    before = Tail(older(path)).read() if len(now) < lines else []
    for line in deque(_log_lines([*before, *now], as_json), maxlen=lines):
        typer.echo(line)
    try:
        while follow:
            time.sleep(FOLLOW_SECONDS)
            for line in _log_lines(tail.read(), as_json):
                typer.echo(line)
    except KeyboardInterrupt:
        return


def _order(folder: Path, request: dict[str, Any], as_json: bool) -> None:
    answer = control.ask(folder, request)
    if as_json:
        typer.echo(json.dumps(answer))
        return
    match request["ask"], answer["pauses"]:
        case (("finish" | "leave"), _):
            typer.echo("the peer leaves when its round is done")
        case "resume", []:
            typer.echo("the peer trains")
        case _, pauses:
            typer.echo("\n".join(pause_lines(pauses, time.time())))


# -- what a person reads -------------------------------------------------------------------------------------


def pause_lines(pauses: Iterable[Mapping[str, Any]], now: float) -> list[str]:
    """Why the peer is paused, and when that ends."""
    from p2ptrain.events import duration

    lines = []
    for each in pauses:
        ends = each["resumes"]
        if each["until"] is not None:
            at = f"{datetime.fromtimestamp(each['until']):%H:%M}"
            ends = f"in {duration(max(each['until'] - now, 0))}, at {at}"
        lines.append(f"paused: {each['because']}; resumes {ends}")
    return lines


def status_lines(status: Mapping[str, Any], now: float) -> list[str]:
    """A status for a person, the most important first."""
    from p2ptrain.events import clean, duration

    since = duration(status["seconds"])
    lines = [f"{STATES[status['state']]}: {status['run_id']} for {since}, in {status['data_dir']}"]
    lines += pause_lines(status["pauses"], now)
    if "step" not in status:  # there is no replica yet
        return lines
    if status["pauses"] and not status["aside"]:
        lines.append("what it has computed waits for the round under way")
    if status["waiting"]:
        lines.append(f"waiting: {clean(status['waiting'])}")
    if (progress := status["catching_up"]) is not None:
        lines.append(
            f"catching up: {progress['done_bytes'] / 1e6:,.1f} of {progress['total_bytes'] / 1e6:,.1f} MB"
        )
    return [*lines, *(f"  {name:<10} {text}" for name, text in status_rows(status).items())]


def status_rows(status: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a peer that has a replica, by name."""
    from p2ptrain.events import clean, duration, short

    carriers = list(status["carriers"].items())
    rows = {
        "peer": f"{short(status['peer'])} {clean(status['name'], 64)}".strip(),
        "step": f"{status['step']:,} of {status['total_steps']:,}, lineage {status['lineage'][:8]}",
        "given": f"{status['samples']:,} samples in {status['rounds']:,} rounds",
        "data": _data_words(status.get("data")),
        "loss": f"{_number(status['loss'])}, held out {_number(status['heldout_loss'])}",
        "speed": f"{status['samples_per_second']:,.1f} samples/s of the swarm's "
        f"{status['swarm_samples_per_second']:,.1f}",
        "batch": _batch(status.get("target_batch_size"), status.get("noise_scale")),
        "upload": _traffic(status["sent_bytes"], status["sent_bytes_per_second"]),
        "download": _traffic(status["received_bytes"], status["received_bytes_per_second"]),
        "peers": f"{status['roster']} in the last round, {_links(status)}",
        "gradients": ", ".join(f"{short(peer)} {carrier}" for peer, carrier in carriers[:8])
        + (f" and {len(carriers) - 8} more" if len(carriers) > 8 else ""),
        "left out": "; ".join(
            f"{short(peer)}, as {clean(reason, 100)}" for peer, reason in status.get("left_out", {}).items()
        ),
        "reach": "behind NAT or a firewall" if status["hidden"] else "",
        "page": clean(status.get("page", ""), 300),
        "deadlines": ", ".join(
            f"{name.removesuffix('_seconds')} {duration(seconds)}"
            for name, seconds in status["deadlines"].items()
        ),
    }
    return {name: text for name, text in rows.items() if text}


def _data_words(data: Mapping[str, int] | None) -> str:
    if data is None:
        return ""
    words = f"{data['unique']:,} samples counted, each once" if not data["repeated"] else ""
    words = words or f"{data['unique']:,} samples counted, {data['repeated']:,} of them twice"
    lost = f", {data['lost']:,} lost (not finite)" if data["lost"] else ""
    return f"{words}{lost}; {data['returned']:,} given back and next"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _batch(size: int | None, noise_scale: float | None) -> str:
    if size is None:  # a peer of an older version does not say
        return ""
    scale = "" if noise_scale is None else f", noise scale {noise_scale:,.0f} (see `p2ptrain batch advise`)"
    return f"{size:,} samples a step{scale}"


def _traffic(total: int, per_second: float) -> str:
    return f"{total / 1e6:,.1f} MB, {per_second * 8 / 1e6:,.2f} Mbit/s"


def _links(status: Mapping[str, Any]) -> str:
    ways = ", ".join(f"{count} {path}" for path, count in sorted(status["links"].items()) if count)
    return f"{status['connected']} connected{f' ({ways})' if ways else ''}"


def _log_lines(records: Iterable[Mapping[str, Any]], as_json: bool) -> Iterable[str]:
    """Each as its sentence, those for debugging left out; or as it is."""
    from p2ptrain.events import clean, from_dict

    for record in records:
        if as_json:
            yield json.dumps(record)
            continue
        event = from_dict(record)
        if event is None:
            yield f"{_clock(record)} {clean(json.dumps(record))}"
        elif event.level >= logging.INFO:
            yield f"{_clock(record)} {event.sentence()}"


def _clock(record: Mapping[str, Any]) -> str:
    """When it happened, by this machine's clock and zone."""
    try:
        return f"{datetime.fromisoformat(str(record.get('time'))).astimezone():%m-%d %H:%M:%S}"
    except ValueError:
        return "--:--:--"
