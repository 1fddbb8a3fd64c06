"""`p2ptrain run`: what the organizer says to everybody in a run, by the organizer's key and from any time on
when the bootstrap runs to tell it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from p2ptrain.errors import ConfigError
from p2ptrain.events import clean, short
from peers.durations import parse_seconds
from peers.places import user_data

app = typer.Typer(
    name="run",
    help="Say what holds for a run that you opened with bootstrap: who is put out of it.",
    no_args_is_help=True,
)

Run = Annotated[str, typer.Option("--run", metavar="RUN", help="Its name, where you organize several here.")]
DataDir = Annotated[str, typer.Option(help="The bootstrap's data folder, if it was given one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of output.")]

KICK_TIME = "1h"


@app.command()
def kick(
    peer: Annotated[str, typer.Argument(metavar="PEER", help="Its id, or the end of it, as logs show it.")],
    ban: Annotated[bool, typer.Option("--ban", help="For good.")] = False,
    for_: Annotated[
        str, typer.Option("--for", help="For how long, if not for good: 30m, 1h, 7d.")
    ] = KICK_TIME,
    reason: Annotated[str, typer.Option(help="It and all others are told.")] = "",
    lift: Annotated[bool, typer.Option("--lift", help="Let it come back now.")] = False,
    run: Run = "",
    data_dir: DataDir = "",
    as_json: Json = False,
) -> None:
    """Put a peer out of the run, whatever invite it shows.

    An id costs nothing: who has the line of an invite can come again under another one, until the invite is
    revoked.
    """
    from peers import invites, present

    if (seconds := parse_seconds(for_)) is None:
        raise ConfigError(f"--for {for_!r}: expected a time such as 30m, 1h or 7d; for good is --ban")
    folder, now = organized(run, data_dir), int(time.time())
    seen = present.read(folder)
    who = present.resolve(peer, seen)
    until = None if ban else now + seconds
    kicks = invites.lift(folder, who, now) if lift else invites.kick(folder, who, until, reason, now)
    if as_json:
        typer.echo(json.dumps({"peer": who, "kicks": [each.model_dump() for each in kicks]}))
        return
    name = next((clean(each.name, 64) for each in seen if each.peer == who), "")
    whom = f"{short(who)} {name}".strip()
    when = "The bootstrap tells the swarm within seconds, or when it is next started"
    typer.echo(
        f"{whom} may come back. {when}"
        if lift
        else f"{whom} is put out {'for good' if ban else f'for {for_}'}. {when}"
    )
    came_by = next((each.invite for each in seen if each.peer == who), None)
    if came_by and not lift:
        typer.echo(
            f"It came by invite {came_by}, and who has that line can come again under another id; "
            f"`p2ptrain invite revoke RUN.toml {came_by}` puts out all who came by it"
        )


def organized(run: str, data_dir: str) -> Path:
    """The folder with the organizer's key of that run: the only one on this machine if none is named. Raises
    ConfigError."""
    from peers.invites import ORGANIZER

    if data_dir:
        return Path(data_dir).expanduser()
    if run:
        return user_data() / run
    found = sorted(path.parent for path in user_data().glob(f"*/{ORGANIZER}"))
    if len(found) != 1:
        those = f": {', '.join(path.name for path in found)}" if found else ""
        raise ConfigError(
            f"{len(found)} runs have been opened on this machine by this user{those}; say which with "
            "--run, or --data-dir if the bootstrap was given one"
        )
    return found[0]
