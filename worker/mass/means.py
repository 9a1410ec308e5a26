"""What a process runs mass cancels with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.mass_cancels import MassCancels
from kalshi_cancel.store.rate_limits import Pacer
from worker.dispatch.events import Emit, nobody


@dataclass(frozen=True, slots=True)
class Means:
    """What running mass cancels takes; ``call_senders`` wakes workers up for a lane with so many messages.

    ``others``: whether a worker runs whose key is none of these.
    """

    store: CancelStore
    mass_cancels: MassCancels
    exchange: Exchange
    pacer: Pacer
    call_senders: Callable[[Lane, int], None]
    read_lag_s: float
    stopping: threading.Event
    emit: Emit = nobody
    others: Callable[[Collection[str]], bool] = lambda _key_ids: False
