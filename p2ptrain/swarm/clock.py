"""Time that jumps to the next thing that happens, instead of passing.

`EventQueue` does it for plain callbacks, fast enough to simulate thousands of swarms of pure state machines.
`VirtualClockLoop` does it for asyncio: an hour of heartbeats and time-outs takes as long as the code they
run. Both tell the same story every time they are given the same one.

Not covered: threads, sockets and child processes, which take real time; and what a program itself leaves to
chance, such as the order of a set or `os.urandom`.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import selectors
from collections.abc import Callable, Coroutine
from contextvars import Context
from heapq import heappop, heappush
from typing import Any, NoReturn, Protocol, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

TICKS_PER_SECOND = 2**20
"""Virtual asyncio time is a whole number of ticks: sums and differences of times are then exact, and no timer
fires a rounding error too early. A tick, 0.95 µs, is longer than the clock resolution asyncio allows for."""
MAX_TURNS_PER_INSTANT = 100_000
"""A loop that turns this often without its clock moving will never get anywhere."""
MAX_TASKS_SHOWN = 20


class Cancellable(Protocol):
    """What is going to happen, unless `cancel` is called."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Who keeps the time and calls when it has come: an `EventQueue`, or any asyncio event loop."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> Cancellable: ...


class Stuck(RuntimeError):
    """The program under the virtual clock gets nowhere any more: a bug in it, not a fault to survive."""


# -- plain callbacks -----------------------------------------------------------------------------------------


class Timer:
    """One callback that is due; `cancel` forgets it."""

    __slots__ = ("_args", "_callback")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._callback: Callable[..., object] | None = callback
        self._args = args

    def cancel(self) -> None:
        self._callback, self._args = None, ()

    def fire(self) -> bool:
        """Run the callback; False if there is none any more."""
        callback, args = self._callback, self._args
        if callback is None:
            return False
        self._callback, self._args = None, ()
        callback(*args)
        return True


class EventQueue:
    """Callbacks in the order of their times, and for equal times in the order they were scheduled in.

    A cancelled timer keeps its place until its time comes, so memory is bounded by what was scheduled ahead.
    """

    def __init__(self) -> None:
        self.now = 0.0
        """Virtual seconds since the beginning."""
        self._heap: list[tuple[float, int, Timer]] = []
        self._serial = itertools.count()

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> Timer:
        """Run `callback(*args)` at `when`. ValueError if that is past, or never comes."""
        if not self.now <= when < math.inf:
            raise ValueError(f"nothing can be scheduled for {when} s: it is {self.now:.6f} s already")
        timer = Timer(callback, args)
        heappush(self._heap, (when, next(self._serial), timer))
        return timer

    def run(self, until: float | Callable[[], bool], max_events: int) -> bool:
        """Let things happen until a time has come, or until a condition holds; it is asked after each event.

        False if nothing is left to happen and the condition still does not hold, else True. Raises Stuck if
        `max_events` events were not enough. What a callback raises comes out with the virtual time noted.
        """
        reached, end = (until, math.inf) if callable(until) else (None, until)
        if reached is not None and reached():
            return True
        heap, events = self._heap, 0
        try:
            while heap and heap[0][0] <= end:
                self.now, _, timer = heappop(heap)
                if not timer.fire():
                    continue
                if reached is not None and reached():
                    return True
                events += 1
                if events >= max_events:
                    raise Stuck(
                        f"not there after {events} events; see what keeps the swarm busy, or raise max_events"
                    )
        except Exception as error:
            error.add_note(f"at {self.now:.6f} s of virtual time")
            raise
        if reached is not None:
            return False
        self.now = max(self.now, end)
        return True


# -- asyncio -------------------------------------------------------------------------------------------------


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock starts at 0 and jumps to the next timer whenever nothing is ready.

    Only waiting takes virtual time, computing takes none. Where an ordinary loop would wait or turn for ever,
    this one raises Stuck and says who waits where. And an exception that nobody caught ends the run, instead
    of becoming a line in a log, unless `set_exception_handler` was used.
    """

    def __init__(self) -> None:
        self._virtual_seconds = 0.0
        self._turns = 0
        self._uncaught: BaseException | None = None
        selector = _JumpingSelector(self._jump)
        super().__init__(selector)
        selector.sealed = True

    def time(self) -> float:
        return self._virtual_seconds

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        if when == math.inf:  # a timer that is set and never fires; the base class would count the days to it
            return asyncio.TimerHandle(when, callback, args, self, context)
        ticks = math.ceil(when * TICKS_PER_SECOND)
        return super().call_at(ticks / TICKS_PER_SECOND, callback, *args, context=context)

    def run_in_executor(self, executor: object, func: Callable[..., object], *args: object) -> NoReturn:
        raise RuntimeError(f"{func} was to run in a thread, which takes real time; call it inline instead")

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is None or self._uncaught is not None or self.get_exception_handler() is not None:
            super().call_exception_handler(context)
        else:
            error.add_note(f"uncaught at {self.time():.6f} s of virtual time: {context['message']}")
            self._uncaught = error

    def raise_uncaught(self) -> None:
        """Raise the first exception that nobody caught, if there was one."""
        if self._uncaught is not None:
            error, self._uncaught = self._uncaught, None
            raise error

    def _jump(self, timeout: float | None) -> None:
        """Called on every turn; `timeout` is 0 while callbacks are ready, None if no timer is set either."""
        self.raise_uncaught()
        if timeout is None:
            raise Stuck(
                f"everyone waits for ever at {self.time():.6f} s of virtual time: {self._who_waits()}"
            )
        if timeout > 0:
            self._virtual_seconds += timeout
            self._turns = 0
            return
        self._turns += 1
        if self._turns > MAX_TURNS_PER_INSTANT:
            self._turns = 0
            raise Stuck(
                f"after {MAX_TURNS_PER_INSTANT} turns it is still {self.time():.6f} s of virtual time; "
                f"somebody polls without sleeping: {self._who_waits()}"
            )

    def _who_waits(self) -> str:
        waiting = sorted(f"{task.get_name()!r} in {_place(task)}" for task in asyncio.all_tasks(self))
        others = len(waiting) - MAX_TASKS_SHOWN
        return "; ".join(waiting[:MAX_TASKS_SHOWN]) + (f"; and {others} more" if others > 0 else "")


def _place(task: asyncio.Task[Any]) -> str:
    """Where a task waits: the coroutines it is in, outermost first, as name:line."""
    places = []
    inner: Any = task.get_coro()
    while (frame := getattr(inner, "cr_frame", None)) is not None:
        places.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        inner = inner.cr_await
    return " > ".join(places)


class _JumpingSelector(selectors.SelectSelector):
    """Never waits: `jump` is told for how long it would have."""

    def __init__(self, jump: Callable[[float | None], None]) -> None:
        super().__init__()
        self._jump = jump
        self.sealed = False
        """Set once the loop has registered its own wake-up pipe; nothing else may be waited for."""

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if self.sealed:
            raise RuntimeError(
                "a virtual clock cannot wait for a socket, pipe or process; use an ordinary loop"
            )
        return super().register(fileobj, events, data)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._jump(timeout)
        return []


def run(main: Coroutine[Any, Any, T], seed: int = 0) -> T:
    """Run `main` under a virtual clock, with the global `random` seeded meanwhile; returns what it returns.

    Raises what `main` raises, Stuck if it gets nowhere, and else the first exception that nobody caught.
    """
    loop = VirtualClockLoop()
    chance = random.getstate()
    random.seed(seed)
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            result = runner.run(main)
    finally:
        random.setstate(chance)
    loop.raise_uncaught()
    return result
