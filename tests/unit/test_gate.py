"""The gate: who is let in on what they show, for every way in which that can be wrong, with no network.

Not covered: that nothing is said before it is asked, see `tests/swarm/test_invites.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
from organizer import NOW, ORGANIZER, RUN_ID, invite

from p2ptrain.protocol.presence import RUNGS
from p2ptrain.records import (
    MAX_HELLO_BYTES,
    MAX_KICKED,
    MAX_REVOKED,
    Ballot,
    GetEntry,
    GetEvents,
    GetInput,
    GetLineage,
    GetManifest,
    GetMetrics,
    GetPiece,
    GetPledges,
    GetProof,
    GetRun,
    Grant,
    Hello,
    Kick,
    Milestone,
    Pass,
    Presence,
    Redeem,
    Request,
    Succession,
)
from p2ptrain.swarm.access import pass_of, redeemed
from p2ptrain.swarm.frames import pack
from p2ptrain.swarm.gate import Gate, kick, permits, revoke, succeed
from p2ptrain.swarm.identity import SIGNATURE_BYTES, of_seed
from p2ptrain.swarm.validator import MAX_RECORD_BYTES

ALICE, BOB, EVE = (of_seed(bytes([number]) * 32).peer_id for number in (1, 2, 3))
STRANGER = of_seed(b"s" * 32)


class Clock:
    """A clock that stands until it is set."""

    now = float(NOW)

    def __call__(self) -> float:
        return self.now


def gate(**changes: Any) -> Gate:
    return Gate(invite(**changes).shown_by(ALICE), ALICE, Clock())


def judged(shown: Pass | None, **options: Any) -> str:
    """What is wrong with that, shown by Bob."""
    return gate().flaw(BOB, shown, **options)


def bobs(**changes: Any) -> Pass:
    return invite(**changes).shown_by(BOB)


def test_peer_is_let_in_with_a_pass_of_its_own_by_the_same_or_another_invite() -> None:
    ours = invite()
    assert Gate(ours.shown_by(ALICE), ALICE, Clock()).flaw(BOB, ours.shown_by(BOB)) == ""
    assert judged(bobs(serial=7, role="watch", name="lab", issued=NOW, expires=NOW + 1)) == ""


def test_nobody_is_put_out_when_a_clock_was_set_back() -> None:
    assert judged(bobs(issued=NOW + 3600)) == ""


@pytest.mark.parametrize(
    ("shown", "flaw"),
    [
        (None, "no invite was shown"),
        (
            bobs(expires=NOW),
            "the invite shown (number 1) expired at 2027-01-15 08:00:00 UTC, and it is 2027-01-15",
        ),
        (bobs(run_digest="1" * 64), "the invite shown (number 1) is to run 111111111111… and not to "),
        (bobs(organizer=STRANGER), f"the invite shown is by organizer …{STRANGER.peer_id[-8:]} and not by …"),
        (invite().shown_by(EVE), "the invite shown was given to another peer"),
    ],
    ids=["none", "expired", "another run", "another organizer", "another peer"],
)
def test_peer_is_turned_away_and_told_why(shown: Pass | None, flaw: str) -> None:
    assert judged(shown).startswith(flaw)


def test_pass_to_another_run_of_the_organizer_is_good_for_asking_what_run_this_is() -> None:
    assert judged(bobs(run_digest="1" * 64), any_run=True) == ""
    assert judged(bobs(run_digest="1" * 64, expires=NOW), any_run=True)
    assert judged(bobs(organizer=STRANGER), any_run=True)


def test_pass_is_void_when_any_byte_of_it_was_changed() -> None:
    good, watch = bobs(), gate()
    assert not watch.flaw(BOB, good)
    for field in ("signature", "proof"):
        right = bytearray.fromhex(getattr(good, field))
        for place in range(len(right)):
            wrong = right.copy()
            wrong[place] ^= 1 << place % 8
            assert watch.flaw(BOB, good.model_copy(update={field: wrong.hex()}))
    changes: dict[str, Any] = {
        "run_id": "another", "run_digest": "1" * 64, "organizer": STRANGER.peer_id, "key": STRANGER.peer_id,
        "role": "serve", "serial": 2, "name": "x", "issued": 1, "expires": NOW + 9,
        "uses": 3,
    }  # fmt: skip
    assert changes.keys() == Grant.model_fields.keys()
    for field, value in changes.items():
        assert watch.flaw(
            BOB, good.model_copy(update={"grant": good.grant.model_copy(update={field: value})})
        )


def test_overheard_pass_is_void_when_the_thief_adds_a_proof_with_its_own_key() -> None:
    overheard = bobs()
    thief = invite(organizer=STRANGER).model_copy(update={"grant": overheard.grant})
    forged = thief.model_copy(update={"signature": overheard.signature}).shown_by(EVE)
    assert gate().flaw(EVE, forged) == "the invite shown was given to another peer"


def test_pass_ends_when_its_time_does_also_our_own() -> None:
    clock = Clock()
    ours = Gate(invite(expires=NOW + 60).shown_by(ALICE), ALICE, clock)
    theirs = bobs(expires=NOW + 30)
    assert not ours.flaw(BOB, theirs)
    clock.now += 31
    assert "expired" in ours.flaw(BOB, theirs)
    assert not ours.own_flaw()
    clock.now += 30
    assert "expired" in ours.own_flaw()


# -- revocations ---------------------------------------------------------------------------------------------


def test_pass_is_void_once_a_list_that_revokes_it_has_come_by_also_our_own() -> None:
    ours = gate(serial=5)
    assert ours.learn(revoke(ORGANIZER, RUN_ID, 1, [7, 3]))
    assert ours.flaw(BOB, bobs(serial=7)) == "the invite shown (number 7) has been revoked by the organizer"
    assert not ours.flaw(BOB, bobs(serial=4))
    assert not ours.own_flaw()
    ours.learn(revoke(ORGANIZER, RUN_ID, 2, [3, 5, 7]))
    assert "revoked" in ours.own_flaw()


def test_list_is_not_heeded_when_somebody_else_made_or_changed_it() -> None:
    ours, genuine = gate(), revoke(ORGANIZER, RUN_ID, 1, [7])
    for forged in (
        revoke(STRANGER, RUN_ID, 2, [1]),
        genuine.model_copy(update={"serials": (1,)}),
        genuine.model_copy(update={"revision": 2}),
    ):
        assert not ours.learn(forged)
    assert ours.decrees == {}


def test_older_list_does_not_bring_back_what_a_newer_one_revoked() -> None:
    ours = gate()
    ours.learn(revoke(ORGANIZER, RUN_ID, 2, [7]))
    assert ours.learn(revoke(ORGANIZER, RUN_ID, 1, []).model_copy(update={"peer": EVE}))
    assert ours.flaw(BOB, bobs(serial=7))


# -- kicks ---------------------------------------------------------------------------------------------------


def test_kicked_peer_is_turned_away_whatever_it_shows_until_its_time_is_over_or_it_is_lifted() -> None:
    clock = Clock()
    ours = Gate(invite().shown_by(ALICE), ALICE, clock)
    brief, banned = Kick(who=BOB, until=NOW + 60, reason="it stalls"), Kick(who=EVE, until=None)
    assert ours.learn(kick(ORGANIZER, RUN_ID, 1, [brief, banned]))
    assert [each.who for each in ours.kicks] == [BOB, EVE]
    for serial in (1, 7):
        assert ours.flaw(BOB, bobs(serial=serial)) == (
            "the organizer has put this peer out until 2027-01-15 08:01:00 UTC: it stalls"
        )
    assert ours.flaw(EVE, invite().shown_by(EVE)) == "the organizer has put this peer out"
    assert not ours.own_flaw()
    clock.now += 60
    assert not ours.flaw(BOB, bobs())
    assert [each.who for each in ours.kicks] == [EVE]
    assert ours.learn(kick(ORGANIZER, RUN_ID, 2, []))
    assert not ours.flaw(EVE, invite().shown_by(EVE))


def test_peer_that_is_kicked_itself_knows_that_others_do_not_let_it_in() -> None:
    ours = gate()
    ours.learn(kick(ORGANIZER, RUN_ID, 1, [Kick(who=ALICE, until=None, reason="by mistake")]))
    assert ours.own_flaw() == "the organizer has put this peer out: by mistake"


def test_kicks_are_not_heeded_when_they_are_forged_or_of_another_run_and_do_not_replace_revocations() -> None:
    ours, genuine = gate(), kick(ORGANIZER, RUN_ID, 1, [Kick(who=BOB, until=None)])
    changed = genuine.model_copy(update={"kicks": (Kick(who=EVE, until=None),)})
    for forged in (kick(STRANGER, RUN_ID, 2, []), kick(ORGANIZER, "another", 2, []), changed):
        assert not ours.learn(forged)
    assert ours.learn(revoke(ORGANIZER, RUN_ID, 9, [7]))
    assert ours.learn(genuine)
    assert (ours.revoked, [each.who for each in ours.kicks]) == ((7,), [BOB])


# -- invites for a few peers, and another key ----------------------------------------------------------------

BEARER = of_seed(b"\2" * 32)
"""Bob, with his key."""
SUCCESSOR = of_seed(b"p" * 32)
ENDS = NOW + 600


def test_invite_for_a_few_peers_is_good_for_asking_the_bootstrap_and_its_grant_for_one_peer_alone() -> None:
    limited = bobs(uses=2)
    assert judged(limited).endswith("is for 2 peers, and the bootstrap has not counted this one")
    bootstrap = Gate(invite(serial=0).shown_by(ALICE), ALICE, Clock(), redeems=True)
    assert not bootstrap.flaw(BOB, limited)
    own = pass_of(redeemed(ORGANIZER, limited.grant, BOB), BEARER)
    assert not judged(own)
    assert gate().flaw(EVE, own) == "the invite shown was given to another peer"
    stolen = pass_of(redeemed(ORGANIZER, limited.grant, BOB), of_seed(b"\3" * 32))
    assert gate().flaw(EVE, stolen) == "the invite shown was given to another peer"
    forged = limited.model_copy(update={"grant": limited.grant.model_copy(update={"uses": None})})
    assert "not as its organizer signed it" in judged(forged)
    revoked = gate()
    revoked.learn(revoke(ORGANIZER, RUN_ID, 1, [1]))
    assert "revoked" in revoked.flaw(BOB, own)


def successor_decreed(**changes: Any) -> Succession:
    return succeed(ORGANIZER, SUCCESSOR, RUN_ID, 1, ENDS).model_copy(update=changes)


def test_peer_follows_the_organizer_to_another_key_and_bears_with_those_who_have_not_for_a_while() -> None:
    clock = Clock()
    ours = Gate(invite().shown_by(ALICE), ALICE, clock)
    new, old = bobs(organizer=SUCCESSOR), bobs(serial=7)
    assert ours.flaw(BOB, new)
    assert ours.learn(successor_decreed())
    assert (ours.flaw(BOB, new), ours.flaw(BOB, old), ours.own_flaw()) == ("", "", "")
    assert ours.has_to_redeem
    clock.now = ENDS
    assert "by a key of the organizer's that ended at 2027-01-15 08:10:00 UTC" in ours.flaw(BOB, old)
    assert ours.own_flaw()
    ours.own = invite(organizer=SUCCESSOR).shown_by(ALICE)
    assert (ours.flaw(BOB, new), ours.own_flaw(), ours.has_to_redeem) == ("", "", False)


def test_newcomer_by_the_new_key_bears_with_the_old_one_only_if_the_new_one_says_so() -> None:
    ours = gate(organizer=SUCCESSOR)
    claimed = successor_decreed(accepted="0" * 128)
    assert not ours.learn(claimed)
    assert ours.flaw(BOB, bobs())
    assert ours.learn(successor_decreed())
    assert not ours.flaw(BOB, bobs())
    assert not ours.has_to_redeem


def test_succession_is_not_followed_when_it_is_forged_of_another_run_or_by_a_key_that_was_replaced() -> None:
    ours = gate()
    for forged in (
        successor_decreed(signature="0" * 128),
        successor_decreed(ends=ENDS + 1),
        successor_decreed(successor=STRANGER.peer_id),
        succeed(STRANGER, SUCCESSOR, RUN_ID, 1, ENDS),
        succeed(ORGANIZER, SUCCESSOR, "another", 1, ENDS),
    ):
        assert not ours.learn(forged)
    assert ours.learn(successor_decreed())
    assert not ours.learn(succeed(ORGANIZER, STRANGER, RUN_ID, 2, ENDS))
    assert ours.organizer == SUCCESSOR.peer_id
    third = of_seed(b"q" * 32)
    assert ours.learn(succeed(SUCCESSOR, third, RUN_ID, 2, ENDS))
    assert ours.organizer == third.peer_id
    assert "by organizer" in ours.flaw(BOB, bobs())


def test_decrees_by_the_old_key_hold_until_the_new_one_says_something_else_and_no_new_ones_are_heeded() -> (
    None
):
    ours = gate()
    ours.learn(revoke(ORGANIZER, RUN_ID, 8, [7]))
    ours.learn(successor_decreed())
    assert not ours.learn(revoke(ORGANIZER, RUN_ID, 99, []))
    assert ours.revoked == (7,)
    assert ours.learn(revoke(SUCCESSOR, RUN_ID, 2, [7, 9]))
    assert ours.revoked == (7, 9)


# -- roles and bounds ----------------------------------------------------------------------------------------

BALLOT = Ballot(number=1, leader=ALICE)


@pytest.mark.parametrize(
    ("wish", "roles"),
    [
        (None, {"train"}),
        (GetInput(step=1, parent="0" * 64, ballot=BALLOT, rank=0, number=0, member=ALICE), {"train"}),
        (GetPledges(step=1, parent="0" * 64, ballot=BALLOT), {"train"}),
        (GetProof(proof="0" * 64), {"train"}),
        (GetPiece(state_digest="0" * 64, number=0), {"train", "serve"}),
        (GetEntry(step=1), {"train", "serve"}),
        (GetEntry(step=1, with_payload=False), {"train", "serve", "watch"}),
        (GetManifest(), {"train", "serve", "watch"}),
        (GetLineage(step=1), {"train", "serve", "watch"}),
        (GetRun(), {"train", "serve", "watch"}),
        (GetMetrics(), {"train", "serve", "watch"}),
        (GetEvents(), {"train", "serve", "watch"}),
        (Redeem(access=bobs()), {"train", "serve", "watch"}),
    ],
)
def test_role_may_do_what_it_says_and_no_more(wish: Request | None, roles: set[str]) -> None:
    assert {role for role in ("train", "serve", "watch") if permits(role, wish)} == roles  # type: ignore[arg-type]


def test_largest_pass_fits_into_a_greeting_and_a_presence_record_and_all_revocations_into_one() -> None:
    largest = invite(
        run_id="r" * 63,
        name="\U0001f469" * 64,
        serial=2**31 - 1,
        issued=2**40 - 1,
        expires=2**40 - 1,
        uses=2**31 - 1,
    )
    shown = largest.shown_by(ALICE)
    assert len(pack(Hello(protocol=2**53 - 1, fingerprint="0" * 64, access=shown))) < MAX_HELLO_BYTES / 2
    presence = Presence(
        peer=ALICE, role="train", name="\U0001f469" * 64, protocol=3, fingerprint="0" * 64,
        incarnation="i" * 32, position=None, extra="\U0001f469" * 200, access=shown,
        milestones=(Milestone(step=2**53 - 1, lineage="0" * 16, state="0" * 32),) * len(RUNGS),
    )  # fmt: skip
    room = MAX_RECORD_BYTES - SIGNATURE_BYTES
    assert len(presence.model_dump_json().encode()) < room
    longest = Kick(who=BOB, until=2**40 - 1, reason="x" * 40)
    for everything in (
        revoke(ORGANIZER, RUN_ID, 2**53 - 1, range(2**31 - MAX_REVOKED, 2**31)),
        kick(ORGANIZER, RUN_ID, 2**53 - 1, [longest] * MAX_KICKED),
        succeed(ORGANIZER, SUCCESSOR, RUN_ID, 2**53 - 1, 2**40 - 1),
    ):
        assert len(everything.model_dump_json().encode()) < room
