"""The way out of a process: one hand at a time claims, signs and sends; waiting for replies is done together.

Signing and sending need a core. Hands that all did so at once would each claim the little that is due at that
moment; in line, each claims what has come while the one before it was at it. Idle, there is no line. While
several come at a time, the next waits a few milliseconds more, so that calls are fewer and each for more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# A hand that is held up on its way out (connecting, a slow Redis) must not keep the others.
IN_LINE_MOST_S = 0.05
# A call for so many is worth its signature: the next in line need not wait until it is sent.
LARGE_CALL = 10
# A call for several tells that more are coming, and a signature and a round trip cost as much as ten
# orders: the next waits a little, unless there were enough to be worth their signature.
SEVERAL = 4
ENOUGH = 30
GATHER_S = 0.012


class Outbox:
    """The line of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mine = threading.local()
        self._next_at = 0.0  # monotonic

    @contextmanager
    def at_it(self) -> Iterator[None]:
        """Waits in line, for the body or until :meth:`sent`."""
        self._mine.turn = self._lock.acquire(timeout=IN_LINE_MOST_S)
        try:
            time.sleep(max(self._next_at - time.monotonic(), 0.0))
            yield
        finally:
            self.sent()

    def claimed(self, orders: int) -> None:
        """The calling thread has so many for its call."""
        if SEVERAL <= orders < ENOUGH:
            self._next_at = time.monotonic() + GATHER_S
        if orders >= LARGE_CALL:
            self.sent()

    def sent(self) -> None:
        """The calling thread's request is on its way: the next in line may go."""
        if getattr(self._mine, "turn", False):
            self._mine.turn = False
            self._lock.release()
