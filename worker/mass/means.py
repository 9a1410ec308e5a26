"""What a process runs mass cancels with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.model.orders import Lane
from kalshi_cancel.store.cancels import Book
from kalshi_cancel.store.mass_cancels import Masses
from kalshi_cancel.store.rate_limits import Pacer
from worker.dispatch.events import Tell, nobody


@dataclass(frozen=True, slots=True)
class Means:
    """What running mass cancels takes; ``call_hands`` wakes workers up for a lane with so many messages.

    ``others``: whether a worker runs whose key is none of these.
    """

    book: Book
    masses: Masses
    exchange: Exchange
    pacer: Pacer
    call_hands: Callable[[Lane, int], None]
    read_lag_s: float
    stopping: threading.Event
    tell: Tell = nobody
    others: Callable[[Collection[str]], bool] = lambda _key_ids: False
