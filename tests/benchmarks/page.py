"""What the monitor's page costs with a large swarm and a long history, in Debian's Chromium:

    python tests/benchmarks/page.py [--peers 200] [--rounds 10000] [--updates 20] [--json] [--picture FILE]

The swarm is simulated (`tests/browser/simulated.py`); page, server and browser are the real ones. `paint` is
from the start of the navigation to the first contentful paint, `ready` until the whole history is shown,
`update` from when the monitor publishes until the browser has drawn it, and `script` the browser's own count
of time in JavaScript for each update, in which every peer tells of one more round. Until it is published an
event has waited for at most 0.2 s at its peer and 0.4 s at the monitor.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.browser.chrome import chromium
from tests.browser.simulated import Simulated

FLUSH_SECONDS = 0.4
"""As the monitor."""
DRAWN = """step => new Promise(done => {
  const look = () => document.getElementById('step').textContent === step
    ? requestAnimationFrame(() => done(true)) : requestAnimationFrame(look);
  look();
})"""


async def measure(peers: int, rounds: int, updates: int, picture: Path | None) -> dict[str, Any]:
    """The figures, in seconds."""
    simulated = Simulated(peers)
    now = time.time()
    simulated.present(now)
    simulated.history(rounds - 60, now - 61, members=3)
    for number in range(60):
        simulated.round(now - 60 + number)
    simulated.publish(now)
    scripts, delays = [], []
    async with chromium() as browser, simulated.served() as url:
        page = await (await browser.new_context(viewport={"width": 1280, "height": 900})).new_page()
        began = time.perf_counter()
        await page.goto(url, wait_until="commit")
        await page.evaluate(DRAWN, f"{rounds:,}")
        ready = time.perf_counter() - began
        paint = await page.evaluate(
            "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"
        )
        client = await page.context.new_cdp_session(page)
        await client.send("Performance.enable")

        async def script_seconds() -> float:
            metrics = (await client.send("Performance.getMetrics"))["metrics"]
            return float(next(each["value"] for each in metrics if each["name"] == "ScriptDuration"))

        for _ in range(updates):
            await asyncio.sleep(FLUSH_SECONDS)
            before, told = await script_seconds(), time.perf_counter()
            simulated.round(time.time())
            simulated.publish(time.time())
            await page.evaluate(DRAWN, f"{simulated.step:,}")
            delays.append(time.perf_counter() - told)
            await asyncio.sleep(0.1)
            scripts.append(await script_seconds() - before)
        if picture is not None:
            await page.screenshot(path=picture, full_page=True)
    return {
        "peers": peers,
        "rounds": rounds,
        "paint_seconds": round(paint, 3),
        "ready_seconds": round(ready, 3),
        "update_seconds": {"median": round(statistics.median(delays), 3), "max": round(max(delays), 3)},
        "script_seconds": {"median": round(statistics.median(scripts), 4), "max": round(max(scripts), 4)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What the monitor's page costs.")
    parser.add_argument("--peers", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--picture", type=Path, help="where to put a screenshot")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = asyncio.run(measure(options.peers, options.rounds, options.updates, options.picture))
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:>16}: {value}")


if __name__ == "__main__":
    main()
