"""What a call tells a member of a freeze, and that the member makes the same freeze of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transcripts import standing_at

from p2ptrain.protocol.roster import call_for, freeze_of
from p2ptrain.protocol.spans import levels, share_out, shares
from p2ptrain.records import MAX_ROSTER, Ballot, Freeze, PeerId
from p2ptrain.swarm.frames import pack

VALUES = 1_000_000
names = st.integers(0, 40).map(lambda number: PeerId(f"peer {number:02}"))


def frozen(roster: tuple[PeerId, ...], rates: list[float], finishing: tuple[PeerId, ...] = ()) -> Freeze:
    return Freeze(
        step=6,
        parent="a" * 64,
        ballot=Ballot(number=1, leader=roster[0]),
        roster=roster,
        spans=share_out(VALUES, shares(levels(rates))),
        finishing=finishing,
        cutoff_seconds=1.0,
        deadline_seconds=3.0,
    )


@given(st.data(), st.sets(names), st.sets(names, min_size=1))
def test_every_member_makes_the_leaders_freeze_of_its_call(
    data: st.DataObject, before: set[PeerId], now: set[PeerId]
) -> None:
    roster = tuple(sorted(now))
    rates = data.draw(st.lists(st.floats(0, 1e9), min_size=len(roster), max_size=len(roster)))
    finishing = tuple(sorted(data.draw(st.sets(st.sampled_from(roster)))))
    _, last = standing_at(6, tuple(sorted(before))) if before else (None, None)
    freeze = frozen(roster, rates, finishing)
    for member in roster:
        call = call_for(member, freeze, levels(rates), "1.0", last)
        own = (member,) if member in finishing else ()
        assert freeze_of(member, call, last, VALUES) == freeze.model_copy(update={"finishing": own})


def test_call_is_for_nobody_else() -> None:
    a, b, c = (PeerId(name) for name in "abc")
    _, last = standing_at(6, (a, b, c))
    call = call_for(a, frozen((a, b), [0.0, 0.0]), levels([0.0, 0.0]), "1.0", last)
    assert freeze_of(c, call, last, VALUES) is None, "it is not on the roster"
    _, other = standing_at(6, (a, b))
    assert freeze_of(a, call, last, VALUES) is not None
    assert freeze_of(a, call.model_copy(update={"came": (c,)}), other, VALUES) is None, "it has another entry"


@pytest.mark.parametrize("changed", [0, 1, 10])
def test_call_grows_with_what_has_changed_and_one_letter_for_each_member(changed: int) -> None:
    everybody = tuple(PeerId(f"{number:052}") for number in range(MAX_ROSTER))
    _, last = standing_at(6, everybody[: MAX_ROSTER - changed])
    roster = everybody[changed:]
    call = call_for(roster[-1], frozen(roster, [1e6] * len(roster)), levels([1e6] * len(roster)), "1.0", last)
    assert len(pack(call)) < len(roster) + 61 * changed + 400
