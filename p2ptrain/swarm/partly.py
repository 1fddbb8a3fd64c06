"""Modules of a package, imported without what its `__init__` imports besides."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def parts_only(package: str) -> Iterator[None]:
    """In the block `from package.part import name` imports that part and what it needs itself; afterwards
    `import package` is what it was. Changes nothing if the package is imported already."""
    if package in sys.modules or (spec := importlib.util.find_spec(package)) is None:
        yield
        return
    bare = ModuleType(package)
    bare.__spec__, bare.__path__ = spec, list(spec.submodule_search_locations or ())
    sys.modules[package] = bare
    try:
        yield
    finally:
        del sys.modules[package]
