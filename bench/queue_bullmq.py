"""BullMQ's Python port; a program of its own is the worker, as its users write one.

    python -m bench.queue_bullmq CONCURRENCY

The record is stored by the task: the port keeps its own inside the job.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from bullmq import Job, Queue, Worker
from redis.asyncio import Redis

from bench import work

NAME = "bench"
# It waits five seconds for work, which is when redis-py 8 would give up the connection.
CONNECTION = {"connection": f"{os.environ['REDIS_URL']}?socket_timeout=30"}


def queue() -> Queue:
    """The producers' side; a job that is done leaves nothing behind, as with the other queues."""
    return Queue(NAME, {**CONNECTION, "defaultJobOptions": {"removeOnComplete": True}})


async def main(concurrency: int) -> None:
    """Works until it is told to stop."""
    store = Redis.from_url(os.environ["REDIS_URL"])

    async def cancel(job: Job, _token: str) -> None:
        order_id, requested_at = job.data["order_id"], job.data["requested_at"]
        await store.set(work.RECORD_KEY + order_id, await work.cancel_async(order_id, requested_at))

    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    worker = Worker(NAME, cancel, {**CONNECTION, "concurrency": concurrency})
    worker.on("failed", lambda job, error: print(f"{job.id}: {error!r}", file=sys.stderr, flush=True))
    worker.on("error", lambda error, *_: print(repr(error), file=sys.stderr, flush=True))
    await stop.wait()
    await worker.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
