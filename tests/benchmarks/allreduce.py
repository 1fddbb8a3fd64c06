"""How long it takes to average a vector that all peers have, beside hivemind and gloo, as JSON.

    python tests/benchmarks/allreduce.py --peers 2 --megabytes 100 [--rounds 7]

Ours is an `Attempt` as in training, with a roster that is fixed beforehand: encoding, sending, adding in
roster order, checking, hashing, until every peer holds the same bytes; per carrier and codec, and as in a
run that is audited: hashed and signed both ways, too. hivemind's is
the all-reduce of its `DecentralizedAverager`, in a group that was formed beforehand. gloo's is torch's
`all_reduce`, without encryption or checks, for peers that never leave. Each peer is a process on loopback
with one torch thread. All contenders are up all the time and take turns; what counts is the median of the
rounds, each from the last peer's start to the last one's end on one monotonic clock. A whole round of a tiny
model, with freeze, commit and step, is measured after that, by `round_latency`.

Not covered: the internet.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import signal
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from round_latency import ROUND_SECONDS, Worker, in_ms, measure_p2ptrain, say, workers

TARGETS = {
    "fp32_times_as_fast_as_hivemind": ">= 4",
    "fp16_times_as_fast_as_hivemind": ">= 5",
    "fp32_time_over_gloo": "<= 2.2 with 2 peers, <= 3.5 with 4",
    "audited_time_over_plain": "<= 1.03 of a whole round, of which averaging is a part",
    "tiny_round_ms": "<= 15 with 2 peers, <= 30 with 4",
}


# -- in the workers ------------------------------------------------------------------------------------------


async def reduce_here(folder: Path, number: int, entries: list[str], carrier: str, values: int) -> None:
    """In a worker: one peer of ours, which takes part in an attempt whenever it is told to."""
    import torch

    from p2ptrain import PROTOCOL_VERSION
    from p2ptrain.allreduce import Attempt, Contribution, touched_memory
    from p2ptrain.auditing import Evidence
    from p2ptrain.config import RunConfig
    from p2ptrain.court import Told
    from p2ptrain.events import Carrier
    from p2ptrain.gradients.aggregation import mean_chunk
    from p2ptrain.gradients.codecs import codec_named
    from p2ptrain.gradients.feedback import Owed
    from p2ptrain.gradients.reducing import Scratch
    from p2ptrain.protocol.spans import chunk_count, share_out
    from p2ptrain.records import Averaged, Ballot, Chunk, Freeze, PeerId, Presence, Refusal
    from p2ptrain.swarm.libp2p import Libp2pSwarm

    torch.set_num_threads(1)
    torch.manual_seed(number)
    total = torch.randn(values)
    loop = asyncio.get_running_loop()
    threads = ThreadPoolExecutor(1, "reduce"), ThreadPoolExecutor(1, "stdin")
    scratch = Scratch()
    chunk_values = int(os.environ.get("CHUNK_VALUES", RunConfig().chunk_values))

    async def work(function: Callable[..., Any], *arguments: Any) -> Any:
        return await loop.run_in_executor(threads[0], function, *arguments)

    class Averaging:
        """A handler that knows one attempt at a time, and lets the next one's chunks wait."""

        attempt: Attempt | None = None
        begun = asyncio.Condition()

        def on_message(self, sender: PeerId, message: Any) -> None:
            pass

        def place(self, sender: PeerId, header: Chunk | Averaged, size: int) -> memoryview | None:
            if self.attempt is None or not self.attempt.awaits(header):
                return None
            return self.attempt.place(sender, header, size)

        async def on_chunk(self, sender: PeerId, header: Chunk | Averaged, payload: Any) -> None:
            async with self.begun:
                await self.begun.wait_for(lambda: self.attempt is not None and self.attempt.awaits(header))
            assert self.attempt is not None
            await self.attempt.receive(sender, header, payload)

        def on_link(self, peer: PeerId, up: bool) -> None:
            if up and self.attempt is not None:
                self.attempt.rewind(peer)

        async def on_request(self, sender: PeerId, request: Any) -> Any:
            return Refusal(reason="a benchmark"), b""

    averaging = Averaging()
    swarm = Libp2pSwarm(
        folder / f"{number}.key",
        "allreduce",
        "1" * 64,
        entries,
        ["/ip4/127.0.0.1/tcp/0"],
        data_port=0 if carrier == "tls" else None,
    )

    async def average(
        step: int, codec_name: str, audited: bool, roster: list[PeerId], seconds: float
    ) -> dict[str, Any]:
        codec, ended = codec_named(codec_name), loop.create_future()
        memory = await work(touched_memory, codec.encoded_bytes(values) + 2**16)  # as while they compute
        freeze = Freeze(
            step=step,
            parent="e" * 64,
            ballot=Ballot(number=1, leader=roster[0]),
            roster=tuple(roster),
            spans=share_out(values, [1.0] * len(roster)),
            finishing=(),
            cutoff_seconds=0.0,
            deadline_seconds=seconds,
        )
        chunks = [chunk_count(*span, chunk_values) for span in pairwise(freeze.spans)]
        evidence = Evidence(freeze, swarm, "1" * 64, "", chunks, None) if audited else None
        usage = resource.getrusage(resource.RUSAGE_SELF)
        began, cpu = monotonic(), usage.ru_utime + usage.ru_stime
        async with asyncio.TaskGroup() as group:
            attempt = Attempt(
                Told(freeze, swarm, "1" * 64, ""),
                swarm,
                codec,
                mean_chunk,
                chunk_values,
                2**24,
                (values / len(roster)) ** 0.5,  # that of a mean of these: outsized ones are looked for
                Owed(codec),
                group.create_task,
                work,
                scratch,
                memory,
                evidence,
                lambda header, _: ended.set_result(header.digest),
                lambda suspects, cause, detail: ended.set_exception(RuntimeError(f"{cause}: {detail}")),
            )
            attempt.contribute(Contribution(total, 1))
            async with averaging.begun:
                averaging.attempt = attempt
                averaging.begun.notify_all()
            digest = await ended
            finished = monotonic()
            payload = attempt.payload()
            assert len(payload) == codec.encoded_bytes(1) * values or codec_name != "fp32"
            usage = resource.getrusage(resource.RUSAGE_SELF)
            spent = usage.ru_utime + usage.ru_stime - cpu
            # What others still need of it goes out before it is told that all is over.
            while any(box.sent < len(box.frames) for box in attempt._outboxes.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            attempt.close()
        over_tls = swarm.carriers.get(Carrier.TLS, 0)
        return {"began": began, "ended": finished, "peers": len(roster), "digest": digest, "cpu": spent} | {
            "tls": over_tls
        }

    async with swarm:
        swarm.serve(averaging)
        say(addresses=swarm.visible_addresses(), peer=swarm.peer_id)
        while line := await loop.run_in_executor(threads[1], sys.stdin.readline):
            match json.loads(line):
                case {"do": "publish"}:
                    me = Presence(
                        peer=swarm.peer_id,
                        role="train",
                        name="",
                        protocol=PROTOCOL_VERSION,
                        fingerprint="1" * 64,
                        incarnation="",
                        position=None,
                    )
                    say(published=await swarm.publish(me, ttl_seconds=100))
                case {"do": "meet"}:
                    say(met=[record.peer for record in await swarm.lookup("presence")])
                case {"do": "go", "step": step, "codec": codec, "audited": audited, "roster": roster}:
                    say(**await average(step, codec, audited, roster, ROUND_SECONDS))


def hivemind_here(number: int, peers: int, entries: list[str], codec: str, values: int) -> None:
    """In a worker: one averager that does as it is told, until its stdin ends."""
    import hivemind
    import torch
    from hivemind.averaging.control import AveragingStage
    from hivemind.compression import Float16Compression, NoCompression

    torch.set_num_threads(1)
    torch.manual_seed(number)
    dht = hivemind.DHT(initial_peers=entries, host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    averager = hivemind.DecentralizedAverager(
        [torch.randn(values)],
        dht,
        prefix="allreduce",
        target_group_size=peers,
        min_matchmaking_time=1.0,
        request_timeout=0.9,  # it warns of deadlocks if this is not the smaller one
        sender_timeout=10.0,
        allreduce_timeout=ROUND_SECONDS,
        compression=Float16Compression() if codec == "fp16" else NoCompression(),
        start=True,
    )
    say(addresses=[str(address) for address in dht.get_visible_maddrs()])
    step: Any = None
    for line in sys.stdin:
        began = monotonic()
        met = 0
        try:
            if json.loads(line)["do"] == "match":
                step = averager.step(
                    wait=False, require_trigger=True, timeout=ROUND_SECONDS, allow_retries=False
                )
                while step.stage is not AveragingStage.AWAITING_TRIGGER and not step.done():
                    if monotonic() > began + ROUND_SECONDS / 2:
                        break
                    sleep(0.001)
            else:
                began = monotonic()
                step.allow_allreduce()
                met = len(step.result(timeout=ROUND_SECONDS) or ())
        except Exception as error:  # whatever it was, that round does not count
            print(f"hivemind: {error!r}", file=sys.stderr)
        say(began=began, ended=monotonic(), peers=met)


def gloo_here(folder: Path, number: int, peers: int, values: int) -> None:
    """In a worker: one rank of a gloo group."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(number)
    total = torch.randn(values)
    say(addresses=["-"])
    sys.stdin.readline()  # all are there
    store = dist.FileStore(str(folder / "gloo"), peers)
    dist.init_process_group("gloo", store=store, rank=number, world_size=peers)
    say(ready=True)
    for _ in sys.stdin:
        began = monotonic()
        dist.all_reduce(total)
        total.div_(peers)
        say(began=began, ended=monotonic(), peers=peers)
    dist.destroy_process_group()


# -- the contenders, as their parent sees them ---------------------------------------------------------------


class Ours:
    """All peers of ours over one carrier."""

    def __init__(self, started: list[Worker], carrier: str) -> None:
        self._started, self._carrier = started, carrier
        self._roster = sorted(worker.first["peer"] for worker in started)
        self._step = 0
        for word in ("publish", "meet"):
            told(started, do=word)
        for _ in range(20):  # until all chunks go the way that is to be measured
            self.round("fp32")
            if self.over_tls == (len(started) - 1 if carrier == "tls" else 0):
                return
        raise RuntimeError(f"not everybody's chunks go over {carrier}")

    def round(self, codec: str, *, audited: bool = False) -> tuple[float, float]:
        """Seconds, and seconds of processor time of one peer on average."""
        self._step += 1
        heard = told(
            self._started, do="go", step=self._step, codec=codec, audited=audited, roster=self._roster
        )
        if len({each["digest"] for each in heard}) != 1:
            raise RuntimeError("peers ended with different bytes")
        self.over_tls = min(each["tls"] for each in heard)
        return elapsed(heard), statistics.mean(each["cpu"] for each in heard)


def told(started: list[Worker], **message: Any) -> list[dict[str, Any]]:
    """What each says to this."""
    for worker in started:
        worker.tell(**message)
    return [worker.hear(2 * ROUND_SECONDS) for worker in started]


def elapsed(heard: list[dict[str, Any]]) -> float:
    """From the last one's start to the last one's end."""
    return float(max(each["ended"] for each in heard) - max(each["began"] for each in heard))


def measure(peers: int, megabytes: float, rounds: int, without: list[str]) -> dict[str, Any]:
    values = int(megabytes * 1e6 / 4)
    seconds: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    failed = 0
    with contextlib.ExitStack() as stack:

        def up(kind: str, *arguments: str) -> list[Worker]:
            return stack.enter_context(workers(kind, peers, *arguments, str(values), script=__file__))

        ours = {name: Ours(up("ours", name), name) for name in ("tls", "libp2p") if name not in without}
        theirs = {codec: up("hivemind", codec) for codec in ("fp32", "fp16") if "hivemind" not in without}
        gloo = up("gloo", "-") if "gloo" not in without else []
        if gloo:
            told(gloo, do="begin")
        for turn in range(rounds + 1):  # the first one of each warms up
            for carrier, contender in ours.items():
                for codec, audited in product(("fp32", "fp16"), (False, True)):
                    took, spent = contender.round(codec, audited=audited)
                    if turn:
                        name = f"{carrier} {codec}{' audited' if audited else ''}"
                        seconds.setdefault(name, []).append(took)
                        processor.setdefault(name, []).append(spent)
            for codec, started in theirs.items():
                told(started, do="match")
                heard = told(started, do="go")
                if any(each["peers"] != peers for each in heard):
                    failed += 1
                elif turn:
                    seconds.setdefault(f"hivemind {codec}", []).append(elapsed(heard))
            if gloo:
                heard = told(gloo, do="go")
                if turn:
                    seconds.setdefault("gloo fp32", []).append(elapsed(heard))
    report: dict[str, Any] = {
        what: {"median_seconds": round(statistics.median(each), 4), "min_seconds": round(min(each), 4)}
        for what, each in seconds.items()
    }
    for what, each in processor.items():
        report[what]["processor_seconds_per_peer"] = round(statistics.median(each), 4)
    return {"failed_hivemind_rounds": failed, "contenders": report}


def ratios(contenders: dict[str, Any]) -> dict[str, float]:
    """What the targets are about, of those that were measured."""

    def over(one: str, other: str) -> float | None:
        if one not in contenders or other not in contenders:
            return None
        return round(contenders[one]["median_seconds"] / contenders[other]["median_seconds"], 2)

    found = {
        "fp32_times_as_fast_as_hivemind": over("hivemind fp32", "tls fp32"),
        "fp16_times_as_fast_as_hivemind": over("hivemind fp16", "tls fp16"),
        "fp32_time_over_gloo": over("tls fp32", "gloo fp32"),
        "tls_times_as_fast_as_libp2p": over("libp2p fp32", "tls fp32"),
        "audited_time_over_plain": over("tls fp16 audited", "tls fp16"),
    }
    return {name: value for name, value in found.items() if value is not None}


def work() -> None:
    """What a worker does."""
    kind, folder, number, peers, entries, *rest = sys.argv[2:]
    match kind, rest:
        case "ours", [carrier, values]:
            import uvloop

            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(reduce_here(Path(folder), int(number), json.loads(entries), carrier, int(values)))
        case "hivemind", [codec, values]:
            hivemind_here(int(number), int(peers), json.loads(entries), codec, int(values))
        case "gloo", [_, values]:
            gloo_here(Path(folder), int(number), int(peers), int(values))


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work()
        return
    parser = argparse.ArgumentParser(description="All-reduce, beside hivemind's and gloo's.")
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=100.0, help="of float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--tiny-rounds", type=int, default=100, help="whole rounds of a tiny model; 0 for none"
    )
    parser.add_argument(
        "--without", nargs="*", default=[], choices=["tls", "libp2p", "hivemind", "gloo"], help="leave out"
    )
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended, too
    report: dict[str, Any] = {
        "peers": chosen.peers,
        "megabytes": chosen.megabytes,
        "load_before": round(os.getloadavg()[0], 1),
    }
    report |= measure(chosen.peers, chosen.megabytes, chosen.rounds, chosen.without)
    report["ratios"] = ratios(report["contenders"])
    if chosen.tiny_rounds:
        report["tiny_round"] = in_ms(measure_p2ptrain(chosen.peers, chosen.tiny_rounds, 50.0))
        report["ratios"]["tiny_round_ms"] = report["tiny_round"]["median_ms"]
    report["targets"] = TARGETS
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
