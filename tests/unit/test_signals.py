"""A first signal, before there is anything to finish."""

from __future__ import annotations

import asyncio

import pytest

from peers.signals import Stop, Stopped, heeding


def test_first_signal_ends_at_once_what_is_waited_for() -> None:
    async def story() -> None:
        stop = Stop()
        async with heeding(stop):
            stop.ask("Ctrl-C")
            await asyncio.Event().wait()

    with pytest.raises(Stopped, match="Ctrl-C"):
        asyncio.run(story())


def test_signal_is_left_to_others_once_there_is_something_to_finish() -> None:
    async def story() -> str:
        stop = Stop()
        async with heeding(stop) as over:
            over()
            stop.ask("Ctrl-C")
            for _ in range(3):
                await asyncio.sleep(0)
            await stop.first()
            return "finished"

    assert asyncio.run(story()) == "finished"


def test_who_is_cancelled_for_another_reason_is_not_told_of_a_signal() -> None:
    async def story() -> None:
        async with heeding(Stop()):
            await asyncio.Event().wait()

    async def impatient() -> None:
        task = asyncio.create_task(story())
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(impatient())


def test_failure_comes_out_as_it_is() -> None:
    async def story() -> None:
        async with heeding(Stop()):
            raise ValueError("not built")

    with pytest.raises(ValueError, match="not built"):
        asyncio.run(story())
