"""Whole trainers in runs without audits: who tells some of the others something else is proven to, by what it
has signed, at the first attempt in which it does so, and left out by all.

The liar runs the production code with one thing bent from outside, and signs what it says. Not covered:
leaders whose freezes share no member.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from blake3 import blake3

from p2ptrain import events
from p2ptrain.allreduce import Attempt, Contribution, Rounds
from p2ptrain.court import Told
from p2ptrain.protocol.lineage import joint_digest
from p2ptrain.protocol.roster import freeze_of
from p2ptrain.records import Averaged, Call
from p2ptrain.swarm import clock
from p2ptrain.swarm.memory import MemoryHub
from tests.swarm.training import Trainer, Training, check_replicas, small_run

pytestmark = [pytest.mark.swarm, pytest.mark.virtual]

PEERS, LIAR, BEGINS = 4, "peer1", 3


def play(until: Callable[[list[Trainer]], object], lying: list[str], seed: int = 0) -> list[Trainer]:
    """Train until that holds of the honest peers; from step 3 on, the liar lies."""
    training = Training(MemoryHub(seed), small_run(target_batch_size=40))

    async def story() -> None:
        async with training:
            for number in range(PEERS):
                training.start(f"peer{number}", micro_batch_size=8 - number)
            await training.until_step(BEGINS)
            lying.append(LIAR)
            honest = [trainer for name, trainer in training.peers.items() if name != LIAR]
            await training.until(lambda: until(honest), 60.0)
            check_replicas(training.lives)

    clock.run(story())
    return [life for life in training.lives if life.name != LIAR]


def convicted_and_on(honest: list[Trainer]) -> bool:
    """All have convicted somebody, and are ten steps on."""
    return all(
        life.of(events.PeerConvicted) and life.step >= life.of(events.PeerConvicted)[0].step + 10
        for life in honest
    )


def spoiled(honest: list[Trainer]) -> set[tuple[int, int]]:
    """Attempts that came to nothing since the lies began."""
    return {
        (event.step, event.attempt)
        for life in honest
        for event in life.of(events.RoundAborted)
        if event.step >= BEGINS
    }


@pytest.mark.parametrize("seed", range(3))
def test_leader_that_calls_to_two_freezes_is_out_after_the_first(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed, lying = Rounds._signed, list[str]()

    def telling(self: Rounds, to: Any, call: Call) -> Call:
        if self._swarm.peer_id not in lying or to != "peer3":
            return signed(self, to, call)
        call = call.model_copy(update={"left": (*call.left, 0), "levels": call.levels[1:]})
        freeze = freeze_of(to, call, self.member.last, self.member.rules.values)
        assert freeze is not None
        return call.model_copy(update=self.court.call(freeze, self.member.incarnation))

    monkeypatch.setattr(Rounds, "_signed", telling)
    honest = play(convicted_and_on, lying, seed)
    for life in honest:
        (convicted,) = life.of(events.PeerConvicted)
        assert (convicted.peer, "two different freezes" in convicted.reason) == (LIAR, True)
    assert len(spoiled(honest)) == 1
    assert len({life.lineage_at(life.of(events.PeerConvicted)[0].step + 5) for life in honest}) == 1
    assert not [event for life in honest for event in life.of(events.PeerBenched)]


@pytest.mark.parametrize("seed", range(3))
def test_reducer_that_sends_two_means_is_out_after_the_first(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    contribute, lying = Attempt.contribute, list[str]()

    def contributing(self: Attempt, contribution: Contribution) -> None:
        if self._me in lying:
            outbox = self._outboxes["peer3"]  # type: ignore[index]
            put = outbox.put

            def other(header: Any, payload: Any) -> None:
                if isinstance(header, Averaged) and header.pledge is not None:
                    payload = bytes([*payload[:-3], payload[-3] ^ 1, *payload[-2:]])
                    rank = self._reduction.rank
                    digests = [self._digests[rank, at] for at in range(header.number)]
                    signer = Told(self.freeze, self._swarm, self.told._run, self.told._incarnation)
                    root = joint_digest([*digests, blake3(payload).digest()])
                    header = header.model_copy(update=signer.pledge(rank, root))
                put(header, payload)

            outbox.put = other  # type: ignore[method-assign]
        contribute(self, contribution)

    monkeypatch.setattr(Attempt, "contribute", contributing)
    honest = play(convicted_and_on, lying, seed)
    for life in honest:
        (convicted,) = life.of(events.PeerConvicted)
        assert (convicted.peer, "two different means" in convicted.reason) == (LIAR, True)
    # One more may have begun until everybody knows.
    assert 1 <= len(spoiled(honest)) <= 2


def test_leader_that_signs_for_nothing_is_replaced_at_once_and_left_out_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signed, lying = Rounds._signed, list[str]()

    def telling(self: Rounds, to: Any, call: Call) -> Call:
        call = signed(self, to, call)
        return call.model_copy(update={"signature": "0" * 128}) if self._swarm.peer_id in lying else call

    monkeypatch.setattr(Rounds, "_signed", telling)
    honest = play(lambda honest: all(life.of(events.PeerBenched) for life in honest), lying)
    told = {(event.peer, event.reason) for life in honest for event in life.of(events.PeerBenched)}
    assert told == {(LIAR, f"{LIAR[-8:]} calls without having signed for it")}


def test_reducer_whose_word_is_not_what_it_sent_is_left_out_by_whoever_it_lied_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It sends two means, and signs but one: nobody can prove that to others, and everybody sees it."""
    receive, lying = Attempt.receive, list[str]()

    async def damaged(self: Attempt, sender: Any, header: Any, payload: Any) -> None:
        if sender in lying and isinstance(header, Averaged) and header.pledge is not None:
            changed = bytearray(payload)
            changed[-3] ^= 1 if self._me == "peer3" else 2
            payload = changed
        await receive(self, sender, header, payload)

    monkeypatch.setattr(Attempt, "receive", damaged)
    honest = play(lambda honest: all(life.of(events.PeerBenched) for life in honest), lying)
    assert {event.peer for life in honest for event in life.of(events.PeerBenched)} == {LIAR}
    assert not [event for life in honest for event in life.of(events.PeerConvicted)]


def test_nobody_is_convicted_by_a_pledge_that_was_changed_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A liar that passes on made up pledges of others proves nothing."""
    shown, lying = Told.shown, list[str]()
    asked = 0

    def forged(self: Told, first: int) -> Any:
        nonlocal asked
        told = shown(self, first)
        if self._swarm.peer_id in lying:
            asked += 1
            made = tuple(mean.model_copy(update={"digest": "0" * 64}) for mean in told.means)
            return told.model_copy(update={"means": made})
        return told

    begin = Rounds._begin

    def curious(self: Rounds, freeze: Any) -> None:
        """As if the attempt before had ended in two stories."""
        if self.court._told:
            self.court.compare(next(reversed(self.court._told.values())))
        begin(self, freeze)

    monkeypatch.setattr(Told, "shown", forged)
    monkeypatch.setattr(Rounds, "_begin", curious)
    honest = play(lambda honest: min(life.step for life in honest) > 12, lying)
    assert asked
    assert not [event for life in honest for event in life.of(events.PeerConvicted)]
    assert not [event for life in honest for event in life.of(events.PeerFaulted)]
