"""A checkpoint becomes a model elsewhere: with equal logits where the Hugging Face libraries load it, and
with a card that says where it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from p2ptrain.config import BytesTask, CausalLmTask, PeerConfig, RunConfig, Schedule, load_run
from p2ptrain.errors import StorageError
from p2ptrain.replica.checkpoint import save
from p2ptrain.replica.replica import Replica
from p2ptrain.tasks import build_task
from peers.cli import app
from peers.exporting import export
from tests.unit.hub_models import save_model, save_tokenizer
from tests.unit.replicas import next_entry

QUICK = Schedule(warmup_steps=1)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("model"))
    return save_tokenizer(folder, ["a text about texts", "and words about words"])


def checkpoint(folder: Path, run: RunConfig, peer: PeerConfig) -> Replica:
    """Of a state after one step; the replica is as what is in it."""
    replica = Replica(build_task(run, peer).build_model(run.seed), run, "0" * 64)
    replica.apply(next_entry(replica))
    save(folder, replica.snapshot(), run, {"heldout": {"loss": 5.25}}, keep=1, lineages=b"")
    return replica


@pytest.mark.parametrize("new", [True, False], ids=["new model", "their model"])
def test_exported_language_model_has_equal_logits_where_the_libraries_load_it(
    new: bool, theirs: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sizes = CausalLmTask(layers=1, width=32, heads=2, context=24)
    task = sizes if new else CausalLmTask(model="theirs", tokenizer="model", context=24)
    run, peer = RunConfig(task=task, schedule=QUICK), PeerConfig(model=str(theirs))
    replica = checkpoint(tmp_path / "checkpoints", run, peer)
    assert export(tmp_path / "checkpoints", tmp_path / "out", peer) == sorted(
        ["README.md", "config.json", "generation_config.json", "model.safetensors", "run.toml",
         "tokenizer.json", "tokenizer_config.json"]
    )  # fmt: skip

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "words – about\n tëxts"
    ours = build_task(run, peer).tokenizer  # type: ignore[attr-defined]
    assert tokenizer.encode(text) == ours.encode(text)
    assert tokenizer.decode(ours.encode(text)) == text
    tokens = torch.tensor([ours.encode(text)])
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, replica.model(input_ids=tokens).logits)


def test_model_card_says_where_the_model_comes_from(tmp_path: Path) -> None:
    run = RunConfig(run_id="poems", task=BytesTask(layers=1, width=32, heads=2), schedule=QUICK)
    replica = checkpoint(tmp_path / "checkpoints", run, PeerConfig())
    names = export(tmp_path / "checkpoints", tmp_path / "out", PeerConfig())
    assert names == ["README.md", "config.json", "model.safetensors", "run.toml"]
    assert load_run(tmp_path / "out" / "run.toml") == run
    assert json.loads((tmp_path / "out" / "config.json").read_text())["task"]["width"] == 32

    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "p2ptrain"\n')
    assert replica.last is not None
    for fact in (
        "# poems",
        replica.position.lineage,
        f"{replica.position.weight:,}",
        replica.compute_state_digest(),
        f"| parameters | {replica.numel:,} |",
        "| held-out loss, when last measured | 5.25 |",
        *(f"{samples:,} |" for samples in replica.last.samples),
        *(f"`{peer}`" for peer in replica.last.roster),
    ):
        assert fact in card


def test_folder_that_holds_something_is_not_written_over(tmp_path: Path) -> None:
    run = RunConfig(task=BytesTask(layers=1, width=32, heads=2), schedule=QUICK)
    checkpoint(tmp_path / "checkpoints", run, PeerConfig())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(StorageError, match="is there already, and not empty; name a new folder"):
        export(tmp_path / "checkpoints", tmp_path / "out", PeerConfig())
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    (tmp_path / "out" / "mine").unlink()
    assert export(tmp_path / "checkpoints", tmp_path / "out", PeerConfig())
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_eval_measures_what_training_measured(tmp_path: Path) -> None:
    run = RunConfig(task=BytesTask(layers=1, width=32, heads=2, corpus="mine"), schedule=QUICK)
    (tmp_path / "text").write_text("a text of my own. " * 2000)
    peer = PeerConfig(corpus=str(tmp_path / "text"))
    replica = checkpoint(tmp_path / "checkpoints", run, peer)
    words = ["eval", str(tmp_path / "checkpoints"), "--corpus", str(tmp_path / "text"), "--json"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    measured = json.loads(result.output.splitlines()[-1])
    assert measured["step"] == 1
    assert measured["figures"] == build_task(run, peer).evaluate(replica.model)
