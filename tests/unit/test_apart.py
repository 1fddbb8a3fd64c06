"""Strategy `local` is what the papers say it is: identities that hold whatever is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from replicas import FINGERPRINT, next_entry, small_replica, small_run, unmeasured
from torch import Tensor, nn

from p2ptrain.config import Local, Optimizer, RunConfig, Schedule
from p2ptrain.errors import LocalFault
from p2ptrain.gradients.aggregation import EmptyRound, mean_chunk
from p2ptrain.gradients.codecs import codec_named
from p2ptrain.gradients.noise import spread_of
from p2ptrain.records import PeerId
from p2ptrain.replica.apart import Agreement, LocalSteps, LocalStrategy, agreement, effective_steps
from p2ptrain.replica.optimizers import FlatOptimizer, build_optimizer, outer_optimizer
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.sync import SyncStrategy

SIZE = 6
Gradient = Callable[[Tensor, int, int, int], Tensor]
"""(parameters, peer, round, inner step) → mean gradient of the inner batch there."""


def optimizer(dtype: torch.dtype = torch.float64, **settings: Any) -> FlatOptimizer:
    """Its state in that dtype, for identities that float32 would blur."""
    config, whole = Optimizer(**{"weight_decay": 0.0, "clip_norm": 0.0, **settings}), [(0, SIZE)]
    built = build_optimizer(config, whole, whole)
    for name, value in vars(built).items():
        if isinstance(value, Tensor) and value.dtype == torch.float32 and value.numel() == SIZE:
            setattr(built, name, value.to(dtype))
    return built


def outer(settings: Local) -> FlatOptimizer:
    config = outer_optimizer(settings)
    return optimizer(kind="sgd", lr=config.lr, momentum=config.momentum, nesterov=True)


class Peer:
    """One that trains apart from θ, in float64."""

    def __init__(self, settings: Local, anchor: Tensor, rate: float, inner: FlatOptimizer) -> None:
        self.working = anchor.clone()
        self.steps = LocalSteps(settings, anchor, self.working, inner, 0.0, lambda: rate)


def trained(
    gradient: Gradient,
    *,
    counts: Sequence[int],
    rounds: int,
    rate: float,
    settings: Local,
    inner: Callable[[], FlatOptimizer],
    start: Tensor,
) -> Tensor:
    """θ after so many rounds of peers that take `counts` inner steps each."""
    theta, size = start.clone(), settings.inner_batch_size
    peers = [Peer(settings, theta, rate, inner()) for _ in counts]
    outer_step = outer(settings)
    for number in range(rounds):
        for rank, (peer, count) in enumerate(zip(peers, counts, strict=True)):
            for step in range(count):
                assert peer.steps.add(size * gradient(peer.working, rank, number, step), size)
            peer.steps.gather()
        samples = [peer.steps.samples for peer in peers]
        mean = torch.stack([peer.steps.total for peer in peers]).sum(0) / sum(samples)
        if settings.weighting == "fednova":
            mean *= effective_steps(samples, size)
        outer_step.step(theta, mean, settings.outer_learning_rate)
        for peer in peers:
            peer.working.copy_(theta)
            peer.steps.settle(codec_named("fp32"), ())
    return theta


def averaging(**changes: Any) -> Local:
    settings = {"inner_batch_size": 4, "outer_learning_rate": 1.0, "outer_momentum": 0.0}
    return Local(**{**settings, **changes})


def noisy(parameters: Tensor, peer: int, number: int, step: int) -> Tensor:
    """Of a quadratic with the same curvature for all, and noise that does not depend on the parameters."""
    generator = torch.Generator().manual_seed(1000 * peer + 100 * number + step)
    curvature = torch.linspace(0.1, 1.0, SIZE, dtype=torch.float64)
    return curvature * parameters + torch.randn(SIZE, generator=generator, dtype=torch.float64)


START = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
SGD: list[dict[str, Any]] = [
    {"momentum": 0.0, "nesterov": False},
    {"momentum": 0.9, "nesterov": False},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.3},
]


@pytest.mark.parametrize("settings", SGD, ids=["plain", "momentum", "nesterov", "weight decay"])
def test_one_inner_step_is_synchronous_training_when_the_inner_optimizer_is_sgd(
    settings: dict[str, Any],
) -> None:
    """T7: it is linear, so momentum kept by each peer averages to that of the averaged gradient."""
    found = trained(
        noisy,
        counts=[1, 1, 1],
        rounds=6,
        rate=0.05,
        settings=averaging(),
        inner=lambda: optimizer(kind="sgd", **settings),
        start=START,
    )
    theta, sync = START.clone(), optimizer(kind="sgd", **settings)
    for number in range(6):
        mean = torch.stack([noisy(theta, peer, number, 0) for peer in range(3)]).mean(0)
        sync.step(theta, mean, 0.05)
    assert torch.allclose(found, theta, rtol=0, atol=1e-12)


def test_one_inner_step_with_outer_momentum_is_synchronous_nesterov() -> None:
    """T8: at the product of both rates."""
    found = trained(
        noisy,
        counts=[1, 1],
        rounds=8,
        rate=0.25,
        settings=averaging(outer_learning_rate=0.5, outer_momentum=0.75),
        inner=lambda: optimizer(kind="sgd", momentum=0.0),
        start=START,
    )
    theta, sync = START.clone(), optimizer(kind="sgd", momentum=0.75, nesterov=True)
    for number in range(8):
        sync.step(theta, torch.stack([noisy(theta, peer, number, 0) for peer in range(2)]).mean(0), 0.125)
    assert torch.allclose(found, theta, rtol=0, atol=1e-12)


def test_one_inner_step_is_not_synchronous_training_when_the_inner_optimizer_is_adamw() -> None:
    """T8: the identity is linear training's alone."""
    found = trained(
        noisy,
        counts=[1, 1],
        rounds=6,
        rate=0.05,
        settings=averaging(),
        inner=lambda: optimizer(kind="adamw"),
        start=START,
    )
    theta, sync = START.clone(), optimizer(kind="adamw")
    for number in range(6):
        sync.step(theta, torch.stack([noisy(theta, peer, number, 0) for peer in range(2)]).mean(0), 0.05)
    assert (found - theta).abs().max() > 1e-3


def test_averaging_later_changes_nothing_on_a_quadratic_that_all_share() -> None:
    """T9: with the same noise in the same order. Where curvatures differ it does change something."""

    def in_order(parameters: Tensor, peer: int, number: int, step: int, every: int) -> Tensor:
        return noisy(parameters, peer, 0, number * every + step)

    def unlike(parameters: Tensor, peer: int, number: int, step: int, every: int) -> Tensor:
        return (1 + peer) * in_order(parameters, peer, number, step, every)

    def after(gradient: Any, every: int) -> Tensor:
        return trained(
            lambda *at: gradient(*at, every),
            counts=[every] * 2,
            rounds=12 // every,
            rate=0.1,
            settings=averaging(),
            inner=lambda: optimizer(kind="sgd", momentum=0.0),
            start=START,
        )

    assert torch.allclose(after(in_order, 12), after(in_order, 1), rtol=0, atol=1e-12)
    assert (after(unlike, 12) - after(unlike, 1)).abs().max() > 1e-2


@pytest.mark.parametrize("peers", [1, 2, 5])
def test_peers_with_the_same_data_are_one_peer_that_trains_alone(peers: int) -> None:
    """T10: and one peer is plain training."""
    found = trained(
        lambda parameters, peer, number, step: noisy(parameters, 0, number, step),
        counts=[7] * peers,
        rounds=3,
        rate=0.05,
        settings=averaging(),
        inner=lambda: optimizer(kind="adamw"),
        start=START,
    )
    theta, alone = START.clone(), optimizer(kind="adamw")
    for number in range(3):
        for step in range(7):
            alone.step(theta, noisy(theta, 0, number, step), 0.05)
    assert torch.allclose(found, theta, rtol=0, atol=1e-12)


def test_unequal_work_moves_the_goal_and_fednova_does_not_let_it() -> None:
    """Two peers with goals +1 and -1, and short steps. By samples, whoever takes three times as many steps
    pulls nine times as hard: by its share and by its way."""

    def pulled(parameters: Tensor, peer: int, number: int, step: int) -> Tensor:
        return parameters - (1.0 if peer == 0 else -1.0)

    def end(weighting: str) -> float:
        found = trained(
            pulled,
            counts=[60, 20],
            rounds=200,
            rate=0.001,
            settings=averaging(weighting=weighting),
            inner=lambda: optimizer(kind="sgd", momentum=0.0),
            start=torch.zeros(SIZE, dtype=torch.float64),
        )
        return float(found.mean())

    assert end("fednova") == pytest.approx(0.75 - 0.25, abs=0.02)
    assert end("samples") == pytest.approx(0.9 - 0.1, abs=0.02)


def test_effective_steps_are_the_steps_when_all_take_equally_many() -> None:
    assert effective_steps([40, 40, 40], 4) == 10
    assert effective_steps([60, 20], 4) == pytest.approx((60 * 15 + 20 * 5) / 80)


def test_an_inner_batch_under_way_does_not_count_and_is_dropped() -> None:
    peer = Peer(averaging(), START.clone(), 0.1, optimizer(kind="sgd", momentum=0.0))
    ones = torch.ones(SIZE, dtype=torch.float64)
    assert peer.steps.add(4 * ones, 4)
    assert peer.steps.add(3 * ones, 3)
    peer.steps.gather()
    assert (peer.steps.samples, peer.steps.room) == (4, 1)
    assert torch.allclose(peer.steps.total, 0.4 * ones, atol=1e-7)
    peer.steps.settle(codec_named("fp32"), ())
    assert (peer.steps.samples, peer.steps.room) == (0, 4)
    assert not peer.steps.total.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    peer = Peer(averaging(), START.clone(), 0.1, optimizer(kind="sgd"))
    assert not peer.steps.add(torch.full((SIZE,), bad, dtype=torch.float64), 4)
    assert peer.steps.room == 4
    assert torch.equal(peer.working, START)


def test_own_steps_that_leave_what_float32_holds_bring_nothing() -> None:
    """T15."""
    peer = Peer(averaging(), START.clone(), 0.1, optimizer(kind="sgd", momentum=0.0))
    ones = torch.ones(SIZE, dtype=torch.float64)
    assert peer.steps.add(4 * ones, 4)
    peer.working[2] = float("nan")
    peer.steps.gather()
    assert (peer.steps.samples, peer.steps.gathered) == (0, True)
    assert not peer.steps.total.any()


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_without_a_dropped_peer_the_average_is_that_of_the_others_by_their_work(dropped: int) -> None:
    """T15: not one to which it brings a zero, which would be a shorter step."""
    counts, peers = (2, 1, 3), []
    for rank, count in enumerate(counts):
        peer = Peer(averaging(), START.float(), 0.1, optimizer(torch.float32, kind="sgd", momentum=0.0))
        for step in range(count):
            assert peer.steps.add(4 * noisy(peer.working, rank, 0, step).float(), 4)
        peer.steps.gather()
        peers.append(peer.steps)
    there = [steps for rank, steps in enumerate(peers) if rank != dropped]
    found = mean_chunk([steps.total for steps in there], [steps.samples for steps in there])
    whole = sum(steps.samples for steps in there)
    assert torch.equal(found, (there[0].total + there[1].total) / torch.tensor(float(whole)))
    idle = mean_chunk(
        [torch.zeros(SIZE) if rank == dropped else steps.total for rank, steps in enumerate(peers)],
        [0 if rank == dropped else steps.samples for rank, steps in enumerate(peers)],
    )
    assert torch.equal(idle, found)


def test_a_round_to_which_nobody_brings_anything_is_refused() -> None:
    """T15."""
    with pytest.raises(EmptyRound, match="none of the 2 members"):
        mean_chunk([torch.zeros(SIZE)] * 2, [0, 0])


def test_what_a_codec_lost_comes_with_the_next_change() -> None:
    codec = codec_named("int4")
    anchor = torch.linspace(-1, 1, 128)
    working = anchor.clone()
    inner = build_optimizer(Optimizer(kind="sgd", momentum=0.0, weight_decay=0.0), [(0, 128)], ())
    steps = LocalSteps(averaging(), anchor, working, inner, 0.0, lambda: 0.1)
    steps.add(4 * torch.linspace(0, 1, 128), 4)
    steps.gather()
    total, data = steps.total.clone(), codec.encode(steps.total)
    decoded = torch.empty(128)
    codec.decode(data, decoded)
    steps.settle(codec, [(0, 128, data)])
    working.copy_(anchor)
    steps.add(4 * torch.zeros(128), 4)
    steps.gather()
    assert torch.allclose(steps.total, total - decoded, atol=1e-6)
    steps.reset()
    steps.add(4 * torch.zeros(128), 4)
    steps.gather()
    assert not steps.total.any()


# -- the warm-up ---------------------------------------------------------------------------------------------

WARM = 3


def warm_run(**fields: Any) -> RunConfig:
    """Its first three rounds are synchronized."""
    warmed = Local(inner_batch_size=4, warmup_rounds=WARM, warmup_batch_size=8, outer_momentum=0.5)
    defaults = {"strategy": "local", "local": warmed, "codec": "fp32", "schedule": Schedule(warmup_steps=2)}
    return small_run(**{**defaults, **fields})


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_warm_up_is_strategy_sync_to_the_last_bit_and_then_the_outer_step_applies(kind: Any) -> None:
    optimizer = Optimizer(kind=kind, lr=0.01)
    replica, sync = (
        small_replica(warm_run(optimizer=optimizer)),
        small_replica(small_run(codec="fp32", schedule=Schedule(warmup_steps=2), optimizer=optimizer)),
    )
    for step in range(WARM):
        assert isinstance(replica.strategy, SyncStrategy)
        for each in (replica, sync):
            each.apply(next_entry(each, step))
        assert torch.equal(replica.parameters, sync.parameters)
    assert isinstance(replica.strategy, LocalStrategy)
    before, entry = replica.parameters.clone(), next_entry(replica, WARM)
    mean = torch.frombuffer(bytearray(entry.payload), dtype=torch.float32)
    replica.apply(entry)
    settings = replica.run.local
    outer_step = settings.outer_learning_rate * (1 + settings.outer_momentum) * mean
    assert torch.allclose(replica.parameters, before - outer_step, atol=1e-6)


@pytest.mark.parametrize("steps", [WARM - 1, WARM, WARM + 1])
def test_a_joiner_has_the_state_that_its_step_needs_and_goes_on_bit_for_bit(steps: int) -> None:
    """T16: while it warms up, when that is over, and later; also for one that stood elsewhere before."""
    replica = small_replica(warm_run())
    for step in range(steps):
        replica.apply(next_entry(replica, step))
    snapshot, ahead = replica.snapshot(), small_replica(warm_run())
    assert len(snapshot.blob) <= replica.max_state_bytes
    for step in range(WARM + 1):
        ahead.apply(next_entry(ahead, step))
    for joiner in (small_replica(warm_run()), ahead):
        joiner.load_state(snapshot)
        straight = small_replica(warm_run())
        straight.load_state(snapshot)
        for step in range(3):
            entry = next_entry(straight, 7 + step)
            for each in (joiner, straight):
                each.apply(entry)
            assert joiner.compute_state_digest() == straight.compute_state_digest()


def test_own_steps_go_on_with_the_optimizer_of_the_warm_up_and_a_joiners_with_a_fresh_one() -> None:
    replica = small_replica(warm_run())
    for step in range(WARM):
        replica.apply(next_entry(replica, step))
    joiner = small_replica(warm_run())
    joiner.load_state(replica.snapshot())
    gradient = torch.linspace(-1, 1, replica.numel)
    moved = []
    for each in (replica, joiner):
        steps = each.contributor(PeerId("me"), unmeasured).gathered
        assert steps.add(4 * gradient, 4)
        steps.gather()
        moved.append(steps.total / 4)
    warm, fresh = moved
    clipped = gradient * min(1.0, 1.0 / float(gradient.norm()))
    rate = replica.run.optimizer.lr
    # The first step of AdamW is as long in each value, whatever the gradient; but for weight decay.
    assert torch.allclose(fresh.abs()[clipped.abs() > 1e-4], torch.tensor(rate), rtol=0.05)
    assert (warm - fresh).norm() > 0.1 * fresh.norm()


# -- how the copies were to each other -----------------------------------------------------------------------


def averaged(changes: Tensor, samples: Sequence[int]) -> Agreement:
    """What is told of a round to which peers bring these changes (float64 [peers, SIZE])."""
    totals = changes * torch.tensor(samples, dtype=torch.float64)[:, None]
    mean = totals.sum(0) / sum(samples)
    entry = next_entry(small_replica())
    header = entry.header.model_copy(
        update={
            "roster": tuple(PeerId(f"p{rank}") for rank in range(len(samples))),
            "samples": tuple(samples),
            "squared_norms": (float(mean.square().sum()),),
        }
    )
    return agreement(header, spread_of(samples, totals @ totals.T), 1.0)


@pytest.mark.parametrize("samples", [(4, 4, 4), (12, 4, 8)])
def test_consensus_distance_and_norm_are_those_of_the_copies_themselves(samples: tuple[int, ...]) -> None:
    changes = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shares = torch.tensor(samples, dtype=torch.float64) / sum(samples)
    mean = (shares[:, None] * changes).sum(0)
    found = averaged(changes, samples)
    assert found.norm == pytest.approx(float(mean.norm()), rel=1e-12)
    expected = (shares * (changes - mean).square().sum(1)).sum().sqrt()
    assert found.consensus_distance == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("samples", [(4, 4, 4), (12, 4, 8)])
def test_cosine_of_changes_is_the_mean_over_pairs(samples: tuple[int, ...]) -> None:
    changes = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    changes /= changes.norm(dim=1, keepdim=True)
    products, weights = changes @ changes.T, torch.outer(*[torch.tensor(samples, dtype=torch.float64)] * 2)
    pairs = ~torch.eye(3, dtype=torch.bool)
    expected = (products * weights)[pairs].sum() / weights[pairs].sum()
    assert averaged(changes, samples).cosine == pytest.approx(float(expected), abs=1e-9)


def test_copies_that_went_the_same_way_agree_and_one_alone_tells_nothing() -> None:
    ones = torch.ones(3, SIZE, dtype=torch.float64)
    same = averaged(ones, (4, 8, 4))
    assert (same.cosine, same.consensus_distance) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-6))
    alone = averaged(ones[:1], (4,))
    assert (alone.cosine, alone.consensus_distance) == (None, None)


def test_average_that_is_shown_is_that_of_the_copies_and_ends_with_the_next_step() -> None:
    replica = small_replica(small_run(strategy="local", codec="fp32"))
    replica.contributor(PeerId("me"), unmeasured)
    entry, before = next_entry(replica), replica.parameters.clone()
    mean = torch.frombuffer(bytearray(entry.payload), dtype=torch.float32)
    assert isinstance(replica.strategy, LocalStrategy)
    replica.strategy.show_average(replica.mean_of(entry), entry.header)
    shown = torch.cat([each.detach().reshape(-1) for each in replica.model.parameters()])
    assert torch.equal(shown, before - mean)
    assert torch.equal(replica.parameters, before)
    replica.apply(entry)
    ended = torch.cat([each.detach().reshape(-1) for each in replica.model.parameters()])
    assert torch.equal(ended, replica.parameters)


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_own_optimizer_keeps_its_state_where_the_model_is(kind: Any) -> None:
    """On a device without memory, where any use of what lies on the CPU fails."""
    there = torch.device("meta")
    own = build_optimizer(Optimizer(kind=kind), [(0, SIZE)], [(0, SIZE)], there)
    own.step(torch.empty(SIZE, device=there), torch.empty(SIZE, device=there), 0.1)
    assert {each.device for each in own.state_tensors().values()} == {there}


def test_model_with_running_statistics_is_refused() -> None:
    """T19: no change carries them, so copies would be averaged without."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(LocalFault, match=r"keeps state in buffers .* running statistics"):
        Replica(model, small_run(strategy="local"), FINGERPRINT)


def test_run_files_that_cannot_work_are_refused_by_the_fields() -> None:
    with pytest.raises(ValueError, match="warmup_rounds"):
        RunConfig(strategy="local", total_steps=100, local=Local(warmup_rounds=100))
    with pytest.raises(ValueError, match="delay"):
        RunConfig(strategy="local", delay=1)
    with pytest.raises(ValueError, match="audit"):
        RunConfig(strategy="local", audit=1.0, codec="fp16")
    with pytest.raises(ValueError, match="inner_batch_size"):
        RunConfig(strategy="local", target_batch_size=8, local=Local(inner_batch_size=16))
