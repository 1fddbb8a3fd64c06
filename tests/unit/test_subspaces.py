"""Strategy `partition`: who owns what, and how parts that were trained apart fit together."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from p2ptrain.replica.subspaces import (
    NOTHING,
    PROBE_VALUES,
    By,
    Cohesion,
    Probe,
    candidates,
    chosen,
    coordinates,
    owners,
    power,
    steps_behind,
    turn_of,
    union_of_mean,
    within,
)

TENSORS = [(0, 600), (600, 640), (640, 1000), (1000, 1012)]
BYS: list[By] = ["tensor", "block", "random"]


@pytest.mark.parametrize("by", BYS)
@given(members=st.integers(1, 9), turn=st.integers(0, 20))
def test_each_coordinate_has_exactly_one_owner(by: By, members: int, turn: int) -> None:
    """T11: the masks of all parts add up to 1."""
    of = owners(by, TENSORS, members, seed=3, turn=turn)
    masks = torch.zeros(1012)
    for rank in range(members):
        masks[coordinates(of, rank)] += 1
    assert torch.equal(masks, torch.ones(1012))


@pytest.mark.parametrize("by", BYS)
def test_parts_follow_from_what_all_know(by: By) -> None:
    """And from nothing else: torch's own generator may stand anywhere."""
    torch.manual_seed(1)
    first = owners(by, TENSORS, 3, seed=3, turn=2)
    torch.manual_seed(2)
    assert torch.equal(owners(by, TENSORS, 3, seed=3, turn=2), first)


def test_random_parts_are_the_same_in_every_version() -> None:
    """Another order would part the replicas of peers that run another version."""
    expected = [0, 1, 2, 0, 1, 1, 1, 2, 0, 2, 1, 2]
    assert owners("random", [(0, 12)], 3, seed=7, turn=1).tolist() == expected


def test_tensors_stay_whole_and_are_shared_out_by_size() -> None:
    of = owners("tensor", TENSORS, 2, seed=0, turn=0)
    assert [of[start:stop].unique().tolist() for start, stop in TENSORS] == [[0], [1], [1], [1]]


def test_random_parts_are_about_equal_and_others_with_another_seed() -> None:
    of = owners("random", [(0, 30_000)], 3, seed=0, turn=0)
    assert torch.bincount(of.long()).tolist() == pytest.approx([10_000] * 3, rel=0.03)
    for changed in (
        owners("random", [(0, 30_000)], 3, seed=1, turn=0),
        owners("random", [(0, 30_000)], 3, 0, 1),
    ):
        assert float((changed == of).float().mean()) == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize("by", ["tensor", "block"])
def test_parts_go_round_and_come_back(by: By) -> None:
    first, *others = (owners(by, TENSORS, 3, seed=0, turn=turn) for turn in range(4))
    assert all(not (other == first).any() for other in others[:2])
    assert torch.equal(others[2], first)


def test_parts_stay_when_none_are_to_go_round() -> None:
    assert [turn_of(step, 0) for step in (0, 5, 1000)] == [0, 0, 0]
    assert [turn_of(step, 3) for step in (0, 2, 3, 7)] == [0, 0, 1, 2]


def test_ranges_are_found_again_among_the_coordinates_of_a_part() -> None:
    mine = torch.tensor([2, 3, 7, 8, 9, 20])
    assert within(mine, [(0, 4), (4, 6), (8, 21)]) == [(0, 2), (3, 6)]
    assert within(mine, []) == []


# -- the union -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [(8, 8), (4, 4, 8, 16)])
def test_union_of_a_rounds_mean_is_what_each_owner_did(samples: tuple[int, ...]) -> None:
    """T11: a scatter of the owners' changes; to the bit where the samples of all are a power of two."""
    of = owners("random", TENSORS, len(samples), seed=1, turn=0)
    changes = [
        torch.randn(1012, generator=torch.Generator().manual_seed(rank)) for rank in range(len(samples))
    ]
    brought = torch.zeros(1012)
    scattered = torch.empty(1012)
    for rank, change in enumerate(changes):
        part = coordinates(of, rank)
        brought[part] += change[part]
        scattered[part] = change[part]
    assert torch.equal(union_of_mean(brought / sum(samples), sum(samples)), scattered)


COUPLED = torch.full((3, 3), 0.6, dtype=torch.float64).fill_diagonal_(1.0)
"""Of three blocks whose curvature off the diagonal is 0.6: Jacobi's method has a spectral radius of 1.2."""


def quadratic(theta: Tensor) -> float:
    """Of 3 blocks of 4 coordinates."""
    blocks = theta.reshape(3, 4)
    return 0.5 * float((blocks * (COUPLED @ blocks)).sum())


def parts_after(theta: Tensor, steps: int) -> list[Tensor]:
    """What each of three owners does alone in so many steps of SGD."""
    changes = []
    of = owners("block", [(0, 12)], 3, seed=0, turn=0)
    for rank in range(3):
        mine, own = coordinates(of, rank), theta.clone()
        for _ in range(steps):
            own[mine] -= 0.1 * (COUPLED @ own.reshape(3, 4)).reshape(-1)[mine]
        changes.append(own - theta)
    return changes


@pytest.mark.parametrize(
    ("gamma", "steps", "converges"), [(1.0, 50, False), (1.0, 5, True), (1.0, 1, True), (1 / 3, 50, True)]
)
def test_union_diverges_where_curvature_couples_what_was_trained_apart_for_long(
    gamma: float, steps: int, converges: bool
) -> None:
    """T12: Jacobi's method, with a spectral radius of 1.2."""
    theta = torch.ones(12, dtype=torch.float64)
    for _ in range(2000 // steps):
        theta += gamma * torch.stack(parts_after(theta, steps)).sum(0)
    loss = quadratic(theta) / quadratic(torch.ones(12, dtype=torch.float64))
    assert loss < 1e-3 if converges else loss > 1e3


# -- how well parts fit together -----------------------------------------------------------------------------


def test_cohesion_defect_is_the_curvature_between_the_parts() -> None:
    """Exactly so on a quadratic: Σ over pairs of Δ_pᵀ H Δ_q."""
    theta = torch.linspace(1, 2, 12, dtype=torch.float64)
    changes = parts_after(theta, 20)
    before = quadratic(theta)
    union = quadratic(theta + torch.stack(changes).sum(0)) - before
    found = Cohesion(union=union, parts=sum(quadratic(theta + each) - before for each in changes))
    blocks = [each.reshape(3, 4) for each in changes]
    between = sum(float((one * (COUPLED @ other)).sum()) for one, other in combinations(blocks, 2))
    assert found.defect == pytest.approx(between, rel=1e-12)
    assert found.parts < 0 < found.defect
    assert found.eats_the_gains


def test_gains_are_eaten_when_half_of_them_are_lost() -> None:
    assert not Cohesion(union=-0.16, parts=-0.3).eats_the_gains
    assert Cohesion(union=-0.14, parts=-0.3).eats_the_gains
    assert not Cohesion(union=-0.4, parts=-0.3).eats_the_gains
    assert Cohesion(union=0.3, parts=0.1).eats_the_gains


def probe(*whole: float, peers: float = 2.0, parts: float = 2.0) -> Probe:
    return Probe(peers, (whole[0], whole[1], whole[2], whole[3]), parts, -0.3)


def test_what_peers_measured_comes_as_it_went() -> None:
    measured = probe(0.1, -0.2, -0.3, -0.1)
    assert len(measured.values()) == PROBE_VALUES
    assert Probe.of(measured.values()) == measured


def test_cohesion_is_told_only_when_all_owners_measured_their_part() -> None:
    assert probe(0.4, 0, 0, 0).cohesion(2) == Cohesion(union=0.2, parts=-0.3)
    assert probe(0.4, 0, 0, 0).cohesion(3) is None
    assert NOTHING.cohesion(0) is None


def test_gamma_is_that_with_the_least_loss_and_the_larger_of_equal_ones() -> None:
    assert candidates(8) == (1.0, 0.5, 0.25, 0.125)
    assert chosen("auto", 8, probe(0.4, -0.1, -0.2, -0.1), before=1.0) == 0.25
    assert chosen("auto", 8, probe(0.4, 0.3, 0.2, 0.1), before=1.0) == 0.125
    assert chosen("auto", 8, probe(-0.2, -0.2, -0.1, 0), before=0.25) == 1.0


def test_gamma_stays_while_nobody_has_measured_and_begins_with_the_average() -> None:
    assert chosen("auto", 4, NOTHING, before=0.5) == 0.5
    assert chosen("auto", 4, NOTHING, before=0.0) == 0.25
    assert chosen("1", 4, probe(9, 0, 0, 0), before=0.5) == 1.0
    assert chosen("1/n", 4, probe(-9, 0, 0, 0), before=0.5) == 0.25


def test_powers_are_within_rounding_of_the_librarys() -> None:
    for exponent in (0, 1, 7, 1000):
        assert power(0.99, exponent) == pytest.approx(math.pow(0.99, exponent), rel=1e-12)


def test_an_entry_stands_for_at_least_one_step() -> None:
    assert steps_behind(samples=96, owners=3, inner_batch_size=8) == 4
    assert steps_behind(samples=7, owners=3, inner_batch_size=8) == 1
