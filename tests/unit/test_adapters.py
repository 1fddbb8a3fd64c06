"""Adapters put together: what is exact is exact, what is lost is known, what cannot be meant is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from p2ptrain.adapters.combine import combine, weights_for
from p2ptrain.adapters.factors import Factors, compressed, concatenated, inner
from p2ptrain.adapters.files import Adapter, load_adapter, merge, save_adapter
from p2ptrain.errors import AdapterError, StorageError
from peers.cli import app

TOKENS = torch.arange(24).view(2, 12) % 64


def random_factors(out: int, rank: int, into: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, into, generator=generator, dtype=torch.float64)
    return Factors(a, torch.randn(out, rank, generator=generator, dtype=torch.float64))


# -- factors -------------------------------------------------------------------------------------------------


def test_concatenation_is_the_weighted_sum_of_the_changes_when_ranks_differ() -> None:
    parts = [random_factors(7, rank, 5, rank) for rank in (1, 2, 3)]
    whole = concatenated(parts, [0.5, -1.0, 2.0])
    expected = 0.5 * parts[0].delta() - parts[1].delta() + 2.0 * parts[2].delta()
    assert whole.rank == 6
    assert torch.allclose(whole.delta(), expected, rtol=0, atol=1e-12)


def test_mean_of_products_is_not_the_product_of_means_and_the_residual_restores_it() -> None:
    """T5: the residual is what FedEx-LoRA (arXiv:2410.09432) adds to the base."""
    parts = [random_factors(9, 4, 6, seed) for seed in range(3)]
    exact = concatenated(parts, [1 / 3] * 3).delta()
    means = Factors(
        torch.stack([p.a for p in parts]).mean(0), torch.stack([p.b for p in parts]).mean(0)
    ).delta()
    assert (exact - means).norm() / exact.norm() > 0.1
    residual = torch.stack([p.delta() for p in parts]).mean(0) - means
    assert torch.allclose(means + residual, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(12, 9), (5, 12)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_what_a_cut_loses_is_the_root_of_the_squares_cut_off(shape: tuple[int, int], rank: int) -> None:
    """T6, by the singular values of the change itself."""
    whole = concatenated([random_factors(shape[0], 4, shape[1], seed) for seed in (1, 2)], [1.0, 0.5])
    singular = torch.linalg.svdvals(whole.delta())
    cut = compressed(whole, rank, None)
    assert cut.factors.rank == rank
    assert (cut.factors.delta() - whole.delta()).norm() == pytest.approx(
        singular[rank:].square().sum().sqrt().item(), abs=1e-9
    )
    assert cut.lost_squared == pytest.approx(singular[rank:].square().sum().item(), abs=1e-9)
    assert cut.whole_squared == pytest.approx(whole.delta().square().sum().item())


def test_a_cut_loses_nothing_when_the_rank_is_all_there_is() -> None:
    """T6."""
    whole = concatenated([random_factors(30, 4, 20, seed) for seed in (1, 2)], [1.0, 1.0])
    assert (compressed(whole, 8, None).factors.delta() - whole.delta()).norm() < 1e-9


def test_energy_keeps_the_smallest_rank_that_has_it() -> None:
    whole = random_factors(30, 8, 20, 1)
    squares = torch.linalg.svdvals(whole.delta())[:8].square()
    for energy in (0.3, 0.8, 0.99, 1.0):
        rank = compressed(whole, None, energy).factors.rank
        assert squares[:rank].sum() >= energy * squares.sum() * (1 - 1e-12)
        assert rank == 1 or squares[: rank - 1].sum() < energy * squares.sum()


@pytest.mark.parametrize("rank", [7, 100])
def test_a_rank_above_what_the_factors_hold_is_refused(rank: int) -> None:
    """T6."""
    with pytest.raises(ValueError, match="at most rank 6"):
        compressed(random_factors(6, 8, 20, 1), rank, None)


def test_inner_product_needs_no_dense_change() -> None:
    one, other = random_factors(8, 2, 5, 1), random_factors(8, 3, 5, 2)
    assert inner(one, other) == pytest.approx((one.delta() * other.delta()).sum().item())


# -- folders that PEFT wrote ---------------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    ).eval()


def gpt2() -> GPT2LMHeadModel:
    """Its layers keep their weights as [in, out]."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


def trained(folder: Path, seed: int, model: Any = None, **settings: Any) -> Path:
    """A folder as PEFT writes it, its factors random as if they had been trained."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model or llama(), LoraConfig(**{**options, **settings}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def change(base: Path, adapter: Path) -> Tensor:
    """Of the logits' first weight, as PEFT merges it: the first layer's q_proj."""
    merged = loaded(base, adapter).merge_and_unload()
    before = AutoModelForCausalLM.from_pretrained(base)
    return (
        merged.model.layers[0].self_attn.q_proj.weight - before.model.layers[0].self_attn.q_proj.weight
    ).detach()


SETTINGS: dict[str, dict[str, Any]] = {
    "alpha is not the rank": {"lora_alpha": 3},
    "rank-stabilised": {"use_rslora": True, "r": 8},
    "another rank for one": {"rank_pattern": {"q_proj": 2}},
    "another rank and alpha for one layer": {
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5},
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_one_adapter_with_weight_1_is_unchanged_whatever_its_scaling(
    tmp_path: Path, base: Path, settings: dict[str, Any]
) -> None:
    """T4: what is scaled twice, or not at all, shows here."""
    path = trained(tmp_path / "a", 1, **settings)
    read = load_adapter(path)
    result = combine([read], "cat", [1.0])
    save_adapter(tmp_path / "out", result.factors, read, {}, sorted(result.factors))
    assert torch.allclose(change(base, tmp_path / "out"), change(base, path), rtol=0, atol=1e-6)
    assert torch.allclose(logits(loaded(base, tmp_path / "out")), logits(loaded(base, path)), atol=1e-5)


def test_two_adapters_with_unlike_scalings_add_up_when_peft_loads_the_result(
    tmp_path: Path, base: Path
) -> None:
    """T3 and T4: the concatenation, the base plus the sum, and PEFT's own merge agree."""
    paths = [trained(tmp_path / "a", 1, lora_alpha=3), trained(tmp_path / "b", 2, r=2, use_rslora=True)]
    read = [load_adapter(path) for path in paths]
    result = combine(read, "cat", [0.25, 0.5])
    save_adapter(tmp_path / "out", result.factors, read[0], {}, sorted(result.factors))
    merge(base, result.factors, False, tmp_path / "merged")

    expected = 0.25 * change(base, paths[0]) + 0.5 * change(base, paths[1])
    assert torch.allclose(change(base, tmp_path / "out"), expected, atol=1e-6)
    by_adapter = logits(loaded(base, tmp_path / "out"))
    assert torch.allclose(
        by_adapter, logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), atol=1e-5
    )
    assert torch.allclose(by_adapter, logits(loaded(base, tmp_path / "out").merge_and_unload()), atol=1e-5)


def test_merging_transposes_the_change_when_layers_keep_their_weights_as_in_by_out(tmp_path: Path) -> None:
    """GPT-2's attention is not square, so a transpose too few is refused and one too many shows."""
    gpt2().save_pretrained(tmp_path / "base")
    path = trained(tmp_path / "a", 1, gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    read = load_adapter(path)
    merge(tmp_path / "base", combine([read], "cat", [1.0]).factors, True, tmp_path / "merged")
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")),
        logits(loaded(tmp_path / "base", path)),
        atol=1e-5,
    )


def test_adapters_that_change_other_modules_combine_as_if_the_rest_were_unchanged(
    tmp_path: Path, base: Path
) -> None:
    paths = [trained(tmp_path / "a", 1), trained(tmp_path / "b", 2, target_modules=["v_proj"])]
    read = [load_adapter(path) for path in paths]
    result = combine(read, "mean", [0.5, 0.5])
    save_adapter(tmp_path / "out", result.factors, read[0], {}, sorted(result.factors))
    assert torch.allclose(change(base, tmp_path / "out"), 0.5 * change(base, paths[0]), atol=1e-6)
    assert result.likenesses[0].cosine == 0


def test_svd_cuts_to_the_largest_rank_among_the_parents(tmp_path: Path) -> None:
    read = [load_adapter(trained(tmp_path / str(rank), rank, r=rank)) for rank in (2, 4)]
    result = combine(read, "svd", weights_for(read, "svd", ""))
    assert result.ranks == (4, 4)
    exact = combine(read, "mean", weights_for(read, "mean", ""))
    lost = sum((exact.factors[m].delta() - result.factors[m].delta()).square().sum() for m in exact.factors)
    assert result.lost_norm == pytest.approx(float(lost) ** 0.5, abs=1e-9)
    assert 0 < result.energy_kept < 1


def test_likeness_is_that_of_the_dense_changes(tmp_path: Path) -> None:
    read = [load_adapter(trained(tmp_path / str(seed), seed)) for seed in (1, 2)]
    one, other = (torch.cat([f.delta().reshape(-1) for f in each.factors.values()]) for each in read)
    found = combine(read, "mean", [0.5, 0.5]).likenesses[0]
    assert found.cosine == pytest.approx(torch.cosine_similarity(one, other, dim=0).item())
    assert found.sign_agreement == pytest.approx((one.sign() == other.sign()).double().mean().item())
    same = combine([read[0], read[0]], "mean", [0.5, 0.5]).likenesses[0]
    assert (same.cosine, same.sign_agreement) == (pytest.approx(1.0), 1.0)


def test_residual_in_the_base_and_mean_factors_are_the_exact_mean_for_weights_of_either_layout(
    tmp_path: Path,
) -> None:
    """T5 on GPT-2's [in, out] weights, which are not square: what FedEx-LoRA does, merged by `merge`, and a
    transpose too few or too many shows."""
    gpt2().save_pretrained(tmp_path / "base")
    shape = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "lora_alpha": 4}
    read = [load_adapter(trained(tmp_path / str(seed), seed, gpt2(), **shape)) for seed in (1, 2, 3)]
    exact = combine(read, "mean", [1 / 3] * 3).factors
    means = {
        module: Factors(
            torch.stack([each.factors[module].a for each in read]).mean(0),
            torch.stack([each.factors[module].b for each in read]).mean(0),
        )
        for module in exact
    }
    residual = {module: concatenated([exact[module], means[module]], [1.0, -1.0]) for module in exact}
    merge(tmp_path / "base", residual, True, tmp_path / "with-residual")
    save_adapter(tmp_path / "means", means, read[0], {}, sorted(means))
    merge(tmp_path / "base", exact, True, tmp_path / "exact")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "exact"))
    assert torch.allclose(logits(loaded(tmp_path / "with-residual", tmp_path / "means")), expected, atol=1e-5)
    without = logits(loaded(tmp_path / "base", tmp_path / "means"))
    assert (without - expected).abs().max() > 1e-2


# -- weights -------------------------------------------------------------------------------------------------


def noted(tmp_path: Path, samples: int, digest: str = "a" * 64) -> Adapter:
    path = trained(tmp_path / f"noted-{samples}-{digest[0]}", samples)
    (path / "p2ptrain.json").write_text(json.dumps({"samples": samples, "base_digest": digest}))
    return load_adapter(path)


def test_weights_by_samples_are_their_shares(tmp_path: Path) -> None:
    assert weights_for([noted(tmp_path, 1), noted(tmp_path, 3)], "mean", "samples") == (0.25, 0.75)


@pytest.mark.parametrize(
    ("method", "text", "expected"),
    [
        ("mean", "1,3", (0.25, 0.75)),
        ("cat", "1,3", (1.0, 3.0)),
        ("cat", "", (1.0, 1.0)),
        ("sum", "", (1.0, 1.0)),
    ],
)
def test_weights_are_taken_as_the_method_says(
    tmp_path: Path, method: Any, text: str, expected: tuple[float, float]
) -> None:
    read = [load_adapter(trained(tmp_path / str(seed), seed)) for seed in (1, 2)]
    assert weights_for(read, method, text) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1,-1", "sum to 0"),
        ("1", "expected 2"),
        ("1,nan", "finite"),
        ("a,b", "samples"),
        ("samples", "how many"),
    ],
)
def test_weights_that_mean_nothing_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    read = [load_adapter(trained(tmp_path / str(seed), seed)) for seed in (1, 2)]
    with pytest.raises(AdapterError, match=complaint):
        weights_for(read, "mean", text)


# -- folders that are not as they should be ------------------------------------------------------------------


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def with_config(**changes: Any) -> Callable[[Path], None]:
    def change_it(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))

    return change_it


def with_tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def change_them(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return change_them


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (without("adapter_config.json"), "has no adapter_config.json"),
    "no weights": (without("adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{") and None, "cannot be read"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]") and None, "JSON object"),
    "cut off": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x10" + bytes(20)) and None,
        "is damaged",
    ),
    "another type": (with_config(peft_type="IA3"), "only LORA"),
    "rank 0": (with_config(r=0), "r:"),
    "DoRA": (with_config(use_dora=True), "DoRA"),
    "biases": (with_config(bias="all"), "biases"),
    "whole modules": (with_config(modules_to_save=["lm_head"]), "whole modules"),
    "one factor": (with_tensors(lambda t: t.pop(FIRST)), "only one factor"),
    "a stranger": (with_tensors(lambda t: t.update(x=torch.ones(1))), "no factor of a LoRA"),
    "a cut factor": (with_tensors(lambda t: t.update({FIRST: t[FIRST][:2].clone()})), "expected"),
    "NaN": (with_tensors(lambda t: t[FIRST].fill_(float("nan"))), "not finite"),
    "nothing": (with_tensors(lambda t: t.clear()), "no factor at all"),
}


@pytest.mark.parametrize(("damage", "complaint"), DAMAGED.values(), ids=DAMAGED)
def test_a_folder_is_refused_with_the_reason_when(
    tmp_path: Path, damage: Callable[[Path], None], complaint: str
) -> None:
    path = trained(tmp_path / "a", 1)
    damage(path)
    with pytest.raises(AdapterError, match=complaint):
        load_adapter(path)


def test_adapters_of_different_bases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="choose adapters of one base"):
        combine([noted(tmp_path, 1, "a" * 64), noted(tmp_path, 1, "b" * 64)], "mean", [0.5, 0.5])
    shutil.copytree(trained(tmp_path / "a", 1), tmp_path / "b")
    with_config(base_model_name_or_path="other/model")(tmp_path / "b")
    with pytest.raises(AdapterError, match="choose adapters of one base"):
        combine([load_adapter(tmp_path / name) for name in "ab"], "mean", [0.5, 0.5])


def test_a_folder_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    read = load_adapter(trained(tmp_path / "a", 1))
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(StorageError, match="is there already"):
        save_adapter(tmp_path / "a", read.factors, read, {}, [])
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before


def test_nothing_is_left_when_the_base_does_not_fit(tmp_path: Path, base: Path) -> None:
    read = load_adapter(trained(tmp_path / "a", 1, gpt2(), target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(AdapterError, match="has no weight"):
        merge(base, read.factors, True, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- the command ---------------------------------------------------------------------------------------------


def test_command_prints_what_it_made_and_peft_loads_it(tmp_path: Path, base: Path) -> None:
    paths = [str(trained(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    words = ["adapters", "combine", *paths, "--method", "svd", "--rank", "3", "--out", str(tmp_path / "out")]
    said = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    facts = json.loads(said.stdout.splitlines()[-1])
    assert facts["ranks"] == [3, 3]
    assert len(facts["likenesses"]) == 1
    assert logits(loaded(base, tmp_path / "out")).isfinite().all()
    note = json.loads((tmp_path / "out" / "p2ptrain.json").read_text())
    assert [parent["weight"] for parent in note["combined"]["parents"]] == [0.5, 0.5]


def test_command_merges_into_the_base(tmp_path: Path, base: Path) -> None:
    path = trained(tmp_path / "a", 1)
    words = ["adapters", "combine", str(path), "--method", "merge", "--base", str(base)]
    said = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert "100.00% of the exact one" in said.stdout
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(merged), logits(loaded(base, path)), atol=1e-5)
