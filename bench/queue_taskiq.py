"""Taskiq with its list broker."""

from __future__ import annotations

import functools
import os

from redis.asyncio import Redis
from taskiq_redis import ListQueueBroker

from bench import work

# It waits for work without a limit; redis-py 8 gives up after five seconds, and the worker process ends.
broker = ListQueueBroker(os.environ["REDIS_URL"], socket_timeout=None)


@functools.cache
def _redis() -> Redis:
    return Redis.from_url(os.environ["REDIS_URL"])


@broker.task(task_name="cancel")
async def cancel(order_id: str, requested_at: float) -> None:
    """One order."""
    record = await work.cancel_async(order_id, requested_at)
    await _redis().set(work.RECORD_KEY + order_id, record)
