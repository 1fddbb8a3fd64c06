"""The invariants I1, I2, I3 and I5 of the fault matrix, held against what the peers' journals say.

Pure: journals in, sentences out, none if all is well. Not covered: what no journal tells, so what a killed
peer held; and the weight of a lineage whose beginning nobody kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peers.chronicle import Record

Journals = Mapping[str, Sequence[Record]]
"""By peer, all that it wrote in all its lives, oldest first; `joined` begins a life."""


@dataclass
class Audit:
    """What was found."""

    problems: list[str] = field(default_factory=list)
    """A sentence for each time that an invariant was broken."""
    states_compared: int = 0
    """States that more than one peer hashed."""
    rollbacks: int = 0
    rollbacks_weighed: int = 0
    """Of them, those of which the journals tell both weights."""


def audit(journals: Journals, *, forks: bool) -> Audit:
    """`forks`: the swarm may have parted, so that a step may have had several lineages."""
    found = Audit()
    _states(journals, found)
    if not forks:
        _one_lineage(journals, found)
    _steps(journals, found)
    _weights(journals, found)
    _samples(journals, found)
    _finite(journals, found)
    return found


def _told(journals: Journals, event: str) -> list[tuple[str, Record]]:
    return [
        (name, record) for name, records in journals.items() for record in records if record["event"] == event
    ]


def _states(journals: Journals, found: Audit) -> None:
    """I1: what has one name has one content."""
    for event, digest in (("state_hashed", "state_digest"), ("round_committed", "digest")):
        seen: dict[str, tuple[str, str]] = {}
        compared = set()
        for name, record in _told(journals, event):
            known, first = seen.setdefault(record["lineage"], (record[digest], name))
            if first != name:
                compared.add(record["lineage"])
            if known != record[digest]:
                found.problems.append(
                    f"I1: at step {record['step']} and lineage {record['lineage'][:8]} {first} had "
                    f"{digest} {known[:8]} and {name} {record[digest][:8]}"
                )
        if event == "state_hashed":
            found.states_compared = len(compared)
    for name, record in _told(journals, "replica_diverged"):
        found.problems.append(f"I1: {name} was told at step {record['step']} that its state differs")


def _one_lineage(journals: Journals, found: Audit) -> None:
    """I1: a committed step has one lineage."""
    lineages: dict[int, dict[str, str]] = defaultdict(dict)
    for name, record in _told(journals, "round_committed"):
        lineages[record["step"]].setdefault(record["lineage"], name)
    for step, names in sorted(lineages.items()):
        if len(names) > 1:
            who = ", ".join(f"{lineage[:8]} by {name}" for lineage, name in names.items())
            found.problems.append(f"I1: step {step} was committed on {len(names)} lineages: {who}")
            return  # the rest follows from it


def _steps(journals: Journals, found: Audit) -> None:
    """I2: within a life the step goes back only by a rollback that is logged."""
    for name, records in journals.items():
        at, rolled_to = 0, -1
        for record in records:
            match record:
                case {"event": "joined"}:
                    at, rolled_to = 0, -1
                case {"event": "rolled_back", "to_step": to}:
                    rolled_to, found.rollbacks = to, found.rollbacks + 1
                    if record.get("liar") is not None:  # it went back by itself
                        at = to
                case {"event": "caught_up", "to_step": to}:
                    if to < at and to != rolled_to:
                        found.problems.append(
                            f"I2: {name} went from step {at} to {to} and logged no rollback"
                        )
                    at, rolled_to = to, -1
                case {"event": "round_committed", "step": step}:
                    if step < at:
                        found.problems.append(f"I2: {name} committed step {step} when it was at step {at}")
                    at = step + 1


def _weights(journals: Journals, found: Audit) -> None:
    """I2: who rolls back gives up no more samples than there are behind what it takes up."""
    parents: dict[str, str] = {}
    samples: dict[str, int] = {}
    for records in journals.values():
        before: Record | None = None
        for record in records:
            match record["event"]:
                case "round_committed":
                    samples[record["lineage"]] = record["samples"]
                    if before is not None and before["step"] + 1 == record["step"]:
                        parents[record["lineage"]] = before["lineage"]
                    before = record
                case "joined" | "caught_up" | "rolled_back":
                    before = None

    def behind(lineage: str) -> dict[str, int]:
        """Each ancestor, itself first → samples after it."""
        weights, total = {lineage: 0}, 0
        while lineage in parents:
            total += samples[lineage]
            lineage = parents[lineage]
            weights[lineage] = total
        return weights

    for name, records in journals.items():
        last = ""
        for record in records:
            match record:
                case {"event": "joined"}:
                    last = ""
                case {"event": "round_committed", "lineage": lineage}:
                    last = lineage
                case {"event": "rolled_back", "lineage": adopted}:
                    ours, theirs = behind(last), behind(adopted)
                    fork = next((lineage for lineage in ours if lineage in theirs), None)
                    void = record.get("liar") is not None  # what has a proven lie in it has no weight
                    if last and fork is not None and not void:
                        found.rollbacks_weighed += 1
                        if ours[fork] > theirs[fork]:
                            found.problems.append(
                                f"I2: {name} gave up {ours[fork]} samples of lineage {last[:8]} for "
                                f"{theirs[fork]} of {adopted[:8]}"
                            )
                    last = adopted


def _samples(journals: Journals, found: Audit) -> None:
    """I3: an entry's samples are those of its roster, each counted once.

    Who lost all that it had and takes the same step from the same state again tells of the same entry in
    another life, and that entry holds its samples once. Twice in one life is once too often.
    """
    entries: dict[tuple[int, str], list[tuple[str, Record]]] = defaultdict(list)
    for name, records in journals.items():
        of_this_life: set[tuple[int, str]] = set()
        for record in records:
            if record["event"] == "joined":
                of_this_life = set()
            if record["event"] != "round_committed":
                continue
            entry = record["step"], record["lineage"]
            if entry in of_this_life:
                found.problems.append(f"I3: {name} counted its samples of step {record['step']} twice")
            of_this_life.add(entry)
            entries[entry].append((name, record))
    for (step, _), told in entries.items():
        mine = sum(samples for _, samples in {(name, record["mine"]) for name, record in told})
        whole, roster = told[0][1]["samples"], told[0][1]["peers"]
        names = {name for name, _ in told}
        if mine > whole or (len(names) == roster and mine != whole):
            found.problems.append(
                f"I3: {len(names)} of the {roster} peers of step {step} gave {mine} samples; "
                f"{whole} were counted"
            )


def _finite(journals: Journals, found: Audit) -> None:
    """I5: a journal says null for what is not finite; a peer that gave no samples has no loss."""
    for name, record in _told(journals, "round_committed"):
        if record["gradient_norm"] is None or (record["loss"] is None and record["mine"]):
            found.problems.append(
                f"I5: {name} tells of a gradient or loss at step {record['step']} not finite"
            )
    for name, record in _told(journals, "evaluated"):
        if record["loss"] is None:
            found.problems.append(f"I5: the held-out loss of {name} at step {record['step']} was not finite")
