"""What people train of their own, through the installed commands from the first to the last: open, join, ask,
resume, measure, take elsewhere. For adapters of a model in a folder, for a task from a package, and for text
whose windows are leased."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from p2ptrain.config import load_peer
from p2ptrain.replica.checkpoint import latest, load, restore
from peers.models import blank
from peers.passes import Data, Passes
from tests.swarm import processes, test_commands
from tests.swarm.processes import RUN, Crew, Process, crew
from tests.swarm.test_commands import told
from tests.unit.hub_models import documents, save_json_lines, save_model, save_tokenizer

pytestmark = [pytest.mark.swarm, pytest.mark.long]

README = Path(__file__).parents[2] / "p2ptrain/tasks/README.md"
HALF, STEPS = 12, 24
"""At the first all peers leave; they come back for the rest."""


PATIENCE_SECONDS = 180.0
"""For what takes ten on a machine that has nothing else to do."""


@pytest.fixture
def people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with crew(tmp_path) as started:
        yield started


def write_run(path: Path, run_id: str, task: str, before: str = "") -> Path:
    """The small run of these tests with another task, of steps by two peers; `before` goes in front of all
    tables."""
    head, _, rest = RUN.format(run_id=run_id, steps=100_000, batch=8).partition("[task]")
    path.write_text(
        f"{head}min_peers = 2\n{before}\n[task]\n{task}\n[schedule]{rest.partition('[schedule]')[2]}"
    )
    return path


def write_peer(path: Path, **settings: Any) -> str:
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    return str(path)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> None:
    """The package `toys` of the tasks' README, with `more` at its end, for all commands from now on."""
    (folder / "packages").mkdir()
    source = next(iter(re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)))
    (folder / "packages" / "toys.py").write_text(source + more)
    paths = (str(folder / "packages"), *filter(None, [os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def until(holds: Callable[[], Any], what: Callable[[], str]) -> None:
    processes.until(holds, what, PATIENCE_SECONDS)


def complaint(process: Process, code: int, *words: str) -> None:
    test_commands.complaint(process, code, *words, seconds=PATIENCE_SECONDS)


def succeed(process: Process) -> Process:
    assert process.end(PATIENCE_SECONDS) == 0, process
    return process


def train(people: Crew, invite: str, until_step: int, **settings: Any) -> list[dict[str, Any]]:
    """Two peers as far as that step; what they print at the end."""
    words = ("--until-step", str(until_step))
    peers = [people.join(invite, name, *words, **settings) for name in ("one", "two")]
    results = [succeed(peer).result() for peer in peers]
    assert {(each["step"], each["state_digest"]) for each in results} == {
        (until_step, results[0]["state_digest"])
    }
    return results


def check_goes_on(people: Crew, **peers: Process) -> None:
    """Each of them is in another round, and says so when it is asked."""
    for name, peer in peers.items():
        folder = people.folder / name
        before = len(told(folder, "round_committed"))
        until(
            lambda folder=folder, before=before: len(told(folder, "round_committed")) > before,
            lambda peer=peer: str(peer),
        )
        status = succeed(people.start("status", "--data-dir", str(folder), "--json")).result()
        assert (status["step"] > before, status["roster"]) == (True, len(peers))


def finish(people: Crew, invite: str, own: str, **settings: Any) -> tuple[Path, Path, dict[str, Process]]:
    """Both halves of the run, and all that is done with a checkpoint; that one, the exported folder, and the
    peers, which go on."""
    before = train(people, invite, HALF, **settings)
    after = train(people, invite, STEPS, **settings)
    newest = Path(after[0]["checkpoint"])
    # Peers that go on put newer ones in its place.
    checkpoint = Path(shutil.copytree(newest, people.folder / "kept" / newest.name))
    assert before[0]["lineage"] != after[0]["lineage"]
    for name in ("one", "two"):
        assert [each["step"] for each in told(people.folder / name, "round_committed")] == list(range(STEPS))
    measured = succeed(people.start("eval", str(checkpoint), "--peer", own, "--json")).result()
    assert measured["step"] == STEPS
    assert measured["figures"]["loss"] > 0
    written = people.start("generate", str(checkpoint), "--prompt", "word", "--length", "8", "--peer", own)
    assert succeed(written).output.read_text().strip()
    out = people.folder / "out"
    succeed(people.start("export", str(checkpoint), "--to", str(out), "--peer", own))
    card = (out / "README.md").read_text()
    assert after[0]["lineage"] in card
    assert all(each["peer"] in card for each in after)
    peers = {name: people.join(invite, name, **settings) for name in ("one", "two")}
    for name, peer in peers.items():
        until(
            lambda name=name: told(people.folder / name, "round_committed")[STEPS:],
            lambda peer=peer: str(peer),
        )
    check_goes_on(people, **peers)
    verified = people.start("verify", str(checkpoint), invite, "--peer", own, "--json")
    assert succeed(verified).result()["verdict"] == "contained"
    return checkpoint, out, peers


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")  # GPT-2's weights are stored transposed
def test_adapters_of_a_model_in_a_folder_go_all_the_way_to_peft(people: Crew, tmp_path: Path) -> None:
    base = save_tokenizer(save_model(tmp_path / "base"), documents(9, 20))
    other = save_tokenizer(save_model(tmp_path / "other", seed=1), documents(9, 20))
    rows = save_json_lines(tmp_path / "rows.jsonl")
    run = write_run(
        tmp_path / "run.toml",
        "adapters",
        'kind = "causal_lm"\nmodel = "theirs"\ntokenizer = "model"\ndataset = "rows"\ncontext = 24\n',
        'payload = "lora"\n',
    )
    _, invite = people.bootstrap(run)
    settings = {"corpus": str(rows), "model": str(base)}
    own = write_peer(tmp_path / "own.toml", **settings)

    demanded = people.join(invite, "unasked", corpus=str(rows))
    complaint(demanded, 2, 'wants the model "theirs"', "set model in the peer file")
    checkpoint, out, peers = finish(people, invite, own, **settings)
    loaded = load(checkpoint)  # before others take its place
    assert {each.name for each in out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "p2ptrain.json", "run.toml"
    }  # fmt: skip
    assert (out / "adapter_model.safetensors").stat().st_size < (
        base / "model.safetensors"
    ).stat().st_size / 2
    wrong = write_peer(tmp_path / "wrong.toml", corpus=str(rows), model=str(other))
    complaint(people.start("eval", str(checkpoint), "--peer", wrong), 3, "adapters for a model of digest")

    stranger = people.join(invite, "stranger", corpus=str(rows), model=str(other))
    complaint(stranger, 3, "the model that the adapters are for", "take the same weights")
    check_goes_on(people, **peers)

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, replica = blank(loaded, load_peer(own))
    assert replica.base_digest in (out / "README.md").read_text()
    restore(replica, loaded)
    plain = AutoModelForCausalLM.from_pretrained(base)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        untrained = plain(input_ids=tokens).logits
        theirs = PeftModel.from_pretrained(plain, out).eval()(input_ids=tokens).logits
        ours = replica.model(input_ids=tokens).logits
    assert torch.allclose(theirs, ours, atol=1e-6)
    assert not torch.allclose(theirs, untrained, atol=1e-6)


def test_task_of_a_package_is_trained_where_it_is_allowed_and_nowhere_else(
    people: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    run = write_run(
        tmp_path / "run.toml", "toys", 'kind = "own"\nfactory = "toys:make"\nsettings = { radius = 0.6 }\n'
    )
    _, invite = people.bootstrap(run)
    own = write_peer(tmp_path / "own.toml", allow_tasks=["toys"])
    complaint(people.join(invite, "careful"), 2, "package 'toys'", 'set allow_tasks = ["toys"]')
    checkpoint, out, peers = finish(people, invite, own, allow_tasks=["toys"])
    for peer in peers.values():
        peer.kill()
    assert {each.name for each in out.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "run.toml",
    }
    for words in (("eval", str(checkpoint)), ("export", str(checkpoint), "--to", str(tmp_path / "no"))):
        complaint(people.start(*words), 2, 'set allow_tasks = ["toys"]')

    rates = ("--uplink", "20Mbit", "--json")
    planned = succeed(people.start("plan", str(run), "--peer", own, *rates)).result()
    assert planned["parameters"] == 65
    complaint(people.start("plan", str(run), *rates), 2, 'set allow_tasks = ["toys"]')
    shown = people.start("demo", "--run", str(run), "--peer", own, "--seconds", "20", "--json")
    receipt = succeed(shown).result()
    assert (receipt["problem"], receipt["kills"]) == ("", 1)
    assert receipt["sample"].endswith(("inside", "outside"))
    refused = people.start("demo", "--run", str(run), "--seconds", "20")
    complaint(refused, 2, "peer-", 'set allow_tasks = ["toys"]')
    words = ("--seconds", "10", "--faults", "kill", "--rate", "12/min", "--peers", "2", "--json")
    stormed = succeed(people.start("chaos", str(run), "--peer", own, *words)).result()
    assert (stormed["problem"], stormed["digests_equal"]) == ("", True)


def test_leased_windows_of_a_text_go_on_at_the_exact_position_when_all_have_left_or_are_killed(
    people: Crew, tmp_path: Path
) -> None:
    rows = save_json_lines(tmp_path / "rows.jsonl")
    sizes = 'kind = "causal_lm"\nlayers = 1\nwidth = 32\nheads = 2\ncontext = 24\n'
    task = f'{sizes}dataset = "rows"\nexact = true\n'
    run = write_run(tmp_path / "run.toml", "leases", task, 'data = "leased"\n')
    _, invite = people.bootstrap(run)
    settings = {"corpus": str(rows), "checkpoint_every_steps": 5}
    own = write_peer(tmp_path / "own.toml", **settings)
    *_, peers = finish(people, invite, own, **settings)
    for peer in peers.values():
        peer.kill()
    newest = latest(tmp_path / "one" / "checkpoints")
    assert newest is not None
    kept = load(newest).snapshot.position.lineage
    back = [people.join(invite, name, **settings) for name in ("one", "two")]
    until(lambda: len(told(tmp_path / "one", "joined")) == 4, lambda: str(back[0]))
    lived = len(told(tmp_path / "one", "round_committed"))
    until(lambda: told(tmp_path / "one", "round_committed")[lived + 20 :], lambda: str(back[0]))
    for peer in back:
        peer.kill()

    # By another account than the protocol's: from the ranges that the journals say each round took.
    passes, rounds = Passes(), dict[str, dict[str, Any]]()
    for name in ("one", "two"):
        for each in told(tmp_path / name, "round_committed"):
            rounds[each["lineage"]] = each
            passes.observe(each)
    last = told(tmp_path / "one", "round_committed")[-1]
    data = passes.account({last["lineage"]})
    assert data == Data(last["unique"], repeated=0, lost=0, returned=last["returned"])
    chain, at = [], last["lineage"]
    while at in rounds:
        chain.append(rounds[at])
        at = rounds[at]["parent"]
    assert [each["step"] for each in chain] == list(range(len(chain)))[::-1]
    assert kept in {each["lineage"] for each in chain}
    assert sum(each["samples"] for each in chain) == data.unique


# -- what is wrong with one peer ends that peer in a sentence, or not even that; the others go on -----------


def test_peer_whose_model_tokenizer_or_data_will_not_do_is_told_what_to_do(
    people: Crew, tmp_path: Path
) -> None:
    texts = documents(9, 20)
    base = save_tokenizer(save_model(tmp_path / "base"), texts)
    strange = save_tokenizer(save_model(tmp_path / "strange"), texts[:1])
    large = save_tokenizer(save_model(tmp_path / "large"), texts, size=600)
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    save_tokenizer(tmp_path / "t5", texts)
    rows = save_json_lines(tmp_path / "rows.jsonl")
    (tmp_path / "bodies.jsonl").write_text(rows.read_text().replace('"text"', '"body"'))
    task = 'kind = "causal_lm"\nmodel = "theirs"\ntokenizer = "theirs"\ndataset = "rows"\ncontext = 24\n'
    _, invite = people.bootstrap(write_run(tmp_path / "run.toml", "choosy", task))
    good = {"corpus": str(rows), "model": str(base), "tokenizer": str(base)}
    peers = [people.join(invite, name, **good) for name in ("one", "two")]
    until(lambda: told(tmp_path / "one", "round_committed"), lambda: str(peers[0]))
    wrong = {
        "model": ({"model": str(tmp_path / "t5")}, 2, "has no loss for the next token", "choose a causal"),
        "tokenizer": ({"tokenizer": str(strange)}, 3, "wants the same on every peer", "the same files"),
        "large": ({"tokenizer": str(large)}, 2, "tokens, but the model theirs", "set task.tokenizer"),
        "column": ({"corpus": str(tmp_path / "bodies.jsonl")}, 5, "has no column 'text'", "set task.column"),
    }
    for name, (settings, code, *words) in wrong.items():
        complaint(people.join(invite, name, **good | settings), code, *words)
    check_goes_on(people, one=peers[0], two=peers[1])


POISONED = '''

def make_some(settings, *, seed, corpus):
    """Whoever names a corpus gets what its name says."""
    return {"": Circle, "/nan": Poisoned, "/narrow": Narrow}[corpus](settings.get("radius", 0.7), seed)


class Poisoned(Circle):
    def loss_sum(self, model, batch):
        return super().loss_sum(model, batch) * float("nan")


class Narrow(Circle):
    passes = 0

    def loss_sum(self, model, batch):
        self.passes += 1
        if self.passes > 40 and len(batch[0]) > 1:  # not while sizes are tried
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().loss_sum(model, batch)
'''


def test_swarm_goes_on_when_a_batch_holds_nan_or_the_memory_no_longer_suffices(
    people: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, POISONED)
    run = write_run(tmp_path / "run.toml", "toys", 'kind = "own"\nfactory = "toys:make_some"\n')
    _, invite = people.bootstrap(run)
    allowed = {"allow_tasks": ["toys"]}
    one, narrow = (
        people.join(invite, name, **allowed | each)
        for name, each in (("one", {}), ("narrow", {"corpus": "/narrow", "micro_batch_size": 4}))
    )
    until(lambda: told(tmp_path / "narrow", "micro_batch_shrunk"), lambda: str(narrow))
    poisoned = people.join(invite, "poisoned", **allowed, corpus="/nan")
    complaint(poisoned, 10, "20 micro-batches in a row were not finite", "look for numbers")
    check_goes_on(people, one=one, narrow=narrow)
    assert told(tmp_path / "narrow", "round_committed")[-1]["loss"] is not None
