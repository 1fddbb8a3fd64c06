"""What ships: the files parse, agree with each other and with the code, and pass their own tools' checks.

Not covered: building the image and starting the containers, which need a Docker daemon.
"""

from __future__ import annotations

import asyncio
import configparser
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from event_examples import ONE_OF_EACH
from external_tools import run_tool
from typer.main import get_command

from p2ptrain.config import load_peer, load_run
from p2ptrain.errors import LocalFault, PeerFault
from p2ptrain.telemetry.health import HealthServer
from p2ptrain.telemetry.metrics import Metrics
from peers.cli import app
from peers.monitor_pages import BOOTSTRAP_PORT

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
UNIT = DOCKER / "p2ptrain-peer.service"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
PROMETHEUS: dict[str, Any] = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PEER = load_peer(DOCKER / "peer.toml")


def dockerfile() -> Iterator[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, continued lines joined."""
    text = "\n".join(
        line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.startswith("#")
    )
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            instruction, arguments = line.split(maxsplit=1)
            yield instruction, arguments


def last(instruction: str) -> str:
    return [arguments for name, arguments in dockerfile() if name == instruction][-1]


def copied() -> set[str]:
    """What the build takes from the repository."""
    return {
        source
        for name, arguments in dockerfile()
        if name == "COPY" and "--from" not in arguments
        for source in arguments.split()[:-1]
    }


def image_health_check() -> list[str]:
    command: list[str] = json.loads(last("HEALTHCHECK").split(" CMD ", 1)[1])
    return command


async def run_check(command: list[str], port: int) -> int:
    """Exit status of a container's health check, sent to another port and with the Python at hand."""
    assert command[:2] == ["python", "-c"]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        command[2],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "P2PTRAIN_HEALTH_PORT": str(port)},
    )
    return await process.wait()


# -- the image -----------------------------------------------------------------------------------------------


def test_image_has_all_that_the_build_needs_when_copied() -> None:
    assert all((ROOT / source).exists() for source in copied())
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert copied() == {"pyproject.toml", PROJECT["project"]["readme"], *packages}


def test_builder_sees_what_is_copied_and_nothing_else_when_filtered() -> None:
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied()


def test_image_runs_a_python_that_the_project_supports_when_chosen() -> None:
    bases = {arguments.split()[0] for name, arguments in dockerfile() if name == "FROM"}
    assert bases == {"python:3.11-slim"}
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"


def test_image_starts_our_command_without_a_shell_when_run() -> None:
    (entry,) = json.loads(last("ENTRYPOINT"))
    assert entry in PROJECT["project"]["scripts"]
    assert json.loads(last("CMD")) == ["--help"]
    assert image_health_check()[0] == "python"


def test_image_is_not_root_when_run() -> None:
    names = [name for name, _ in dockerfile()]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last("USER"))
    assert names.index("USER") < names.index("ENTRYPOINT")


@pytest.mark.parametrize(("failed", "status"), [([], 0), (["state not caught up"], 1)])
async def test_health_check_follows_readiness_when_run(failed: list[str], status: int) -> None:
    async with HealthServer(lambda: b"", lambda: failed) as server:
        assert await run_check(image_health_check(), server.port) == status


def test_instructions_keep_to_the_rules_of_good_images() -> None:
    """What hadolint would say, where it applies."""
    found = list(dockerfile())
    assert not any(name in {"ADD", "MAINTAINER"} for name, _ in found)
    assert not any(re.search(r"\bsudo\b|apt-get|curl |wget ", arguments) for _, arguments in found)
    assert all(
        ":" in arguments.split()[0] and ":latest" not in arguments
        for name, arguments in found
        if name == "FROM"
    )
    assert all("--no-cache-dir" in arguments for name, arguments in found if "pip install" in arguments)
    assert all(json.loads(last(name)) for name in ("ENTRYPOINT", "CMD")), "in exec form"
    assert [name for name, _ in found].count("HEALTHCHECK") == 1
    images = [service["image"] for service in SERVICES.values()]
    assert all(image == "p2ptrain" or re.fullmatch(r"[a-z/]+:v?[0-9][0-9.]+", image) for image in images)


# -- the containers ------------------------------------------------------------------------------------------


def test_services_have_one_profile_each_when_listed() -> None:
    profiles = {name: service["profiles"] for name, service in SERVICES.items()}
    assert profiles == {
        "bootstrap": ["bootstrap"],
        "peer": ["peer", "three"],
        "peer-2": ["three"],
        "peer-3": ["three"],
        "monitor": ["monitoring"],
        "prometheus": ["monitoring"],
        "grafana": ["monitoring"],
    }


def test_services_use_only_keys_that_compose_knows() -> None:
    known = {
        *("build", "cap_drop", "command", "environment", "healthcheck", "image", "network_mode", "profiles"),
        *("read_only", "restart", "security_opt", "stop_grace_period", "tmpfs", "volumes"),
    }
    for name, service in SERVICES.items():
        assert set(service) <= known, name
        assert all(isinstance(value, str) for value in service.get("environment", {}).values()), name
    assert set(COMPOSE) == {"name", "x-hardened", "x-p2ptrain", "services", "volumes"}
    mounted = {mount.split(":")[0] for service in SERVICES.values() for mount in service["volumes"]}
    assert {each for each in mounted if not each.startswith((".", "$"))} == set(COMPOSE["volumes"])


@pytest.mark.parametrize(
    "name", [name for name, service in SERVICES.items() if service["image"] == "p2ptrain"]
)
def test_command_of_a_service_is_one_that_p2ptrain_has(name: str) -> None:
    verb, *words = SERVICES[name]["command"]
    command = get_command(app).commands[verb]  # type: ignore[attr-defined]
    known = {option for each in command.params for option in each.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("name", SERVICES)
def test_service_can_do_little_harm_when_taken_over(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp"]


@pytest.mark.parametrize("name", ["bootstrap", "peer", "peer-2", "peer-3", "monitor"])
def test_service_finishes_its_round_when_stopped(name: str) -> None:
    assert SERVICES[name]["stop_grace_period"] == "2m"
    assert last("STOPSIGNAL") == "SIGINT"


@pytest.mark.parametrize("name", SERVICES)
def test_mounts_exist_and_are_read_only_when_they_are_ours(name: str) -> None:
    for mount in SERVICES[name]["volumes"]:
        source, *rest = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", mount).split(":")
        if source.startswith("."):
            assert (DOCKER / source).exists(), source
            assert rest[-1] == "ro"
        else:
            assert source in COMPOSE["volumes"]


def test_commands_name_mounted_files_when_run() -> None:
    peers = ("peer", "peer-2", "peer-3")
    for name, word in (("bootstrap", "bootstrap"), *((peer, "join") for peer in peers)):
        command = SERVICES[name]["command"]
        mounted = {mount.split(":")[-2] for mount in SERVICES[name]["volumes"] if mount.endswith(":ro")}
        assert command[0] == word
        assert {argument for argument in command if argument.startswith("/etc/")} == mounted


def test_default_run_of_the_bootstrap_loads_when_nothing_is_chosen() -> None:
    mount = SERVICES["bootstrap"]["volumes"][0]
    found = re.match(r"\$\{P2PTRAIN_RUN:-(.*?)\}", mount)
    assert found is not None
    load_run(DOCKER / found[1])


def test_state_is_on_the_volume_when_written() -> None:
    assert PEER.data_dir == last("VOLUME") == "/data"
    assert SERVICES["peer"]["volumes"][-1] == "peer:/data"
    assert SERVICES["bootstrap"]["volumes"][-1] == "bootstrap:/data"


def test_ports_agree_when_read_from_every_file() -> None:
    swarm, peers = PROMETHEUS["scrape_configs"]
    monitor = SERVICES["monitor"]
    port = monitor["command"][monitor["command"].index("--port") + 1]
    assert monitor["environment"] == {"P2PTRAIN_HEALTH_PORT": port}
    assert swarm["static_configs"] == [{"targets": [f"127.0.0.1:{port}"]}]
    assert peers["http_sd_configs"][0]["url"] == f"http://127.0.0.1:{port}/api/v1/sd"
    assert f"P2PTRAIN_HEALTH_PORT={PEER.metrics_port}" in last("ENV")
    taken = [PEER.metrics_port, int(port), BOOTSTRAP_PORT]
    for name in ("peer-2", "peer-3"):
        config = load_peer(DOCKER / f"{name}.toml")
        assert SERVICES[name]["environment"] == {"P2PTRAIN_HEALTH_PORT": str(config.metrics_port)}
        assert config.data_dir == "/data"
        assert config.metrics_port not in taken
        taken.append(config.metrics_port)
    mounted = [mount.split(":")[0] for mount in SERVICES["prometheus"]["volumes"]]
    assert "./prometheus.yml" in mounted
    bootstrap_port = SERVICES["bootstrap"]["command"][-1].rsplit("/", 1)[1]
    readme = (DOCKER / "README.md").read_text()
    for port in (PEER.listen[0].rsplit("/", 1)[1], bootstrap_port, str(PEER.metrics_port)):
        assert port in readme
    assert bootstrap_port not in PEER.listen[0]
    opening = SERVICES["bootstrap"]
    assert opening["command"][opening["command"].index("--page-port") + 1] == str(BOOTSTRAP_PORT)
    assert opening["environment"] == {"P2PTRAIN_HEALTH_PORT": str(BOOTSTRAP_PORT)}


# -- Prometheus ----------------------------------------------------------------------------------------------


def test_scrape_config_passes_promtool_when_checked() -> None:
    path = str(DOCKER / "prometheus.yml")
    checked = run_tool("promtool", "check", "config", path, debian_package="prometheus")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_scrape_limits_let_our_own_page_pass_when_it_is_full() -> None:
    _, job = PROMETHEUS["scrape_configs"]
    metrics = Metrics("r" * 63, "f" * 64)
    for event in ONE_OF_EACH:
        metrics.observe(event)
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    assert len(samples) * 2 < job["sample_limit"]
    assert max(len(sample.labels) for sample in samples) + 2 <= job["label_limit"]  # with job and instance
    longest = max(len(value) for sample in samples for value in sample.labels.values())
    assert longest < job["label_value_length_limit"]
    assert job["body_size_limit"] == "1MB"
    assert len(metrics.page()) < 100_000


# -- systemd -------------------------------------------------------------------------------------------------


def test_unit_passes_systemd_analyze_when_checked(tmp_path: Path) -> None:
    program = tmp_path / ".local" / "bin" / "p2ptrain"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    env = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    checked = run_tool("systemd-analyze", "--user", "verify", str(UNIT), debian_package="systemd", env=env)
    # An unknown key is only a warning to systemd, so nothing at all may be said.
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def service_section() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(UNIT)
    return parser["Service"]


def test_unit_restarts_only_what_may_mend_itself_when_a_peer_ends() -> None:
    def below(fault: type[LocalFault]) -> set[int]:
        codes = {fault.exit_code}
        return codes.union(*(below(kind) for kind in fault.__subclasses__()))

    service = service_section()
    final = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert service["Restart"] == "on-failure"
    assert final == below(LocalFault)
    assert PeerFault.exit_code not in final


def test_unit_ends_only_our_process_when_stopped() -> None:
    service = service_section()
    assert (service["KillSignal"], service["KillMode"], service["TimeoutStopSec"]) == (
        "SIGINT",
        "mixed",
        "2min",
    )
    assert service["ExecStart"].split()[1:] == [
        "join",
        "${P2PTRAIN_INVITE}",
        "--peer",
        "%E/p2ptrain/peer.toml",
    ]


@pytest.mark.parametrize("role", ["bootstrap", "monitor"])
def test_hardened_unit_passes_systemd_analyze(role: str, tmp_path: Path) -> None:
    unit = DOCKER / f"p2ptrain-{role}.service"
    checked = run_tool(
        "systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit), debian_package="systemd"
    )
    assert checked.returncode == 0, checked.stdout.splitlines()[-1]
    program = tmp_path / "p2ptrain"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/usr/local/bin/p2ptrain", str(program)))
    checked = run_tool("systemd-analyze", "verify", str(copy), debian_package="systemd")
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


@pytest.mark.parametrize("role", ["bootstrap", "monitor"])
def test_hardened_unit_runs_a_command_that_p2ptrain_has(role: str) -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", (DOCKER / f"p2ptrain-{role}.service").read_text(), flags=re.M)
    program, verb, *words = line.split()
    command = get_command(app).commands[verb]  # type: ignore[attr-defined]
    assert (program, verb) == ("/usr/local/bin/p2ptrain", role)
    assert {word for word in words if word.startswith("--")} <= {
        o for each in command.params for o in each.opts
    }
