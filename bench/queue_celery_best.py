"""Celery's best set-up on this work: threads, nothing stored by Celery itself, our own SET, urllib3."""

from __future__ import annotations

import functools
import os

import redis
from celery import Celery

from bench import work

app = Celery("best", broker=os.environ["REDIS_URL"])
app.conf.update(task_ignore_result=True, worker_send_task_events=False, worker_enable_remote_control=False)


@functools.cache
def _redis(_pid: int) -> redis.Redis:
    return redis.Redis.from_url(os.environ["REDIS_URL"])


@app.task(name="cancel")
def cancel(order_id: str, requested_at: float) -> None:
    """One order."""
    _redis(os.getpid()).set(work.RECORD_KEY + order_id, work.cancel(order_id, requested_at))
