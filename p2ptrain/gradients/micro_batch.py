"""How many samples go through the model at once: found by trying, 1, 2, 4, … until there is no gain.

More at once keep a device busier, until it is; from there on they only take memory, and make the swarm wait
for the last micro-batch of a step. So the answer is the smallest size that is about as fast as any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

GAIN = 1.05
"""A size is faster only if it does so many times the samples per second: less is noise."""
USELESS_DOUBLINGS = 2
"""Give up after so many that were not faster; one alone may have been disturbed."""
LONGEST_SECONDS = 2.0
"""No doubling from a pass that takes longer: it would outlast the swarm's step, and the search be felt."""


@dataclass(frozen=True)
class Trial:
    """One size that was tried."""

    size: int
    seconds: float | None
    """Of one forward and backward pass; None if the memory did not suffice."""

    @property
    def samples_per_second(self) -> float:
        return self.size / max(self.seconds, 1e-9) if self.seconds is not None else 0.0


def next_size(trials: Sequence[Trial], most: int) -> int | None:
    """The size to try next, at most `most` (≥ 1); None if enough is known."""
    if not trials:
        return 1
    last = trials[-1]
    if last.seconds is None or last.seconds > LONGEST_SECONDS or last.size >= most:
        return None
    if len(trials) > USELESS_DOUBLINGS:
        before, recent = trials[:-USELESS_DOUBLINGS], trials[-USELESS_DOUBLINGS:]
        mark = GAIN * max(trial.samples_per_second for trial in before)
        if all(trial.samples_per_second < mark for trial in recent):
            return None
    return min(2 * last.size, most)


def best_size(trials: Sequence[Trial]) -> int:
    """The smallest size that is about as fast as the fastest. Raises ValueError if none fits the memory."""
    fitting = [trial for trial in trials if trial.seconds is not None]
    if not fitting:
        raise ValueError("no size fits the memory")
    fastest = max(trial.samples_per_second for trial in fitting)
    return next(trial.size for trial in fitting if GAIN * trial.samples_per_second >= fastest)


def measure_sizes(run: Callable[[int], bool], most: int, now: Callable[[], float]) -> list[Trial]:
    """Try sizes as `next_size` says. `run` does one pass of that size: False if the memory did not suffice;
    `now` gives seconds. Each is run three times, and the quicker of the last two counts: the first one also
    loads kernels and grows the device's pool."""
    trials: list[Trial] = []
    while (size := next_size(trials, most)) is not None:
        seconds: float | None = None
        for warm in (False, True, True):
            began = now()
            if not run(size):
                seconds = None
                break
            took = now() - began
            if warm:
                seconds = took if seconds is None else min(seconds, took)
            elif took > 2 * LONGEST_SECONDS:
                seconds = took  # so slow that kernels loaded or not makes no difference
                break
        trials.append(Trial(size, seconds))
    return trials
