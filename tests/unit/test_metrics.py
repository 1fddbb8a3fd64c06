"""Metrics: events folded in, a page that Prometheus' own linter accepts, a size that no swarm can change."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import time
from typing import Any

import aiohttp
import pytest
from event_examples import (
    ABORTED,
    CAUGHT_UP,
    COMMITTED,
    LEASED,
    ONE_OF_EACH,
    PAUSED,
    RESUMED,
    ROLLED_BACK,
    SAVED,
    STOOD_OUT,
    WAITING,
    WASTED,
)
from external_tools import run_tool
from prometheus_client.parser import text_string_to_metric_families

from p2ptrain.events import AbortCause, Carrier, WasteCause
from p2ptrain.records import PeerId
from p2ptrain.telemetry import reference
from p2ptrain.telemetry.health import HealthServer
from p2ptrain.telemetry.metrics import MOST_OUTLIERS, LogCounter, Metrics, PeerState, watch_event_loop

NOW = 1_800_000_000.0


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("python-stdlib", "f" * 64, clock=lambda: NOW)


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(f"p2ptrain_{name}", labels)
    assert found is not None, f"no series {name} {labels}"
    return found


def series(metrics: Metrics) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    families = text_string_to_metric_families(metrics.page().decode())
    return {
        (sample.name, frozenset(sample.labels.items())) for family in families for sample in family.samples
    }


async def test_page_passes_promtool_when_served_over_http(metrics: Metrics) -> None:
    for event in ONE_OF_EACH:
        metrics.observe(event)
    async with (
        HealthServer(metrics.page, list) as server,
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{server.port}/metrics") as response,
    ):
        page = await response.text()
    checked = run_tool("promtool", "check", "metrics", debian_package="prometheus", stdin=page)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_promtool_refuses_a_page_when_its_names_break_the_rules() -> None:
    bad = "# TYPE p2ptrain_waited_milliseconds counter\np2ptrain_waited_milliseconds 1\n"
    checked = run_tool("promtool", "check", "metrics", debian_package="prometheus", stdin=bad)
    assert checked.returncode == 3


def test_families_are_documented_and_prefixed_when_listed(metrics: Metrics) -> None:
    for family in metrics.registry.collect():
        assert family.name.startswith(("p2ptrain_", "process_", "python_")), family.name
        assert len(family.documentation) > 10, family.name
        if family.name.startswith("p2ptrain_"):
            assert family.documentation.endswith((".", "never", "NaN until known", "0 on a CPU.")), (
                family.name
            )


def test_series_stay_the_same_when_thousands_of_peers_come_and_go(metrics: Metrics) -> None:
    before = series(metrics)
    for number in range(200):
        for event in ONE_OF_EACH:
            text: dict[str, Any] = {
                field.name: f"{field.name} {number}"
                for field in dataclasses.fields(event)
                if type(getattr(event, field.name)) is str
            }
            metrics.observe(dataclasses.replace(event, **text))
    for cause in AbortCause:
        metrics.observe(dataclasses.replace(ABORTED, cause=cause))
    named = {each for each in series(metrics) if each[0] == "p2ptrain_outlier_rounds_total"}
    assert series(metrics) - named == before
    assert len(named) == MOST_OUTLIERS
    assert len(before) < 500


def test_series_name_no_peer_when_peers_were_seen_that_did_not_stand_out(metrics: Metrics) -> None:
    for event in ONE_OF_EACH:
        if event != STOOD_OUT:
            metrics.observe(event)
    page = metrics.page().decode()
    assert "12D3KooW" not in page
    assert "2222bbbb" not in page


def test_peer_is_named_with_its_rounds_when_its_gradients_stood_out(metrics: Metrics) -> None:
    metrics.observe(STOOD_OUT)
    metrics.observe(STOOD_OUT)
    assert value(metrics, "outlier_rounds_total", peer="2222bbbb") == 16


def test_last_outliers_are_named_when_there_are_more_than_the_page_has_room_for(metrics: Metrics) -> None:
    for number in (*range(MOST_OUTLIERS), 0, MOST_OUTLIERS):
        metrics.observe(dataclasses.replace(STOOD_OUT, peer=PeerId(f"12D3KooW{number:08d}")))
    assert value(metrics, "outlier_rounds_total", peer="00000000") == 16
    assert value(metrics, "outlier_rounds_total", peer="00000008") == 8
    page = metrics.page().decode()
    assert 'peer="00000001"' not in page, "it had been silent for longest"
    assert page.count("p2ptrain_outlier_rounds_total{") == MOST_OUTLIERS


def test_catch_up_and_what_was_given_are_read_when_the_page_is(metrics: Metrics) -> None:
    assert value(metrics, "catch_up_parts", of="all") == 0
    metrics.catch_up_parts.labels("done").set_function(lambda: 12)
    metrics.read_donated = lambda: 5_000_000
    assert value(metrics, "catch_up_parts", of="done") == 12
    assert value(metrics, "donated_bytes_total") == 5_000_000


def test_round_is_counted_when_committed(metrics: Metrics) -> None:
    metrics.observe(COMMITTED)
    assert value(metrics, "global_step") == 42  # entry 41 leads to step 42
    assert value(metrics, "round_seconds_count", outcome="committed") == 1
    assert value(metrics, "round_seconds_sum", outcome="committed") == pytest.approx(3.2)
    assert value(metrics, "round_phase_seconds_sum", phase="accumulate") == 9.0
    assert value(metrics, "round_phase_seconds_sum", phase="reduce") == 2.9
    assert value(metrics, "round_phase_seconds_sum", phase="commit") == 0.2
    assert value(metrics, "round_phase_seconds_sum", phase="apply") == 0.1
    assert value(metrics, "samples_total", outcome="counted") == 512
    assert value(metrics, "averaged_samples_total") == 4112
    assert value(metrics, "data_samples", fate="unique") == 0
    assert value(metrics, "roster_peers") == 7
    assert value(metrics, "last_commit_timestamp_seconds") == NOW
    assert value(metrics, "loss", split="train") == 2.25
    assert value(metrics, "gradient_norm") == 0.5
    assert value(metrics, "learning_rate") == 0.002


def test_leased_samples_are_told_of_by_what_became_of_them(metrics: Metrics) -> None:
    metrics.observe(LEASED)
    assert value(metrics, "data_samples", fate="unique") == 150_000
    assert value(metrics, "data_samples", fate="lost") == 8
    assert value(metrics, "data_samples", fate="repeated") == 0
    assert value(metrics, "data_samples", fate="returned") == 4192


def test_loss_is_unknown_when_none_was_measured(metrics: Metrics) -> None:
    metrics.observe(dataclasses.replace(COMMITTED, loss=None, mine=0))
    assert math.isnan(value(metrics, "loss", split="train"))
    assert math.isnan(value(metrics, "loss", split="heldout"))


def test_abort_is_counted_by_cause_when_nobody_stepped(metrics: Metrics) -> None:
    metrics.observe(ABORTED)
    assert value(metrics, "round_aborts_total", cause="peer_lost") == 1
    assert value(metrics, "round_aborts_total", cause="deadline") == 0
    assert value(metrics, "round_seconds_sum", outcome="aborted") == 1.3
    assert value(metrics, "global_step") == 0


def test_samples_are_wasted_and_not_counted_when_the_swarm_went_on(metrics: Metrics) -> None:
    metrics.observe(WASTED)
    assert value(metrics, "samples_total", outcome="wasted") == 512
    assert value(metrics, "samples_total", outcome="counted") == 0
    assert value(metrics, "nonfinite_gradients_total") == 0
    metrics.observe(dataclasses.replace(WASTED, cause=WasteCause.NONFINITE))
    assert value(metrics, "nonfinite_gradients_total") == 1


def test_step_follows_the_replica_when_it_catches_up_and_rolls_back(metrics: Metrics) -> None:
    metrics.observe(dataclasses.replace(CAUGHT_UP, to_step=44))
    assert value(metrics, "global_step") == 44
    assert value(metrics, "catch_up_seconds_count", how="snapshot") == 1
    metrics.observe(ROLLED_BACK)
    assert value(metrics, "global_step") == 41
    assert value(metrics, "rollbacks_total") == 1
    assert value(metrics, "rolled_back_samples_total") == 1024


def test_checkpoint_time_stands_when_one_was_saved(metrics: Metrics) -> None:
    assert value(metrics, "last_checkpoint_timestamp_seconds") == 0
    metrics.observe(SAVED)
    assert value(metrics, "last_checkpoint_timestamp_seconds") == NOW
    assert value(metrics, "checkpoint_bytes") == 3_400_000


def test_waiting_ends_when_the_reason_is_empty(metrics: Metrics) -> None:
    metrics.observe(WAITING)
    assert value(metrics, "waiting") == 1
    metrics.observe(dataclasses.replace(WAITING, reason=""))
    assert value(metrics, "waiting") == 0


def test_reason_to_pause_is_shown_until_it_is_gone(metrics: Metrics) -> None:
    assert value(metrics, "paused", reason="user") == 0
    metrics.observe(PAUSED)
    assert value(metrics, "paused", reason="user") == 1
    metrics.observe(RESUMED)
    assert value(metrics, "paused", reason="user") == 0


@pytest.mark.parametrize("state", PeerState)
def test_exactly_one_state_is_set_when_read(metrics: Metrics, state: PeerState) -> None:
    metrics.read_state = lambda: state
    assert [each for each in PeerState if value(metrics, "peer_state", state=each)] == [state]


def test_carriers_are_read_with_their_peers_when_the_page_is_read(metrics: Metrics) -> None:
    metrics.read_carriers = lambda: {Carrier.TLS: 3}
    page = metrics.page().decode()
    assert 'p2ptrain_carrier_peers{carrier="tls"} 3.0' in page
    assert 'p2ptrain_carrier_peers{carrier="libp2p"} 0.0' in page


def test_traffic_is_read_by_lane_when_the_page_is_read(metrics: Metrics) -> None:
    metrics.read_traffic = lambda: {"data": (7, 9), "carrier pigeon": (1, 1)}
    metrics.read_journal_lost = lambda: 3
    assert value(metrics, "sent_bytes_total", lane="data") == 7
    assert value(metrics, "received_bytes_total", lane="data") == 9
    assert value(metrics, "sent_bytes_total", lane="control") == 0
    assert value(metrics, "journal_lost_events_total") == 3
    assert "pigeon" not in metrics.page().decode()


def test_registries_are_apart_when_two_peers_share_a_process(metrics: Metrics) -> None:
    other = Metrics("python-stdlib", "f" * 64)
    metrics.observe(COMMITTED)
    assert value(other, "global_step") == 0


def test_clips_are_counted_by_the_rounds_that_may_have_one_and_are_not_there_without() -> None:
    metrics = Metrics("run", "f" * 64)
    metrics.observe(COMMITTED)
    assert "\np2ptrain_gradient_clips_total " not in metrics.page().decode()
    metrics.observe(dataclasses.replace(COMMITTED, clipped=False))
    assert value(metrics, "gradient_clips_total") == 0
    metrics.observe(dataclasses.replace(COMMITTED, clipped=True))
    assert value(metrics, "gradient_clips_total") == 1


def test_tokens_are_those_of_the_samples_that_count() -> None:
    metrics = Metrics("run", "f" * 64, sample_tokens=128)
    metrics.observe(COMMITTED)
    assert value(metrics, "tokens_total") == 512 * 128


def test_dht_requests_are_timed_by_outcome_when_asked(metrics: Metrics) -> None:
    metrics.asked_dht("publish", False, 1.5)
    assert value(metrics, "dht_request_seconds_sum", operation="publish", outcome="failed") == 1.5
    assert value(metrics, "dht_request_seconds_count", operation="lookup", outcome="ok") == 0


def test_unknown_paths_make_no_series_when_asked_for(metrics: Metrics) -> None:
    before = series(metrics)
    for path, status in (("/metrics", 200), ("/healthz", 200), ("/wp-admin", 404), ("/../x", 404)):
        metrics.answered_http(path, status)
    assert series(metrics) == before
    assert value(metrics, "http_requests_total", route="/livez", code="2xx") == 1
    assert value(metrics, "http_requests_total", route="other", code="4xx") == 2


def test_log_messages_are_counted_by_level_when_logged(metrics: Metrics) -> None:
    logger = logging.getLogger("test of the counter")
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    logger.addHandler(LogCounter(metrics.log_messages))
    logger.debug("nobody counts this")
    logger.warning("this counts")
    assert value(metrics, "log_messages_total", level="warning") == 1
    assert value(metrics, "log_messages_total", level="info") == 0


def test_reference_in_the_readme_is_what_the_code_exports() -> None:
    text = reference.README.read_text()
    written = text.split(reference.BEGIN)[1].split(reference.END)[0].strip()
    assert written == reference.generated(), "run: python -m p2ptrain.telemetry.reference"


async def test_lag_is_told_when_something_blocks_the_loop() -> None:
    lags: list[float] = []
    seen = asyncio.Event()

    def observe(seconds: float) -> None:
        lags.append(seconds)
        seen.set()

    watcher = asyncio.create_task(watch_event_loop(observe, period_seconds=0.001))
    await seen.wait()
    until = time.perf_counter() + 0.05
    while time.perf_counter() < until:
        pass
    seen.clear()
    await seen.wait()
    watcher.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watcher
    assert max(lags) >= 0.04
