"""Everything about the sandbox that can be switched while it runs, with its default."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from kalshi_cancel.sandbox.buckets import Budget
from kalshi_cancel.sandbox.forms import FORMS, TIME_FORMS
from kalshi_cancel.sandbox.refusal import SHAPES

_CHOICES: dict[str, tuple[Any, ...]] = {
    "v1": ("retired", "alive_int", "alive_fp"),
    "order_form": tuple(FORMS),
    "last_update_form": tuple(TIME_FORMS),
    "cursors": ("keyset", "offset"),
    "empty_page": ("array", "null", "absent"),
    "oversize_status": (400, 413, 429),
    "pause_status": (409, 503),
    "error_shape": (None, *SHAPES),
    "refuse_reuse": ("off", "note", "refuse"),
    "wrong_market_ticker": ("not_found", "ignored"),
    "omitted_subaccount": ("primary", "any"),
    "cancel_all_cost": ("fixed", "max_batch"),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The sandbox's switches; what the exchange's documents leave open has one, so that both can be tried."""

    seed: int = 0  # of ids, probabilities and shuffles
    # -- dialects
    v1: str = "retired"  # the old cancel: "retired" (410) | "alive_int" | "alive_fp"
    order_form: str = "fp"  # how reads write an order: "fp" (today) | "int" (the first V1)
    error_shape: str | None = None  # every error body in this shape; None = the exchange's own
    # -- budget
    tier: str = "unlimited"  # or a tier's name
    buckets: dict[str, Any] | None = None  # {"read": [refill, capacity], "write": [...]} overrule the tier
    max_batch: int | None = (
        None  # orders in a batch; None = what the write bucket holds, 1,000 without limits
    )
    oversize_status: int = 400  # of a batch beyond max_batch
    cancel_all_cost: str = "fixed"  # "fixed": 2 tokens | "max_batch": as much as the largest batch
    # -- listings
    cursors: str = "keyset"  # "keyset": the last order shown | "offset": how many orders to pass over, so
    # that an order that leaves the front hides another
    empty_page: str = "array"  # the orders of a page that has none: [] | "null" | "absent"
    archive_after_s: float = 14 * 86_400.0  # orders that ended longer ago are in the archive alone
    # -- time
    read_lag_s: float = 0.0  # how long reads show an order's state before a write
    latency_s: float = 0.0  # added to every call before it is looked at
    skew_s: float = 0.0  # how far both of the exchange's clocks are ahead of this machine's
    front_skew_s: float = 0.0  # how much farther the front's is (`Date`, the signature window)
    engine_skew_s: float = 0.0  # how much farther the engine's is (`ts_ms`, the times of orders)
    timestamp_window_s: float = 10.0  # accepted distance of a request's timestamp from the front's clock
    last_update_form: str = "utc"  # how reads write last_update_time: "utc" | "naive" (no offset) |
    # "offset" (+02:00) | "epoch_ms" | "epoch_s" (numbers) | "unreadable" | "absent"
    refuse_reuse: str = "note"  # of a signature: "note" it in the call | "refuse" it (401) | "off"
    # -- pauses: True = everywhere, or a list of shards
    exchange_paused: bool | list[int] = False
    trading_paused: bool | list[int] = False
    pause_status: int = 409
    resume_time: str | None = None  # exchange_estimated_resume_time while paused
    # -- routing
    shard_count: int = 4
    shards: dict[str, int] = field(default_factory=dict)  # shard by prefix of the ticker; the longest wins
    wrong_market_ticker: str = (
        "not_found"  # auto-routing with another market's ticker: "not_found" | "ignored"
    )
    omitted_subaccount: str = "primary"  # a write without subaccount is about "primary" (0) | "any"
    # -- cancel-all
    tail_s: float = 60.0  # how long new orders are canceled on arrival
    tail_honours_subaccount: bool = True  # else the minute strikes every subaccount's new orders
    cancel_all_cap: int = 10_000
    # -- the record
    record: bool = True

    def changed(self, changes: dict[str, Any]) -> Settings:
        """These settings with `changes`; ValueError naming what is unknown or impossible."""
        known = {item.name for item in fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(unknown)}")
        for name, choices in _CHOICES.items():
            if name in changes and changes[name] not in choices:
                raise ValueError(f"{name} must be one of {choices}, not {changes[name]!r}")
        for name, value in changes.items():
            if name in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{name} must be a number, not {value!r}")
        settings = replace(self, **changes)
        settings.budget()
        return settings

    def budget(self) -> Budget:
        """Fresh, full buckets."""
        return Budget(self.tier, self.buckets)

    def shard_of(self, ticker: str) -> int:
        """The shard on which a market's orders live."""
        prefixes = [prefix for prefix in self.shards if ticker.startswith(prefix)]
        return self.shards[max(prefixes, key=len)] if prefixes else 0

    def exchange_active(self, shard: int) -> bool:
        """Whether anything can be changed on `shard`."""
        return not _covers(self.exchange_paused, shard)

    def trading_active(self, shard: int) -> bool:
        """Whether orders can be placed on `shard`."""
        return self.exchange_active(shard) and not _covers(self.trading_paused, shard)

    @property
    def batch_limit(self) -> int:
        """The largest batch that is looked at."""
        if self.max_batch is not None:
            return self.max_batch
        budget = self.budget()
        return int(budget.rates["write"][1] // 2) if budget.enforced else 1000


_NUMBERS = frozenset(item.name for item in fields(Settings) if type(item.default) in {int, float})


def _covers(pause: bool | list[int], shard: int) -> bool:  # noqa: FBT001  # the setting's own type
    return pause if isinstance(pause, bool) else shard in pause
