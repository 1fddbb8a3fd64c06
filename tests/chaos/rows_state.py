"""Rows 32, 33, 35 and 40: what survives the end of everybody, who may be whom, and sums in any order. Not
covered: disks that lose what they had promised to keep."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from peers.rehearsal import Child
from tests.chaos.rows import Failed, Figures, Trial, row
from tests.chaos.rows_liars import complaint
from tests.chaos.swarm import Swarm
from tests.chaos.victims import ROOT


def kill_all(swarm: Swarm, names: list[str]) -> None:
    """At one moment, as a power cut would."""
    for name in names:
        swarm.peers[name].awaited = True
        os.kill(swarm.peers[name].pid or 0, 9)
    for name in names:
        swarm.kill(name)


def saved(swarm: Swarm, name: str) -> int:
    """Step of that peer's newest checkpoint."""
    return int(swarm.last(name, "checkpoint_saved")["step"])


@row(
    32,
    fault="all killed; the first to come is fresh",
    injected="SIGKILL of all; a peer without data, then those with checkpoints",
    criterion="the trained lineage goes on, from the newest checkpoint; the fresh one gives way and says so",
    ci=True,
)
def fresh_first(trial: Trial) -> Figures:
    with trial.swarm(peers=trial.pick(3, 2), forks=True, tells="p2ptrain_rollbacks_total") as swarm:
        names = list(swarm.peers)
        swarm.wait_steps(trial.pick(20, 15), 120)
        # Who leaves writes a checkpoint.
        for name in names:
            swarm.peers[name].leave()
        swarm.wait(lambda: not swarm.living(), "all have left with a checkpoint", 30)
        newest = max(saved(swarm, name) for name in names)
        swarm.add("fresh")
        swarm.wait(lambda: len(swarm.commits("fresh")) >= 2, "the fresh peer trains alone", 60)
        alone = swarm.step(["fresh"])
        if alone >= newest:
            raise Failed(f"the fresh peer was at step {alone} before those of step {newest} came back")
        for name in names:
            swarm.restart(name)
        healed = swarm.together()
        if not (given_up := swarm.events("fresh", "rolled_back")):
            raise Failed("the fresh peer did not give way, or did not say so")
        if swarm.step() <= newest:
            raise Failed(f"they are at step {swarm.step()}, their newest checkpoint is of step {newest}")
    return Figures(
        f"went on from step {newest}, its newest checkpoint; the fresh peer gave up "
        f"{given_up[-1]['samples_lost']} samples, {healed:.1f} s after the others' start",
        {"newest_step": newest, "fresh_step": alone, "healed_seconds": healed},
    )


@row(
    33,
    fault="all killed, all started again",
    injected="SIGKILL of all at one moment, the bootstrap too",
    criterion="on from the newest checkpoint or later, one digest, no sample twice",
    ci=True,
)
def all_killed(trial: Trial) -> Figures:
    every = trial.pick(3, 5)
    # The steps between the checkpoint and the kill are taken again, on another lineage.
    with trial.swarm(peers=1, forks=True) as swarm:
        for number in range(trial.pick(3, 1)):
            swarm.add(f"keeper-{number + 1}", checkpoint_every_steps=every)
        swarm.together()
        keepers = [name for name in swarm.peers if name.startswith("keeper")]
        swarm.wait(
            lambda: all(swarm.events(name, "checkpoint_saved") for name in keepers), "checkpoints", 120
        )
        before = swarm.step()
        swarm.kill("bootstrap")
        kill_all(swarm, list(swarm.peers))
        newest = max(saved(swarm, name) for name in keepers)
        swarm.restart("bootstrap")
        for name in swarm.peers:
            swarm.restart(name)
        back = swarm.together()
        after = swarm.step()
        if after <= newest:
            raise Failed(f"they went on to step {after}; the newest checkpoint is of step {newest}")
    return Figures(
        f"killed at step {before}, went on from the checkpoint of step {newest}; together {back:.1f} s after",
        {"killed_at_step": before, "checkpoint_step": newest, "back_seconds": back},
    )


@row(
    35,
    fault="two peers with one port, with one identity",
    injected="a second process on the same host; a copy of the identity file on another",
    criterion="a clear error that names the owner; the first is not affected",
    gate=False,
    ci=True,
)
def twins(trial: Trial) -> Figures:
    seconds: dict[str, float] = {}
    with trial.swarm(peers=trial.pick(3, 2)) as swarm:
        usual = swarm.pace(trial.pick(15, 4))
        first = swarm.peers["peer-1"]
        inside = (*swarm.lab.hosts.hosts["peer-1"].inside, *swarm.environment())
        pid = str(first.pid)
        same_data, _ = second(swarm, "same-data", inside, data=str(first.folder), port=0)
        seconds["folder"] = complaint(swarm, same_data, 8, ["data folder", pid])
        same_port, _ = second(swarm, "same-port", inside, port=31337)
        seconds["port"] = complaint(swarm, same_port, 8, ["31337", "taken", pid])
        # A copy, on another host: only the swarm can tell.
        _, there = swarm.place("copy")
        copy, data = second(swarm, "copy", (*there, *swarm.environment()), port=0)
        (data / "identity.key").write_bytes((first.folder / "identity.key").read_bytes())
        peer = swarm.last("peer-1", "joined")["peer"]
        seconds["copied identity"] = complaint(swarm, copy, 2, [peer[-8:], "online already"])
        rate = swarm.pace(trial.pick(15, 4))
        if str(first.pid) != pid or not first.running:
            raise Failed("the first peer ended")
        if rate < 0.8 * usual:
            raise Failed(f"{rate / usual:.0%} of the usual rate afterwards")
    told = ", ".join(f"{what} in {took:.1f} s" for what, took in seconds.items())
    return Figures(
        f"refused by name: {told}; the swarm at {rate / usual:.0%} of its rate",
        {f"{what.replace(' ', '_')}_seconds": took for what, took in seconds.items()},
    )


def second(
    swarm: Swarm, name: str, inside: tuple[str, ...], *, data: str = "", port: int
) -> tuple[Child, os.PathLike[str]]:
    """A peer that is expected to be refused, and its data folder."""
    folder = swarm.lab.folder / name
    (folder / "data").mkdir(parents=True)
    file = folder / "peer.toml"
    file.write_text(f'listen = ["/ip4/0.0.0.0/tcp/{port}"]\ndata_dir = "{data or folder / "data"}"\n')
    words = ("join", swarm.stage.invites()[-1], "--peer", str(file))
    return swarm.stage.child(name, *words, inside=inside), folder / "data"


@row(
    40,
    fault="a round's recorded inputs, reduced again in shuffled arrival orders",
    injected="replay, with each codec and aggregation",
    criterion="byte-identical 100 of 100",
)
def replayed(trial: Trial) -> Figures:
    command = [sys.executable, "-m", "tests.chaos.replay", "--seed", str(trial.seed), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    if not done.stdout:
        raise Failed(f"the replay failed: {done.stderr[-500:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    ways = {f"{each['codec']} {each['aggregation']}": each for each in figures}
    told = "; ".join(f"{way}: {each['identical']} of {each['orders']}" for way, each in ways.items())
    if any(each["identical"] != each["orders"] for each in figures):
        raise Failed(told)
    return Figures(
        f"{told} byte-identical, {figures[0]['members']} members, {figures[0]['values']:,} values",
        {f"{way.replace(' ', '_')}_identical": each["identical"] for way, each in ways.items()},
    )
