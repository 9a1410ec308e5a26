"""Checks what the command line asks of Celery: what this service or the pool cannot do is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery import concurrency
from celery.utils.text import str_to_list

from kalshi_cancel.model.requests import Lane
from kalshi_cancel.settings.near_misses import nearest

THREADS, PROCESSES, SOLO = (f"celery.concurrency.{name}" for name in ("thread", "prefork", "solo"))
# What only Celery's pool of processes obeys; in the others it does nothing, or ends the worker under load.
OF_PROCESSES = ("autoscale", "time_limit", "soft_time_limit", "max_tasks_per_child", "max_memory_per_child")


def forks(pool: Any) -> bool:
    """Whether a pool, Celery's name for it or its class, is one of processes."""
    return _module(pool) == PROCESSES


def problems(options: Mapping[str, Any], *, pool: Any) -> list[str]:
    """Why a worker cannot be started: ``options`` as Celery has parsed them, ``pool`` if they name none."""
    pool = options.get("pool") or options.get("pool_cls") or pool
    found = []
    if _module(pool) not in (THREADS, PROCESSES, SOLO):
        found.append(
            f"the pool {_named(pool)} is not supported: use -P threads (the default), processes or solo"
        )
    elif not forks(pool):
        given = [name for name in OF_PROCESSES if options.get(name)]
        found += [f"--{name.replace('_', '-')} works with -P processes only: leave it out" for name in given]
    return [*found, *_queue_problems(options)]


def _queue_problems(options: Mapping[str, Any]) -> list[str]:
    ours = [lane.queue for lane in Lane]
    # What somebody may take for a queue's name: the lane's, and the tasks'.
    meant_by = {lane.value: lane.queue for lane in Lane if lane.value != lane.queue}
    meant_by |= dict.fromkeys(("cancel", "cancel_order", "cancel_orders"), Lane.STRATEGY.queue)
    wanted, left_out = (str_to_list(options.get(name)) or [] for name in ("queues", "exclude_queues"))
    found = [
        f"there is no queue {name!r}: did you mean {meant!r}?"
        for name in (*wanted, *left_out)
        if (meant := meant_by.get(name) or nearest(name, ours))
    ]
    if set(ours) <= set(left_out) and not wanted:
        found.append(f"-X {','.join(left_out)} leaves no queue to work on")
    return found


def _module(pool: Any) -> str:
    return str(concurrency.get_implementation(pool).__module__)


def _named(pool: Any) -> str:
    return pool if isinstance(pool, str) else _module(pool).rpartition(".")[2]
