"""One of each event, for the tests of whatever takes them."""

from __future__ import annotations

from dataclasses import replace

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
)
from p2ptrain.records import PeerId

ANNA = PeerId("12D3KooWAnnaAnnaAnnaAnna1111aaaa")
BERT = PeerId("12D3KooWBertBertBertBert2222bbbb")

COMMITTED = RoundCommitted(
    step=41,
    attempt=1,
    samples=4112,
    mine=512,
    peers=7,
    loss=2.25,
    gradient_norm=0.5,
    learning_rate=0.002,
    compute_seconds=8.5,
    accumulate_seconds=9.0,
    reduce_seconds=2.9,
    commit_seconds=0.2,
    apply_seconds=0.1,
    lineage="a1" * 32,
    digest="b2" * 32,
)
LEASED = replace(
    COMMITTED, parent="d4" * 32, taken=((0, 4000), (8192, 8304)), unique=150_000, lost=8, returned=4192
)
ABORTED = RoundAborted(step=41, attempt=2, cause=AbortCause.PEER_LOST, dropped=(BERT,), seconds=1.3)
WASTED = SamplesWasted(step=41, samples=512, cause=WasteCause.BEHIND)
CAUGHT_UP = CaughtUp(from_step=12, to_step=41, how=CatchUpBy.SNAPSHOT, received_bytes=9_800_000, seconds=2.1)
CATCHING_UP = CatchingUp(
    step=12,
    what="pieces",
    done=12,
    total=48,
    done_bytes=12_600_000,
    total_bytes=50_300_000,
    bytes_per_second=4_200_000.0,
    eta_seconds=9.0,
    donors=3,
)
ROLLED_BACK = RolledBack(from_step=44, to_step=41, samples_lost=1024, lineage="c3" * 32)
SAVED = CheckpointSaved(step=200, path="checkpoints/step-00000200", size_bytes=3_400_000, seconds=0.038)
WAITING = WaitingChanged(reason="2 of 3 peers")
PAUSED = Paused(reasons=(PauseReason.USER,), seconds=7200.0)
RESUMED = Resumed(reasons=(PauseReason.USER,), seconds=4000.0)
STOOD_OUT = PeerStoodOut(step=41, peer=BERT, rounds=8)

ONE_OF_EACH: tuple[Event, ...] = (
    Joined(run_id="python-stdlib", peer=ANNA, name="anna", others=6),
    WAITING,
    PAUSED,
    RESUMED,
    DeadlinesChanged(silence_seconds=5.0, reduce_seconds=29.0, dial_seconds=1.0, request_seconds=13.0),
    COMMITTED,
    StateHashed(step=42, lineage="a1" * 32, state_digest="d4" * 32),
    ABORTED,
    LeaderTookOver(step=41, attempt=3, leader=ANNA),
    WASTED,
    DeviceChosen(device="cuda:0 (NVIDIA T4)", precision="fp16", samples=32, samples_per_second=410.5),
    MicroBatchShrunk(step=41, device="cuda:0", from_samples=32, to_samples=16),
    CATCHING_UP,
    CAUGHT_UP,
    CatchUpFailed(from_step=12, donor=BERT, reason="no such snapshot"),
    ROLLED_BACK,
    ReplicaDiverged(step=41, ours="d4" * 32, theirs="e5" * 32),
    Evaluated(step=200, loss=1.9406, bits_per_byte=2.7997, seconds=0.4, zlib_bits_per_byte=2.2),
    CopiesAveraged(
        step=200,
        change_norm=0.31,
        cosine=0.42,
        consensus_distance=0.29,
        own_loss=1.985,
        average_loss=1.95,
    ),
    PartsUnited(step=200, owners=4, gamma=0.5, union_change=0.733, parts_change=-0.199),
    GainsEaten(step=200, rounds=8, parts_change=-0.199, defect=0.932),
    Previewed(step=200, text="def get(self):\n    return self._value\n"),
    SAVED,
    CheckpointFailed(step=400, reason="no space left on device"),
    PeerFaulted(peer=BERT, cause=FaultCause.BAD_MESSAGE, detail="chunk 3 has 12 bytes, not 131076"),
    PeerBenched(peer=BERT, offences=3, seconds=120.0, reason="a chunk of 5 bytes, not 8"),
    PeerKicked(peer=BERT, seconds=3600.0, reason="it stalls"),
    TermsHeard(revision=3, says=("optimizer.lr = 0.0002 from step 500", "the run is over at step 9,000")),
    TermsApplied(step=500, changes=("optimizer.lr = 0.0002",)),
    CarrierChanged(peer=BERT, carrier=Carrier.LIBP2P, reason="192.0.2.7 port 4433: no answer within 5 s"),
    STOOD_OUT,
    PeerConvicted(step=41, peer=BERT, reason="it signed two different gradients for one round"),
    DataUnlike(step=41, peer=BERT, noise_excess=3.14),
    DataDuplicated(step=41, noise_excess=0.02),
    ReachChanged(reachable=False, address="/ip4/203.0.113.7/tcp/31337", relays=1),
    DaemonRestarted(seconds=0.8),
    Leaving(step=500, reason="asked to", rounds=412, samples=12_288),
)
