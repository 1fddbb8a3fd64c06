"""The forecast of a step over given links, and `p2ptrain plan` around it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from p2ptrain.config import RunConfig
from p2ptrain.errors import ConfigError
from p2ptrain.protocol.forecast import GOOD_UTILISATION, Forecast, Links, forecast
from peers.plan import Plan, parse_rate, plan_lines

RUN = Path(__file__).parents[2] / "configs/runs/default.toml"
HOME = Links(uplink=2.5e6, downlink=12.5e6, rtt_seconds=0.05)


def cost(*, peers: int = 4, batch_size: int = 100, links: Links = HOME, delay: int = 0) -> Forecast:
    return forecast(
        peers=peers,
        batch_size=batch_size,
        sample_seconds=0.1,
        encoded_bytes=10_000_000,
        state_bytes=60_000_000,
        most_donors=8,
        donor_share=0.25,
        links=links,
        delay=delay,
    )


def test_step_is_computing_and_moving_bytes_and_waiting() -> None:
    four = cost()
    assert four.compute_seconds == 100 * 0.1 / 4
    assert four.sent_bytes == 15_000_000  # 2 (n - 1) / n
    assert four.transfer_seconds == 6.0
    assert 2 * 0.05 <= four.latency_seconds <= 10 * 0.05
    parts = four.compute_seconds + four.transfer_seconds + four.latency_seconds
    assert four.step_seconds == pytest.approx(parts)
    assert four.bytes_per_day == pytest.approx(86_400 / parts * 15_000_000)


def test_lone_peer_sends_nothing() -> None:
    alone = cost(peers=1)
    assert (alone.sent_bytes, alone.latency_seconds, alone.utilisation) == (0, 0, 1)
    assert alone.bottleneck == "computing"


@pytest.mark.parametrize(
    ("links", "bottleneck"),
    [
        (HOME, "uplink"),
        (Links(12.5e6, 1e6, 0.05), "downlink"),
        (Links(1e9, 1e9, 2.0), "round trips"),
        (Links(1e9, 1e9, 0.001), "computing"),
    ],
)
def test_what_takes_longest_is_named(links: Links, bottleneck: str) -> None:
    assert cost(links=links).bottleneck == bottleneck


@pytest.mark.parametrize("batch_size", [100, 1000])
def test_delay_hides_the_shorter_of_computing_and_waiting(batch_size: int) -> None:
    plain, hidden = (cost(batch_size=batch_size, delay=delay) for delay in (0, 1))
    wait = plain.transfer_seconds + plain.latency_seconds
    assert hidden.step_seconds == max(plain.compute_seconds, wait) < plain.step_seconds
    assert hidden.utilisation == pytest.approx(min(1.0, plain.compute_seconds / wait))


@pytest.mark.parametrize("delay", [0, 1])
def test_advised_batch_brings_the_promised_utilisation(delay: int) -> None:
    advised = cost(batch_size=cost(delay=delay).good_batch_size, delay=delay)
    assert advised.utilisation == pytest.approx(GOOD_UTILISATION, abs=0.001)


def test_joiner_is_bounded_by_the_donors_share_or_by_its_own_downlink() -> None:
    assert cost(peers=2).join_seconds == 60e6 / (2.5e6 / 4)
    assert cost(peers=100, links=Links(100e6, 1e6, 0.05)).join_seconds == 60


@pytest.mark.parametrize(("text", "rate"), [("20Mbit", 2.5e6), ("1.5 Gbit/s", 187.5e6), ("8 kbps", None)])
def test_rate_is_bits_with_a_unit(text: str, rate: float | None) -> None:
    if rate is None:
        with pytest.raises(ConfigError, match=r"'8 kbps' is no rate; say 20Mbit"):
            parse_rate(text)
    else:
        assert parse_rate(text) == rate


def test_advice_is_only_what_the_strategy_allows() -> None:
    """A run file that followed other advice would be refused."""

    def advice(**fields: Any) -> str:
        plan = Plan(4, 1000, 10_000_000, 10.0, True, cost())
        return plan_lines(plan, RunConfig(target_batch_size=100, codec="fp32", **fields))[-1]

    assert "delay" in advice()
    assert "fp16" in advice()
    assert "delay" not in advice(strategy="local")
    assert "delay" not in advice(strategy="partition")
    assert "fp16" not in advice(strategy="partition")


def test_command_plans_the_run_of_a_file() -> None:
    words = ("plan", str(RUN), "--tokens-per-second", "2000", "--json")
    ended = subprocess.run(
        [sys.executable, "-c", "from peers import cli; cli.main()", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    *lines, last = ended.stdout.splitlines()
    planned = json.loads(last)
    assert planned["encoded_bytes"] > 2 * planned["parameters"]
    assert [line for line in lines if line.startswith("bottleneck")]
    assert planned["forecast"]["step_seconds"] > 0
