"""Why a peer is paused: a set of reasons, of which each may end by itself. It trains when the set is empty.

Pure: a change gives another set, and `told` what there is to tell about it. Times are Unix times, as a
person means them who says two hours and closes the lid.

Not covered: where a reason comes from. The user's own comes over the control socket, the machine's from
`limits`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from p2ptrain.events import Event, Paused, PauseReason, Resumed


@dataclass(frozen=True)
class Pause:
    """One reason, since when it holds and until when; never ending by itself: inf."""

    reason: PauseReason
    since: float
    until: float = math.inf


@dataclass(frozen=True)
class Pauses:
    """All that hold, in the order in which they came."""

    holding: tuple[Pause, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.holding)

    @property
    def until(self) -> float:
        """When the last of them will have ended by itself."""
        return max((pause.until for pause in self.holding), default=-math.inf)

    def has(self, reason: PauseReason) -> bool:
        """Whether this one holds."""
        return any(pause.reason is reason for pause in self.holding)

    def add(self, reason: PauseReason, now: float, seconds: float = math.inf) -> Pauses:
        """This reason holds for so long from now on, whether it held before or not."""
        since = next((each.since for each in self.holding if each.reason is reason), now)
        return Pauses((*self.remove(reason).holding, Pause(reason, since, now + seconds)))

    def remove(self, reason: PauseReason) -> Pauses:
        """This reason holds no longer."""
        return Pauses(tuple(each for each in self.holding if each.reason is not reason))

    def at(self, now: float) -> Pauses:
        """Those that have not ended by then."""
        return Pauses(tuple(each for each in self.holding if now < each.until))


def told(before: Pauses, after: Pauses, now: float) -> Event | None:
    """What there is to tell when the one has become the other."""
    if before == after:
        return None
    if after:
        seconds = None if math.isinf(after.until) else after.until - now
        return Paused(reasons=tuple(each.reason for each in after.holding), seconds=seconds)
    since = min(each.since for each in before.holding)
    return Resumed(reasons=tuple(each.reason for each in before.holding), seconds=now - since)
