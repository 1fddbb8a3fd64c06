"""Imports that last as long as the process, kept out of the garbage collector's way."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """What is imported in the block is never looked at by the garbage collector.

    torch and what comes with it are a third of a million objects, and all of them stay. To look at them again
    and again while they are made, in each full collection and once more at the end takes a process a second,
    and now and then stops its event loop for a quarter of one.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
