"""The lab itself: hosts that are parted, slowed and cut off really are, and nothing of it stays.

The road's queue is held by `tests/unit/test_chaos_road.py`; what peers make of it, by the rows.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from tests.chaos.lab import Lab, NotHere
from tests.swarm.processes import crew, run_file

pytestmark = pytest.mark.chaos


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    try:
        with Lab(tmp_path) as made:
            yield made
    except NotHere as reason:
        pytest.fail(f"this machine has no lab: {reason}")


@contextmanager
def echo(lab: Lab, name: str) -> Iterator[None]:
    """A service on that host that sends back what it is sent."""
    listener = lab.within(name, lambda: socket.create_server(("", 7)))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(65_536):
                    connection.sendall(data)

    thread = Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def reach(lab: Lab, source: str, target: str, megabytes: float = 0.0, patience_s: float = 20.0) -> float:
    """Seconds until the echo of so much was back. Raises OSError after so long without a connection.

    A host that was cut off may take a while to be found again: the kernel asks for its address once a second.
    """

    def ask() -> float:
        began, question = time.monotonic(), bytes(max(1, round(megabytes * 1e6)))
        with socket.create_connection((lab.address(target), 7), timeout=patience_s) as connection:
            connection.settimeout(20)
            Thread(target=connection.sendall, args=(question,), daemon=True).start()
            back = 0
            while back < len(question):
                back += len(connection.recv(65_536))
        return time.monotonic() - began

    return lab.within(source, ask)


def unreachable(lab: Lab, source: str, target: str) -> bool:
    try:
        reach(lab, source, target, patience_s=1.0)
    except OSError:
        return True
    return False


def test_hosts_reach_each_other_until_they_are_parted_cut_off_or_unplugged(lab: Lab) -> None:
    for name in ("anna", "bert"):
        lab.place(name)
    with echo(lab, "bert"):
        reach(lab, "anna", "bert")
        for injure, mend in (
            (lambda: lab.part(["bert"]), lab.heal),
            (lambda: lab.cut("anna", "bert"), lab.mend),
            (lambda: lab.cut("bert", "anna"), lab.mend),
            (lambda: lab.loss("bert", 1.0), lab.mend),
            (lambda: lab.unplug("anna"), lambda: lab.plug("anna")),
        ):
            injure()
            assert unreachable(lab, "anna", "bert")
            mend()
            reach(lab, "anna", "bert")


def test_rate_holds_a_line_to_it_both_ways(lab: Lab) -> None:
    for name in ("anna", "bert"):
        lab.place(name)
    with echo(lab, "bert"):
        lab.rate("anna", 10)
        assert reach(lab, "anna", "bert", megabytes=1) > 0.7  # 0.8 s at 10 Mbit/s, less what the bucket holds
        lab.rate("anna", None)
        assert reach(lab, "anna", "bert", megabytes=1) < 0.7


def test_road_delays_and_damages_and_what_is_damaged_comes_whole(lab: Lab) -> None:
    for name in ("anna", "bert"):
        lab.place(name)
    with echo(lab, "bert"):
        lab.relay(delay_seconds=0.05)
        assert 0.2 <= reach(lab, "anna", "bert") < 1  # a round trip to connect, one for the echo
        lab.relay(delay_seconds=0.0, loss=0.05, reorder=0.1, duplicate=0.05, corrupt=0.02)
        reach(lab, "anna", "bert", megabytes=2)
        counts = lab.road()
        assert all(counts[what] > 10 for what in ("lost", "reordered", "duplicated", "corrupted"))


def test_router_lets_connections_out_and_none_in(lab: Lab) -> None:
    lab.place("anna")
    lab.place_behind_nat("hidden")
    with echo(lab, "anna"), echo(lab, "hidden"):
        assert reach(lab, "hidden", "anna") < 1
        assert unreachable(lab, "anna", "hidden's router")


def test_nothing_of_a_lab_is_left(tmp_path: Path) -> None:
    with Lab(tmp_path) as lab:
        lab.place("anna")
        lab.place_behind_nat("bert")
        lab.group("small")
        disk = lab.disk(tmp_path / "disk", 1)
        assert disk.is_mount()
        prefix = lab.hosts.prefix
    shown = [
        subprocess.run(words, capture_output=True, text=True, check=True).stdout
        for words in (("ip", "netns"), ("ip", "-o", "link"), ("mount",), ("ls", "-R", "/sys/fs/cgroup"))
    ]
    assert not any(prefix in text or str(disk) in text for text in shown)


@pytest.mark.long
def test_two_volunteers_in_networks_of_their_own_complete_one_run(lab: Lab, tmp_path: Path) -> None:
    run = run_file(tmp_path, "two-networks", 200, batch=16)
    with crew(tmp_path) as people:
        listen, inside = lab.place("bootstrap")
        _, invite = people.bootstrap(run, listen, inside=inside)
        peers = []
        for name in ("anna", "bert"):
            listen, inside = lab.place(name)
            peers.append(people.join(invite, name, listen=listen, inside=inside, checkpoint_every_steps=0))
        for peer in peers:
            assert peer.end(90) == 0, peer
        results = [peer.result() for peer in peers]
    assert [result["step"] for result in results] == [200, 200]
    assert len({(result["lineage"], result["state_digest"]) for result in results}) == 1
    assert all(result["rounds"] >= 20 for result in results)
