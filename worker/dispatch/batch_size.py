"""Learns from accepted and refused calls how many orders one call may hold."""

from __future__ import annotations

import logging
import time

from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say

log = logging.getLogger(__name__)

# What a batch was refused for may have been its size: that is believed for so long.
REFUSED_SIZE_STANDS_S = 60.0
# Batches that were turned away one after the other, so many in so long a time, may be too large.
TURNED_AWAY = 5
TURNED_AWAY_S = 1.0
# Orders that no exchange calls too many for one call.
NEVER_TOO_MANY = 4
# How long all go out alone to find the one that spoils every call.
ALONE_S = 1.0


class BatchSize:
    """How many orders one call may hold, as far as the exchange has let us know."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = most
        self._refused = most + 1
        self._refused_until = 0.0
        self._alone_until = 0.0
        self._turned_away = 0
        self._turned_away_since = 0.0

    @property
    def limit(self) -> int:
        """How many the next call may hold."""
        if self._limit == 1 and time.monotonic() >= self._alone_until:
            return min(2, self._most)  # single calls teach nothing about size
        return self._limit

    def accepted(self, size: int) -> None:
        """A batch of this size went through: the next may be larger, below what was refused lately."""
        self._turned_away = 0
        if size >= self._limit:
            ceiling = self._refused - 1 if time.monotonic() < self._refused_until else self._most
            self._limit = min(max(size, (size + ceiling + 1) // 2), ceiling)

    def turned_away(self, size: int) -> None:
        """A batch of this size got a 429: if all of them do for a while, they may be too large."""
        now = time.monotonic()
        if not self._turned_away:
            self._turned_away_since = now
        self._turned_away += 1
        if self._turned_away >= TURNED_AWAY and now - self._turned_away_since >= TURNED_AWAY_S:
            self._turned_away = 0
            if size > NEVER_TOO_MANY:
                self.refused(size)

    def refused(self, size: int) -> None:
        """A batch of this size was refused: it is tried in halves."""
        say(log, LogEvent.BATCH_REFUSED, count=size)
        if size <= NEVER_TOO_MANY:
            # One of them spoils the call, and those before: alone, it is told so, and is out of the way.
            self._limit, self._alone_until = 1, time.monotonic() + ALONE_S
            self._refused, self._refused_until = self._most + 1, 0.0
        elif time.monotonic() >= self._alone_until:  # (until then: sent before, with the one that spoils it)
            now = time.monotonic()
            # Several senders ask at once: news of a larger size comes after that of a smaller one.
            self._refused = min(size, self._refused) if now < self._refused_until else size
            self._refused_until = now + REFUSED_SIZE_STANDS_S
            self._limit = min(self._limit, max(size // 2, 1))

    def spoiler_found(self) -> None:
        """An order was refused by itself: what was refused before may have been its doing, not the size's."""
        self._refused, self._refused_until = self._most + 1, 0.0
