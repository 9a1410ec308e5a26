"""The senders of a process: a pool of threads of which one listens for wake-ups in Redis, and works then.

A wake-up goes out in the same step that adds work to the store, so a cancel is on its way within
milliseconds; Celery's messages wake workers up where no sender listens. Who is woken up works until nothing
is due, and another listens. Those that are free wait for a claim, for a call, or to be the next listener.
While all senders but one are at work, that one serves the risk lane only.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from kalshi_cancel.model.requests import Lane
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.pending import WakeUp
from kalshi_cancel.store.scripts import StoreError, say_failed
from kalshi_cancel.telemetry.logs import Seldom
from worker.dispatch.completions import Completions
from worker.dispatch.dispatcher import Dispatcher
from worker.dispatch.services import Service, Services

log = logging.getLogger(__name__)

# Between looks at whether to stop; below the time after which Redis' silence is an outage.
LISTEN_S = 0.75
LISTEN_AGAIN_S = 0.1  # without Redis
HELD_BACK_S = 0.25  # between looks whether the exchange is back
# Who listens comes by far more often than this; after it, another takes its place.
LISTENER_GONE_S = 3.0
# Within this, who is to be given a claim is told whether it is.
DRAFTED_S = 0.05
# That senders listen is said again and again, which comes late where a process has more to do than it can.
LISTENERS_LIFE_S = 5.0
# Longer than any step of a sender's work may take: a call to the exchange, a few pages of a listing.
HANGS_AFTER_S = 120.0


class Senders:
    """So many senders of one process at one dispatcher."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        store: CancelStore,
        lanes: Sequence[Lane],
        completions: Completions,
        *,
        number: int,
        key_id: Callable[[], str],
    ) -> None:
        self._key_id = key_id
        self._dispatcher = dispatcher
        self._store = store
        self._lanes = tuple(lanes)
        self._completions = completions
        self._not_listening = Seldom()
        self._lock = threading.Lock()
        self._free: list[_Sender] = []
        self._listener: _Sender | None = None
        self._listened_at = -math.inf  # monotonic
        self._senders = [_Sender(f"sender-{at + 1}", self._serve) for at in range(number)]
        self.names = {sender.service.name for sender in self._senders}
        self._running: Services | None = None
        self._showing = threading.Lock()  # that somebody listens
        self._has_ended = False

    def start(self, services: Services) -> None:
        """Starts them."""
        self._dispatcher.pool = self
        self._completions.call_next = self._call_next
        self._running = services  # before they look: whoever then finds nothing is idle
        services.start(*(sender.service for sender in self._senders))

    def show_listeners(self) -> None:
        """Says in Redis that somebody listens; raises StoreError."""
        with self._showing:
            if self._running is not None and not self._has_ended:
                offer = self._dispatcher.idle_offer()
                self._store.show_listeners(self._lanes, life_s=LISTENERS_LIFE_S, idle=offer)

    def finish(self) -> None:
        """Once they have ended: what was claimed for one that did not come to it goes back at once."""
        given = [sender.given.popleft() for sender in self._senders for _ in range(len(sender.given))]
        left: dict[Lane, WakeUp] = {}
        try:
            if self.listens:
                with self._showing:
                    self._has_ended = True
                    left = self._store.stop_listening(self._lanes)
        except StoreError as error:  # it is forgotten within seconds
            say_failed(log, error, "say that nobody listens")
        claims = [each.claim for each in (*given, *left.values()) if each.claim is not None]
        self._dispatcher.finish(claims)
        try:
            for lane in left:
                self._store.wake_up(lane)
        except StoreError as error:  # the sweeper finds what nobody works on
            say_failed(log, error, "wake another worker up")

    # -- as the dispatcher needs them

    @property
    def listens(self) -> bool:
        """Whether a sender listens for wake-ups."""
        return self._running is not None

    def draft(self) -> Sequence[_Sender]:
        """Free senders that will be told at once what to do; one always stays, for risk."""
        with self._lock:
            drafted, self._free = self._free[1:], self._free[:1]
            for sender in drafted:
                sender.is_drafted = True
        return drafted

    def dismiss(self, others: Sequence[_Sender], given: Sequence[WakeUp]) -> None:
        """Gives the first of them these claims; the others are free again."""
        with self._lock:
            for sender in others:
                sender.is_drafted = False
            for sender, wake_up in zip(others, given, strict=False):
                sender.given.append(wake_up)
            self._free += others[len(given) :]
        for sender in others[: len(given)]:
            sender.service.wake()

    def _call_next(self) -> None:
        with self._lock:
            # The one that has come last: its caches are warm.
            sender = self._free.pop() if self._free else None
            if sender is not None:
                sender.given.append(WakeUp())
        if sender is not None:
            sender.service.wake()

    # -- what one does

    def _serve(self, sender: _Sender) -> float:
        """One round: works if there is something to do, else listens, or is free; how long until the next."""
        wake_up = self._next_for(sender)
        if wake_up is None:
            if sender.is_drafted:
                return DRAFTED_S
            if not self._dispatcher.breaker.is_closed:  # workers that can go on need the wake-ups
                return self._look_again(sender, HELD_BACK_S)
            if not self._listens_now(sender):
                return LISTENER_GONE_S
            try:
                wake_up = self._store.listen(
                    self._dispatcher.lanes_with_room, within_s=LISTEN_S, key_id=self._key_id()
                )
            except StoreError as error:
                if not error.can_pass:
                    raise
                say_failed(log, error, "listen for wake-ups", seldom=self._not_listening)
                return self._look_again(sender, LISTEN_AGAIN_S)  # wake-ups may be lost
            if wake_up is None:
                return 0.0
            if wake_up.claim is None:
                self._listen_no_more(sender)
            else:  # to call another takes time, and nobody comes twice within a millisecond
                self._completions.when_sent(lambda: self._listen_no_more(sender))
        later_s = self._dispatcher.serve(wake_up=wake_up, beat=sender.service.beat)
        self._listen_no_more(sender)
        return self._look_again(sender, later_s) if later_s else 0.0

    def _next_for(self, sender: _Sender) -> WakeUp | None:
        """What there is for it: a claim, or a wake-up. It is not free any more, unless it is drafted."""
        with self._lock:
            if sender.is_drafted:
                return None
            if sender in self._free:
                self._free.remove(sender)
            looks, sender.looks_again = sender.looks_again, False
            return sender.given.popleft() if sender.given else WakeUp() if looks else None

    def _look_again(self, sender: _Sender, in_s: float) -> float:
        with self._lock:
            sender.looks_again = True
            self._free.append(sender)
        return in_s

    def _listens_now(self, sender: _Sender) -> bool:
        """Makes it the listener; False: another is, and it is free."""
        now = time.monotonic()
        with self._lock:
            if self._listener in (None, sender) or now > self._listened_at + LISTENER_GONE_S:
                self._listener, self._listened_at = sender, now
                return True
            self._free.append(sender)
            return False

    def _listen_no_more(self, sender: _Sender) -> None:
        """Another listens, if it did."""
        with self._lock:
            if self._listener is not sender:
                return
            self._listener = None
            another = self._free.pop() if self._free else None
        if another is not None:
            another.service.wake()


class _Sender:
    """One of them; ``given``: what it is to do. It looks once before anybody has listened."""

    def __init__(self, name: str, serve: Callable[[_Sender], float]) -> None:
        self.given: deque[WakeUp] = deque()
        self.looks_again = True
        self.is_drafted = False
        self.service = Service(name, lambda: serve(self), hangs_after_s=HANGS_AFTER_S)
