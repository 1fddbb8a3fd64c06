"""`p2ptrain config`: check a run or peer file, explain a key, print the schemas or a file to start from.

It needs no swarm, torch or hivemind, so it answers at once. With `--json` the last line is one JSON object.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, assert_never

import typer

if TYPE_CHECKING:  # the verbs import it when they run: help, and other commands, answer at once
    from p2ptrain.config import PeerConfig, RunConfig

app = typer.Typer(name="config", help="Check, explain and describe run and peer files.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on one line.")]


class Kind(StrEnum):
    RUN = "run"
    PEER = "peer"


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A run file or a peer file; its keys tell which.")],
    as_json: Json = False,
) -> None:
    """Say whether FILE is valid, and what it means."""
    from p2ptrain import config
    from p2ptrain.config import PeerConfig, RunConfig

    settings = config.load_either(file)
    match settings:
        case RunConfig():
            lines, facts = _about_run(settings), {"kind": "run", "digest": config.run_digest(settings)}
        case PeerConfig():
            lines, facts = _about_peer(settings), {"kind": "peer"}
        case _:
            assert_never(settings)
    typer.echo(f"{file} is a valid {facts['kind']} file")
    for line in lines:
        typer.echo(f"  {line}")
    if as_json:
        _echo_json({"file": str(file), **facts, "config": settings.model_dump(mode="json")})


@app.command()
def explain(
    key: Annotated[str, typer.Argument(help="A key of either file, such as optimizer.lr")],
    as_json: Json = False,
) -> None:
    """Say what KEY takes, its default, and what setting it low or high does."""
    from p2ptrain import config

    text = config.explain(key)
    typer.echo(text)
    if as_json:
        _echo_json({"key": key, "text": text})


@app.command()
def schema(
    kind: Annotated[Kind | None, typer.Argument(help="Which file; both if left out.")] = None,
    as_json: Json = False,
) -> None:
    """Print the JSON schema of the run file, of the peer file or of both, for editors and other programs."""
    from p2ptrain import config

    schemas = config.schema()
    chosen = schemas if kind is None else schemas[kind]
    if as_json:
        _echo_json(chosen)
    else:
        typer.echo(json.dumps(chosen, indent=2))


@app.command()
def default(kind: Annotated[Kind, typer.Argument(help="Which file.")]) -> None:
    """Print a run or peer file with every default spelled out and explained, to start your own from."""
    from p2ptrain import config
    from p2ptrain.config import PeerConfig, RunConfig

    typer.echo(config.commented_toml(RunConfig() if kind is Kind.RUN else PeerConfig()), nl=False)


def _about_run(run: RunConfig) -> list[str]:
    from p2ptrain import config

    schedule = run.schedule
    after = "" if schedule.kind == "constant" else f", then {schedule.kind} to {schedule.final_ratio:g} of it"
    strategy = {
        "sync": "",
        "local": "; peers train apart, and average",
        "partition": "; peers train parts that do not overlap (experimental)",
    }[run.strategy]
    return [
        f"run      {run.run_id}, {run.total_steps:,} steps{strategy}",
        f"digest   {config.run_digest(run)}",
        f"trains   {run.task.summary}",
        f"step     {run.target_batch_size:,} samples from {run.min_peers} to {run.max_peers} peers, "
        f"averaged as {run.codec}",
        f"applies  {run.optimizer.kind}, lr {run.optimizer.lr:g} after {schedule.warmup_steps} steps{after}",
        f"gone     is a peer that says nothing for {run.silence_seconds:g} s",
    ]


def _about_peer(peer: PeerConfig) -> list[str]:
    checkpoints = (
        f"every {peer.checkpoint_every_steps:,} steps, {peer.checkpoints_kept} kept"
        if peer.checkpoint_every_steps
        else "none"
    )
    return [
        f"name         {peer.name or 'made from the peer id'}",
        f"computes     {_at_once(peer)} samples at a time on {_device(peer)}, threads {peer.threads}",
        f"corpus       {peer.corpus or 'as the run says'}",
        f"listens on   {' '.join(peer.listen) or 'nothing'}",
        f"announces    {' '.join(peer.announce) or 'what it listens on'}",
        f"metrics on   {peer.metrics_host}:{peer.metrics_port or 'any free port'}"
        + (", with the page of the run" if peer.page else ""),
        f"checkpoints  {checkpoints}",
    ]


def _at_once(peer: PeerConfig) -> str:
    return "as many as suit" if peer.micro_batch_size == "auto" else f"{peer.micro_batch_size:,}"


def _device(peer: PeerConfig) -> str:
    return "the first device that works" if peer.device == "auto" else peer.device


def _echo_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value))
