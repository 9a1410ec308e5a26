"""The way out of a process: one sender at a time claims, signs and sends; all wait for replies together.

Signing and sending need a core. Senders that all did so at once would each claim the little that is due at
that moment; in line, each claims what has come while the one before it was at it. Idle, there is no line.
While several come at a time, the next waits a few milliseconds more, so that calls are fewer and each for
more.

Where calls are for one order each (a shard's own tokens pay for single cancels only), the sender whose turn
it is has the step in Redis done for those behind it, too: what they completed is stored, each is given a
call, and they sign and send at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

# A sender that is held up on its way out (connecting, a slow Redis) must not keep the others.
IN_LINE_MOST_S = 0.05
# A call for so many is worth its signature: the next in line need not wait until it is sent.
LARGE_CALL = 10
# A call for several tells that more are coming, and a signature and a round trip cost as much as ten
# orders: the next waits a little, unless there were enough to be worth their signature.
SEVERAL = 4
ENOUGH = 30
GATHER_S = 0.012
# What several senders completed is stored in one step up to so many orders: the script must not take long.
TOGETHER_MOST = 30

Held = TypeVar("Held")
Given = TypeVar("Given")


class Place(Generic[Held, Given]):
    """One sender's place in line: what it holds, of how many orders, and what it is given.

    A sender can be served in the step of another that ``takes`` nothing which it does not take, too.
    """

    def __init__(self, held: Held, orders: int, takes: AbstractSet[object]) -> None:
        self.held = held
        self.orders = orders
        self.takes = takes
        self.has_turn = False
        self._given: Given | None = None
        self._called = threading.Event()
        self._served = threading.Event()

    def call(self) -> None:
        """It is this sender's turn."""
        self.has_turn = True
        self._called.set()

    def serve(self, given: Given | None) -> None:
        """Gives the sender what it stands in line for; None: it may stand in line again."""
        self._given = given
        self._served.set()
        self._called.set()

    def wait(self, within_s: float) -> None:
        """Until it is the sender's turn, or another has served it."""
        self._called.wait(within_s)

    def given(self) -> Given | None:
        """What the sender was given, once it is served."""
        self._served.wait()
        return self._given


class Completions:
    """The line of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line: list[Place[Any, Any]] = []  # those whom nobody serves yet
        self._is_taken = False  # the turn
        self._mine = threading.local()
        self._next_at = 0.0  # monotonic

    @contextmanager
    def at_it(self, place: Place[Held, Given]) -> Iterator[list[Place[Held, Given]]]:
        """Waits in line, for the body or until :meth:`sent`.

        The places that the body is to serve: this one and some behind it; none, if another serves this one.
        """
        with self._lock:
            self._line.append(place)
            if not self._is_taken:
                self._call_next()
        place.wait(IN_LINE_MOST_S)
        early_s = self._next_at - time.monotonic()
        if place.has_turn and early_s > 0:
            time.sleep(early_s)
        places = self._to_serve(place)
        try:
            yield places
        finally:
            self.sent()

    def _to_serve(self, first: Place[Held, Given]) -> list[Place[Held, Given]]:
        with self._lock:
            self._mine.turn = first.has_turn
            places: list[Place[Held, Given]] = []
            if first in self._line:
                places, orders = [first], first.orders
                for place in self._line:
                    fits = first.takes <= place.takes and orders + place.orders <= TOGETHER_MOST
                    if place is not first and fits:
                        places.append(place)
                        orders += place.orders
                self._line = [place for place in self._line if place not in places]
        if not places:
            self.sent()  # to sign and send, once claimed, is nobody else's business
        return places

    def claimed(self, orders: int, *, is_more: bool) -> None:
        """The calling thread has so many for its call; ``is_more``: nobody need wait for more to come."""
        if SEVERAL <= orders < ENOUGH and not is_more:
            self._next_at = time.monotonic() + GATHER_S
        if orders >= LARGE_CALL:
            self.sent()

    def sent(self) -> None:
        """The calling thread's request is on its way: the next in line may go."""
        if getattr(self._mine, "turn", False):
            self._mine.turn = False
            with self._lock:
                self._call_next()

    def _call_next(self) -> None:
        self._is_taken = bool(self._line)
        if self._line:
            self._line[0].call()
