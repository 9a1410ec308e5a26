"""The desk: sees claimed cancels through at the exchange until their outcome is known and stored.

A woken worker calls :meth:`Desk.work`: it claims what is due, asks the exchange, follows the outcome rules,
concludes, and goes on until nothing is due. tenacity owns asking again: short pauses are waited out with
the order in hand; before a long one the order goes back into the book, due when the pause ends.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal

from tenacity import RetryCallState, Retrying, retry_if_exception_type

from worker.book import (
    Accepted,
    Book,
    BookError,
    Conclusion,
    Entry,
    GiveBack,
    GiveUp,
    Overdue,
    Progress,
    Settle,
)
from worker.dialects import Canceled, Trouble
from worker.exchange import Exchange
from worker.gate import Gate, GateState
from worker.orders import CancelRequest, CancelResult, Lane, Order, Outcome, Problem, utc_text
from worker.outcomes import Case, Next, Pause, Step, Verdict, after_cancel, after_read

log = logging.getLogger(__name__)

# Back-off with full jitter: up to 50 ms at first (reads lag writes by about 360 ms), doubling.
BACK_OFF_FIRST_S = 0.05
BACK_OFF_MOST_S = 2.0  # while somebody waits for the result
BACK_OFF_MOST_READ_S = 0.5  # reads catch up within the read lag, a second or two
BACK_OFF_MOST_OVERDUE_S = 30.0  # once the waiters were told "unresolved"
# Longer pauses are spent in the book: a hand full of waiting orders would keep risk out.
PATIENCE_S = 0.25
# A hand with nothing to do stays for what is due this soon; beyond that, the sweep wakes somebody up.
LINGER_S = 1.0
# A vanished worker's orders are due again after this; kept alive while the hand lives.
LEASE_S = 2.5
LEASE_EXTEND_EVERY_S = 0.5
# A call with less time than this is not worth starting for somebody who then hears "unresolved".
WORTH_A_CALL_S = 0.05
# What became claimable without anybody coming is noticed after this, by the next sweep.
SWEEP_PATIENCE_S = 1.0
REPORT_AT_ONCE = 100
STORE_AGAIN_EVERY_S = 0.2
STORE_WHEN_STOPPING_S = 3.0
REFUSED_ID_MAX_CHARS = 1000  # an id beyond that is an attack on Redis' memory, and nobody waits for it
LOOK_FOR_RESULTS_EVERY_S = 0.5


class Desk:
    """Works the book's open cancels at the exchange; one per process, shared by its threads."""

    def __init__(
        self,
        book: Book,
        exchange: Exchange,
        *,
        cancel_deadline_s: float,
        cancel_max_age_s: float,
        read_lag_s: float,
        lanes: Sequence[Lane] = tuple(Lane),
        hands: int = 1,
        call_hand: Callable[[Lane], None] = lambda _lane: None,
        name: str = "",
    ) -> None:
        self._book = book
        self._exchange = exchange
        self._cancel_deadline_s = cancel_deadline_s
        self._cancel_max_age_s = cancel_max_age_s
        self._read_lag_ms = round(read_lag_s * 1000)
        self._lanes = lanes
        self._hands = _Hands(hands)
        self._call_hand = call_hand
        self._stopping = threading.Event()
        self._leases = _Leases(book)
        self._name = name
        self._gate = Gate(exchange.warm_up, self._tell_gate)

    def accept(self, requests: Sequence[CancelRequest], *, lane: Lane, reply_to: str = "") -> Accepted:
        """Enters the requests of a message into the book; raises BookError only when stopping."""
        while True:
            try:
                return self._book.accept(
                    requests, lane=lane, default_deadline_s=self._cancel_deadline_s, reply_to=reply_to
                )
            except BookError as error:
                log.warning("a message cannot be entered yet: %s", error)
                if self._stopping.wait(STORE_AGAIN_EVERY_S):
                    raise

    def refuse(self, result: CancelResult) -> None:
        """Stores the outcome of a request that cannot be understood where its waiter looks, if it can."""
        if result.order_id is not None and len(result.order_id) <= REFUSED_ID_MAX_CHARS:
            self._book.refuse(result)

    def keep_unreadable(self, message: str) -> None:
        """Keeps a message that nobody can understand, for inspection."""
        self._book.keep_unreadable(message)

    def work(self) -> None:
        """Claims and sees through what is due, risk first, until nothing is due or soon will be."""
        try:
            with self._hands.busy():
                self._work()
        except BookError as error:
            log.warning("no work without the book: %s", error)  # the sweep wakes somebody up when it is back

    def _work(self) -> None:
        called = False
        while not self._stopping.is_set():
            if not self._gate.is_open and not self._gate.keep_watch(self._stopping):
                return
            asked = time.monotonic()
            claim = self._book.claim(self._lanes, at_most=1, lease_s=LEASE_S, exchange_ms=self._exchange_ms())
            for entry in claim.entries:
                more_is_due = claim.next_due_s == 0.0
                if more_is_due and not called and not claim.waiting_messages and self._hands.any_idle:
                    called = True
                    self._call_hand(entry.lane)
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
            try:
                for result in self._book.await_records(missing, timeout_s=LOOK_FOR_RESULTS_EVERY_S):
                    found[str(result.order_id)] = result
            except BookError as error:
                log.warning("no results to be seen: %s", error)
                self._stopping.wait(STORE_AGAIN_EVERY_S)
            missing = [order_id for order_id in missing if order_id not in found]
        return found

    def tell_overdue(self) -> None:
        """Tells the waiters of overdue cancels that they are unresolved; the work on them goes on."""
        while overdue := self._book.overdue(at_most=REPORT_AT_ONCE):
            self._book.report([_unresolved(each) for each in overdue])
            if len(overdue) < REPORT_AT_ONCE:
                break

    def lanes_to_wake(self) -> list[Lane]:
        """The lanes where something can be claimed and nobody is coming."""
        if not self._gate.is_open and self._gate.is_watched:
            return []  # the hand on watch goes on when the exchange is back
        return self._book.lanes_to_wake(tuple(Lane), patience_s=SWEEP_PATIENCE_S)

    def stop(self) -> None:
        """Ends every :meth:`work` after the call it is in; what is in hand goes back into the book."""
        self._stopping.set()

    def _tell_gate(self, state: GateState) -> None:
        try:
            self._book.note_gate(self._name, state.value)
        except BookError as error:
            log.warning("the gate's state cannot be shown: %s", error)

    def _exchange_ms(self) -> int | None:
        return None if self._exchange.skew_ms is None else self._exchange.now_ms()

    def _see_through(self, entry: Entry) -> Conclusion:
        """Asks, and asks again after short pauses, until the outcome is known or the pause is a long one."""
        walk = _Walk(self._case_of(entry), entry)
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
        return Settle(entry, _result(entry, walk.case, verdict))

    def _take_step(self, walk: _Walk) -> Verdict:
        """One signed exchange and what follows from it; raises _NotKnownYet."""
        entry, case = walk.entry, walk.case
        if not self._leases.is_held(entry):
            # Frozen past the lease: another hand is at it, and what this one knows is old.
            raise _NotKnownYet(walk, Next(case, Pause.NONE), abandoned=True)
        answer: Canceled | Order | Trouble
        if case.step is Step.CANCEL:
            case = case.sending(self._exchange_ms())
            answer = self._exchange.cancel(entry.order_id, case.routing, time_left_s=walk.time_left_s())
            learned = after_cancel(case, answer, self._exchange.now_ms())
        else:
            answer = self._exchange.read_order(entry.order_id, time_left_s=walk.time_left_s())
            learned = after_read(case, answer, self._exchange.now_ms(), read_lag_ms=self._read_lag_ms)
        self._gate.note(answer)
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
        most_s = BACK_OFF_MOST_READ_S if walk.case.step is Step.READ_BACK else BACK_OFF_MOST_S
        if walk.is_overdue():
            most_s = BACK_OFF_MOST_OVERDUE_S
        ceiling_s = min(BACK_OFF_FIRST_S * 2.0 ** min(learned.case.back_offs - 1, 20), most_s)
        pause_s = random.uniform(0, ceiling_s)  # noqa: S311 - jitter, not a secret
        return max(pause_s, learned.at_least_s)

    def _enough_for_now(self, state: RetryCallState) -> bool:
        return (
            _raised(state).abandoned
            or state.upcoming_sleep > PATIENCE_S
            or self._stopping.is_set()
            or not self._gate.is_open
        )

    def _give_back(self, walk: _Walk, pause_s: float) -> Conclusion:
        """The entry for the book again, at its old place while the gate is closed; or too old for it."""
        learned = walk.case.to_json()
        if walk.entry.age_s > self._cancel_max_age_s:
            return GiveUp(walk.entry, learned)
        return GiveBack(walk.entry, learned, pause_s if self._gate.is_open else 0.0)

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
        if not done:
            log.warning("%s: another hand has taken over", entry.order_id)
        elif isinstance(conclusion, Settle):
            result = conclusion.result
            log.log(
                logging.INFO if result.outcome.final else logging.WARNING,
                "%s: %s after %d attempts%s",
                entry.order_id,
                result.outcome.value,
                result.attempts,
                f" ({result.error.code})" if result.error else "",
            )
        elif isinstance(conclusion, GiveUp):
            log.error("%s: given up unresolved after %.0f s", entry.order_id, entry.age_s)


_NO_ANSWER_YET = Problem("no_answer", "the deadline passed before the exchange could be asked")


class _Walk:
    """One entry in hand: what is known so far, and by when its waiters want to hear."""

    def __init__(self, case: Case, entry: Entry) -> None:
        self.case = case
        self.entry = entry
        self._deadline = time.monotonic() + entry.deadline_left_s

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


def _unresolved(overdue: Overdue) -> CancelResult:
    progress = Progress.parse(overdue.learned)
    return CancelResult(
        order_id=overdue.order_id,
        outcome=Outcome.UNRESOLVED,
        attempts=progress.attempts,
        requested_at=overdue.requested_at,
        error=progress.last_problem or _NO_ANSWER_YET,
    )


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


class _Hands:
    """How many of this process' threads are at work in the book."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._lock = threading.Lock()
        self._busy = 0

    @property
    def any_idle(self) -> bool:
        """Whether one more message would find a thread."""
        return self._busy < self._number

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Counts the body's thread as busy."""
        with self._lock:
            self._busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1
