"""Stories that once broke an invariant, each with its seed; a story that breaks prints the line to add.

A story is kept whole, not only its seed, so that it stays itself when the mix in `story.py` changes. A change
of the protocol may still turn it into another tale; what a bug was is written down as a transcript in
`tests/unit`.
"""

from __future__ import annotations

from tests.simulation.story import Story

KEPT: tuple[tuple[int, Story], ...] = (
    # A donor that cannot help makes a member forget which attempt it has left: it joins it a second time.
    (
        541,
        Story(peers=3, target=4, latency=(0.005, 0.05), loss=0.02, liars=("boast",), seconds=4.0),
    ),
    # After a fork, a frame of the lineage that lost is taken for one of the winner's: same step and ballot.
    (
        9233,
        Story(
            peers=3,
            target=4,
            latency=(0.005, 0.05),
            loss=0.02,
            leader_falls=("collecting", "asking"),
            leader_pauses=True,
            restarts=True,
            joins=1,
            slow=True,
            slow_link=True,
        ),
    ),
    # Who restarts within an attempt is sent its freeze again, and brings other samples to it than before.
    (
        21002,
        Story(peers=3, target=8, crashes=3, restarts=True, forgets=False, quorum="majority"),
    ),
    # The leader falls; one of two follows a leader that hangs, the other follows the first, hears nothing,
    # and commits what the first does not hold.
    (
        423,
        Story(
            peers=4,
            target=8,
            latency=(0.001, 0.002),
            loss=0.002,
            leader_falls=("reducing",),
            hangs=1,
            liars=("mean", "boast"),
            chunk_values=2,
            seconds=7.0,
        ),
    ),
    # Who comes back asks the one peer there is, whose answer is lost with its link, and takes that one for
    # dead.
    (
        1856,
        Story(
            peers=3,
            target=8,
            latency=(0.02, 0.3),
            loss=0.02,
            duplicates=0.05,
            crashes=3,
            restarts=True,
            joins=1,
            slow=True,
            chunk_values=2,
            seconds=7.0,
        ),
    ),
)
