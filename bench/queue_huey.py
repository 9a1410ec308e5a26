"""Huey with processes."""

from __future__ import annotations

import functools
import os

import redis
from huey import RedisHuey

from bench import work

huey = RedisHuey("bench", url=os.environ["REDIS_URL"], results=False)


@functools.cache
def _redis(_pid: int) -> redis.Redis:
    return redis.Redis.from_url(os.environ["REDIS_URL"])


@huey.task(name="cancel")
def cancel(order_id: str, requested_at: float) -> None:
    """One order."""
    _redis(os.getpid()).set(work.RECORD_KEY + order_id, work.cancel(order_id, requested_at))
