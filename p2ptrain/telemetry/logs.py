"""Log messages as JSON lines, for programs that gather them; what they tell is in the journal as well.

Each has `time` (ISO-8601, UTC), `level`, `logger` and `message`, and if it tells of an event, that event's
name under `event` and its fields.
"""

from __future__ import annotations

import json
import logging

from p2ptrain.events import Event
from p2ptrain.telemetry.journal import shown_moment

FIELDS = "event_fields"
"""Attribute of a log record that holds an event as JSON values."""


def tell(logger: logging.Logger, event: Event) -> None:
    """Log the event at its level: its sentence for people, its fields for programs."""
    logger.log(event.level, "%s", event.sentence(), extra={FIELDS: event.to_dict()})


class JsonLines(logging.Formatter):
    """One JSON object a record, on one line whatever is in it."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": shown_moment(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        # The record's own keys are not an event's to change.
        return json.dumps({**getattr(record, FIELDS, {}), **line}, allow_nan=False)
