"""How a running peer looks to its volunteer: one panel, drawn from what `status` answers. On a terminal,
`join` keeps it below its log, and `top` fills the screen with it.

Not covered: the swarm, which `monitor` shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from p2ptrain.events import clean
from peers.control_cli import STATES, pause_lines, status_rows
from peers.display import clock, sparkline

BAR_WIDTH = 32


def body(status: Mapping[str, Any], now: float) -> RenderableType:
    """All that the panel shows; `now` is Unix time."""
    state = STATES[status["state"]]
    parts: list[RenderableType] = [
        Text(state, "bold green" if state.startswith("training") else "bold yellow")
    ]
    parts += [Text(line, "yellow") for line in pause_lines(status["pauses"], now)]
    if "step" not in status:  # there is no replica yet
        return Group(*parts)
    if status["waiting"]:
        parts.append(Text(f"waiting: {clean(status['waiting'])}", "yellow"))
    if (progress := status["catching_up"]) is not None:
        parts.append(_bar("catching up", progress["done_bytes"], progress["total_bytes"], _coming(progress)))
    mine, target = status["batch"]["mine"], status["batch"]["target"]
    parts.append(_bar("this step", mine, target, f"{mine:,} of {target:,} samples are mine"))
    if losses := status["losses"]:
        parts.append(Text(f"{losses[0]:.2f} {sparkline(losses)} {losses[-1]:.2f} training loss", "cyan"))
    rows = Table.grid(padding=(0, 2, 0, 0))
    for name, text in status_rows(status).items():
        rows.add_row(Text(name, "dim"), Text(text, no_wrap=True, overflow="ellipsis"))
    return Group(*parts, rows)


def framed(status: Mapping[str, Any], now: float) -> Panel:
    """The same in a frame, with the run's name on it."""
    title = Text.assemble(("p2ptrain ", "bold"), f"{status['run_id']}  {clock(status['seconds'])}")
    return Panel(body(status, now), title=title, title_align="left")


def _coming(progress: Mapping[str, Any]) -> str:
    left = "" if progress["eta_seconds"] is None else f", {clock(progress['eta_seconds'])} left"
    donors = "1 donor" if progress["donors"] == 1 else f"{progress['donors']} donors"
    return (
        f"{progress['done']:,} of {progress['total']:,} {progress['what']} from {donors}, "
        f"{progress['bytes_per_second'] / 1e6:,.1f} MB/s{left}"
    )


def _bar(name: str, done: float, total: float, words: str) -> RenderableType:
    row = Table.grid(padding=(0, 1, 0, 0))
    row.add_row(
        Text(name, "dim"),
        ProgressBar(total=max(total, 1), completed=min(done, total), width=BAR_WIDTH),
        Text(words, no_wrap=True, overflow="ellipsis"),
    )
    return row


class Below:
    """The panel below whatever is written to the terminal meanwhile; nothing of it stays there."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, status: Mapping[str, Any], now: float) -> None:
        """Draw it as things are."""
        self._live.update(framed(status, now), refresh=True)
