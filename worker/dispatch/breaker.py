"""Holds cancels back while the exchange cannot take them: unreachable, or paused.

A circuit breaker with a watch: closed, cancels pass; open, none is claimed, and each keeps its place in the
line. It opens after several calls in a row without a usable reply, or at the exchange's word that it is
paused. One sender of the process keeps watch, asks for the exchange's status about once a second, and closes
it when the exchange is back. A refused key opens it as well, until a signed read is answered:
workers with another key go on.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from kalshi_cancel.exchange.protocol import Canceled, Failure, Meaning
from kalshi_cancel.model.orders import Order
from kalshi_cancel.model.results import Problem

# One lost reply is one order's failure; this many in a row, over all orders, are the exchange's.
FAILURES_TO_OPEN = 5
# Between looks, with jitter: back within two seconds, without hammering what is down.
LOOK_EVERY_S = 1.0
KEY_LOOK_EVERY_S = 3.0  # a signed read, which costs tokens


class BreakerState(StrEnum):
    """Whether cancels pass, and if not, why."""

    CLOSED = "closed"
    UNREACHABLE = "unreachable"
    PAUSED = "paused"
    KEY_REFUSED = "key_refused"


class CircuitBreaker:
    """The breaker of one process; ``look`` asks for the exchange's status, ``moved`` is told of each move."""

    def __init__(
        self,
        look: Callable[[BreakerState], Mapping[str, Any] | Failure],
        moved: Callable[[BreakerState], None] = lambda _state: None,
    ) -> None:
        self._look = look
        self._moved = moved
        self._lock = threading.Lock()
        self._watch = threading.Lock()
        self._failures = 0
        self._active_at = float("-inf")
        self.state = BreakerState.CLOSED
        self.key_problem: Problem | None = None

    @property
    def is_closed(self) -> bool:
        """Whether cancels pass."""
        return self.state is BreakerState.CLOSED

    @property
    def is_watched(self) -> bool:
        """Whether a sender looks after the exchange, and goes on when it is back."""
        return self._watch.locked()

    def note(self, answer: Canceled | Order | Failure | None) -> None:
        """Learns from an answer of the exchange (None: one that is no failure), or from there being none."""
        meaning = answer.meaning if isinstance(answer, Failure) else None
        with self._lock:
            if isinstance(answer, Failure) and meaning is Meaning.KEY_REFUSED:
                self._refuse_key(answer)
                return
            self._failures = self._failures + 1 if meaning and meaning.no_usable_answer else 0
            # What fails, or is "paused", while the status says active is an order's or a shard's failure.
            if time.monotonic() - self._active_at <= LOOK_EVERY_S:
                return
            if self._failures >= FAILURES_TO_OPEN:
                self._move(BreakerState.UNREACHABLE)
            elif meaning is Meaning.PAUSED:
                self._move(BreakerState.PAUSED)

    def keep_watch(self, stopping: threading.Event, beat: Callable[[], None] = lambda: None) -> bool:
        """Waits until the breaker is closed, asking the exchange; False for all senders but one, at once.

        Calls ``beat`` before each look.
        """
        if not self._watch.acquire(blocking=False):
            return False
        try:
            while not self.is_closed and not stopping.is_set():
                beat()
                self._see(self._look(self.state))
                if not self.is_closed:
                    every_s = KEY_LOOK_EVERY_S if self.state is BreakerState.KEY_REFUSED else LOOK_EVERY_S
                    stopping.wait(every_s * random.uniform(0.75, 1.0))  # noqa: S311 - jitter
            return self.is_closed
        finally:
            self._watch.release()

    def _see(self, shown: Mapping[str, Any] | Failure) -> None:
        with self._lock:
            meaning = shown.meaning if isinstance(shown, Failure) else None
            paused = isinstance(shown, Mapping) and shown.get("exchange_active") is False
            if isinstance(shown, Failure) and meaning is Meaning.KEY_REFUSED:
                self._refuse_key(shown)
            elif meaning and meaning.no_usable_answer and self.state is BreakerState.KEY_REFUSED:
                pass  # whether the key works by now, nobody has said
            elif meaning and meaning.no_usable_answer:
                self._move(BreakerState.UNREACHABLE)
            elif paused or meaning is Meaning.PAUSED:
                self._move(BreakerState.PAUSED)
            else:
                self._active_at = time.monotonic()
                self._failures = 0
                self._move(BreakerState.CLOSED)

    def _refuse_key(self, failure: Failure) -> None:
        self.key_problem = failure.problem
        self._move(BreakerState.KEY_REFUSED)

    def _move(self, state: BreakerState) -> None:
        if state is self.state:
            return
        self.state = state
        self._moved(state)
