"""The stats reader tells how all workers stands: for metrics and for `cancelctl top`, by the same rules.

It only reads, by a script that writes nothing: a Redis user that may only read may use it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import redis

from kalshi_cancel.model.requests import Lane
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import scripts
from kalshi_cancel.store.keys import Keys
from kalshi_cancel.store.rate_limits import Level

# Of a lane, how many entries are looked at on either end of its lines for the oldest: about a millisecond of
# Redis' time.
ENDS = 500
MASS_CANCELS_MOST = 100
# The lists in which Celery keeps a queue's messages: one for each of its priority steps.
_PRIORITIES = ("", "\x06\x163", "\x06\x166", "\x06\x169")


@dataclass(frozen=True, slots=True)
class LaneState:
    """A lane. Of ``open`` entries, ``looked_at`` were looked at: what follows is told of those.

    Ages are in seconds, None when nothing is open; ``messages`` wait in the lane's queue. ``accepted`` counts
    all requests ever.
    """

    lane: Lane
    open: int
    looked_at: int
    claimed: int
    unresolved: int
    oldest_s: float | None
    median_s: float | None
    messages: int
    accepted: int


@dataclass(frozen=True, slots=True)
class StatsShown:
    """The service at ``now_s``, epoch seconds by the server's clock.

    ``buckets`` are those in use, by name: none while the account's limits are not known. ``mass_cancels``
    counts the latest 100: ``running``, ``flat``, ``not_flat``. ``set_aside`` counts entries that cannot
    be read, ``audit_gaps`` entries that the audit log is missing.
    """

    now_s: float
    lanes: dict[Lane, LaneState]
    unresolved: int
    dead_letters: int
    set_aside: int
    audit_gaps: int
    buckets: dict[str, Level]
    mass_cancels: dict[str, int]
    redis_round_trip_s: float


class Stats:
    """The service under one prefix; safe to share between threads."""

    def __init__(self, server: redis.Redis, settings: RedisSettings) -> None:
        self._server = server
        self._keys = Keys(settings.key_prefix)
        self._celery_prefix = settings.celery_prefix
        self._state = scripts.load(server, "gather", "buckets", "stats")
        self._ended: dict[str, str] = {}  # what has ended does not change any more

    def look(self) -> StatsShown:
        """How it stands now; raises StoreError."""
        asked = time.perf_counter()
        scripts.call(self._server.ping)
        round_trip_s = time.perf_counter() - asked
        args = scripts.asking(self._keys.prefix, ends=ENDS, lanes=[lane.value for lane in Lane])
        unresolved, dead, aside, missed, lanes, buckets, now_us = scripts.run(self._server, self._state, args)
        messages = self._messages()
        return StatsShown(
            now_s=int(now_us) / 1e6,
            lanes={lane: _lane(lane, told, messages[lane]) for lane, told in zip(Lane, lanes, strict=True)},
            unresolved=int(unresolved),
            dead_letters=int(dead),
            set_aside=int(aside),
            audit_gaps=int(missed),
            buckets={level.bucket: level for level in map(Level.parse, buckets)},
            mass_cancels=self._mass_cancels(),
            redis_round_trip_s=round_trip_s,
        )

    def _messages(self) -> dict[Lane, int]:
        pipeline = self._server.pipeline(transaction=False)
        for lane in Lane:
            for priority in _PRIORITIES:
                pipeline.llen(self._celery_prefix + lane.queue + priority)
        lengths = iter(scripts.call(pipeline.execute))
        return {lane: sum(next(lengths) for _ in _PRIORITIES) for lane in Lane}

    def _mass_cancels(self) -> dict[str, int]:
        pipeline = self._server.pipeline(transaction=False)
        pipeline.zrange(self._keys.mass_cancels, -MASS_CANCELS_MOST, -1)
        pipeline.smembers(self._keys.mass_cancels_open)
        latest, running = scripts.call(pipeline.execute)
        ended = {
            each: self._ended.get(each) or self._how_ended(each) for each in latest if each not in running
        }
        self._ended = {each: how for each, how in ended.items() if how}
        counts = Counter(ended.values())
        return {"running": len(running), "flat": counts["flat"], "not_flat": counts["not_flat"]}

    def _how_ended(self, request_id: str) -> str:
        return scripts.call(lambda: self._server.hget(self._keys.mass_cancel(request_id), "ended")) or ""


def _lane(lane: Lane, told: Sequence[int], messages: int) -> LaneState:
    """A lane as ``lua/stats.lua`` tells it."""
    open_now, accepted, looked_at, claimed, unresolved, oldest_ms, median_ms = map(int, told)
    oldest_s, median_s = (None if age_ms < 0 else age_ms / 1000 for age_ms in (oldest_ms, median_ms))
    return LaneState(lane, open_now, looked_at, claimed, unresolved, oldest_s, median_s, messages, accepted)
