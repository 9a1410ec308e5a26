"""The lists of results that bulk messages wait for, each answered once every order on it has a result.

The scripts that reply to an order's waiters strike it off (``lua/reply.lua``): among them a list is known
by its task's id with ``list:`` before it. So only lists of which something was struck off are looked at.
Their keys: docs/reference/redis-keys.md.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from typing import Any

import redis

from kalshi_cancel.model.results import CancelResult, Outcome, Problem
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import results, scripts
from kalshi_cancel.store.keys import Keys
from kalshi_cancel.store.scripts import StoreError
from kalshi_cancel.store.server_clock import ServerClock
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say

log = logging.getLogger(__name__)

LIST_PREFIX = "list:"
LIFE_S = 7 * 86_400  # whoever waits for longer has given up, as lua/accept.lua has it
NOTE_AT_ONCE = 1_000
LOOK_AT_ONCE = 100
GONE = Problem("result_gone", "its result is not kept any more: ask again")


class Lists:
    """The lists under one prefix; safe to share between threads. Everything raises StoreError."""

    def __init__(self, server: redis.Redis, settings: RedisSettings) -> None:
        self._server = server
        self._prefix = settings.key_prefix
        self._celery_prefix = settings.celery_prefix
        self._life_s = settings.result_expires_s
        self._clock = ServerClock(server)
        self._complete = scripts.load(server, "gather", "lists_complete")
        self._put_back = scripts.load(server, "gather", "list_put_back")

    def note(self, task_id: str, order_ids: Sequence[str]) -> str:
        """Notes a list before its orders are entered; the name under which it waits for each of them."""
        for portion in _portions(order_ids):
            pipeline = self._server.pipeline()
            pipeline.sadd(self._left(task_id), *portion)
            pipeline.expire(self._left(task_id), LIFE_S)
            scripts.call(pipeline.execute)
        return LIST_PREFIX + task_id

    def close(
        self,
        task_id: str,
        order_ids: Sequence[str],
        refused: Sequence[object],
        *,
        not_entered: Collection[str],
    ) -> None:
        """Says that all is entered: what the list is of, and with which values it ends."""
        pipeline = self._server.pipeline()
        noted: dict[Any, Any] = {"orders": json.dumps(list(order_ids)), "refused": json.dumps(list(refused))}
        pipeline.hset(self._key(task_id), mapping=noted)
        pipeline.expire(self._key(task_id), LIFE_S)
        if not_entered:
            pipeline.srem(self._left(task_id), *not_entered)
        pipeline.sadd(Keys(self._prefix).lists, task_id)
        scripts.call(pipeline.execute)

    def answer(self) -> None:
        """Stores the list of results of every task whose orders all have one.

        Whoever waits for one that cannot be read is told that.
        """
        touched = scripts.call(lambda: self._server.srandmember(Keys(self._prefix).lists, LOOK_AT_ONCE))
        if not touched:
            return
        args = scripts.asking(self._prefix, zip(touched))
        for task_id in scripts.run(self._server, self._complete, args):
            now = self._clock.now()
            try:
                noted = self._noted(task_id)
            except (StoreError, ValueError, TypeError, KeyError, RecursionError) as error:
                if isinstance(error, StoreError) and error.can_pass:
                    raise
                say(log, LogEvent.LIST_UNREADABLE, task_id=task_id, why=str(error))
                why = f"the list of its results cannot be read: {error}"
                self._end(task_id, results.failure_record(task_id, why, date_done=now))
                continue
            if noted is None:
                continue
            order_ids, refused = noted
            values = self._values(task_id, order_ids)
            if values is not None:
                self._end(task_id, results.task_record(task_id, [*values, *refused], date_done=now))

    def _noted(self, task_id: str) -> tuple[list[str], list[object]] | None:
        """What :meth:`close` has noted; None: another worker has answered the list meanwhile.

        Raises ValueError and the like for anything else.
        """
        noted = scripts.call(lambda: self._server.hgetall(self._key(task_id)))
        if not noted:
            return None
        order_ids, refused = json.loads(noted["orders"]), json.loads(noted["refused"])
        if not isinstance(order_ids, list) or not all(isinstance(each, str) for each in order_ids):
            raise TypeError("the orders are no list of ids")
        if not isinstance(refused, list):
            raise TypeError("what was refused is no list")
        return order_ids, refused

    def _values(self, task_id: str, order_ids: Sequence[str]) -> list[object] | None:
        """The results; None where an order has been asked for again meanwhile: that one is waited for."""
        found: dict[str, CancelResult] = scripts.call(
            lambda: results.read(self._server, order_ids, self._celery_prefix)
        )
        missing = [order_id for order_id in order_ids if order_id not in found]
        for portion in _portions(missing):
            record_prefix = results.record_key("", self._celery_prefix)
            asked = {"record_prefix": record_prefix, "task_id": task_id}
            args = scripts.asking(self._prefix, zip(portion), **asked)
            if scripts.run(self._server, self._put_back, args):
                return None
        gone = {each: CancelResult(each, Outcome.UNRESOLVED, error=GONE) for each in missing}
        return [{**gone, **found}[order_id].to_json() for order_id in order_ids]

    def _end(self, task_id: str, record: str) -> None:
        """Answers a list with its record, and forgets it."""
        pipeline = self._server.pipeline()
        key = results.task_key(task_id, self._celery_prefix)
        pipeline.set(key, record, ex=self._life_s)
        pipeline.publish(key, record)
        pipeline.delete(self._key(task_id), self._left(task_id))
        pipeline.srem(Keys(self._prefix).lists, task_id)
        scripts.call(pipeline.execute)

    def _key(self, task_id: str) -> str:
        return Keys(self._prefix).result_list(task_id)

    def _left(self, task_id: str) -> str:
        return f"{self._key(task_id)}:left"


def _portions(order_ids: Sequence[str]) -> list[Sequence[str]]:
    return [order_ids[start : start + NOTE_AT_ONCE] for start in range(0, len(order_ids), NOTE_AT_ONCE)]
