"""Takes in raw messages many at a time: Celery's loop needs a millisecond for each of a flood.

Where a worker gets one raw ``cancel_order``, those that wait behind it in the queue are read, entered into
the store in one step, and only then taken off the queue: whoever vanishes in between leaves them where they
were, and an order that is entered twice has one entry. Whatever is not such a message is left to Celery.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence

import redis

from kalshi_cancel.model.fields import BadRequest
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import scripts
from kalshi_cancel.store.keys import Keys
from kalshi_cancel.store.scripts import StoreError
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say
from kalshi_cancel.wake_ups import ENTERED_HEADER
from worker.broker.entrance import Entrance
from worker.broker.guard import PlainCall, plain_call

log = logging.getLogger(__name__)

AT_ONCE = 200
WORTH_IT = 4  # messages; fewer are Celery's own work
TURN_MS = 2_000  # one worker at a time takes in
LEFT_MOST = 10_000


class Intake:
    """The intake of one process; ``server`` answers in bytes."""

    def __init__(self, server: redis.Redis, settings: RedisSettings, entrance: Entrance) -> None:
        self._server = server
        self._settings = settings
        self._entrance = entrance
        self._at_it = threading.Lock()
        self._left: set[bytes] = set()

    def take_in(self, lane: Lane) -> None:
        """Takes in what waits in the lane's queue, unless somebody is at it already."""
        if not self._at_it.acquire(blocking=False):
            return
        try:
            while self._take_some(lane):
                pass
        except StoreError as error:
            scripts.say_failed(log, error, "take in several messages at once")
        except Exception as error:  # noqa: BLE001 - a defect of ours, not of the message that was just entered
            say(log, LogEvent.INTERNAL_ERROR, error=error, doing="take in several messages at once")
        finally:
            self._at_it.release()

    def _take_some(self, lane: Lane) -> bool:
        """Takes in a portion; False when there is no more."""
        queue = self._settings.celery_prefix + lane.queue
        turn = Keys(self._settings.key_prefix).intake(lane)
        if not scripts.call(lambda: self._server.set(turn, 1, nx=True, px=TURN_MS)):
            return False
        try:
            items: list[bytes] = scripts.call(lambda: self._server.lrange(queue, -AT_ONCE, -1))
            found = [
                (item, *read)
                for item in items
                if item not in self._left and (read := _request_in(item, lane))
            ]
            if len(found) < WORTH_IT:
                return False
            requests = [request for _, request, _ in found]
            entered = self._entrance.enter(
                requests, lane=lane, reply_to=[reply_to for _, _, reply_to in found]
            )
            refused = {request.order_id for request, _ in entered.refused}
            self._leave([item for item, request, _ in found if request.order_id in refused])
            self._take_off(queue, [item for item, request, _ in found if request.order_id not in refused])
            return True
        finally:
            scripts.call(functools.partial(self._server.delete, turn))

    def _leave(self, items: Sequence[bytes]) -> None:
        """Leaves to Celery what Redis does not take: each is answered and set aside when its turn comes."""
        if len(self._left) > LEFT_MOST:
            self._left.clear()  # most of those are gone by now
        self._left.update(items)

    def _take_off(self, queue: str, items: Sequence[bytes]) -> None:
        pipeline = self._server.pipeline(transaction=False)
        for item in reversed(items):  # the oldest is last in the list
            pipeline.lrem(queue, -1, item)  # type: ignore[arg-type]  # it takes bytes as well
        scripts.call(pipeline.execute)


def _request_in(item: bytes, lane: Lane) -> tuple[CancelRequest, str] | None:
    """The request of a raw ``cancel_order`` and the task id that wants its result, or None for all else."""
    call = plain_call(item, lane.queue)
    if call is None or call.task != "cancel_order" or ENTERED_HEADER in call.headers:
        return None
    try:
        request = CancelRequest.parse(_fields(call))
    except BadRequest:
        return None  # answered, field by field, when its turn comes
    return request, "" if call.headers.get("ignore_result") else call.task_id


def _fields(call: PlainCall) -> object:
    if len(call.args) == 1 and "order_id" not in call.kwargs:
        return {"order_id": call.args[0], **call.kwargs}
    return None if call.args else call.kwargs
