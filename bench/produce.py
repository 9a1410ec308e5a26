"""A producer as a process of its own: publishes orders flat out, at a rate, or in one call.

    python -m bench.produce ours single PREFIX COUNT [--rate 20]

Says ``ready`` once it is connected, starts at the first line on its standard input, and prints what it did
as one line of JSON: when its first call began, when its last one returned, and for a rate, each order's
moment (seconds of the monotonic clock).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

DEADLINE_S = 600.0  # nobody is told "unresolved" because a benchmark let its cancels wait

Publish = Callable[[str], Awaitable[None]]
PublishMany = Callable[[Sequence[str]], Awaitable[None]]

_to_close: list[Callable[[], Awaitable[None]]] = []  # while the loop still runs


def order_ids(prefix: str, count: int) -> list[str]:
    """The ids that a producer of this prefix publishes, as long as the exchange's own."""
    return [f"{prefix}-{number:0{35 - len(prefix)}d}" for number in range(count)]


async def ours() -> tuple[Publish, PublishMany]:
    """Our own client."""
    from kalshi_cancel.client import CancelClient  # noqa: PLC0415 - each producer loads its own queue only

    client = CancelClient(os.environ["REDIS_URL"], requested_by="bench")

    async def one(order_id: str) -> None:
        client.cancel(order_id, deadline_s=DEADLINE_S)

    async def many(ids: Sequence[str]) -> None:
        client.cancel_many([{"order_id": order_id, "deadline_s": DEADLINE_S} for order_id in ids])

    return one, many


async def raw() -> tuple[Publish, PublishMany]:
    """Plain Celery messages for our workers."""
    from celery import Celery  # noqa: PLC0415 - see ours

    app = Celery("raw", broker=os.environ["REDIS_URL"])

    async def one(order_id: str) -> None:
        fields = {"order_id": order_id, "requested_by": "bench", "deadline_s": DEADLINE_S}
        app.send_task("cancel_order", kwargs=fields, queue="cancels", ignore_result=True)

    return one, _one_by_one(one)


async def celery_shipped() -> tuple[Publish, PublishMany]:
    """Celery with its result backend; the task's id is the record's key."""
    from bench import queue_celery  # noqa: PLC0415 - see ours

    async def one(order_id: str) -> None:
        queue_celery.cancel.apply_async((order_id, time.time()), task_id=f"cancel:{order_id}")

    return one, _one_by_one(one)


async def celery_best() -> tuple[Publish, PublishMany]:
    """Celery without results."""
    from bench import queue_celery_best  # noqa: PLC0415 - see ours

    async def one(order_id: str) -> None:
        queue_celery_best.cancel.apply_async((order_id, time.time()))

    return one, _one_by_one(one)


async def taskiq() -> tuple[Publish, PublishMany]:
    """Taskiq."""
    from bench import queue_taskiq  # noqa: PLC0415 - see ours

    await queue_taskiq.broker.startup()

    async def one(order_id: str) -> None:
        await queue_taskiq.cancel.kiq(order_id, time.time())

    return one, _one_by_one(one)


async def huey() -> tuple[Publish, PublishMany]:
    """Huey."""
    from bench import queue_huey  # noqa: PLC0415 - see ours

    async def one(order_id: str) -> None:
        queue_huey.cancel(order_id, time.time())

    return one, _one_by_one(one)


async def bullmq() -> tuple[Publish, PublishMany]:
    """BullMQ; it sends many jobs in one transaction."""
    from bench import queue_bullmq  # noqa: PLC0415 - see ours

    queue = queue_bullmq.queue()
    _to_close.append(queue.close)

    async def one(order_id: str) -> None:
        await queue.add("cancel", {"order_id": order_id, "requested_at": time.time()})

    async def many(ids: Sequence[str]) -> None:
        now = time.time()
        await queue.addBulk(
            [{"name": "cancel", "data": {"order_id": each, "requested_at": now}} for each in ids]
        )

    return one, many


async def ardiq() -> tuple[Publish, PublishMany]:
    """Ardiq; it sends many tasks in one round trip."""
    from bench import queue_ardiq  # noqa: PLC0415 - see ours

    task = queue_ardiq.cancel

    async def one(order_id: str) -> None:
        await task.options(task_id=order_id).enqueue(order_id, time.time())

    async def many(ids: Sequence[str]) -> None:
        now = time.time()
        await queue_ardiq.app.enqueue_many(task.options(task_id=each).prepare(each, now) for each in ids)

    return one, many


def _one_by_one(one: Publish) -> PublishMany:
    async def many(ids: Sequence[str]) -> None:
        for order_id in ids:
            await one(order_id)

    return many


PRODUCERS = {
    "ours": ours,
    "raw": raw,
    "celery_shipped": celery_shipped,
    "celery_best": celery_best,
    "taskiq": taskiq,
    "huey": huey,
    "bullmq": bullmq,
    "ardiq": ardiq,
}


async def _produce(name: str, mode: str, prefix: str, count: int, rate: float) -> dict[str, Any]:
    one, many = await PRODUCERS[name]()
    await one(f"{prefix}-warm")
    print("ready", flush=True)
    sys.stdin.readline()
    ids = order_ids(prefix, count)
    began, cpu = time.monotonic(), time.process_time()
    published: dict[str, float] = {}
    if mode == "bulk":
        await many(ids)
    elif mode == "single":
        for order_id in ids:
            await one(order_id)
    else:
        due = began
        for order_id in ids:
            due += random.uniform(0.5, 1.5) / rate
            await asyncio.sleep(max(due - time.monotonic(), 0))
            published[order_id] = time.monotonic()
            await one(order_id)
    done = {
        "began": began,
        "ended": time.monotonic(),
        "cpu_s": time.process_time() - cpu,
        "published": published,
    }
    for close in _to_close:
        await close()
    return done


def main() -> None:
    """Produces once."""
    parser = argparse.ArgumentParser(prog="python -m bench.produce")
    parser.add_argument("name", choices=PRODUCERS)
    parser.add_argument("mode", choices=["single", "bulk", "paced"])
    parser.add_argument("prefix")
    parser.add_argument("count", type=int)
    parser.add_argument("--rate", type=float, default=20.0, help="orders a second, for `paced`")
    arguments = parser.parse_args()
    print(
        json.dumps(
            asyncio.run(
                _produce(arguments.name, arguments.mode, arguments.prefix, arguments.count, arguments.rate)
            )
        )
    )


if __name__ == "__main__":
    main()
