"""A checkpoint's adapters as the two files that PEFT loads, and a note of what PEFT does not write down.

`adapter_model.safetensors` has `base_model.model.<module>.lora_A.weight` [rank, in] and `…lora_B.weight`
[out, rank]; `adapter_config.json` says what to put where; `p2ptrain.json` of which base, by its digest, since
PEFT notes a name and no more. `p2ptrain adapters` reads all three.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors.torch import save as save_safetensors
from torch import Tensor

from p2ptrain.config import RunConfig, run_digest
from p2ptrain.records import Count, Digest, Position

ADAPTER, ADAPTER_CONFIG, NOTE = "adapter_model.safetensors", "adapter_config.json", "p2ptrain.json"
PREFIX = "base_model.model."
INNER = ".default."
"""PEFT's name for the adapter that is trained, between `lora_A` and `weight`; it is no part of its files."""


class Note(BaseModel):
    """The content of `p2ptrain.json`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    base_digest: Digest
    """Of the model that the adapters are for."""
    base: str
    """What the run calls it."""
    run_id: str
    run_digest: Digest
    step: Count
    lineage: Digest
    samples: Count


def adapter_files(
    parameters: Mapping[str, Tensor], run: RunConfig, base_digest: str, position: Position
) -> dict[str, bytes]:
    """Name → content of the three files, for adapters under the names that they have in the model."""
    base, revision = getattr(run.task, "model", None), getattr(run.task, "model_revision", None)
    tensors = {PREFIX + name.replace(INNER, ".", 1): tensor for name, tensor in parameters.items()}
    note = Note(
        base_digest=base_digest,
        base=base or run.task.kind,
        run_id=run.run_id,
        run_digest=run_digest(run),
        step=position.step,
        lineage=position.lineage,
        samples=position.weight,
    )
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if run.task.kind == "causal_lm" else None,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": run.lora.rank,
        "lora_alpha": run.lora.alpha,
        "lora_dropout": run.lora.dropout,
        "use_rslora": run.lora.rank_stabilized,
        "target_modules": sorted({name.partition(".lora_")[0] for name in parameters}),
        "bias": "none",
        "inference_mode": True,
    }
    return {
        ADAPTER: save_safetensors(dict(tensors), {"format": "pt"}),
        ADAPTER_CONFIG: json.dumps(settings, indent=2).encode(),
        NOTE: note.model_dump_json(indent=2).encode(),
    }
