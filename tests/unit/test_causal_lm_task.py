"""Language models: what they are built from, what their loss is, and what is said of what will not do."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from p2ptrain.config import CausalLmTask as Settings
from p2ptrain.config import PeerConfig, RunConfig
from p2ptrain.errors import ConfigError
from p2ptrain.replica.replica import Replica
from p2ptrain.tasks import build_task
from p2ptrain.tasks.causal_lm import CausalLmTask
from p2ptrain.tasks.tokens import ByteTokenizer, FolderTokenizer
from tests.unit.hub_models import into_cache, save_model, save_tokenizer

TINY = Settings(layers=1, width=32, heads=2, context=24)


@pytest.fixture(scope="module")
def tiny() -> CausalLmTask:
    return CausalLmTask(TINY, 7, PeerConfig())


@pytest.fixture(scope="module")
def model(tiny: CausalLmTask) -> torch.nn.Module:
    return tiny.build_model(7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model with its own tokenizer."""
    folder = save_model(tmp_path_factory.mktemp("model"))
    return save_tokenizer(folder, ["a text about texts", "and words about words"])


# -- a new model ---------------------------------------------------------------------------------------------


def test_new_model_can_be_trained_and_knows_nothing(tiny: CausalLmTask, model: torch.nn.Module) -> None:
    replica = Replica(model, RunConfig(task=TINY), "")
    assert replica.numel == 320 * 32 + 4 * 32 * 32 + 3 * 32 * 128 + 3 * 32
    assert tiny.evaluate(model)["loss"] == pytest.approx(math.log(320), abs=0.4)


def test_model_is_the_same_when_its_seed_is(tiny: CausalLmTask, model: torch.nn.Module) -> None:
    before = torch.random.get_rng_state()
    again, other = (tiny.build_model(seed).state_dict() for seed in (7, 8))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert not torch.equal(again["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_loss_sum_is_the_entropy_of_all_tokens_but_the_first(
    tiny: CausalLmTask, model: torch.nn.Module
) -> None:
    batch = tiny.batch(3, "alice", 0, 3)
    with torch.no_grad():
        parts = [
            F.cross_entropy(model(input_ids=each[None, :-1]).logits[0], each[1:]).item() for each in batch
        ]
        assert tiny.loss_sum(model, batch).item() == pytest.approx(sum(parts), rel=1e-5)


def test_bits_per_byte_are_those_of_the_loss_when_tokens_are_bytes(
    tiny: CausalLmTask, model: torch.nn.Module
) -> None:
    figures = tiny.evaluate(model)
    assert figures["bits_per_byte"] == pytest.approx(figures["loss"] / math.log(2), rel=0.02)


def test_samples_have_numbers_and_lie_side_by_side(tiny: CausalLmTask) -> None:
    assert tiny.size > 100_000
    first, second = tiny.samples([0, 1])
    assert first.shape == (25,)
    assert first[-1] == second[0]


def test_preview_goes_on_from_the_prompt_the_same_way_each_time(
    tiny: CausalLmTask, model: torch.nn.Module
) -> None:
    def written(seed: int, temperature: float) -> str:
        return tiny.preview(model, "def ", 12, torch.Generator().manual_seed(seed), temperature)

    before = torch.random.get_rng_state()
    assert written(0, 1.0).startswith("def ")
    assert written(0, 1.0) == written(0, 1.0) != written(1, 1.0)
    assert written(0, 0.0) == written(1, 0.0)
    assert torch.equal(torch.random.get_rng_state(), before)


# -- a model from a folder or the hub ------------------------------------------------------------------------


def test_folder_s_model_and_tokenizer_are_used_as_they_come(folder: Path) -> None:
    from safetensors.torch import load_file

    settings = Settings(model="theirs", tokenizer="model", context=24)
    task = CausalLmTask(settings, 0, PeerConfig(model=str(folder)))
    model = task.build_model(0)
    assert torch.equal(
        model.state_dict()["transformer.wte.weight"],
        load_file(folder / "model.safetensors")["transformer.wte.weight"],
    )
    Replica(model, RunConfig(task=settings), "")  # nothing of it is frozen or a buffer
    assert isinstance(task.tokenizer, FolderTokenizer)
    assert task.tokenizer.decode(task.tokenizer.encode("words – and ünïcode")) == "words – and ünïcode"
    assert math.isfinite(task.evaluate(model)["loss"])


def test_folder_s_weights_are_left_where_they_are_when_the_run_starts_anew(folder: Path) -> None:
    task = CausalLmTask(
        Settings(model="theirs", pretrained=False, context=24), 0, PeerConfig(model=str(folder))
    )
    weights = [task.build_model(seed).state_dict()["transformer.wte.weight"] for seed in (0, 1)]
    assert weights[0].shape == (320, 32)
    assert not torch.equal(weights[0], weights[1])


def test_model_from_the_hub_is_taken_from_its_cache_when_there_is_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    save_model(save_tokenizer(into_cache(tmp_path, "models", "somebody/small"), ["a text"]))
    run = RunConfig(task=Settings(model="somebody/small", tokenizer="model", context=24))
    task = build_task(run)
    assert type(task.build_model(0)).__name__ == "GPT2LMHeadModel"

    with pytest.raises(
        ConfigError, match=r"model somebody/other .* could not be fetched .* set model in the"
    ):
        build_task(RunConfig(task=Settings(model="somebody/other")))


def test_folder_that_has_the_name_of_a_model_on_the_hub_is_not_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run from a stranger must not reach files on this machine by the names that it uses."""
    (tmp_path / "somebody").mkdir()
    (tmp_path / "somebody" / "private").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for settings in (Settings(model="somebody/private"), Settings(tokenizer="somebody/private")):
        with pytest.raises(ConfigError, match="could not be fetched"):
            build_task(RunConfig(task=settings))


# -- what will not do ----------------------------------------------------------------------------------------


def refusal(settings: Settings, **peer: str) -> str:
    with pytest.raises(ConfigError) as caught:
        CausalLmTask(settings, 0, PeerConfig(**peer), with_data=False).build_model(0)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_tokenizer_is_refused_when_it_has_more_tokens_than_the_model(folder: Path, tmp_path: Path) -> None:
    large = save_tokenizer(tmp_path, [" ".join(f"word{k}" for k in range(300))], size=600)
    said = refusal(Settings(model="m", tokenizer="t", context=24), model=str(folder), tokenizer=str(large))
    assert "has 551 tokens, but the model m in" in said
    assert 'knows 320; set task.tokenizer to the one it was made with, as "model" does' in said


def test_model_is_refused_when_it_has_no_loss_for_the_next_token(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    said = refusal(Settings(model="m"), model=str(tmp_path))
    assert "is of type 't5', which has no loss for the next token; choose a causal language model" in said


def test_model_is_refused_when_it_would_bring_code(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}})
    )
    (tmp_path / "code.py").write_text("raise SystemExit('this was run')")
    assert "code that comes with a model is not run" in refusal(Settings(model="m"), model=str(tmp_path))


def test_model_is_refused_when_its_weights_are_pickled_or_missing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    said = refusal(Settings(model="m", context=24), model=str(tmp_path))
    assert "choose one with a causal language-model head and safetensors weights" in said


def test_context_is_refused_when_the_model_has_fewer_positions(folder: Path) -> None:
    said = refusal(Settings(model="m", context=65), model=str(folder))
    assert "task.context (65) is more than the 64 positions that the model m in" in said


def test_folder_is_named_when_there_is_none_or_nothing_in_it(tmp_path: Path) -> None:
    assert "correct model in the peer file" in refusal(Settings(model="m"), model=str(tmp_path / "no"))
    assert "it needs a config.json" in refusal(Settings(model="m"), model=str(tmp_path))
    assert "it needs a tokenizer.json" in refusal(Settings(tokenizer="t"), tokenizer=str(tmp_path))


# -- notes ---------------------------------------------------------------------------------------------------


def test_peers_must_share_the_tokenizer_and_with_exact_the_data(folder: Path, tiny: CausalLmTask) -> None:
    assert tiny.note.startswith(tiny.shared_note)
    other = CausalLmTask(Settings(tokenizer="t"), 0, PeerConfig(tokenizer=str(folder)))
    assert not other.note.startswith(tiny.shared_note)
    exact = CausalLmTask(TINY.model_copy(update={"exact": True}), 0, PeerConfig())
    assert exact.shared_note == exact.note == tiny.note
    assert len(tiny.note) <= 200  # what a presence record has room for


def test_byte_tokenizer_gives_back_what_it_was_given() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([*tokenizer.encode("a – ü"), tokenizer.end or 0]) == "a – ü"
    assert max(tokenizer.encode("\ud800")) < tokenizer.size
