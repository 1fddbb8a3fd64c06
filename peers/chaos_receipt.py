"""What `p2ptrain chaos` prints in the end, for people and for programs, and reads again as a twin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from p2ptrain.errors import ConfigError
from p2ptrain.events import duration
from peers.display import replica_words
from peers.faults import NO_KIND
from peers.ledger import Samples, Spread, loss_at
from peers.passes import Data


@dataclass(frozen=True)
class Heldout:
    """How good the model was on text it never saw."""

    step: int
    samples: int
    """In the rounds that led there."""
    loss: float
    """Nats per byte."""


@dataclass(frozen=True)
class Twin:
    """What is read of the receipt of a rehearsal of the same run without faults."""

    run_digest: str
    faults: dict[str, int]
    heldout: list[Heldout]


@dataclass(frozen=True)
class BesideTwin:
    """Both losses at the last of our points that the twin has come to as well: equal samples behind."""

    samples: int
    loss: float
    twin_loss: float


def beside_twin(heldout: Sequence[Heldout], twin: Sequence[Heldout]) -> BesideTwin | None:
    """Compare at equal samples; None if no point of ours lies within the twin's curve."""
    curve = [(point.samples, point.loss) for point in twin]
    for point in reversed(heldout):
        if (loss := loss_at(point.samples, curve)) is not None:
            return BesideTwin(point.samples, point.loss, loss)
    return None


@dataclass(frozen=True)
class Crowd:
    """So many joined at once."""

    joiners: int
    all_in_seconds: float | None
    """From their start until each had been in a round; None if one never was."""
    samples_per_second_before: float
    samples_per_second_meanwhile: float


@dataclass(frozen=True)
class Receipt:
    """How the swarm fared; also what `--json` prints. Losses are in nats per byte."""

    seconds: float
    """From the first round with all peers until they were asked to leave; figures are of that time, but for
    steps, attempts, rounds and samples, which are from the start."""
    run_digest: str
    seed: int
    peers: int
    """At the end."""
    faults: dict[str, int]
    """By kind."""
    failed_starts: int
    """Starts after a fault that came to nothing, since there was no entrance then; tried again."""
    steps: int
    """The step that the swarm reached."""
    rounds_attempted: int
    rounds_committed: int
    samples: Samples
    data: Data | None
    """Where the run leases samples."""
    participation: float | None
    """Mean over the committed rounds of roster size per live peer."""
    resume_seconds: Spread
    """From each kill of a peer that trained to the next commit by another."""
    survivors_gave_up: int
    """Samples that those who trained then could not bring into that commit; 0: all were kept."""
    rejoin_by_replay_seconds: Spread
    """From a peer's start until it had committed a round, where its log or checkpoint was recent enough."""
    rejoin_by_snapshot_seconds: Spread
    crowd: Crowd | None
    longest_gap_seconds: float
    """Between two commits."""
    lineages: int
    """The most that there were of one step; 1 if the log never parted."""
    died_out: int
    """Of those, the ones that nobody rolled back from: all who had committed them were killed."""
    rollbacks: int
    states_compared: int
    digests_equal: bool
    heldout: list[Heldout]
    beside_twin: BesideTwin | None
    """None without a twin, or if it has come to none of our points."""
    memory_mb_per_minute: dict[str, float]
    """Growth of each process that lived long enough to tell, its longest life."""
    left_over: int
    """Processes that outlived the rehearsal."""
    interrupted: bool
    folder: str
    problem: str
    """What did not go as it must, as a sentence; empty if all did."""


def read_twin(path: Path) -> Twin:
    """What `--json` printed of a rehearsal without faults, as its last line. Raises ConfigError."""
    try:
        twin = TypeAdapter(Twin).validate_json(path.read_text().rstrip().rpartition("\n")[2])
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, ValidationError):
        raise ConfigError(
            f"the last line of {path} is no receipt; --twin takes what `p2ptrain chaos --faults {NO_KIND} "
            "--json` printed"
        ) from None
    if sum(twin.faults.values()):
        raise ConfigError(f"the twin in {path} had faults itself; it must be of --faults {NO_KIND}")
    return twin


def receipt_lines(receipt: Receipt) -> list[str]:
    """The receipt for people."""
    samples, wasted = receipt.samples, sum(receipt.samples.wasted.values())
    faults = ", ".join(f"{count} {kind}" for kind, count in receipt.faults.items()) or NO_KIND
    growth = receipt.memory_mb_per_minute
    fastest = max(growth, key=lambda name: growth[name], default="")
    counted = f"{samples.used:,} of {samples.computed:,} used ({_share(samples.used, samples.computed)})"
    facts = {
        "faults": f"{faults}, in {duration(receipt.seconds)} (seed {receipt.seed})",
        "rounds": f"{receipt.rounds_committed:,} of {receipt.rounds_attempted:,} attempts committed "
        f"({_share(receipt.rounds_committed, receipt.rounds_attempted)}); step {receipt.steps:,}",
        "samples": f"{counted}; {wasted:,} wasted, about {samples.lost:,} lost with killed peers",
        "participation": "no round was committed"
        if receipt.participation is None
        else f"{receipt.participation:.1%} of live peers in the mean round",
        "resumed": _spread_words(receipt.resume_seconds, "after a kill")
        + f"; survivors gave up {receipt.survivors_gave_up:,} samples",
        "back by replay": _spread_words(receipt.rejoin_by_replay_seconds, "after the start"),
        "by snapshot": _spread_words(receipt.rejoin_by_snapshot_seconds, "after the start"),
        "longest gap": f"{receipt.longest_gap_seconds:.1f} s between two commits",
        "lineages": f"{receipt.lineages} at most; {receipt.rollbacks} rollbacks"
        + f"; {receipt.died_out} died with their peers" * (receipt.died_out > 0),
        "replicas": replica_words(receipt.digests_equal, receipt.states_compared),
        "held-out loss": _loss_words(receipt),
        "memory": f"grew by at most {growth[fastest]:.2f} MB/min ({fastest})"
        if growth
        else "not measured: no process lived long enough",
        "folder": receipt.folder,
    }
    if (data := receipt.data) is not None:
        facts["data"] = (
            f"{data.unique:,} samples counted, {data.repeated:,} repeated, {data.lost:,} lost; "
            f"{data.returned:,} given back and next"
        )
    if (crowd := receipt.crowd) is not None:
        all_in = "never" if crowd.all_in_seconds is None else f"after {duration(crowd.all_in_seconds)}"
        before, meanwhile = crowd.samples_per_second_before, crowd.samples_per_second_meanwhile
        rates = f"{before:,.1f} samples a second before, {meanwhile:,.1f} meanwhile"
        facts["crowd"] = f"{crowd.joiners} joiners, all in {all_in}; {rates}"
    if receipt.failed_starts:
        facts["failed starts"] = f"{receipt.failed_starts}, while there was no way in; tried again"
    return [f"{name:<15} {fact}" for name, fact in facts.items()]


def _loss_words(receipt: Receipt) -> str:
    if not receipt.heldout:
        return "not measured: there were too few steps"
    last = receipt.heldout[-1].loss
    words = f"{receipt.heldout[0].loss:.3f} at first, {last:.3f} at last, in nats per byte"
    if (both := receipt.beside_twin) is None:
        return words
    more = both.loss / both.twin_loss - 1
    return (
        f"{words}; at {both.samples:,} samples {both.loss:.3f}, and {both.twin_loss:.3f} without faults "
        f"({more:+.1%})"
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _spread_words(spread: Spread, since: str) -> str:
    if spread.median is None or spread.worst is None:
        return "never"
    return f"{spread.median:.1f} s {since} in the median, {spread.worst:.1f} s at worst, of {spread.count}"
