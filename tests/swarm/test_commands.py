"""What users meet when something is wrong: one sentence, its exit code, and a swarm that goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from typing import Any

import psutil
import pytest

from p2ptrain.swarm.access import decode, encode
from p2ptrain.swarm.identity import load_or_create
from p2ptrain.telemetry.journal import read_journal
from tests.swarm.processes import Crew, Process, crew, run_file, until
from tests.unit import organizer
from tests.unit.external_tools import run_tool
from tests.unit.organizer import NOBODY

pytestmark = pytest.mark.swarm


@pytest.fixture
def people(tmp_path: Path) -> Iterator[Crew]:
    with crew(tmp_path) as started:
        yield started


def complaint(process: Process, code: int, *words: str, seconds: float = 30.0) -> None:
    """It ended with that exit code and one sentence that holds these words."""
    ended = process.end(seconds)
    errors = process.errors.read_text()
    assert ended == code, process
    assert "Traceback" not in errors, errors
    sentences = [line for line in errors.splitlines() if line.startswith("p2ptrain: ")]
    assert len(sentences) == 1, errors
    for word in words:
        assert word in sentences[0], sentences[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def invite_to(address: str) -> str:
    return encode(organizer.invite([address]))


def test_join_says_who_cannot_be_reached_when_the_bootstrap_is_not_there(people: Crew) -> None:
    address = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{NOBODY}"
    complaint(people.join(invite_to(address), "peer"), 4, address)


def test_join_gives_up_when_the_bootstrap_takes_connections_and_says_nothing(people: Crew) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{NOBODY}"
        complaint(people.join(invite_to(address), "peer"), 4, address, "firewall")


def test_doctor_names_a_closed_door_and_a_bootstrap_that_is_not_there(people: Crew, tmp_path: Path) -> None:
    _, invite = people.bootstrap(run_file(tmp_path, "healthy", 10))
    closed = tmp_path / "closed.toml"
    closed.write_text(f'announce = ["/ip4/127.0.0.1/tcp/{free_port()}"]\n')
    away = invite_to(f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{NOBODY}")
    examined = [
        people.start("doctor", *words, "--json") for words in ((invite, "--peer", str(closed)), (away,), ())
    ]
    assert [process.end(60) for process in examined] == [0, 4, 0]
    found = [
        {check["name"]: check["finding"] for check in process.result()["checks"]} for process in examined
    ]
    assert [each.get("reach") for each in found] == ["behind NAT", None, None]
    assert [each.get("run") for each in found] == ["ok", None, None]
    assert found[1]["swarm"] == "Unreachable"


def test_join_asks_for_a_new_invite_when_its_run_is_no_longer_the_bootstraps(
    people: Crew, tmp_path: Path
) -> None:
    _, link = people.bootstrap(run_file(tmp_path, "changed", 10), data_dir="bootstrap")
    key = load_or_create(tmp_path / "bootstrap" / "organizer.key")
    before = organizer.invite(decode(link).addresses, organizer=key, run_id="changed", run_digest="0" * 64)
    complaint(people.join(encode(before), "peer"), 4, "not 00000000", "ask the organizer for a new invite")


def test_ctrl_c_ends_a_join_at_once_while_its_task_is_built(
    people: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that builds cannot be stopped, and this one takes ten minutes."""
    begun = tmp_path / "begun"
    lines = ("import pathlib, time", "def make(*_, **__):", f"    pathlib.Path({str(begun)!r}).touch()")
    (tmp_path / "slowly.py").write_text("\n".join((*lines, "    time.sleep(600)", "")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    run = run_file(tmp_path, "slow", 10)
    head, _, rest = run.read_text().partition("[task]")
    schedule = rest.partition("[schedule]")[2]
    run.write_text(f'{head}[task]\nkind = "own"\nfactory = "slowly:make"\n[schedule]{schedule}')
    _, invite = people.bootstrap(run)
    peer = people.join(invite, "peer", allow_tasks=["slowly"])
    until(begun.exists, lambda: f"its task: {peer}")
    daemons = peer.daemons()
    assert daemons
    peer.interrupt()
    assert peer.end() == 0
    assert peer.result() == {"run_id": "slow", "stopped": "Ctrl-C"}
    assert "Traceback" not in peer.errors.read_text()
    until(lambda: not any(each.is_running() for each in daemons), "the end of its p2pd", 10)


@pytest.mark.parametrize("spoil", [lambda text: text[:-5], lambda _: "hello", lambda text: text.upper()])
def test_join_refuses_an_invite_when_it_is_damaged_or_foreign(people: Crew, spoil) -> None:  # type: ignore[no-untyped-def]
    invite = invite_to(f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}")
    complaint(people.join(spoil(invite), "peer"), 2, "invite")


def test_bootstrap_names_the_address_when_its_port_is_taken(people: Crew, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        listen = f"/ip4/127.0.0.1/tcp/{port}"
        run = str(run_file(tmp_path, "busy", 10))
        complaint(people.start("bootstrap", run, "--listen", listen), 8, str(port))


def test_unknown_key_is_refused_with_the_nearest_one(people: Crew, tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text("target_batchsize = 8\n")
    complaint(people.start("bootstrap", str(run)), 2, "target_batchsize", "target_batch_size")
    invite = invite_to(f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}")
    complaint(people.join(invite, "peer", microbatch_size=8), 2, "microbatch_size", "micro_batch_size")


@pytest.mark.long
def test_join_names_the_corpus_when_it_is_missing_or_too_small(people: Crew, tmp_path: Path) -> None:
    bootstrap, invite = people.bootstrap(run_file(tmp_path, "corpus", 10))
    (tmp_path / "tiny.txt").write_text("too little")
    (tmp_path / "nothing").mkdir()
    for corpus in ("tiny.txt", "nothing", "absent"):
        complaint(people.join(invite, f"peer-{corpus}", corpus=str(tmp_path / corpus)), 5, corpus)
    assert bootstrap.process.poll() is None


def test_join_names_the_field_when_the_swarm_trains_another_run(people: Crew, tmp_path: Path) -> None:
    _, invite = people.bootstrap(run_file(tmp_path, "mine", 10))
    other = tmp_path / "other.toml"
    other.write_text((tmp_path / "mine.toml").read_text() + "\n[optimizer]\nlr = 0.5\n")
    complaint(people.join(invite, "peer", "--run", str(other)), 3, "optimizer.lr", "0.5")


@pytest.mark.long
def test_join_names_the_field_when_others_train_another_run_of_that_name(
    people: Crew, tmp_path: Path
) -> None:
    _, invite = people.bootstrap(run_file(tmp_path, "mine", 100_000), data_dir="mine-bootstrap")
    first = people.join(invite, "first")
    until(lambda: "round_committed" in first.journal(tmp_path / "first"), lambda: f"a round: {first}")
    # Entered by the first peer, the organizer opens another run under the same name.
    (other := tmp_path / "other.toml").write_text(
        (tmp_path / "mine.toml").read_text() + "[optimizer]\nlr = 0.5\n"
    )
    (tmp_path / "again").mkdir()
    copyfile(tmp_path / "mine-bootstrap" / "organizer.key", tmp_path / "again" / "organizer.key")
    _, theirs = people.bootstrap(other, data_dir="again")
    entrances = (*decode(theirs).addresses[:1], *decode(invite).addresses[:1])
    mixed = encode(decode(theirs).model_copy(update={"addresses": entrances}))
    complaint(people.join(mixed, "second"), 3, "optimizer.lr", "0.5 here", "ask the organizer")
    assert first.process.poll() is None


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    assert mounted.returncode == 0, f"needs root, to make a small disk: {mounted.stderr}"
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.long
def test_join_names_the_folder_when_nothing_can_be_written_there(people: Crew, tmp_path: Path) -> None:
    invite = invite_to(f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}")
    with tmpfs(tmp_path / "full", "4k") as full:
        (full / "filler").write_bytes(b"x" * 4096)
        complaint(people.join(invite, "full"), 6, "full", "0 MB free", "make room")
        complaint(people.join(invite, "full", "--no-doctor"), 6, "full", "No space left", "free space")
        (full / "filler").unlink()
        complaint(people.join(invite, "full", "--no-doctor"), 4)  # no half-written key stands in the way
        subprocess.run(["mount", "-o", "remount,ro", str(full)], check=True)
        complaint(people.join(invite, "full/read-only"), 6, "read-only")


@pytest.mark.long
@pytest.mark.parametrize(("folder", "disk"), [("peer", "256k"), ("peer/checkpoints", "256k,ro")])
def test_training_goes_on_when_the_disk_is_too_small_for_checkpoints_or_read_only(
    people: Crew, tmp_path: Path, folder: str, disk: str
) -> None:
    _, invite = people.bootstrap(run_file(tmp_path, "small-disk", 12))
    with tmpfs(tmp_path / folder, disk):
        peer = people.join(invite, "peer", "--no-doctor", checkpoint_every_steps=4)
        assert peer.end(60) == 0, peer
        assert peer.result()["step"] == 12
        assert peer.result()["checkpoint"] is None
        assert "checkpoint not saved, training goes on" in peer.errors.read_text()


@pytest.mark.long
def test_damaged_checkpoint_is_named_when_resumed_from_or_verified(people: Crew, tmp_path: Path) -> None:
    _, invite = people.bootstrap(run_file(tmp_path, "damage", 6))
    peer = people.join(invite, "peer")
    assert peer.end(60) == 0, peer
    good = Path(peer.result()["checkpoint"])
    written = people.start("generate", str(good), "--prompt", "def ", "--length", "20")
    assert written.end() == 0
    assert written.output.read_text().startswith("def ")
    assert people.start("verify", str(good), str(good)).end() == 0
    state = good / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    for process in (
        people.start("verify", str(good), str(good)),
        people.start("generate", str(good), "--prompt", "def "),
        people.join(invite, "peer"),
    ):
        complaint(process, 7, "state.safetensors")


def metrics_port(peer: Process) -> int:
    found = until(
        lambda: re.search(r"metrics: http://127\.0\.0\.1:(\d+)", peer.errors.read_text()), lambda: str(peer)
    )
    return int(found[1])


def listening_port(peer: Process) -> int:
    daemon = until(peer.daemons, "its p2pd")[0]
    return next(c.laddr.port for c in daemon.net_connections("tcp") if c.status == psutil.CONN_LISTEN)


@pytest.mark.long
def test_swarm_loses_nothing_when_strangers_talk_garbage_and_pages_are_read(
    people: Crew, tmp_path: Path
) -> None:
    _, invite = people.bootstrap(run_file(tmp_path, "garbage", 120))
    peers = [people.join(invite, name, checkpoint_every_steps=0) for name in ("one", "two")]
    for peer in peers:
        until(lambda peer=peer: peer.said("averaged"), lambda peer=peer: f"a round: {peer}")
    for address in [listening_port(peer) for peer in peers]:
        with socket.create_connection(("127.0.0.1", address), timeout=5) as stranger:
            stranger.sendall(os.urandom(64 * 1024))
    page = f"http://127.0.0.1:{metrics_port(peers[0])}"
    for path in ("/livez", "/readyz"):
        with urllib.request.urlopen(page + path, timeout=5) as answer:
            assert answer.status == 200
    with urllib.request.urlopen(page + "/metrics", timeout=5) as answer:
        text = answer.read().decode()
    checked = run_tool("promtool", "check", "metrics", debian_package="prometheus", stdin=text)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "p2ptrain_global_step" in text
    for peer in peers:
        assert peer.end(90) == 0, peer
    one, two = (peer.result() for peer in peers)
    assert one["step"] == two["step"] == 120
    assert (one["lineage"], one["state_digest"]) == (two["lineage"], two["state_digest"])


def test_ctrl_c_once_leaves_cleanly_and_kill_leaves_no_daemon(people: Crew, tmp_path: Path) -> None:
    bootstrap, invite = people.bootstrap(run_file(tmp_path, "leaving", 100_000))
    polite, killed = (people.join(invite, name) for name in ("polite", "killed"))
    for peer in (polite, killed):
        until(lambda peer=peer: peer.said("averaged"), lambda peer=peer: f"a round: {peer}")
    daemons = [*polite.daemons(), *killed.daemons(), *bootstrap.daemons()]
    assert len(daemons) == 3
    os.kill(killed.process.pid, signal.SIGKILL)
    polite.interrupt()
    assert polite.end(10) == 0, polite
    assert polite.result()["checkpoint"] is not None
    bootstrap.interrupt()
    assert bootstrap.end(10) == 0, bootstrap
    assert decode(json.loads(bootstrap.output.read_text().splitlines()[-1])["invite"]).run_id == "leaving"
    until(lambda: not any(daemon.is_running() for daemon in daemons), "the end of every p2pd", 10)


# -- joining -------------------------------------------------------------------------------------------------


def downloadable(folder: Path, run_id: str) -> Path:
    """A run whose snapshot has a dozen pieces, and whose steps take a moment."""
    path = run_file(folder, run_id, 100_000, batch=64)
    path.write_text(path.read_text().replace("width = 32", "width = 128").replace("layers = 1", "layers = 2"))
    return path


def told(data_dir: Path, event: str) -> list[dict[str, Any]]:
    """The events of that name in a peer's journal."""
    return [line for line in read_journal(data_dir / "journal.jsonl") if line["event"] == event]


def rounds(data_dir: Path) -> int:
    """In how many that peer has taken part."""
    return len(told(data_dir, "round_committed"))


@pytest.mark.long
def test_newcomer_that_is_killed_in_mid_download_goes_on_with_it_from_all_peers(
    people: Crew, tmp_path: Path
) -> None:
    _, invite = people.bootstrap(downloadable(tmp_path, "download"))
    given = {"log_megabytes": 16, "donor_upload_mbit": 6, "checkpoint_every_steps": 0}  # ten entries
    donors = [people.join(invite, name, **given) for name in ("one", "two")]
    for donor, name in zip(donors, ("one", "two"), strict=True):
        until(lambda name=name: rounds(tmp_path / name) > 20, lambda donor=donor: f"rounds: {donor}")

    killed = people.join(invite, "late", **given)
    partial = tmp_path / "late" / "partial"
    until(lambda: len(list(partial.glob("*/*.piece"))) >= 5, lambda: f"pieces: {killed}")
    killed.kill()
    kept = len(list(partial.glob("*/*.piece")))
    back = people.join(invite, "late", **given)
    until(lambda: told(tmp_path / "late", "caught_up"), lambda: f"its arrival: {back}")
    until(lambda: rounds(tmp_path / "late"), lambda: f"a round: {back}")

    caught_up = told(tmp_path / "late", "caught_up")[0]
    assert (caught_up["how"], caught_up["donors"]) == ("snapshot", 2)
    assert not list(partial.iterdir())
    pages = [f"http://127.0.0.1:{metrics_port(donor)}/metrics" for donor in donors]
    donated = [figure(page, "p2ptrain_donated_bytes_total") for page in pages]
    assert min(donated) > 2 * 2**20
    assert figure(pages[0], 'p2ptrain_catch_up_parts{of="all"}') == 0
    assert caught_up["resumed_bytes"] >= kept * 2**20 * 0.9  # the last piece is shorter
    states = [
        {e["lineage"]: e["state_digest"] for e in told(tmp_path / name, "state_hashed")}
        for name in ("one", "late")
    ]
    common = states[0].keys() & states[1].keys()
    assert common
    assert all(states[0][lineage] == states[1][lineage] for lineage in common)


def figure(page: str, series: str) -> float:
    """The value of that series on a metrics page."""
    with urllib.request.urlopen(page, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{series} "))


@pytest.mark.long
def test_newcomer_joins_when_its_disk_is_too_small_for_the_download(people: Crew, tmp_path: Path) -> None:
    _, invite = people.bootstrap(downloadable(tmp_path, "no-room"))
    given = {"log_megabytes": 1, "checkpoint_every_steps": 0}
    donor = people.join(invite, "one", **given)
    until(lambda: rounds(tmp_path / "one") > 3, lambda: f"rounds: {donor}")
    with tmpfs(tmp_path / "late" / "partial", "2m"):
        late = people.join(invite, "late", **given)
        until(lambda: rounds(tmp_path / "late"), lambda: f"a round: {late}")
        assert told(tmp_path / "late", "caught_up")[0]["how"] == "snapshot"
        late.kill()


@pytest.mark.long
def test_join_names_the_field_when_its_checkpoint_is_of_another_run(people: Crew, tmp_path: Path) -> None:
    _, before = people.bootstrap(run_file(tmp_path, "same-name", 6))
    peer = people.join(before, "peer")
    assert peer.end(60) == 0, peer
    _, after = people.bootstrap(run_file(tmp_path, "same-name", 7))
    again = people.join(after, "peer")
    complaint(again, 3, "total_steps: 7 here, 6 there", "data_dir", str(tmp_path / "peer" / "checkpoints"))
