"""Experiment trackers: what each committed step and each look at held-out data gave, for trackio, Weights &
Biases or TensorBoard, by one narrow adapter.

A tracker only listens. One that fails while training goes on is told of once and then left out. None is
imported unless the peer file asks for it; accounts and servers are their own business.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from p2ptrain.config import RunConfig
from p2ptrain.errors import ConfigError
from p2ptrain.events import Evaluated, Event, RoundCommitted

logger = logging.getLogger(__name__)

PROJECT = "p2ptrain"


class Tracker(Protocol):
    """Where figures go: a `Run` of trackio or wandb is one as it comes."""

    def log(self, figures: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


def figures_of(event: Event) -> tuple[int, dict[str, float]] | None:
    """The step and the figures that a tracker gets for this event; None if it is none of its business.

    An event's `step` counts what was committed before it, as those of all peers do.
    """
    match event:
        case RoundCommitted():
            figures: dict[str, float | None] = {
                "train/loss": event.loss,
                "train/gradient_norm": event.gradient_norm,
                "train/learning_rate": event.learning_rate,
                "swarm/samples": event.samples,
                "swarm/peers": event.peers,
                "swarm/noise_scale": event.noise_scale,
                "peer/samples": event.mine,
                "seconds/compute": event.compute_seconds,
                "seconds/accumulate": event.accumulate_seconds,
                "seconds/round": event.seconds,
            }
        case Evaluated():
            figures = {
                "heldout/loss": event.loss,
                "heldout/bits_per_byte": event.bits_per_byte,
                "heldout/accuracy": event.accuracy,
            }
        case _:
            return None
    return event.step, {name: float(value) for name, value in figures.items() if value is not None}


class Tracking:
    """Hands a tracker what happens. A context manager."""

    def __init__(self, tracker: Tracker | None) -> None:
        self._tracker = tracker

    def observe(self, event: Event) -> None:
        found = figures_of(event)
        if self._tracker is None or found is None:
            return
        step, figures = found
        try:
            self._tracker.log(figures, step=step)
        except Exception as error:  # of a library beside training: it must not end what it only watches
            self._tracker = None
            logger.warning("the tracker failed (%s: %s) and gets no more", type(error).__name__, error)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracker is not None:
            try:
                self._tracker.finish()
            except Exception as error:  # as above
                logger.warning("the tracker failed at the end (%s: %s)", type(error).__name__, error)


def open_tracker(kind: str, run: RunConfig, peer: str, folder: Path) -> Tracker | None:
    """The tracker that the peer file asks for, None for `none`; what it keeps itself is in `folder`.

    Blocks while the tracker starts, which may need the network. Raises ConfigError if its package is missing
    or it does not start.
    """
    name, about = f"{run.run_id}-{peer}", run.model_dump(mode="json")
    try:
        match kind:
            case "trackio":
                import trackio

                opened: Tracker = trackio.init(project=PROJECT, name=name, config=about, resume="allow")
                return opened
            case "wandb":
                import wandb

                folder.mkdir(parents=True, exist_ok=True)
                opened = wandb.init(
                    project=PROJECT, name=name, id=name[-64:], config=about, dir=str(folder), resume="allow"
                )
                return opened
            case "tensorboard":
                return TensorBoard(folder / "tensorboard", about)
            case _:
                return None
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the tracker {kind!r} of the peer file needs the package {error.name}, which is not installed; "
            f'run pip install "p2ptrain[{kind}]", or set tracker to "none"'
        ) from error
    except Exception as error:  # of a library, its server or its account
        raise ConfigError(
            f"the tracker {kind!r} does not start ({type(error).__name__}: {str(error).splitlines()[:1]}); "
            'see its own documentation, or set tracker to "none" in the peer file'
        ) from error


class TensorBoard:
    """TensorBoard's event files, by torch's own writer."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))
        self._writer.add_text("run", "\n".join(f"    {key}: {value}" for key, value in about.items()))

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()
