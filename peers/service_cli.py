"""`p2ptrain service`: the peer as a systemd user service, which starts with the machine's user and comes back
after a fault, but not after one that would only come again.

Not covered: system services and other systems than Linux with systemd; `docker/` has units for those who
manage many machines.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from p2ptrain.errors import P2PTrainError, StorageError

app = typer.Typer(name="service", help="Run the peer as a systemd user service.", no_args_is_help=True)

SYSTEMCTL_SECONDS = 30.0

UNIT = """\
# Made by `p2ptrain service install`; what you change here it would overwrite, so use `systemctl --user edit`.
[Unit]
Description=p2ptrain peer in {run_id}

[Service]
Type=simple
EnvironmentFile={environment}
ExecStart={command}

# What will not mend itself is not tried again: setting or invite (2), another run or version (3), training
# data (5), disk (6), checkpoint (7), a port that is taken (8), the device (10). A swarm out of reach (4)
# is: at login the network may not be up yet, and a user service cannot wait for it.
Restart=on-failure
RestartSec=30
RestartPreventExitStatus=2 3 5 6 7 8 9 10

# Like Ctrl-C, and to our process alone: it finishes the round and then ends the libp2p daemon itself.
KillSignal=SIGINT
KillMode=mixed
TimeoutStopSec=2min

# The machine is its owner's first.
Nice=10
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native

[Install]
WantedBy=default.target
"""


@app.command()
def install(
    invite: Annotated[str, typer.Argument(help="The one line that the organizer gave you.")],
    peer: Annotated[Path | None, typer.Option(help="Peer file: how this machine takes part.")] = None,
    data_dir: Annotated[str, typer.Option(help="Folder for the peer's key, checkpoints and journal.")] = "",
    print_: Annotated[bool, typer.Option("--print", help="Show the unit and change nothing.")] = False,
    start: Annotated[bool, typer.Option("--start/--no-start", help="Enable and start it, too.")] = True,
) -> None:
    """Write a systemd user unit for the peer that INVITE lets in, and start it.

    The invite, which is a secret, goes to a file of its own that only you can read.
    """
    import time

    from p2ptrain.config import load_peer
    from p2ptrain.swarm.access import check, decode

    check(entrance := decode(invite), time.time(), role="train")
    if peer is not None:
        load_peer(peer)  # a mistake in it is told now, and not to a log that nobody reads
    run_id = entrance.run_id
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    environment = base / "p2ptrain" / f"{run_id}.env"
    text = unit(run_id, environment, program(), peer.absolute() if peer else None, data_dir)
    if print_:
        typer.echo(text, nl=False)
        return
    name = f"p2ptrain-{run_id}"
    place = base / "systemd" / "user" / f"{name}.service"
    _write(environment, f"P2PTRAIN_INVITE={invite.strip()}\n", 0o600)
    _write(place, text, 0o644)
    typer.echo(f"{place} is written")
    if start:
        _systemctl("daemon-reload")
        _systemctl("enable", "--now", name)
        typer.echo(f"it runs; `p2ptrain status {run_id}` shows how it stands")
    else:
        typer.echo(f"start it with: systemctl --user daemon-reload && systemctl --user enable --now {name}")
    typer.echo("it runs while you are logged in; with `loginctl enable-linger`, always")
    typer.echo(f"end it for good with: systemctl --user disable --now {name}")


def unit(run_id: str, environment: Path, command: str, peer: Path | None, data_dir: str) -> str:
    """The unit's text; `command`: the installed program."""
    words = [_quoted(command), "join", "${P2PTRAIN_INVITE}"]
    words += ["--peer", _quoted(str(peer))] if peer else []
    words += ["--data-dir", _quoted(str(Path(data_dir).expanduser().absolute()))] if data_dir else []
    return UNIT.format(run_id=run_id, environment=_escaped(str(environment)), command=" ".join(words))


def program() -> str:
    """The installed command, as this process was started by it or as it lies beside this Python."""
    beside = Path(sys.executable).parent / "p2ptrain"
    return str(beside) if beside.exists() else shutil.which("p2ptrain") or "p2ptrain"


def _escaped(text: str) -> str:
    return text.replace("%", "%%")  # else systemd takes it for a specifier


def _quoted(text: str) -> str:
    text = _escaped(text).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{text}"' if set(text) & set(" \t;'\"\\") else text


def _write(path: Path, text: str, mode: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
            file.write(text)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror}; make its folder writable, or see --print"
        ) from None


def _systemctl(*words: str) -> None:
    command = ["systemctl", "--user", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SYSTEMCTL_SECONDS, check=False)
        said = done.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        said, done = str(error), None
    if done is None or done.returncode:
        raise P2PTrainError(
            f"the unit is written, but `{' '.join(command)}` failed ({said or 'no reason given'}); "
            "run it yourself where systemd runs for your user"
        )
