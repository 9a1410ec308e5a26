"""The account's token buckets, shared by all workers through Redis: when a call may be sent.

The exchange's own model: a bucket refills continuously up to a capacity; there is one for reads, one for
unscoped writes, and one for the single cancels of each shard from 1. Cancels are paid for in the step that
claims them (``lua/steps.lua``); what follows from an answer is paid for here.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import redis

from kalshi_cancel.store import scripts
from kalshi_cancel.store.keys import Keys
from kalshi_cancel.store.scripts import StoreError

log = logging.getLogger(__name__)


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
            table = {(c["method"], _path(c["path"])): float(c["cost"]) for c in costs["endpoint_costs"]}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            return None
        known = replace(
            known,
            cancel_cost=table.get(("DELETE", "/trade-api/v2/portfolio/events/orders/:"), default),
            read_cost=table.get(("GET", "/trade-api/v2/portfolio/orders/:"), default),
            list_cost=table.get(("GET", "/trade-api/v2/portfolio/orders"), default),
        )
        # What is none of this would stop the arithmetic, and with it every cancel.
        usable = all(0 < number < math.inf for number in astuple(known))
        return known if usable and known.holds_its_calls else None

    @property
    def holds_its_calls(self) -> bool:
        """Whether each bucket, of which half is always counted on, holds the tokens of its dearest call."""
        return self.read_capacity >= 2 * self.list_cost and self.write_capacity >= 2 * self.cancel_cost


_PARAMETER = re.compile(r":\w+|\{\w+\}")


def _path(path: str) -> str:
    """An endpoint's path, whatever its parameters are called and however they are written."""
    return _PARAMETER.sub(":", path).rstrip("/")


@dataclass(frozen=True, slots=True)
class Level:
    """A bucket at one moment: its tokens, the most that we count on, and its refill in tokens a second.

    ``share`` of the refill counts at this moment; ``refused``: 429s met so far.
    """

    bucket: str
    tokens: float
    capacity: float
    refill: float
    share: float
    refused: int

    @classmethod
    def parse(cls, told: Sequence[str]) -> Level:
        """As ``level`` of ``lua/buckets.lua`` tells it."""
        bucket, *numbers = told
        tokens, capacity, refill, share, refused = map(float, numbers)
        return cls(bucket, tokens, capacity, refill, share, int(refused))


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
        self._keys = Keys(prefix)
        self.limits = limits
        self._corrected = corrected
        self._take = scripts.load(server, "gather", "buckets", "take")
        self._levels = scripts.load(server, "gather", "buckets", "levels")
        self._correct = scripts.load(server, "gather", "buckets", "correct")
        self._set_limits = scripts.load(server, "gather", "buckets", "limits")

    def set_limits(self, limits: Limits) -> None:
        """Makes these the limits of all workers; raises StoreError."""
        self.limits = limits
        args = scripts.asking(self._keys.prefix, **_shared(limits))
        scripts.run(self._server, self._set_limits, args)

    def set_limits_unless_known(self) -> None:
        """Makes the configured limits the shared ones, unless true ones are known; raises StoreError."""
        pipeline = self._server.pipeline()
        for field, value in _shared(self.limits).items():
            pipeline.hsetnx(self._keys.limits, str(field), value)
        scripts.call(pipeline.execute)

    def take(self, bucket: str, tokens: float, *, kept_share: float = 0.0) -> float:
        """Takes the tokens (0.0), or none and says in how many seconds they may be there."""
        args = scripts.asking(self._keys.prefix, bucket=bucket, tokens=tokens, kept_share=kept_share)
        return float(scripts.run(self._server, self._take, args)) / 1000

    def correct(self, bucket: str, tokens: float, *, taken_at: float) -> bool:
        """Learns from a 429 of a call whose tokens were taken at that moment (monotonic).

        All workers learn from it: once from all calls that were under way together. True where the
        tokens must have been there: the call was turned away for something else, its size perhaps.
        """
        taken_ms_ago = round((time.monotonic() - taken_at) * 1000)
        args = scripts.asking(self._keys.prefix, bucket=bucket, tokens=tokens, taken_ms_ago=taken_ms_ago)
        try:
            is_news, was_affordable = scripts.run(self._server, self._correct, args)
        except StoreError as error:
            scripts.say_failed(log, error, "share what a 429 taught")
            return False
        if is_news:
            self._corrected(bucket)
        return bool(was_affordable)

    def levels(self, buckets: Sequence[str]) -> dict[str, Level]:
        """How these buckets stand at this moment."""
        args = scripts.asking(self._keys.prefix, buckets=list(buckets))
        answer = scripts.run(self._server, self._levels, args)
        return {level.bucket: level for level in map(Level.parse, answer)}


def _shared(limits: Limits) -> dict[Any, Any]:
    """The fields of the shared limits, as ``lua/buckets.lua`` reads them."""
    return {
        "read_refill": limits.read_refill,
        "read_capacity": limits.read_capacity,
        "write_refill": limits.write_refill,
        "write_capacity": limits.write_capacity,
    }
