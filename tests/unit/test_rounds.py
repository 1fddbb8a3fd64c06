"""How `Rounds` keeps time for its machine, on the loop that peers run on. All else of it is in `swarm/`."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import uvloop

from p2ptrain.allreduce import Rounds
from p2ptrain.gradients.codecs import Fp32


def test_deadline_that_has_passed_may_be_set_again() -> None:
    ticks = 0

    def tick(now: float) -> list[Any]:
        nonlocal ticks
        ticks += 1
        return []

    async def twice_late() -> None:
        overdue: Any = SimpleNamespace(deadline=lambda: 0.0, tick=tick)
        nobody: Any = None
        rounds = Rounds(nobody, overdue, Fp32(), nobody, 1024, nobody, nobody, nobody, "f" * 64)
        for _ in range(2):
            rounds._carry_out([])
        await asyncio.sleep(0)
        rounds.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(twice_late())
    assert ticks == 1
