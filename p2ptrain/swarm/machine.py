"""This machine, to whoever listens on it: addresses, ports, and files that are one process's own."""

from __future__ import annotations

import errno
import fcntl
import re
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from p2ptrain.errors import ConfigError, LocalFault, PortBusy, StorageError
from p2ptrain.swarm.holders import lock_holder, port_holder

_LISTEN = re.compile(r"/(ip4|ip6)/([^/]+)/tcp/(\d{1,5})")
_ADDRESS = re.compile(r"/ip[46]/([0-9A-Fa-f.:]+)/")


def host_of(address: str) -> str:
    """The IP address to listen on in a multiaddress. Raises ConfigError."""
    return _listening(address)[2]


def hosts_of(addresses: Sequence[str]) -> list[str]:
    """The IP addresses in multiaddresses that lead here, not to a relay, each once."""
    ours = [_ADDRESS.match(address) for address in addresses if "/p2p-circuit" not in address]
    return list(dict.fromkeys(found[1] for found in ours if found is not None))


def is_loopback(address: str) -> bool:
    return address.startswith(("/ip4/127.", "/ip6/::1/"))


def _listening(address: str) -> re.Match[str]:
    """Family, IP address and port of a listen address. Raises ConfigError."""
    parts = _LISTEN.fullmatch(address)
    if parts is None or int(parts[3]) > 65535:
        raise ConfigError(
            f"listen address {address!r}: expected an IP address and TCP port, such as /ip4/0.0.0.0/tcp/31337"
        )
    return parts


def reserved(address: str) -> tuple[str, socket.socket]:
    """This listen address, with port 0 replaced by a free one, and a socket that keeps the port for us.

    p2pd shares its port with whoever else wants it (SO_REUSEPORT), so it would not notice that it is taken.
    """
    parts = _listening(address)
    family = socket.AF_INET if parts[1] == "ip4" else socket.AF_INET6
    keeper = socket.socket(family)
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bind(probe, parts[2], int(parts[3]))
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bind(keeper, parts[2], int(parts[3]))
    except OSError as error:
        keeper.close()
        if error.errno == errno.EADDRINUSE:
            raise PortBusy(
                f"{address} is taken by {port_holder(int(parts[3]))}; stop that one, or choose another port "
                "in `listen`"
            ) from None
        raise LocalFault(
            f"cannot listen on {address}: {error.strerror}; choose another address or port in `listen`"
        ) from None
    return f"/{parts[1]}/{parts[2]}/tcp/{keeper.getsockname()[1]}", keeper


def bind(listener: socket.socket, host: str, port: int) -> None:
    """To that address and no other: one of IPv6 takes nothing of IPv4's. Raises OSError."""
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind((host, port))


def sole_user(identity: Path) -> BinaryIO:
    """The identity file, held open so that a second p2ptrain on this machine does not use it too."""
    file = identity.open("rb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise LocalFault(
            f"the identity {identity} is in use on this machine by {lock_holder(identity)}; "
            "stop that one, or give this one a data_dir, and so an identity file of its own"
        ) from None
    return file


def private_directory() -> tempfile.TemporaryDirectory[str]:
    """A folder for sockets, ours alone. Its path is short: that of a socket has at most 107 characters."""
    folder = tempfile.gettempdir()
    if len(folder) > 40:
        folder = "/tmp"  # noqa: S108 - the folder that is made there is nobody else's
    try:
        return tempfile.TemporaryDirectory(prefix="p2ptrain-", dir=folder)
    except OSError as error:
        raise StorageError(f"no folder for temporary sockets: {error}; set TMPDIR to one") from error
