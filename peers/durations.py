"""Times as people write them on a command line: 30m, 2h, 7d."""

from __future__ import annotations

import re

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_seconds(text: str) -> int | None:
    """Seconds of `90s`, `30m`, `24h` or `7d`; None if the text is no such time."""
    parts = re.fullmatch(r"([1-9]\d{0,8})([smhd])", text)
    return int(parts[1]) * _UNITS[parts[2]] if parts else None
