"""Wakes workers up: publishes messages that say "there is work in the store".

The store holds the work, so a message only wakes workers up. When enough of them wait in a queue, one more
adds nothing. A lost one costs a second: the sweeper sends another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kalshi_cancel.model.requests import CancelRequest, Lane

if TYPE_CHECKING:
    from celery import Celery

# With this header a message says that its orders are in the store: the worker need not enter them.
ENTERED_HEADER = "kalshi_entered"
TRACE_HEADER = "traceparent"  # W3C's, as every instrumented producer sends it
# Messages waiting in a queue from which on another wake-up adds nothing: each wakes a sender that works on
# until nothing is due, and a worker has about as many senders.
WAKE_UPS_ENOUGH = 8


def wake_up_for(app: Celery, lane: Lane, requests: Sequence[CancelRequest], *, waiting: int) -> None:
    """Publishes a ``cancel_order`` for as many of the accepted requests as still adds something."""
    for request in requests[: max(WAKE_UPS_ENOUGH - waiting, 0)]:
        headers: dict[str, Any] = {ENTERED_HEADER: 1}
        if request.traceparent is not None:
            headers[TRACE_HEADER] = request.traceparent
        _publish(app, "cancel_order", lane, kwargs=request.fields(), headers=headers)


def wake_up(app: Celery, lane: Lane) -> None:
    """Publishes a wake-up, which names no order."""
    _publish(app, "wake_up", lane)


def start_mass_cancel(app: Celery, request_id: str) -> None:
    """Publishes that a mass cancel is waiting for a runner."""
    _publish(app, "mass_cancel", Lane.RISK, kwargs={"request_id": request_id}, headers={ENTERED_HEADER: 1})


def wake_up_all(app: Celery, lane: Lane, *, waiting: int) -> None:
    """Publishes as many wake-ups as still add something."""
    for _ in range(WAKE_UPS_ENOUGH - waiting):
        wake_up(app, lane)


def _publish(app: Celery, task: str, lane: Lane, **message: Any) -> None:
    # ignore_result: the store keeps the results; asking for one would subscribe first, and hang with Redis.
    app.send_task(task, queue=lane.queue, ignore_result=True, **message)
