"""The short forms of those rows of the fault matrix that run with every change: the very functions of
`python -m tests.chaos`, on a small model and with short waits. The other rows are not covered here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.lab import NotHere
from tests.chaos.rows import Form, Row, Trial, deadline, load_rows

pytestmark = pytest.mark.chaos

SHORT = [row for row in load_rows().values() if row.ci]


@pytest.mark.parametrize("row", SHORT, ids=lambda row: f"{row.number}: {row.fault}")
def test_swarm_holds_its_promises_under(row: Row, tmp_path: Path) -> None:
    try:
        with deadline(row.deadline_seconds / 2):
            print(row.play(Trial(tmp_path, 0, Form.SHORT)).text)
    except NotHere as reason:
        pytest.fail(f"row {row.number} cannot be run on this machine: {reason}")


def test_enough_rows_run_with_every_change() -> None:
    assert len(SHORT) >= 12
