"""No task of a crew outlives its owner, and none fails unnoticed."""

from __future__ import annotations

import asyncio

import pytest

from p2ptrain.errors import LocalFault
from p2ptrain.swarm.crew import Crew


async def for_ever() -> None:
    await asyncio.get_running_loop().create_future()


async def fail() -> None:
    raise ZeroDivisionError


async def test_tasks_are_cancelled_when_the_owner_leaves() -> None:
    async with Crew() as crew:
        task = crew.spawn(for_ever())
        await asyncio.sleep(0)
    assert task.cancelled()


async def test_owner_is_ended_by_the_failure_when_a_task_fails() -> None:
    async def own() -> None:
        async with Crew() as crew:
            crew.spawn(fail())
            await for_ever()

    with pytest.raises(ZeroDivisionError):
        await own()
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_failure_comes_out_when_the_owner_leaves_without_waiting() -> None:
    async def fail_at_the_end() -> None:
        try:
            await for_ever()
        finally:
            raise ZeroDivisionError

    async def own() -> None:
        async with Crew() as crew:
            crew.spawn(fail_at_the_end())
            await asyncio.sleep(0)

    with pytest.raises(ZeroDivisionError):
        await own()


async def test_owners_error_comes_out_as_it_is_when_it_raises() -> None:
    async def own() -> None:
        async with Crew() as crew:
            crew.spawn(for_ever())
            raise LocalFault("as it is")

    with pytest.raises(LocalFault):
        await own()


async def test_owner_stays_cancelled_when_it_was_cancelled_from_outside() -> None:
    async def own() -> None:
        async with Crew() as crew:
            crew.spawn(for_ever())
            await for_ever()

    owner = asyncio.create_task(own())
    await asyncio.sleep(0)
    owner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await owner


async def test_work_is_cancelled_at_once_when_it_comes_while_leaving() -> None:
    async with Crew() as crew:
        pass
    task = crew.spawn(for_ever())
    with pytest.raises(asyncio.CancelledError):
        await task
