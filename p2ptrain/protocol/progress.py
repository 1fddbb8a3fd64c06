"""When the swarm's batch is full: the leader's decision to freeze, from what the members reported.

Members never wait for work: they run micro-batch after micro-batch until a freeze tells them to stop. So that
nobody computes a micro-batch in vain, the leader freezes as soon as the micro-batches already in flight will
fill the target, and lets those that matter finish. A member that is far slower than the rest is not waited
for: it brings what it has.

Not covered: choosing micro-batch sizes (`trainer` does); a peer that needs longer than a step for a single
sample brings nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from p2ptrain.records import PeerId

_PATIENCE = 1.5  # a micro-batch that ends within this factor of the needed time is waited for
_CUTOFF = 2.0  # … and given up at this factor of its own estimate
_GRACE_SECONDS = 0.2  # estimates below this are noise
_FIRST_BATCH_SECONDS = 15.0  # nothing was measured yet, and warming up is slow


@dataclass(frozen=True)
class Pace:
    """What the leader knows of one member; times are on the leader's clock."""

    samples: int
    in_flight: int
    finish_at: float
    batch_seconds: float


@dataclass(frozen=True)
class Full:
    """Freeze now; `finishing` members complete their micro-batch in flight, for at most `cutoff_seconds`."""

    finishing: tuple[PeerId, ...]
    cutoff_seconds: float


@dataclass(frozen=True)
class Filling:
    """Not yet, and why."""

    reason: str


def decide(
    paces: Mapping[PeerId, Pace], expected: int, target: int, min_peers: int, now: float
) -> Full | Filling:
    """Whether to freeze. `expected` members should report and have not yet: while any is missing, only
    samples that are done count, so that a newcomer gets its chance to be in.
    """
    if len(paces) < min_peers:
        return Filling(f"{len(paces)} of {min_peers} peers are here")
    done = sum(pace.samples for pace in paces.values())
    if done >= target:
        return Full(finishing=(), cutoff_seconds=0.0)
    if expected:
        return Filling(f"{done} of {target} samples; {expected} peers have not reported yet")
    promised = done + sum(pace.in_flight for pace in paces.values())
    if promised < target:
        return Filling(f"{promised} of {target} samples are done or in flight")
    full_at = _time_of_enough(paces, target - done)
    if full_at is None:
        return Filling(f"{done} of {target} samples; a faster peer will do another micro-batch first")
    wait = max(full_at - now, 0.0)
    patience = now + _PATIENCE * wait + _GRACE_SECONDS / 4
    finishing = {peer: pace for peer, pace in paces.items() if pace.in_flight and pace.finish_at <= patience}
    slowest = max((_patience_for(pace, now) for pace in finishing.values()), default=0.0)
    return Full(tuple(sorted(finishing)), _CUTOFF * slowest + _GRACE_SECONDS)


def _patience_for(pace: Pace, now: float) -> float:
    if not pace.batch_seconds:
        return _FIRST_BATCH_SECONDS
    return max(pace.finish_at - now, pace.batch_seconds)


def _time_of_enough(paces: Mapping[PeerId, Pace], missing: int) -> float | None:
    """When `missing` samples will be done, or None if some member will have finished a second micro-batch by
    then."""
    completions = [(pace.finish_at, peer) for peer, pace in paces.items() if pace.in_flight]
    heapq.heapify(completions)
    second: float = min(
        (
            pace.finish_at + pace.batch_seconds
            for pace in paces.values()
            if pace.in_flight and pace.batch_seconds
        ),
        default=float("inf"),
    )
    while completions and missing > 0:
        at, peer = heapq.heappop(completions)
        missing -= paces[peer].in_flight
        if missing <= 0:
            return None if at > second else at
    return None
