"""When a volunteer's machine shall not train: on battery, outside of its hours, while it is used or hot.

Pure: (limits, readings, what held before, now) → what holds now. Each reason begins at one threshold and ends
at another, and only once the machine has been beyond it for a while: nobody wants to hear a fan go on and off
every few seconds. What cannot be read is no reason to pause, and ends one.

Not covered: the readings (`readings`), what is asked for by people (`pauses`), and rates of the network
(`p2ptrain/swarm/throttle.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from p2ptrain import timetable
from p2ptrain.config import Limits
from p2ptrain.events import PauseReason

DWELL_SECONDS = 60.0
"""A reason ends when nothing has spoken for it for so long."""
BUSY_SECONDS = 10.0
"""Other programs' load is a reason only if it lasts: each start of a program is a burst."""
CALM_OF_CPU = 0.75
"""Of the limit: below it other programs' load has ended."""
COOL_BY_CELSIUS = 5.0
"""Below the limit: there heat has ended."""


@dataclass(frozen=True)
class Readings:
    """How the machine stands; None for what it does not tell."""

    week_minute: float
    """Minutes since Monday, 00:00, by the local clock."""
    on_battery: bool | None = None
    idle: bool | None = None
    """Whether nobody uses it."""
    other_cpu_percent: float | None = None
    """What other processes take of all processors together."""
    celsius: float | None = None
    """Of its hottest sensor."""


@dataclass(frozen=True)
class Standing:
    """One reason: whether it holds, and since when (Unix time) the readings have said otherwise."""

    holds: bool = False
    otherwise_since: float | None = None


Strain = Mapping[PauseReason, Standing]
NONE: Strain = MappingProxyType({})


def decide(limits: Limits, readings: Readings, before: Strain, now: float) -> Strain:
    """Every reason as it stands after these readings."""
    after = {}
    for reason, (begins, ends, patience) in _wishes(limits, readings).items():
        standing = before.get(reason, Standing())
        otherwise = ends if standing.holds else begins
        if not otherwise:
            after[reason] = Standing(standing.holds)
            continue
        since = now if standing.otherwise_since is None else standing.otherwise_since
        turned = now - since >= (_dwell(reason) if standing.holds else patience)
        after[reason] = Standing(not standing.holds) if turned else Standing(standing.holds, since)
    return after


def holding(strain: Strain) -> list[PauseReason]:
    """The reasons that hold."""
    return [reason for reason, standing in strain.items() if standing.holds]


def closed_seconds(limits: Limits, readings: Readings) -> float:
    """Until the schedule opens; 0 if it is open."""
    return 60 * timetable.opens_in(limits.schedule, readings.week_minute)


def resumes_when(reason: PauseReason, limits: Limits) -> str:
    """What ends this reason, where no time is known."""
    minute = f"for {DWELL_SECONDS:.0f} s"
    match reason:
        case PauseReason.USER:
            return "with `p2ptrain resume`"
        case PauseReason.ORGANIZER:
            return "when the organizer says so"
        case PauseReason.SCHEDULE:
            return "when the schedule opens"
        case PauseReason.BATTERY:
            return f"when it has had mains power {minute}"
        case PauseReason.ACTIVITY:
            return f"when nobody has used it {minute}"
        case PauseReason.OTHER_CPU:
            calm = CALM_OF_CPU * limits.other_cpu_percent
            return f"when other programs take less than {calm:.0f} % of the processors {minute}"
        case PauseReason.TEMPERATURE:
            return f"when it is cooler than {limits.temperature_celsius - COOL_BY_CELSIUS:.0f} °C {minute}"


def _dwell(reason: PauseReason) -> float:
    return 0.0 if reason is PauseReason.SCHEDULE else DWELL_SECONDS


def _wishes(limits: Limits, readings: Readings) -> dict[PauseReason, tuple[bool, bool, float]]:
    """Reason → whether these readings speak for its beginning, whether for its end, and for how many seconds
    they must do so before it begins."""
    closed = timetable.opens_in(limits.schedule, readings.week_minute) > 0
    used = limits.only_when_idle and readings.idle is False
    battery = limits.on_battery == "pause" and readings.on_battery is True
    cpu = readings.other_cpu_percent if limits.other_cpu_percent else None
    celsius = readings.celsius if limits.temperature_celsius else None
    busy = cpu is not None and cpu > limits.other_cpu_percent
    calm = cpu is None or cpu < CALM_OF_CPU * limits.other_cpu_percent
    hot = celsius is not None and celsius > limits.temperature_celsius
    cool = celsius is None or celsius < limits.temperature_celsius - COOL_BY_CELSIUS
    return {
        PauseReason.SCHEDULE: (closed, not closed, 0.0),
        PauseReason.BATTERY: (battery, not battery, 0.0),
        PauseReason.ACTIVITY: (used, not used, 0.0),
        PauseReason.OTHER_CPU: (busy, calm, BUSY_SECONDS),
        PauseReason.TEMPERATURE: (hot, cool, 0.0),
    }
