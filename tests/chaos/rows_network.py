"""Rows 12 to 21: the bootstrap, partitions, and bad roads. Not covered: IPv6, and links that are slow one
way only."""

from __future__ import annotations

import time

from tests.chaos.rows import Failed, Figures, Trial, row
from tests.chaos.swarm import START_SECONDS


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
        if without < 0.8 * rate:
            raise Failed(f"{without:.2f} steps/s without the bootstrap, {rate:.2f} with it")
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
    15,
    fault="3/1 partition, healed",
    injected="cable into another bridge, 60 s",
    criterion="the three keep 70 % of their rate; one digest within 60 s; the one rolls back and says so",
    ci=True,
)
def one_apart(trial: Trial) -> Figures:
    with trial.swarm(peers=trial.pick(4, 3), forks=True, tells="p2ptrain_rollbacks_total") as swarm:
        *majority, alone = swarm.peers
        rate = swarm.pace(trial.pick(15, 4))
        swarm.lab.part([alone])
        cut_at = time.time()
        swarm.watch(trial.pick(60, 10))
        healed_at = time.time()
        swarm.lab.heal()
        again = swarm.together(seconds=START_SECONDS)
        share = swarm.rate(cut_at, healed_at, majority) / rate
        if share < 0.7:
            raise Failed(f"the majority kept {share:.0%} of its rate, at least 70 % were expected")
        back = swarm.events(alone, "rolled_back", healed_at)
        lost = sum(record["samples_lost"] for record in back)
        if any(swarm.events(name, "rolled_back", healed_at) for name in majority):
            raise Failed("a peer of the majority rolled back")
        if not back:
            raise Failed(f"{alone} did not roll back; {swarm.summary()}")
    return Figures(
        f"majority at {share:.0%} of its rate; one digest {again:.1f} s after; {lost} samples rolled back",
        {"rate_share": share, "heal_seconds": again, "samples_rolled_back": lost},
    )
