"""Virtual asyncio time: it jumps, it is exact, and where it cannot go on it says so."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from p2ptrain.swarm.clock import Stuck, run


def now() -> float:
    return asyncio.get_running_loop().time()


def test_time_passes_exactly_as_waited_when_nothing_else_happens() -> None:
    async def main() -> float:
        assert now() == 0.0
        await asyncio.sleep(3600)
        return now()

    assert run(main()) == 3600.0


def test_timeout_fires_when_its_time_has_come_and_nothing_came_before() -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        assert now() == 5.0

    run(main())


def test_no_timer_fires_early_when_times_are_arbitrary() -> None:
    chance = random.Random(1)
    late: list[float] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(1000):
            due = chance.uniform(0, 1000)
            for at in (due, due + 0.4e-9):  # closer than the loop's clock resolution
                loop.call_at(at, lambda at=at: late.append(loop.time() - at))
        await asyncio.sleep(1001)

    run(main())
    assert len(late) == 2000
    assert min(late) >= 0
    assert max(late) <= 1e-6, "and at most a tick late"


def test_run_is_stuck_and_says_who_waits_where_when_everyone_waits_for_ever() -> None:
    cleaned_up = []

    async def wait_for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned_up.append(True)

    async def main() -> None:
        await asyncio.sleep(1.5)
        async with asyncio.timeout(float("inf")), asyncio.TaskGroup() as group:
            group.create_task(wait_for_ever(), name="a patient task")

    with pytest.raises(Stuck, match=r"1\.5\d* s.*'a patient task' in .*wait_for_ever:\d+ > Event\.wait:\d+"):
        run(main())
    assert cleaned_up == [True]


def test_run_is_stuck_when_somebody_polls_without_sleeping() -> None:
    async def main() -> None:
        for _ in itertools.count():
            await asyncio.sleep(0)

    with pytest.raises(Stuck, match=r"polls without sleeping: 'Task-\d+' in .*main:\d+"):
        run(main())


def test_run_raises_what_main_raises_and_returns_what_it_returns() -> None:
    async def main(fail: bool) -> int:
        if fail:
            raise KeyError("ours")
        return 7

    assert run(main(fail=False)) == 7
    with pytest.raises(KeyError, match="ours"):
        run(main(fail=True))


@pytest.mark.parametrize("where", ["callback", "task"])
def test_exception_that_nobody_catches_ends_the_run_when_it_is_raised(where: str) -> None:
    reached = []

    async def fail() -> None:
        raise KeyError("ours")

    async def main() -> None:
        if where == "callback":
            asyncio.get_running_loop().call_later(2.0, lambda: {}["ours"])
        else:
            background = asyncio.create_task(fail())
            await asyncio.sleep(2.0)
            del background
        await asyncio.sleep(100)
        reached.append(True)

    with pytest.raises(KeyError, match="ours") as caught:
        run(main())
    assert not reached
    assert caught.value.__notes__[0].startswith("uncaught at 2.000000 s of virtual time")


def test_exception_comes_out_when_it_is_raised_as_main_ends() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(lambda: {}["ours"])
        await asyncio.sleep(0)

    with pytest.raises(KeyError, match="ours"):
        run(main())


def test_thread_is_refused_when_one_is_asked_for() -> None:
    async def main() -> None:
        await asyncio.to_thread(print)

    with pytest.raises(RuntimeError, match="call it inline instead"):
        run(main())


def test_socket_is_refused_when_one_is_to_be_waited_for() -> None:
    async def main() -> None:
        await asyncio.open_connection("127.0.0.1", 1)

    with pytest.raises(RuntimeError, match="cannot wait for a socket"):
        run(main())


def test_global_chance_follows_the_seed_and_is_put_back_when_the_run_is_over() -> None:
    async def main() -> float:
        return random.random()

    random.seed(5)
    expected = random.random()
    random.seed(5)
    one, same, other = run(main(), seed=1), run(main(), seed=1), run(main(), seed=2)
    assert one == same != other
    assert random.random() == expected
