"""Am I reachable, and by which way otherwise: what a peer asks of others, and answers when they ask.

The initial peers dial us back; who is hidden reserves a place at peers that relay. What an answer means, and
what it may cost, is decided in `reach`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from p2ptrain.errors import BadMessage, LocalFault, Unreachable
from p2ptrain.events import ReachChanged, clean, short
from p2ptrain.records import DialBack, Dialled, PeerId
from p2ptrain.swarm import reach
from p2ptrain.swarm.frames import pack, read_frame
from p2ptrain.swarm.lanes import Stream
from p2ptrain.swarm.machine import is_loopback
from p2ptrain.swarm.node import Entry, Node

STRANGER = {"noListenAddrs": "1", "tls": "1", "relay": "0"}
"""Options of a daemon without identity or connections, for looking at somebody from outside."""


class Outside:
    """How this peer looks from outside."""

    def __init__(
        self,
        me: PeerId,
        initial: Sequence[Entry],
        listen: Sequence[str],
        announce: Sequence[str],
        start_daemon: Callable[[Mapping[str, str]], Awaitable[Node]],
        on_event: Callable[[ReachChanged], None],
    ) -> None:
        """`initial`: whom to ask; `listen`: where we listen by then, and `announce` what others should use
        instead; `start_daemon`: with such options as `STRANGER`."""
        self._me, self._initial, self._listen, self._announce = me, initial, listen, announce
        self._start_daemon, self._on_event = start_daemon, on_event
        self.reach = reach.Reach()
        """What others say of us: whether they can open connections to us."""
        self.relays: tuple[Entry, ...] = ()
        """Where other hidden peers can meet us, if we are hidden."""
        self._doorkeeper = reach.Doorkeeper()

    async def look(self, node: Node) -> None:
        """Have the initial peers dial us back."""
        port = reach.port_of((self._announce or self._listen)[0])
        if port is None or all(map(is_loopback, self._listen)):
            return  # on this machine everybody reaches everybody
        entries = [entry for entry in self._initial if node.knows(entry.peer)]
        answers = await asyncio.gather(*(self._ask_back(node, entry, port) for entry in entries))
        found = reach.judged([answer for answer in answers if answer is not None])
        before = self.reach
        if found.reachable is None or found.reachable is before.reachable:
            return
        self.reach = found
        await self.reserve(node)
        self._on_event(
            ReachChanged(reachable=bool(found.reachable), address=found.address, relays=len(self.relays))
        )

    async def reserve(self, node: Node) -> None:
        """Be there for other hidden peers, at each connected peer that relays. A relay forgets us when the
        connection breaks, or after an hour. p2pd would reserve by itself, but only once it knows that it is
        hidden, and that it never learns among private addresses."""
        if not self.reach.hidden:
            self.relays = ()
            return
        try:
            async with asyncio.timeout(reach.DIAL_SECONDS):
                entries = reach.candidates(await node.connections(), [each.peer for each in self._initial])
        except (OSError, EOFError):
            return  # our own daemon died; there will be another time
        grants = await asyncio.gather(*(self._granted(node, peer) for peer, _ in entries))
        self.relays = tuple(
            Entry(peer, address)
            for (peer, address), grant in zip(entries, grants, strict=True)
            if grant >= reach.ENOUGH_BYTES
        )

    async def _granted(self, node: Node, relay: PeerId) -> int:
        """How many bytes this peer relays for us and another, each way; 0 if it does not."""
        try:
            async with asyncio.timeout(reach.DIAL_SECONDS):
                reader, writer = await node.open_stream(relay, reach.HOP)
                try:
                    writer.write(reach.RESERVE)
                    return reach.granted(await reach.read_message(reader))
                finally:
                    writer.transport.abort()
        except (Unreachable, BadMessage, OSError, EOFError):  # a TimeoutError is an OSError
            return 0

    async def relays_little(self, node: Node) -> bool:
        """p2pd starts two relays for one protocol, ours and one that passes 128 KiB and hangs up, and which
        of them answers is chance. A stranger asks."""
        stranger = await self._start_daemon(STRANGER)
        try:
            async with asyncio.timeout(reach.DIAL_SECONDS):
                await stranger.connect(Entry(self._me, (await node.addresses())[0]))
            return await self._granted(stranger, self._me) < reach.ENOUGH_BYTES
        except (Unreachable, OSError, EOFError):
            return False  # nobody could say
        finally:
            await stranger.stop()

    async def _ask_back(self, node: Node, entry: Entry, port: int) -> Dialled | None:
        """What that peer says; None if it does not."""
        try:
            async with asyncio.timeout(reach.ANSWER_SECONDS):
                reader, writer = await node.open_stream(entry.peer, reach.PROTOCOL)
                try:
                    writer.write(pack(DialBack(port=port)))
                    answer, _, _ = await read_frame(reader, max_payload_bytes=0)
                finally:
                    writer.transport.abort()
        except (Unreachable, BadMessage, OSError, EOFError):  # a TimeoutError is an OSError
            return None
        return answer if isinstance(answer, Dialled) else None

    async def answer(
        self, peer: PeerId, observed: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Dial back a peer that asks for it."""
        try:
            async with asyncio.timeout(reach.DIAL_SECONDS):
                question, _, _ = await read_frame(reader, max_payload_bytes=0)
        except (BadMessage, TimeoutError):
            return
        if not isinstance(question, DialBack):
            return
        address = reach.target(observed, question.port)
        if address is None:
            answer = Dialled(reachable=None, detail="not asked over TCP")
        elif not self._doorkeeper.admits(peer, asyncio.get_running_loop().time()):
            answer = Dialled(reachable=None, detail="busy; ask again later")
        else:
            try:
                failure = await self._dial_back(Entry(peer, address))
                answer = Dialled(reachable=not failure, address=address, detail=clean(failure, 300))
            except LocalFault as fault:
                answer = Dialled(reachable=None, detail=clean(str(fault), 300))
            finally:
                self._doorkeeper.done()
        writer.write(pack(answer))
        await writer.drain()

    async def _dial_back(self, entry: Entry) -> str:
        """Why no new connection can be made to this peer; empty if one can. A daemon of its own makes it:
        ours would use the connection that it has."""
        stranger = await self._start_daemon(STRANGER)
        try:
            async with asyncio.timeout(reach.DIAL_SECONDS):
                await stranger.connect(entry)
            return ""
        except TimeoutError:
            return f"no answer within {reach.DIAL_SECONDS:.0f} s"
        except Unreachable as fault:
            return str(fault)
        except (OSError, EOFError) as error:
            raise LocalFault(f"the libp2p daemon died while dialling: {error!r}") from error
        finally:
            await stranger.stop()

    async def stream_to(self, node: Node, peer: PeerId, protocol: str, seconds: float) -> Stream:
        """One that is hidden itself asks the relays for a peer that it cannot reach. One that is not leaves
        it to the hidden peer to come: that way is direct. Raises Unreachable or TimeoutError."""
        if not self.reach.hidden:
            return await node.open_stream(peer, protocol)
        try:
            async with asyncio.timeout(seconds / 2):
                return await node.open_stream(peer, protocol)
        except (Unreachable, TimeoutError) as fault:
            reasons = [str(fault) or "no answer"]
        for relay in self.relays:
            try:
                await node.connect(Entry(peer), through=relay)
                return await node.open_stream(peer, protocol)
            except Unreachable as fault:
                reasons.append(f"by way of {short(relay.peer)}: {fault}")
        raise Unreachable("; ".join(reasons))
