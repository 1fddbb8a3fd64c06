"""Log messages as JSON lines: each on one line, with the event's own fields, whatever is in it."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from event_examples import COMMITTED, ONE_OF_EACH

from p2ptrain.events import Event
from p2ptrain.telemetry.logs import JsonLines, tell


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.setFormatter(JsonLines())

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def logger(kept: Kept) -> logging.Logger:
    logger = logging.getLogger("the test of json lines")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.handlers = [kept]
    return logger


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: event.event)
def test_event_is_told_with_its_fields(logger: logging.Logger, kept: Kept, event: Event) -> None:
    tell(logger, event)
    (line,) = kept.lines
    record = json.loads(line)
    assert record["event"] == event.event
    assert record["message"] == event.sentence()
    assert record["level"] == logging.getLevelName(event.level).lower()
    assert record["time"].endswith("Z")
    assert set(event.to_dict()) <= set(record)


def test_line_is_one_whatever_is_in_it(logger: logging.Logger, kept: Kept) -> None:
    logger.warning("a\nb %s", '"\u2028')
    try:
        raise ValueError("broken")
    except ValueError:
        logger.error("seen", exc_info=sys.exc_info())
    first, second = kept.lines
    assert len(first.splitlines()) == len(second.splitlines()) == 1
    assert json.loads(first)["message"] == 'a\nb "\u2028'
    assert "ValueError: broken" in json.loads(second)["error"]


def test_sentence_with_a_percent_sign_is_told_as_it_is(logger: logging.Logger, kept: Kept) -> None:
    tell(logger, COMMITTED)
    logger.info("100 %")
    assert json.loads(kept.lines[1])["message"] == "100 %"
