"""`p2ptrain bench` measures with real peers, and leaves nothing behind, also when it is interrupted.

Not covered: the figures themselves, which are the machine's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.swarm.processes import Crew, crew, until

pytestmark = [pytest.mark.swarm, pytest.mark.long]


@pytest.fixture
def people(tmp_path: Path) -> Iterator[Crew]:
    with crew(tmp_path) as started:
        yield started


def test_bench_measures_codecs_and_says_what_home_links_make_of_the_default_run(people: Crew) -> None:
    bench = people.start("bench", "--peers", "2", "--megabytes", "1", "--codecs", "int8", "--json")
    assert bench.end(120) == 0, str(bench)
    report = bench.result()
    assert set(report["codecs"]) == {"fp16", "int8"}
    assert min(each["allreduce_seconds"] for each in report["codecs"].values()) > 0
    assert report["tls_gigabytes_per_second"] > 0
    assert report["tiny_round_seconds"] > 0
    slow, *_, fast = (plan["forecast"]["step_seconds"] for plan in report["plans"].values())
    assert slow > fast > 0
    assert not list((people.folder / "process-0" / "data").rglob("peer-*"))


def test_bench_ends_with_its_peers_when_it_is_interrupted(people: Crew) -> None:
    bench = people.start("bench", "--megabytes", "1")
    family = psutil.Process(bench.process.pid)
    peers = until(
        lambda: [p for p in family.children() if len(family.children()) == 2], lambda: f"peers: {bench}"
    )
    bench.interrupt()
    assert bench.end(10) == 1, str(bench)
    assert "stopped by Ctrl-C" in bench.errors.read_text()
    assert not any(peer.is_running() for peer in peers)


def test_bench_says_what_it_needs_when_the_memory_is_not_there(people: Crew) -> None:
    bench = people.start("bench", "--peers", "16", "--megabytes", "1000")
    assert bench.end() == 2, str(bench)
    assert "lower --peers or --megabytes" in bench.errors.read_text()
