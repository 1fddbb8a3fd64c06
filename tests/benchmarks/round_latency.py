"""How long a round takes, from the last peer being ready to the step applied on every peer.

    python tests/benchmarks/round_latency.py --peers 2 [--rounds 200] [--json]

Each peer is a process of its own with a real libp2p daemon on loopback: the same `Peer` and `train` that a
volunteer runs. A micro-batch is a pause and a tiny gradient, so that as many peers as there are cores do not
fight for them; each round is filled by one micro-batch of every peer. All processes read the same monotonic
clock.

Beside it, in the same run, hivemind's averager with as many peers and values, from the last peer's call to
the last one's return: `step` as it is by default, where a group waits out the matchmaking time for who may
come; `step` where it is told the number of peers beforehand, so that it need not; and the all-reduce alone,
in a group that was formed beforehand. None of them includes an optimizer step or a commit.

Not covered: the internet. On loopback a message takes a fraction of a millisecond.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any

INPUTS, OUTPUTS = 99, 100
VALUES = (INPUTS + 1) * OUTPUTS
"""Parameters of the model: 10,000."""
WARMUP_ROUNDS = 10
START_SECONDS = 180.0
ROUND_SECONDS = 30.0
"""Nothing that is waited for may take longer."""


# -- the processes -------------------------------------------------------------------------------------------


class Worker:
    """One process that speaks and hears lines of JSON. `close` ends it and all its children."""

    def __init__(self, *arguments: str, script: str = __file__, inside: Sequence[str] = ()) -> None:
        """`inside`: words before the command, such as `ip netns exec NAME`."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [*inside, sys.executable, script, "--worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin: IO[str] = self._process.stdin
        self._stdout: IO[str] = self._process.stdout
        self.first: dict[str, Any] = {}
        """What it said first."""

    def tell(self, **message: Any) -> None:
        print(json.dumps(message), file=self._stdin, flush=True)

    def hear(self, seconds: float) -> dict[str, Any]:
        """The next line. Raises RuntimeError if none comes in time, or the process ends."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            ready = selector.select(seconds)
        line = self._stdout.readline() if ready else ""
        if not line:
            raise RuntimeError(f"a worker said nothing for {seconds:g} s, or ended (see above)")
        heard: dict[str, Any] = json.loads(line)
        return heard

    def end_of_input(self) -> None:
        self._stdin.close()

    def close(self) -> None:
        self._stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        with contextlib.suppress(ProcessLookupError):  # hivemind leaves processes behind
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._stdout.close()


@contextlib.contextmanager
def workers(
    kind: str,
    peers: int,
    *arguments: str,
    script: str = __file__,
    insides: Sequence[Sequence[str]] = (),
) -> Iterator[list[Worker]]:
    """So many workers; the first one is where the others enter the swarm. `script` is what they run, and
    `insides` the words before the command of each, if they are elsewhere."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="latency-"))
        started: list[Worker] = []
        entries: list[str] = []
        for number in range(peers):
            words = (kind, folder, str(number), str(peers), json.dumps(entries), *arguments)
            worker = Worker(*words, script=script, inside=insides[number] if insides else ())
            stack.callback(worker.close)
            started.append(worker)
            worker.first = worker.hear(START_SECONDS)
            entries = entries or worker.first["addresses"]
        yield started


def say(**message: Any) -> None:
    """From a worker to its parent."""
    print(json.dumps(message), flush=True)


# -- p2ptrain ------------------------------------------------------------------------------------------------


def measure_p2ptrain(peers: int, rounds: int, batch_ms: float) -> list[float]:
    """Seconds of each round after the first few."""
    total = WARMUP_ROUNDS + rounds
    with workers("p2ptrain", peers, str(total), str(batch_ms)) as started:
        reports = [worker.hear(START_SECONDS + total * 1.0) for worker in started]
    latencies = []
    for step in map(str, range(WARMUP_ROUNDS, total)):
        if all(step in report["ready"] and report["peers"].get(step) == peers for report in reports):
            ready = max(report["ready"][step] for report in reports)
            latencies.append(max(report["applied"][step] for report in reports) - ready)
    return latencies


async def train_here(
    folder: Path,
    number: int,
    peers: int,
    entries: list[str],
    total: int,
    batch_ms: float,
    *,
    outputs: int = OUTPUTS,
    listen: str = "/ip4/127.0.0.1/tcp/0",
    data_port: int | None = None,
    settings: dict[str, Any] | None = None,
    task: Any = None,
    micro_batch_size: int = 1,
    log_megabytes: int = 256,
    stepped: Callable[[int, Any], None] = lambda step, replica: None,
) -> None:
    """In a worker: one peer, until `total` steps are made; then it waits for its stdin to end.

    `data_port`: as of `Libp2pSwarm`; `settings`: fields of the run that are not as here; `task`: another one
    than of pauses; `stepped` is told of each step and shown the replica.
    """
    import torch
    from torch import nn

    from p2ptrain import events
    from p2ptrain.config import Optimizer, PeerConfig, RunConfig, Schedule, fingerprint
    from p2ptrain.gradients.devices import CPU
    from p2ptrain.gradients.engine import Engine
    from p2ptrain.replica.flat import parameter_table
    from p2ptrain.replica.replica import Replica
    from p2ptrain.swarm.libp2p import Libp2pSwarm
    from p2ptrain.trainer import Peer, train

    torch.set_num_threads(1)
    pause = random.Random(number)
    ready: dict[int, float] = {}
    committed: dict[int, float] = {}
    applied: dict[int, float] = {}
    over_tls: dict[int, int] = {}
    computing: list[tuple[float, float]] = []
    rosters: dict[int, int] = {}
    samples: dict[int, int] = {}
    spans: dict[int, tuple[int, ...]] = {}
    sent: dict[int, int] = {}
    batch_ended = 0.0

    class Pauses:
        """A task whose micro-batch takes `batch_ms` ± 20 %, and hardly any of the processor."""

        note = shared_note = ""

        def build_model(self, seed: int) -> nn.Module:
            torch.manual_seed(seed)
            return nn.Linear(INPUTS, outputs)

        def batch(self, step: int, peer: str, first: int, count: int) -> Any:
            time.sleep(batch_ms / 1000 * pause.uniform(0.8, 1.2))
            return torch.ones(count, INPUTS)

        def loss_sum(self, model: nn.Module, batch: Any) -> torch.Tensor:
            return torch.as_tensor(model(batch)).square().sum()

        def evaluate(self, model: nn.Module) -> dict[str, float]:
            return {"loss": 0.0}

        def preview(self, model: nn.Module, prompt: str, length: int, generator: torch.Generator) -> str:
            return ""

    task = task or Pauses()
    usual = {
        "run_id": "latency",
        "total_steps": total,
        "target_batch_size": peers,
        "min_peers": peers,
        "optimizer": Optimizer(lr=1e-3),
        "schedule": Schedule(warmup_steps=0),
    }
    run = RunConfig.model_validate(usual | (settings or {}))
    model = task.build_model(run.seed)
    print_ = fingerprint(run, parameter_table(model))
    replica = Replica(model, run, print_)
    assert not isinstance(task, Pauses) or replica.numel == (INPUTS + 1) * outputs
    threads = ThreadPoolExecutor(1), ThreadPoolExecutor(2), ThreadPoolExecutor(1)

    async def compute(function: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal batch_ended
        name = function.__name__
        if name == "add":
            ready[replica.position.step] = batch_ended  # the last micro-batch that counted is what matters

        def timed() -> Any:
            nonlocal batch_ended
            began = time.monotonic()
            result = function(*arguments)
            if name == "_gradients":
                batch_ended = time.monotonic()
                computing.append((began, batch_ended))
            elif name == "_apply_now":
                applied[arguments[0].entry.header.step] = time.monotonic()
            return result

        return await asyncio.get_running_loop().run_in_executor(threads[0], timed)

    async def aside(function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(threads[1], function, *arguments)

    async def work(function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(threads[2], function, *arguments)

    def observe(event: events.Event) -> None:
        if isinstance(event, events.RoundCommitted):
            rosters[event.step] = event.peers
            samples[event.step] = event.mine
            committed[event.step] = time.monotonic() - event.apply_seconds
            over_tls[event.step] = swarm.carriers.get(events.Carrier.TLS, 0)
            assert replica.last is not None
            spans[event.step] = replica.last.spans
            sent[event.step] = sum(out for out, _ in swarm.traffic.values())
            stepped(event.step, replica)

    swarm = Libp2pSwarm(folder / f"{number}.key", run.run_id, print_, entries, [listen], data_port=data_port)
    async with swarm:
        say(addresses=swarm.visible_addresses())
        config = PeerConfig(
            micro_batch_size=micro_batch_size,
            eval_every_steps=0,
            checkpoint_every_steps=0,
            log_megabytes=log_megabytes,
        )
        peer = Peer(
            swarm,
            run,
            config,
            task,
            replica,
            Engine(replica.model, replica.gradient, CPU, micro_batch_size),
            fingerprint=print_,
            incarnation=str(number),
            compute=compute,
            aside=aside,
            work=work,
            observe=observe,
        )
        async with peer:
            await train(peer, run)
            say(
                ready=ready,
                committed=committed,
                applied=applied,
                peers=rosters,
                samples=samples,
                spans=spans,
                over_tls=over_tls,
                sent=sent,
                computing=computing,
            )
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for pool in threads:
        pool.shutdown()


# -- hivemind ------------------------------------------------------------------------------------------------


def measure_hivemind(
    peers: int, rounds: int, matchmaking_seconds: float
) -> tuple[dict[str, list[float]], int]:
    """Seconds of each round, by what was measured; and how many rounds failed or were partial."""
    latencies: dict[str, list[float]] = {}
    failed = 0
    for what, size_known, phases in (
        ("step", False, ("step",)),
        ("step_of_known_size", True, ("step",)),
        ("all_reduce_alone", True, ("match", "go")),
    ):
        latencies[what] = []
        with workers("hivemind", peers, str(matchmaking_seconds), str(int(size_known))) as started:
            for _ in range(rounds):
                for phase in phases:
                    # All are told at once, and the clock starts with the last of them.
                    for worker in started:
                        worker.tell(do=phase)
                    heard = [worker.hear(ROUND_SECONDS) for worker in started]
                if all(each["peers"] == peers for each in heard):
                    began = max(each["began"] for each in heard)
                    latencies[what].append(max(each["ended"] for each in heard) - began)
                else:
                    failed += 1
    return latencies, failed


def average_here(
    number: int, peers: int, entries: list[str], matchmaking_seconds: float, known: bool
) -> None:
    """In a worker: one averager that does as it is told, until its stdin ends."""
    import hivemind
    import torch
    from hivemind.averaging.control import AveragingStage

    torch.set_num_threads(1)
    dht = hivemind.DHT(initial_peers=entries, host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
    averager = hivemind.DecentralizedAverager(
        [torch.full((VALUES,), float(number))],
        dht,
        prefix="latency",
        target_group_size=peers if known else None,
        min_matchmaking_time=matchmaking_seconds,
        request_timeout=matchmaking_seconds * 0.9,  # it warns of deadlocks if this is not the smaller one
        sender_timeout=2.0,  # by default it waits for ever
        allreduce_timeout=5.0,
        start=True,
    )
    say(addresses=[str(address) for address in dht.get_visible_maddrs()])
    step: Any = None
    for line in sys.stdin:
        match json.loads(line)["do"]:
            case "step":
                began = time.monotonic()
                group = _group(partial(averager.step, timeout=ROUND_SECONDS / 2, allow_retries=False))
                say(began=began, ended=time.monotonic(), peers=group)
            case "match":
                step = averager.step(
                    wait=False, require_trigger=True, timeout=ROUND_SECONDS / 2, allow_retries=False
                )
                while step.stage is not AveragingStage.AWAITING_TRIGGER and not step.done():
                    time.sleep(0.001)
                say(began=0.0, ended=0.0, peers=peers)
            case "go":
                began = time.monotonic()
                step.allow_allreduce()
                group = _group(partial(step.result, timeout=ROUND_SECONDS / 2))
                say(began=began, ended=time.monotonic(), peers=group)


def _group(average: Callable[[], Any]) -> int:
    """How many peers were averaged over; 0 if it failed."""
    try:
        return len(average() or ())
    except Exception as error:  # whatever it was, that round does not count
        print(f"hivemind: {error!r}", file=sys.stderr)
        return 0


# -- the report ----------------------------------------------------------------------------------------------


def in_ms(seconds: Sequence[float]) -> dict[str, float | int | None]:
    if len(seconds) < 2:
        return {"rounds": len(seconds), "median_ms": None, "p95_ms": None, "max_ms": None}
    return {
        "rounds": len(seconds),
        "median_ms": round(statistics.median(seconds) * 1000, 1),
        "p95_ms": round(statistics.quantiles(seconds, n=20, method="inclusive")[-1] * 1000, 1),
        "max_ms": round(max(seconds) * 1000, 1),
    }


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        kind, folder, number, peers, entries, *rest = sys.argv[2:]
        if kind == "hivemind":
            average_here(int(number), int(peers), json.loads(entries), float(rest[0]), rest[1] == "1")
        else:
            import uvloop

            training = train_here(
                Path(folder), int(number), int(peers), json.loads(entries), int(rest[0]), float(rest[1])
            )
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(training)
        return

    parser = argparse.ArgumentParser(description="Latency of a round, beside hivemind's.")
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--batch-ms", type=float, default=50.0, help="length of a micro-batch, ± 20 %%")
    parser.add_argument("--hivemind-rounds", type=int, default=20, help="0: leave hivemind out")
    parser.add_argument(
        "--matchmaking-seconds", type=float, default=0.5, help="hivemind's min_matchmaking_time"
    )
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended, too

    report: dict[str, Any] = {"peers": chosen.peers, "values": VALUES, "batch_ms": chosen.batch_ms}
    report["load_before"] = round(os.getloadavg()[0], 1)
    report["p2ptrain"] = in_ms(measure_p2ptrain(chosen.peers, chosen.rounds, chosen.batch_ms))
    if chosen.hivemind_rounds and chosen.peers > 1:
        latencies, failed = measure_hivemind(chosen.peers, chosen.hivemind_rounds, chosen.matchmaking_seconds)
        report["hivemind"] = {
            "min_matchmaking_seconds": chosen.matchmaking_seconds,
            "failed_rounds": failed,
        } | {what: in_ms(seconds) for what, seconds in latencies.items()}
    if chosen.json:
        print(json.dumps(report))
        return
    rows = {"p2ptrain, ready to applied everywhere": report["p2ptrain"]}
    if "hivemind" in report:
        rows |= {f"hivemind, {what}": report["hivemind"][what] for what in latencies}
    print(f"{chosen.peers} peers, {VALUES:,} values, load average {report['load_before']} before")
    for what, row in rows.items():
        print(f"  {what:40}", *(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
