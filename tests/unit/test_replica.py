"""The replica: one vector under the model, an apply that all peers take alike, a state that can be moved."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replicas import FINGERPRINT, entry_at, next_entry, small_model, small_replica, small_run
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from p2ptrain.config import BytesTask, Optimizer
from p2ptrain.errors import BadMessage, LocalFault
from p2ptrain.gradients.accumulator import Accumulator
from p2ptrain.gradients.aggregation import mean_chunk
from p2ptrain.protocol.lineage import advance, genesis
from p2ptrain.records import DataPosition, Manifest, Position
from p2ptrain.replica.log import Entry
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.snapshot import PIECE_BYTES, Assembly, Snapshot, unpack

# -- the model on one vector ---------------------------------------------------------------------------------


def test_replica_keeps_the_model_as_it_was_when_it_takes_it_over() -> None:
    before = {name: tensor.clone() for name, tensor in small_model().state_dict().items()}
    replica = small_replica()
    assert replica.numel == sum(tensor.numel() for tensor in before.values())
    for name, tensor in replica.model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.untyped_storage().data_ptr() == replica.parameters.untyped_storage().data_ptr()


def test_backward_adds_to_the_flat_gradient_when_it_runs_twice() -> None:
    replica, inputs = small_replica(), torch.ones(3, 32)
    for _ in range(2):
        replica.model(inputs).sum().backward()
    plain = small_model()
    plain(inputs).sum().backward()
    expected = torch.cat([parameter.grad.reshape(-1) for parameter in plain.parameters()])
    torch.testing.assert_close(replica.gradient, 2 * expected)


def test_replica_counts_a_tied_weight_once_when_two_layers_share_it() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
    model[2].weight = model[0].weight
    replica = Replica(model, small_run(), FINGERPRINT)
    assert replica.parameter_table() == [("0.weight", (8, 8), "float32")]
    replica.parameters.fill_(2.0)
    assert model[2].weight.tolist() == [[2.0] * 8] * 8


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_moved_model_follows_the_state_when_it_steps_or_is_loaded(device: str) -> None:
    """With a copy on the CPU, too: it is one that only follows if it is made to."""
    plain, moved = small_replica(), small_replica()
    moved.move_model(torch.device(device))
    assert moved.moved
    assert not plain.moved
    inputs = torch.ones(3, 32)
    for step in range(3):
        moved.gradient.zero_()
        moved.model(inputs.to(device)).sum().backward()
        assert moved.gradient.device.type == device
        assert moved.gradient.any()
        entry = next_entry(plain, step)
        plain.apply(entry)
        moved.apply(entry)
        assert moved.state_digest == plain.state_digest
        assert moved.compute_state_digest() == plain.compute_state_digest()
        at = torch.cat([parameter.detach().reshape(-1) for parameter in moved.model.parameters()])
        assert torch.equal(at.cpu(), plain.parameters)
    newcomer = small_replica(seed=1)
    newcomer.move_model(torch.device(device))
    newcomer.load_state(moved.snapshot())
    for mine, theirs in zip(newcomer.model.parameters(), moved.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.untyped_storage().data_ptr() != newcomer.parameters.untyped_storage().data_ptr()


def test_parameter_table_has_the_order_of_the_vector_when_listed() -> None:
    assert small_replica().parameter_table()[:3] == [
        ("0.weight", (64, 32), "float32"),
        ("0.bias", (64,), "float32"),
        ("2.weight", (12, 64), "float32"),
    ]


def frozen() -> nn.Module:
    model = small_model()
    model[0].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "1.running_mean"),
        (nn.Linear(4, 4).half(), "weight of Linear must be float32"),
        (nn.Linear(4, 4, device="meta"), "on the cpu, not torch.float32 on meta"),
        (frozen(), "0.bias of Sequential is frozen"),
        (nn.Tanh(), "no parameters"),
    ],
)
def test_replica_names_the_obstacle_when_a_model_cannot_be_trained(model: nn.Module, complaint: str) -> None:
    with pytest.raises(LocalFault, match=complaint):
        Replica(model, small_run(), FINGERPRINT)


def test_replica_accepts_a_buffer_when_it_is_a_constant() -> None:
    model = nn.Linear(4, 4)
    model.register_buffer("mask", torch.ones(4), persistent=False)
    assert Replica(model, small_run(), FINGERPRINT).numel == 20


def test_replica_stands_at_genesis_when_it_is_new() -> None:
    replica = small_replica()
    assert replica.position == genesis(FINGERPRINT, replica.compute_state_digest())
    assert replica.last is None
    assert replica.position == small_replica().position
    assert replica.position != small_replica(seed=1).position


# -- apply ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_replicas_are_equal_to_the_bit_when_they_applied_the_same_entries(kind: str, codec: str) -> None:
    run = small_run(codec=codec, optimizer=Optimizer(kind=kind))
    one, other = small_replica(run), small_replica(run)
    for _ in range(10):
        entry = next_entry(one)
        one.apply(entry)
        other.apply(entry)
        assert one.position == other.position
        assert one.compute_state_digest() == other.compute_state_digest()


def test_state_digest_is_unknown_when_an_entry_was_applied_until_it_is_computed() -> None:
    replica = small_replica()
    before = replica.state_digest
    entry = next_entry(replica)
    replica.apply(entry)
    assert replica.state_digest is None
    assert replica.compute_state_digest() != before
    assert replica.state_digest == replica.compute_state_digest()
    assert replica.last == entry.header
    assert replica.position == advance(small_replica().position, entry.header)


def test_apply_takes_the_step_of_one_big_batch_when_three_peers_average_theirs() -> None:
    run = small_run(
        codec="fp32", optimizer=Optimizer(kind="sgd", lr=0.1, clip_norm=1e9), target_batch_size=24
    )
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(count, 32, generator=generator) for count in (4, 7, 13)]

    replica, totals = small_replica(run), []
    for batch in batches:
        peer, accumulator = small_replica(run), Accumulator(replica.numel)
        peer.model(batch).square().sum().backward()
        accumulator.add(peer.gradient, len(batch))
        totals.append(accumulator.total)
    mean = mean_chunk(totals, [len(batch) for batch in batches])
    replica.apply(entry_at(replica.position, run, mean))

    alone = small_replica(run)
    alone.model(torch.cat(batches)).square().sum().backward()
    alone.apply(entry_at(alone.position, run, alone.gradient / 24))
    torch.testing.assert_close(replica.parameters, alone.parameters, rtol=1e-5, atol=1e-8)
    assert not torch.equal(replica.parameters, small_replica(run).parameters)


def test_apply_clips_to_the_norm_in_the_header_when_the_gradient_is_large() -> None:
    # Without momentum or decay, the parameters move by lr · clip_norm.
    optimizer = Optimizer(kind="sgd", lr=0.5, momentum=0.0, nesterov=False, weight_decay=0.0, clip_norm=0.25)
    replica = small_replica(small_run(codec="fp32", optimizer=optimizer, schedule={"warmup_steps": 0}))
    before = replica.parameters.clone()
    replica.apply(entry_at(replica.position, replica.run, torch.randn(replica.numel) * 100))
    assert (replica.parameters - before).double().norm().item() == pytest.approx(0.125, rel=1e-4)


def test_apply_decays_matrices_only_when_the_gradient_is_zero() -> None:
    optimizer = Optimizer(kind="sgd", lr=0.5, weight_decay=1.0)
    replica = small_replica(small_run(optimizer=optimizer, schedule={"warmup_steps": 0}))
    before = {name: parameter.clone() for name, parameter in replica.model.named_parameters()}
    replica.apply(entry_at(replica.position, replica.run, torch.zeros(replica.numel)))
    for name, parameter in replica.model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.5 if parameter.ndim > 1 else 1.0))


def state_of(replica: Replica) -> tuple[Position, object, str]:
    return replica.position, replica.last, replica.snapshot().state_digest


def test_apply_changes_nothing_when_the_entry_does_not_follow() -> None:
    replica = small_replica()
    first = next_entry(replica)
    replica.apply(first)
    before = state_of(replica)
    other_parent = entry_at(
        Position(step=1, lineage="e" * 64, weight=0), replica.run, torch.ones(replica.numel)
    )
    for entry in (first, other_parent):
        with pytest.raises(ValueError, match="does not follow"):
            replica.apply(entry)
    assert state_of(replica) == before


def test_apply_changes_nothing_when_the_last_chunk_is_not_finite() -> None:
    replica = small_replica(small_run(codec="fp32"))
    before = state_of(replica)
    entry = next_entry(replica)
    payload = entry.payload[:-4] + struct.pack("<f", float("nan"))
    with pytest.raises(BadMessage, match="finite"):
        replica.apply(replace(entry, payload=payload))
    assert state_of(replica) == before
    replica.apply(entry)


@pytest.mark.parametrize("spans", [(0, 100), (0, 5000), (5, 2949)])
def test_apply_changes_nothing_when_the_spans_are_not_of_this_model(spans: tuple[int, ...]) -> None:
    replica = small_replica()
    before = state_of(replica)
    entry = next_entry(replica)
    header = entry.header.model_copy(update={"spans": spans})
    with pytest.raises(BadMessage, match="spans"):
        replica.apply(replace(entry, header=header))
    assert state_of(replica) == before


def test_apply_changes_nothing_when_the_entry_takes_samples_that_were_not_leased() -> None:
    run = small_run(data="leased", task=BytesTask(exact=True), target_batch_size=8)
    replica = small_replica(run)
    before = state_of(replica)
    header = replace_samples(next_entry(replica), samples=(8, 0), data=DataPosition(next=8, returned=()))
    stray = replace_samples(header, samples=(8, 0), data=DataPosition(next=9, returned=()))
    newcomer = replace_samples(header, samples=(8, 1), data=DataPosition(next=9, returned=()))
    for entry in (stray, newcomer, next_entry(replica)):
        with pytest.raises(BadMessage, match="entry 0 takes samples that it must not"):
            replica.apply(entry)
    assert state_of(replica) == before
    replica.apply(header)
    assert replica.last is not None
    assert replica.last.data == DataPosition(next=8, returned=())


def test_apply_changes_nothing_when_samples_are_leased_and_the_run_draws_them() -> None:
    replica = small_replica()
    before = state_of(replica)
    entry = replace_samples(next_entry(replica), samples=(8, 8), data=DataPosition(next=16, returned=()))
    with pytest.raises(BadMessage, match="does not fit data = 'drawn'"):
        replica.apply(entry)
    assert state_of(replica) == before


def replace_samples(entry: Entry, **fields: object) -> Entry:
    return replace(entry, header=entry.header.model_copy(update=fields))


# -- snapshot and load ---------------------------------------------------------------------------------------


def moved(steps: int = 3, **fields: object) -> Replica:
    replica = small_replica(small_run(**fields))
    for _ in range(steps):
        replica.apply(next_entry(replica))
    return replica


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_newcomer_goes_on_with_the_same_bits_when_it_loaded_a_snapshot(kind: str, steps: int) -> None:
    donor = moved(steps, optimizer=Optimizer(kind=kind))
    newcomer = small_replica(donor.run, seed=99)
    newcomer.load_state(donor.snapshot())
    assert state_of(newcomer) == state_of(donor)
    entry = next_entry(donor)
    donor.apply(entry)
    newcomer.apply(entry)
    assert state_of(newcomer) == state_of(donor)


def test_model_uses_the_loaded_parameters_when_a_snapshot_was_loaded() -> None:
    donor, newcomer = moved(), small_replica(seed=99)
    newcomer.load_state(donor.snapshot())
    assert torch.equal(newcomer.model(torch.ones(1, 32)), donor.model(torch.ones(1, 32)))
    newcomer.model(torch.ones(1, 32)).sum().backward()
    assert newcomer.gradient.any()


def test_snapshots_have_the_same_pieces_when_two_donors_stand_at_the_same_state() -> None:
    manifests = {moved().snapshot().manifest() for _ in range(5)}
    assert len(manifests) == 1


def test_snapshot_stays_as_it_was_when_the_replica_moves_on() -> None:
    donor = moved()
    snapshot = donor.snapshot()
    before = snapshot.manifest()
    donor.apply(next_entry(donor))
    assert snapshot.manifest() == before
    newcomer = small_replica()
    newcomer.load_state(snapshot)
    assert newcomer.position.step == 3


def test_packed_snapshot_has_the_digest_of_its_state_when_none_was_known() -> None:
    replica = moved()
    packed = replica.packed()
    assert packed.state_digest is None
    assert packed.snapshot().state_digest == replica.compute_state_digest() == unpack(packed.blob).digest()


def test_snapshot_fits_the_announced_bound_when_packed() -> None:
    donor = moved()
    assert len(donor.snapshot().blob) <= donor.max_state_bytes < 2 * len(donor.snapshot().blob) + 65_536


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Snapshot], Snapshot]:
    """The snapshot with changed tensors and the same scalars."""

    def altered(snapshot: Snapshot) -> Snapshot:
        tensors = {name: tensor.clone() for name, tensor in load_safetensors(snapshot.blob).items()}
        change(tensors)
        return replace(snapshot, blob=save_safetensors(tensors, metadata_of(snapshot)))

    return altered


def with_note(old: str, new: str) -> Callable[[Snapshot], Snapshot]:
    """The snapshot with the same tensors and its format and scalars edited as text."""

    def altered(snapshot: Snapshot) -> Snapshot:
        note = metadata_of(snapshot)["p2ptrain"]
        assert old in note
        metadata = {"p2ptrain": note.replace(old, new)}
        return replace(snapshot, blob=save_safetensors(load_safetensors(snapshot.blob), metadata))

    return altered


def metadata_of(snapshot: Snapshot) -> dict[str, str]:
    size = int.from_bytes(snapshot.blob[:8], "little")
    return json.loads(snapshot.blob[8 : 8 + size])["__metadata__"]


BETA1_POWER = f"beta1_power={(0.9 * 0.9 * 0.9).hex()}"  # after three steps
PLAIN_FILE = save_safetensors({"model.0.bias": torch.ones(64)})


def at(**fields: object) -> Callable[[Snapshot], Snapshot]:
    return lambda snapshot: replace(snapshot, position=snapshot.position.model_copy(update=fields))


HOSTILE = {
    "no bytes": (lambda s: replace(s, blob=b""), "safetensors"),
    "garbage": (lambda s: replace(s, blob=b"\x80\x04garbage" * 50), "safetensors"),
    "cut short": (lambda s: replace(s, blob=s.blob[:-1]), "safetensors"),
    "too long": (lambda s: replace(s, blob=s.blob + b"\0"), "safetensors"),
    "a pickle": (
        lambda s: replace(s, blob=b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c"),
        "safetensors",
    ),
    "no metadata": (lambda s: replace(s, blob=PLAIN_FILE), "__metadata__"),
    "other format": (with_note("p2ptrain-state-1", "p2ptrain-state-2"), "format is 'p2ptrain-state-2'"),
    "scalar is text": (with_note(BETA1_POWER, "beta1_power=much"), "invalid hexadecimal"),
    "scalar is huge": (with_note(BETA1_POWER, "beta1_power=0x1p99999999"), "too large"),
    "scalar has no name": (with_note(BETA1_POWER, "0x1p-1"), "unpack"),
    "scalar is not a power": (with_note(BETA1_POWER, "beta1_power=0x1p+1"), "power of a beta"),
    "scalar is nan": (with_note(BETA1_POWER, "beta1_power=nan"), "power of a beta"),
    "scalar is another": (with_note(BETA1_POWER, "beta1_power=0x1p-1"), "was announced as"),
    "a scalar more": (with_note(BETA1_POWER, BETA1_POWER + "\nmore=0x1p-1"), "only one of them has"),
    "a stray tensor": (with_tensors(lambda t: t.update(stray=torch.ones(1))), "'stray'"),
    "a tensor less": (with_tensors(lambda t: t.pop("model.0.bias")), "model.0.bias"),
    "a tensor more": (with_tensors(lambda t: t.update({"model.x": torch.ones(1)})), "model.x"),
    "other shape": (
        with_tensors(lambda t: t.update({"model.0.weight": torch.ones(32, 64)})),
        r"must be float32 \[64, 32\]",
    ),
    "other dtype": (with_tensors(lambda t: t.update({"model.0.bias": torch.ones(64).double()})), "float64"),
    "nan": (with_tensors(lambda t: t["optimizer.mean"].fill_(float("nan"))), "not finite"),
    "one infinity": (with_tensors(lambda t: t["model.4.bias"].fill_(-float("inf"))), "not finite"),
    "other values": (with_tensors(lambda t: t["model.0.bias"].add_(1)), "was announced as"),
    "other digest": (lambda s: replace(s, state_digest="0" * 64), "was announced as"),
    "other step": (at(step=4), "claims step 4"),
    "other lineage": (at(lineage="b" * 64), "claims step 3 of lineage bbbbbbbb"),
    "too light": (at(weight=3), "claims 3 samples"),
    "no last entry": (lambda s: replace(s, last=None), "its last entry leads to step 0"),
}


@pytest.mark.parametrize(("hostile", "complaint"), HOSTILE.values(), ids=HOSTILE)
def test_load_state_changes_nothing_when_a_snapshot_is_not_right(
    hostile: Callable[[Snapshot], Snapshot], complaint: str
) -> None:
    newcomer = moved(1)
    before, parameters = state_of(newcomer), newcomer.parameters.clone()
    with pytest.raises(BadMessage, match=complaint):
        newcomer.load_state(hostile(moved(3).snapshot()))
    assert state_of(newcomer) == before
    assert torch.equal(newcomer.parameters, parameters)


GOOD = moved(3).snapshot()


@settings(max_examples=200)
@given(st.integers(0, 8 + int.from_bytes(GOOD.blob[:8], "little") + 64), st.integers(1, 255))
def test_load_state_refuses_or_loads_the_same_when_any_byte_was_changed(at: int, flip: int) -> None:
    blob = bytearray(GOOD.blob)
    blob[at] ^= flip
    newcomer = small_replica()
    try:
        newcomer.load_state(replace(GOOD, blob=bytes(blob)))
    except BadMessage:
        return
    assert newcomer.snapshot().state_digest == GOOD.state_digest


# -- snapshot in pieces --------------------------------------------------------------------------------------

BLOB = bytes(range(256)) * 4096 * 2 + b"the end"  # two pieces of 1 MiB and a bit
WHOLE = replace(GOOD, blob=BLOB)


def test_assembly_gives_back_the_snapshot_when_pieces_come_in_any_order() -> None:
    manifest = WHOLE.manifest()
    assert (len(manifest.pieces), manifest.size_bytes, manifest.piece_bytes) == (3, len(BLOB), PIECE_BYTES)
    assembly = Assembly(manifest)
    for number in (2, 0, 0, 1):
        assembly.add(number, bytes(WHOLE.piece(number)))
    assert assembly.missing() == []
    assert assembly.snapshot() == WHOLE


def test_assembly_says_what_is_missing_when_it_is_not_whole() -> None:
    assembly = Assembly(WHOLE.manifest())
    assert assembly.missing() == [0, 1, 2]
    assembly.add(1, bytes(WHOLE.piece(1)))
    assert assembly.missing() == [0, 2]
    with pytest.raises(ValueError, match="2 of 3 pieces are missing"):
        assembly.blob()


@pytest.mark.parametrize(
    ("number", "data", "complaint"),
    [
        (0, bytes(PIECE_BYTES), "piece 0 of a snapshot has digest"),
        (0, b"", "must have 1048576 bytes, not 0"),
        (0, bytes(PIECE_BYTES + 1), "must have 1048576 bytes"),
        (2, b"the enD", "piece 2 of a snapshot has digest"),
        (2, b"the end.", "must have 7 bytes, not 8"),
        (3, b"", "no piece 3"),
        (-1, b"the end", "no piece -1"),
    ],
)
def test_assembly_refuses_a_piece_when_it_is_not_what_the_manifest_says(
    number: int, data: bytes, complaint: str
) -> None:
    assembly = Assembly(WHOLE.manifest())
    with pytest.raises(BadMessage, match=complaint):
        assembly.add(number, data)
    assert assembly.missing() == [0, 1, 2]


@pytest.mark.parametrize("size_bytes", [0, 2 * PIECE_BYTES, 3 * PIECE_BYTES + 1, 2**50])
def test_assembly_refuses_a_manifest_when_size_and_pieces_do_not_agree(size_bytes: int) -> None:
    manifest = Manifest(**{**dict(WHOLE.manifest()), "size_bytes": size_bytes})
    with pytest.raises(BadMessage, match="pieces of 1048576, not 3"):
        Assembly(manifest)


@pytest.mark.parametrize("number", [-1, 3])
def test_snapshot_raises_when_asked_for_a_piece_that_is_not_there(number: int) -> None:
    with pytest.raises(IndexError, match="this snapshot has 3"):
        WHOLE.piece(number)


def test_snapshot_takes_larger_pieces_when_a_manifest_would_be_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("p2ptrain.replica.snapshot.MAX_PIECES", 2)
    manifest = replace(WHOLE).manifest()
    assert (len(manifest.pieces), manifest.piece_bytes) == (2, 2 * PIECE_BYTES)
    assembly = Assembly(manifest)
    for number in assembly.missing():
        assembly.add(number, bytes(replace(WHOLE).piece(number)))
    assert assembly.blob() == BLOB
