"""The round's stories, told by the machines themselves; how to read a transcript is said in `transcripts`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transcripts import RULES, Story, standing_at, tell

from p2ptrain.events import AbortCause
from p2ptrain.protocol.leader import blame
from p2ptrain.protocol.ledger import lease
from p2ptrain.protocol.lineage import advance
from p2ptrain.protocol.member import BENCH_SECONDS, Member, Stage
from p2ptrain.protocol.roster import call_for
from p2ptrain.protocol.round import Begin, Benched, Cancel, CatchUp, Distrusted, Effect, Send, TookOver
from p2ptrain.protocol.spans import balanced, levels
from p2ptrain.records import Abort, Answer, Ask, Ballot, Call, Freeze, PeerId, Position, Report

A, B, C, D, E = (PeerId(name) for name in "abcde")
RULES_OF_12 = replace(RULES, target_batch_size=12)
RULES_OF_16 = replace(RULES, target_batch_size=16)
LEASED = replace(RULES, leased=True)


# -- the round as it should be -------------------------------------------------------------------------------


def test_round_is_committed_when_both_members_hold_the_same_bytes() -> None:
    tell(
        """
        a b stand at step 6
        a did 4
          waits: 4 of 8 samples; 1 peers have not reported yet
        b did 4
          → a: report 4
        a ← b
          begins 1/a
          → b: freeze 1/a of a b
        b ← a
          begins 1/a
        a holds m
        b holds m
          → a: done 1/a m
        a ← b
          → b: commit 1/a m
          applies 1/a m
        b ← a
          applies 1/a m
        a arrives
        b arrives
        """
    )


def test_leader_rotates_when_a_round_is_committed() -> None:
    tell(
        """
        a b stand at step 6
        a did 4
          waits: 4 of 8 samples; 1 peers have not reported yet
        b did 4
          → a: report 4
        a ← b
          begins 1/a
          → b: freeze 1/a of a b
        b ← a
          begins 1/a
        a holds m
        b holds m
          → a: done 1/a m
        a ← b
          → b: commit 1/a m
          applies 1/a m
        b ← a
          applies 1/a m
        a arrives
        b arrives
        # step 7 is b's turn
        a did 4
          → b: report 4
        b did 4
          waits: 4 of 8 samples; 1 peers have not reported yet
        b ← a
          → a: freeze 1/b of a b
          begins 1/b
        """
    )


def test_lone_peer_steps_when_nobody_else_is_known() -> None:
    tell(
        """
        a starts at step 0
        a did 4, 4 more in 0.5 s
          begins 1/a
        a holds m
          applies 1/a m
        a arrives
        """
    )


def test_member_finishes_its_micro_batch_when_that_fills_the_target() -> None:
    tell(
        """
        a b stand at step 6
        a did 4
          waits: 4 of 8 samples; 1 peers have not reported yet
        b did 0, 4 more in 0.5 s
          → a: report 0, 4 more
        a ← b
          begins 1/a
          → b: freeze 1/a of a b, finishing b
        """
    )


def test_report_that_comes_early_counts_when_the_leader_has_applied_the_entry() -> None:
    tell(
        """
        a b stand at step 6
        a did 4
          waits: 4 of 8 samples; 1 peers have not reported yet
        b did 4
          → a: report 4
        a ← b
          begins 1/a
          → b: freeze 1/a of a b
        b ← a
          begins 1/a
        a holds m
        b holds m
          → a: done 1/a m
        a ← b
          → b: commit 1/a m
          applies 1/a m
        b ← a
          applies 1/a m
        # a is at step 7 already, and its leader, b, is not
        a arrives
        a did 4
          → b: report 4
        b ← a
        b arrives
          waits: 4 of 8 samples are done or in flight
        b did 4
          → a: freeze 1/b of a b
          begins 1/b
        """
    )


# -- the leader dies (I7) ------------------------------------------------------------------------------------


def test_successor_leads_on_when_the_leader_dies_before_the_freeze() -> None:
    tell(
        """
        a b c stand at step 6
        b did 4
          → a: report 4
        c did 4
          → a: report 4
        a dies
        c loses a
          → b: report 4
        b loses a
          → c: ask from step 6, to lead as 1/b
          takes over as 1/b
        # c's report came before b led; now it is answered for, and c says it again
        b ← c
        c ← b
          → b: answer step 6, b leads, obeys 1/b
          → b: report 4
        b ← c
        b ← c
          begins 2/b
          → c: freeze 2/b of b c
        c ← b
          begins 2/b
        """
    )


def test_successor_waits_for_what_the_others_have_when_its_own_samples_would_do() -> None:
    tell(
        """
        a b c stand at step 6
        b did 8
          → a: report 8
        c did 8
          → a: report 8
        a dies
        c loses a
          → b: report 8
        b loses a
          → c: ask from step 6, to lead as 1/b
          takes over as 1/b
        c ← b
          → b: answer step 6, b leads, obeys 1/b
          → b: report 8
        # c's answer comes behind what it said before, and its report behind its answer
        b ← c
        b ← c
        b ← c
          begins 2/b
          → c: freeze 2/b of b c
        """
    )


def test_leader_waits_for_what_the_others_have_when_an_attempt_was_aborted() -> None:
    tell(
        """
        a b c stand at step 6
        a did 8
          waits: 8 of 16 samples; 2 peers have not reported yet
        b did 4
          → a: report 4
        c did 4
          → a: report 4
        a ← b
          waits: 12 of 16 samples; 1 peers have not reported yet
        a ← c
          begins 1/a
          → b: freeze 1/a of a b c
          → c: freeze 1/a of a b c
        b ← a
          begins 1/a
        a loses c
          cancels 1/a (peer_lost) without c
          → b: abort 1/a (peer_lost) without c
          → c: abort 1/a (peer_lost) without c
        a did 16
        b ← a
          cancels 1/a (peer_lost) without c
        b did 4
          → a: report 4
        a ← b
          begins 2/a
          → b: freeze 2/a of a b
        """,
        RULES_OF_16,
    )


def test_leader_goes_on_alone_when_nobody_reports_for_a_heartbeat_after_an_abort() -> None:
    tell(
        """
        a b c stand at step 6
        a did 8
          waits: 8 of 16 samples; 2 peers have not reported yet
        b did 4
          → a: report 4
        c did 4
          → a: report 4
        a ← b
          waits: 12 of 16 samples; 1 peers have not reported yet
        a ← c
          begins 1/a
          → b: freeze 1/a of a b c
          → c: freeze 1/a of a b c
        b ← a
          begins 1/a
        a loses c
          cancels 1/a (peer_lost) without c
          → b: abort 1/a (peer_lost) without c
          → c: abort 1/a (peer_lost) without c
        a did 20
        a ticks 1 s later
          → b: answer step 6, a leads
          begins 2/a
        """,
        RULES_OF_16,
    )


def test_successor_aborts_and_starts_anew_when_the_leader_dies_and_a_member_is_not_done() -> None:
    tell(
        """
        a b c stand at step 6
        b did 4
          → a: report 4
        c did 4
          → a: report 4
        a ← b
          waits: 4 of 8 samples; 1 peers have not reported yet
        a ← c
          begins 1/a
          → b: freeze 1/a of a b c
          → c: freeze 1/a of a b c
        b ← a
          begins 1/a
        c ← a
          begins 1/a
        b holds m
          → a: done 1/a m
        a dies
        b loses a
          → c: ask from step 6, to lead as 2/b
          takes over as 2/b
        c ← b
          cancels 1/a (leader_lost)
          → b: answer step 6, b leads, obeys 2/b
          → b: report 4
        # c was not done, so nobody can have committed
        b ← c
          cancels 1/a (leader_lost)
        b ← c
          waits: 4 of 8 samples are done or in flight
        b did 4
          begins 3/b
          → c: freeze 3/b of b c
        c ← b
          begins 3/b
        """
    )


def test_successor_commits_the_same_entry_when_the_leader_dies_after_all_are_done() -> None:
    tell(
        """
        a b c stand at step 6
        b did 4
          → a: report 4
        c did 4
          → a: report 4
        a ← b
          waits: 4 of 8 samples; 1 peers have not reported yet
        a ← c
          begins 1/a
          → b: freeze 1/a of a b c
          → c: freeze 1/a of a b c
        b ← a
          begins 1/a
        c ← a
          begins 1/a
        b holds m
          → a: done 1/a m
        c holds m
          → a: done 1/a m
        a dies
        b loses a
          → c: ask from step 6, to lead as 2/b
          takes over as 2/b
        c ← b
          → b: answer step 6, b leads, obeys 2/b, holds 1/a m
        b ← c
          → a: commit 1/a m
          → c: commit 1/a m
          applies 1/a m
        c ← b
          applies 1/a m
        """
    )


def test_successor_commits_when_the_leader_dies_and_one_peer_has_applied_the_entry() -> None:
    tell(
        """
        a b c stand at step 6
        b did 4
          → a: report 4
        c did 4
          → a: report 4
        a ← b
          waits: 4 of 8 samples; 1 peers have not reported yet
        a ← c
          begins 1/a
          → b: freeze 1/a of a b c
          → c: freeze 1/a of a b c
        b ← a
          begins 1/a
        c ← a
          begins 1/a
        a holds m
        b holds m
          → a: done 1/a m
        c holds m
          → a: done 1/a m
        a ← b
        a ← c
          → b: commit 1/a m
          → c: commit 1/a m
          applies 1/a m
        c ← a
          applies 1/a m
        b ✕ a
        a dies
        c arrives
        b loses a
          → c: ask from step 6, to lead as 2/b
          takes over as 2/b
        c ← b
          → b: answer step 7, b leads
        b ← c
          applies 1/a m
        b arrives
        """
    )


def test_successor_fetches_the_entry_when_it_was_committed_without_it_being_done() -> None:
    tell(
        """
        a b stand at step 6
        c starts at step 6 seeing a b
        b did 4
          → a: report 4
        a did 4
          waits: 4 of 8 samples; 1 peers have not reported yet
        a ← b
          begins 1/a
          → b: freeze 1/a of a b
        b ← a
          begins 1/a
        a holds m
        b holds m
          → a: done 1/a m
        a ← b
          → b: commit 1/a m
          applies 1/a m
        b ← a
          applies 1/a m
        b arrives
        a dies
        # c was too late for the roster, and never heard of the commit
        c loses a
          → b: report 0
        c did 4
          → b: report 4
        b ← c
          → c: commit 1/a m
        c ← b
          catches up with b at step 7
        """
    )


def test_member_never_declares_done_when_it_has_promised_a_successor_otherwise() -> None:
    story = tell(
        """
        a b c stand at step 6
        b did 4
          → a: report 4
        c did 4
          → a: report 4
        a ← b
          waits: 4 of 8 samples; 1 peers have not reported yet
        a ← c
          begins 1/a
          → b: freeze 1/a of a b c
          → c: freeze 1/a of a b c
        b ← a
          begins 1/a
        c ← a
          begins 1/a
        b loses a
          cancels 1/a (leader_lost)
          → c: ask from step 6, to lead as 2/b
          takes over as 2/b
        c ← b
          cancels 1/a (leader_lost)
          → b: answer step 6, b leads, obeys 2/b
          → b: report 4
        """
    )
    # c's data plane may still finish the old attempt: that must stay without effect, whoever asks.
    member = story.machines[C]
    call, freeze = call_from_a(), freeze_by_a()
    assert member.held(story.header(freeze, "m"), 0.0, story.now) == []
    assert member.received(A, call, story.now) == [Send(A, member.answer())]
    assert member.answer().held is None


def test_peer_that_has_become_slow_gets_less_to_reduce_in_the_next_round() -> None:
    story = tell("a b c stand at step 6")
    spans = []
    for rate in (8e6, 1e5):
        story.machines[B].sent_at(rate)
        for name in (A, C):
            story.machines[name].sent_at(8e6)
        reports = {
            name: report.message
            for name in (B, C)
            for report in story.machines[name].progressed(2, 0, 0.0, 0.0, None, story.now)
            if isinstance(report, Send) and isinstance(report.message, Report)
        }
        assert reports.keys() == {B, C}
        spans.append(balanced([8e6, *(report.rate for report in reports.values())]))
    assert spans[0] == pytest.approx([1 / 3] * 3)
    assert spans[1][1] == 0


def test_peer_whose_link_was_not_full_is_taken_for_as_fast_as_before_until_that_lasts() -> None:
    story = tell("a b c stand at step 6")
    reported = []
    for rate in (8e6, 5e6, 3e6, 5e6, 5e6, 9e6):
        story.machines[B].sent_at(rate)
        [report] = story.machines[B].progressed(2, 0, 0.0, 0.0, None, story.now)
        assert isinstance(report, Send)
        assert isinstance(report.message, Report)
        reported.append(report.message.rate)
    assert reported == [8e6, 8e6, 8e6, 8e6, 5e6, 9e6]


# -- restarts, promises and a majority -----------------------------------------------------------------------


def test_attempt_is_given_up_when_a_member_has_restarted_within_it() -> None:
    tell(
        """
        a b c stand at step 6
        a did 1
          waits: 1 of 8 samples; 2 peers have not reported yet
        b did 4
          → a: report 4
        c did 4
          → a: report 4
        a ← b
          waits: 5 of 8 samples; 1 peers have not reported yet
        a ← c
          begins 1/a
          → b: freeze 1/a of a b c
          → c: freeze 1/a of a b c
        b ← a
          begins 1/a
        # c may have sent chunks before it died; what it does now are other samples
        c dies
        c starts at step 6 seeing a
        c did 2
          → a: report 2
        a ← c
          cancels 1/a (peer_lost)
          → b: abort 1/a (peer_lost)
          → c: abort 1/a (peer_lost)
        b ← a
          cancels 1/a (peer_lost)
        """
    )


def test_freeze_for_an_earlier_incarnation_is_not_joined() -> None:
    story = tell(
        """
        a b c stand at step 6
        c dies
        c starts at step 6 seeing a
        c did 2
          → a: report 2
        """
    )
    member = story.machines[C]
    assert member.incarnation == "1.1"
    for incarnation, joins in (("1.0", False), ("1.1", True)):
        effects = member.received(A, call_from_a(incarnation=incarnation), story.now)
        assert any(isinstance(effect, Begin) for effect in effects) is joins


def test_attempt_that_was_left_is_not_joined_again_when_its_freeze_comes_twice() -> None:
    story = tell("a b c stand at step 6")
    member, call, freeze = story.machines[B], call_from_a(), freeze_by_a()
    abort = Abort(step=6, ballot=freeze.ballot, cause="deadline")
    assert Begin(freeze) in member.received(A, call, story.now)
    assert member.received(A, abort, story.now) == [Cancel(freeze.ballot, AbortCause.DEADLINE, ())]
    assert member.received(A, call, story.now) == []


def test_member_that_did_not_hear_of_an_abort_is_told_again_when_it_is_done() -> None:
    tell(
        """
        a b c stand at step 6
        a did 1
          waits: 1 of 8 samples; 2 peers have not reported yet
        b did 4
          → a: report 4
        c did 4
          → a: report 4
        a ← b
          waits: 5 of 8 samples; 1 peers have not reported yet
        a ← c
          begins 1/a
          → b: freeze 1/a of a b c
          → c: freeze 1/a of a b c
        b ← a
          begins 1/a
        a loses c
          cancels 1/a (peer_lost) without c
          → b: abort 1/a (peer_lost) without c
          → c: abort 1/a (peer_lost) without c
        b ✕ a
        b holds m
          → a: done 1/a m
        a ← b
          → b: abort 1/a (peer_lost) without c
        b ← a
          cancels 1/a (peer_lost) without c
        """
    )


def test_member_that_promised_a_successor_joins_nothing_of_the_leader_before() -> None:
    story = tell(
        """
        a b c stand at step 6
        b loses a
          → c: ask from step 6, to lead as 1/b
          takes over as 1/b
        c ← b
          → b: answer step 6, b leads, obeys 1/b
          → b: report 0
        """
    )
    member = story.machines[C]
    call = call_from_a(ballot=Ballot(number=7, leader=A))
    assert member.received(A, call, story.now) == [Send(A, member.answer())], "however high its ballot"


def test_successor_keeps_a_held_entry_when_the_leader_before_aborts_it() -> None:
    story = tell("a b c stand at step 6")
    member, freeze = story.machines[B], freeze_by_a()
    member.received(A, call_from_a(), story.now)
    member.held(story.header(freeze, "m"), 0.0, story.now)
    ask = Ask(position=member.answer().position, ballot=Ballot(number=2, leader=C))
    member.received(C, ask, story.now)
    assert member.received(A, Abort(step=6, ballot=freeze.ballot, cause="deadline"), story.now) == []
    assert member.answer().held == advance(standing_at(6, (A, B, C))[0], story.header(freeze, "m"))


MAJORITY = replace(RULES, quorum="majority")


def test_minority_waits_when_the_others_are_cut_off_and_the_run_asks_for_a_majority() -> None:
    tell(
        """
        a b c stand at step 6
        a loses b
          waits: 1 of the last round's 3 peers are here, and the quorum is 2
        a loses c
        a did 8
        a ticks 1 s later
        a ticks 1 s later
        """,
        MAJORITY,
    )


def test_successor_asks_again_until_a_majority_has_answered_when_the_run_asks_for_one() -> None:
    tell(
        """
        a b c stand at step 6
        b did 8
          → a: report 8
        b loses a
          → c: ask from step 6, to lead as 1/b
          takes over as 1/b
        c ✕ b
        b ticks 1 s later
          → c: ask from step 6, to lead as 1/b
        b ticks 1 s later
          → c: ask from step 6, to lead as 1/b
        b ticks 1 s later
          → c: ask from step 6, to lead as 1/b
          → a: ask from step 6, to lead as 1/b
          → c: ask from step 6, to lead as 1/b
          waits: 1 of the last round's 3 peers are here, and the quorum is 2
        c ← b
          → b: answer step 6, b leads, obeys 1/b
          → b: report 0
        b ← c
        b ← c
          begins 2/b
          → c: freeze 2/b of b c
        """,
        MAJORITY,
    )


def test_nobody_is_taken_for_gone_when_it_was_this_process_that_stood_still() -> None:
    tell(
        """
        a b stand at step 6
        b did 4
          → a: report 4
        b ticks 1 s later
          → a: report 4
        b ticks 30 s later
          → a: report 4
        b ticks 1 s later
          → a: report 4
        """
    )


def test_leader_that_stood_still_gives_its_attempt_another_heartbeat() -> None:
    tell(
        """
        a b stand at step 6
        a did 4
          waits: 4 of 8 samples; 1 peers have not reported yet
        b did 4
          → a: report 4
        a ← b
          begins 1/a
          → b: freeze 1/a of a b
        a holds m
        b ← a
          begins 1/a
        b holds m
          → a: done 1/a m
        a ticks 60 s later
          → b: answer step 6, a leads, holds 1/a m
        a ← b
          → b: commit 1/a m
          applies 1/a m
        """
    )


def test_dropped_peer_is_let_in_again_when_there_would_be_too_few_without_it() -> None:
    tell(
        """
        a b stand at step 6
        a did 4
          waits: 1 of 2 peers are here
        b did 4
          → a: report 4
        a ← b
          begins 1/a
          → b: freeze 1/a of a b
        b ← a
          begins 1/a
        a loses b
          cancels 1/a (peer_lost) without b
          → b: abort 1/a (peer_lost) without b
        a did 4
          waits: 1 of 2 peers are here
        b ← a
          cancels 1/a (peer_lost) without b
        b did 4
          → a: report 4
        a ← b
          begins 2/a
          → b: freeze 2/a of a b
        """,
        replace(RULES, min_peers=2),
    )


def test_peer_that_claims_more_samples_than_it_can_have_does_not_fill_the_batch() -> None:
    tell(
        """
        a b c stand at step 6
        b did 1000000000
          → a: report 1000000000
        a ← b
          distrusts b: it reports 1000000000 samples and 0 in flight; a peer brings at most 16 to a step
          waits: 0 of 8 samples; 1 peers have not reported yet
        c did 4
          → a: report 4
        a did 4
          waits: 4 of 8 samples; 1 peers have not reported yet
        a ← c
          begins 1/a
          → c: freeze 1/a of a c
        """
    )


# -- samples that are leased ---------------------------------------------------------------------------------


def test_first_entry_needs_no_whole_batch_since_it_is_what_gives_leases() -> None:
    story = tell(
        """
        a starts at step 0
        b starts at step 0 seeing a
        b did 0
          → a: report 0
        a ← b
          waits: 0 of 1 samples are done or in flight
        a did 0, 4 more in 0.5 s
          begins 1/a
          → b: freeze 1/a of a b
        b ← a
          begins 1/a
        """,
        LEASED,
    )
    of = story.machines[B].leases()
    assert of is not None
    assert (lease(of, A), lease(of, B)) == (((0, 16),), ())


def test_samples_of_a_peer_without_a_lease_do_not_fill_the_batch() -> None:
    tell(
        """
        a b stand at step 6
        c starts at step 6 seeing a b
        c did 8
          → a: report 8
        a did 4
          waits: 4 of 8 samples; 1 peers have not reported yet
        a ← c
        b did 3
          → a: report 3
        a ← b
          waits: 7 of 8 samples are done or in flight
        b did 4
          → a: report 4
        a ← b
          begins 1/a
          → b: freeze 1/a of a b c
          → c: freeze 1/a of a b c
        """,
        LEASED,
    )


def test_batch_is_full_when_all_leases_are_used_though_the_target_has_grown_since() -> None:
    story = Story(LEASED)
    story.play("a b stand at step 6")
    leader = story.machines[A].leader
    assert leader is not None
    assert leader.lease_size == 16
    leader.lease_size = 3
    story.play("a did 3")
    story.play("b did 3")
    assert "begins 1/a" in story.play("a ← b")


def test_successor_from_outside_the_roster_has_a_lease_that_is_nobody_elses() -> None:
    story = tell(
        """
        a stand at step 6
        c starts at step 6 seeing a
        a dies
        c loses a
          takes over as 1/c
          waits: 0 of 1 peers are here
          waits: 0 of 1 samples are done or in flight
        """,
        LEASED,
    )
    of = story.machines[C].leases()
    assert of is not None
    assert (lease(of, A), lease(of, C)) == (((0, 16),), ((16, 32),))


# -- who breaks the contract ---------------------------------------------------------------------------------


def refused(story: Story, member: Member, number: int, by: PeerId) -> list[Effect]:
    """In attempt `number` of a's, a chunk of that peer breaks the contract."""
    ballot = Ballot(number=number, leader=A)
    member.received(A, call_from_a(ballot=ballot, incarnation=member.incarnation), story.now)
    return member.failed(ballot, [by], AbortCause.BAD_CHUNK, story.now)


def test_leader_that_breaks_the_contract_is_replaced_since_it_would_not_drop_itself() -> None:
    story = tell("a b c stand at step 6")
    effects = refused(story, story.machines[B], 1, A)
    assert any(isinstance(effect, TookOver) for effect in effects)
    effects = refused(story, story.machines[C], 1, A)
    assert [effect.to for effect in effects if isinstance(effect, Send)] == [A, B], (
        "its failure, and a report"
    )


def test_peer_is_benched_when_it_has_broken_the_contract_three_times_and_heard_again_later() -> None:
    story = tell("a b c stand at step 6")
    member = story.machines[B]
    for number in (1, 2, 3):
        effects = refused(story, member, number, C)
        abort = Abort(step=6, ballot=Ballot(number=number, leader=A), cause="bad_chunk", dropped=(C,))
        member.received(A, abort, story.now)
        benched = [effect for effect in effects if isinstance(effect, Benched)]
        assert benched == ([] if number < 3 else [Benched(C, 3, BENCH_SECONDS)])
    elsewhere = Position(step=9, lineage="9" * 64, weight=10**6)
    claim = Ask(position=elsewhere)
    assert member.received(C, claim, story.now) == []
    assert member.informed({C: elsewhere}, story.now) == []
    assert member.linked(C, True, story.now) == []
    later = story.now + BENCH_SECONDS + 1
    assert CatchUp(C, elsewhere) in member.received(C, claim, later)


def test_donor_that_makes_up_entries_is_benched_and_no_longer_taken_for_ahead() -> None:
    story = tell("a b c stand at step 6")
    member = story.machines[B]
    elsewhere = Position(step=9, lineage="9" * 64, weight=10**6)
    assert CatchUp(C, elsewhere) in member.received(C, Ask(position=elsewhere), story.now)
    for _ in range(3):
        effects = member.offended(C, story.now)
    assert effects == [Benched(C, 3, BENCH_SECONDS)]
    position, last = standing_at(6, (A, B, C))
    member.advance(position, last, story.now, settled=False)
    assert member.received(C, Ask(position=elsewhere), story.now) == []
    assert member.following == A


def test_bench_doubles_with_each_further_offence_up_to_an_hour() -> None:
    member = tell("a b c stand at step 6").machines[B]
    seconds = [
        effect.seconds for _ in range(12) for effect in member.offended(C, 0.0) if isinstance(effect, Benched)
    ]
    assert seconds == [120, 240, 480, 960, 1920, 3600, 3600, 3600, 3600, 3600]


def test_peer_that_is_proven_to_lie_is_neither_heard_nor_believed_and_its_round_ends() -> None:
    story = tell("a b c stand at step 6")
    leader = story.machines[A]
    assert leader.leader is not None
    for peer in (B, C):
        leader.received(peer, report_of(story, peer), story.now)
    effects = leader.convicted(C, story.now)
    assert not [effect for effect in effects if isinstance(effect, Benched)]
    assert leader.received(C, report_of(story, C), story.now + 86_400) == []
    assert leader.informed({C: Position(step=9, lineage="9" * 64, weight=10**6)}, story.now) == []
    assert leader.convicted(A, story.now) == []  # whoever is meant by that, it is not this peer


def test_peer_that_claims_what_cannot_be_three_times_is_benched() -> None:
    story = tell("a b c stand at step 6")
    leader = story.machines[A]
    claim = report_of(story, C).model_copy(update={"samples": RULES.most_samples + 1})
    for number in (1, 2, 3):
        assert leader.leader is not None
        leader.leader.dropped.clear()  # as if it were another step
        effects = leader.received(C, claim, story.now)
        assert [type(e) for e in effects if isinstance(e, Distrusted | Benched)] == (
            [Distrusted] if number < 3 else [Distrusted, Benched]
        )


def test_peer_that_undoes_a_lie_goes_to_no_lineage_with_it_again_and_above_the_ballots_of_then() -> None:
    story = tell("a b c stand at step 6")
    member = story.machines[B]
    lie = Position(step=8, lineage="9" * 64, weight=10**6)
    member.received(C, Ask(position=Position(step=9, lineage="8" * 64, weight=10)), story.now)
    (effect,) = member.undo(6, [lie.lineage])
    assert isinstance(effect, CatchUp)
    assert (effect.donor, effect.undo) == (B, 6)
    assert member.stage is Stage.OUTSIDE
    position, last = standing_at(6, (A, B, C))
    member.advance(position, last, story.now, settled=False, above=Ballot(number=3, leader=C))
    assert not [e for e in member.received(C, Ask(position=lie), story.now) if isinstance(e, CatchUp)]
    assert member.received(A, call_from_a(ballot=Ballot(number=3, leader=A)), story.now) == [
        Send(A, member.answer())
    ]
    other = lie.model_copy(update={"lineage": "7" * 64})
    assert [e for e in member.received(C, Ask(position=other), story.now) if isinstance(e, CatchUp)]


def report_of(story: Story, peer: PeerId) -> Report:
    member = story.machines[peer]
    assert member.position is not None
    return Report(
        incarnation=member.incarnation,
        position=member.position,
        samples=1,
        in_flight=0,
        finish_seconds=0.0,
        batch_seconds=0.1,
    )


def freeze_by_a() -> Freeze:
    """For a, b and c at step 6."""
    return Freeze(
        step=6,
        parent=standing_at(6, (A, B, C))[0].lineage,
        ballot=Ballot(number=1, leader=A),
        roster=(A, B, C),
        spans=(0, 4, 8, 12),
        finishing=(),
        cutoff_seconds=0.0,
        deadline_seconds=3.0,
    )


def call_from_a(**changes: object) -> Call:
    """What b or c would get of it."""
    _, last = standing_at(6, (A, B, C))
    return call_for(B, freeze_by_a(), levels([0.0] * 3), "1.0", last).model_copy(update=changes)


# -- two leaders ---------------------------------------------------------------------------------------------


def test_superseded_leader_stands_down_when_a_member_answers_its_freeze() -> None:
    tell(
        """
        a b c stand at step 6
        a did 1
          waits: 1 of 8 samples; 2 peers have not reported yet
        b did 4
          → a: report 4
        c did 4
          → a: report 4
        a ← b
          waits: 5 of 8 samples; 1 peers have not reported yet
        a ← c
          begins 1/a
          → b: freeze 1/a of a b c
          → c: freeze 1/a of a b c
        b ← a
          begins 1/a
        # only the link between a and b is cut
        b loses a
          cancels 1/a (leader_lost)
          → c: ask from step 6, to lead as 2/b
          takes over as 2/b
        c ← b
          → b: answer step 6, b leads, obeys 2/b
          → b: report 4
        b ← c
        b ← c
          begins 3/b
          → c: freeze 3/b of b c
        # the late freeze is of a lower ballot than c has promised
        c ← b
          begins 3/b
        c ← a
          → a: answer step 6, b leads
        a ← c
          cancels 1/a (superseded)
          → b: report 1
        """
    )


def test_smaller_peer_id_leads_when_two_peers_start_and_neither_has_begun() -> None:
    tell(
        """
        a starts at step 0
        b starts at step 0 seeing a
        a did 4
          waits: 4 of 8 samples are done or in flight
        b did 4
          → a: report 4
        a ← b
          begins 1/a
          → b: freeze 1/a of a b
        b ← a
          begins 1/a
        """
    )


# -- members that fail ---------------------------------------------------------------------------------------


def test_round_goes_on_without_the_odd_one_when_averages_differ() -> None:
    tell(
        """
        a b c stand at step 6
        a did 4
          waits: 4 of 12 samples; 2 peers have not reported yet
        b did 4
          → a: report 4
        c did 4
          → a: report 4
        a ← b
          waits: 8 of 12 samples; 1 peers have not reported yet
        a ← c
          begins 1/a
          → b: freeze 1/a of a b c
          → c: freeze 1/a of a b c
        b ← a
          begins 1/a
        c ← a
          begins 1/a
        a holds m
        b holds m
          → a: done 1/a m
        c holds x
          → a: done 1/a x
        a ← b
        a ← c
          cancels 1/a (digest_mismatch) without c
          → b: abort 1/a (digest_mismatch) without c
          → c: abort 1/a (digest_mismatch) without c
        b ← a
          cancels 1/a (digest_mismatch) without c
        # it may knock as it likes
        c ← a
          cancels 1/a (digest_mismatch) without c
        c did 4
          → a: report 4
        a ← c
        # kept contributions are reported again, and the next attempt needs nobody else
        a did 4
        b did 4
          → a: report 4
        b did 4, 4 more in 0.5 s
          → a: report 4, 4 more
        a ← b
          waits: 8 of 12 samples are done or in flight
        a ← b
          begins 2/a
          → b: freeze 2/a of a b, finishing b
        """,
        RULES_OF_12,
    )


def test_accused_member_is_dropped_when_the_others_missed_its_chunks() -> None:
    tell(
        """
        a b c stand at step 6
        a did 4
          waits: 4 of 12 samples; 2 peers have not reported yet
        b did 4
          → a: report 4
        c did 4
          → a: report 4
        a ← b
          waits: 8 of 12 samples; 1 peers have not reported yet
        a ← c
          begins 1/a
          → b: freeze 1/a of a b c
          → c: freeze 1/a of a b c
        b ← a
          begins 1/a
        a misses c
        b misses c
          → a: failed 1/a (deadline) for c
        a ← b
        # c gets one heartbeat to testify, and says nothing
        a ticks 1 s later
          → b: answer step 6, a leads
          → c: answer step 6, a leads
          cancels 1/a (deadline) without c
          → b: abort 1/a (deadline) without c
          → c: abort 1/a (deadline) without c
        b ← a
        """,
        RULES_OF_12,
    )


def test_silent_member_is_dropped_when_it_was_on_the_roster() -> None:
    tell(
        """
        a b stand at step 6
        a did 4
          waits: 4 of 8 samples; 1 peers have not reported yet
        b did 4
          → a: report 4
        a ← b
          begins 1/a
          → b: freeze 1/a of a b
        a holds m
        a ticks 1 s later
          → b: answer step 6, a leads, holds 1/a m
        a ticks 1 s later
          → b: answer step 6, a leads, holds 1/a m
        a ticks 1 s later
          → b: answer step 6, a leads, holds 1/a m
        a ticks 1 s later
          → b: answer step 6, a leads, holds 1/a m
          cancels 1/a (peer_lost) without b
          → b: abort 1/a (peer_lost) without b
        """
    )


def test_member_takes_over_when_its_leader_has_been_silent_for_too_long() -> None:
    tell(
        """
        a b stand at step 6
        b did 2
          → a: report 2
        b ticks 1 s later
          → a: report 2
        b ticks 1 s later
          → a: report 2
        b ticks 1 s later
          → a: report 2
        b ticks 1 s later
          → a: report 2
          takes over as 1/b
          waits: 0 of 1 peers are here
          waits: 2 of 8 samples are done or in flight
        """
    )


def test_damaged_replica_takes_the_others_state_when_its_digest_is_odd() -> None:
    tell(
        """
        a b c stand at step 6
        a did 1 as x
          waits: 1 of 8 samples; 2 peers have not reported yet
        b did 1 as x
          → a: report 1 as x
        c did 1 as y
          → a: report 1 as y
        a ← b
          waits: 2 of 8 samples; 1 peers have not reported yet
        a ← c
          → c: resync to x from a
          waits: 2 of 8 samples are done or in flight
        c ← a
          diverged: y here, x there
          catches up with a at step 6 afresh
        """
    )


@pytest.mark.parametrize(
    ("accused_by", "dropped"),
    [
        ({}, []),
        ({A: ()}, []),
        ({A: (C,), B: (C,)}, [C]),
        ({A: (C,), B: (C,), C: (B,)}, [C]),
        # One broken link between b and c costs one of them, not two.
        ({B: (C,), C: (B,)}, [C]),
        ({A: (C, D), B: (C, D), E: (C,)}, [C, D]),
        # Two may be wrong, or have a bad link to one and the same peer: it takes more than half.
        ({A: (C,), B: (C, E), C: (E,), D: (C,), E: (C,)}, [C]),
        # Nobody is dropped for a single grudge when others accuse somebody else more.
        ({A: (C,), B: (C,), D: (E,)}, [C]),
        # The judge does not drop itself.
        ({B: (A,), C: (A,)}, []),
        ({B: (A,), C: (A, D)}, [D]),
        # Naming somebody twice counts once.
        ({A: (C, C), B: (D,), E: (D,)}, [D]),
    ],
)
def test_blame_names_whom_most_accuse_when_an_attempt_failed(
    accused_by: dict[PeerId, tuple[PeerId, ...]], dropped: list[PeerId]
) -> None:
    assert blame(accused_by, A) == dropped


# -- members that withdraw -----------------------------------------------------------------------------------


def test_nobody_waits_for_a_member_that_has_withdrawn() -> None:
    tell(
        """
        a b c stand at step 6
        c withdraws
          → a: withdraw
          → b: withdraw
        a ← c
          waits: 0 of 8 samples; 1 peers have not reported yet
        a did 4
          waits: 4 of 8 samples; 1 peers have not reported yet
        b did 4
          → a: report 4
        a ← b
          begins 1/a
          → b: freeze 1/a of a b
        """
    )


def test_successor_leads_at_once_when_the_leader_withdraws() -> None:
    tell(
        """
        a b c stand at step 6
        b did 2
          → a: report 2
        a withdraws
          → b: withdraw
          → c: withdraw
        a ← b
          → b: withdraw
        b ← a
          → c: ask from step 6, to lead as 1/b
          takes over as 1/b
        c ← a
          → b: report 0
        c ← b
          → b: answer step 6, b leads, obeys 1/b
          → b: report 0
        """
    )


def test_attempt_is_aborted_at_once_when_a_member_withdraws_within_it() -> None:
    tell(
        """
        a b c stand at step 6
        a did 4
          waits: 4 of 8 samples; 2 peers have not reported yet
        c did 0
          → a: report 0
        b did 4
          → a: report 4
        a ← c
          waits: 4 of 8 samples; 1 peers have not reported yet
        a ← b
          begins 1/a
          → b: freeze 1/a of a b c
          → c: freeze 1/a of a b c
        b ← a
          begins 1/a
        c ← a
          begins 1/a
        c withdraws
          cancels 1/a (superseded)
          → a: withdraw
          → b: withdraw
        a ← c
          cancels 1/a (peer_lost) without c
          → b: abort 1/a (peer_lost) without c
          → c: abort 1/a (peer_lost) without c
        """
    )


def test_member_that_is_back_catches_up_with_the_step_that_it_missed() -> None:
    tell(
        """
        a b stand at step 6
        b withdraws
          → a: withdraw
        a ← b
          waits: 0 of 8 samples are done or in flight
        a did 8
          begins 1/a
        a holds m
          applies 1/a m
        a arrives
        b is back
        b did 0
          → a: report 0
        a ← b
          → b: commit 1/a m
        b ← a
          catches up with a at step 7
        """
    )


def test_who_is_behind_a_withdrawn_peer_is_told_where_it_stands() -> None:
    tell(
        """
        a b stand at step 6
        a withdraws
          → b: withdraw
        b ✕ a
        b starts at step 5
          → a: ask from step 5, to lead as 1/b
        b sees a at step 5
          → a: ask from step 5
        a ← b
          → b: answer step 6, a leads
          → b: withdraw
        b ← a
          catches up with a at step 6
        """
    )


def test_time_away_does_not_count_as_the_others_silence() -> None:
    story = tell(
        """
        a b stand at step 6
        b did 2
          → a: report 2
        a ← b
          waits: 2 of 8 samples are done or in flight
        a ticks 1.5 s later
          → b: answer step 6, a leads
        a withdraws
          → b: withdraw
        b ← a
        b ← a
          takes over as 1/b
          waits: 0 of 1 peers are here
          waits: 2 of 8 samples are done or in flight
        b ticks 9000 s later
        a is back
          → b: ask from step 6, to lead as 1/a
        b ← a
          → a: answer step 6, b leads
        a ← b
          → b: report 0
        """
    )
    assert story.machines[A].waits()[0] == RULES.silence_seconds


# -- newcomers and strangers ---------------------------------------------------------------------------------


def test_next_leader_holds_the_freeze_for_a_newcomer_when_the_commit_announced_it() -> None:
    tell(
        """
        a b stand at step 6
        c starts at step 6 seeing a b
        a did 4
          waits: 4 of 8 samples; 1 peers have not reported yet
        b did 4
          → a: report 4
        a ← b
          begins 1/a
          → b: freeze 1/a of a b
        # too late for this roster
        c did 0, 4 more in 0.5 s
          → a: report 0, 4 more
        a ← c
        b ← a
          begins 1/a
        a holds m
        b holds m
          → a: done 1/a m
        a ← b
          → b: commit 1/a m, expecting c
          → c: commit 1/a m, expecting c
          applies 1/a m, expecting c
        b ← a
          applies 1/a m, expecting c
        b arrives
        # the batch is full, but c is one entry away
        b did 8
        c ← a
          catches up with a at step 7
        b ticks 0.9 s later
        # … and not waited for longer than a heartbeat
        b ticks 0.1 s later
          → a: answer step 7, b leads
          → c: answer step 7, b leads
          begins 1/b
        """
    )


def test_peer_that_missed_one_commit_gets_it_when_it_reports_the_step_before() -> None:
    tell(
        """
        a b stand at step 6
        c starts at step 6 seeing a b
        a did 4
          waits: 4 of 8 samples; 1 peers have not reported yet
        b did 4
          → a: report 4
        a ← b
          begins 1/a
          → b: freeze 1/a of a b
        b ← a
          begins 1/a
        a holds m
        b holds m
          → a: done 1/a m
        a ← b
          → b: commit 1/a m
          applies 1/a m
        b ← a
          applies 1/a m
        b arrives
        a arrives
        c did 4
          → a: report 4
        a ← c
          → c: commit 1/a m
        c ← a
          catches up with a at step 7
        """
    )


def test_peer_catches_up_when_a_heavier_one_asks() -> None:
    tell(
        """
        a b stand at step 6
        c starts at step 9
        c sees a at step 6
          → a: ask from step 9
        a ← c
          → c: answer step 6, a leads
          catches up with c at step 9
        """
    )


def test_peer_catches_up_when_it_asks_a_heavier_one() -> None:
    tell(
        """
        a b stand at step 6
        c starts at step 4
        c sees a at step 6
          → a: ask from step 4
        a ← c
          → c: answer step 6, a leads
        c ← a
          catches up with a at step 6
        """
    )


def test_peer_catches_up_at_once_when_it_starts_behind_those_it_sees() -> None:
    story = tell("a b stand at step 6")
    member = story.machines[A]
    ahead, _ = standing_at(9, (A, B))
    member.informed({B: ahead}, story.now)
    position, last = standing_at(6, (A, B))
    assert member.advance(position, last, story.now, settled=False) == [CatchUp(B, ahead)]


def test_donor_is_believed_no_more_when_it_could_not_help_five_times() -> None:
    story = tell("a b stand at step 6")
    member = story.machines[A]
    ahead, _ = standing_at(9, (A, B))
    member.informed({B: ahead}, story.now)
    position, last = standing_at(6, (A, B))
    for _ in range(5):
        assert member.advance(position, last, story.now, settled=False) == [CatchUp(B, ahead)]
        member.unhelpful(B)
    assert not any(
        isinstance(effect, CatchUp) for effect in member.advance(position, last, story.now, settled=False)
    )


# -- what a stranger may not do ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"ballot": Ballot(number=9, leader=C)},
        {"parent": "f" * 64},
        {"left": (0,), "levels": levels([0.0] * 2)},
        {"levels": levels([0.0] * 4)},
        {"levels": "ab?"},
    ],
    ids=["for another leader", "of another parent", "without us", "of another roster", "of no levels"],
)
def test_freeze_is_not_obeyed_when_it_does_not_fit(change: dict[str, object]) -> None:
    story = tell("a b c stand at step 6")
    member = story.machines[A]
    fitting = call_from_a(ballot=Ballot(number=9, leader=B))
    effects = member.received(B, fitting.model_copy(update=change), story.now)
    assert all(isinstance(effect, Send) and isinstance(effect.message, Answer) for effect in effects)
    assert member.freeze is None
