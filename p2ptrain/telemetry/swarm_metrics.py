"""What the monitor exports of the swarm as a whole; each peer's own metrics are scraped beside it.

Not covered: who was not let in, which only those know who refused it (`p2ptrain_peer_faults_total`).
"""

from __future__ import annotations

import math
from enum import StrEnum

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from p2ptrain import PROTOCOL_VERSION, __version__
from p2ptrain.telemetry.metrics import PeerState, Split

UNKNOWN = "unknown"
"""State of a peer that is there and does not answer."""


class Parting(StrEnum):
    """How a peer went."""

    LEFT = "left"
    LOST = "lost"


class Protocol(StrEnum):
    """What peers speak, as the monitor sees it."""

    SAME = "same"
    OTHER = "other"


class SwarmMetrics:
    """Every metric of the swarm, in a registry of its own. The monitor sets them."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the number of counters
        self.registry = registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"p2ptrain_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"p2ptrain_{name}", text, labels, registry=registry)

        self._build = Info("p2ptrain_monitor_build", "Versions of the monitor.", registry=registry)
        self._build.info({"version": __version__, "protocol": str(PROTOCOL_VERSION)})
        self.run = Info("p2ptrain_swarm_run", "The run that is watched.", registry=registry)
        self.run.info({"run_id": "", "digest": ""})
        self.peers = gauge("swarm_peers", "Peers that train, by what they are busy with.", "state")
        self.min_peers = gauge("swarm_min_peers", "Fewest peers that may step in this run.")
        self.bootstraps = gauge("swarm_bootstraps", "Bootstrap peers that are there.")
        self.protocols = gauge(
            "swarm_protocol_peers",
            "Peers that train, by whether the monitor speaks their protocol.",
            "protocol",
        )
        self.fingerprints = gauge("swarm_fingerprints", "Runs that peers train under this run's name.")
        self.lineages = gauge("swarm_lineages", "Lineages of the last step that peers told of; 1: all agree.")
        self.hidden = gauge("swarm_hidden_peers", "Peers that train and that nobody can connect to.")
        self.step = gauge("swarm_global_step", "Synchronized steps behind the swarm.")
        self.total_steps = gauge("swarm_total_steps", "Steps after which the run is over.")
        self.last_commit = gauge(
            "swarm_last_commit_timestamp_seconds", "When the last step was committed; 0: never."
        )
        self.loss = gauge("swarm_loss", "Last mean loss per sample in nats; NaN until known.", "split")
        self.bits_per_byte = gauge(
            "swarm_bits_per_byte", "Of the last look at held-out text; NaN until known."
        )
        self.tokens_per_second = gauge("swarm_tokens_per_second", "In the rounds of the last minute.")
        self.tokens = counter("swarm_tokens_total", "Tokens in the committed rounds that were seen.")
        self.rounds = counter("swarm_rounds_total", "Committed rounds that were seen.")
        self.joins = counter("swarm_joins_total", "Peers that came to train.")
        self.leaves = counter(
            "swarm_leaves_total", "Peers that went: said so, or were seen no more.", "reason"
        )
        self.last_checkpoint = gauge(
            "swarm_last_checkpoint_timestamp_seconds", "When a peer last saved a checkpoint; 0: never."
        )
        self.refreshed = gauge(
            "monitor_last_refresh_timestamp_seconds", "When the monitor last saw a presence record; 0: never."
        )
        self.refresh_seconds = gauge("monitor_refresh_seconds", "Time of its last look into the DHT.")
        self.refresh_failures = counter("monitor_refresh_failures_total", "Looks that found nobody at all.")
        self.ask_failures = counter("monitor_ask_failures_total", "Questions that a peer did not answer.")
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        for state in (*PeerState, UNKNOWN):
            self.peers.labels(state)
        for protocol in Protocol:
            self.protocols.labels(protocol)
        for reason in Parting:
            self.leaves.labels(reason)
        for unknown in (self.bits_per_byte, *(self.loss.labels(split) for split in Split)):
            unknown.set(math.nan)

    def page(self) -> bytes:
        """All of them as Prometheus text 0.0.4."""
        return generate_latest(self.registry)
