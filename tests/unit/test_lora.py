"""Adapters: where they go, that averaging their gradients is exact, and that PEFT reads their checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_models import Arithmetic, tiny_llama
from replicas import entry_at, next_entry, unmeasured
from torch import Tensor, nn

from p2ptrain.adapters.files import load_adapter
from p2ptrain.config import Local, Lora, Optimizer, RunConfig, Schedule, fingerprint
from p2ptrain.errors import BadMessage, CheckpointError, ConfigError, IncompatibleRun
from p2ptrain.gradients.codecs import codec_named
from p2ptrain.records import PeerId
from p2ptrain.replica.apart import LocalStrategy
from p2ptrain.replica.checkpoint import latest, load, restore, save
from p2ptrain.replica.flat import parameter_table
from p2ptrain.replica.replica import Replica
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


# -- trained apart -------------------------------------------------------------------------------------------


def apart_run(**settings: Any) -> RunConfig:
    """Each peer's steps are of two samples."""
    plain = {"outer_learning_rate": 1.0, "outer_momentum": 0.0}
    local = Local(inner_batch_size=2, **{**plain, **settings})
    return lora_run(strategy="local", local=local, lora=Lora(rank=4))


def changes(model: nn.Module) -> dict[str, Tensor]:
    """Module → s·B·A, float64."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (
                getattr(module, side)["default"].weight.detach().double() for side in ("lora_A", "lora_B")
            )
            found[name] = module.scaling["default"] * b @ a
    return found


class Swarm:
    """Peers that train apart, and whose rounds are held by hand."""

    def __init__(self, run: RunConfig, steps: Sequence[int]) -> None:
        self.replicas = [lora_replica(run) for _ in steps]
        self.steps = steps
        self.apart = [replica.contributor(PeerId("me"), unmeasured).gathered for replica in self.replicas]
        self.task = Arithmetic()

    def compute(self) -> Tensor:
        """What each peer does alone in a round; float32 [numel], the mean that a round makes of it."""
        for rank, (replica, apart) in enumerate(zip(self.replicas, self.apart, strict=True)):
            for step in range(self.steps[rank]):
                replica.gradient.zero_()
                batch = self.task.batch(replica.position.step, f"peer{rank}", 2 * step, 2)
                self.task.loss_sum(replica.model, batch).backward()  # type: ignore[no-untyped-call]
                assert apart.add(replica.gradient, 2)
            apart.gather()
        whole = torch.stack([each.total for each in self.apart]).double().sum(0)
        return (whole / sum(each.samples for each in self.apart)).float()

    def step(self, mean: Tensor) -> None:
        entry = entry_at(self.replicas[0].position, self.replicas[0].run, mean)
        for replica, apart in zip(self.replicas, self.apart, strict=True):
            replica.apply(entry)
            apart.settle(codec_named("fp32"), ())
        assert len({replica.compute_state_digest() for replica in self.replicas}) == 1


def test_mean_of_adapters_that_were_trained_apart_is_the_mean_of_their_products() -> None:
    """In every round, whichever factor's turn it is, and however unequal the peers' work was."""
    swarm = Swarm(apart_run(), steps=(3, 1, 5))
    shares = [count / sum(swarm.steps) for count in swarm.steps]
    for _ in range(4):
        before = changes(swarm.replicas[0].model)
        mean = swarm.compute()
        own = [changes(replica.model) for replica in swarm.replicas]
        swarm.step(mean)
        for name, found in changes(swarm.replicas[0].model).items():
            expected = sum(share * each[name] for share, each in zip(shares, own, strict=True))
            assert isinstance(expected, Tensor)
            assert (expected - before[name]).norm() > 1e-3
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_mean_with_one_factor_held_is_exact_and_without_it_is_not() -> None:
    """The identity itself, in float64; T5 has what the mean of both factors is off by."""
    chance = torch.Generator().manual_seed(1)
    a, *others = (torch.randn(4, 9, generator=chance, dtype=torch.float64) for _ in range(3))
    shares, bs = (0.2, 0.3, 0.5), [torch.randn(7, 4, generator=chance, dtype=torch.float64) for _ in range(3)]
    mean_b = sum(share * b for share, b in zip(shares, bs, strict=True))
    mean = sum(share * b @ a for share, b in zip(shares, bs, strict=True))
    torch.testing.assert_close(mean_b @ a, mean, rtol=0, atol=1e-12)
    unlike = sum(share * b @ each for share, b, each in zip(shares, bs, [a, *others], strict=True))
    mean_a = sum(share * each for share, each in zip(shares, [a, *others], strict=True))
    assert isinstance(unlike, Tensor)
    assert (mean_b @ mean_a - unlike).norm() > 0.1 * unlike.norm()


@pytest.mark.parametrize("kind", ["adamw", "sgd", "lamb"])
def test_the_factor_whose_turn_it_is_not_rests_to_the_last_bit(kind: Any) -> None:
    """In a peer's own steps and in the outer one, with momentum and weight decay."""
    run = apart_run(outer_momentum=0.9).model_copy(
        update={"optimizer": Optimizer(kind=kind, lr=0.01, weight_decay=0.1)}
    )
    swarm = Swarm(run, steps=(2, 1))
    for turn in ("lora_B", "lora_A", "lora_B", "lora_A"):
        start = {name: each.detach().clone() for name, each in swarm.replicas[0].model.named_parameters()}
        mean = swarm.compute()
        for moment in ("alone", "together"):
            if moment == "together":
                swarm.step(mean)
            for name, parameter in swarm.replicas[0].model.named_parameters():
                if turn in name:
                    assert not torch.equal(parameter, start[name]), (moment, name)
                else:
                    assert torch.equal(parameter, start[name]), (moment, name)


def test_adapters_trained_apart_are_resumed_bit_for_bit_and_peft_loads_them(tmp_path: Path) -> None:
    from peft import PeftModel

    run = apart_run(outer_learning_rate=0.7, outer_momentum=0.6, warmup_rounds=1)
    straight = moved(lora_replica(run), 4)
    folder = saved(straight, tmp_path)
    theirs = PeftModel.from_pretrained(tiny_llama(), str(folder))
    torch.testing.assert_close(logits(theirs), logits(straight.model), rtol=0, atol=1e-6)
    resumed = lora_replica(run)
    restore(resumed, load(folder))
    for step in range(3):
        entry = next_entry(straight, step)
        straight.apply(entry)
        resumed.apply(entry)
        assert resumed.compute_state_digest() == straight.compute_state_digest()


def test_both_factors_own_optimizers_go_on_from_the_warm_up() -> None:
    replica = moved(lora_replica(apart_run(warmup_rounds=2)), 2)
    assert isinstance(replica.strategy, LocalStrategy)
    warm = replica.contributor(PeerId("me"), unmeasured).gathered
    fresh = lora_replica(apart_run(warmup_rounds=2))
    fresh.load_state(replica.snapshot())
    alone = fresh.contributor(PeerId("me"), unmeasured).gathered
    gradient = torch.full((replica.numel,), 1e-3)
    for each in (warm, alone):
        each.add(gradient, 2)
        each.gather()
    assert (warm.total - alone.total).norm() > 0.1 * alone.total.norm()


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
