"""Strategy `partition` on replicas: parts that are trained apart, and what an entry makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from replicas import FINGERPRINT, unmeasured
from torch import Tensor, nn

from p2ptrain.config import CausalLmTask, Optimizer, Outer, Partition, RunConfig, Schedule, Sync
from p2ptrain.gradients.aggregation import mean_chunk, squared_norm
from p2ptrain.gradients.codecs import codec_named
from p2ptrain.records import Ballot, EntryHeader, PeerId
from p2ptrain.replica.log import Entry, entry_digest, entry_ranges
from p2ptrain.replica.optimizers import FlatOptimizer, build_optimizer
from p2ptrain.replica.parts import PartSteps, Share
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.subspaces import PROBE_VALUES, coordinates, owners, within

INNER = 4
SETTINGS = Partition(inner_batch_size=INNER)
PLAIN = {"kind": "sgd", "momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "lr": 0.01}
Gradient = Callable[[Tensor, PeerId, int], Tensor]
"""(parameters, peer, step of the run) → mean gradient of an inner batch there."""


def part_run(by: Any = "random", rotate_every: int = 0, gamma: Any = "1", **optimizer: Any) -> RunConfig:
    return RunConfig(
        strategy="partition",
        codec="fp32",
        chunk_values=1024,
        partition=Partition(
            by=by, inner_batch_size=INNER, rotate_every=rotate_every, gamma=gamma, probe_every=1
        ),
        optimizer=Optimizer(**{"lr": 0.01, "clip_norm": 0.0, **optimizer}),
        schedule=Schedule(warmup_steps=0),
    )


def tiny_model() -> nn.Module:
    """47 parameters near 1: so short steps from there leave no rounding in a difference (Sterbenz)."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    return model


def noisy(theta: Tensor, peer: PeerId, step: int) -> Tensor:
    """Of a quadratic in which no coordinate knows of another, and noise that all peers share."""
    generator = torch.Generator().manual_seed(step)
    curvature = torch.linspace(0.1, 1.0, len(theta), dtype=theta.dtype)
    return curvature * theta + torch.randn(len(theta), generator=generator, dtype=torch.float64).to(
        theta.dtype
    )


class Member:
    def __init__(self, name: str, run: RunConfig) -> None:
        self.name = PeerId(name)
        self.replica = Replica(tiny_model(), run, FINGERPRINT)
        self.parts = self.replica.contributor(self.name, unmeasured).gathered

    def train(self, gradient: Gradient, steps: int) -> None:
        for _ in range(steps):
            if self.parts.room:
                theta, step = self.parts._working, self.replica.position.step
                assert self.parts.add(INNER * gradient(theta, self.name, step), INNER)
        self.parts.gather()


def entry_of(members: list[Member]) -> Entry:
    """What a round of these members makes of what they bring."""
    first = members[0].replica
    samples = tuple(member.parts.samples for member in members)
    mean = mean_chunk([member.parts.total for member in members], samples)
    codec, spans = codec_named("fp32"), (*(0 for _ in members), len(mean))
    chunks = [codec.encode(mean[a:b]) for a, b in entry_ranges(spans, len(mean), first.run.chunk_values)]
    header = EntryHeader(
        step=first.position.step,
        parent=first.position.lineage,
        ballot=Ballot(number=0, leader=members[0].name),
        roster=tuple(member.name for member in members),
        samples=samples,
        spans=spans,
        squared_norms=tuple(squared_norm(mean[a:b]) for a, b in pairwise(spans)),
        digest=entry_digest(chunks),
    )
    return Entry(header, b"".join(chunks))


def one_round(
    members: list[Member],
    gradient: Gradient = noisy,
    steps: int | Mapping[str, int] = 1,
    loss: Callable[[Tensor], float] | None = None,
) -> Entry:
    """All train, the entry is applied by all, and their states are equal."""
    for member in members:
        member.train(gradient, steps if isinstance(steps, int) else steps[member.name])
    entry = entry_of(members)
    for member in members:
        member.replica.apply(entry)
        member.parts.settle(codec_named("fp32"), ())
        if loss is not None:
            working = member.parts._working
            member.parts.measure(
                partial(loss, working), member.replica.strategy.union, member.replica.position.step
            )
            assert torch.equal(working, member.replica.parameters)
    assert len({member.replica.compute_state_digest() for member in members}) == 1
    return entry


def swarm(run: RunConfig, names: str = "abcd") -> list[Member]:
    """Peers that have been through their first round, in which all train all."""
    members = [Member(name, run) for name in names]
    one_round(members)
    return members


def part_of(member: Member) -> Tensor:
    return member.parts.share.coordinates


@pytest.mark.parametrize("names", ["ab", "abcd"])
@pytest.mark.parametrize("by", ["tensor", "block", "random"])
def test_one_plain_step_on_the_same_data_is_strategy_sync_to_the_bit(by: Any, names: str) -> None:
    """T11; weight decay and all."""
    run = part_run(by, **PLAIN | {"weight_decay": 0.5})
    members = [Member(name, run) for name in names]
    sync = Replica(tiny_model(), run.model_copy(update={"strategy": "sync"}), FINGERPRINT)
    for step in range(6):
        one_round(members)
        mean = noisy(sync.parameters, PeerId("a"), step)
        codec = codec_named("fp32")
        header = EntryHeader(
            step=step,
            parent=sync.position.lineage,
            ballot=Ballot(number=0, leader=PeerId("a")),
            roster=(PeerId("a"),),
            samples=(8,),
            spans=(0, len(mean)),
            squared_norms=(squared_norm(mean),),
            digest=entry_digest([codec.encode(mean)]),
        )
        sync.apply(Entry(header, codec.encode(mean)))
        assert torch.equal(members[0].replica.parameters, sync.parameters)


@pytest.mark.parametrize("by", ["tensor", "block", "random"])
def test_what_others_own_stays_as_it_was_whatever_the_optimizer_does(by: Any) -> None:
    """T11: to the bit, under Adam's momentum and weight decay."""
    members = swarm(part_run(by, kind="adamw", weight_decay=0.5))
    for _ in range(3):
        one_round(members, steps=3)
    for member in members:
        before = member.replica.parameters.clone()
        member.train(noisy, 10)
        mine = torch.zeros(len(before), dtype=torch.bool)
        mine[part_of(member)] = True
        assert torch.equal(member.parts._working[~mine], before[~mine])
        assert not (member.parts._working[mine] == before[mine]).any()
        total = member.parts.total[:-PROBE_VALUES].reshape(3, -1)
        assert not total[:, ~mine].any()
        assert total[:, mine].all()


def optimizer64(count: int, decayed: list[tuple[int, int]]) -> FlatOptimizer:
    """AdamW whose state is float64, for identities that float32 would blur."""
    built = build_optimizer(Optimizer(weight_decay=0.3, clip_norm=0.0), [(0, count)], decayed)
    for name, value in vars(built).items():
        if isinstance(value, Tensor):
            setattr(built, name, value.double())
    return built


@pytest.mark.parametrize("by", ["tensor", "block", "random"])
def test_parts_that_go_round_with_their_state_are_trained_as_by_one_owner(by: Any) -> None:
    """T13: as by one optimizer that never changed hands."""
    size, peers, rounds, steps, decayed = 30, 3, 7, 4, [(0, 20)]
    tensors = [(0, 12), (12, 20), (20, 30)]
    theta = torch.linspace(-1, 1, size, dtype=torch.float64)
    shared = optimizer64(size, decayed)
    alone, replay = theta.clone(), optimizer64(size, decayed)

    def share_of(rank: int, turn: int) -> Share:
        mine = coordinates(owners(by, tensors, peers, seed=0, turn=turn), rank)
        own = optimizer64(len(mine), within(mine, decayed))
        own.load({name: each[mine] for name, each in shared.state_tensors().items()}, shared.scalars())
        return Share(mine, True, own, 0.05, 0.0)

    for number in range(rounds):
        brought, scalars = torch.zeros(3 * size + PROBE_VALUES, dtype=torch.float64), {}
        for rank in range(peers):
            working = theta.clone()
            parts = PartSteps(
                SETTINGS, theta, working, len(brought), lambda _, at=rank, turn=number: share_of(at, turn)
            )
            for step in range(steps):
                assert parts.add(INNER * noisy(working, PeerId("a"), number * steps + step), INNER)
            parts.gather()
            brought += parts.total
            scalars = parts.share.optimizer.scalars()
        change, *moved = brought[:-PROBE_VALUES].split(size)
        theta += change
        state = shared.state_tensors()
        shared.load(
            {name: each + by_ for (name, each), by_ in zip(state.items(), moved, strict=True)}, scalars
        )
        for step in range(steps):
            replay.step(alone, noisy(alone, PeerId("a"), number * steps + step), 0.05)
    assert torch.allclose(theta, alone, rtol=0, atol=1e-12)


def test_replicas_carry_the_optimizers_state_from_owner_to_owner() -> None:
    """The same by `apply`, in float32: as if one peer had trained everything all the time."""
    run = part_run("tensor", rotate_every=1, kind="adamw", weight_decay=0.1)
    members, alone = [Member(name, run) for name in "abc"], [Member("a", run)]
    for _ in range(8):
        one_round(members, steps=3)
        one_round(alone, steps=3)
    assert torch.allclose(members[0].replica.parameters, alone[0].replica.parameters, rtol=0, atol=1e-5)
    assert members[0].replica.snapshot().blob != alone[0].replica.snapshot().blob


def test_part_of_a_peer_that_vanished_waits_for_one_round_and_goes_to_others() -> None:
    members = swarm(part_run(kind="adamw"), "abc")
    gone, left = members[1], [members[0], members[2]]
    lost, before = part_of(gone), members[0].replica.parameters.clone()
    one_round(left)
    after = members[0].replica.parameters
    assert torch.equal(after[lost], before[lost])
    assert not torch.equal(after, before)
    taken = torch.cat([part_of(member) for member in left])
    assert torch.equal(taken.sort().values, torch.arange(len(before)))


def test_who_comes_owns_nothing_at_first_and_a_part_after_its_first_round() -> None:
    members = swarm(part_run(), "ac")
    late = Member("b", members[0].replica.run)
    late.replica.load_state(members[0].replica.snapshot())
    late.parts.reset()
    assert late.parts.room == 0
    everybody = [members[0], late, members[1]]
    entry = one_round(everybody)
    assert entry.header.samples == (INNER, 0, INNER)
    assert all(len(part_of(member)) for member in everybody)


def test_who_is_left_without_any_owner_trains_everything() -> None:
    members = swarm(part_run(), "a")
    late = Member("b", members[0].replica.run)
    late.replica.load_state(members[0].replica.snapshot())
    late.parts.reset()
    late.parts.take_over(True)
    before = late.replica.parameters.clone()
    one_round([late])
    assert not (late.replica.parameters == before).any()
    assert len(part_of(late)) == len(before)


def test_peers_who_train_everything_are_averaged_by_their_samples() -> None:
    run = part_run(**PLAIN)
    members = [Member("a", run), Member("b", run)]
    start = members[0].replica.parameters.clone()
    one_round(
        members,
        lambda theta, peer, step: torch.full_like(theta, 1.0 if peer == "a" else 4.0),
        {"a": 2, "b": 1},
    )
    expected = start - 0.01 * (2 * 2 * 1.0 + 1 * 4.0) / 3
    assert torch.allclose(members[0].replica.parameters, expected, atol=1e-6)


@pytest.mark.parametrize("gamma", ["1", "1/n"])
def test_union_is_the_sum_of_all_changes_times_gamma(gamma: Any) -> None:
    members = swarm(part_run(gamma=gamma, **PLAIN))
    start = members[0].replica.parameters.clone()
    one_round(members, lambda theta, peer, step: torch.ones_like(theta), 5)
    share = {"1": 1.0, "1/n": 0.25}[gamma]
    assert torch.allclose(members[0].replica.parameters, start - 0.05 * share, atol=1e-6)


@pytest.mark.parametrize("gamma", ["1", "auto"])
def test_a_peer_that_restarts_goes_on_as_if_it_had_not(gamma: Any) -> None:
    """T16: the state is all there is, ownership, momentum and gamma included."""
    run = part_run("block", rotate_every=2, gamma=gamma, kind="adamw")
    members = swarm(run, "abc")
    one_round(members, steps=2, loss=lambda theta: float(theta.square().sum()))
    for member in members:
        member.train(noisy, 0)
    snapshot = members[0].replica.snapshot()
    back = [Member(name, run) for name in "abc"]
    for member in back:
        member.replica.load_state(snapshot)
        member.parts.reset()
    for member in members:
        member.parts.reset()  # what it measured is gone, too
    for _ in range(5):
        assert one_round(members, steps=2).header == one_round(back, steps=2).header
    assert back[0].replica.compute_state_digest() == members[0].replica.compute_state_digest()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_model_on_a_device_trains_its_part_as_one_on_the_cpu(device: str) -> None:
    """With a copy on the CPU, too: what is stepped is on the CPU, and the copy follows."""
    run = part_run("block", kind="adamw")
    members = [Member("a", run), Member("b", run)]
    moved = members[1]
    moved.replica.move_model(torch.device(device))
    moved.parts = moved.replica.contributor(moved.name, unmeasured).gathered
    for _ in range(3):
        one_round(members, lambda theta, peer, step: noisy(theta.cpu(), peer, step).to(theta.device), steps=2)
        at = torch.cat([parameter.detach().reshape(-1) for parameter in moved.replica.model.parameters()])
        assert at.device.type == device
        assert torch.equal(at.cpu(), members[0].replica.parameters)


# -- gamma and cohesion --------------------------------------------------------------------------------------


def coupled(theta: Tensor) -> Tensor:
    """Gradient of `coupled_loss`: every coordinate knows of every other."""
    return 0.02 * theta + 0.2 * theta.mean()


def coupled_loss(theta: Tensor) -> float:
    return float(0.01 * theta.square().sum() + 0.1 * len(theta) * theta.mean() ** 2)


def drawn_together(theta: Tensor, peer: PeerId, step: int) -> Tensor:
    return coupled(theta)


def test_gamma_falls_where_parts_undo_each_other_and_all_replicas_take_the_same() -> None:
    members = swarm(part_run("block", gamma="auto", **{**PLAIN, "lr": 0.2}))
    gammas = []
    for _ in range(4):
        one_round(members, drawn_together, 60, coupled_loss)
        unions = [member.replica.strategy.union for member in members]
        assert all(unions)
        gammas.append(unions[0].gamma)
        assert {union.gamma for union in unions} == {gammas[-1]}
    assert gammas[0] == 0.25  # nothing was measured yet
    assert all(gamma < 1.0 for gamma in gammas)
    assert coupled_loss(members[0].replica.parameters) < coupled_loss(swarm(part_run())[0].replica.parameters)


def test_cohesion_is_what_the_loss_says_of_the_round_before() -> None:
    members = swarm(part_run("block", **{**PLAIN, "lr": 0.2}))
    before = members[0].replica.parameters.clone()
    changes = []
    for member in members:
        own = before.clone()
        for _ in range(40):
            own[part_of(member)] -= 0.2 * coupled(own)[part_of(member)]
        changes.append(own - before)
    one_round(members, drawn_together, 40, coupled_loss)
    one_round(members, drawn_together, 1, coupled_loss)
    found = members[0].replica.strategy.cohesion
    assert found is not None
    at = coupled_loss(before)
    assert found.union == pytest.approx(coupled_loss(before + torch.stack(changes).sum(0)) - at, rel=1e-3)
    assert found.parts == pytest.approx(sum(coupled_loss(before + each) - at for each in changes), rel=1e-3)
    assert found.eats_the_gains


def test_cohesion_is_not_told_when_somebody_who_owned_a_part_has_gone() -> None:
    members = swarm(part_run("block"))
    one_round(members, loss=coupled_loss)
    one_round(members[:3], loss=coupled_loss)
    assert members[0].replica.strategy.cohesion is None
    one_round(members[:3], loss=coupled_loss)
    assert members[0].replica.strategy.cohesion is not None


def test_a_loss_that_is_no_number_counts_as_very_bad() -> None:
    members = swarm(part_run("block", gamma="auto"))
    one_round(members, loss=lambda theta: float("nan"))
    one_round(members)
    assert members[0].replica.strategy.union is not None
    assert members[0].replica.strategy.union.gamma == 1.0  # all are as bad: the largest
    assert members[0].replica.parameters.isfinite().all()


def test_mean_squares_stay_above_zero_when_a_peer_says_otherwise() -> None:
    members = swarm(part_run(kind="adamw"), "ab")
    for member in members:
        member.train(noisy, 1)
    numel = members[0].replica.numel
    members[1].parts.total[2 * numel : 3 * numel] = -1.0
    entry = entry_of(members)
    for member in members:
        member.replica.apply(entry)
        member.parts.settle(codec_named("fp32"), ())
        assert (member.replica.strategy.optimizer.state_tensors()["square_mean"] >= 0).all()
    one_round(members)
    assert members[0].replica.parameters.isfinite().all()


# -- run files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"sync": Sync(outer=Outer(every=30))}, r"sync\.outer\.every must be 0"),
        ({"delay": 1}, "nobody knows where to take the next steps from"),
        ({"audit": 1.0}, "what a peer has brought is gone"),
        ({"payload": "lora", "task": CausalLmTask()}, "the factors of an adapter"),
        ({"aggregation": "median"}, "nobody to compare it with"),
        ({"codec": "fp16"}, "lose its small values"),
        ({"optimizer": Optimizer(kind="lamb")}, "length of whole tensors"),
        ({"target_batch_size": 8}, "no peer takes a step"),
        ({"data": "leased"}, "with which it was never tried"),
    ],
)
def test_run_files_that_cannot_work_are_refused_by_the_field(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        RunConfig(**{"strategy": "partition", "codec": "fp32", **fields})
