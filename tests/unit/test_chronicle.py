"""What several journals tell together, followed while they are written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from event_examples import ABORTED, ANNA, CAUGHT_UP, COMMITTED, ONE_OF_EACH, ROLLED_BACK, SAVED
from rich.console import Console

from p2ptrain.events import CatchUpBy, Evaluated, Event, Joined, Previewed, ReplicaDiverged, StateHashed
from p2ptrain.telemetry.journal import Journal, older
from peers.chronicle import Chronicle, Record, Tail
from peers.display import BARS, Lines, body, progress, quality, sample_lines, sparkline

NOON = 1_800_000_000.0


def record(event: Event, at: float = NOON) -> Record:
    """The event as its line in a journal says it."""
    return {"time": datetime.fromtimestamp(at, UTC).isoformat(), **event.to_dict()}


def hashed(step: int, lineage: str, digest: str) -> Record:
    return record(StateHashed(step=step, lineage=lineage * 64, state_digest=digest * 64))


def committed(step: int, mine: int, at: float = NOON) -> Record:
    return record(dataclasses.replace(COMMITTED, step=step, mine=mine, samples=16, peers=2), at)


@pytest.fixture
def two() -> Chronicle:
    return Chronicle(["peer-1", "peer-2"])


# -- following one journal -----------------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.jsonl", max_bytes=2000, clock=lambda: NOON) as journal:
        yield journal


def steps(records: list[Record]) -> list[int]:
    return [record["step"] for record in records]


def test_tail_gives_each_line_once_when_read_again_and_again(tmp_path: Path, journal: Journal) -> None:
    tail = Tail(tmp_path / "journal.jsonl")
    assert tail.read() == []
    journal.write(dataclasses.replace(ABORTED, step=1))
    journal.write(dataclasses.replace(ABORTED, step=2))
    assert steps(tail.read()) == [1, 2]
    assert tail.read() == []
    journal.write(dataclasses.replace(ABORTED, step=3))
    assert steps(tail.read()) == [3]
    tail.close()


def test_tail_waits_for_the_rest_when_a_line_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    tail = Tail(path)
    path.write_bytes(b'{"step": 1}\n{"step": ')
    assert steps(tail.read()) == [1]
    path.write_bytes(b'{"step": 1}\n')  # its writer was killed, came back and cut it off
    assert tail.read() == []
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    assert steps(tail.read()) == [2]
    tail.close()


def test_tail_misses_nothing_when_the_journal_is_rotated(tmp_path: Path, journal: Journal) -> None:
    tail, seen = Tail(tmp_path / "journal.jsonl"), []
    for step in range(40):
        journal.write(dataclasses.replace(ABORTED, step=step))
        if step % 3 == 0:
            seen += steps(tail.read())
    assert older(tmp_path / "journal.jsonl").exists()
    assert seen + steps(tail.read()) == list(range(40))
    tail.close()


# -- several journals together -------------------------------------------------------------------------------


def test_chronicle_takes_every_event_when_one_is_added(two: Chronicle) -> None:
    for event in ONE_OF_EACH:
        two.observe("peer-1", record(event))


def test_replicas_are_equal_when_equal_lineages_have_equal_digests(two: Chronicle) -> None:
    for name in two.peers:
        for step, lineage in enumerate("abc"):
            two.observe(name, hashed(step, lineage, lineage))
    assert two.differences() == []
    assert two.compared == 3
    assert two.steps == 2


def test_difference_is_told_when_one_lineage_has_two_digests(two: Chronicle) -> None:
    two.observe("peer-1", hashed(7, "a", "1"))
    two.observe("peer-2", hashed(7, "a", "2"))
    assert two.differences() == [
        "at step 7 and lineage aaaaaaaa the state of peer-1 was 11111111 and that of peer-2 22222222"
    ]


def test_difference_is_told_when_a_peer_was_said_to_have_diverged(two: Chronicle) -> None:
    two.observe("peer-2", record(ReplicaDiverged(step=4, ours="a" * 64, theirs="b" * 64)))
    assert two.differences() == ["peer-2 was told at step 4 that its state differs"]


def test_difference_is_told_when_two_peers_hold_different_logs_at_the_end(two: Chronicle) -> None:
    two.observe("peer-1", hashed(1, "a", "1"))
    two.observe("peer-2", hashed(1, "b", "2"))
    assert two.differences() == ["from step 1 on peer-1 and peer-2 hold different logs"]


def test_replicas_are_equal_when_the_lighter_log_was_rolled_back(two: Chronicle) -> None:
    two.observe("peer-1", hashed(1, "a", "1"))
    two.observe("peer-2", hashed(1, "b", "2"))
    two.observe("peer-2", record(ROLLED_BACK))
    two.observe("peer-2", hashed(2, "c", "3"))
    two.observe("peer-1", hashed(2, "c", "3"))
    assert two.differences() == []


def test_replicas_are_equal_when_a_log_was_left_for_a_snapshot(two: Chronicle) -> None:
    two.observe("peer-1", hashed(1, "a", "1"))
    two.observe("peer-2", hashed(1, "b", "2"))
    two.observe("peer-2", record(dataclasses.replace(CAUGHT_UP, how=CatchUpBy.LOG)))
    assert two.differences() == ["from step 1 on peer-1 and peer-2 hold different logs"]
    two.observe("peer-2", record(CAUGHT_UP))
    assert two.differences() == []


def test_replicas_are_equal_when_a_killed_peer_had_stepped_alone(two: Chronicle) -> None:
    two.observe("peer-2", hashed(1, "b", "2"))
    two.restarted("peer-2", NOON)
    for name in two.peers:
        two.observe(name, hashed(1, "a", "1"))
    assert two.differences() == []


def test_rounds_and_attempts_are_counted_once_when_both_peers_tell_of_them(two: Chronicle) -> None:
    for name in two.peers:
        two.observe(name, committed(0, mine=8))
        two.observe(name, record(ABORTED))
        two.observe(name, committed(1, mine=8))
    assert two.rounds() == {0: 16, 1: 16}
    assert len(two.aborted) == 1
    assert [peer.samples for peer in two.peers.values()] == [16, 16]
    assert len(two.last_rounds) == 2
    assert two.steps == 2


def test_round_that_counted_is_chosen_when_logs_had_parted(two: Chronicle) -> None:
    for name, lineage, samples in (("peer-1", "a", 8), ("peer-2", "b", 24)):
        alone = dataclasses.replace(COMMITTED, step=0, mine=8, samples=samples, lineage=lineage * 64)
        two.observe(name, record(alone))
        two.observe(name, hashed(1, lineage, lineage))
    two.observe("peer-2", record(ROLLED_BACK))
    two.observe("peer-2", hashed(1, "a", "a"))
    assert two.rounds() == {0: 8}


def test_training_loss_of_a_round_is_weighted_when_peers_gave_unequal_samples(two: Chronicle) -> None:
    for name, mine, loss in (("peer-1", 12, 2.0), ("peer-2", 4, 4.0)):
        event = dataclasses.replace(COMMITTED, step=0, mine=mine, loss=loss)
        two.observe(name, record(event))
    assert two.losses() == [2.5]


def test_rejoin_lasts_from_the_restart_to_the_first_commit_when_a_peer_was_killed(two: Chronicle) -> None:
    two.observe("peer-2", committed(0, mine=8, at=NOON))
    two.restarted("peer-2", NOON + 10)
    assert two.peers["peer-2"].rejoin_seconds is None
    two.observe("peer-1", committed(1, mine=8, at=NOON + 11))
    two.observe("peer-2", record(Joined(run_id="r", peer=ANNA, name="", others=1), NOON + 12))
    two.observe("peer-2", record(CAUGHT_UP, NOON + 13))
    assert two.peers["peer-2"].rejoin_seconds is None
    for step, at in ((42, NOON + 14.5), (43, NOON + 20)):
        two.observe("peer-2", committed(step, mine=8, at=at))
    assert two.peers["peer-2"].rejoin_seconds == pytest.approx(4.5)
    assert [text for _, text in two.notes] == [
        "peer-2 caught up from step 12 to 41 by snapshot in 2.1 s",
        "peer-2 is back in a round, 4.5 s after its restart",
    ]


def test_checkpoint_is_the_newest_when_peers_have_several(two: Chronicle) -> None:
    assert two.checkpoint == ""
    for name, step in (("peer-1", 100), ("peer-2", 200), ("peer-1", 150)):
        two.observe(name, record(dataclasses.replace(SAVED, step=step, path=f"{name}/{step}")))
    assert two.checkpoint == "peer-2/200"


# -- showing it ----------------------------------------------------------------------------------------------


def test_progress_and_quality_tell_how_things_are_when_training_goes_on(two: Chronicle) -> None:
    assert progress(two) == "no step yet"
    assert quality(two) == "peer-1 is starting, peer-2 is starting"
    two.observe("peer-1", committed(0, mine=8))
    assert progress(two) == "step 1; 1 of 2 peers training; 0 states compared, all equal"
    assert quality(two) == "training loss 2.25"
    figures = Evaluated(step=50, loss=1.94, bits_per_byte=2.8, seconds=0.1, zlib_bits_per_byte=2.08)
    two.observe("peer-1", record(figures))
    assert quality(two) == "held-out 2.80 bits per byte at step 50; zlib -9 takes 2.08"


def test_panel_fits_a_small_terminal_when_everything_has_happened(two: Chronicle) -> None:
    for name in two.peers:
        for event in ONE_OF_EACH:
            two.observe(name, record(event))
        for step in range(9):
            two.observe(name, committed(step, mine=8))
    console = Console(width=78)
    assert len(console.render_lines(body(two, NOON))) <= 22  # and a border


def test_lines_tell_each_thing_once_when_shown_again(
    two: Chronicle, capsys: pytest.CaptureFixture[str]
) -> None:
    started_at = time.time()
    with Lines(Console(), two, started_at) as lines:
        two.note(started_at + 65, "peer-2 was killed")
        lines.show()
        lines.show()
    assert capsys.readouterr().out == "    1:05  peer-2 was killed\n"


def test_sample_is_printable_when_the_model_wrote_control_characters(two: Chronicle) -> None:
    two.observe("peer-1", record(Previewed(step=1, text="\n\x1b[2Jdef f():\n\treturn 1  \n")))
    assert sample_lines(two.preview, 3) == ["�[2Jdef f():", "    return 1"]


def test_sparkline_spans_its_values_when_there_are_few_or_many() -> None:
    assert sparkline([]) == ""
    assert sparkline([3.0]) == BARS[0]
    assert sparkline([1.0, 8.0]) == BARS[0] + BARS[-1]
    assert sparkline([float(number) for number in range(800)], width=8) == BARS
