"""The sweeper finds what nobody came for: passed deadlines, lost wake-ups, cancels without a place in line.

Every worker runs it, as rounds of its background jobs (``worker/runtime/services.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from kalshi_cancel.model.requests import Lane
from kalshi_cancel.model.results import CancelResult, Outcome, Problem
from kalshi_cancel.store.cancels import CancelStore
from kalshi_cancel.store.pending import Overdue, Progress
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say
from worker.dispatch.breaker import BreakerState, CircuitBreaker

log = logging.getLogger(__name__)

# What became claimable without anybody coming is noticed after this, by the next sweep.
PATIENCE_S = 1.0
REPORT_AT_ONCE = 100
_NO_ANSWER_YET = Problem("no_answer", "the deadline passed before the exchange could be asked")


class Sweeper:
    """Sweeps the store for one worker, whose breaker it looks at; everything raises StoreError.

    ``others_serve``: whether another worker can go on where this one's key is refused.
    """

    def __init__(
        self, store: CancelStore, breaker: CircuitBreaker, *, others_serve: Callable[[], bool]
    ) -> None:
        self._store = store
        self._breaker = breaker
        self._others_serve = others_serve
        self._mend_from = 0

    def report_overdue(self) -> None:
        """Tells the waiters of overdue cancels that they are unresolved; the work on them goes on.

        Where no worker's key works they are told that it is refused. Once one works, they are canceled.
        """
        while overdue := self._store.overdue(at_most=REPORT_AT_ONCE):
            refused = self._refused_everywhere()
            if refused is not None:
                self._store.report([_refused(each, refused) for each in overdue])
            else:
                why = _NO_ANSWER_YET if self._breaker.is_closed else _held_back(self._breaker.state)
                self._store.report([_unresolved(each, why) for each in overdue])
            if len(overdue) < REPORT_AT_ONCE:
                break

    def lanes_to_wake(self) -> dict[Lane, bool]:
        """The lanes where something can be claimed and nobody was coming; see the store's."""
        if not self._breaker.is_closed and self._breaker.is_watched:
            return {}  # the sender on watch goes on when the exchange is back
        return self._store.lanes_to_wake(tuple(Lane), patience_s=PATIENCE_S)

    def mend(self) -> None:
        """Looks at some more of the store for entries that nobody would ever come for."""
        self._mend_from, _ = self._store.mend(self._mend_from)

    def forget_dead(self) -> None:
        """Forgets dead letters that nobody looks at any more."""
        while forgotten := self._store.forget_dead():
            say(log, LogEvent.DEAD_LETTERS_DELETED, count=forgotten)

    def _refused_everywhere(self) -> Problem | None:
        """What the exchange says to this worker's key, where no other worker can serve either."""
        is_refused = self._breaker.state is BreakerState.KEY_REFUSED
        return self._breaker.key_problem if is_refused and not self._others_serve() else None


def _held_back(state: BreakerState) -> Problem:
    return Problem(f"exchange_{state}", f"the exchange is {state}: the cancel is held until it is back")


def _refused(overdue: Overdue, problem: Problem) -> CancelResult:
    attempts = Progress.parse(overdue.progress).attempts
    return CancelResult(
        order_id=overdue.order_id,
        outcome=Outcome.REFUSED,
        attempts=attempts,
        requested_at=overdue.requested_at,
        error=problem,
    )


def _unresolved(overdue: Overdue, nothing_yet: Problem) -> CancelResult:
    progress = Progress.parse(overdue.progress)
    return CancelResult(
        order_id=overdue.order_id,
        outcome=Outcome.UNRESOLVED,
        attempts=progress.attempts,
        requested_at=overdue.requested_at,
        error=progress.last_problem or nothing_yet,
    )
