"""Play stories: one with its transcript, or as many as there is time for.

`python -m tests.simulation SEED` tells one; `--stories N [--first-seed S] [--seconds T]` soaks, shows how far
it is and prints what broke. Exit status 1 if anything did.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

from tests.simulation.sim import Simulation, play_many

AT_ONCE = 50
PROGRESS_SECONDS = 5.0


def tell(seed: int) -> int:
    """One story, whole."""
    sim = Simulation(seed)
    try:
        sim.run()
    finally:
        print(sim.story, *sim.transcript.lines(), sep="\n")
    print(f"seed {seed} holds")
    return 0


def soak(stories: int, first: int, seconds: float, workers: int) -> int:
    """Many stories, until they are played or the time is up."""
    began = time.monotonic()
    happened: Counter[str] = Counter()
    broken, shown_at = 0, began
    parts = iter(
        [range(at, min(at + AT_ONCE, first + stories)) for at in range(first, first + stories, AT_ONCE)]
    )
    running: set[Future[tuple[Counter[str], list[str]]]] = set()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        while True:
            while len(running) < 2 * workers and time.monotonic() - began < seconds:
                part = next(parts, None)
                if part is None:
                    break
                running.add(pool.submit(play_many, part))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                events, broke = future.result()
                happened += events
                broken += len(broke)
                for story in broke:
                    print(story, end="\n\n", flush=True)
            now = time.monotonic()
            if now - shown_at > PROGRESS_SECONDS or not running:
                shown_at, played = now, happened["stories"]
                rate = played / (now - began)
                print(f"{played:,} of {stories:,} stories, {rate:.0f}/s, {broken} broke", file=sys.stderr)
    print(f"{happened['stories']:,} stories in {time.monotonic() - began:.0f} s, {broken} broke:")
    print(", ".join(f"{count:,} {what}" for what, count in happened.most_common() if what != "stories"))
    return 1 if broken else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seed", nargs="?", type=int, help="tell this story")
    parser.add_argument("--stories", type=int, default=10_000, help="how many to play (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    chosen = parser.parse_args(arguments)
    if chosen.seed is not None:
        return tell(chosen.seed)
    return soak(chosen.stories, chosen.first_seed, chosen.seconds, chosen.workers)


if __name__ == "__main__":
    sys.exit(main())
