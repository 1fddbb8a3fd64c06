"""A round's sums do not depend on the order in which chunks arrive; and were it otherwise, we would know."""

from random import Random

import pytest

from p2ptrain import trainer
from p2ptrain.gradients.aggregation import AGGREGATIONS, mean_chunk
from p2ptrain.gradients.codecs import CODECS
from tests.chaos.replay import every_way

pytestmark = pytest.mark.chaos


def test_recorded_round_gives_the_same_bytes_in_every_arrival_order_with_every_codec_and_rule() -> None:
    usual = ["fp32", "fp16"]
    figures = every_way(50, width=32, chunk_values=4096, codecs=usual)
    figures += every_way(5, width=32, chunk_values=4096, codecs=sorted(CODECS.keys() - set(usual)))
    assert [each.identical for each in figures] == [each.orders for each in figures]
    assert {each.codec for each in figures} == set(CODECS)
    assert {each.aggregation for each in figures} == set(AGGREGATIONS)
    assert all(each.members == 4 and min(each.samples) > 0 for each in figures)


def test_replay_tells_when_a_reducer_adds_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = Random(0)

    def in_any_order(totals, samples):  # type: ignore[no-untyped-def]
        return mean_chunk(chance.sample(totals, len(totals)), samples)

    monkeypatch.setattr(trainer, "AGGREGATIONS", {**AGGREGATIONS, "mean": in_any_order})
    figures = every_way(5, width=32, chunk_values=4096, codecs=["fp32"])
    assert figures[0].identical == 0  # a coarser codec may round the difference away
