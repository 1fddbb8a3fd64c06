"""The README says what is true: its commands exist, and CI runs exactly its test command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from p2ptrain import errors
from peers.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ROOMS = ("p2ptrain", "peers", "configs", "tests", "docker")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.S)


def test_readme_opens_with_two_one_line_commands_that_set_everything_up() -> None:
    for block in BLOCKS[:2]:
        assert len(block.strip().splitlines()) == 1
        assert block.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert BLOCKS[0].rstrip().endswith("p2ptrain demo")
    assert "pytest" in BLOCKS[1]


def test_ci_runs_exactly_the_readme_s_test_command() -> None:
    commands = [line for line in (ROOT / ".ci/run").read_text().splitlines() if "venv .venv" in line]
    assert commands == [BLOCKS[1].strip()]


def shown_commands() -> list[list[str]]:
    lines = [line.split("#")[0] for block in BLOCKS for line in block.splitlines()]
    return [line.split()[1:] for line in lines if line.startswith("p2ptrain ")]


@pytest.mark.parametrize("words", shown_commands(), ids=" ".join)
def test_command_shown_in_the_readme_exists_with_its_options(words: list[str]) -> None:
    command = get_command(app)
    for word in words:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]  # type: ignore[attr-defined]
    assert not getattr(command, "commands", None), f"{words} names no command"
    known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


def test_every_exit_code_is_in_the_readme_s_table() -> None:
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.M)}
    codes = {
        each.exit_code
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.P2PTrainError)
    }
    assert table == codes | {0}


def shown_paths() -> list[tuple[str, str]]:
    """(README, path in backticks), relative to the repository or to the README's own folder."""
    readmes = [
        ROOT / "README.md",
        *(path for room in ROOMS for path in sorted((ROOT / room).rglob("README.md"))),
    ]
    return [
        (str(readme.relative_to(ROOT)), path)
        for readme in readmes
        for path in re.findall(r"`([\w.-]+(?:/[\w.-]+)*(?:/|\.py|\.md|\.toml))`", readme.read_text())
    ]


@pytest.mark.parametrize(("readme", "path"), shown_paths())
def test_path_shown_in_a_readme_exists(readme: str, path: str) -> None:
    assert (ROOT / path).exists() or ((ROOT / readme).parent / path).exists()
