"""How this machine stands: battery, who uses it, what else it computes, how hot it is. Only what its limits
ask about is read.

Whether somebody uses it is for logind to say (its IdleHint, of all sessions together), which works from
within a systemd sandbox, too, where no screen can be asked. Where there is no logind, the kernel's pressure
figures do: while others wait for a processor, the machine is in use.

Not covered: Windows, and sensors that psutil does not know.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from p2ptrain import timetable
from p2ptrain.config import Limits
from peers.limits import Readings

PRESSURE = Path("/proc/pressure/cpu")
BUSY_PRESSURE_PERCENT = 10.0
"""Of the last minute, in which some process waited for a processor."""
LOGIND_SECONDS = 2.0
WARM_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "acpitz")


class Reader:
    """Reads what these limits ask about. Blocks for some milliseconds: call it beside the event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._me = psutil.Process()
        self._before: tuple[float, float, float] | None = None  # when, busy and own processor seconds

    def read(self) -> Readings:
        """How things are now."""
        limits = self._limits
        return Readings(
            week_minute=week_minute(time.localtime()),
            on_battery=_on_battery() if limits.on_battery == "pause" else None,
            idle=_idle() if limits.only_when_idle else None,
            other_cpu_percent=self._other_cpu_percent() if limits.other_cpu_percent else None,
            celsius=_celsius() if limits.temperature_celsius else None,
        )

    def _other_cpu_percent(self) -> float | None:
        """Since the last call; None for the first."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted twice
        now, busy, own = time.monotonic(), sum(times) - idle - guest, self._own_seconds()
        before, self._before = self._before, (now, busy, own)
        if before is None or now <= before[0]:
            return None
        others: float = (busy - before[1]) - (own - before[2])
        return max(0.0, min(100.0, 100 * others / (now - before[0]) / (os.cpu_count() or 1)))

    def _own_seconds(self) -> float:
        total = 0.0
        for process in (self._me, *self._me.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += sum(process.cpu_times()[:2])
        return total


def week_minute(moment: time.struct_time) -> float:
    """Minutes since Monday, 00:00."""
    in_day = 60 * moment.tm_hour + moment.tm_min + moment.tm_sec / 60
    return timetable.DAY_MINUTES * moment.tm_wday + in_day


def _on_battery() -> bool | None:
    with contextlib.suppress(OSError, AttributeError):
        battery = psutil.sensors_battery()
        if battery is not None and battery.power_plugged is not None:
            return not battery.power_plugged
    return None


def _celsius() -> float | None:
    with contextlib.suppress(OSError, AttributeError):
        sensors = psutil.sensors_temperatures()
        heat: list[float] = [each.current for name in WARM_SENSORS for each in sensors.get(name, ())]
        return max(heat, default=None)
    return None


def _idle() -> bool | None:
    """What logind says, or where it says nothing, the kernel."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(
            ["loginctl", "show-session", "--property=IdleHint"],  # noqa: S607 - from the user's own PATH
            capture_output=True,
            text=True,
            timeout=LOGIND_SECONDS,
            check=True,
        ).stdout
        if "IdleHint=" in told:
            return "IdleHint=yes" in told
    with contextlib.suppress(OSError):
        return _unpressed(PRESSURE.read_text())
    return None


def _unpressed(pressure: str) -> bool | None:
    """Whether the kernel's figures (`some avg10=0.12 avg60=…`) say that nobody waits for a processor."""
    for line in pressure.splitlines():
        kind, *figures = line.split()
        if kind == "some":
            values = dict(each.split("=", 1) for each in figures)
            return float(values["avg60"]) < BUSY_PRESSURE_PERCENT
    return None
