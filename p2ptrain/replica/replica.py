"""The training state of one peer: parameters, optimizer state, and where it stands in the log.

All parameters lie in one flat float32 vector and all gradients in another, of which the model's own tensors
are views; so the optimizer, the codecs and the digest see one vector, and `backward` writes straight into
what is sent. The state lives on the CPU and is stepped there, whatever device computes: a model that was
moved to another has a copy of the parameters, which follows at each step (ADR 25).

Not covered: models with persistent buffers (such as batch-norm statistics), which would be state that no
gradient carries, and other dtypes than float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from p2ptrain.config import Optimizer, RunConfig
from p2ptrain.errors import BadMessage, LocalFault
from p2ptrain.gradients.accumulator import LARGEST_GRADIENT
from p2ptrain.gradients.codecs import codec_named
from p2ptrain.protocol.ledger import follows
from p2ptrain.protocol.lineage import advance, genesis
from p2ptrain.protocol.terms import in_force
from p2ptrain.records import EntryHeader, PeerId, Position
from p2ptrain.replica.alternating import Alternating
from p2ptrain.replica.apart import LocalSteps, effective_steps
from p2ptrain.replica.log import Entry, entry_ranges, payload_chunks
from p2ptrain.replica.optimizers import (
    CPU,
    FlatOptimizer,
    Ranges,
    build_optimizer,
    clip_factor,
    outer_optimizer,
)
from p2ptrain.replica.outer import Outer
from p2ptrain.replica.parts import PartSteps, Share, Union
from p2ptrain.replica.schedule import learning_rate, optimizer_for_batch
from p2ptrain.replica.snapshot import Packed, Snapshot, State, pack, unpack
from p2ptrain.replica.subspaces import (
    NOTHING,
    PROBE_VALUES,
    Cohesion,
    Probe,
    chosen,
    coordinates,
    owners,
    power,
    steps_behind,
    turn_of,
    union_of_mean,
    within,
)

ParameterTable = list[tuple[str, tuple[int, ...], str]]

GAMMA = "gamma"
"""With strategy `partition`, the scalar of the state that says by what the last union was multiplied."""


def parameter_table(model: nn.Module) -> ParameterTable:
    """(name, shape, dtype) of each trained parameter, a tied one once, in the order the fingerprint binds."""
    return [
        (name, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
        for name, parameter in _trained(model)
    ]


SECOND_FACTOR = ".lora_B."
"""In the names of adapters' second factors, which lie behind all first ones in the flat vector."""


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return sorted(named, key=lambda each: SECOND_FACTOR in each[0])


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
        _check_trainable(model, run.payload)
        named = _trained(model)
        sizes = [parameter.numel() for _, parameter in named]
        bounds = [0, *accumulate(sizes)]

        self.model = model
        self.run = run
        self.fingerprint = fingerprint
        self.base_digest = base_digest
        self.numel = bounds[-1]
        self.gradient = torch.zeros(self.numel)
        """float32 [numel], where the model is. `backward` adds to it; clear it with `zero_()`: `zero_grad()`
        would detach it. A step may overwrite it."""
        self.parameters = torch.empty(self.numel)
        """float32 [numel]."""

        self._copy: Tensor | None = None
        """The parameters on the model's device, if that is another."""
        self._views: dict[str, Tensor] = {}
        decayed = []
        for (name, parameter), (start, stop) in zip(named, pairwise(bounds), strict=True):
            view = self.parameters[start:stop].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = self._views[name] = view
            parameter.grad = self.gradient[start:stop].view(parameter.shape)
            # Matrices only: decay would pull gains and biases to zero and gain nothing.
            if parameter.ndim >= 2:
                decayed.append((start, stop))

        self._tensors, self._decayed = list(pairwise(bounds)), decayed
        first = sum(size for (name, _), size in zip(named, sizes, strict=True) if SECOND_FACTOR not in name)
        self._factors = {"b": (first, self.numel), "a": (0, first)}
        """Of adapters: where the second and the first factors are."""
        self._optimizer = self._optimizer_at(0)
        self._warmed_up: FlatOptimizer | None = None
        """What the rounds before strategy `local` set in were applied by, until this peer goes on from it."""
        self._outer = Outer(run.sync.outer, self.parameters) if run.sync.outer.every else None
        self._codec = codec_named(run.codec)
        self.values = self.numel
        """How many an entry averages."""
        if run.strategy == "partition":
            self.values += len(self._optimizer.state_tensors()) * self.numel + PROBE_VALUES
        # What lies in `gradient` when a step is taken is of no use any more, unless it was computed ahead. If
        # the model moves to another device, `gradient` moves along, and this stays.
        own = run.delay or run.strategy == "partition"
        self._mean = torch.empty(self.values) if own else self.gradient
        self.union: Union | None = None
        """With strategy `partition`: what the last entry was, until the next one or another state."""
        self._found_part: dict[tuple[int, int, int], Tensor] = {}
        self.cohesion: Cohesion | None = None
        """How well the parts of the entry before the last fitted together, as the last one tells."""
        self._gamma = 0.0
        self.state_digest: str | None = self._state().digest()
        """Digest of the state at `position`, or None while it has not been computed there."""
        self.position = genesis(fingerprint, self.state_digest)
        self.last: EntryHeader | None = None

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
        parameters = [parameter for _, parameter in _trained(self.model)]
        self.model.to(device)  # what is not trained, too
        self.gradient = torch.zeros(self.numel, device=device)
        self._copy_for(parameters, device)

    def _copy_for(self, parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
        copy = self._copy = self.parameters.to(device, copy=True)
        start = 0
        for parameter in parameters:
            stop = start + parameter.numel()
            parameter.data = copy[start:stop].view(parameter.shape)
            parameter.grad = self.gradient[start:stop].view(parameter.shape)
            start = stop
        return copy

    @property
    def strategy(self) -> str:
        """Of the next entry: `sync` while strategy `local` warms up."""
        return self._strategy_at(self.position.step)

    def _strategy_at(self, step: int) -> str:
        return in_force(self.run, None, step).strategy

    def _optimizer_at(self, step: int) -> FlatOptimizer:
        """A fresh one, of the kind that applies the entry of that step."""
        run = in_force(self.run, None, step)
        if run.strategy == "local":
            return self._build(outer_optimizer(run.local), ())
        return build_optimizer(optimizer_for_batch(run), self._tensors, self._decayed)

    def _build(self, config: Optimizer, decayed: Ranges, device: torch.device = CPU) -> FlatOptimizer:
        """For strategy `local`: with adapters, one that steps their factors in turn."""
        if self.run.payload == "full":
            return build_optimizer(config, self._tensors, decayed, device)

        def of_factor(start: int, stop: int) -> FlatOptimizer:
            tensors, shrinking = (
                [(a - start, b - start) for a, b in ranges if start <= a < stop]
                for ranges in (self._tensors, decayed)
            )
            return build_optimizer(config, tensors, shrinking, device)

        return Alternating(self._factors, of_factor, lambda: "ba"[self.position.step % 2])

    @property
    def moved(self) -> bool:
        """Whether the model has a copy of the parameters, and `gradient` is not where they are."""
        return self._copy is not None

    def compute_state_digest(self) -> str:
        """Digest of the state at `position`, as every replica there must have it (I2)."""
        if self.state_digest is None:
            self.state_digest = self._state().digest()
        return self.state_digest

    def apply(self, entry: Entry) -> None:
        """Take the synchronized optimizer step that the entry stands for.

        The payload must be known to be the header's: the round has hashed it, and `log.verify_entry` does for
        one that was fetched. Raises ValueError if the entry does not follow `position`, and BadMessage if its
        spans, size, numbers or samples cannot be; nothing changed then.
        """
        header = entry.header
        position = advance(self.position, header)
        self._check_samples(header)
        run = self._run_of(header)
        self._decode(entry)
        if run.strategy == "partition":
            self._put_together(run, header)
        else:
            self._step(run, position, header)
        self._update_copy()
        self.position, self.last, self.state_digest = position, header, None
        if self.strategy != run.strategy:
            self._warmed_up, self._optimizer = self._optimizer, self._optimizer_at(position.step)

    def _step(self, run: RunConfig, position: Position, header: EntryHeader) -> None:
        """By the optimizer, with what the entry has averaged."""
        rate = self._scale_mean(run, header)

        if run.strategy == "sync":  # an outer optimizer has none
            self._optimizer.weight_decay = run.optimizer.weight_decay
        self._optimizer.step(self.parameters, self._mean, rate)
        if self._outer is not None:
            self._outer.after(position.step, self.parameters)

    def show_average(self, entry: Entry) -> None:
        """Let the model have the mean of the peers' own parameters, weighed as in the entry, until the next
        step or state. Only where peers train apart. Raises BadMessage as `apply` does."""
        assert self._copy is not None
        self._decode(entry)
        self._scale_mean(self._run_of(entry.header), entry.header)
        self._copy.copy_(torch.sub(self.parameters, self._mean))

    def _decode(self, entry: Entry) -> None:
        """What the entry says, into `_mean`."""
        ranges = entry_ranges(entry.header.spans, self.values, self.run.chunk_values)
        for start, stop, chunk in payload_chunks(entry.payload, ranges, self._codec):
            self._codec.decode(chunk, self._mean[start:stop])

    def _scale_mean(self, run: RunConfig, header: EntryHeader) -> float:
        """Scale `_mean` as it is applied; returns the learning rate for it."""
        factor, rate = self.scale(run, header)
        if factor != 1.0:
            self._mean.mul_(torch.tensor(factor, dtype=torch.float32))
        return rate

    def _put_together(self, run: RunConfig, header: EntryHeader) -> None:
        """Apply the union of what the owners of all parts did, or if there were none the mean of what
        everybody did."""
        last, brought = self.last, sum(count > 0 for count in header.samples)
        divided = last is not None and not set(last.roster).isdisjoint(header.roster)
        members = len(last.roster) if last is not None and divided else 1
        gamma, probe = 1.0, NOTHING
        if divided:
            union_of_mean(self._mean, header.total_samples).clamp_(-LARGEST_GRADIENT, LARGEST_GRADIENT)
            probe = Probe.of(self._mean[-PROBE_VALUES:].tolist())
            gamma = self._gamma = chosen(run.partition.gamma, members, probe, self._gamma)
        trained_before = sum(count > 0 for count in last.samples) if last is not None else 0
        self.cohesion = probe.cohesion(trained_before)

        change, *others = torch.split(self._mean[:-PROBE_VALUES], self.numel)
        self.parameters.add_(torch.mul(change, torch.tensor(gamma, dtype=torch.float32)))
        for (name, tensor), moved in zip(self._optimizer.state_tensors().items(), others, strict=True):
            tensor.add_(moved)
            if name == "square_mean":  # a rounding below zero would have no root
                tensor.clamp_(min=0.0)
        steps = steps_behind(header.total_samples, brought, run.partition.inner_batch_size)
        settings = optimizer_for_batch(run)
        powers = {
            name: value * power(getattr(settings, name.removesuffix("_power")), steps)
            for name, value in self._optimizer.scalars().items()
        }
        self._optimizer.load(self._optimizer.state_tensors(), powers)
        self.union = Union(change, gamma, members) if divided else None

    @staticmethod
    def scale(run: RunConfig, header: EntryHeader) -> tuple[float, float]:
        """What the entry's mean is multiplied by, and the learning rate that it is applied with."""
        if run.strategy == "sync":
            return clip_factor(header.squared_norms, run.optimizer.clip_norm), learning_rate(run, header.step)
        local = run.local
        by_steps = local.weighting == "fednova"
        return (
            effective_steps(header.samples, local.inner_batch_size) if by_steps else 1.0,
            local.outer_learning_rate,
        )

    def averaged_norm(self, entry: EntryHeader) -> float:
        """Norm of what the last entry has averaged, or with strategy `partition` put together."""
        if self.union is not None:
            return float(torch.linalg.vector_norm(self.union.change))
        return math.sqrt(math.fsum(entry.squared_norms))

    def train_apart(self) -> LocalSteps:
        """From now on the model has parameters of its own, for strategy `local`, which every step and every
        state that is loaded resets to the replica's. The state of the optimizer for these is this peer's own:
        that of the warm-up if it took part in its last round, else a fresh one."""
        copy = self._copy
        if copy is None:
            trained = [parameter for _, parameter in _trained(self.model)]
            copy = self._copy_for(trained, self.parameters.device)
        inner = self._build(optimizer_for_batch(self.run), self._decayed, copy.device)
        if (warm := self._warmed_up) is not None:
            load = inner.load_whole if isinstance(inner, Alternating) else inner.load
            load(warm.state_tensors(), warm.scalars())
            self._warmed_up = None
        return LocalSteps(
            self.run.local,
            self.parameters,
            copy,
            inner,
            self.run.optimizer.clip_norm,
            self._inner_rate,
        )

    def train_part(self, me: PeerId) -> PartSteps:
        """The same for strategy `partition`, where this peer has a part of the parameters in each step."""
        copy = self._copy
        if copy is None:
            trained = [parameter for _, parameter in _trained(self.model)]
            copy = self._copy_for(trained, self.parameters.device)
        return PartSteps(
            self.run.partition,
            self.parameters,
            copy,
            self.values,
            lambda orphaned: self._share(me, orphaned),
        )

    def _share(self, me: PeerId, orphaned: bool) -> Share:
        """What that peer trains in the step that the replica is at; everything, if nobody is there any more
        who owns a part."""
        last, partition = self.last, self.run.partition
        divided = last is not None and not orphaned
        if last is None or orphaned:
            mine = torch.arange(self.numel)
        elif me in last.roster:
            turn = turn_of(self.position.step, partition.rotate_every)
            part = (len(last.roster), last.roster.index(me), turn)
            if part not in self._found_part:  # it is mostly that of the step before
                of = owners(partition.by, self._tensors, part[0], self.run.seed, turn)
                self._found_part = {part: coordinates(of, part[1])}
            mine = self._found_part[part]
        else:
            mine = torch.empty(0, dtype=torch.int64)
        run = self._run_now()
        inner = build_optimizer(optimizer_for_batch(self.run), [(0, len(mine))], within(mine, self._decayed))
        state = {name: tensor[mine] for name, tensor in self._optimizer.state_tensors().items()}
        inner.load(state, self._optimizer.scalars())
        inner.weight_decay = run.optimizer.weight_decay
        return Share(mine, divided, inner, self._inner_rate(), run.optimizer.clip_norm)

    def _run_now(self) -> RunConfig:
        """The run as it stands here. Changes by the organizer count from the step after the entry that
        carries them."""
        terms = self.last.terms if self.last is not None else None
        return in_force(self.run, terms, self.position.step)

    def _inner_rate(self) -> float:
        return learning_rate(self._run_now(), self.position.step)

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
        same = self._strategy_at(snapshot.position.step) == self.strategy
        optimizer = self._optimizer if same else self._optimizer_at(snapshot.position.step)
        _check_same_layout(theirs, self._state(optimizer))
        if (digest := theirs.digest()) != snapshot.state_digest:
            raise BadMessage(
                f"a snapshot was announced as {snapshot.state_digest[:8]}, but its state is {digest[:8]}"
            )
        self._check_position(snapshot)

        for name, view in self._views.items():
            view.copy_(theirs.parameters[name])
        optimizer.load(theirs.optimizer, theirs.scalars)
        self._optimizer, self._warmed_up = optimizer, None
        if self._outer is not None:
            self._outer.load(theirs.optimizer)
        self.union = self.cohesion = None
        self._gamma = theirs.scalars.get(GAMMA, 0.0)
        self._update_copy()
        self.position, self.last, self.state_digest = snapshot.position, snapshot.last, snapshot.state_digest

    def _run_of(self, header: EntryHeader) -> RunConfig:
        """The run as it stands for that entry."""
        try:
            return in_force(self.run, header.terms, header.step)
        except ValueError as error:
            raise BadMessage(f"the terms of entry {header.step} make no valid run") from error

    def _update_copy(self) -> None:
        if self._copy is not None:
            self._copy.copy_(self.parameters)

    def _state(self, optimizer: FlatOptimizer | None = None) -> State:
        """With that optimizer's state in place of our own, if one is given."""
        optimizer = optimizer or self._optimizer
        tensors = optimizer.state_tensors()
        if self._outer is not None:
            tensors |= self._outer.state_tensors()
        scalars = optimizer.scalars()
        if self.run.strategy == "partition":
            scalars |= {GAMMA: self._gamma}
        return State(self._views, tensors, scalars)

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
