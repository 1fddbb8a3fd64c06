"""Rows 34 and 36 to 38: crowds and storms, as `p2ptrain chaos` plays and measures them.

Not covered here: hosts of their own for every process; without partitions the command keeps to loopback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from p2ptrain.config import commented_toml
from tests.chaos.rows import Failed, Figures, Trial, must, row

MARGIN_SECONDS = 150.0
"""For a rehearsal to begin, to calm down and to leave."""


def rehearse(
    trial: Trial, run: dict[str, Any], *options: str, seconds: float, seed: int = 0
) -> dict[str, Any]:
    """The receipt of `p2ptrain chaos` with these options on a run with these fields; I1 and I4 hold in it."""
    file = trial.folder / "run.toml"
    file.write_text(commented_toml(trial.run(**run)))
    program = str(Path(sys.executable).with_name("p2ptrain"))
    words = [program, "chaos", str(file), *options, "--seconds", str(seconds)]
    words += ["--seed", str(seed + trial.seed)]
    try:
        done = subprocess.run(
            [*words, "--json"],
            capture_output=True,
            text=True,
            timeout=seconds + MARGIN_SECONDS,
            check=False,
            env={**os.environ, "XDG_DATA_HOME": str(trial.folder)},
        )
    except subprocess.TimeoutExpired as late:
        raise Failed(f"the rehearsal was not over after {late.timeout:.0f} s") from late
    try:
        receipt: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise Failed(f"exit status {done.returncode} and no receipt: {done.stderr[-500:]}") from None
    must(not receipt["problem"], receipt["problem"])
    must(receipt["digests_equal"] and receipt["states_compared"] > 1, "digests differ, or were not compared")
    must(receipt["left_over"] == 0, f"{receipt['left_over']} processes outlived the rehearsal")
    return receipt


@row(
    34,
    fault="8 joiners at once",
    injected="`p2ptrain chaos --faults crowd`, the joiners on the other half of the processors",
    criterion="all in; the swarm's rate falls by at most 20 % meanwhile",
    gate=False,
    deadline_seconds=420,
)
def crowd(trial: Trial) -> Figures:
    joiners = trial.pick(8, 3)
    options = ("--faults", "crowd", "--rate", "1/min", "--peers", "2", "--max-peers", str(2 + joiners))
    # With seed 5 the crowd comes late enough for a rate to compare with.
    receipt = rehearse(trial, {}, *options, seconds=trial.pick(150, 60), seed=5)
    came = receipt["crowd"]
    must(came is not None, "no crowd came in that time")
    must(came["joiners"] == joiners, f"{came['joiners']} came instead of {joiners}")
    must(came["all_in_seconds"] is not None, "not all of them were ever in a round")
    must(came["samples_per_second_before"] > 0, "they came before there was a rate to compare with")
    share = came["samples_per_second_meanwhile"] / came["samples_per_second_before"]
    told = f"{joiners} in after {came['all_in_seconds']:.1f} s, the rate at {share:.0%} meanwhile"
    must(share >= 0.8, told)
    return Figures(told, {"all_in_seconds": came["all_in_seconds"], "rate_share": share})


@row(
    36,
    fault="storm: a kill or a newcomer every 0.5 to 2 s, up to 8 peers",
    injected="`p2ptrain chaos --faults kill,spawn`; 10 min with --soak",
    criterion="no gap of 30 s between commits (PCCL: 300 s)",
    gate=False,
    deadline_seconds=300,
)
def storm(trial: Trial) -> Figures:
    options = (
        "--faults",
        "kill,spawn",
        "--rate",
        "48/min",
        "--absence",
        "1",
        "--peers",
        trial.pick("4", "3"),
    )
    tiny = {"target_batch_size": trial.pick(2048, 1024), **trial.tiny()}
    receipt = rehearse(trial, tiny, *options, seconds=trial.pick(90, 20, 600))
    gap, faults = receipt["longest_gap_seconds"], sum(receipt["faults"].values())
    told = f"{faults} faults, {receipt['rounds_committed']} rounds, longest gap {gap:.1f} s"
    must(faults >= trial.pick(30, 6), f"only {faults} faults")
    must(gap <= 30, told)
    return Figures(
        told, {"longest_gap_seconds": gap, "faults": faults, "rounds": receipt["rounds_committed"]}
    )


@row(
    37,
    fault="a failure a minute, nobody exempt, steps stretched to 10 s",
    injected="`p2ptrain chaos --faults kill,bootstrap`; all 4 times as fast, or 30 min with --soak",
    criterion="90 % of attempted rounds commit (torchft: 82.3 %) by 90 % of live peers; 97 % of samples used",
    deadline_seconds=420,
)
def a_failure_a_minute(trial: Trial) -> Figures:
    # The same faults per step, in a quarter of the time, unless there is time.
    batch, rate = trial.pick((640, "4/min"), (1024, "4/min"), (2560, "1/min"))
    options = ("--faults", "kill,bootstrap", "--rate", rate)
    receipt = rehearse(
        trial,
        {"target_batch_size": batch},
        *options,
        seconds=trial.pick(150, 30, 1800),
    )
    committed, attempted = receipt["rounds_committed"], receipt["rounds_attempted"]
    samples, part = receipt["samples"], receipt["participation"]
    used = samples["used"] / samples["computed"]
    told = f"{sum(receipt['faults'].values())} failures; {committed} of {attempted} attempts committed, "
    told += f"{used:.1%} of samples used, {part:.1%} of live peers took part"
    must(committed >= 0.9 * attempted and used >= 0.97 and part >= 0.9, told)
    return Figures(told, {"committed_share": committed / attempted, "used": used, "participation": part})


@row(
    38,
    fault="mixed storm: 125 kills, pauses and partitions an hour",
    injected="`p2ptrain chaos --faults kill,pause,partition`; 30 min with --soak",
    criterion="all recover; back in the median within 60 s (ft-diloco: 149 s)",
    gate=False,
    deadline_seconds=420,
)
def mixed_storm(trial: Trial) -> Figures:
    rate = trial.pick("6/min", "12/min", "125/h")
    options = ("--faults", "kill,pause,partition", "--rate", rate)
    receipt = rehearse(trial, {}, *options, seconds=trial.pick(150, 30, 1800))
    faults = sum(receipt["faults"].values())
    back = receipt["rejoin_by_replay_seconds"]
    told = f"{faults} faults, all recovered; {back['count']} came back by replay, in the median after "
    told += f"{back['median']} s; {receipt['rollbacks']} rollbacks, "
    told += f"longest gap {receipt['longest_gap_seconds']} s"
    must(faults >= 3, f"only {faults} faults")
    must(back["median"] is None or back["median"] <= 60, told)
    return Figures(told, {"faults": faults, "back_median_seconds": back["median"] or 0.0})
