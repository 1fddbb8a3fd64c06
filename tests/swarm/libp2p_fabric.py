"""Real peers on loopback, for the contract and for libp2p's own tests."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contract import RUN

from p2ptrain.swarm.port import Swarm

if TYPE_CHECKING:
    from p2ptrain.swarm.libp2p import Libp2pSwarm

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


class Libp2pFabric:
    """Every peer enters by those that are there, and has its identity file in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._peers: dict[Swarm, AsyncExitStack] = {}

    async def join(self, name: str, fingerprint: str = RUN, **options: Any) -> Libp2pSwarm:
        from p2ptrain.swarm.libp2p import Libp2pSwarm  # slow: not while pytest collects

        options = {
            "initial_peers": [address for peer in self._peers for address in peer.visible_addresses()],
            "listen": LOOPBACK,
            **options,
        }
        swarm = Libp2pSwarm(self._folder / name, "a-run", fingerprint, **options)
        stack = AsyncExitStack()
        await stack.enter_async_context(swarm)
        self._peers[swarm] = stack
        return swarm

    async def leave(self, swarm: Swarm) -> None:
        await self._peers.pop(swarm).aclose()

    async def kill(self, swarm: Libp2pSwarm) -> None:
        assert swarm._node is not None
        swarm._node.daemon.kill()  # the kernel cuts all its connections, as when the whole peer is killed
        await self.leave(swarm)

    async def aclose(self) -> None:
        for swarm in list(self._peers):
            await self.leave(swarm)
