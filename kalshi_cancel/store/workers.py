"""The worker registry: who works, for which lanes, with which key, and whether it holds cancels back.

Hides what workers say of themselves in Redis, again and again: ``P:workers``, a sorted set of JSON by when it
was said. Who has said nothing for a while is forgotten. A worker is known by a random id: two containers may
have the same host name and process id, which are for people to read.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import redis

from kalshi_cancel.model.results import Problem
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import scripts
from kalshi_cancel.store.keys import Keys

WORKER_LIFE_S = 5.0  # since it last said that it runs
# A worker that fell silent without saying that it ends may be frozen and come back: so long, an order that
# other keys may not cancel, or do not see, waits for its key.
KEY_LIFE_S = 60.0
LOOK_EVERY_S = 0.5  # at the others, for who asks again and again
CLOSED = "closed"
KEY_REFUSED = "key_refused"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a process is: ``worker_id`` is its own alone, ``name`` (host and process id) is for people."""

    worker_id: str
    name: str

    @classmethod
    def of_this_process(cls) -> Identity:
        """A new one; to be made once in each process."""
        return cls(uuid.uuid4().hex, f"{socket.gethostname()}:{os.getpid()}")

    @property
    def full(self) -> str:
        """Both in one word: nobody else's, and to be read."""
        return f"{self.name}#{self.worker_id[:12]}"


@dataclass(frozen=True, slots=True)
class WorkerShown:
    """A worker process that runs: which lanes it serves, with how many senders at most, and as whom.

    ``breaker`` is the state of its circuit breaker, ``problem`` what opened it. One without senders of its
    own serves by other processes.
    """

    name: str
    lanes: tuple[str, ...]
    senders: int
    worker_id: str = ""
    key_id: str = ""
    breaker: str = CLOSED
    problem: Problem | None = None

    @property
    def why_held_back(self) -> str:
        """Why it holds cancels back; empty while it sends."""
        if self.breaker == CLOSED:
            return ""
        return self.breaker if self.problem is None else f"{self.breaker} ({self.problem.code})"


class WorkerRegistry:
    """The registry under one prefix; everything raises StoreError."""

    def __init__(self, server: redis.Redis, settings: RedisSettings) -> None:
        self._server = server
        self._key = Keys(settings.key_prefix).workers

    def show(self, worker: WorkerShown) -> None:
        """Says that a worker runs; to be said again and again: who has not for a while is forgotten."""
        now_ms = self._now_ms()
        pipeline = self._server.pipeline(transaction=False)
        pipeline.zadd(self._key, {json.dumps(asdict(worker)): now_ms})
        pipeline.zremrangebyscore(self._key, "-inf", now_ms - KEY_LIFE_S * 1000)
        scripts.call(pipeline.execute)

    def leave(self, worker_id: str) -> None:
        """Says that a worker ends."""
        said = scripts.call(lambda: self._server.zrange(self._key, 0, -1))
        mine = [each for each in said if (shown := _parse(each)) and shown.worker_id == worker_id]
        if mine:
            scripts.call(lambda: self._server.zrem(self._key, *mine))

    def workers(self, *, within_s: float = WORKER_LIFE_S) -> list[WorkerShown]:
        """The workers that said lately that they run, by name; a name that several have is told apart."""
        since_ms = self._now_ms() - within_s * 1000
        said = scripts.call(lambda: self._server.zrange(self._key, since_ms, "+inf", byscore=True))
        latest: dict[str, WorkerShown] = {}  # in the order in which it was said
        for worker in filter(None, map(_parse, said)):
            latest[worker.worker_id or worker.name] = worker
        return sorted(_told_apart(latest.values()), key=lambda worker: worker.name)

    def held_back(self) -> dict[str, str]:
        """The workers that hold cancels back at this moment, and why."""
        return {each.name: each.why_held_back for each in self.workers() if each.why_held_back}

    def _now_ms(self) -> float:
        """The server's clock: workers' own may differ by minutes."""
        seconds, micros = scripts.call(self._server.time)
        return float(seconds) * 1000 + float(micros) / 1000


class Colleagues:
    """The other workers, as one of them sees them; safe to share between threads.

    Everything raises StoreError.
    """

    def __init__(self, registry: WorkerRegistry, worker_id: str) -> None:
        self._registry = registry
        self._worker_id = worker_id
        self._looked_at: dict[float, float] = {}
        self._seen: dict[float, list[WorkerShown]] = {}

    def serve(self) -> bool:
        """Whether any of them sends."""
        return any(each.breaker == CLOSED for each in self._others(WORKER_LIFE_S))

    def another_key(self, key_ids: Collection[str], lane: str) -> str:
        """The id of a key that is none of these, of one that serves the lane; empty: there is none.

        A key that the exchange refuses altogether does not count. That of a worker that fell silent does.
        """
        for each in self._others(KEY_LIFE_S):
            if (
                each.key_id
                and each.key_id not in key_ids
                and each.breaker != KEY_REFUSED
                and lane in each.lanes
            ):
                return each.key_id
        return ""

    def _others(self, within_s: float) -> list[WorkerShown]:
        if time.monotonic() - self._looked_at.get(within_s, -math.inf) > LOOK_EVERY_S:
            workers = self._registry.workers(within_s=within_s)
            self._seen[within_s] = [each for each in workers if each.worker_id != self._worker_id]
            self._looked_at[within_s] = time.monotonic()
        return self._seen[within_s]


def _parse(text: str) -> WorkerShown | None:
    """What a worker has said, of a newer one as far as that is understood.

    None for what somebody else has put there: it must not hide the others.
    """
    try:
        said: dict[str, Any] = json.loads(text)
        problem, senders = said.get("problem"), said.get("senders")
        return WorkerShown(
            name=str(said["name"]),
            lanes=tuple(str(lane) for lane in list(said["lanes"])),
            senders=senders if isinstance(senders, int) else 0,
            worker_id=str(said.get("worker_id", "")),
            key_id=str(said.get("key_id", "")),
            breaker=str(said.get("breaker", CLOSED)),
            problem=Problem(str(problem.get("code")), str(problem.get("message")), problem.get("http_status"))
            if isinstance(problem, dict)
            else None,
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _told_apart(workers: Collection[WorkerShown]) -> Iterable[WorkerShown]:
    names = Counter(worker.name for worker in workers)
    for worker in workers:
        is_alone = names[worker.name] == 1
        yield worker if is_alone else replace(worker, name=f"{worker.name}#{worker.worker_id[:4]}")
