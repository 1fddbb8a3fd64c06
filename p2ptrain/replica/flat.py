"""A model whose parameters are one vector, and whose gradients are another.

All trained parameters lie in one flat float32 vector and all gradients in another, of which the model's own
tensors are views; so the optimizer, the codecs and the digest see one vector, and `backward` writes straight
into what is sent. The parameters live on the CPU and are stepped there, whatever device computes: a model
that was moved to another, or that trains apart, has a copy of them, which follows at each step (ADR 25).

Not covered: models with persistent buffers (such as batch-norm statistics), which would be state that no
gradient carries, and other dtypes than float32.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from p2ptrain.errors import LocalFault

ParameterTable = list[tuple[str, tuple[int, ...], str]]

SECOND_FACTOR = ".lora_B."
"""In the names of adapters' second factors, which lie behind all first ones in the flat vector."""


def parameter_table(model: nn.Module) -> ParameterTable:
    """(name, shape, dtype) of each trained parameter, a tied one once, in the order the fingerprint binds."""
    return [
        (name, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
        for name, parameter in _trained(model)
    ]


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return sorted(named, key=lambda each: SECOND_FACTOR in each[0])


class FlatModel:
    """The model that was taken over, its vectors, and where in them everything lies."""

    def __init__(self, model: nn.Module, payload: str) -> None:
        """Raises LocalFault if the model cannot be trained so."""
        _check_trainable(model, payload)
        named = _trained(model)
        sizes = [parameter.numel() for _, parameter in named]
        bounds = [0, *accumulate(sizes)]

        self.model = model
        self.numel = bounds[-1]
        self.gradient = torch.zeros(self.numel)
        """float32 [numel], where the model is. `backward` adds to it; clear it with `zero_()`: `zero_grad()`
        would detach it. A step may overwrite it."""
        self.parameters = torch.empty(self.numel)
        """float32 [numel]."""
        self.copy: Tensor | None = None
        """The parameters that the model has, where they are not those above."""
        self.views: dict[str, Tensor] = {}
        """Name → its place in `parameters`."""
        self.tensors = list(pairwise(bounds))
        """The range [start, stop) of each."""
        self.decayed: list[tuple[int, int]] = []
        """Of those under weight decay."""
        for (name, parameter), (start, stop) in zip(named, self.tensors, strict=True):
            view = self.parameters[start:stop].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = self.views[name] = view
            parameter.grad = self.gradient[start:stop].view(parameter.shape)
            # Matrices only: decay would pull gains and biases to zero and gain nothing.
            if parameter.ndim >= 2:
                self.decayed.append((start, stop))
        first = sum(size for (name, _), size in zip(named, sizes, strict=True) if SECOND_FACTOR not in name)
        self.factors = {"b": (first, self.numel), "a": (0, first)}
        """Of adapters: where the second and the first factors are."""

    def move(self, device: torch.device) -> None:
        """From now on the model is on that device, with copies of the parameters; and so is `gradient`."""
        parameters = [parameter for _, parameter in _trained(self.model)]
        self.model.to(device)  # what is not trained, too
        self.gradient = torch.zeros(self.numel, device=device)
        self._copy_to(device, parameters)

    def apart(self) -> Tensor:
        """From now on the model has parameters of its own (float32 [numel], on its device), which `follow`
        resets."""
        if self.copy is not None:
            return self.copy
        return self._copy_to(self.parameters.device, [parameter for _, parameter in _trained(self.model)])

    def follow(self) -> None:
        """The parameters have changed: so have the model's."""
        if self.copy is not None:
            self.copy.copy_(self.parameters)

    def _copy_to(self, device: torch.device, parameters: list[nn.Parameter]) -> Tensor:
        copy = self.copy = self.parameters.to(device, copy=True)
        for parameter, (start, stop) in zip(parameters, self.tensors, strict=True):
            parameter.data = copy[start:stop].view(parameter.shape)
            parameter.grad = self.gradient[start:stop].view(parameter.shape)
        return copy


def _check_trainable(model: nn.Module, payload: str) -> None:
    kind = type(model).__name__
    parameters = dict(model.named_parameters() if payload == "full" else _trained(model))
    if not parameters:
        raise LocalFault(f"{kind} has no parameters to train")
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise LocalFault(
                f"parameter {name} of {kind} must be float32 on the cpu, "
                f"not {parameter.dtype} on {parameter.device}"
            )
        if not parameter.requires_grad:
            raise LocalFault(f"parameter {name} of {kind} is frozen, but payload 'full' trains all of them")
    state = model.state_dict(keep_vars=True)
    if buffers := [name for name, tensor in state.items() if not isinstance(tensor, nn.Parameter)]:
        raise LocalFault(
            f"{kind} keeps state in buffers ({', '.join(buffers[:5])}), which no gradient carries; use "
            "layers without running statistics, and register_buffer(…, persistent=False) for constants"
        )
