"""A lab of hosts for real processes, and what can go wrong with hosts and the network between them.

A host is a network namespace on a bridge (`peers.sites.Hosts`). Rates are limited by tbf, packets lost by
iptables; what a kernel without netem cannot do, the relay does. Whatever a `Lab` sets up is gone when it
ends.

What this machine cannot inject raises NotHere: the caller has not seen the fault, and must say so. Not
covered: systems other than Linux, and anything without root.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Self, TypeVar

from p2ptrain.errors import LocalFault
from peers.sites import PORT, Host, Hosts
from tests.chaos.relay import Link

T = TypeVar("T")

_RELAY = Path(__file__).with_name("relay.py")
_CGROUPS = Path("/sys/fs/cgroup")
_CLONE_NEWNET = 0x40000000
_GROUP_PERIOD_MICROSECONDS = 50_000


class NotHere(Exception):
    """This machine cannot inject the fault; the message says why, and what would help."""


class Lab:
    """Hosts, and what is done to them. A context manager; the hosts' processes must have ended before its
    end."""

    def __init__(self, folder: Path) -> None:
        """`folder` is there, and takes the small files that some injections need."""
        self.folder = folder
        self.hosts = Hosts()
        self._stack = ExitStack()
        self._relay: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise NotHere(
                "hosts are network namespaces: run as root, with iproute2 (apt-get install iproute2)"
            )
        try:
            self._stack.enter_context(self.hosts)
        except LocalFault as fault:
            raise NotHere(str(fault)) from fault
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- hosts -----------------------------------------------------------------------------------------------

    def place(self, name: str) -> tuple[str, Sequence[str]]:
        """(address to listen on, words before a command that put it there), a new host for this name."""
        if self._relay is not None:
            raise AssertionError(
                "the relay carries the hosts that were there when it came: place them before"
            )
        return self.hosts.place(name)

    def place_behind_nat(self, name: str) -> tuple[str, Sequence[str]]:
        """The same behind a router of its own, which hides it and lets no connection in."""
        _needs("iptables")
        self.hosts.place(f"{name}'s router")
        self.hosts.place(name)
        router, host = self.hosts.hosts[f"{name}'s router"].namespace, self.hosts.hosts[name]
        lan = f"192.168.{len(self.hosts.hosts)}"
        # Its cable leads to the router instead of the bridge.
        _run("ip", "link", "set", host.cable, "nomaster")
        _run("ip", "link", "set", host.cable, "netns", router)
        _run("ip", "-n", router, "addr", "add", f"{lan}.1/24", "dev", host.cable)
        _run("ip", "-n", router, "link", "set", host.cable, "up")
        _run("ip", "-n", host.namespace, "addr", "flush", "dev", "eth0")
        _run("ip", "-n", host.namespace, "addr", "add", f"{lan}.2/24", "dev", "eth0")
        _run("ip", "-n", host.namespace, "route", "add", "default", "via", f"{lan}.1")
        inside = ("ip", "netns", "exec", router)
        _run(*inside, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        for rule in (
            "-t nat -A POSTROUTING -o eth0 -j MASQUERADE",
            "-P FORWARD DROP",
            f"-A FORWARD -i {host.cable} -j ACCEPT",
            "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
            "-A INPUT -i eth0 -j DROP",
        ):
            _run(*inside, "iptables", "-w", *rule.split())
        return f"/ip4/{lan}.2/tcp/{PORT}", host.inside

    def address(self, name: str) -> str:
        """That host's on the bridge."""
        return self.hosts.hosts[name].address

    def within(self, name: str, function: Callable[[], T]) -> T:
        """What the function returns or raises when it runs on that host, in a thread of its own."""
        namespace, results, errors = self._host(name).namespace, [], []

        def work() -> None:
            try:
                fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
                try:
                    # Of this thread only.
                    if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
                finally:
                    os.close(fd)
                results.append(function())
            except BaseException as error:
                errors.append(error)

        thread = Thread(target=work)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def processes(self) -> list[int]:
        """Process ids of all that run on any host."""
        found = []
        for host in self.hosts.hosts.values():
            found += [int(pid) for pid in _run("ip", "netns", "pids", host.namespace).split()]
        return found

    def _host(self, name: str) -> Host:
        return self.hosts.hosts[name]

    # -- the network -----------------------------------------------------------------------------------------

    def part(self, side: Sequence[str]) -> None:
        """Cut the network between these hosts and all others."""
        self.hosts.part(side)

    def heal(self) -> None:
        """Undo `part`."""
        self.hosts.heal()

    def unplug(self, name: str) -> None:
        """Pull that host's cable out."""
        self.hosts.unplug(name)

    def plug(self, name: str) -> None:
        """Put it in again."""
        self.hosts.plug(name)

    def cut(self, source: str, target: str) -> None:
        """Lose all that the first sends to the second; the other way stays open."""
        self._iptables(target, "-A", "INPUT", "-s", self.address(source), "-j", "DROP")

    def mend(self) -> None:
        """Undo `cut` and `loss`, on all hosts."""
        for name in self.hosts.hosts:
            self._iptables(name, "-F", "INPUT")

    def loss(self, name: str, share: float) -> None:
        """Lose this share of the packets that the host would receive, from now on."""
        words = ("-m", "statistic", "--mode", "random", "--probability", f"{share:.4f}")
        self._iptables(name, "-A", "INPUT", *words, "-j", "DROP")

    def rate(self, name: str, mbit: float | None) -> None:
        """Limit the host's line, up and down, by tbf at both ends of its cable; None lifts it."""
        _needs("tc")
        host = self._host(name)
        for words in (
            ("-n", host.namespace, "qdisc", "{}", "dev", "eth0"),
            ("qdisc", "{}", "dev", host.cable),
        ):
            bucket = f"root tbf rate {mbit}mbit burst 32kb latency 300ms".split() if mbit else ["root"]
            verb = "replace" if mbit else "delete"
            _run("tc", *(word.format(verb) for word in words), *bucket)

    def _iptables(self, name: str, *rule: str) -> None:
        _needs("iptables")
        _run(*self._host(name).inside, "iptables", "-w", *rule)

    # -- the road --------------------------------------------------------------------------------------------

    def relay(self, **link: float) -> None:
        """From now on the packets of all hosts go by a road with these fields of `Link`, others as they were.

        Addresses stay the same, and so do connections. Where the road leads, `part`, `rate` and `unplug` do
        nothing; `cut` and `loss` do.
        """
        asdict(Link(**link))  # a mistake in a name is ours
        if self._relay is None:
            if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
                raise NotHere("the relay needs the device /dev/net/tun: load the module tun, or pass it in")
            places = [f"{host.namespace}={host.address}" for host in self.hosts.hosts.values()]
            with (self.folder / "relay.log").open("wb") as log:
                self._relay = subprocess.Popen(
                    [sys.executable, "-P", str(_RELAY), *places],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
            self._stack.callback(self._end_relay)
            self._answer()
        self._ask(link)

    def road(self) -> dict[str, int]:
        """Packets of the relay so far, by what became of them."""
        return self._ask({})

    def _ask(self, link: dict[str, float]) -> dict[str, int]:
        assert self._relay is not None
        assert self._relay.stdin is not None
        self._relay.stdin.write(json.dumps(link) + "\n")
        self._relay.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, int]:
        assert self._relay is not None
        assert self._relay.stdout is not None
        line = self._relay.stdout.readline()
        if not line:
            raise NotHere(f"the relay ended: {(self.folder / 'relay.log').read_text()[-500:]}")
        counts: dict[str, int] = json.loads(line)
        return counts

    def _end_relay(self) -> None:
        assert self._relay is not None
        self._relay.kill()
        self._relay.communicate()

    # -- the machine -----------------------------------------------------------------------------------------

    def group(self, name: str) -> Group:
        """A control group of that name, without limits yet."""
        group = Group(f"{self.hosts.prefix}-{name}")
        self._stack.callback(group.close)
        return group

    def disk(self, path: Path, megabytes: int) -> Path:
        """An empty file system of that size in this folder, which is made if it is not there."""
        path.mkdir(parents=True, exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path))
        self._stack.callback(_umount, path)
        return path

    def remount(self, path: Path, *, read_only: bool) -> None:
        """Let nobody write to that disk, or everybody again."""
        _run("mount", "-o", f"remount,{'ro' if read_only else 'rw'}", str(path))

    def clock(self, name: str, offset_seconds: float = 0.0) -> Clock:
        """A clock that is off by so much, for a process that is started with its words."""
        return Clock(self.folder / f"clock-{name}", offset_seconds)


class Group:
    """A control group for processes, of version 1 or 2, whichever this machine has."""

    def __init__(self, name: str) -> None:
        self._two = (_CGROUPS / "cgroup.controllers").exists()
        roots = [_CGROUPS] if self._two else [_CGROUPS / "cpu", _CGROUPS / "memory"]
        self._folders = [root / name for root in roots]
        if self._two:
            self._write(_CGROUPS / "cgroup.subtree_control", "+cpu +memory")
        for folder in self._folders:
            try:
                folder.mkdir()
            except OSError as error:
                raise NotHere(f"cannot make the control group {folder}: {error.strerror}") from error

    @property
    def inside(self) -> tuple[str, ...]:
        """Words before a command that start it in the group; before those of a host, which sees no groups."""
        join = " && ".join(f"echo $$ > {folder / 'cgroup.procs'}" for folder in self._folders)
        return ("sh", "-c", f'{join} && exec "$@"', "sh")

    def add(self, pids: Sequence[int]) -> None:
        """Take these processes in, with all their threads."""
        for folder in self._folders:
            for pid in pids:
                self._write(folder / "cgroup.procs", str(pid))

    def limit_cpu(self, share: float | None) -> None:
        """All processes together get this share of one core; None: what they want."""
        quota = max(1000, round(share * _GROUP_PERIOD_MICROSECONDS)) if share else None
        if self._two:
            self._write(self._folders[0] / "cpu.max", f"{quota or 'max'} {_GROUP_PERIOD_MICROSECONDS}")
        else:
            self._write(self._folders[0] / "cpu.cfs_period_us", str(_GROUP_PERIOD_MICROSECONDS))
            self._write(self._folders[0] / "cpu.cfs_quota_us", str(quota or -1))

    def limit_memory(self, megabytes: float) -> None:
        """The kernel kills one of them when they need more; what they have now beyond that goes to swap, or
        the limit is refused."""
        file = "memory.max" if self._two else "memory.limit_in_bytes"
        self._write(self._folders[-1] / file, str(int(megabytes * 1e6)))

    def memory_megabytes(self) -> float:
        """What they have now."""
        file = "memory.current" if self._two else "memory.usage_in_bytes"
        return int((self._folders[-1] / file).read_text()) / 1e6

    def kills(self) -> int:
        """How often the kernel killed one of them for want of memory."""
        text = (self._folders[-1] / ("memory.events" if self._two else "memory.oom_control")).read_text()
        return int(dict(line.split() for line in text.splitlines()).get("oom_kill", 0))

    def close(self) -> None:
        deadline = time.monotonic() + 5
        for folder in self._folders:
            while folder.exists() and time.monotonic() < deadline:
                with suppress(OSError):  # a process in it is not quite gone
                    folder.rmdir()
                time.sleep(0.05)

    @staticmethod
    def _write(file: Path, text: str) -> None:
        try:
            file.write_text(text)
        except OSError as error:
            raise NotHere(f"cannot write {text!r} to {file}: {error.strerror}") from error


class Clock:
    """A wall clock that is not the machine's, by libfaketime; the monotonic clock stays right.

    Only what asks the C library sees it: Python does, p2pd (Go) does not.
    """

    def __init__(self, file: Path, offset_seconds: float) -> None:
        found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
        if not found:
            raise NotHere("another wall clock needs libfaketime (apt-get install libfaketime)")
        self._library, self._file = found[0], file
        self.set(offset_seconds)

    def set(self, offset_seconds: float) -> None:
        """From within a second on it is off by so much."""
        self._file.write_text(f"{offset_seconds:+g}\n")

    @property
    def inside(self) -> tuple[str, ...]:
        """Words before a command that give it this clock."""
        return (
            "env",
            f"LD_PRELOAD={self._library}",
            f"FAKETIME_TIMESTAMP_FILE={self._file}",
            "FAKETIME_CACHE_DURATION=1",
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
        )


def _needs(program: str) -> None:
    if shutil.which(program) is None:
        package = {"iptables": "iptables", "tc": "iproute2"}[program]
        raise NotHere(f"there is no program {program} here (apt-get install {package})")


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotHere(f"`{' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout


def _umount(path: Path) -> None:
    subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)
