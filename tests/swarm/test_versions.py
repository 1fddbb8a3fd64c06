"""A peer that is asked for the run and speaks another version of the protocol: told apart, with the command
that helps."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from contract import RUN

from p2ptrain import PROTOCOL_VERSION
from p2ptrain.errors import IncompatibleRun, OtherVersion
from p2ptrain.records import GetRun, Hello, PeerId
from p2ptrain.swarm.crew import Crew
from p2ptrain.swarm.frames import pack
from p2ptrain.swarm.lanes import ASKING, Kind, Lanes, Stream
from peers.volunteer import fetch_run, upgrade
from tests.unit.organizer import invite

pytestmark = pytest.mark.swarm


async def asked(version: int) -> Any:
    """What a peer of that version makes of a question for the run."""
    ours, theirs = socket.socketpair()
    _, their_writer = await asyncio.open_connection(sock=theirs)
    their_writer.write(pack(Hello(protocol=version, fingerprint=RUN)))

    async def open_stream(peer: PeerId, kind: Kind, seconds: float) -> Stream:
        return await asyncio.open_connection(sock=ours)

    try:
        async with Crew() as crew:
            lanes = Lanes(
                PeerId("me"),
                ASKING,
                open_stream,
                crew.spawn,
                max_payload_bytes=0,
                on_event=lambda event: None,
            )
            return await lanes.request(PeerId("other"), GetRun(), timeout_seconds=5, max_bytes=1024)
    finally:
        their_writer.close()


@pytest.mark.parametrize("version", [PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1])
async def test_other_version_is_told_from_a_refusal(version: int) -> None:
    with pytest.raises(OtherVersion, match=f"speaks protocol {version}, not {PROTOCOL_VERSION}") as said:
        await asked(version)
    assert said.value.theirs == version


async def test_join_ends_with_code_3_and_the_command_to_upgrade() -> None:
    class Newer:
        """A swarm whose peers are all of the next version."""

        async def request(self, *_: Any, **__: Any) -> Any:
            raise OtherVersion("peer …x speaks protocol 99, not 9", 99)

    with pytest.raises(IncompatibleRun, match=r"pip install --upgrade p2ptrain") as said:
        await fetch_run(Newer(), invite())  # type: ignore[arg-type]
    assert said.value.exit_code == 3
    assert "ask the organizer which version" in upgrade(PROTOCOL_VERSION - 1)
