"""What befalls a swarm: a `Story` is drawn from a seed, and the seed also decides every chance in it.

The mix is wide and the stories are short: most have one to three kinds of fault, each in the first seconds,
so that ten thousand of them fit into a test run and every kind meets every other one often.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

PHASES = ("asking", "collecting", "reducing", "all done", "half told")
"""Where a leader falls: while its take-over's questions are out, while reports come in, while members reduce,
when all are Done and nobody has been told, and when some have been told."""

LIES = ("chunk", "mean", "two faces", "boast", "donor", "report")
"""A chunk or a mean out of contract, a mean of which one member gets another version, a position that is not
the peer's, a log that does not hold when it is fetched, and more samples than a peer can have computed."""


@dataclass(frozen=True)
class Story:
    """A swarm and the faults that it meets; the defaults are a calm one."""

    peers: int = 4
    target: int = 16
    """Samples per step."""
    latency: tuple[float, float] = (0.02, 0.3)
    loss: float = 0.0
    """Chance that a message meets a reset of its lane."""
    duplicates: float = 0.0
    """Chance that a control message arrives once more, up to a second later."""
    crashes: int = 0
    leader_falls: tuple[str, ...] = ()
    """Phases in which a leader crashes, or stands still where `leader_pauses` says so."""
    leader_pauses: bool = False
    donors_die: int = 0
    """So many donors crash when they are asked for their log."""
    restarts: bool = False
    """Who crashes comes back after up to 6 s."""
    forgets: bool = True
    """Who comes back may have lost the newest entries, or all."""
    leaves: int = 0
    joins: int = 0
    pauses: int = 0
    hangs: int = 0
    partitions: int = 0
    cuts: int = 0
    """Pairs that do not reach each other for a while, in one direction or in both."""
    slow: bool = False
    """p0 computes at a tenth of the others' pace."""
    slow_link: bool = False
    """Everything to and from p0 takes four times as long."""
    liars: tuple[str, ...] = ()
    quorum: Literal["any", "majority"] = "any"
    leased: bool = False
    """Samples are numbered, and each counts once in all of a lineage."""
    skips: float = 0.0
    """Chance that the gradient of a leased micro-batch is not finite."""
    audited: bool = False
    """Reducers' sums are done again; then one may tell the lie `sum`: the same false mean to all, from then
    on. Not drawn: with audits others may stand on what is being undone, and many an invariant says less."""
    chunk_values: int = 4
    seconds: float = 7.0
    """All faults are over by then."""
    patience_seconds: float = 240.0
    """How much later each survivor must have gone on by three steps."""

    @staticmethod
    def draw(chance: random.Random) -> Story:
        def sometimes(share: float, most: int = 1) -> int:
            return chance.randint(1, most) if chance.random() < share else 0

        majority = chance.random() < 0.25
        falls = [phase for phase in PHASES if chance.random() < 0.08]
        if "asking" in falls:
            falls.insert(0, "collecting")  # somebody has to take over first
        return Story(
            peers=chance.choice([3, 3, 4, 5] if majority else [1, 2, 2, 3, 3, 4, 5]),
            target=chance.choice([4, 8, 16, 30]),
            latency=chance.choice([(0.001, 0.002), (0.005, 0.05), (0.02, 0.3)]),
            loss=chance.choice([0.0, 0.0, 0.002, 0.02]),
            duplicates=chance.choice([0.0, 0.0, 0.0, 0.05]),
            crashes=sometimes(0.4, 3),
            leader_falls=tuple(falls),
            leader_pauses=chance.random() < 0.2,
            donors_die=sometimes(0.1),
            restarts=majority or chance.random() < 0.6,
            forgets=not majority,
            leaves=0 if majority else sometimes(0.12, 2),
            joins=sometimes(0.3, 2),
            pauses=sometimes(0.15, 2),
            hangs=0 if majority else sometimes(0.1),
            partitions=sometimes(0.15),
            cuts=sometimes(0.12, 2),
            slow=chance.random() < 0.15,
            slow_link=chance.random() < 0.08,
            liars=tuple(lie for lie in LIES if chance.random() < 0.05),
            quorum="majority" if majority else "any",
            chunk_values=chance.choice([2, 4, 4]),
            leased=chance.random() < 0.4,
            skips=chance.choice([0.0, 0.0, 0.05]),
        )

    @property
    def may_fork(self) -> bool:
        """Only a peer that lives and is taken for gone can make two lineages; they must become one again."""
        stood_still = self.pauses or (self.leader_falls and self.leader_pauses)
        return bool(self.partitions or self.cuts or stood_still or self.slow_link)
