"""When the batch is full: the leader's decision, from what members reported."""

from p2ptrain.protocol.progress import Filling, Full, Pace, decide
from p2ptrain.records import PeerId

A, B, C = PeerId("A"), PeerId("B"), PeerId("C")


def pace(samples: int, in_flight: int, finish_at: float, batch_seconds: float = 1.0) -> Pace:
    return Pace(samples, in_flight, finish_at, batch_seconds)


def test_freeze_comes_at_once_when_what_is_in_flight_fills_the_target() -> None:
    decision = decide({A: pace(0, 8, 1.0), B: pace(0, 8, 1.1)}, expected=0, target=16, min_peers=1, now=0.0)
    assert isinstance(decision, Full)
    assert decision.finishing == (A, B)
    assert decision.cutoff_seconds > 1.1


def test_freeze_waits_when_even_what_is_in_flight_is_too_little() -> None:
    decision = decide({A: pace(8, 8, 1.0)}, expected=0, target=17, min_peers=1, now=0.0)
    assert decision == Filling("16 of 17 samples are done or in flight")


def test_freeze_waits_when_a_fast_peer_will_have_done_another_micro_batch_first() -> None:
    paces = {A: pace(0, 8, 0.1, 0.1), B: pace(0, 8, 1.0, 1.0)}
    assert isinstance(decide(paces, expected=0, target=16, min_peers=1, now=0.0), Filling)


def test_slow_peer_brings_what_it_has_when_the_others_fill_the_target_sooner() -> None:
    paces = {A: pace(8, 8, 0.2, 0.1), B: pace(8, 8, 0.21, 0.1), C: pace(4, 4, 3.0, 3.0)}
    decision = decide(paces, expected=0, target=28, min_peers=1, now=0.1)
    assert isinstance(decision, Full)
    assert decision.finishing == (A, B)
    assert decision.cutoff_seconds < 1.0


def test_freeze_gives_a_newcomer_its_chance_until_the_samples_are_done() -> None:
    paces = {A: pace(0, 16, 1.0)}
    assert isinstance(decide(paces, expected=1, target=16, min_peers=1, now=0.0), Filling)
    paces = {A: pace(16, 16, 2.0)}
    assert decide(paces, expected=1, target=16, min_peers=1, now=1.0) == Full((), 0.0)


def test_freeze_waits_when_fewer_than_min_peers_are_here() -> None:
    assert decide({A: pace(99, 0, 0.0)}, expected=0, target=16, min_peers=2, now=0.0) == Filling(
        "1 of 2 peers are here"
    )


def test_first_micro_batch_gets_a_long_cutoff_when_nothing_was_measured_yet() -> None:
    decision = decide({A: pace(0, 8, 0.0, 0.0)}, expected=0, target=8, min_peers=1, now=0.0)
    assert isinstance(decision, Full)
    assert decision.cutoff_seconds > 10
