"""What happens to a swarm of whole trainers: peers come late, die, are cut off, and come back.

Three peers of uneven pace train on a network with 10 to 50 ms of latency; time is virtual. See `training`.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training import Regression, Trainer, Training, check_replicas, largest_pause, small_run

from p2ptrain import events
from p2ptrain.allreduce import Attempt
from p2ptrain.config import RunConfig
from p2ptrain.errors import DeviceError
from p2ptrain.events import CatchUpBy, WasteCause
from p2ptrain.gradients.accumulator import Sent
from p2ptrain.gradients.codecs import Codec
from p2ptrain.protocol.member import Stage
from p2ptrain.records import Change, PeerId, Terms
from p2ptrain.replica.strategy import Gathered
from p2ptrain.swarm import clock
from p2ptrain.swarm.memory import MemoryHub

pytestmark = [pytest.mark.swarm, pytest.mark.virtual]

PACES = {"anna": (3, 0.1), "bert": (5, 0.17), "carl": (2, 0.05)}
"""(samples, virtual seconds) of each peer's micro-batches."""


def play(
    story: Callable[[Training], Awaitable[None]],
    run: RunConfig | None = None,
    folder: Path | None = None,
    loss: float = 0.0,
) -> None:
    """Tell the story to a swarm that is at step 5; in the end, all that ever lived must agree (I2, I3)."""

    async def whole() -> None:
        async with Training(MemoryHub(seed=1, loss=loss), run, folder) as training:
            for name in PACES:
                start(training, name)
            await training.until_step(5)
            await story(training)
            assert check_replicas(training.lives)

    clock.run(whole())


def start(training: Training, name: str) -> Trainer:
    samples, seconds = PACES.get(name, (2, 0.1))
    every = 5 if training.folder is not None else 0
    return training.start(
        name, micro_batch_size=samples, batch_seconds=seconds, checkpoint_every_steps=every, log_megabytes=1
    )


async def agree(training: Training, step: int) -> None:
    """All that are online get to that step, and have the same log behind them. One that has taken a snapshot
    on the way may have passed over it: then it is the next one that they all were at."""

    def common() -> set[int]:
        been = [{at.step for at in life.positions if at.step >= step} for life in training.peers.values()]
        return set.intersection(*been)

    await training.until(common)
    assert len({life.lineage_at(min(common())) for life in training.peers.values()}) == 1


# -- peers come late -----------------------------------------------------------------------------------------


def test_late_peer_gets_the_swarms_state_from_the_log_when_it_missed_a_few_steps() -> None:
    async def story(training: Training) -> None:
        began = training.now
        dora = start(training, "dora")
        await training.until(lambda: dora.of(events.RoundCommitted))
        await agree(training, dora.step + 3)
        caught_up = dora.of(events.CaughtUp)[0]
        assert (caught_up.how, caught_up.from_step) == (CatchUpBy.LOG, 0)
        assert dora.headers()[-1].roster == ("anna", "bert", "carl", "dora")
        others_go_on(training, began, except_for=dora)

    play(story)


def test_late_peer_gets_the_swarms_state_as_a_snapshot_when_the_log_is_too_short() -> None:
    async def story(training: Training) -> None:
        await training.until_step(80, seconds=300)  # a log of 1 MB holds 62 entries
        began = training.now
        dora = start(training, "dora")
        await training.until(lambda: dora.of(events.RoundCommitted))
        await agree(training, dora.step + 3)
        caught_up = dora.of(events.CaughtUp)[0]
        assert (caught_up.how, caught_up.from_step) == (CatchUpBy.SNAPSHOT, 0)
        assert not dora.of(events.RolledBack)
        others_go_on(training, began, except_for=dora)

    play(story)


def others_go_on(training: Training, began: float, except_for: Trainer) -> None:
    """None of the others waited longer for a step than it used to, but for one heartbeat for the newcomer."""
    for life in training.peers.values():
        if life is not except_for:
            usual = largest_pause(life, 2.0, began)
            assert largest_pause(life, began, training.now) <= usual + training.run.heartbeat_seconds


# -- peers die -----------------------------------------------------------------------------------------------


async def a_freeze(training: Training, *, leads: bool) -> Trainer:
    """Wait until a peer of that role has just begun an attempt."""
    while True:
        for life in training.peers.values():
            assert life.peer is not None
            member = life.peer.rounds.member
            if member.stage is Stage.REDUCING and (member.leader is not None) == leads:
                return life
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("silently", [False, True], ids=["and the others hear of it", "silently"])
@pytest.mark.parametrize("leads", [True, False], ids=["leader", "member"])
@pytest.mark.parametrize("milliseconds", range(0, 300, 30))
def test_survivors_share_one_state_and_lose_no_sample_when_a_peer_dies_in_a_round(
    milliseconds: int, leads: bool, silently: bool
) -> None:
    a_death_in_a_round(milliseconds, leads, silently, small_run())


@pytest.mark.parametrize("leads", [True, False], ids=["leader", "member"])
@pytest.mark.parametrize("milliseconds", [0, 60, 150])
def test_the_same_holds_when_the_next_step_is_computed_meanwhile(milliseconds: int, leads: bool) -> None:
    a_death_in_a_round(milliseconds, leads, True, small_run(delay=1))


def a_death_in_a_round(milliseconds: int, leads: bool, silently: bool, run: RunConfig) -> None:
    async def story(training: Training) -> None:
        victim = await a_freeze(training, leads=leads)
        step = victim.step
        await asyncio.sleep(milliseconds / 1000)
        brought = {
            life.name: life.contributed()
            for life in training.lives
            if life is not victim and life.step == step
        }
        if silently:
            training.hub.partition([[victim.name]])
        await training.kill(victim.name)

        await agree(training, step + 2)
        header = next(iter(training.peers.values())).headers()[step]
        counted = dict(zip(header.roster, header.samples, strict=True))
        for name, samples in brought.items():
            assert counted[name] >= samples

    play(story, run)


def test_last_peer_trains_on_when_all_others_die() -> None:
    async def story(training: Training) -> None:
        await training.kill("anna")
        await training.kill("bert")
        await agree(training, 10)

    play(story)


def test_peers_wait_when_too_few_are_left_and_go_on_when_one_comes() -> None:
    async def story(training: Training) -> None:
        await training.kill("anna")
        await training.kill("bert")
        carl = training.peers["carl"]
        await training.until(lambda: carl.of(events.WaitingChanged))
        stood = carl.step
        await asyncio.sleep(20)
        assert carl.step == stood
        start(training, "dora")
        await agree(training, stood + 3)

    play(story, small_run(min_peers=2))


def test_peer_that_is_too_slow_for_a_whole_micro_batch_brings_a_smaller_one() -> None:
    async def story(training: Training) -> None:
        snail = training.start("snail", micro_batch_size=16, batch_seconds=1.0)  # four steps
        await training.until(lambda: snail.of(events.RoundCommitted))
        await training.until_step(training.peers["anna"].step + 60)
        brought = [event.mine for event in snail.of(events.RoundCommitted)]
        assert brought[0] == 0
        assert sum(mine > 0 for mine in brought[-20:]) >= 10
        assert max(brought) < 16

    play(story)


# -- the network parts ---------------------------------------------------------------------------------------


def test_two_halves_become_one_lineage_when_the_network_is_whole_again() -> None:
    async def story(training: Training) -> None:
        start(training, "dora")
        await agree(training, 8)
        training.hub.partition([["anna", "bert"], ["carl", "dora"]])
        await asyncio.sleep(8)
        before = {str(life.name): life.replica.position for life in training.lives}
        halves = [("anna", "bert"), ("carl", "dora")]
        lighter, heavier = sorted(halves, key=lambda half: before[half[0]].weight)
        assert before[heavier[0]].weight > before[lighter[0]].weight > 200
        training.hub.heal()

        await agree(training, max(position.step for position in before.values()) + 5)
        for name in heavier:
            assert not training.peers[name].of(events.RolledBack)
        elsewhere = training.peers[heavier[0]].positions
        for name in lighter:
            life = training.peers[name]
            (rolled_back,) = life.of(events.RolledBack)
            left = next(at for at in life.positions if at.step == rolled_back.from_step)
            common = [at for at in life.positions[: life.positions.index(left)] if at in elsewhere]
            assert rolled_back.samples_lost == left.weight - common[-1].weight > 0

    play(story)


def test_peer_is_back_soon_when_it_is_cut_off_twice_and_its_only_donor_has_an_older_snapshot() -> None:
    async def story(training: Training) -> None:
        await training.kill("anna")
        bert, carl = training.peers["bert"], training.peers["carl"]
        for _ in range(2):
            rolled_back = len(bert.of(events.RolledBack))
            training.hub.partition([["bert"], ["carl"]])
            await asyncio.sleep(6)
            assert bert.replica.position.weight < carl.replica.position.weight
            training.hub.heal()
            await training.until(lambda: len(bert.of(events.RolledBack)) > rolled_back, seconds=10)  # noqa: B023
            await agree(training, carl.step + 3)

    play(story)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (small_run(min_peers=2), "1 of 2 peers are here"),
        (small_run(quorum="majority"), "1 of the last round's 3 peers are here, and the quorum is 2"),
    ],
)
def test_minority_waits_and_nothing_is_rolled_back_when_the_run_asks_for_a_majority(
    run: RunConfig, reason: str
) -> None:
    async def story(training: Training) -> None:
        training.hub.partition([["anna", "bert"], ["carl"]])
        carl = training.peers["carl"]
        stood = carl.step
        await asyncio.sleep(20)
        assert carl.step <= stood + 1
        assert carl.of(events.WaitingChanged)[-1].reason == reason
        assert training.peers["anna"].step > stood + 10
        training.hub.heal()
        await agree(training, training.peers["anna"].step + 3)
        assert not any(life.of(events.RolledBack) for life in training.lives)

    play(story, run)


def test_nobody_steps_when_an_even_split_leaves_no_majority() -> None:
    async def story(training: Training) -> None:
        start(training, "dora")
        peers = training.peers.values()
        await training.until(lambda: all(len(life.headers()[-1].roster) == 4 for life in peers))
        training.hub.partition([["anna", "bert"], ["carl", "dora"]])
        await asyncio.sleep(5)
        stood = {name: peer.step for name, peer in training.peers.items()}
        await asyncio.sleep(15)
        assert {name: peer.step for name, peer in training.peers.items()} == stood
        training.hub.heal()
        await agree(training, max(stood.values()) + 3)
        assert not any(life.of(events.RolledBack) for life in training.lives)

    play(story, small_run(quorum="majority"))


def test_training_goes_on_when_streams_are_reset_all_the_time() -> None:
    async def story(training: Training) -> None:
        await agree(training, 30)

    play(story, loss=0.01)


def test_no_sample_counts_twice_when_a_peer_stays_behind_because_its_donor_dies() -> None:
    async def story(training: Training) -> None:
        await training.kill("bert")
        anna, carl = training.peers["anna"], training.peers["carl"]
        training.hub.partition([["anna"], ["carl"]])
        await training.until(lambda: carl.replica.position.weight > anna.replica.position.weight + 100)
        training.hub.heal()
        await training.until(lambda: anna.outside())
        await training.kill("carl")
        await training.until(lambda: anna.of(events.CatchUpFailed))
        await agree(training, anna.step + 2)

    play(story)


# -- peers are paused ----------------------------------------------------------------------------------------


async def soon(condition: Callable[[], object]) -> None:
    """Until the condition holds, also between two events."""
    async with asyncio.timeout(30):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def stand_aside(training: Training, name: str) -> None:
    """Pause this peer, and wait until no round counts on it."""
    peer = training.peers[name].peer
    assert peer is not None
    peer.paused = True
    await soon(lambda: peer.rounds.member.withdrawn)


def resume(training: Training, name: str) -> None:
    peer = training.peers[name].peer
    assert peer is not None
    peer.paused = False


@pytest.mark.parametrize(("turn", "delay"), [(0, 0), (1, 0), (2, 1)])
def test_paused_peer_brings_what_it_has_and_then_holds_nobody_up(turn: int, delay: int) -> None:
    async def story(training: Training) -> None:
        bert, others = training.peers["bert"], [training.peers["anna"], training.peers["carl"]]
        await soon(lambda: bert.step % 3 == turn and bert.contributed())
        step, brought, began = bert.step, bert.contributed(), training.now
        drawn = sum(map(len, bert.drawn.values()))
        await stand_aside(training, "bert")
        assert bert.step <= step + 1 + delay  # who leads next differs with `turn`
        roster, samples = bert.headers()[step].roster, bert.headers()[step].samples
        assert samples[roster.index(bert.name)] >= brought
        aside, computed = training.now, sum(map(len, bert.drawn.values()))
        assert computed == drawn  # no micro-batch began once it was asked for
        await asyncio.sleep(8)

        assert sum(map(len, bert.drawn.values())) == computed
        assert sum(waste.samples for waste in bert.of(events.SamplesWasted)) <= 5  # a micro-batch cut off
        for life in others:
            assert not [event for event in life.of(events.RoundAborted) if event.step >= step]
            usual = largest_pause(life, training.now - 4, training.now)
            assert largest_pause(life, began, aside + 2) <= usual + 0.15  # two round trips, for a new leader

        resume(training, "bert")
        await training.until(lambda: bert.of(events.RoundCommitted)[-1].step > others[0].step - 3)
        await agree(training, bert.step + 3)
        assert {event.how for event in bert.of(events.CaughtUp)} == {CatchUpBy.LOG}

    play(story, small_run(delay=delay))


def test_newcomer_goes_on_from_the_state_of_peers_that_are_all_paused() -> None:
    async def story(training: Training) -> None:
        for name in ("anna", "bert"):
            await stand_aside(training, name)
        await training.kill("carl")
        step = max(training.peers[name].step for name in ("anna", "bert"))
        dora = start(training, "dora")
        await training.until(lambda: dora.of(events.RoundCommitted))
        assert dora.of(events.RoundCommitted)[0].step == step
        assert max(training.peers[name].step for name in ("anna", "bert")) == step
        for name in ("anna", "bert"):
            resume(training, name)
        await agree(training, dora.step + 5)
        assert not any(life.of(events.RolledBack) for life in (dora, training.peers["anna"]))

    play(story)


# -- peers come back -----------------------------------------------------------------------------------------


def test_peer_is_back_in_rounds_when_it_restarts_from_its_checkpoint(tmp_path: Path) -> None:
    async def story(training: Training) -> None:
        await training.until(lambda: training.peers["bert"].of(events.CheckpointSaved))
        killed = await training.kill("bert")
        await asyncio.sleep(1)
        back = start(training, "bert")
        assert back.replica.position in killed.positions
        assert back.step == killed.of(events.CheckpointSaved)[-1].step
        await training.until(lambda: back.of(events.RoundCommitted))
        await agree(training, back.step + 3)
        assert {event.how for event in back.of(events.CaughtUp)} == {CatchUpBy.LOG}

    play(story, folder=tmp_path)


def test_peer_that_lost_its_disk_is_back_when_it_starts_from_nothing() -> None:
    async def story(training: Training) -> None:
        await training.kill("bert")
        back = start(training, "bert")
        await training.until(lambda: back.of(events.RoundCommitted))
        await agree(training, back.step + 3)

    play(story)


def test_swarm_goes_on_where_it_was_when_all_peers_restart_from_checkpoints(tmp_path: Path) -> None:
    async def story(training: Training) -> None:
        await training.until_step(12)
        await training.until(lambda: all(life.of(events.CheckpointSaved) for life in training.lives))
        killed = [await training.kill(name) for name in PACES]
        await asyncio.sleep(60)
        back = [start(training, name) for name in PACES]
        newest = max((life.replica.position for life in back), key=lambda position: position.weight)
        saved = {life.name: life.replica.compute_state_digest() for life in back}
        for life, dead in zip(back, killed, strict=True):
            assert saved[life.name] == dead.state_digests()[life.replica.position.lineage]
        await agree(training, newest.step + 5)
        for life in back:
            assert life.lineage_at(newest.step) == newest.lineage
            assert not life.of(events.RolledBack)

    play(story, folder=tmp_path)


def test_fresh_peer_that_is_there_first_after_total_death_gives_way_to_what_was_trained(
    tmp_path: Path,
) -> None:
    async def story(training: Training) -> None:
        await training.until_step(12)
        await training.until(lambda: all(life.of(events.CheckpointSaved) for life in training.lives))
        for name in PACES:
            await training.kill(name)
        await asyncio.sleep(60)
        dora = start(training, "dora")
        await training.until(lambda: dora.step >= 2)
        back = [start(training, name) for name in PACES]
        trained = max((life.replica.position for life in back), key=lambda position: position.weight)
        assert dora.replica.position.weight < trained.weight
        await agree(training, trained.step + 5)
        assert all(life.lineage_at(trained.step) == trained.lineage for life in (*back, dora))
        (rolled_back,) = dora.of(events.RolledBack)
        assert rolled_back.samples_lost > 0
        assert not any(life.of(events.RolledBack) for life in back)

    play(story, folder=tmp_path)


# -- deadlines -----------------------------------------------------------------------------------------------


def test_deadlines_are_told_and_follow_what_was_measured_when_peers_train() -> None:
    async def story(training: Training) -> None:
        await agree(training, 60)
        run = training.run
        for life in training.lives:
            told = life.of(events.DeadlinesChanged)
            assert told
            assert all(run.silence_seconds <= event.silence_seconds for event in told)
            assert all(event.reduce_seconds <= run.attempt_most_seconds for event in told)
            # A model of a few values on links of 50 ms: what a home link would need is long forgotten.
            assert told[-1].reduce_seconds < run.silence_seconds + 2.0

    play(story)


# -- replicas and gradients that are damaged -----------------------------------------------------------------


def test_damaged_replica_is_replaced_when_its_digest_is_not_the_others() -> None:
    async def story(training: Training) -> None:
        bert = training.peers["bert"]
        committed = len(bert.of(events.RoundCommitted))
        await training.until(lambda: len(bert.of(events.RoundCommitted)) > committed)
        bert.replica.parameters[7] += 1.0  # a bit flips in memory
        bert.parameters.clear()
        await training.until(lambda: bert.of(events.ReplicaDiverged))
        bert.forget()
        await training.until(lambda: bert.of(events.RoundCommitted))
        await agree(training, bert.step + 5)

    play(story)


class SometimesBroken(Regression):
    """One sample in twenty has a target that is not a number."""

    def loss_sum(self, model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        broken = (inputs[:, :1] > 1.6).float()
        return super().loss_sum(model, (inputs, targets / (1 - broken)))


def test_micro_batch_is_left_out_and_training_goes_on_when_its_gradient_is_not_finite() -> None:
    async def story(training: Training) -> None:
        training.task = SometimesBroken()
        again = start(training, "dora")
        await agree(training, 20)
        wasted = [event for event in again.of(events.SamplesWasted) if event.cause is WasteCause.NONFINITE]
        assert wasted
        assert all(bool(torch.isfinite(life.replica.parameters).all()) for life in training.lives)

    play(story)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("delay", [0, 1])
def test_peers_end_every_step_bit_equal_when_one_computes_on_another_device(device: str, delay: int) -> None:
    """A copy of the model on the same device takes all the ways of one on another."""

    async def story(training: Training) -> None:
        dora = start(training, "dora")
        dora.compute_on(torch.device(device))
        await agree(training, 25)
        given = {peer for header in dora.headers() for peer in header.roster}
        assert dora.name in given
        assert dora.peer is not None
        assert dora.peer.samples_given > 20
        assert training.task.evaluate(dora.replica.model)["loss"] < 1.0

    play(story, small_run(delay=delay))


def test_peer_gives_up_with_a_remedy_when_nothing_it_computes_is_finite() -> None:
    class Broken(Regression):
        def loss_sum(self, model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return super().loss_sum(model, batch) * float("nan")

    async def story() -> None:
        async with Training(MemoryHub(seed=1)) as training:
            training.task = Broken()
            training.start("anna")
            await training.until(lambda: False)

    with pytest.raises(ExceptionGroup) as caught:
        clock.run(story())
    assert caught.group_contains(DeviceError, match="20 micro-batches in a row .* set precision", depth=None)


# -- fewer bytes ---------------------------------------------------------------------------------------------


def watch_what_is_owed(life: Trainer) -> None:
    """Assert at every event of this peer that only commits change what it owes, and how much that is."""
    assert life.peer is not None
    rounds, accumulator = life.peer.rounds, life.peer.gathered
    settle, owed = accumulator.settle, rounds._owed

    def settling(codec: Codec, sent: Sequence[Sent]) -> None:
        before, samples = accumulator.total.clone(), accumulator.samples
        settle(codec, sent)
        if samples:
            assert sum(stop - start for start, stop, _ in sent) == life.replica.numel
            assert 0 < accumulator.total.norm() < 0.02 * before.norm()  # int8 loses about 0.6 %
        else:
            assert torch.equal(accumulator.total, before)

    def observing(event: events.Event) -> None:
        nonlocal owed
        if isinstance(event, events.RoundCommitted):
            assert rounds._owed is not owed
            assert rounds._owed._lost.any()
            owed = rounds._owed
        elif isinstance(event, events.RoundAborted):
            assert rounds._owed is owed

    life.watching.append(observing)
    accumulator.settle = settling  # type: ignore[method-assign,assignment]


def test_only_commits_change_what_the_codec_owes_and_a_newcomer_owes_nothing() -> None:
    async def story(training: Training) -> None:
        for life in training.lives:
            watch_what_is_owed(life)
        victim = await a_freeze(training, leads=False)
        await asyncio.sleep(0.02)
        await training.kill(victim.name)
        await training.until(lambda: any(life.of(events.RoundAborted) for life in training.peers.values()))

        dora = start(training, "dora")
        await training.until(lambda: dora.of(events.CaughtUp))
        assert dora.peer is not None
        assert not dora.peer.gathered.total.any()
        assert not dora.peer.rounds._owed._lost.numel()
        watch_what_is_owed(dora)
        await training.until(lambda: len(dora.of(events.RoundCommitted)) > 3)

    play(story, small_run(codec="int8"))


def test_attempt_that_is_over_is_gone_before_the_collector_of_cycles_comes_by() -> None:
    """It holds megabytes, and the collector comes the more rarely the larger the program is."""

    async def story(training: Training) -> None:
        gc.collect()
        gc.disable()
        try:
            await training.until_step(25)
            attempts = [each for each in gc.get_objects() if type(each) is Attempt]
        finally:
            gc.enable()
        assert len(attempts) <= len(training.peers)

    play(story)


def test_client_takes_part_and_reduces_nothing_unless_nobody_else_is_there() -> None:
    def spans(life: Trainer, since: int) -> dict[str, set[int]]:
        sizes: dict[str, set[int]] = {}
        for header in life.headers()[since:]:
            for peer, start, stop in zip(header.roster, header.spans, header.spans[1:], strict=False):
                sizes.setdefault(peer, set()).add(stop - start)
        return sizes

    async def story(training: Training) -> None:
        client = training.start("dora", micro_batch_size=2, batch_seconds=0.1, reduces=False)
        await training.until(lambda: len(client.of(events.RoundCommitted)) > 5)
        sizes = spans(training.lives[0], since=5)
        assert sizes.pop("dora") == {0}
        assert all(min(each) > 0 for each in sizes.values())
        assert client.peer is not None
        assert client.peer.samples_given > 0
        for name in PACES:
            await training.kill(name)
        before = client.step
        await training.until_step(before + 5)

    play(story)


# -- with `delay` --------------------------------------------------------------------------------------------


def watch_ages(life: Trainer) -> list[int]:
    """How many steps old each sample's gradient is in the step that it counts for."""
    assert life.peer is not None
    batches, ages = life.peer.batches, []
    begin, take = batches.begin, batches.take
    computed_at = life.step

    def begins(most: int) -> None:
        nonlocal computed_at
        computed_at = life.step
        begin(most)

    async def takes(into: Gathered, step: int) -> bool:
        before = into.samples
        taken = await take(into, step)
        ages.extend([step - computed_at] * (into.samples - before))
        return taken

    batches.begin, batches.take = begins, takes  # type: ignore[method-assign]
    return ages


@pytest.mark.parametrize(("delay", "least", "most", "oldest"), [(0, 0.7, 0.9, 0), (1, 0.95, 1.0, 1)])
def test_delay_hides_the_round_and_makes_gradients_one_step_old_at_most(
    delay: int, least: float, most: float, oldest: int
) -> None:
    async def story(training: Training) -> None:
        ages = [watch_ages(life) for life in training.lives]
        await training.until_step(40)
        shares = []
        for life in training.lives:
            commits = [pair for pair in life.happened if isinstance(pair[1], events.RoundCommitted)]
            (began, _), *later = commits[10:]
            computed = sum(event.compute_seconds for _, event in later)  # type: ignore[attr-defined]
            shares.append(computed / (later[-1][0] - began))
        assert least <= min(shares)
        assert max(shares) <= most
        assert all({0, oldest} == set(each) for each in ages)
        headers = training.lives[0].headers()[5:]
        assert sum(header.total_samples for header in headers) <= 1.25 * 96 * len(headers)
        assert training.task.evaluate(training.lives[0].replica.model)["loss"] < 0.15

    play(story, small_run(delay=delay, target_batch_size=96))


def test_steps_stay_of_their_size_when_the_network_is_slower_than_computing() -> None:
    async def story(training: Training) -> None:
        for life in training.lives:
            training.hub.slow(life.name, 20.0)
        await training.until_step(30, seconds=600)
        headers = training.lives[0].headers()[10:]
        assert sum(header.total_samples for header in headers) <= 1.25 * 24 * len(headers)

    play(story, small_run(delay=1))


# -- the organizer changes something -------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["anna", "bert", "carl"])
def test_change_of_a_setting_takes_effect_at_one_step_whoever_has_heard_of_it(who: str) -> None:
    """One peer knows of it in time, and one only later; all go by the entries. A late peer that replays them,
    and one that begins from a snapshot, end with the same bits."""

    async def story(training: Training) -> None:
        step = training.peers[who].step + 6
        change = Change(step=step, key="optimizer.lr", value=0.003)
        said = Terms(peer=PeerId("organizer"), revision=1, signature="0" * 128, changes=(change,))
        for name, when in ((who, step - 6), (next(name for name in PACES if name != who), step + 4)):
            life = training.peers[name]
            await training.until(lambda life=life, when=when: life.step >= when)
            assert life.peer is not None
            life.peer.heed(said)
        dora = start(training, "dora")
        await agree(training, step + 20)
        [first] = {life.of(events.TermsApplied)[0].step for life in training.lives if life is not dora}
        assert step <= first < step + 6  # the first leader that had heard of it
        for life in training.lives:
            rates = {each.step: each.learning_rate for each in life.of(events.RoundCommitted)}
            assert all(rate == 0.003 for at, rate in rates.items() if at >= first), life.name
            assert all(rate != 0.003 for at, rate in rates.items() if at < first), life.name

    play(story)


def test_step_takes_the_batch_that_the_organizer_asks_for_and_the_run_ends_when_told() -> None:
    async def story(training: Training) -> None:
        step = max(life.step for life in training.peers.values()) + 4
        change = Change(step=step, key="target_batch_size", value=72)
        said = Terms(
            peer=PeerId("organizer"), revision=1, signature="0" * 128, changes=(change,), stop=step + 10
        )
        for life in training.peers.values():
            assert life.peer is not None
            life.peer.heed(said)
        await training.until(lambda: all(life.step == step + 10 for life in training.lives))
        sizes = {each.step: each.samples for each in training.peers["anna"].of(events.RoundCommitted)}
        assert all(size >= 72 for at, size in sizes.items() if at >= step)
        assert all(size < 72 for at, size in sizes.items() if at < step)

    play(story)
