"""A hostile DHT node, over real libp2p: it can neither fill, wipe, hide nor age what honest nodes keep.

The three holes are hivemind's own (plain value, declined store, one bad entry); the rest is ours to bound.
Not covered: a node that answers nothing, or hides what it keeps: others keep it as well.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from contract import presence
from libp2p_fabric import Libp2pFabric

from p2ptrain.records import PeerId
from p2ptrain.swarm.identity import of_seed
from p2ptrain.swarm.validator import seal
from tests.unit.organizer import invite

pytestmark = pytest.mark.swarm

EVE = of_seed(b"e" * 32)
BOB = of_seed(b"b" * 32)


class Trio:
    """Alice and Bob, who are invited, and Eve's node, which does what it is told to."""

    def __init__(self, alice: Any, bob: Any, eve: Any) -> None:
        self.alice, self.bob, self.eve = alice, bob, eve
        self.key = alice._keys["presence"]

    async def bring(
        self, subkeys: list[Any], values: list[Any], expires: list[float], *, plain: bool = False
    ) -> list[bool] | None:
        """What Alice says to these, brought by Eve as hivemind's own node would."""
        node, protocol = self.eve._node, self.eve._node.dht.protocol
        peer = node.p2p.peer_id.from_base58(self.alice.peer_id)
        keys = [self.key] * len(values)
        answer = await protocol.call_store(peer, keys, values, expires, None if plain else subkeys)
        return None if answer is None else list(answer)

    async def seen(self) -> set[str]:
        return {record.peer for record in await self.alice.lookup("presence")}

    def kept(self, author: str) -> tuple[bytes, float] | None:
        """What Alice's node has of that author."""
        found = self.alice._node.dht.protocol.storage.get(self.key)
        return None if found is None else found.value.get(author)


@pytest.fixture
async def trio(tmp_path: Path) -> AsyncIterator[Trio]:
    fabric = Libp2pFabric(tmp_path)
    try:
        alice = await fabric.join("alice", invite=invite(serial=1))
        bob = await fabric.join("bob", invite=invite(serial=2))
        eve = await fabric.join("eve")
        for swarm in (alice, bob):
            assert await swarm.publish(presence(swarm.peer_id), ttl_seconds=60)
        yield Trio(alice, bob, eve)
    finally:
        await fabric.aclose()


def packed(value: bytes) -> bytes:
    from hivemind.utils import MSGPackSerializer

    return bytes(MSGPackSerializer.dumps(value))


def record_of(identity: Any, key: Any, expires: float, **options: Any) -> bytes:
    text = presence(identity.peer_id).model_copy(update=options).model_dump_json().encode()
    return packed(seal(identity, key.to_bytes(), text, expires))


async def test_plain_value_wipes_nothing_and_nothing_unsigned_or_uninvited_is_kept(trio: Trio) -> None:
    soon, late = time.time() + 30, time.time() + 10_000
    both = {trio.alice.peer_id, trio.bob.peer_id}
    mine = trio.kept(trio.bob.peer_id)
    assert mine is not None
    assert await trio.bring([], [packed(b"gone")], [late], plain=True) == [False]
    assert await trio.bring([], [packed(b"gone")], [soon], plain=True) == [False]
    forged = record_of(EVE, trio.key, soon)  # signed well, by somebody without a pass
    stolen = presence(EVE.peer_id).model_copy(update={"access": invite().shown_by(trio.bob.peer_id)})
    theirs = packed(seal(EVE, trio.key.to_bytes(), stolen.model_dump_json().encode(), soon))
    for subkey, value, expires in (
        (EVE.peer_id, forged, soon),
        (EVE.peer_id, theirs, soon),
        (trio.bob.peer_id, forged, soon),
        (trio.bob.peer_id, packed(b"x" * 100), soon),
        (EVE.peer_id, packed(b"x" * 100_000), soon),
        (EVE.peer_id, record_of(EVE, trio.key, late, access=invite().shown_by(EVE.peer_id)), late),
        (7, forged, soon),
        ("p" * 500_000, forged, soon),
    ):
        assert await trio.bring([subkey], [value], [expires]) == [False]
    from hivemind.dht.routing import DHTID

    trio.key, key = DHTID.generate("another key"), trio.key
    assert await trio.bring([EVE.peer_id], [record_of(EVE, trio.key, soon)], [soon]) == [False]
    trio.key = key
    assert await trio.seen() == both
    assert trio.kept(trio.bob.peer_id) == mine


async def test_older_record_that_is_brought_again_does_not_age_the_newer_one(trio: Trio) -> None:
    now = time.time()
    access = invite(serial=3).shown_by(BOB.peer_id)
    older, newer = (record_of(BOB, trio.key, now + ends, access=access) for ends in (2, 40))
    assert await trio.bring([BOB.peer_id], [older], [now + 2]) == [True]
    assert await trio.bring([BOB.peer_id], [newer], [now + 40]) == [True]
    assert await trio.bring([BOB.peer_id], [older], [now + 2]) == [False]
    await asyncio.sleep(2.5)
    kept = trio.kept(BOB.peer_id)
    assert kept is not None
    assert kept[1] == now + 40
    assert BOB.peer_id in await trio.seen()


async def test_dictionary_with_bad_entries_hides_no_good_one_brought_or_answered(trio: Trio) -> None:
    from hivemind.dht.storage import DictionaryDHTValue

    now = time.time()
    good = record_of(BOB, trio.key, now + 30, access=invite(serial=3).shown_by(BOB.peer_id))
    mixed = DictionaryDHTValue()
    with mixed.freeze():
        mixed.store("nobody", packed(b"bad"), now + 30)
        mixed.store(EVE.peer_id, record_of(EVE, trio.key, now + 30), now + 30)
        mixed.store(BOB.peer_id, good, now + 30)
        mixed.latest_expiration_time = math.inf
    assert await trio.bring([], [mixed], [math.inf], plain=True) == [True]
    assert trio.kept(BOB.peer_id)
    assert trio.kept("nobody") is None
    # And when it is what Eve answers to a look-up: she says that she has all, and that it never expires.
    del trio.alice._node.dht.protocol.storage.get(trio.key).value[BOB.peer_id]
    storage = trio.eve._node.dht.protocol.storage
    storage.data.clear()
    type(storage).__mro__[2].store(storage, trio.key, mixed, now + 30)
    assert {BOB.peer_id, trio.bob.peer_id} <= await trio.seen()


async def test_flood_of_made_up_records_costs_little_and_members_are_served_meanwhile(trio: Trio) -> None:
    trio.alice._node.dht.protocol.record_validator.refused = before = 0
    soon = time.time() + 30
    records = [record_of(of_seed(bytes([n]) * 32), trio.key, soon) for n in range(200)]
    names = [of_seed(bytes([n]) * 32).peer_id for n in range(200)]
    answers = [await trio.bring(names, records, [soon] * 200) for _ in range(30)]
    assert None in answers  # at some time it is no longer listened to
    looked_at = trio.alice._validator.refused - before
    assert 200 <= looked_at < 3000
    assert await trio.bob.publish(presence(trio.bob.peer_id), ttl_seconds=60)
    assert trio.bob.peer_id in await trio.seen()
    found = trio.alice._node.dht.protocol.storage.get(trio.key)
    assert len(found.value) == 2
    assert PeerId(names[0]) not in found.value
