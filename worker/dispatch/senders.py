"""The senders of a process: threads of which one listens for wake-ups in Redis, and works when there is one.

A wake-up goes out in the same step that adds work to the store, so a cancel is on its way within
milliseconds; Celery's messages wake workers up where no sender listens. Who is woken up works until nothing
is due, and another listens. While all senders but one are at work, that one serves the risk lane only.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from kalshi_cancel.model.requests import Lane
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.pending import WakeUp
from kalshi_cancel.store.scripts import StoreError, say_failed
from kalshi_cancel.telemetry.logs import Seldom
from worker.dispatch.dispatcher import Dispatcher
from worker.dispatch.services import Service, Services

log = logging.getLogger(__name__)

# Between looks at whether to stop; below the time after which Redis' silence is an outage.
LISTEN_S = 0.75
LISTEN_AGAIN_S = 0.1  # without Redis
HELD_BACK_S = 0.25  # between looks whether the exchange is back
# Who listens comes by far more often than this; after it, another takes its place.
LISTENER_GONE_S = 3.0
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
        *,
        number: int,
        key_id: Callable[[], str],
    ) -> None:
        self._key_id = key_id
        self._dispatcher = dispatcher
        self._store = store
        self._lanes = tuple(lanes)
        self._listener = _Listener()
        self._not_listening = Seldom()
        self.services = [_Sender(f"sender-{at + 1}", self._serve).service for at in range(number)]
        self.names = {service.name for service in self.services}
        self._running: Services | None = None

    def start(self, services: Services) -> None:
        """Starts them."""
        self._dispatcher.has_listeners = True
        services.start(*self.services)
        self._running = services

    def show_listeners(self) -> None:
        """Says in Redis that somebody listens; raises StoreError."""
        if self._running is not None:
            offer = self._dispatcher.idle_offer()
            self._store.show_listeners(self._lanes, life_s=LISTENERS_LIFE_S, idle=offer)

    def _serve(self, sender: _Sender) -> float:
        """One round: works if there was a wake-up, then listens, or waits; how long until the next."""
        if sender.woken:
            self._dispatcher.serve(wake_up=sender.woken, beat=sender.service.beat)
        sender.woken = WakeUp()  # a lost connection loses wake-ups, and an open breaker takes none
        if not self._dispatcher.may_claim:
            return HELD_BACK_S  # workers that can go on need the wake-up
        if not self._listener.is_now(sender):
            sender.woken = None
            return LISTENER_GONE_S
        try:
            sender.woken = self._store.listen(
                self._dispatcher.lanes_with_room, within_s=LISTEN_S, key_id=self._key_id()
            )
        except StoreError as error:
            if not error.can_pass:
                raise
            say_failed(log, error, "listen for wake-ups", seldom=self._not_listening)
            return LISTEN_AGAIN_S
        if sender.woken:
            self._listener.leave(sender)
        return 0.0


class _Sender:
    """One of them; ``woken``: there may be something to do, as there may be before anybody has listened."""

    def __init__(self, name: str, serve: Callable[[_Sender], float]) -> None:
        self.woken: WakeUp | None = WakeUp()
        self.service = Service(name, lambda: serve(self), hangs_after_s=HANGS_AFTER_S)


class _Listener:
    """Which sender listens: one at a time, another once it has left or has not come by for a while."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._who: _Sender | None = None
        self._came_by_at = -math.inf
        self._waiting: list[_Sender] = []

    def is_now(self, sender: _Sender) -> bool:
        """Makes the sender the listener, unless another is; then it is woken up when it may be the next."""
        now = time.monotonic()
        with self._lock:
            if self._who in (None, sender) or now > self._came_by_at + LISTENER_GONE_S:
                self._who, self._came_by_at = sender, now
                return True
            if sender not in self._waiting:
                self._waiting.append(sender)
            return False

    def leave(self, sender: _Sender) -> None:
        """The sender has other work: the one that has come last, whose caches are warm, may be the next."""
        with self._lock:
            if self._who is not sender:
                return
            self._who = None
            another = self._waiting.pop() if self._waiting else None
        if another is not None:
            another.service.wake()
