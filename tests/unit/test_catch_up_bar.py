"""The bar that a volunteer sees at a terminal while the peer catches up."""

from __future__ import annotations

import io

from rich.console import Console

from p2ptrain.replica.joining import Progress
from peers.display import CatchUpBar


def shown(*steps: Progress | None) -> str:
    terminal = io.StringIO()
    bar = CatchUpBar(Console(file=terminal, force_terminal=True, width=140))
    for step in steps:
        bar.show(step)
    bar.close()
    return terminal.getvalue()


def test_bar_tells_pieces_donors_rate_and_time_left() -> None:
    text = shown(Progress("pieces", 12, 48, 12_000_000, 48_000_000, 4_000_000.0, 3))
    assert "catching up: 12 of 48 pieces from 3 donors" in text
    assert "12.0/48.0 MB" in text
    assert "4.0 MB/s 0:09 left" in text


def test_bar_promises_no_time_when_nothing_has_come_yet() -> None:
    text = shown(Progress("entries", 0, 5, 0, 500_000, 0.0, 1))
    assert "0 of 5 entries from 1 donor" in text
    assert "left" not in text


def test_nothing_is_drawn_when_there_is_no_catch_up_and_a_second_one_is_drawn_anew() -> None:
    assert shown(None, None) == ""
    first, second = (Progress("entries", n, 5, n, 5, 1.0, 1) for n in (4, 1))
    text = shown(first, None, second)
    assert text.index("4 of 5") < text.index("1 of 5")
