"""The token buckets of a test's own account."""

from __future__ import annotations

import uuid

from kalshi_cancel.settings.redis import RedisSettings
from kalshi_cancel.store.rate_limits import Limits, Pacer
from kalshi_cancel.store.scripts import connect

LIMITS = Limits(200.0, 200.0, 300.0, 600.0)
ON_THE_WAY_S = (
    0.2  # kalshi_cancel/store/lua/buckets.lua: what a full bucket misses in this time is not counted on
)


class Account:
    """The buckets under a prefix of a test's own, where time can be let pass at once."""

    def __init__(self, url, limits=LIMITS):
        self.settings = RedisSettings.from_env(
            {"REDIS_URL": url, "KALSHI_KEY_PREFIX": f"test-{uuid.uuid4().hex[:8]}"}
        )
        self.server = connect(self.settings)
        self.prefix = self.settings.key_prefix
        self.pacer = self.another_workers(limits)
        self.pacer.set_limits(limits)

    def close(self):
        self.server.close()

    def another_workers(self, limits=LIMITS):
        return Pacer(self.server, self.prefix, limits)

    def buckets(self):
        """The keys of the buckets that were paid from."""
        return self.server.keys(f"{self.prefix}:bucket:*")

    def level(self, bucket="write"):
        """How a bucket stands."""
        return self.pacer.levels([bucket])[bucket]

    def pass_time(self, seconds):
        """Moves every moment of the buckets back."""
        for key in self.buckets():
            for field in ("at_us", "share_at_us", "since_us", "nothing_us"):
                if self.server.hexists(key, field):
                    self.server.hincrby(key, field, -round(seconds * 1e6))

    def tokens(self, bucket="write"):
        """The tokens that can be had at this moment, by asking for too many."""
        lacking = self.pacer.take(bucket, 1e9)
        refill = self.refill(bucket)
        return 1e9 - lacking * refill

    def refill(self, bucket):
        limits = self.pacer.limits
        return limits.read_refill if bucket == "read" else limits.write_refill


def usable(capacity, refill):
    """The part of a bucket that is ever counted on."""
    return max(capacity - refill * ON_THE_WAY_S, capacity / 2)
