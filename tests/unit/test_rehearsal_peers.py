"""Peers of a rehearsal are as the peer file says, but for what two on one machine cannot share."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2ptrain.config import BytesTask, CausalLmTask, Limits, OwnTask, PeerConfig, RunConfig
from p2ptrain.errors import ConfigError
from peers.rehearsal import peer_config

RUN = RunConfig(target_batch_size=32)


def test_peers_of_a_rehearsal_are_all_alike_when_nothing_is_said() -> None:
    config = peer_config(RUN, 3, PeerConfig())
    assert (config.micro_batch_size, config.device, config.limits.on_battery) == (8, "cpu", "train")
    assert peer_config(RUN, 8, PeerConfig()).micro_batch_size == 4


def test_peer_file_counts_but_for_what_peers_cannot_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = PeerConfig(
        name="me",
        data_dir="mine",
        listen=("/ip4/0.0.0.0/tcp/31337",),
        data_port=4,
        metrics_port=5,
        micro_batch_size=2,
        threads=3,
        model="base",
        corpus="stdlib",
        allow_tasks=("toys",),
        limits=Limits(upload_mbit=5),
    )
    config = peer_config(RUN, 3, own)
    assert not config.model_fields_set & {"name", "data_dir", "listen", "data_port", "metrics_port"}
    assert (config.micro_batch_size, config.threads, config.allow_tasks) == (2, 3, ("toys",))
    assert (config.model, config.corpus) == (str(tmp_path / "base"), "stdlib")
    assert (config.limits.upload_mbit, config.limits.on_battery) == (5, "train")


def test_what_the_run_only_names_is_asked_for_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="trains on the text 'poems'; say with --corpus"):
        peer_config(RunConfig(task=BytesTask(corpus="poems")), 2, PeerConfig())
    named = RunConfig(task=CausalLmTask(model="theirs"))
    with pytest.raises(ConfigError, match=r"wants the model .*; set model in the peer file"):
        peer_config(named, 2, PeerConfig(corpus="stdlib"))
    assert peer_config(RunConfig(task=OwnTask()), 2, PeerConfig()).allow_tasks == ()
