"""Which adapter is best for a text: what no choice can beat, what a router learns, what it may not mix up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from p2ptrain.adapters.panel import Panel
from p2ptrain.adapters.route import Scores, compare, train
from p2ptrain.adapters.routers import load_router
from p2ptrain.adapters.texts import ByteTokenizer, windows
from p2ptrain.errors import AdapterError
from peers.cli import app

TEXTS = {"counting": "0123456789" * 700, "spelling": "qwertyuiop" * 700}


def scores(texts: int, seed: int) -> Scores:
    """Three choices; the features say plainly which is best, and the base is never the worst."""
    generator = torch.Generator().manual_seed(seed)
    domains = torch.randint(0, 2, (texts,), generator=generator)
    rest = torch.full((3, texts), 2.0, dtype=torch.float64)
    rest[1], rest[2] = torch.where(domains == 0, 1.0, 3.0), torch.where(domains == 1, 1.0, 3.0)
    rest += 0.01 * torch.rand(rest.shape, generator=generator)
    features = torch.randn(texts, 4, generator=generator, dtype=torch.float64)
    features[:, 0] += 6.0 * domains
    return Scores(rest + 0.1, rest, features, tuple(domains.tolist()))


# -- choosing ------------------------------------------------------------------------------------------------


def test_no_choice_does_better_than_the_oracle_on_its_own_scores() -> None:
    """T17."""
    router, found = train(scores(80, 1), 0.4), scores(60, 2)
    result = compare(found, router, 2)
    for way in (*result.fixed, result.likelihood, result.learned):
        assert all(oracle <= loss for oracle, loss in zip(result.oracle, way, strict=True))


def test_router_learns_which_is_best_when_the_features_tell() -> None:
    result = compare(scores(60, 2), train(scores(80, 1), 0.4), 2)
    assert result.learned == pytest.approx(result.oracle, abs=0.05)
    assert sum(map(sum, result.confusion)) == 60
    assert result.confusion[1][2] + result.confusion[2][1] <= 2


def test_router_leaves_it_to_the_base_when_a_context_tells_nothing() -> None:
    """T17: half-way between all that it has seen, no adapter is likely enough."""
    learned = scores(400, 1)
    router = train(learned, 0.9)
    assert router.choose(learned.features.mean(0, keepdim=True)).tolist() == [0]


def test_threshold_that_is_found_is_high_where_that_costs_nothing() -> None:
    learned = scores(400, 1)
    router = train(learned)
    assert router.threshold > 0.5
    found, without = (compare(scores(200, 2), each, 2).learned for each in (router, train(learned, 0.0)))
    assert found == pytest.approx(without, abs=0.02)


def test_training_again_gives_the_same_router() -> None:
    one, other = train(scores(80, 1), 0.4), train(scores(80, 1), 0.4)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)


# -- with models ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter for each of the texts that learned it for a moment."""
    folder = tmp_path_factory.mktemp("route")
    torch.manual_seed(0)
    form = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(form).save_pretrained(folder / "base")
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
        tokens = windows(folder / f"{name}.txt", ByteTokenizer(), 32, 32)
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(15):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        model.save_pretrained(folder / name)
    return folder


def panel(folder: Path) -> Panel:
    return Panel(folder / "base", {name: folder / name for name in TEXTS})


def test_a_mixed_batch_is_each_text_by_itself(folder: Path) -> None:
    """T17."""
    model = panel(folder)
    tokens = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(1))
    choices = [0, 1, 2, 2, 1, 0]
    mixed = model.losses(tokens, choices)
    for row, choice in enumerate(choices):
        assert torch.allclose(mixed[row], model.losses(tokens[row : row + 1], [choice])[0], atol=1e-5)


def test_each_choice_is_what_peft_alone_makes_of_it(folder: Path) -> None:
    model, tokens = panel(folder), torch.arange(40).view(2, 20)
    for choice, name in enumerate(("base", *TEXTS)):
        alone = AutoModelForCausalLM.from_pretrained(folder / "base")
        if choice:
            alone = PeftModel.from_pretrained(alone, folder / name)
        with torch.no_grad():
            logits = alone.eval()(input_ids=tokens).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        assert torch.allclose(model.losses(tokens, [choice] * 2), expected.double(), atol=1e-5)


def invoked(*words: str) -> str:
    result = CliRunner().invoke(app, ["adapters", "route", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_commands_train_a_router_that_chooses_right_and_measure_it(folder: Path, tmp_path: Path) -> None:
    adapters = [word for name in TEXTS for word in ("--adapters", f"{name}={folder / name}")]
    data = [word for name in TEXTS for word in ("--data", f"{name}={folder / name}.txt")]
    sizes = ["--length", "32", "--windows", "40"]
    out = tmp_path / "router"
    base = ["--base", str(folder / "base")]
    invoked("train", *base, *adapters, *data, *sizes, "--prefix", "8", "--out", str(out))
    said = json.loads(invoked("eval", str(out), *data, *sizes, "--json").splitlines()[-1])
    table = said["table"]
    assert set(table) == {"base", *TEXTS, "oracle", "likelihood", "learned", "merged"}
    assert table["learned"]["mean"] == pytest.approx(table["oracle"]["mean"], abs=0.05)
    assert table["oracle"]["mean"] < table["base"]["mean"]
    assert all(table["oracle"]["mean"] < table[name]["mean"] for name in TEXTS)
    assert load_router(out)[1].confusion[1][1] == load_router(out)[1].confusion[2][2] == 8

    text, by = {}, {}
    for name in TEXTS:
        words = ["generate", "--router", str(out), "--prompt", TEXTS[name][:20], "--length", "20"]
        result = CliRunner().invoke(app, [*words, "--temperature", "0", "--json"], catch_exceptions=False)
        written = json.loads(result.stdout.splitlines()[-1])
        text[name], by[name] = written["text"], written["choice"]
    assert by == {name: name for name in TEXTS}
    assert all(text[name].startswith(TEXTS[name][:20]) for name in TEXTS)


def combined(folder: Path, *words: str) -> Result:
    base = ["--base", str(folder / "base"), "--length", "32", "--windows", "20"]
    return CliRunner().invoke(app, ["adapters", "combine", *words, *base], catch_exceptions=False)


def test_combining_is_judged_by_base_parents_and_result_on_a_text(folder: Path, tmp_path: Path) -> None:
    """The mean knows half of what the one parent knows who learned this text: that one is better."""
    parents = [str(folder / name) for name in TEXTS]
    text = ["--eval", str(folder / "counting.txt")]
    said = combined(folder, *parents, "--method", "mean", *text, "--out", str(tmp_path / "out"), "--json")
    facts = json.loads(said.stdout.splitlines()[-1])["eval"]
    assert facts["verdict"] == "worse"
    assert facts["windows"] == 20
    assert list(facts["losses"]) == ["base", "parent1", "parent2", "result"]
    assert facts["losses"]["parent1"] < facts["losses"]["result"] < facts["losses"]["base"]
    assert [each["than"] for each in facts["margins"]] == ["base", "parent1", "parent2"]
    note = json.loads((tmp_path / "out" / "p2ptrain.json").read_text())
    assert note["combined"]["eval"] == facts


def test_adapter_that_was_made_half_as_strong_is_improved_by_making_it_whole_again(
    folder: Path, tmp_path: Path
) -> None:
    half, whole = str(tmp_path / "half"), str(tmp_path / "whole")
    combined(folder, str(folder / "counting"), "--method", "cat", "--weights", "0.5", "--out", half)
    text = ["--eval", str(folder / "counting.txt")]
    said = combined(folder, half, "--method", "cat", "--weights", "2", *text, "--out", whole)
    assert "verdict: improved: better than the base and each parent, beyond the noise" in said.stdout
    assert "parent1   -" in said.stdout


def test_router_is_refused_when_an_adapter_has_changed(folder: Path, tmp_path: Path) -> None:
    copies = {}
    for name in TEXTS:
        copies[name] = tmp_path / name
        copies[name].mkdir()
        for file in (folder / name).iterdir():
            (copies[name] / file.name).write_bytes(file.read_bytes())
    adapters = [word for name, path in copies.items() for word in ("--adapters", f"{name}={path}")]
    data = [word for name in TEXTS for word in ("--data", f"{name}={folder / name}.txt")]
    words = ["train", "--base", str(folder / "base"), *adapters, *data, "--length", "32", "--windows", "5"]
    invoked(*words, "--prefix", "8", "--out", str(tmp_path / "router"))
    file = copies["counting"] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(AdapterError, match="is not the adapter 'counting'"):
        load_router(tmp_path / "router")


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(AdapterError, match="at least five windows"):
        windows(tmp_path / "short.txt", ByteTokenizer(), 32, 40)
    with pytest.raises(AdapterError, match="cannot read"):
        windows(tmp_path / "none.txt", ByteTokenizer(), 32, 40)
