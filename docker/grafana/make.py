"""Writes the Grafana dashboards beside this file: `python docker/grafana/make.py`.

Panels are written here as a title, a unit, a sentence and expressions; what Grafana wants around that is the
same for all. A test holds the JSON equal to this, and every metric named here to what p2ptrain exports.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RATE = "$__rate_interval"
SWARM = 'job=~"$job", instance=~"$instance"'
FAILED = 'outcome="failed"'
PEERS = 'job=~"$job", instance=~"$instance"'


@dataclass(frozen=True)
class Panel:
    """One panel; each query is a legend and an expression."""

    title: str
    unit: str
    description: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    width: int = 12
    stacked: bool = False


def stat(title: str, unit: str, description: str, expression: str) -> Panel:
    return Panel(title, unit, description, (("", expression),), "stat", 4)


def by_peer(title: str, unit: str, description: str, expression: str) -> Panel:
    return Panel(title, unit, description, (("{{instance}}", expression),))


def rate(metric: str, labels: str = "") -> str:
    inside = f"{PEERS}, {labels}" if labels else PEERS
    return f"rate({metric}{{{inside}}}[{RATE}])"


def quantile(metric: str, share: float, labels: str = "", by: str = "le") -> str:
    return f"histogram_quantile({share}, sum by ({by}) ({rate(f'{metric}_bucket', labels)}))"


def swarm(metric: str, labels: str = "") -> str:
    return f"{metric}{{{SWARM}{', ' + labels if labels else ''}}}"


OVERVIEW = (
    stat(
        "Step", "none", "Synchronized optimizer steps behind the swarm.", swarm("p2ptrain_swarm_global_step")
    ),
    stat(
        "Progress",
        "percentunit",
        "Steps taken, of all of the run.",
        f"{swarm('p2ptrain_swarm_global_step')} / {swarm('p2ptrain_swarm_total_steps')}",
    ),
    stat(
        "Since the last step",
        "s",
        "Time since a step was committed; NoProgress fires after ten minutes.",
        f"time() - {swarm('p2ptrain_swarm_last_commit_timestamp_seconds')}",
    ),
    stat("Tokens per second", "short", "In the last minute.", swarm("p2ptrain_swarm_tokens_per_second")),
    stat(
        "Bits per byte",
        "none",
        "On held-out text, where the task counts bytes.",
        swarm("p2ptrain_swarm_bits_per_byte"),
    ),
    stat("Peers", "none", "That are there to train.", f"sum({swarm('p2ptrain_swarm_peers')})"),
    Panel(
        "Loss",
        "none",
        "Mean loss per sample in nats, of the last round and of the last look at held-out data.",
        (("{{split}}", swarm("p2ptrain_swarm_loss")),),
    ),
    Panel(
        "Speed",
        "short",
        "Tokens per second in the last minute.",
        (("tokens/s", swarm("p2ptrain_swarm_tokens_per_second")),),
    ),
    Panel(
        "Peers by state",
        "none",
        "What the peers are busy with; unknown ones are there and do not answer.",
        (("{{state}}", f"sum by (state) ({swarm('p2ptrain_swarm_peers')})"),),
        stacked=True,
    ),
    Panel(
        "Comings and goings",
        "none",
        "Peers that came, left, or were seen no more, per hour.",
        (
            ("came", f"increase({swarm('p2ptrain_swarm_joins_total')}[1h])"),
            ("{{reason}}", f"increase({swarm('p2ptrain_swarm_leaves_total')}[1h])"),
        ),
    ),
    Panel(
        "Lineages and fingerprints",
        "none",
        "1 is right. More lineages: the swarm has parted; more fingerprints: some train another run.",
        (
            ("lineages", swarm("p2ptrain_swarm_lineages")),
            ("fingerprints", swarm("p2ptrain_swarm_fingerprints")),
        ),
    ),
    Panel(
        "Steps per minute",
        "none",
        "Committed rounds that the monitor saw.",
        (("steps", f"60 * rate({swarm('p2ptrain_swarm_rounds_total')}[{RATE}])"),),
    ),
)

DRILL_DOWN = (
    by_peer(
        "Samples that count",
        "short",
        "Samples per second of each peer in committed rounds.",
        rate("p2ptrain_samples_total", 'outcome="counted"'),
    ),
    by_peer(
        "Samples wasted",
        "short",
        "Samples per second computed for nothing: the swarm had stepped, or the gradient was not finite.",
        rate("p2ptrain_samples_total", 'outcome="wasted"'),
    ),
    by_peer(
        "Share of the time at work",
        "percentunit",
        "How much of its time each peer spends in micro-batches.",
        rate("p2ptrain_compute_seconds_total"),
    ),
    Panel(
        "Where a round's time goes",
        "s",
        "Mean seconds in each phase of a committed round.",
        (
            (
                "{{phase}}",
                f"sum by (phase) ({rate('p2ptrain_round_phase_seconds_sum')})"
                f" / sum by (phase) ({rate('p2ptrain_round_phase_seconds_count')})",
            ),
        ),
        stacked=True,
    ),
    Panel(
        "Attempts that failed",
        "none",
        "Per minute, by cause; contributions are kept and it is tried again.",
        (("{{cause}}", f"60 * sum by (cause) ({rate('p2ptrain_round_aborts_total')})"),),
        stacked=True,
    ),
    by_peer(
        "Step",
        "none",
        "Where each replica stands; one that falls behind catches up.",
        f"p2ptrain_global_step{{{PEERS}}}",
    ),
    Panel(
        "Micro-batch",
        "s",
        "Time to compute one: the median, and what one of twenty takes.",
        (
            ("median", quantile("p2ptrain_micro_batch_seconds", 0.5)),
            ("95 %", quantile("p2ptrain_micro_batch_seconds", 0.95)),
        ),
    ),
    Panel(
        "Loss and gradient",
        "none",
        "Training loss as each peer sees it, and the norm of the averaged gradient before clipping.",
        (
            ("loss {{instance}}", f'p2ptrain_loss{{{PEERS}, split="train"}}'),
            ("norm", f"max(p2ptrain_gradient_norm{{{PEERS}}})"),
        ),
    ),
    Panel(
        "Catching up",
        "none",
        "Times per hour that peers adopted the swarm's state, by how.",
        (("{{how}}", f"sum by (how) (increase(p2ptrain_catch_up_seconds_count{{{PEERS}}}[1h]))"),),
    ),
    by_peer("Paused", "none", "1 while a peer is paused.", f"max by (instance) (p2ptrain_paused{{{PEERS}}})"),
    by_peer("Memory", "bytes", "Of the process.", f"process_resident_memory_bytes{{{PEERS}}}"),
    by_peer(
        "Lag of the event loop",
        "s",
        "How late timers run, at worst in one of a hundred; seconds cost a peer its place in rounds.",
        quantile("p2ptrain_event_loop_lag_seconds", 0.99, by="le, instance"),
    ),
    by_peer(
        "Checkpoint's age",
        "s",
        "Time since each peer's last checkpoint.",
        f"time() - (p2ptrain_last_checkpoint_timestamp_seconds{{{PEERS}}} > 0)",
    ),
    by_peer(
        "Clock",
        "s",
        "How far the clock of whom it entered by is ahead.",
        f"p2ptrain_clock_offset_seconds{{{PEERS}}}",
    ),
)

NETWORK = (
    Panel(
        "Bootstrap peers",
        "none",
        "That are there. With none the swarm goes on, and newcomers may not find it.",
        (("bootstraps", swarm("p2ptrain_swarm_bootstraps")),),
        width=6,
    ),
    Panel(
        "Hidden peers",
        "none",
        "That nobody can connect to; they open connections themselves, or meet at a relay.",
        (("hidden", swarm("p2ptrain_swarm_hidden_peers")),),
        width=6,
    ),
    Panel(
        "The monitor's own looks",
        "s",
        "Time of a look into the DHT.",
        (("look", swarm("p2ptrain_monitor_refresh_seconds")),),
    ),
    by_peer(
        "Sent",
        "Bps",
        "Bytes per second, framing included.",
        f"sum by (instance) ({rate('p2ptrain_sent_bytes_total')})",
    ),
    by_peer(
        "Received",
        "Bps",
        "Bytes per second, framing included.",
        f"sum by (instance) ({rate('p2ptrain_received_bytes_total')})",
    ),
    Panel(
        "Traffic by lane",
        "Bps",
        "Sent by all peers. Chunks go over tls, or over data where no TLS connection can be made.",
        (("{{lane}}", f"sum by (lane) ({rate('p2ptrain_sent_bytes_total')})"),),
        stacked=True,
    ),
    Panel(
        "Connections",
        "none",
        "Of all peers, by the way they go.",
        (("{{path}}", f"sum by (path) (p2ptrain_links{{{PEERS}}})"),),
        stacked=True,
    ),
    Panel(
        "Chunks by carrier",
        "none",
        "How many peers' chunks go over TLS and how many over libp2p, which is slower.",
        (("{{carrier}}", f"sum by (carrier) (p2ptrain_carrier_peers{{{PEERS}}})"),),
    ),
    Panel(
        "DHT requests",
        "s",
        "What nineteen of twenty take, by operation.",
        (("{{operation}}", quantile("p2ptrain_dht_request_seconds", 0.95, by="le, operation")),),
    ),
    Panel(
        "DHT requests that failed",
        "none",
        "Per minute. A peer that is alone has nobody to keep its records.",
        (
            (
                "{{operation}}",
                f"60 * sum by (operation) ({rate('p2ptrain_dht_request_seconds_count', FAILED)})",
            ),
        ),
    ),
    Panel(
        "What peers did wrong",
        "none",
        "Per minute, by cause, as those saw it that survived it.",
        (("{{cause}}", f"60 * sum by (cause) ({rate('p2ptrain_peer_faults_total')})"),),
    ),
    Panel(
        "Given to newcomers",
        "Bps",
        "Snapshots and entries.",
        (("{{instance}}", rate("p2ptrain_donated_bytes_total")),),
    ),
    Panel(
        "Deadlines",
        "s",
        "How long peers wait at present, at most, as derived from what they measured.",
        (("{{wait}}", f"max by (wait) (p2ptrain_deadline_seconds{{{PEERS}}})"),),
    ),
    Panel(
        "Libp2p daemons that died",
        "none",
        "Per hour; they are started again.",
        (("{{instance}}", f"increase(p2ptrain_daemon_restarts_total{{{PEERS}}}[1h])"),),
    ),
)

DASHBOARDS = {
    "swarm": ("p2ptrain: swarm", "p2ptrain-swarm", OVERVIEW),
    "peers": ("p2ptrain: peers", "p2ptrain", DRILL_DOWN),
    "network": ("p2ptrain: network", ".*", NETWORK),
}
"""File → title, the jobs it is about, panels."""


def grafana(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    custom: dict[str, Any] = {"fillOpacity": 20, "stacking": {"mode": "normal"}} if panel.stacked else {}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "gridPos": {"h": 4 if panel.kind == "stat" else 8, "w": panel.width, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "targets": [
            {"refId": chr(65 + place), "expr": expression, "legendFormat": legend, "datasource": SOURCE}
            for place, (legend, expression) in enumerate(panel.queries)
        ],
    }


def variable(name: str, text: str, query: str, regex: str = "") -> dict[str, Any]:
    return {
        "name": name,
        "label": text,
        "type": "query",
        "datasource": SOURCE,
        "query": query,
        "regex": regex,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard(name: str) -> dict[str, Any]:
    """What Grafana provisions."""
    title, jobs, panels = DASHBOARDS[name]
    placed, x, y, row = [], 0, 0, 0
    for number, panel in enumerate(panels, 1):
        if x + panel.width > 24:
            x, y = 0, y + row
        made = grafana(panel, number, x, y)
        placed.append(made)
        x, row = x + panel.width, made["gridPos"]["h"]
    probe = "p2ptrain_build_info" if name == "peers" else "up"
    return {
        "uid": f"p2ptrain-{name}",
        "title": title,
        "tags": ["p2ptrain"],
        "editable": False,
        "schemaVersion": 39,
        "refresh": "15s",
        "time": {"from": "now-3h", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["p2ptrain"], "title": "p2ptrain", "asDropdown": False}],
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                variable("job", "Job", f"label_values({probe}, job)", f"/^{jobs}$/"),
                variable("instance", "Peer", f'label_values({probe}{{job=~"$job"}}, instance)'),
            ]
        },
        "panels": placed,
    }


def main() -> None:
    """Write them."""
    FOLDER.mkdir(exist_ok=True)
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(json.dumps(dashboard(name), indent=1) + "\n")


if __name__ == "__main__":
    main()
