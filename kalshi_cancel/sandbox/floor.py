"""The exchange floor: everything one sandbox exchange knows, under one lock, and the time it goes by."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from kalshi_cancel.sandbox.armed import Faults
from kalshi_cancel.sandbox.calls import Calls
from kalshi_cancel.sandbox.market import Market, Moment
from kalshi_cancel.sandbox.settings import Settings

if TYPE_CHECKING:
    from kalshi_cancel.sandbox.auth import Key
    from kalshi_cancel.sandbox.faults import Fault


class Floor:
    """Settings, orders, buckets, faults, keys and calls of one exchange.

    Whoever touches `market`, `budget` or `faults` holds `lock`. `calls` locks itself, `keys` and
    `settings` are replaced as a whole.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.lock = threading.RLock()
        self.ended = threading.Event()
        self.keys: dict[str, Key] = {}
        self.calls = Calls()
        self._first_settings = settings or Settings()
        self._released = threading.Event()
        self._start()

    def _start(self) -> None:
        self.settings = self._first_settings
        self.market = Market(seed=self.settings.seed, read_lag_s=self.settings.read_lag_s)
        self.budget = self.settings.budget()
        self.faults = Faults(self.settings.seed)
        self.calls.kept = self.settings.record

    def reset(self) -> None:
        """Back to the first settings: no orders, groups, faults or calls. Keys stay."""
        with self.lock:
            self._release()
            self.calls.clear()
            self._start()

    def configure(self, changes: dict[str, Any]) -> None:
        """Changes settings while running; a change of tier or buckets fills the buckets."""
        with self.lock:
            self.settings = self.settings.changed(changes)
            self.market.read_lag_s = self.settings.read_lag_s
            self.calls.kept = self.settings.record
            if {"tier", "buckets"} & set(changes):
                self.budget = self.settings.budget()
            if "seed" in changes:
                self.faults.seed = self.settings.seed
            if {"exchange_paused", "trading_paused"} & set(changes):
                self._cancel_on_pause()

    def _cancel_on_pause(self) -> None:
        moment = self.moment()
        for order in self.market.resting():
            if order.new.cancel_order_on_pause and not self.settings.trading_active(order.new.exchange_index):
                self.market.cancel(order, moment, by="pause")

    def arm(self, fault: Fault) -> int:
        """Arms a fault and returns its number."""
        with self.lock:
            return self.faults.arm(fault)

    def clear_faults(self) -> None:
        """Disarms all faults and lets go of the calls that hang (their connections close)."""
        with self.lock:
            self._release()
            self.faults = Faults(self.settings.seed)

    def end(self) -> None:
        """Wakes everything that waits, for good."""
        self.ended.set()
        self._release()

    def _release(self) -> None:
        self._released.set()
        if not self.ended.is_set():
            self._released = threading.Event()

    @property
    def released(self) -> threading.Event:
        """Set when the calls that hang now are let go."""
        return self._released

    def moment(self, offset_s: float = 0.0) -> Moment:
        """Now on the engine's clock, and `offset_s` from there."""
        settings = self.settings
        offset_us = int((settings.skew_s + settings.engine_skew_s + offset_s) * 1_000_000)
        return Moment(time.time_ns() // 1000 + offset_us, time.monotonic())

    def front_ms(self, offset_s: float = 0.0) -> int:
        """Now on the front's clock, and `offset_s` from there: epoch milliseconds."""
        return time.time_ns() // 1_000_000 + int((self.front_skew_s + offset_s) * 1000)

    @property
    def front_skew_s(self) -> float:
        """How far the front's clock is ahead of this machine's."""
        return self.settings.skew_s + self.settings.front_skew_s

    def wait(self, seconds: float) -> None:
        """Lets `seconds` pass, or less when the exchange ends."""
        if seconds > 0:
            self.ended.wait(seconds)
