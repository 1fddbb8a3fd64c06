"""A volunteer that asks for the run file does not give up at the first stream that breaks."""

from __future__ import annotations

from typing import Any, cast

import pytest

from p2ptrain.config import RunConfig, canonical_json
from p2ptrain.errors import Unreachable
from p2ptrain.records import GetRun, PeerId, Piece
from p2ptrain.swarm import clock
from p2ptrain.swarm.port import Swarm
from peers.volunteer import RUN_FILE_PAUSES_SECONDS, _run_of

PEER = PeerId("anna")


class Flaky:
    """Its first streams break."""

    def __init__(self, breaks: int) -> None:
        self.breaks, self.asked = breaks, 0

    async def request(self, to: PeerId, request: GetRun, **limits: Any) -> tuple[Piece, bytes]:
        self.asked += 1
        if self.asked <= self.breaks:
            raise Unreachable(f"peer {to} ended the stream")
        return Piece(), canonical_json(RunConfig()).encode()


def test_run_file_is_asked_for_again_when_a_stream_breaks() -> None:
    swarm = Flaky(breaks=len(RUN_FILE_PAUSES_SECONDS))
    assert clock.run(_run_of(cast(Swarm, swarm), PEER)) == RunConfig()
    assert swarm.asked == 3


def test_volunteer_is_told_when_every_stream_breaks() -> None:
    swarm = Flaky(breaks=99)
    with pytest.raises(Unreachable, match="ended the stream"):
        clock.run(_run_of(cast(Swarm, swarm), PEER))
    assert swarm.asked == 3
