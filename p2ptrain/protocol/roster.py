"""Who leads a step, and who stands in.

The last entry's roster fixes the order, rotated by the step so that the work of leading goes round. Peers
that were not in it come last: they lead only when nobody of the roster is left, as at step 0 or after
everyone restarted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from p2ptrain.records import EntryHeader, PeerId


def leader_order(step: int, last: EntryHeader | None, others: Iterable[PeerId]) -> tuple[PeerId, ...]:
    """The leader of `step` and its successors, first to last. `last` is the entry that led to `step`."""
    roster: Sequence[PeerId] = last.roster if last is not None else ()
    turn = step % len(roster) if roster else 0
    rotated = (*roster[turn:], *roster[:turn])
    return (*rotated, *sorted(set(others) - set(roster)))
