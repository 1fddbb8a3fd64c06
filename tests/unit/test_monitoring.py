"""What ships for Prometheus and Grafana: alerts are seen to fire, dashboards name what is exported."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from external_tools import run_tool

from p2ptrain.telemetry.metrics import Metrics
from p2ptrain.telemetry.swarm_metrics import SwarmMetrics

DOCKER = Path(__file__).parents[2] / "docker"
RULES: list[dict[str, Any]] = yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"][0]["rules"]
CASES: list[dict[str, Any]] = yaml.safe_load((DOCKER / "alerts.test.yml").read_text())["tests"]
NAMES = [rule["alert"] for rule in RULES]
BOARDS = ("swarm", "peers", "network")


def exported() -> set[str]:
    """Every series' name, of a peer and of a monitor."""
    registries = (Metrics("run", "0" * 64).registry, SwarmMetrics().registry)
    samples = {
        sample.name for registry in registries for family in registry.collect() for sample in family.samples
    }
    outliers = {"p2ptrain_outlier_rounds_total"}  # no series before somebody stood out
    return samples | outliers | {"up"}


EXPORTED = exported()


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:p2ptrain|process|python)_[a-z_]+\b", expression))


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make", DOCKER / "grafana" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make"] = module
    spec.loader.exec_module(module)
    return module


# -- alerts --------------------------------------------------------------------------------------------------


def test_rules_pass_promtool_s_checks_and_tests() -> None:
    checked = run_tool("promtool", "check", "rules", str(DOCKER / "alerts.yml"), debian_package="prometheus")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = run_tool(
        "promtool", "test", "rules", str(DOCKER / "alerts.test.yml"), debian_package="prometheus"
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_promtool_fails_when_an_alert_would_not_fire(tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").write_text(
        (DOCKER / "alerts.yml")
        .read_text()
        .replace("p2ptrain_swarm_bootstraps < 1", "p2ptrain_swarm_bootstraps < 0")
    )
    (tmp_path / "test.yml").write_text((DOCKER / "alerts.test.yml").read_text())
    tested = run_tool("promtool", "test", "rules", str(tmp_path / "test.yml"), debian_package="prometheus")
    assert tested.returncode == 1
    assert "BootstrapDown" in tested.stdout + tested.stderr


@pytest.mark.parametrize("name", NAMES)
def test_alert_is_seen_to_fire_and_to_be_silent(name: str) -> None:
    asked = [case for each in CASES for case in each["alert_rule_test"] if case["alertname"] == name]
    assert any(case["exp_alerts"] for case in asked)
    assert any(not case["exp_alerts"] for case in asked)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_alert_says_how_grave_what_and_what_to_do(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"([A-Z][a-z]+)+", rule["alert"])
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"]["summary"]
    assert rule["for"]
    document, anchor = rule["annotations"]["runbook_url"].split("#")
    headings = re.findall(r"^## (.+)$", (DOCKER.parent / document).read_text(), flags=re.M)
    assert [heading for heading in headings if heading.lower() == anchor] == [rule["alert"]]


def test_runbook_has_no_section_without_an_alert() -> None:
    assert re.findall(r"^## (.+)$", (DOCKER / "RUNBOOK.md").read_text(), flags=re.M) == NAMES


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_alert_names_only_what_is_exported(rule: dict[str, Any]) -> None:
    assert metrics_in(rule["expr"]) <= EXPORTED
    assert metrics_in(rule["expr"])


# -- dashboards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOARDS)
def test_dashboard_is_what_its_script_makes(name: str) -> None:
    made = maker()
    assert set(made.DASHBOARDS) == set(BOARDS) == {path.stem for path in made.FOLDER.glob("*.json")}
    assert json.loads((made.FOLDER / f"{name}.json").read_text()) == made.dashboard(name), (
        "run: python docker/grafana/make.py"
    )


@pytest.mark.parametrize("name", BOARDS)
def test_dashboard_keeps_to_the_rules(name: str) -> None:
    board = json.loads((DOCKER / "grafana" / "dashboards" / f"{name}.json").read_text())
    assert board["editable"] is False
    assert [each["name"] for each in board["templating"]["list"]] == ["datasource", "job", "instance"]
    assert len({panel["title"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel["targets"]:
            assert 'job=~"$job"' in target["expr"]
            assert 'instance=~"$instance"' in target["expr"]
            assert not re.search(r"\brate\([^)]*\[(?!\$__rate_interval)", target["expr"])


@pytest.mark.parametrize("name", BOARDS)
def test_dashboard_names_only_what_is_exported_in_expressions_that_parse(name: str, tmp_path: Path) -> None:
    board = json.loads((DOCKER / "grafana" / "dashboards" / f"{name}.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    for expression in expressions:
        assert metrics_in(expression)
        assert metrics_in(expression) <= EXPORTED, expression
    plain = [
        each.replace("$__rate_interval", "1m").replace("$job", ".*").replace("$instance", ".*")
        for each in expressions
    ]
    rules = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(plain)]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    checked = run_tool("promtool", "check", "rules", str(path), debian_package="prometheus")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_provisioning_agrees_with_the_containers() -> None:
    provider = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/p2ptrain.yml").read_text())
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    folder = provider["providers"][0]["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in services["grafana"]["volumes"]
    (listen,) = [
        word for word in services["prometheus"]["command"] if word.startswith("--web.listen-address=")
    ]
    assert source["datasources"][0]["url"] == f"http://{listen.split('=')[1]}"
