"""Checkpoints: whole or not there, verified to the byte, and comparable."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from replicas import FINGERPRINT, entry_at, next_entry, small_model, small_replica, small_run
from safetensors.torch import load_file

from p2ptrain.config import Optimizer
from p2ptrain.errors import CheckpointError, IncompatibleRun, StorageError
from p2ptrain.replica import checkpoint
from p2ptrain.replica.checkpoint import compare, discard_after, latest, load, restore, save
from p2ptrain.replica.replica import Replica

FILES = ["lineages.bin", "manifest.json", "model.safetensors", "run.json", "state.safetensors"]


def saved(directory: Path, replica: Replica, keep: int = 10) -> Path:
    return save(
        directory, replica.snapshot(), replica.run, {"samples": 40, "note": "five"}, keep=keep, lineages=b"12"
    )


def advanced(replica: Replica, steps: int, seed: int = 0) -> Replica:
    for _ in range(steps):
        replica.apply(next_entry(replica, seed))
    return replica


# -- save and load -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_replica_goes_on_with_the_same_bits_when_restored(tmp_path: Path, kind: str, steps: int) -> None:
    run = small_run(optimizer=Optimizer(kind=kind))
    replica = advanced(small_replica(run), steps)
    path = saved(tmp_path / "not" / "there yet", replica)
    restored = small_replica(run, seed=99)
    restore(restored, load(path))
    assert (restored.position, restored.last) == (replica.position, replica.last)
    entry = next_entry(replica)
    replica.apply(entry)
    restored.apply(entry)
    assert restored.compute_state_digest() == replica.compute_state_digest()


def test_checkpoint_gives_back_what_was_put_in_when_loaded(tmp_path: Path) -> None:
    replica = advanced(small_replica(), 3)
    path = saved(tmp_path, replica)
    assert path == tmp_path / "step-00000003"
    assert sorted(os.listdir(path)) == FILES
    assert os.listdir(tmp_path) == [path.name]
    loaded = load(path)
    assert loaded.lineages == b"12"
    assert loaded.snapshot == replica.snapshot()
    assert loaded.run == replica.run
    assert loaded.extra == {"samples": 40, "note": "five"}
    assert loaded.versions["torch"] == torch.__version__


def test_model_file_loads_into_a_plain_model_when_used_elsewhere(tmp_path: Path) -> None:
    replica = advanced(small_replica(), 3)
    model = small_model(seed=99)
    model.load_state_dict(load_file(saved(tmp_path, replica) / "model.safetensors"))
    assert torch.equal(model(torch.ones(1, 32)), replica.model(torch.ones(1, 32)))


def test_save_refuses_extra_when_it_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save(tmp_path, small_replica().snapshot(), small_run(), {"loss": object()}, keep=1, lineages=b"")
    assert os.listdir(tmp_path) == []


def test_load_gives_none_for_a_figure_when_training_had_diverged(tmp_path: Path) -> None:
    extra = {"heldout": {"loss": float("nan"), "bits": float("inf"), "seen": 3.5}, "pair": (1, 2)}
    path = save(tmp_path, small_replica().snapshot(), small_run(), extra, keep=1, lineages=b"")
    assert load(path).extra == {"heldout": {"loss": None, "bits": None, "seen": 3.5}, "pair": [1, 2]}


# -- damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0, 0.5, 0.999])
def test_load_names_the_file_when_a_byte_was_changed(tmp_path: Path, name: str, where: float) -> None:
    path = saved(tmp_path, advanced(small_replica(), 2))
    content = bytearray((path / name).read_bytes())
    content[int(where * len(content))] ^= 0x11
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} is not part of .*delete its step folder"):
        load(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "longer"])
def test_latest_passes_a_checkpoint_over_when_a_file_is_not_whole(
    tmp_path: Path, name: str, damage: str
) -> None:
    replica = advanced(small_replica(), 1)
    older = saved(tmp_path, replica)
    newer = saved(tmp_path, advanced(replica, 1))
    assert latest(tmp_path) == newer
    file = newer / name
    content = file.read_bytes()
    match damage:
        case "missing":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "cut short":
            file.write_bytes(content[:-1])
        case "longer":
            file.write_bytes(content + b"x")
    assert latest(tmp_path) == older
    with pytest.raises(CheckpointError, match=name):
        load(newer)
    load(older)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m["position"].update(weight=10**9), "expected digest"),
        (lambda m: m["files"].pop("run.json"), "lists files"),
        (lambda m: m.update(format="p2ptrain-checkpoint-3"), "1 of its fields"),
        (lambda m: m.update(surprise=1), "1 of its fields"),
        (lambda m: m["extra"].update(samples=41), "expected digest"),
    ],
)
def test_load_refuses_a_manifest_when_it_was_edited(tmp_path: Path, change, complaint: str) -> None:
    path = saved(tmp_path, advanced(small_replica(), 1))
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"manifest.json.*{complaint}"):
        load(path)
    assert latest(tmp_path) is None


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "more.bin"])
def test_load_opens_no_other_file_when_a_manifest_names_one(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, small_replica())
    manifest = checkpoint.CheckpointManifest.model_validate_json((path / "manifest.json").read_bytes())
    files = {**manifest.files, name: manifest.files["run.json"]}
    resealed = manifest.model_copy(update={"files": files})
    resealed = resealed.model_copy(update={"digest": resealed.own_digest()})
    (path / "manifest.json").write_text(resealed.model_dump_json())
    with pytest.raises(CheckpointError, match=r"manifest.json .*lists files"):
        load(path)


def test_load_raises_when_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        load(tmp_path / "step-00000001")


def test_latest_is_none_when_there_is_nothing_that_counts(tmp_path: Path) -> None:
    assert latest(tmp_path / "not there") is None
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-00000002").write_text("a file")
    assert latest(tmp_path) is None


def test_restore_names_the_difference_when_the_checkpoint_is_of_another_run(tmp_path: Path) -> None:
    loaded = load(saved(tmp_path, small_replica()))
    other = small_replica(small_run(seed=5))
    with pytest.raises(IncompatibleRun, match=r"another run .*seed"):
        restore(other, loaded)


def test_restore_changes_nothing_when_the_model_is_another(tmp_path: Path) -> None:
    loaded = load(saved(tmp_path, advanced(small_replica(), 1)))
    other = Replica(torch.nn.Linear(2, 2), small_run(), FINGERPRINT)
    before = other.position
    with pytest.raises(CheckpointError, match="does not fit this run's model"):
        restore(other, loaded)
    assert other.position == before


# -- a disk that fails, a process that dies ------------------------------------------------------------------


def test_save_raises_storage_error_when_the_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=rf"to {tmp_path}/file/checkpoints: .*data_dir"):
        saved(tmp_path / "file" / "checkpoints", small_replica())


def test_save_leaves_earlier_checkpoints_intact_when_the_disk_is_full(tmp_path: Path) -> None:
    replica = advanced(small_replica(), 2)
    earlier = saved(tmp_path, replica)
    replica.apply(next_entry(replica))
    # A bound on the size of files stands in for the full disk: writes fail in the same place and way.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(StorageError, match=rf"cannot write a checkpoint of 0.1 MB to {tmp_path}"):
            saved(tmp_path, replica)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == [earlier.name]
    load(earlier)


class Died(BaseException):
    """Stands for a kill: nothing may catch it and clean up."""


@pytest.mark.parametrize("moment", range(1, 9))
def test_some_whole_checkpoint_remains_when_the_process_dies_at_any_moment(
    tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = advanced(small_replica(), 1)
    saved(tmp_path, replica)
    newest = saved(tmp_path, advanced(replica, 1))

    calls = 0

    def dies(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            raise Died

    # Every change on the disk is followed or preceded by one of these.
    real_flush, real_rename, real_write = checkpoint._flush, Path.rename, checkpoint._write
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", lambda *a: (dies(), real_write(*a)))
        patch.setattr(checkpoint, "_flush", lambda *a: (dies(), real_flush(*a)))
        patch.setattr(Path, "rename", lambda *a: (dies(), real_rename(*a)))
        with pytest.raises(Died):
            saved(tmp_path, advanced(replica, 1), keep=1)
    found = latest(tmp_path)
    assert found is not None
    load(found)
    assert found in (newest, tmp_path / "step-00000003")

    assert saved(tmp_path, replica, keep=2) == tmp_path / "step-00000003"
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000003"]  # and no leftovers


# -- which ones are kept -------------------------------------------------------------------------------------


def test_save_keeps_only_the_newest_when_there_are_more(tmp_path: Path) -> None:
    replica = small_replica()
    for _ in range(5):
        saved(tmp_path, advanced(replica, 1), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000004", "step-00000005"]


def test_latest_is_the_heavier_lineage_when_a_rollback_left_higher_steps(tmp_path: Path) -> None:
    abandoned = advanced(small_replica(), 5)
    saved(tmp_path, abandoned)
    heavier = small_replica()
    while heavier.position.weight <= abandoned.position.weight:
        mean = torch.ones(heavier.numel)
        heavier.apply(entry_at(heavier.position, heavier.run, mean, spans=(0, 9, 99, 999, heavier.numel)))
    assert heavier.position.step < abandoned.position.step
    assert latest(saved(tmp_path, heavier, keep=1).parent) == tmp_path / f"step-{heavier.position.step:08d}"
    assert len(os.listdir(tmp_path)) == 1


def test_save_replaces_a_checkpoint_when_the_step_comes_again_in_another_lineage(tmp_path: Path) -> None:
    saved(tmp_path, advanced(small_replica(), 2, seed=1))
    other = advanced(small_replica(), 2, seed=2)
    path = saved(tmp_path, other)
    assert load(path).snapshot == other.snapshot()
    assert os.listdir(tmp_path) == [path.name]


def test_save_touches_nothing_else_when_strangers_live_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-1").mkdir()
    saved(tmp_path, small_replica(), keep=1)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "step-00000000", "step-1"]


# -- compare -------------------------------------------------------------------------------------------------


def test_compare_finds_two_peers_equal_when_they_applied_the_same_entries(tmp_path: Path) -> None:
    one, other = (saved(tmp_path / name, advanced(small_replica(), 3)) for name in "ab")
    comparison = compare(one, other)
    assert comparison.equal
    assert comparison.difference is None
    assert comparison.a == comparison.b


def test_compare_names_the_step_when_one_peer_is_further(tmp_path: Path) -> None:
    replica = advanced(small_replica(), 1)
    one, other = saved(tmp_path, replica), saved(tmp_path, advanced(replica, 1))
    comparison = compare(one, other)
    assert not comparison.equal
    assert str(comparison.difference) == "step: 1 in the first, 2 in the second"


def test_compare_names_the_lineage_when_two_peers_trained_apart(tmp_path: Path) -> None:
    one, other = (saved(tmp_path / str(seed), advanced(small_replica(), 2, seed)) for seed in (1, 2))
    difference = compare(one, other).difference
    assert difference is not None
    assert difference.where == "lineage"


def with_state(replica: Replica, change) -> Replica:
    """The replica with its tensors or scalars changed in place, at the same position."""
    change(replica)
    replica.state_digest = None
    return replica


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda r: r.parameters[70:72].fill_(0.0),
            "model.0.weight[70]: {} in the first, 0.0 in the second",
        ),
        (
            lambda r: r.strategy.optimizer.state_tensors()["mean"][5].fill_(2.5),
            "optimizer.mean[5]: {} in",
        ),
        (
            lambda r: setattr(r.strategy.optimizer, "_beta1_power", 0.5),
            "beta1_power: 0.81 in the first, 0.5 in",
        ),
    ],
)
def test_compare_names_the_first_value_when_states_at_one_position_differ(
    tmp_path: Path, change, expected: str
) -> None:
    healthy = advanced(small_replica(), 2)
    sick = with_state(advanced(small_replica(), 2), change)
    values = {
        "model": healthy.parameters[70].item(),
        "optim": healthy.strategy.optimizer.state_tensors()["mean"][5].item(),
    }
    comparison = compare(saved(tmp_path / "a", healthy), saved(tmp_path / "b", sick))
    assert str(comparison.difference).startswith(expected.format(values.get(expected[:5])))
    assert comparison.a == comparison.b


def test_compare_sees_the_sign_of_zero_when_nothing_else_differs(tmp_path: Path) -> None:
    one = with_state(small_replica(), lambda r: r.parameters.fill_(0.0))
    other = with_state(small_replica(), lambda r: r.parameters.fill_(0.0)[7].fill_(-0.0))
    other.position = one.position
    difference = compare(saved(tmp_path / "a", one), saved(tmp_path / "b", other)).difference
    assert difference is not None
    # The first in order of names: value 7 of the vector lies in 0.weight.
    assert (difference.where, difference.index, difference.a, difference.b) == (
        "model.0.weight",
        7,
        "0.0",
        "-0.0",
    )


def test_compare_names_the_tensor_when_only_one_of_them_has_it(tmp_path: Path) -> None:
    one = saved(tmp_path / "a", small_replica())
    sgd = small_replica(small_run(optimizer=Optimizer(kind="sgd")))
    sgd.position = small_replica().position
    difference = compare(one, saved(tmp_path / "b", sgd)).difference
    assert str(difference) == f"optimizer.mean: [{sgd.numel}] in the first, missing in the second"


def test_checkpoints_after_a_step_are_gone_when_what_led_to_them_is_void(tmp_path: Path) -> None:
    for step in (3, 8, 12):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "other").mkdir()
    discard_after(tmp_path, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "step-00000003", "step-00000008"]
    discard_after(tmp_path / "nowhere", 8)
