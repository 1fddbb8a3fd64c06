"""The training state of one peer: parameters, what its strategy replicates, and where it stands in the log.

Parameters are one flat vector (`flat`), and what an entry does to them, and which state there is beside them,
is for the strategy to say (`strategy`). Here is what is the same with all of them: that entries follow each
other and hold what they may, snapshots, and the digest of it all.
"""

from __future__ import annotations

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from p2ptrain.config import RunConfig
from p2ptrain.errors import BadMessage
from p2ptrain.gradients.codecs import codec_named
from p2ptrain.protocol.ledger import follows
from p2ptrain.protocol.lineage import advance, genesis
from p2ptrain.protocol.terms import in_force
from p2ptrain.records import EntryHeader, PeerId, Position
from p2ptrain.replica.apart import LocalStrategy
from p2ptrain.replica.flat import FlatModel, ParameterTable, parameter_table
from p2ptrain.replica.log import Entry, entry_ranges, payload_chunks
from p2ptrain.replica.optimizers import FlatOptimizer
from p2ptrain.replica.parts import PartitionStrategy
from p2ptrain.replica.schedule import learning_rate
from p2ptrain.replica.snapshot import Packed, Snapshot, State, pack, unpack
from p2ptrain.replica.strategy import Contributor, Probe, Strategy
from p2ptrain.replica.sync import SyncStrategy


class Replica:
    """The state at `position`, where entry `last` led (None at step 0).

    `apply` and `load_state` change it and must run alone; the other methods only read, and may run beside
    each other and beside the model.
    """

    def __init__(self, model: nn.Module, run: RunConfig, fingerprint: str, base_digest: str = "") -> None:
        """Take the model over, at step 0 of the run. Raises LocalFault if it cannot be trained so.

        With payload `lora`, what the model's frozen parameters are is named by `base_digest`, and all that is
        said of parameters here is said of the others.
        """
        self.run = run
        self.fingerprint = fingerprint
        self.base_digest = base_digest
        self._flat = flat = FlatModel(model, run.payload)
        self.strategy = self._strategy_at(0)
        """Of the next entry."""
        self._codec = codec_named(run.codec)
        # What lies in `gradient` when a step is taken is of no use any more, unless it was computed ahead. If
        # the model moves to another device, `gradient` moves along, and this stays.
        own = run.delay or self.values != flat.numel
        self._mean = torch.empty(self.values) if own else flat.gradient
        self.state_digest: str | None = self._state().digest()
        """Digest of the state at `position`, or None while it has not been computed there."""
        self.position = genesis(fingerprint, self.state_digest)
        self.last: EntryHeader | None = None

    def _strategy_at(
        self, step: int, warm: FlatOptimizer | None = None
    ) -> SyncStrategy | LocalStrategy | PartitionStrategy:
        """The run's strategy for the entry of that step, in its first state. `warm`: the optimizer of the
        strategy before it, where a warm-up has just ended here."""
        run = in_force(self.run, None, step)  # `sync` while `local` warms up
        match run.strategy:
            case "sync":
                return SyncStrategy(run, self._flat)
            case "local":
                return LocalStrategy(run, self._flat, lambda: self.position.step, warm)
            case "partition":
                return PartitionStrategy(run, self._flat)

    def _named_at(self, step: int) -> str:
        return in_force(self.run, None, step).strategy

    def contributor(self, me: PeerId, probe: Probe, probes_every: int = 0) -> Contributor:
        """What makes this peer one that trains, as long as its `strategy` is what it is; see
        `Strategy.contributor`. From now on the model may have parameters of its own."""
        return self.strategy.contributor(self, me, probe, probes_every)

    @property
    def base_note(self) -> str:
        """How the presence of a peer that trains adapters begins: with what they are for."""
        return f"base {self.base_digest[:16]}, " if self.base_digest else ""

    @property
    def model(self) -> nn.Module:
        return self._flat.model

    @property
    def numel(self) -> int:
        """Parameters that are trained."""
        return self._flat.numel

    @property
    def values(self) -> int:
        """How many an entry averages."""
        return self.strategy.values

    @property
    def parameters(self) -> Tensor:
        """float32 [numel], on the CPU."""
        return self._flat.parameters

    @property
    def gradient(self) -> Tensor:
        """float32 [numel], where the model is; see `FlatModel`."""
        return self._flat.gradient

    @property
    def max_state_bytes(self) -> int:
        """No snapshot of this run is larger: its tensors, and room for a header that names them."""
        tensors = self._state().tensors()
        known = sum(4 * tensor.numel() + 2 * len(name) + 256 for name, tensor in tensors.items()) + 65_536
        # While it warms up there may be another optimizer, whose state is at most two vectors.
        return known + (8 * self.numel if self.run.local.warmup_rounds else 0)

    def parameter_table(self) -> ParameterTable:
        """(name, shape, dtype) of every trained parameter, in the order they have in the flat vectors."""
        return parameter_table(self.model)

    def move_model(self, device: torch.device) -> None:
        """From now on the model is on that device, with copies of the parameters; and so is `gradient`."""
        self._flat.move(device)

    @property
    def moved(self) -> bool:
        """Whether the model has a copy of the parameters, and `gradient` is not where they are."""
        return self._flat.copy is not None

    def compute_state_digest(self) -> str:
        """Digest of the state at `position`, as every replica there must have it (I2)."""
        if self.state_digest is None:
            self.state_digest = self._state().digest()
        return self.state_digest

    def apply(self, entry: Entry) -> None:
        """Take the synchronized step that the entry stands for.

        The payload must be known to be the header's: the round has hashed it, and `log.verify_entry` does for
        one that was fetched. Raises ValueError if the entry does not follow `position`, and BadMessage if its
        spans, size, numbers or samples cannot be; nothing changed then.
        """
        header = entry.header
        position = advance(self.position, header)
        self._check_samples(header)
        run = self.run_for(header)
        self.strategy.apply(self.mean_of(entry), run, header, self.last)
        self._flat.follow()
        self.position, self.last, self.state_digest = position, header, None
        if self._named_at(position.step) != run.strategy:
            self.strategy = self._strategy_at(position.step, self.strategy.optimizer)

    def mean_of(self, entry: Entry) -> Tensor:
        """What the entry averaged: float32 [values], in the place where the next one is put. Raises
        BadMessage if its spans, size or numbers cannot be."""
        ranges = entry_ranges(entry.header.spans, self.values, self.run.chunk_values)
        for start, stop, chunk in payload_chunks(entry.payload, ranges, self._codec):
            self._codec.decode(chunk, self._mean[start:stop])
        return self._mean

    @property
    def run_now(self) -> RunConfig:
        """The run as it stands here. Changes by the organizer count from the step after the entry that
        carries them."""
        terms = self.last.terms if self.last is not None else None
        return in_force(self.run, terms, self.position.step)

    def learning_rate_now(self) -> float:
        """Of steps that a peer takes alone."""
        return learning_rate(self.run_now, self.position.step)

    def snapshot(self) -> Snapshot:
        """A copy of the state, to send or to save."""
        return Snapshot(self.position, self.last, self.compute_state_digest(), pack(self._state()))

    def packed(self) -> Packed:
        """The same, not hashed yet: that may be done elsewhere while this replica goes on."""
        return Packed(self.position, self.last, self.state_digest, pack(self._state()))

    def load_state(self, snapshot: Snapshot) -> None:
        """Adopt a snapshot of this run.

        Raises BadMessage, and nothing has changed, if its tensors are not those of our model, are not finite,
        do not have its `state_digest`, or if its position does not follow from its last entry.
        """
        theirs = unpack(snapshot.blob)
        strategy = self.strategy
        if self._named_at(snapshot.position.step) != self._named_at(self.position.step):
            strategy = self._strategy_at(snapshot.position.step)
        _check_same_layout(theirs, self._state(strategy))
        if (digest := theirs.digest()) != snapshot.state_digest:
            raise BadMessage(
                f"a snapshot was announced as {snapshot.state_digest[:8]}, but its state is {digest[:8]}"
            )
        self._check_position(snapshot)

        for name, view in self._flat.views.items():
            view.copy_(theirs.parameters[name])
        strategy.load(theirs.optimizer, theirs.scalars)
        self.strategy = strategy
        self._flat.follow()
        self.position, self.last, self.state_digest = snapshot.position, snapshot.last, snapshot.state_digest

    def run_for(self, header: EntryHeader) -> RunConfig:
        """The run as it stands for that entry."""
        try:
            return in_force(self.run, header.terms, header.step)
        except ValueError as error:
            raise BadMessage(f"the terms of entry {header.step} make no valid run") from error

    def _state(self, strategy: Strategy | None = None) -> State:
        """With that strategy's state in place of our own, if one is given."""
        strategy = strategy or self.strategy
        return State(self._flat.views, strategy.tensors(), strategy.scalars())

    def _check_samples(self, header: EntryHeader) -> None:
        """No sample counts twice (I4): an entry takes what was leased for its step, and nothing else."""
        leased = self.run.data == "leased"
        try:
            if leased:
                follows(self.last, header, self.run.target_batch_size)
        except ValueError as error:
            raise BadMessage(f"entry {header.step} takes samples that it must not: {error}") from error
        if (header.data is not None) != leased or (header.skipped and not leased):
            raise BadMessage(f"entry {header.step} does not fit data = {self.run.data!r}")

    def _check_position(self, snapshot: Snapshot) -> None:
        last, position = snapshot.last, snapshot.position
        if last is None:
            expected = genesis(self.fingerprint, snapshot.state_digest)
        else:
            try:
                weight = position.weight - last.total_samples
                expected = advance(Position(step=last.step, lineage=last.parent, weight=weight), last)
            except ValidationError as error:
                raise BadMessage(
                    f"a snapshot claims {position.weight} samples, but its last entry alone has "
                    f"{last.total_samples}"
                ) from error
        if position != expected:
            raise BadMessage(
                f"a snapshot claims step {position.step} of lineage {position.lineage[:8]}, but its last "
                f"entry leads to step {expected.step} of {expected.lineage[:8]}"
            )


def _check_same_layout(theirs: State, ours: State) -> None:
    found, expected = theirs.tensors(), ours.tensors()
    if found.keys() != expected.keys() or theirs.scalars.keys() != ours.scalars.keys():
        names = {*found, *theirs.scalars} ^ {*expected, *ours.scalars}
        raise BadMessage(
            f"a snapshot does not fit this run's model: only one of them has {sorted(names)[:5]}"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape or tensor.dtype != torch.float32:
            raise BadMessage(
                f"{name} must be float32 {list(expected[name].shape)}, but a snapshot has {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            raise BadMessage(f"{name} of a snapshot holds a value that is not finite")
    for name, value in theirs.scalars.items():
        if not 0.0 <= value <= 1.0:
            raise BadMessage(f"{name} of a snapshot is {value}, which is no power of a beta and no gamma")
