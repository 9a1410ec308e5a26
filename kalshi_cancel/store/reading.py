"""The reader of the cancel store: results, what is open, and what was given up. It changes nothing.

Producers and operators read while workers write: what is in two places is looked at in one step, and what
somebody has spoilt hides nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import redis

from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import CancelResult
from kalshi_cancel.model.times import utc_text
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import results, scripts
from kalshi_cancel.store.keys import Keys
from kalshi_cancel.store.pending import (
    SPOILT_ENTRY,
    UNREADABLE,
    DeadLetter,
    OpenCancel,
    Progress,
    Standing,
    parse_dead_letter,
    parse_open,
)
from kalshi_cancel.store.redis_errors import words
from kalshi_cancel.store.scripts import StoreError

LIST_AT_ONCE = 500
LOOK_AT_ONCE = 200  # orders, of four looks each
_DEAD_FIELDS = ["request", "requested_by", "accepted_ms", "progress"]
_OPEN_FIELDS = [
    *("request", "requested_by", "accepted_ms", "token", "reported", "progress", "claimed_by", "left_out")
]


class CancelReader:
    """The reader under one prefix; safe to share between threads. Everything raises StoreError."""

    def __init__(self, server: redis.Redis, settings: RedisSettings) -> None:
        self._server = server
        self._keys = Keys(settings.key_prefix)
        self._celery_prefix = settings.celery_prefix
        self._record_prefix = results.record_key("", settings.celery_prefix)

    def await_records(self, order_ids: Sequence[str], *, timeout_s: float | None) -> Iterator[CancelResult]:
        """The records of these orders as they come; ends early when the time is over."""
        try:
            yield from results.await_each(
                self._server, order_ids, timeout_s=timeout_s, celery_prefix=self._celery_prefix
            )
        except redis.RedisError as error:
            raise StoreError(words(error), may_be_accepted=False) from None

    def standing(self, order_ids: Collection[str]) -> Standing:
        """Where each of these orders is, looked at in one step of Redis for a portion."""
        settled: dict[str, CancelResult] = {}
        found: dict[str, list[str]] = {"open": [], "dead": [], "lost": []}
        ids = list(order_ids)
        for start in range(0, len(ids), LOOK_AT_ONCE):
            some = ids[start : start + LOOK_AT_ONCE]
            pipeline = self._server.pipeline(transaction=True)
            pipeline.mget([self._record_prefix + order_id for order_id in some])
            for order_id in some:
                for key_of in (self._keys.pending, self._keys.dead_letter, self._keys.set_aside):
                    pipeline.exists(key_of(order_id))
            texts, *there = scripts.call(pipeline.execute)
            for at, (order_id, text) in enumerate(zip(some, texts, strict=True)):
                entry, dead, aside = there[3 * at : 3 * at + 3]
                result = results.readable(order_id, text) if text else None
                if result is not None:
                    settled[order_id] = result
                else:
                    found["open" if entry else "dead" if dead or aside else "lost"].append(order_id)
        return Standing(settled, *(tuple(found[name]) for name in ("open", "dead", "lost")))

    def records(self, order_ids: Sequence[str]) -> dict[str, CancelResult]:
        """The records there are of these orders, by order id."""
        found: dict[str, CancelResult] = scripts.call(
            lambda: results.read(self._server, order_ids, self._celery_prefix)
        )
        return found

    def record(self, order_id: str) -> CancelResult | None:
        """The record of one order, if there is one."""
        return self.records([order_id]).get(order_id)

    def open_cancels(self) -> Iterator[OpenCancel]:
        """Every entry, risk first, in the order they are due; read in portions, without a lock."""
        for lane in Lane:
            for path in self._paths():
                start = 0
                while due := self._range(self._keys.due(lane, path), start):
                    start += len(due)
                    yield from self._listed(lane, due)

    def open_cancel(self, order_id: str) -> OpenCancel | None:
        """The entry of one order, or None when nothing is open for it."""
        pipeline = self._server.pipeline(transaction=False)
        pipeline.exists(self._keys.pending(order_id))
        pipeline.hmget(self._keys.pending(order_id), ["lane", "path"])
        is_there, home = self._each(pipeline)
        if not is_there:
            return None
        lane, path = home or ("", "")
        due = scripts.call(lambda: self._server.zscore(self._keys.due(lane, path), order_id))
        lane = lane if lane in tuple(Lane) else Lane.RISK
        return next(self._listed(Lane(lane), [(order_id, math.nan if due is None else due)]), None)

    @staticmethod
    def _each(pipeline: Any) -> list[Any]:
        """What each command got; None for a key that holds something else."""
        answers = scripts.call(lambda: pipeline.execute(raise_on_error=False))
        for answer in answers:
            if isinstance(answer, redis.RedisError) and "WRONGTYPE" not in str(answer):
                scripts.call(functools.partial(_raise, answer))
        return [None if isinstance(answer, redis.RedisError) else answer for answer in answers]

    def waiting(self, lane: Lane) -> dict[str, int]:
        """How many entries of a lane there are on each path."""
        paths = self._paths()
        pipeline = self._server.pipeline(transaction=False)
        for path in paths:
            pipeline.zcount(self._keys.due(lane, path), "-inf", "+inf")
        return dict(zip(paths, scripts.call(pipeline.execute), strict=True)) if paths else {}

    def _paths(self) -> list[str]:
        return sorted(scripts.call(lambda: self._server.smembers(self._keys.paths)))

    def _range(self, index: str, start: int) -> list[tuple[str, float]]:
        end = start + LIST_AT_ONCE - 1
        members = scripts.call(lambda: self._server.zrange(index, start, end, withscores=True))
        return [(str(order_id), float(score)) for order_id, score in members]

    def _listed(self, lane: Lane, due: Sequence[tuple[str, float]]) -> Iterator[OpenCancel]:
        pipeline = self._server.pipeline(transaction=False)
        pipeline.time()
        for order_id, _ in due:
            pipeline.hmget(self._keys.pending(order_id), _OPEN_FIELDS)
        (seconds, micros), *entries = self._each(pipeline)
        now_ms = seconds * 1000 + micros // 1000
        for (order_id, due_ms), fields in zip(due, entries, strict=True):
            if fields is not None and fields[0] is None and fields[2] is None:
                continue  # settled between the two looks
            next_due_s = 0.0 if math.isnan(due_ms) else (due_ms - now_ms) / 1000
            try:
                yield parse_open(order_id, lane, fields or (), now_ms, next_due_s)
            except UNREADABLE:  # whoever claims it sets it aside
                nothing, progress = CancelRequest(order_id), Progress(0, SPOILT_ENTRY)
                now = utc_text(now_ms / 1000)
                yield OpenCancel(
                    order_id,
                    lane,
                    (),
                    now,
                    0.0,
                    next_due_s,
                    claimed=False,
                    unresolved=False,
                    request=nothing,
                    progress=progress,
                )

    def dead_letters(self) -> Iterator[DeadLetter]:
        """What was given up, oldest first, and then what was set aside; read in portions."""
        start = 0
        while dead := self._range(self._keys.dead, start):
            start += len(dead)
            pipeline = self._server.pipeline(transaction=False)
            for order_id, _ in dead:
                pipeline.hmget(self._keys.dead_letter(order_id), _DEAD_FIELDS)
            for (order_id, died_ms), fields in zip(dead, self._each(pipeline), strict=True):
                if fields is None or fields[0] is not None:
                    yield parse_dead_letter(order_id, died_ms, fields)
        start = 0
        while aside := self._range(self._keys.aside, start):
            start += len(aside)
            for order_id, at_ms in aside:
                yield self._aside(order_id, at_ms)

    def dead_letter(self, order_id: str) -> DeadLetter | None:
        """What was given up or set aside about one order, None when nothing was."""
        pipeline = self._server.pipeline(transaction=False)
        pipeline.zscore(self._keys.dead, order_id)
        pipeline.hmget(self._keys.dead_letter(order_id), _DEAD_FIELDS)
        pipeline.zscore(self._keys.aside, order_id)
        died_ms, fields, aside_ms = self._each(pipeline)
        if died_ms is not None and (fields is None or fields[0] is not None):
            return parse_dead_letter(order_id, died_ms, fields)
        return None if aside_ms is None else self._aside(order_id, aside_ms)

    def _aside(self, order_id: str, at_ms: float) -> DeadLetter:
        """What was set aside: a hash as it was, or text; of anything else nothing is shown."""
        pipeline = self._server.pipeline(transaction=False)
        pipeline.hgetall(self._keys.set_aside(order_id))
        pipeline.get(self._keys.set_aside(order_id))
        stored, text = self._each(pipeline)
        at = utc_text(at_ms / 1000)
        stored = {"text": text} if text is not None else stored or {}
        request, progress = CancelRequest(order_id), Progress(0, SPOILT_ENTRY)
        return DeadLetter(order_id, (), at, at, request, progress, stored)


def _raise(error: Exception) -> None:
    raise error
