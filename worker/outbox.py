"""The way out of a process: one hand at a time claims, signs and sends; waiting for replies is done together.

Signing and sending need a core. Hands that all did so at once would each claim the little that is due at that
moment; in line, each claims what has come while the one before it was at it. Idle, there is no line. While
several come at a time, the next waits a few milliseconds more, so that calls are fewer and each for more.

Where calls are for one order each (a shard's own tokens pay for single cancels only), the hand whose turn it
is has the step in Redis done for those behind it, too: what they bring is put down, each is given a call, and
they sign and send at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

# A hand that is held up on its way out (connecting, a slow Redis) must not keep the others.
IN_LINE_MOST_S = 0.05
# A call for so many is worth its signature: the next in line need not wait until it is sent.
LARGE_CALL = 10
# A call for several tells that more are coming, and a signature and a round trip cost as much as ten
# orders: the next waits a little, unless there were enough to be worth their signature.
SEVERAL = 4
ENOUGH = 30
GATHER_S = 0.012
# What several hands bring is put down in one step up to so many orders: the script must not take long.
TOGETHER_MOST = 30

Held = TypeVar("Held")
Given = TypeVar("Given")


class Place(Generic[Held, Given]):
    """One hand's place in line: what it holds, of how many orders, and what it is given.

    Hands of one ``kind`` can be served in one step.
    """

    def __init__(self, held: Held, orders: int, kind: object) -> None:
        self.held = held
        self.orders = orders
        self.kind = kind
        self._given: Given | None = None
        self._served = threading.Event()

    def serve(self, given: Given | None) -> None:
        """Gives the hand what it stands in line for; None: it may stand in line again."""
        self._given = given
        self._served.set()

    def given(self) -> Given | None:
        """What the hand was given, once it is served."""
        self._served.wait()
        return self._given


class Outbox:
    """The line of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mine = threading.local()
        self._next_at = 0.0  # monotonic
        self._line: list[Place[Any, Any]] = []
        self._line_lock = threading.Lock()

    @contextmanager
    def at_it(self, place: Place[Held, Given]) -> Iterator[list[Place[Held, Given]]]:
        """Waits in line, for the body or until :meth:`sent`.

        The places that the body is to serve: this one and some behind it; none, if another serves this one.
        """
        with self._line_lock:
            self._line.append(place)
        self._mine.turn = self._lock.acquire(timeout=IN_LINE_MOST_S)
        try:
            if place in self._line:
                time.sleep(max(self._next_at - time.monotonic(), 0.0))
            places = self._to_serve(place)
            if not places:
                self.sent()  # to sign and send, once claimed, is nobody else's business
            yield places
        finally:
            self.sent()

    def _to_serve(self, first: Place[Held, Given]) -> list[Place[Held, Given]]:
        with self._line_lock:
            if first not in self._line:
                return []
            places, orders = [first], first.orders
            for place in self._line:
                if place is not first and place.kind == first.kind and orders + place.orders <= TOGETHER_MOST:
                    places.append(place)
                    orders += place.orders
            self._line = [place for place in self._line if place not in places]
        return places

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
