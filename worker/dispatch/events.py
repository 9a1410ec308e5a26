"""The events of a worker's work, as values; who listens (log, metrics, traces) is decided elsewhere.

A listener is called in the thread that does the work, so it must be quick and must not raise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kalshi_cancel.exchange.protocol import Failure
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.store.pending import Conclusion, Entry
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say
from worker.dispatch.breaker import BreakerState

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Claimed:
    """Entries were claimed, to be asked for now; each one's ``age_s`` is how long it had waited."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class CallMade:
    """One signed HTTP exchange has ended, after ``duration_s``.

    ``operation``: ``cancel``, ``batch``, ``read_back`` or ``list``; ``failure`` None: it was done as asked.
    ``tokens`` were paid from ``bucket``; ``lane`` None: it was not for any one order (a listing).
    ``request_id``: of the mass cancel that made it, where no sender did.
    """

    operation: str
    order_ids: tuple[str, ...]
    lane: Lane | None
    failure: Failure | None
    duration_s: float
    bucket: str
    tokens: float
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Concluded:
    """Entries were put down, each at an age in seconds.

    ``ours`` False: another sender had taken that one over.
    """

    conclusions: tuple[Conclusion, ...]
    ours: tuple[bool, ...]
    ages_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """So many entries that this process had claimed turned out to be another's."""

    entries: int


@dataclass(frozen=True, slots=True)
class WakeUpSent:
    """The sweeper found something claimable that nobody was coming for."""

    lane: Lane


@dataclass(frozen=True, slots=True)
class BucketCorrected:
    """A 429: the shared idea of a bucket was corrected."""

    bucket: str


@dataclass(frozen=True, slots=True)
class BreakerMoved:
    """Cancels pass again, or are held back; ``why``: what the exchange says where it refuses the key."""

    state: BreakerState
    why: str | None = None


@dataclass(frozen=True, slots=True)
class MassStep:
    """A mass cancel is ``started``, ``planned`` (a dry run), ``flat``, ``not_flat`` or ``left`` to others."""

    request_id: str
    step: str
    traceparent: str | None = None
    dry_run: bool = False
    requested_by: str | None = None
    why: str | None = None  # of ``not_flat``


@dataclass(frozen=True, slots=True)
class ServiceMoved:
    """A background job is well (again), or is not."""

    service: str
    well: bool


@dataclass(frozen=True, slots=True)
class ServiceFailed:
    """A round of a background job went wrong; ``error``: a defect, whose traceback is worth a look."""

    service: str
    why: str = ""
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class ServiceRestarted:
    """The thread of a background job had died, or hung (``why``), and another has taken its place."""

    service: str
    why: str = ""


Event: TypeAlias = (
    Claimed
    | CallMade
    | Concluded
    | LeaseLost
    | WakeUpSent
    | BucketCorrected
    | BreakerMoved
    | MassStep
    | ServiceMoved
    | ServiceFailed
    | ServiceRestarted
)
Emit: TypeAlias = Callable[[Event], None]


def nobody(_event: Event) -> None:
    """Listens to nothing."""


def emit_to_all(listeners: Sequence[Emit]) -> Emit:
    """One listener that hands events on to them all; what goes wrong in one is logged and stops no work."""
    if not listeners:
        return nobody

    def emit(event: Event) -> None:
        for listener in listeners:
            try:
                listener(event)
            except Exception as error:  # noqa: BLE001 - who only observes stops no work
                say(log, LogEvent.INTERNAL_ERROR, error=error, doing="tell a listener what happened")

    return emit
