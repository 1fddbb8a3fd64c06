"""A machine that shall not train now, from what psutil and logind say to what `p2ptrain status` shows: the
reason, when it ends, and that it ends later than it began."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from p2ptrain.config import Limits
from p2ptrain.events import Event, Paused, Resumed
from peers import daemon, readings
from peers.control_cli import status_lines
from peers.daemon import LOOK_SECONDS, Daemon
from peers.signals import Stop


class CpuTimes(NamedTuple):
    user: float
    system: float
    idle: float
    iowait: float


class Machine:
    """Two processors, a battery and a sensor, and somebody who uses it or not."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.plugged = True
        self.celsius = 50.0
        self.used = False
        self.others = 0.0
        """Processors that other programs take."""
        self.busy = 0.0

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.busy += (self.others + 1) * seconds  # one is ours

    def own_seconds(self) -> tuple[float, float]:
        return self.now - 1_800_000_000.0, 0.0

    def loginctl(self, *words: object, **options: object) -> SimpleNamespace:
        return SimpleNamespace(stdout=f"IdleHint={'no' if self.used else 'yes'}\n")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    own = SimpleNamespace(cpu_times=machine.own_seconds, children=lambda recursive: [])
    monkeypatch.setattr(
        readings,
        "psutil",
        SimpleNamespace(
            Process=lambda: own,
            Error=OSError,
            cpu_times=lambda: CpuTimes(machine.busy, 0.0, 0.0, 0.0),
            sensors_battery=lambda: SimpleNamespace(power_plugged=machine.plugged),
            sensors_temperatures=lambda: {"coretemp": [SimpleNamespace(current=machine.celsius)]},
        ),
    )
    monkeypatch.setattr(
        readings, "time", SimpleNamespace(monotonic=lambda: machine.now, localtime=time.localtime)
    )
    monkeypatch.setattr(
        readings,
        "subprocess",
        SimpleNamespace(run=machine.loginctl, SubprocessError=subprocess.SubprocessError),
    )
    monkeypatch.setattr(readings.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(daemon, "time", SimpleNamespace(time=lambda: machine.now, monotonic=time.monotonic))
    return machine


async def passed(peer: Daemon, machine: Machine, seconds: float) -> list[str]:
    """What `status` says after that time, in which the peer has looked at its machine as often as it does."""
    for _ in range(int(seconds / LOOK_SECONDS)):
        machine.pass_time(LOOK_SECONDS)
        await peer.look()
    return status_lines(peer.answer({"ask": "status"}), machine.now)


def unplug(machine: Machine, *, bad: bool) -> None:
    machine.plugged = not bad


def heat(machine: Machine, *, bad: bool) -> None:
    machine.celsius = 91.0 if bad else 74.0


def use(machine: Machine, *, bad: bool) -> None:
    machine.used = bad


def compute(machine: Machine, *, bad: bool) -> None:
    machine.others = 1.0 if bad else 0.2


@pytest.mark.parametrize(
    ("limits", "happens", "because", "resumes"),
    [
        (Limits(), unplug, "runs on battery", "when it has had mains power for 60 s"),
        (Limits(temperature_celsius=80), heat, "hot", "when it is cooler than 75 °C for 60 s"),
        (Limits(only_when_idle=True), use, "somebody uses", "when nobody has used it for 60 s"),
        (Limits(other_cpu_percent=40), compute, "other programs", "take less than 30 % of the processors"),
    ],
    ids=["battery", "temperature", "idle", "other_cpu"],
)
async def test_peer_pauses_with_its_reason_and_goes_on_a_minute_after_that_has_ended(
    machine: Machine, limits: Limits, happens: Callable[..., None], because: str, resumes: str
) -> None:
    happened: list[Event] = []
    peer = Daemon(Path("/data/one"), "stdlib", Stop(), happened.append, limits)
    assert "paused" not in " ".join(await passed(peer, machine, 20))

    happens(machine, bad=True)
    (paused,) = [line for line in await passed(peer, machine, 20) if line.startswith("paused: ")]
    assert because in paused
    assert f"; resumes {resumes}" in paused or resumes in paused

    happens(machine, bad=False)
    assert paused in await passed(peer, machine, 55), "it is not said again and again that it goes on"
    happens(machine, bad=True)
    assert paused in await passed(peer, machine, 5)
    happens(machine, bad=False)
    assert paused in await passed(peer, machine, 55), "the minute begins anew"
    assert "paused" not in " ".join(await passed(peer, machine, 15))
    assert [type(event) for event in happened] == [Paused, Resumed], "told once each"


async def test_machine_that_tells_nothing_is_no_reason_to_pause(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(readings.psutil, "sensors_battery", lambda: None)
    monkeypatch.setattr(readings.psutil, "sensors_temperatures", dict)
    monkeypatch.setattr(readings, "PRESSURE", tmp_path / "none")

    def absent(*words: object, **options: object) -> None:
        raise FileNotFoundError("loginctl")

    monkeypatch.setattr(readings.subprocess, "run", absent)
    limits = Limits(only_when_idle=True, temperature_celsius=60)
    peer = Daemon(Path("/data/one"), "stdlib", Stop(), lambda event: None, limits)
    assert "paused" not in " ".join(await passed(peer, machine, 30))
