"""What dispatching is set to, and whom of its worker a dispatcher knows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeAlias

from kalshi_cancel.model.requests import Lane
from kalshi_cancel.settings.worker import WorkerSettings
from worker.dispatch.events import Emit, nobody

# The id of a key that is none of these, of another worker of the lane (empty: none); raises StoreError.
AnotherKey: TypeAlias = Callable[[Collection[str], Lane], str]


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """How cancels are dispatched: the lanes that are served, and by how many senders."""

    cancel_max_age_s: float
    read_lag_s: float
    record_life_s: float
    risk_reserve: float
    batch_most: int
    lanes: tuple[Lane, ...] = tuple(Lane)
    senders: int = 1

    @classmethod
    def of(cls, settings: WorkerSettings, *, lanes: tuple[Lane, ...], senders: int) -> DispatchSettings:
        """As the worker's settings say."""
        return cls(
            cancel_max_age_s=settings.cancel_max_age_s,
            read_lag_s=settings.read_lag_s,
            record_life_s=settings.redis.result_expires_s,
            risk_reserve=settings.risk_reserve,
            batch_most=settings.batch_most,
            lanes=lanes,
            senders=senders,
        )


@dataclass(frozen=True, slots=True)
class Neighbors:
    """Whom a dispatcher tells and asks; by default it is alone.

    ``call_sender`` wakes a worker up for a lane; ``breaker_moved`` is called when the breaker moves.
    """

    call_sender: Callable[[Lane], None] = lambda _lane: None
    breaker_moved: Callable[[], None] = lambda: None
    another_key: AnotherKey = lambda _key_ids, _lane: ""
    emit: Emit = nobody


ALONE = Neighbors()
