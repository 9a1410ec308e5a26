"""One claimed entry on its way to a known outcome: what is known so far, and how much time is left."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from decimal import Decimal

from kalshi_cancel.exchange.clock import Span
from kalshi_cancel.model.results import CancelResult, Outcome
from kalshi_cancel.store.pending import Entry
from worker.dispatch.case import Case, Instant
from worker.dispatch.events import CallMade
from worker.dispatch.read_slots import ReadSlot
from worker.dispatch.resolution import Verdict

# A call with less time than this is not worth starting for somebody who then hears "unresolved".
WORTH_A_CALL_S = 0.05


@dataclass(frozen=True, slots=True)
class Clocks:
    """What a moment is by the exchange's clocks, read once for all orders of a call; see Instant."""

    front_ms: int
    engine: Span | None
    effect_ms: int


class Walk:
    """One claimed entry: what is known so far, and by when its waiters want to hear."""

    def __init__(
        self,
        case: Case,
        entry: Entry,
        calls: list[CallMade],
        slot: ReadSlot,
        since: float,
        *,
        key_id: str,
    ) -> None:
        self.case = case
        self.entry = entry
        self.calls = calls  # made for all entries of the claim
        self.since = since  # when it was claimed, and its first call paid for (monotonic)
        self.paid_at: float | None = None  # when the tokens of its next call were taken (monotonic)
        self.reads_only = False  # claimed to be read back
        self.slot = slot
        self.key_id = key_id  # of the key that signs for it
        self._claimed = time.monotonic()
        self._deadline = self._claimed + entry.deadline_left_s

    def age_ms(self, *, ago_s: float = 0.0) -> int:
        """How long before now, or before a moment ``ago_s`` ago, the cancel was accepted."""
        return round((self.entry.age_s + time.monotonic() - self._claimed - ago_s) * 1000)

    def instant(self, clocks: Clocks, *, ago_s: float = 0.0) -> Instant:
        """The moment that the clocks show, or one ``ago_s`` before, in this cancel's life."""
        ago_ms, engine = ago_s * 1000, clocks.engine
        if engine is not None and ago_ms:
            engine = engine.moved(-ago_ms)
        return Instant(clocks.front_ms - round(ago_ms), self.age_ms(ago_s=ago_s), engine, clocks.effect_ms)

    def is_overdue(self) -> bool:
        """Whether the waiters are told ``unresolved``, now or already: no short pauses, and no end."""
        return self.entry.reported or self._deadline - time.monotonic() < WORTH_A_CALL_S

    def time_left_s(self) -> float:
        """How long a call may take."""
        return math.inf if self.is_overdue() else self._deadline - time.monotonic()


def result_of(walk: Walk, verdict: Verdict) -> CancelResult:
    """The result that a verdict makes of an entry's way."""
    order, entry = verdict.order, walk.entry
    # A canceled order has nothing left by definition ("zeroed"), also where the reply shows no order.
    left = Decimal(0) if verdict.outcome is Outcome.CANCELED else None
    if order is not None:
        # A number that contradicts the order's end (an older state's, perhaps) is not known to be true.
        left = None if order.status.terminal and order.remaining_count else order.remaining_count
    return CancelResult(
        order_id=entry.order_id,
        outcome=verdict.outcome,
        status=verdict.status,
        reduced_by=verdict.reduced_by,
        fill_count=order.fill_count if order else None,
        remaining_count=left,
        confirmed_by=verdict.confirmed_by,
        attempts=walk.case.attempts,
        requested_at=entry.requested_at,
        exchange_ts_ms=verdict.exchange_ts_ms,
        error=verdict.problem,
        order=order.fields() if order else None,
    )
