"""Tells the time by Redis' clock: the one that all times of requests, results and reports are told by.

Producers' and workers' own clocks may differ by hours; what is compared has to come from one.
"""

from __future__ import annotations

import math
import threading
import time

import redis

from kalshi_cancel.model.times import utc_text
from kalshi_cancel.store import scripts
from kalshi_cancel.store.scripts import StoreError

# What was heard counts for so long: the clocks of two hosts drift apart, and answers take time.
HEARD_FOR_S = 10.0
TOLD_TO_S = 0.001  # scripts tell whole milliseconds: it may be so much later
# Answers are late by less than this; what differs by more is a clock that was set.
SET_S = 2.0


class ServerClock:
    """The clock of one server; safe to share between threads."""

    def __init__(self, server: redis.Redis) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._ahead_s: float | None = None  # of this process' monotonic clock
        self._heard_s = 0.0
        self._at_most_s = math.inf  # as far ahead as it may be

    def heard(self, epoch_s: float, *, asked_s: float | None = None) -> None:
        """Takes notice of what an answer of the server has just told; it was asked for at ``asked_s``."""
        now_s = time.monotonic()
        if asked_s is not None:
            self._at_most_s = epoch_s + TOLD_TO_S - asked_s
        ahead_s = epoch_s - now_s
        with self._lock:
            known = self._ahead_s
            is_old = now_s - self._heard_s > HEARD_FOR_S
            # An answer that was late is behind those before it: that is no clock that goes back.
            if known is None or is_old or ahead_s > known or known - ahead_s > SET_S:
                self._ahead_s, self._heard_s = ahead_s, now_s

    def earliest_s(self, epoch_s: float) -> float:
        """The earliest moment (monotonic) at which the server's clock may have shown this; now at most."""
        return min(epoch_s - self._at_most_s, time.monotonic())

    def now_s(self) -> float:
        """Epoch seconds. While the server is away, as it was last known; never heard of, this host's own."""
        if self._ahead_s is None or time.monotonic() - self._heard_s > HEARD_FOR_S:
            try:
                seconds, micros = scripts.call(self._server.time)
                self.heard(float(seconds) + float(micros) / 1e6)
            except StoreError:
                pass
        return time.time() if self._ahead_s is None else time.monotonic() + self._ahead_s

    def now(self) -> str:
        """ISO 8601, UTC."""
        return utc_text(self.now_s())
