"""What a process runs mass cancels with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

from worker.book import Book
from worker.exchange import Exchange
from worker.masses import Masses
from worker.notices import Tell, nobody
from worker.orders import Lane
from worker.pacing import Pacer


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
