"""Packages that only some tasks need: what to install, said when one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from p2ptrain.errors import ConfigError


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around the imports of a task. Raises ConfigError, with the command that helps, if one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this run needs the package {error.name}, which is not installed; "
            f'run pip install "p2ptrain[{extra}]"'
        ) from error
