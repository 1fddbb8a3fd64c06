"""Rows 1 to 8: `kill -9` in each phase. Not covered: two that die at once, as in a storm (rows 36 to 38)."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.chaos.rows import Failed, Figures, Trial, row
from tests.chaos.swarm import Swarm
from tests.chaos.victims import Victim, deaths, longest_gap

LOST = 'p2ptrain_peer_faults_total{cause="unreachable"}'
"""Each kind of death is at least a peer that cannot be reached any more."""
LITTLE_LOG = {"log_megabytes": 1}


def play(trial: Trial, phases: Sequence[tuple[str, ...]], within_seconds: float) -> Figures:
    """Let a peer die in each of these places, and demand that the others go on in time with all that they
    had."""
    with trial.swarm(peers=trial.pick(3, 2), tells=LOST) as swarm:
        victim = Victim(swarm)
        swarm.together()
        found, back = deaths(swarm, victim, phases)
        for death in found:
            if death.resume_seconds > within_seconds:
                raise Failed(
                    f"{death.phase}: {death.resume_seconds:.1f} s until all survivors committed a round "
                    f"without it, at most {within_seconds:g} s were expected"
                )
            if death.lost_samples:
                raise Failed(f"{death.phase}: {death.lost_samples} samples of survivors were lost")
    resumed = [death.resume_seconds for death in found]
    which = ", ".join(f"{death.resume_seconds:.1f} s ({death.phase})" for death in found)
    return Figures(
        f"next round by all others after {which}; none of their samples lost; back in {max(back):.1f} s",
        {
            "resume_median_seconds": statistics.median(resumed),
            "resume_worst_seconds": max(resumed),
            "back_worst_seconds": max(back),
        },
    )


@row(
    1,
    fault="killed while accumulating",
    injected="SIGKILL by itself, in a micro-batch",
    criterion="survivors commit the next step within 15 s, with their samples",
    ci=True,
)
def killed_accumulating(trial: Trial) -> Figures:
    return play(trial, [("accumulating",)], 15)


@row(
    2,
    fault="killed as leader before the freeze, then as follower after it",
    injected="SIGKILL by itself, before and between messages",
    criterion="the round is formed again within 10 s",
    ci=True,
)
def killed_forming(trial: Trial) -> Figures:
    return play(trial, trial.pick([("leading",), ("leading", "1"), ("frozen",)], [("leading",)]), 10)


@row(
    3,
    fault="killed as sender in the all-reduce",
    injected="SIGKILL by itself, after some of its chunks",
    criterion="tried again by the others with what they had; no step on own gradients",
    ci=True,
)
def killed_sending(trial: Trial) -> Figures:
    return play(trial, [("sending", "1"), ("sending", "3")], 15)


@row(
    4,
    fault="killed as reducer in the all-reduce",
    injected="SIGKILL by itself, after averaging part of its span",
    criterion="as 3; no span is left without an average",
    ci=True,
)
def killed_reducing(trial: Trial) -> Figures:
    return play(trial, [("reducing", "1")], 15)


@row(
    5,
    fault="killed between vote and step",
    injected="SIGKILL by itself: after Done, before apply, as leader before and between commits",
    criterion="it comes back to the same digest; no other is affected",
)
def killed_voting(trial: Trial) -> Figures:
    places = [("done",), ("applying",), ("committing", "0"), ("committing", "1")]
    return play(trial, trial.pick(places, places[2:]), 15)


@row(
    6,
    fault="donor killed during a download",
    injected="SIGKILL by itself, when asked for a piece",
    criterion="the joiner goes on with another donor; it takes at most twice as long as without",
    deadline_seconds=300,
)
def donor_killed(trial: Trial) -> Figures:
    with with_little_log(trial, trial.pick(3, 2)) as swarm:
        donor = Victim(swarm, **LITTLE_LOG)
        swarm.together()
        swarm.add("first", **LITTLE_LOG)
        without = swarm.wait(lambda: swarm.commits("first"), "the first joiner is in a round", 90)
        child = swarm.peers[donor.name]
        child.awaited = True
        swarm.kills += 1
        donor.order("--die", "giving")
        for name in ("second", "third", "fourth"):  # not every donor is needed each time
            swarm.add(name, **LITTLE_LOG)
            joined = swarm.wait(lambda name=name: swarm.commits(name), f"the {name} is in a round", 90)
            if not child.running:
                break
        else:
            raise Failed("nobody asked the victim for a piece")
        arrival = swarm.last(name, "caught_up")
        donor.restart()
        swarm.together()
        if joined > 2 * without + 1:
            raise Failed(f"joined in {joined:.1f} s, in {without:.1f} s when no donor died")
    return Figures(
        f"in a round {joined:.1f} s after its start by {arrival['how']}, {without:.1f} s when no donor dies",
        {"join_seconds": joined, "join_without_fault_seconds": without},
    )


@contextmanager
def with_little_log(trial: Trial, peers: int) -> Iterator[Swarm]:
    """A swarm whose log reaches back a few steps only, so that newcomers need a snapshot."""
    with trial.swarm(peers=0, tells=LOST) as swarm:
        for number in range(peers):
            swarm.add(f"peer-{number + 1}", **LITTLE_LOG)
        swarm.together()
        swarm.wait_steps(10, 120)
        yield swarm


@row(
    7,
    fault="joiner killed during a download",
    injected="SIGKILL by itself, after its first piece",
    criterion="no member waits more than 5 s for it",
)
def joiner_killed(trial: Trial) -> Figures:
    with with_little_log(trial, trial.pick(4, 2)) as swarm:
        usual = 1 / swarm.pace(trial.pick(20, 5))
        since = time.time()
        joiner = Victim(swarm, "joiner", start=False, **LITTLE_LOG)
        told = joiner.die("joining")
        swarm.watch(trial.pick(15, 6))
        longest = longest_gap(swarm, since, time.time())
        joiner.restart()
        swarm.together()
        if longest - usual > 5:
            raise Failed(f"{longest:.1f} s without a commit, {usual:.1f} s is usual")
    return Figures(
        f"died with {told['pieces']} of {told['of']} pieces; at most {longest:.1f} s between two commits, "
        f"{usual:.1f} s is usual",
        {"longest_gap_seconds": longest, "usual_gap_seconds": usual},
    )


@row(
    8,
    fault="killed while writing a checkpoint",
    injected="SIGKILL by itself at 20 random bytes, before and after the rename",
    criterion="the last whole checkpoint loads each time, and no half one is taken for it",
    deadline_seconds=600,
)
def killed_saving(trial: Trial) -> Figures:
    from p2ptrain.replica.checkpoint import latest, load

    chance, times = random.Random(trial.seed), trial.pick(20, 3)
    with trial.swarm(peers=1) as swarm:
        victim = Victim(swarm, checkpoint_every_steps=1, checkpoints_kept=2)
        folder = swarm.stage.folder / victim.name / "checkpoints"
        swarm.together()
        swarm.wait(lambda: latest(folder), "the first checkpoint is written", 30)
        loaded = 0
        for number in range(times):
            newest = latest(folder)
            assert newest is not None
            size = sum(file.stat().st_size for file in newest.iterdir())
            # The last two: all bytes are there, and the folder has its old name, or its new one.
            at = size + number if number < 2 else chance.randrange(size)
            told, since = victim.die("saving", str(at)), time.time()
            whole = latest(folder)
            if whole is None:
                raise Failed(f"no checkpoint is left after a death at byte {at} of {size}")
            step = load(whole).snapshot.position.step  # raises CheckpointError, by name, if a byte is wrong
            loaded += 1
            victim.restart()
            swarm.together()
            arrival = swarm.events(victim.name, "caught_up", since)[0]["from_step"]
            if arrival != step:
                raise Failed(
                    f"{told}: it came back at step {arrival}, its last whole checkpoint was of {step}"
                )
    return Figures(f"{loaded} of {times} loaded, every byte verified", {"loaded": loaded, "deaths": times})
