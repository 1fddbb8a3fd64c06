"""Of all verbs of the command, what a command line needs.

Typer looks at every parameter of every verb before it looks at the words, and that takes longer than all that
the quick verbs do.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import typer
from typer.models import CommandInfo, TyperInfo


def needed(app: typer.Typer, words: Sequence[str]) -> typer.Typer:
    """The app with no other verb than these words name; where all are listed, without their parameters; where
    it is not clear which is meant, the app itself."""
    first = words[0] if words else "--help"
    if first == "--help":
        commands = [_bare(each) for each in app.registered_commands]
        return _with(app, commands, [_group(each, ["--help"]) for each in app.registered_groups])
    commands = [each for each in app.registered_commands if _name(each) == first]
    groups = [each for each in app.registered_groups if each.name == first]
    if not commands and not groups:
        return app
    return _with(app, commands, [_group(each, words[1:]) for each in groups])


def _with(app: typer.Typer, commands: list[CommandInfo], groups: list[TyperInfo]) -> typer.Typer:
    only = copy.copy(app)
    only.registered_commands, only.registered_groups = commands, groups
    return only


def _group(group: TyperInfo, words: Sequence[str]) -> TyperInfo:
    only = copy.copy(group)
    if group.typer_instance is not None:
        only.typer_instance = needed(group.typer_instance, words)
    return only


def _name(command: CommandInfo) -> str:
    """By which it is called."""
    return command.name or getattr(command.callback, "__name__", "").replace("_", "-")


def _bare(command: CommandInfo) -> CommandInfo:
    """One that has the name and the help of this one, and no parameters."""

    def listed() -> None:
        raise AssertionError("it is listed, and not called")

    listed.__name__ = getattr(command.callback, "__name__", "")
    listed.__doc__ = getattr(command.callback, "__doc__", "")
    bare = copy.copy(command)
    bare.callback = listed
    return bare
