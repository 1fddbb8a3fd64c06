"""How often a peer says that it is here, and how often it looks who else is.

All presence records lie under one key, so the nodes nearest to it keep them all and hand all of them out: a
look costs the swarm's size, and everybody's looks its square. Only one peer has to look often, the leader: it
asks strangers where they stand, and who follows it hears from it where that leads.

A record also says which states its peer had at some of the last steps, the same ones for all: by that, and by
the majority of those who signed, a newcomer knows a made-up snapshot (`replica.joining`).

Not covered: what is done with the records (`Member.informed`), and where they lie (`swarm.libp2p`).
"""

from __future__ import annotations

from collections.abc import Iterable

from p2ptrain.records import Milestone, Position

PRESENCE_SECONDS = 3.0
"""How often a peer renews its presence record; it lives five times as long."""
RECORD_BYTES = 950
"""Of a usual record; one that shows an invite has half as many again."""
KEEPER_BYTES_PER_SECOND = 2**18
"""What a node that keeps the records may have to send for everybody's looks: 2 Mbit/s."""


RUNGS = (1, 4, 16, 64)
"""A peer tells of its newest step, and of the last that each of these divides: two peers that are up to some
dozens of steps apart then speak of a common one. 64 steps pass within one renewal only at 20 a second."""


def standing(before: Iterable[Milestone], newest: Milestone) -> tuple[Milestone, ...]:
    """What a peer that told of those says when it has got to the newest, oldest first."""
    told = {newest.step - newest.step % rung for rung in RUNGS}
    known = {each.step: each for each in (*before, newest)}
    return tuple(known[step] for step in sorted(told & known.keys()))


def milestone(position: Position, state_digest: str) -> Milestone:
    """What is said of that state."""
    return Milestone(step=position.step, lineage=position.lineage[:16], state=state_digest[:32])


def look_seconds(others: int, *, urgent: bool) -> float:
    """Between two looks of a peer that knows so many others. `urgent`: it leads, or is not in time.

    Without that, a newcomer is known to a large swarm's members from what it says itself, and by its record
    only later; meanwhile it has to make the direct connections, or the chunks go over libp2p.
    """
    if urgent:
        return PRESENCE_SECONDS
    return max(PRESENCE_SECONDS, others * (others + 1) * RECORD_BYTES / KEEPER_BYTES_PER_SECOND)
