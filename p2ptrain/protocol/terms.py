"""What the organizer changes while a run goes on, and how all replicas change at the same step.

A change is worth nothing if two peers apply it at different steps: their replicas part. So no peer goes by
what it has heard itself. The leader of a step puts the newest `Terms` that it knows into its freeze, from
there they get into the entry's header, which the lineage binds, and the header is what `apply` goes by. Who
replays old entries finds in each the terms under which it was applied; who takes a snapshot finds them in the
next. Terms do not get older from an entry to the next one.

A change holds from the step that it names, if the leader of that step has heard of it: the organizer names
one that is some way off. If it has not, the change holds from the next entry whose leader has, for all at
once, too.

Not covered: whether terms are signed by the organizer, which is for the rim to find out (`swarm.gate`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from p2ptrain.config import RunConfig
from p2ptrain.protocol.round import Rules
from p2ptrain.records import Change, Terms


def newest(*known: Terms | None) -> Terms | None:
    """The terms of the highest revision, of those that there are."""
    return max((each for each in known if each is not None), key=lambda each: each.revision, default=None)


def revision(terms: Terms | None) -> int:
    """0 if there are none."""
    return 0 if terms is None else terms.revision


def due(terms: Terms | None, step: int) -> list[Change]:
    """What has been changed for the entry of this step: the last change of each key."""
    changes = [] if terms is None else sorted(terms.changes, key=lambda each: each.step)
    return list({each.key: each for each in changes if each.step <= step}.values())


@lru_cache(maxsize=8)
def in_force(run: RunConfig, terms: Terms | None, step: int) -> RunConfig:
    """The run as it stands for the entry of this step: one of strategy `sync`, while strategy `local` warms
    up. Raises ValueError if that is no valid run."""
    changed = _changed(run, due(terms, step))
    if run.strategy != "local" or step >= run.local.warmup_rounds:
        return changed
    return changed.model_copy(
        update={"strategy": "sync", "target_batch_size": run.local.warmup_batch_size},
    )


def _changed(run: RunConfig, changes: list[Change]) -> RunConfig:
    if not changes:
        return run
    document: dict[str, Any] = run.model_dump()
    for change in changes:
        *tables, name = change.key.split(".")
        table = document
        for each in tables:
            table = table[each]
        table[name] = int(change.value) if isinstance(table[name], int) else change.value
    return RunConfig.model_validate(document)


def total_steps(run: RunConfig, terms: Terms | None) -> int:
    """Steps after which the run is over."""
    stop = None if terms is None else terms.stop
    return run.total_steps if stop is None else min(run.total_steps, stop)


def rules_of(run: RunConfig, values: int, encoded_bytes: int) -> Rules:
    """What the machines of this run go by; an entry averages so many values, of so many bytes."""
    warms_up = run.strategy == "local"
    return Rules(
        target_batch_size=run.target_batch_size,
        min_peers=run.min_peers,
        max_peers=run.max_peers,
        values=values,
        encoded_bytes=encoded_bytes,
        heartbeat_seconds=run.heartbeat_seconds,
        silence_seconds=run.silence_seconds,
        silence_most_seconds=run.silence_most_seconds,
        attempt_most_seconds=run.attempt_most_seconds,
        quorum=run.quorum,
        leased=run.data == "leased",
        warmup_rounds=run.local.warmup_rounds if warms_up else 0,
        warmup_batch_size=run.local.warmup_batch_size if warms_up else 0,
    )


def rules_at(rules: Rules, terms: Terms | None, step: int) -> Rules:
    """The rules that hold at this step."""
    if step < rules.warmup_rounds:
        return replace(rules, target_batch_size=rules.warmup_batch_size)
    targets = [int(each.value) for each in due(terms, step) if each.key == "target_batch_size"]
    return replace(rules, target_batch_size=targets[-1]) if targets else rules


def most_samples(rules: Rules, *known: Terms | None) -> int:
    """What a peer can bring, also one that has not heard of a change, or has heard of one that is to come."""
    changes = [each for terms in known if terms is not None for each in terms.changes]
    targets = [int(each.value) for each in changes if each.key == "target_batch_size"]
    return max(rules.most_samples, *(2 * target for target in targets), 0)


def in_words(terms: Terms) -> list[str]:
    """All that they say, for people."""
    said = [f"{each.key} = {each.value:g} from step {each.step:,}" for each in terms.changes]
    said += [] if terms.stop is None else [f"the run is over at step {terms.stop:,}"]
    if terms.paused is not None:
        reason = f" ({terms.paused})" if terms.paused else ""
        said.append(f"training is paused from step {terms.paused_from:,}{reason}")
    return said or ["all is as the run file says"]
