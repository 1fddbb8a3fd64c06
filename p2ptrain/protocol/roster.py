"""Who leads a step, and who stands in.

The last entry's roster fixes the order, rotated by the step so that the work of leading goes round. Peers
that were not in it come last: they lead only when nobody of the roster is left, as at step 0 or after
everyone restarted.

A new roster is told to its members as the difference to that one, which all have in their logs: rosters grow
with the swarm, and a leader tells its whole roster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from p2ptrain.protocol.spans import share_out, shares
from p2ptrain.records import MAX_ROSTER, Call, EntryHeader, Freeze, PeerId


def leader_order(step: int, last: EntryHeader | None, others: Iterable[PeerId]) -> tuple[PeerId, ...]:
    """The leader of `step` and its successors, first to last. `last` is the entry that led to `step`."""
    roster: Sequence[PeerId] = last.roster if last is not None else ()
    turn = step % len(roster) if roster else 0
    rotated = (*roster[turn:], *roster[:turn])
    return (*rotated, *sorted(set(others) - set(roster)))


def call_for(member: PeerId, freeze: Freeze, levels: str, incarnation: str, last: EntryHeader | None) -> Call:
    """What one member has to be told of a freeze; `levels` are those that its spans follow from."""
    before = last.roster if last is not None else ()
    here = set(freeze.roster)
    return Call(
        step=freeze.step,
        parent=freeze.parent,
        ballot=freeze.ballot,
        left=tuple(rank for rank, peer in enumerate(before) if peer not in here),
        came=tuple(sorted(here - set(before))),
        levels=levels,
        incarnation=incarnation,
        finishing=member in freeze.finishing,
        cutoff_seconds=freeze.cutoff_seconds,
        deadline_seconds=freeze.deadline_seconds,
        terms=freeze.terms,
    )


def freeze_of(member: PeerId, call: Call, last: EntryHeader | None, values: int) -> Freeze | None:
    """The freeze that `member` is told of, or None if the call cannot be meant for it: it is not on that
    roster, or has another entry behind it than the caller."""
    before = last.roster if last is not None else ()
    left = set(call.left)
    stayed = [peer for rank, peer in enumerate(before) if rank not in left]
    roster = tuple(sorted({*stayed, *call.came}))
    if len(roster) != len(call.levels) or len(roster) > MAX_ROSTER or member not in roster:
        return None
    try:
        spans = share_out(values, shares(call.levels))
    except ValueError:
        return None
    return Freeze(
        step=call.step,
        parent=call.parent,
        ballot=call.ballot,
        roster=roster,
        spans=spans,
        finishing=(member,) if call.finishing else (),
        cutoff_seconds=call.cutoff_seconds,
        deadline_seconds=call.deadline_seconds,
        terms=call.terms,
        signature=call.signature,
        caller=call.caller,
    )
