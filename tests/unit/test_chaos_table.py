"""The table of the fault matrix keeps older lines and failures, and its rows are those that there are."""

from __future__ import annotations

import pytest

from tests.chaos.rows import load_rows
from tests.chaos.table import BEGIN, END, README, Line, Result, merged, parse, render

EMPTY = f"# Title\n\n{BEGIN}\n\n{END}\n\nAfter.\n"


def line(number: int, result: Result = Result.PASS, measured: str = "1.2 s") -> Line:
    return Line(number, f"fault {number}", "SIGKILL", measured, result, "abc1234", "2026-01-31")


def test_lines_come_back_as_they_were_written_in_order() -> None:
    lines = [line(12), line(3, Result.FAIL), line(7, Result.NOT_RUN)]
    written = render(EMPTY, lines)
    assert written.startswith("# Title\n")
    assert written.endswith("\n\nAfter.\n")
    assert list(parse(written).values()) == [lines[1], lines[2], lines[0]]
    assert render(written, parse(written).values()) == written


def test_row_that_was_not_played_keeps_its_line_and_a_failure_stays() -> None:
    older = {3: line(3, Result.FAIL, "older"), 4: line(4)}
    found = {each.number: each for each in merged(older, [line(4, Result.FAIL, "newer"), line(5)])}
    assert [found[number].measured for number in (3, 4, 5)] == ["older", "newer", "1.2 s"]
    assert [found[number].result for number in (3, 4, 5)] == [Result.FAIL, Result.FAIL, Result.PASS]


def test_bars_and_line_breaks_in_a_reason_do_not_break_the_table() -> None:
    reason = "| Error\n  in a | b"
    (back,) = parse(render(EMPTY, [line(1, Result.FAIL, reason)])).values()
    assert back.measured == "/ Error in a / b"


def test_readme_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no table between"):
        parse("# Title\n")


def test_rows_that_there_are_say_what_they_do() -> None:
    rows = load_rows()
    assert set(rows) == set(range(1, 42))
    assert sum(row.gate for row in rows.values()) == 30
    for row in rows.values():
        for text in (row.fault, row.injected, row.criterion):
            assert text
            assert "|" not in text
        assert row.deadline_seconds <= 1500


def test_table_in_the_readme_tells_of_rows_that_there_are() -> None:
    assert set(parse(README.read_text())) <= set(load_rows())
