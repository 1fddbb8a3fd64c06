"""A bootstrap and two volunteers on three hosts of their own: network namespaces on one bridge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.swarm.processes import Crew, Process, crew, run_file, until

pytestmark = pytest.mark.chaos


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


class Network:
    """A bridge, and hosts on it: each a namespace with the address 10.83.0.<its number>."""

    def __init__(self) -> None:
        self.bridge = f"p2pt{os.getpid() % 100_000}"
        self.hosts: list[str] = []
        ip("link", "add", self.bridge, "type", "bridge")
        ip("link", "set", self.bridge, "up")

    def host(self) -> tuple[str, str, list[str]]:
        """(namespace, address, words that run a command in it)."""
        number = len(self.hosts) + 1
        name, outer = f"{self.bridge}n{number}", f"{self.bridge}v{number}"
        self.hosts.append(name)
        ip("netns", "add", name)
        ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", outer, "master", self.bridge, "up")
        ip("-n", name, "addr", "add", f"10.83.0.{number}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", "eth0", "up")
        return name, f"10.83.0.{number}", ["ip", "netns", "exec", name]

    def link(self, number: int, state: str) -> None:
        """Put that host's cable in or out."""
        ip("link", "set", f"{self.bridge}v{number}", state)

    def close(self) -> None:
        for number, name in enumerate(self.hosts, start=1):
            # The cable first: a namespace goes only after its last process, and its devices after that.
            subprocess.run(["ip", "link", "delete", f"{self.bridge}v{number}"], check=False)
            subprocess.run(["ip", "netns", "delete", name], check=False)
        subprocess.run(["ip", "link", "delete", self.bridge], check=False)


@pytest.fixture
def network() -> Iterator[Network]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.fail(
            "this test makes network namespaces: run it as root, with iproute2 (apt-get install iproute2)"
        )
    made = Network()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def people(tmp_path: Path, network: Network) -> Iterator[Crew]:
    with crew(tmp_path) as started:
        yield started


def swarm(network: Network, people: Crew, run: Path) -> list[Process]:
    """Two volunteers that found each other through a bootstrap, each on a host of its own."""
    _, address, inside = network.host()
    _, invite = people.bootstrap(run, f"/ip4/{address}/tcp/31337", inside=inside)
    peers = []
    for name in ("anna", "bert"):
        _, address, inside = network.host()
        listen = f"/ip4/{address}/tcp/31337"
        peers.append(people.join(invite, name, listen=listen, inside=inside, checkpoint_every_steps=0))
    return peers


def agree(peers: list[Process], step: int) -> None:
    results = [peer.result() for peer in peers]
    assert [result["step"] for result in results] == [step] * len(peers)
    assert len({(result["lineage"], result["state_digest"]) for result in results}) == 1


def test_two_volunteers_in_networks_of_their_own_train_one_model(
    network: Network, people: Crew, tmp_path: Path
) -> None:
    peers = swarm(network, people, run_file(tmp_path, "two-networks", 200, batch=16))
    for peer in peers:
        assert peer.end(90) == 0, peer
    agree(peers, 200)
    assert all(peer.result()["rounds"] >= 20 for peer in peers)


def test_halves_of_a_cut_network_end_on_one_lineage_when_it_is_mended(
    network: Network, people: Crew, tmp_path: Path
) -> None:
    peers = swarm(network, people, run_file(tmp_path, "cut", 100_000, batch=16))
    anna, bert = peers

    def events(name: str) -> list[dict[str, object]]:
        path = tmp_path / name / "journal.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def together(name: str, after: int) -> bool:
        rounds = [event for event in events(name)[after:] if event["event"] == "round_committed"]
        return len(rounds) > 5 and rounds[-1]["peers"] == 2

    for name in ("anna", "bert"):
        until(lambda name=name: together(name, 0), lambda: f"{anna}\n{bert}")
    network.link(3, "down")
    for name in ("anna", "bert"):
        alone = len(events(name))
        until(
            lambda name=name, alone=alone: any(event.get("peers") == 1 for event in events(name)[alone:]),
            lambda: f"{anna}\n{bert}",
        )
    cut = {name: len(events(name)) for name in ("anna", "bert")}
    network.link(3, "up")
    for name in ("anna", "bert"):
        until(lambda name=name: together(name, cut[name]), lambda: f"{anna}\n{bert}", 120)
    told = [event["event"] for name in cut for event in events(name)[cut[name] :]]
    assert told.count("rolled_back") == 1, "the lighter side gave up its own lineage, and only it"
    assert "caught_up" in told
    states: dict[object, object] = {}
    compared = 0
    for name in cut:
        for event in events(name):
            if event["event"] == "state_hashed":
                compared += event["lineage"] in states
                assert states.setdefault(event["lineage"], event["state_digest"]) == event["state_digest"]
    assert compared > 5
    for peer in peers:
        peer.interrupt()
    assert [peer.end(30) for peer in peers] == [0, 0]
