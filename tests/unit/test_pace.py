"""How fast a peer can send, from what it was seen to deliver in an attempt.

Not covered: what the kernel confirms, see `tests/swarm/test_tls.py`.
"""

import pytest

from p2ptrain.allreduce import LOOK_SECONDS, STRETCH_SECONDS, Pace


class Link:
    """Delivers what it is given, at a rate."""

    def __init__(self) -> None:
        self.now, self.delivered = 5.0, 0.0
        self.pace = Pace(lambda: round(self.delivered))

    def send(self, seconds: float, bytes_per_second: float, frame_seconds: float = 0.01) -> None:
        """One frame after the other with no pause."""
        until = self.now + seconds
        self.pace.look(self.now)
        while self.now < until:
            self.now += frame_seconds
            self.delivered += frame_seconds * bytes_per_second
            self.pace.look(self.now)

    def rest(self, seconds: float) -> None:
        self.now += seconds


def test_link_that_is_full_for_a_while_is_taken_for_what_it_carried_then() -> None:
    link = Link()
    link.send(1.0, 1e6)
    link.send(1.0, 4e6)
    link.send(3.0, 2e6)  # its receivers are busy
    assert link.pace.bytes_per_second == pytest.approx(4e6)


def test_pauses_in_which_there_was_nothing_to_send_say_nothing() -> None:
    link = Link()
    for _ in range(3):
        link.send(1.0, 1e6)
        link.rest(60)
    assert link.pace.bytes_per_second == pytest.approx(1e6)


def test_frames_that_take_longer_than_a_stretch_are_counted_once() -> None:
    link = Link()
    for _ in range(5):
        for lane in range(3):  # three end at nearly the same time
            link.now += 1.2 if lane == 0 else 0.001
            link.delivered += 500_000
            link.pace.look(link.now)
    assert link.pace.bytes_per_second == pytest.approx(1.5e6 / 1.202, rel=0.01)


def test_attempt_too_short_for_a_stretch_says_nothing() -> None:
    link = Link()
    link.send(0.9 * STRETCH_SECONDS, 8e6)
    assert link.pace.bytes_per_second is None


def test_who_delivered_nothing_says_nothing() -> None:
    link = Link()
    link.send(1.0, 0.0)
    assert link.pace.bytes_per_second is None


def test_network_is_not_asked_for_each_frame() -> None:
    asked = 0

    def delivered_bytes() -> int:
        nonlocal asked
        asked += 1
        return asked

    pace = Pace(delivered_bytes)
    for number in range(1000):
        pace.look(number / 1000)
    assert 0 < asked <= 1 / LOOK_SECONDS + 1
