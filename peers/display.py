"""How a rehearsal looks: a panel drawn in place on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from p2ptrain.events import clean
from peers.chronicle import Chronicle

LINE_SECONDS = 5.0
BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 48
NOTES_SHOWN, ROUNDS_SHOWN, SAMPLE_SHOWN = 5, 3, 3
"""Lines; the panel fits a terminal of 24."""


class Lines:
    """Plain lines: what happens, when it happens, and every few seconds how far training is."""

    def __init__(self, console: Console, chronicle: Chronicle, started_at: float) -> None:
        """`started_at` is Unix time."""
        self._console, self._chronicle, self._started_at = console, chronicle, started_at
        self._told = 0
        self._headline = ""
        self._preview = ""
        self._next = started_at + LINE_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.show()

    def show(self) -> None:
        """Print what is new."""
        chronicle, now = self._chronicle, time.time()
        for at, text in chronicle.notes[self._told :]:
            self._print(at, text)
        self._told = len(chronicle.notes)
        if now < self._next:
            return
        self._next = now + LINE_SECONDS
        headline = f"{progress(chronicle)}; {quality(chronicle)}"
        if headline != self._headline:
            self._headline = headline
            self._print(now, headline)
        if chronicle.preview != self._preview:
            self._preview = chronicle.preview
            if lines := sample_lines(self._preview, SAMPLE_SHOWN):
                self._print(now, "the model writes:")
            for line in lines:
                self._console.print(Text(f"          | {line}"), soft_wrap=True)

    def _print(self, at: float, text: str) -> None:
        self._console.print(Text(f"{clock(at - self._started_at):>8}  {text}"), soft_wrap=True)


class Screen:
    """The same as a panel that is drawn anew in place."""

    def __init__(
        self, console: Console, chronicle: Chronicle, started_at: float, seconds: float | None, title: str
    ) -> None:
        """`started_at` is Unix time, `seconds` how long it will take, None if nobody knows."""
        self._chronicle, self._started_at, self._seconds, self._title = chronicle, started_at, seconds, title
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.show()
        self._live.stop()

    def show(self) -> None:
        """Draw the panel as things are."""
        now = time.time() - self._started_at
        if self._seconds is None:
            passed = clock(now)
        else:
            passed = f"{clock(now)} of {clock(self._seconds)}" if now < self._seconds else "time is over"
        title = Text.assemble((self._title, "bold"), f"  {passed}")
        panel = Panel(body(self._chronicle, self._started_at), title=title, title_align="left")
        self._live.update(panel, refresh=True)


def display(
    console: Console, chronicle: Chronicle, started_at: float, seconds: float | None, title: str
) -> Lines | Screen:
    """The panel where it can be drawn, else lines; see `Screen`."""
    if console.is_terminal and console.encoding.startswith("utf"):
        return Screen(console, chronicle, started_at, seconds, title)
    return Lines(console, chronicle, started_at)


# -- the parts -----------------------------------------------------------------------------------------------


def body(chronicle: Chronicle, started_at: float) -> RenderableType:
    """All that the panel shows."""
    losses = chronicle.losses()
    parts: list[RenderableType] = [Text(progress(chronicle), "bold"), Text(quality(chronicle))]
    if losses:
        parts.append(Text(f"{losses[0]:.2f} {sparkline(losses)} {losses[-1]:.2f} training loss", "cyan"))
    peers = Table.grid(padding=(0, 3, 0, 0))
    for peer in chronicle.peers.values():
        doing = Text(peer.doing, "green" if peer.doing == "training" else "yellow")
        peers.add_row(peer.name, doing, f"step {peer.step:,}", f"gave {peer.samples:,} samples")
    parts += ["", peers]
    parts += [Text(line, "dim") for line in list(chronicle.last_rounds)[-ROUNDS_SHOWN:]]
    if chronicle.notes:
        parts.append("")
    for at, text in chronicle.notes[-NOTES_SHOWN:]:
        parts.append(Text(f"{clock(at - started_at):>5}  {text}"))
    if chronicle.preview:
        parts += ["", *(Text(line, "green") for line in sample_lines(chronicle.preview, SAMPLE_SHOWN))]
    for part in parts:
        if isinstance(part, Text):
            part.no_wrap, part.overflow = True, "ellipsis"  # or the panel would outgrow the terminal
    return Group(*parts)


def progress(chronicle: Chronicle) -> str:
    """How far the swarm is, as a line."""
    if chronicle.first_commit_at is None:
        return "no step yet"
    training = sum(peer.doing == "training" for peer in chronicle.peers.values())
    equal = "NOT EQUAL" if chronicle.faults else "all equal"
    return (
        f"step {chronicle.steps:,}; {training} of {len(chronicle.peers)} peers training; "
        f"{chronicle.compared:,} states compared, {equal}"
    )


def quality(chronicle: Chronicle) -> str:
    """How good the model is, as a line."""
    if not chronicle.heldout:
        losses = chronicle.losses()[-10:]
        if losses:
            return f"training loss {sum(losses) / len(losses):.2f}"
        return ", ".join(f"{peer.name} is {peer.doing}" for peer in chronicle.peers.values())
    last = chronicle.heldout[-1]
    if last.bits_per_byte is None or last.zlib_bits_per_byte is None:
        return f"held-out loss {last.loss:.3f} at step {last.step}"
    return (
        f"held-out {last.bits_per_byte:.2f} bits per byte at step {last.step}; "
        f"zlib -9 takes {last.zlib_bits_per_byte:.2f}"
    )


def replica_words(equal: bool, compared: int) -> str:
    """Whether the replicas were identical, for a receipt."""
    if not equal:
        return "digests equal at every step on every peer: NO"
    if not compared:
        return "not compared: no state was reached by more than one peer"
    return f"digests equal at every step on every peer: yes ({compared:,} states compared)"


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """The values as bars from their least to their greatest; of more than `width`, means of stretches."""
    count = min(width, len(values))
    if not count:
        return ""
    bounds = [len(values) * number // count for number in range(count + 1)]
    means = [sum(values[start:stop]) / (stop - start) for start, stop in pairwise(bounds)]
    low, span = min(means), max(means) - min(means) or 1.0
    return "".join(BARS[min(int((mean - low) / span * len(BARS)), len(BARS) - 1)] for mean in means)


def sample_lines(text: str, most: int) -> list[str]:
    """What a model wrote as printable lines: it may have learned to write anything."""
    lines = [line.expandtabs(4).rstrip() for line in text.split("\n") if line.strip()]
    return [clean(line, 100) for line in lines[:most]]


def clock(seconds: float) -> str:
    """Seconds as 2:05."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
