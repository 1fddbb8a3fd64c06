"""The receipt of `p2ptrain chaos`: what people read in it, and how it is read again as a twin."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from p2ptrain.errors import ConfigError
from peers.chaos_receipt import BesideTwin, Crowd, Heldout, Receipt, beside_twin, read_twin, receipt_lines
from peers.ledger import Samples, Spread
from peers.passes import Data

NEVER = Spread(count=0, median=None, worst=None)
QUIET = Receipt(
    seconds=60.0,
    run_digest="abc",
    seed=0,
    peers=4,
    faults={},
    failed_starts=0,
    steps=40,
    rounds_attempted=0,
    rounds_committed=0,
    samples=Samples(computed=0, used=0, wasted={}, lost=0),
    data=None,
    participation=None,
    resume_seconds=NEVER,
    survivors_gave_up=0,
    rejoin_by_replay_seconds=NEVER,
    rejoin_by_snapshot_seconds=NEVER,
    crowd=None,
    longest_gap_seconds=1.0,
    lineages=1,
    died_out=0,
    rollbacks=0,
    states_compared=0,
    digests_equal=True,
    heldout=[],
    beside_twin=None,
    memory_mb_per_minute={},
    left_over=0,
    interrupted=False,
    folder="folder",
    problem="",
)
HELDOUT = [Heldout(20, 5120, 2.5), Heldout(40, 10_240, 1.5)]


def fact(name: str, **changes: object) -> str:
    """The line of that name."""
    lines = receipt_lines(dataclasses.replace(QUIET, **changes))  # type: ignore[arg-type]
    return next(line for line in lines if line.startswith(name)).removeprefix(name).strip()


def printed(tmp_path: Path, receipt: Receipt) -> Path:
    """A file with what the command printed."""
    path = tmp_path / "receipt"
    path.write_text(f"    0:05  step 3\n\nrounds  3\n{json.dumps(dataclasses.asdict(receipt))}\n")
    return path


def test_receipt_says_what_became_of_leased_samples() -> None:
    data = Data(unique=51_200, repeated=0, lost=3, returned=1_024)
    expected = "51,200 samples counted, 0 repeated, 3 lost; 1,024 given back and next"
    assert fact("data", data=data) == expected


def test_receipt_says_what_was_not_measured_when_nothing_happened() -> None:
    assert fact("faults") == "none, in 60.0 s (seed 0)"
    assert fact("rounds") == "0 of 0 attempts committed (none); step 40"
    assert fact("participation") == "no round was committed"
    assert fact("resumed").startswith("never; ")
    assert fact("held-out loss") == "not measured: there were too few steps"
    assert fact("memory") == "not measured: no process lived long enough"


def test_receipt_tells_figures_in_words() -> None:
    samples = Samples(computed=1000, used=970, wasted={"behind": 20, "rolled_back": 4}, lost=6)
    told = fact("samples", samples=samples)
    assert told == "970 of 1,000 used (97.0%); 24 wasted, about 6 lost with killed peers"
    resumed = Spread(count=20, median=2.0, worst=4.0)
    assert (
        fact("resumed", resume_seconds=resumed)
        == "2.0 s after a kill in the median, 4.0 s at worst, of 20; survivors gave up 0 samples"
    )
    assert fact("crowd", crowd=Crowd(8, None, 100.0, 90.0)) == (
        "8 joiners, all in never; 100.0 samples a second before, 90.0 meanwhile"
    )
    assert fact("memory", memory_mb_per_minute={"a": 0.1, "b": -3.0}) == "grew by at most 0.10 MB/min (a)"
    assert fact("held-out loss", heldout=HELDOUT, beside_twin=BesideTwin(9000, 1.5, 1.6)) == (
        "2.500 at first, 1.500 at last, in nats per byte; "
        "at 9,000 samples 1.500, and 1.600 without faults (-6.2%)"
    )


def test_losses_are_compared_at_the_last_point_that_the_twin_has_come_to() -> None:
    further = [Heldout(30, 5120, 2.6), Heldout(60, 20_480, 1.4)]
    assert beside_twin(HELDOUT, further) == BesideTwin(10_240, 1.5, pytest.approx(2.0))
    shorter = [Heldout(10, 2560, 2.9), Heldout(30, 5120, 2.6)]
    assert beside_twin(HELDOUT, shorter) == BesideTwin(5120, 2.5, 2.6)
    assert beside_twin(HELDOUT, shorter[:1]) is None


def test_twin_is_what_the_command_printed_when_it_had_no_faults(tmp_path: Path) -> None:
    twin = read_twin(printed(tmp_path, dataclasses.replace(QUIET, heldout=HELDOUT)))
    assert (twin.run_digest, twin.heldout) == ("abc", HELDOUT)


@pytest.mark.parametrize("text", ["", "p2ptrain: no\n", '{"heldout": 3}\n', "\xff"])
def test_twin_is_refused_with_what_to_do_when_it_is_no_receipt(tmp_path: Path, text: str) -> None:
    (tmp_path / "receipt").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="is no receipt; --twin takes what `p2ptrain chaos --faults none"):
        read_twin(tmp_path / "receipt")


def test_twin_is_refused_when_it_had_faults_or_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="had faults itself"):
        read_twin(printed(tmp_path, dataclasses.replace(QUIET, faults={"kill": 1})))
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        read_twin(tmp_path / "nothing")
