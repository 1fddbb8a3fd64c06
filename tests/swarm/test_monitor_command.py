"""`p2ptrain monitor` beside a swarm of real processes: it sees all of it, and takes no part."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.swarm.processes import Crew, Process, crew, get, run_file, until

pytestmark = [pytest.mark.swarm, pytest.mark.long]

DOCKER = Path(__file__).parents[2] / "docker"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Scene:
    people: Crew
    peers: list[Process]
    run: Path
    train: str
    watch: str
    folder: Path
    monitor: Process
    url: str

    def state(self) -> dict[str, Any]:
        status, text = get(f"{self.url}api/v1/state")
        return json.loads(text) if status == 200 else {}

    def start(self) -> None:
        self.monitor = self.people.start(
            "monitor",
            self.watch,
            *("--port", self.url.rsplit(":", 1)[1].rstrip("/"), "--data-dir", str(self.folder / "monitor")),
            *("--file-sd", str(self.folder / "peers.json")),
        )


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("monitor")
    with crew(folder) as people:
        run = run_file(folder, "watched", 100_000, batch=64)
        run.write_text(f"min_peers = 2\n{run.read_text()}")
        _, train = people.bootstrap(run, data_dir="bootstrap")
        inviting = people.start(
            *(
                "invite",
                "create",
                str(run),
                "--role",
                "watch",
                "--data-dir",
                str(folder / "bootstrap"),
                "--json",
            )
        )
        assert inviting.end() == 0
        peers = [people.join(train, f"peer-{number}") for number in range(2)]
        url = f"http://127.0.0.1:{free_port()}/"
        scene = Scene(people, peers, run, train, inviting.result()["invite"], folder, peers[0], url)
        scene.start()
        until(lambda: len(scene.state().get("rounds", ())) > 3, lambda: f"rounds: {scene.monitor}")
        yield scene


def test_monitor_sees_peers_and_rounds_and_is_in_none(scene: Scene) -> None:
    def trainers() -> list[dict[str, Any]]:
        return [peer for peer in scene.state()["peers"].values() if peer["role"] == "train"]

    until(
        lambda: sum(peer["samples"] > 0 for peer in trainers()) == 2, lambda: f"two that gave: {trainers()}"
    )
    state = scene.state()
    assert state["run"]["id"] == "watched"
    assert {len({part[1] for part in state["parts"]}), max(row[3] for row in state["rounds"])} == {2}
    assert {peer["role"] for peer in state["peers"].values()} == {"train", "bootstrap"}
    assert state["invite"] == "", "an invite to watch lets nobody train"


def test_peers_metrics_come_through_the_link_to_whom_service_discovery_names(scene: Scene) -> None:
    def targets() -> list[dict[str, Any]]:
        return list(json.loads(get(f"{scene.url}api/v1/sd")[1]))

    until(lambda: len(targets()) == 2, lambda: f"two targets: {targets()}")
    for target in targets():
        (address,) = target["targets"]
        assert f"http://{address}/" == scene.url
        status, page = get(f"http://{address}{target['labels']['__metrics_path__']}")
        assert status == 200
        assert "p2ptrain_run_info{" in page
        assert "p2ptrain_global_step " in page
    assert json.loads((scene.folder / "peers.json").read_text()) == targets()
    assert get(f"{scene.url}peers/nobody/metrics")[0] == 404
    assert "p2ptrain_swarm_rounds_total " in get(f"{scene.url}metrics")[1]
    assert get(scene.url, Host="evil.example")[0] == 403
    assert get(f"{scene.url}readyz")[0] == 200


def test_history_is_there_when_the_monitor_was_killed_and_started_again(scene: Scene) -> None:
    history = scene.folder / "monitor" / "history.jsonl"
    until(lambda: history.read_text().count('"kind":"round"') > 3, "some rounds on disk")
    before = scene.state()["rounds"][0]
    scene.monitor.kill()
    with history.open("a") as torn:
        torn.write('{"kind":"round","row":[1,')
    scene.start()
    until(lambda: scene.state().get("rounds"), lambda: f"the page again: {scene.monitor}", 180)
    assert scene.state()["rounds"][0] == before


def test_what_is_seen_is_printed_once_with_json(scene: Scene) -> None:
    looking = scene.people.start("monitor", scene.watch, "--json")
    assert looking.end(180) == 0, str(looking)
    seen = looking.result()
    assert seen["run"]["training"] == 2
    assert sum(peer["answered"] for peer in seen["peers"].values()) == 2


@pytest.fixture
def prometheus(scene: Scene, tmp_path: Path) -> Iterator[str]:
    """Debian's, with the configuration and the alerts that ship, but for ports and times."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.fail("this test needs prometheus; install it with: apt-get install prometheus")
    config = (DOCKER / "prometheus.yml").read_text().replace("127.0.0.1:9411", scene.url.split("/")[2])
    (tmp_path / "prometheus.yml").write_text(re.sub(r"interval: \d+s", "interval: 1s", config))
    (tmp_path / "alerts.yml").write_text(re.sub(r"for: \d+m", "for: 0s", (DOCKER / "alerts.yml").read_text()))
    address = f"127.0.0.1:{free_port()}"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield f"http://{address}/api/v1"
    finally:
        process.terminate()
        process.wait(10)


def test_prometheus_scrapes_all_peers_and_an_alert_fires_and_resolves(scene: Scene, prometheus: str) -> None:
    def asked(path: str) -> Any:
        status, text = get(f"{prometheus}/{path}")
        return json.loads(text)["data"] if status == 200 else {}

    def healthy() -> bool:
        targets = asked("targets").get("activeTargets", [])
        return [each["health"] for each in targets] == ["up"] * 3

    def firing() -> list[str]:
        alerts = asked("alerts").get("alerts", [])
        return [each["labels"]["alertname"] for each in alerts if each["state"] == "firing"]

    def order(verb: str) -> None:
        process = scene.people.start(verb, "--data-dir", str(scene.folder / "peer-0"))
        assert process.end() == 0, str(process)

    until(healthy, lambda: f"the swarm and two peers to be scraped: {asked('targets')}")
    steps = asked("query?query=p2ptrain_global_step")["result"]
    assert {each["metric"]["run"] for each in steps} == {"watched"}
    assert len({each["metric"]["instance"] for each in steps}) == 2
    assert "TooFewPeers" not in firing()
    order("pause")
    until(lambda: "TooFewPeers" in firing(), lambda: f"the alert: {firing()}")
    order("resume")
    until(lambda: "TooFewPeers" not in firing(), lambda: f"its end: {firing()}")


def test_monitor_ends_cleanly_on_ctrl_c(scene: Scene) -> None:
    scene.monitor.interrupt()
    assert scene.monitor.end() == 0, str(scene.monitor)
    assert "Traceback" not in str(scene.monitor)
    assert '"kind":"totals"' in (scene.folder / "monitor" / "history.jsonl").read_text().splitlines()[-1]


def test_monitor_ends_and_says_why_when_its_invite_was_revoked(scene: Scene) -> None:
    words = (str(scene.run), "2", "--data-dir", str(scene.folder / "bootstrap"))
    assert scene.people.start("invite", "revoke", *words).end() == 0
    scene.start()
    assert scene.monitor.end(180) == 2, str(scene.monitor)
    assert "has been revoked by the organizer; ask the organizer" in scene.monitor.errors.read_text()
    assert "Traceback" not in str(scene.monitor)
