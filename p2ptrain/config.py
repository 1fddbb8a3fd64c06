"""The run file (`RunConfig`: shared by every peer, hashed) and the peer file (`PeerConfig`: local, free to choose).

Whatever changes the result of training is in the run; whatever only changes how this machine takes part is in the
peer file. Both are data, never code.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class BytesTask(Section):
    """A byte-level transformer language model on plain text."""

    kind: Literal["bytes"] = "bytes"
    layers: Annotated[int, Field(ge=1, le=64)] = 4
    width: Annotated[int, Field(ge=8, le=4096)] = 128
    heads: Annotated[int, Field(ge=1, le=64)] = 4
    context: Annotated[int, Field(ge=8, le=8192)] = 128
    corpus: Annotated[str, Field(min_length=1, max_length=300)] = "stdlib"
    holdout: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    exact: bool = False


class Optimizer(Section):
    kind: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0, le=10)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    clip_norm: Annotated[float, Field(ge=0)] = 1.0


class Schedule(Section):
    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1


class RunConfig(Section):
    run_id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")] = "python-stdlib"
    strategy: Literal["sync"] = "sync"
    payload: Literal["full"] = "full"
    total_steps: Annotated[int, Field(ge=1, le=10**9)] = 10_000
    target_batch_size: Annotated[int, Field(ge=1, le=2**24)] = 16
    min_peers: Annotated[int, Field(ge=1, le=256)] = 1
    max_peers: Annotated[int, Field(ge=1, le=256)] = 64
    codec: Literal["fp32", "fp16"] = "fp16"
    chunk_values: Annotated[int, Field(ge=1024, le=4 * 2**20)] = 65_536
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    heartbeat_seconds: Annotated[float, Field(gt=0, le=60)] = 1.0
    silence_seconds: Annotated[float, Field(gt=0, le=600)] = 5.0
    task: BytesTask = BytesTask()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()


class PeerConfig(Section):
    name: Annotated[str, Field(max_length=64)] = ""
    data_dir: str = ""
    micro_batch_size: Annotated[int, Field(ge=1, le=65_536)] = 8
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    device: Literal["cpu"] = "cpu"
    corpus: str = ""
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce: tuple[str, ...] = ()
    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    checkpoint_every_steps: Annotated[int, Field(ge=0)] = 200
    checkpoints_kept: Annotated[int, Field(ge=1, le=1000)] = 3
    log_megabytes: Annotated[int, Field(ge=1, le=100_000)] = 256
    eval_every_steps: Annotated[int, Field(ge=0)] = 50
