"""Whether a worker is ready: whether cancels would go through it now, and if not, why."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from kalshi_cancel.exchange.calls import ACCOUNT_LIMITS
from kalshi_cancel.exchange.client import SKEW_TO_CORRECT_MS, Exchange
from kalshi_cancel.exchange.protocol import Failure
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.scripts import StoreError
from worker.dispatch.services import ServiceState

OK = "ok"
ASK_EXCHANGE_EVERY_S = 5.0
_REFUSED = (401, 403)


class Readiness:
    """Looks whether cancels would go through; safe to share between threads.

    ``held_back``: why breakers of this worker hold cancels back, if any does; ``failing``: background jobs of
    its other processes that are not well.
    """

    def __init__(
        self,
        store: CancelStore,
        exchange: Exchange,
        held_back: Callable[[], Sequence[str]],
        services: Callable[[], Sequence[ServiceState]],
        failing: Callable[[], Sequence[str]],
    ) -> None:
        self._store = store
        self._exchange = exchange
        self._held_back = held_back
        self._services = services
        self._failing = failing
        self._lock = threading.Lock()
        self._asked_at = -ASK_EXCHANGE_EVERY_S
        self._failure: Failure | None = None

    def look(self) -> dict[str, str]:
        """``ok`` or why not, for each of redis, key, clock, exchange, breaker and services.

        The exchange is asked at most every five seconds, by one read that is signed; so an answer may take as
        long as a call to the exchange may.
        """
        failure = self._ask_exchange()
        refused = failure is not None and failure.problem.http_status in _REFUSED
        words = "" if failure is None else f"{failure.problem.code}: {failure.problem.message}"
        return {
            "redis": self._redis(),
            "key": words if refused else OK,
            "clock": self._clock(),
            "exchange": OK if failure is None or refused else words,
            "breaker": ", ".join(self._held_back()) or OK,
            "services": self._background(),
        }

    def _background(self) -> str:
        here = {state.name: state.failure for state in self._services() if state.failure}
        elsewhere = [name for name in self._failing() if name not in here]
        found = [f"{name} {failure}" for name, failure in here.items()]
        return ", ".join([*found, *(f"{name} of a pool's process" for name in elsewhere)]) or OK

    def _redis(self) -> str:
        try:
            self._store.ping()
        except StoreError as error:
            return str(error)
        return OK

    def _clock(self) -> str:
        skew_ms = self._exchange.skew_ms
        if skew_ms is None:
            return "the exchange has not told its time yet"
        if abs(skew_ms) >= SKEW_TO_CORRECT_MS:
            return f"this host's clock is off: the exchange's differs by {skew_ms:+d} ms"
        return OK

    def _ask_exchange(self) -> Failure | None:
        with self._lock:
            if time.monotonic() - self._asked_at >= ASK_EXCHANGE_EVERY_S:
                answer = self._exchange.fetch(ACCOUNT_LIMITS)
                self._failure = answer if isinstance(answer, Failure) else None
                self._asked_at = time.monotonic()
            return self._failure
