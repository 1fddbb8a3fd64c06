"""`p2ptrain monitor`: the command."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2ptrain.errors import ConfigError
from peers.places import user_data

if TYPE_CHECKING:
    from p2ptrain.swarm.access import Invite

Run = Callable[[Coroutine[Any, Any, Any]], Any]


def add_to(app: typer.Typer, run: Run) -> None:
    """Make the verb the app's own; `run` runs a role."""

    @app.command()
    def monitor(
        invite: Annotated[str, typer.Argument(help="The one line that the organizer gave you.")] = "",
        host: Annotated[
            str, typer.Option(help="Address to serve on.", show_default="127.0.0.1, or 0.0.0.0 with --public")
        ] = "",
        port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0 for any.")] = 9411,
        public: Annotated[
            bool,
            typer.Option("--public", help="Serve the page to whoever can reach this machine, read-only."),
        ] = False,
        share: Annotated[
            str,
            typer.Option(
                metavar="INVITE",
                help="Invite to show in the join box; without it INVITE, on this machine only.",
            ),
        ] = "",
        file_sd: Annotated[
            Path | None, typer.Option(help="Keep the peers in this file, too, for Prometheus' file_sd.")
        ] = None,
        replay: Annotated[
            Path | None, typer.Option(help="Show this journal, of a peer or a monitor, in place of a swarm.")
        ] = None,
        data_dir: Annotated[str, typer.Option(help="Folder for the monitor's key and history.")] = "",
        as_json: Annotated[
            bool, typer.Option("--json", help="Print what is seen, once, as one JSON object, and end.")
        ] = False,
    ) -> None:
        """Watch the swarm that INVITE leads to: a web page, and metrics of all peers for Prometheus.

        It takes part in no round. Everything it serves is read-only.
        """
        from p2ptrain.swarm.access import check, decode

        if bool(invite) == bool(replay):
            raise ConfigError("expected an invite, or --replay with a journal, and not both")
        entrance = decode(invite) if invite else None
        if entrance is not None:
            check(entrance, time.time())
        shown = decode(share) if share else None
        if shown is not None:
            check(shown, time.time(), role="train")
        from peers.replaying import Options
        from peers.replaying import replay as show_again

        folder = user_data() / f"monitor-{entrance.run_id}" if entrance and not data_dir else Path(data_dir)
        options = Options(
            host=host or ("0.0.0.0" if public else "127.0.0.1"),  # noqa: S104 - the operator asks for it, by --public
            port=port,
            public=public,
            folder=folder.expanduser(),
            file_sd=file_sd,
            share=_shared(entrance, shown, public=public) if entrance else "",
        )
        if replay is not None:
            run(show_again(replay, options, _say_where))
            return
        from peers import monitor as role

        if entrance is not None and as_json:
            with tempfile.TemporaryDirectory(prefix="p2ptrain-") as briefly:
                typer.echo(json.dumps(run(role.look(entrance, Path(briefly)))))
        elif entrance is not None:
            run(role.monitor(entrance, options, _say_where))


def _say_where(address: str) -> None:
    print(f"the swarm is to be seen at {address}", flush=True)


def _shared(invite: Invite, share: Invite | None, *, public: bool) -> str:
    """The invite to show in the join box: the one given for it; or our own, to this machine alone, if one can
    train with it."""
    from p2ptrain.swarm.access import encode

    if share is not None:
        return encode(share)
    return "" if public or invite.grant.role != "train" else encode(invite)
