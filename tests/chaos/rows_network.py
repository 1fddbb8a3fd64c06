"""Rows 12 to 21: the bootstrap, partitions, and bad roads.

Not covered: IPv6, and networks in which only some packets are too large.
"""

from __future__ import annotations

import json
import math
import time
from itertools import pairwise

from p2ptrain.errors import Unreachable
from peers.sites import PORT
from tests.chaos.rows import Failed, Figures, Trial, must, row
from tests.chaos.swarm import Swarm

RTT_SECONDS = 0.2
LOSSY_MBIT = 20.0


# -- the bootstrap -------------------------------------------------------------------------------------------


@row(
    12,
    fault="bootstrap killed, later restarted",
    injected="SIGKILL",
    criterion="80 % of the rate without it; newcomers join by a live peer, and by it when it is back",
    ci=True,
)
def bootstrap_killed(trial: Trial) -> Figures:
    with trial.swarm(peers=trial.pick(4, 2)) as swarm:
        rate = swarm.pace(trial.pick(15, 4))
        swarm.kill("bootstrap")
        without = swarm.pace(trial.pick(15, 4))
        swarm.add("newcomer", invite=swarm.invite("peer-1"))
        by_peer = swarm.together()
        swarm.restart("bootstrap")
        swarm.add("another", invite=swarm.stage.invites()[-1])
        by_bootstrap = swarm.together()
        must(without >= 0.8 * rate, f"{without:.2f} steps/s without the bootstrap, {rate:.2f} with it")
    return Figures(
        f"{without / rate:.0%} of the rate without it; newcomer by a peer in {by_peer:.1f} s, "
        f"by the restarted bootstrap in {by_bootstrap:.1f} s",
        {
            "rate_share": without / rate,
            "join_by_peer_seconds": by_peer,
            "join_by_bootstrap_seconds": by_bootstrap,
        },
    )


@row(
    13,
    fault="bootstrap absent when a peer starts",
    injected="nothing on its port; its cable out",
    criterion="one sentence within 10 s that names the address and what to do; exit 4",
    ci=True,
)
def bootstrap_absent(trial: Trial) -> Figures:
    took = {}
    with trial.swarm(peers=0) as swarm:
        address = f"/ip4/{swarm.lab.address('bootstrap')}/tcp/{PORT}"
        swarm.kill("bootstrap")
        for how in ("closed", "unplugged"):
            if how == "unplugged":
                swarm.lab.unplug("bootstrap")
            child = swarm.add(how)
            child.awaited = True
            took[how] = swarm.wait(lambda child=child: not child.running, f"{how}: it gives up", 30)
            said = child.last_words()
            expected = Unreachable.exit_code
            must(child.status == expected, f"{how}: exit status {expected} was expected: {said}")
            must(took[how] <= 10, f"{how}: it gave up after {took[how]:.1f} s, at most 10 were expected")
            must(address in said, f"{how}: {address} is not named: {said}")
            for word in ("running", "firewall"):
                must(word in said, f"{how}: it does not say what to do: {said}")
            must("Traceback" not in said, f"{how}: a traceback: {said}")
    return Figures(
        f"said after {took['closed']:.1f} s (port closed), {took['unplugged']:.1f} s (no such host), exit 4",
        {f"{how}_seconds": seconds for how, seconds in took.items()},
    )


# -- partitions ----------------------------------------------------------------------------------------------


def _steps_of(swarm: Swarm, names: list[str], since: float, until: float) -> int:
    return len(swarm.commit_times(since, until, names))


def _grace(swarm: Swarm) -> float:
    """So long after a cut, a round that was under way may still be committed."""
    return 2 * swarm.run.silence_seconds


@row(
    14,
    fault="2/2 partition, healed: both may go on, or quorum = majority",
    injected="cables into another bridge, 60 s",
    criterion="one digest within 60 s of healing; one side rolls back and says so; with the majority's rule "
    "neither side commits and nobody rolls back",
    ci=True,
    deadline_seconds=420,
)
def halves_apart(trial: Trial) -> Figures:
    seconds = trial.pick(60, 10)
    with trial.swarm(peers=4, forks=True, tells="p2ptrain_rollbacks_total") as swarm:
        left, right = ["peer-1", "peer-2"], ["peer-3", "peer-4"]
        swarm.lab.part(right)
        cut_at = time.time()
        swarm.watch(seconds)
        healed_at = time.time()
        swarm.lab.heal()
        free = swarm.together()
        sides = [_steps_of(swarm, side, cut_at, healed_at) for side in (left, right)]
        must(min(sides) > 0, f"both sides may go on, but they committed {sides} steps")
        back = [
            sum(r["samples_lost"] for name in side for r in swarm.events(name, "rolled_back", healed_at))
            for side in (left, right)
        ]
        must((back[0] > 0) != (back[1] > 0), f"one side was expected to roll back; given up: {back} samples")
    with trial.swarm(peers=4, quorum="majority", tells="p2ptrain_waiting") as swarm:
        swarm.lab.part(right)
        cut_at = time.time()
        swarm.watch(trial.pick(30, 15))
        healed_at = time.time()
        late = _steps_of(swarm, [*left, *right], cut_at + _grace(swarm), healed_at)
        must(late == 0, f"{late} steps were committed in a half that is no majority")
        waiting = [name for name in swarm.peers if swarm.events(name, "waiting_changed", cut_at)]
        must(bool(waiting), "no peer says what it waits for")
        swarm.count()
        swarm.lab.heal()
        bound = swarm.together()
    return Figures(
        f"free: {sides[0]} and {sides[1]} steps apart, one digest {free:.1f} s after; "
        f"majority: no step, on after {bound:.1f} s",
        {"heal_seconds": free, "heal_seconds_majority": bound, "samples_rolled_back": sum(back) / 2},
    )


@row(
    15,
    fault="3/1 partition, healed: the one may go on, or quorum = majority",
    injected="cable into another bridge, 60 s",
    criterion="the three give 70 % of the samples that they gave before; one digest within 60 s of healing; "
    "the one rolls back and says so, or with the majority's rule never commits",
    deadline_seconds=420,
)
def one_apart(trial: Trial) -> Figures:
    shares, heals, given_up = {}, {}, 0
    for quorum in ("any", "majority"):
        changes = {"quorum": quorum} if quorum == "majority" else {}
        tells = "p2ptrain_rollbacks_total" if quorum == "any" else "p2ptrain_waiting"
        with trial.swarm(peers=trial.pick(4, 3), forks=quorum == "any", tells=tells, **changes) as swarm:
            *majority, alone = swarm.peers
            began = time.time()
            swarm.watch(trial.pick(15, 5))
            cut_at = time.time()
            swarm.lab.part([alone])
            swarm.watch(trial.pick(60, 20))
            swarm.count()
            healed_at = time.time()
            swarm.lab.heal()
            heals[quorum] = swarm.together()
            before = swarm.given(majority, began, cut_at) / (cut_at - began)
            shares[quorum] = swarm.given(majority, cut_at, healed_at) / (healed_at - cut_at) / before
            must(shares[quorum] >= 0.7, f"{quorum}: the three gave {shares[quorum]:.0%} of before, not 70 %")
            back = swarm.events(alone, "rolled_back", healed_at)
            for name in majority:
                must(not swarm.events(name, "rolled_back", healed_at), f"{name} of the majority rolled back")
            if quorum == "any":
                must(bool(back), f"{alone} did not roll back; {swarm.summary()}")
                given_up = sum(record["samples_lost"] for record in back)
            else:
                late = len(swarm.commit_times(cut_at + _grace(swarm), healed_at, [alone]))
                must(not back and not late, f"{alone} committed {late} steps alone under the majority's rule")
    return Figures(
        f"majority gave {shares['any']:.0%} ({shares['majority']:.0%}) of its samples, one digest after "
        f"{heals['any']:.1f} s ({heals['majority']:.1f} s; in brackets: quorum = majority)",
        {
            "samples_share": shares["any"],
            "samples_share_majority": shares["majority"],
            "heal_seconds": heals["any"],
            "heal_seconds_majority": heals["majority"],
            "samples_rolled_back": given_up,
        },
    )


@row(
    16,
    fault="packets lost one way; two that cannot reach each other (triangle)",
    injected="iptables DROP by address, 45 s each",
    criterion="no livelock: never 30 s without a commit, and one digest after",
    gate=False,
)
def triangle(trial: Trial) -> Figures:
    gaps = {}
    with trial.swarm(peers=3, forks=True, tells="p2ptrain_peer_faults_total") as swarm:
        for how in ("one way", "both ways"):
            swarm.lab.cut("peer-1", "peer-2")
            if how == "both ways":
                swarm.lab.cut("peer-2", "peer-1")
            since = time.time()
            swarm.watch(trial.pick(45, 12))
            until = time.time()
            swarm.lab.mend()
            gaps[how] = _longest_gap(swarm, since, until)
            must(gaps[how] <= 30, f"{how}: {gaps[how]:.1f} s without a commit, at most 30 were expected")
            swarm.together()
    return Figures(
        f"longest gap {gaps['one way']:.1f} s one way, {gaps['both ways']:.1f} s both ways",
        {"gap_one_way_seconds": gaps["one way"], "gap_triangle_seconds": gaps["both ways"]},
    )


def _longest_gap(swarm: Swarm, since: float, until: float) -> float:
    times = [since, *swarm.commit_times(since, until), until]
    return max(after - before for before, after in pairwise(times))


# -- bad roads -----------------------------------------------------------------------------------------------


def _attempts(swarm: Swarm, since: float) -> tuple[int, int]:
    """(attempts that were committed, all attempts) that any peer tells of."""
    committed, aborted = set(), set()
    for name in swarm.told:
        committed |= {(r["step"], r["attempt"]) for r in swarm.commits(name, since)}
        aborted |= {(r["step"], r["attempt"]) for r in swarm.events(name, "round_aborted", since)}
    return len(committed), len(committed | aborted)


@row(
    17,
    fault="200 ms round trips, ± 50 ms of jitter; then also 1 % lost, at 20 Mbit/s",
    injected="relay, 100 ± 25 ms each way",
    criterion="every round commits; a step takes at most 25 % more than bytes, rate and round trips predict",
    deadline_seconds=360,
)
def far_apart(trial: Trial) -> Figures:
    told, numbers = [], {}
    with trial.swarm(peers=trial.pick(4, 3)) as swarm:
        for mbit, loss in trial.pick([(0.0, 0.0), (LOSSY_MBIT, 0.01)], [(0.0, 0.0)]):
            swarm.lab.relay(delay_seconds=0, jitter_seconds=0, loss=0, mbit=mbit)
            swarm.watch(trial.pick(10, 0))
            near = 1 / swarm.pace(trial.pick(30, 6))
            swarm.lab.relay(delay_seconds=RTT_SECONDS / 2, jitter_seconds=RTT_SECONDS / 8, loss=loss)
            swarm.watch(trial.pick(10, 4))
            since = time.time()
            far = 1 / swarm.pace(trial.pick(60, 12))
            committed, attempted = _attempts(swarm, since)
            trips = _round_trips(swarm)
            predicted = near + trips * RTT_SECONDS
            road = f"{loss:.0%} lost at {mbit:g} Mbit/s" if mbit else "nothing lost"
            told.append(
                f"{road}: {committed} of {attempted} attempts committed; {far:.2f} s a step, "
                f"{predicted:.2f} s predicted ({near:.2f} s near + {trips:.1f} round trips)"
            )
            must(committed == attempted, told[-1])
            must(far <= 1.25 * predicted, told[-1])
            kind = "lossy_" if loss else ""
            numbers |= {
                f"{kind}near_step_seconds": near,
                f"{kind}step_seconds": far,
                f"{kind}predicted_step_seconds": predicted,
            }
    return Figures("; ".join(told), numbers)


def _round_trips(swarm: Swarm) -> float:
    """That a step has to wait for: freeze, contributions, means, Done and commit are one way each, and half a
    round trip is hidden by freezing early. Besides, TCP sends ten packets after a pause and doubles that at
    each round trip; contributions and means go over one connection, so it does once in a step."""
    span_bytes = 2 * swarm.values() / len(swarm.living())
    return 2.0 + max(0.0, math.log2(span_bytes / (10 * 1350) + 1) - 1)


@row(
    18,
    fault="packets lost (5 %), reordered (10 %), repeated (5 %), damaged (1 %)",
    injected="relay, 10 ms each way, each alone and all at once",
    criterion="no wrong digest; 95 % of attempted rounds commit",
    gate=False,
)
def bad_road(trial: Trial) -> Figures:
    faults = {"loss": 0.05, "reorder": 0.1, "duplicate": 0.05, "corrupt": 0.01}
    none = dict.fromkeys(faults, 0.0)
    shares = {}
    with trial.swarm(peers=trial.pick(4, 3)) as swarm:
        swarm.lab.relay(delay_seconds=0.01)
        began = time.time()
        for name, share in faults.items():
            since = time.time()
            swarm.lab.relay(**{**none, name: share})
            swarm.watch(trial.pick(20, 4))
            shares[name] = _attempts(swarm, since)
        since = time.time()
        swarm.lab.relay(**faults)
        swarm.watch(trial.pick(20, 4))
        shares["all"] = _attempts(swarm, since)
        committed, attempted = _attempts(swarm, began)
        each = ", ".join(f"{name} {done}/{tried}" for name, (done, tried) in shares.items())
        met = swarm.lab.road()
        for what in ("lost", "reordered", "duplicated", "corrupted"):
            must(met.get(what, 0) >= 20, f"the relay {what} only {met.get(what, 0)} packets")
        must(all(done for done, _ in shares.values()), f"no commit under one of them: {each}")
        must(committed >= 0.95 * attempted, f"{committed} of {attempted} attempts committed: {each}")
    return Figures(
        f"{committed} of {attempted} attempts committed ({each}); {swarm.states_compared} states compared",
        {"committed": committed, "attempted": attempted, **{f"packets_{k}": v for k, v in met.items()}},
    )


@row(
    19,
    fault="10 Mbit/s",
    injected="tbf on all lines, both ways",
    criterion="no peer is taken for dead; no process grows by 1 MB/min over 20 min",
    deadline_seconds=1500,
)
def narrow(trial: Trial) -> Figures:
    # A log that is full soon, or it is its growth that is measured.
    with trial.swarm(peers=trial.pick(4, 3), peer_file={"log_megabytes": 4}) as swarm:
        for name in ("bootstrap", *swarm.peers):
            swarm.lab.rate(name, 10)
        since = time.time()
        slopes = swarm.memory_slopes(trial.pick(1200, 12), settle_seconds=trial.pick(120, 0))
        committed, attempted = _attempts(swarm, since)
        dead = [
            (name, r["peer"][-8:]) for name in swarm.told for r in swarm.events(name, "peer_faulted", since)
        ]
        must(not dead, f"{len(dead)} times a peer was taken for dead: {dead[:3]}")
        must(committed >= 3, f"{committed} rounds were committed")
        worst = max(slopes, key=lambda name: slopes[name], default="")
        if trial.pick(True, False):  # over seconds a slope says nothing
            must(slopes[worst] < 1, f"{worst} grew by {slopes[worst]:.2f} MB/min")
    grown = (
        f"; memory grew by at most {slopes[worst]:.2f} MB/min ({worst})" if trial.pick(True, False) else ""
    )
    return Figures(
        f"{committed} of {attempted} attempts committed, nobody taken for dead{grown}",
        {"committed": committed, "attempted": attempted, "memory_mb_per_minute": slopes.get(worst, math.nan)},
    )


@row(
    20,
    fault="a link that flaps",
    injected="cable of one peer out for 1 s every 6 s",
    criterion="the others keep 90 % of their rate; the peer is in or out, and changes at most once in 30 s",
    gate=False,
)
def flapping(trial: Trial) -> Figures:
    with trial.swarm(peers=4, forks=True) as swarm:
        *steady, flapping = swarm.peers
        swarm.lab.unplug(flapping)  # the rate of the others without it is what they can keep
        swarm.together(steady)
        rate = swarm.pace(20)
        swarm.lab.plug(flapping)
        swarm.together()
        since = time.time()
        for _ in range(trial.pick(10, 4)):
            swarm.lab.unplug(flapping)
            swarm.watch(1)
            swarm.lab.plug(flapping)
            swarm.watch(5)
        until = time.time()
        share = swarm.rate(since, until, steady) / rate
        sizes = [r["peers"] for r in sorted(swarm.commits(steady[0], since), key=lambda r: r["step"])]
        changes = sum(before != after for before, after in pairwise(sizes))
        allowed = math.ceil((until - since) / 30)
        told = f"others at {share:.0%} of their rate without it; in or out changed {changes} times in "
        told += f"{until - since:.0f} s"
        must(share >= 0.9, told)
        must(changes <= allowed, f"{told}, at most {allowed} were expected")
        swarm.together()
    return Figures(told, {"rate_share": share, "changes": changes})


@row(
    21,
    fault="one peer, then two, behind a router that lets no connection in",
    injected="iptables MASQUERADE and DROP on a router of its own",
    criterion="both train (by relay or in client mode); `p2ptrain doctor` names the NAT",
)
def behind_nat(trial: Trial) -> Figures:
    with trial.swarm(peers=2, tells="p2ptrain_hidden") as swarm:
        swarm.add("hidden-1", behind_nat=True)
        one = swarm.together()
        swarm.add("hidden-2", behind_nat=True)
        try:
            two = swarm.together()
        except Failed as reason:
            raise Failed(f"one behind NAT trains after {one:.1f} s; two do not: {reason}") from reason
        since = time.time()
        swarm.watch(trial.pick(15, 3))
        committed, attempted = _attempts(swarm, since)
        swarm.together()
        must(
            swarm.last("peer-1", "reach_changed")["reachable"], "peer-1, which is not hidden, says that it is"
        )
        for name in ("hidden-1", "hidden-2"):
            by_relay = swarm.metrics(name)['p2ptrain_links{path="relay"}']
            must(by_relay == 1, f"{name} has {by_relay:g} links by way of a relay, 1 was expected")
        told = f"one behind NAT trains after {one:.1f} s, two after {two:.1f} s, {committed} of {attempted} "
        told += "attempts committed"
        doctor = swarm.run_command("hidden-1", "doctor", swarm.stage.invites()[-1], "--json")
        printed = [line for line in doctor.splitlines() if line.startswith("{")]
        must(bool(printed), f"{told}, but `p2ptrain doctor` does not answer: {doctor[-300:]}")
        findings = {check["name"]: check["finding"] for check in json.loads(printed[-1])["checks"]}
        must(findings.get("reach") == "behind NAT", f"{told}, but `p2ptrain doctor` finds {findings}")
    return Figures(f"{told}; doctor names the NAT", {"one_seconds": one, "two_seconds": two})
