"""The way out of a process: one hand at a time claims, signs and sends; waiting for replies is done together.

Signing and sending need a core. Hands that all did so at once would each claim the little that is due at that
moment; in line, each claims what has come while the one before it was at it. Idle, there is no line.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# A hand that is held up on its way out (connecting, a slow Redis) must not keep the others.
IN_LINE_MOST_S = 0.05


class Outbox:
    """The line of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mine = threading.local()

    @contextmanager
    def at_it(self) -> Iterator[None]:
        """Waits in line, for the body or until :meth:`sent`."""
        self._mine.turn = self._lock.acquire(timeout=IN_LINE_MOST_S)
        try:
            yield
        finally:
            self.sent()

    def sent(self) -> None:
        """The calling thread's request is on its way: the next in line may go."""
        if getattr(self._mine, "turn", False):
            self._mine.turn = False
            self._lock.release()
