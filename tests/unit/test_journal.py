"""The journal: whole lines, a bounded size, and disks that are full, torn or gone."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from event_examples import COMMITTED, ONE_OF_EACH, WAITING

from p2ptrain.telemetry.journal import Journal, older, read_journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "peer" / "journal.jsonl"


def at(moment: float) -> Callable[[], float]:
    return lambda: moment


def test_journal_returns_what_was_written_when_read(path: Path) -> None:
    with Journal(path, clock=at(1_800_000_000.25)) as journal:
        for event in ONE_OF_EACH:
            journal.write(event)
    records = list(read_journal(path))
    assert [record.pop("time") for record in records] == ["2027-01-15T08:00:00.250Z"] * len(ONE_OF_EACH)
    assert records == [event.to_dict() for event in ONE_OF_EACH]


def test_time_is_utc_when_parsed(path: Path) -> None:
    with Journal(path, clock=at(1_800_000_000.0)) as journal:
        journal.write(WAITING)
    (record,) = read_journal(path)
    assert datetime.fromisoformat(record["time"]).timestamp() == 1_800_000_000.0


def test_line_is_on_disk_when_write_returns(path: Path) -> None:
    with Journal(path) as journal:
        journal.write(COMMITTED)
        assert path.read_bytes().endswith(b"}\n")


def test_journal_goes_on_where_it_was_when_opened_again(path: Path) -> None:
    for _ in range(2):
        with Journal(path) as journal:
            journal.write(WAITING)
    assert len(list(read_journal(path))) == 2


def test_journal_of_a_new_peer_is_empty_when_read(path: Path) -> None:
    assert list(read_journal(path)) == []


def test_size_stays_bounded_when_events_keep_coming(path: Path) -> None:
    with Journal(path, max_bytes=4096, clock=at(1_800_000_000.0)) as journal:
        for _ in range(300):
            journal.write(COMMITTED)
            assert path.stat().st_size <= 4096
    assert older(path).stat().st_size <= 4096
    assert {file.name for file in path.parent.iterdir()} == {"journal.jsonl", "journal.jsonl.1"}
    kept = list(read_journal(path))
    assert 8 <= len(kept) < 300


def test_records_come_oldest_first_when_the_journal_was_rotated(path: Path) -> None:
    moments = iter(range(1_800_000_000, 1_800_000_100))
    with Journal(path, max_bytes=1000, clock=lambda: float(next(moments))) as journal:
        for _ in range(12):
            journal.write(WAITING)
    assert older(path).exists()
    times = [record["time"] for record in read_journal(path)]
    assert times == sorted(times)
    assert times[-1] == "2027-01-15T08:00:11.000Z"


def test_full_journal_is_rotated_when_opened_again(path: Path) -> None:
    for _ in range(2):
        with Journal(path, max_bytes=700) as journal:
            journal.write(COMMITTED)
    assert len(path.read_bytes().splitlines()) == 1
    assert len(list(read_journal(path))) == 2


def test_reader_passes_over_the_last_line_when_it_is_torn(path: Path) -> None:
    with Journal(path) as journal:
        journal.write(WAITING)
    with path.open("ab") as file:
        file.write(b'{"time":"2027-01-15T08:')
    assert len(list(read_journal(path))) == 1


def test_reader_passes_over_what_is_no_record_when_the_file_was_damaged(path: Path) -> None:
    with Journal(path) as journal:
        journal.write(WAITING)
    with path.open("ab") as file:
        file.write(b"\0\0\0\0\n[1]\n\xff\xfe\n")
    assert len(list(read_journal(path))) == 1


@pytest.mark.parametrize("torn", [b"{", b'{"half":' + b" " * 10_000])
def test_writer_cuts_a_torn_line_off_when_it_opens_the_file(path: Path, torn: bytes) -> None:
    with Journal(path) as journal:
        journal.write(WAITING)
    with path.open("ab") as file:
        file.write(torn)
    with Journal(path) as journal:
        journal.write(COMMITTED)
    lines = path.read_bytes().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["waiting_changed", "round_committed"]


def test_outage_is_counted_and_told_once_when_the_folder_is_gone(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path.parent.write_text("a file where the folder should be")
    with Journal(path) as journal:
        for _ in range(5):
            journal.write(WAITING)
        assert journal.lost == 5
        path.parent.unlink()
        journal.write(COMMITTED)
        assert journal.lost == 5
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]
    assert str(path) in caplog.messages[0]
    assert "5 events are lost" in caplog.messages[1]
    assert [record["event"] for record in read_journal(path)] == ["round_committed"]


FULL_DISK = """
import resource, sys
from pathlib import Path
from event_examples import COMMITTED
from p2ptrain.telemetry.journal import Journal, read_journal

path = Path(sys.argv[1])
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
journal = Journal(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # the disk has room for three lines and a piece
for _ in range(10):
    journal.write(COMMITTED)
full = (journal.lost, path.stat().st_size)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
journal.write(COMMITTED)
print(*full, journal.lost, len(list(read_journal(path))), path.read_bytes().count(b"\\n"))
"""


def test_training_goes_on_and_lines_stay_whole_when_the_disk_is_full(path: Path) -> None:
    """In a process of its own: the kernel's limit on file sizes would hit pytest's files, too."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FULL_DISK, str(path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lost, size, lost_after, kept, lines = (int(word) for word in done.stdout.split())
    assert lost == lost_after > 0
    assert size <= 2000
    assert kept == lines == 10 - lost + 1
    assert done.stderr.count("cannot write the event journal") == 1
