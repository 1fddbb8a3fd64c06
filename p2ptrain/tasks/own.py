"""Tasks from packages that are not ours: code, so the volunteer must have allowed its package by name.

A run file only names a factory. Nothing of it is imported before the peer file's `allow_tasks` was asked: the
run may come from a stranger, and importing is running.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from p2ptrain.config import OwnTask, PeerConfig
from p2ptrain.errors import ConfigError, P2PTrainError
from p2ptrain.gradients.devices import is_out_of_memory

if TYPE_CHECKING:
    from p2ptrain.tasks import Task

GROUP = "p2ptrain.tasks"
MAX_NOTE = 200
"""Characters: what a presence record has room for."""


def load_own(settings: OwnTask, seed: int, peer: PeerConfig) -> CheckedTask:
    """Call the factory that the run names, if this peer allows its package. Raises ConfigError."""
    entry = _entry(settings.factory)
    package = entry.module.partition(".")[0]
    if package not in peer.allow_tasks:
        raise ConfigError(
            f"this run wants to run code of the package {package!r} ({settings.factory}) on this machine, "
            "and p2ptrain runs none that you have not allowed; if you trust its author with everything on "
            f'this machine, install it and set allow_tasks = ["{package}"] in the peer file'
        )
    with _faults_named(settings.factory, "could not be built"):
        factory: Callable[..., Task] = entry.load()
        return CheckedTask(settings.factory, factory(dict(settings.settings), seed=seed, corpus=peer.corpus))


def _entry(factory: str) -> EntryPoint:
    """What `package.module:factory` or the name of an installed entry point stands for; nothing is loaded."""
    if ":" in factory:
        return EntryPoint(name=factory, value=factory, group=GROUP)
    found = {entry.value: entry for entry in entry_points(group=GROUP, name=factory)}
    if not found:
        known = sorted({entry.name for entry in entry_points(group=GROUP)})
        raise ConfigError(
            f"no installed package has a task {factory!r} ({', '.join(known) or 'none has any'}); install "
            "the one that the organizer of the run says"
        )
    if len(found) > 1:
        raise ConfigError(
            f"several installed packages have a task {factory!r} ({', '.join(sorted(found))}); uninstall all "
            "but one"
        )
    return next(iter(found.values()))


class CheckedTask:
    """Somebody else's task, held to the `Task` interface: what it does wrong is one sentence that names it.

    Each method raises ConfigError for that. Too little memory is no fault of the task's: to whoever asked for
    samples, for a loss or for figures it comes as it is, since fewer samples at once may do.
    """

    def __init__(self, name: str, task: Task) -> None:
        self._name, self._task = name, task
        self.note = self._noted("note", task.note)
        self.shared_note = self._noted("shared_note", task.shared_note)
        self._expect(self.note.startswith(self.shared_note), "note must begin with shared_note", (self.note,))

    def build_model(self, seed: int) -> nn.Module:
        with _faults_named(self._name, "could not build its model"):
            model = self._task.build_model(seed)
        self._expect(isinstance(model, nn.Module), "build_model must return a torch.nn.Module", model)
        return model

    def batch(self, step: int, peer: str, first: int, count: int) -> Any:
        with _faults_named(self._name, "could not give samples", at_work=True):
            return self._task.batch(step, peer, first, count)

    @property
    def size(self) -> int:
        """How many samples it has numbered; 0 if it numbers none."""
        with _faults_named(self._name, "could not say its size"):
            size = getattr(self._task, "size", 0)
        self._expect(isinstance(size, int) and size >= 0, "size must be a whole number", size)
        return size

    def samples(self, numbers: Sequence[int]) -> Any:
        with _faults_named(self._name, "could not give samples by their number", at_work=True):
            return self._task.samples(numbers)  # type: ignore[attr-defined]

    def loss_sum(self, model: nn.Module, batch: Any) -> Tensor:
        with _faults_named(self._name, "could not compute its loss", at_work=True):
            loss = self._task.loss_sum(model, batch)
        fine = (
            isinstance(loss, Tensor)
            and loss.ndim == 0
            and (loss.requires_grad or not torch.is_grad_enabled())
        )
        self._expect(
            fine, "loss_sum must return a scalar tensor that depends on the model's parameters", loss
        )
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        with _faults_named(self._name, "could not evaluate its model", at_work=True):
            figures = self._task.evaluate(model)
        fine = isinstance(figures, dict) and all(isinstance(each, float) for each in figures.values())
        self._expect(
            fine and "loss" in figures, 'evaluate must return floats by name, with a "loss"', figures
        )
        return {name: value for name, value in figures.items() if math.isfinite(value) or name == "loss"}

    def preview(
        self, model: nn.Module, prompt: str, length: int, generator: torch.Generator, temperature: float = 0.7
    ) -> str:
        with _faults_named(self._name, "could not show what its model does", at_work=True):
            text = self._task.preview(model, prompt, length, generator, temperature)
        self._expect(isinstance(text, str), "preview must return text", text)
        return text

    def _noted(self, field: str, text: str) -> str:
        fine = isinstance(text, str) and len(text) <= MAX_NOTE and "\n" not in text
        self._expect(fine, f"{field} must be one line of at most {MAX_NOTE} characters", text)
        return text

    def _expect(self, fine: bool, wanted: str, seen: object) -> None:
        if not fine:
            shown = " ".join(repr(seen).split())
            raise ConfigError(
                f"of the task {self._name}, {wanted}, but is {shown[:80]}{'…' if len(shown) > 80 else ''}; "
                "tell its author"
            )


@contextmanager
def _faults_named(name: str, what: str, *, at_work: bool = False) -> Iterator[None]:
    """Its own P2PTrainErrors pass; anything else becomes one, with where it came from, for its author.
    `at_work`: too little memory passes as well; the engine has an answer to it."""
    try:
        yield
    except P2PTrainError:
        raise
    except Exception as error:  # of somebody else's code: the boundary that turns it into a sentence
        if at_work and is_out_of_memory(error):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"the task {name} {what}: {type(error).__name__}: {' '.join(str(error).split())[:200]} "
            f"({frame.filename}, line {frame.lineno}); correct task.settings, or tell its author"
        ) from error
