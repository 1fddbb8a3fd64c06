"""What a volunteer lets this program send and receive per second, over all its connections: token buckets.

What is charged may go beyond what a bucket holds: then whoever comes next waits until it is filled again. So
a frame is never torn by a wait, two connections share a rate fairly, and over seconds the rate is kept to the
byte. Control messages, a few kB a step, are charged and wait for nothing: a round is not held up for them.

Not covered: what the kernel and p2pd have buffered, the overhead of TLS and TCP (some 3 %), and what p2pd
sends and receives for others, as a relay and as a node of the DHT.
"""

from __future__ import annotations

import asyncio

BURST_SECONDS = 0.25
"""Of unused rate that is kept: what was not sent a minute ago is no reason to send more now."""
SIP_BYTES = 16 * 1024
"""Taken from the network at once where receiving is limited: of a large gulp the others would pay the
wait."""


class Bucket:
    """So many bytes per second; 0: any number."""

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second
        self._holds = bytes_per_second * BURST_SECONDS
        self._at = float("-inf")

    def take(self, count: int, now: float) -> float:
        """Charge so many bytes; returns the seconds until the bucket is filled again, 0 if nobody need
        wait."""
        rate = self.bytes_per_second
        if not rate:
            return 0.0
        full = rate * BURST_SECONDS
        if self._at > float("-inf"):
            self._holds = min(full, self._holds + (now - self._at) * rate)
        self._at = now
        self._holds -= count
        return max(-self._holds / rate, 0.0)


class Throttle:
    """Of one peer, both ways; bytes per second, 0 for no limit."""

    def __init__(self, upload: float = 0.0, download: float = 0.0) -> None:
        self.upload, self.download = Bucket(upload), Bucket(download)

    async def before_sending(self, count: int) -> None:
        """Returns when so many bytes may go."""
        if seconds := self.upload.take(count, self._now()):
            await asyncio.sleep(seconds)

    def sent(self, count: int) -> None:
        """So many have gone, and could not wait."""
        self.upload.take(count, self._now())

    async def before_receiving(self) -> None:
        """Returns when what has come is paid for."""
        if seconds := self.download.take(0, self._now()):
            await asyncio.sleep(seconds)

    def received(self, count: int) -> float:
        """So many have come; returns for how many seconds no more should."""
        return self.download.take(count, self._now())

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
