"""Hours of the week at which a machine may train, as people write them: `22:00-07:00`, `sat,sun 00:00-24:00`,
`mon-fri 18:30-08:00`.

Pure: the moment is an argument, in minutes of the local week, which begins on Monday at 00:00.

Not covered: daylight saving. In the night when the clock is put, a window is an hour off.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES = 24 * 60
WEEK_MINUTES = 7 * DAY_MINUTES

_WINDOW = re.compile(r"(?:([a-z]{3}(?:[,-][a-z]{3})*)\s+)?(\d{2}):(\d{2})-(\d{2}):(\d{2})")

Window = tuple[int, int]
"""First minute of the week, and how many minutes long."""


def parse(text: str) -> list[Window]:
    """The windows that one entry of a schedule stands for: one a day. Raises ValueError, saying what is
    wrong."""
    found = _WINDOW.fullmatch(text.strip().lower())
    if not found:
        raise ValueError(f"{text!r} is no time of the week; write it as 22:00-07:00 or mon-fri 18:30-08:00")
    days, *numbers = found.groups()
    opens_hour, opens_minute, closes_hour, closes_minute = map(int, numbers)
    opens, closes = 60 * opens_hour + opens_minute, 60 * closes_hour + closes_minute
    if max(opens_minute, closes_minute) > 59 or opens >= DAY_MINUTES or closes > DAY_MINUTES:
        raise ValueError(f"{text!r} names a time that no clock shows; it goes from 00:00 to 24:00")
    if opens == closes:
        raise ValueError(f"{text!r} never opens, as it ends when it begins; the whole day is 00:00-24:00")
    length = (closes - opens) % DAY_MINUTES or DAY_MINUTES
    return [(DAY_MINUTES * day + opens, length) for day in _days(days, text)]


def opens_in(schedule: Sequence[str], minute: float) -> float:
    """Minutes until this schedule is open; 0 if it is. An empty one always is. Raises ValueError."""
    windows = [window for entry in schedule for window in parse(entry)]
    if not windows or any((minute - start) % WEEK_MINUTES < length for start, length in windows):
        return 0.0
    return min((start - minute) % WEEK_MINUTES for start, _ in windows)


def _days(text: str | None, whole: str) -> list[int]:
    """`mon-wed,sat` → [0, 1, 2, 5]; a range may go over the week's end."""
    if text is None:
        return list(range(7))
    days: list[int] = []
    for part in text.split(","):
        ends = part.split("-")
        if len(ends) > 2 or not set(ends) <= set(DAYS):
            raise ValueError(f"{whole!r} names a day that is none; they are {', '.join(DAYS)}")
        first, last = DAYS.index(ends[0]), DAYS.index(ends[-1])
        days += [(first + day) % 7 for day in range((last - first) % 7 + 1)]
    return sorted(set(days))
