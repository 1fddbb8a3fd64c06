"""The reference of all metrics, written from the code.

`python -m p2ptrain.telemetry.reference` brings the table in `README.md` beside this file up to date, and a
test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from prometheus_client import Metric

from p2ptrain.telemetry.metrics import Metrics
from p2ptrain.telemetry.swarm_metrics import SwarmMetrics

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
PREFIX = "p2ptrain_"


def families() -> Mapping[str, Iterable[Metric]]:
    """Whose page → what is on it."""
    return {
        "Of each peer": Metrics("run", "0" * 64).registry.collect(),
        "Of the swarm, by the monitor": SwarmMetrics().registry.collect(),
    }


def table(found: Iterable[Metric]) -> list[str]:
    """The families as rows of a Markdown table, those of the client library left out."""
    lines = ["| name | type | labels | what it says |", "|---|---|---|---|"]
    for family in found:
        if not family.name.startswith(PREFIX):
            continue
        values: dict[str, set[str]] = {}
        for sample in family.samples:
            for label, value in sample.labels.items():
                if label != "le":
                    values.setdefault(label, set()).add(value)
        shown = family.type == "info"
        labels = ", ".join(
            f"`{label}`"
            if shown or not all(values[label])
            else f"`{label}`: {', '.join(sorted(values[label]))}"
            for label in sorted(values)
        )
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        lines.append(f"| `{family.name}{suffix}` | {family.type} | {labels} | {family.documentation} |")
    return lines


def _label(family: Metric, label: str, values: Iterable[str]) -> str:
    known = "" if family.type == "info" else f": {', '.join(sorted(values))}"
    return f"`{label}`{known}"


def generated() -> str:
    """What stands between the marks."""
    parts = [f"### {title}\n\n" + "\n".join(table(found)) for title, found in families().items()]
    return "\n\n".join(parts)


def main() -> None:
    """Write the table into the README."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{generated()}\n{END}{after}")


if __name__ == "__main__":
    main()
