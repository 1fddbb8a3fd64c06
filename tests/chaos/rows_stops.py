"""Rows 9 to 11: peers that leave, stand still or are slow. Not covered: machines that swap."""

from __future__ import annotations

import os
import signal
import time

from tests.chaos.rows import Failed, Figures, Trial, row
from tests.chaos.swarm import Swarm
from tests.chaos.victims import first_commits, longest_gap, lost_samples

LEAVE_SECONDS = 5.0
RESUME_SECONDS = 15.0


@row(
    9,
    fault="SIGTERM, Ctrl-C",
    injected="signal",
    criterion="leaves within 5 s with exit status 0; no round is lost and nothing of it is left",
    ci=True,
)
def asked_to_leave(trial: Trial) -> Figures:
    left, aborted, resumed = [], 0, []
    with trial.swarm(peers=trial.pick(4, 3)) as swarm:
        for number, sign in enumerate((signal.SIGTERM, signal.SIGINT)):
            name = f"peer-{number + 1}"
            child, others = swarm.peers[name], [other for other in swarm.living() if other != name]
            child.awaited = True
            at = time.time()
            os.kill(child.pid or 0, sign)
            left.append(swarm.wait(lambda child=child: not child.running, f"{name} has left", 30))
            if child.status != 0:
                raise Failed(f"{name} left with exit status {child.status} on {sign.name}")
            resumed.append(first_commits(swarm, others, at + left[-1], RESUME_SECONDS))
            aborted += len(
                {
                    (record["step"], record["attempt"])
                    for other in others
                    for record in swarm.events(other, "round_aborted", at)
                }
            )
            lost = lost_samples(swarm, others, at)
            if lost:
                raise Failed(f"{lost} samples of others were lost when {name} left on {sign.name}")
        if max(left) > LEAVE_SECONDS:
            raise Failed(f"left after {max(left):.1f} s, at most {LEAVE_SECONDS:g} s were expected")
        if aborted:
            raise Failed(f"{aborted} attempts were aborted because two peers left; none was expected")
    return Figures(
        f"left in {left[0]:.1f} s (SIGTERM) and {left[1]:.1f} s (SIGINT), exit status 0; no attempt aborted; "
        f"next commit by all {max(resumed):.1f} s after",
        {"leave_worst_seconds": max(left), "resume_worst_seconds": max(resumed), "aborted": aborted},
    )


@row(
    10,
    fault="SIGSTOP for 3 s, 30 s (in the soak 5 min), then SIGCONT",
    injected="SIGSTOP to peer and p2pd",
    criterion="3 s: the round waits or goes on; longer: the others go on within 15 s, and it catches up",
    deadline_seconds=600,
)
def stopped(trial: Trial) -> Figures:
    told, numbers = [], {}
    with trial.swarm(peers=trial.pick(4, 3), tells="p2ptrain_catch_up_seconds_count") as swarm:
        *others, name = swarm.peers
        silence = swarm.run.silence_seconds
        for seconds in trial.pick((3.0, 30.0), (0.6 * silence, 4 * silence), (3.0, 30.0, 300.0)):
            since = time.time()
            swarm.peers[name].stop()
            swarm.watch(seconds)
            went_on = time.time()
            swarm.peers[name].go_on()
            back = swarm.together(seconds=60 + seconds)
            gap = longest_gap(swarm, since, went_on, others)
            if seconds > silence and gap > RESUME_SECONDS:
                raise Failed(f"stopped for {seconds:g} s: the others did not commit for {gap:.1f} s")
            if seconds > silence and not swarm.events(name, "caught_up", went_on):
                raise Failed(f"stopped for {seconds:g} s: {name} came back without catching up")
            told.append(f"{seconds:g} s: others at most {gap:.1f} s without a commit, back in {back:.1f} s")
            numbers |= {f"gap_{seconds:g}_seconds": gap, f"back_{seconds:g}_seconds": back}
    return Figures("; ".join(told), numbers)


@row(
    11,
    fault="a peer 10 times as slow as the others",
    injected="cpu control group",
    criterion="what it has by the freeze counts; the others' steps take at most 1.2 times as long",
    deadline_seconds=420,
)
def slow(trial: Trial) -> Figures:
    # Steps of about 5 s, so that computing is most of a step, as it is between homes.
    with trial.swarm(peers=trial.pick(3, 2), target_batch_size=trial.pick(1536, 1024)) as swarm:
        others = list(swarm.peers)
        swarm.add("snail")
        swarm.together()
        since = time.time()
        usual = swarm.pace(trial.pick(40, 8))
        fast = samples_per_second(swarm, "snail", since)
        swarm.peers["snail"].leave()
        swarm.wait(lambda: not swarm.peers["snail"].running, "the fourth has left", 20)
        swarm.together()
        without = swarm.pace(trial.pick(60, 8))
        swarm.restart("snail")
        swarm.together()
        group = swarm.lab.group("snail")
        group.add([process.pid for process in swarm.peers["snail"].family()])
        # A tenth of what it had: that was its share of the cores, with all others.
        group.limit_cpu(share_of_cores(swarm, "snail") / 10)
        swarm.watch(trial.pick(10, 4))
        since = time.time()
        rate = swarm.pace(trial.pick(90, 15))
        given = samples_per_second(swarm, "snail", since)
        group.limit_cpu(None)
        swarm.together([*others, "snail"])
        longer = without / rate
        if longer > 1.2:
            raise Failed(f"steps took {longer:.2f} times as long as without it, at most 1.2 were expected")
        if not given:
            raise Failed("nothing of what the slow peer computed was counted")
    return Figures(
        f"others' steps of {1 / without:.1f} s were {longer:.2f} times as long; "
        f"it gave {given / fast:.0%} of its samples",
        {"step_ratio": longer, "share_given": given / fast, "rate_with_all_per_second": usual},
    )


def samples_per_second(swarm: Swarm, name: str, since: float) -> float:
    return swarm.samples(since)[name] / (time.time() - since)


def share_of_cores(swarm: Swarm, name: str) -> float:
    """What its processes take now, in cores."""
    family = swarm.peers[name].family()
    before = sum(sum(process.cpu_times()[:2]) for process in family)
    began = time.monotonic()
    swarm.watch(5)
    after = sum(sum(process.cpu_times()[:2]) for process in family)
    return (after - before) / (time.monotonic() - began)
