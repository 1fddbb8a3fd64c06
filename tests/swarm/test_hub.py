"""A dataset is streamed from the Hugging Face hub: from a server on loopback that answers as the hub does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.swarm.hub_server import hub
from tests.unit.hub_models import save_shards

pytestmark = pytest.mark.swarm

CARD = """---
configs:
- config_name: default
  data_files: data/*.parquet
- config_name: sample-10BT
  data_files: sample/10BT/*.parquet
---
"""

READ = """
import json, sys
from p2ptrain.config import CausalLmTask
from p2ptrain.errors import CorpusError
from p2ptrain.tasks.documents import Documents
from p2ptrain.tasks.tokens import ByteTokenizer

said = {"dataset": "somebody/web", "subset": "sample-10BT", "context": 96}

def opened(place="", **other):
    return Documents(CausalLmTask(**(said | other)), ByteTokenizer(), 0, place)

there, here = opened(), opened(sys.argv[1])
windows = [
    [window.tolist() for step in (0, 40) for window in each.samples(step, "alice", 0, 4) + each.heldout(3)]
    for each in (there, here)
]
refusals = []
for other in ({"subset": "sample-9"}, {"split": "test"}, {"column": "body"}, {"dataset": "somebody/else"}):
    try:
        opened(**other)
    except CorpusError as error:
        refusals.append(str(error))
print(json.dumps({"equal": windows[0] == windows[1], "count": len(windows[0]), "refusals": refusals}))
"""


def test_streamed_dataset_gives_the_windows_of_the_same_files_on_this_machine(tmp_path: Path) -> None:
    shards = tmp_path / "hub" / "sample" / "10BT"
    save_shards(shards, rows=400, group=100)
    save_shards(tmp_path / "hub" / "data", shards=1)
    (tmp_path / "hub" / "README.md").write_text(CARD)
    asked: list[tuple[str, str]] = []
    with hub("somebody/web", tmp_path / "hub", asked) as address:
        places = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", READ, str(shards)],
            env=os.environ | places,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["equal"]
    assert result["count"] == 14
    no_subset, no_split, no_column, no_dataset = result["refusals"]
    assert "sample-9" in no_subset
    assert "test" in no_split
    assert "has no column 'body', only text, id, dump, url" in no_column
    assert "the dataset somebody/else cannot be read" in no_dataset
    assert {path for path, _ in asked if path.endswith(".parquet")} < {
        path.relative_to(tmp_path / "hub").as_posix() for path in shards.iterdir()
    }, "files that no drawn shard is in were read"
