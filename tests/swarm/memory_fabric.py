"""Peers in this process, for the contract and for `memory`'s own tests."""

from __future__ import annotations

from contextlib import AsyncExitStack

from contract import RUN

from p2ptrain.swarm.memory import MemoryHub, MemorySwarm


class MemoryFabric:
    """Peers on one hub."""

    def __init__(self, hub: MemoryHub) -> None:
        self.hub = hub
        self._peers: dict[MemorySwarm, AsyncExitStack] = {}

    async def join(self, name: str, fingerprint: str = RUN) -> MemorySwarm:
        swarm = self.hub.swarm(name, fingerprint)
        stack = AsyncExitStack()
        await stack.enter_async_context(swarm)
        self._peers[swarm] = stack
        return swarm

    async def leave(self, swarm: MemorySwarm) -> None:
        await self._peers.pop(swarm).aclose()

    async def kill(self, swarm: MemorySwarm) -> None:
        self.hub.kill(swarm.peer_id)
        await self.leave(swarm)

    async def aclose(self) -> None:
        for swarm in list(self._peers):
            await self.leave(swarm)
