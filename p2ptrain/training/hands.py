"""What every part of a peer works with: threads, tasks beside the loop, and whoever is told what happens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from p2ptrain import events
from p2ptrain.replica.donor import Compute


@dataclass(frozen=True)
class Hands:
    compute: Compute
    """Runs a function on the one thread that owns the replica's tensors."""
    aside: Compute
    """On others."""
    spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    """Starts a task beside the loop, which ends with the peer; what goes wrong in it ends the peer."""
    observe: Callable[[events.Event], None]


def now() -> float:
    """Loop time, in seconds."""
    return asyncio.get_running_loop().time()
