"""Events: their sentences, their machine form, and strangers' words in them."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, get_args

import pytest
from event_examples import (
    ABORTED,
    BERT,
    CATCHING_UP,
    CAUGHT_UP,
    COMMITTED,
    ONE_OF_EACH,
    PAUSED,
    RESUMED,
    ROLLED_BACK,
    SAVED,
    STOOD_OUT,
    WAITING,
    WASTED,
)

from p2ptrain.events import CatchUpFailed, Event, clean, duration, from_dict
from p2ptrain.records import PeerId


def test_examples_hold_every_event_when_one_is_added() -> None:
    assert {type(event) for event in ONE_OF_EACH} == set(get_args(Event))


def test_sentence_tells_the_volunteers_story_when_a_round_is_committed() -> None:
    assert COMMITTED.sentence() == "step 41: averaged 4,112 samples from 7 peers in 3.2 s; you gave 512"


def test_sentence_tells_how_far_a_catch_up_is_and_what_it_took() -> None:
    assert CATCHING_UP.sentence() == (
        "catching up: 12 of 48 pieces, 12.6 of 50.3 MB (3 donors, 4.2 MB/s, 9.0 s left)"
    )
    assert CAUGHT_UP.sentence() == "caught up from step 12 to 41 by snapshot (9.8 MB in 2.1 s)"
    several = dataclasses.replace(CAUGHT_UP, donors=3, resumed_bytes=2_000_000)
    assert several.sentence().endswith("(9.8 MB from 3 donors in 2.1 s beside 2.0 MB from before)")


def test_sentence_has_no_plural_when_there_is_one() -> None:
    alone = dataclasses.replace(COMMITTED, samples=1, mine=1, peers=1)
    assert alone.sentence() == "step 41: averaged 1 sample from 1 peer in 3.2 s; you gave 1"


def test_sentence_names_cause_and_dropped_peers_when_an_attempt_is_aborted() -> None:
    assert ABORTED.sentence() == (
        "step 41: attempt 2 aborted after 1.3 s, a peer was lost; without …2222bbbb from here; "
        "contributions are kept"
    )


def test_sentence_tells_why_and_how_long_a_peer_is_paused() -> None:
    assert PAUSED.sentence() == "paused, for 2 h 0 min: you asked for it"
    assert dataclasses.replace(PAUSED, seconds=None).sentence() == "paused: you asked for it"
    assert RESUMED.sentence() == "training again, after a pause of 1 h 7 min"


def test_sentence_names_the_peer_whose_gradients_stood_out() -> None:
    assert STOOD_OUT.sentence() == (
        "step 41: the gradients of …2222bbbb are unlike the others', in 8 rounds more"
    )


def test_sentence_stays_short_when_a_whole_roster_is_dropped() -> None:
    dropped = tuple(PeerId(f"12D3KooW{number:08d}") for number in range(256))
    assert "…00000002 and 253 more" in dataclasses.replace(ABORTED, dropped=dropped).sentence()


def test_sentences_read_well_when_numbers_are_small() -> None:
    assert SAVED.sentence() == ("step 200: checkpoint saved to checkpoints/step-00000200 (3.4 MB in 38 ms)")
    assert WASTED.sentence() == (
        "step 41: 512 samples of yours did not count, the swarm stepped without this peer"
    )
    assert dataclasses.replace(WAITING, reason="").sentence() == "no longer waiting"


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: event.event)
def test_sentence_is_one_printable_line_when_a_stranger_wrote_its_text(event: Event) -> None:
    hostile = "\x1b[2J\nstep 99: all is well\u202e" + "x" * 10_000
    fields: dict[str, Any] = {
        field.name: hostile
        for field in dataclasses.fields(event)
        if field.name in {"peer", "leader", "donor", "name", "reason", "detail"}
    }
    sentence = dataclasses.replace(event, **fields).sentence()
    assert sentence.isprintable()
    assert len(sentence) < 500


def test_event_names_are_snake_case_and_unique_when_listed() -> None:
    names = [event.event for event in ONE_OF_EACH]
    assert len(set(names)) == len(names)
    assert all(name.isascii() and name.islower() and name.replace("_", "").isalpha() for name in names)


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: event.event)
def test_dict_survives_strict_json_when_read_back(event: Event) -> None:
    record = event.to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["event"] == event.event
    assert set(record) == {"event", *(field.name for field in dataclasses.fields(event))}


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: event.event)
def test_event_is_the_same_when_read_from_a_journal(event: Event) -> None:
    record = json.loads(json.dumps(event.to_dict()))
    assert from_dict({"time": "2026-01-01T00:00:00Z", **record, "added_later": 1}) == event


@pytest.mark.parametrize(
    "damage",
    [
        {"event": "unheard_of"},
        {"event": ["round_aborted"]},
        {"cause": "a whim"},
        {"step": "41"},
        {"dropped": "all"},
        {"seconds": True},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_no_event_is_read_when_its_record_is_damaged_or_of_a_newer_version(damage: dict[str, Any]) -> None:
    assert from_dict(ABORTED.to_dict()) == ABORTED
    assert from_dict({**ABORTED.to_dict(), **damage}) is None
    torn = ABORTED.to_dict()
    del torn["cause"]
    assert from_dict(torn) is None


def test_dict_holds_plain_values_when_fields_are_enums_or_tuples() -> None:
    record = ABORTED.to_dict()
    assert type(record["cause"]) is str
    assert record["dropped"] == [BERT]


def test_dict_holds_none_when_a_loss_is_not_finite() -> None:
    assert dataclasses.replace(COMMITTED, loss=math.nan).to_dict()["loss"] is None
    assert dataclasses.replace(COMMITTED, gradient_norm=math.inf).to_dict()["gradient_norm"] is None


def test_reason_is_cut_when_it_is_long() -> None:
    assert clean("y" * 200) == "y" * 200
    assert clean("y" * 201) == "y" * 199 + "…"
    failed = CatchUpFailed(from_step=0, donor=BERT, reason="no\r\nno")
    assert failed.sentence() == "could not catch up from step 0 with …2222bbbb: no��no"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "0 ms"),
        (0.0384, "38 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.0 s"),
        (3.2, "3.2 s"),
        (99.94, "99.9 s"),
        (99.96, "1 min 40 s"),
        (250.4, "4 min 10 s"),
        (7499.0, "2 h 5 min"),
        (273_600.0, "3 d 4 h"),
    ],
)
def test_duration_keeps_about_two_digits_when_shown(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_rollback_says_whose_lie_was_undone() -> None:
    lied = dataclasses.replace(ROLLED_BACK, liar=BERT)
    assert lied.sentence() == (
        "rolled back from step 44 to 41: 1,024 samples given up because of the lie of peer …2222bbbb"
    )
