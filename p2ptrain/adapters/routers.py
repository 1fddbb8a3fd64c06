"""A router's folder: `router.safetensors`, and `router.json` with what it chooses among and how well."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file, save_file

from p2ptrain.adapters.files import file_digest, opened, read_json, write_json, writing
from p2ptrain.adapters.route import Router
from p2ptrain.errors import AdapterError
from p2ptrain.replica.adapter_files import ADAPTER

ROUTER, NOTE = "router.safetensors", "router.json"


class Choice(BaseModel):
    """One adapter among which a router chooses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    path: str
    digest: str
    """SHA-256 of its `adapter_model.safetensors`."""


class RouterNote(BaseModel):
    """The content of `router.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    """Path of the base's folder."""
    adapters: tuple[Choice, ...] = Field(min_length=1)
    """Choices 1, 2, …; choice 0 is the base alone."""
    feature: Literal["means over the prefix of the base's embeddings, middle and last hidden states"] = (
        "means over the prefix of the base's embeddings, middle and last hidden states"
    )
    prefix: int = Field(ge=2)
    """Tokens that are looked at."""
    threshold: float = Field(ge=0, le=1)
    domains: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    """On texts that it was not trained on: [best choice][its choice], how many."""
    table: dict[str, dict[str, float]]
    """On the same: way of choosing → domain → loss after the prefix, nats per token."""


def save_router(folder: Path, router: Router, note: RouterNote) -> None:
    """Write it. Raises StorageError if `folder` is there already or cannot be written."""
    with writing(folder):
        tensors = {name: getattr(router, name).contiguous() for name in ("weight", "bias", "center", "scale")}
        save_file(tensors, folder / ROUTER)
        write_json(folder / NOTE, note.model_dump(mode="json"))


def load_router(folder: Path) -> tuple[Router, RouterNote]:
    """Read it. Raises AdapterError if it is damaged, or its adapters are not those it was trained with."""
    try:
        note = RouterNote.model_validate(read_json(folder / NOTE, folder))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise AdapterError(f"{folder / NOTE}: {where}: {first['msg']}; train the router again") from None
    with opened(folder / ROUTER, folder):
        tensors: dict[str, Any] = load_file(folder / ROUTER)
    choices = len(note.adapters) + 1
    weight = tensors.get("weight")
    width = weight.shape[1] if weight is not None and weight.ndim == 2 else 0
    shapes = {"weight": (choices, width), "bias": (choices,), "center": (width,), "scale": (width,)}
    if {name: tuple(each.shape) for name, each in tensors.items()} != shapes:
        raise AdapterError(f"{folder / ROUTER} is not of {choices} choices, as its note says; train it again")
    for choice in note.adapters:
        file = Path(choice.path) / ADAPTER
        if not file.is_file() or file_digest(file) != choice.digest:
            raise AdapterError(
                f"{choice.path} is not the adapter {choice.name!r} that {folder} was trained with; put "
                "that one back, or train the router again"
            )
    return Router(**tensors, threshold=note.threshold), note
