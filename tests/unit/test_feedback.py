"""Error feedback: what a codec loses of one step comes with later ones, once, if that step was committed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2ptrain.gradients.accumulator import LARGEST_GRADIENT, Accumulator, Sent
from p2ptrain.gradients.aggregation import mean_chunk
from p2ptrain.gradients.codecs import CODECS, LARGEST, Codec, codec_named
from p2ptrain.gradients.feedback import Owed

torch.set_num_threads(1)  # for so little work, threads only wait for each other

NUMEL, CHUNK = 1500, 1200
lossy = pytest.mark.parametrize(
    "codec", [each for each in CODECS.values() if each.feedback], ids=lambda c: c.name
)
lossless = pytest.mark.parametrize(
    "codec", [each for each in CODECS.values() if not each.feedback], ids=lambda c: c.name
)


def drawn(seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(NUMEL, np.float32))


def sent(codec: Codec, total: Tensor) -> list[Sent]:
    """The contribution, chunk by chunk."""
    return [
        (start, min(start + CHUNK, NUMEL), codec.encode(total[start : start + CHUNK]))
        for start in range(0, NUMEL, CHUNK)
    ]


def decoded(codec: Codec, chunks: list[Sent]) -> Tensor:
    out = torch.empty(NUMEL)
    for start, stop, data in chunks:
        codec.decode(data, out[start:stop])
    return out


# -- a member's contributions --------------------------------------------------------------------------------


@lossy
@given(seeds=st.lists(st.tuples(st.integers(0, 2**32), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=20)
def test_contributions_add_up_to_the_gradients_and_what_is_owed_whether_attempts_are_aborted_or_not(
    codec: Codec, seeds: list[tuple[int, bool]]
) -> None:
    accumulator = Accumulator(NUMEL)
    gradients, given_away = torch.zeros(NUMEL, dtype=torch.float64), torch.zeros(NUMEL, dtype=torch.float64)
    for seed, committed in seeds:
        accumulator.add(drawn(seed), 1)
        gradients += drawn(seed).double()
        before = accumulator.total.clone()
        chunks = sent(codec, accumulator.total)
        assert torch.equal(accumulator.total, before)  # an attempt alone changes nothing
        if committed:
            given_away += decoded(codec, chunks).double()
            accumulator.settle(codec, chunks)
            assert accumulator.samples == 0
    assert torch.allclose(given_away + accumulator.total.double(), gradients, atol=1e-4)


@lossy
def test_contribution_owes_exactly_what_its_codec_lost(codec: Codec) -> None:
    accumulator = Accumulator(NUMEL)
    accumulator.add(drawn(1), 4)
    chunks = sent(codec, accumulator.total)
    accumulator.settle(codec, chunks)
    assert torch.equal(accumulator.total, drawn(1) - decoded(codec, chunks))
    assert accumulator.total.any()


@lossy
def test_what_is_owed_waits_when_the_next_round_gets_no_samples(codec: Codec) -> None:
    accumulator = Accumulator(NUMEL)
    accumulator.add(drawn(1), 4)
    accumulator.settle(codec, sent(codec, accumulator.total))
    owed = accumulator.total.clone()
    accumulator.settle(codec, [])
    assert torch.equal(accumulator.total, owed)


@lossy
def test_total_can_always_be_encoded_when_as_much_as_can_be_is_owed(codec: Codec) -> None:
    """What was sent is the opposite of the total: the most that any codec could be off by."""
    accumulator = Accumulator(NUMEL)
    accumulator.total.fill_(LARGEST)
    accumulator.settle(codec, sent(codec, torch.full((NUMEL,), -LARGEST)))
    assert accumulator.total.abs().max() <= LARGEST_GRADIENT
    assert 2.0**24 * LARGEST_GRADIENT + LARGEST_GRADIENT <= LARGEST


@lossless
def test_nothing_is_owed_when_the_codec_says_so(codec: Codec) -> None:
    accumulator = Accumulator(NUMEL)
    accumulator.add(drawn(1), 4)
    accumulator.settle(codec, [])
    assert not accumulator.total.any()
    assert accumulator.samples == 0


# -- a reducer's means ---------------------------------------------------------------------------------------


@lossy
@given(seeds=st.lists(st.tuples(st.integers(0, 2**32), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=20)
def test_means_add_up_to_what_was_averaged_and_what_is_owed_whether_attempts_are_aborted_or_not(
    codec: Codec, seeds: list[tuple[int, bool]]
) -> None:
    owed = Owed(codec, 0, NUMEL)
    wanted, got = torch.zeros(NUMEL, dtype=torch.float64), torch.zeros(NUMEL, dtype=torch.float64)
    for seed, committed in seeds:
        attempt = owed.moved(0, NUMEL)
        chunks = [
            attempt.encode(start, drawn(seed)[start : start + CHUNK]) for start in range(0, NUMEL, CHUNK)
        ]
        if committed:
            owed = attempt
            wanted += drawn(seed).double()
            got += torch.cat([out for _, out in chunks]).double()
    assert torch.allclose(got + owed._lost.double(), wanted, atol=1e-4)


@lossy
def test_mean_is_what_everyone_decodes_and_the_same_again_when_the_attempt_is_made_anew(codec: Codec) -> None:
    owed = Owed(codec, 0, NUMEL)
    owed.encode(0, drawn(1))
    first, second = owed.moved(0, NUMEL), owed.moved(0, NUMEL)
    encoded, out = first.encode(0, drawn(2))
    assert second.encode(0, drawn(2))[0] == encoded
    assert encoded != codec.encode(drawn(2))
    again = torch.empty(NUMEL)
    codec.decode(encoded, again)
    assert torch.equal(out, again)


@lossy
def test_mean_comes_out_the_same_whatever_order_the_chunks_are_ready_in(codec: Codec) -> None:
    base = Owed(codec, 100, 100 + NUMEL)
    base.encode(100, drawn(1))
    outs = []
    for starts in ([0, CHUNK], [CHUNK, 0]):
        attempt = base.moved(100, 100 + NUMEL)
        outs.append({at: attempt.encode(100 + at, drawn(2)[at : at + CHUNK])[0] for at in starts})
    assert outs[0] == outs[1]


@lossy
@pytest.mark.parametrize(
    ("start", "stop", "kept"),
    [
        (100, 1600, (100, 1600)),
        (50, 1650, (100, 1600)),
        (200, 250, (200, 250)),
        (1500, 1900, (1500, 1600)),
        (0, 99, (0, 0)),
    ],
)
def test_reducer_still_owes_what_both_spans_have_when_its_span_moves(
    codec: Codec, start: int, stop: int, kept: tuple[int, int]
) -> None:
    owed = Owed(codec, 100, 100 + NUMEL)
    owed.encode(100, drawn(1))
    before = dict(zip(range(100, 100 + NUMEL), owed._lost.tolist(), strict=True))
    after = dict(zip(range(start, stop), owed.moved(start, stop)._lost.tolist(), strict=True))
    assert after == {at: before[at] if at in range(*kept) else 0.0 for at in range(start, stop)}


@lossy
def test_mean_can_be_encoded_when_what_is_owed_makes_it_too_large(codec: Codec) -> None:
    owed = Owed(codec, 0, 1)
    owed._lost.fill_(LARGEST)
    assert owed.encode(0, torch.full((1,), LARGEST))[1].abs().item() <= LARGEST


@lossless
def test_mean_is_encoded_as_it_is_when_the_codec_owes_nothing(codec: Codec) -> None:
    owed = Owed(codec, 0, NUMEL)
    for _ in range(2):
        assert owed.encode(0, drawn(1))[0] == codec.encode(drawn(1))
        owed = owed.moved(0, NUMEL)


# -- both together -------------------------------------------------------------------------------------------


@lossy
def test_many_steps_move_as_far_as_their_gradients_when_each_alone_is_rounded_coarsely(codec: Codec) -> None:
    """Values far below half a level of their block never get through alone; with what is owed they do, a few
    steps late."""
    small = torch.full((NUMEL,), 0.03)
    small[::50] = 1.0
    members, owed = [Accumulator(NUMEL) for _ in range(3)], Owed(codec, 0, NUMEL)
    steps, moved = 200, torch.zeros(NUMEL)
    for _ in range(steps):
        parts = []
        for member in members:
            member.add(small, 1)
            chunks = sent(codec, member.total)
            parts.append(decoded(codec, chunks))
            member.settle(codec, chunks)
        moved += owed.encode(0, mean_chunk(parts, [1, 1, 1]))[1]
    assert (moved - steps * small).abs().max() < 4  # without, int4 would be 6 behind


def test_int4_without_feedback_would_never_move_a_small_value() -> None:
    """The measure itself."""
    small = torch.full((64,), 0.03)
    small[0] = 1.0
    out = torch.empty(64)
    codec_named("int4").decode(codec_named("int4").encode(small), out)
    assert not out[1:].any()
