"""Whole trainers on the memory swarm: a small task, peers to start and kill, and what they went through.

Time is virtual; a micro-batch takes what its peer's pace says. Everything but the task and the network is
what a volunteer runs.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from p2ptrain import events
from p2ptrain.config import Optimizer, PeerConfig, RunConfig, Schedule, fingerprint
from p2ptrain.gradients.devices import CPU, Found, Place
from p2ptrain.gradients.engine import Engine
from p2ptrain.protocol.member import Stage
from p2ptrain.records import EntryHeader, PeerId, Position
from p2ptrain.replica.checkpoint import latest, load, restore
from p2ptrain.replica.flat import parameter_table
from p2ptrain.replica.replica import Replica
from p2ptrain.swarm.memory import MemoryHub
from p2ptrain.tasks import Task, build_model
from p2ptrain.trainer import Peer, train

torch.set_num_threads(1)  # for so little work, threads only wait for each other

INPUTS, HIDDEN, OUTPUTS = 32, 64, 32
DATA = 1000
"""Samples that have a number, for runs that lease them."""
APPLY_SECONDS = 0.002
"""Of virtual time, for everything on the compute thread that is no micro-batch."""


class Regression:
    """A small network learns what a fixed random one answers; sample k of (step, peer) is always the same."""

    note, shared_note = "regression", ""

    def __init__(self) -> None:
        self._teacher = _network(torch.Generator().manual_seed(4711))
        self.asked: list[int] = []
        """Numbers of the samples that were leased and asked for, by whatever peer."""
        self.poisoned: set[int] = set()
        """Of those whose gradient is not finite."""

    def build_model(self, seed: int) -> nn.Module:
        """4,192 parameters: two or three chunks of 1,024 for each of two reducers."""
        return _network(torch.Generator().manual_seed(seed))

    def batch(self, step: int, peer: str, first: int, count: int) -> tuple[Tensor, Tensor]:
        """(float32 [count, INPUTS], float32 [count, OUTPUTS])"""
        inputs = torch.stack([_sample(step, peer, number) for number in range(first, first + count)])
        with torch.no_grad():
            return inputs, self._teacher(inputs)

    @property
    def size(self) -> int:
        return DATA

    def samples(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.asked.extend(numbers)
        inputs = torch.stack([_sample(0, "data", number) for number in numbers])
        if self.poisoned & set(numbers):
            inputs.fill_(torch.nan)
        with torch.no_grad():
            return inputs, self._teacher(inputs)

    def loss_sum(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        device = next(model.parameters()).device
        inputs, targets = (each.to(device) for each in batch)
        losses: Tensor = (model(inputs) - targets).square().mean(dim=1)
        return losses.sum()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"loss": float(self.loss_sum(model, self.batch(0, "held out", 0, 64))) / 64}

    def preview(
        self, model: nn.Module, prompt: str, length: int, generator: torch.Generator, temperature: float = 0.7
    ) -> str:
        return ""


def _network(chance: torch.Generator) -> nn.Module:
    network = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=chance) / INPUTS**0.5)
    return network


def _sample(step: int, peer: str, number: int) -> Tensor:
    seed = hashlib.sha256(f"{step}/{peer}/{number}".encode()).digest()
    return torch.randn(INPUTS, generator=torch.Generator().manual_seed(int.from_bytes(seed[:6], "big")))


def small_run(**fields: Any) -> RunConfig:
    """24 samples a step, in fp32, by AdamW with warm-up."""
    defaults: dict[str, Any] = {
        "run_id": "regression",
        "total_steps": 1_000_000,
        "target_batch_size": 24,
        "codec": "fp32",
        "chunk_values": 1024,
        "heartbeat_seconds": 0.5,
        "silence_seconds": 2.0,
        "optimizer": Optimizer(lr=0.01),
        "schedule": Schedule(warmup_steps=5),
    }
    return RunConfig(**defaults | fields)


# -- one peer ------------------------------------------------------------------------------------------------


class Trainer:
    """One life of a peer, and what it went through: a peer that comes back is another `Trainer`."""

    def __init__(self, training: Training, name: str, config: PeerConfig, batch_seconds: float) -> None:
        run = training.run
        model, base_digest = build_model(training.task, run)
        self.name = PeerId(name)
        print_ = fingerprint(run, parameter_table(model), base_digest)
        self.replica = Replica(model, run, print_, base_digest)
        self.folder = training.folder / name if training.folder is not None else None
        self.lineages = b""
        if self.folder is not None and (newest := latest(self.folder)) is not None:
            checkpoint = load(newest)
            restore(self.replica, checkpoint)
            self.lineages = checkpoint.lineages
        assert config.micro_batch_size != "auto"
        self._micro_batch_size = config.micro_batch_size
        self.engine = Engine(self.replica.model, self.replica.gradient, CPU, config.micro_batch_size)
        self.config = config
        self.peer: Peer | None = None
        self.happened: list[tuple[float, events.Event]] = []
        """(virtual time, event), in order."""
        self.watching: list[Callable[[events.Event], None]] = []
        """Told of each event before anybody else."""
        self.positions: list[Position] = [self.replica.position]
        """Every position that this replica had, in order."""
        self.parameters: dict[str, Tensor] = {}
        """Lineage → a copy of the parameters that this replica had there."""
        self.drawn: dict[int, set[int]] = {}
        """Step → numbers of the samples that this peer computed for it."""
        self.batch_sizes: dict[int, int] = {}
        """Step → samples in its first micro-batch; the others are no larger."""
        self.run = run
        self._training = training
        self._batch_seconds = batch_seconds
        self._thread = asyncio.Lock()

    @property
    def step(self) -> int:
        return self.replica.position.step

    def of(self, kind: type[events.Event]) -> list[Any]:
        """What happened of this kind, in order."""
        return [event for _, event in self.happened if isinstance(event, kind)]

    def state_digests(self) -> dict[str, str]:
        """Lineage → digest of the state that this replica had there."""
        return {event.lineage: event.state_digest for event in self.of(events.StateHashed)}

    def lineage_at(self, step: int) -> str | None:
        """Of the last state that this replica had at that step."""
        return next((at.lineage for at in reversed(self.positions) if at.step == step), None)

    def contributed(self) -> int:
        """Samples in the contribution to its next round."""
        assert self.peer is not None
        return self.peer.gathered.samples

    def outside(self) -> bool:
        """Whether it takes part in nothing until it has caught up."""
        assert self.peer is not None
        member = self.peer.rounds.member
        # While it applies what it holds it is outside, too, but not behind.
        return member.stage is Stage.OUTSIDE and member.held_header is None

    def forget(self) -> None:
        """What happened and how it stood until now: of a replica that was damaged on purpose."""
        self.happened.clear()
        self.parameters.clear()

    def headers(self) -> list[EntryHeader]:
        """Of the entries in its log, from the oldest on."""
        assert self.peer is not None
        log = self.peer.log
        entries = (log.get(step) for step in range(log.oldest or 0, log.step))
        return [entry.header for entry in entries if entry is not None]

    def compute_on(self, device: torch.device) -> None:
        """From its first micro-batch on: the model is there, with a copy of the parameters."""
        self.replica.move_model(device)
        place = Place(Found(str(device)), "fp32")
        self.engine = Engine(self.replica.model, self.replica.gradient, place, self._micro_batch_size)

    async def live(self) -> None:
        training = self._training
        swarm = training.hub.swarm(self.name, self.replica.fingerprint)
        async with swarm:
            self.peer = Peer(
                swarm,
                training.run,
                self.config,
                training.task,
                self.replica,
                self.engine,
                fingerprint=self.replica.fingerprint,
                incarnation=f"{self.name} {len(training.lives)}",
                compute=self._compute,
                aside=self._aside,
                observe=self._observe,
                checkpoints=self.folder,
                lineages=self.lineages,
                partial=self.folder / "partial" if self.folder is not None else None,
            )
            async with self.peer:
                await train(self.peer, training.run)

    async def _compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        async with self._thread:  # one thread: first come, first served
            if getattr(function, "__name__", "") == "_gradients":
                step, first, count, _ = arguments
                self.batch_sizes.setdefault(step, count)
                self.drawn.setdefault(step, set()).update(range(first, first + count))
                await asyncio.sleep(self._batch_seconds * count / self._micro_batch_size)
            else:
                await asyncio.sleep(APPLY_SECONDS)
            result = function(*arguments)
        self._look()
        return result

    async def _aside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        await asyncio.sleep(APPLY_SECONDS)
        return function(*arguments)

    def _look(self) -> None:
        position = self.replica.position
        if position != self.positions[-1]:
            self.positions.append(position)
            self.parameters[position.lineage] = self.replica.parameters.clone()

    def _observe(self, event: events.Event) -> None:
        for watch in self.watching:
            watch(event)
        self.happened.append((self._training.now, event))
        self._training.something_happened()


# -- all of them ---------------------------------------------------------------------------------------------


class Training:
    """A run on a hub. Use as an async context manager; whoever still trains at the end is stopped."""

    def __init__(self, hub: MemoryHub, run: RunConfig | None = None, folder: Path | None = None) -> None:
        """`folder`: for checkpoints, one folder in it per peer name; None for none."""
        self.hub = hub
        self.run = run or small_run()
        self.task: Task = Regression()
        self.folder = folder
        self.peers: dict[str, Trainer] = {}
        """Those that are online."""
        self.lives: list[Trainer] = []
        """All that ever were."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group = asyncio.TaskGroup()
        self._turn = asyncio.Event()

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def __aenter__(self) -> Training:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        for task in self._tasks.values():
            task.cancel()
        await self._group.__aexit__(*error)

    def start(self, name: str, *, batch_seconds: float = 0.1, **config: Any) -> Trainer:
        """Bring a peer online, from its newest checkpoint if it has one."""
        defaults: dict[str, Any] = {
            "name": name,
            "micro_batch_size": 4,
            "eval_every_steps": 0,
            "checkpoint_every_steps": 0,
        }
        trainer = Trainer(self, name, PeerConfig(**defaults | config), batch_seconds)
        self.peers[name] = trainer
        self.lives.append(trainer)
        self._tasks[name] = self._group.create_task(trainer.live(), name=f"peer {name}")
        return trainer

    async def kill(self, name: str) -> Trainer:
        """As by `kill -9`: from one moment to the next it says and does nothing more."""
        self.hub.kill(name)
        task = self._tasks.pop(name)
        task.cancel()
        await asyncio.wait([task])
        return self.peers.pop(name)

    def something_happened(self) -> None:
        turn, self._turn = self._turn, asyncio.Event()
        turn.set()

    async def until(self, condition: Callable[[], object], seconds: float = 120.0) -> None:
        """Let them train until the condition holds; it is asked whenever something happened to a peer."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    await self._turn.wait()
        except TimeoutError:
            standing = {name: trainer.replica.position for name, trainer in self.peers.items()}
            raise AssertionError(
                f"not after {seconds:g} s of virtual time; they stand at {standing}"
            ) from None

    async def until_step(self, step: int, seconds: float = 120.0) -> None:
        """Let them train until all that are online have come that far."""
        await self.until(lambda: all(trainer.step >= step for trainer in self.peers.values()), seconds)


# -- what must always hold -----------------------------------------------------------------------------------


async def rounds_at_unlike_speeds(run: RunConfig, rounds: int) -> tuple[list[EntryHeader], Tensor, int]:
    """Three peers train: headers of the first rounds, the first peer's parameters after them, and how many
    states could be compared."""
    async with Training(MemoryHub(1), run) as training:
        for number, (samples, seconds) in enumerate(((3, 0.05), (6, 0.2), (2, 0.1))):
            training.start(f"peer{number}", micro_batch_size=samples, batch_seconds=seconds)
        await training.until_step(rounds + 1)
        compared = check_replicas(training.lives)
        first = training.lives[0]
        at_end = next(position for position in first.positions if position.step == rounds)
        return first.headers()[:rounds], first.parameters[at_end.lineage], compared


def check_replicas(lives: Sequence[Trainer]) -> int:
    """Assert what must hold whatever happened; returns how many states were compared.

    Equal lineages were equal states, bit for bit, on every peer (I2). Nobody's weight fell while it lived,
    except to undo a lie that was proven (I3). No entry counts more samples of a peer than that peer computed
    for its step (or the one before, with `delay`), nor do all entries together, which one that counted twice
    would lead to (I4).
    """
    seen: dict[str, tuple[Trainer, Tensor]] = {}
    digests: dict[str, str] = {}
    drawn: dict[tuple[PeerId, int], set[int]] = {}
    compared = 0
    for life in lives:
        for lineage, parameters in life.parameters.items():
            first, expected = seen.setdefault(lineage, (life, parameters))
            assert torch.equal(parameters.view(torch.int32), expected.view(torch.int32)), (
                f"{first.name} and {life.name} differ at lineage {lineage[:8]}"
            )
            compared += first is not life
        for lineage, digest in life.state_digests().items():
            assert digests.setdefault(lineage, digest) == digest, f"{life.name} differs at {lineage[:8]}"
        weights = [position.weight for position in life.positions]
        falls = sum(later < earlier for earlier, later in pairwise(weights))
        undone = sum(event.liar is not None for event in life.of(events.RolledBack))
        assert falls <= undone, f"the weight of {life.name} fell: {weights}"
        for step, numbers in life.drawn.items():
            drawn.setdefault((life.name, step), set()).update(numbers)
    for life in lives:
        delay, left = life.run.delay, Counter[PeerId]()
        for header in life.headers():
            for peer, samples in zip(header.roster, header.samples, strict=True):
                computed = len(drawn.get((peer, header.step), ()))
                older = len(drawn.get((peer, header.step - 1), ())) if delay else 0
                left[peer] += computed + (older if peer not in left else 0) - samples
                assert samples <= computed + older, f"entry {header.step} counts {samples} of {peer}"
                assert left[peer] >= 0, f"entries until {header.step} count {-left[peer]} too many of {peer}"
                left[peer] *= delay
    return compared


def largest_pause(trainer: Trainer, start: float, stop: float) -> float:
    """Longest time between two commits of this peer, in that window of virtual time."""
    times = [at for at, event in trainer.happened if isinstance(event, events.RoundCommitted)]
    window = [start, *(at for at in times if start < at < stop), stop]
    return max(later - earlier for earlier, later in pairwise(window))
