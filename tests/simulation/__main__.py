"""Replay stories: `python -m tests.simulation SEED` prints the transcript, `FIRST-LAST` only what broke."""

from __future__ import annotations

import sys
from collections import Counter

from tests.simulation.sim import Simulation, play


def main(argument: str) -> int:
    first, _, last = argument.partition("-")
    if not last:
        sim = Simulation(int(first))
        try:
            sim.run()
        finally:
            print(sim.story, *sim.lines(), sep="\n")
        print(f"seed {first} holds")
        return 0
    broken, happened = 0, Counter[str]()
    for seed in range(int(first), int(last) + 1):
        ending = play(seed)
        happened += ending.happened
        if ending.broke is not None:
            broken += 1
            print(ending.broke, flush=True)
    print(f"{broken} stories broke;", ", ".join(f"{count} {what}" for what, count in happened.most_common()))
    return 1 if broken else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.simulation SEED | FIRST-LAST")
    sys.exit(main(sys.argv[1]))
