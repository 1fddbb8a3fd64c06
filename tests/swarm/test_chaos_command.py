"""`p2ptrain chaos` as an organizer has it: processes that are killed, stopped and cut off, and a receipt."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from p2ptrain.config import load_run
from p2ptrain.errors import ConfigError
from tests.swarm.rehearsals import Started

pytestmark = [pytest.mark.swarm, pytest.mark.long]

RUN = Path(__file__).parents[2] / "configs/runs/rehearsal-tiny.toml"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts a rehearsal of tiny peers with these options."""
    rehearsals: list[Started] = []

    def started(*options: str) -> Started:
        rehearsals.append(Started(tmp_path, "chaos", str(RUN), *options))
        return rehearsals[-1]

    yield started
    for rehearsal in rehearsals:
        rehearsal.clear()


def assert_one_log_in_the_end(receipt: dict[str, Any]) -> None:
    """Peers that were cut off, stopped or starved may have gone on alone; then they rolled back, or were
    killed before they could, and either is counted."""
    assert receipt["digests_equal"] is True
    assert 1 <= receipt["lineages"] <= 1 + receipt["rollbacks"] + receipt["died_out"]


def test_swarm_goes_on_and_everybody_comes_back_when_peers_and_bootstrap_are_struck(
    start: Callable[..., Started],
) -> None:
    kinds = "kill,leave,bootstrap,spawn"
    options = ("--peers", "3", "--max-peers", "4", "--absence", "0.5", "--seed", "5")
    chaos = start(*options, "--faults", kinds, "--rate", "40/min", "--seconds", "12")
    assert chaos.ends(180) == 0, f"{chaos.errors.read_text()}\n{chaos.output.read_text()}"
    receipt, told = chaos.receipt(), chaos.output.read_text()
    assert receipt["problem"] == ""
    assert list(receipt["faults"]) == kinds.split(",")
    assert sum(receipt["faults"].values()) >= 3
    for kind, words in {
        "kill": "is killed (SIGKILL)",
        "leave": "is asked to leave (SIGTERM)",
        "spawn": "peer-4 comes",
    }.items():
        count = receipt["faults"][kind] + (receipt["faults"]["bootstrap"] if kind == "kill" else 0)
        assert told.count(words) == count, kind
    assert receipt["peers"] == 3 + receipt["faults"]["spawn"]
    assert_one_log_in_the_end(receipt)
    assert receipt["states_compared"] > 1
    assert receipt["rounds_attempted"] >= receipt["rounds_committed"] > 1
    samples = receipt["samples"]
    assert samples["computed"] == samples["used"] + sum(samples["wasted"].values()) + samples["lost"]
    batch = load_run(RUN).target_batch_size
    assert samples["used"] >= batch * (receipt["steps"] - 5), "a few rounds may follow while all leave"
    assert 0 < receipt["participation"] <= 1
    assert receipt["resume_seconds"]["count"] <= receipt["faults"]["kill"]
    assert receipt["longest_gap_seconds"] < receipt["seconds"]
    back = sum(receipt[f"rejoin_by_{way}_seconds"]["count"] for way in ("replay", "snapshot"))
    assert back <= sum(receipt["faults"].values()) - receipt["faults"]["bootstrap"]
    assert receipt["left_over"] == 0
    assert chaos.left() == []
    assert list(Path(tempfile.gettempdir()).glob(f"p2ptrain-{chaos.process.pid}-*")) == []


def test_rehearsal_ends_with_the_receipt_so_far_when_ctrl_c_is_pressed_while_a_peer_is_stopped(
    start: Callable[..., Started],
) -> None:
    chaos = start("--peers", "2", "--faults", "pause", "--rate", "2/s", "--seconds", "600")
    chaos.until("is stopped (SIGSTOP)", 120)
    os.killpg(chaos.process.pid, signal.SIGINT)
    assert chaos.ends(60) == 0, chaos.errors.read_text()
    receipt = chaos.receipt()
    assert (receipt["problem"], receipt["interrupted"], receipt["left_over"]) == ("", True, 0)
    assert receipt["faults"]["pause"] >= 1
    assert chaos.left() == []


def test_both_sides_end_on_one_lineage_when_the_network_was_cut(start: Callable[..., Started]) -> None:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.fail("this test parts a network: run it as root, with iproute2 (apt-get install iproute2)")
    options = ("--faults", "partition,pause", "--rate", "2/s", "--seconds", "6", "--seed", "2")
    chaos = start("--peers", "3", "--megabits", "100", *options)
    assert chaos.ends(180) == 0, f"{chaos.errors.read_text()}\n{chaos.output.read_text()}"
    receipt, told = chaos.receipt(), chaos.output.read_text()
    assert receipt["faults"]["partition"] >= 1
    assert told.count("the network is cut: ") == receipt["faults"]["partition"]
    assert "both sides were in one round, " in told
    assert_one_log_in_the_end(receipt)
    assert chaos.left() == []
    for words in (("netns",), ("-o", "link")):
        shown = subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout
        assert f"p2pc{chaos.process.pid}" not in shown


def test_nothing_is_left_when_the_rehearsal_itself_is_killed(start: Callable[..., Started]) -> None:
    chaos = start("--peers", "2", "--faults", "pause", "--rate", "2/s", "--seconds", "600")
    chaos.until("is stopped (SIGSTOP)", 120)
    chaos.process.kill()
    chaos.process.wait()
    assert chaos.left() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--faults", "boom"), "there is no fault 'boom'; --faults takes kill, "),
        (("--rate", "often"), "--rate must be a number of faults per h, min or s, such as 60/h"),
        (("--twin", "nothing"), "cannot read nothing: No such file"),
        (("--max-peers", "3"), "--max-peers (3) is less than --peers (4)"),
    ],
)
def test_mistake_is_one_sentence_before_anything_is_started(
    start: Callable[..., Started], options: tuple[str, ...], said: str
) -> None:
    chaos = start(*options)
    assert chaos.ends(30) == ConfigError.exit_code
    assert chaos.errors.read_text().startswith(f"p2ptrain: {said}")
    assert chaos.errors.read_text().count("\n") == 1
    assert chaos.seen("p2pd") == 0
