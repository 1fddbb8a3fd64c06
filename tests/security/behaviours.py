"""What hostile peers and strangers do, one function each, against a live swarm; and how they must be met.

A behaviour returns in a few words what was seen, and raises AssertionError if it got what it wanted. That the
swarm goes on at its rate, that no victim's memory grows and that nobody applies a wrong byte is looked at for
all of them alike, by `__main__`. Not covered: poisoned gradients within the contract, see
`tests/chaos/rows_liars.py`, and floods that need more bandwidth than a victim has.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import msgpack

from p2ptrain import PROTOCOL_VERSION
from p2ptrain.errors import Refused
from p2ptrain.records import (
    Ask,
    Ballot,
    Chunk,
    GetManifest,
    GetPiece,
    Greeting,
    Hello,
    Manifest,
    Pass,
    PeerId,
    Position,
    Presence,
    Succession,
)
from p2ptrain.swarm.access import encode
from p2ptrain.swarm.frames import pack
from p2ptrain.swarm.gate import revoke, succeed
from p2ptrain.swarm.identity import Identity, of_seed
from tests.security.attackers import (
    ask_for_all,
    bring,
    directs,
    frame,
    hangs_up,
    keep,
    node,
    sealed,
    stream,
    tcp,
)
from tests.security.stage import TARGET_BATCH_SIZE, Stage
from tests.unit.organizer import invite as invite_by

NOWHERE = "0" * 64
EVE = of_seed(b"the attacker's key, and no other")


@dataclass
class Field:
    """The stage, and what the attackers know: every address, and one invite."""

    stage: Stage
    seconds: float
    """For which a flood lasts."""
    liars: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.peers = {name: self.stage.peer_id(name) for name in self.stage.honest}
        self.victim = next(iter(self.peers.values()))
        self.port = int(self.stage.status(self.stage.honest[0])["metrics_port"])
        self.addresses = list(self.stage.invite.addresses)

    def node(self, shown: Callable[[PeerId], Pass] | None = None) -> Any:
        return node(self.stage.run_id, self.addresses, shown)

    def member(self) -> Any:
        return self.node(self.stage.invite.shown_by)


Play = Callable[[Field], Coroutine[Any, Any, str]]


async def bystander(field: Field) -> str:
    """Enters by its invite, asks for what it may have, and looks who is there."""
    ends = time.monotonic() + field.seconds
    async with field.member() as member:
        await ask_for_all(member, [field.victim])
        while time.monotonic() < ends:
            await member.lookup("presence")
            await asyncio.sleep(0.2)
    return "nothing"


async def volunteer(field: Field) -> str:
    """The liar, as long as it has no orders."""
    await asyncio.to_thread(field.stage.watch, 2 * field.seconds)
    return "nothing"


@dataclass(frozen=True)
class Behaviour:
    name: str
    what: str
    play: Play
    lie: str = ""
    """Of a liar among the peers, which is there and behaves before it begins."""
    honest: Play = bystander
    """What somebody honest would do in its place."""


BEHAVIOURS: dict[str, Behaviour] = {}


def hostile(play: Play) -> Play:
    """An outsider, or a node with a valid invite that takes no part in rounds."""
    name = play.__name__.replace("_", " ")
    BEHAVIOURS[name] = Behaviour(name, " ".join((play.__doc__ or "").split()), play)
    return play


def lying(lie: str, honest: Play = volunteer) -> Callable[[Play], Play]:
    """A volunteer that tells this lie of `tests.chaos.rogue`."""

    def register(play: Play) -> Play:
        name = play.__name__.replace("_", " ")
        BEHAVIOURS[name] = Behaviour(name, " ".join((play.__doc__ or "").split()), play, lie, honest)
        return play

    return register


# -- strangers, and whoever is one by now --------------------------------------------------------------------


async def turned_away(field: Field, shown: Callable[[PeerId], Pass] | None) -> str:
    async with field.node(shown) as eve:
        told = await ask_for_all(eve, field.peers.values())
    assert not told["answered"], told
    assert told["refused"] == told["asked"], told
    return f"{told['refused']} of {told['asked']} questions refused"


@hostile
async def no_invite(field: Field) -> str:
    """Asks every peer for run file, manifest, entries and pieces, and shows no invite."""
    return await turned_away(field, None)


@hostile
async def expired_invite(field: Field) -> str:
    """The same, with an invite that has expired."""
    made = await asyncio.to_thread(field.stage.created, "--ttl", "1s")
    await asyncio.sleep(max(0.0, (made.grant.expires or 0) + 1 - time.time()))
    return await turned_away(field, made.shown_by)


@hostile
async def revoked_invite(field: Field) -> str:
    """The same, with an invite that has been revoked."""
    made = await asyncio.to_thread(field.stage.created)
    words = ("invite", "revoke", str(field.stage.run), str(made.grant.serial))
    await asyncio.to_thread(field.stage.command, *words)
    await asyncio.sleep(8)  # it is told "within seconds"
    return await turned_away(field, made.shown_by)


@hostile
async def forged_invite(field: Field) -> str:
    """The same, with an invite by an organizer of its own, and one with another's name in it."""
    grant = field.stage.invite.grant
    own = invite_by(run_id=grant.run_id, run_digest=grant.run_digest)
    renamed = own.model_copy(update={"grant": own.grant.model_copy(update={"organizer": grant.organizer})})
    said = await turned_away(field, own.shown_by)
    return f"{said}; {await turned_away(field, renamed.shown_by)}"


@hostile
async def stolen_pass(field: Field) -> str:
    """The same, with the pass that it overheard from a member."""
    return await turned_away(field, lambda me: field.stage.invite.shown_by(field.victim))


@hostile
async def limited_invite_used_too_often(field: Field) -> str:
    """Shows an invite for one peer to the members, and redeems it at the bootstrap as two peers."""
    made = await asyncio.to_thread(field.stage.created, "--uses", "1")
    said = await turned_away(field, made.shown_by)
    bootstrap = PeerId(field.addresses[0].rsplit("/", 1)[1])
    async with field.node(made.shown_by) as first, field.node(made.shown_by) as second:
        await first.redeem(bootstrap, timeout_seconds=6)
        try:
            await second.redeem(bootstrap, timeout_seconds=6)
        except Refused:
            return f"{said}; the second one was refused"
    raise AssertionError("two peers came by an invite for one")


@hostile
async def kicked_peer(field: Field) -> str:
    """Goes on asking after the organizer has put it out."""
    async with field.member() as eve:
        before = await ask_for_all(eve, [field.victim])
        assert before["answered"], before
        await asyncio.to_thread(field.stage.command, "run", "kick", eve.peer_id, "--ban")
        await asyncio.sleep(8)
        told = await ask_for_all(eve, field.peers.values())
    assert told["refused"] == told["asked"], told
    return f"{told['refused']} of {told['asked']} questions refused"


@hostile
async def watcher_that_wants_more(field: Field) -> str:
    """Has an invite to watch; asks for the state, and publishes itself as a trainer far ahead of all."""
    made = await asyncio.to_thread(field.stage.created, "--role", "watch")
    async with field.node(made.shown_by) as eve:
        try:
            await eve.request(
                field.victim, GetPiece(state_digest=NOWHERE, number=0), timeout_seconds=6, max_bytes=2**26
            )
            raise AssertionError("it was given a piece")
        except Refused as refusal:
            said = str(refusal)
        assert "'watch'" in said, said
        there = [each for each in await eve.lookup("presence") if isinstance(each, Presence)]
        ahead = Position(step=2**50, lineage=NOWHERE, weight=2**52)
        await eve.publish(
            there[0].model_copy(update={"peer": eve.peer_id, "role": "train", "position": ahead}),
            ttl_seconds=60,
        )
        await asyncio.sleep(field.seconds)
        eve_id = eve.peer_id
    async with field.member() as member:
        assert eve_id not in {each.peer for each in await member.lookup("presence")}
    return "no piece, and nobody believes that it trains"


# -- the DHT -------------------------------------------------------------------------------------------------


def presence(of: Identity, like: Presence, **changes: Any) -> bytes:
    text = like.model_copy(update={"peer": of.peer_id, "position": None, **changes})
    return text.model_dump_json().encode()


async def trainer(swarm: Any) -> Presence:
    there = [each for each in await swarm.lookup("presence") if isinstance(each, Presence)]
    return next(each for each in there if each.role == "train")


@hostile
async def sybil_flood_of_the_dht(field: Field) -> str:
    """A hundred peer ids a second, without an invite, publish themselves at every node."""
    async with field.node() as eve:
        like, number, taken = await trainer(eve), 0, 0

        async def flood() -> None:
            nonlocal number, taken
            soon, items = time.time() + 60, []
            for _ in range(20):
                number += 1
                who = of_seed(number.to_bytes(32, "big"))
                value = sealed(who, eve, "presence", presence(who, like), soon)
                items.append((who.peer_id, value, soon))
            for peer in field.peers.values():
                taken += sum(await bring(eve, peer, "presence", items) or [])
            await asyncio.sleep(0.2)

        await keep(flood, field.seconds)
        seen = {record.peer for record in await eve.lookup("presence")}
    assert not taken, f"{taken} were kept"
    assert set(field.peers.values()) <= seen
    return f"{number} ids at each node, none was kept, all members are still found"


@hostile
async def wiping_the_dht(field: Field) -> str:
    """Stores plain values that never expire under the run's keys."""
    late = time.time() + 10**6
    async with field.node() as eve:
        for peer in field.peers.values():
            for kind in ("presence", "round", "revocations"):
                for expires in (late, time.time() + 60):
                    value = msgpack.packb(b"gone")
                    assert await bring(eve, peer, kind, [(None, value, expires)], plain=True) == [False]
        seen = {record.peer for record in await eve.lookup("presence")}
    assert set(field.peers.values()) <= seen
    return "refused, all members are still found"


@hostile
async def dht_bombs(field: Field) -> str:
    """Oversized, over-long-lived, deeply nested and endless values, names and keys."""
    soon, late = time.time() + 60, time.time() + 10**6
    deep = b"\x91" * 100_000 + b"\x90"
    async with field.node() as eve:
        text = presence(EVE, await trainer(eve))
        bombs = [
            (EVE.peer_id, sealed(EVE, eve, "presence", text, late), late),
            (EVE.peer_id, sealed(EVE, eve, "presence", text, soon), float("inf")),
            (EVE.peer_id, sealed(EVE, eve, "presence", text, soon), float("nan")),
            (EVE.peer_id, msgpack.packb(b"x" * 2**20), soon),
            (EVE.peer_id, deep, soon),
            (EVE.peer_id, b"\xc6\xff\xff\xff\xff", soon),
            ("1" * 500_000, msgpack.packb(b"x" * 200), soon),
            (10**18, msgpack.packb(b"x" * 200), soon),
        ]
        answered = 0
        for peer in field.peers.values():
            for bomb in bombs:
                began = time.monotonic()
                answer = await bring(eve, peer, "presence", [bomb])
                assert answer in (None, [False]), bomb[0]
                answered += answer is not None
                assert time.monotonic() - began < 5, "it took long to say no"
    return f"{answered} of {len(bombs) * len(field.peers)} refused at once, the others not answered"


@hostile
async def replayed_records(field: Field) -> str:
    """Brings back older records of members all the time, so that they are forgotten with these."""
    async with field.node() as eve:
        key, old = eve._keys["presence"], {}
        assert eve._node is not None
        for author, found in (await eve._node.fetch(key)).items():
            old[author] = found
        await asyncio.sleep(3)

        async def again() -> None:
            items = [(author, msgpack.packb(value), expires) for author, (value, expires) in old.items()]
            for peer in field.peers.values():
                await bring(eve, peer, "presence", items)
            await asyncio.sleep(0.3)

        times = await keep(again, field.seconds)
        seen = {record.peer for record in await eve.lookup("presence")}
    assert set(field.peers.values()) <= seen
    return f"{len(old)} old records brought {times} times, all members are still found"


@hostile
async def forged_decrees(field: Field) -> str:
    """Revokes everybody's invites, and names another organizer, with a key of its own."""
    grant = field.stage.invite.grant
    async with field.node() as eve:
        own = revoke(EVE, grant.run_id, 2**40, list(range(200))).model_copy(update={"peer": EVE.peer_id})
        forged = own.model_copy(update={"signature": "0" * 128})
        heir = succeed(EVE, EVE, grant.run_id, 2**40, int(time.time()))
        stolen = Succession.model_validate(
            {**heir.model_dump(), "predecessor": grant.organizer, "peer": EVE.peer_id}
        )
        soon, taken = time.time() + 60, 0
        for peer in field.peers.values():
            for kind, told in (("revocations", own), ("revocations", forged), ("succession", stolen)):
                value = sealed(EVE, eve, kind, told.model_dump_json().encode(), soon)
                taken += sum(await bring(eve, peer, kind, [(EVE.peer_id, value, soon)]) or [])
    assert not taken
    return await still_let_in(field)


async def still_let_in(field: Field) -> str:
    async with field.member() as member:
        told = await ask_for_all(member, [field.victim])
    assert told["answered"], told
    return "refused; who is invited is let in as before"


# -- libp2p streams ------------------------------------------------------------------------------------------


@hostile
async def silent_streams(field: Field) -> str:
    """Opens streams to a peer as fast as it can, and says nothing on them."""
    async with field.node() as eve:
        opened: list[Any] = []

        async def another() -> None:
            _, writer = await eve._open_stream(field.victim, "control", 2.0)
            opened.append(writer)

        await keep(another, field.seconds)
        for writer in opened:
            writer.transport.abort()
    return f"{len(opened)} streams; {await still_let_in(field)}"


@hostile
async def garbage(field: Field) -> str:
    """Says what is no frame, no record, no JSON, or JSON that is deep or has endless numbers."""
    sayings = [
        os.urandom(4096),
        b"GET / HTTP/1.1\r\n\r\n",
        frame(b"{}"),
        frame(b"[" * 4000),
        frame(b'{"kind":"hello","protocol":' + b"9" * 3000 + b"}"),
        frame(b'{"kind":"hello","protocol":1e400,"fingerprint":"x"}'),
        frame(b'"\\ud800"'),
        frame(pack(Ask(position=Position(step=1, lineage=NOWHERE, weight=1)))[8:]),
        frame(b"\xff\xfe" * 2000),
    ]
    async with field.node() as eve:
        for saying in sayings:
            for kind in ("control", "data", "request"):
                async with stream(eve, field.victim, kind) as (reader, writer):
                    writer.write(saying)
                    assert await hangs_up(reader, 8), saying[:40]
    return f"{3 * len(sayings)} streams hung up"


@hostile
async def giant_lengths(field: Field) -> str:
    """Begins frames of four gigabytes, before and after a good greeting."""
    giant = b"\xff\xff\xff\xff" * 2
    async with field.node() as eve, stream(eve, field.victim) as (reader, writer):
        writer.write(giant + b"x" * 10_000)
        assert await hangs_up(reader, 8)
    async with field.member() as member:
        for kind in ("control", "data", "request"):
            async with stream(member, field.victim, kind) as (reader, writer):
                writer.write(pack(hello(member)) + giant + b"x" * 10_000)
                assert await hangs_up(reader, 8)
    return "hung up"


def hello(swarm: Any) -> Hello:
    lanes = swarm._lanes
    return Hello(protocol=PROTOCOL_VERSION, fingerprint=lanes.fingerprint, access=lanes.gate.own)


@hostile
async def flood_of_messages(field: Field) -> str:
    """A member without a part in rounds says the same thing to all as fast as its streams take it."""
    async with field.member() as member:
        message = Ask(position=Position(step=1, lineage=NOWHERE, weight=1))
        text, sent = pack(message) * 100, 0

        async def at(peer: PeerId) -> None:
            nonlocal sent
            async with stream(member, peer) as (_, writer):
                writer.write(pack(hello(member)))
                while True:
                    writer.write(text)
                    await writer.drain()
                    sent += 100

        await asyncio.gather(
            *(keep(lambda peer=peer: at(peer), field.seconds) for peer in field.peers.values())
        )
    return f"{sent:,} messages were taken, at its victims' pace"


@hostile
async def chunks_of_no_attempt(field: Field) -> str:
    """A member sends chunks of attempts that do not exist, and of every size, as fast as they are taken."""
    async with field.member() as member:
        ballot, sent = Ballot(number=2**30, leader=member.peer_id), 0

        async def at(peer: PeerId) -> None:
            nonlocal sent
            async with stream(member, peer, "data") as (_, writer):
                writer.write(pack(hello(member)))
                number = 0
                while True:
                    number += 1
                    header = Chunk(
                        step=number,
                        parent=NOWHERE,
                        ballot=ballot,
                        freeze=NOWHERE,
                        number=number,
                        samples=2**50,
                    )
                    writer.write(pack(header, 2**16) + bytes(2**16))
                    await writer.drain()
                    sent += 1
                    await asyncio.sleep(0.005)  # some 10 MB/s to each: more is a matter of bandwidth

        await asyncio.gather(
            *(keep(lambda peer=peer: at(peer), field.seconds) for peer in field.peers.values())
        )
    return f"{sent:,} chunks of 64 KB were passed over"


@hostile
async def flood_of_requests(field: Field) -> str:
    """A member asks for the same snapshot a hundred times at once, and reads no answer."""
    async with field.member() as member:
        answer, _ = await member.request(field.victim, GetManifest(), timeout_seconds=20, max_bytes=2**20)
        digest = answer.state_digest if isinstance(answer, Manifest) else NOWHERE
        question = pack(hello(member)) + pack(GetPiece(state_digest=digest, number=0))
        opened = []

        async def another() -> None:
            if len(opened) < 100:
                _, writer = await member._open_stream(field.victim, "request", 2.0)
                opened.append(writer)
                writer.write(question)

        await keep(another, field.seconds)
        for writer in opened:
            writer.transport.abort()
    return f"{len(opened)} requests; {await still_let_in(field)}"


# -- TLS -----------------------------------------------------------------------------------------------------


async def where(field: Field) -> tuple[str, int]:
    async with field.node() as eve:
        found = (await directs(eve))[field.victim]
    return found.hosts[0], found.port


@hostile
async def slow_loris_on_tls(field: Field) -> str:
    """Opens 200 TCP connections to a peer's data port and says nothing, or a byte now and then."""
    host, port = await where(field)
    opened = [await tcp(host, port) for _ in range(200)]
    ends = asyncio.get_running_loop().time() + max(field.seconds, 7)
    while asyncio.get_running_loop().time() < ends:
        for _, writer in opened[::2]:
            writer.write(b"\x16")
        await asyncio.sleep(1)
    gone = sum(reader.at_eof() or reader.exception() is not None for reader, _ in opened)
    for _, writer in opened:
        writer.transport.abort()
    assert gone, "none was hung up"
    return f"{gone} of 200 hung up within {max(field.seconds, 7):.0f} s, the others wait their turn"


@hostile
async def greetings_on_tls(field: Field) -> str:
    """Handshakes well, and then greets as a member, in part, not at all, or with a giant."""
    host, port = await where(field)
    async with field.member() as member:
        fingerprint = member._lanes.fingerprint
    as_member = Greeting(
        protocol=PROTOCOL_VERSION,
        fingerprint=fingerprint,
        sender=list(field.peers.values())[1],
        to=field.victim,
        access=field.stage.invite.shown_by(list(field.peers.values())[1]),
    )
    sayings = [
        pack(as_member),
        pack(as_member.model_copy(update={"to": EVE.peer_id})),
        pack(as_member)[:-10],
        b"\xff" * 16,
        frame(b"[" * 16_000),
        b"",
    ]
    for saying in sayings:
        reader, writer = await tcp(host, port, tls=True)
        writer.write(saying)
        assert await hangs_up(reader, 15), saying[:40]
        writer.transport.abort()
    return f"{len(sayings)} connections hung up"


# -- HTTP ----------------------------------------------------------------------------------------------------


async def said_to(port: int, words: bytes, seconds: float = 15) -> bytes:
    reader, writer = await tcp("127.0.0.1", port)
    writer.write(words)
    heard = b""
    try:
        async with asyncio.timeout(seconds):
            while some := await reader.read(65536):
                heard += some
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()
    return heard


@hostile
async def slow_loris_on_http(field: Field) -> str:
    """Opens 200 connections to the metrics, sends a byte now and then, and reads nothing."""
    opened = []
    for _ in range(200):
        opened.append(await tcp("127.0.0.1", field.port))
        opened[-1][1].write(b"GET /metrics HTTP/1.1\r\n")
    for _ in range(12):
        await asyncio.sleep(1)
        for _, writer in opened:
            if not writer.is_closing():
                writer.write(b"x: y\r\n")
    gone = sum([await hangs_up(reader, 0.05) for reader, _ in opened])
    for _, writer in opened:
        writer.transport.abort()
    page = await said_to(field.port, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert page.startswith(b"HTTP/1.1 200"), page[:80]
    assert gone == 200, gone
    return "all 200 hung up, and the next is served"


@hostile
async def strange_http(field: Field) -> str:
    """Asks with endless headers, by other methods, by another host's name, or from another site's page."""
    sayings = {
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 10**6 + b"\r\n\r\n": b"400",
        b"GET /" + b"a" * 10**6 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n": b"400",
        b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nsomething": b"405",
        b"DELETE /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n": b"405",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n": b"404",
        b"GET /metrics HTTP/1.1\r\nHost: attacker.example\r\n\r\n": b"403",
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nOrigin: https://attacker.example\r\n\r\n": b"403",
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: cross-site\r\n\r\n": b"403",
        os.urandom(5000): b"400",
    }
    for saying, code in sayings.items():
        heard = await said_to(field.port, saying)
        assert not heard or heard.split()[1] == code, (saying[:60], heard[:80])
    return f"{len(sayings)} refused"


# -- liars on the roster -------------------------------------------------------------------------------------


@contextmanager
def lies(field: Field, lie: str) -> Iterator[float]:
    """It has lied for a while, since then; and it is gone afterwards."""
    name, since = field.liars[-1], time.time()
    draft = field.stage.folder / f"{name}.draft"
    draft.write_text(f"--lie {lie}")
    draft.rename(field.stage.folder / f"{name}.orders")
    yield since
    assert field.stage.lied(name), f"it never came to lie: {field.stage.processes[name]}"


async def refused(field: Field, lie: str) -> str:
    """What it sends is no part of any average; who sends it is left out after a few attempts."""
    usual = field.stage.largest_norm(0)
    with lies(field, lie) as since:
        await asyncio.to_thread(field.stage.watch, 2 * field.seconds)
    worst = field.stage.largest_norm(since)
    assert worst < 100 * usual, f"it was averaged: norm {worst:.3g} after {usual:.3g}"
    benched = field.stage.events("peer_benched", since)
    aborted = field.stage.events("round_aborted", since)
    assert benched, f"nobody left it out, {len(aborted)} attempts were spoiled"
    return f"left out after {len({(each['step'], each['attempt']) for each in aborted})} spoiled attempts"


@lying("nan")
async def nan(field: Field) -> str:
    """Its gradient is NaN."""
    return await refused(field, "nan")


@lying("inf")
async def infinite(field: Field) -> str:
    """Its gradient is infinite."""
    return await refused(field, "inf")


@lying("huge")
async def a_million_times_too_large(field: Field) -> str:
    """Its gradient is 1e6 times as large."""
    return await refused(field, "huge")


@lying("shape")
async def wrong_shape(field: Field) -> str:
    """Its chunks are half as long as they should be."""
    return await refused(field, "shape")


@lying("oversized")
async def oversized_chunks(field: Field) -> str:
    """Its chunks are a megabyte longer than they should be."""
    return await refused(field, "oversized")


async def believed_for(field: Field, lie: str) -> str:
    with lies(field, lie) as since:
        await asyncio.to_thread(field.stage.watch, 2 * field.seconds)
    entries = field.stage.events("round_committed", since)
    assert entries, "no round was committed"
    most, fewest = (pick(each["samples"] for each in entries) for pick in (max, min))
    assert most <= 10 * TARGET_BATCH_SIZE, f"{most:,} samples were believed"
    assert fewest >= TARGET_BATCH_SIZE / 2, f"a step was taken on {fewest} samples"
    return f"entries of {fewest} to {most} samples, {TARGET_BATCH_SIZE} are the target"


@lying("samples")
async def inflated_sample_count(field: Field) -> str:
    """It says that a billion samples are in its gradient."""
    return await believed_for(field, "samples")


@lying("progress")
async def inflated_progress(field: Field) -> str:
    """It reports a billion samples from the first moment of each step."""
    return await believed_for(field, "progress")


@lying("replay")
async def replayed_messages(field: Field) -> str:
    """It says and sends again, with each freeze, all that it did in the round before."""
    with lies(field, "replay") as since:
        await asyncio.to_thread(field.stage.watch, 2 * field.seconds)
    entries = field.stage.events("round_committed", since)
    assert entries, "no round was committed"
    return f"passed over; {len(entries)} commits meanwhile"


@lying("two-faced")
async def two_faced_reducer(field: Field) -> str:
    """As reducer it sends each member another average."""
    with lies(field, "two-faced") as since:
        await asyncio.to_thread(field.stage.watch, 2 * field.seconds)
    mismatched = [
        each for each in field.stage.events("round_aborted", since) if each["cause"] == "digest_mismatch"
    ]
    return f"no two applied what differed; {len(mismatched)} aborts named it"


@lying("equivocate")
async def equivocating_leader(field: Field) -> str:
    """As leader it tells each member of another roster."""
    with lies(field, "equivocate") as since:
        await asyncio.to_thread(field.stage.watch, 2 * field.seconds)
    aborted = field.stage.events("round_aborted", since)
    return f"no entry came of it; {len(aborted)} aborts told"


async def newcomer_comes(field: Field) -> str:
    """It is given the state by all, trains with the others for a while, and leaves."""
    name = f"newcomer-{next(NUMBERS)}"
    field.stage.join(name, encode(field.stage.invite))
    caught = await asyncio.to_thread(field.stage.wait_for, name, "caught_up")
    # As an honest one it must have the others' bytes from now on.
    field.stage.honest.append(name)
    await asyncio.to_thread(field.stage.watch, 2 * field.seconds)
    assert not field.stage.wrong_bytes()
    hashed = [each for each in field.stage.told[name] if each["event"] == "state_hashed"]
    field.stage.honest.remove(name)
    field.stage.part(name)
    return f"caught up by {caught['how']}, and {len(hashed)} states of it were compared"


NUMBERS = count(1)


@lying("pieces", honest=newcomer_comes)
async def lying_donor(field: Field) -> str:
    """It gives wrong pieces of the state to a newcomer, which asks it and the others."""
    with lies(field, "pieces"):
        return await newcomer_comes(field)


@lying("stall")
async def stalled(field: Field) -> str:
    """It stands still in the middle of rounds, and is let go on again, twice."""
    process = field.stage.processes[field.liars[-1]].process
    since = time.time()
    for _ in range(2):
        process.send_signal(signal.SIGSTOP)
        await asyncio.to_thread(field.stage.watch, field.seconds)
        process.send_signal(signal.SIGCONT)
        await asyncio.to_thread(field.stage.watch, field.seconds)
    entries = field.stage.events("round_committed", since)
    assert entries, "no round was committed"
    return "the others went on without it"
