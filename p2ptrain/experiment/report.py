"""A summary for people: as text, as one HTML page that needs nothing else, and as a picture.

The picture takes matplotlib (the extra `plot`); without it the page has the tables alone, and says so.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from p2ptrain.errors import StorageError
from p2ptrain.experiment.grid import sizes
from p2ptrain.experiment.rows import PUBLISHED, PUBLISHED_STEPS, Check, checks
from p2ptrain.experiment.summary import SIGMAS, Measured, Summary, answers, hours, pareto

PAGE, PICTURE = "report.html", "report.png"

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
body { color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
td.same { background: #e6f4ea; } td.worse { background: #fdf0d5; } td.far { background: #f9d9d6; }
code { background: #f4f4f4; padding: .1rem .3rem; } img { max-width: 100%; } small { color: #555; }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd; } code { background: #2a2a2a; } small { color: #aaa; }
  td.same { background: #1f4429; } td.worse { background: #57430f; } td.far { background: #5c2320; }
  img { background: white; }
}
"""


COHESION = "Change of the loss by one round, in nats, on samples that nobody trains on"
COPIES = (
    "How far apart peers came in a round. Cosine: between two peers' changes; consensus distance: of a copy "
    "from the average; barrier: loss of the average, or of the undamped union, less the mean loss of the "
    "peers' own copies, in nats, on samples that nobody trains on: below zero putting together helps"
)


def budget(summary: Summary) -> str:
    """What all cells have in common, in a sentence."""
    grid = summary.grid
    seeds = f"{len(grid.seeds)} seeds" if len(grid.seeds) > 1 else "1 seed, so no spread is known"
    return (
        f"{grid.task.summary}. Every cell trains on {grid.samples:,} samples, all its peers together, "
        f"{grid.batch_size} a step: more peers bring no more data. The learning rate is chosen for each cell "
        f"by the held-out loss with seed {grid.tuning_seed}, then {seeds}."
    )


def table(summary: Summary, arm: str) -> list[list[str]]:
    """N × H of the gap in % of the synchronous loss ± σ; a header row first. `*`: the best rate tried is at
    an end of those tried."""
    cells = summary.of(arm)
    peers, steps = sizes([each.cell for each in cells])
    rows = [["N", *(f"H = {step}" for step in steps)]]
    for count in peers:
        found = {each.cell.steps: each for each in cells if each.cell.peers == count}
        rows.append([f"N = {count}", *(_gap(found.get(step)) for step in steps)])
    return rows


def _gap(each: Measured | None) -> str:
    if each is None:
        return "not measured"
    mark = "*" if each.at_edge else ""
    if not each.finite:
        return "diverged"
    if each.gap is None or each.percent is None:
        return f"{each.loss:.4f}{mark}"
    if not each.sigma:
        return f"{each.percent:+.2f} %{mark}"
    return f"{each.percent:+.2f} ± {abs(100 * each.sigma / (each.loss - each.gap)):.2f} %{mark}"


def losses(summary: Summary) -> list[list[str]]:
    """Each cell; a header row first."""
    links = summary.grid.link_mbit
    header = ["cell", "loss", "± over seeds", "rate", "rounds", "sent by each"]
    rows = [header + [f"hours at {mbit:g} Mbit/s" for mbit in links]]
    for each in summary.cells:
        name = f"{each.cell.arm}, N = {each.cell.peers}, H = {each.cell.steps}"
        rows.append(
            [
                name,
                f"{each.loss:.4f}" if each.finite else "diverged",
                f"{each.spread:.4f}",
                f"{each.rate:g}{'*' if each.at_edge else ''}",
                f"{each.rounds:,}",
                f"{each.sent_bytes / 1e6:,.1f} MB",
                *(f"{hours(summary, each, mbit):.2g}" for mbit in links),
            ]
        )
    return rows


def cohesions(summary: Summary) -> list[list[str]]:
    """How well parts fit together, for strategy `partition`; a header row first, alone if there is none."""
    rows = [["cell", "each part alone", "together", "cohesion defect", "it eats the gains"]]
    for each in summary.cells:
        if (found := each.cohesion) is not None:
            rows.append(
                [
                    f"{each.cell.arm}, N = {each.cell.peers}, H = {each.cell.steps}",
                    f"{found.parts:+.4f}",
                    f"{found.union:+.4f}",
                    f"{found.defect:+.4f}",
                    "yes" if found.eats_the_gains else "no",
                ]
            )
    return rows


def copies(summary: Summary) -> list[list[str]]:
    """How far apart peers came, and what it cost to put together what they did; a header row first, alone if
    nobody trained apart."""
    rows = [["cell", "length of the mean change", "cosine", "consensus distance", "barrier"]]
    for each in summary.cells:
        found = each.copies
        if found.known and each.finite:
            rows.append(
                [
                    f"{each.cell.arm}, N = {each.cell.peers}, H = {each.cell.steps}",
                    "" if found.change_norm is None else f"{found.change_norm:.3g}",
                    "" if found.cosine is None else f"{found.cosine:+.2f}",
                    "" if found.consensus_distance is None else f"{found.consensus_distance:.3g}",
                    "" if found.barrier is None else f"{found.barrier:+.4f}",
                ]
            )
    return rows


def published(summary: Summary) -> list[list[str]]:
    """The published gaps at 30 steps, and ours at the number of steps nearest to that; a header row first."""
    rows = [["gap in % of the synchronous loss", *(f"N = {peers}" for peers in (1, 2, 4, 8))]]
    for name, gaps in PUBLISHED.items():
        found = (f"{gaps[peers]:+.1f}" if peers in gaps else "" for peers in (1, 2, 4, 8))
        rows.append([f"{name}, H = {PUBLISHED_STEPS}, outer Nesterov (2503.09799)", *found])
    for arm, steps, ours in _beside_published(summary):
        found = (f"{ours[peers]:+.1f}" if peers in ours else "" for peers in (1, 2, 4, 8))
        rows.append([f"ours: {arm}, H = {steps}", *found])
    return rows


def _beside_published(summary: Summary) -> list[tuple[str, int, dict[int, float]]]:
    """(arm, steps, peers → gap in %) at the number of steps nearest to the published one; none for what is
    no language model, since the published ones are."""
    found: list[tuple[str, int, dict[int, float]]] = []
    if summary.grid.task.kind == "digits":
        return found
    for arm in (arm for arm in summary.apart if arm.strategy == "local"):
        cells = [each for each in summary.of(arm.name) if each.percent is not None]
        if len({each.cell.steps for each in cells}) < 2:
            continue
        steps = min({each.cell.steps for each in cells}, key=lambda step: abs(step - PUBLISHED_STEPS))
        at = {each.cell.peers: each.percent for each in cells if each.cell.steps == steps and each.finite}
        found.append((arm.name, steps, {peers: gap for peers, gap in at.items() if gap is not None}))
    return found


# -- text ----------------------------------------------------------------------------------------------------


def lines(summary: Summary) -> list[str]:
    """The report for a terminal."""
    said = [budget(summary)]
    if summary.missing:
        said.append(f"{summary.missing} cells are not measured yet: `experiment run … --resume` goes on.")
    for arm in summary.grid.arms:
        if summary.of(arm.name):
            said += ["", _heading(summary, arm.name), *_aligned(table(summary, arm.name))]
    if len(fits := cohesions(summary)) > 1:
        said += ["", f"{COHESION}:", *_aligned(fits)]
    if len(apart := copies(summary)) > 1:
        said += ["", f"{COPIES}:", *_aligned(apart)]
    said += ["", *answers(summary)]
    found = checks(summary)
    if found:
        said += ["", f"row {summary.grid.row}, what was expected:", *(map(check_line, found))]
        said.append(verdict(found))
    return said


def check_line(check: Check) -> str:
    return f"{'holds' if check.holds else 'CONTRADICTED':<12} {check.expected}: {check.seen}"


def verdict(found: list[Check]) -> str:
    """In one line."""
    failed = sum(not check.holds for check in found)
    return "all of it holds" if not failed else f"{failed} of {len(found)} are contradicted"


def _heading(summary: Summary, name: str) -> str:
    arm = summary.grid.arm(name)
    baseline = summary.grid.baseline(arm)
    what = (
        "held-out loss in nats"
        if baseline is None or baseline.name == name
        else f"held-out loss against {baseline.name} with as many peers, ± σ"
    )
    return f"{name}: {what}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{text:>{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


# -- page and picture ----------------------------------------------------------------------------------------


def write(summary: Summary, folder: Path, commands: list[str]) -> list[Path]:
    """Write the page, and the picture if matplotlib is there; the files written. `commands` are those that
    make them. Raises StorageError."""
    picture = _picture(summary, commands)
    page = _page(summary, picture, commands)
    written = [folder / PAGE]
    try:
        (folder / PAGE).write_text(page, encoding="utf-8")
        if picture is not None:
            (folder / PICTURE).write_bytes(picture)
            written.append(folder / PICTURE)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror or error}") from None
    return written


def _page(summary: Summary, picture: bytes | None, commands: list[str]) -> str:
    made = "<p><small>Made by " + ", then ".join(f"<code>{html.escape(each)}</code>" for each in commands)
    made += "</small></p>"
    parts = [
        f"<h1>{html.escape(summary.grid.name)}</h1>",
        f"<p>{html.escape(budget(summary))}</p>",
    ]
    if summary.missing:
        parts.append(f"<p>{summary.missing} cells are not measured yet.</p>")
    parts += ["<h2>How many peers, and how long before averaging?</h2>", "<ul>"]
    parts += [f"<li>{html.escape(each)}</li>" for each in answers(summary)]
    parts.append("</ul>")
    for arm in summary.grid.arms:
        if summary.of(arm.name):
            parts.append(f"<h3>{html.escape(_heading(summary, arm.name))}</h3>")
            parts.append(_html_table(table(summary, arm.name), _colours(summary, arm.name)))
    parts.append(
        f"<p><small>N: peers; H: steps between averages; green: within {SIGMAS:g} σ of synchronous or "
        "better; *: the best of the rates tried is at an end of them. σ is √((s² + s₀²) / seeds), with s₀ "
        "the pooled spread of synchronous cells, and s the cell's own if larger.</small></p>"
    )
    if picture is not None:
        data = base64.b64encode(picture).decode()
        parts.append(f'<img alt="the same as curves" src="data:image/png;base64,{data}">')
    else:
        parts.append('<p>For the curves, install matplotlib: <code>pip install "p2ptrain[plot]"</code>.</p>')
    parts.append(made)
    if found := checks(summary):
        rows = [["expected", "", "seen"]]
        rows += [[each.expected, "holds" if each.holds else "contradicted", each.seen] for each in found]
        parts += [f"<h2>Row {summary.grid.row}: {html.escape(verdict(found))}</h2>", _html_table(rows)]
    if len(fits := cohesions(summary)) > 1:
        parts += ["<h2>How parts fit together</h2>", _html_table(fits)]
        parts.append(f"<p><small>{COHESION}; mean over seeds and rounds.</small></p>{made}")
    if len(apart := copies(summary)) > 1:
        parts += ["<h2>How far apart peers came</h2>", _html_table(apart)]
        parts.append(f"<p><small>{COPIES}; mean over seeds and rounds.</small></p>{made}")
    if _beside_published(summary):
        parts += ["<h2>Beside the published curve</h2>", _html_table(published(summary)), made]
    parts += ["<h2>All cells</h2>", _html_table(losses(summary))]
    parts.append(
        f"<p><small>Hours by the model of <code>p2ptrain plan</code>, with a round trip of "
        f"{summary.grid.rtt_milliseconds:g} ms and {summary.sample_seconds * 1000:.2g} ms of computing a "
        f"sample, as measured here.</small></p>{made}"
    )
    title = html.escape(summary.grid.name)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _colours(summary: Summary, arm: str) -> dict[str, str]:
    """Text of a gap → the class of its field."""
    found = {}
    for each in summary.of(arm):
        if each.gap is None or not each.sigma:
            continue
        far = each.gap > 10 * each.sigma
        found[_gap(each)] = "same" if each.as_synchronous else "far" if far else "worse"
    return found


def _html_table(rows: list[list[str]], classes: dict[str, str] | None = None) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in rows[0])
    body = ""
    for row in rows[1:]:
        fields = ((html.escape(text), (classes or {}).get(text, "")) for text in row)
        body += "<tr>" + "".join(f'<td class="{kind}">{text}</td>' for text, kind in fields) + "</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def _picture(summary: Summary, commands: list[str]) -> bytes | None:
    """A PNG; None where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    arms = [arm.name for arm in summary.apart if len({each.cell.steps for each in summary.of(arm.name)}) > 1]
    panels: list[Callable[[Any], None]] = [partial(_draw_gaps, summary, arm) for arm in arms]
    panels += [partial(_draw_curves, summary, arm) for arm in arms]
    panels += [partial(_draw_pareto, summary, mbit) for mbit in (None, *summary.grid.link_mbit)]
    if _beside_published(summary):
        panels.append(partial(_draw_published, summary))
    across = 3
    down = -(-len(panels) // across)
    figure = Figure(figsize=(6 * across, 4.4 * down + 0.6), layout="constrained")
    for axes, draw in zip(figure.subplots(down, across, squeeze=False).flat, panels, strict=False):
        draw(axes)
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(f"{summary.grid.name}: {summary.grid.samples:,} samples in each cell, all peers together")
    figure.supxlabel("made by: " + ", then ".join(commands), fontsize=9)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _colour(summary: Summary, peers: int) -> str:
    counts = sorted({each.cell.peers for each in summary.cells})
    return f"C{counts.index(peers)}"


def _draw_gaps(summary: Summary, arm: str, axes: Any) -> None:
    for peers in sorted({each.cell.peers for each in summary.of(arm)}):
        row = [each for each in summary.of(arm, peers=peers) if each.finite and each.gap is not None]
        steps = [each.cell.steps for each in row]
        gaps = [each.percent or 0.0 for each in row]
        widths = [100 * each.sigma / (each.loss - (each.gap or 0.0)) for each in row]
        colour = _colour(summary, peers)
        axes.plot(steps, gaps, "o-", color=colour, label=f"N = {peers}")
        low, high = zip(*((gap - w, gap + w) for gap, w in zip(gaps, widths, strict=True)), strict=True)
        axes.fill_between(steps, low, high, color=colour, alpha=0.2)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="H, steps between averages", ylabel="loss above synchronous, % ± σ")
    _, steps = sizes([each.cell for each in summary.of(arm)])
    axes.set_xticks(steps, list(map(str, steps)))
    axes.minorticks_off()
    axes.set_title(f"{arm}: gap to synchronous")
    axes.legend()


def _draw_curves(summary: Summary, arm: str, axes: Any) -> None:
    most = max(each.cell.peers for each in summary.of(arm))
    baseline = summary.grid.baseline(summary.grid.arm(arm))
    shown = summary.of(arm, peers=most)
    if baseline is not None:
        shown = summary.of(baseline.name, peers=most) + shown
    for number, each in enumerate(each for each in shown if each.curve):
        samples, losses_ = zip(*each.curve, strict=True)
        name = each.cell.arm if each.cell.arm != arm else f"H = {each.cell.steps}"
        style = "k--" if each.cell.arm != arm else ".-"
        colour = {} if each.cell.arm != arm else {"color": f"C{number}"}
        axes.plot(samples, losses_, style, label=name, **colour)
    axes.set(xlabel="samples", ylabel="held-out loss, nats", title=f"{arm}, N = {most}: on the way")
    axes.legend()


def _draw_pareto(summary: Summary, mbit: float | None, axes: Any) -> None:
    """Loss against what each peer sends, or hours over such links; the line joins what nothing beats."""
    compared = {arm.name for arm in summary.grid.arms if summary.grid.baseline(arm) is not None}
    shown = [each for each in summary.cells if each.finite and each.cell.peers > 1]
    shown = [each for each in shown if each.cell.arm in compared]
    markers = {arm.name: mark for arm, mark in zip(summary.grid.arms, "osD^v<>Pp*hHXd|_", strict=False)}
    x = [each.sent_bytes / 1e6 if mbit is None else hours(summary, each, mbit) for each in shown]
    y = [each.loss for each in shown]
    for each, at, loss in zip(shown, x, y, strict=True):
        axes.plot(at, loss, markers[each.cell.arm], color=_colour(summary, each.cell.peers), alpha=0.7)
    front = pareto(list(zip(x, y, strict=True)))
    axes.step([x[at] for at in front], [y[at] for at in front], "k:", where="post", linewidth=1)
    for at in front:
        axes.annotate(
            f"H={shown[at].cell.steps}", (x[at], y[at]), fontsize=7, xytext=(3, 3), textcoords="offset points"
        )
    for arm in {each.cell.arm: None for each in shown}:
        axes.plot([], [], markers[arm], color="grey", label=arm)
    for peers in sorted({each.cell.peers for each in shown}):
        axes.plot([], [], "-", color=_colour(summary, peers), label=f"N = {peers}")
    what = "MB sent by each peer" if mbit is None else f"hours at {mbit:g} Mbit/s"
    axes.set(xscale="log", xlabel=what, ylabel="held-out loss, nats", title=f"loss against {what}")
    axes.tick_params(axis="x", which="minor", labelbottom=False)  # they would lie on each other
    if shown:
        axes.legend(fontsize=7)


def _draw_published(summary: Summary, axes: Any) -> None:
    for name, gaps in PUBLISHED.items():
        axes.plot(list(gaps), list(gaps.values()), ".--", color="grey", alpha=0.6)
        axes.annotate(name, (8, gaps[8]), fontsize=7, xytext=(4, -2), textcoords="offset points")
    axes.plot([], [], ".--", color="grey", label=f"published, H = {PUBLISHED_STEPS} (2503.09799)")
    for arm, steps, ours in _beside_published(summary):
        axes.plot(list(ours), list(ours.values()), "o-", label=f"ours: {arm}, H = {steps}")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="N, peers", ylabel="loss above synchronous, %", title="beside the published curve")
    axes.legend(fontsize=8)
