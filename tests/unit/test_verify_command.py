"""`p2ptrain verify` and `p2ptrain generate`: checkpoints, live peers, and what is refused in one sentence."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from organizer import invite
from replicas import next_entry, small_replica, small_run

from p2ptrain.config import BytesTask, RunConfig, canonical_json, fingerprint
from p2ptrain.errors import CheckpointError, ConfigError, IncompatibleRun, InviteError, Refused
from p2ptrain.records import Averaged, Chunk, GetEntry, GetManifest, Message, PeerId, Reply, Request
from p2ptrain.replica.checkpoint import MANIFEST, STATE, save
from p2ptrain.replica.donor import Donor
from p2ptrain.replica.flat import parameter_table
from p2ptrain.replica.log import EntryLog
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.snapshot import Snapshot
from p2ptrain.swarm import clock
from p2ptrain.swarm.memory import MemoryHub
from p2ptrain.swarm.port import Buffer
from p2ptrain.tasks.bytes import BytesTask as Task
from peers import cli, models
from peers.models import Verdict

DONOR = PeerId("donor")


def saved(folder: Path, replica: Replica) -> Path:
    return save(folder, replica.snapshot(), replica.run, {}, keep=3, lineages=b"")


def advanced(replica: Replica, steps: int, seed: int = 0) -> Replica:
    for _ in range(steps):
        replica.apply(next_entry(replica, seed))
    return replica


def command(*arguments: str) -> int:
    """Exit status of the command with these arguments, run in this process."""
    before, sys.argv = sys.argv, ["p2ptrain", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


# -- two checkpoints -----------------------------------------------------------------------------------------


def test_verify_says_equal_when_two_peers_saved_the_same_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        saved(tmp_path / name / "checkpoints", advanced(small_replica(), 2))
    assert command("verify", str(tmp_path / "a"), str(tmp_path / "b"), "--json") == 0
    told, last = capsys.readouterr().out.splitlines()
    assert told.startswith("equal: both are at step 2 of lineage ")
    verdict = json.loads(last)
    assert verdict["verdict"] == "equal"
    assert verdict["first"] == verdict["second"]
    assert verdict["first"]["step"] == 2


def test_verify_names_the_first_difference_when_one_value_was_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replica = small_replica()
    a = saved(tmp_path / "a", replica)
    with torch.no_grad():
        replica.parameters[5] += 1
    replica.state_digest = None
    b = saved(tmp_path / "b", replica)
    assert command("verify", str(a), str(b)) == 1
    assert "they first differ in model.0.weight[5]: " in capsys.readouterr().out


def test_verify_names_the_step_when_one_is_ahead(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", small_replica()), saved(tmp_path / "b", advanced(small_replica(), 1))
    verdict = models.verify(a, b)
    assert verdict.verdict == "different"
    assert verdict.explanation == "they first differ in step: 0 in the first, 1 in the second"


def test_verify_names_the_run_when_the_runs_differ(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", small_replica())
    b = saved(tmp_path / "b", advanced(small_replica(small_run(seed=7)), 1))
    explanation = models.verify(a, b).explanation
    assert explanation == "they are of different runs (seed: 0 here, 7 there)"


def test_verify_ends_in_a_sentence_when_a_checkpoint_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = saved(tmp_path / "a", small_replica()), saved(tmp_path / "b", small_replica())
    state = bytearray((b / STATE).read_bytes())
    state[-1] ^= 1
    (b / STATE).write_bytes(state)
    assert command("verify", str(a), str(b)) == CheckpointError.exit_code
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"p2ptrain: {b / STATE} is not part of a whole checkpoint: ")


def test_verify_says_what_to_name_when_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no whole checkpoint at .*; name a folder such as"):
        models.verify(tmp_path, tmp_path)


def test_verify_takes_the_newest_when_given_a_folder_of_several(tmp_path: Path) -> None:
    for steps in (1, 2):
        saved(tmp_path / "checkpoints", advanced(small_replica(), steps))
    assert models.found(tmp_path) == tmp_path / "checkpoints" / "step-00000002"
    assert models.found(tmp_path / "checkpoints" / "step-00000001").name == "step-00000001"


# -- a checkpoint and a live peer ----------------------------------------------------------------------------


class LivePeer:
    """A replica with its log, which answers as a training peer does."""

    def __init__(self, log_bytes: int = 2**20) -> None:
        self.replica = small_replica()
        self.log = EntryLog(log_bytes, self.replica.position)
        self.asked: list[Request] = []

        async def compute(function: Callable[..., Any], *arguments: Any) -> Any:
            return function(*arguments)

        self._donor = Donor(canonical_json(self.replica.run), self.replica, self.log, compute, compute)

    def step(self, steps: int = 1, seed: int = 0) -> LivePeer:
        for _ in range(steps):
            entry = next_entry(self.replica, seed)
            self.replica.apply(entry)
            self.log.append(entry)
        return self

    def on_message(self, sender: PeerId, message: Message) -> None:
        """Takes part in no round here."""

    async def on_chunk(self, sender: PeerId, header: Chunk | Averaged, payload: Buffer) -> None:
        """Takes part in no round here."""

    def place(self, sender: PeerId, header: Chunk | Averaged, size: int) -> memoryview | None:
        return None

    def on_link(self, peer: PeerId, up: bool) -> None:
        """Peers come and go."""

    async def on_request(self, sender: PeerId, request: Request) -> tuple[Reply, Buffer]:
        self.asked.append(request)
        return await self._donor.answer(sender, request)


def compared(ours: Snapshot, live: LivePeer) -> Verdict:
    """What comparing with the live peer over a network gives."""

    async def story() -> Verdict:
        hub = MemoryHub(seed=0)
        async with hub.swarm(DONOR) as donor, hub.swarm("guest") as guest:
            donor.serve(live)
            return await models.against(guest, DONOR, ours)

    return clock.run(story())


def test_live_peer_is_equal_when_it_stands_where_the_checkpoint_does() -> None:
    assert compared(small_replica().snapshot(), LivePeer()).verdict == "equal"
    assert compared(advanced(small_replica(), 3).snapshot(), LivePeer().step(3)).verdict == "equal"


@pytest.mark.parametrize("ours", [0, 1, 4])
def test_checkpoint_is_contained_when_the_live_peer_went_on_from_it(ours: int) -> None:
    verdict = compared(advanced(small_replica(), ours).snapshot(), LivePeer().step(5))
    assert verdict.verdict == "contained"
    assert (verdict.first.step, verdict.second.step) == (ours, 5)


def test_checkpoint_is_contained_when_the_live_peers_log_begins_at_it() -> None:
    live = LivePeer().step(3)
    live.log.restart(live.replica.position)
    live.step(2)
    assert compared(advanced(small_replica(), 3).snapshot(), live).verdict == "contained"


@pytest.mark.parametrize("ours", [1, 3, 5])
def test_live_peer_is_different_when_its_log_went_another_way(ours: int) -> None:
    verdict = compared(advanced(small_replica(), ours, seed=1).snapshot(), LivePeer().step(5))
    assert verdict.verdict == "different"


def test_live_peer_is_different_when_its_state_is_but_its_lineage_is_not() -> None:
    live = LivePeer().step(2)
    live.replica.parameters[7] += 1
    live.replica.state_digest = None
    verdict = compared(advanced(small_replica(), 2).snapshot(), live)
    assert verdict.verdict == "different"
    assert verdict.explanation.startswith("…donor has another state at step 2 of lineage ")


def test_live_peer_cannot_tell_when_it_is_behind_or_its_log_is_too_short() -> None:
    with pytest.raises(Refused, match=r"cannot tell about step 4: .* its snapshot is of step 2 "):
        compared(advanced(small_replica(), 4).snapshot(), LivePeer().step(2))
    with pytest.raises(Refused, match="cannot tell about step 1: "):
        compared(advanced(small_replica(), 1).snapshot(), LivePeer(log_bytes=1).step(5))


def test_no_tensors_are_fetched_when_a_live_peer_is_compared() -> None:
    live, ours = LivePeer().step(5), advanced(small_replica(), 2).snapshot()
    compared(ours, live)
    assert live.asked == [GetManifest(weight=ours.position.weight), GetEntry(step=1, with_payload=False)]


def test_verify_refuses_when_the_invite_is_of_another_run(tmp_path: Path) -> None:
    a = saved(tmp_path, small_replica())
    address = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDRAuVxfdkKXnhTaLaf9Eh8fxMMPwoD9GrebiGxDbfMqg"
    other = invite([address], small_run(seed=9), run_id="other")
    with pytest.raises(IncompatibleRun, match="but the invite leads to other with digest"):
        asyncio.run(models.verify_live(a, other, ""))


def test_verify_refuses_when_what_follows_the_invite_is_no_peer_id(tmp_path: Path) -> None:
    a = saved(tmp_path, small_replica())
    address = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDRAuVxfdkKXnhTaLaf9Eh8fxMMPwoD9GrebiGxDbfMqg"
    same = invite([address], small_run())
    with pytest.raises(ConfigError, match=r"after INVITE# goes a peer id, such as .*, not 'xyz'"):
        asyncio.run(models.verify_live(a, same, "xyz"))


def test_verify_refuses_when_the_invite_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = saved(tmp_path, small_replica())
    assert command("verify", str(a), "p2ptrain:AAAA#12D3") == InviteError.exit_code
    assert "this invite is damaged" in capsys.readouterr().err


# -- generate ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that has learned nothing, on a text that is not on this machine."""
    run = RunConfig(task=BytesTask(layers=1, width=16, heads=2, context=16, corpus="diary"))
    model = Task(run.task, run.seed, "stdlib").build_model(run.seed)
    replica = Replica(model, run, fingerprint(run, parameter_table(model)))
    return saved(tmp_path_factory.mktemp("peer") / "checkpoints", replica)


def test_generate_writes_the_same_text_when_asked_twice(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = models.generate(checkpoint, "def ", 40, 0.7, seed=3)
    assert text.startswith("def ")
    assert text == models.generate(checkpoint.parent, "def ", 40, 0.7, seed=3)
    assert text != models.generate(checkpoint, "def ", 40, 0.7, seed=4)
    options = ("--prompt", "def ", "--length", "40", "--seed", "3", "--json")
    assert command("generate", str(checkpoint.parents[1]), *options) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["text"] == text


def test_generate_ends_in_a_sentence_when_the_checkpoint_is_damaged(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / checkpoint.name
    damaged.mkdir()
    for file in checkpoint.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / MANIFEST).write_text("{}")
    assert command("generate", str(damaged), "--prompt", "x") == CheckpointError.exit_code
    assert capsys.readouterr().err.startswith(f"p2ptrain: {damaged / MANIFEST} is not part of ")
