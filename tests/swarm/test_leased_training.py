"""Whole trainers on samples that are leased: each counts once, whoever comes, dies or is cut off."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from training import DATA, Regression, Trainer, Training, check_replicas, small_run

from p2ptrain import events
from p2ptrain.config import BytesTask, CausalLmTask, Local, PeerConfig, RunConfig
from p2ptrain.errors import LocalFault
from p2ptrain.events import WasteCause
from p2ptrain.protocol.ledger import account, shuffled
from p2ptrain.records import DataPosition
from p2ptrain.swarm import clock
from p2ptrain.swarm.memory import MemoryHub
from p2ptrain.tasks import Numbered, Task
from p2ptrain.tasks.causal_lm import CausalLmTask as LanguageTask

pytestmark = [pytest.mark.swarm, pytest.mark.virtual]

PACES = {"anna": (3, 0.1), "bert": (5, 0.17), "carl": (2, 0.05)}
"""(samples, virtual seconds) of each peer's micro-batches."""
LEASED = small_run(data="leased", task=BytesTask(exact=True))


APART = LEASED.model_copy(
    update={
        "strategy": "local",
        "target_batch_size": 48,
        "local": Local(inner_batch_size=6, outer_momentum=0.3, warmup_rounds=2, warmup_batch_size=24),
    }
)


def play(
    story: Callable[[Training], Awaitable[None]],
    folder: Path | None = None,
    run: RunConfig = LEASED,
    task: Task | None = None,
) -> None:
    """Tell the story to a swarm that is at step 5; in the end all samples of its log are counted."""

    async def whole() -> None:
        async with Training(MemoryHub(seed=1), run, folder) as training:
            training.task = task or training.task
            for name in PACES:
                start(training, name)
            await training.until_step(5)
            await story(training)
            assert check_replicas(training.lives)
            check_samples(training)

    clock.run(whole())


def start(training: Training, name: str) -> Trainer:
    samples, seconds = PACES.get(name, (2, 0.1))
    every = 5 if training.folder is not None else 0
    return training.start(name, micro_batch_size=samples, batch_seconds=seconds, checkpoint_every_steps=every)


def rounds(training: Training) -> list[events.RoundCommitted]:
    """Those that lead to where the swarm stands, from the first one on, as whoever was in them tells."""
    life = max(training.peers.values(), key=lambda each: each.replica.position.weight)
    assert life.peer is not None
    log = life.peer.log
    told = {event.lineage: event for each in training.lives for event in each.of(events.RoundCommitted)}
    return [told[log.lineage_at(step + 1) or ""] for step in range(life.step)]


def data_of(life: Trainer) -> DataPosition:
    assert life.replica.last is not None
    assert life.replica.last.data is not None
    return life.replica.last.data


def check_samples(training: Training) -> Counter[int]:
    """None is counted twice, and none is left out but those that wait for their turn (I4); how often each of
    the data was counted."""
    life = max(training.peers.values(), key=lambda each: each.replica.position.weight)
    data = data_of(life)
    counted = Counter(number for event in rounds(training) for a, b in event.taken for number in range(a, b))
    assert max(counted.values()) == 1
    returned = {number for a, b in data.returned for number in range(a, b)}
    assert counted.keys() == set(range(data.next)) - returned
    last = rounds(training)[-1]
    assert (last.repeated, last.returned) == (0, len(returned))
    assert last.unique + last.lost == len(counted)
    assert isinstance(training.task, Numbered)
    return Counter(shuffled(number, training.task.size, LEASED.seed) for number in counted)


def test_every_sample_counts_once_in_a_pass_while_peers_come_and_die() -> None:
    async def story(training: Training) -> None:
        for turn in range(4):
            await training.until_step(10 + 10 * turn)
            await training.kill("bert")
            newcomer = start(training, f"dora {turn}")
            await training.until(lambda newcomer=newcomer: newcomer.of(events.RoundCommitted))
            start(training, "bert")
        await training.until(lambda: min(data_of(life).next for life in training.lives[:1]) > 2 * DATA)
        await training.until(lambda: not any(a < DATA for a, _ in data_of(training.lives[0]).returned))
        times = check_samples(training)
        assert set(times) == set(range(DATA))
        assert max(times.values()) <= 3  # two passes, and the first samples of a third

    play(story)


def test_every_sample_counts_once_where_peers_train_apart_though_some_are_not_finite() -> None:
    """What an inner batch that is not full has, skipped or not, is somebody's next."""

    async def story(training: Training) -> None:
        training.task.poisoned = {shuffled(number, DATA, APART.seed) for number in (300, 301, 450, 601)}
        await training.until_step(9)
        await training.kill("bert")
        await training.until_step(14)
        start(training, "bert")
        await training.until(lambda: data_of(training.lives[0]).next > DATA + 200)
        await training.until(lambda: not any(a < DATA for a, _ in data_of(training.lives[0]).returned))
        assert set(check_samples(training)) == set(range(DATA))
        assert rounds(training)[-1].lost >= 4

    play(story, run=APART)


def test_every_window_of_a_text_counts_once_in_a_pass_also_when_all_are_killed_in_between(
    tmp_path: Path,
) -> None:
    """A language model on text of its own: what is counted is found in the text, window by window."""
    text = "".join(f"{number:06}, " for number in range(500))
    (tmp_path / "numbers.txt").write_text(text)
    settings = CausalLmTask(layers=1, width=8, heads=1, context=8, dataset="numbers", holdout=0.2, exact=True)
    run = LEASED.model_copy(update={"task": settings})
    task = LanguageTask(settings, run.seed, PeerConfig(corpus=str(tmp_path / "numbers.txt")))

    async def story(training: Training) -> None:
        await training.until(lambda: all(life.of(events.CheckpointSaved) for life in training.lives))
        for name in PACES:
            await training.kill(name)
        for name in PACES:
            start(training, name)
        await training.until(lambda: max(data_of(life).next for life in training.lives[3:]) > task.size + 200)
        await training.until(lambda: not any(a < task.size for a, _ in data_of(training.lives[3]).returned))
        assert set(check_samples(training)) == set(range(task.size))

    play(story, tmp_path, run, task)
    windows = [bytes(each[:-1].tolist()).decode() for each in task.samples(range(task.size))]
    assert windows == [f"{number:06}, " for number in range(400)]


def test_peer_says_so_when_a_task_that_shall_be_leased_numbers_nothing() -> None:
    class Unnumbered(Regression):
        size = 0

    async def whole() -> None:
        async with Training(MemoryHub(seed=1), LEASED) as training:
            training.task = Unnumbered()
            start(training, "anna")
            await asyncio.sleep(60)

    said = 'leases samples by their number, and its task has none .*; set data to "drawn" in the run file$'
    with pytest.RaisesGroup(pytest.RaisesExc(LocalFault, match=said), flatten_subgroups=True):
        clock.run(whole())


def test_newcomer_has_a_lease_once_it_is_on_a_roster() -> None:
    async def story(training: Training) -> None:
        dora = start(training, "dora")
        await training.until(lambda: len(dora.of(events.RoundCommitted)) > 3)
        first, *later = dora.of(events.RoundCommitted)
        assert first.mine == 0
        assert all(event.mine for event in later)
        assert not dora.of(events.SamplesWasted)

    play(story)


def test_swarm_goes_on_at_the_exact_sample_when_all_are_killed_and_come_back(tmp_path: Path) -> None:
    async def story(training: Training) -> None:
        await training.until(lambda: all(life.of(events.CheckpointSaved) for life in training.lives))
        for name in PACES:
            await training.kill(name)
        await asyncio.sleep(60)
        back = [start(training, name) for name in PACES]
        newest = max(back, key=lambda life: life.replica.position.weight)
        position, data = newest.replica.position, data_of(newest)
        assert account(data, position.weight).unique == position.weight
        await training.until_step(position.step + 5)
        # Nothing before that step is taken again, nothing after it was taken before: `check_samples` adds up
        # the rounds of both lives.
        assert {life.lineage_at(position.step) for life in training.peers.values()} == {position.lineage}

    play(story, tmp_path)


def test_samples_count_once_when_the_swarm_was_split_and_one_side_rolled_back() -> None:
    async def story(training: Training) -> None:
        training.hub.partition([["anna", "bert"], ["carl"]])
        await training.until_step(12)
        training.hub.heal()
        await training.until(lambda: any(life.of(events.RolledBack) for life in training.lives))
        step = max(life.step for life in training.lives)
        await training.until_step(step + 5)

    play(story)


def test_sample_whose_gradient_is_not_finite_is_lost_and_never_computed_again() -> None:
    async def story(training: Training) -> None:
        poison = shuffled(300, DATA, LEASED.seed)
        training.task.poisoned = {poison}
        await training.until(lambda: training.task.asked.count(poison))
        await training.until_step(training.lives[0].step + 10)
        told = [event for life in training.lives for event in life.of(events.SamplesWasted)]
        (wasted,) = [event for event in told if event.cause is WasteCause.NONFINITE]
        assert rounds(training)[-1].lost == wasted.samples
        assert training.task.asked.count(poison) == 1

    play(story)


def test_successor_from_outside_the_roster_goes_on_with_the_next_samples() -> None:
    async def story(training: Training) -> None:
        dora = start(training, "dora")
        await training.until(lambda: dora.step >= 5)
        for name in PACES:
            await training.kill(name)
        await training.until_step(dora.step + 5)

    play(story)
