"""State transfer, the joiner's side: how a peer gets to where the swarm is, in the way of nobody.

A peer that missed a few rounds replays the entries it missed. One that missed more, or whose lineage was
outweighed, takes a snapshot in hash-checked pieces from several donors at once, and then replays. A donor
that dies, is silent or sends something wrong is left alone for a while, and the others are asked instead. The
decisions are in `joining`; what donors do is in `donor`.

Not covered: proof that a snapshot belongs to the lineage that its donors claim for it; a donor that makes up
a whole entry, header and all, is found out only where its log does not lead to the claimed position.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from p2ptrain.errors import BadMessage, PeerFault, Refused, Unreachable
from p2ptrain.events import CatchUpBy
from p2ptrain.gradients.codecs import Codec
from p2ptrain.protocol.estimate import Estimate
from p2ptrain.protocol.lineage import heavier
from p2ptrain.records import (
    Ballot,
    EntryHeader,
    EntryReply,
    GetEntry,
    GetLineage,
    GetManifest,
    GetPiece,
    Later,
    Lineage,
    Manifest,
    Milestone,
    PeerId,
    Piece,
    Position,
    Presence,
    Reply,
    Request,
)
from p2ptrain.replica.donor import QUEUE_SECONDS, REACH_SECONDS, Compute
from p2ptrain.replica.joining import (
    LIAR_SECONDS,
    MAX_DONORS,
    SILENT_SECONDS,
    Bench,
    Elected,
    Errands,
    Pace,
    Progress,
    attested,
    common_step,
    elect,
    replay_pays,
    spread,
)
from p2ptrain.replica.log import Entry, EntryLog, verify_entry
from p2ptrain.replica.partial import Partial
from p2ptrain.replica.replica import Replica
from p2ptrain.replica.snapshot import Assembly, Snapshot
from p2ptrain.swarm.port import Swarm

ENTRIES_AT_ONCE = 4
ANSWER_DIALS = 5
"""An answer must begin within so many times what a peer is given to answer a dial."""
PACKING_SECONDS = 15.0
"""For a donor to copy and hash its state."""
FIRST_BYTES_PER_SECOND = 256 * 1024
"""Taken for the pace of a donor while nothing was measured."""
GRACE_SECONDS = 2.0
"""Once one donor has offered a snapshot, the others have so long to offer theirs."""
EXTRA_STEPS = (0, 4, 16, 64)
"""Added to the step that donors propose, try by try: the swarm may be faster than it seemed."""


class Lie(Protocol):
    """An attempt of which it is proven that a reducer lied in it: `auditing.Convicted` is one."""

    @property
    def step(self) -> int: ...

    @property
    def parent(self) -> str: ...

    @property
    def ballot(self) -> Ballot: ...


@dataclass(frozen=True)
class Arrival:
    """How a catch-up went."""

    how: CatchUpBy
    given_up: int | None
    """If this peer's log led elsewhere than the donor's: the samples behind its own entries since they
    parted."""
    received_bytes: int
    donors: int
    """How many gave something."""
    resumed_bytes: int
    """Of the snapshot, what an interrupted download had left on disk."""


class CatchUp:
    """Brings `replica` and `log` to where a donor stands. Remembers from one time to the next which donors
    failed."""

    def __init__(
        self,
        swarm: Swarm,
        replica: Replica,
        log: EntryLog,
        codec: Codec,
        compute: Compute,
        aside: Compute,
        partial: Partial,
        watch: Callable[[Progress], None] = lambda _: None,
        on_fault: Callable[[PeerId, PeerFault], None] = lambda *_: None,
        lies: Sequence[Lie] = (),
        on_lie: Callable[[PeerId], None] = lambda _: None,
    ) -> None:
        """`compute` runs a function on the one thread that owns the replica's tensors, `aside` on others.
        `on_fault` is told which donor failed, and how. `lies`: a log with one of these in it is void, and
        `on_lie` is told whose is."""
        self._swarm, self._replica, self._log, self._codec = swarm, replica, log, codec
        self._compute, self._aside, self._partial = compute, aside, partial
        self._watch, self._on_fault = watch, on_fault
        self._lies, self._on_lie = lies, on_lie
        self._snapshot_bytes = replica.max_state_bytes
        self._bench = Bench()
        self._seconds_per_byte = Estimate(first=1 / FIRST_BYTES_PER_SECOND)
        self._received = self._resumed = 0
        self._gave: set[PeerId] = set()
        self._forked = False
        self._void = False
        self._misled_by: frozenset[PeerId] = frozenset()
        """Who gave the last snapshot."""

    async def from_donor(
        self,
        donor: PeerId,
        claimed: Position,
        others: Mapping[PeerId, Position],
        *,
        afresh: bool,
        void: bool = False,
    ) -> Arrival:
        """Replay the donor's entries up to `claimed`, after a snapshot where replay alone does not lead there
        or costs more. What `donor` gives, the `others` may give as well; where they stand may be old news.

        `afresh`: what is here is damaged, so take a snapshot in any case. `void`: so is what is here, and
        whatever state is not will do. Raises PeerFault if nobody helped.
        """
        self._void = void
        self._received, self._resumed, self._forked = 0, 0, False
        self._gave.clear()
        here, me = self._replica.position, self._swarm.peer_id
        ahead = {each for each, at in others.items() if void or heavier(at, here)} - {donor, me}
        alike = others.keys() - ahead - {donor, me}
        donors = [donor, *spread(me, ahead), *spread(me, alike)]
        # If all have failed lately they are asked again: to give up at once would make this peer go on alone.
        donors = (self._bench.without(donors, self._now()) or [donor])[:MAX_DONORS]
        # Entries that follow on a sound state have no lie before it.
        donors = await self._sound(donors, [lie for lie in self._lies if lie.step >= here.step])
        donor = donor if donor in donors else donors[0]
        if not afresh and not void and await self._replay(donors, donor, claimed, or_snapshot=True):
            return self._arrival(CatchUpBy.LOG, None)
        parted = not void and (self._forked or await self._parted(donor, claimed))
        given_up = await self._given_up(donor, claimed) if parted else None
        donors = await self._sound(donors, self._lies)
        donor = donor if donor in donors else donors[0]
        await self._load_snapshot(donors, donor, claimed, afresh)
        await self._replay(donors, donor, claimed, or_snapshot=False)
        return self._arrival(CatchUpBy.SNAPSHOT, given_up)

    async def _sound(self, donors: Sequence[PeerId], lies: Sequence[Lie]) -> list[PeerId]:
        """Those of the donors whose logs have none of these lies in them. Raises Refused if none is left."""
        lying = await asyncio.gather(*(self._stands_on_one(donor, lies) for donor in donors))
        sound = [donor for donor, lies in zip(donors, lying, strict=True) if not lies]
        if not sound:
            raise Refused("whoever could help has a log with a proven lie in it")
        return sound

    async def _stands_on_one(self, donor: PeerId, lies: Sequence[Lie]) -> bool:
        """Whether an entry of the donor's log is proven to be a lie. If so it is told, and may go back."""
        for lie in lies:
            try:
                reply, _ = await self._request(donor, GetEntry(step=lie.step, with_payload=False))
            except PeerFault:
                continue  # its log may not reach back so far; if it is gone, that will be seen
            if isinstance(reply, EntryReply):
                header = reply.header
                if (header.parent, header.ballot) == (lie.parent, lie.ballot):
                    self._on_lie(donor)
                    return True
        return False

    def was_misled(self) -> None:
        """The state that the last snapshot led to is not the swarm's: who gave it is not asked again soon."""
        misled, self._misled_by = self._misled_by, frozenset()
        for donor in sorted(misled):
            self._failed(donor, BadMessage(f"{donor[-8:]} gave a snapshot that is not the swarm's state"))

    def _arrival(self, how: CatchUpBy, given_up: int | None) -> Arrival:
        return Arrival(how, given_up, self._received, len(self._gave), self._resumed)

    # -- replay ----------------------------------------------------------------------------------------------

    async def _replay(
        self, donors: Sequence[PeerId], donor: PeerId, claimed: Position, *, or_snapshot: bool
    ) -> bool:
        """Apply the entries from here to `claimed`. False if they do not lead on from here, or if a snapshot
        costs less and that is allowed."""
        first, now = self._replica.position.step, self._now()
        pace, received = Pace(now), self._received
        strangers: set[PeerId] = set()
        """Donors whose entries do not follow our lineage."""
        fetching: dict[int, asyncio.Task[tuple[PeerId, Entry]]] = {}
        try:
            while (position := self._replica.position).step < claimed.step:
                for step in range(position.step, min(position.step + ENTRIES_AT_ONCE, claimed.step)):
                    if step not in fetching:
                        willing = [each for each in donors if each not in strangers]
                        fetching[step] = asyncio.create_task(
                            self._entry_of(willing, step), name=f"entry {step}"
                        )
                giver, entry = await fetching.pop(position.step)
                if entry.header.parent != position.lineage:
                    if giver == donor:
                        self._forked = True
                        return False
                    strangers.add(giver)
                    continue
                await self._compute(self._replica.apply, entry)
                self._log.append(entry)
                pace.add(len(entry.payload), now := self._now())
                done, left = position.step + 1 - first, claimed.step - position.step - 1
                size, rate = len(entry.payload), pace.bytes_per_second(now)
                came = self._received - received
                self._watch(
                    Progress("entries", done, done + left, came, came + left * size, rate, len(self._gave))
                )
                pays = done <= ENTRIES_AT_ONCE or replay_pays(left, size, self._snapshot_bytes, rate)
                if or_snapshot and not pays:
                    return False
        except Refused:
            return False
        finally:
            await _stop(fetching.values())
        if position.lineage == claimed.lineage or not heavier(claimed, position):
            return True
        self._forked = True  # it has more behind it without more steps than here: another log
        return False

    async def _entry_of(self, donors: Sequence[PeerId], step: int) -> tuple[PeerId, Entry]:
        """Entry `step` from the first of the donors that has it whole. Raises the last one's fault."""
        last: PeerFault = Unreachable(f"no donor is left for entry {step}")
        for donor in self._bench.without(donors, self._now()) or donors:
            try:
                entry = Entry(*await self._entry(donor, step))
                verify_entry(entry, self._codec, self._replica.run.chunk_values, self._replica.values)
            except Refused as fault:
                last = fault  # its log may be shorter than another's
            except PeerFault as fault:
                last = fault
                self._failed(donor, fault)
            else:
                self._gave.add(donor)
                return donor, entry
        raise last

    async def _entry(self, donor: PeerId, step: int) -> tuple[EntryHeader, bytes]:
        values = self._replica.values
        expected_bytes, max_bytes = self._codec.encoded_bytes(values), 4 * values + 2**20
        reply, payload = await self._request(donor, GetEntry(step=step), expected_bytes, max_bytes=max_bytes)
        if not isinstance(reply, EntryReply) or reply.header.step != step:
            raise BadMessage(f"{donor[-8:]} answered a request for entry {step} with {reply.kind}")
        self._received += len(payload)
        return reply.header, payload

    async def _parted(self, donor: PeerId, claimed: Position) -> bool:
        """Whether the donor's log is known to have gone another way than this one."""
        step = min(self._replica.position.step, claimed.step)
        mine, theirs = self._log.lineage_at(step), await self._lineage(donor, step, claimed)
        return None not in (mine, theirs) and mine != theirs

    async def _lineage(self, donor: PeerId, step: int, claimed: Position) -> str | None:
        """Which lineage the donor had at that step; None if it does not know."""
        if step == claimed.step:
            return claimed.lineage
        reply, _ = await self._request(donor, GetLineage(step=step))
        if not isinstance(reply, Lineage):
            raise BadMessage(
                f"{donor[-8:]} answered a request for the lineage of step {step} with {reply.kind}"
            )
        return reply.lineage

    async def _given_up(self, donor: PeerId, claimed: Position) -> int:
        """The samples of the own entries that the donor's log does not have, as far as both logs reach
        back."""
        low, high = self._log.oldest or 0, self._log.step
        while low < high:
            middle = (low + high) // 2
            theirs = await self._lineage(donor, middle, claimed)
            # So old that the donor does not know it: taken for common.
            same = theirs == self._log.lineage_at(middle) if theirs is not None else middle < claimed.step
            low, high = (middle + 1, high) if same else (low, middle)
        own = (self._log.get(step) for step in range(max(low - 1, 0), self._log.step))
        return sum(entry.header.total_samples for entry in own if entry is not None)

    # -- the snapshot ----------------------------------------------------------------------------------------

    async def _load_snapshot(
        self, donors: Sequence[PeerId], donor: PeerId, claimed: Position, afresh: bool
    ) -> None:
        elected = await self._elected(donors, donor, claimed, afresh)
        for liar in elected.outvoted:
            more = f"{len(elected.donors)} of {len(elected.donors) + len(elected.outvoted)} donors"
            fault = f"its snapshot of step {elected.manifest.position.step} is not the one that {more} have"
            self._failed(liar, BadMessage(f"{liar[-8:]}: {fault}"))
        snapshot = await self._download(elected)
        # Records that were not out yet when the donors were asked may be by now.
        if not _is_attested(elected.manifest, await self._said()):
            await self._aside(self._partial.clear)
            for liar in elected.donors:
                self._failed(liar, _unlike_the_records(liar, elected.manifest))
            raise _unlike_the_records(elected.donors[0], elected.manifest)
        await self._compute(self._replica.load_state, snapshot)
        self._misled_by = frozenset(elected.donors)
        self._log.restart(snapshot.position)
        await self._aside(self._partial.clear)

    async def _elected(
        self, donors: Sequence[PeerId], donor: PeerId, claimed: Position, afresh: bool
    ) -> Elected:
        """The snapshot that as many donors as possible have: they are asked for one at the same step."""
        begun: Manifest | None = await self._aside(self._partial.manifest)
        here = self._replica.position
        if begun is not None and (self._void or not heavier(begun.position, here)):
            begun = None
        fresh = here.weight == 0 or self._void
        step, exactly = begun.position.step if begun is not None else claimed.step, False
        best: Elected | None = None
        for extra in EXTRA_STEPS:
            offers, proposed, last = await self._offers(donors, step, exactly, afresh)
            said = await self._said()
            for liar in [each for each, offer in offers.items() if not _is_attested(offer, said)]:
                last = _unlike_the_records(liar, offers.pop(liar))
                self._failed(liar, last)
            elected = elect(offers, donor, fresh=fresh, begun=begun)
            if elected is not None and (best is None or len(elected.donors) > len(best.donors)):
                best = elected
            if best is not None and (best.manifest == begun or len(best.donors) > len(proposed)):
                break
            if not proposed:
                break
            step, exactly = common_step(proposed, extra), True
        if best is None:
            raise last or Unreachable(f"none of {len(donors)} donors could have a snapshot ready in time")
        return best

    async def _offers(
        self, donors: Sequence[PeerId], step: int, exactly: bool, afresh: bool
    ) -> tuple[dict[PeerId, Manifest], list[int], PeerFault | None]:
        """What each donor would give, the steps that others propose, and why the last one failed, if one
        did."""
        least = 0 if self._void else self._replica.position.weight + (0 if afresh else 1)
        wanted = GetManifest(weight=least, step=step, exactly=exactly)
        asked = {
            asyncio.create_task(self._ask(donor, wanted), name=f"manifest of {donor}"): donor
            for donor in self._bench.without(donors, self._now()) or donors
        }
        offers: dict[PeerId, Manifest] = {}
        proposed: list[int] = []
        last: PeerFault | None = None
        pending, deadline = set(asked), None
        try:
            while pending and (deadline is None or self._now() < deadline):
                patience = None if deadline is None else deadline - self._now()
                done, pending = await asyncio.wait(
                    pending, timeout=patience, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    donor = asked[task]
                    try:
                        match task.result():
                            case Manifest() as manifest:
                                self._check(donor, manifest, afresh)
                                offers[donor] = manifest
                                deadline = deadline or self._now() + GRACE_SECONDS
                            case Later(step=int() as later):
                                proposed.append(later)
                            case reply:
                                raise BadMessage(
                                    f"{donor[-8:]} answered a request for a manifest with {reply.kind}"
                                )
                    except Refused as fault:
                        last = fault
                    except PeerFault as fault:
                        last = fault
                        self._failed(donor, fault)
        finally:
            await _stop(pending)
        return offers, proposed, last

    async def _said(self) -> list[Sequence[Milestone]]:
        """Which states peers have signed for having had, in their presence records."""
        records = await self._swarm.lookup("presence")
        return [each.milestones for each in records if isinstance(each, Presence)]

    async def _ask(self, donor: PeerId, wanted: GetManifest) -> Reply:
        reply, _ = await self._request(donor, wanted, donor_seconds=REACH_SECONDS + PACKING_SECONDS)
        return reply

    def _check(self, donor: PeerId, manifest: Manifest, afresh: bool) -> None:
        """Raises Refused if the snapshot is of no use here, BadMessage if it cannot be one of this run."""
        here = self._replica.position
        same = afresh and manifest.position == here
        if not self._void and not same and not heavier(manifest.position, here):
            raise Refused(
                f"{donor[-8:]} offers step {manifest.position.step} with {manifest.position.weight} samples "
                f"behind it; this peer already has {here.weight}"
            )
        if manifest.size_bytes > self._snapshot_bytes:
            raise BadMessage(
                f"{donor[-8:]} offers a snapshot of {manifest.size_bytes} bytes; "
                f"this model's is at most {self._snapshot_bytes}"
            )
        Assembly(manifest)  # its numbers must fit together

    async def _download(self, elected: Elected) -> Snapshot:
        """All pieces, from all donors that have them. Raises PeerFault once nobody is left who does; what is
        here by then is on disk for the next time."""
        manifest = elected.manifest
        assembly = Assembly(manifest)
        await self._aside(self._resume, assembly)
        errands = Errands(assembly.missing(), elected.donors)
        pace = Pace(self._now())
        fetching: dict[asyncio.Task[Later | bytes], tuple[PeerId, int]] = {}
        last: PeerFault = Unreachable("no donor has the snapshot")
        self._watch(_pieces(assembly, errands, pace, self._now()))
        try:
            while errands.missing:
                for donor, number in errands.ask(self._now()):
                    task = asyncio.create_task(self._piece(donor, assembly, number), name=f"piece {number}")
                    fetching[task] = donor, number
                if not errands.donors:
                    raise last
                wake = errands.wake_at(self._now()) - self._now()
                patience = None if wake == float("inf") else wake
                if fetching:
                    await asyncio.wait(fetching, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                else:
                    await asyncio.sleep(patience or 0.0)
                for task in [each for each in fetching if each.done()]:
                    donor, number = fetching.pop(task)
                    try:
                        match task.result():
                            case Later(seconds=seconds):
                                errands.later(donor, number, self._now() + max(seconds, 0.1))
                            case data:
                                errands.came(donor, number, self._now())
                                pace.add(len(data), self._now())
                                self._watch(_pieces(assembly, errands, pace, self._now()))
                    except PeerFault as fault:
                        last = fault
                        errands.gone(donor, number)
                        self._failed(donor, fault)
        finally:
            await _stop(fetching)
        snapshot: Snapshot = await self._aside(assembly.snapshot)
        return snapshot

    def _resume(self, assembly: Assembly) -> None:
        """Aside: take in what an earlier process has left of this very snapshot."""
        self._partial.begin(assembly.manifest)
        for number, data in self._partial.pieces():
            try:
                assembly.add(number, data)
            except BadMessage:
                continue  # torn, when the process died or the power failed: it is fetched again
            self._resumed += len(data)

    async def _piece(self, donor: PeerId, assembly: Assembly, number: int) -> Later | bytes:
        """Fetch a piece into the assembly, and keep it; or hear when to ask again. Raises PeerFault."""
        manifest = assembly.manifest
        reply, data = await self._request(
            donor,
            GetPiece(state_digest=manifest.state_digest, number=number),
            manifest.piece_bytes,
            max_bytes=manifest.piece_bytes,
            donor_seconds=QUEUE_SECONDS,
        )
        match reply:
            case Later():
                return reply
            case Piece():
                assembly.add(number, data)
            case _:
                raise BadMessage(f"{donor[-8:]} answered a request for piece {number} with {reply.kind}")
        self._received += len(data)
        self._gave.add(donor)
        await self._aside(self._partial.keep, number, data)
        return data

    # -- requests --------------------------------------------------------------------------------------------

    def request_seconds(self, size_bytes: int) -> float:
        """How long an answer of that size may take, from what reaching peers and moving bytes took so far."""
        return ANSWER_DIALS * self._swarm.dial_seconds + 2 * size_bytes * self._seconds_per_byte.bound

    async def _request(
        self,
        donor: PeerId,
        request: Request,
        size_bytes: int = 0,
        *,
        max_bytes: int = 0,
        donor_seconds: float = 0.0,
    ) -> tuple[Reply, bytes]:
        """The answer, of about so many bytes; the donor may let us wait for `donor_seconds` on purpose."""
        began, patience = self._now(), donor_seconds + self.request_seconds(size_bytes)
        try:
            reply, payload = await self._swarm.request(
                donor, request, timeout_seconds=patience, max_bytes=max_bytes
            )
        except Unreachable:
            if size_bytes and self._now() - began >= patience:
                self._seconds_per_byte.miss()
            raise
        if payload:
            self._seconds_per_byte.observe((self._now() - began) / len(payload))
        return reply, payload

    # -- donors that fail ------------------------------------------------------------------------------------

    def _failed(self, donor: PeerId, fault: PeerFault) -> None:
        """Leave the donor alone for a while: longer, if it was not the network's fault."""
        if isinstance(fault, Refused):
            return  # it only has not what we want
        seconds = LIAR_SECONDS if isinstance(fault, BadMessage) else SILENT_SECONDS
        self._bench.put(donor, seconds, self._now())
        self._on_fault(donor, fault)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _is_attested(manifest: Manifest, said: Sequence[Sequence[Milestone]]) -> bool:
    """Whether it is the state that most of those had who have signed for what they had there, if any."""
    state = attested(manifest.position.step, manifest.position.lineage, said)
    return state is None or manifest.state_digest.startswith(state)


def _unlike_the_records(donor: PeerId, manifest: Manifest) -> BadMessage:
    return BadMessage(
        f"{donor[-8:]} offers a snapshot of step {manifest.position.step} that is not the state which most "
        "peers have signed for"
    )


def _pieces(assembly: Assembly, errands: Errands, pace: Pace, now: float) -> Progress:
    manifest = assembly.manifest
    total, left = len(manifest.pieces), len(assembly.missing())
    done_bytes = min((total - left) * manifest.piece_bytes, manifest.size_bytes)
    return Progress(
        "pieces",
        total - left,
        total,
        done_bytes,
        manifest.size_bytes,
        pace.bytes_per_second(now),
        len(errands.donors),
    )


async def _stop(tasks: Iterable[asyncio.Task[object]]) -> None:
    """Cancel them, and wait until they are over."""
    stopping = list(tasks)
    for task in stopping:
        task.cancel()
    await asyncio.gather(*stopping, return_exceptions=True)
