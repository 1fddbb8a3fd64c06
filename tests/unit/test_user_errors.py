"""What people get wrong: each mistake ends the command in one sentence with its cause and what to do, and
with the exit code of its kind. None shows a traceback.

The command runs in this process, as `p2ptrain` does. Not covered: what only a network can say; that is in
`tests/swarm/test_commands.py`.
"""

from __future__ import annotations

import fcntl
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
import torch
from organizer import NOBODY, NOW, invite
from safetensors.torch import save_file

from p2ptrain.config import RunConfig, commented_toml
from p2ptrain.swarm.access import encode
from peers import cli, control, invites, present

INVITE = encode(invite())
README = (Path(__file__).parents[2] / "README.md").read_text()

Prepare = Callable[[Path], None]


def text(name: str, content: str | bytes) -> Prepare:
    """A file of that name in the folder where the command runs."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def opened(folder: Path) -> None:
    """A run that a bootstrap was started for, and that stood at step 100."""
    here = folder / "host"
    here.mkdir()
    invites.open_book(here, RunConfig(), [f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}"], None, NOW)
    present.write(here, [present.Seen(peer="p", name="", role="train", invite=1, at=NOW, step=100)])


def host(then: Prepare) -> Prepare:
    """The same, and then something is done to it."""

    def prepare(folder: Path) -> None:
        opened(folder)
        then(folder)

    return prepare


def two_runs(folder: Path) -> None:
    for name in ("one", "two"):
        text(f"data/p2ptrain/{name}/organizer.key", b"")(folder)
        text(f"data/p2ptrain/{name}/identity.key", b"")(folder)


def nothing(folder: Path) -> None:
    """No preparation."""


def a_key(folder: Path) -> None:
    from p2ptrain.swarm.identity import load_or_create

    load_or_create(folder / "mine.key")


def running(folder: Path) -> None:
    """Another process has the data folder."""
    text("busy/control.lock", b"4711")(folder)
    lock = (folder / "busy" / control.LOCK).open("rb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    HELD.append(lock)


HELD: list[IO[bytes]] = []
"""What keeps locks until its test ends."""

RUN_FILE = text("run.toml", commented_toml(RunConfig()))
WIDTH = text("r.toml", "[task]\nwidth = 100\nheads = 3")
BAD_PEERS = 'run_id = "x"\nmin_peers = 9\nmax_peers = 3\n'


def adapter(name: str, *, without: str = "") -> Prepare:
    """A folder as PEFT writes it, of rank 2 for a weight of 6 by 4, but for one of its files."""

    def write(folder: Path) -> None:
        (folder / name).mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "base"}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        prefix = "base_model.model.layer"
        factors = {f"{prefix}.lora_A.weight": torch.ones(2, 4), f"{prefix}.lora_B.weight": torch.ones(6, 2)}
        save_file(factors, folder / name / "adapter_model.safetensors")
        if without:
            (folder / name / without).unlink()

    return write


def both(*preparations: Prepare) -> Prepare:
    def prepare(folder: Path) -> None:
        for each in preparations:
            each(folder)

    return prepare


ADAPTERS = both(adapter("a"), adapter("b"))
COMBINE = "adapters combine a b --out o --method"


def broken_book(folder: Path) -> None:
    opened(folder)
    RUN_FILE(folder)
    text("host/invites.json", "{")(folder)


# what the user did | what there is | exit code | the cause, and what to do, as patterns in the sentence
MISTAKES: list[tuple[str, Prepare, int, str, str]] = [
    # invites
    ("join hello", nothing, 2, "hello", "invite|p2ptrain:"),
    (f"join {INVITE[: len(INVITE) // 2]}", nothing, 2, "cut|damaged|incomplete", "whole|again|copy"),
    (f"join {INVITE[:-4]}abcd", nothing, 2, "damaged|typed|cut|checksum", "whole|again|copy"),
    (f"join {encode(invite(role='watch'))}", nothing, 2, "watch", "ask the organizer"),
    (f"join {encode(invite(expires=5))}", nothing, 2, "expired|ended", "ask the organizer"),
    ("doctor hello", nothing, 2, "hello", "invite|p2ptrain:"),
    ("service install hello", nothing, 2, "hello", "invite|p2ptrain:"),
    # peer files and options of join
    (f"join {INVITE} --peer gone.toml", nothing, 2, "cannot read gone.toml", "No such file"),
    (
        f"join {INVITE} --peer p.toml",
        text("p.toml", "threads = "),
        2,
        "not valid TOML",
        "Invalid value .at end",
    ),
    (f"join {INVITE} --peer p.toml", text("p.toml", "thread = 2"), 2, 'unknown key "thread"', "threads"),
    (f"join {INVITE} --peer p.toml", text("p.toml", "threads = 0"), 2, "threads", "from 1 to 1024"),
    (f"join {INVITE} --peer p.toml", text("p.toml", "target_batch_size = 3"), 2, "target_batch", "run file"),
    (f"join {INVITE} --peer p.toml", text("p.toml", b"\xff\xfe"), 2, "not UTF-8", "save it as UTF-8"),
    (f"join {INVITE} --peer p.toml", text("p.toml", "#" * 70_000), 2, "larger than 65536", "no run or peer"),
    (f"join {INVITE} --threads 0", nothing, 2, "threads in the options", "from 1 to 1024"),
    (f"join {INVITE} --upload-mbit -1", nothing, 2, "upload_mbit in the options", "from 0 to"),
    (f"join {INVITE} --temperature-celsius 500", nothing, 2, "temperature_celsius", "to 150"),
    (f"join {INVITE} --schedule 07:00-07:00", nothing, 2, "never opens", "00:00-24:00"),
    (f"join {INVITE} --schedule nights", nothing, 2, "no time of the week", "22:00-07:00"),
    (f"join {INVITE} --run gone.toml", nothing, 2, "cannot read gone.toml", "No such file"),
    (f"join {INVITE} --data-dir /proc/none", nothing, 6, "/proc/none|/proc", "data_dir|folder"),
    (f"join {INVITE} --data-dir busy", running, 8, "another peer runs .* 4711", "p2ptrain leave"),
    (f"join {INVITE} --data-dir d", text("d/identity.key", b"x"), 2, "should hold an Ed25519 key", "move it"),
    # the run file
    ("bootstrap gone.toml", nothing, 2, "cannot read gone.toml", "No such file"),
    ("bootstrap r.toml", text("r.toml", "run_id = 'A B'"), 2, "run_id", "text like"),
    ("bootstrap run.toml --entrance here", RUN_FILE, 2, "--entrance 'here'", "/ip4/203.0.113.7"),
    ("bootstrap run.toml --beside hello", RUN_FILE, 2, "hello", "invite|p2ptrain:"),
    (f"bootstrap r.toml --beside {INVITE}", text("r.toml", "seed = 5"), 3, "digest", "run file that its"),
    ("config check gone.toml", nothing, 2, "cannot read gone.toml", "No such file"),
    ("config check r.toml", text("r.toml", BAD_PEERS), 2, "min_peers .9. must be at most", "raise max_peers"),
    ("config check r.toml", text("r.toml", "silence_seconds = 1.0"), 2, "at least 3 times", "raise silence"),
    ("config check r.toml", text("r.toml", "total_steps = 5"), 2, "warmup_steps", "raise total_steps"),
    (
        "config check r.toml",
        text("r.toml", "[task]\nwidth = 100\nheads = 3"),
        2,
        "divisible",
        "nearest width",
    ),
    ("config check r.toml", text("r.toml", "codec = 'zip'"), 2, "codec", "fp16"),
    ("config explain learning.rate", nothing, 2, "no key", "config schema|nearest"),
    ("plan run.toml --uplink fast", RUN_FILE, 2, "'fast' is no rate", "20Mbit"),
    ("plan run.toml --peers 500", RUN_FILE, 2, "--peers .500.", "max_peers"),
    # the organizer
    ("invite create run.toml --ttl soon", RUN_FILE, 2, "--ttl 'soon'", "24h or 7d"),
    ("invite create run.toml", RUN_FILE, 2, "no bootstrap's data folder", "p2ptrain bootstrap"),
    ("invite revoke run.toml 9 --data-dir host", host(RUN_FILE), 2, "no invite number 9", "invite list"),
    ("invite list run.toml --data-dir host", broken_book, 6, "damaged", "put back"),
    ("run show", nothing, 2, "0 runs have been opened", "--data-dir"),
    ("run show", two_runs, 2, "2 runs .* one, two", "--run"),
    ("run kick nobody --data-dir host", opened, 2, "no peer whose id ends in 'nobody'", "write the id"),
    ("run kick p --for ever --data-dir host", opened, 2, "--for 'ever'", "for good is --ban"),
    ("run set seed=3 --data-dir host", opened, 2, "'seed' cannot change", "these can: optimizer.lr"),
    ("run set optimizer.lr=99 --data-dir host", opened, 2, "would not be valid", "less than or equal to 10"),
    ("run stop --at-step 7 --data-dir host", opened, 2, "7 is past", "such as 150"),
    ("run resume --data-dir host", opened, 2, "not paused", "nothing to resume"),
    # the peer that runs here
    ("status", nothing, 9, "no peer runs on this machine", "p2ptrain join INVITE"),
    ("pause --for 2h", nothing, 9, "no peer runs on this machine", "p2ptrain join INVITE"),
    ("pause --for long", nothing, 2, "--for 'long'", "30m, 2h or 1d"),
    ("top", nothing, 9, "no peer runs on this machine", "p2ptrain join INVITE"),
    ("leave --data-dir gone", nothing, 9, "no peer runs with the data folder", "p2ptrain join INVITE"),
    ("logs --data-dir gone", nothing, 6, "no journal", "folder of a peer that ran"),
    ("status --peer gone.toml", nothing, 2, "cannot read gone.toml", "No such file"),
    ("identity show", nothing, 6, "no peer's key", "p2ptrain join INVITE"),
    ("identity show", two_runs, 2, "2 peers have a key", "by its run's name"),
    ("identity import k digits", text("k", "x"), 2, "should hold an Ed25519 key", "put the right file"),
    ("identity import mine.key", a_key, 2, "say for which run", "identity import FILE RUN"),
    # checkpoints
    ("generate gone --prompt a", nothing, 7, "no whole checkpoint at gone", "name a folder"),
    ("verify gone gone", nothing, 7, "no whole checkpoint at gone", "name a folder"),
    ("generate c --prompt a", text("c/manifest.json", "{"), 7, "manifest", "checkpoint|damaged|copy"),
    # adapters
    (f"{COMBINE} mean --weights 1,-1", ADAPTERS, 7, "sum to 0", "give weights that sum to something"),
    (f"{COMBINE} mean --weights 1", ADAPTERS, 7, "expected 2 finite numbers", "one for each"),
    (
        f"{COMBINE} svd --rank 9",
        ADAPTERS,
        7,
        "--rank 9 is above what layer can hold, at most rank 4",
        "smaller",
    ),
    (f"{COMBINE} mean --rank 1 --energy 0.5", ADAPTERS, 7, "both say how much to keep", "give one of them"),
    (f"{COMBINE} merge", ADAPTERS, 7, "add the result to the base", "with --base"),
    (f"{COMBINE} mean --eval t.txt", ADAPTERS, 7, "measure the result", "with --base"),
    (
        f"{COMBINE} merge --base a",
        ADAPTERS,
        7,
        "a is no model folder",
        "give the folder of the adapters' base",
    ),
    (f"{COMBINE} mean", adapter("a"), 7, "b is no folder", "give one that PEFT"),
    (
        f"{COMBINE} mean",
        both(adapter("a"), adapter("b", without="adapter_config.json")),
        7,
        "b has no adapter_config.json",
        "copy the whole folder again",
    ),
    (
        f"{COMBINE} mean",
        both(adapter("a"), adapter("b", without="adapter_model.safetensors")),
        7,
        "b has no adapter_model.safetensors",
        "copy the whole folder again",
    ),
    (
        "adapters combine a b --method mean --out b",
        ADAPTERS,
        6,
        "b is there already",
        "name a folder that is not",
    ),
    # rehearsals
    ("demo --listen here", nothing, 2, "--listen", "/ip4/0.0.0.0/tcp/31337"),
    ("demo --run gone.toml", nothing, 2, "cannot read gone.toml", "No such file"),
    ("chaos --faults dance", nothing, 2, "dance", "kill"),
    ("chaos --rate often", nothing, 2, "often", "60/h|per"),
    ("chaos --peers 6 --max-peers 4", nothing, 2, "--max-peers .4. is less", "raise it"),
    ("bench --codecs zip", nothing, 2, "zip", "fp16"),
]


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    yield
    while HELD:
        HELD.pop().close()


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["p2ptrain", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_list_is_long_enough() -> None:
    assert len(MISTAKES) >= 40


@pytest.mark.parametrize(
    ("words", "prepare", "code", "cause", "remedy"),
    MISTAKES,
    ids=[re.sub(r"p2ptrain:[\w:-]+", "INVITE", words) for words, *_ in MISTAKES],
)
def test_mistake_is_named_with_its_remedy_in_one_sentence(
    words: str,
    prepare: Prepare,
    code: int,
    cause: str,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(tmp_path)
    ended = run(words.split(), monkeypatch)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    [sentence] = [line for line in said.splitlines() if line.startswith("p2ptrain: ")]
    assert re.search(cause, sentence), sentence
    assert re.search(remedy, sentence), sentence
    assert ended == code, sentence
    assert f"\n| {code} | " in README


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("dance", "No such command 'dance'"),
        ("join", "Missing argument"),
        ("demo --peers 99", "Invalid value for '--peers'"),
        ("config default swarm", "'swarm' is not one of 'run', 'peer'"),
        ("generate c --prompt a --length many", "Invalid value for '--length'"),
        ("status --verbose", "No such option: --verbose"),
    ],
)
def test_mistake_in_the_words_of_a_command_shows_its_usage(
    words: str, cause: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    assert run(words.split(), monkeypatch) == 2
    said = capsys.readouterr().err
    assert cause in " ".join(re.sub(r"[│╭╮╰╯─]", " ", said).split())
    assert "Usage: p2ptrain" in said
    assert "Traceback" not in said
