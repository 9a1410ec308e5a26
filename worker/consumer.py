"""How a worker listens to its queues: back at once after an outage, and nothing unreadable thrown away.

Celery's consumer with three changes: it reconnects within half a second instead of 2, 4, ... 30 s; a
message that cannot be understood is logged and kept; and its timer sweeps the book for what nobody is
coming to claim.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from celery import Celery, bootsteps
from celery.worker.consumer import Consumer
from celery.worker.state import maybe_shutdown
from kombu.exceptions import OperationalError

from worker import bells
from worker.lifecycle import desk
from worker.scripts import BookError

log = logging.getLogger(__name__)

RECONNECT_MOST_S = 0.5
# What became claimable is noticed within two seconds: half a second until the look, and its patience of one.
SWEEP_EVERY_S = 0.5
KEPT_BODY_MOST_BYTES = 65_536


class CancelConsumer(Consumer):  # type: ignore[misc]  # Celery ships no types
    """The consumer of this project's workers (Celery's setting ``worker_consumer``)."""

    def ensure_connected(self, conn: Any) -> Any:
        """A connection to Redis: at the first start or not at all, later for as long as it takes."""
        if self.first_connection_attempt:
            conn.connect()
        else:
            conn.ensure_connection(
                lambda error, _interval: log.error("no connection to Redis: %s", error),
                interval_start=0.1,
                interval_step=0.1,
                interval_max=RECONNECT_MOST_S,
                callback=maybe_shutdown,
            )
        self.first_connection_attempt: bool = False
        return conn

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Keeps a message that is no JSON, or not of our content type."""
        self._keep(message, exc)
        message.ack()

    def on_unknown_message(self, body: Any, message: Any) -> None:
        """Keeps a message that is none of Celery's."""
        self._keep(message, "not a Celery message")
        super().on_unknown_message(body, message)

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Keeps a message for a task that there is not."""
        self._keep(message, f"unknown task {exc}")
        super().on_unknown_task(body, message, exc)

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Keeps a message whose envelope cannot be used."""
        self._keep(message, exc)
        super().on_invalid_task(body, message, exc)

    def _keep(self, message: Any, why: object) -> None:
        body = bytes(message.body) if not isinstance(message.body, str) else message.body.encode()
        kept = {
            "why": str(why)[:1000],
            "content_type": str(message.content_type),
            "headers": repr(message.headers)[:KEPT_BODY_MOST_BYTES],
            "queue": (message.delivery_info or {}).get("routing_key"),
            "body_bytes": len(body),
            "body": body[:KEPT_BODY_MOST_BYTES].decode("utf-8", "backslashreplace"),
        }
        text = json.dumps(kept)
        log.critical("a message that cannot be understood is kept: %s", text)
        try:
            desk().keep_unreadable(text)
        except BookError as error:
            log.warning("it is only in this log: %s", error)


class Sweep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """On the timer of every worker: rings for what nobody is coming for, and tells those who wait."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._timer: Any = None

    def start(self, consumer: Any) -> None:
        """Starts the timer; called again after every reconnect."""
        self._timer = consumer.timer.call_repeatedly(SWEEP_EVERY_S, _sweep, (consumer.app,))

    def stop(self, _consumer: Any) -> None:
        """Stops the timer."""
        if self._timer is not None:
            self._timer.cancel()


def _sweep(app: Celery) -> None:
    try:
        desk().tell_overdue()
        desk().answer_bulks()
        for lane in desk().lanes_to_wake():
            log.info("waking up for the %s lane", lane.value)
            bells.wake_up(app, lane)
    except (BookError, OperationalError, OSError) as error:
        log.warning("no sweep: %s", error)
