"""What a peer needs from the network, and all it may assume about it.

Two lanes per pair of peers, each opened on first use: `CONTROL`, an ordered stream of small messages, and
`DATA` for chunks, so that tensors never hold up a decision. Chunks go by the best carrier there is to that
peer at the moment, maybe over several connections at once, so one may overtake another. A lane may break at
any time; frames in flight are then lost and both ends are told by `on_link(peer, up)`: `True` after a quick
reconnect (say again what matters), `False` when the peer could not be reached again (for all we know it is
gone). Nothing else is promised: not delivery, not liveness; every wait on a peer needs its own deadline.

Everything that arrives was authenticated as coming from the peer id that the handler is given, comes from a
peer with our run fingerprint, was parsed into a `Record`, and kept its size bounds. Malformed input never
reaches a handler: the carrier counts it, drops it and closes that stream.

Time is the running event loop's (`loop.time()`, `asyncio.sleep`, `asyncio.timeout`): under `memory` that
loop's clock is virtual, so nothing here or above may read another clock to make a decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from p2ptrain.records import Averaged, Chunk, Message, PeerId, Reply, Request, SignedRecord

Buffer = bytes | bytearray | memoryview


class Handler(Protocol):
    """What a peer does with what arrives. All methods run on the event loop and must not block."""

    def on_message(self, sender: PeerId, message: Message) -> None: ...

    async def on_chunk(self, sender: PeerId, header: Chunk | Averaged, payload: Buffer) -> None:
        """Awaited before the next frame of that lane is read: this is the back-pressure."""
        ...

    def place(self, sender: PeerId, header: Chunk | Averaged, size: int) -> memoryview | None:
        """Where the payload of this chunk, which is about to arrive, shall be written; None: wherever. A
        carrier need not ask, and what it was lent it hands to `on_chunk` if the payload came whole."""
        ...

    def on_link(self, peer: PeerId, up: bool) -> None: ...

    async def on_request(self, sender: PeerId, request: Request) -> tuple[Reply, Buffer]: ...


class Swarm(Protocol):
    """The network as one peer sees it. An async context manager: inside, the peer is on the net."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def dial_seconds(self) -> float:
        """How long a peer whose link broke is given to answer again, from what reaching peers took so far."""
        ...

    @property
    def delivered_bytes(self) -> int:
        """Bytes of chunks that have reached others so far, framing included; where the carrier cannot tell,
        those that it took."""
        ...

    def sign(self, claim: bytes) -> str:
        """This peer's signature, as hex."""
        ...

    def signed(self, peer: PeerId, claim: bytes, signature: str) -> bool:
        """Whether that peer has signed these bytes."""
        ...

    def serve(self, handler: Handler) -> None:
        """Deliver what arrives to `handler`; until then it is refused."""
        ...

    def send(self, to: PeerId, message: Message) -> None:
        """Queue a control message; never blocks. If the queue is full or the peer is gone, it is dropped."""
        ...

    async def send_chunk(self, to: PeerId, header: Chunk | Averaged, payload: Buffer) -> None:
        """Returns once the carrier has taken the bytes. Raises Unreachable if the lane broke."""
        ...

    async def request(
        self, to: PeerId, request: Request, *, timeout_seconds: float, max_bytes: int
    ) -> tuple[Reply, bytes]:
        """Ask and wait for the one answer. Raises Unreachable, BadMessage (larger than `max_bytes`) or
        Refused."""
        ...

    async def publish(self, record: SignedRecord, *, ttl_seconds: float) -> bool:
        """Sign the record and store it under this run's key for its kind; False if no other node took it."""
        ...

    async def lookup(self, kind: str) -> Sequence[SignedRecord]:
        """All valid records of that kind in this run; a peer has at most one of a kind."""
        ...
