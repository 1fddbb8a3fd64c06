"""The best batch: the formula against a search, and what a journal says."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from event_examples import COMMITTED
from typer.testing import CliRunner

from p2ptrain.errors import ConfigError
from p2ptrain.protocol.batch import advise, step_seconds
from peers.batch_cli import Measured, app, summary


def shortest(critical: float, round_seconds: float, pace: float, delay: int) -> float:
    """The batch that takes least time, by thirds."""

    def seconds(log_batch: float) -> float:
        batch = math.exp(log_batch)
        return (1 + critical / batch) * step_seconds(batch, round_seconds, pace, delay)

    low, high = 0.0, 30.0
    for _ in range(200):
        third = (high - low) / 3
        low, high = (
            (low, high - third) if seconds(low + third) < seconds(high - third) else (low + third, high)
        )
    return math.exp((low + high) / 2)


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize(
    ("critical", "round_seconds", "pace"), [(340, 0.2, 85), (1e5, 12.0, 3000), (9, 40.0, 2)]
)
def test_best_batch_is_the_shortest_one_when_searched_for(
    critical: float, round_seconds: float, pace: float, delay: int
) -> None:
    """T20."""
    advice = advise(
        batch_size=16, critical=critical, round_seconds=round_seconds, samples_per_second=pace, delay=delay
    )
    found = shortest(critical, round_seconds, pace, delay)
    assert advice.best_batch_size == pytest.approx(found, rel=1e-6)

    def seconds(batch: float) -> float:
        return (1 + critical / batch) * step_seconds(batch, round_seconds, pace, delay)

    assert seconds(advice.best_batch_size) == pytest.approx(seconds(found), rel=1e-6)
    assert advice.more_time == pytest.approx(seconds(16) / seconds(found) - 1, rel=1e-6)


def test_factors_are_two_each_when_the_batch_is_the_critical_one() -> None:
    advice = advise(batch_size=64, critical=64.0, round_seconds=1.0, samples_per_second=64.0)
    assert (advice.steps_factor, advice.samples_factor) == (2.0, 2.0)
    assert advice.best_batch_size == 64.0
    assert (advice.more_time, advice.more_samples) == (0.0, 0.0)


def test_best_batch_is_one_sample_when_rounds_cost_nothing() -> None:
    assert advise(batch_size=8, critical=64.0, round_seconds=0.0, samples_per_second=9.0).best_batch_size == 1


ROUND = dataclasses.replace(COMMITTED, noise_scale=340.0)  # 4112 samples, 9 s, then 3.2 s; 8.5 s computed


@pytest.mark.parametrize(("delay", "pace"), [(0, 4112 / 9.0), (1, 4112 / 8.5)])
def test_measured_is_the_median_round_when_a_journal_is_read(delay: int, pace: float) -> None:
    slow = dataclasses.replace(ROUND, reduce_seconds=60.0, noise_scale=None)
    records = [event.to_dict() for event in (ROUND, ROUND, slow)] + [{"event": "unheard of"}]
    found = summary(records, delay)
    assert found == Measured(3, 4112, 340.0, pytest.approx(3.2), pytest.approx(pace))


def journal(folder: Path, *rounds: object) -> Path:
    lines = [json.dumps(round_.to_dict()) for round_ in rounds]  # type: ignore[attr-defined]
    (folder / "journal.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_command_prints_the_best_batch_and_what_the_present_one_costs(tmp_path: Path) -> None:
    folder = journal(tmp_path, ROUND, ROUND)
    result = CliRunner().invoke(app, ["advise", "--data-dir", str(folder)], catch_exceptions=False)
    best = round(math.sqrt(3.2 * 4112 / 9.0 * 340))
    assert f"target_batch_size = {best:,}" in result.output
    assert "1.08 times the fewest steps, 13.09 times the fewest samples" in result.output
    assert "time +" in result.output
    assert "Adam" in result.output


def test_command_takes_what_is_given_when_nothing_was_measured() -> None:
    given = ["--batch", "16", "--noise-scale", "100", "--round-seconds", "1", "--samples-per-second", "100"]
    result = CliRunner().invoke(app, ["advise", *given, "--json"], catch_exceptions=False)
    answer = json.loads(result.output)
    assert (answer["best_batch_size"], answer["batch_size"], answer["rounds"]) == (100.0, 16, 0)


def test_command_says_what_to_give_when_the_journal_has_no_noise_scale(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"after 1 rounds.*give --noise-scale"):
        CliRunner().invoke(
            app, ["advise", "--data-dir", str(journal(tmp_path, COMMITTED))], catch_exceptions=False
        )
    with pytest.raises(ConfigError, match="there is no journal"):
        CliRunner().invoke(app, ["advise", "--data-dir", str(tmp_path / "none")], catch_exceptions=False)
