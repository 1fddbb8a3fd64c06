"""What the doctor makes of its measurements: each cause is named, with one thing to do and its exit code.

Not covered: the measuring; `tests/swarm/test_commands.py` runs the command.
"""

from __future__ import annotations

import pytest

from p2ptrain.config import PeerConfig, RunConfig
from p2ptrain.errors import LocalFault, StorageError, Unreachable
from p2ptrain.protocol.forecast import Links
from p2ptrain.swarm.reach import Reach
from peers import doctor
from peers.doctor import Check, Verdict

FOUND = {"torch": "2.13.0", "hivemind": "1.1.12"}
ADDRESS = "/ip4/203.0.113.7/tcp/31337"
HERE = doctor.Path("/data")
GB = 10**9


@pytest.mark.parametrize(
    ("check", "code", "word"),
    [
        (doctor.versions((3, 10), FOUND, ""), 1, "3.11 to 3.13"),
        (doctor.versions((3, 11), {**FOUND, "torch": None}, ""), 1, "without torch"),
        (doctor.versions((3, 11), FOUND, "there is no libp2p daemon"), 1, "no libp2p daemon"),
        (doctor.memory(GB, 2 * GB), 1, "2.0 GB are needed"),
        (doctor.disk(HERE, GB, True, 2 * GB), StorageError.exit_code, "2.0 GB are needed"),
        (doctor.disk(HERE, 10**6, True, None), StorageError.exit_code, "100 MB are needed"),
        (doctor.disk(HERE, GB, False, None), StorageError.exit_code, "cannot be written"),
        (doctor.open_files(64, 4096), 1, "64 open files"),
        (doctor.clock(70.0), LocalFault.exit_code, "70.0 s behind"),
        (doctor.clock(-70.0), LocalFault.exit_code, "70.0 s ahead of"),
        (doctor.fault("swarm", Unreachable("nobody there"), "ask"), Unreachable.exit_code, "nobody there"),
    ],
)
def test_machine_that_cannot_take_part_hears_the_cause_and_a_remedy(
    check: Check, code: int, word: str
) -> None:
    assert check.verdict is Verdict.BAD
    assert check.exit_code == code
    assert word in check.detail
    assert check.remedy


@pytest.mark.parametrize(
    "check",
    [
        doctor.versions((3, 11), FOUND, ""),
        doctor.processor(2, 2),
        doctor.memory(2 * GB, GB),
        doctor.memory(2 * GB, None),
        doctor.disk(HERE, GB, True, None),
        doctor.open_files(20_000, 20_000),
        doctor.open_files(-1, -1),
        doctor.clock(0.4),
        doctor.reachable(Reach(True, ADDRESS), 0, "/ip4/0.0.0.0/tcp/0"),
    ],
)
def test_what_is_well_asks_for_nothing(check: Check) -> None:
    assert (check.verdict, check.exit_code, check.remedy) == (Verdict.FINE, 0, "")


@pytest.mark.parametrize(("limit", "wise"), [((512, 4096), 1024), ((512, 800), 800), ((512, -1), 1024)])
def test_low_limit_of_open_files_is_raised_as_far_as_it_may_be(limit: tuple[int, int], wise: int) -> None:
    check = doctor.open_files(*limit)
    assert (check.verdict, check.remedy) == (Verdict.NOTE, f"ulimit -n {wise}")


def test_nat_is_named_with_what_it_means_and_keeps_nobody_out() -> None:
    hidden = Reach(False, ADDRESS, "no answer within 3 s")
    check = doctor.reachable(hidden, 1, "/ip4/0.0.0.0/tcp/31337")
    assert (check.verdict, check.finding, check.exit_code) == (Verdict.NOTE, "behind NAT", 0)
    assert ADDRESS in check.detail
    assert "takes part all the same" in check.detail
    assert "by way of a relay" in check.detail
    assert check.remedy.startswith("nothing needed")
    assert "forward TCP port 31337" in check.remedy
    assert "peer file" not in check.remedy


def test_nat_without_a_relay_asks_for_an_open_port_that_stays_the_same() -> None:
    check = doctor.reachable(Reach(False, ADDRESS, "connection refused"), 0, "/ip4/0.0.0.0/tcp/0")
    assert "cannot reach other hidden peers" in check.detail
    assert check.remedy.startswith("to be reached, forward TCP port 31337")
    assert 'listen = ["/ip4/0.0.0.0/tcp/31337"]' in check.remedy


def test_own_peer_that_answers_at_the_port_proves_that_it_is_open() -> None:
    mismatch = Reach(False, ADDRESS, "failed to negotiate security protocol: peer id mismatch: expected …")
    assert doctor.reachable(mismatch, 0, "/ip4/0.0.0.0/tcp/31337").finding == "public"


def test_nothing_is_claimed_when_nobody_dialled_back() -> None:
    check = doctor.reachable(Reach(), 0, "/ip4/0.0.0.0/tcp/0")
    assert (check.verdict, check.finding) == (Verdict.NOTE, "unknown")


def test_larger_model_needs_more_of_memory_and_disk() -> None:
    config = PeerConfig()
    assert doctor.needed_memory(10**9, config) - doctor.needed_memory(0, config) == 36 * GB
    assert doctor.needed_disk(10**9, config) - doctor.needed_disk(0, config) == 60 * GB


def test_command_ends_with_the_code_of_the_first_cause() -> None:
    checks = [doctor.clock(0.0), doctor.disk(HERE, 0, True, None), doctor.clock(90.0)]
    assert doctor.exit_code(checks) == StorageError.exit_code
    assert doctor.exit_code(checks[:1]) == 0
    told = doctor.plain(checks)
    assert told["can_take_part"] is False
    assert [check["verdict"] for check in told["checks"]] == ["fine", "bad", "bad"]


def test_cause_and_remedy_are_two_lines() -> None:
    cause, remedy = doctor.lines(doctor.clock(90.0))
    assert cause.startswith("BAD")
    assert remedy.strip() == "→ sudo timedatectl set-ntp true"


def test_join_is_refused_with_the_first_cause_and_told_how_to_insist() -> None:
    notes = [doctor.clock(0.0), doctor.open_files(512, 4096)]
    doctor.insist(notes)  # a note keeps nobody out
    with pytest.raises(doctor.Unfit, match=r"disk: .*cannot be written; set data_dir .*--no-doctor") as said:
        doctor.insist([*notes, doctor.disk(HERE, GB, False, None), doctor.memory(0, GB)])
    assert said.value.exit_code == StorageError.exit_code


def test_quick_look_asks_nobody_and_finds_what_a_larger_model_needs() -> None:
    config = PeerConfig()
    assert [check.name for check in doctor.look_over(config)] == [
        "version",
        "compute",
        "files",
        "disk",
        "memory",
    ]
    too_large = doctor.look_at_needs(config, 10**12)
    assert {check.verdict for check in too_large} == {Verdict.BAD}


@pytest.mark.parametrize(
    ("sample_seconds", "step_seconds", "uplink", "finding", "word"),
    [
        (0.1, 1.0, 1e6, "yes", "make the round: yes"),
        (0.1, None, 1e6, "yes", "nobody trains now"),
        (2.0, 1.0, 1e6, "no", "no, a single sample takes longer than a step"),
        (0.1, 1.0, 1e3, "no", "no, an attempt is given up after"),
    ],
)
def test_speed_says_whether_this_machine_would_make_the_round(
    sample_seconds: float, step_seconds: float | None, uplink: float, finding: str, word: str
) -> None:
    links = Links(uplink, 1e7, 0.05)
    figures = doctor._figures(RunConfig(), 10**6, 2, sample_seconds, links)
    check = doctor.speed(figures, links, sample_seconds, step_seconds, most_seconds=60.0)
    assert check.finding == finding
    assert word in check.detail
    assert bool(check.remedy) == (finding == "no")
    assert check.exit_code == 0  # slow is no reason to keep somebody out
