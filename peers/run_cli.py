"""`p2ptrain run`: what the organizer says to everybody in a run, by the organizer's key and from any time on
when the bootstrap runs to tell it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from p2ptrain.errors import ConfigError
from peers.durations import parse_seconds
from peers.places import user_data

if TYPE_CHECKING:  # they take longer than all the rest, and help answers at once
    from p2ptrain.config import RunConfig
    from p2ptrain.records import Change, LiveKey, Terms

app = typer.Typer(
    name="run",
    help="Say what holds for a run that you opened with bootstrap: its settings, its end, who is put out.",
    no_args_is_help=True,
)

Run = Annotated[str, typer.Option("--run", metavar="RUN", help="Its name, where you organize several here.")]
DataDir = Annotated[str, typer.Option(help="The bootstrap's data folder, if it was given one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of output.")]

AtStep = Annotated[
    int | None,
    typer.Option(min=0, help="From this step on; else soon after where the run was last seen."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the change, and make none.")]

KICK_TIME = "1h"
MARGIN_STEPS = 50
"""By when all have heard of a change, in a fast swarm."""
EXAMPLES: dict[str, str] = {
    "optimizer.lr": "2e-4",
    "optimizer.weight_decay": "0.1",
    "optimizer.clip_norm": "1",
    "target_batch_size": "128",
}


@app.command()
def kick(
    peer: Annotated[str, typer.Argument(metavar="PEER", help="Its id, or the end of it, as logs show it.")],
    ban: Annotated[bool, typer.Option("--ban", help="For good.")] = False,
    for_: Annotated[
        str, typer.Option("--for", help="For how long, if not for good: 30m, 1h, 7d.")
    ] = KICK_TIME,
    reason: Annotated[str, typer.Option(help="It and all others are told.")] = "",
    lift: Annotated[bool, typer.Option("--lift", help="Let it come back now.")] = False,
    run: Run = "",
    data_dir: DataDir = "",
    as_json: Json = False,
) -> None:
    """Put a peer out of the run, whatever invite it shows.

    An id costs nothing: who has the line of an invite can come again under another one, until the invite is
    revoked.
    """
    from p2ptrain.events import clean, short
    from peers import invites, present

    if (seconds := parse_seconds(for_)) is None:
        raise ConfigError(f"--for {for_!r}: expected a time such as 30m, 1h or 7d; for good is --ban")
    folder, now = organized(run, data_dir), int(time.time())
    seen = present.read(folder)
    who = present.resolve(peer, seen)
    until = None if ban else now + seconds
    kicks = invites.lift(folder, who, now) if lift else invites.kick(folder, who, until, reason, now)
    if as_json:
        typer.echo(json.dumps({"peer": who, "kicks": [each.model_dump() for each in kicks]}))
        return
    name = next((clean(each.name, 64) for each in seen if each.peer == who), "")
    whom = f"{short(who)} {name}".strip()
    when = "The bootstrap tells the swarm within seconds, or when it is next started"
    typer.echo(
        f"{whom} may come back. {when}"
        if lift
        else f"{whom} is put out {'for good' if ban else f'for {for_}'}. {when}"
    )
    came_by = next((each.invite for each in seen if each.peer == who), None)
    if came_by and not lift:
        typer.echo(
            f"It came by invite {came_by}, and who has that line can come again under another id; "
            f"`p2ptrain invite revoke RUN.toml {came_by}` puts out all who came by it"
        )


@app.command()
def show(run: Run = "", data_dir: DataDir = "", as_json: Json = False) -> None:
    """Say what holds for the run now, and where the bootstrap has last seen it."""
    from p2ptrain.config import RunConfig, run_digest
    from p2ptrain.protocol.terms import in_words
    from peers import invites, present

    folder = organized(run, data_dir)
    book, seen = invites.read(folder), present.read(folder)
    step = present.latest_step(seen)
    digest = run_digest(RunConfig.model_validate_json(book.run_json)) if book.run_json else ""
    if as_json:
        facts = {
            "run_id": book.run_id,
            "run_digest": digest,
            "step": step,
            "terms": None if book.terms is None else book.terms.model_dump(exclude={"peer", "signature"}),
            "kicked": [] if book.kicks is None else [each.model_dump() for each in book.kicks.kicks],
        }
        typer.echo(json.dumps(facts))
        return
    typer.echo(f"run {book.run_id}, digest {digest[:12]}, {_seen_at(step)}")
    if book.terms is None:
        typer.echo("  all is as the run file says")
    else:
        typer.echo(f"  revision {book.terms.revision}")
        for line in in_words(book.terms):
            typer.echo(f"  {line}")
    if book.kicks is not None and book.kicks.kicks:
        typer.echo(f"  peers that are put out: {len(book.kicks.kicks)}")


@app.command()
def log(run: Run = "", data_dir: DataDir = "", as_json: Json = False) -> None:
    """Tell what was said to the run so far, and when: settings, pauses, invites, who was put out."""
    from peers import decreed

    records = decreed.read(organized(run, data_dir))
    for line in [json.dumps(each) for each in records] if as_json else decreed.lines(records):
        typer.echo(line)


@app.command("set")
def set_(
    setting: Annotated[str, typer.Argument(metavar="KEY=VALUE", help="Such as optimizer.lr=2e-4.")],
    at_step: AtStep = None,
    dry_run: DryRun = False,
    run: Run = "",
    data_dir: DataDir = "",
    as_json: Json = False,
) -> None:
    """Change a setting of the run from a step on: optimizer.lr, optimizer.weight_decay, optimizer.clip_norm
    or target_batch_size.

    All replicas change at the same step: what an entry is applied under is part of the entry.
    """
    from p2ptrain.records import MAX_CHANGES, Change

    key, value = _setting(setting)
    folder = organized(run, data_dir)
    step = _at_step(at_step, folder)

    def change(settings: RunConfig, before: Terms) -> Terms:
        kept = _without_the_past(before, _seen_step(folder))
        kept = [each for each in kept if (each.key, each.step) != (key, step)]
        if len(kept) == MAX_CHANGES:
            raise ConfigError(
                f"{MAX_CHANGES} changes are ahead already, and no more travel at once; wait until one holds"
            )
        return before.model_copy(update={"changes": (*kept, Change(step=step, key=key, value=value))})

    _decree(folder, change, dry_run, as_json)


@app.command()
def pause(
    reason: Annotated[str, typer.Option(help="All volunteers are shown it.")] = "",
    at_step: Annotated[int, typer.Option(min=0, help="From this step on; 0: now.")] = 0,
    dry_run: DryRun = False,
    run: Run = "",
    data_dir: DataDir = "",
    as_json: Json = False,
) -> None:
    """Have nobody train until `resume`; peers save a checkpoint, stay connected and show why."""
    from p2ptrain.events import clean
    from p2ptrain.records import MAX_REASON

    if (
        len(reason) > MAX_REASON
        or not reason.isascii()
        or not reason.isprintable()
        or set(reason) & set('"\\')
    ):
        raise ConfigError(
            f"--reason {clean(reason, 50)}: expected at most {MAX_REASON} characters of ASCII, no quotes or "
            "backslashes"
        )
    _decree(
        organized(run, data_dir),
        lambda _, before: before.model_copy(update={"paused": reason, "paused_from": at_step}),
        dry_run,
        as_json,
    )


@app.command()
def resume(dry_run: DryRun = False, run: Run = "", data_dir: DataDir = "", as_json: Json = False) -> None:
    """End a pause of the run."""

    def change(settings: RunConfig, before: Terms) -> Terms:
        if before.paused is None:
            raise ConfigError("the run is not paused, so there is nothing to resume")
        return before.model_copy(update={"paused": None, "paused_from": 0})

    _decree(organized(run, data_dir), change, dry_run, as_json)


@app.command()
def stop(
    at_step: AtStep = None,
    dry_run: DryRun = False,
    run: Run = "",
    data_dir: DataDir = "",
    as_json: Json = False,
) -> None:
    """End the run at a step: all peers save a checkpoint, print their receipt and leave."""
    folder = organized(run, data_dir)
    step = _at_step(at_step, folder)
    _decree(folder, lambda _, before: before.model_copy(update={"stop": step}), dry_run, as_json)


def _setting(text: str) -> tuple[LiveKey, float]:
    """`optimizer.lr=2e-4` → its key and value. Raises ConfigError."""
    from p2ptrain.events import clean
    from p2ptrain.records import LiveKey

    key, equals, value = text.partition("=")
    allowed: tuple[LiveKey, ...] = get_args(LiveKey)
    found = next((each for each in allowed if each == key.strip()), None)
    if found is None:
        raise ConfigError(
            f"{clean(key, 60)!r} cannot change while a run goes on; these can: {', '.join(allowed)}"
        )
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    parts = found == "target_batch_size" and math.isfinite(number) and number != int(number)
    if not equals or parts or not 0 <= number <= 1e9:  # which no NaN is
        raise ConfigError(f"{clean(text, 60)!r}: expected {found}=NUMBER, such as {found}={EXAMPLES[found]}")
    return found, number


def _seen_step(folder: Path) -> int | None:
    from peers import present

    return present.latest_step(present.read(folder))


def _at_step(at_step: int | None, folder: Path) -> int:
    """The step that is meant. Raises ConfigError for one that is past, or if none is known to count from."""
    seen = _seen_step(folder)
    if at_step is None:
        if seen is None:
            raise ConfigError("nobody was seen training, so say from which step on: --at-step 500")
        return seen + MARGIN_STEPS
    if seen is not None and at_step <= seen:
        raise ConfigError(
            f"--at-step {at_step} is past: the bootstrap has seen the run at step {seen}; name a later one, "
            f"such as {seen + MARGIN_STEPS}, so that all have heard of it by then"
        )
    return at_step


def _without_the_past(terms: Terms, seen: int | None) -> list[Change]:
    """Its changes but for those that a later one has replaced for good."""
    past = [each for each in terms.changes if seen is not None and each.step <= seen]
    last = {each.key: each for each in sorted(past, key=lambda each: each.step)}
    return [each for each in terms.changes if each not in past or last[each.key] == each]


def _decree(folder: Path, change: Callable[[RunConfig, Terms], Terms], dry_run: bool, as_json: bool) -> None:
    from p2ptrain.protocol.terms import in_words
    from peers import invites

    before = invites.read(folder).terms
    after = invites.decree(folder, change, dry=dry_run)
    if as_json:
        facts = after.model_dump(exclude={"peer", "signature"})
        typer.echo(json.dumps({"dry_run": dry_run, "terms": facts}))
        return
    then, now = ([] if before is None else in_words(before)), in_words(after)
    for line in then:
        if line not in now:
            typer.echo(f"- {line}")
    for line in now:
        typer.echo(f"{'  ' if line in then else '+ '}{line}")
    typer.echo(
        "nothing was changed (--dry-run)"
        if dry_run
        else f"revision {after.revision} is signed; the bootstrap tells the swarm within seconds, or when it "
        "is next started"
    )


def _seen_at(step: int | None) -> str:
    return "nobody was seen training" if step is None else f"last seen at step {step:,}"


def organized(run: str, data_dir: str) -> Path:
    """The folder with the organizer's key of that run: the only one on this machine if none is named. Raises
    ConfigError."""
    from peers.invites import ORGANIZER

    if data_dir:
        return Path(data_dir).expanduser()
    if run:
        return user_data() / run
    found = sorted(path.parent for path in user_data().glob(f"*/{ORGANIZER}"))
    if len(found) != 1:
        those = f": {', '.join(path.name for path in found)}" if found else ""
        raise ConfigError(
            f"{len(found)} runs have been opened on this machine by this user{those}; say which with "
            "--run, or --data-dir if the bootstrap was given one"
        )
    return found[0]
