"""The table of rooms holds: who may import what, read from the sources themselves.

Every import is looked at, also those inside functions and under `TYPE_CHECKING`. What a room may import of
ours and of others' is listed, so that anything new is a decision made here.

Not covered: what a child process imports.
"""

from __future__ import annotations

import ast
import fnmatch
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TOP_LEVEL = {"pyproject.toml", "p2ptrain", "peers", "configs", "tests", "docker", "README.md"}


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TORCH = names("torch numpy safetensors")
PURE = names(
    "__future__ abc bisect collections dataclasses enum functools hashlib heapq itertools json logging math "
    "operator struct textwrap types typing"
)
"""Standard modules without clock, chance or I/O; `logging` is for its levels, and refused to the rules."""

ANY = frozenset(sys.stdlib_module_names)


@dataclass(frozen=True)
class Room:
    """What the modules of a room may import; the longest name that fits a module is its room."""

    ours: frozenset[str]
    """Modules and packages of this repository, beside the room itself."""
    packages: frozenset[str] = frozenset()
    standard: frozenset[str] = ANY


WORDS = names("p2ptrain p2ptrain.errors p2ptrain.events p2ptrain.records p2ptrain.timetable p2ptrain.config")
LOWER = WORDS | names(
    "p2ptrain.protocol p2ptrain.gradients p2ptrain.replica p2ptrain.tasks p2ptrain.swarm.port"
)
WORD = Room(WORDS, names("pydantic"), PURE | {"difflib", "pathlib", "tomllib"})

ROOMS = {
    # 0: words
    "p2ptrain": Room(frozenset(), standard=frozenset({"__future__"})),
    "p2ptrain.errors": WORD,
    "p2ptrain.events": WORD,
    "p2ptrain.records": WORD,
    "p2ptrain.timetable": Room(frozenset(), standard=PURE | {"re"}),
    "p2ptrain.config": WORD,
    # 1: rules and sums
    "p2ptrain.protocol": Room(WORDS, names("blake3"), PURE - {"logging"}),
    "p2ptrain.gradients": Room(WORDS, TORCH | {"blake3"}, PURE | {"contextlib", "threading"}),
    # 2: rim, state, work, eyes
    "p2ptrain.swarm": Room(
        WORDS | {"p2ptrain.protocol.estimate"}, names("base58 cryptography msgpack pydantic")
    ),
    "p2ptrain.swarm.holders": Room(frozenset(), names("psutil")),
    "p2ptrain.swarm.node": Room(  # the one that imports hivemind
        WORDS | {"p2ptrain.swarm", "p2ptrain.protocol.presence"}, names("base58 hivemind")
    ),
    "p2ptrain.replica": Room(
        WORDS | names("p2ptrain.protocol p2ptrain.gradients"),
        TORCH | {"pydantic"},
        ANY - names("asyncio logging random socket subprocess threading time"),
    ),
    "p2ptrain.replica.transfer": Room(LOWER, frozenset(), PURE | {"asyncio"}),
    "p2ptrain.replica.donor": Room(LOWER, frozenset(), PURE | {"asyncio"}),
    "p2ptrain.replica.joining": Room(WORDS | {"p2ptrain.protocol"}, frozenset(), PURE - {"logging"}),
    "p2ptrain.tasks": Room(
        WORDS, TORCH, ANY - names("asyncio importlib random socket subprocess threading time")
    ),
    "p2ptrain.tasks.lora": Room(WORDS | {"p2ptrain.tasks"}, TORCH | {"peft"}, PURE | {"warnings"}),
    "p2ptrain.tasks.digits": Room(WORDS | {"p2ptrain.tasks"}, TORCH | {"sklearn"}, PURE),
    "p2ptrain.tasks.causal_lm": Room(
        WORDS | {"p2ptrain.tasks"}, TORCH | {"transformers"}, PURE | {"pathlib"}
    ),
    "p2ptrain.tasks.documents": Room(
        WORDS | {"p2ptrain.tasks"},
        TORCH | names("datasets pyarrow"),
        PURE | names("array codecs contextlib pathlib"),
    ),
    "p2ptrain.tasks.hub": Room(WORDS | {"p2ptrain.tasks"}, names("huggingface_hub"), PURE | {"pathlib"}),
    "p2ptrain.tasks.tokens": Room(
        WORDS | {"p2ptrain.tasks"}, names("tokenizers transformers"), PURE | {"pathlib"}
    ),
    "p2ptrain.tasks.own": Room(  # the one that loads code which others wrote
        WORDS | {"p2ptrain.tasks", "p2ptrain.gradients.devices"},
        TORCH,
        PURE | {"contextlib", "importlib", "traceback"},
    ),
    "p2ptrain.telemetry.trackers": Room(WORDS, names("torch trackio wandb"), PURE | {"pathlib"}),
    "p2ptrain.telemetry": Room(WORDS, names("aiohttp prometheus_client psutil")),
    # 3: loop
    "p2ptrain.allreduce": Room(
        LOWER | names("p2ptrain.auditing p2ptrain.court"),
        names("torch numpy"),
        PURE | {"asyncio", "contextlib"},
    ),
    "p2ptrain.auditing": Room(LOWER | {"p2ptrain.court"}, names("blake3"), PURE | {"asyncio"}),
    "p2ptrain.court": Room(LOWER, names("blake3")),
    "p2ptrain.training": Room(
        LOWER | names("p2ptrain.allreduce p2ptrain.court"),
        names("torch"),
        PURE | {"asyncio", "pathlib"},
    ),
    "p2ptrain.trainer": Room(
        LOWER | names("p2ptrain.allreduce p2ptrain.auditing p2ptrain.court p2ptrain.training"),
        frozenset(),
        PURE | {"asyncio", "pathlib"},
    ),
    # beside: tools that need no swarm
    "p2ptrain.adapters": Room(
        WORDS | {"p2ptrain.tasks", "p2ptrain.replica.adapter_files"},
        TORCH | names("peft pydantic transformers"),
        ANY - names("asyncio random socket threading time"),
    ),
    "p2ptrain.experiment": Room(
        LOWER - {"p2ptrain.swarm.port"},
        names("matplotlib pydantic torch"),
        ANY - names("asyncio random socket subprocess threading"),
    ),
    # roles: they wire
    "peers": Room(
        LOWER
        | names("p2ptrain.adapters p2ptrain.experiment p2ptrain.swarm p2ptrain.telemetry p2ptrain.trainer"),
        names("psutil pydantic rich segno torch typer uvloop"),
    ),
    "peers.top": Room(WORDS | {"peers"}, names("rich textual")),
    # the web page is served here and nowhere else
    "peers.monitor_pages": Room(
        WORDS | names("p2ptrain.telemetry.connections p2ptrain.telemetry.health peers.watching"),
        names("aiohttp segno"),
    ),
    "peers.watching": Room(WORDS | names("p2ptrain.telemetry.feed"), frozenset(), PURE),
}

UNLOADING = names("pickle marshal shelve dill cloudpickle joblib")
"""Ways to let bytes run code (ADR 8)."""

TRAINS = names(
    "p2ptrain.gradients p2ptrain.replica p2ptrain.tasks p2ptrain.allreduce p2ptrain.training "
    "p2ptrain.trainer torch"
)

MACHINES = names("p2ptrain.protocol.member p2ptrain.protocol.leader p2ptrain.protocol.reduction")


@dataclass(frozen=True)
class Import:
    """One imported name: `module`, or `module` and the `name` taken from it."""

    module: str
    name: str | None
    line: int
    lazy: bool
    """Inside a function, so it happens only when that is called."""

    def reaches(self) -> Iterator[str]:
        """The module, and what may be a module in it."""
        yield self.module
        if self.name is not None:
            yield f"{self.module}.{self.name}"


def imports(source: str) -> list[Import]:
    found: list[Import] = []

    def walk(node: ast.AST, lazy: bool) -> None:
        match node:
            case ast.Import():
                found.extend(Import(alias.name, None, node.lineno, lazy) for alias in node.names)
            case ast.ImportFrom():
                module = "." * node.level + (node.module or "")
                found.extend(Import(module, alias.name, node.lineno, lazy) for alias in node.names)
            case ast.Call(func=ast.Name("__import__") | ast.Attribute(attr="import_module")):
                found.append(Import("a module named at run time", None, node.lineno, lazy))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        for child in ast.iter_child_nodes(node):
            walk(child, lazy or inside)

    walk(ast.parse(source), False)
    return found


def within(module: str, places: frozenset[str]) -> bool:
    """Whether the module is one of these or inside one; `p2ptrain` as a place is its `__init__` alone."""
    return any(
        module == place or (place != "p2ptrain" and module.startswith(f"{place}.")) for place in places
    )


def room_of(module: str) -> str | None:
    fitting = [
        room for room in ROOMS if module == room or (module.startswith(f"{room}.") and room != "p2ptrain")
    ]
    return max(fitting, key=len, default=None)


def complaints(module: str, source: str, modules: frozenset[str]) -> list[str]:
    """What this module imports and may not; `modules` are all there are."""
    name = room_of(module)
    if name is None:
        return [f"{module} is in no room: give it one in ROOMS"]
    room = ROOMS[name]
    wrong = []
    for each in imports(source):
        target = next(
            (reached for reached in reversed(list(each.reaches())) if reached in modules), each.module
        )
        top = target.partition(".")[0]
        if top in {"p2ptrain", "peers"}:
            fine = target == name or target.startswith(f"{name}.") or within(target, room.ours)
        elif top in sys.stdlib_module_names:
            fine = top in room.standard and top not in UNLOADING
        else:
            fine = top in room.packages
        if not fine:
            wrong.append(f"{module}:{each.line} imports {target}, which {name} may not")
    return wrong


def sources() -> dict[str, str]:
    """Dotted name → text, of every module that ships."""
    found = {}
    for package in ("p2ptrain", "peers"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


SOURCES = sources()
MODULES = frozenset(SOURCES)


def closure(start: str, *, with_lazy: bool) -> frozenset[str]:
    """Every module and package that importing `start` brings in, as far as our own sources tell."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module in reached:
            continue
        reached.add(module)
        for each in imports(SOURCES.get(module, "")):
            if with_lazy or not each.lazy:
                waiting += [name for name in each.reaches() if name in MODULES or name == each.module]
    return frozenset(reached)


# -- the rule itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_imports_only_what_its_room_may(module: str) -> None:
    assert complaints(module, SOURCES[module], MODULES) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("p2ptrain.protocol.member", "import time"),
        ("p2ptrain.protocol.member", "import asyncio"),
        ("p2ptrain.protocol.member", "from random import Random"),
        ("p2ptrain.protocol.member", "import logging"),
        ("p2ptrain.protocol.member", "import torch"),
        ("p2ptrain.protocol.member", "from hivemind.p2p import P2P"),
        ("p2ptrain.protocol.member", "from p2ptrain.swarm.port import Swarm"),
        ("p2ptrain.protocol.member", "from p2ptrain.swarm import port"),
        ("p2ptrain.protocol.member", "from p2ptrain import swarm"),
        ("p2ptrain.protocol.member", "def late() -> None:\n    import socket"),
        ("p2ptrain.protocol.member", "if TYPE_CHECKING:\n    import socket"),
        ("p2ptrain.protocol.member", "from . import leader"),
        ("p2ptrain.records", "from p2ptrain.protocol import round"),
        ("p2ptrain.gradients.codecs", "import socket"),
        ("p2ptrain.gradients.codecs", "import os"),
        ("p2ptrain.swarm.lanes", "import hivemind"),
        ("p2ptrain.swarm.lanes", "import torch"),
        ("p2ptrain.swarm.lanes", "from p2ptrain.protocol.member import Member"),
        ("p2ptrain.replica.transfer", "from p2ptrain.swarm.libp2p import Libp2pSwarm"),
        ("p2ptrain.replica.joining", "import asyncio"),
        ("p2ptrain.replica.joining", "import torch"),
        ("p2ptrain.replica.replica", "from p2ptrain import trainer"),
        ("p2ptrain.trainer", "import hivemind"),
        ("p2ptrain.trainer", "import time"),
        ("p2ptrain.trainer", "from peers import signals"),
        ("p2ptrain.tasks", "import pickle"),
        ("p2ptrain.tasks", "import importlib\nimportlib.import_module(name)"),
        ("p2ptrain.tasks.causal_lm", "from importlib.metadata import EntryPoint"),
        ("p2ptrain.cleverness", "import math"),
        ("peers.volunteer", "import hivemind"),
        ("peers.volunteer", "import pickle"),
        ("peers.volunteer", "import requests"),
    ],
)
def test_rule_complains_when_an_import_breaks_it(module: str, line: str) -> None:
    assert complaints(module, line, MODULES | {module})


def test_rule_is_silent_when_imports_go_down() -> None:
    down = "from p2ptrain.protocol import leader\nfrom p2ptrain import events\nimport p2ptrain.records"
    assert complaints("p2ptrain.protocol.member", down, MODULES) == []


# -- what the table alone does not say -----------------------------------------------------------------------


def test_top_level_shows_exactly_the_given_entries() -> None:
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line[:1] != "#"]
    visible = {
        path.name
        for path in ROOT.iterdir()
        if not path.name.startswith(".") and not any(fnmatch.fnmatch(path.name, each) for each in ignored)
    }
    assert visible == TOP_LEVEL


def test_hivemind_is_imported_by_one_module_only() -> None:
    importing = {
        module
        for module, source in SOURCES.items()
        if any(each.module.partition(".")[0] == "hivemind" for each in imports(source))
    }
    assert importing == {"p2ptrain.swarm.node"}


@pytest.mark.parametrize(
    "role",
    [
        "peers.bootstrap",
        "peers.signals",
        "peers.places",
        "peers.config_cli",
        "peers.control_cli",
        "peers.pauses",
        "peers.monitor",
        "peers.monitor_cli",
        "peers.monitor_pages",
        "peers.replaying",
        "peers.watching",
    ],
)
def test_role_that_trains_nothing_imports_no_module_that_trains(role: str) -> None:
    """hivemind imports torch itself; that is its business, and the bootstrap pays for it in memory only."""
    assert [module for module in closure(role, with_lazy=True) if within(module, TRAINS)] == []


def test_command_imports_no_module_that_trains_before_a_verb_asks_for_it() -> None:
    heavy = TRAINS | {"hivemind", "numpy", "p2ptrain.swarm.node"}
    assert [module for module in closure("peers.cli", with_lazy=False) if within(module, heavy)] == []


@pytest.mark.parametrize("module", sorted(module for module in MODULES if room_of(module) == "peers"))
def test_role_drives_no_state_machine_of_the_protocol(module: str) -> None:
    """A role may show the stage that a member is in, and no more."""
    taken = {
        f"{each.module}.{each.name}"
        for each in imports(SOURCES[module])
        if each.module in MACHINES and (each.module, each.name) != ("p2ptrain.protocol.member", "Stage")
    }
    assert taken == set()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_loads_no_pickle_through_torch_or_numpy(module: str) -> None:
    loading = [
        f"line {node.lineno}"
        for node in ast.walk(ast.parse(SOURCES[module]))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in {("torch", "load"), ("np", "load"), ("numpy", "load")}
    ]
    assert loading == []


def test_main_loop_fits_one_screen() -> None:
    loop = next(
        node
        for node in ast.walk(ast.parse(SOURCES["p2ptrain.trainer"]))
        if isinstance(node, ast.AsyncFunctionDef) and node.name == "train"
    )
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno < 25
