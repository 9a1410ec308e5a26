"""How the whole service stands, read from Redis in one look: what every worker sees alike."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import redis

from kalshi_cancel.model.orders import Lane
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import scripts
from kalshi_cancel.store.keys import Keys

# Of a line, how many entries are looked at on either end for the oldest: about a millisecond of Redis' time.
ENDS = 500
MASS_CANCELS_MOST = 100
# The lists in which Celery keeps a queue's messages: one for each of its priority steps.
_PRIORITIES = ("", "\x06\x163", "\x06\x166", "\x06\x169")


@dataclass(frozen=True, slots=True)
class LaneState:
    """A lane: entries that are open, seconds since the oldest was accepted, and requests accepted ever."""

    open: int
    oldest_age_s: float
    accepted: int


@dataclass(frozen=True, slots=True)
class BucketState:
    """A bucket: its tokens now, the most that we count on, and the 429s met."""

    tokens: float
    capacity: float
    refused: int


@dataclass(frozen=True, slots=True)
class StatsShown:
    """The service at one moment; ``mass_cancels`` counts the latest 100: ``running``, ``flat``, ``not_flat``.

    ``set_aside``: entries that cannot be read; ``audit_gaps``: entries that the audit log is missing.
    """

    lanes: dict[Lane, LaneState]
    unresolved: int
    dead_letters: int
    set_aside: int
    audit_gaps: int
    queues: dict[str, int]
    buckets: dict[str, BucketState]
    mass_cancels: dict[str, int]
    redis_round_trip_s: float


class Stats:
    """The service under one prefix; safe to share between threads."""

    def __init__(self, server: redis.Redis, settings: RedisSettings) -> None:
        self._server = server
        self._prefix = settings.key_prefix
        self._celery_prefix = settings.celery_prefix
        self._state = scripts.load(server, "gather", "buckets", "stats")
        self._mass_end = scripts.load(server, "mass_end")
        self._ended: dict[str, str] = {}  # what has ended does not change any more

    def look(self) -> StatsShown:
        """How it stands now; raises StoreError."""
        asked = time.perf_counter()
        scripts.call(self._server.ping)
        round_trip_s = time.perf_counter() - asked
        unresolved, dead, aside, missed, lanes, buckets = scripts.call(
            lambda: self._state(args=[self._prefix, ENDS, *(lane.value for lane in Lane)])
        )
        return StatsShown(
            lanes={
                lane: LaneState(int(open_now), age_ms / 1000, int(accepted))
                for lane, (open_now, age_ms, accepted) in zip(Lane, lanes, strict=True)
            },
            unresolved=int(unresolved),
            dead_letters=int(dead),
            set_aside=int(aside),
            audit_gaps=int(missed),
            queues=self._queues(),
            buckets={
                str(name): BucketState(float(tokens), float(capacity), int(refused))
                for name, tokens, capacity, refused in buckets
            },
            mass_cancels=self._mass_cancels(),
            redis_round_trip_s=round_trip_s,
        )

    def _queues(self) -> dict[str, int]:
        pipeline = self._server.pipeline(transaction=False)
        for lane in Lane:
            for priority in _PRIORITIES:
                pipeline.llen(self._celery_prefix + lane.queue + priority)
        lengths = iter(scripts.call(pipeline.execute))
        return {lane.queue: sum(next(lengths) for _ in _PRIORITIES) for lane in Lane}

    def _mass_cancels(self) -> dict[str, int]:
        pipeline = self._server.pipeline(transaction=False)
        pipeline.zrange(Keys(self._prefix).mass_cancels, -MASS_CANCELS_MOST, -1)
        pipeline.smembers(Keys(self._prefix).mass_cancels_open)
        latest, running = scripts.call(pipeline.execute)
        ended = {
            each: self._ended.get(each) or self._how_ended(each) for each in latest if each not in running
        }
        self._ended = {each: how for each, how in ended.items() if how}
        counts = Counter(ended.values())
        return {"running": len(running), "flat": counts["flat"], "not_flat": counts["not_flat"]}

    def _how_ended(self, request_id: str) -> str:
        args = [Keys(self._prefix).mass_cancel(request_id)]
        return str(scripts.call(lambda: self._mass_end(args=args)))
