"""The entry log: consecutive, bounded, and able to say what it was asked long ago."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from replicas import FINGERPRINT, entry_at, small_run

from p2ptrain.errors import BadMessage
from p2ptrain.gradients.codecs import codec_named
from p2ptrain.protocol.lineage import advance, genesis
from p2ptrain.records import Position
from p2ptrain.replica import log as log_module
from p2ptrain.replica.log import Entry, EntryLog, entry_digest, entry_ranges, payload_digest, verify_entry

RUN = small_run(codec="fp32")
NUMEL = 3000
START = genesis(FINGERPRINT, "0" * 64)


def entries_from(position: Position, count: int) -> tuple[list[Entry], list[Position]]:
    """Consecutive entries, and the position before each and after the last."""
    entries, positions = [], [position]
    for _ in range(count):
        entries.append(entry_at(positions[-1], RUN, torch.full((10,), float(positions[-1].step))))
        positions.append(advance(positions[-1], entries[-1].header))
    return entries, positions


def filled(max_bytes: int, count: int) -> tuple[EntryLog, list[Entry], list[Position]]:
    entries, positions = entries_from(START, count)
    log = EntryLog(max_bytes, START)
    for entry in entries:
        log.append(entry)
    return log, entries, positions


# -- the layout of an entry ----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5000), min_size=0, max_size=6), st.integers(1, 5000), st.integers(1, 2000))
def test_entry_ranges_cover_every_value_once_in_order_when_spans_are_cut(
    cuts: list[int], numel: int, chunk_values: int
) -> None:
    spans = (0, *sorted(min(cut, numel) for cut in cuts), numel)
    ranges = entry_ranges(spans, numel, chunk_values)
    assert [value for start, stop in ranges for value in range(start, stop)] == list(range(numel))
    assert all(0 < stop - start <= chunk_values for start, stop in ranges)
    for boundary in spans[1:-1]:  # no chunk has two reducers
        assert not any(start < boundary < stop for start, stop in ranges)


@pytest.mark.parametrize("spans", [(0, 10), (1, NUMEL), (0, NUMEL + 1), (0, 2000, 1000, NUMEL), (0, 0)])
def test_entry_ranges_refuses_spans_when_they_do_not_cover_the_vector(spans: tuple[int, ...]) -> None:
    with pytest.raises(BadMessage, match="spans"):
        entry_ranges(spans, NUMEL, 1024)


@pytest.mark.parametrize("spans", [(0, NUMEL), (0, 1000, 2500, NUMEL), (0, 0, NUMEL, NUMEL)])
@pytest.mark.parametrize("codec", ["fp32", "fp16"])
def test_payload_digest_is_that_of_the_chunks_when_recomputed(codec: str, spans: tuple[int, ...]) -> None:
    entry = entry_at(START, small_run(codec=codec), torch.randn(NUMEL), spans)
    assert payload_digest(entry, codec_named(codec), 1024, NUMEL) == entry.header.digest
    verify_entry(entry, codec_named(codec), 1024, NUMEL)


def test_entry_digest_tells_chunks_apart_when_their_bytes_joined_are_the_same() -> None:
    assert entry_digest([b"ab", b"c"]) != entry_digest([b"a", b"bc"])


@pytest.mark.parametrize("at", [0, 5, 4 * 1024, 4 * NUMEL - 1])
def test_verify_entry_refuses_a_payload_when_any_byte_was_changed(at: int) -> None:
    entry = entry_at(START, RUN, torch.ones(NUMEL))
    payload = bytearray(entry.payload)
    payload[at] ^= 1
    with pytest.raises(BadMessage, match="entry 0 has digest"):
        verify_entry(replace(entry, payload=bytes(payload)), codec_named("fp32"), 1024, NUMEL)


@pytest.mark.parametrize("change", [lambda p: p[:-1], lambda p: p + b"\0", lambda p: b""])
def test_verify_entry_refuses_a_payload_when_its_size_is_wrong(change) -> None:
    entry = entry_at(START, RUN, torch.ones(NUMEL))
    with pytest.raises(BadMessage, match="must have 12000 bytes"):
        verify_entry(replace(entry, payload=change(entry.payload)), codec_named("fp32"), 1024, NUMEL)


# -- the log -------------------------------------------------------------------------------------------------


def test_log_knows_only_where_it_starts_when_nothing_was_appended() -> None:
    log = EntryLog(1000, START)
    assert (log.step, log.oldest, log.newest, log.get(0)) == (0, None, None, None)
    assert log.lineage_at(0) == START.lineage
    assert log.lineage_at(1) is None


def test_log_gives_back_entries_and_lineages_when_they_were_appended() -> None:
    log, entries, positions = filled(10**6, 5)
    assert [log.get(step) for step in range(5)] == entries
    assert [log.lineage_at(step) for step in range(6)] == [position.lineage for position in positions]
    assert (log.step, log.oldest, log.newest) == (5, 0, 4)
    assert [log.get(step) for step in (-1, 5)] == [None, None]
    assert [log.lineage_at(step) for step in (-1, 6)] == [None, None]


def test_log_refuses_an_entry_when_it_does_not_follow() -> None:
    log, entries, _ = filled(10**6, 3)
    stranger = entry_at(Position(step=3, lineage="e" * 64, weight=0), RUN, torch.ones(10))
    skipping = entries_from(START, 5)[0][4]
    for wrong in (entries[2], entries[0], stranger, skipping):
        with pytest.raises(ValueError, match="does not follow"):
            log.append(wrong)
    assert (log.step, log.newest, log.payload_bytes) == (3, 2, 3 * 40)


def test_log_drops_the_oldest_entries_and_keeps_their_lineage_when_it_is_full() -> None:
    log, entries, positions = filled(100, 5)  # two entries of 40 bytes fit
    assert (log.oldest, log.newest, log.payload_bytes) == (3, 4, 80)
    assert log.get(2) is None
    assert log.get(3) == entries[3]
    assert [log.lineage_at(step) for step in range(6)] == [position.lineage for position in positions]


def test_log_keeps_the_newest_entry_when_it_alone_exceeds_the_bound() -> None:
    log, entries, _ = filled(1, 3)
    assert (log.oldest, log.newest) == (2, 2)
    assert log.get(2) == entries[2]


def test_log_keeps_what_a_joiner_will_need_when_told_so_and_within_a_bound() -> None:
    log, entries, _ = filled(100, 5)  # two entries of 40 bytes fit: 3 and 4
    log.hold(4, extra_bytes=100)
    more, _ = entries_from(START, 12)
    for entry in more[5:8]:
        log.append(entry)
    assert (log.oldest, log.newest) == (4, 7)
    for entry in more[8:11]:
        log.append(entry)
    assert log.oldest == 6  # five fit into 200 bytes
    log.hold(None)
    log.append(more[11])
    assert log.oldest == 10
    assert log.get(4) is None
    assert entries[4] == more[4]


def test_log_starts_anywhere_when_a_snapshot_was_loaded() -> None:
    log, _, _ = filled(10**6, 3)
    elsewhere = Position(step=70, lineage="a" * 64, weight=500)
    log.restart(elsewhere)
    assert (log.step, log.oldest, log.payload_bytes) == (70, None, 0)
    assert log.lineage_at(2) is None
    entries, positions = entries_from(elsewhere, 2)
    for entry in entries:
        log.append(entry)
    assert log.get(71) == entries[1]
    assert log.lineage_at(72) == positions[2].lineage


def test_log_forgets_what_came_after_when_it_goes_back() -> None:
    log, entries, positions = filled(10**6, 5)
    log.truncate_after(3)
    assert (log.step, log.newest, log.payload_bytes) == (3, 2, 3 * 40)
    assert log.lineage_at(3) == positions[3].lineage
    assert log.lineage_at(4) is None
    log.append(entries[3])
    assert log.step == 4


def test_log_goes_back_behind_its_entries_when_it_still_knows_the_lineage() -> None:
    log, entries, _ = filled(1, 5)
    log.truncate_after(1)
    assert (log.step, log.oldest, log.payload_bytes) == (1, None, 0)
    log.append(entries[1])
    assert log.oldest == 1


@pytest.mark.parametrize("step", [-1, 6])
def test_log_refuses_to_go_back_when_it_does_not_know_the_step(step: int) -> None:
    log, _, _ = filled(10**6, 5)
    with pytest.raises(ValueError, match="the log knows 0 to 5"):
        log.truncate_after(step)


def test_log_forgets_the_oldest_lineages_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "MAX_LINEAGES", 4)
    log, _, positions = filled(10**6, 9)
    assert [log.lineage_at(step) for step in (5, 6, 9)] == [None, *(positions[s].lineage for s in (6, 9))]
    assert log.step == 9


def test_log_knows_lineages_from_before_it_began_when_a_checkpoint_brought_them() -> None:
    log, _, positions = filled(10**6, 5)
    kept = log.lineages(positions[3])
    later = EntryLog(10**6, positions[3], kept)
    known = [later.lineage_at(step) for step in range(5)]
    assert known == [*(position.lineage for position in positions[:4]), None]
    assert later.step == 3
    assert EntryLog(10**6, positions[3], b"x" * 64).lineage_at(2) is None, "they lead elsewhere"
    stranger = START.model_copy(update={"lineage": "f" * 64})
    assert log.lineages(stranger) == b"\xff" * 32, "that state is not of this log"
