"""How many samples a peer can have by now, going by what it has brought before.

A sample count is its owner's word: nobody sees another compute. But entries say what each has brought so far,
and this peer's clock how long each of them took. Who suddenly claims several times as much is not counted
before it can have computed it at several times its speed: until then no step is frozen on its word, and it is
on no roster. An honest peer that has become so much faster loses a step or two by that, and is blamed for
nothing. The first entries are taken as they come: there is nothing to compare them with.

Not covered: who grows a little with every step; what a leader claims of itself, who may freeze when it likes.
Runs whose members may lie bound what a count is worth (ADR 17), or lease their samples (ADR 34).
"""

from __future__ import annotations

from p2ptrain.records import EntryHeader, PeerId

JUMP = 3.0
"""Times what it usually brings, or what is its fair share of a step, or what it computes in such a time."""
MEMORY = 0.9
"""Of what a peer brought at its best, so much counts after each further entry."""
MAX_KNOWN = 1024
SHORTEST_SECONDS = 1e-3
"""A step that took less says nothing about speed."""


class Speeds:
    """What one peer has seen the others bring."""

    def __init__(self) -> None:
        self._usual: dict[PeerId, float] = {}
        """Samples of an entry."""
        self._rate: dict[PeerId, float] = {}
        """Samples per second."""
        self._fair = self._fair_rate = 0.0

    def saw(self, header: EntryHeader, seconds: float) -> None:
        """That entry was committed so long after the one before."""
        seconds = max(seconds, SHORTEST_SECONDS)
        self._fair = header.total_samples / len(header.roster)
        self._fair_rate = self._fair / seconds
        if len(self._usual) + len(header.roster) > MAX_KNOWN:
            self._usual = {peer: self._usual[peer] for peer in header.roster if peer in self._usual}
            self._rate = {peer: self._rate[peer] for peer in self._usual}
        for peer, samples in zip(header.roster, header.samples, strict=True):
            self._usual[peer] = max(samples, MEMORY * self._usual.get(peer, 0.0))
            self._rate[peer] = max(samples / seconds, MEMORY * self._rate.get(peer, 0.0))

    def counts_from(self, peer: PeerId, samples: int, began: float) -> float:
        """When so many samples of that peer may count in a step that began then; -inf: at any time. Who is
        not known may be as fast as the fastest."""
        if not self._usual:
            return float("-inf")
        usual = self._usual.get(peer, max(self._usual.values()))
        rate = self._rate.get(peer, max(self._rate.values()))
        if samples <= JUMP * max(usual, self._fair):
            return float("-inf")
        return began + samples / (JUMP * max(rate, self._fair_rate))
