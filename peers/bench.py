"""`p2ptrain bench`: what this machine and its loopback reach, and what that would mean over home links.

Peers are processes on loopback that do what peers do (`bench_peer`), so they share this machine's cores: what
one peer reaches with a machine of its own is more. The forecast's arithmetic is `protocol.forecast`.

Not covered: real links, which only real peers tell.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import psutil  # type: ignore[import-untyped]

from p2ptrain.config import RunConfig
from p2ptrain.errors import ConfigError
from p2ptrain.events import duration
from p2ptrain.protocol.forecast import Links
from p2ptrain.protocol.spans import moved_bytes
from peers.rehearsal import Child, Rehearsal, RehearsalFailed, new_folder

LINKS = {
    "DSL: 10 Mbit/s up, 50 down, 40 ms": Links(10e6 / 8, 50e6 / 8, 0.04),
    "cable: 20 Mbit/s up, 100 down, 50 ms": Links(20e6 / 8, 100e6 / 8, 0.05),
    "cable: 50 Mbit/s up, 250 down, 30 ms": Links(50e6 / 8, 250e6 / 8, 0.03),
    "fibre: 300 Mbit/s both ways, 20 ms": Links(300e6 / 8, 300e6 / 8, 0.02),
}
"""Home links that are common, each peer's own."""
COPIES = 12
"""Of the gradient, that a peer holds in memory here, at most: model, momentum, contribution, means, the log
and what is on its way."""
PEER_BYTES = 350e6
"""Of a peer without them."""
LEAST_COUNTED = 3
"""Rounds of a codec, of which the median is taken."""
SLOWEST_BYTES_PER_SECOND = 5e6
"""Of an all-reduce; what is slower is given up."""


@dataclass(frozen=True)
class Reached:
    """One codec; speeds are in GB of float32, per second."""

    allreduce_seconds: float
    allreduce_gigabytes_per_second: float
    encode_gigabytes_per_second: float
    decode_gigabytes_per_second: float
    bytes_per_value: float
    rounds: int
    """Of which `allreduce_seconds` is the median."""


@dataclass(frozen=True)
class Report:
    """What `--json` prints."""

    peers: int
    megabytes: float
    cores: int
    load_before: float
    tiny_round_seconds: float
    """A whole step of a tiny model, from commit to commit, without computing."""
    tls_gigabytes_per_second: float
    codecs: dict[str, Reached]
    fills_link_megabits_per_second: float
    """A faster link of each peer would not make rounds with the default codec shorter here."""
    plans: dict[str, dict[str, Any]]
    """Of the default run, as `plan --json` prints them, over `LINKS`."""


def parse_codecs(text: str) -> list[str]:
    """Those named, and the default one; all if none is. Raises ConfigError."""
    known = [str(name) for name in get_args(RunConfig.model_fields["codec"].annotation)]
    wanted = {name.strip() for name in text.split(",")} if text else set(known)
    if unknown := sorted(wanted - set(known)):
        raise ConfigError(f"--codecs: there is no codec {unknown[0]!r}; there are {', '.join(known)}")
    return [name for name in known if name in wanted | {RunConfig().codec}]


def bench(peers: int, megabytes: float, codecs: list[str], tell: Callable[[str], None]) -> Report:
    """Measure; `tell` is told what was found meanwhile.

    Raises ConfigError if it would not fit into this machine's memory, RehearsalFailed if a peer broke, or
    after Ctrl-C.
    """
    values = round(megabytes * 1e6 / 4)
    needed, free = peers * (PEER_BYTES + COPIES * 4 * values), psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"{peers} peers with a gradient of {megabytes:g} MB need about {needed / 1e9:.1f} GB of memory, "
            f"and {free / 1e9:.1f} GB are free; lower --peers or --megabytes"
        )
    folder = new_folder("bench")  # with the logs of a peer that broke it is kept
    try:
        report = _measured(peers, megabytes, codecs, folder, tell)
    except _Stopped:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return report


class _Stopped(RehearsalFailed):
    """By Ctrl-C."""


def _measured(
    peers: int, megabytes: float, codecs: list[str], folder: Path, tell: Callable[[str], None]
) -> Report:
    load, values = os.getloadavg()[0], round(megabytes * 1e6 / 4)
    with Rehearsal(RunConfig(), folder) as stage:
        tell(f"{peers} peers start, as processes on loopback …")
        links = json.dumps([asdict(each) for each in LINKS.values()])
        words = (str(folder), str(peers), str(values), ",".join(codecs), links)
        children = [
            stage.child(f"peer-{number}", "bench-peer", str(number), *words) for number in range(peers)
        ]
        for child in children:
            child.start()
        hearing = _Hearing(stage, children, 60 + peers * 4 * values * 8 / SLOWEST_BYTES_PER_SECOND)
        (speeds,) = (found["speeds"] for found in hearing.hear("codecs", children[:1]))
        tell("measured how fast one core encodes and decodes")
        (plans,) = (found["plans"] for found in hearing.hear("plans", children[:1]))
        tell("measured how fast one core trains the default model")
        tls = _tls(hearing.hear("tls", children[:2]))
        tell(f"TLS carries {tls:.2f} GB/s")
        tiny = _period([found["rounds"] for found in hearing.hear("tiny", children)])
        tell(f"a round of a tiny model takes {tiny * 1000:.1f} ms")
        reached = {}
        for name, speed in speeds.items():
            took = _allreduce_seconds([found["rounds"] for found in hearing.hear(name, children)], name)
            seconds = statistics.median(took)
            reached[name] = Reached(
                round(seconds, 4),
                round(4 * values / seconds / 1e9, 3),
                speed["encode_gigabytes_per_second"],
                speed["decode_gigabytes_per_second"],
                speed["bytes_per_value"],
                len(took),
            )
            tell(f"all-reduce of {megabytes:g} MB as {name}: {seconds:.3f} s")
    default = reached[RunConfig().codec]
    moved = moved_bytes(peers, round(values * default.bytes_per_value))
    return Report(
        peers=peers,
        megabytes=megabytes,
        cores=len(os.sched_getaffinity(0)),
        load_before=round(load, 1),
        tiny_round_seconds=round(tiny, 5),
        tls_gigabytes_per_second=round(tls, 3),
        codecs=reached,
        fills_link_megabits_per_second=round(moved * 8 / default.allreduce_seconds / 1e6),
        plans=dict(zip(LINKS, plans, strict=True)),
    )


class _Hearing:
    """What the peers have printed."""

    def __init__(self, stage: Rehearsal, children: list[Child], patience_seconds: float) -> None:
        self._stage, self._children, self._patience = stage, children, patience_seconds

    def hear(self, what: str, speakers: list[Child]) -> list[dict[str, Any]]:
        """Each one's line about this. Raises RehearsalFailed if one does not come."""

        def there() -> bool:
            return all(_line(child, what) for child in speakers)

        def broken() -> list[Child]:
            return [child for child in self._children if child.status]

        interrupts = self._stage.interrupts  # also one that came before this
        self._stage.wait(lambda: there() or bool(broken()) or interrupts.count > 0, self._patience)
        if interrupts.count:
            raise _Stopped("stopped by Ctrl-C before all was measured")
        if ended := broken():
            raise ended[0].fault()
        if not there():
            silent = next(child for child in speakers if not _line(child, what))
            raise RehearsalFailed(
                f"{silent.name} had not measured {what!r} after {self._patience:.0f} s: {silent.last_words()}"
            )
        return [_line(child, what) for child in speakers]


def _line(child: Child, what: str) -> dict[str, Any]:
    """What the child has said about this; nothing if it has not yet."""
    *whole, _ = child.output.read_text().split("\n")
    found: list[dict[str, Any]] = [line for line in map(json.loads, whole) if line["what"] == what]
    return found[0] if found else {}


# -- figures -------------------------------------------------------------------------------------------------


def _tls(found: list[dict[str, Any]]) -> float:
    """GB/s from the first byte's start to the last one's arrival."""
    receiver, sender = found
    return float(sender["bytes"] / (receiver["ended"] - sender["began"]) / 1e9)


def _period(rounds: list[list[dict[str, float]]]) -> float:
    """Median seconds from everybody's being done with a step to everybody's being done with the next."""
    done = [max(each["applied"] for each in step) for step in zip(*rounds, strict=True)]
    later = len(done) // 4  # the first ones are to get acquainted
    return float(statistics.median(b - a for a, b in zip(done[later:], done[later + 1 :], strict=False)))


def _allreduce_seconds(rounds: list[list[dict[str, float]]], codec: str) -> list[float]:
    """Of each round that counts: from the last peer's contribution until the last one holds all means.

    Raises RehearsalFailed if there are too few, of which all peers brought something and all went over TLS.
    """
    peers = len(rounds)
    took = [
        max(each["held"] for each in step) - max(each["sealed"] for each in step)
        for step in zip(*rounds, strict=True)
        if all(
            each["samples"] > 0 and each["peers"] == peers and each["peers_over_tls"] == peers - 1
            for each in step
        )
    ]
    if len(took) < LEAST_COUNTED:
        raise RehearsalFailed(
            f"only {len(took)} of {len(rounds[0])} rounds with {codec} had all {peers} peers' gradients, and "
            "all chunks over TLS; is this machine overloaded, or does a firewall close its loopback?"
        )
    return took


def report_lines(report: Report) -> list[str]:
    """The report for people."""
    lines = [
        f"{report.peers} peers on {report.cores} cores, a gradient of {report.megabytes:g} MB as float32",
        "",
        f"{'codec':<8} {'all-reduce':>10} {'GB/s':>7} {'encode GB/s':>12} {'decode GB/s':>12} "
        f"{'bytes a value':>14}",
    ]
    for name, each in report.codecs.items():
        lines.append(
            f"{name:<8} {each.allreduce_seconds:>8.3f} s {each.allreduce_gigabytes_per_second:>7.2f} "
            f"{each.encode_gigabytes_per_second:>12.2f} {each.decode_gigabytes_per_second:>12.2f} "
            f"{each.bytes_per_value:>14.2f}"
        )
    lines += [
        "",
        f"a round of a tiny model takes {report.tiny_round_seconds * 1000:.1f} ms: its fixed cost here",
        f"TLS between two peers carries {report.tls_gigabytes_per_second:.2f} GB/s one way",
        f"a link of up to {report.fills_link_megabits_per_second:,.0f} Mbit/s each would be full with "
        f"{RunConfig().codec}, all peers on this machine together",
        "",
        f"The default run with {report.peers} peers like this machine, one core each, "
        "if every peer were at home behind",
    ]
    for name, plan in report.plans.items():
        figures = plan["forecast"]
        lines.append(
            f"  {name}: a step takes {duration(figures['step_seconds'])}, of which "
            f"{figures['utilisation']:.0%} is computing; the bottleneck is {figures['bottleneck']}"
        )
    return lines
