"""`p2ptrain top`: the running peer on the whole screen, with keys for what one may ask of it.

It asks as the other commands do, over the peer's socket, once a second and beside the screen; the peer does
not notice. Needs Textual (extra `tui`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import Footer, Header, RichLog, Static

from p2ptrain.errors import P2PTrainError
from peers import control
from peers.panel import body

LOOK_SECONDS = 1.0
Ask = Callable[[Path, dict[str, Any]], dict[str, Any]]
News = Callable[[], list[str]]
"""What has happened since the last call, a line each."""


class Top(App[None]):
    """The status above, what happens below."""

    TITLE = "p2ptrain"
    CSS = """
    #status { height: auto; max-height: 60%; padding: 0 1; border: round $primary; }
    #news { border: round $secondary; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "order('pause')", "Pause"),
        Binding("r", "order('resume')", "Resume"),
        Binding("f", "order('finish')", "Finish this step, then leave"),
        Binding("l", "order('leave')", "Leave"),
        Binding("q", "quit", "Close this view"),
    ]

    def __init__(self, folder: Path, news: News, ask: Ask = control.ask) -> None:
        super().__init__()
        self._folder, self._news, self._ask = folder, news, ask

    def compose(self) -> ComposeResult:
        yield Header()
        with VerticalScroll(id="status"):
            yield Static("asking the peer …", id="figures")
        yield RichLog(id="news", wrap=True, max_lines=1000)
        yield Footer()

    def on_mount(self) -> None:
        self.set_interval(LOOK_SECONDS, self.look)
        self.look()

    @work(thread=True, exclusive=True, group="look")
    def look(self) -> None:
        """Show how things are now."""
        try:
            status: Mapping[str, Any] | str = self._ask(self._folder, {"ask": "status"})
        except P2PTrainError as fault:
            status = str(fault)
        self.call_from_thread(self._show, status, self._news())

    @work(thread=True, group="order")
    def action_order(self, verb: str) -> None:
        """Ask the peer for this."""
        try:
            self._ask(self._folder, {"ask": verb} | ({"seconds": None} if verb == "pause" else {}))
        except P2PTrainError as fault:
            self.call_from_thread(self.notify, str(fault), severity="error")
        else:
            self.call_from_thread(self.look)

    def _show(self, status: Mapping[str, Any] | str, news: list[str]) -> None:
        figures = self.query_one("#figures", Static)
        if isinstance(status, str):
            figures.update(Text(status, "bold red"))
        else:
            self.sub_title = str(status["run_id"])
            figures.update(body(status, time.time()))
        for line in news:
            self.query_one("#news", RichLog).write(Text(line), expand=True)  # else it wraps at 80 columns
