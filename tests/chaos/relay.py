"""A bad road between hosts: a process that carries their packets, and delays, loses, repeats, reorders or
damages them on the way.

    python relay.py NAMESPACE=ADDRESS …

It opens a tun device in each network namespace; what is sent to one address comes out of the device that has
it. `Road` is the queue, pure: time and chance are arguments. Each line on stdin is a JSON object with
fields of `Link`, from then on in force; each is answered by a line with the packets counted so far. It ends
with its stdin.

Only the standard library is used, so that it starts at once. Not covered: IPv6, and packets above 1,400
bytes.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import random
import selectors
import struct
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace

MTU = 1400
HEADER = 20
"""Bytes of an IPv4 header, which stays whole: damage there would only be loss."""
HELD_BACK_SECONDS = 0.02
"""How much later than the others a packet comes that is out of order."""
QUEUE_SECONDS = 0.5
"""What waits longer for its turn on a slow line is dropped, as a router's full buffer would."""
MOST_PACKETS = 20_000
"""On the way at once."""

_TUNSETIFF, _IFF_TUN_NO_PI = 0x400454CA, 0x1001
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Link:
    """What the road does to packets, in each direction; shares are between 0 and 1."""

    delay_seconds: float = 0.0
    jitter_seconds: float = 0.0
    """Added or taken off, evenly distributed; packets of one pair of hosts keep their order."""
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    """One bit is flipped; TCP's checksum finds it."""
    mbit: float = 0.0
    """Of each host's line, up and down; 0: no limit."""


class Road:
    """Packets on their way."""

    def __init__(self, chance: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._chance = chance
        self._on_the_way: list[tuple[float, int, bytes]] = []
        self._number = 0
        self._last: dict[tuple[bytes, bytes], float] = {}  # when the last packet of a pair arrives
        self._free: dict[tuple[str, bytes], float] = {}  # when a line has sent what it was given

    def send(self, packet: bytes, link: Link, now: float) -> None:
        """Take a packet; what becomes of it is decided here, and counted."""
        if len(packet) < HEADER or packet[0] >> 4 != 4:
            self.counts["not_ipv4"] += 1
            return
        self.counts["sent"] += 1
        if self._happens(link.loss):
            self.counts["lost"] += 1
            return
        if (sent_at := self._sent(packet, link, now)) is None or len(self._on_the_way) >= MOST_PACKETS:
            self.counts["overflow"] += 1
            return
        if self._happens(link.corrupt) and len(packet) > HEADER:
            self.counts["corrupted"] += 1
            place = self._chance.randrange(8 * HEADER, 8 * len(packet))
            damaged = bytearray(packet)
            damaged[place // 8] ^= 1 << place % 8
            packet = bytes(damaged)
        at = max(now, sent_at + link.delay_seconds + self._chance.uniform(-1, 1) * link.jitter_seconds)
        pair = (packet[12:16], packet[16:20])
        if self._happens(link.reorder):
            self.counts["reordered"] += 1
            self._put(at + HELD_BACK_SECONDS, packet)
        else:
            self._last[pair] = at = max(at, self._last.get(pair, 0.0))
            self._put(at, packet)
        if self._happens(link.duplicate):
            self.counts["duplicated"] += 1
            self._put(at, packet)

    def arrived(self, now: float) -> list[bytes]:
        """What is there by now, in order of arrival."""
        packets = []
        while self._on_the_way and self._on_the_way[0][0] <= now:
            packets.append(heapq.heappop(self._on_the_way)[2])
        return packets

    @property
    def next_at(self) -> float | None:
        """When the next packet arrives; None if none is on the way."""
        return self._on_the_way[0][0] if self._on_the_way else None

    def _happens(self, share: float) -> bool:
        return share > 0 and self._chance.random() < share

    def _sent(self, packet: bytes, link: Link, now: float) -> float | None:
        """When the last bit has left the sender's line and the receiver's; None if a line has too much to
        send."""
        if not link.mbit:
            return now
        takes, at = len(packet) * 8 / (link.mbit * 1e6), now
        lines = (("up", packet[12:16]), ("down", packet[16:20]))
        if any(self._free.get(line, 0.0) - now > QUEUE_SECONDS for line in lines):
            return None
        for line in lines:
            at = self._free[line] = max(at, self._free.get(line, 0.0)) + takes
        return at

    def _put(self, at: float, packet: bytes) -> None:
        self._number += 1
        heapq.heappush(self._on_the_way, (at, self._number, packet))


# -- the process ---------------------------------------------------------------------------------------------


def open_tun(namespace: str, address: str) -> int:
    """A tun device in that namespace which has this address from now on; its file descriptor."""
    for words in (
        # The cable keeps its state, and the bridge, but nothing is addressed to it any more.
        ("-n", namespace, "addr", "flush", "dev", "eth0"),
        ("-n", namespace, "tuntap", "add", "dev", "wan0", "mode", "tun"),
        ("-n", namespace, "addr", "add", f"{address}/24", "dev", "wan0"),
        ("-n", namespace, "link", "set", "wan0", "mtu", str(MTU), "txqueuelen", "2000", "up"),
    ):
        subprocess.run(["ip", *words], check=True)
    libc = ctypes.CDLL(None, use_errno=True)
    home, there = os.open("/proc/self/ns/net", os.O_RDONLY), os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(there, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", b"wan0", _IFF_TUN_NO_PI))
    finally:
        libc.setns(home, _CLONE_NEWNET)
        os.close(home)
        os.close(there)
    return device


def main(places: list[str]) -> None:
    with suppress(OSError):
        os.nice(-10)  # a road takes no longer because the hosts on it are busy
    devices: dict[bytes, int] = {}
    for place in places:
        namespace, _, address = place.partition("=")
        devices[bytes(map(int, address.split(".")))] = open_tun(namespace, address)
    road, link = Road(random.Random(0)), Link()
    with selectors.DefaultSelector() as selector:
        for fd in (*devices.values(), sys.stdin.fileno()):
            selector.register(fd, selectors.EVENT_READ)
        print("{}", flush=True)
        while True:
            next_at = road.next_at
            for key, _ in selector.select(None if next_at is None else max(0.0, next_at - time.monotonic())):
                if key.fd == sys.stdin.fileno():
                    line = sys.stdin.readline()
                    if not line:
                        return
                    link = replace(link, **json.loads(line))
                    print(json.dumps(road.counts), flush=True)
                    continue
                with suppress(BlockingIOError):
                    for _ in range(64):  # then the others have their turn
                        road.send(os.read(key.fd, 65_536), link, time.monotonic())
            for packet in road.arrived(time.monotonic()):
                if (device := devices.get(packet[16:20])) is not None:
                    with suppress(BlockingIOError):
                        os.write(device, packet)


if __name__ == "__main__":
    main(sys.argv[1:])
