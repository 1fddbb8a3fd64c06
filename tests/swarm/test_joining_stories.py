"""Peers that join a swarm which goes on meanwhile: several donors, dying ones, lying ones, and many joiners.

Three peers train on a network with 10 to 50 ms of latency and keep short logs; a snapshot has some fifty
pieces, and each donor may upload a few kilobytes a second. Time is virtual. See `training`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from training import Trainer, Training, check_replicas

from p2ptrain import events
from p2ptrain.events import CatchUpBy, FaultCause
from p2ptrain.protocol.leader import Leader
from p2ptrain.records import (
    EntryReply,
    GetManifest,
    Manifest,
    PeerId,
    Piece,
    Refusal,
    Reply,
    Request,
)
from p2ptrain.replica.joining import BURST_SECONDS
from p2ptrain.replica.snapshot import Packed, pack, unpack
from p2ptrain.swarm import clock
from p2ptrain.swarm.memory import MemoryHub

pytestmark = [pytest.mark.swarm, pytest.mark.virtual]

PIECE_BYTES = 1024
SNAPSHOT_BYTES = 50_000
"""A little less than the snapshot of the model in `training` has."""
SLOW_MBIT = 0.04
"""5 kB/s: three donors need about two seconds for a snapshot."""
ENTRY_BYTES = 4 * 4192
DONORS = ("anna", "bert", "carl")

Answer = tuple[Reply, Any]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2ptrain.replica.snapshot.PIECE_BYTES", PIECE_BYTES)


def play(
    story: Callable[[Training], Awaitable[None]],
    *,
    folder: Path | None = None,
    mbit: float = SLOW_MBIT,
    entries: int = 16,
    hurry: float = 1.0,
) -> None:
    """Tell the story to three peers at step 24 whose logs hold so many entries; in the end, all agree.

    With `hurry`, network and micro-batches take so many times less.
    """

    async def whole() -> None:
        hub = MemoryHub(seed=2, latency=(0.01 / hurry, 0.05 / hurry))
        async with Training(hub, folder=folder) as training:
            for name in DONORS:
                training.start(name, donor_upload_mbit=mbit, batch_seconds=0.1 / hurry)
            await training.until(lambda: all(life.peer is not None for life in training.lives))
            for life in training.lives:
                life.peer.log._max_bytes = entries * ENTRY_BYTES  # type: ignore[union-attr]
            await training.until_step(24)
            await story(training)
            assert check_replicas(training.lives)

    clock.run(whole())


async def arrives(training: Training, joiner: Trainer, seconds: float = 60.0) -> events.CaughtUp:
    """It takes part in a round; how it first caught up."""
    await training.until(lambda: joiner.of(events.RoundCommitted), seconds)
    first: events.CaughtUp = joiner.of(events.CaughtUp)[0]
    return first


async def downloading(training: Training, joiner: Trainer, pieces: int) -> None:
    """Wait until it has so many pieces of a snapshot."""

    def has() -> bool:
        progress = joiner.peer.catching_up if joiner.peer is not None else None
        return progress is not None and progress.what == "pieces" and progress.done >= pieces

    await until_soon(has)


async def until_soon(condition: Callable[[], bool]) -> None:
    """Look every millisecond of virtual time: there are things that are no event."""
    for _ in range(60_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("not after 60 s of virtual time")


def served(training: Training) -> dict[str, int]:
    """Bytes that each of the first three has given to joiners."""
    return {life.name: life.peer.donor.served_bytes for life in training.lives[:3] if life.peer is not None}


def intercept(
    life: Trainer, change: Callable[[Request, Reply, Any], Answer], asked: Counter[str] | None = None
) -> Counter[str]:
    """From now on this peer answers requests with what `change` makes of its answers; what it is asked for is
    counted by kind."""
    assert life.peer is not None
    asked = Counter() if asked is None else asked
    answer = life.peer.donor.answer

    async def instead(sender: PeerId, request: Request) -> Answer:
        asked[request.kind] += 1
        reply, payload = await answer(sender, request)
        return change(request, reply, payload)

    life.peer.rounds._serve = instead
    return asked


def flipped(payload: Any) -> bytes:
    """The same bytes but one."""
    spoilt = bytearray(payload)
    spoilt[len(spoilt) // 2] ^= 1
    return bytes(spoilt)


def as_it_is(request: Request, reply: Reply, payload: Any) -> Answer:
    return reply, payload


# -- several donors ------------------------------------------------------------------------------------------


def test_several_donors_serve_one_snapshot_when_a_newcomer_joins() -> None:
    async def story(training: Training) -> None:
        dora = training.start("dora")
        caught_up = await arrives(training, dora)
        assert (caught_up.how, caught_up.donors) == (CatchUpBy.SNAPSHOT, 3)
        shares = served(training)
        assert sum(shares.values()) > SNAPSHOT_BYTES
        assert min(shares.values()) > SNAPSHOT_BYTES / 8, shares
        assert not dora.of(events.PeerFaulted)
        assert not dora.of(events.RolledBack)
        assert dora.peer is not None
        assert dora.peer.catching_up is None

    play(story)


def test_donors_meet_at_one_step_when_the_swarm_is_much_faster_than_the_joiner_s_link() -> None:
    async def story(training: Training) -> None:
        pace = steps_between(training, training.now - 1, training.now)
        dora = training.start("dora")
        training.hub.slow("dora", 20)
        await training.until(lambda: dora.of(events.CaughtUp))
        caught_up = dora.of(events.CaughtUp)[0]
        assert (caught_up.how, caught_up.donors) == (CatchUpBy.SNAPSHOT, 3)
        assert pace > 20  # a request takes several steps to arrive
        training.hub.slow("dora", 1)
        await arrives(training, dora)

    play(story, mbit=0.8, entries=8, hurry=15)


def test_donors_keep_to_their_cap_when_four_join_at_once() -> None:
    async def story(training: Training) -> None:
        began, before = training.now, served(training)
        joiners = [training.start(f"joiner {number}") for number in range(4)]
        donors = [life.peer.donor for life in training.lives[:3] if life.peer is not None]
        pieces = [donor.upload for donor in donors]
        granted = {id(upload): 0 for upload in pieces}
        for upload in pieces:
            take = upload.take

            def counted(size: int, now: float, take: Any = take, upload: Any = upload) -> float:
                granted[id(upload)] += size
                wait: float = take(size, now)
                allowed = SLOW_MBIT * 1e6 / 8 * (now + wait - began + BURST_SECONDS) + PIECE_BYTES
                assert granted[id(upload)] <= allowed
                return wait

            upload.take = counted  # type: ignore[method-assign]
        await training.until(lambda: all(each.of(events.CaughtUp) for each in joiners), 120)
        assert sum(granted.values()) >= 4 * SNAPSHOT_BYTES
        assert sum(served(training).values()) > sum(before.values())

    play(story, entries=8)


def steps_between(training: Training, start: float, stop: float) -> float:
    """Commits per second of the first peer in that time."""
    times = [at for at, event in training.lives[0].happened if isinstance(event, events.RoundCommitted)]
    return sum(start < at <= stop for at in times) / (stop - start)


@pytest.mark.parametrize("joiners", [1, 8])
def test_swarm_keeps_its_pace_and_packs_little_when_peers_join(joiners: int) -> None:
    async def story(training: Training) -> None:
        usual = steps_between(training, training.now - 8, training.now)
        packed: Counter[str] = Counter()
        for life in training.lives:
            count_packing(life, packed)
        began = training.now
        newcomers = [training.start(f"joiner {number}") for number in range(joiners)]
        # As long as the usual pace was taken, or longer: in a second or two one slow step would decide.
        await training.until(
            lambda: training.now - began >= 8 and any(each.of(events.CaughtUp) for each in newcomers), 120
        )
        assert steps_between(training, began, training.now) >= 0.8 * usual
        await training.until(lambda: all(each.of(events.RoundCommitted) for each in newcomers), 240)
        assert {each.of(events.CaughtUp)[0].how for each in newcomers} == {CatchUpBy.SNAPSHOT}
        assert max(packed.values()) <= 3, packed
        assert min(served(training).values()) > joiners * SNAPSHOT_BYTES / 10

    play(story, mbit=0.4)


def count_packing(life: Trainer, packed: Counter[str]) -> None:
    whole = life.replica.packed

    def counted() -> Any:
        packed[life.name] += 1
        return whole()

    life.replica.packed = counted  # type: ignore[method-assign]


# -- donors that die or lie ----------------------------------------------------------------------------------


def test_others_go_on_when_a_donor_dies_in_mid_download() -> None:
    async def story(training: Training) -> None:
        dora = training.start("dora")
        await downloading(training, dora, 10)
        await training.kill("bert")
        caught_up = await arrives(training, dora)
        assert (caught_up.how, caught_up.donors) == (CatchUpBy.SNAPSHOT, 3)
        assert not dora.of(events.CatchUpFailed)
        assert caught_up.received_bytes < 1.5 * SNAPSHOT_BYTES + 16 * ENTRY_BYTES

    play(story)


def test_others_go_on_when_a_donor_falls_silent_in_mid_download() -> None:
    async def story(training: Training) -> None:
        dora = training.start("dora")
        await downloading(training, dora, 10)
        training.hub.cut("bert", "dora")
        began = training.now
        await training.until(lambda: dora.of(events.CaughtUp))
        assert dora.of(events.CaughtUp)[0].how is CatchUpBy.SNAPSHOT
        assert not dora.of(events.CatchUpFailed)
        assert training.now - began < 15
        training.hub.heal()
        await arrives(training, dora)

    play(story)


def test_donors_that_cannot_be_reached_are_asked_again_in_a_while_and_not_at_once() -> None:
    async def story(training: Training) -> None:
        for name in tuple(training.peers):
            await training.kill(name)  # their records go on for a while
        dora = training.start("dora")
        await training.until(lambda: dora.of(events.RoundCommitted))
        failed = [at for at, event in dora.happened if isinstance(event, events.CatchUpFailed)]
        assert len(failed) > 3
        assert all(later - earlier >= 0.3 for earlier, later in pairwise(failed))

    play(story)


def test_peer_that_has_left_is_asked_for_nothing() -> None:
    async def story(training: Training) -> None:
        await training.peers["bert"].peer.attendance.leave()
        await training.kill("bert")
        dora = training.start("dora")
        await arrives(training, dora)
        assert not [event for event in dora.of(events.PeerFaulted) if event.peer == "bert"]

    play(story)


def test_liar_is_left_alone_and_named_when_its_pieces_are_not_what_the_manifest_says() -> None:
    def lie(request: Request, reply: Reply, payload: Any) -> Answer:
        return (reply, flipped(payload)) if isinstance(reply, Piece) else (reply, payload)

    async def story(training: Training) -> None:
        asked = intercept(training.peers["bert"], lie)
        dora = training.start("dora")
        caught_up = await arrives(training, dora)
        assert (caught_up.how, caught_up.donors) == (CatchUpBy.SNAPSHOT, 2)
        faults = dora.of(events.PeerFaulted)
        assert {(fault.peer, fault.cause) for fault in faults} == {("bert", FaultCause.BAD_MESSAGE)}
        assert "its manifest says" in faults[0].detail
        assert 1 <= asked["get_piece"] <= 2  # what was on its way already
        assert not dora.of(events.CatchUpFailed)

    play(story)


def test_majority_is_believed_when_one_donor_has_another_state_at_the_same_step() -> None:
    def lie(request: Request, reply: Reply, payload: Any) -> Answer:
        if isinstance(reply, Manifest):
            return reply.model_copy(update={"state_digest": "0" * 64}), payload
        return reply, payload

    async def story(training: Training) -> None:
        asked = intercept(training.peers["bert"], lie)
        dora = training.start("dora")
        caught_up = await arrives(training, dora)
        assert (caught_up.how, caught_up.donors) == (CatchUpBy.SNAPSHOT, 2)
        (fault,) = dora.of(events.PeerFaulted)
        assert (fault.peer, fault.cause) == ("bert", FaultCause.BAD_MESSAGE)
        assert "not the one that 2 of 3 donors have" in fault.detail
        assert asked["get_piece"] == 0

    play(story)


def makes_up(donor: Trainer) -> None:
    """From now on this donor gives another state than it has, and everything that it says of that agrees."""
    packed = donor.replica.packed

    def other() -> Packed:
        mine = packed()
        state = unpack(mine.blob)
        first = next(iter(state.parameters))
        state.parameters[first].add_(1.0)
        return Packed(mine.position, mine.last, None, pack(state))

    donor.replica.packed = other  # type: ignore[method-assign]


def nothing_to_give(request: Request, reply: Reply, payload: Any) -> Answer:
    return (Refusal(reason="not today"), b"") if isinstance(request, GetManifest) else (reply, payload)


def test_lone_donor_is_refused_when_most_have_signed_for_another_state() -> None:
    """Steps are slow, so that all speak of the step that the donor packs."""

    async def story(training: Training) -> None:
        for name in ("anna", "carl"):
            intercept(training.peers[name], nothing_to_give)
        for life in training.lives:
            life._batch_seconds = 4.0
        makes_up(training.peers["bert"])
        await training.until_step(training.peers["anna"].step + 2)
        dora = training.start("dora", batch_seconds=4.0)
        await training.until(lambda: dora.of(events.PeerFaulted))
        (fault,) = dora.of(events.PeerFaulted)
        assert (fault.peer, fault.cause) == ("bert", FaultCause.BAD_MESSAGE)
        assert "signed for" in fault.detail
        assert dora.step == 0

    play(story, mbit=1.0)


def test_peer_that_was_given_another_state_takes_the_swarm_s_although_no_leader_tells_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps are fast: nobody has spoken of the one that the donor packed. The records of later ones tell."""
    monkeypatch.setattr(Leader, "_resync", lambda self, now: [])

    async def story(training: Training) -> None:
        anna, bert, carl = training.lives
        for life in (anna, carl):
            intercept(life, nothing_to_give)
        makes_up(bert)
        dora = training.start("dora")
        await training.until(lambda: dora.of(events.ReplicaDiverged))
        assert {fault.peer for fault in dora.of(events.PeerFaulted)} == {"bert"}
        for life in (anna, carl):
            assert life.peer is not None
            life.peer.rounds._serve = life.peer.donor.answer
        dora.forget()
        await training.until(lambda: dora.of(events.CaughtUp))
        dora.forget()
        at = dora.step
        await training.until(lambda: dora.step > at + 3)
        assert not dora.of(events.ReplicaDiverged)

    play(story, mbit=1.0)


def test_peer_waits_and_joins_when_its_only_donor_has_lied_once() -> None:
    lies = [True]

    def lie(request: Request, reply: Reply, payload: Any) -> Answer:
        if isinstance(reply, Piece) and lies:
            lies.clear()
            return reply, flipped(payload)
        return reply, payload

    async def story(training: Training) -> None:
        await training.kill("anna")
        await training.kill("carl")
        intercept(training.peers["bert"], lie)
        dora = training.start("dora")
        await arrives(training, dora)
        assert dora.of(events.CatchUpFailed)

    play(story, mbit=0.4)


# -- joiners that die ----------------------------------------------------------------------------------------


def test_joiner_goes_on_where_it_was_when_it_was_killed_in_mid_download(tmp_path: Path) -> None:
    async def story(training: Training) -> None:
        training.start("dora")
        await downloading(training, training.peers["dora"], 25)
        await training.kill("dora")
        await asyncio.sleep(2)
        (kept,) = (tmp_path / "dora" / "partial").iterdir()
        pieces = len(list(kept.glob("*.piece")))
        assert pieces >= 20
        next(kept.glob("*.piece")).write_bytes(b"torn")
        fetched: Counter[str] = Counter()
        for name in DONORS:
            fetched = intercept(training.peers[name], as_it_is, fetched)
        dora = training.start("dora")
        await downloading(training, dora, pieces - 1)
        await training.until(lambda: dora.of(events.CaughtUp))
        caught_up = dora.of(events.CaughtUp)[0]
        assert caught_up.how is CatchUpBy.SNAPSHOT
        assert caught_up.resumed_bytes == (pieces - 1) * PIECE_BYTES
        assert fetched["get_piece"] <= 53 - pieces + 4
        assert not list((tmp_path / "dora" / "partial").iterdir())
        await arrives(training, dora)

    play(story, folder=tmp_path)


def test_joiner_begins_anew_when_no_donor_has_its_snapshot_any_more(tmp_path: Path) -> None:
    async def story(training: Training) -> None:
        training.start("dora")
        await downloading(training, training.peers["dora"], 10)
        await training.kill("dora")
        (kept,) = (tmp_path / "dora" / "partial").iterdir()
        for life in training.lives[:3]:
            life.peer.donor._held.clear()  # type: ignore[union-attr]
        dora = training.start("dora")
        await downloading(training, dora, 1)
        assert not kept.exists()
        assert (await arrives(training, dora)).how is CatchUpBy.SNAPSHOT

    play(story, folder=tmp_path)


# -- replay --------------------------------------------------------------------------------------------------


def test_peer_replays_and_downloads_no_snapshot_when_the_log_holds_what_it_missed(tmp_path: Path) -> None:
    async def story(training: Training) -> None:
        await training.peers["bert"].peer.upkeep.save()  # type: ignore[union-attr]
        killed = await training.kill("bert")
        asked = intercept(training.peers["anna"], as_it_is)
        asked_too = intercept(training.peers["carl"], as_it_is)
        await training.until_step(killed.step + 60)
        back = training.start("bert")
        assert back.step >= 24
        await arrives(training, back)
        assert {each.how for each in back.of(events.CaughtUp)} == {CatchUpBy.LOG}
        assert asked["get_entry"] + asked_too["get_entry"] >= 60
        assert not asked["get_manifest"] + asked_too["get_manifest"]

    play(story, folder=tmp_path, entries=200)


@pytest.mark.parametrize("fails", ["dies", "lies"])
def test_replay_changes_donors_when_the_first_one_fails(fails: str) -> None:
    async def story(training: Training) -> None:
        dora = training.start("dora")
        await until_soon(lambda: dora.step >= 4)
        first = max(DONORS, key=lambda name: served(training)[name])
        if fails == "dies":
            await training.kill(first)
        else:

            def lie(request: Request, reply: Reply, payload: Any) -> Answer:
                return (reply, flipped(payload)) if isinstance(reply, EntryReply) else (reply, payload)

            intercept(training.peers[first], lie)
        caught_up = await arrives(training, dora)
        assert (caught_up.from_step, caught_up.how) == (0, CatchUpBy.LOG)
        assert caught_up.donors == 2
        expected = FaultCause.UNREACHABLE if fails == "dies" else FaultCause.BAD_MESSAGE
        assert (first, expected) in {(fault.peer, fault.cause) for fault in dora.of(events.PeerFaulted)}
        assert not dora.of(events.CatchUpFailed)

    play(story, entries=200)


# -- checkpoints that are not where the swarm is -------------------------------------------------------------


@pytest.mark.parametrize("entries", [8, 200])
def test_joiner_catches_up_when_its_checkpoint_is_behind(tmp_path: Path, entries: int) -> None:
    async def story(training: Training) -> None:
        await training.peers["bert"].peer.upkeep.save()  # type: ignore[union-attr]
        killed = await training.kill("bert")
        await training.until_step(killed.step + 20)
        back = training.start("bert")
        caught_up = await arrives(training, back)
        assert caught_up.how is (CatchUpBy.SNAPSHOT if entries == 8 else CatchUpBy.LOG)
        assert not back.of(events.RolledBack)

    play(story, folder=tmp_path, entries=entries, mbit=0.4)


def test_swarm_takes_the_heavier_log_when_a_checkpoint_is_ahead_of_it(tmp_path: Path) -> None:
    """No lighter lineage replaces a heavier one (I8), also when the heavier one comes last."""

    async def story(training: Training) -> None:
        anna = training.peers["anna"]
        await training.kill("bert")
        await training.kill("carl")
        await training.until_step(40)
        await anna.peer.upkeep.save()  # type: ignore[union-attr]
        ahead = (await training.kill("anna")).replica.position
        bert = training.start("bert")
        await training.until_step(3)
        began_anew = bert.replica.position
        assert 0 < began_anew.weight < ahead.weight
        back = training.start("anna")
        assert back.replica.position == ahead
        await training.until_step(ahead.step + 3)
        assert not back.of(events.RolledBack)
        assert bert.lineage_at(ahead.step + 2) == back.lineage_at(ahead.step + 2)

    play(story, folder=tmp_path, entries=200)
