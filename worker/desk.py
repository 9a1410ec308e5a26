"""The desk: sees claimed cancels through at the exchange until their outcome is known and stored.

A woken worker calls :meth:`Desk.work`: it claims what is due, asks the exchange, follows the outcome rules,
concludes, and goes on until nothing is due. tenacity owns asking again: short pauses are waited out with
the order in hand; before a long one the order goes back into the book, due when the pause ends.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal

from tenacity import RetryCallState, Retrying, retry_if_exception_type

from worker import records
from worker.book import Accepted, Book, BookError, Conclusion, Entry
from worker.exchange import Exchange
from worker.orders import CancelRequest, CancelResult, Lane, Outcome, Problem, utc_text
from worker.outcomes import Case, Next, Pause, Step, Verdict, after_cancel, after_read

log = logging.getLogger(__name__)

# Back-off with full jitter: up to 50 ms at first (reads lag writes by about 360 ms), doubling.
BACK_OFF_FIRST_S = 0.05
BACK_OFF_MOST_S = 2.0  # while somebody waits for the result
BACK_OFF_MOST_OVERDUE_S = 30.0  # once the waiters were told "unresolved"
# Longer pauses are spent in the book: a hand full of waiting orders would keep risk out.
PATIENCE_S = 0.25
# A hand with nothing to do stays for what is due this soon; beyond that, the sweep wakes somebody up.
LINGER_S = 1.0
# A vanished worker's orders are due again after this; kept alive while the hand lives.
LEASE_S = 2.5
LEASE_EXTEND_EVERY_S = 0.5
STORE_AGAIN_EVERY_S = 0.2
STORE_WHEN_STOPPING_S = 3.0
REFUSED_ID_MAX_CHARS = 1000  # an id beyond that is an attack on Redis' memory, and nobody waits for it
LOOK_FOR_RESULTS_EVERY_S = 0.5


class Desk:
    """Works the book's open cancels at the exchange; one per process, shared by its threads."""

    def __init__(
        self, book: Book, exchange: Exchange, *, cancel_deadline_s: float, read_lag_s: float
    ) -> None:
        self._book = book
        self._exchange = exchange
        self._cancel_deadline_s = cancel_deadline_s
        self._read_lag_ms = round(read_lag_s * 1000)
        self._stopping = threading.Event()
        self._leases = _Leases(book)

    def accept(self, requests: Sequence[CancelRequest], *, lane: Lane, reply_to: str = "") -> Accepted:
        """Enters the requests of a message into the book."""
        return self._book.accept(
            requests, lane=lane, default_deadline_s=self._cancel_deadline_s, reply_to=reply_to
        )

    def refuse(self, result: CancelResult) -> None:
        """Stores the outcome of a request that cannot be understood where its waiter looks, if it can."""
        if result.order_id is not None and len(result.order_id) <= REFUSED_ID_MAX_CHARS:
            self._book.refuse(result)

    def work(self, lanes: Sequence[Lane] = tuple(Lane)) -> None:
        """Claims and sees through what is due, risk first, until nothing is due or soon will be."""
        while not self._stopping.is_set():
            exchange_ms = None if self._exchange.skew_ms is None else self._exchange.now_ms()
            asked = time.monotonic()
            claim = self._book.claim(lanes, at_most=1, lease_s=LEASE_S, exchange_ms=exchange_ms)
            for entry in claim.entries:
                with self._leases.holding(entry, since=asked):
                    self._conclude(self._see_through(entry))
            if not claim.entries:
                if claim.next_due_s is None or claim.next_due_s > LINGER_S:
                    return
                self._stopping.wait(max(claim.next_due_s, 0.001))

    def work_until_settled(self, requests: Sequence[CancelRequest]) -> dict[str, CancelResult]:
        """Works until each of these accepted requests has a record; fewer only when stopping."""
        found: dict[str, CancelResult] = {}
        missing = [request.order_id for request in requests]
        while missing and not self._stopping.is_set():
            self.work()
            for result in records.await_each(self._book.server, missing, timeout_s=LOOK_FOR_RESULTS_EVERY_S):
                found[str(result.order_id)] = result
            missing = [order_id for order_id in missing if order_id not in found]
        return found

    def stop(self) -> None:
        """Ends every :meth:`work` after the call it is in; what is in hand goes back into the book."""
        self._stopping.set()

    def _see_through(self, entry: Entry) -> Conclusion:
        """Asks, and asks again after short pauses, until the outcome is known or the pause is a long one."""
        walk = _Walk(self._case_of(entry), entry, time.monotonic() + entry.deadline_left_s)
        retrying = Retrying(
            retry=retry_if_exception_type(_NotKnownYet),
            wait=self._pause_s,
            stop=self._enough_for_now,
            sleep=self._wait,
            reraise=True,
        )
        try:
            verdict = retrying(self._take_step, walk)
        except _NotKnownYet as open_still:
            return self._give_back(walk, self._pause_after(open_still))
        return Conclusion(entry, _result(entry, walk.case, verdict))

    def _take_step(self, walk: _Walk) -> Verdict:
        """One signed exchange and what follows from it; raises _NotKnownYet."""
        entry, case = walk.entry, walk.case
        left_s = walk.deadline - time.monotonic()
        if not self._leases.is_held(entry):
            # Frozen past the lease: another hand is at it, and what this one knows is old.
            raise _NotKnownYet(walk, Next(case, Pause.NONE), abandoned=True)
        if left_s <= 0 and not entry.reported:
            raise _NotKnownYet(walk, Next(case, Pause.NONE))
        time_left_s = float("inf") if entry.reported else left_s
        if case.step is Step.CANCEL:
            skew_known = self._exchange.skew_ms is not None
            case = case.sending(self._exchange.now_ms() if skew_known else None)
            answer = self._exchange.cancel(entry.order_id, case.routing, time_left_s=time_left_s)
            learned = after_cancel(case, answer, self._exchange.now_ms())
        else:
            seen = self._exchange.read_order(entry.order_id, time_left_s=time_left_s)
            learned = after_read(case, seen, self._exchange.now_ms(), read_lag_ms=self._read_lag_ms)
        walk.case = case if isinstance(learned, Verdict) else learned.case
        if isinstance(learned, Next):
            raise _NotKnownYet(walk, learned)
        return learned

    def _case_of(self, entry: Entry) -> Case:
        case = Case.from_json(entry.request, entry.learned)
        if entry.interrupted:
            case = case.interrupted(entry.first_sent_ms, self._exchange.now_ms())
        return case

    def _wait(self, seconds: float) -> None:
        self._stopping.wait(seconds)

    def _pause_s(self, state: RetryCallState) -> float:
        """How long to wait before the next step, for tenacity; drawn once per answer."""
        return self._pause_after(_raised(state))

    def _pause_after(self, open_still: _NotKnownYet) -> float:
        if open_still.pause_s is None:
            open_still.pause_s = self._draw_pause_s(open_still)
        return open_still.pause_s

    def _draw_pause_s(self, open_still: _NotKnownYet) -> float:
        learned, walk = open_still.learned, open_still.walk
        if learned.pause is Pause.NONE:
            return 0.0
        most_s = BACK_OFF_MOST_OVERDUE_S if walk.entry.reported else BACK_OFF_MOST_S
        ceiling_s = min(BACK_OFF_FIRST_S * 2.0 ** min(learned.case.back_offs - 1, 20), most_s)
        pause_s = random.uniform(0, ceiling_s)  # noqa: S311 - jitter, not a secret
        return max(pause_s, learned.at_least_s)

    def _enough_for_now(self, state: RetryCallState) -> bool:
        open_still = _raised(state)
        overdue = not open_still.walk.entry.reported and time.monotonic() >= open_still.walk.deadline
        return open_still.abandoned or overdue or state.upcoming_sleep > PATIENCE_S or self._stopping.is_set()

    def _give_back(self, walk: _Walk, pause_s: float) -> Conclusion:
        """The entry for the book again; the waiters are told once their deadline has passed."""
        entry = walk.entry
        left_s = walk.deadline - time.monotonic()
        learned = walk.case.to_json()
        if entry.reported:
            return Conclusion(entry, None, pause_s, learned)
        if left_s > 0:
            return Conclusion(entry, None, min(pause_s, left_s), learned)
        verdict = Verdict(
            Outcome.UNRESOLVED, problem=walk.case.last_problem or _NO_ANSWER_YET, order=walk.case.order
        )
        return Conclusion(entry, _result(entry, walk.case, verdict), pause_s, learned)

    def _conclude(self, conclusion: Conclusion) -> None:
        """Stores and tells; asks Redis until it is done, because the exchange will not say it twice."""
        entry = conclusion.entry
        give_up = None
        while True:
            try:
                [done] = self._book.conclude([conclusion])
                break
            except BookError as error:
                log.warning("the result cannot be stored yet: %s", error, extra={"order_id": entry.order_id})
                if self._stopping.is_set():
                    give_up = give_up or time.monotonic() + STORE_WHEN_STOPPING_S
                    if time.monotonic() > give_up:
                        return  # still in the book: whoever claims it next finds out what became of it
                time.sleep(STORE_AGAIN_EVERY_S)
        result = conclusion.result
        if not done:
            log.warning("another hand has taken over", extra={"order_id": entry.order_id})
        elif result is not None:
            level = logging.INFO if result.outcome.final else logging.WARNING
            fields = {
                "order_id": entry.order_id,
                "outcome": result.outcome.value,
                "attempts": result.attempts,
                "lane": entry.lane.value,
                "code": result.error and result.error.code,
            }
            log.log(level, "%(order_id)s: %(outcome)s", fields, extra=fields)


_NO_ANSWER_YET = Problem("no_answer", "the deadline passed before the exchange could be asked")


class _Walk:
    """One entry in hand: what is known so far, and by when its waiters want to hear."""

    def __init__(self, case: Case, entry: Entry, deadline: float) -> None:
        self.case = case
        self.entry = entry
        self.deadline = deadline


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


def _result(entry: Entry, case: Case, verdict: Verdict) -> CancelResult:
    order = verdict.order
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
        attempts=case.attempts,
        requested_at=entry.requested_at,
        settled_at=utc_text(time.time()),
        exchange_ts_ms=verdict.exchange_ts_ms,
        error=verdict.problem,
        order=order.raw if order else None,
    )


class _Leases:
    """Keeps the leases of what is in hand alive, and knows which ones have run out.

    Judged by this process' own monotonic clock from before each call: a host that was frozen finds its
    leases over when it wakes, before it asks anybody.
    """

    def __init__(self, book: Book) -> None:
        self._book = book
        self._lock = threading.Lock()
        self._valid_until: dict[Entry, float] = {}
        self._keeper: threading.Thread | None = None

    @contextmanager
    def holding(self, entry: Entry, *, since: float) -> Iterator[None]:
        """Keeps the entry's lease, claimed at ``since`` (monotonic), alive for the body's time."""
        with self._lock:
            self._valid_until[entry] = since + LEASE_S
            if self._keeper is None:
                self._keeper = threading.Thread(target=self._keep, name="lease-keeper", daemon=True)
                self._keeper.start()
        try:
            yield
        finally:
            with self._lock:
                del self._valid_until[entry]

    def is_held(self, entry: Entry) -> bool:
        """Whether no other hand can have the entry yet."""
        return time.monotonic() < self._valid_until[entry]

    def _keep(self) -> None:
        while True:
            time.sleep(LEASE_EXTEND_EVERY_S)
            with self._lock:
                entries = list(self._valid_until)
            if not entries:
                continue
            asked = time.monotonic()
            try:
                held = self._book.extend(entries, lease_s=LEASE_S)
            except BookError as error:
                log.warning("leases cannot be extended: %s", error)
                continue
            with self._lock:
                for entry, still in zip(entries, held, strict=True):
                    if entry in self._valid_until:
                        self._valid_until[entry] = asked + LEASE_S if still else 0.0
