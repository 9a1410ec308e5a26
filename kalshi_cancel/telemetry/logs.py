"""Writes log lines: each with its event, as text for people or as one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any, TypeAlias, Unpack

from kalshi_cancel.model.requests import Lane
from kalshi_cancel.settings.values import LogFormat
from kalshi_cancel.telemetry.log_events import LogEvent, LogFields, RequestFields

SELDOM_S = 10.0  # between two lines that say the same again
_BARE = re.compile(r"[!#-<>-~]+")  # a value that needs no quotes in text: visible ASCII but for " and =

Line: TypeAlias = tuple[LogEvent, Mapping[str, Any]]


def say(
    log: logging.Logger,
    event: LogEvent,
    *,
    seldom: Seldom | None = None,
    error: BaseException | None = None,
    **fields: Unpack[LogFields],
) -> None:
    """Writes the line of an event; ``error`` adds its traceback, ``seldom`` may leave the line out."""
    if seldom is not None:
        left_out = seldom.now()
        if left_out is None:
            return
        if left_out:
            fields["repeats"] = left_out
    if log.isEnabledFor(event.level):
        log.log(event.level, Lines([(event, fields)]), exc_info=error, stacklevel=2)


def say_all(log: logging.Logger, level: int, lines: Sequence[Line]) -> None:
    """Writes many lines of one level in one go: thousands of outcomes come a second."""
    if lines and log.isEnabledFor(level):
        log.log(level, Lines(lines), stacklevel=2)


def about(lane: Lane, request_id: str | None, traceparent: str | None) -> RequestFields:
    """The fields of a line about an order or a mass cancel."""
    fields: RequestFields = {} if request_id is None else {"request_id": request_id}
    fields["lane"] = lane.value
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

    def now(self) -> int | None:
        """How many lines were left out before the one that is due now; None: leave this one out, too."""
        with self._lock:
            if self._clock() < self._next_at:
                self._left_out += 1
                return None
            left_out, self._left_out = self._left_out, 0
            self._next_at = self._clock() + self._every_s
        return left_out


class Lines:
    """The message of a record that has one line of ours, or several of one level.

    A record for each would take three times as long, and thousands of outcomes come a second.
    """

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines

    def __str__(self) -> str:
        return "\n".join([event.as_text + _in_text(fields) for event, fields in self.lines])


def set_format(logger: logging.Logger, log_format: LogFormat) -> None:
    """Has a logger's handlers write in this format; ``auto``: JSON where nobody is looking."""
    for handler in logger.handlers:
        if log_format == "json" or (log_format == "auto" and not _is_terminal(handler)):
            handler.setFormatter(JsonFormatter())


def is_json(logger: logging.Logger) -> bool:
    """Whether any of a logger's handlers writes JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logger.handlers)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``at`` (UTC), ``level``, ``logger``, ``process``, ``message``; event, fields.

    Records of others have no event and no fields: what hangs on Celery's is what strangers wrote.

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
        end = f',"exception":{_quoted(self.formatException(record.exc_info))}}}' if record.exc_info else "}"
        if isinstance(record.msg, Lines):
            return "\n".join(
                [f"{head}{event.as_json}{_in_json(fields)}{end}" for event, fields in record.msg.lines]
            )
        return f"{head}{_quoted(record.getMessage())}{end}"


def _in_json(fields: Mapping[str, Any]) -> str:
    return "".join([f',"{name}":{_json(value)}' for name, value in fields.items()])


def _in_text(fields: Mapping[str, Any]) -> str:
    return "".join([f" {name}={_text(value)}" for name, value in fields.items() if value is not None])


def _json(value: Any) -> str:
    if type(value) is str:
        return _quoted(value)
    if value is None:
        return "null"
    return repr(value) if type(value) in (int, float) else json.dumps(value, default=str)


def _text(value: Any) -> str:
    if type(value) is str:
        return value if _BARE.fullmatch(value) else _quoted(value)
    return _json(value)


def _is_terminal(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None)
    return stream is not None and stream.isatty()
