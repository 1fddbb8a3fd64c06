"""What a hurried and a hung scraper cost the training of real peers, measured in turns within one run:

    python tests/benchmarks/scrape.py [--peers 2] [--seconds 5] [--turns 6] [--rate 100] [--page] [--json]

Peers train the default model over loopback. Each turn has a period of each kind, in an order that changes
from turn to turn: `alone`, nobody asks; `scraped`, so many requests a second for the metrics of the first
peer; `hung`, connections to it that ask and never read, and others that never ask, more than are let in. With
`--page` the first peer serves the page of the run as well, and in `scraped` a reader follows its events.

`step_rate` is steps per second; `noise` the standard deviation of the periods alone, and what that makes of
the difference of two means; `difference` from the mean alone, also in units of that noise: below 2 there is
none. The scraper runs on the same cores; `scraper_core` is how much of one it took, not the peer's doing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.swarm.processes import crew, until

KINDS = ("alone", "scraped", "hung")
SETTLE_SECONDS = 0.5
"""Of a period, before its steps count."""
HUNG = 40
"""Connections of each of the two sorts: more than are let in."""
RUN = """
run_id = "scraped"
total_steps = 1000000
target_batch_size = 32
"""
ASK = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def commits(folder: Path) -> list[float]:
    """When that peer's steps were committed, as Unix time."""
    lines = (folder / "journal.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines if '"round_committed"' in line]
    return [datetime.fromisoformat(each["time"]).timestamp() for each in found]


async def scrape(port: int, rate: float, seconds: float) -> tuple[int, int]:
    """Requests at an even pace; how many were answered in full, and how many were not."""
    answered = failed = 0

    async def once() -> None:
        nonlocal answered, failed
        try:
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(ASK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
                page = await reader.read()
                writer.close()
            answered += b"p2ptrain_global_step" in page
            failed += b"p2ptrain_global_step" not in page
        except (OSError, TimeoutError):
            failed += 1

    async with asyncio.TaskGroup() as group:
        began = time.monotonic()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(began + number / rate - time.monotonic(), 0))
            group.create_task(once())
    return answered, failed


async def follow(port: int) -> None:
    """Read a page's events until cancelled."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /api/v1/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    try:
        while await reader.read(65536):
            pass
    finally:
        writer.close()


async def hang(port: int, seconds: float) -> None:
    """Connections that ask without reading, and some that say nothing."""
    async with contextlib.AsyncExitStack() as stack:
        for number in range(2 * HUNG):
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
                stack.callback(writer.transport.abort)
                if number % 2:
                    writer.write(ASK * 50)
        await asyncio.sleep(seconds)


async def period(kind: str, options: argparse.Namespace, port: int) -> dict[str, float]:
    """When its steps count, and what the scraper took and got."""
    began, core = time.time(), time.process_time()
    answered = failed = 0
    if kind == "alone":
        await asyncio.sleep(options.seconds)
    elif kind == "hung":
        await hang(port, options.seconds)
    else:
        reading = asyncio.create_task(follow(port)) if options.page else None
        answered, failed = await scrape(port, options.rate, options.seconds)
        if reading is not None:
            reading.cancel()
    ended = time.time()
    return {
        "from": began + SETTLE_SECONDS,
        "to": ended,
        "core": (time.process_time() - core) / (ended - began),
        "answered": answered,
        "failed": failed,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    with (
        tempfile.TemporaryDirectory(prefix="p2ptrain-") as temporary,
        crew(folder := Path(temporary)) as people,
    ):
        run = folder / "run.toml"
        run.write_text(RUN)
        _, invite = people.bootstrap(run)
        common = {"checkpoint_every_steps": 0, "micro_batch_size": 16}
        peers = [
            people.join(invite, f"peer-{number}", **common, page=options.page and not number)
            for number in range(options.peers)
        ]
        for peer in peers:
            until(lambda peer=peer: peer.said(f"from {options.peers} peers"), str(peer), 120)
        status = people.start("status", "--data-dir", str(folder / "peer-0"), "--json")
        status.end()
        port = int(status.result()["metrics_port"])
        chance, found = random.Random(0), {kind: [] for kind in KINDS}
        for _ in range(options.turns):
            for kind in chance.sample(KINDS, len(KINDS)):
                found[kind].append(asyncio.run(period(kind, options, port)))
        times = commits(folder / "peer-0")
    return report(found, times)


def report(found: dict[str, list[dict[str, float]]], times: list[float]) -> dict[str, Any]:
    """Means and differences, of periods and the moments of all steps."""
    rates = {
        kind: [
            sum(each["from"] <= at <= each["to"] for at in times) / (each["to"] - each["from"])
            for each in periods
        ]
        for kind, periods in found.items()
    }
    alone = statistics.mean(rates["alone"])
    noise = statistics.stdev(rates["alone"])
    of_mean = noise * (2 / len(rates["alone"])) ** 0.5  # of the difference of two such means
    result: dict[str, Any] = {
        "step_rate": {kind: round(statistics.mean(each), 3) for kind, each in rates.items()},
        "noise": {"of_a_period": round(noise, 3), "of_a_difference": round(of_mean, 3)},
        "difference": {},
        "scraper_core": round(statistics.mean(each["core"] for each in found["scraped"]), 3),
        "answered": sum(each["answered"] for each in found["scraped"]),
        "failed": sum(each["failed"] for each in found["scraped"]),
    }
    for kind in ("scraped", "hung"):
        difference = statistics.mean(rates[kind]) - alone
        result["difference"][kind] = {
            "share": round(difference / alone, 4),
            "in_noise": round(abs(difference) / of_mean, 2) if of_mean else None,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="What scrapers cost a peer's training.")
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each period")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--rate", type=float, default=100.0, help="requests per second")
    parser.add_argument("--page", action="store_true", help="with the page of the run on the scraped peer")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:>14}: {value}")


if __name__ == "__main__":
    main()
