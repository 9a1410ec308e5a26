"""The account's token buckets: how many tokens there are and who is turned away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SECONDS_OF_WRITES = 2  # above Basic, the write bucket holds two seconds of budget


@dataclass(frozen=True, slots=True)
class Tier:
    """Read and write tokens per second."""

    read: float
    write: float


TIERS = {
    "basic": Tier(200, 100),
    "advanced": Tier(300, 300),
    "expert": Tier(600, 600),
    "premier": Tier(1000, 1000),
    "paragon": Tier(2000, 2000),
    "prime": Tier(4000, 4000),
    "prestige": Tier(10_000, 8_000),
}
UNLIMITED = "unlimited"  # nothing is refused; the limits endpoint then reports a million a second
_NO_LIMIT = Tier(1_000_000, 1_000_000)


class TokenBucket:
    """Tokens that refill continuously up to a capacity. Not thread-safe: its owner locks."""

    def __init__(self, refill: float, capacity: float, at_s: float) -> None:
        self.refill = refill
        self.capacity = capacity
        self._level = capacity
        self._at_s = at_s

    def level(self, at_s: float) -> float:
        """Tokens there are at `at_s` (monotonic seconds)."""
        self._level = min(self.capacity, self._level + max(0.0, at_s - self._at_s) * self.refill)
        self._at_s = max(at_s, self._at_s)
        return self._level

    def take(self, tokens: float, at_s: float) -> bool:
        """Takes all of `tokens`, or none of them and says False."""
        if self.level(at_s) < tokens:
            return False
        self._level -= tokens
        return True

    def drain(self, tokens: float, at_s: float) -> None:
        """Another client of the account spent `tokens`, as far as there were any."""
        self._level = max(0.0, self.level(at_s) - tokens)


class Budget:
    """All buckets of the account: `read`, `write` (unscoped) and `write:N` for each shard N >= 1."""

    def __init__(self, tier: str, explicit: dict[str, Any] | None = None) -> None:
        """`explicit`: {"read": [refill, capacity], "write": [...]}, numbers that overrule the tier's."""
        if tier != UNLIMITED and tier not in TIERS:
            raise ValueError(f"tier must be one of {', '.join([UNLIMITED, *TIERS])}, not {tier!r}")
        self.tier = tier
        self.enforced = tier != UNLIMITED or bool(explicit)
        rates = TIERS.get(tier, _NO_LIMIT)
        write_seconds = 1 if tier == "basic" else SECONDS_OF_WRITES
        self.rates: dict[str, tuple[float, float]] = {
            "read": (rates.read, rates.read),
            "write": (rates.write, rates.write * write_seconds),
        }
        for name, numbers in (explicit or {}).items():
            refill, capacity = numbers
            if name not in self.rates or min(refill, capacity) < 0:
                raise ValueError(f"buckets: {name}: {numbers!r}")
            self.rates[name] = (float(refill), float(capacity))
        self._buckets: dict[str, TokenBucket] = {}

    def take(self, bucket: str, tokens: float, at_s: float) -> bool:
        """Takes `tokens` from `bucket`, all or none; always True when nothing is enforced."""
        return not self.enforced or self.bucket(bucket, at_s).take(tokens, at_s)

    def bucket(self, name: str, at_s: float) -> TokenBucket:
        """The bucket `name`; a shard's own comes into being, full, when it is first asked for."""
        found = self._buckets.get(name)
        if found is None:
            kind, _, shard = name.partition(":")
            if kind not in self.rates or (shard and not shard.isdigit()):
                raise ValueError(f"no bucket {name!r}: read, write or write:<shard>")
            found = self._buckets[name] = TokenBucket(*self.rates[kind], at_s)
        return found

    def levels(self, at_s: float) -> dict[str, dict[str, float]]:
        """Refill, capacity and present level of each bucket that is in use."""
        names = sorted({"read", "write", *self._buckets})
        return {
            name: {
                "refill_rate": bucket.refill,
                "bucket_capacity": bucket.capacity,
                "level": bucket.level(at_s),
            }
            for name in names
            for bucket in [self.bucket(name, at_s)]
        }

    def limits(self) -> dict[str, Any]:
        """The body of GET /account/limits, which knows whole numbers only."""
        return {
            "usage_tier": self.tier,
            **{
                name: {"refill_rate": int(refill), "bucket_capacity": int(capacity)}
                for name, (refill, capacity) in self.rates.items()
            },
            "grants": [],
        }
