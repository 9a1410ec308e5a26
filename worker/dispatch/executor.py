"""Executes claimed cancels at the exchange: asks, and asks again, until known or a longer pause is due.

One order is asked for by a single call and followed up at once; tenacity owns asking again: short pauses
are waited out, before a long one the order goes back into the store. Several orders are asked for by one
batch call; those that it does not settle go back at once and are followed up one by one.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from http import HTTPStatus

from tenacity import RetryCallState, Retrying, retry_if_exception_type

from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.exchange.clock import Span
from kalshi_cancel.exchange.protocol import Canceled, Failure, Meaning
from kalshi_cancel.log_events import LogEvent
from kalshi_cancel.logs import say
from kalshi_cancel.model.orders import CancelResult, Lane, Order, OrderStatus, Outcome, write_path
from kalshi_cancel.store.cancels import Brought, Claim, Conclusion, Entry, GiveBack, GiveUp, Settle
from kalshi_cancel.store.rate_limits import Pacer
from kalshi_cancel.store.scripts import StoreError, say_failed
from worker.dispatch.archive import Archive, NotNow
from worker.dispatch.breaker import CircuitBreaker
from worker.dispatch.events import CallMade, Emit, nobody
from worker.dispatch.leases import Leases
from worker.dispatch.resolution import (
    Attempt,
    Case,
    Instant,
    Lags,
    Next,
    Pause,
    Step,
    Verdict,
    after_cancel,
    after_lost_batch,
    after_read,
    after_search,
)

log = logging.getLogger(__name__)

# Back-off with full jitter: up to 50 ms at first (reads lag writes by about 360 ms), doubling.
BACK_OFF_FIRST_S = 0.05
BACK_OFF_MOST_S = 2.0  # while somebody waits for the result
BACK_OFF_MOST_READ_S = 0.5  # reads catch up within the read lag, a second or two
BACK_OFF_MOST_OVERDUE_S = 30.0  # once the waiters were told "unresolved"
# Longer pauses are spent in the store: a sender full of waiting orders would keep risk out.
PATIENCE_S = 0.25
# Reads lag writes by about 360 ms: sooner, a listing would not show what a lost batch has canceled.
LISTINGS_CATCH_UP_S = 0.4
# A call with less time than this is not worth starting for somebody who then hears "unresolved".
WORTH_A_CALL_S = 0.05
# What a batch was refused for may have been its size: that is believed for so long.
REFUSED_SIZE_STANDS_S = 60.0
# Orders that no exchange calls too many for one call.
NEVER_TOO_MANY = 4
# Pages of canceled orders, the latest first: what is farther back was not canceled just now.
PAGES_MOST = 10
# Read-backs let new cancels go first, but not for ever.
READS_AFTER_S = 1.0
READS_LAST_S = 3600.0
# Until an order is due again that this worker's key may not cancel: the same worker must not be the next.
LEFT_TO_OTHERS_S = 0.25
LEFT_OVERDUE_S = 5.0
# How long all go out alone to find the one that spoils every call.
ALONE_S = 1.0


# The id of a key that is none of these, of another worker of the lane (empty: none); raises StoreError.
AnotherKey = Callable[[Collection[str], Lane], str]


def no_other(_key_ids: Collection[str], _lane: Lane) -> str:
    """For a worker that is alone."""
    return ""


@dataclass(frozen=True, slots=True)
class Completion:
    """What has become of a claim, made at ``since`` (monotonic), and the calls that it took."""

    conclusions: Sequence[Conclusion] = ()
    calls: Sequence[CallMade] = ()
    since: float = 0.0

    @property
    def brought(self) -> Brought:
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
        return Brought(self.conclusions, done)


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
        cancel_max_age_s: float,
        read_lag_s: float,
        record_life_s: float,
        risk_reserve: float,
        batch_most: int,
        senders: int = 1,
        another_key: AnotherKey = no_other,
        emit: Emit = nobody,
    ) -> None:
        self._exchange = exchange
        self._another_key = another_key
        self._emit = emit
        self._pacer = pacer
        self._breaker = breaker
        self._leases = leases
        self._stopping = stopping
        self._cancel_max_age_s = cancel_max_age_s
        self._lags = Lags(round(read_lag_s * 1000), round(record_life_s * 1000))
        self._archive = Archive(exchange, pacer, stopping, emit=emit)
        self._risk_reserve = risk_reserve
        self.batch_size = BatchSize(batch_most)
        self.read_slots = ReadSlots(senders)
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
            key_id, clocks = self._exchange.signs_with[0], self._clocks()
            walks = [
                _Walk(self._case(entry, key_id, clocks), entry, calls, slot, since, key_id=key_id)
                for entry in claim.entries
            ]
            left = {id(walk): given for walk in walks if (given := self._left_to_others(walk, walk.case))}
            mine = [walk for walk in walks if id(walk) not in left]
            return Completion([*self._execute(mine, claim), *left.values()], calls, since)

    def _execute(self, walks: Sequence[_Walk], claim: Claim) -> Sequence[Conclusion]:
        if len(walks) > 1 and claim.bucket == "read":
            return self._read_together(walks)
        if len(walks) > 1:
            return self._cancel_batch(walks, claim)
        for walk in walks:
            walk.reads_only = claim.bucket == "read"
        return [self._see_through(walk) for walk in walks]

    # -- one order

    def _see_through(self, walk: _Walk) -> Conclusion:
        walk.paid = True
        try:
            verdict = self._retrying(self._take_step, walk)
        except _NotKnownYet as open_still:
            return self._give_back(walk, self._pause_after(open_still))
        return self._settle(walk, verdict)

    def _take_step(self, walk: _Walk) -> Verdict:
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
        self._pay(walk, bucket)
        answer: Canceled | Order | Failure
        started = time.monotonic()
        if case.step is Step.CANCEL:
            case = case.sending(self._now(walk))
            answer = self._exchange.cancel(entry.order_id, case.routing, time_left_s=walk.time_left_s())
            learned = after_cancel(case, answer, self._now(walk))
        else:
            answer = self._exchange.read_order(entry.order_id, time_left_s=walk.time_left_s())
            # What a slow reply shows may be as old as its question; the clock is as this very reply tells it.
            asked_at = self._now(walk, ago_s=time.monotonic() - started)
            learned = after_read(case, answer, asked_at, self._lags)
        operation = "cancel" if case.step is Step.CANCEL else "read_back"
        if isinstance(answer, Failure) and answer.meaning is Meaning.REFUSED and operation == "cancel":
            self.batch_size.spoiler_found()
        self._notice(operation, [walk], answer, started, bucket=bucket, tokens=self._cost(case))
        return self._known(walk, case, learned)

    def _known(self, walk: _Walk, case: Case, learned: Verdict | Next) -> Verdict:
        """The verdict, if it is one; else raises _NotKnownYet."""
        walk.case = case if isinstance(learned, Verdict) else learned.case
        if isinstance(learned, Next):
            raise _NotKnownYet(walk, learned)
        return learned

    def _search(self, walk: _Walk) -> Verdict:
        """Looks into the archive, which pays for itself; raises _NotKnownYet."""
        case, asked = walk.case, self._now(walk)
        missing_for_s = (asked.age_ms - (case.first_unknown_age_ms or 0)) / 1000
        found = self._archive.find(walk.entry.order_id, missing_since=time.monotonic() - missing_for_s)
        if isinstance(found, NotNow):
            raise _NotKnownYet(walk, Next(case, Pause.NONE, found.wait_s))
        return self._known(walk, case, after_search(case, found, asked, self._lags))

    def _pay(self, walk: _Walk, bucket: str) -> None:
        """Takes the tokens of the walk's next call, unless the claim has; raises _NotKnownYet."""
        if walk.paid:
            walk.paid = False
            return
        limits = self._pacer.limits
        kept = self._risk_reserve if walk.entry.lane is Lane.STRATEGY else 0.0
        if bucket == "read":  # the tokens of a listing are left to mass cancels
            kept = min(limits.list_cost, (limits.read_capacity - limits.read_cost) / 4) / limits.read_capacity
        try:
            walk.taken_at = time.monotonic()
            wait_s = self._pacer.take(bucket, self._cost(walk.case), kept_share=kept)
        except StoreError as error:
            say_failed(log, error, "take tokens")
            wait_s = PATIENCE_S
        if wait_s > 0:
            raise _NotKnownYet(walk, Next(walk.case, Pause.NONE, wait_s))

    def _cost(self, case: Case) -> float:
        limits = self._pacer.limits
        return limits.cancel_cost if case.step is Step.CANCEL else limits.read_cost

    def _notice(
        self,
        operation: str,
        walks: Sequence[_Walk],
        answer: Canceled | Order | Failure,
        started: float,
        *,
        bucket: str,
        tokens: float,
    ) -> bool:
        """What breaker, buckets and listeners learn from a call that began at ``started`` (monotonic).

        True for a 429 although the tokens must have been there.
        """
        self._breaker.note(answer)
        failure, was_affordable = answer if isinstance(answer, Failure) else None, False
        if failure is not None and failure.meaning is Meaning.BUSY:
            was_affordable = self._pacer.correct(bucket, tokens, taken_at=walks[0].taken_at)
        order_ids = tuple(walk.entry.order_id for walk in walks)
        took_s = time.monotonic() - started
        call = CallMade(operation, order_ids, walks[0].entry.lane, failure, took_s, bucket, tokens)
        walks[0].calls.append(call)
        self._emit(call)
        return was_affordable

    def _pause_s(self, state: RetryCallState) -> float:
        """How long to wait before the next step, for tenacity; drawn once per answer."""
        return self._pause_after(_raised(state))

    def _pause_after(self, open_still: _NotKnownYet) -> float:
        if open_still.pause_s is None:
            open_still.pause_s = _draw_pause_s(open_still.learned, open_still.walk)
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

    def _cancel_batch(self, walks: Sequence[_Walk], claim: Claim) -> list[Conclusion]:
        if not all(self._leases.is_held(walk.entry) for walk in walks):
            return [self._give_back(walk, 0.0) for walk in walks]  # frozen past the lease: see _take_step
        clocks = self._clocks()
        for walk in walks:
            walk.case = walk.case.sending(walk.instant(clocks))
        orders = [(walk.entry.order_id, walk.case.routing) for walk in walks]
        time_left_s = max(walk.time_left_s() for walk in walks)
        started = time.monotonic()
        answers = self._exchange.cancel_batch(orders, time_left_s=time_left_s)
        if isinstance(answers, Failure):
            was_affordable = self._notice(
                "batch", walks, answers, started, bucket=claim.bucket, tokens=claim.tokens
            )
            return self._whole_batch(walks, answers, was_affordable=was_affordable)
        paused = [
            each for each in answers.values() if isinstance(each, Failure) and each.meaning is Meaning.PAUSED
        ]
        busy = [
            each for each in answers.values() if isinstance(each, Failure) and each.meaning is Meaning.BUSY
        ]
        heard = paused[0] if len(paused) == len(walks) else busy[0] if busy else _ANSWERED
        self._notice("batch", walks, heard, started, bucket=claim.bucket, tokens=claim.tokens)
        self.batch_size.accepted(len(walks))
        clocks = self._clocks()
        return [
            self._conclude(walk, after_cancel(walk.case, answers[walk.entry.order_id], walk.instant(clocks)))
            for walk in walks
        ]

    def _whole_batch(
        self, walks: Sequence[_Walk], failure: Failure, *, was_affordable: bool
    ) -> list[Conclusion]:
        """A failure of the whole call is not any order's own: a refusal may be the size's, or one order's.

        So may a 429 be, where the tokens must have been there (``was_affordable``).
        """
        if failure.meaning is Meaning.REFUSED:
            self.batch_size.refused(len(walks))
            return [self._give_back(walk, 0.0) for walk in walks]
        if was_affordable and len(walks) > NEVER_TOO_MANY:
            self.batch_size.refused(len(walks))
        if failure.may_have_taken_effect or failure.meaning is Meaning.NOT_FOUND:
            clocks = self._clocks()
            for walk in walks:
                walk.case = after_lost_batch(walk.case, failure, walk.instant(clocks)).case
            if len(walks) * self._pacer.limits.read_cost <= self._pacer.limits.list_cost:
                return [self._give_back(walk, 0.0) for walk in walks]
            return [self._give_back(walk, LISTINGS_CATCH_UP_S, path="reads") for walk in walks]
        return [self._conclude(walk, after_cancel(walk.case, failure, self._now(walk))) for walk in walks]

    def _read_together(self, walks: Sequence[_Walk]) -> list[Conclusion]:
        """Looks for many in listings of canceled orders, as long as that is cheaper than one by one."""
        missing = {walk.entry.order_id: walk for walk in walks}
        conclusions: list[Conclusion] = []
        limits, cursor, paid_s, pages = self._pacer.limits, "", 0.0, 0
        while missing and paid_s == 0.0 and pages < PAGES_MOST and not self._stopping.is_set():
            if not all(self._leases.is_held(walk.entry) for walk in walks):
                break
            pages += 1
            started = time.monotonic()
            page = self._exchange.list_orders({"status": OrderStatus.CANCELED.value}, cursor)
            failure = page if isinstance(page, Failure) else None
            self._notice("list", walks, failure or _ANSWERED, started, bucket="read", tokens=limits.list_cost)
            if isinstance(page, Failure):
                break
            for order in page.orders:
                walk = missing.pop(order.order_id, None)
                if walk is not None:
                    at = self._now(walk, ago_s=time.monotonic() - started)
                    learned = after_read(walk.case, order, at, self._lags)
                    conclusions.append(self._conclude(walk, learned))
            cursor = page.cursor
            if not cursor or len(missing) * limits.read_cost <= limits.list_cost:
                break
            walks[0].taken_at = time.monotonic()
            paid_s = self._pacer.take("read", limits.list_cost)
        # What is not among the canceled ones is executed, or shown late: that only its own read-back tells.
        return conclusions + [self._give_back(walk, 0.0, path="read") for walk in missing.values()]

    def _conclude(self, walk: _Walk, learned: Verdict | Next) -> Conclusion:
        if isinstance(learned, Verdict):
            return self._settle(walk, learned)
        walk.case = learned.case
        return self._give_back(walk, _draw_pause_s(learned, walk))

    # -- both

    def engine_now(self) -> str | None:
        """This moment on the clock that stamps orders, as a claim notes it; None while that is not known."""
        engine = self._exchange.engine_now()
        return None if engine is None else f"{engine.low_ms:.0f}:{engine.high_ms:.0f}"

    def _settle(self, walk: _Walk, verdict: Verdict) -> Conclusion:
        """The outcome; or the entry for workers with another key, which may do or see more than this."""
        left = None
        if verdict.is_of_the_key:
            left = self._left_to_others(walk, walk.case.left_to_others(walk.key_id, self._now(walk)))
        return left or Settle(walk.entry, _result(walk, verdict))

    def _left_to_others(self, walk: _Walk, case: Case) -> Conclusion | None:
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
            return self._give_back(walk, LEFT_OVERDUE_S)
        if not other:
            return None
        walk.case = case
        pause_s = LEFT_OVERDUE_S if walk.is_overdue() else LEFT_TO_OTHERS_S
        given = self._give_back(walk, pause_s * random.uniform(1.0, 1.5))  # noqa: S311 - jitter
        return replace(given, for_key=other) if isinstance(given, GiveBack) else given

    def _case(self, entry: Entry, key_id: str, clocks: Clocks) -> Case:
        """What is known of an entry, as a worker with this key goes on with it."""
        case = Case.from_json(entry.request, entry.learned).asked_by(key_id)
        if not entry.interrupted:
            return case
        attempt = Attempt(entry.first_sent_age_ms, _span(entry.first_sent_ms))
        return case.interrupted(attempt, Instant(clocks.front_ms, round(entry.age_s * 1000), clocks.engine))

    def _clocks(self) -> Clocks:
        return Clocks(self._exchange.now_ms(), self._exchange.engine_now())

    def _now(self, walk: _Walk, *, ago_s: float = 0.0) -> Instant:
        return walk.instant(self._clocks(), ago_s=ago_s)

    def _give_back(self, walk: _Walk, pause_s: float, path: str = "") -> Conclusion:
        """The entry for the store again, at its old place while the breaker is open; or too old for it."""
        learned = walk.case.to_json(walk.key_id)
        if walk.entry.age_s > self._cancel_max_age_s and walk.entry.reported:  # nobody is left without a word
            return GiveUp(walk.entry, learned)
        return GiveBack(
            walk.entry, learned, pause_s if self._breaker.is_closed else 0.0, path or _bucket(walk.case)
        )


class ReadSlots:
    """How many senders of a process may read back at a time: half of them, so that new cancels find one."""

    def __init__(self, senders: int) -> None:
        self._most = max(senders // 2, 1)
        self._is_lone = senders == 1
        self._lock = threading.Lock()
        self._taken = 0
        self._last_read = False

    @property
    def free(self) -> int:
        """How many more may begin."""
        return max(self._most - self._taken, 0)

    @property
    def after_s(self) -> float:
        """How much later than it is a read-back counts as due; a lone sender takes turns."""
        if self._is_lone:
            return READS_LAST_S if self._last_read else 0.0
        return READS_AFTER_S

    @contextmanager
    def of(self, reads: bool) -> Iterator[ReadSlot]:  # noqa: FBT001 - the claim is one of reads, or not
        """The slot of a sender for the body's time; of one that ``reads``, it is taken."""
        slot = ReadSlot(self)
        self._last_read = reads
        if reads:
            self.take(slot, at_most=math.inf)
        try:
            yield slot
        finally:
            with self._lock:
                self._taken -= slot.is_taken

    def take(self, slot: ReadSlot, *, at_most: float) -> bool:
        """Takes the slot, unless so many are taken."""
        with self._lock:
            if self._taken < at_most:
                slot.is_taken = True
                self._taken += 1
            return slot.is_taken

    def may_take(self, slot: ReadSlot) -> bool:
        """Takes a slot for a sender that came to cancel and has to read back."""
        return self.take(slot, at_most=self._most)


class ReadSlot:
    """Whether one sender may read back."""

    def __init__(self, slots: ReadSlots) -> None:
        self._slots = slots
        self.is_taken = False

    def may_read(self) -> bool:
        """Whether it has its slot, or gets one now."""
        return self.is_taken or self._slots.may_take(self)


class BatchSize:
    """How many orders one call may hold, as far as the exchange has let us know."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = most
        self._refused = most + 1
        self._refused_until = 0.0
        self._alone_until = 0.0

    @property
    def limit(self) -> int:
        """How many the next call may hold."""
        if self._limit == 1 and time.monotonic() >= self._alone_until:
            return min(2, self._most)  # single calls teach nothing about size
        return self._limit

    def accepted(self, size: int) -> None:
        """A batch of this size went through: the next may be larger, below what was refused lately."""
        if size >= self._limit:
            ceiling = self._refused - 1 if time.monotonic() < self._refused_until else self._most
            self._limit = min(max(size, (size + ceiling + 1) // 2), ceiling)

    def refused(self, size: int) -> None:
        """A batch of this size was refused: it is tried in halves."""
        say(log, LogEvent.BATCH_REFUSED, count=size)
        if size <= NEVER_TOO_MANY:
            # One of them spoils the call, and those before: alone, it is told so, and is out of the way.
            self._limit, self._alone_until = 1, time.monotonic() + ALONE_S
            self._refused, self._refused_until = self._most + 1, 0.0
        elif time.monotonic() >= self._alone_until:  # (until then: sent before, with the one that spoils it)
            now = time.monotonic()
            # Several senders ask at once: news of a larger size comes after that of a smaller one.
            self._refused = min(size, self._refused) if now < self._refused_until else size
            self._refused_until = now + REFUSED_SIZE_STANDS_S
            self._limit = min(self._limit, max(size // 2, 1))

    def spoiler_found(self) -> None:
        """An order was refused by itself: what was refused before may have been its doing, not the size's."""
        self._refused, self._refused_until = self._most + 1, 0.0


# What the breaker is told of a batch that was answered, whatever it says of its orders.
_ANSWERED = Canceled(Decimal(0), None, None)


@dataclass(frozen=True, slots=True)
class Clocks:
    """The exchange's two clocks at one moment, read once for all orders of a call; see Instant."""

    front_ms: int
    engine: Span | None


class _Walk:
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
        self.paid = False  # the tokens of its next call are taken
        self.taken_at = since  # when those of its latest call were (monotonic)
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
        return Instant(clocks.front_ms - round(ago_ms), self.age_ms(ago_s=ago_s), engine)

    def is_overdue(self) -> bool:
        """Whether the waiters are told ``unresolved``, now or already: no hurry any more, and no end."""
        return self.entry.reported or self._deadline - time.monotonic() < WORTH_A_CALL_S

    def time_left_s(self) -> float:
        """How long a call may take."""
        return math.inf if self.is_overdue() else self._deadline - time.monotonic()


class _NotKnownYet(Exception):  # noqa: N818 - no error, the reason to ask again
    """The outcome is not known yet: the one exception that is asked again for."""

    def __init__(self, walk: _Walk, learned: Next, *, abandoned: bool = False) -> None:
        super().__init__(walk.entry.order_id)
        self.walk = walk
        self.learned = learned
        self.abandoned = abandoned
        self.pause_s: float | None = None


def _raised(state: RetryCallState) -> _NotKnownYet:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, _NotKnownYet)
    return error


def _draw_pause_s(learned: Next, walk: _Walk) -> float:
    if learned.pause is Pause.NONE:
        return learned.at_least_s
    most_s = BACK_OFF_MOST_READ_S if learned.case.step.reads else BACK_OFF_MOST_S
    if walk.is_overdue():
        most_s = BACK_OFF_MOST_OVERDUE_S
    ceiling_s = min(BACK_OFF_FIRST_S * 2.0 ** min(learned.case.back_offs - 1, 20), most_s)
    pause_s = random.uniform(0, ceiling_s)  # noqa: S311 - jitter, not a secret
    return max(pause_s, learned.at_least_s)


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


def _result(walk: _Walk, verdict: Verdict) -> CancelResult:
    order, entry = verdict.order, walk.entry
    # A canceled order has nothing left by definition ("zeroed"), also where the reply shows no order.
    zeroed = Decimal(0) if verdict.outcome is Outcome.CANCELED else None
    return CancelResult(
        order_id=entry.order_id,
        outcome=verdict.outcome,
        status=verdict.status,
        reduced_by=verdict.reduced_by,
        fill_count=order.fill_count if order else None,
        remaining_count=order.remaining_count if order else zeroed,
        confirmed_by=verdict.confirmed_by,
        attempts=walk.case.attempts,
        requested_at=entry.requested_at,
        exchange_ts_ms=verdict.exchange_ts_ms,
        error=verdict.problem,
        order=order.fields() if order else None,
    )
