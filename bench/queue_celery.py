"""Celery as it comes out of the box: default settings, result backend, one message for each order."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from bench import work

app = Celery("shipped", broker=os.environ["REDIS_URL"], backend=os.environ["REDIS_URL"])


@app.task(name="cancel")
def cancel(order_id: str, requested_at: float) -> dict[str, Any]:
    """One order; the record is the task's result."""
    return work.cancel_plainly(order_id, requested_at)
