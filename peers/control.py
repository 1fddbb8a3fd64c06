"""How to find a peer that runs on this machine, and to ask it something: one JSON line each way over a Unix
socket in its data folder, which only its owner can open.

Each running peer leaves a link to its folder in `RUNNING`, so that it is found wherever its folder is. The
path of a Unix socket is short: where a folder's is too long, the socket is in a temporary folder of its own,
and a link to it in its place. Nothing here loads more than the standard library: answers come at once.

Not covered: other users of this machine, and Windows.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from p2ptrain.errors import ConfigError, NotRunning, P2PTrainError
from peers.places import user_data

SOCKET = "control.sock"
LOCK = "control.lock"
"""Held by the process that uses a data folder; the kernel lets go of it when that one dies."""
MAX_PATH_BYTES = 100
"""Of a socket: macOS allows 103, Linux 107."""
MAX_REQUEST_BYTES = 4096
MAX_ANSWER_BYTES = 2**20
ANSWER_SECONDS = 5.0
MAX_RUNNING = 256
"""Links that are looked at; those of peers that were killed stay."""


@dataclass(frozen=True)
class Running:
    """A peer that runs here, as its link tells."""

    run_id: str
    folder: Path


# -- where things are ----------------------------------------------------------------------------------------


def running_folder() -> Path:
    """Where running peers leave their links."""
    return user_data() / ".running"


def link_name(run_id: str, folder: Path) -> str:
    """Of a peer's link: the run's name, which tells it apart for people, and the folder's hash."""
    return f"{run_id}.{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}"


def socket_path(folder: Path) -> Path:
    """Where the socket is that belongs to this data folder, if there is one."""
    place = folder / SOCKET
    return Path(os.readlink(place)) if place.is_symlink() else place


def running() -> list[Running]:
    """Every peer that runs here."""
    return [each for each in islice(_links(), MAX_RUNNING) if _listens(each.folder)]


def _links() -> Iterator[Running]:
    try:
        links = sorted(running_folder().iterdir())
    except OSError:
        return
    for link in links:
        run_id, dot, _ = link.name.rpartition(".")
        if dot and link.is_symlink():
            yield Running(run_id, Path(os.readlink(link)))


def _listens(folder: Path) -> bool:
    try:
        _connect(folder, ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


# -- which one -----------------------------------------------------------------------------------------------


def choose(candidates: Sequence[Running], run_id: str) -> Running:
    """The one that is meant; `run_id` may be empty if there is only one. Raises NotRunning or ConfigError."""
    fitting = [each for each in candidates if run_id in ("", each.run_id)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        others = f" (but of {', '.join(sorted({each.run_id for each in candidates}))})" if candidates else ""
        what = f"no peer of run {run_id}" if run_id else "no peer"
        raise NotRunning(
            f"{what} runs on this machine for this user{others}; start one with `p2ptrain join INVITE`"
        )
    folders = "; ".join(f"{each.run_id} in {each.folder}" for each in fitting)
    raise ConfigError(
        f"{len(fitting)} peers run here: {folders}; say which with its run's name or --data-dir"
    )


def find(run_id: str, data_dir: str, peer_file: Path | None) -> Path:
    """The data folder of the peer that is meant. Raises NotRunning or ConfigError."""
    if data_dir or (data_dir := _data_dir_in(peer_file)):
        return Path(data_dir).expanduser()
    return choose(running(), run_id).folder


def _data_dir_in(peer_file: Path | None) -> str:
    """What a peer file says about its folder. What else is in it, its peer has checked at its start."""
    if peer_file is None:
        return ""
    try:
        settings = tomllib.loads(peer_file.read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {peer_file}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{peer_file} is not valid TOML: {error}") from None
    return str(settings.get("data_dir", ""))


# -- asking --------------------------------------------------------------------------------------------------


def ask(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What the peer with this data folder answers. Raises NotRunning if there is none, or it does not answer
    in time, and whatever the peer says was wrong with the request."""
    try:
        with _connect(folder, ANSWER_SECONDS) as connection:
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(_read(connection))
    except TimeoutError:
        raise NotRunning(
            f"the peer in {folder} does not answer within {ANSWER_SECONDS:g} s: it hangs, or is stopped; "
            "look at its log, or end its process"
        ) from None
    except (OSError, ValueError):
        raise NotRunning(
            f"no peer runs with the data folder {folder}; start one with `p2ptrain join INVITE`"
        ) from None
    if "error" in answer:
        raise P2PTrainError(str(answer["error"]))
    return dict(answer)


def _connect(folder: Path, seconds: float) -> socket.socket:
    """Raises OSError if nobody listens there."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(seconds)
    try:
        connection.connect(str(socket_path(folder)))
    except OSError:
        connection.close()
        raise
    return connection


def _read(connection: socket.socket) -> bytes:
    """All that comes until the other end closes. Raises TimeoutError, ValueError."""
    deadline, answer = time.monotonic() + ANSWER_SECONDS, b""
    while block := connection.recv(65536):
        answer += block
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        if len(answer) > MAX_ANSWER_BYTES:
            raise ValueError
    return answer
