"""A round's sums do not depend on the order in which chunks arrive; and were it otherwise, we would know."""

from random import Random

import pytest

from p2ptrain import trainer
from p2ptrain.gradients.aggregation import AGGREGATIONS, mean_chunk
from tests.chaos.replay import every_way

pytestmark = pytest.mark.chaos


def test_recorded_round_gives_the_same_bytes_in_every_arrival_order_with_every_codec_and_rule() -> None:
    figures = every_way(100, width=32, chunk_values=4096)
    assert [each.identical for each in figures] == [each.orders for each in figures]
    assert {each.orders for each in figures} == {100, 10}
    assert {"fp32", "fp16"} <= {each.codec for each in figures}
    assert {each.aggregation for each in figures} == set(AGGREGATIONS)
    assert all(each.members == 4 and min(each.samples) > 0 for each in figures)


def test_replay_tells_when_a_reducer_adds_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = Random(0)

    def in_any_order(totals, samples):  # type: ignore[no-untyped-def]
        return mean_chunk(chance.sample(totals, len(totals)), samples)

    monkeypatch.setattr(trainer, "AGGREGATIONS", {**AGGREGATIONS, "mean": in_any_order})
    figures = {(each.codec, each.aggregation): each for each in every_way(5, width=32, chunk_values=4096)}
    assert figures["fp32", "mean"].identical == 0  # a coarser codec may round the difference away
