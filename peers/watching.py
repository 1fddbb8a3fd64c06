"""A swarm as one who takes no part sees it: records, answers and events in, one picture out.

`Watch` folds whatever comes in, in any order and from whomever, into what the page shows and what is kept on
disk. It is given the time and reads no clock, so a journal that is replayed gives the picture that there was.
All texts in it came from strangers: they are printable and short, and it is for whoever shows them to escape
them.

A peer's samples count once its round is a few seconds old, and only if the lineage that it tells for the
round is that of most others. What it says of itself is believed beyond that; who lies about its own speed
gains nothing.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

from p2ptrain import PROTOCOL_VERSION, events
from p2ptrain.config import RunConfig, run_digest
from p2ptrain.events import clean, short
from p2ptrain.records import PeerId, Presence, RoundRecord
from p2ptrain.telemetry.feed import Told

MOST_ROUNDS = 10_000
"""That are remembered."""
MOST_PARTS = 40_000
"""Parts of peers in rounds that are remembered: the timeline."""
MOST_PEERS = 1024
MOST_KEPT = 32
"""Members of a round whose parts are kept on disk with it."""
MOST_LINES = 400
"""Of the event log."""
MOST_EVALUATIONS = 4000
SETTLED_SECONDS = 3.0
"""After its last report a round counts."""
GONE_SECONDS = 45.0
"""Without a presence record, which lives for 25 s, a peer is gone."""
FORGET_SECONDS = 3600.0
"""A peer that is gone and gave nothing is forgotten."""
STILL_SECONDS = 30.0
"""Without a step for so long, or for ten usual rounds, nothing moves."""
RATE_SECONDS = 60.0
QUIET = frozenset(
    {
        "round_committed",
        "state_hashed",
        "deadlines_changed",
        "catching_up",
        "previewed",
        "evaluated",
        "copies_averaged",
        "parts_united",
        "samples_wasted",
    }
)
"""Events that are no lines of the log: they are in the charts, or too many."""

Json = dict[str, Any]


@dataclass
class Part:
    """What one peer did in one round; seconds."""

    ended: float
    compute: float
    wait: float
    reduce: float
    apply: float
    mine: int
    lineage: str
    loss: float | None
    samples: int
    peers: int
    seconds: float

    def row(self, step: int, peer: str) -> list[Any]:
        began = self.ended - self.compute - self.wait - self.reduce - self.apply
        shown = [began, self.compute, self.wait, self.reduce, self.apply]
        return [step, peer, *(round(value, 3) for value in shown), self.mine]


@dataclass
class Round:
    """One committed step, as its members told of it."""

    step: int
    parts: dict[str, Part] = field(default_factory=dict)
    reported: float = 0.0
    """When somebody last did."""
    counted: bool = False

    def row(self) -> list[Any] | None:
        """Step, time, samples, peers, loss, seconds: of the lineage that most tell of."""
        parts = self.agreed()
        if not parts:
            return None
        losses = [(part.loss, part.mine) for part in parts if part.loss is not None and part.mine]
        given = sum(mine for _, mine in losses)
        loss = sum(loss * mine for loss, mine in losses) / given if given else None
        first = parts[0]
        return [
            self.step,
            round(max(part.ended for part in parts), 3),
            first.samples,
            first.peers,
            None if loss is None else round(loss, 4),
            round(max(part.seconds for part in parts), 3),
        ]

    def lineage(self) -> str:
        votes = Counter(part.lineage for part in self.parts.values())
        return max(votes, key=lambda lineage: (votes[lineage], lineage), default="")

    def agreed(self) -> list[Part]:
        lineage = self.lineage()
        return [part for part in self.parts.values() if part.lineage == lineage]


@dataclass
class Seen:
    """One peer, as far as it is known."""

    id: str
    name: str = ""
    role: str = "train"
    protocol: int = 0
    fingerprint: str = ""
    step: int = 0
    present: bool = False
    since: float = 0.0
    seen: float = 0.0
    """When its presence was last there."""
    answered: bool = False
    """Whether it answered when it was last asked."""
    why: str = ""
    """Why not."""
    leaving: str = ""
    status: Mapping[str, Any] = field(default_factory=dict)
    paused: tuple[str, ...] = ()
    waiting: str = ""
    samples: int = 0
    """Accepted."""
    rounds: int = 0

    @property
    def state(self) -> str:
        if not self.present:
            return "left" if self.leaving else "gone"
        if self.role != "train":
            return self.role
        if self.paused:
            return "paused"
        state = str(self.status.get("state", ""))
        return state if state else "unknown"

    def to_dict(self) -> Json:
        status = self.status
        return {
            "id": self.id,
            "short": short(PeerId(self.id)),
            "name": self.name,
            "role": self.role,
            "state": self.state,
            "pauses": list(self.paused),
            "waiting": self.waiting,
            "step": self.step,
            "samples": self.samples,
            "rounds": self.rounds,
            "protocol": self.protocol,
            "version": status.get("version", ""),
            "device": status.get("device", ""),
            "hidden": status.get("hidden"),
            "direct": status.get("direct"),
            "relay": status.get("relay"),
            "speed": _rounded(status.get("samples_per_second")),
            "up": _rounded(status.get("sent_bytes_per_second")),
            "down": _rounded(status.get("received_bytes_per_second")),
            "since": round(self.since),
            "answered": self.answered,
            "why": self.why,
        }


def _rounded(value: object) -> float | None:
    return float(f"{value:.3g}") if isinstance(value, int | float) else None


@dataclass(frozen=True)
class Incident:
    """Something that somebody should look at, and what to do about it."""

    key: str
    level: str
    """`warning` or `error`."""
    what: str
    remedy: str
    peer: str = ""
    since: float = 0.0

    def to_dict(self) -> Json:
        return {**vars(self), "since": round(self.since)}


class Watch:
    """The picture of one swarm."""

    def __init__(self) -> None:
        self.run: RunConfig | None = None
        self.sees_bootstraps = True
        """Whether their records are shown to whoever looks for us."""
        self.away = False
        """Whether nobody has looked who is there since it was last of interest."""
        self.peers: dict[str, Seen] = {}
        self.rounds: dict[int, Round] = {}
        self.rows: dict[int, list[Any]] = {}
        """Step → summary, ascending; of settled rounds and those under way."""
        self.evaluations: deque[list[Any]] = deque(maxlen=MOST_EVALUATIONS)
        """[step, time, loss, bits per byte, bits per byte of zlib]."""
        self.log: deque[Json] = deque(maxlen=MOST_LINES)
        self.aborts: deque[list[Any]] = deque(maxlen=2000)
        """[began, step, peer, cause, seconds]."""
        self.samples: deque[Json] = deque(maxlen=200)
        """What the model wrote."""
        self.step = 0
        self.last_commit = 0.0
        self.last_checkpoint = 0.0
        self.joined = self.left = self.lost = 0
        self.total_samples = 0
        self.rounds_seen = 0
        self.kept: list[Json] = []
        """What is to be written to disk; whoever does empties it."""
        self._parts = 0
        self._began: float | None = None
        self._lines = 0
        self._notes: dict[str, Incident] = {}
        self._raised: dict[str, float] = {}
        self._dirty: set[int] = set()
        self._told_peers: dict[str, Json] = {}
        self._told: dict[str, Any] = {}
        self._fresh: dict[str, list[Any]] = {"log": [], "aborts": [], "evaluations": [], "samples": []}

    # -- in --------------------------------------------------------------------------------------------------

    def present(self, records: Iterable[Presence], rounds: Iterable[RoundRecord], now: float) -> None:
        """Who is there now, by their signed records."""
        self.away = False
        self._began = now if self._began is None else self._began
        for record in islice(records, MOST_PEERS):
            if record.role == "monitor":
                continue
            peer = self._peer(record.peer, now)
            if peer is None:
                continue
            if not peer.present:
                peer.present, peer.since, peer.leaving = True, now, ""
                if record.role == "train":
                    self.joined += 1
            peer.name = clean(record.name, 64)
            peer.role, peer.protocol, peer.fingerprint = record.role, record.protocol, record.fingerprint
            peer.seen = now
            if record.position is not None:
                peer.step = max(record.position.step, peer.step if record.role == "train" else 0)
        for told in rounds:
            if told.position.step > self.step:
                self.step = told.position.step
        for peer in list(self.peers.values()):
            if peer.present and now - peer.seen > GONE_SECONDS:
                self._went(peer, now)
            if not peer.present and not peer.samples and now - peer.seen > FORGET_SECONDS:
                del self.peers[peer.id]

    def look_away(self) -> None:
        """Until the next look nobody knows who is there: who leaves meanwhile is not gone without a word."""
        self.away = True
        for peer in self.peers.values():
            peer.present = peer.answered = False

    def told(self, peer: PeerId, told: Told, now: float) -> None:
        """A peer answered."""
        seen = self._peer(peer, now)
        if seen is None:
            return
        seen.answered, seen.why, seen.status = True, "", told.status
        seen.step = told.status.get("step", seen.step)
        seen.waiting = told.status.get("waiting", seen.waiting)
        seen.paused = tuple(told.status.get("pauses", ()))
        for at, event in told.events:
            self.event(peer, min(at, now), event)

    def failed(self, peer: PeerId, why: str, now: float) -> None:
        """A peer did not answer."""
        seen = self._peer(peer, now)
        if seen is not None:
            seen.answered, seen.why = False, clean(why)

    def event(self, peer: PeerId, at: float, event: events.Event) -> None:
        """Something happened to a peer then. A replayed journal tells it by this alone."""
        seen = self._peer(peer, at)
        if seen is None:
            return
        match event:
            case events.RoundCommitted():
                self._committed(peer, at, event)
            case events.RoundAborted(step=step, cause=cause, seconds=seconds):
                self._add(
                    "aborts",
                    self.aborts,
                    [round(at - seconds, 3), step, peer, cause.value, round(seconds, 3)],
                )
            case events.Evaluated(step=step, loss=loss, bits_per_byte=bits, zlib_bits_per_byte=zlib):
                if math.isfinite(loss) and (not self.evaluations or self.evaluations[-1][0] < step):
                    row = [step, round(at, 3), round(loss, 4), _figure(bits), _figure(zlib)]
                    self._add("evaluations", self.evaluations, row)
                    self.kept.append({"kind": "evaluation", "row": row})
            case events.Previewed(step=step, text=text):
                if not self.samples or self.samples[-1]["step"] < step:
                    sample = {"step": step, "time": round(at, 3), "peer": peer, "text": _lines(text)}
                    self._add("samples", self.samples, sample)
                    self.kept.append({"kind": "sample", "sample": sample})
            case events.Joined(name=name):
                seen.name = seen.name or clean(name, 64)
                seen.leaving = ""
            case events.Leaving(reason=reason):
                seen.leaving = clean(reason)
            case events.Paused(reasons=reasons):
                seen.paused = tuple(events.paused_because(reason) for reason in reasons)
            case events.Resumed():
                seen.paused = ()
            case events.WaitingChanged(reason=reason):
                seen.waiting = clean(reason)
            case events.CheckpointSaved():
                self.last_checkpoint = max(self.last_checkpoint, at)
            case _:
                self._noted(peer, at, event)
        replayed = isinstance(event, events.CaughtUp) and event.how is events.CatchUpBy.LOG
        if event.level >= logging.INFO and event.event not in QUIET and not replayed:
            self._line(peer, at, event.level, event.event, event.sentence())

    def restore(self, record: Mapping[str, Any]) -> None:
        """Take in what `kept` held once. Raises KeyError, TypeError or ValueError for what never did."""
        match record["kind"]:
            case "round":
                step, at, samples, *_ = row = list(record["row"])
                self._set_row(int(step), row)
                self.total_samples += int(samples)
                self.rounds_seen += 1
                for peer, mine in dict(record["by"]).items():
                    seen = self.peers.setdefault(peer, Seen(peer))
                    seen.samples, seen.rounds = seen.samples + int(mine), seen.rounds + 1
                self.last_commit, self.step = max(self.last_commit, float(at)), max(self.step, int(step) + 1)
            case "evaluation":
                self.evaluations.append(list(record["row"]))
            case "sample":
                self.samples.append(dict(record["sample"]))
            case "line":
                self._lines += 1
                self.log.append({**record["line"], "number": self._lines})
            case "totals":
                self.total_samples, self.rounds_seen = int(record["samples"]), int(record["rounds"])
                for peer, (name, samples, rounds) in dict(record["peers"]).items():
                    seen = self.peers.setdefault(peer, Seen(peer))
                    seen.name, seen.samples, seen.rounds = str(name), int(samples), int(rounds)

    def totals(self) -> Json:
        """What each peer has given, to be kept on disk now and then."""
        given = sorted((each for each in self.peers.values() if each.samples), key=lambda each: -each.samples)
        return {
            "kind": "totals",
            "samples": self.total_samples,
            "rounds": self.rounds_seen,
            "peers": {each.id: [each.name, each.samples, each.rounds] for each in given[:512]},
        }

    # -- out -------------------------------------------------------------------------------------------------

    def snapshot(self, now: float) -> Json:
        """All of the picture."""
        return {
            "all": True,
            "now": round(now, 3),
            "run": self._run_facts(now),
            "peers": {peer: seen.to_dict() for peer, seen in self.peers.items()},
            "rounds": list(self.rows.values()),
            "parts": [row for step in list(self.rounds)[-200:] for row in self._part_rows(self.rounds[step])][
                -12_000:
            ],
            "aborts": list(self.aborts)[-500:],
            "evaluations": list(self.evaluations),
            "samples": list(self.samples),
            "log": list(self.log),
            "incidents": [each.to_dict() for each in self.incidents(now)],
        }

    def changes(self, now: float) -> Json | None:
        """What has changed since the last call; None if nothing has."""
        self.settle(now)
        changed: Json = {name: rows for name, rows in self._fresh.items() if rows}
        self._fresh = {name: [] for name in self._fresh}
        steps, self._dirty = sorted(self._dirty), set()
        if rows := [self.rows[step] for step in steps if step in self.rows]:
            changed["rounds"] = rows
        if parts := [
            row for step in steps if step in self.rounds for row in self._part_rows(self.rounds[step])
        ]:
            changed["parts"] = parts[-4000:]
        peers = {peer: seen.to_dict() for peer, seen in self.peers.items()}
        fresh = {peer: facts for peer, facts in peers.items() if self._told_peers.get(peer) != facts}
        if gone := [peer for peer in self._told_peers if peer not in peers]:
            changed["forgotten"] = gone
        if fresh:
            changed["peers"] = fresh
        self._told_peers = peers
        for name, value in (
            ("run", self._run_facts(now)),
            ("incidents", [each.to_dict() for each in self.incidents(now)]),
        ):
            if self._told.get(name) != value:
                changed[name] = self._told[name] = value
        return {"now": round(now, 3), **changed} if changed else None

    def timeline(self, until: int, count: int) -> list[list[Any]]:
        """Parts of at most `count` rounds up to that step."""
        steps = [step for step in self.rounds if step <= until][-count:]
        return [row for step in steps for row in self._part_rows(self.rounds[step])]

    def settle(self, now: float) -> None:
        """Count the rounds that nobody will tell more about."""
        for one in list(self.rounds.values())[-256:]:
            if not one.counted and now - one.reported >= SETTLED_SECONDS:
                self._settle(one)

    @property
    def training(self) -> list[Seen]:
        """Peers that are there to train."""
        return [each for each in self.peers.values() if each.present and each.role == "train"]

    def rate(self, now: float) -> tuple[float, float]:
        """Samples and steps per second in the last minute; of one step, there is no rate."""
        recent = [row for row in islice(reversed(self.rows.values()), 2000) if now - row[1] <= RATE_SECONDS]
        if len(recent) < 2:
            return 0.0, 0.0
        span = max(now, recent[0][1]) - recent[-1][1]
        if span <= 0:
            return 0.0, 0.0
        return sum(row[2] for row in recent[:-1]) / span, (len(recent) - 1) / span

    def round_seconds(self) -> float:
        """Between two steps, usually; 0 if nobody knows."""
        times = sorted(row[1] for row in islice(reversed(self.rows.values()), 20))
        gaps = sorted(after - before for before, after in pairwise(times))
        return float(gaps[len(gaps) // 2]) if gaps else 0.0

    def lineages(self) -> int:
        """Lineages that peers tell of for the newest step that two of them told about; 1 if all agree."""
        for one in islice(reversed(self.rounds.values()), 64):
            if len(one.parts) > 1:
                return len({part.lineage for part in one.parts.values()})
        return 1

    def phase(self, now: float) -> tuple[str, str]:
        """What the run is doing, and why, in words."""
        if self.run is not None and self.step >= self.run.total_steps:
            return "complete", "all steps are done"
        training = self.training
        if self.away:
            return "looking", "who is there"
        if not training:
            return "empty", "nobody trains"
        if all(each.state == "paused" for each in training):
            return "paused", "all peers are paused"
        if self._stands_still(now):
            waits = Counter(each.waiting for each in training if each.waiting)
            return "waiting", waits.most_common(1)[0][0] if waits else "no step for a while"
        return "training", ""

    def incidents(self, now: float) -> list[Incident]:
        """What is wrong now, the gravest first."""
        found = {} if self.away else {each.key: each for each in self._wrong(now)}
        for key in list(self._raised):
            if key not in found:
                del self._raised[key]
        recent = {key: note for key, note in self._notes.items() if now - note.since < 600}
        self._notes = recent
        dated = [
            Incident(**{**vars(each), "since": self._raised.setdefault(each.key, now)})
            for each in found.values()
        ]
        return sorted([*dated, *recent.values()], key=lambda each: (each.level != "error", -each.since))[:50]

    # -- inside ----------------------------------------------------------------------------------------------

    def _peer(self, peer: PeerId, now: float) -> Seen | None:
        if peer not in self.peers:
            if len(self.peers) >= MOST_PEERS:
                return None
            self.peers[peer] = Seen(peer, since=now, seen=now)
        return self.peers[peer]

    def _went(self, peer: Seen, now: float) -> None:
        peer.present = peer.answered = False
        if peer.role != "train":
            return
        if peer.leaving:
            self.left += 1
        else:
            self.lost += 1
            self._line(PeerId(peer.id), now, logging.WARNING, "lost", "gone without a word")

    def _committed(self, peer: PeerId, at: float, event: events.RoundCommitted) -> None:
        one = self.rounds.get(event.step)
        if one is None:
            if self.rounds and event.step < next(reversed(self.rounds)) - 256:
                return  # long past
            # One that was kept on disk has been counted before.
            one = self.rounds[event.step] = Round(event.step, counted=event.step in self.rows)
            if len(self.rounds) > 1 and list(islice(reversed(self.rounds), 2))[1] > event.step:
                self.rounds = dict(sorted(self.rounds.items()))
        self._parts += peer not in one.parts
        compute = min(event.compute_seconds, event.accumulate_seconds)
        one.parts[peer] = Part(
            ended=at,
            compute=compute,
            wait=event.accumulate_seconds - compute,
            reduce=event.reduce_seconds,
            apply=event.commit_seconds + event.apply_seconds,
            mine=event.mine,
            lineage=event.lineage,
            loss=event.loss if event.loss is not None and math.isfinite(event.loss) else None,
            samples=event.samples,
            peers=event.peers,
            seconds=event.seconds,
        )
        one.reported = at
        self._dirty.add(event.step)
        if not one.counted and (row := one.row()) is not None:
            self._set_row(event.step, row)
        self.step = max(self.step, event.step + 1)
        self.last_commit = max(self.last_commit, at)
        while self._parts > MOST_PARTS or len(self.rounds) > MOST_ROUNDS:
            self._settle(oldest := self.rounds[next(iter(self.rounds))])
            self._parts -= len(oldest.parts)
            del self.rounds[oldest.step]

    def _set_row(self, step: int, row: list[Any]) -> None:
        newest = next(reversed(self.rows), -1)
        self.rows[step] = row
        if step < newest:
            self.rows = dict(sorted(self.rows.items()))
        while len(self.rows) > MOST_ROUNDS:
            del self.rows[next(iter(self.rows))]

    def _settle(self, one: Round) -> None:
        if one.counted:
            return
        one.counted = True
        lineage, row = one.lineage(), one.row()
        by = {peer: part.mine for peer, part in one.parts.items() if part.lineage == lineage}
        for peer, mine in by.items():
            if peer in self.peers:
                self.peers[peer].samples += mine
                self.peers[peer].rounds += 1
        if row is not None:
            self.total_samples += row[2]
            self.rounds_seen += 1
            kept = by if len(by) <= MOST_KEPT else {}  # the totals tell, now and then
            self.kept.append({"kind": "round", "row": row, "by": kept})

    def _part_rows(self, one: Round) -> list[list[Any]]:
        return [part.row(one.step, peer) for peer, part in one.parts.items()]

    def _add(self, name: str, kept: deque[Any], row: Any) -> None:
        kept.append(row)
        self._fresh[name].append(row)
        del self._fresh[name][:-MOST_LINES]

    def _line(self, peer: PeerId, at: float, level: int, event: str, text: str) -> None:
        self._lines += 1
        word = "error" if level >= logging.ERROR else "warning" if level >= logging.WARNING else "info"
        line = {
            "number": self._lines,
            "time": round(at, 3),
            "peer": peer,
            "level": word,
            "event": event,
            "text": clean(text, 300),
        }
        self._add("log", self.log, line)
        self.kept.append({"kind": "line", "line": line})

    def _noted(self, peer: PeerId, at: float, event: events.Event) -> None:
        """What is over as soon as it is told, and worth a look for a while."""
        who = self._named(peer)
        match event:
            case events.ReplicaDiverged():
                what = f"{who} had other parameters than the swarm at one lineage, and fetched the swarm's"
                remedy = "once: look at that machine's memory; often: take it out and report a bug"
            case events.RolledBack():
                what = f"{who} rolled back: the swarm had parted, and the other side had more samples"
                remedy = 'look at its network; quorum = "majority" in the run file lets the smaller side wait'
            case events.PeerStoodOut(peer=other):
                what = f"the gradients of {self._named(other)} are unlike the others', says {who}"
                remedy = "look at its data and machine; revoke its invite if it means harm"
            case events.PeerBenched(peer=other):
                what = f"{self._named(other)} broke the contract several times, says {who}"
                remedy = "compare versions of p2ptrain; revoke its invite if it means harm"
            case events.CheckpointFailed():
                what = f"{who} could not save a checkpoint"
                remedy = "look at the free space of its disk, and into its log"
            case events.DaemonRestarted():
                what = f"the libp2p daemon of {who} died and was started again"
                remedy = "once is no harm; often: look at that machine's memory"
            case _:
                return
        note = Incident(f"{event.event}-{peer}", "warning", what, remedy, peer, at)
        self._notes[note.key] = note

    def _named(self, peer: PeerId) -> str:
        seen = self.peers.get(peer)
        return f"{seen.name} ({short(peer)})" if seen is not None and seen.name else short(peer)

    def _stands_still(self, now: float) -> bool:
        last = max(self.last_commit, self._began or 0.0)
        return bool(last) and now - last > max(STILL_SECONDS, 10 * self.round_seconds())

    def _wrong(self, now: float) -> Iterable[Incident]:
        training, run = self.training, self.run
        if run is not None and self.step < run.total_steps:
            if training and self._stands_still(now):
                yield Incident("still", "error", "no step for a while", self._phase_remedy(now))
            if len(training) < run.min_peers:
                what = (
                    f"{len(training)} peers are there, and no step is taken with fewer than {run.min_peers}"
                )
                yield Incident(
                    "few", "error", what, "invite more peers, or open a run with a lower min_peers"
                )
        if self.lineages() > 1:
            yield Incident(
                "apart",
                "error",
                "peers tell of different lineages for one step: the swarm has parted",
                "look at the network between them; once they meet, the side with fewer samples rolls back",
            )
        if (
            self.sees_bootstraps
            and self._began is not None
            and not any(each.present for each in self.peers.values() if each.role == "bootstrap")
        ):
            yield Incident(
                "bootstrap",
                "warning",
                "no bootstrap peer is there; the swarm goes on, and newcomers may not find it",
                "start `p2ptrain bootstrap` again with the same data folder",
            )
        if training and self.rows and all(row[4] is None for row in islice(reversed(self.rows.values()), 5)):
            yield Incident("loss", "warning", "no finite loss in the last rounds", "lower the learning rate")
        prints = Counter(each.fingerprint for each in training)
        usual = max(prints, key=lambda each: prints[each], default="")
        for each in training:
            who = self._named(PeerId(each.id))
            if each.protocol and each.protocol != PROTOCOL_VERSION:
                what = f"{who} speaks protocol {each.protocol}, this monitor {PROTOCOL_VERSION}"
                yield Incident(f"protocol-{each.id}", "warning", what, "upgrade the older side", each.id)
            elif each.fingerprint != usual:
                what = f"{who} trains another run of that name, and meets nobody here"
                yield Incident(
                    f"run-{each.id}", "warning", what, "have it join with this run's invite", each.id
                )
            elif not each.answered and each.why and now - each.since > 30:
                what = f"{who} does not answer: {each.why}"
                yield Incident(f"silent-{each.id}", "warning", what, "look into its log", each.id)
            if each.status.get("hidden") and not each.status.get("direct") and not each.status.get("relay"):
                what = f"{who} is behind NAT and connected to nobody"
                remedy = "set relay_for on a peer that others can reach, or forward its port"
                yield Incident(f"hidden-{each.id}", "warning", what, remedy, each.id)

    def _phase_remedy(self, now: float) -> str:
        _, why = self.phase(now)
        return f"{why}: look at the peers' states and logs" if why else "look at the peers' states and logs"

    def _run_facts(self, now: float) -> Json:
        run = self.run
        phase, why = self.phase(now)
        samples, steps = self.rate(now)
        tokens = run.task.tokens_per_sample if run is not None else 0
        left = None if run is None else max(run.total_steps - self.step, 0)
        return {
            "id": "" if run is None else run.run_id,
            "digest": "" if run is None else run_digest(run)[:12],
            "phase": phase,
            "why": clean(why),
            "step": self.step,
            "total_steps": 0 if run is None else run.total_steps,
            "min_peers": 0 if run is None else run.min_peers,
            "target_batch_size": 0 if run is None else run.target_batch_size,
            "codec": "" if run is None else run.codec,
            "sample_tokens": tokens,
            "samples_per_second": round(samples, 1),
            "tokens_per_second": round(samples * tokens),
            "samples": self.total_samples,
            "training": len(self.training),
            "last_commit": round(self.last_commit, 1),
            "eta_seconds": round(left / steps) if left and steps else None,
        }


def _figure(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


def _lines(text: str) -> str:
    """A model's text: printable, its lines kept."""
    return "\n".join(clean(line.expandtabs(4), 200) for line in text.split("\n")[:40])
