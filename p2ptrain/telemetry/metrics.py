"""What one peer exports to Prometheus: events folded into counters, and a few numbers that are read directly.

Every series is there from the first scrape on, and no label takes a value that this module does not know: the
page has the same size for a peer that met three others and for one that met three thousand. Which peer it is
about, the scraper knows. The one exception names the last few peers whose gradients stood out: who is to be
thrown out must be told by name.

Not covered: the swarm as a whole, which the monitor exports.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from importlib.metadata import version
from types import MappingProxyType
from typing import NoReturn, TypeVar, assert_never

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from p2ptrain import PROTOCOL_VERSION, __version__
from p2ptrain.events import (
    AbortCause,
    Carrier,
    CarrierChanged,
    CatchingUp,
    CatchUpBy,
    CatchUpFailed,
    CaughtUp,
    CheckpointFailed,
    CheckpointSaved,
    CopiesAveraged,
    DaemonRestarted,
    DataDuplicated,
    DataUnlike,
    DeadlinesChanged,
    DeviceChosen,
    Evaluated,
    Event,
    FaultCause,
    GainsEaten,
    Joined,
    LeaderTookOver,
    Leaving,
    MicroBatchShrunk,
    PartsUnited,
    Paused,
    PauseReason,
    PeerBenched,
    PeerConvicted,
    PeerFaulted,
    PeerKicked,
    PeerStoodOut,
    Previewed,
    ReachChanged,
    ReplicaDiverged,
    Resumed,
    RolledBack,
    RoundAborted,
    RoundCommitted,
    SamplesWasted,
    StateHashed,
    TermsApplied,
    TermsHeard,
    WaitingChanged,
    WasteCause,
    clean,
)
from p2ptrain.records import PeerId

LANES = ("control", "data", "request", "tls")
"""What moves bytes between peers; see `swarm.port`. Chunks go over `tls`, or else over `data`."""

ROUND_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""10 ms is two peers on one machine, 10 minutes a large model over home links."""

LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
"""Below 5 ms nobody notices; 1 s is a heartbeat, 5 s is silence and costs this peer its place."""


MOST_OUTLIERS = 8
"""Peers that are named at once; a liar that comes back under ever new names shows up as the last of them."""

Family = TypeVar("Family", Counter, Gauge, Histogram)


class PeerState(StrEnum):
    """What a peer is busy with."""

    JOINING = "joining"
    CATCHING_UP = "catching_up"
    ACCUMULATING = "accumulating"
    AVERAGING = "averaging"
    PAUSED = "paused"
    LEAVING = "leaving"


class Phase(StrEnum):
    """The parts of a committed round, each with its own time."""

    ACCUMULATE = "accumulate"
    REDUCE = "reduce"
    COMMIT = "commit"
    APPLY = "apply"


class Outcome(StrEnum):
    COMMITTED = "committed"
    ABORTED = "aborted"


class Fate(StrEnum):
    """What became of the samples that this peer computed."""

    COUNTED = "counted"
    WASTED = "wasted"


class DataFate(StrEnum):
    """What became of the leased samples of the run."""

    UNIQUE = "unique"
    LOST = "lost"
    REPEATED = "repeated"
    RETURNED = "returned"


class Wait(StrEnum):
    """What has a deadline that is derived from measurements."""

    SILENCE = "silence"
    REDUCE = "reduce"
    DIAL = "dial"
    REQUEST = "request"


class Extent(StrEnum):
    """How much of something there is."""

    DONE = "done"
    ALL = "all"


class Path(StrEnum):
    """How a connection goes."""

    DIRECT = "direct"
    RELAY = "relay"


class DataAlarm(StrEnum):
    """What gradients tell about the data that peers train on."""

    UNLIKE = "unlike"
    DUPLICATED = "duplicated"


class Split(StrEnum):
    TRAIN = "train"
    HELDOUT = "heldout"


class Operation(StrEnum):
    """What is asked of the DHT."""

    PUBLISH = "publish"
    LOOKUP = "lookup"


class Answer(StrEnum):
    """Whether what was asked was done."""

    OK = "ok"
    FAILED = "failed"


class Level(StrEnum):
    """How grave a log message is."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Route(StrEnum):
    """What was asked for over HTTP."""

    METRICS = "/metrics"
    LIVE = "/livez"
    READY = "/readyz"
    OTHER = "other"


class Code(StrEnum):
    """The class of an HTTP status."""

    OK = "2xx"
    MOVED = "3xx"
    REFUSED = "4xx"
    FAILED = "5xx"


def _with_all(family: Family, label: Mapping[str, type[StrEnum]]) -> Family:
    """The family with all its series: what is not there yet cannot be seen to rise."""
    if label:
        for values in itertools.product(*label.values()):
            family.labels(*values)
    return family


class LogCounter(logging.Handler):
    """Counts log messages from `info` up by their level; shows none."""

    def __init__(self, family: Counter) -> None:
        super().__init__(logging.INFO)
        self._family = family

    def emit(self, record: logging.LogRecord) -> None:
        graver = record.levelno >= logging.ERROR
        level = Level.ERROR if graver else Level.WARNING if record.levelno >= logging.WARNING else Level.INFO
        self._family.labels(level).inc()


class Metrics:
    """Every metric of one peer, in a registry of its own.

    `observe` folds events in. The public attributes are for what is no event: set them, observe into them, or
    point the `read_*` callables at whoever knows.
    """

    def __init__(
        self,
        run_id: str,
        fingerprint: str,
        *,
        sample_tokens: int = 0,
        about: Mapping[str, str] = MappingProxyType({}),
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`sample_tokens`: in one sample, 0 where there is no such thing; `about`: what does not change about
        this peer, never its id."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the number of counters
        self.registry = registry = CollectorRegistry()
        self._clock = clock
        self._sample_tokens = sample_tokens
        self.clips: int | None = None
        """Steps so far whose gradient was shortened; None before the first that might have been."""

        # A keyword argument is the family's label, with the values that it can take.
        def counter(name: str, text: str, **label: type[StrEnum]) -> Counter:
            return _with_all(Counter(f"p2ptrain_{name}", text, list(label), registry=registry), label)

        def gauge(name: str, text: str, **label: type[StrEnum]) -> Gauge:
            return _with_all(Gauge(f"p2ptrain_{name}", text, list(label), registry=registry), label)

        def histogram(
            name: str, text: str, buckets: tuple[float, ...] = ROUND_BUCKETS, **label: type[StrEnum]
        ) -> Histogram:
            family = Histogram(f"p2ptrain_{name}", text, list(label), registry=registry, buckets=buckets)
            return _with_all(family, label)

        # identity
        Info("p2ptrain_build", "Versions of what runs here.", registry=registry).info(
            {
                "version": __version__,
                "protocol": str(PROTOCOL_VERSION),
                "python": platform.python_version(),
                "torch": version("torch"),
                "hivemind": version("hivemind"),
            }
        )
        Info("p2ptrain_run", "The run that this peer trains.", registry=registry).info(
            {"run_id": run_id, "fingerprint": fingerprint}
        )
        Info("p2ptrain_peer", "How this peer takes part.", registry=registry).info(
            {"role": "train", "device": "cpu", **about}
        )
        self._waiting = gauge("waiting", "1 while this peer waits for what its log names.")
        self._paused = gauge("paused", "1 while this peer is paused for that reason.", reason=PauseReason)

        # rounds
        self._step = gauge("global_step", "Synchronized optimizer steps behind this replica.")
        self._rounds = histogram(
            "round_seconds", "From the freeze of an attempt to its apply or abort.", outcome=Outcome
        )
        self._phases = histogram(
            "round_phase_seconds", "Time in each phase of a committed round.", phase=Phase
        )
        self._aborts = counter("round_aborts_total", "Attempts that ended without a step.", cause=AbortCause)
        self._last_commit = gauge(
            "last_commit_timestamp_seconds", "When the last entry was applied; 0: never."
        )
        self._roster = gauge("roster_peers", "Peers on the roster of the last committed round.")
        self._averaged = counter(
            "averaged_samples_total", "Samples of all peers in the rounds committed here."
        )
        self._takeovers = counter("leader_takeovers_total", "Times that a successor took the lead of a step.")

        self._deadlines = gauge(
            "deadline_seconds", "How long this peer waits at present, as derived; 0: not yet.", wait=Wait
        )

        # training
        self._samples = counter(
            "samples_total", "Samples computed here, by whether a committed entry counts them.", outcome=Fate
        )
        self._tokens = counter(
            "tokens_total", "Tokens in the samples computed here that a committed entry counts."
        )
        self.micro_batch_seconds = histogram("micro_batch_seconds", "Time to compute one micro-batch.")
        self._data = gauge(
            "data_samples",
            "Leased samples of the run after its last round: counted, lost for want of a finite gradient, "
            "counted twice, and given back; 0 where samples are drawn.",
            fate=DataFate,
        )
        self._nonfinite = counter("nonfinite_gradients_total", "Own gradients that were not finite.")
        self._micro_batch = gauge("micro_batch_samples", "Most samples that the device computes at once.")
        self._loss = gauge("loss", "Last mean loss per sample in nats; NaN until known.", split=Split)
        self._norm = gauge(
            "gradient_norm", "Norm of the last averaged gradient, before clipping; NaN until known."
        )
        self._rate = gauge("learning_rate", "Learning rate of the last step.")
        self._noise_scale = gauge(
            "gradient_noise_scale_samples",
            "Samples beyond which a larger batch hardly improves a step; NaN until known.",
        )
        self._signal = gauge(
            "gradient_signal_norm_squared", "Squared norm of the gradient without its noise; NaN until known."
        )
        self._efficiency = gauge(
            "batch_efficiency_ratio",
            "Progress per sample at the last round's batch over that of small batches; NaN until known.",
        )
        self._excess = gauge(
            "gradient_noise_excess_ratio",
            "Noise between peers over that within this one: 1 for like data, more for unlike, less for the "
            "same samples; NaN until known.",
        )
        self._change_norm = gauge(
            "copies_change_norm",
            "Strategy local: norm of the mean change of all copies in the last round (the pseudo-gradient); "
            "NaN until known.",
        )
        self._change_cosine = gauge(
            "copies_change_cosine",
            "Strategy local: mean cosine between two peers' changes in the last round; NaN until known.",
        )
        self._consensus_distance = gauge(
            "copies_consensus_distance",
            "Strategy local: root mean squared distance of the copies from their average in the last round; "
            "NaN until known.",
        )
        self._barrier = gauge(
            "copies_averaging_barrier",
            "Strategy local: loss of the copies' average on a probe batch less that of this peer's copy, at "
            "the last look; NaN until known. Its mean over the peers below 0: averaging helps.",
        )
        self._gamma = gauge(
            "union_gamma_ratio",
            "Strategy partition: by what the last union of all parts was multiplied; NaN until known.",
        )
        self._defect = gauge(
            "cohesion_defect_nats",
            "Strategy partition: what parts that were trained apart lost when they were put together, by the "
            "last round that tells; NaN until known.",
        )
        self._parts_change = gauge(
            "parts_loss_change_nats",
            "Strategy partition: change of the loss by each part alone, added up, in that round; NaN until "
            "known.",
        )
        self._data_alarms = counter(
            "data_alarms_total",
            "Times that a peer's data looked unlike the others', or the same as theirs.",
            alarm=DataAlarm,
        )
        self._computed = counter(
            "compute_seconds_total", "Time in micro-batches; its rate is the share of the time put to use."
        )

        # network
        self._faults = counter(
            "peer_faults_total", "Things that peers did wrong and this one survived.", cause=FaultCause
        )
        self._benched = counter("peer_benches_total", "Times that a peer was left out for what it had done.")
        self._terms = gauge("terms_revision", "Of the organizer's changes to the run, as heard of.")
        self._kicked = counter("peer_kicks_total", "Times that the organizer put a peer out.")
        self._convicted = counter("peer_convictions_total", "Peers that were proven to have lied.")
        self._carrier_changes = counter(
            "carrier_changes_total", "Times that a peer's chunks began to go this way.", carrier=Carrier
        )
        self._outlier_rounds = Counter(
            "p2ptrain_outlier_rounds_total",
            f"Rounds in which a peer's gradient stood out, for the last {MOST_OUTLIERS} peers named for it.",
            ["peer"],
            registry=registry,
        )
        self._outliers: list[str] = []
        self._restarts = counter(
            "daemon_restarts_total", "Times that the libp2p daemon died and was restarted."
        )
        self.hidden = gauge("hidden", "1 while other peers cannot open connections to this one.")
        self.connected_peers = gauge("connected_peers", "Peers that this one is connected to.")

        self.clock_offset_seconds = gauge(
            "clock_offset_seconds", "By how much an initial peer's clock is ahead; NaN until known."
        )
        self.dht_contacts = gauge("dht_contacts", "Nodes that this peer's DHT node knows.")
        self.dht_request_seconds = histogram(
            "dht_request_seconds",
            "Time to publish a record, or to look up those of one kind.",
            operation=Operation,
            outcome=Answer,
        )

        # state
        self._catch_ups = histogram("catch_up_seconds", "Time to adopt the swarm's state.", how=CatchUpBy)
        self.catch_up_parts = gauge(
            "catch_up_parts", "Pieces or entries of the catch-up under way; 0 while there is none.", of=Extent
        )
        self.catch_up_bytes = gauge(
            "catch_up_bytes", "Bytes of the catch-up under way; 0 while there is none.", of=Extent
        )
        self._catch_up_failures = counter("catch_up_failures_total", "Donors that did not bring the state.")
        self._rollbacks = counter("rollbacks_total", "Times that a heavier lineage replaced this replica's.")
        self._rolled_back = counter(
            "rolled_back_samples_total", "Samples of all peers given up by rollbacks."
        )
        self._diverged = counter(
            "state_digest_mismatches_total", "Times that this replica differed from others at equal lineage."
        )
        self._checkpoints = histogram("checkpoint_seconds", "Time to write one checkpoint.")
        self._checkpoint_failures = counter("checkpoint_failures_total", "Checkpoints that were not written.")
        self._checkpoint_at = gauge(
            "last_checkpoint_timestamp_seconds", "When the last checkpoint was written; 0: never."
        )
        self._checkpoint_bytes = gauge("checkpoint_bytes", "Size of the last checkpoint.")

        # process
        self.event_loop_lag_seconds = histogram(
            "event_loop_lag_seconds", "How late the event loop ran a timer.", LAG_BUCKETS
        )
        self.log_messages = counter("log_messages_total", "Messages logged, by level.", level=Level)
        self._http_requests = counter(
            "http_requests_total", "Requests answered by the pages of this process.", route=Route, code=Code
        )
        self.device_memory_bytes = gauge("device_memory_bytes", "Accelerator memory in use; 0 on a CPU.")
        self.read_state: Callable[[], PeerState] = lambda: PeerState.JOINING
        """What the peer is busy with."""
        self.read_traffic: Callable[[], Mapping[str, tuple[int, int]]] = dict
        """Lane → bytes (sent, received) so far; a lane that is not in `LANES` is left out."""
        self.read_carriers: Callable[[], Mapping[Carrier, int]] = dict
        """Carrier → peers whose chunks it carries."""
        self.read_links: Callable[[], Mapping[str, int]] = dict
        """Path → connections with peers."""
        self.read_journal_lost: Callable[[], int] = int
        """Events that the journal could not keep."""
        self.read_donated: Callable[[], int] = int
        """Bytes given to peers that were catching up."""
        registry.register(_Readings(self))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

        for unknown in (
            self._norm,
            self.clock_offset_seconds,
            self._noise_scale,
            self._signal,
            self._efficiency,
            self._excess,
            self._change_norm,
            self._change_cosine,
            self._consensus_distance,
            self._barrier,
            self._gamma,
            self._defect,
            self._parts_change,
            *(self._loss.labels(split) for split in Split),
        ):
            unknown.set(math.nan)  # 0 would be the best loss of all

    def page(self) -> bytes:
        """All metrics as Prometheus text 0.0.4, about 20 kB in 2 ms."""
        return generate_latest(self.registry)

    def asked_dht(self, operation: str, ok: bool, seconds: float) -> None:
        """The DHT did what it was asked, or not."""
        outcome = Answer.OK if ok else Answer.FAILED
        self.dht_request_seconds.labels(Operation(operation), outcome).observe(seconds)

    def answered_http(self, path: str, status: int) -> None:
        """A page of this process was asked for; paths that are none of its own count as `other`."""
        path = "/livez" if path == "/healthz" else path
        route = Route(path) if path in set(Route) else Route.OTHER
        self._http_requests.labels(route, f"{status // 100}xx").inc()

    def observe(self, event: Event) -> None:
        """Fold in what happened."""
        match event:
            case RoundCommitted():
                self._committed(event)
            case RoundAborted():
                self._rounds.labels(Outcome.ABORTED).observe(event.seconds)
                self._aborts.labels(event.cause).inc()
            case LeaderTookOver():
                self._takeovers.inc()
            case SamplesWasted():
                self._samples.labels(Fate.WASTED).inc(event.samples)
                if event.cause is WasteCause.NONFINITE:
                    self._nonfinite.inc()
            case DeviceChosen():
                self._micro_batch.set(event.samples)
            case MicroBatchShrunk():
                self._micro_batch.set(event.to_samples)
            case CaughtUp():
                self._step.set(event.to_step)
                self._catch_ups.labels(event.how).observe(event.seconds)
            case CatchUpFailed():
                self._catch_up_failures.inc()
            case RolledBack():
                self._step.set(event.to_step)
                self._rollbacks.inc()
                self._rolled_back.inc(event.samples_lost)
            case ReplicaDiverged():
                self._diverged.inc()
            case Evaluated():
                self._loss.labels(Split.HELDOUT).set(event.loss)
            case CopiesAveraged():
                self._copies_averaged(event)
            case CheckpointSaved():
                self._checkpoints.observe(event.seconds)
                self._checkpoint_at.set(self._clock())
                self._checkpoint_bytes.set(event.size_bytes)
            case CheckpointFailed():
                self._checkpoint_failures.inc()
            case PeerFaulted():
                self._faults.labels(event.cause).inc()
            case PeerBenched():
                self._benched.inc()
            case PeerKicked():
                self._kicked.inc()
            case PeerConvicted():
                self._convicted.inc()
            case CarrierChanged():
                self._carrier_changes.labels(event.carrier).inc()
            case PeerStoodOut():
                self._stood_out(event.peer, event.rounds)
            case DataUnlike():
                self._data_alarms.labels(DataAlarm.UNLIKE).inc()
            case PartsUnited():
                self._parts_united(event)
            case DataDuplicated():
                self._data_alarms.labels(DataAlarm.DUPLICATED).inc()
            case DaemonRestarted():
                self._restarts.inc()
            case DeadlinesChanged():
                self._deadlines.labels(Wait.SILENCE).set(event.silence_seconds)
                self._deadlines.labels(Wait.REDUCE).set(event.reduce_seconds)
                self._deadlines.labels(Wait.DIAL).set(event.dial_seconds)
                self._deadlines.labels(Wait.REQUEST).set(event.request_seconds)
            case WaitingChanged():
                self._waiting.set(bool(event.reason))
            case Paused():
                self._set_paused(event.reasons)
            case Resumed():
                self._set_paused(())
            case TermsHeard():
                self._terms.set(event.revision)
            case Joined() | Leaving() | StateHashed() | Previewed() | CatchingUp() | ReachChanged():
                pass  # nothing to count: these are for the journal
            case TermsApplied() | GainsEaten():
                pass  # the learning rate, and the cohesion defect, have metrics of their own
            case _:
                assert_never(event)

    def _copies_averaged(self, event: CopiesAveraged) -> None:
        self._change_norm.set(event.change_norm)
        self._change_cosine.set(math.nan if event.cosine is None else event.cosine)
        distance = event.consensus_distance
        self._consensus_distance.set(math.nan if distance is None else distance)
        if event.barrier is not None:
            self._barrier.set(event.barrier)

    def _set_paused(self, reasons: Sequence[PauseReason]) -> None:
        for reason in PauseReason:
            self._paused.labels(reason).set(reason in reasons)

    def _stood_out(self, peer: PeerId, rounds: int) -> None:
        name = clean(peer[-8:])
        self._outliers = [*(other for other in self._outliers if other != name), name]
        for forgotten in self._outliers[:-MOST_OUTLIERS]:
            self._outlier_rounds.remove(forgotten)
        self._outliers = self._outliers[-MOST_OUTLIERS:]
        self._outlier_rounds.labels(name).inc(rounds)

    def _parts_united(self, event: PartsUnited) -> None:
        self._gamma.set(event.gamma)
        if event.defect is not None and event.parts_change is not None:
            self._defect.set(event.defect)
            self._parts_change.set(event.parts_change)

    def _committed(self, event: RoundCommitted) -> None:
        self._step.set(event.step + 1)
        self._rounds.labels(Outcome.COMMITTED).observe(event.seconds)
        for phase, seconds in (
            (Phase.ACCUMULATE, event.accumulate_seconds),
            (Phase.REDUCE, event.reduce_seconds),
            (Phase.COMMIT, event.commit_seconds),
            (Phase.APPLY, event.apply_seconds),
        ):
            self._phases.labels(phase).observe(seconds)
        self._computed.inc(event.compute_seconds)
        self._last_commit.set(self._clock())
        self._roster.set(event.peers)
        self._averaged.inc(event.samples)
        self._samples.labels(Fate.COUNTED).inc(event.mine)
        for fate in DataFate:
            self._data.labels(fate).set(getattr(event, fate))
        self._tokens.inc(event.mine * self._sample_tokens)
        if event.clipped is not None:
            self.clips = (self.clips or 0) + event.clipped
        if event.loss is not None:
            self._loss.labels(Split.TRAIN).set(event.loss)
        self._norm.set(event.gradient_norm)
        scale = math.nan if event.noise_scale is None else event.noise_scale
        self._noise_scale.set(scale)
        self._signal.set(math.nan if event.signal_norm_squared is None else event.signal_norm_squared)
        # Where there is no noise, nothing is gained by a second sample.
        self._efficiency.set(1 / (1 + event.samples / scale) if scale else 0.0)
        self._excess.set(math.nan if event.noise_excess is None else event.noise_excess)
        self._rate.set(event.learning_rate)


class _Readings(Collector):
    """What others know; read when the page is."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        current = self._metrics.read_state()
        states = GaugeMetricFamily(
            "p2ptrain_peer_state", "1 for what this peer is busy with.", labels=["state"]
        )
        for state in PeerState:
            states.add_metric([state], state is current)
        yield states
        traffic = self._metrics.read_traffic()
        for place, (direction, text) in enumerate((("sent", "sent to"), ("received", "received from"))):
            family = CounterMetricFamily(
                f"p2ptrain_{direction}_bytes", f"Bytes {text} peers, framing included.", labels=["lane"]
            )
            for lane in LANES:
                family.add_metric([lane], traffic.get(lane, (0, 0))[place])
            yield family
        yield CounterMetricFamily(
            "p2ptrain_gradient_clips",
            "Steps whose gradient was shortened to clip_norm; not there with strategies that shorten none.",
            value=self._metrics.clips,
        )
        carriers = GaugeMetricFamily(
            "p2ptrain_carrier_peers", "Peers whose chunks go this way.", labels=["carrier"]
        )
        for carrier in Carrier:
            carriers.add_metric([carrier], self._metrics.read_carriers().get(carrier, 0))
        yield carriers
        links = GaugeMetricFamily(
            "p2ptrain_links", "Peers that this one is connected to, by the way it goes.", labels=["path"]
        )
        for path in Path:
            links.add_metric([path], self._metrics.read_links().get(path, 0))
        yield links
        yield CounterMetricFamily(
            "p2ptrain_donated_bytes",
            "Bytes of snapshots and entries given to peers that were catching up.",
            value=self._metrics.read_donated(),
        )
        yield CounterMetricFamily(
            "p2ptrain_journal_lost_events",
            "Events that the journal could not keep, for want of disk.",
            value=self._metrics.read_journal_lost(),
        )


async def watch_event_loop(observe: Callable[[float], object], period_seconds: float = 0.5) -> NoReturn:
    """Tell `observe` every period how many seconds late the loop ran this timer. Ends when cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + period_seconds
        await asyncio.sleep(period_seconds)
        observe(max(0.0, loop.time() - due))
