"""What is trained: the `Task` interface, and the built-in tasks. `README.md` here says how to add one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, assert_never, runtime_checkable

import torch
from torch import Tensor, nn

from p2ptrain import config
from p2ptrain.config import PeerConfig, RunConfig, check_names
from p2ptrain.tasks.bytes import BytesTask
from p2ptrain.tasks.causal_lm import CausalLmTask
from p2ptrain.tasks.digits import DigitsTask
from p2ptrain.tasks.lora import add_adapters, base_digest
from p2ptrain.tasks.own import load_own


class Task(Protocol):
    """Model, data and loss of a run. Built from the run file alone, so it is the same on every peer.

    Which sample is which is a pure function: of (run seed, step, peer, number) where they are drawn, of its
    number where they are leased. A task keeps no place in its data: that is in the replicated state.
    """

    @property
    def note(self) -> str:
        """One line about this peer's data for its presence record, such as the corpus digest: at most 200
        characters."""
        ...

    @property
    def shared_note(self) -> str:
        """How every other peer's note must begin, too, or this one does not train with them; may be empty."""
        ...

    def build_model(self, seed: int) -> nn.Module:
        """A freshly initialised model, float32 on the CPU."""
        ...

    def batch(self, step: int, peer: str, first: int, count: int) -> Any:
        """Samples `first … first + count - 1` that `peer` draws for global step `step`, on the CPU."""
        ...

    def loss_sum(self, model: nn.Module, batch: Any) -> Tensor:
        """Scalar, float32 or under autocast what comes out: Σ over the batch's samples of each sample's loss
        (never the mean). The batch is brought to the model's device here, see `placing.device_of`."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out figures; `loss` (nats) is always there."""
        ...

    def preview(
        self, model: nn.Module, prompt: str, length: int, generator: torch.Generator, temperature: float = 0.7
    ) -> str:
        """A short text that shows what the model has learned: for a language model the prompt and how it goes
        on. At temperature 0 it takes the likeliest each time."""
        ...


@runtime_checkable
class Numbered(Protocol):
    """A task whose data has an end, so that each of its samples can be leased (`data = "leased"`)."""

    @property
    def size(self) -> int:
        """How many samples there are."""
        ...

    def samples(self, numbers: Sequence[int]) -> Any:
        """A batch of the samples of these numbers, each below `size`; the same on every peer."""
        ...


NOTHING_SAID = PeerConfig()


def build_model(task: Task, run: RunConfig) -> tuple[nn.Module, str]:
    """The model that this run trains, and with payload `lora` the digest of what its adapters are for: of all
    that is frozen in it. Raises ConfigError if it has no layer to adapt."""
    model = task.build_model(run.seed)
    if run.payload == "full":
        return model, ""
    digest = base_digest(model)
    add_adapters(model, run.lora, run.seed)
    return model, digest


def build_task(run: RunConfig, peer: PeerConfig = NOTHING_SAID, *, with_data: bool = True) -> Task:
    """The task of a run, with what this peer file says about data.

    Without data it can build and preview its model, and no more.

    Names in a run are never opened as paths: the run may come from a stranger, and a trained model can repeat
    what it has read. Raises ConfigError if the peer file does not say where such a thing is, or a package is
    missing, and CorpusError if the data is missing, empty or too small.
    """
    if not with_data:
        peer = peer.model_copy(update={"corpus": peer.corpus or "stdlib"})
    check_names(run, peer)
    match run.task:
        case config.BytesTask() as settings:
            return BytesTask(settings, run.seed, peer.corpus or "stdlib")
        case config.CausalLmTask() as settings:
            return CausalLmTask(settings, run.seed, peer, with_data=with_data)
        case config.OwnTask() as settings:
            return load_own(settings, run.seed, peer)
        case config.DigitsTask() as settings:
            return DigitsTask(settings, run.seed)
        case _:
            assert_never(run.task)
