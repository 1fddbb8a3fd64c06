"""Which running peer a command means, and what a person reads of its answer. The socket itself is in
`swarm/test_control_command.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from event_examples import ANNA, BERT, COMMITTED, SAVED, WAITING

from p2ptrain.config import Limits
from p2ptrain.errors import ConfigError, NotRunning
from p2ptrain.events import Event
from peers.control import Running, choose, find, link_name
from peers.control_cli import pause_lines, status_lines
from peers.daemon import RATE_SECONDS, Daemon, Rates, Standing
from peers.signals import Stop
from peers.volunteer import Receipt, receipt_lines

HERE, THERE = Running("stdlib", Path("/data/one")), Running("digits", Path("/data/two"))


def test_only_running_peer_is_meant_when_nothing_is_said() -> None:
    assert choose([HERE], "") == HERE


def test_run_tells_which_peer_is_meant() -> None:
    assert choose([HERE, THERE], "digits") == THERE


@pytest.mark.parametrize(
    ("candidates", "run_id", "words"),
    [
        ([], "", ["no peer runs", "p2ptrain join"]),
        ([], "digits", ["no peer of run digits"]),
        ([HERE], "digits", ["no peer of run digits", "but of stdlib"]),
    ],
)
def test_sentence_says_who_runs_when_the_peer_that_is_meant_does_not(
    candidates: list[Running], run_id: str, words: list[str]
) -> None:
    with pytest.raises(NotRunning) as fault:
        choose(candidates, run_id)
    assert all(word in str(fault.value) for word in words)


def test_folders_are_named_when_several_peers_could_be_meant() -> None:
    with pytest.raises(ConfigError, match=r"2 peers run here: stdlib in /data/one; stdlib in /data/three"):
        choose([HERE, THERE, Running("stdlib", Path("/data/three"))], "stdlib")


def test_peer_file_tells_the_folder(tmp_path: Path) -> None:
    file = tmp_path / "peer.toml"
    file.write_text('micro_batch_size = 8\ndata_dir = "/data/one"\n')
    assert find("", "", file) == Path("/data/one")
    assert find("", "/data/two", file) == Path("/data/two")
    file.write_text("data_dir = ")
    with pytest.raises(ConfigError, match=r"peer.toml is not valid TOML"):
        find("", "", file)
    with pytest.raises(ConfigError, match=r"cannot read .*absent.toml"):
        find("", "", tmp_path / "absent.toml")


def test_link_tells_the_run_and_differs_by_folder() -> None:
    one, two = link_name("stdlib", Path("/data/one")), link_name("stdlib", Path("/data/two"))
    assert one.rpartition(".")[0] == two.rpartition(".")[0] == "stdlib"
    assert one != two


# -- what is answered ----------------------------------------------------------------------------------------


@pytest.fixture
def happened() -> list[Event]:
    return []


@pytest.fixture
def stop() -> Stop:
    return Stop()


@pytest.fixture
def joining(happened: list[Event], stop: Stop) -> Daemon:
    """A peer that is still on its way in."""
    return Daemon(Path("/data/one"), "stdlib", stop, happened.append, Limits())


def test_pause_and_resume_are_told_also_before_there_is_a_peer(
    joining: Daemon, happened: list[Event]
) -> None:
    assert joining.answer({"ask": "status"})["state"] == "joining"
    (pause,) = joining.answer({"ask": "pause", "seconds": 7200})["pauses"]
    assert pause["until"] - pause["since"] == pytest.approx(7200)
    assert joining.answer({"ask": "resume"})["pauses"] == []
    assert joining.answer({"ask": "resume"})["pauses"] == []
    assert [event.event for event in happened] == ["paused", "resumed"]


def test_peer_finishes_its_step_unless_it_is_paused(joining: Daemon, stop: Stop) -> None:
    assert joining.answer({"ask": "finish"})["state"] == "leaving"
    assert (stop.finishing, stop.asked) == (True, False)
    with pytest.raises(ConfigError, match="about to leave"):
        joining.answer({"ask": "pause", "seconds": None})


def test_paused_peer_leaves_when_it_is_asked_to_finish(joining: Daemon, stop: Stop) -> None:
    joining.answer({"ask": "pause", "seconds": None})
    assert joining.answer({"ask": "finish"})["state"] == "leaving"
    assert (stop.finishing, stop.asked, stop.reason) == (False, True, "p2ptrain finish")


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"ask": "dance"},
        {"ask": ["status"]},
        {"ask": "pause"},
        {"ask": "pause", "seconds": 0},
        {"ask": "pause", "seconds": "2h"},
        {"ask": "pause", "seconds": 10**12},
    ],
)
def test_request_that_makes_no_sense_changes_nothing(
    joining: Daemon, happened: list[Event], request_: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="does not know this request"):
        joining.answer(request_)
    assert not happened


def test_standing_follows_the_events() -> None:
    standing = Standing()
    for event in (WAITING, COMMITTED, COMMITTED, SAVED):
        standing.observe(event)
    assert (standing.waiting, list(standing.losses), standing.roster) == ("2 of 3 peers", [2.25, 2.25], 7)
    assert (standing.samples, standing.samples_of_all) == (1024, 8224)


def test_rate_is_that_of_the_last_minute() -> None:
    rates = Rates()
    assert rates.add(0.0, 0) == [0.0]
    assert rates.add(10.0, 500) == [50.0]
    for second in range(11, 200):
        last = rates.add(float(second), 500 + (second - 10) * 2)
    assert last == [2.0]
    assert len(rates._points) <= RATE_SECONDS + 2


# -- what a person reads -------------------------------------------------------------------------------------

STATUS: dict[str, Any] = {
    "run_id": "python-stdlib",
    "data_dir": "/data/one",
    "seconds": 7500.0,
    "state": "accumulating",
    "pauses": [],
    "peer": ANNA,
    "name": "anna\x1b[2J",
    "step": 1234,
    "total_steps": 5000,
    "lineage": "a1" * 32,
    "aside": False,
    "waiting": "",
    "catching_up": None,
    "rounds": 412,
    "samples": 12_288,
    "loss": 1.94,
    "heldout_loss": None,
    "samples_per_second": 34.25,
    "swarm_samples_per_second": 120.0,
    "roster": 4,
    "target_batch_size": 16,
    "noise_scale": 340.4,
    "connected": 5,
    "links": {"direct": 4, "relay": 1},
    "carriers": {BERT: "tls"},
    "hidden": True,
    "sent_bytes": 1_200_000_000,
    "received_bytes": 3_400_000,
    "sent_bytes_per_second": 1_000_000.0,
    "received_bytes_per_second": 0.0,
    "deadlines": {"silence_seconds": 5.0},
}
PAUSED_UNTIL = {
    "reason": "user",
    "because": "you asked for it",
    "resumes": "with `p2ptrain resume`",
    "since": 0.0,
    "until": 7200.0,
}


def test_status_reads_well() -> None:
    assert status_lines(STATUS, 0.0) == [
        "training: python-stdlib for 2 h 5 min, in /data/one",
        "  peer       …1111aaaa anna\ufffd[2J",
        "  step       1,234 of 5,000, lineage a1a1a1a1",
        "  given      12,288 samples in 412 rounds",
        "  loss       1.940, held out unknown",
        "  speed      34.2 samples/s of the swarm's 120.0",
        "  batch      16 samples a step, noise scale 340 (see `p2ptrain batch advise`)",
        "  upload     1,200.0 MB, 8.00 Mbit/s",
        "  download   3.4 MB, 0.00 Mbit/s",
        "  peers      4 in the last round, 5 connected (4 direct, 1 relay)",
        "  gradients  …2222bbbb tls",
        "  reach      behind NAT or a firewall",
        "  deadlines  silence 5.0 s",
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((5120, 0, 0, 96), "5,120 samples counted, each once; 96 given back and next"),
        ((5120, 8, 0, 0), "5,120 samples counted, each once, 8 lost (not finite); 0 given back and next"),
        ((5120, 0, 16, 0), "5,120 samples counted, 16 of them twice; 0 given back and next"),
    ],
)
def test_status_says_what_became_of_leased_samples(data: tuple[int, ...], words: str) -> None:
    status = STATUS | {"data": dict(zip(("unique", "lost", "repeated", "returned"), data, strict=True))}
    assert any(line.split(maxsplit=1) == ["data", words] for line in status_lines(status, 0.0))


def test_status_says_first_what_keeps_a_peer_from_training() -> None:
    waiting = {**STATUS, "state": "paused", "pauses": [PAUSED_UNTIL], "waiting": "1 of 2 peers are here"}
    first, why, kept, whom = status_lines(waiting, 600.0)[:4]
    assert first.startswith("paused: python-stdlib")
    assert why.startswith("paused: you asked for it; resumes in 1 h 50 min, at ")
    assert kept == "what it has computed waits for the round under way"
    assert whom == "waiting: 1 of 2 peers are here"
    joining = {key: STATUS[key] for key in ("run_id", "data_dir", "seconds", "pauses")}
    assert status_lines({**joining, "state": "joining"}, 0.0) == [
        "joining: python-stdlib for 2 h 5 min, in /data/one"
    ]


def test_pause_without_an_end_says_how_it_ends() -> None:
    assert pause_lines([{**PAUSED_UNTIL, "until": None}], 0.0) == [
        "paused: you asked for it; resumes with `p2ptrain resume`"
    ]


def test_receipt_tells_what_was_given_and_what_came_of_it() -> None:
    receipt = Receipt(
        run_id="stdlib",
        peer="12D3KooWabcdefgh",
        step=1200,
        lineage="ab" * 32,
        state_digest="cd" * 32,
        seconds=250.0,
        rounds=1100,
        samples=5000,
        tokens=640_000,
        share=0.34,
        first_loss=5.5,
        last_loss=2.25,
        heldout_loss=2.3,
        checkpoint="/data/checkpoints/step-00001200",
    )
    assert receipt_lines(receipt) == [
        "",
        "Thank you. In 4 min 10 s you gave 5,000 samples in 1,100 rounds: 640,000 tokens, 34% of all.",
        "Training loss: 5.500 at first, 2.250 now; held out 2.300.",
        "Your copy of the model, at step 1,200: /data/checkpoints/step-00001200",
    ]
    nothing = replace(receipt, rounds=0, samples=0, tokens=0, share=None, first_loss=None, checkpoint=None)
    assert receipt_lines(nothing) == ["", "Thank you. In 4 min 10 s you gave 0 samples in 0 rounds."]
