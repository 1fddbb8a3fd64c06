"""What a command line needs of all verbs: the answer is the same, and everything else is left out."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from peers.cli import app
from peers.verbs import needed

LINES = [
    "",
    "--help",
    "config",
    "config --help",
    "config check --help",
    "status --help",
    "bench-peer --help",
    "run set --help",
    "dance",
    "config dance",
    "--log-format json status --help",
]


def shown(app: typer.Typer, words: list[str]) -> tuple[int, str]:
    done = CliRunner().invoke(app, words, prog_name="p2ptrain", env={"TERMINAL_WIDTH": "120"})
    return done.exit_code, done.output


@pytest.mark.parametrize("line", LINES)
def test_answer_is_the_same_when_other_verbs_are_left_out(line: str) -> None:
    words = line.split()
    assert shown(needed(app, words), words) == shown(app, words)


def test_only_the_verb_that_is_meant_is_left() -> None:
    commands, groups = len(app.registered_commands), len(app.registered_groups)
    only = needed(app, ["config", "check", "run.toml"])
    (group,) = only.registered_groups
    assert group.typer_instance is not None
    assert (len(only.registered_commands), len(group.typer_instance.registered_commands)) == (0, 1)
    assert len(needed(app, ["status"]).registered_commands) == 1
    assert needed(app, ["--log-format", "json", "status"]) is app
    assert (len(app.registered_commands), len(app.registered_groups)) == (commands, groups)
