"""The records of outcomes by order, in Celery's own result format, as anybody may read and await them.

A record is what ``AsyncResult("cancel:" + order_id)`` reads: the JSON that Celery's Redis backend keeps
under ``celery-task-meta-{task id}`` and publishes on the channel of the same name. Only the store writes
records, in the step that removes the entry; this module knows the format, reads, and waits. Both names begin
with RedisSettings.celery_prefix: channels are one for all databases of a server, so that is what keeps
accounts apart.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import redis

from kalshi_cancel.model.results import CancelResult
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say

log = logging.getLogger(__name__)

_TASK_KEY_PREFIX = "celery-task-meta-"
# A task's id is its producer's word; what is kept under these is somebody else's.
RESERVED = ("cancel:", "mass:", "list:")
_MGET_AT_ONCE = 500
_encode = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make one at every call
# Between looks at the records themselves: a published notice can be lost with its connection.
_LOOK_AGAIN_S = 2.0
_CONNECT_AGAIN_S = 0.2


def record_key(order_id: str, celery_prefix: str = "") -> str:
    """The Redis key of an order's record, which is its channel too."""
    return task_key(f"cancel:{order_id}", celery_prefix)


def task_key(task_id: str, celery_prefix: str = "") -> str:
    """The Redis key of a task's own result, which is its channel too."""
    return f"{celery_prefix}{_TASK_KEY_PREFIX}{task_id}"


def task_record(task_id: str, value: object, *, date_done: str) -> str:
    """The record of a task's own result."""
    record = {
        "status": "SUCCESS",
        "result": value,
        "traceback": None,
        "children": [],
        "date_done": date_done,
        "task_id": task_id,
    }
    return _encode(record)


def failure_record(task_id: str, why: str, *, date_done: str) -> str:
    """The record of a task of which no result can be given: whoever waits for it gets a RuntimeError."""
    failure = {"exc_type": "RuntimeError", "exc_message": [why], "exc_module": "builtins"}
    record: dict[str, Any] = {
        "status": "FAILURE",
        "result": failure,
        "traceback": None,
        "children": [],
        "date_done": date_done,
        "task_id": task_id,
    }
    return _encode(record)


def record_parts(result: CancelResult, *, date_done: str, **known: str | None) -> tuple[str, str]:
    """A record's JSON up to and after the value of ``requested_by``, ending in ``"task_id":``.

    ``known``: fields of the result that are known better than it says, such as ``settled_at``.
    """
    value = result.to_json() | known
    for name in ("requested_by", "requested_by_left_out"):
        del value[name]  # filled in by the store, which knows who has joined
    head = _encode(value)[:-1] + ',"requested_by":'
    tail = f'}},"traceback":null,"children":[],"date_done":"{date_done}","task_id":'
    return '{"status":"SUCCESS","result":' + head, tail


def parse_record(text: str | bytes) -> CancelResult:
    """The result in a record's JSON; raises ValueError when it is not one of ours."""
    try:
        return CancelResult.from_json(json.loads(text)["result"])
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"not a record of a cancel: {error!r}") from error


def read(server: redis.Redis, order_ids: Collection[str], celery_prefix: str = "") -> dict[str, CancelResult]:
    """The records there are, by order id."""
    found: dict[str, CancelResult] = {}
    for some in _portions(order_ids):
        texts = server.mget([record_key(order_id, celery_prefix) for order_id in some])
        for order_id, text in zip(some, texts, strict=True):
            result = readable(order_id, text) if text else None
            if result is not None:
                found[order_id] = result
    return found


def await_each(
    server: redis.Redis, order_ids: Collection[str], *, timeout_s: float | None, celery_prefix: str = ""
) -> Iterator[CancelResult]:
    """Each order's result as it is stored, those already there first; ends early when time is over.

    A lost connection is made anew while there is time; raises redis' error when it is lost at the end.
    """
    give_up = math.inf if timeout_s is None else time.monotonic() + timeout_s
    missing = dict.fromkeys(order_ids)
    while missing:
        try:
            for order_id, result in _watch(server, tuple(missing), give_up, celery_prefix):
                if order_id in missing:
                    del missing[order_id]
                    yield result
                if not missing:
                    return
        except (redis.ConnectionError, redis.TimeoutError):
            if time.monotonic() >= give_up:
                raise
            time.sleep(_CONNECT_AGAIN_S)
        else:
            return  # time is over


def _watch(
    server: redis.Redis, order_ids: Collection[str], give_up: float, celery_prefix: str
) -> Iterator[tuple[str, CancelResult]]:
    """Looks at the records, subscribes, and looks again now and then; some may be seen twice."""
    yield from read(server, order_ids, celery_prefix).items()
    with server.pubsub(ignore_subscribe_messages=True) as notices:
        for some in _portions(order_ids):
            notices.subscribe(*(record_key(order_id, celery_prefix) for order_id in some))
        look_again = (
            time.monotonic()
        )  # at once: one may have come between the first look and the subscription
        while (now := time.monotonic()) < give_up:
            if now >= look_again:
                look_again = now + _LOOK_AGAIN_S
                yield from read(server, order_ids, celery_prefix).items()
            wait_s = min(look_again, give_up) - time.monotonic()
            notice: Mapping[str, Any] | None = notices.get_message(timeout=max(wait_s, 0.0))
            if notice is not None:
                order_id = str(notice["channel"])[len(record_key("", celery_prefix)) :]
                result = readable(order_id, notice["data"])
                if result is not None:
                    yield order_id, result


def readable(order_id: str, text: str | bytes) -> CancelResult | None:
    """The result, or None (and a line in the log) for what somebody else has put there."""
    try:
        return parse_record(text)
    except ValueError as error:
        say(log, LogEvent.RESULT_UNREADABLE, order_id=order_id, why=str(error))
        return None


def _portions(order_ids: Iterable[str]) -> Iterator[list[str]]:
    ids = list(order_ids)
    for start in range(0, len(ids), _MGET_AT_ONCE):
        yield ids[start : start + _MGET_AT_ONCE]
