"""One look at how full the store is and how old its entries are, at the same cost however full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import redis

from kalshi_cancel.model.orders import Lane
from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store import scripts
from kalshi_cancel.store.keys import Keys

AT_MOST = 250  # entries at either end of each index: the next due, and those that wait longest


@dataclass(frozen=True, slots=True)
class LaneGlance:
    """A lane at a glance. Of ``open`` entries, ``looked_at`` were looked at: the rest of it is told of those.

    Ages are in seconds, None when nothing is open; ``messages`` wait in the lane's queue.
    """

    lane: Lane
    open: int
    looked_at: int
    claimed: int
    unresolved: int
    oldest_s: float | None
    median_s: float | None
    messages: int


@dataclass(frozen=True, slots=True)
class Glance:
    """The store at a glance, at ``now_s`` by the server's clock (epoch seconds)."""

    now_s: float
    lanes: tuple[LaneGlance, ...]
    dead_letters: int


def glance(server: redis.Redis, settings: RedisSettings) -> Glance:
    """How full the lanes are and how old what is in them; raises StoreError."""
    keys_of = Keys(settings.key_prefix)
    paths = sorted(scripts.call(lambda: server.smembers(keys_of.paths)))
    homes = [(lane, path) for lane in Lane for path in paths]
    pipeline = server.pipeline(transaction=False)
    pipeline.time()
    pipeline.zcard(keys_of.dead)
    for lane in Lane:
        pipeline.llen(settings.celery_prefix + lane.queue)
    for lane, path in homes:
        due = keys_of.due(lane, path)
        pipeline.zcard(due)
        pipeline.zrange(due, 0, AT_MOST - 1)
        pipeline.zrange(due, -AT_MOST, -1)
    (seconds, micros), dead, *rest = scripts.call(pipeline.execute)
    messages, indexes = rest[: len(Lane)], rest[len(Lane) :]
    now_s = seconds + micros / 1e6
    lanes = []
    for at, lane in enumerate(Lane):
        mine = [n for n, (home, _) in enumerate(homes) if home is lane]
        ids = dict.fromkeys(each for n in mine for ends in indexes[3 * n + 1 : 3 * n + 3] for each in ends)
        keys = [keys_of.pending(order_id) for order_id in ids]
        size = sum(indexes[3 * n] for n in mine)
        lanes.append(_lane(server, lane, keys, size=size, now_s=now_s, messages=messages[at]))
    return Glance(now_s, tuple(lanes), dead)


def _lane(
    server: redis.Redis, lane: Lane, keys: Sequence[str], *, size: int, now_s: float, messages: int
) -> LaneGlance:
    pipeline = server.pipeline(transaction=False)
    for key in keys:
        pipeline.hmget(key, ["accepted_ms", "token", "reported"])
    found = [fields for fields in scripts.call(pipeline.execute) if (fields[0] or "").isdecimal()]
    ages = sorted(max(now_s - int(accepted_ms) / 1000, 0.0) for accepted_ms, _, _ in found)
    return LaneGlance(
        lane,
        size,
        len(keys),
        sum(bool(token) for _, token, _ in found),
        sum(reported == "1" for _, _, reported in found),
        ages[-1] if ages else None,
        ages[len(ages) // 2] if ages else None,
        messages,
    )
