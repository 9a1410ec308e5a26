"""Executes claimed cancels at the exchange: asks, and asks again, until known or a longer pause is due.

One order is asked for by a single call and followed up at once; tenacity owns asking again: short pauses
are waited out, before a long one the order goes back into the store. Several orders are asked for by one
batch call; those that it does not settle go back at once and are followed up one by one.
"""

from __future__ import annotations

import functools
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type

from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.exchange.clock import Span
from kalshi_cancel.exchange.protocol import Canceled, Failure, Meaning
from kalshi_cancel.model.orders import OrderStatus
from kalshi_cancel.model.requests import write_path
from kalshi_cancel.store.pending import (
    Claim,
    Completed,
    Conclusion,
    Entry,
    MakeDeadLetter,
    RetryLater,
    Settle,
)
from kalshi_cancel.store.rate_limits import Pacer
from kalshi_cancel.store.scripts import StoreError, say_failed
from worker.dispatch.archive import Archive, NotNow
from worker.dispatch.batch_size import NEVER_TOO_MANY, BatchSize
from worker.dispatch.breaker import CircuitBreaker
from worker.dispatch.case import UNDER_WAY_MOST_MS, Attempt, Case, Instant, Step
from worker.dispatch.events import CallMade
from worker.dispatch.leases import Leases
from worker.dispatch.paid_calls import Made, NoTokens, PaidCalls, Payment, Target, kept_share
from worker.dispatch.read_slots import ReadSlot, ReadSlots
from worker.dispatch.resolution import (
    Lags,
    Next,
    Pause,
    Verdict,
    after_cancel,
    after_lost_batch,
    after_read,
    after_search,
)
from worker.dispatch.settings import ALONE, DispatchSettings, Neighbors
from worker.dispatch.walk import Clocks, Walk, result_of

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

# Back-off with full jitter: up to 50 ms at first (reads lag writes by about 360 ms), doubling.
BACK_OFF_FIRST_S = 0.05
BACK_OFF_MOST_S = 2.0  # while somebody waits for the result
BACK_OFF_MOST_READ_S = 0.5  # reads catch up within the read lag, a second or two
BACK_OFF_MOST_OVERDUE_S = 30.0  # once the waiters were told "unresolved"
# Longer pauses are spent in the store: a sender full of waiting orders would keep risk out.
PATIENCE_S = 0.25
# Reads lag writes by about 360 ms: sooner, a listing would not show what a lost batch has canceled.
LISTINGS_CATCH_UP_S = 0.4
_PERHAPS_OF_ITS_SIZE = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
)
# Pages of canceled orders, the latest first: what is farther back was not canceled just now.
PAGES_MOST = 10
# Until an order is due again that this worker's key may not cancel: the same worker must not be the next.
LEFT_TO_OTHERS_S = 0.25
LEFT_OVERDUE_S = 5.0


@dataclass(frozen=True, slots=True)
class Completion:
    """What has become of a claim, made at ``since`` (monotonic), and the calls that it took."""

    conclusions: Sequence[Conclusion] = ()
    calls: Sequence[CallMade] = ()
    since: float = 0.0

    @property
    def completed(self) -> Completed:
        """As the store is to have it."""
        done = [
            {
                "operation": call.operation,
                "orders": len(call.order_ids),
                "status": call.failure.problem.http_status if call.failure else HTTPStatus.OK,
                "code": call.failure and call.failure.problem.code,
                "ms": round(call.duration_s * 1000, 1),
                "tokens": call.tokens,
                "bucket": call.bucket,
            }
            for call in self.calls
        ]
        return Completed(self.conclusions, done)


class Executor:
    """How one process executes cancels; shared by its threads."""

    def __init__(
        self,
        exchange: Exchange,
        pacer: Pacer,
        breaker: CircuitBreaker,
        leases: Leases,
        stopping: threading.Event,
        *,
        settings: DispatchSettings,
        neighbors: Neighbors = ALONE,
    ) -> None:
        self._exchange = exchange
        self._another_key = neighbors.another_key
        self._calls = PaidCalls(pacer, emit=neighbors.emit, hear=breaker.note)
        self._breaker = breaker
        self._leases = leases
        self._stopping = stopping
        self._cancel_max_age_s = settings.cancel_max_age_s
        self._lags = Lags(round(settings.read_lag_s * 1000), round(settings.record_life_s * 1000))
        self._archive = Archive(exchange, PaidCalls(pacer, emit=neighbors.emit), stopping)
        self._risk_reserve = settings.risk_reserve
        self.batch_size = BatchSize(settings.batch_most)
        self.read_slots = ReadSlots(settings.senders)
        self._retrying = Retrying(
            retry=retry_if_exception_type(_NotKnownYet),
            wait=self._pause_s,
            stop=self._enough_for_now,
            sleep=self._wait,
            reraise=True,
        )

    def execute(self, claim: Claim, *, since: float) -> Completion:
        """What becomes of a claim's entries, whose first call is paid for."""
        calls: list[CallMade] = []
        with self.read_slots.of(claim.bucket == "read") as slot:
            walks = self._walks(claim, calls, slot, since)
            left = {id(walk): given for walk in walks if (given := self._left_to_others(walk, walk.case))}
            mine = [walk for walk in walks if id(walk) not in left]
            return Completion([*self._execute(mine, claim), *left.values()], calls, since)

    def return_claim(self, claim: Claim) -> Completion:
        """The claim's entries for the store again, before anything is sent."""
        since = time.monotonic()
        with self.read_slots.of(reads=False) as slot:
            walks = self._walks(claim, [], slot, since)
        return Completion([self._retry_later(walk, 0.0) for walk in walks], (), since)

    def _walks(self, claim: Claim, calls: list[CallMade], slot: ReadSlot, since: float) -> list[Walk]:
        key_id = self._exchange.signs_with[0]
        clocks = self._clocks() if any(entry.interrupted for entry in claim.entries) else None
        return [
            Walk(self._case(entry, key_id, clocks), entry, calls, slot, since, key_id=key_id)
            for entry in claim.entries
        ]

    def _execute(self, walks: Sequence[Walk], claim: Claim) -> Sequence[Conclusion]:
        if len(walks) > 1 and claim.bucket == "read":
            return self._read_together(walks)
        if len(walks) > 1:
            return self._cancel_batch(walks, claim)
        for walk in walks:
            walk.reads_only = claim.bucket == "read"
        return [self._see_through(walk) for walk in walks]

    # -- one order

    def _see_through(self, walk: Walk) -> Conclusion:
        walk.paid_at = walk.since
        try:
            verdict = self._first_step(walk)
        except _NotKnownYet as open_still:
            return self._retry_later(walk, self._pause_after(open_still))
        return self._settle(walk, verdict)

    def _first_step(self, walk: Walk) -> Verdict:
        """A step, and those that tenacity has follow it: most cancels need none, and are not kept by it."""
        try:
            return self._take_step(walk)
        except _NotKnownYet as open_still:
            taken = [open_still]

        def next_step() -> Verdict:
            if taken:
                raise taken.pop()
            return self._take_step(walk)

        return self._retrying(next_step)

    def _take_step(self, walk: Walk) -> Verdict:
        """One signed exchange and what follows from it; raises _NotKnownYet."""
        entry, case = walk.entry, walk.case
        if not self._leases.is_held(entry):
            # Frozen past the lease: another sender is at it, and what this one knows is old.
            raise _NotKnownYet(walk, Next(case, Pause.NONE), abandoned=True)
        if walk.reads_only and case.step is Step.CANCEL:
            # The store must know that a cancel may be sent before one is: it is claimed for that anew.
            raise _NotKnownYet(walk, Next(case, Pause.NONE), abandoned=True)
        if case.step.reads and not walk.slot.may_read():
            raise _NotKnownYet(walk, Next(case, Pause.NONE), abandoned=True)
        bucket = _bucket(case)
        if case.step is Step.SEARCH_ARCHIVE:
            return self._search(walk)
        paid = self._pay(walk, bucket)
        if case.step is Step.CANCEL:
            return self._cancel(walk, paid)
        made = self._send(
            "read_back",
            [walk],
            paid,
            lambda: self._exchange.read_order(entry.order_id, time_left_s=walk.time_left_s()),
        )
        # What a slow reply shows may be as old as its question; the clock is as this very reply tells it.
        asked_at = self._now(walk, ago_s=time.monotonic() - made.began)
        return self._known(walk, case, after_read(case, made.answer, asked_at, self._lags))

    def _cancel(self, walk: Walk, paid: Payment) -> Verdict:
        """Asks for the cancel, and what follows from the answer; raises _NotKnownYet."""
        case, order_id = walk.case.sending(self._now(walk)), walk.entry.order_id
        made = self._send(
            "cancel",
            [walk],
            paid,
            lambda: self._exchange.cancel(order_id, case.routing, time_left_s=walk.time_left_s()),
        )
        if isinstance(made.answer, Failure) and made.answer.meaning is Meaning.REFUSED:
            self.batch_size.spoiler_found()
        return self._known(walk, case, after_cancel(case, made.answer, self._now(walk)))

    def _send(
        self,
        operation: str,
        walks: Sequence[Walk],
        paid: Payment,
        ask: Callable[[], _Answer],
        failure_in: Callable[[_Answer], Failure | None] | None = None,
    ) -> Made[_Answer]:
        """Makes a call for these orders, and notes it among those of their claim."""
        target = Target(operation, tuple(walk.entry.order_id for walk in walks), walks[0].entry.lane)
        made = self._calls.send(paid, target, ask, failure_in=failure_in)
        walks[0].calls.append(made.call)
        return made

    def _known(self, walk: Walk, case: Case, decided: Verdict | Next) -> Verdict:
        """The verdict, if it is one; else raises _NotKnownYet."""
        walk.case = case if isinstance(decided, Verdict) else decided.case
        if isinstance(decided, Next):
            raise _NotKnownYet(walk, decided)
        return decided

    def _search(self, walk: Walk) -> Verdict:
        """Looks into the archive, which pays for itself; raises _NotKnownYet."""
        case, asked = walk.case, self._now(walk)
        missing_for_s = (asked.age_ms - (case.first_unknown_age_ms or 0)) / 1000
        found = self._archive.find(walk.entry.order_id, missing_since=time.monotonic() - missing_for_s)
        if isinstance(found, NotNow):
            raise _NotKnownYet(walk, Next(case, Pause.NONE, found.wait_s))
        return self._known(walk, case, after_search(case, found, asked, self._lags))

    def _pay(self, walk: Walk, bucket: str) -> Payment:
        """Takes the tokens of the walk's next call, unless the claim has; raises _NotKnownYet."""
        limits = self._calls.limits
        cost = limits.cancel_cost if walk.case.step is Step.CANCEL else limits.read_cost
        if walk.paid_at is not None:
            paid_at, walk.paid_at = walk.paid_at, None
            return Payment(bucket, cost, paid_at)
        kept = kept_share(bucket, walk.entry.lane, limits, risk_reserve=self._risk_reserve)
        try:
            paid = self._calls.take(bucket, cost, kept_share=kept)
        except StoreError as error:
            say_failed(log, error, "take tokens")
            paid = NoTokens(PATIENCE_S)
        if isinstance(paid, NoTokens):
            raise _NotKnownYet(walk, Next(walk.case, Pause.NONE, paid.wait_s))
        return paid

    def _pause_s(self, state: RetryCallState) -> float:
        """How long to wait before the next step, for tenacity; drawn once per answer."""
        return self._pause_after(_raised(state))

    def _pause_after(self, open_still: _NotKnownYet) -> float:
        if open_still.pause_s is None:
            open_still.pause_s = _draw_pause_s(open_still.decided, open_still.walk)
        return open_still.pause_s

    def _enough_for_now(self, state: RetryCallState) -> bool:
        return (
            _raised(state).abandoned
            or state.upcoming_sleep > PATIENCE_S
            or self._stopping.is_set()
            or not self._breaker.is_closed
        )

    def _wait(self, seconds: float) -> None:
        self._stopping.wait(seconds)

    # -- several orders in one call

    def _cancel_batch(self, walks: Sequence[Walk], claim: Claim) -> list[Conclusion]:
        if not all(self._leases.is_held(walk.entry) for walk in walks):
            return [self._retry_later(walk, 0.0) for walk in walks]  # frozen past the lease: see _take_step
        clocks = self._clocks()
        for walk in walks:
            walk.case = walk.case.sending(walk.instant(clocks))
        orders = [(walk.entry.order_id, walk.case.routing) for walk in walks]
        time_left_s = max(walk.time_left_s() for walk in walks)
        made = self._send(
            "batch",
            walks,
            Payment(claim.bucket, claim.tokens, walks[0].since),
            lambda: self._exchange.cancel_batch(orders, time_left_s=time_left_s),
            _failure_of_batch,
        )
        answers = made.answer
        if isinstance(answers, Failure):
            return self._whole_batch(walks, answers, was_affordable=made.was_affordable)
        self.batch_size.accepted(len(walks))
        clocks = self._clocks()
        return [
            self._conclude(walk, after_cancel(walk.case, answers[walk.entry.order_id], walk.instant(clocks)))
            for walk in walks
        ]

    def _whole_batch(
        self, walks: Sequence[Walk], failure: Failure, *, was_affordable: bool
    ) -> list[Conclusion]:
        """A failure of the whole call is not any order's own: a refusal may be the size's, or one order's.

        So may a 429 be, where the tokens must have been there (``was_affordable``).
        """
        if failure.meaning is Meaning.REFUSED:
            self.batch_size.refused(len(walks))
            return [self._retry_later(walk, 0.0) for walk in walks]
        # A gateway may let single calls pass and turn away what is larger.
        turned_away = failure.no_usable_answer and failure.problem.http_status in _PERHAPS_OF_ITS_SIZE
        if turned_away or (was_affordable and len(walks) > NEVER_TOO_MANY):
            self.batch_size.refused(len(walks))
        elif failure.meaning is Meaning.BUSY:
            self.batch_size.turned_away(len(walks))
        if failure.may_have_taken_effect or failure.meaning is Meaning.NOT_FOUND:
            clocks = self._clocks()
            for walk in walks:
                walk.case = after_lost_batch(walk.case, failure, walk.instant(clocks)).case
            pause_s = failure.retry_after_s or 0.0
            if len(walks) * self._calls.limits.read_cost <= self._calls.limits.list_cost:
                return [self._retry_later(walk, pause_s) for walk in walks]
            pause_s = max(pause_s, LISTINGS_CATCH_UP_S)
            return [self._retry_later(walk, pause_s, path="reads") for walk in walks]
        return [self._conclude(walk, after_cancel(walk.case, failure, self._now(walk))) for walk in walks]

    def _read_together(self, walks: Sequence[Walk]) -> list[Conclusion]:
        """Looks for many in listings of canceled orders, as long as that is cheaper than one by one."""
        missing = {walk.entry.order_id: walk for walk in walks}
        conclusions: list[Conclusion] = []
        limits, cursor, pages = self._calls.limits, "", 0
        paid: Payment | NoTokens = Payment("read", limits.list_cost, walks[0].since)
        while missing and isinstance(paid, Payment) and pages < PAGES_MOST and not self._stopping.is_set():
            if not all(self._leases.is_held(walk.entry) for walk in walks):
                break
            pages += 1
            query = {"status": OrderStatus.CANCELED.value}
            ask = functools.partial(self._exchange.list_orders, query, cursor)
            made = self._send("list", walks, paid, ask)
            page = made.answer
            if isinstance(page, Failure):
                break
            for order in page.orders:
                walk = missing.pop(order.order_id, None)
                if walk is not None:
                    at = self._now(walk, ago_s=time.monotonic() - made.began)
                    decided = after_read(walk.case, order, at, self._lags)
                    conclusions.append(self._conclude(walk, decided))
            cursor = page.cursor
            if not cursor or len(missing) * limits.read_cost <= limits.list_cost:
                break
            paid = self._calls.take("read", limits.list_cost)
        # What is not among the canceled ones is executed, or shown late: that only its own read-back tells.
        return conclusions + [self._retry_later(walk, 0.0, path="read") for walk in missing.values()]

    def _conclude(self, walk: Walk, decided: Verdict | Next) -> Conclusion:
        if isinstance(decided, Verdict):
            return self._settle(walk, decided)
        walk.case = decided.case
        return self._retry_later(walk, _draw_pause_s(decided, walk))

    # -- both

    def engine_now(self) -> str | None:
        """This moment on the clock that stamps orders, as a claim notes it; None while that is not known."""
        engine = self._exchange.engine_now()
        return None if engine is None else f"{engine.low_ms:.0f}:{engine.high_ms:.0f}"

    def _settle(self, walk: Walk, verdict: Verdict) -> Conclusion:
        """The outcome; or the entry for workers with another key, which may do or see more than this."""
        left = None
        if verdict.is_of_the_key:
            left = self._left_to_others(walk, walk.case.left_to_others(walk.key_id, self._now(walk)))
        return left or Settle(walk.entry, result_of(walk, verdict))

    def _left_to_others(self, walk: Walk, case: Case) -> Conclusion | None:
        """The entry for workers with another key; None where this was not turned away, or is the last."""
        turned_away = case.keys_turned_away(self._now(walk)) if case.turned_away else frozenset()
        if walk.key_id not in turned_away:
            return None
        signs_now = self._exchange.signs_with[0]
        try:
            other = "" if signs_now in turned_away else signs_now  # it was replaced meanwhile
            other = other or self._another_key(turned_away, walk.entry.lane)
        except StoreError as error:
            say_failed(log, error, "look for workers with another key")
            return self._retry_later(walk, LEFT_OVERDUE_S)
        if not other:
            return None
        walk.case = case
        pause_s = LEFT_OVERDUE_S if walk.is_overdue() else LEFT_TO_OTHERS_S
        given = self._retry_later(walk, pause_s * random.uniform(1.0, 1.5))  # noqa: S311 - jitter
        return replace(given, for_key=other) if isinstance(given, RetryLater) else given

    def _case(self, entry: Entry, key_id: str, clocks: Clocks | None) -> Case:
        """What is known of an entry, as a worker with this key goes on with it."""
        case = Case.from_json(entry.request, entry.progress).asked_by(key_id)
        if not entry.interrupted or clocks is None:
            return case
        attempt = Attempt(entry.first_sent_age_ms, _span(entry.first_sent_ms))
        return case.interrupted(attempt, Instant(clocks.front_ms, round(entry.age_s * 1000), clocks.engine))

    def _clocks(self) -> Clocks:
        effect_ms = min(self._exchange.effect_within_s * 1000, UNDER_WAY_MOST_MS)
        return Clocks(self._exchange.now_ms(), self._exchange.engine_now(), math.ceil(effect_ms))

    def _now(self, walk: Walk, *, ago_s: float = 0.0) -> Instant:
        return walk.instant(self._clocks(), ago_s=ago_s)

    def _retry_later(self, walk: Walk, pause_s: float, path: str = "") -> Conclusion:
        """The entry for the store again, at its old place while the breaker is open; or too old for it."""
        progress = walk.case.to_json(walk.key_id)
        if walk.entry.age_s > self._cancel_max_age_s and walk.entry.reported:  # nobody is left without a word
            return MakeDeadLetter(walk.entry, progress)
        return RetryLater(
            walk.entry, progress, pause_s if self._breaker.is_closed else 0.0, path or _bucket(walk.case)
        )


class _NotKnownYet(Exception):  # noqa: N818 - no error, the reason to ask again
    """The outcome is not known yet: the one exception that is asked again for."""

    def __init__(self, walk: Walk, decided: Next, *, abandoned: bool = False) -> None:
        super().__init__(walk.entry.order_id)
        self.walk = walk
        self.decided = decided
        self.abandoned = abandoned
        self.pause_s: float | None = None


def _raised(state: RetryCallState) -> _NotKnownYet:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, _NotKnownYet)
    return error


def _draw_pause_s(decided: Next, walk: Walk) -> float:
    if decided.pause is Pause.NONE:
        return decided.at_least_s
    most_s = BACK_OFF_MOST_READ_S if decided.case.step.reads else BACK_OFF_MOST_S
    if walk.is_overdue():
        most_s = BACK_OFF_MOST_OVERDUE_S
    ceiling_s = min(BACK_OFF_FIRST_S * 2.0 ** min(decided.case.back_offs - 1, 20), most_s)
    pause_s = random.uniform(0, ceiling_s)  # noqa: S311 - jitter, not a secret
    return max(pause_s, decided.at_least_s)


def _failure_of_batch(answers: Mapping[str, Canceled | Failure] | Failure) -> Failure | None:
    """How a batch has failed as a whole: none of its orders passes, or one has met a 429."""
    each = [answers] if isinstance(answers, Failure) else list(answers.values())
    failures = [answer for answer in each if isinstance(answer, Failure)]
    paused = [failure for failure in failures if failure.meaning is Meaning.PAUSED]
    if paused and len(paused) == len(each):
        return paused[0]
    return next((failure for failure in failures if failure.meaning is Meaning.BUSY), None)


def _bucket(case: Case) -> str:
    """The bucket that pays for the case's next call, and so its path in the store."""
    return "read" if case.step.reads else write_path(case.routing.exchange_index)


def _span(noted: str | None) -> Span | None:
    """The moment that a claim has noted, on the engine's clock."""
    low_ms, _, high_ms = (noted or "").partition(":")
    try:
        return Span(float(low_ms), float(high_ms))
    except ValueError:
        return None
