"""What a strategy is: how the peers of a run train together.

Each has two sides. The `Strategy` is the same on every replica: it says what state there is beside the
parameters, and what an entry does to all of it. Its `Contributor` is one peer's own: what it does between two
rounds, what it brings to the next one, and what it can tell of the last. Nothing of a contributor is in a
snapshot; a replica that nobody trains, as when a log is checked, has none.

There are three: `sync`, `apart` (strategy `local`) and `parts` (strategy `partition`). Which one a run has is
decided in one place, `Replica._strategy_at`; everything else asks the object that it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from p2ptrain.config import RunConfig
from p2ptrain.events import Event
from p2ptrain.gradients.accumulator import Sent
from p2ptrain.gradients.engine import Engine, LossSum
from p2ptrain.gradients.noise import UNREAD, Reading, Spread
from p2ptrain.records import EntryHeader, PeerId
from p2ptrain.replica.log import Entry

if TYPE_CHECKING:  # it has a strategy
    from p2ptrain.replica.replica import Replica

# -- what all replicas do alike ------------------------------------------------------------------------------


class Strategy(Protocol):
    """Some of the replicated state, and what entries do to all of it."""

    values: int
    """How many an entry averages."""

    def tensors(self) -> dict[str, Tensor]:
        """Its state beside the parameters, not a copy: float32, of any shape."""
        ...

    def scalars(self) -> dict[str, float]:
        """The rest of it."""
        ...

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, float]) -> None:
        """Adopt a copy of a state whose names and shapes are those of `tensors` and `scalars`."""
        ...

    def apply(self, mean: Tensor, run: RunConfig, header: EntryHeader, last: EntryHeader | None) -> None:
        """Change the parameters and this state by what an entry averaged (float32 [values], which may be
        overwritten). `run`: as it stands for that entry; `last`: the one before it."""
        ...

    def contributor(self, replica: Replica, me: PeerId, probe: Probe, probes_every: int) -> Contributor:
        """The side of it that is this peer's own. A peer that has a look at what only some rounds can tell
        does so every `probes_every` steps, 0: never."""
        ...


# -- what one peer does --------------------------------------------------------------------------------------


class Gathered(Protocol):
    """What a peer has done for the next round: a sum, and over how many samples it is."""

    total: Tensor
    """float32 [values], on the CPU: the contribution, once it is `gathered`."""
    samples: int
    loss_sum: float
    """Σ loss over the same samples."""
    counts_each: bool
    """Whether each micro-batch counts by itself, and not only with others that fill an inner batch."""

    @property
    def room(self) -> int:
        """Samples that the next micro-batch may have at most; 0: this peer has nothing to compute now."""
        ...

    @property
    def gathered(self) -> bool:
        """Whether `total` is up to date."""
        ...

    def add(self, gradient: Tensor, samples: int, loss_sum: float = 0.0) -> bool:
        """Take a micro-batch's gradient (float32 [numel]) and loss, summed over so many samples. False, and
        nothing changed, if the gradient is not finite (I5)."""
        ...

    def gather(self) -> None:
        """Bring `total` up to date. Nothing may be added meanwhile."""
        ...


@dataclass(frozen=True)
class Round:
    """A committed one, to a peer that took part."""

    entry: Entry
    sent: Sequence[Sent] = ()
    """Its contribution as the entry has it, if the codec loses something."""
    spread: Spread | None = None
    """How far the members' contributions were apart, if that can be told."""


@dataclass(frozen=True)
class Told:
    """What a round tells, besides that it was."""

    norm: float
    """Of what it averaged, or put together."""
    clipped: bool | None = None
    """Whether that was shortened to `clip_norm`; None where it never is."""
    noise: Reading = UNREAD
    events: tuple[Event, ...] = ()


class Contributor(Protocol):
    """One peer's own side of a strategy. But for what is marked, the compute thread alone may use it."""

    @property
    def gathered(self) -> Gathered:
        """For the round under way. Its figures may be read anywhere."""
        ...

    @property
    def ahead(self) -> Gathered | None:
        """For the round after that one, with `delay`."""
        ...

    @property
    def judges_data(self) -> bool:
        """Whether what peers bring tells now whose data are unlike the others'. May be read anywhere."""
        ...

    def take(self, committed: Round) -> Told:
        """Have the replica apply the entry, settle what was brought to it, and begin anew."""
        ...

    def reset(self) -> None:
        """Begin anew where the replica is now, with nothing brought and nothing owed."""
        ...

    def rethink(self, orphaned: bool) -> Callable[[], None] | None:
        """None of those whom the last entry names take part any more (true), or some do, and this peer is
        not one of them. What the compute thread has to run if that changes what it has to do: what it has
        gathered is lost then. May be asked anywhere."""
        ...


# -- samples for nobody --------------------------------------------------------------------------------------

PROBE, PROBE_SAMPLES = "probe", 32
"""The peer by whose name, and how many, samples of each step are drawn that nobody trains on: the same for
all who have the same data."""

Probe = Callable[[int], float]
"""Step → mean loss, in nats, of the model as it is on that step's samples that nobody trains on."""


def probe_by(engine: Engine, draw: Callable[[int, str, int, int], Any], loss_sum: LossSum) -> Probe:
    """`draw` and `loss_sum` are a task's `batch` and `loss_sum`."""
    return lambda step: engine.mean_loss(partial(draw, step, PROBE), loss_sum, PROBE_SAMPLES)
