"""Who shows no valid invite is served nothing: over the lanes in memory, over libp2p, and by the command.

Not covered: what a stranger reads in the DHT, which is no secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from contract import Recorder, ask, chunk, give_run, is_refused, presence, recorded, steps
from libp2p_fabric import Libp2pFabric

from p2ptrain.errors import PeerFault, Refused, Uninvited
from p2ptrain.events import FaultCause, PeerFaulted
from p2ptrain.records import (
    GetEntry,
    GetEvents,
    GetLineage,
    GetManifest,
    GetMetrics,
    GetPiece,
    GetRun,
    Pass,
    PeerId,
    Piece,
    Request,
    Watching,
)
from p2ptrain.swarm import clock
from p2ptrain.swarm.access import Invite, decode, encode
from p2ptrain.swarm.gate import Gate, revoke
from p2ptrain.swarm.identity import of_seed
from p2ptrain.swarm.lanes import ASKING
from p2ptrain.swarm.memory import MemoryHub, MemorySwarm
from peers import present
from tests.swarm.processes import Crew, Process, crew, run_file, until
from tests.unit.organizer import NOW, ORGANIZER, RUN_ID, invite

pytestmark = pytest.mark.swarm

ALICE, BOB, EVE = (of_seed(bytes([number]) * 32).peer_id for number in (1, 2, 3))
QUESTIONS: tuple[Request, ...] = (
    GetRun(),
    GetManifest(),
    GetPiece(state_digest="0" * 64, number=0),
    GetEntry(step=0),
    GetEntry(step=0, with_payload=False),
    GetLineage(step=0),
    GetMetrics(),
    GetEvents(),
)
SECRET = b"a piece of the state"


class Shows(Gate):
    """Shows whatever it was given, and lets in everybody."""

    def __init__(self, shown: Pass) -> None:
        super().__init__(shown, EVE)

    def flaw(self, peer: PeerId, shown: Pass | None, *, any_run: bool = False) -> str:
        return ""


def gate(me: PeerId, **changes: object) -> Gate:
    return Gate(invite(**changes).shown_by(me), me, lambda: NOW)  # type: ignore[arg-type]


async def give_state(request: Request) -> tuple[Piece, bytes]:
    return Piece(), SECRET


async def comes(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until that is true."""
    async with asyncio.timeout(seconds):
        while True:
            if condition():
                return
            await asyncio.sleep(0.05)


@asynccontextmanager
async def two(mine: Gate | None, theirs: Gate | None, who: PeerId) -> AsyncIterator[tuple[MemorySwarm, ...]]:
    """Alice, who gives the state to whoever she lets in, and a peer that wants it."""
    hub = MemoryHub(1)
    async with hub.swarm(ALICE, gate=mine) as alice, hub.swarm(who, gate=theirs) as other:
        yield alice, other


@pytest.mark.parametrize(
    "shown",
    [
        None,
        Shows(invite(expires=NOW - 1).shown_by(EVE)),
        Shows(invite(organizer=of_seed(b"m" * 32)).shown_by(EVE)),
        Shows(invite().shown_by(BOB)),
    ],
    ids=["nothing", "expired", "another organizer's", "another peer's, replayed"],
)
def test_stranger_gets_no_byte_and_is_not_heard_whatever_it_shows(shown: Gate | None) -> None:
    events: list[PeerFaulted] = []

    async def main() -> None:
        hub = MemoryHub(1)
        async with (
            hub.swarm(ALICE, gate=gate(ALICE), on_event=events.append) as alice,
            hub.swarm(EVE, gate=shown) as eve,
        ):
            heard, told = recorded(alice), recorded(eve)
            heard.answer = give_state
            for question in QUESTIONS:
                with pytest.raises(Uninvited, match="invite"):
                    await eve.request(ALICE, question, timeout_seconds=10, max_bytes=2**20)
            eve.send(ALICE, ask(1))
            with pytest.raises(PeerFault):
                await eve.send_chunk(ALICE, chunk(EVE, 0), b"gradients")
            await told.until(lambda told: (ALICE, False) in told.links)
            # Nor is she told anything when it is Alice who comes to her.
            alice.send(EVE, ask(2))
            with pytest.raises(Refused):
                await alice.request(EVE, GetManifest(), timeout_seconds=10, max_bytes=2**20)
            await heard.until(lambda heard: (EVE, False) in heard.links)
            assert (heard.messages, heard.chunks, heard.requests) == ([], [], [])
            assert not told.messages

    clock.run(main())
    assert [(event.peer, event.cause) for event in events] == [(EVE, FaultCause.REFUSED)]


def test_clock_that_was_set_back_puts_nobody_out() -> None:
    async def main() -> None:
        async with two(gate(ALICE), gate(BOB, serial=2, issued=NOW + 3600), BOB) as (alice, bob):
            recorded(alice).answer = give_state
            _, payload = await bob.request(ALICE, GetManifest(), timeout_seconds=10, max_bytes=2**20)
            assert payload == SECRET

    clock.run(main())


def test_invited_peers_talk_as_before() -> None:
    async def main() -> None:
        async with two(gate(ALICE), gate(BOB, serial=2), BOB) as (alice, bob):
            heard = recorded(alice)
            heard.answer = give_state
            recorded(bob)
            for question in QUESTIONS:
                _, payload = await bob.request(ALICE, question, timeout_seconds=10, max_bytes=2**20)
                assert payload == SECRET
            bob.send(ALICE, ask(1))
            await bob.send_chunk(ALICE, chunk(BOB, 0), b"gradients")
            await heard.until(lambda heard: heard.messages and heard.chunks)

    clock.run(main())


@pytest.mark.parametrize(("role", "granted"), [("watch", 6), ("serve", 8)])
def test_peer_that_may_not_train_is_told_what_its_role_allows_and_is_in_no_round(
    role: str, granted: int
) -> None:
    async def main() -> None:
        async with two(gate(ALICE), gate(BOB, role=role), BOB) as (alice, bob):
            heard, told = recorded(alice), recorded(bob)
            heard.answer = give_state
            answered = 0
            for question in QUESTIONS:
                with contextlib.suppress(Refused):
                    await bob.request(ALICE, question, timeout_seconds=10, max_bytes=2**20)
                    answered += 1
            assert answered == granted
            bob.send(ALICE, ask(1))
            await told.until(lambda told: told.links)
            assert not heard.messages

    clock.run(main())


def test_watcher_knows_no_model_and_is_told_how_peers_are_and_nothing_else() -> None:
    async def main() -> None:
        hub = MemoryHub(1)
        async with (
            hub.swarm(ALICE, gate=gate(ALICE)) as alice,
            hub.swarm(BOB, fingerprint=ASKING, gate=gate(BOB, role="watch")) as bob,
        ):
            recorded(alice).answer = give_state
            for question in QUESTIONS:
                if isinstance(question, GetRun | Watching):
                    _, payload = await bob.request(ALICE, question, timeout_seconds=10, max_bytes=2**20)
                    assert payload == SECRET
                else:
                    await is_refused(bob, ALICE, question)

    clock.run(main())


def test_peer_to_another_run_of_the_organizer_may_ask_what_run_this_is_and_no_more() -> None:
    async def main() -> None:
        async with two(gate(ALICE), gate(BOB, run_digest="1" * 64), BOB) as (alice, bob):
            recorded(alice).answer = give_run
            _, run = await bob.request(ALICE, GetRun(), timeout_seconds=10, max_bytes=100)
            assert run == b"the run"
            for question in QUESTIONS[1:]:
                await is_refused(bob, ALICE, question)

    clock.run(main())


def test_peer_is_parted_from_and_stays_out_when_its_invite_is_revoked() -> None:
    async def main() -> None:
        mine = gate(ALICE)
        async with two(mine, gate(BOB, serial=2), BOB) as (alice, bob):
            heard, told = recorded(alice), recorded(bob)
            bob.send(ALICE, ask(1))
            alice.send(BOB, ask(1))
            await heard.until(lambda heard: heard.messages)
            await told.until(lambda told: told.messages)
            alice.review()
            assert not heard.links
            mine.learn(revoke(ORGANIZER, RUN_ID, 1, [2]))
            alice.review()
            await heard.until(lambda heard: heard.links == [(BOB, False)])
            await told.until(lambda told: (ALICE, False) in told.links)
            await asyncio.sleep(2)
            bob.send(ALICE, ask(2))
            with pytest.raises(Uninvited, match="revoked by the organizer"):
                await bob.request(ALICE, GetRun(), timeout_seconds=10, max_bytes=100)
            assert steps(heard.messages) == [1]

    clock.run(main())


# -- over libp2p ---------------------------------------------------------------------------------------------


async def test_revocation_reaches_all_through_the_dht_and_uninvited_records_are_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from p2ptrain.swarm import libp2p  # slow: not while pytest collects

    monkeypatch.setattr(libp2p, "REVIEW_SECONDS", 0.2)
    fabric = Libp2pFabric(tmp_path)
    try:
        organizer = await fabric.join("organizer", invite=invite(serial=0))
        alice = await fabric.join("alice", invite=invite(serial=1))
        bob = await fabric.join("bob", invite=invite(serial=2))
        stranger = await fabric.join("stranger")
        heard: dict[str, Recorder] = {}
        for name, swarm in (("organizer", organizer), ("alice", alice), ("bob", bob)):
            heard[name] = recorded(swarm)
            assert await swarm.publish(presence(swarm.peer_id), ttl_seconds=60)
        assert not await stranger.publish(presence(stranger.peer_id), ttl_seconds=60)  # nobody keeps it
        assert {record.peer for record in await alice.lookup("presence")} == {
            swarm.peer_id for swarm in (organizer, alice, bob)
        }
        bob.send(alice.peer_id, ask(1))
        await heard["alice"].until(lambda heard: heard.messages)

        assert organizer.gate is not None
        organizer.gate.learn(revoke(ORGANIZER, RUN_ID, 1, [2]))
        await heard["alice"].until(lambda heard: heard.links[-1:] == [(bob.peer_id, False)])
        assert alice.gate is not None
        assert bob.gate is not None
        await comes(bob.gate.own_flaw)  # it hears of it itself
        with pytest.raises(Uninvited, match="revoked"):
            await bob.request(alice.peer_id, GetRun(), timeout_seconds=5, max_bytes=100)
        assert bob.peer_id not in {record.peer for record in await alice.lookup("presence")}
        # The list outlives whoever brought it.
        await fabric.leave(organizer)
        late = await fabric.join("late", invite=invite(serial=3))
        assert late.gate is not None
        gate_of_late = late.gate
        await comes(lambda: gate_of_late.revoked)
    finally:
        await fabric.aclose()


# -- by the command ------------------------------------------------------------------------------------------


@pytest.fixture
def people(tmp_path: Path) -> Iterator[Crew]:
    with crew(tmp_path) as started:
        yield started


def sentence(process: Process, code: int) -> str:
    """The one sentence with which it ended, and that exit code."""
    assert process.end(30) == code, process
    errors = process.errors.read_text()
    assert "Traceback" not in errors, errors
    [line] = [line for line in errors.splitlines() if line.startswith("p2ptrain: ")]
    return line


def test_private_run_lets_in_by_invite_only_until_it_is_revoked_or_expires(
    people: Crew, tmp_path: Path
) -> None:
    run = run_file(tmp_path, "private", 100_000)
    listen = "/ip4/127.0.0.1/tcp/0"
    _, link = people.bootstrap(run, listen, "--private", data_dir="organizer")
    assert link is None
    there = ("--data-dir", str(tmp_path / "organizer"))

    def command(*words: str) -> dict[str, object]:
        process = people.start("invite", words[0], str(run), *words[1:], *there, "--json")
        assert process.end() == 0, process
        return process.result()

    def created(*words: str) -> Invite:
        return decode(str(command("create", *words)["invite"]))

    good = created("--name", "good")
    brief = created("--ttl", "4s")
    watcher = created("--role", "watch")
    peer = people.join(encode(good), "peer")
    until(lambda: "round_committed" in peer.journal(tmp_path / "peer"), lambda: f"a round: {peer}")

    assert "for role 'watch' and not for 'train'" in sentence(people.join(encode(watcher), "watcher"), 2)
    until(lambda: time.time() > (brief.grant.expires or 0), "the end of the brief invite")
    assert "set the clock" in sentence(people.join(encode(brief), "brief"), 2)

    def seen() -> list[str]:
        return [each.peer for each in present.read(tmp_path / "organizer") if each.role == "train"]

    until(seen, "the bootstrap has seen the peer")
    [who] = seen()
    kicking = people.start("run", "kick", who[-8:], *there, "--ban", "--reason", "it stalls")
    assert kicking.end() == 0, kicking
    assert f"came by invite {good.grant.serial}" in str(kicking)
    said = sentence(peer, 2)
    assert "the organizer has put this peer out: it stalls" in said
    assert "checkpoint" in said
    witness = people.join(encode(created("--name", "witness")), "witness")
    until(
        lambda: '"peer_kicked"' in witness.journal(tmp_path / "witness"),
        lambda: f"another peer hears of it: {witness}",
    )
    witness.interrupt()
    assert witness.end() == 0, witness
    assert "it stalls" in sentence(people.join(encode(good), "peer"), 2)
    command("revoke", str(good.grant.serial))
    assert "has been revoked by the organizer" in sentence(people.join(encode(good), "again"), 2)
    rows = command("list")["invites"]
    assert isinstance(rows, list)
    assert [row["state"] for row in rows] == ["revoked", "expired", "valid", "valid"]
    assert json.dumps(rows).count(encode(watcher)) == 1


@pytest.mark.long
def test_invite_for_one_peer_lets_in_one_and_who_is_there_stays_when_all_invites_are_rotated(
    people: Crew, tmp_path: Path
) -> None:
    run = run_file(tmp_path, "few", 100_000)
    people.bootstrap(run, "/ip4/127.0.0.1/tcp/0", "--private", data_dir="organizer")
    there = ("--data-dir", str(tmp_path / "organizer"))
    creating = people.start("invite", "create", str(run), "--uses", "1", *there, "--json")
    assert creating.end() == 0, creating
    line = str(creating.result()["invite"])

    def rounds() -> int:
        return peer.journal(tmp_path / "peer").count("round_committed")

    peer = people.join(line, "peer")
    until(rounds, lambda: f"a round: {peer}")
    assert "was for 1 peer" in sentence(people.join(line, "second"), 2)

    until(lambda: any(each.role == "train" for each in present.read(tmp_path / "organizer")), "it is seen")
    rotating = people.start("invite", "rotate", str(run), "--grace", "8s", *there, "--json")
    assert rotating.end() == 0, rotating
    told = rotating.result()
    assert isinstance(told["kept"], list)
    assert len(told["kept"]) == 1
    until(lambda: peer.said("it stays"), lambda: f"it follows the organizer: {peer}")
    until(lambda: time.time() > int(str(told["ends"])) + 2, "the old key has ended")
    before = rounds()
    until(lambda: rounds() > before + 2, lambda: f"it goes on: {peer}")
    peer.interrupt()
    assert peer.end() == 0, peer
    again = people.join(line, "peer")
    until(lambda: rounds() > before + 20, lambda: f"it comes back by the old line: {again}")
    assert "replaced" in sentence(people.join(line, "third"), 2)


def test_bearer_of_an_invite_to_another_organizers_run_is_told_so(people: Crew, tmp_path: Path) -> None:
    _, theirs = people.bootstrap(run_file(tmp_path, "same", 10))
    _, ours = people.bootstrap(run_file(tmp_path, "same", 10))
    misled = decode(ours).model_copy(update={"addresses": decode(theirs).addresses})
    said = sentence(people.join(encode(misled), "peer"), 2)
    assert "is by organizer" in said
    assert "ask the organizer for another one" in said


@pytest.mark.long
def test_second_bootstrap_lets_newcomers_in_when_the_first_is_gone(people: Crew, tmp_path: Path) -> None:
    run = run_file(tmp_path, "twice", 1_000_000)
    first, invite = people.bootstrap(run, data_dir="first")
    words = ("--listen", "/ip4/127.0.0.1/tcp/0", "--data-dir", str(tmp_path / "second"), "--json")
    second = people.start("bootstrap", str(run), "--beside", invite, *words)
    until(lambda: second.said('"ready"'), lambda: f"its addresses: {second}")
    [entrance] = json.loads(second.output.read_text().splitlines()[0])["addresses"]
    first.interrupt()
    assert first.end() == 0, first
    both = encode(decode(invite).model_copy(update={"addresses": (*decode(invite).addresses, entrance)}))
    anna = people.join(both, "anna", "--until-step", "3")
    assert anna.end() == 0, anna
    assert anna.result()["rounds"] >= 3
