"""Rows 25 to 31 and 41: peers that lie, strangers, and checkpoints of elsewhere. Not covered: liars who know
of each other, and a stranger who can read the traffic."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from p2ptrain.config import BytesTask, commented_toml
from p2ptrain.swarm.access import Invite, decode, encode, issue
from p2ptrain.swarm.identity import of_seed
from peers.chronicle import Record
from peers.rehearsal import COMPLAINT, Child
from peers.sites import PORT
from tests.chaos.rows import SMALL, Failed, Figures, Trial, row
from tests.chaos.swarm import Swarm
from tests.chaos.victims import ROOT, Victim, lies, lost_samples, rogue

STRANGER = (sys.executable, "-m", "tests.chaos.stranger")
BENCHED_AFTER = 5
"""Attempts that a liar may spoil before it is let in no more."""


def honest(swarm: Swarm, victim: Victim) -> list[str]:
    return [name for name in swarm.living() if name != victim.name]


@row(
    25,
    fault="NaN, Inf, a gradient 1e6 times too large from one peer",
    injected="a lying volunteer",
    criterion="refused before averaging; counted; benched after a few",
    deadline_seconds=400,
)
def not_finite(trial: Trial) -> Figures:
    told, numbers, wrong = [], {}, []
    with trial.swarm(peers=trial.pick(3, 2), tells='p2ptrain_round_aborts_total{cause="nonfinite"}') as swarm:
        others = list(swarm.peers)
        largest = 0.0
        for lie in ("nan", "inf", "huge"):
            # Each time another peer: what one has done is held against it.
            liar = Victim(swarm, f"liar-{lie}")
            swarm.together()
            usual = swarm.pace(trial.pick(20, 6))
            largest = largest or max(record["gradient_norm"] for record in swarm.commits(others[0]))
            since = time.time()
            liar.order("--lie", lie)
            swarm.watch(trial.pick(30, 8))
            until = time.time()
            rate = swarm.rate(since, until, others)
            spoiled = {
                (record["step"], record["attempt"])
                for name in others
                for record in swarm.events(name, "round_aborted", since)
                if record["cause"] in ("nonfinite", "bad_chunk")
            }
            norm = max((record["gradient_norm"] for record in swarm.commits(others[0], since)), default=0.0)
            accepted = norm > 100 * largest
            if not lies(swarm, liar.name):
                raise Failed(f"the liar never came to lie ({lie})")
            if accepted:
                wrong.append(f"{lie}: it was averaged, norm {norm:.3g} after {largest:.3g} at most")
            elif len(spoiled) > BENCHED_AFTER:
                wrong.append(f"{lie}: refused, but not benched after {len(spoiled)} spoiled attempts")
            told.append(f"{lie}: {'averaged' if accepted else 'refused'}, rate {rate / usual:.0%}")
            numbers |= {
                f"{lie}_rate_share": rate / usual,
                f"{lie}_attempts_spoiled": len(spoiled),
                f"{lie}_norm_ratio": norm / largest,
                f"{lie}_samples_lost": lost_samples(swarm, others, since),
            }
            swarm.disown(liar.name)
    text = "; ".join(told)
    if wrong:
        raise Failed(f"{'; '.join(wrong)}. Measured: {text}")
    return Figures(text, numbers)


@row(
    26,
    fault="1 of 5 sends its gradient flipped, constant, noise, or flipped and five times as long",
    injected="a lying volunteer",
    criterion="final loss at most 1.05 times that of plain means without it; metrics name it and no other",
    deadline_seconds=600,
)
def poisoned(trial: Trial) -> Figures:
    steps = trial.pick(80, 25)
    told, wrong, numbers = [], [], dict[str, float]()
    clean, _ = fifth_peer(trial, steps, "mean", "")
    for aggregation, lie in (
        ("multi_krum", "flip"),
        ("multi_krum", "constant"),
        ("multi_krum", "random"),
        ("multi_krum", "outweigh"),
        ("mean", "outweigh"),  # for comparison: it is documented as unsafe
    ):
        loss, named = fifth_peer(trial, steps, aggregation, lie)
        told.append(f"{aggregation}, {lie} {loss / clean:.2f}")
        numbers[f"{aggregation}_{lie}_loss_ratio"] = loss / clean
        if aggregation != "mean" and loss > 1.05 * clean:
            wrong.append(f"{lie} cost too much with {aggregation}")
        if named != {"fifth"}:
            wrong.append(f"metrics named {', '.join(sorted(named)) or 'nobody'} ({aggregation}, {lie})")
    text = f"loss at step {steps} relative to {clean:.3f} without it: {'; '.join(told)}; metrics named it"
    if wrong:
        raise Failed(f"{'; '.join(wrong)}. Measured: {text}")
    return Figures(text, {"clean_loss": clean, **numbers})


def fifth_peer(trial: Trial, steps: int, aggregation: str, lie: str) -> tuple[float, set[str]]:
    """Mean loss of four honest peers in the last ten of so many steps, and whom their metrics name, while a
    fifth tells that lie (none: is honest)."""
    settings = {
        "task": SMALL,
        "target_batch_size": 80,
        "chunk_values": 4096,
        "heartbeat_seconds": 0.5,
        "silence_seconds": 3.0,
        "min_peers": 5,  # none begins before all are there
        "aggregation": aggregation,
    }
    with trial.swarm(peers=0, **settings) as swarm:
        honest = [f"peer-{number + 1}" for number in range(4)]
        for name in honest:
            swarm.add(name)
        swarm.add("fifth", through=rogue("--lie", lie) if lie else ())
        swarm.together()
        swarm.wait_steps(steps - swarm.step(), 300)
        if lie and not lies(swarm, "fifth"):
            raise Failed(f"the liar never came to lie ({lie})")
        names = {swarm.last(name, "joined")["peer"][-8:]: name for name in swarm.peers}
        named = {
            who
            for name in honest
            for series in swarm.metrics(name)
            for short, who in names.items()
            if series == f'p2ptrain_outlier_rounds_total{{peer="{short}"}}'
        }
        losses = [
            record["loss"]
            for name in honest
            for record in swarm.commits(name)
            if record["loss"] is not None and steps - 10 <= record["step"] < steps
        ]
    return statistics.fmean(losses), named


@row(
    41,
    fault="a reducer that averages wrongly, where the run is audited",
    injected="a lying volunteer",
    criterion="within 20 steps proven to and left out by all others, who go back before its lie and go on",
    gate=False,
)
def false_sums(trial: Trial) -> Figures:
    settings = {"audit": 1.0, "codec": "fp16", "aggregation": "multi_krum"}
    tells = "p2ptrain_peer_convictions_total"
    with trial.swarm(peers=trial.pick(4, 3), forks=True, tells=tells, **settings) as swarm:
        liar = Victim(swarm)
        swarm.together()
        others, peer = honest(swarm, liar), swarm.last(liar.name, "joined")["peer"]
        usual, begin = swarm.pace(trial.pick(20, 6)), swarm.step(others)
        since = time.time()
        liar.order("--lie", "sums")
        swarm.wait(lambda: all(swarm.events(name, "peer_convicted") for name in others), "all know", 90)
        known = time.time()
        convicted = [record for name in others for record in swarm.events(name, "peer_convicted")]
        if wrong := {record["peer"] for record in convicted} - {peer}:
            raise Failed(f"{', '.join(sorted(wrong))} did nothing and was convicted")
        steps = max(record["step"] for record in convicted) - begin
        swarm.wait(lambda: all(swarm.commits(name, known + 1) for name in others), "the others go on", 60)
        back = [record for name in others for record in swarm.events(name, "rolled_back", since)]
        if {record["liar"] for record in back} != {peer} or len(back) < len(others):
            raise Failed(f"{len(back)} of {len(others)} went back before the lie")
        after = time.time()
        swarm.watch(trial.pick(20, 6))
        rate = swarm.rate(after, time.time(), others)
        swarm.disown(liar.name)
    seconds, given_up = known - since, max(record["samples_lost"] for record in back)
    return Figures(
        f"proven to {len(others)} of {len(others)} others {seconds:.1f} s and {steps} steps after its first "
        f"lie; they gave up {given_up:,} samples and go on at {rate / usual:.0%} of their rate",
        {"found_seconds": seconds, "found_steps": steps, "samples_undone": given_up},
    )


@row(
    27,
    fault="a billion samples claimed, and a billion reported",
    injected="a lying volunteer",
    criterion="clamped or refused; no step is triggered early",
)
def claimed(trial: Trial) -> Figures:
    told, wrong, numbers = [], [], {}
    with trial.swarm(peers=trial.pick(3, 2)) as swarm:
        others, target = list(swarm.peers), swarm.run.target_batch_size
        for lie in ("samples", "progress"):
            liar = Victim(swarm, f"liar-{lie}")
            swarm.together()
            since = time.time()
            liar.order("--lie", lie)
            swarm.watch(trial.pick(20, 8))
            entries = swarm.commits(others[0], since)
            if not entries or not lies(swarm, liar.name):
                raise Failed(f"{lie}: {len(entries)} rounds, and the liar said {lies(swarm, liar.name)}")
            most = max(record["samples"] for record in entries)
            fewest = min(record["samples"] for record in entries)
            told.append(f"{lie}: entries of {fewest:,} to {most:,} samples, {target} are the target")
            numbers |= {f"{lie}_most_samples": most, f"{lie}_fewest_samples": fewest}
            if most > 10 * target:
                wrong.append(f"{lie}: {most:,} samples were believed")
            if fewest < target / 2:
                wrong.append(f"{lie}: a step was taken on {fewest} samples")
            swarm.disown(liar.name)
    if wrong:
        raise Failed(f"{'; '.join(wrong)}. Measured: {'; '.join(told)}")
    return Figures("; ".join(told), numbers)


# -- who is let in -------------------------------------------------------------------------------------------


def complaint(swarm: Swarm, child: Child, code: int, words: Sequence[str], seconds: float = 60) -> float:
    """Start it, and wait until it has ended with that exit status and one sentence with these words; how long
    that took."""
    child.start()
    child.awaited = True
    took = swarm.wait(lambda: child.status is not None, f"{child.name} is refused", seconds)
    sentences = [line for line in child.log.read_text().splitlines() if line.startswith(COMPLAINT)]
    if child.status != code or len(sentences) != 1 or any(word not in sentences[0] for word in words):
        raise Failed(
            f"{child.name}: expected exit status {code} and one sentence with {', '.join(words)}; "
            f"{child.last_words()}"
        )
    return took


def newcomer(swarm: Swarm, name: str, *words: str, invite: str = "", through: Sequence[str] = ()) -> Child:
    """Not one of the swarm's peers: it is expected to be refused."""
    _, there = swarm.place(name)
    data = str(swarm.lab.folder / name / "data")
    command = ("join", invite or swarm.stage.invites()[-1], "--data-dir", data, "--json", *words)
    return swarm.stage.child(name, *command, inside=(*there, *swarm.environment(), *through))


def startup_seconds(swarm: Swarm) -> float:
    """What a process takes here until it could say anything about the swarm: it is refused by a host on which
    nobody listens."""
    invite = decode(swarm.stage.invites()[-1])
    nowhere = tuple(address.replace(f"/tcp/{PORT}/", "/tcp/9/") for address in invite.addresses)
    lost = encode(invite.model_copy(update={"addresses": nowhere}))
    return complaint(swarm, newcomer(swarm, "lost", invite=lost), 4, ["refused"])


@row(
    28,
    fault="another config, model, data or protocol",
    injected="another run file; lying volunteers",
    criterion="refused within 5 s, each differing field by name; others undisturbed",
)
def other_run(trial: Trial) -> Figures:
    numbers: dict[str, float] = {}
    with trial.swarm(peers=trial.pick(4, 2), tells='p2ptrain_peer_faults_total{cause="refused"}') as swarm:
        usual = swarm.pace(trial.pick(20, 5))
        since = time.time()
        other = swarm.run.model_copy(
            update={
                "optimizer": swarm.run.optimizer.model_copy(update={"lr": 0.5}),
                "task": BytesTask(layers=3, width=64),
            }
        )
        file = swarm.lab.folder / "other.toml"
        file.write_text(commented_toml(other))
        fields = ("optimizer.lr", "0.5", "task.layers", "task.width")
        numbers["config_seconds"] = complaint(swarm, newcomer(swarm, "other", "--run", str(file)), 3, fields)
        unlike = newcomer(swarm, "unlike", through=rogue("--lie", "config"))
        numbers["secret_config_seconds"] = complaint(swarm, unlike, 3, ["optimizer.lr"])
        newer = newcomer(swarm, "newer", through=rogue("--lie", "protocol"))
        numbers["protocol_seconds"] = complaint(swarm, newer, 3, ["protocol", "upgrade"])
        # This one does not see itself that it trains something else: the others must.
        model = newcomer(swarm, "model", through=rogue("--lie", "fingerprint"))
        model.start()
        swarm.wait(lambda: refusals(swarm, since), "somebody refuses the peer with another fingerprint", 60)
        swarm.watch(trial.pick(10, 4))
        if "caught_up" in (swarm.lab.folder / "model" / "data" / "journal.jsonl").read_text():
            raise Failed("a peer with another fingerprint was given the state")
        model.leave()
        swarm.wait(lambda: not model.running, "it has left", 30)
        rate = swarm.rate(since, time.time())
        begins = startup_seconds(swarm)
        late = {name: seconds for name, seconds in numbers.items() if seconds - begins > 5}
        if late:
            raise Failed(f"{late} after the start of the command; {begins:.1f} s of that is starting up")
    worst = max(0.0, max(numbers.values()) - begins)
    return Figures(
        f"refused within {worst:.1f} s of being up, by the fields that differ; others at {rate / usual:.0%}",
        {**numbers, "startup_seconds": begins, "rate_share": rate / usual},
    )


def refusals(swarm: Swarm, since: float) -> list[Record]:
    """What these peers refused since then."""
    faults = [record for name in swarm.living() for record in swarm.events(name, "peer_faulted", since)]
    return [record for record in faults if record["cause"] == "refused"]


@row(
    29,
    fault="no token, an expired one, replayed messages, wrong swarm name",
    injected="a stranger; a lying volunteer; changed invites",
    criterion="refused; no byte of state is given",
    deadline_seconds=360,
)
def no_token(trial: Trial) -> Figures:
    with trial.swarm(peers=trial.pick(3, 2)) as swarm:
        replayer = Victim(swarm)
        swarm.together()
        others = honest(swarm, replayer)
        # Strangers with the address of each peer, and what they could have got hold of.
        expired, good = created(swarm, "--ttl", "1s"), created(swarm, "--ttl", "1h")
        foreign = issued_by_another(decode(good))
        until = decode(expired).grant.expires or 0
        swarm.wait(lambda: time.time() > until + 1, "the invite has expired", 30)
        member = swarm.last(others[0], "joined")["peer"]
        guises = {
            "no token": None,
            "expired token": (expired, ""),
            "another organizer's token": (foreign, ""),
            "a member's token, replayed": (good, member),
            "good token": (good, ""),
        }
        told = ask_as(swarm, guises, [decode(swarm.invite(name)).addresses[0] for name in others])
        got = told.pop("good token")
        if not (got["answered"] and got["bytes"]):
            raise Failed(f"somebody with a good token got nothing, so refusals show nothing: {got}")
        for guise, answer in told.items():
            if answer["answered"] or answer["bytes"] or answer["refused"] < answer["asked"]:
                raise Failed(f"{guise}: asked {answer['asked']} questions and got {answer}")
        questions = sum(answer["asked"] for answer in told.values())
        # The command itself, with an invite that has expired, and another swarm's name on a good one.
        complaint(swarm, newcomer(swarm, "late", invite=expired), 2, ["expired", "clock", "organizer"])
        grant = decode(good).grant.model_copy(update={"run_id": "another"})
        renamed = encode(decode(good).model_copy(update={"grant": grant}))
        complaint(swarm, newcomer(swarm, "misled", invite=renamed), 2, ["another", "changed"])
        complaint(swarm, newcomer(swarm, "astray", invite=foreign), 2, ["by organizer"])
        # All that was said in the round before, said again.
        usual = swarm.pace(trial.pick(15, 5))
        replayer.order("--lie", "replay")
        swarm.watch(2)
        rate = swarm.pace(trial.pick(15, 5))
        if not (said := lies(swarm, replayer.name)):
            raise Failed("the replayer never came to replay")
        if rate < 0.5 * usual:
            raise Failed(f"with messages replayed {rate / usual:.0%} of the usual rate")
        swarm.watch(1)
    return Figures(
        f"{questions} questions by strangers without, with an expired, a foreign or a replayed token: all "
        f"refused, no byte given ({got['bytes']:,} with a good one); expired, changed and foreign invites "
        f"refused by the command; with {said[-1]['messages']} messages a round replayed "
        f"{rate / usual:.0%} of the usual rate",
        {
            "questions": questions,
            "bytes_given": sum(answer["bytes"] for answer in told.values()),
            "bytes_given_to_the_invited": got["bytes"],
            "replay_rate_share": rate / usual,
        },
    )


def created(swarm: Swarm, *options: str) -> str:
    """A new invite by the organizer, who needs no network for it."""
    where = (str(swarm.stage.folder / "run.toml"), "--data-dir", str(swarm.stage.folder / "bootstrap"))
    told = swarm.run_command("bootstrap", "invite", "create", *where, *options, "--json")
    try:
        return str(json.loads(told.splitlines()[-1])["invite"])
    except (ValueError, IndexError, KeyError):
        raise Failed(f"no invite could be created: {told[-300:]}") from None


def issued_by_another(invite: Invite) -> str:
    """The same, signed by somebody else who calls himself the organizer."""
    other = issue(
        of_seed(b"another organizer's private key."),
        addresses=invite.addresses,
        **invite.grant.model_dump(exclude={"organizer", "key"}),
    )
    return encode(other)


def ask_as(swarm: Swarm, guises: Mapping[str, object], addresses: Sequence[str]) -> dict[str, dict[str, int]]:
    """What a stranger in each of these guises got from these peers; see `stranger`."""
    _, there = swarm.place("stranger")
    asked = subprocess.run(
        [*there, *swarm.environment(), *STRANGER, swarm.run.run_id, json.dumps(guises), *addresses],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    if asked.returncode:
        raise Failed(f"the stranger could not ask: {asked.stderr[-300:]}")
    told: dict[str, dict[str, int]] = json.loads(asked.stdout.splitlines()[-1])
    return told


@row(
    30,
    fault="a donor serves damaged bytes",
    injected="a lying volunteer: one bit of each piece, of each entry",
    criterion="refused by hash; the joiner goes on with another donor; the liar is named",
)
def damaged_pieces(trial: Trial) -> Figures:
    told, numbers = [], {}
    # With little log a newcomer needs a snapshot.
    for lie, log_megabytes in (("pieces", 1), ("entries", 64)):
        with trial.swarm(peers=0, tells="p2ptrain_peer_faults_total") as swarm:
            for number in range(trial.pick(3, 2)):
                swarm.add(f"peer-{number + 1}", log_megabytes=log_megabytes)
            liar = Victim(swarm, log_megabytes=log_megabytes)
            swarm.together()
            swarm.wait_steps(10, 120)
            liar.order("--lie", lie)
            swarm.add("joiner")
            seconds = swarm.wait(lambda: swarm.commits("joiner"), "the joiner is in a round", 90)
            if not lies(swarm, liar.name):
                raise Failed(f"the joiner never asked the liar for {lie}")
            peer = swarm.last(liar.name, "joined")["peer"]
            named = [each for each in swarm.events("joiner", "peer_faulted") if each["peer"] == peer]
            named += [each for each in swarm.events("joiner", "catch_up_failed") if each["donor"] == peer]
            if not named:
                raise Failed(f"the joiner got damaged {lie} and did not name the donor")
            told.append(f"{lie}: in a round after {seconds:.1f} s")
            numbers[f"{lie}_join_seconds"] = seconds
    return Figures("; ".join(told) + "; the donor is named", numbers)


@row(
    31,
    fault="a peer comes back with a stale, a newer, a foreign checkpoint",
    injected="its data folder is changed between two lives",
    criterion="behind: catches up; newer: the heavier lineage goes on; foreign: refused by name",
    deadline_seconds=400,
)
def other_checkpoints(trial: Trial) -> Figures:
    far = trial.pick(20, 150)
    """Steps that the newer checkpoint is ahead: more than the others take until its owner is back."""
    with trial.swarm(peers=0, forks=True) as swarm:
        names = [f"peer-{number + 1}" for number in range(trial.pick(4, 3))]
        for name in names:
            swarm.add(name, checkpoint_every_steps=5, checkpoints_kept=1000)
        swarm.together()
        swarm.wait(
            lambda: all(swarm.events(name, "checkpoint_saved") for name in names), "all have saved", 120
        )
        first, *others = names
        # Stale: it has been away for some steps.
        stop(swarm, [first])
        swarm.wait_steps(10, 120)
        swarm.restart(first)
        behind = swarm.together()
        arrival = swarm.last(first, "caught_up")
        # Newer: the others have lost all but their oldest.
        swarm.wait_steps(far, 300)
        stop(swarm, names)
        newest = max(int(path.name.removeprefix("step-")) for path in saved(swarm, first))
        for name in others:
            for path in saved(swarm, name)[1:]:
                shutil.rmtree(path)
        for name in others:
            swarm.restart(name)
        swarm.together(others)
        if (meanwhile := swarm.step(others)) >= newest:
            raise Failed(f"the others were at step {meanwhile} before the checkpoint of {newest} came back")
        since = time.time()
        swarm.restart(first)
        swarm.together()
        if swarm.events(first, "rolled_back", since) or swarm.step() <= newest:
            raise Failed(f"the checkpoint of step {newest} gave way to others at step {meanwhile}")
        said = sum(bool(swarm.events(name, "rolled_back", since)) for name in others)
        # Foreign: of another run, which has the same name.
        stop(swarm, [first])
        strange = swarm.run.model_copy(update={"seed": swarm.run.seed + 1})
        for path in saved(swarm, first):
            forge(path, strange.model_dump_json(indent=2))
        refused = complaint(swarm, swarm.peers[first], 3, ["checkpoint", "seed", "data_dir"])
        shutil.rmtree(swarm.stage.folder / first / "checkpoints")
        swarm.restart(first)
        swarm.together()
    return Figures(
        f"{arrival['to_step'] - arrival['from_step']} steps behind: in a round after {behind:.1f} s by "
        f"{arrival['how']}; newer, of step {newest}: {len(others)} others came to it, {said} could tell "
        f"that they gave something up; "
        f"foreign: refused after {refused:.1f} s by the field that differs",
        {"behind_seconds": behind, "foreign_seconds": refused},
    )


def stop(swarm: Swarm, names: Sequence[str]) -> None:
    """They leave, each with a checkpoint."""
    for name in names:
        swarm.peers[name].leave()
    swarm.wait(lambda: not any(swarm.peers[name].running for name in names), "they have left", 30)


def saved(swarm: Swarm, name: str) -> list[Path]:
    """That peer's checkpoints, the oldest first."""
    return sorted((swarm.stage.folder / name / "checkpoints").glob("step-*"))


def forge(path: Path, run_json: str) -> None:
    """Make a checkpoint of this folder's that says it is of another run; whole, by its own hashes."""
    from p2ptrain.replica import checkpoint

    manifest = checkpoint._read_manifest(path)
    (path / checkpoint.RUN).write_text(run_json)
    note = checkpoint.FileNote(
        size_bytes=len(run_json.encode()), sha256=checkpoint._sha256(run_json.encode())
    )
    manifest = manifest.model_copy(update={"files": {**manifest.files, checkpoint.RUN: note}})
    manifest = manifest.model_copy(update={"digest": manifest.own_digest()})
    (path / checkpoint.MANIFEST).write_text(manifest.model_dump_json(indent=2))
