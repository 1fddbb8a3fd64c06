"""`p2ptrain batch advise`: the target batch that reaches a loss soonest, by what a peer has measured.

The noise scale, the cost of a round and the swarm's speed are in the journal of every peer that took part in
rounds of several. The arithmetic is `protocol.batch`; nothing that trains is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from p2ptrain.errors import ConfigError, NotRunning
from p2ptrain.protocol.batch import BatchAdvice, advise
from peers import control

app = typer.Typer(help="Choose the size of a step.", no_args_is_help=True)

ROUNDS = 200
"""Of the journal's last rounds, so many count."""

Number = TypeVar("Number", int, float)

CAVEAT = (
    "The noise scale foretells the critical batch for SGD, within a factor of about 5. With Adam and LAMB "
    "the critical batch can be far larger: there the best batch is no smaller than this."
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a peer's rounds say; None for what they do not."""

    rounds: int
    batch_size: int | None
    noise_scale: float | None
    round_seconds: float | None
    samples_per_second: float | None


@app.callback()
def _group() -> None:
    """Or its one command would take the group's place."""


@app.command(name="advise")
def advise_(
    run: Annotated[
        str, typer.Argument(metavar="[RUN]", help="Name of its run, where several peers run here.")
    ] = "",
    peer: Annotated[Path | None, typer.Option(help="The peer file that it was started with.")] = None,
    data_dir: Annotated[str, typer.Option(help="Its data folder; it need not run any more.")] = "",
    batch: Annotated[int | None, typer.Option(min=1, help="The present target batch.")] = None,
    noise_scale: Annotated[float | None, typer.Option(min=1e-3, help="Critical batch, in samples.")] = None,
    round_seconds: Annotated[
        float | None, typer.Option(min=0, help="What a round costs, besides computing.")
    ] = None,
    samples_per_second: Annotated[float | None, typer.Option(min=1e-9, help="Of all peers together.")] = None,
    delay: Annotated[int | None, typer.Option(min=0, max=1, help="The run's delay.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say which target batch takes the least time to a loss, and what the present one costs.

    Whatever is not given is as the peer that runs on this machine has measured it. It changes nothing.
    """
    found = Measured(0, None, None, None, None)
    if None in (batch, noise_scale, round_seconds, samples_per_second):
        folder = control.find(run, data_dir, peer)
        delay = _delay(folder) if delay is None else delay
        found = measured(folder, delay)
    advice = advise(
        batch_size=_known("--batch", batch, found.batch_size, found),
        critical=_known("--noise-scale", noise_scale, found.noise_scale, found),
        round_seconds=_known("--round-seconds", round_seconds, found.round_seconds, found),
        samples_per_second=_known(
            "--samples-per-second", samples_per_second, found.samples_per_second, found
        ),
        delay=delay or 0,
    )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(advice) | {"rounds": found.rounds, "caveat": CAVEAT}))
    else:
        typer.echo("\n".join(advice_lines(advice, found.rounds)))


def _delay(folder: Path) -> int:
    """As the running peer says; 0 if there is none."""
    try:
        return int(control.ask(folder, {"ask": "status"}).get("delay", 0))
    except NotRunning:
        return 0


def _known(option: str, given: Number | None, found: Number | None, by: Measured) -> Number:
    if given is not None:
        return given
    if found is not None:
        return found
    raise ConfigError(
        f"this peer's journal does not tell enough yet, after {by.rounds} rounds: it takes 30 rounds of two "
        f"peers or more since its start; wait, or give {option}"
    )


def measured(folder: Path, delay: int) -> Measured:
    """From the journal in this data folder. Raises ConfigError if there is none."""
    from p2ptrain.telemetry.journal import read_journal

    path = folder / "journal.jsonl"
    if not path.exists():
        raise ConfigError(f"there is no journal {path}; name the data folder of a peer that took part")
    return summary(read_journal(path), delay)


def summary(records: Iterable[Mapping[str, Any]], delay: int) -> Measured:
    """Of the last `ROUNDS` rounds. With `delay` a peer computes all the time, so the swarm's speed is what
    was in the rounds over how long this peer computed for them."""
    from p2ptrain.events import RoundCommitted, from_dict

    rounds: deque[RoundCommitted] = deque(maxlen=ROUNDS)
    noise_scale = None
    for record in records:
        if record.get("event") != RoundCommitted.event:
            continue
        event = from_dict(record)
        if isinstance(event, RoundCommitted):
            rounds.append(event)
            noise_scale = event.noise_scale or noise_scale
    if not rounds:
        return Measured(0, None, None, None, None)
    computed = [round_ for round_ in rounds if round_.mine]
    seconds = sum(
        round_.compute_seconds if delay else round_.accumulate_seconds for round_ in (computed or rounds)
    )
    samples = sum(round_.samples for round_ in (computed or rounds))
    return Measured(
        rounds=len(rounds),
        batch_size=round(statistics.median(round_.samples for round_ in rounds)),
        noise_scale=noise_scale,
        round_seconds=statistics.median(round_.seconds for round_ in rounds),
        samples_per_second=samples / seconds if seconds > 0 else None,
    )


def advice_lines(advice: BatchAdvice, rounds: int) -> list[str]:
    """The advice for people."""
    import textwrap

    from p2ptrain.events import duration

    best = round(advice.best_batch_size)
    fewer = "more" if advice.more_samples >= 0 else "fewer"
    basis = f", by the last {rounds} rounds" if rounds else ""
    facts = {
        "critical batch": f"{advice.critical_batch_size:,.0f} samples, the gradient's noise scale",
        "a round costs": f"{duration(advice.round_seconds)}; the swarm computes "
        f"{advice.samples_per_second:,.1f} samples/s{basis}",
        "best batch": f"target_batch_size = {best:,}",
        f"at {advice.batch_size:,} now": f"{advice.steps_factor:,.2f} times the fewest steps, "
        f"{advice.samples_factor:,.2f} times the fewest samples",
        "against the best": f"time +{advice.more_time:.0%}, samples {advice.more_samples:+.0%} ({fewer})",
    }
    lines = [f"{name:<17} {fact}" for name, fact in facts.items()]
    return [*lines, *textwrap.wrap(f"{CAVEAT} A new batch wants a new lr; see optimizer.batch_rule.", 100)]
