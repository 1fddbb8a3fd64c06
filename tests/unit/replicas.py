"""Small replicas and the entries to move them, for the tests of `p2ptrain.replica`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from p2ptrain.config import Optimizer, RunConfig
from p2ptrain.gradients.aggregation import squared_norm
from p2ptrain.gradients.codecs import codec_named
from p2ptrain.records import Ballot, EntryHeader, PeerId, Position
from p2ptrain.replica.log import Entry, entry_digest, entry_ranges
from p2ptrain.replica.replica import Replica

FINGERPRINT = "f" * 64


def small_run(**fields: Any) -> RunConfig:
    return RunConfig(**{"chunk_values": 1024, "optimizer": Optimizer(lr=0.01)} | fields)


def small_model(seed: int = 0) -> nn.Module:
    """2,949 parameters: a few chunks of 1,024, the last one short."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 12), nn.Linear(12, 4), nn.Linear(4, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def small_replica(run: RunConfig | None = None, seed: int = 0) -> Replica:
    return Replica(small_model(seed), run or small_run(), FINGERPRINT)


def entry_at(position: Position, run: RunConfig, mean: Tensor, spans: tuple[int, ...] | None = None) -> Entry:
    """The entry that a roster of `len(spans) - 1` peers with 8 samples each commits at `position`."""
    spans = spans or (0, len(mean) // 3, len(mean))
    codec = codec_named(run.codec)
    chunks = [codec.encode(mean[a:b]) for a, b in entry_ranges(spans, len(mean), run.chunk_values)]
    members = range(len(spans) - 1)
    header = EntryHeader(
        step=position.step,
        parent=position.lineage,
        ballot=Ballot(number=0, leader=PeerId("p0")),
        roster=tuple(PeerId(f"p{i}") for i in members),
        samples=tuple(8 for _ in members),
        spans=spans,
        squared_norms=tuple(squared_norm(mean[spans[i] : spans[i + 1]]) for i in members),
        digest=entry_digest(chunks),
    )
    return Entry(header, b"".join(chunks))


def next_entry(replica: Replica, seed: int = 0) -> Entry:
    """An entry with a random mean that follows where the replica stands."""
    generator = torch.Generator().manual_seed(1000 * seed + replica.position.step)
    return entry_at(replica.position, replica.run, torch.randn(replica.numel, generator=generator))


def unmeasured(step: int) -> float:
    """A loss on the probe, for those who ask for none."""
    return 0.0
