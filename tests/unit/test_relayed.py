"""Another peer's metrics page: an honest one passes unchanged, and nothing passes that is not ours."""

from __future__ import annotations

import pytest
from event_examples import ONE_OF_EACH

from p2ptrain.errors import BadMessage
from p2ptrain.telemetry.metrics import Metrics
from p2ptrain.telemetry.relayed import Filter

FILTER = Filter()


def lines(page: bytes) -> set[str]:
    return {line for line in page.decode().splitlines() if not line.startswith("#")}


def honest() -> bytes:
    metrics = Metrics("run", "f" * 64, about={"device": "cpu", "reduces": "true"})
    for event in ONE_OF_EACH:
        metrics.observe(event)
    return metrics.page()


def test_honest_page_passes_whole_when_it_is_ours() -> None:
    page = honest()
    assert {line for line in lines(page) if line.startswith(("p2ptrain_", "process_"))} == lines(
        FILTER.passed(page)
    )


@pytest.mark.parametrize(
    "line",
    [
        'p2ptrain_global_step{peer="12D3KooW"} 7',
        "someone_elses_metric 1",
        "p2ptrain_no_such_metric 1",
        'p2ptrain_paused{reason="because I say so"} 1',
        'p2ptrain_outlier_rounds_total{peer="not a peer id at all"} 1',
        'p2ptrain_build_info{version="1",evil="x"} 1',
        "p2ptrain_gradient_norm +Inf",
        'p2ptrain_round_seconds_bucket{outcome="committed",le="0.123"} 1',
        "up 0",
    ],
)
def test_line_is_left_out_when_no_peer_of_ours_would_write_it(line: str) -> None:
    passed = FILTER.passed(f"p2ptrain_roster_peers 3.0\n{line}\n".encode())
    assert lines(passed) == {"p2ptrain_roster_peers 3.0"}


def test_series_passes_once_when_it_is_repeated() -> None:
    passed = FILTER.passed(b"p2ptrain_roster_peers 3.0\np2ptrain_roster_peers 4.0\n")
    assert lines(passed) == {"p2ptrain_roster_peers 3.0"}


def test_label_is_printable_and_short_when_a_stranger_chose_it() -> None:
    passed = FILTER.passed(b'p2ptrain_build_info{version="' + b"x" * 500 + b'"} 1.0\n')
    assert len(passed) < 250


def test_only_so_many_outliers_pass_when_a_peer_names_hundreds() -> None:
    page = "# TYPE p2ptrain_outlier_rounds_total counter\n" + "".join(
        f'p2ptrain_outlier_rounds_total{{peer="peer{n}"}} 1\n' for n in range(300)
    )
    assert len(lines(FILTER.passed(page.encode()))) == 8


@pytest.mark.parametrize(
    "page", [b"\xff\xfe", b"<html>no metrics</html>", b"p2ptrain_roster_peers three\n", b'a{b="']
)
def test_page_is_refused_when_it_is_none(page: bytes) -> None:
    with pytest.raises(BadMessage):
        FILTER.passed(page)
