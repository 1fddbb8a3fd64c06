"""How long rounds take with spans by measured rates, beside the optimum of the linear program and beside
hivemind's load balancer, on the same uplinks.

    python tests/benchmarks/spans.py [--json]

Nothing is sent: with shares x, a member at rate r sends (1 + (n - 2) x) / r of the gradient, and the slowest
ends the round. The optimum comes from scipy's solver on exact rates, while ours are rounded.

Not covered: what a link does on the way (`tests/chaos`).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linprog

from p2ptrain.protocol.spans import balanced, share_out

VALUES = 10_000_000
UPLINKS: dict[str, list[float]] = {
    "equal": [100.0] * 4,
    "unequal": [10.0, 20.0, 50.0, 100.0],
    "one slow": [10.0, 100.0, 100.0, 100.0],
    "near": [80.0, 90.0, 100.0, 110.0],
    **{
        f"{count} homes": [10 ** random.Random(count).uniform(0.7, 2.3) for _ in range(count)]
        for count in (8, 32, 64)
    },
}
"""Mbit/s."""


def round_seconds(spans: Sequence[int], mbit: Sequence[float]) -> float:
    """With fp16; `spans` are boundaries."""
    others = len(mbit) - 2
    shares = np.diff(spans) / VALUES
    return max(
        16 * VALUES * (1 + others * share) / (rate * 1e6) for share, rate in zip(shares, mbit, strict=True)
    )


def optimum_seconds(mbit: Sequence[float]) -> float:
    """The least that any shares allow."""
    count, seconds_each = len(mbit), 16 * VALUES / (np.asarray(mbit) * 1e6)
    # Unknown: the shares, and the time; minimise the time.
    ends = np.hstack([np.diag((count - 2) * seconds_each), -np.ones((count, 1))])
    solved = linprog(
        np.array([*[0.0] * count, 1.0]),
        A_ub=ends,
        b_ub=-seconds_each,
        A_eq=np.array([[*[1.0] * count, 0.0]]),
        b_eq=[1.0],
    )
    return float(solved.x[-1])


def hivemind_seconds(mbit: Sequence[float]) -> tuple[float | None, float | str]:
    """(round, what finding the spans took), or None and why it found none."""
    from hivemind.averaging.load_balancing import load_balance_peers

    began = time.perf_counter()
    try:
        sizes = load_balance_peers(VALUES, mbit)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"[:160]
    took = time.perf_counter() - began
    return round_seconds([0, *np.cumsum(sizes)], mbit), took


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", action="store_true")
    results: dict[str, Any] = {}
    as_json = parser.parse_args().json
    for name, mbit in UPLINKS.items():
        began = time.perf_counter()
        spans = share_out(VALUES, balanced([rate * 125_000 for rate in mbit]))
        took = time.perf_counter() - began
        best = optimum_seconds(mbit)
        theirs, theirs_took = hivemind_seconds(mbit)
        results[name] = {
            "round_seconds": round(round_seconds(spans, mbit), 3),
            "optimum_seconds": round(best, 3),
            "of_optimum": round(round_seconds(spans, mbit) / best, 3),
            "equal_spans_of_optimum": round(
                round_seconds(share_out(VALUES, [1.0] * len(mbit)), mbit) / best, 3
            ),
            "hivemind_of_optimum": None if theirs is None else round(theirs / best, 3),
            "microseconds": round(took * 1e6),
            "hivemind_microseconds": round(theirs_took * 1e6)
            if isinstance(theirs_took, float)
            else theirs_took,
        }
        if not as_json:
            print(f"{name:10}", ", ".join(f"{key} {value}" for key, value in results[name].items()))
    if as_json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
