"""`p2ptrain invite`: make, list and end invites, by the organizer's key and with nothing on the net."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2ptrain.errors import ConfigError
from peers.durations import parse_seconds
from peers.places import user_data

if TYPE_CHECKING:  # the verbs import it when they run: help, and other commands, answer at once
    from p2ptrain.config import RunConfig
    from p2ptrain.records import Grant
    from peers import invites

app = typer.Typer(
    name="invite",
    help="Say who may come in: make, list and end invites to a run that you opened with bootstrap.",
    no_args_is_help=True,
)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file that the bootstrap serves.")]
DataDir = Annotated[str, typer.Option(help="The bootstrap's data folder, if it was given one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of output.")]


THERE_SECONDS = 600


class Role(StrEnum):
    TRAIN = "train"
    SERVE = "serve"
    WATCH = "watch"


@app.command()
def create(
    run_file: RunFile,
    role: Annotated[
        Role,
        typer.Option(help="train: everything; serve: may take the state; watch: may see where it stands."),
    ] = Role.TRAIN,
    ttl: Annotated[str, typer.Option(help="How long it holds: 30m, 24h, 7d or never.")] = "30d",
    uses: Annotated[
        int,
        typer.Option(min=0, max=10_000, help="For how many peers; 0: for any number.", show_default=False),
    ] = 0,
    name: Annotated[str, typer.Option(help="A note for yourself, such as whom it is for.")] = "",
    qr: Annotated[bool, typer.Option("--qr", help="Show it as a QR code as well.")] = False,
    data_dir: DataDir = "",
    as_json: Json = False,
) -> None:
    """Make an invite. When its time is over, whoever came by it is put out.

    With --uses the bootstrap counts: it must run when a peer comes by it for the first time.
    """
    from p2ptrain.config import load_run
    from p2ptrain.events import clean
    from p2ptrain.swarm.access import encode
    from peers import invites

    run, seconds = load_run(run_file), invites.parse_ttl(ttl)
    if len(name) > 64 or name == invites.LINK or not name.isprintable():
        raise ConfigError(f"--name {clean(name, 80)!r}: expected at most 64 printable characters, not 'link'")
    folder, now = _folder(run, data_dir), int(time.time())
    invite = invites.create(folder, run, role.value, seconds, name, now, uses=uses or None)
    line = encode(invite)
    if as_json:
        typer.echo(json.dumps({**_facts(invite.grant), "invite": line}))
        return
    typer.echo(f"Invite {_described(invite.grant)}. Whoever has this line may use it:\n")
    typer.echo(f"    p2ptrain join {line}\n")
    if qr:
        typer.echo(qr_code(line))


@app.command("list")
def list_(run_file: RunFile, data_dir: DataDir = "", as_json: Json = False) -> None:
    """Show all invites that were made."""
    from p2ptrain.config import load_run
    from peers import invites

    run = load_run(run_file)
    book = invites.read(_folder(run, data_dir))
    rows = [
        {
            **_facts(each.grant),
            "used": len(each.used_by),
            "state": _state(book, each, run),
            "invite": each.line,
        }
        for each in book.invites
    ]
    if as_json:
        typer.echo(json.dumps({"public": book.public, "invites": rows}))
        return
    for each, row in zip(book.invites, rows, strict=True):
        used = f", used by {row['used']}" if each.grant.uses else ""
        typer.echo(f"{_described(each.grant)}{used}: {row['state']}")
    if not rows:
        typer.echo(
            "no invite yet; the bootstrap makes the first at its start, and `p2ptrain invite create` more"
        )


@app.command()
def revoke(
    run_file: RunFile,
    numbers: Annotated[list[int], typer.Argument(min=1, help="As `p2ptrain invite list` shows them.")],
    data_dir: DataDir = "",
    as_json: Json = False,
) -> None:
    """Take invites back: who came by them is put out once the running bootstrap has told the swarm."""
    from p2ptrain.config import load_run
    from peers import invites

    folder = _folder(load_run(run_file), data_dir)
    book = invites.revoke(folder, numbers)
    assert book.revocations is not None
    if as_json:
        typer.echo(json.dumps({"revoked": list(book.revocations.serials)}))
        return
    typer.echo(
        f"revoked: {', '.join(map(str, numbers))}. The bootstrap tells the swarm within seconds, or when it "
        "is next started"
    )


@app.command()
def rotate(
    run_file: RunFile,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PEER",
            help="Only these stay, by their ids or the ends of them; may be repeated. Else: all who were "
            "there in the last ten minutes.",
        ),
    ] = None,
    nobody: Annotated[bool, typer.Option("--nobody", help="Keep nobody.")] = False,
    grace: Annotated[
        str,
        typer.Option(
            help="How long passes by the old key still hold: 30s, 10m; so long, who stays has to "
            "be given another."
        ),
    ] = "10m",
    data_dir: DataDir = "",
    as_json: Json = False,
) -> None:
    """Replace the organizer's key, and with it all invites: no old line lets anybody in any more.

    Peers who stay are given new passes by the running bootstrap and notice nothing; all others are put out
    when the grace is over, and need a new invite. Do this when a line or the key has got into wrong hands;
    whoever has the old key can do it too, so be the first.
    """
    from p2ptrain.config import load_run
    from p2ptrain.events import clean, short
    from p2ptrain.records import PeerId
    from peers import invites, present

    run = load_run(run_file)
    folder, now = _folder(run, data_dir), int(time.time())
    if (seconds := parse_seconds(grace)) is None:
        raise ConfigError(f"--grace {grace!r}: expected a time such as 30s or 10m")
    if nobody and keep:
        raise ConfigError("--nobody and --keep exclude each other; give one of them")
    seen = present.read(folder)
    there = [PeerId(each.peer) for each in seen if each.at > now - THERE_SECONDS and each.role != "bootstrap"]
    kept = [] if nobody else [present.resolve(word, seen) for word in keep] if keep else there
    book = invites.rotate(folder, run, kept, now + seconds, now)
    assert book.succession is not None
    link = book.link(run)
    if as_json:
        facts = {"organizer": book.succession.successor, "ends": book.succession.ends, "kept": book.kept}
        typer.echo(json.dumps({**facts, "invite": link.line if link else None}))
        return
    names = {each.peer: clean(each.name, 64) for each in seen}
    stay = ", ".join(f"{short(PeerId(peer))} {names.get(peer, '')}".strip() for peer in book.kept) or "nobody"
    typer.echo(f"The organizer's key is another one. Old invites let nobody in; who stays: {stay}.")
    typer.echo("The bootstrap has to run until those who stay have new passes, which takes seconds.\n")
    if link is not None:
        typer.echo(f"The run's new link:\n\n    p2ptrain join {link.line}\n")


def qr_code(line: str) -> str:
    """The line as a QR code of half blocks, for a terminal of some 120 columns."""
    import io

    import segno

    picture = io.StringIO()
    segno.make(line, error="l").terminal(picture, border=2, compact=True)
    return picture.getvalue()


def _folder(run: RunConfig, data_dir: str) -> Path:
    return Path(data_dir).expanduser() if data_dir else user_data() / run.run_id


def _facts(grant: Grant) -> dict[str, Any]:
    return {
        "number": grant.serial,
        "name": grant.name,
        "role": grant.role,
        "issued": grant.issued,
        "expires": grant.expires,
        "uses": grant.uses,
    }


def _described(grant: Grant) -> str:
    from p2ptrain.events import clean, counted

    name = f" ({clean(grant.name, 64)})" if grant.name else ""
    until = "for ever" if grant.expires is None else f"until {_date(grant.expires)}"
    uses = f", for {counted(grant.uses, 'peer')}" if grant.uses else ""
    return f"{grant.serial}{name}, role {grant.role}, {until}{uses}"


def _date(moment: int) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M} UTC"


def _state(book: invites.Book, issued: invites.Issued, run: RunConfig) -> str:
    from p2ptrain.config import run_digest
    from p2ptrain.swarm.access import untimely

    if issued.revoked:
        return "revoked"
    if not book.holds(issued.grant):
        return "of the organizer's old key"
    if untimely(issued.grant, time.time()):
        return "expired"
    return "valid" if issued.grant.run_digest == run_digest(run) else "of another version of the run file"
