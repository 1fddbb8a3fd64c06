"""Adapters: where they go, that averaging their gradients is exact, and that PEFT reads their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora_models import Arithmetic, tiny_llama
from replicas import entry_at, next_entry
from torch import Tensor, nn

from p2ptrain.adapters.files import load_adapter
from p2ptrain.config import Lora, Optimizer, RunConfig, Schedule, fingerprint
from p2ptrain.errors import BadMessage, CheckpointError, ConfigError, IncompatibleRun
from p2ptrain.replica.checkpoint import latest, load, restore, save
from p2ptrain.replica.replica import Replica, parameter_table
from p2ptrain.tasks import build_model
from p2ptrain.tasks.lora import add_adapters, base_digest, chosen_layers

PER_LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora_run(**fields: object) -> RunConfig:
    defaults: dict[str, object] = {
        "payload": "lora",
        "chunk_values": 1024,
        "codec": "fp32",
        "optimizer": Optimizer(lr=0.01),
        "schedule": Schedule(warmup_steps=0),
    }
    return RunConfig.model_validate(defaults | fields)


def lora_replica(run: RunConfig, model_seed: int | None = None) -> Replica:
    model, digest = build_model(Arithmetic(model_seed), run)
    return Replica(model, run, fingerprint(run, parameter_table(model), digest), digest)


def moved(replica: Replica, steps: int = 3) -> Replica:
    for step in range(steps):
        replica.apply(next_entry(replica, step))
    return replica


# -- where they go -------------------------------------------------------------------------------------------


def test_adapters_are_on_all_linear_layers_but_the_head_when_none_is_named() -> None:
    assert sorted({name.rpartition(".")[2] for name in chosen_layers(tiny_llama(), ())}) == sorted(PER_LAYER)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    assert chosen_layers(plain, ()) == ["0", "2"]


def test_adapters_are_only_where_the_run_says() -> None:
    names = chosen_layers(tiny_llama(), ("q_proj", "layers.1.mlp.up_proj"))
    assert names == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]


def test_layer_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r'names "c_attn", but LlamaForCausalLM .* it has down_proj, gate_'):
        chosen_layers(tiny_llama(), ("q_proj", "c_attn"))
    with pytest.raises(ConfigError, match=r'Sequential has no linear layer to adapt; set payload to "full"'):
        chosen_layers(nn.Sequential(nn.Embedding(2, 2)), ())


def test_model_is_what_it_was_until_adapters_learn_and_only_they_are_trained() -> None:
    model, tokens = tiny_llama(), torch.arange(10)[None]
    before, digest = model(input_ids=tokens).logits, base_digest(model)
    add_adapters(model, Lora(rank=4), seed=3)
    assert torch.equal(model(input_ids=tokens).logits, before)
    assert digest == base_digest(tiny_llama())
    assert digest != base_digest(tiny_llama(seed=1))
    table = parameter_table(model)
    assert len(table) == 2 * 2 * len(PER_LAYER)
    assert all(".lora_" in name for name, _, _ in table)


def test_adapters_start_alike_on_all_peers_and_differ_with_the_seed() -> None:
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(99)  # what was drawn before plays no part
        torch.rand(seed)
        model = tiny_llama()
        add_adapters(model, Lora(), seed)
        states.append(torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_replica_holds_the_adapters_and_nothing_else() -> None:
    full = sum(parameter.numel() for parameter in tiny_llama().parameters())
    replica = lora_replica(lora_run(lora=Lora(rank=1)))
    assert replica.numel < full / 10
    before = base_digest(tiny_llama())
    frozen = {n: p.detach().clone() for n, p in replica.model.named_parameters() if not p.requires_grad}
    moved(replica)
    for name, parameter in replica.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, frozen[name])
            assert parameter.grad is None
    assert replica.base_digest == before


def test_peers_with_different_bases_have_different_fingerprints() -> None:
    run = lora_run()
    assert lora_replica(run).fingerprint == lora_replica(run).fingerprint
    assert lora_replica(run).fingerprint != lora_replica(run, model_seed=1).fingerprint


# -- averaging is exact (T2) ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [(1, 3, 8), (12,), (5, 5, 1, 1)])
def test_mean_of_the_peers_gradients_is_that_of_the_pooled_batch_at_each_of_many_steps(
    shards: tuple[int, ...],
) -> None:
    """In float64, with AdamW: adapters of the swarm and of one process never differ by more than rounding."""
    task, run = Arithmetic(), lora_run(lora=Lora(rank=4))
    swarm, alone = (build_model(task, run)[0].double() for _ in range(2))
    optimizers = [torch.optim.AdamW(trained(model), lr=0.01) for model in (swarm, alone)]
    for step in range(20):
        batches = [task.batch(step, f"peer{number}", 0, count) for number, count in enumerate(shards)]
        total = [torch.zeros_like(parameter) for parameter in trained(swarm)]
        for batch in batches:
            gradients = torch.autograd.grad(task.loss_sum(swarm, batch), trained(swarm))
            for sum_, gradient in zip(total, gradients, strict=True):
                sum_.add_(gradient)
        pooled = torch.autograd.grad(task.loss_sum(alone, torch.cat(batches)), trained(alone))
        for model, gradients in ((swarm, total), (alone, list(pooled))):
            for parameter, gradient in zip(trained(model), gradients, strict=True):
                parameter.grad = gradient / sum(shards)
        for optimizer in optimizers:
            optimizer.step()
        for mine, theirs in zip(trained(swarm), trained(alone), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    assert any(bool(parameter.abs().max() > 0.05) for parameter in trained(alone))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# -- checkpoints ---------------------------------------------------------------------------------------------


def saved(replica: Replica, folder: Path) -> Path:
    return save(
        folder, replica.snapshot(), replica.run, {}, keep=2, lineages=b"", base_digest=replica.base_digest
    )


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model.eval()(input_ids=torch.arange(12)[None]).logits
    return answer


@pytest.mark.parametrize(
    "lora",
    [Lora(), Lora(rank=4, alpha=3, rank_stabilized=True), Lora(target_modules=("q_proj", "down_proj"))],
    ids=["default", "rank-stabilised", "two layers"],
)
def test_peft_loads_a_checkpoint_and_gives_the_same_logits(lora: Lora, tmp_path: Path) -> None:
    from peft import PeftModel

    replica = moved(lora_replica(lora_run(lora=lora)))
    folder = saved(replica, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "lineages.bin",
        "manifest.json",
        "p2ptrain.json",
        "run.json",
        "state.safetensors",
    ]
    theirs = PeftModel.from_pretrained(tiny_llama(), str(folder))  # a missing key would be a warning
    ours = logits(replica.model)
    torch.testing.assert_close(logits(theirs), ours, rtol=0, atol=1e-6)
    assert (ours - logits(tiny_llama())).abs().max() > 0.01

    adapter = load_adapter(folder)  # what `p2ptrain adapters combine` takes
    assert adapter.note.base_digest == replica.base_digest
    assert adapter.note.samples == replica.position.weight
    module, factors = next(iter(adapter.factors.items()))
    layer = replica.model.get_submodule(module)
    torch.testing.assert_close(factors.delta().float(), layer.get_delta_weight("default"))  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_resumed_adapters_go_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """T16: as if nothing had happened."""
    run = lora_run(optimizer={"kind": kind, "lr": 0.01})
    straight = moved(lora_replica(run), 3)
    saved(straight, tmp_path)
    newest = latest(tmp_path)
    assert newest is not None
    resumed = lora_replica(run)
    restore(resumed, load(newest))
    assert resumed.position == straight.position
    for step in range(3):
        entry = next_entry(straight, step)
        straight.apply(entry)
        resumed.apply(entry)
        assert resumed.compute_state_digest() == straight.compute_state_digest()
    assert torch.equal(logits(resumed.model), logits(straight.model))


def test_adapters_for_another_base_are_refused_in_one_sentence(tmp_path: Path) -> None:
    run = lora_run()
    folder = saved(moved(lora_replica(run)), tmp_path)
    other = lora_replica(run, model_seed=1)
    before = other.parameters.clone()
    with pytest.raises(IncompatibleRun, match=r"holds adapters for a model of digest .*, but the model here"):
        restore(other, load(folder))
    assert torch.equal(other.parameters, before)


def test_checkpoint_without_its_adapter_files_is_damaged(tmp_path: Path) -> None:
    folder = saved(moved(lora_replica(lora_run())), tmp_path)
    note = folder / "p2ptrain.json"
    content = json.loads(note.read_text())
    assert content["run_id"] == "python-stdlib"
    note.write_text(note.read_text().replace(content["base_digest"][:8], "00000000"))
    with pytest.raises(CheckpointError, match=r"p2ptrain.json is not part of a whole checkpoint: expected"):
        load(folder)
    note.unlink()
    with pytest.raises(CheckpointError, match="not part of a whole checkpoint"):
        load(folder)


def test_dropout_of_adapters_is_there_in_training_only() -> None:
    run = lora_run(lora=Lora(dropout=0.5))
    replica = moved(lora_replica(run))
    replica.model.train()
    batch = Arithmetic().batch(0, "a", 0, 4)
    with torch.no_grad():
        noisy = {float(Arithmetic().loss_sum(replica.model, batch)) for _ in range(3)}
    assert len(noisy) == 3
    assert torch.equal(logits(replica.model), logits(replica.model))


def test_entry_of_a_full_model_is_refused() -> None:
    replica = lora_replica(lora_run())
    entry = entry_at(replica.position, replica.run, torch.zeros(39_000))
    with pytest.raises(BadMessage, match="spans"):
        replica.apply(entry)
