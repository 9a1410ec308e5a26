"""Ardiq; its core stores the task's result under the order's id: cheaper than a SET from here."""

from __future__ import annotations

import os

from ardiq import Ardiq

from bench import work

app = Ardiq(os.environ["REDIS_URL"], queue_name="bench", concurrency=int(os.environ.get("BENCH_HANDS", "64")))


@app.task(name="cancel")
async def cancel(order_id: str, requested_at: float) -> str:
    """One order."""
    return await work.cancel_async(order_id, requested_at)
