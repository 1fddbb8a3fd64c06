"""The volunteer's systemd unit as the command writes it, and the key that moves from machine to machine."""

from __future__ import annotations

import configparser
import stat
from pathlib import Path

import pytest
from external_tools import run_tool
from organizer import invite
from typer.testing import CliRunner, Result

from p2ptrain.errors import ConfigError, LocalFault, P2PTrainError, StorageError
from p2ptrain.swarm.access import encode
from p2ptrain.swarm.identity import load, load_or_create
from peers import service_cli
from peers.cli import app

DOCKER_UNIT = Path(__file__).parents[2] / "docker/p2ptrain-peer.service"


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), catch_exceptions=False)


def sections(text: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text)
    return unit


@pytest.mark.parametrize("folder", ["plain", "with a blank", "100%"])
def test_unit_passes_systemd_analyze(tmp_path: Path, folder: str) -> None:
    place = tmp_path / folder
    place.mkdir()
    (place / "peer.toml").write_text("threads = 1\n")
    (place / "p2ptrain").write_text("#!/bin/sh\n")
    (place / "p2ptrain").chmod(0o755)
    text = service_cli.unit("digits", place / "it.env", f"{place}/p2ptrain", place / "peer.toml", str(place))
    (file := tmp_path / "p2ptrain-digits.service").write_text(text)
    env = {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    checked = run_tool("systemd-analyze", "--user", "verify", str(file), debian_package="systemd", env=env)
    # An unknown key is only a warning to systemd, so nothing at all may be said.
    assert (checked.returncode, checked.stderr.strip()) == (0, "")


def test_unit_is_the_one_that_is_shipped_but_for_its_places() -> None:
    text = service_cli.unit("digits", Path("/x/it.env"), "/x/p2ptrain", None, "")
    ours, shipped = sections(text)["Service"], sections(DOCKER_UNIT.read_text())["Service"]
    differing = {key for key in {*ours, *shipped} if ours.get(key) != shipped.get(key)}
    assert differing == {"EnvironmentFile", "ExecStart"}
    final = set(map(int, ours["RestartPreventExitStatus"].split()))
    assert {each.exit_code for each in LocalFault.__subclasses__()} <= final
    assert 4 not in final  # a swarm that cannot be reached is tried again


def test_install_keeps_the_invite_to_its_owner_and_prints_how_to_go_on(tmp_path: Path) -> None:
    line = encode(invite())
    shown = run("service", "install", line, "--print")
    assert "ExecStart=" in shown.output
    assert line not in shown.output
    assert not (tmp_path / "config").exists()
    done = run("service", "install", line, "--no-start")
    assert "systemctl --user enable --now p2ptrain-" in done.output
    [secret] = (tmp_path / "config/p2ptrain").iterdir()
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert secret.read_text() == f"P2PTRAIN_INVITE={line}\n"
    [unit] = (tmp_path / "config/systemd/user").iterdir()
    assert unit.read_text() == shown.output


def test_systemd_that_does_not_answer_is_named_with_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(P2PTrainError, match=r"the unit is written, but `systemctl --user daemon-reload`"):
        run("service", "install", encode(invite()))


# -- identity ------------------------------------------------------------------------------------------------


def test_key_moves_to_another_folder_and_stays_the_same_peer(tmp_path: Path) -> None:
    here = load_or_create(tmp_path / "data/p2ptrain/digits/identity.key")
    assert run("identity", "show").output.strip() == here.peer_id
    out = tmp_path / "mine.key"
    run("identity", "export", str(out))
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    run("identity", "import", str(out), "--data-dir", str(tmp_path / "there"))
    assert load(tmp_path / "there/identity.key").peer_id == here.peer_id
    with pytest.raises(StorageError, match="a key that is overwritten is lost"):
        run("identity", "export", str(out))
    with pytest.raises(StorageError, match="is there already"):
        run("identity", "import", str(out), "digits")


def test_key_that_is_none_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no peer's key"):
        run("identity", "show")
    (torn := tmp_path / "torn.key").write_bytes(b"half")
    with pytest.raises(LocalFault, match="should hold an Ed25519 key"):
        run("identity", "import", str(torn), "digits")
    with pytest.raises(ConfigError, match="say for which run"):
        run("identity", "import", str(torn))
    for name in ("one", "two"):
        load_or_create(tmp_path / f"data/p2ptrain/{name}/identity.key")
    with pytest.raises(ConfigError, match="2 peers have a key here: one, two"):
        run("identity", "show")
