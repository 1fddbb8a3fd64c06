"""Rows 22 to 24 and 39: clocks, disks, memory, and those who read the metrics.

Not covered: what p2pd makes of a wrong clock; it does not see it (`lab.Clock`).
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from p2ptrain.replica.checkpoint import latest, load
from tests.chaos.rows import Figures, Trial, must, row
from tests.chaos.swarm import METRICS_PORT, Swarm

HOG = """
import sys, time
open("/proc/self/oom_score_adj", "w").write("-1000")
taken = bytearray(int(sys.argv[1]) * 1_000_000)
time.sleep(600)
"""
"""A program that takes so many megabytes, and that the kernel spares."""


@row(
    22,
    fault="clock wrong by 10 s or 1 h, both ways, or set back while it runs",
    injected="libfaketime",
    criterion="the peer takes part, or is refused at its start with the measured skew; others undisturbed",
    gate=False,
)
def wrong_clock(trial: Trial) -> Figures:
    told = {}
    with trial.swarm(peers=2) as swarm:
        steady = list(swarm.peers)
        for offset in trial.pick((10, -10, 3600, -3600), (10, 3600)):
            name = f"off-by-{offset}"
            child = swarm.add(name, inside=swarm.lab.clock(name, offset).inside)
            child.awaited = True
            swarm.wait(
                lambda child=child, name=name: not child.running or swarm.commits(name),
                f"{name} takes part or says why not",
                60,
            )
            if child.running:
                swarm.together([*steady, name])
                told[f"{offset:+d} s"] = "trains"
                child.leave()
                swarm.wait(lambda child=child: not child.running, f"{name} leaves", 20)
            else:
                said = child.last_words()
                must("clock" in said and "Traceback" not in said, f"{name} was not told of its clock: {said}")
                told[f"{offset:+d} s"] = "refused by name"
            swarm.together(steady)
        name, clock = "set-back", swarm.lab.clock("set-back")
        child = swarm.add(name, inside=clock.inside)
        child.awaited = True
        swarm.together([*steady, name])
        clock.set(-600)
        since = time.time()
        swarm.watch(trial.pick(30, 8))
        for steady_name in steady:
            steps = len(swarm.commits(steady_name, since))
            must(steps > 2, f"{steady_name} committed {steps} rounds since a clock was set back")
        if child.running:
            child.leave()
            told["set back"] = "goes on"
        else:
            told["set back"] = f"ended: {child.last_words()[:100]}"
            must("clock" in told["set back"], f"set back, it ended without a word why: {child.last_words()}")
        swarm.together(steady)
    return Figures("; ".join(f"{clock} {how}" for clock, how in told.items()), {"clocks": len(told)})


@row(
    23,
    fault="disk full, then read-only",
    injected="tmpfs on the checkpoints of one peer, filled; remounted",
    criterion="training goes on; the alarm metric rises; the older checkpoint loads; it writes again after",
    ci=True,
)
def no_disk(trial: Trial) -> Figures:
    with trial.swarm(peers=2, tells="p2ptrain_checkpoint_failures_total") as swarm:
        checkpoints = swarm.lab.folder / "full" / "checkpoints"
        disk = swarm.lab.disk(checkpoints, trial.pick(64, 16))
        swarm.add("full", checkpoint_every_steps=trial.pick(3, 6), checkpoints_kept=2)
        swarm.together()
        swarm.wait(lambda: swarm.events("full", "checkpoint_saved"), "a first checkpoint", 60)
        failures = {}
        for how in ("full", "read-only"):
            if how == "full":
                _fill(disk)
            else:
                swarm.lab.remount(disk, read_only=True)
            since = time.time()
            swarm.wait(
                lambda since=since: len(swarm.events("full", "checkpoint_failed", since)) >= 2,
                f"{how}: two checkpoints that could not be saved",
                60,
            )
            swarm.together()
            failures[how] = swarm.last("full", "checkpoint_failed")["reason"]
            must((newest := latest(checkpoints)) is not None, f"{how}: no checkpoint is left")
            load(newest)  # raises for one that is damaged
        swarm.lab.remount(disk, read_only=False)
        (disk / "ballast").unlink()
        since = time.time()
        swarm.wait(lambda: swarm.events("full", "checkpoint_saved", since), "checkpoints again", 60)
    said = failures["full"].partition(" to ")[0]
    return Figures(
        f"training went on; older checkpoint loads; saved again after; said: {said} …",
        {"checkpoints_failed": float(len(swarm.events("full", "checkpoint_failed")))},
    )


def _fill(disk: Path) -> None:
    """Leave no room on it."""
    with (disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(65_536)):
            pass


@row(
    24,
    fault="killed for want of memory",
    injected="memory cgroup of one peer, and a program in it that takes what is left",
    criterion="survivors commit within 15 s; its end is reported as SIGKILL; it comes back",
    gate=False,
)
def out_of_memory(trial: Trial) -> Figures:
    with trial.swarm(peers=2, tells="p2ptrain_peer_faults_total") as swarm:
        steady = list(swarm.peers)
        group = swarm.lab.group("small")
        child = swarm.add("small", inside=group.inside)
        swarm.together()
        child.awaited = True
        swarm.kills += 1  # its temporary folder stays
        room = 40
        group.limit_memory(group.memory_megabytes() + room)
        hog = subprocess.Popen([*group.inside, sys.executable, "-c", HOG, str(10 * room)])
        try:
            swarm.wait(lambda: not child.running, "the kernel kills the peer", 30)
        finally:
            hog.kill()
            hog.wait()
        since = time.time()
        resumed = swarm.wait(
            lambda: any(r["peers"] == 2 for name in steady for r in swarm.commits(name, since)),
            "the survivors commit",
            60,
        )
        kills, said = group.kills(), child.last_words()
        must(kills >= 1, f"the group counts {kills} kills: {said}")
        must("SIGKILL" in said, f"its end is not reported as SIGKILL: {said}")
        must(resumed <= 15, f"survivors committed after {resumed:.1f} s, at most 15 were expected")
        group.limit_memory(4096)
        swarm.restart("small")
        back = swarm.together()
    return Figures(
        f"survivors commit after {resumed:.1f} s; reported as SIGKILL; back after {back:.1f} s",
        {"resume_seconds": resumed, "back_seconds": back},
    )


@row(
    39,
    fault="100 scrapes a second; scrapers that hang",
    injected="another process on the peer's host; 40 connections with half a request",
    criterion="90 % of the rate before and after",
    gate=False,
)
def scraped(trial: Trial) -> Figures:
    seconds, shares = trial.pick(30, 6), {}
    with trial.swarm(peers=2) as swarm:
        before = swarm.pace(seconds)
        for how, per_second, hung in (("often", 100, 0), ("hung", 0, 40)):
            with _scrapers(swarm, "peer-1", per_second, hung) as answered:
                scraped = swarm.pace(seconds)
            after = swarm.pace(seconds)
            shares[how], before = scraped / ((before + after) / 2), after
            if how == "often":
                served = answered[0] / seconds
        told = f"{shares['often']:.0%} of the rate under {served:.0f} scrapes/s, "
        told += f"{shares['hung']:.0%} with 40 that hang"
        must(served >= 50, f"only {served:.0f} scrapes/s were answered; {told}")
        must(min(shares.values()) >= 0.9, f"{told}; 90 % were expected")
    return Figures(
        told, {"share_scraped": shares["often"], "share_hung": shares["hung"], "scrapes_per_second": served}
    )


SCRAPER = f"""
import asyncio, sys, time
per_second, hung = int(sys.argv[1]), int(sys.argv[2])
REQUEST = b"GET /metrics HTTP/1.1\\r\\nHost: localhost\\r\\n"

async def ask():
    global answered
    reader, writer = await asyncio.open_connection("127.0.0.1", {METRICS_PORT})
    writer.write(REQUEST + b"\\r\\n")
    answered += b"p2ptrain_global_step" in await reader.read()
    writer.close()

async def hang():
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", {METRICS_PORT})
            writer.write(REQUEST)
            await reader.read()
            writer.close()
        except OSError:
            pass
        await asyncio.sleep(1)

async def main():
    asking = [asyncio.create_task(hang()) for _ in range(hung)]
    while True:
        await asyncio.sleep(1 / (per_second or 1))
        if per_second:
            asking = [task for task in asking if not task.done()] + [asyncio.create_task(ask())]
        print(answered, flush=True)

answered = 0
asyncio.run(main())
"""
"""A program that asks so often a second, and holds so many connections on which it never finishes asking."""


@contextmanager
def _scrapers(swarm: Swarm, name: str, per_second: int, hung: int) -> Iterator[list[int]]:
    """Scrapers on that peer's host; at the end the list holds how often they got the page. They are nice:
    it is the peer's work for them that is measured, not theirs."""
    command = ["nice", "-n", "19", sys.executable, "-c", SCRAPER, str(per_second), str(hung)]
    answered = [0]
    output = swarm.lab.folder / "scraped"
    with output.open("wb") as file:
        process = subprocess.Popen([*swarm.lab.hosts.hosts[name].inside, *command], stdout=file)
        try:
            yield answered
            must(process.poll() is None, f"the scraper ended with {process.poll()}")
        finally:
            process.kill()
            process.wait()
    answered[0] = int((output.read_text().split() or ["0"])[-1])
