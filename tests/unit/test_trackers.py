"""A tracker gets the figures of each committed step, and nothing that it does ends training."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from p2ptrain.config import PeerConfig, RunConfig
from p2ptrain.errors import ConfigError
from p2ptrain.events import Evaluated, RoundCommitted
from p2ptrain.telemetry.trackers import Tracking, figures_of, open_tracker
from tests.unit.event_examples import ONE_OF_EACH

STUB = """
calls = []

class Run:
    def log(self, figures, step):
        calls.append((step, figures))

    def finish(self):
        calls.append("finished")

def init(**settings):
    calls.append(settings)
    return Run()
"""


def example(kind: type) -> object:
    return next(each for each in ONE_OF_EACH if isinstance(each, kind))


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_tracker_gets_the_figures_of_each_committed_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    run = RunConfig(run_id="poems")
    with Tracking(open_tracker(name, run, "abcdefgh", tmp_path)) as tracking:
        for event in ONE_OF_EACH:
            tracking.observe(event)
    begin, *logged, end = sys.modules[name].calls
    monkeypatch.delitem(sys.modules, name)  # the stub, whatever comes next
    assert begin["name"] == "poems-abcdefgh"
    assert begin["config"] == run.model_dump(mode="json")
    assert end == "finished"
    of_rounds = [each for each in ONE_OF_EACH if isinstance(each, RoundCommitted)]
    of_looks = [each for each in ONE_OF_EACH if isinstance(each, Evaluated)]
    assert len(logged) == len(of_rounds) + len(of_looks)
    assert (of_rounds[0].step, figures_of(of_rounds[0])[1]) in logged  # type: ignore[index]
    assert figures_of(of_looks[0])[1]["heldout/loss"] == of_looks[0].loss  # type: ignore[index]


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    event = example(RoundCommitted)
    with Tracking(open_tracker("tensorboard", RunConfig(), "abcdefgh", tmp_path)) as tracking:
        tracking.observe(event)  # type: ignore[arg-type]
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    step, figures = figures_of(event)  # type: ignore[arg-type, misc]
    for name, value in figures.items():
        (scalar,) = read.Scalars(name)
        assert scalar.step == step
        assert scalar.value == pytest.approx(value)


def test_tracker_that_fails_is_told_of_once_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        asked = 0

        def log(self, figures: dict[str, float], step: int) -> None:
            self.asked += 1
            raise OSError("disk full")

        def finish(self) -> None:
            raise AssertionError("a tracker that failed is left alone")

    broken = Broken()
    with caplog.at_level(logging.WARNING), Tracking(broken) as tracking:
        for _ in range(3):
            tracking.observe(example(RoundCommitted))  # type: ignore[arg-type]
    assert broken.asked == 1
    assert [record.getMessage() for record in caplog.records] == [
        "the tracker failed (OSError: disk full) and gets no more"
    ]


def test_command_that_helps_is_named_when_the_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r'pip install "p2ptrain\[trackio\]", or set tracker to "none"'):
        open_tracker("trackio", RunConfig(), "abcdefgh", tmp_path)


def test_nothing_is_tracked_unless_the_peer_file_asks(tmp_path: Path) -> None:
    assert open_tracker(PeerConfig().tracker, RunConfig(), "abcdefgh", tmp_path) is None
