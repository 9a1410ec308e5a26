"""The account's token buckets, shared by all workers through Redis: when a call may be sent.

The exchange's own model: a bucket refills continuously up to a capacity; there is one for reads, one for
unscoped writes, and one for the single cancels of each shard from 1. Cancels are paid for in the step that
claims them (``lua/claim.lua``); what follows from an answer is paid for here.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import redis

from kalshi_cancel.model.orders import SHARDS, write_path
from kalshi_cancel.store import scripts
from kalshi_cancel.store.scripts import StoreError

log = logging.getLogger(__name__)

RECOVERY_PER_S = 0.05  # as in lua/buckets.lua


@dataclass(frozen=True, slots=True)
class Limits:
    """What the account may: tokens a second and capacities, and what calls cost, in tokens."""

    read_refill: float
    read_capacity: float
    write_refill: float
    write_capacity: float
    cancel_cost: float = 2.0
    read_cost: float = 2.0
    list_cost: float = 10.0

    @classmethod
    def parse(cls, limits: Mapping[str, Any], costs: Mapping[str, Any]) -> Limits | None:
        """Out of the answers of /account/limits and /account/endpoint_costs; None when unreadable."""
        try:
            read, write = limits["read"], limits["write"]
            known = cls(
                float(read["refill_rate"]),
                float(read["bucket_capacity"]),
                float(write["refill_rate"]),
                float(write["bucket_capacity"]),
            )
            default = float(costs.get("default_cost", 10))
            table = {(c["method"], c["path"].rstrip("/")): float(c["cost"]) for c in costs["endpoint_costs"]}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            return None
        known = replace(
            known,
            cancel_cost=table.get(("DELETE", "/trade-api/v2/portfolio/events/orders/:order_id"), default),
            read_cost=table.get(("GET", "/trade-api/v2/portfolio/orders/:order_id"), default),
            list_cost=table.get(("GET", "/trade-api/v2/portfolio/orders"), default),
        )
        # What is none of this would stop the arithmetic, and with it every cancel.
        usable = all(0 < number < math.inf for number in astuple(known))
        return known if usable and known.holds_its_calls else None

    @property
    def holds_its_calls(self) -> bool:
        """Whether each bucket, of which half is always counted on, holds the tokens of its dearest call."""
        return self.read_capacity >= 2 * self.list_cost and self.write_capacity >= 2 * self.cancel_cost


class Pacer:
    """The buckets of one account under one prefix; safe to share between threads.

    ``corrected`` is told which bucket a 429 has corrected.
    """

    def __init__(
        self,
        server: redis.Redis,
        prefix: str,
        limits: Limits,
        *,
        corrected: Callable[[str], object] = lambda _bucket: None,
    ) -> None:
        self._server = server
        self._prefix = prefix
        self.limits = limits
        self._corrected = corrected
        self._take = scripts.load(server, "gather", "buckets", "take")
        self._levels = scripts.load(server, "gather", "buckets", "levels")
        self._correct = scripts.load(server, "gather", "buckets", "correct")
        self._set_limits = scripts.load(server, "gather", "buckets", "limits")

    def set_limits(self, limits: Limits) -> None:
        """Makes these the limits of the whole fleet; raises StoreError."""
        self.limits = limits
        args = [self._prefix, *_shared(limits).values()]
        scripts.call(lambda: self._set_limits(args=args))

    def set_limits_unless_known(self) -> None:
        """Makes the configured limits the fleet's, unless true ones are known; raises StoreError."""
        pipeline = self._server.pipeline()
        for field, value in _shared(self.limits).items():
            pipeline.hsetnx(f"{self._prefix}:limits", str(field), value)
        scripts.call(pipeline.execute)

    def take(self, bucket: str, tokens: float, *, kept_share: float = 0.0) -> float:
        """Takes the tokens (0.0), or none and says in how many seconds they may be there."""
        args = [self._prefix, bucket, tokens, kept_share]
        return float(scripts.call(lambda: self._take(args=args))) / 1000

    def correct(self, bucket: str, tokens: float, *, taken_at: float) -> bool:
        """Learns from a 429 of a call whose tokens were taken at that moment (monotonic).

        The whole fleet learns from it: once from all calls that were under way together. True where the
        tokens must have been there: the call was turned away for something else, its size perhaps.
        """
        args = [self._prefix, bucket, tokens, round((time.monotonic() - taken_at) * 1000)]
        try:
            is_news, was_affordable = scripts.call(lambda: self._correct(args=args))
        except StoreError as error:
            scripts.say_failed(log, error, "share what a 429 taught")
            return False
        if is_news:
            self._corrected(bucket)
        return bool(was_affordable)

    def tokens_now(self, shards: Sequence[int]) -> dict[int, float]:
        """The write tokens there are at this moment: of each shard's own bucket, and for 0 the unscoped."""
        names = [write_path(shard) for shard in shards]
        levels = scripts.call(lambda: self._levels(args=[self._prefix, *names]))
        return {shard: float(level) for shard, level in zip(shards, levels, strict=True)}

    def read_tokens_now(self) -> float:
        """The read tokens there are at this moment."""
        [level] = scripts.call(lambda: self._levels(args=[self._prefix, "read"]))
        return float(level)

    def levels(self) -> dict[str, dict[str, float]]:
        """What Redis knows of each bucket: tokens at ``at_us``, share of the refill, 429s met."""
        names = ["read", *(write_path(shard) for shard in range(SHARDS))]
        pipeline = self._server.pipeline(transaction=False)
        for name in names:
            pipeline.hgetall(f"{self._prefix}:bucket:{name}")
        return {
            name: {field: float(value) for field, value in fields.items()}
            for name, fields in zip(names, scripts.call(pipeline.execute), strict=True)
            if fields
        }


@dataclass(frozen=True, slots=True)
class Level:
    """A bucket at one moment: tokens there are of how many, tokens a second, the share of those that counts.

    ``refused``: 429s met so far.
    """

    bucket: str
    tokens: float
    capacity: float
    refill: float
    share: float
    refused: int


def levels_now(server: redis.Redis, prefix: str) -> list[Level]:
    """Every bucket that was paid from or may be, for who may only read; raises StoreError.

    As ``lua/buckets.lua`` has it, but with the whole capacity: what is on its way is not left out.
    """
    pipeline = server.pipeline(transaction=False)
    pipeline.time()
    pipeline.hgetall(f"{prefix}:limits")
    pipeline.smembers(f"{prefix}:paths")
    (seconds, micros), limits, paths = scripts.call(pipeline.execute)
    names = sorted({"read", "write", *(path for path in paths if path.startswith("write:"))})
    pipeline = server.pipeline(transaction=False)
    for name in names:
        pipeline.hmget(f"{prefix}:bucket:{name}", ["tokens", "at_us", "share", "share_at_us", "refused"])
    now_us = seconds * 1_000_000 + micros
    return [
        _level(name, limits, fields, now_us)
        for name, fields in zip(names, scripts.call(pipeline.execute), strict=True)
    ]


def _level(name: str, limits: Mapping[str, str], fields: Sequence[str | None], now_us: int) -> Level:
    kind = "read" if name.startswith("read") else "write"
    refill, capacity = (float(limits.get(f"{kind}_{each}", 0.0)) for each in ("refill", "capacity"))
    tokens, at_us, share, share_at_us, refused = (None if each is None else float(each) for each in fields)
    counts = 1.0
    if share is not None and share_at_us is not None:
        counts = min(1.0, share + max(now_us - share_at_us, 0) * RECOVERY_PER_S / 1e6)
    there = capacity
    if tokens is not None and at_us is not None:
        there = min(capacity, tokens + max(now_us - at_us, 0) * refill * counts / 1e6)
    return Level(name, there, capacity, refill, counts, int(refused or 0))


def _shared(limits: Limits) -> dict[Any, Any]:
    """The fields of the fleet's limits, as ``lua/buckets.lua`` reads them."""
    return {
        "read_refill": limits.read_refill,
        "read_capacity": limits.read_capacity,
        "write_refill": limits.write_refill,
        "write_capacity": limits.write_capacity,
    }
