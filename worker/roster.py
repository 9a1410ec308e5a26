"""Who works: the workers that run, what they serve, and whether they hold cancels back.

Hides what workers say of themselves in Redis, again and again: ``P:workers``, a sorted set of JSON by when
it was last said, and ``P:gates``, a hash of [state, when] by worker. Who has said nothing for a while is
forgotten.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import redis

from worker import scripts
from worker.settings import RedisSettings

GATE_NOTE_LIFE_S = 10  # a closed gate is noted about every second
WORKER_LIFE_S = 5.0  # since it last said that it runs


@dataclass(frozen=True, slots=True)
class WorkerShown:
    """A worker process that runs: which lanes it serves, with how many hands at most."""

    name: str
    lanes: tuple[str, ...]
    hands: int


class Roster:
    """The roster under one prefix; everything raises BookError."""

    def __init__(self, server: redis.Redis, settings: RedisSettings) -> None:
        self._server = server
        self._prefix = settings.key_prefix

    def note_gate(self, worker: str, state: str) -> None:
        """Says whether a worker holds cancels back, and why; closed gates are noted again and again."""
        noted = json.dumps([state, self._now_s()])
        scripts.call(lambda: self._server.hset(f"{self._prefix}:gates", worker, noted))

    def held_back(self) -> dict[str, str]:
        """The workers that hold cancels back at this moment, and why."""
        noted: dict[str, str] = scripts.call(lambda: self._server.hgetall(f"{self._prefix}:gates"))
        oldest = self._now_s() - GATE_NOTE_LIFE_S
        states = {worker: json.loads(note) for worker, note in noted.items()}
        return {name: str(state) for name, (state, at) in states.items() if at >= oldest and state != "open"}

    def show(self, worker: WorkerShown) -> None:
        """Says that a worker runs; to be said again and again: who has not for a while is forgotten."""
        now_ms = self._now_s() * 1000
        pipeline = self._server.pipeline(transaction=False)
        pipeline.zadd(f"{self._prefix}:workers", {json.dumps(asdict(worker)): now_ms})
        pipeline.zremrangebyscore(f"{self._prefix}:workers", "-inf", now_ms - WORKER_LIFE_S * 1000)
        scripts.call(pipeline.execute)

    def workers(self) -> list[WorkerShown]:
        """The workers that said lately that they run, by name."""
        since_ms = (self._now_s() - WORKER_LIFE_S) * 1000
        noted = scripts.call(
            lambda: self._server.zrange(f"{self._prefix}:workers", since_ms, "+inf", byscore=True)
        )
        shown = (json.loads(each) for each in noted)
        workers = (WorkerShown(each["name"], tuple(each["lanes"]), each["hands"]) for each in shown)
        return sorted(workers, key=lambda worker: worker.name)

    def _now_s(self) -> float:
        """The server's clock: workers' own may differ by minutes."""
        seconds, micros = scripts.call(self._server.time)
        return float(seconds) + float(micros) / 1e6
