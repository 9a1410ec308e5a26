"""Holds cancels back while the exchange cannot take them: unreachable, or paused.

A circuit breaker with a watch. After several calls in a row without a usable reply, or at the exchange's
word that it is paused, the gate closes: nothing is claimed, so everything keeps its place in the line. One
hand of the process keeps watch, asks for the exchange's status about once a second, and opens the gate when
the exchange is back. A refused key closes it as well, until a signed read is answered: workers with another
key go on.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from kalshi_cancel.exchange.protocol import Canceled, Meaning, Trouble
from kalshi_cancel.model.orders import Order, Problem

log = logging.getLogger(__name__)

# One lost reply is one order's trouble; this many in a row, over all orders, are the exchange's.
FAILURES_TO_CLOSE = 5
# Between looks, with jitter: back within two seconds, without hammering what is down.
LOOK_EVERY_S = 1.0
KEY_LOOK_EVERY_S = 3.0  # a signed read, which costs tokens


class GateState(StrEnum):
    """Whether cancels pass, and if not, why."""

    OPEN = "open"
    UNREACHABLE = "unreachable"
    PAUSED = "paused"
    KEY_REFUSED = "key_refused"


class Gate:
    """The gate of one process; ``look`` asks for the exchange's status, ``tell`` makes the state visible."""

    def __init__(
        self,
        look: Callable[[GateState], Mapping[str, Any] | Trouble],
        tell: Callable[[GateState], None] = lambda _state: None,
    ) -> None:
        self._look = look
        self._tell = tell
        self._lock = threading.Lock()
        self._watch = threading.Lock()
        self._failures = 0
        self._active_at = float("-inf")
        self.state = GateState.OPEN
        self.key_problem: Problem | None = None

    @property
    def is_open(self) -> bool:
        """Whether cancels pass."""
        return self.state is GateState.OPEN

    @property
    def is_watched(self) -> bool:
        """Whether a hand looks after the exchange, and goes on when it is back."""
        return self._watch.locked()

    def note(self, answer: Canceled | Order | Trouble) -> None:
        """Learns from an answer of the exchange, or from there being none."""
        meaning = answer.meaning if isinstance(answer, Trouble) else None
        with self._lock:
            if isinstance(answer, Trouble) and meaning is Meaning.KEY_REFUSED:
                self._refuse_key(answer)
                return
            self._failures = self._failures + 1 if meaning and meaning.no_usable_answer else 0
            # What fails, or is "paused", while the status says active is an order's or a shard's trouble.
            if time.monotonic() - self._active_at <= LOOK_EVERY_S:
                return
            if self._failures >= FAILURES_TO_CLOSE:
                self._move(GateState.UNREACHABLE)
            elif meaning is Meaning.PAUSED:
                self._move(GateState.PAUSED)

    def keep_watch(self, stopping: threading.Event, beat: Callable[[], None] = lambda: None) -> bool:
        """Waits until the gate is open, looking after the exchange; False for all hands but one, at once.

        Calls ``beat`` before each look.
        """
        if not self._watch.acquire(blocking=False):
            return False
        try:
            while not self.is_open and not stopping.is_set():
                beat()
                self._see(self._look(self.state))
                self._tell(self.state)
                if not self.is_open:
                    every_s = KEY_LOOK_EVERY_S if self.state is GateState.KEY_REFUSED else LOOK_EVERY_S
                    stopping.wait(every_s * random.uniform(0.75, 1.0))  # noqa: S311 - jitter
            return self.is_open
        finally:
            self._watch.release()

    def _see(self, shown: Mapping[str, Any] | Trouble) -> None:
        with self._lock:
            meaning = shown.meaning if isinstance(shown, Trouble) else None
            paused = isinstance(shown, Mapping) and shown.get("exchange_active") is False
            if isinstance(shown, Trouble) and meaning is Meaning.KEY_REFUSED:
                self._refuse_key(shown)
            elif meaning and meaning.no_usable_answer and self.state is GateState.KEY_REFUSED:
                pass  # whether the key works by now, nobody has said
            elif meaning and meaning.no_usable_answer:
                self._move(GateState.UNREACHABLE)
            elif paused or meaning is Meaning.PAUSED:
                self._move(GateState.PAUSED)
            else:
                self._active_at = time.monotonic()
                self._failures = 0
                self._move(GateState.OPEN)

    def _refuse_key(self, trouble: Trouble) -> None:
        self.key_problem = trouble.problem
        self._move(GateState.KEY_REFUSED)

    def _move(self, state: GateState) -> None:
        if state is self.state:
            return
        self.state = state
        if state is GateState.KEY_REFUSED:
            problem = self.key_problem
            log.critical("this worker claims nothing: its key is refused: %s", problem and problem.message)
            return
        if state is GateState.OPEN:
            log.warning("the exchange is back: cancels go on")
        else:
            log.error("the exchange is %s: cancels are held in the book", state.value)
