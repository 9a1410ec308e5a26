"""What the senders of a process have completed, and whose turn it is to store it and to claim.

One sender at a time has the turn. It stores what all have completed, claims in the same step, and keeps the
turn until its own request is on its way. Nobody waits for the turn: a sender that finishes meanwhile leaves
its completion here, and is free. The next turn stores it. While several finish at a time, the next turn
begins a few milliseconds later, so that calls are fewer and each is for more orders.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

from worker.dispatch.executor import Completion

# A sender that is held up before its request is on its way (a slow Redis) must not keep the others.
HELD_UP_S = 0.05
# A call for so many is worth its signature: the next turn may begin before it is sent.
LARGE_CALL = 10
# A call for several tells that more are coming, and a signature and a round trip cost as much as ten
# orders: the next turn begins a little later, unless there were enough to be worth their signature.
SEVERAL = 4
ENOUGH = 30
GATHER_S = 0.012
# One step puts down so many orders: the script must not take long.
TOGETHER_MOST = 30


class Completions:
    """The completions and the turn of one process; ``call_next`` has a free sender come, if there is one."""

    def __init__(self, call_next: Callable[[], None] = lambda: None) -> None:
        self.call_next = call_next
        self._lock = threading.Lock()
        self._left: deque[Completion] = deque()
        self._turn_of: int | None = None  # a thread's id
        self._since = -math.inf  # monotonic
        self._next_at = -math.inf
        self._is_wanted = False
        self._mine = threading.local()

    def leave(self, completion: Completion) -> None:
        """Leaves what a sender has completed, for the next turn."""
        if completion.conclusions:
            with self._lock:
                self._left.append(completion)

    def take(self, orders: float = TOGETHER_MOST) -> list[Completion]:
        """What was left, of so many orders; one of more comes alone."""
        taken: list[Completion] = []
        with self._lock:
            while self._left and (not taken or len(self._left[0].conclusions) <= orders):
                taken.append(self._left.popleft())
                orders -= len(taken[-1].conclusions)
        return taken

    def take_turn(self) -> float:
        """Takes the turn for the calling thread (0.0), or says in how many seconds to ask again."""
        now = time.monotonic()
        with self._lock:
            if self._turn_of not in (None, threading.get_ident()) and now < self._since + HELD_UP_S:
                self._is_wanted = True
                return self._since + HELD_UP_S - now
            if now < self._next_at:
                return self._next_at - now
            self._turn_of, self._since, self._is_wanted = threading.get_ident(), now, False
            return 0.0

    def claimed(self, orders: int, *, is_more: bool) -> None:
        """The calling thread has so many for its call; ``is_more``: nobody need wait for more to come."""
        with self._lock:
            self._is_wanted = self._is_wanted or is_more
            if SEVERAL <= orders < ENOUGH and not is_more:
                self._next_at = time.monotonic() + GATHER_S
        if orders >= LARGE_CALL:
            self.pass_on()

    def pass_on(self) -> None:
        """The turn is the next one's, if it was the calling thread's."""
        with self._lock:
            if self._turn_of != threading.get_ident():
                return
            self._turn_of = None
            is_wanted = self._is_wanted or bool(self._left)
        if is_wanted:
            self.call_next()

    def when_sent(self, do: Callable[[], object]) -> None:
        """Has this done once, when the calling thread's next request is on its way."""
        self._mine.do = do

    def sent(self) -> None:
        """The calling thread's request is on its way, or has to wait for a connection."""
        self.pass_on()
        do = getattr(self._mine, "do", None)
        if do is not None:
            self._mine.do = None
            do()
