"""`p2ptrain identity`: who this machine's peer is in a run, to keep and to take to another machine.

A peer's samples and its place in others' logs go by its id, and the id by a key in one file. Whoever has that
file is that peer; two that run with it at once are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from p2ptrain.errors import ConfigError, StorageError
from peers.places import made, user_data

app = typer.Typer(name="identity", help="Show, keep and restore a peer's key.", no_args_is_help=True)

KEY = "identity.key"
Run = Annotated[str, typer.Argument(metavar="RUN", help="The run's name, where there are several here.")]
DataDir = Annotated[str, typer.Option(help="The peer's data folder, if it was given one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def show(run: Run = "", data_dir: DataDir = "", as_json: Json = False) -> None:
    """Print the peer's id, by which others know it."""
    from p2ptrain.swarm.identity import load

    path = _folder(run, data_dir) / KEY
    peer_id = load(path).peer_id
    typer.echo(json.dumps({"peer": peer_id, "file": str(path)}) if as_json else peer_id)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="Where to put the key; there must be nothing yet.")],
    run: Run = "",
    data_dir: DataDir = "",
) -> None:
    """Copy the peer's key to FILE. Keep it secret: who has it can pass for this peer."""
    from p2ptrain.swarm.identity import load, store

    identity = load(_folder(run, data_dir) / KEY)
    store(identity, file)
    typer.echo(f"the key of {identity.peer_id} is in {file}; `p2ptrain identity import` takes it elsewhere")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="What `identity export` wrote.")],
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run that the peer is for.")] = "",
    data_dir: DataDir = "",
) -> None:
    """Let the peer of this machine be the one whose key is in FILE."""
    from p2ptrain.swarm.identity import load, store
    from peers import control

    if not run and not data_dir:
        raise ConfigError("say for which run: `p2ptrain identity import FILE RUN`, or --data-dir FOLDER")
    identity = load(file)
    folder = made(Path(data_dir).expanduser() if data_dir else user_data() / run)
    if any(each.folder == folder.absolute() for each in control.running()):
        raise ConfigError(f"a peer runs with {folder}; end it first with `p2ptrain leave`")
    store(identity, folder / KEY)
    typer.echo(f"the peer in {folder} is now {identity.peer_id}; let it run on one machine only")


def _folder(run: str, data_dir: str) -> Path:
    """The data folder that is meant: the only one with a key if none is named. Raises ConfigError."""
    if data_dir:
        return Path(data_dir).expanduser()
    if run:
        return user_data() / run
    found = sorted(path.parent for path in user_data().glob(f"*/{KEY}"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise StorageError(f"there is no peer's key in {user_data()}; `p2ptrain join INVITE` makes one")
    names = ", ".join(path.name for path in found)
    raise ConfigError(f"{len(found)} peers have a key here: {names}; say which by its run's name")
