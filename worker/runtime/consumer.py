"""How a worker listens to its queues: back at once after an outage, and nothing unreadable thrown away.

Celery's consumer with two changes: it reconnects within half a second instead of 2, 4, ... 30 s; and a
message that cannot be understood is logged and kept.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from celery import bootsteps
from celery.exceptions import InvalidTaskError, NotRegistered
from celery.worker.consumer import Consumer
from celery.worker.state import maybe_shutdown

from kalshi_cancel.heartbeat import BEAT_EVERY_S
from kalshi_cancel.store.redis_errors import words
from kalshi_cancel.store.scripts import StoreError, say_failed
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say
from worker.broker.guard import WHY_HEADER, notice_waits
from worker.runtime.context import entrance, opened_context
from worker.telemetry.watch import watch

log = logging.getLogger(__name__)

RECONNECT_MOST_S = 0.5
KEPT_BODY_MOST_BYTES = 65_536


class CancelConsumer(Consumer):  # type: ignore[misc]  # Celery ships no types
    """The consumer of this project's workers (Celery's setting ``worker_consumer``)."""

    def ensure_connected(self, conn: Any) -> Any:
        """A connection to Redis: at the first start or not at all, later for as long as it takes."""
        if self.first_connection_attempt:
            conn.connect()
        else:
            conn.ensure_connection(
                lambda error, _interval: say(
                    log, LogEvent.REDIS_UNAVAILABLE, doing="read messages", why=words(error)
                ),
                interval_start=0.1,
                interval_step=0.1,
                interval_max=RECONNECT_MOST_S,
                callback=_between_tries,
            )
        self.first_connection_attempt: bool = False
        return conn

    def update_strategies(self) -> None:
        """As Celery does, without the tasks that it brings along.

        They run and publish whatever their message names, with a worker's permissions, and store what it
        says under any id it likes.
        """
        super().update_strategies()
        for name in [name for name in self.strategies if name.startswith("celery.")]:
            del self.strategies[name]

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Keeps a message that cannot be opened."""
        headers = message.headers if isinstance(message.headers, dict) else {}
        self._keep(message, headers.get(WHY_HEADER, exc), task_id=headers.get("id"))

    def on_unknown_message(self, _body: Any, message: Any) -> None:
        """Keeps a message that is none of Celery's."""
        self._keep(message, "not a Celery message")

    def on_unknown_task(self, _body: Any, message: Any, exc: Exception) -> None:
        """Keeps a message for a task that there is not."""
        call = message.headers if "id" in message.headers else message.payload
        self._keep(message, NotRegistered(*exc.args), task_id=call["id"])

    def on_invalid_task(self, _body: Any, message: Any, exc: Exception) -> None:
        """Keeps a message whose envelope cannot be used."""
        self._keep(message, exc, task_id=message.headers.get("id"))

    def _keep(self, message: Any, why: object, *, task_id: str | None = None) -> None:
        """Logs the message, keeps it, and has whoever waits under its task id fail."""
        body = bytes(message.body) if not isinstance(message.body, str) else message.body.encode()
        kept = {
            "at": entrance().now(),
            "why": str(why)[:1000],
            "content_type": str(message.content_type),
            "headers": repr(message.headers)[:KEPT_BODY_MOST_BYTES],
            "queue": (message.delivery_info or {}).get("routing_key"),
            "body_bytes": len(body),
            "body": body[:KEPT_BODY_MOST_BYTES].decode("utf-8", "backslashreplace"),
        }
        text = json.dumps(kept)
        say(log, LogEvent.MESSAGE_UNREADABLE, message_text=text)
        try:
            entrance().keep_unreadable(text)
        except StoreError as error:
            say_failed(log, error, "keep an unreadable message: it is only in this log")
        if task_id:
            failure = (
                why if isinstance(why, NotRegistered) else InvalidTaskError(f"cannot be understood: {why}")
            )
            self.app.backend.mark_as_failure(task_id, failure)
        message.ack_log_error(log, self.connection_errors)


class Beat(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """On the timer of every worker: says that the main loop comes by, and looks after the background jobs."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._timer: Any = None

    def start(self, consumer: Any) -> None:
        """Starts the timer; called again after every reconnect."""
        # While Redis is silent one round of the timer takes many waits for it, minutes in all.
        notice_waits(watch.heartbeat.beat)
        self._timer = consumer.timer.call_repeatedly(BEAT_EVERY_S, _beat)

    def stop(self, _consumer: Any) -> None:
        """Stops the timer."""
        if self._timer is not None:
            self._timer.cancel()


def _between_tries() -> None:
    """While Redis is away the main loop, and so its timer, stands in the attempts to reach it."""
    maybe_shutdown()
    watch.heartbeat.beat()


def _beat() -> None:
    watch.heartbeat.beat()
    mine = opened_context()
    if mine is not None:
        mine.services.check()
