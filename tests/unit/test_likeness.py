"""Who stands out among the members of a round, and after how many rounds it is said. Numbers are drawn with
fixed seeds; that real gradients behave like these is shown in `tests/swarm/test_robust_training.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from p2ptrain.gradients.aggregation import about_squared_norm
from p2ptrain.gradients.likeness import ODD_ROUNDS, Likeness, StoodOut, Watch
from p2ptrain.records import PeerId

PEERS = [PeerId(name) for name in "ABCDE"]
NUMEL = 2000
TRUE = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0))


def add(likeness: Likeness, ranks: Sequence[int], totals: Sequence[Tensor], samples: Sequence[int]) -> None:
    likeness.add(ranks, totals, samples, [about_squared_norm(total) for total in totals])


def total(number: int, samples: int, noise: float = 3.0) -> Tensor:
    """Sum over so many samples of gradients that are mostly noise."""
    chance = torch.Generator().manual_seed(number)
    return samples * TRUE + noise * samples**0.5 * torch.randn(NUMEL, generator=chance)


def seen(totals: Sequence[Tensor], samples: Sequence[int]) -> Likeness:
    """In two chunks."""
    likeness = Likeness()
    for part in (slice(0, 700), slice(700, NUMEL)):
        add(likeness, range(len(totals)), [total[part] for total in totals], samples)
    return likeness


LIES: dict[str, Callable[[Tensor], Tensor]] = {
    "flipped": lambda sound: -sound,
    "shortened and flipped": lambda sound: -0.1 * sound,
    "constant": lambda sound: torch.full_like(sound, float(sound.abs().max())),
    "noise": lambda sound: torch.randn(NUMEL, generator=torch.Generator().manual_seed(99)) * sound.std(),
    "nothing": torch.zeros_like,
    "ten times as long": lambda sound: 10 * sound,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
@pytest.mark.parametrize("members", [3, 4, 5])
def test_liar_stands_out_among_honest_members(members: int, lie: Callable[[Tensor], Tensor]) -> None:
    totals = [total(number, 16) for number in range(members)]
    totals[1] = lie(totals[1])
    assert seen(totals, [16] * members).odd() == [1]


def test_nobody_stands_out_among_honest_members_when_some_bring_few_samples() -> None:
    samples = [16, 16, 1, 2, 64]
    assert seen([total(number, count) for number, count in enumerate(samples)], samples).odd() == []


def test_ranks_are_those_in_the_roster_when_a_member_brought_nothing() -> None:
    likeness = Likeness()
    add(likeness, [0, 2, 3, 4], [total(0, 16), total(2, 16), -total(3, 16), total(4, 16)], [16] * 4)
    assert likeness.odd() == [3]


def test_nothing_can_be_told_of_two_members_or_of_gradients_with_nothing_in_common() -> None:
    assert seen([total(0, 16), -total(1, 16)], [16, 16]).odd() is None
    assert seen([total(number, 16, noise=100.0) for number in range(5)], [16] * 5).odd() is None
    assert Likeness().odd() is None, "a peer that reduces nothing"


def round_with(liar: int | None) -> Likeness:
    totals = [total(number, 16) for number in range(5)]
    if liar is not None:
        totals[liar] = -totals[liar]
    return seen(totals, [16] * 5)


HONEST, LYING = round_with(None), round_with(3)


def test_liar_is_named_after_so_many_rounds_and_again_after_as_many_more() -> None:
    watch = Watch()
    for _ in range(2):
        for _ in range(ODD_ROUNDS - 1):
            assert watch.saw(PEERS, LYING) == []
        assert watch.saw(PEERS, LYING) == [StoodOut(PEERS[3], ODD_ROUNDS)]


def test_nobody_is_named_who_stands_out_in_no_more_rounds_than_not() -> None:
    watch = Watch()
    assert [watch.saw(PEERS, each) for _ in range(5 * ODD_ROUNDS) for each in (LYING, HONEST)] == [[]] * (
        10 * ODD_ROUNDS
    )


def test_liar_is_named_that_behaves_in_one_round_of_four() -> None:
    watch = Watch()
    named = [watch.saw(PEERS, HONEST if number % 4 == 0 else LYING) for number in range(4 * ODD_ROUNDS)]
    assert [StoodOut(PEERS[3], ODD_ROUNDS)] in named


def test_rounds_that_tell_nothing_change_nothing() -> None:
    watch = Watch()
    for _ in range(ODD_ROUNDS - 1):
        watch.saw(PEERS, LYING)
        watch.saw(PEERS[:2], Likeness())
    assert watch.saw(PEERS, LYING) == [StoodOut(PEERS[3], ODD_ROUNDS)]


def test_who_left_is_forgotten() -> None:
    watch = Watch()
    for _ in range(ODD_ROUNDS - 1):
        watch.saw(PEERS, LYING)
    watch.saw([PEERS[0], PEERS[1], PEERS[2], PeerId("X"), PEERS[4]], HONEST)
    assert watch.saw(PEERS, LYING) == []
