"""How a worker's log is written: lines for eyes, or one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any

from kalshi_cancel.model.orders import Lane
from kalshi_cancel.settings.values import LogFormat

# What a line may say besides its message; all of it by `extra=`, and nothing else that hangs on a record:
# Celery's own records carry what strangers wrote.
FIELDS = (
    "order_id",
    "request_id",
    "lane",
    "outcome",
    "attempts",
    "code",
    "age_s",
    "key_id",
    "trace_id",
)

SELDOM_S = 10.0  # between two lines that say the same again


def about(lane: Lane, request_id: str | None, traceparent: str | None, **fields: Any) -> dict[str, Any]:
    """The fields of a line about an order or a mass cancel, for ``extra=``."""
    fields["lane"] = lane.value
    if request_id is not None:
        fields["request_id"] = request_id
    if traceparent is not None:
        fields["trace_id"] = traceparent[3:35]
    return fields


class Seldom:
    """Lets through a line that would come again and again, once in a while; safe to share between threads."""

    def __init__(self, every_s: float = SELDOM_S, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._next_at = -math.inf
        self._left_out = 0

    def now(self) -> str | None:
        """What to add to the line that is due now: how many were left out; None: not this time."""
        with self._lock:
            if self._clock() < self._next_at:
                self._left_out += 1
                return None
            left_out, self._left_out = self._left_out, 0
            self._next_at = self._clock() + self._every_s
        return f" ({left_out} more times since)" if left_out else ""


class Lines:
    """The message of a record that says several things at once: each a line of its own, with its fields.

    A record for each would take three times as long, and thousands of outcomes come a second.
    """

    def __init__(self, lines: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        self.lines = lines

    def __str__(self) -> str:
        return "\n".join(message for message, _ in self.lines)


def set_format(logger: logging.Logger, log_format: LogFormat) -> None:
    """Has a logger's handlers write in this format; ``auto``: JSON where nobody is looking."""
    for handler in logger.handlers:
        if log_format == "json" or (log_format == "auto" and not _is_terminal(handler)):
            handler.setFormatter(JsonFormatter())


def is_json(logger: logging.Logger) -> bool:
    """Whether any of a logger's handlers writes JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logger.handlers)


class JsonFormatter(logging.Formatter):
    """One JSON object for each record: ``at`` (UTC), ``level``, ``logger``, ``process``, ``message``, FIELDS.

    ASCII only, so that no text in it can end a line, or colour a terminal.
    """

    def __init__(self) -> None:
        super().__init__()
        self._second = (-1, "")  # the latest, and its text: making that takes longer than all the rest

    def format(self, record: logging.LogRecord) -> str:
        """The record's line, without its end."""
        second, text = self._second
        now = int(record.created)
        if now != second:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
            self._second = (now, text)
        # Put together by hand, which takes a third of the time: thousands of outcomes come a second.
        head = (
            f'{{"at":"{text}.{int(record.msecs):03d}Z","level":"{record.levelname}","logger":{_quoted(record.name)}'
            f',"process":{_quoted(record.processName or "")},"message":'
        )
        if isinstance(record.msg, Lines):
            return "\n".join(
                f"{head}{_quoted(message)}{_fields(fields)}}}" for message, fields in record.msg.lines
            )
        line = f"{head}{_quoted(record.getMessage())}{_fields(record.__dict__)}"
        if record.exc_info:
            line += f',"exception":{_quoted(self.formatException(record.exc_info))}'
        return line + "}"


def _fields(noted: Mapping[str, Any]) -> str:
    return "".join([f',"{name}":{_text(noted[name])}' for name in FIELDS if name in noted])


def _text(value: Any) -> str:
    if type(value) is str:
        return _quoted(value)
    if value is None:
        return "null"
    return repr(value) if type(value) in (int, float) else json.dumps(value, default=str)


def _is_terminal(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None)
    return stream is not None and stream.isatty()
