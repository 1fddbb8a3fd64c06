"""Strategy `local` as its users have it: real processes, whose replicas have one digest after every round."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from p2ptrain.telemetry.journal import read_journal
from tests.swarm.processes import crew, run_file

pytestmark = [pytest.mark.swarm, pytest.mark.long]

STEPS = 12
PLAIN = '[optimizer]\nkind = "sgd"\nlr = 0.1\nmomentum = 0.0\nweight_decay = 0.0\nclip_norm = 0.0\n'
ONE_STEP = f"{PLAIN}\n[local]\ninner_batch_size = 4\nouter_learning_rate = 1.0\nouter_momentum = 0.0\n"
WARM = f"{ONE_STEP}warmup_rounds = 4\nwarmup_batch_size = 8\n"
CASES = {
    "sync": ("", PLAIN),
    "local, one plain step": ('strategy = "local"\n', ONE_STEP),
    "local, after a warm-up": ('strategy = "local"\n', WARM),
}


@pytest.mark.parametrize(("head", "tables"), CASES.values(), ids=CASES)
def test_two_processes_have_one_digest_after_every_round(head: str, tables: str, tmp_path: Path) -> None:
    run = run_file(tmp_path, "one-step", STEPS)
    run.write_text(f"min_peers = 2\n{head}{run.read_text()}\n{tables}")
    with crew(tmp_path) as people:
        _, invite = people.bootstrap(run)
        peers = [
            people.join(invite, name, micro_batch_size=4, eval_every_steps=3) for name in ("anna", "bert")
        ]
        assert [peer.end(120) for peer in peers] == [0, 0]
        assert len({peer.result()["lineage"] for peer in peers}) == 1
    told = [list(read_journal(tmp_path / name / "journal.jsonl")) for name in ("anna", "bert")]
    digests = [
        {line["lineage"]: line["state_digest"] for line in lines if line["event"] == "state_hashed"}
        for lines in told
    ]
    common = digests[0].keys() & digests[1].keys()
    assert len(common) >= STEPS - 1
    assert all(digests[0][lineage] == digests[1][lineage] for lineage in common)
    rounds = [line for line in told[0] if line["event"] == "copies_averaged"]
    if head:
        assert rounds
        assert all(math.isfinite(line["consensus_distance"] or 0.0) for line in rounds)
        assert any(line["average_loss"] is not None for line in told[0] if line["event"] == "copies_averaged")
    else:
        assert not rounds
