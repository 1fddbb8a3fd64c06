"""A volunteer that does one thing wrong: what `p2ptrain join` runs, and one deviation at a named point.

    python -m tests.chaos.rogue --die reducing --number 1 join INVITE --peer peer.toml
    python -m tests.chaos.rogue --orders FILE join INVITE --peer peer.toml

It is the production process, with its own p2pd: the deviation is put around the production objects from
outside, and the product knows nothing of it. With `--orders` it behaves until that file is there and says, in
the same words, what it is to do: `--die reducing --number 1`. A death is SIGKILL to itself. It tells on
stderr what it did and when, in a line that begins with `rogue: `.

Not covered: liars that speak another protocol altogether, and several liars that know of each other.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from p2ptrain import allreduce
from p2ptrain import config as config_module
from p2ptrain.allreduce import Attempt, Contribution, Rounds
from p2ptrain.config import RunConfig
from p2ptrain.court import Told
from p2ptrain.protocol.ledger import Ranges
from p2ptrain.protocol.lineage import joint_digest
from p2ptrain.protocol.member import Member
from p2ptrain.protocol.roster import freeze_of
from p2ptrain.protocol.round import Apply, Begin, Effect, Send
from p2ptrain.records import Averaged, Call, Chunk, Commit, Done, GetEntry, GetPiece, PeerId
from p2ptrain.replica import checkpoint
from p2ptrain.replica.snapshot import Assembly
from p2ptrain.swarm import lanes
from p2ptrain.swarm.libp2p import Libp2pSwarm
from p2ptrain.trainer import Peer
from p2ptrain.training import attendance
from p2ptrain.training.batches import Batches
from peers import cli, offspring, volunteer

SAYS = "rogue: "
"""How a line of it on stderr begins; JSON follows: `did`, `time` in Unix seconds, and details."""
FLUSH_SECONDS = 0.05
"""For what was said before a death to leave p2pd, which dies with the process."""
ORDER_SECONDS = 0.01
"""Between two looks for an order. Orders are renamed into place, so one that is there is whole."""
OFFSPRING = "peers.offspring"


@dataclass
class Rogue:
    """How to deviate, and what became of it."""

    what: str
    number: int | None = None
    """Which one of several: chunks, pieces, messages, bytes. What it counts is said by the deviation."""
    dying: bool = False
    """It decides and begins nothing more; what it has said is on its way."""
    _told: bool = False

    def tell(self, **details: Any) -> None:
        """Say once that it deviates from here on."""
        if not self._told:
            self._told = True
            line = json.dumps({"did": self.what, "time": time.time(), **details})
            os.write(2, f"{SAYS}{line}\n".encode())

    def die(self, **details: Any) -> None:
        """At once."""
        self.dying = True
        self.tell(**details)
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()

    def die_behind(self, **details: Any) -> None:
        """As soon as what it has said before has left the machine, and saying nothing more."""
        self.dying = True
        self.tell(**details)
        asyncio.get_running_loop().call_later(FLUSH_SECONDS, os.kill, os.getpid(), signal.SIGKILL)


Deviation = Callable[[Rogue], None]
DEATHS: dict[str, Deviation] = {}
LIES: dict[str, Deviation] = {}


def death(install: Deviation) -> Deviation:
    """A value of `--die`."""
    DEATHS[install.__name__.replace("_", "-")] = install
    return install


def lie(install: Deviation) -> Deviation:
    """A value of `--lie`."""
    LIES[install.__name__.replace("_", "-")] = install
    return install


# -- deaths --------------------------------------------------------------------------------------------------


@death
def accumulating(rogue: Rogue) -> None:
    """In its micro-batch number N (1) of a step, computed and not yet added."""
    nth, gradients = rogue.number or 1, Batches._gradients

    def computed(self: Batches, step: int, first: int, count: int, held: Ranges) -> float:
        loss = gradients(self, step, first, count, held)
        if first // count + 1 >= nth:
            rogue.die(step=step, samples=first)
        return loss

    Batches._gradients = computed


def at_effect(
    rogue: Rogue, fits: Callable[[Rounds, Effect], bool], passed: int, die: Callable[..., None]
) -> None:
    """Die once `passed` effects that fit have been carried out in one go; 0: before the first of them."""
    carry_out = Rounds._carry_out

    def until_death(rounds: Rounds, effects: Iterable[Effect]) -> Iterator[Effect]:
        fitting = 0
        for effect in effects:
            if rogue.dying:
                return
            fit = fits(rounds, effect)
            if not fit or fitting < passed:
                yield effect
            fitting += fit
            if fit and fitting >= passed:
                at = rounds.member.position
                what = type(getattr(effect, "message", effect)).__name__
                die(step=None if at is None else at.step, effect=what)

    Rounds._carry_out = lambda self, effects: carry_out(self, until_death(self, effects))


def sends(kind: type) -> Callable[[Rounds, Effect], bool]:
    return lambda rounds, effect: isinstance(effect, Send) and isinstance(effect.message, kind)


@death
def leading(rogue: Rogue) -> None:
    """As leader with all reports in, before N (0) of the messages that freeze the round."""
    at_effect(rogue, sends(Call), rogue.number or 0, rogue.die_behind)


@death
def frozen(rogue: Rogue) -> None:
    """As follower: it has got the freeze, and says nothing on it."""

    def follower(rounds: Rounds, effect: Effect) -> bool:
        return isinstance(effect, Begin) and effect.freeze.ballot.leader != rounds.member.me

    at_effect(rogue, follower, 0, rogue.die)


@death
def sending(rogue: Rogue) -> None:
    """As sender, once N (1) of its chunks have left."""
    nth, send_chunk = rogue.number or 1, Libp2pSwarm.send_chunk
    sent: dict[Any, int] = {}

    async def sending_chunk(self: Libp2pSwarm, to: PeerId, header: Chunk | Averaged, payload: Any) -> None:
        if rogue.dying:
            await asyncio.Event().wait()
        await send_chunk(self, to, header, payload)
        if isinstance(header, Chunk):
            attempt = (header.step, header.ballot)
            sent[attempt] = sent.get(attempt, 0) + 1
            if sent[attempt] == nth:
                rogue.die_behind(step=header.step, chunks=nth)

    Libp2pSwarm.send_chunk = sending_chunk
    silent_when_dying(rogue)


@death
def reducing(rogue: Rogue) -> None:
    """As reducer that has averaged N (1) chunks of its span, sent them, and should average the next."""
    after, average = rogue.number or 1, Attempt._average

    async def averaging(self: Attempt, number: int) -> None:
        if rogue.dying:
            return
        if number >= after:
            rogue.die_behind(step=self.freeze.step, averaged=number)
        else:
            await average(self, number)

    Attempt._average = averaging
    silent_when_dying(rogue)


@death
def done(rogue: Rogue) -> None:
    """As follower that holds every span and has said so."""
    at_effect(rogue, sends(Done), 1, rogue.die_behind)


@death
def committing(rogue: Rogue) -> None:
    """As leader, once N (1) of the messages that commit the round have left; 0: when all are done."""
    at_effect(rogue, sends(Commit), 1 if rogue.number is None else rogue.number, rogue.die_behind)


@death
def applying(rogue: Rogue) -> None:
    """Committed, as it knows, and not yet applied."""
    at_effect(rogue, lambda rounds, effect: isinstance(effect, Apply), 0, rogue.die)


def silent_when_dying(rogue: Rogue) -> None:
    """Decides nothing more once it dies."""
    at_effect(rogue, lambda rounds, effect: False, 0, rogue.die)


@death
def saving(rogue: Rogue) -> None:
    """At byte N (0) of writing a checkpoint; -1: before it gets its name, -2: right after."""
    at, written, flushed = rogue.number or 0, 0, 0
    write, flush = checkpoint._write, checkpoint._flush

    def writing(path: Path, content: bytes) -> None:
        nonlocal written, flushed
        if path.name == checkpoint.MODEL:
            written = flushed = 0
        if 0 <= at < written + len(content):
            write(path, content[: at - written])
            rogue.die(file=path.name, byte=at)
        write(path, content)
        written += len(content)

    def flushing(folder: Path) -> None:
        nonlocal flushed
        flushed += 1
        if at == -flushed:
            rogue.die(flush=folder.name)
        flush(folder)

    checkpoint._write, checkpoint._flush = writing, flushing


@death
def giving(rogue: Rogue) -> None:
    """As donor that was asked for its piece number N (1)."""
    nth, on_request = rogue.number or 1, Rounds.on_request
    asked = 0

    async def answering(self: Rounds, sender: PeerId, request: Any) -> Any:
        nonlocal asked
        if isinstance(request, GetPiece):
            asked += 1
            if asked >= nth:
                rogue.die(piece=request.number, to=sender)
        return await on_request(self, sender, request)

    Rounds.on_request = answering


@death
def joining(rogue: Rogue) -> None:
    """As joiner that has N (1) pieces of a snapshot."""
    nth, add = rogue.number or 1, Assembly.add
    got = 0

    def adding(self: Assembly, number: int, data: bytes) -> None:
        nonlocal got
        add(self, number, data)
        got += 1
        if got >= nth:
            rogue.die(pieces=got, of=len(self.manifest.pieces))

    Assembly.add = adding


# -- lies in a round -----------------------------------------------------------------------------------------


def twisted(rogue: Rogue, twist: Callable[[Attempt, bytes, int], bytes]) -> None:
    """Other reducers get its chunks twisted; its own span stays sound, so that it goes on with a straight
    face."""
    contribute = Attempt.contribute

    def contributing(self: Attempt, contribution: Contribution) -> None:
        for to, outbox in self._outboxes.items():
            outbox.put = partial(lying, self, to, outbox.put)
        contribute(self, contribution)

    def lying(attempt: Attempt, to: PeerId, put: Callable[..., None], header: Any, payload: Any) -> None:
        if isinstance(header, Chunk) and payload:
            start, stop = attempt._ranges[attempt.freeze.roster.index(to)][header.number]
            payload = twist(attempt, bytes(payload), stop - start)
            rogue.tell(step=header.step)
        put(header, payload)

    Attempt.contribute = contributing


def pattern(rogue: Rogue, patterns: dict[str, bytes]) -> None:
    """Bytes that the codec itself would never write."""

    def twist(attempt: Attempt, payload: bytes, values: int) -> bytes:
        one = patterns[attempt._codec.name]
        head = len(payload) - values * len(one)  # a scale, if the codec has one
        return payload[:head] + one * values

    twisted(rogue, twist)


def values(rogue: Rogue, change: Callable[[Tensor], Tensor]) -> None:
    def twist(attempt: Attempt, payload: bytes, values: int) -> bytes:
        sound = torch.empty(values)
        attempt._codec.decode(payload, sound)
        return attempt._codec.encode(change(sound).contiguous())

    twisted(rogue, twist)


@lie
def nan(rogue: Rogue) -> None:
    """Every value of its gradient is NaN."""
    pattern(rogue, {"fp32": b"\x00\x00\xc0\x7f", "fp16": b"\x00\x7e"})


@lie
def inf(rogue: Rogue) -> None:
    """Every value of its gradient is infinite."""
    pattern(rogue, {"fp32": b"\x00\x00\x80\x7f", "fp16": b"\x00\x7c"})


@lie
def huge(rogue: Rogue) -> None:
    """Its gradient is a million times as large."""
    values(rogue, lambda sound: sound * 1e6)


@lie
def flip(rogue: Rogue) -> None:
    """Its gradient points the other way."""
    values(rogue, lambda sound: -sound)


@lie
def constant(rogue: Rogue) -> None:
    """Every value of its gradient is the largest of them."""
    values(rogue, lambda sound: torch.full_like(sound, float(sound.abs().max())))


@lie
def random(rogue: Rogue) -> None:
    """Its gradient is noise of the same size."""
    values(rogue, lambda sound: torch.randn_like(sound) * sound.square().mean().sqrt())


@lie
def outweigh(rogue: Rogue) -> None:
    """Its gradient points the other way and is N (5) times as long: enough to undo what four others bring."""
    factor = -float(rogue.number or 5)
    values(rogue, lambda sound: sound * factor)


@lie
def sums(rogue: Rogue) -> None:
    """As a reducer, its means point the other way; all get the same ones, signed and hashed as they are."""
    average = allreduce.average_chunk

    def lying(rule: Any, scratch: Any, *others: Any) -> tuple[float, bytes, list[bytes]]:
        norm, _, hashed = average(rule, scratch, *others)
        count, place = others[-2], others[-1]
        sound = torch.empty(count)
        rule.codec.decode(place, sound)
        place[:] = rule.codec.encode(-sound)
        rogue.tell()
        return norm, blake3(place).digest(), hashed

    allreduce.average_chunk = lying  # type: ignore[assignment]


@lie
def samples(rogue: Rogue) -> None:
    """It claims N (a billion) samples for its contribution."""
    claimed, contribute = rogue.number or 10**9, Attempt.contribute

    def contributing(self: Attempt, contribution: Contribution) -> None:
        if contribution.samples:
            rogue.tell(step=self.freeze.step, claimed=claimed, computed=contribution.samples)
            contribution = Contribution(contribution.total, claimed)
        contribute(self, contribution)

    Attempt.contribute = contributing


@lie
def progress(rogue: Rogue) -> None:
    """It reports N (a billion) samples from the first moment of each step, and brings what it has."""
    claimed, progressed = rogue.number or 10**9, Member.progressed

    def reporting(self: Member, samples: int, *others: Any) -> list[Effect]:
        rogue.tell(claimed=claimed, computed=samples)
        return progressed(self, claimed, *others)

    Member.progressed = reporting


@lie
def replay(rogue: Rogue) -> None:
    """With each freeze it says again all that it said and sent in the round before."""
    carry_out, send_chunk = Rounds._carry_out, Libp2pSwarm.send_chunk
    said: list[Send] = []
    sent: list[tuple[PeerId, Any, Any]] = []

    def repeating(rounds: Rounds, effects: Iterable[Effect]) -> Iterator[Effect]:
        for effect in effects:
            yield effect
            if isinstance(effect, Send):
                said.append(effect)
            elif isinstance(effect, Begin):
                again, chunks = said[:], sent[:]
                said.clear()
                sent.clear()
                if again:
                    rogue.tell(step=effect.freeze.step, messages=len(again), chunks=len(chunks))
                    yield from again
                    rounds._spawn(resend(rounds, chunks))

    async def resend(rounds: Rounds, chunks: list[tuple[PeerId, Any, Any]]) -> None:
        for to, header, payload in chunks:
            await send_chunk(rounds._swarm, to, header, payload)

    async def remembering(self: Libp2pSwarm, to: PeerId, header: Any, payload: Any) -> None:
        sent.append((to, header, bytes(payload)))
        await send_chunk(self, to, header, payload)

    Rounds._carry_out = lambda self, effects: carry_out(self, repeating(self, effects))
    Libp2pSwarm.send_chunk = remembering


def with_changed(rogue: Rogue, kind: type, change: Callable[[PeerId, bytes], bytes]) -> None:
    """What it sends beside headers of that kind is changed on the way."""
    send_chunk = Libp2pSwarm.send_chunk

    async def changed(self: Libp2pSwarm, to: PeerId, header: Any, payload: Any) -> None:
        if isinstance(header, kind) and len(payload):
            rogue.tell(step=header.step)
            payload = change(to, bytes(payload))
        await send_chunk(self, to, header, payload)

    Libp2pSwarm.send_chunk = changed


@lie
def shape(rogue: Rogue) -> None:
    """Its chunks are half as long as they should be."""
    with_changed(rogue, Chunk, lambda to, payload: payload[: len(payload) // 2])


@lie
def oversized(rogue: Rogue) -> None:
    """Its chunks are a megabyte longer than they should be."""
    with_changed(rogue, Chunk, lambda to, payload: payload + bytes(2**20))


@lie
def two_faced(rogue: Rogue) -> None:
    """As reducer it sends each member another average."""

    contribute = Attempt.contribute

    def contributing(self: Attempt, contribution: Contribution) -> None:
        for to, outbox in self._outboxes.items():
            outbox.put = partial(lying, self, to, outbox.put)
        contribute(self, contribution)

    def lying(attempt: Attempt, to: PeerId, put: Callable[..., None], header: Any, payload: Any) -> None:
        if isinstance(header, Averaged) and header.pledge is not None and is_odd(to):
            payload = bytes([*payload[:-1], payload[-1] ^ 1])
            rank = attempt._reduction.rank
            digests = [attempt._digests[rank, at] for at in range(header.number)]
            root = joint_digest([*digests, blake3(payload).digest()])
            # It signs what it sends, or whoever gets it would know at once that it does not hold.
            signed = Told(attempt.freeze, attempt._swarm, attempt.told._run, attempt.told._incarnation)
            header = header.model_copy(update=signed.pledge(rank, root))
            rogue.tell(step=header.step)
        put(header, payload)

    Attempt.contribute = contributing


@lie
def equivocate(rogue: Rogue) -> None:
    """As leader it tells every second member of another roster, on which somebody is missing."""
    signed = Rounds._signed

    def telling(self: Rounds, to: PeerId, call: Call) -> Call:
        if not is_odd(to):
            return signed(self, to, call)
        rogue.tell(step=call.step)
        ranks = tuple(sorted({*call.left, 0}))
        call = call.model_copy(update={"left": ranks, "levels": call.levels[1:] or "a"})
        freeze = freeze_of(to, call, self.member.last, self.member.rules.values)
        # It signs what it says, or whoever hears it would know at once that it does not hold.
        signed_for = self.court.call(freeze, self.member.incarnation) if freeze else {}
        return call.model_copy(update=signed_for)

    Rounds._signed = telling


def is_odd(peer: PeerId) -> bool:
    """Whom it tells something else: half of all."""
    return bool(hashlib.sha256(peer.encode()).digest()[0] & 1)


# -- lies of a donor -----------------------------------------------------------------------------------------


def damaged(rogue: Rogue, kind: type) -> None:
    on_request = Rounds.on_request

    async def answering(self: Rounds, sender: PeerId, request: Any) -> Any:
        reply, payload = await on_request(self, sender, request)
        if isinstance(request, kind) and len(payload):
            rogue.tell(to=sender, request=request.kind)
            payload = bytearray(payload)
            payload[len(payload) // 2] ^= 1
        return reply, payload

    Rounds.on_request = answering


@lie
def pieces(rogue: Rogue) -> None:
    """One bit of each piece of a snapshot that it gives is wrong."""
    damaged(rogue, GetPiece)


@lie
def entries(rogue: Rogue) -> None:
    """One bit of each entry that it gives is wrong."""
    damaged(rogue, GetEntry)


# -- lies about what it is -----------------------------------------------------------------------------------


@lie
def fingerprint(rogue: Rogue) -> None:
    """It says that it trains something else."""
    adopt = Libp2pSwarm.adopt

    def adopting(self: Libp2pSwarm, fingerprint: str) -> None:
        rogue.tell()
        adopt(self, hashlib.sha256(fingerprint.encode()).hexdigest())

    Libp2pSwarm.adopt = adopting


@lie
def protocol(rogue: Rogue) -> None:
    """It speaks protocol N (the next one)."""
    other = rogue.number or lanes.PROTOCOL_VERSION + 1
    rogue.tell(protocol=other)
    for module in (config_module, lanes, attendance, volunteer):
        module.PROTOCOL_VERSION = other


@lie
def config(rogue: Rogue) -> None:
    """It trains with twice the learning rate of the run file that it was given."""
    fetch = volunteer.fetch_run

    async def fetching(*arguments: Any) -> RunConfig:
        run = await fetch(*arguments)
        rogue.tell(lr=2 * run.optimizer.lr)
        faster = run.optimizer.model_copy(update={"lr": 2 * run.optimizer.lr})
        return run.model_copy(update={"optimizer": faster})

    volunteer.fetch_run = fetching


@lie
def stubborn(rogue: Rogue) -> None:
    """It catches up with nobody, and goes on from where it is: fresh, or from its own checkpoint."""

    async def staying(self: Peer, behind: allreduce.Behind) -> None:
        rogue.tell(step=self.replica.position.step, theirs=behind.position.step)
        await self._digested()
        await self._compute(self._contributor.reset)
        self.rounds.unhelpful(behind.donor)
        self._start_step((), settled=True)

    Peer.catch_up = staying


# -- the command ---------------------------------------------------------------------------------------------


def install(what: argparse.Namespace) -> None:
    table, name = (DEATHS, what.die) if what.die else (LIES, what.lie)
    table[name](Rogue(name, what.number))


def deviations() -> argparse.ArgumentParser:
    """What an order says."""
    parser = argparse.ArgumentParser(add_help=False)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--die", choices=DEATHS, help="where it kills itself")
    which.add_argument("--lie", choices=LIES, help="what is not true")
    parser.add_argument("--number", type=int, help="the N of the deviation")
    return parser


def obey(orders: Path) -> None:
    """Wait for an order, in a thread: what is patched is looked up at each call."""
    while not orders.exists():
        time.sleep(ORDER_SECONDS)
    install(deviations().parse_args(orders.read_text().split()))


def main() -> None:
    about = "\n".join(
        f"  --{option} {name:<14} {' '.join((install.__doc__ or '').split())}"
        for option, table in (("die", DEATHS), ("lie", LIES))
        for name, install in table.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.rogue",
        parents=[deviations()],
        description=(__doc__ or "").partition("\n")[0],
        epilog=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--orders", type=Path, help="behave until this file says what to do")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="join INVITE …, or what a rehearsal runs")
    given = parser.parse_args()
    if given.orders is not None:
        threading.Thread(target=obey, args=[given.orders], daemon=True).start()
    elif given.die or given.lie:
        install(given)
    else:
        parser.error("it needs --die, --lie or --orders")
    # Put before the command of a rehearsal's child, this takes that command's place.
    begins = given.command.index(OFFSPRING) if OFFSPRING in given.command else -1
    command = given.command[begins + 1 :]
    if (
        command and Path(command[0]).name == "p2ptrain"
    ):  # put before the installed command, it takes its place
        command = command[1:]
    sys.argv = ["p2ptrain", *command]
    (offspring if begins >= 0 else cli).main()


if __name__ == "__main__":
    main()
