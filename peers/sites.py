"""Where the processes of a rehearsal are: on this machine's loopback, or each on a host of its own.

A host is a network namespace on a bridge. To part the network, the cables of one side are put into a second
bridge. Addresses are seen on that bridge only, so several rehearsals can use the same ones.

Not covered: systems other than Linux, and without root, for anything but loopback.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

from p2ptrain.errors import ConfigError, LocalFault

PORT = 31337
_OURS = re.compile(r"\b(p2pc(\d+)([hvb])\d+)")
"""Names of hosts, cables and bridges, with the number of the process that made them."""


class Site(Protocol):
    """A network that the rehearsal's processes share."""

    def place(self, name: str) -> tuple[str, Sequence[str]]:
        """(address to listen on, words before a command that put it there), a new place for this name."""
        ...

    def part(self, side: Sequence[str]) -> None:
        """Cut the network between these and all others, also those that get a place later."""
        ...

    def heal(self) -> None:
        """Make it whole again; nothing happens if it is."""
        ...


class Loopback:
    """All share one host, so nothing can be cut."""

    def place(self, name: str) -> tuple[str, Sequence[str]]:
        # A fixed port, so that a process that is started again has it again.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return f"/ip4/127.0.0.1/tcp/{free.getsockname()[1]}", ()

    def part(self, side: Sequence[str]) -> None:
        raise AssertionError("loopback cannot be cut")

    def heal(self) -> None:
        """It is whole."""


@dataclass(frozen=True)
class Host:
    """One of `Hosts`: a network namespace, whose device `eth0` is the other end of a cable to the bridge."""

    namespace: str
    cable: str
    address: str

    @property
    def inside(self) -> tuple[str, ...]:
        """Words before a command that run it there."""
        return ("ip", "netns", "exec", self.namespace)


class Hosts:
    """Each name on a host of its own. A host's processes must have ended before `close`.

    `megabits`: how many each may send, and receive, per second; None for what the machine can.
    """

    def __init__(self, megabits: float | None = None) -> None:
        self._megabits = megabits
        self.prefix = f"p2pc{os.getpid()}"
        """Of all names that this makes; what is called so is taken away by the next rehearsal at the
        latest."""
        self.hosts: dict[str, Host] = {}
        self._whole, self._cut = f"{self.prefix}b0", f"{self.prefix}b1"

    def __enter__(self) -> Self:
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Make the bridges. Raises LocalFault where the kernel refuses; `close` takes away what is there."""
        _sweep()
        for bridge in (self._whole, self._cut):
            _ip("link", "add", bridge, "type", "bridge")
            _ip("link", "set", bridge, "up")

    def place(self, name: str) -> tuple[str, Sequence[str]]:
        number = len(self.hosts) + 1
        host = Host(f"{self.prefix}h{number}", f"{self.prefix}v{number}", f"10.83.0.{number}")
        self.hosts[name] = host
        _ip("netns", "add", host.namespace)
        _ip("link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        _ip("link", "set", host.cable, "master", self._whole, "up")
        _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.namespace, "link", "set", "lo", "up")
        _ip("-n", host.namespace, "link", "set", "eth0", "up")
        if self._megabits is not None:
            _tc(self._megabits, "-n", host.namespace, "qdisc", "add", "dev", "eth0")
            _tc(self._megabits, "qdisc", "add", "dev", host.cable)
        return f"/ip4/{host.address}/tcp/{PORT}", host.inside

    def part(self, side: Sequence[str]) -> None:
        for name in side:
            _ip("link", "set", self.hosts[name].cable, "master", self._cut)

    def heal(self) -> None:
        for host in self.hosts.values():
            _ip("link", "set", host.cable, "master", self._whole)

    def unplug(self, name: str) -> None:
        """Pull that host's cable out."""
        _ip("link", "set", self.hosts[name].cable, "down")

    def plug(self, name: str) -> None:
        """Put it in again."""
        _ip("link", "set", self.hosts[name].cable, "up")

    def close(self) -> None:
        """Take all of it away, as far as it is there."""
        for host in self.hosts.values():
            # First: a namespace goes only after its last process, and its devices after that.
            _try_ip("link", "delete", host.cable)
            _try_ip("netns", "delete", host.namespace)
        for bridge in (self._whole, self._cut):
            _try_ip("link", "delete", bridge)


@contextmanager
def site(*, apart: bool, megabits: float | None = None) -> Iterator[Site]:
    """A site. If it can be parted, or has a rate (see `Hosts`), each process is on a host of its own, which
    needs root and the program `ip`.

    Raises ConfigError without them, LocalFault where the kernel refuses.
    """
    if not apart and megabits is None:
        yield Loopback()
        return
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise ConfigError(
            "partition and --megabits give each process a network namespace of its own: run it as root, with "
            "iproute2 (apt-get install iproute2), or leave them out"
        )
    with Hosts(megabits) as hosts:
        yield hosts


def half(second: bool) -> tuple[str, ...]:
    """Words before a command that keep it on one half of this machine's processors.

    Raises ConfigError where there are no halves.
    """
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2 or shutil.which("taskset") is None:
        raise ConfigError(
            "crowd keeps the newcomers off the processors of those who train: it needs two of them, and "
            "the program taskset (apt-get install util-linux), or leave crowd out of --faults"
        )
    middle = len(processors) // 2
    chosen = processors[middle:] if second else processors[:middle]
    return ("taskset", "--cpu-list", ",".join(map(str, chosen)))


def _sweep() -> None:
    """Take away what rehearsals left that were killed, and so could not."""
    for name, pid, kind in _OURS.findall(_try_ip("-o", "link") + _try_ip("netns")):
        if not os.path.exists(f"/proc/{pid}"):
            _try_ip("netns" if kind == "h" else "link", "delete", name)


def _ip(*words: str) -> None:
    _must("ip", *words)


def _tc(megabits: float, *words: str) -> None:
    """A token bucket that holds 10 ms, and a queue of at most 200 ms before it."""
    burst = max(round(megabits * 1e6 / 8 / 100), 16_000)
    _must("tc", *words, "root", "tbf", "rate", f"{megabits:g}mbit", "burst", f"{burst}", "latency", "200ms")


def _must(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LocalFault(
            f"`{' '.join(words)}` failed: {done.stderr.strip()}; partition and --megabits need a kernel and "
            "a container that allow network namespaces, bridges and tbf, or leave them out"
        )


def _try_ip(*words: str) -> str:
    command = ["ip", *words]  # from the PATH of the root that calls
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
