"""Whether a worker lives, and whether it is ready: what an orchestrator asks, and how it is answered.

It lives while its main loop beats. It is ready while cancels would go through: Redis, key, clock, exchange
and gate are fit.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from worker.book import Book
from worker.dialects import ACCOUNT_LIMITS, Trouble
from worker.exchange import SKEW_TO_CORRECT_MS, Exchange
from worker.scripts import BookError

log = logging.getLogger(__name__)

BEAT_EVERY_S = 1.0
# Longer than whatever the main loop waits for while Redis is away or silent.
BEAT_OLD_S = 15.0
ASK_EXCHANGE_EVERY_S = 5.0
OK = "ok"
_REFUSED = (401, 403)


class Heartbeat:
    """The beat of a worker's main loop, also as the age of a file where one is named."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._at = time.monotonic()
        self._warned = False

    def start(self) -> None:
        """The first beat; raises OSError when the file cannot be touched."""
        self._at = time.monotonic()
        if self._file is not None:
            self._file.touch()

    def beat(self) -> None:
        """Says that the main loop has come by; to be called by nobody else."""
        try:
            self.start()
        except OSError as error:
            if not self._warned:
                self._warned = True
                log.warning("the heartbeat file cannot be touched: %s", error)

    @property
    def age_s(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - self._at


def is_alive(file: Path) -> bool:
    """Whether the file was touched lately; also not when that is to come, after a clock was set."""
    try:
        age_s = time.time() - file.stat().st_mtime
    except OSError:
        return False
    return abs(age_s) <= BEAT_OLD_S


class Readiness:
    """Looks whether cancels would go through; safe to share between threads.

    ``held_back``: why gates of this worker hold cancels back, if any does.
    """

    def __init__(self, book: Book, exchange: Exchange, held_back: Callable[[], Sequence[str]]) -> None:
        self._book = book
        self._exchange = exchange
        self._held_back = held_back
        self._lock = threading.Lock()
        self._asked_at = -ASK_EXCHANGE_EVERY_S
        self._trouble: Trouble | None = None

    def look(self) -> dict[str, str]:
        """``ok`` or why not, for each of redis, key, clock, exchange and breaker.

        The exchange is asked at most every five seconds, by one read that is signed; so an answer may take as
        long as a call to the exchange may.
        """
        trouble = self._ask_exchange()
        refused = trouble is not None and trouble.problem.http_status in _REFUSED
        words = "" if trouble is None else f"{trouble.problem.code}: {trouble.problem.message}"
        return {
            "redis": self._redis(),
            "key": words if refused else OK,
            "clock": self._clock(),
            "exchange": OK if trouble is None or refused else words,
            "breaker": ", ".join(self._held_back()) or OK,
        }

    def _redis(self) -> str:
        try:
            self._book.ping()
        except BookError as error:
            return str(error)
        return OK

    def _clock(self) -> str:
        skew_ms = self._exchange.skew_ms
        if skew_ms is None:
            return "the exchange has not told its time yet"
        if abs(skew_ms) >= SKEW_TO_CORRECT_MS:
            return f"this host's clock is off: the exchange's differs by {skew_ms:+d} ms"
        return OK

    def _ask_exchange(self) -> Trouble | None:
        with self._lock:
            if time.monotonic() - self._asked_at >= ASK_EXCHANGE_EVERY_S:
                answer = self._exchange.fetch(ACCOUNT_LIMITS)
                self._trouble = answer if isinstance(answer, Trouble) else None
                self._asked_at = time.monotonic()
            return self._trouble
