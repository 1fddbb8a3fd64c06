"""The table of the fault matrix in this folder's README: read, brought up to date, and written.

A row that was not played keeps the line that it had. Pure but for `update`, which has the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"
HEADER = "| # | fault | injected how | measured | result | commit | date |"
RULE = "|---|---|---|---|---|---|---|"


class Result(StrEnum):
    PASS = "pass"
    FAIL = "**FAIL**"
    NOT_RUN = "**NOT RUN**"


@dataclass(frozen=True)
class Line:
    """One row's line."""

    number: int
    fault: str
    injected: str
    measured: str
    """Figures; for what failed or did not run, why."""
    result: Result
    commit: str
    date: str

    def __str__(self) -> str:
        cells = (str(self.number), self.fault, self.injected, self.measured, self.result.value)
        return "| " + " | ".join(map(_cell, (*cells, self.commit, self.date))) + " |"


def _cell(text: str) -> str:
    """In a Markdown table a line is a row, and a bar ends a cell."""
    return " ".join(text.replace("|", "/").split())


def parse(readme: str) -> dict[int, Line]:
    """The lines that the README holds."""
    _, found, rest = readme.partition(BEGIN)
    if not found or END not in rest:
        raise ValueError(f"the README has no table between {BEGIN} and {END}")
    lines = {}
    for text in rest.partition(END)[0].splitlines():
        if re.match(r"\| \d+ \|", text):
            number, *cells, result, commit, date = (cell.strip() for cell in text.strip("| \n").split("|"))
            lines[int(number)] = Line(int(number), *cells, Result(result), commit, date)
    return lines


def render(readme: str, lines: Iterable[Line]) -> str:
    """The README with these lines for its table."""
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    table = "\n".join([HEADER, RULE, *map(str, sorted(lines, key=lambda line: line.number))])
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def merged(older: Mapping[int, Line], newer: Iterable[Line]) -> list[Line]:
    """What was played now in place of what was there."""
    return list({**older, **{line.number: line for line in newer}}.values())


def update(newer: Iterable[Line], path: Path = README) -> None:
    """Bring the table in that file up to date."""
    readme = path.read_text()
    path.write_text(render(readme, merged(parse(readme), newer)))
