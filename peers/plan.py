"""`p2ptrain plan`: what a run will cost over given links, and what to change.

The arithmetic is `protocol.forecast`. How long a sample takes is given, or measured on this machine's CPU.

Not covered: peers that differ, and the first steps, which compute slower.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch
from torch import nn

from p2ptrain.config import PeerConfig, RunConfig
from p2ptrain.errors import ConfigError
from p2ptrain.events import duration
from p2ptrain.gradients.codecs import codec_named
from p2ptrain.protocol.forecast import GOOD_UTILISATION, Forecast, Links, forecast
from p2ptrain.protocol.spans import chunk_ranges
from p2ptrain.replica.joining import MAX_DONORS, UPLOAD_SHARE
from p2ptrain.replica.replica import Replica
from p2ptrain.tasks import Task, build_model, build_task

MEASURE_SECONDS = 3.0
MEASURED_AT_ONCE = 8
"""Samples in a pass, at most."""


@dataclass(frozen=True)
class Plan:
    """What `--json` prints."""

    peers: int
    parameters: int
    encoded_bytes: int
    samples_per_second: float
    """Of one peer."""
    measured_here: bool
    forecast: Forecast


def parse_rate(text: str) -> float:
    """Bytes per second from text like `20Mbit`, `1.5 Gbit/s` or `500kbit`. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg])bit(?:/s|ps)?", text.strip().lower())
    rate = float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]] / 8 if found else 0.0
    if not rate:
        raise ConfigError(f"{text!r} is no rate; say 20Mbit, 500kbit or 1Gbit (bits per second)")
    return rate


def plan(run: RunConfig, peers: int, links: Links, tokens_per_second: float, peer: PeerConfig) -> Plan:
    """`tokens_per_second`: of one peer, 0: measure it here, with what this peer file says. Raises ConfigError
    or CorpusError."""
    if not run.min_peers <= peers <= run.max_peers:
        raise ConfigError(
            f"--peers ({peers}) is not within min_peers ({run.min_peers}) and max_peers ({run.max_peers}) "
            f"of run {run.run_id}"
        )
    torch.set_num_threads(peer.threads)
    task = build_task(run, peer)
    replica = Replica(build_model(task, run)[0], run, "")
    codec = codec_named(run.codec)
    chunks = chunk_ranges(0, replica.values, run.chunk_values)
    encoded = sum(codec.encoded_bytes(stop - start) for start, stop in chunks)
    at_once = min(MEASURED_AT_ONCE, run.target_batch_size)
    pace = tokens_per_second / run.task.tokens_per_sample or samples_per_second(task, replica.model, at_once)
    figures = forecast(
        peers=peers,
        batch_size=run.target_batch_size,
        sample_seconds=1 / pace,
        encoded_bytes=encoded,
        state_bytes=replica.max_state_bytes,
        most_donors=MAX_DONORS,
        donor_share=UPLOAD_SHARE,
        links=links,
        delay=run.delay,
    )
    return Plan(peers, replica.numel, encoded, pace, not tokens_per_second, figures)


def plan_lines(plan: Plan, run: RunConfig) -> list[str]:
    """The plan for people."""
    figures = plan.forecast
    where = "measured on this machine" if plan.measured_here else "as you say"
    facts = {
        "model": f"{plan.parameters:,} parameters, {_size(plan.encoded_bytes)} in {run.codec}"
        + (" with the optimizer's state, which travels, too" if run.strategy == "partition" else ""),
        "a peer computes": f"{plan.samples_per_second:,.1f} samples a second, {where}",
        "a step takes": f"{duration(figures.step_seconds)}: computing {duration(figures.compute_seconds)}, "
        f"sending {duration(figures.transfer_seconds)}, round trips {duration(figures.latency_seconds)}"
        + (" (computing goes on meanwhile)" if run.delay else ""),
        "utilisation": f"{figures.utilisation:.0%} of a peer's time is computing",
        "a peer sends": f"{_size(figures.sent_bytes)} a step, {_size(figures.bytes_per_day)} a day, "
        "and receives as much",
        "joining takes": f"{duration(figures.join_seconds)} for the snapshot",
        "bottleneck": figures.bottleneck,
        "advice": _advice(figures, run),
    }
    return [f"{name:<16} {fact}" for name, fact in facts.items()]


def _advice(figures: Forecast, run: RunConfig) -> str:
    if figures.utilisation >= GOOD_UTILISATION:
        return "none: computing takes most of the time"
    words = (
        f"target_batch_size = {figures.good_batch_size} (now {run.target_batch_size}) would bring computing "
        f"to {GOOD_UTILISATION:.0%}, if so large a batch still suits the model"
    )
    if run.codec == "fp32" and run.strategy != "partition" and figures.bottleneck != "round trips":
        words += '; codec = "fp16" halves the bytes'
    if not run.delay and run.strategy == "sync":
        wait = figures.transfer_seconds + figures.latency_seconds
        share = figures.compute_seconds / max(figures.compute_seconds, wait)
        words += f"; delay = 1 would bring it to {share:.0%}, with gradients that are one step old"
    return words


def samples_per_second(task: Task, model: nn.Module, count: int) -> float:
    """Computed on this machine in `MEASURE_SECONDS`, so many at once."""
    done, began = -count, 0.0  # the first is to warm up
    while not began or time.perf_counter() - began < MEASURE_SECONDS:
        task.loss_sum(model, task.batch(0, "plan", max(done, 0), count)).backward()  # type: ignore[no-untyped-call]
        done += count
        began = began or time.perf_counter()
    return done / (time.perf_counter() - began)


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 999.5:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.3g} TB"
