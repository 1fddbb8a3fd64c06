"""`p2ptrain invite`: make, list and revoke invites, by the organizer's key and with nothing on the net."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2ptrain.errors import ConfigError
from p2ptrain.events import clean
from peers.places import user_data

if TYPE_CHECKING:  # the verbs import it when they run: help, and other commands, answer at once
    from p2ptrain.config import RunConfig
    from p2ptrain.records import Grant
    from peers import invites

app = typer.Typer(
    name="invite",
    help="Say who may come in: make, list and revoke invites to a run that you opened with bootstrap.",
    no_args_is_help=True,
)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file that the bootstrap serves.")]
DataDir = Annotated[str, typer.Option(help="The bootstrap's data folder, if it was given one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of output.")]


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
    name: Annotated[str, typer.Option(help="A note for yourself, such as whom it is for.")] = "",
    data_dir: DataDir = "",
    as_json: Json = False,
) -> None:
    """Make an invite. When its time is over, whoever came by it is put out."""
    from p2ptrain.config import load_run
    from p2ptrain.swarm.access import encode
    from peers import invites

    run, seconds = load_run(run_file), invites.parse_ttl(ttl)
    if len(name) > 64 or name == invites.LINK or not name.isprintable():
        raise ConfigError(f"--name {clean(name, 80)!r}: expected at most 64 printable characters, not 'link'")
    invite = invites.create(_folder(run, data_dir), run, role.value, seconds, name, int(time.time()))
    line = encode(invite)
    if as_json:
        typer.echo(json.dumps({**_facts(invite.grant), "invite": line}))
        return
    typer.echo(f"Invite {_described(invite.grant)}. Whoever has this line may use it:\n")
    typer.echo(f"    p2ptrain join {line}\n")


@app.command("list")
def list_(run_file: RunFile, data_dir: DataDir = "", as_json: Json = False) -> None:
    """Show all invites that were made."""
    from p2ptrain.config import load_run
    from peers import invites

    run = load_run(run_file)
    book = invites.read(_folder(run, data_dir))
    rows = [{**_facts(each.grant), "state": _state(each, run), "invite": each.line} for each in book.invites]
    if as_json:
        typer.echo(json.dumps({"public": book.public, "invites": rows}))
        return
    for each, row in zip(book.invites, rows, strict=True):
        typer.echo(f"{_described(each.grant)}: {row['state']}")
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


def _folder(run: RunConfig, data_dir: str) -> Path:
    return Path(data_dir).expanduser() if data_dir else user_data() / run.run_id


def _facts(grant: Grant) -> dict[str, Any]:
    return {
        "number": grant.serial,
        "name": grant.name,
        "role": grant.role,
        "issued": grant.issued,
        "expires": grant.expires,
    }


def _described(grant: Grant) -> str:
    name = f" ({clean(grant.name, 64)})" if grant.name else ""
    until = "for ever" if grant.expires is None else f"until {_date(grant.expires)}"
    return f"{grant.serial}{name}, role {grant.role}, {until}"


def _date(moment: int) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M} UTC"


def _state(issued: invites.Issued, run: RunConfig) -> str:
    from p2ptrain.config import run_digest
    from p2ptrain.swarm.access import untimely

    if issued.revoked:
        return "revoked"
    if untimely(issued.grant, time.time()):
        return "expired"
    return "valid" if issued.grant.run_digest == run_digest(run) else "of another version of the run file"
