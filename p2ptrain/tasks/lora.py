"""Low-rank adapters in place of a whole model: what a run with `payload = "lora"` trains (Hu et al. 2021).

A linear layer's W stays as it is and is used as W + s·B·A, with A [rank, in] and B [out, rank]; only these
two are trained, averaged and kept. Their gradients average linearly over samples, so synchronous training of
adapters is exact, where averaging adapters that were trained apart is not. PEFT puts them in.

What stays as it is, the base, is the same on all peers or nothing they compute fits together: its digest is
part of the run's fingerprint.

Not covered: PEFT's other methods, and adapters for embeddings, convolutions and biases.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import nn

from p2ptrain import config
from p2ptrain.errors import ConfigError
from p2ptrain.tasks.extras import needs

SHOWN = 12
"""Names of layers that an error lists at most."""


def base_digest(model: nn.Module) -> str:
    """Hex SHA-256 over name, shape and bytes of each parameter, in order of names, a tied one once."""
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sha.update(json.dumps([name, list(parameter.shape), str(parameter.dtype)]).encode() + b"\n")
        sha.update(parameter.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def add_adapters(model: nn.Module, settings: config.Lora, seed: int) -> None:
    """Put adapters into the model and freeze all else. A is drawn by `seed`, B is zero: nothing changes yet.

    Raises ConfigError if PEFT is missing, or a layer that the settings name is not there.
    """
    with needs("hf"):
        from peft import LoraConfig, inject_adapter_in_model

    form = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rank_stabilized,
        target_modules=chosen_layers(model, settings.target_modules),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # That it stores GPT-2's weights transposed, which it finds out by itself.
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
        torch.manual_seed(seed)
        inject_adapter_in_model(form, model)


def chosen_layers(model: nn.Module, wanted: Iterable[str]) -> list[str]:
    """Full names of the linear layers whose names end with one of the wanted, or of all but the head.

    Raises ConfigError if one of the wanted is none.
    """
    ask_head: Callable[[], object] | None = getattr(model, "get_output_embeddings", None)
    head = None if ask_head is None else ask_head()
    linear = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not head
    ]
    if not linear:
        raise ConfigError(f'{type(model).__name__} has no linear layer to adapt; set payload to "full"')
    wanted = list(wanted)
    for each in wanted:
        if not any(_ends_with(name, each) for name in linear):
            last = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f'lora.target_modules names "{each}", but {type(model).__name__} has no linear layer of that '
                f"name; it has {', '.join(last[:SHOWN])}"
            )
    return [name for name in linear if not wanted or any(_ends_with(name, each) for each in wanted)]


def _ends_with(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")
