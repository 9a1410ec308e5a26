"""The entrance of messages into the store: what cannot be entered is kept as text."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import CancelResult
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.pending import Accepted
from kalshi_cancel.store.scripts import StoreError, say_failed
from kalshi_cancel.telemetry.logs import Seldom

log = logging.getLogger(__name__)

AGAIN_EVERY_S = 0.2
# So long a message waits in a thread until Redis takes it; then it goes back to its queue. Well within the
# time after which it is delivered again anyway.
PATIENT_S = 30.0
REFUSED_ID_MAX_CHARS = 1000  # an id beyond that is an attack on Redis' memory, and nobody waits for it

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class Entered:
    """What entering the requests of a message came to; ``refused``: what Redis does not take, and why."""

    accepted: Accepted
    refused: tuple[tuple[CancelRequest, StoreError], ...] = ()

    def and_also(self, other: Entered) -> Entered:
        """Both together."""
        mine, more = self.accepted, other.accepted
        accepted = Accepted(
            mine.settled | more.settled,
            listener_woken=mine.listener_woken and more.listener_woken,
            waiting_messages=max(mine.waiting_messages, more.waiting_messages),
            joined=mine.joined | more.joined,
        )
        return Entered(accepted, self.refused + other.refused)


class Entrance:
    """The entrance of one process; ``stopping`` ends its patience with Redis."""

    def __init__(self, store: CancelStore, *, cancel_deadline_s: float, stopping: threading.Event) -> None:
        self._store = store
        self._cancel_deadline_s = cancel_deadline_s
        self._stopping = stopping
        self._not_entered = Seldom()

    def enter(
        self, requests: Sequence[CancelRequest], *, lane: Lane, reply_to: Sequence[str] = ()
    ) -> Entered:
        """Enters the requests of a message into the store, those that Redis takes.

        Raises StoreError for what can pass; then asking again changes nothing for those that are entered.
        """
        try:
            accepted = self._store.accept(
                requests, lane=lane, default_deadline_s=self._cancel_deadline_s, reply_to=reply_to
            )
        except StoreError as error:
            if error.can_pass:
                raise
            if len(requests) == 1:
                return Entered(Accepted({}, listener_woken=True, waiting_messages=0), ((requests[0], error),))
        else:
            return Entered(accepted)
        half = len(requests) // 2  # one of them spoils the step: the others are entered without it
        return self.enter(requests[:half], lane=lane, reply_to=reply_to[:half]).and_also(
            self.enter(requests[half:], lane=lane, reply_to=reply_to[half:])
        )

    def until_done(self, ask: Callable[[], _Answer]) -> _Answer:
        """What ``ask`` gets from Redis, asked again for a while where that can help; raises StoreError."""
        give_up = time.monotonic() + PATIENT_S
        while True:
            try:
                return ask()
            except StoreError as error:
                if not error.can_pass:
                    raise
                say_failed(log, error, "accept a message", seldom=self._not_entered)
                if self._stopping.wait(AGAIN_EVERY_S) or time.monotonic() > give_up:
                    raise

    def refuse(self, result: CancelResult) -> None:
        """Stores the outcome of a request that cannot be understood where its waiter looks, if it can."""
        if result.order_id is not None and _can_be_looked_for(result.order_id):
            self._store.refuse(result)

    def now(self) -> str:
        """The time by Redis' clock, ISO 8601 UTC."""
        return self._store.clock.now()

    def keep_unreadable(self, message: str) -> None:
        """Keeps a message that nobody can understand, for inspection; raises StoreError."""
        self._store.keep_unreadable(message)

    def set_aside(self, why: str, **what: Any) -> None:
        """Keeps the text of what could not be entered, for inspection, if that can be done."""
        self._store.keep_not_stored(why, **what)


def _can_be_looked_for(order_id: str) -> bool:
    """Whether an id, however ugly, can be part of a key: no megabytes, and no halves of characters."""
    return len(order_id) <= REFUSED_ID_MAX_CHARS and not any(
        "\ud800" <= each <= "\udfff" for each in order_id
    )
