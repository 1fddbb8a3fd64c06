"""When a machine shall not train: hours of the week, thresholds that differ, patience; and what it reads."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest

from p2ptrain import timetable
from p2ptrain.config import Limits, PeerConfig, with_settings
from p2ptrain.errors import ConfigError
from p2ptrain.events import PauseReason
from peers import readings
from peers.limits import BUSY_SECONDS, DWELL_SECONDS, NONE, Readings, Strain, closed_seconds, decide, holding
from peers.limits import resumes_when as resumes

DAY, HOUR = 1440, 60
MONDAY_NOON = 12 * HOUR


def after(limits: Limits, story: Iterable[tuple[float, Readings]], strain: Strain = NONE) -> list[str]:
    """What holds after each of these (moment, readings)."""
    told = []
    for now, each in story:
        strain = decide(limits, each, strain, now)
        told.append(" ".join(holding(strain)))
    return told


# -- hours of the week ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "minute", "opens_in"),
    [
        ((), 0, 0),
        (("22:00-07:00",), MONDAY_NOON, 10 * HOUR),
        (("22:00-07:00",), 6 * HOUR, 0),  # on Monday morning, from Sunday evening
        (("22:00-07:00",), 7 * HOUR, 15 * HOUR),
        (("22:00-07:00",), 22 * HOUR, 0),
        (("sat,sun 00:00-24:00",), MONDAY_NOON, 5 * DAY - MONDAY_NOON),
        (("sat,sun 00:00-24:00",), 6 * DAY + 1439, 0),
        (("fri-mon 18:30-19:00",), 0, 18 * HOUR + 30),
        (("fri-mon 18:30-19:00",), DAY, 4 * DAY - DAY + 18 * HOUR + 30),
        (("tue 08:00-09:00", "mon 13:00-14:00"), MONDAY_NOON, HOUR),
    ],
)
def test_schedule_tells_in_how_many_minutes_it_opens(
    schedule: tuple[str, ...], minute: float, opens_in: float
) -> None:
    assert timetable.opens_in(schedule, minute) == opens_in


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ("22:00-22:00", "never opens"),
        ("mon 00:00-00:00", "never opens"),
        ("at night", "write it as"),
        ("22-07", "write it as"),
        ("25:00-26:00", "no clock shows"),
        ("10:60-12:00", "no clock shows"),
        ("xyz 10:00-12:00", "a day that is none"),
    ],
)
def test_schedule_that_never_opens_or_is_none_is_refused_in_one_sentence(entry: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as said:
        with_settings(PeerConfig(), {"limits.schedule": [entry]}, "the options")
    assert "\n" not in str(said.value)


# -- decisions -----------------------------------------------------------------------------------------------


def test_battery_pauses_at_once_and_mains_power_must_last_before_it_goes_on() -> None:
    away, home = Readings(0, on_battery=True), Readings(0, on_battery=False)
    story = [(0, home), (5, away), (30, home), (60, away), (70, home), (129, home), (130, home)]
    assert after(Limits(), story) == ["", "battery", "battery", "battery", "battery", "battery", ""]
    assert after(Limits(on_battery="train"), story) == [""] * 7


def test_load_of_others_begins_late_and_ends_lower_than_it_began() -> None:
    limits = Limits(other_cpu_percent=40)

    def load(percent: float) -> Readings:
        return Readings(0, other_cpu_percent=percent)

    burst = [(0.0, load(90)), (BUSY_SECONDS - 1, load(90)), (BUSY_SECONDS, load(10)), (15, load(90))]
    assert after(limits, burst) == [""] * 4
    lasting = [(0.0, load(41)), (BUSY_SECONDS, load(41)), (20, load(39)), (500, load(31))]
    assert after(limits, lasting) == ["", "other_cpu", "other_cpu", "other_cpu"]  # 30 is three quarters
    calm = [*lasting, (600, load(29)), (600 + DWELL_SECONDS, load(29))]
    assert after(limits, calm)[-2:] == ["other_cpu", ""]
    assert after(limits, [(0, load(90)), (1, Readings(0)), (BUSY_SECONDS, load(90))]) == [""] * 3


def test_heat_pauses_at_its_limit_and_ends_five_degrees_below() -> None:
    story = [(0.0, 80.0), (1, 81), (100, 76), (300, 75), (400, 74), (460, 74)]
    limits = Limits(temperature_celsius=80)
    told = after(limits, [(now, Readings(0, celsius=heat)) for now, heat in story])
    assert told == ["", "temperature", "temperature", "temperature", "temperature", ""]


def test_schedule_holds_to_the_minute_and_says_for_how_long() -> None:
    limits = Limits(schedule=("22:00-07:00",))
    assert after(limits, [(0, Readings(MONDAY_NOON)), (9, Readings(22 * HOUR))]) == ["schedule", ""]
    assert closed_seconds(limits, Readings(MONDAY_NOON)) == 10 * 3600


def test_reasons_are_a_set_and_each_says_when_it_ends() -> None:
    limits = Limits(
        only_when_idle=True, schedule=("22:00-07:00",), other_cpu_percent=40, temperature_celsius=80
    )
    readings_ = Readings(MONDAY_NOON, on_battery=True, idle=False)
    assert after(limits, [(0, readings_)]) == ["schedule battery activity"]
    assert after(limits, [(0, Readings(23 * HOUR, on_battery=None, idle=None))]) == [""]
    told = [resumes(reason, limits) for reason in PauseReason]
    assert len(set(told)) == len(PauseReason)
    assert "less than 30 %" in " ".join(told)
    assert "cooler than 75" in " ".join(told)


# -- readings ------------------------------------------------------------------------------------------------


def test_only_what_the_limits_ask_about_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> None:
        raise AssertionError("nobody asked")

    for name in ("_on_battery", "_idle", "_celsius"):
        monkeypatch.setattr(readings, name, asked)
    now = readings.Reader(Limits(on_battery="train")).read()
    assert (now.on_battery, now.idle, now.other_cpu_percent, now.celsius) == (None, None, None, None)
    assert 0 <= now.week_minute < timetable.WEEK_MINUTES


def test_own_processors_are_no_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = readings.Reader(Limits(other_cpu_percent=50))
    assert reader.read().other_cpu_percent is None  # nothing to compare with yet
    before = reader._before
    assert before is not None
    reader._before = (before[0] - 10, before[1] - 1000, before[2] - 1000)  # all that was busy was we
    load = reader.read().other_cpu_percent
    assert load is not None
    assert load < 50


def test_moment_is_of_the_local_week_and_pressure_is_read_as_the_kernel_writes_it() -> None:
    sunday = time.struct_time((2026, 11, 29, 23, 59, 30, 6, 333, 0))
    assert readings.week_minute(sunday) == timetable.WEEK_MINUTES - 0.5
    line = "{} avg10=0.00 avg60={} avg300=0.00 total=1\n"
    assert readings._unpressed(line.format("some", "3.10") + line.format("full", "50.00")) is True
    assert readings._unpressed(line.format("some", "12.00")) is False
    assert readings._unpressed("") is None
