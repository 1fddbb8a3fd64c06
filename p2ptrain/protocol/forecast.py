"""What a run will cost over given links, before anybody joins it: the arithmetic of one step.

A step is computing, then a round. In the round each of n peers sends and receives 2 (n − 1) / n of the
encoded gradient, and waits for a few round trips; none of it is hidden behind computing, unless the run has
`delay`: then a step takes as long as the longer of the two.

Not covered: unequal peers, packet loss, and other traffic on the links.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from p2ptrain.protocol.spans import moved_bytes

ROUND_TRIPS = 2.0
"""Freeze, contributions, means, Done and commit are one way each; half a round trip hides in the micro-batch
that the freeze lets finish."""
FIRST_FLIGHT_BYTES = 10 * 1350
"""What TCP sends after a pause before it hears anything; it doubles with each round trip (RFC 6928)."""
GOOD_UTILISATION = 0.9
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Links:
    """Of each peer."""

    uplink: float
    """Bytes per second."""
    downlink: float
    """Bytes per second."""
    rtt_seconds: float


@dataclass(frozen=True)
class Forecast:
    """One step, and a joiner; times in seconds, sizes in bytes, each for one peer."""

    step_seconds: float
    compute_seconds: float
    transfer_seconds: float
    latency_seconds: float
    utilisation: float
    """Share of its time that a peer computes."""
    sent_bytes: float
    bytes_per_day: float
    """Sent; as much is received."""
    join_seconds: float
    """To fetch a snapshot, when nobody else does."""
    bottleneck: str
    """What takes longest: `computing`, `uplink`, `downlink` or `round trips`."""
    good_batch_size: int
    """Samples per step with which a peer computes for `GOOD_UTILISATION` of its time."""


def forecast(
    *,
    peers: int,
    batch_size: int,
    sample_seconds: float,
    encoded_bytes: int,
    state_bytes: int,
    most_donors: int,
    donor_share: float,
    links: Links,
    delay: int = 0,
) -> Forecast:
    """`sample_seconds`: what one sample takes one peer; `batch_size`: of all peers together; `donor_share`:
    of a donor's uplink, for all joiners together."""
    sent = moved_bytes(peers, encoded_bytes)
    compute = batch_size * sample_seconds / peers
    narrow = min(links.uplink, links.downlink)
    transfer = sent / narrow
    trips = _round_trips(encoded_bytes / peers, narrow, links.rtt_seconds) if sent else 0.0
    latency = trips * links.rtt_seconds
    wait = transfer + latency
    step = max(compute, wait) if delay else compute + wait
    donors = min(most_donors, max(peers - 1, 1))
    costs = {
        "computing": compute,
        "uplink" if links.uplink <= links.downlink else "downlink": transfer,
        "round trips": latency,
    }
    enough = wait * GOOD_UTILISATION / (1 if delay else 1 - GOOD_UTILISATION)
    return Forecast(
        step_seconds=step,
        compute_seconds=compute,
        transfer_seconds=transfer,
        latency_seconds=latency,
        utilisation=compute / step,
        sent_bytes=sent,
        bytes_per_day=sent * SECONDS_PER_DAY / step,
        join_seconds=state_bytes / min(links.downlink, donors * donor_share * links.uplink),
        bottleneck=max(costs, key=lambda what: costs[what]),
        good_batch_size=max(1, math.ceil(enough * peers / sample_seconds)),
    )


def _round_trips(span_bytes: float, bytes_per_second: float, rtt_seconds: float) -> float:
    """Those of the messages, and those until TCP fills the link or has sent the span."""
    in_flight = min(span_bytes, bytes_per_second * rtt_seconds)
    return ROUND_TRIPS + max(0.0, math.log2(in_flight / FIRST_FLIGHT_BYTES + 1) - 1)
