"""A running peer is asked things: over its socket, with whatever comes, and by the installed command."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2ptrain.errors import ConfigError, NotRunning, P2PTrainError, PortBusy
from peers import control, daemon
from peers.daemon import ControlServer
from tests.swarm.processes import Crew, Process, crew, get, run_file, until

pytestmark = pytest.mark.swarm


@pytest.fixture(autouse=True)
def _own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def echo(request: dict[str, Any]) -> dict[str, Any]:
    if "ask" not in request:
        raise ConfigError("ask something")
    return {"heard": request}


def raw(folder: Path, content: bytes) -> bytes:
    """What comes back for these bytes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(control.socket_path(folder)))
        try:
            connection.sendall(content)
            return connection.recv(65536)
        except (BrokenPipeError, ConnectionResetError):
            return b""


# -- the socket ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 200], ids=["short path", "path too long for a socket"])
async def test_peer_is_found_and_answers_its_owner_only(tmp_path: Path, depth: int) -> None:
    folder = tmp_path / ("x" * depth) if depth else tmp_path
    folder.mkdir(exist_ok=True)
    async with ControlServer(folder, "stdlib", echo):
        assert await asyncio.to_thread(control.running) == [control.Running("stdlib", folder)]
        assert control.find("stdlib", "", None) == folder
        answer = await asyncio.to_thread(control.ask, folder, {"ask": "status"})
        assert answer == {"heard": {"ask": "status"}}
        assert stat.S_IMODE(control.socket_path(folder).stat().st_mode) == 0o600
        place = control.socket_path(folder)
    assert not place.exists()
    assert not place.parent.exists() or place.parent == folder
    assert control.running() == []
    with pytest.raises(NotRunning, match="no peer runs with the data folder"):
        control.ask(folder, {"ask": "status"})


async def test_only_one_process_has_a_data_folder_and_a_dead_ones_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / control.SOCKET))
    with pytest.raises(NotRunning):
        control.ask(tmp_path, {"ask": "status"})
    async with ControlServer(tmp_path, "stdlib", echo):
        with pytest.raises(PortBusy, match=r"another peer runs .*`p2ptrain leave --data-dir"):
            async with ControlServer(tmp_path, "stdlib", echo):
                pass
        assert await asyncio.to_thread(control.ask, tmp_path, {"ask": "status"})  # it is still there


async def test_nothing_that_comes_over_the_socket_does_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "REQUEST_SECONDS", 0.3)
    async with ControlServer(tmp_path, "stdlib", echo):
        for content in (b"hello\n", b"[" * 2000 + b"\n", b"\xff\x00\n", b"7\n", b"{}\n"):
            assert b"error" in await asyncio.to_thread(raw, tmp_path, content)
        assert await asyncio.to_thread(raw, tmp_path, b"x" * 100_000 + b"\n") == b""
        assert await asyncio.to_thread(raw, tmp_path, b'{"ask": ') == b""  # and then nothing more
        with pytest.raises(P2PTrainError, match="ask something"):
            await asyncio.to_thread(control.ask, tmp_path, {})
        idle = [socket.socket(socket.AF_UNIX) for _ in range(daemon.MAX_CONNECTIONS)]
        for connection in idle:
            connection.connect(str(control.socket_path(tmp_path)))
            await asyncio.sleep(0)
        await asyncio.sleep(1.0)  # all of them are cut
        assert await asyncio.to_thread(control.ask, tmp_path, {"ask": "status"})
        for connection in idle:
            connection.close()


async def test_peer_that_hangs_is_told_from_one_that_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "ANSWER_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(tmp_path / control.SOCKET))
        hung.listen()
        with pytest.raises(NotRunning, match=r"does not answer within 0.2 s"):
            control.ask(tmp_path, {"ask": "status"})


# -- the installed command -----------------------------------------------------------------------------------


@pytest.fixture
def people(tmp_path: Path) -> Iterator[Crew]:
    with crew(tmp_path) as started:
        yield started


def seen_at(page: str) -> list[str]:
    """Peers whose part in rounds the page there shows, with how they stand."""
    state = json.loads(get(f"{page}api/v1/state")[1] or "{}")
    peers = state.get("peers", {}).values()
    return [each["id"] for each in peers if each["answered"] and each["samples"] and each["speed"]]


def told(process: Process, code: int = 0) -> str:
    """What a command printed that ended with this code."""
    assert process.end() == code, process
    return str(process)


def test_volunteer_pauses_resumes_and_finishes_while_others_train_on(people: Crew, tmp_path: Path) -> None:
    bootstrap, invite = people.bootstrap(run_file(tmp_path, "asked", 1_000_000, batch=64))
    anna, bert = (
        people.join(invite, name, checkpoint_every_steps=0, page=name == "anna") for name in ("anna", "bert")
    )
    folder = str(tmp_path / "anna")

    def ask(verb: str, *words: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(
            told(people.start(verb, "--data-dir", folder, *words, "--json")).splitlines()[0]
        )
        return answer

    for peer in (anna, bert):
        until(lambda peer=peer: peer.said("from 2 peers"), lambda peer=peer: f"a round: {peer}")
    status = ask("status")
    assert (status["run_id"], status["state"], status["aside"]) == ("asked", status["state"], False)
    assert status["step"] > 0
    until(lambda: len(ask("status")["carriers"]) == 1, "a known way to the other peer")
    elsewhere = people.start("status")  # for whoever has other data
    opened: dict[str, Any] = json.loads(bootstrap.output.read_text().splitlines()[0])
    for page in (status["page"], opened["page"]):
        until(lambda page=page: len(seen_at(page)) == 2, lambda page=page: f"both at {page}: {seen_at(page)}")
        assert get(f"{page}healthz") == (200, "ok\n")
        assert get(f"{page}readyz")[0] == 200
        assert get(page, Host="evil.example")[0] == 403
        mine = get(f"{page}peers/{status['peer']}/metrics")
        assert "p2ptrain_global_step " in mine[1], mine
    assert "p2ptrain_global_step " in get(f"{status['page']}metrics")[1]
    assert "p2ptrain_swarm_global_step " in get(f"{opened['page']}metrics")[1]
    again = people.join(invite, "anna")

    assert ask("pause", "--for", "1h")["state"] == "paused"
    until(lambda: ask("status")["aside"], "its standing aside")
    stood = ask("status")["step"]
    until(lambda: bert.journal(tmp_path / "bert").count("round_committed") > stood + 20, str(bert))
    assert ask("status")["step"] == stood
    assert "resumes in" in told(people.start("status", "--data-dir", folder))
    assert ask("resume")["pauses"] == []
    until(lambda: ask("status")["step"] > stood, "its next step")

    assert "another peer runs with the data folder" in told(again, 8)  # while this one does
    assert ask("finish")["state"] == "leaving"
    assert anna.end() == 0, anna
    assert anna.result()["samples"] > 0
    people.start("leave", "--data-dir", str(tmp_path / "bert"))
    assert bert.end() == 0, bert
    assert "no peer runs" in told(elsewhere, 9)
    story = told(people.start("logs", "--data-dir", folder, "-n", "1000"))
    for words in ("paused, for 1 h 0 min: you asked", "training again, after", "leaving (p2ptrain finish)"):
        assert words in story
    assert not (tmp_path / "anna" / control.SOCKET).exists()
    assert os.listdir(tmp_path / "anna" / "checkpoints")
