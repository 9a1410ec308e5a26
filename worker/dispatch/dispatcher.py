"""The dispatcher: takes what is due out of the store, has it executed, and puts it back concluded.

A woken sender calls :meth:`Dispatcher.work`: it claims one call's worth of what is due, risk first, and
goes on until nothing is due. Whatever arrives or runs out of its lease meanwhile is seen by the next claim,
which is one step with storing what the last one completed.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.store.cancels import CancelStore, NothingClaimed
from kalshi_cancel.store.pending import (
    Claim,
    ClaimRequest,
    Conclusion,
    RetryLater,
    Settle,
    WakeUp,
)
from kalshi_cancel.store.rate_limits import Pacer
from kalshi_cancel.store.scripts import StoreError, say_failed
from kalshi_cancel.store.steps import Snapshot
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import Seldom, about, say
from worker.dispatch.breaker import BreakerState, CircuitBreaker
from worker.dispatch.completions import Completions
from worker.dispatch.events import BreakerMoved, Claimed, Concluded, LeaseLost
from worker.dispatch.executor import Completion, Executor
from worker.dispatch.leases import LEASE_S, Leases
from worker.dispatch.planner import plan
from worker.dispatch.settings import ALONE, DispatchSettings, Neighbors

log = logging.getLogger(__name__)

# A sender with nothing to do stays for what is due this soon; beyond that, the sweeper wakes somebody up.
LINGER_S = 1.0
# Waiting for tokens takes at least this: what comes together meanwhile goes out in one call.
GATHER_S = 0.01
# A sender that was called comes at once; if none has come by then, the wake-up was lost.
CALL_AGAIN_S = 0.25
# An idle worker counts as idle for so long, and says it anew every second (runtime/services).
IDLE_S = 3.0
STORE_AGAIN_EVERY_S = 0.2
STORE_WHEN_STOPPING_S = 3.0
NOT_STORED_MOST = 1000  # orders of which it is remembered that this was said

# What one sender at a time waits for: whether tokens, and whether of all lanes.
_WaitsFor = tuple[bool, bool]


class Pool(Protocol):
    """The free senders of a process, as its dispatcher needs them."""

    @property
    def listens(self) -> bool:
        """Whether a sender listens for wake-ups."""

    def draft(self) -> Sequence[Any]:
        """Free senders that will be told at once what to do; one always stays."""

    def dismiss(self, others: Sequence[Any], given: Sequence[WakeUp]) -> None:
        """Gives the first of them these claims; the others are free again."""


class Dispatcher:
    """Works the store's open cancels at the exchange; one per process, shared by its threads."""

    def __init__(
        self,
        store: CancelStore,
        exchange: Exchange,
        pacer: Pacer,
        settings: DispatchSettings,
        *,
        neighbors: Neighbors = ALONE,
        completions: Completions | None = None,
    ) -> None:
        self._store = store
        self._emit = neighbors.emit
        self._pacer = pacer
        self._risk_reserve = settings.risk_reserve
        self._lanes = settings.lanes
        self._completions = completions or Completions()
        self._room = _Room(settings.senders)
        self._for_risk = (Lane.RISK,) if Lane.RISK in settings.lanes else settings.lanes
        # One sender is left to risk, whatever the others are at.
        self._for_all_lanes = _Room(settings.senders)
        self._neighbors = neighbors
        self.stopping = threading.Event()
        self._staying: defaultdict[_WaitsFor, threading.Lock] = defaultdict(threading.Lock)
        self._called_at = -math.inf
        self._busy = _Busy()
        self._snapshot = Snapshot(), time.monotonic()  # what the last turn has left, and when
        self._is_idle = False  # nothing was due, and nothing is under way
        self.pool: Pool = _Nobody()
        self._no_store = Seldom()
        self._not_stored: set[str] = set()
        self._leases = Leases(store, lost=lambda entries: neighbors.emit(LeaseLost(entries)))
        self.breaker = CircuitBreaker(
            lambda state: exchange.warm_up() if state is BreakerState.KEY_REFUSED else exchange.look(),
            self._breaker_moved,
        )
        self._executor = Executor(
            exchange,
            pacer,
            self.breaker,
            self._leases,
            self.stopping,
            settings=settings,
            neighbors=neighbors,
        )

    def work(self) -> None:
        """Works as a message asks for it; see :meth:`serve`.

        Returns at once when enough threads are at it: one stays free for messages that are to be entered.
        """
        with self._room.one_more() as wanted:
            if not wanted:
                return
            try:
                while later_s := self.serve():
                    self.stopping.wait(later_s)
            except StoreError as error:  # the message has done its part, and nobody else is to fail of it
                say_failed(log, error, "claim cancels", seldom=self._no_store)

    def serve(
        self,
        *,
        wake_up: WakeUp | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> float:
        """Claims and sees through what is due, risk first, until nothing is due or soon will be.

        Begins with what the wake-up carries. Calls ``beat`` again and again meanwhile. In how many seconds to
        serve again, unless somebody calls: another sender has the turn (0.0: nobody has to).
        """
        try:
            self._completions.leave(self._granted(wake_up))
            return self._work(beat)
        except StoreError as error:  # the sweeper wakes somebody up when Redis is back
            if not error.can_pass:
                raise
            say_failed(log, error, "claim cancels", seldom=self._no_store)
            return 0.0

    def idle_offer(self) -> ClaimRequest | None:
        """How a lone cancel may be claimed for this process at the moment; None: it is not idle."""
        is_idle = self._is_idle and self.breaker.is_closed and not self.stopping.is_set()
        return self._claim_request(self._lanes, calls=1) if is_idle else None

    def finish(self, claims: Sequence[Claim]) -> None:
        """Once no sender is at work any more: returns what nobody came to, and stores what is left."""
        for claim in claims:
            self._completions.leave(self._executor.return_claim(claim))
        self._put_down_all()

    def _granted(self, wake_up: WakeUp | None) -> Completion:
        """What becomes of a claim that came with a wake-up; too old, it is left to its lease.

        It goes back while the breaker is open: it may have opened since the worker was idle.
        """
        if wake_up is None or wake_up.claim is None:
            return Completion()
        self._is_idle = False
        with self._for_all_lanes.one_more(is_counted=wake_up.is_counted):
            if time.monotonic() > wake_up.since + LEASE_S / 2:  # nobody was listening
                return Completion()
            if not self.breaker.is_closed:
                return self._executor.return_claim(wake_up.claim)
            return self._see_through(wake_up.claim, wake_up.since)

    def _see_through(self, claim: Claim, since: float) -> Completion:
        self._leases.hold(claim.entries, since=since)
        self._emit(Claimed(claim.entries))
        with self._busy:
            return self._execute(claim, since=since)

    @property
    def lanes_with_room(self) -> tuple[Lane, ...]:
        """The lanes that one more sender would serve: risk alone, if all others are at work."""
        return self._lanes if self._for_all_lanes.any_idle else self._for_risk

    def _work(self, beat: Callable[[], None]) -> float:
        """Takes turn after turn until nothing is due, or it is another's turn; as :meth:`serve`."""
        try:
            while not self.stopping.is_set():
                beat()
                if not self.breaker.is_closed:
                    self._put_down_all()
                    if not self.breaker.keep_watch(self.stopping, beat):
                        return 0.0
                if later_s := self._completions.take_turn():
                    return later_s
                with self._for_all_lanes.one_more() as is_room:
                    claim = self._claim_and_send(self._lanes if is_room else self._for_risk)
                if claim is None or claim.entries:
                    continue
                wait_s, waits_for = _until_more(claim), (claim.tokens_in_s > 0, is_room)
                if wait_s is None or not self._stay(wait_s, waits_for):
                    return 0.0
        finally:
            if self.stopping.is_set():
                self._put_down_all()
        return 0.0

    def _claim_and_send(self, lanes: tuple[Lane, ...]) -> Claim | None:
        """One turn, and what was claimed in it seen through; None: nothing could be claimed yet."""
        try:
            turned = self._turn(lanes)
            if turned is None:
                return None
            claim, asked = turned
            self._completions.claimed(len(claim.entries), is_more=claim.is_more)
            if claim.entries:
                self._completions.leave(self._see_through(claim, asked))
            return claim
        finally:
            self._completions.pass_on()

    def _execute(self, claim: Claim, *, since: float) -> Completion:
        """What becomes of a claim; after a defect of ours its entries are due again by their leases."""
        try:
            return self._executor.execute(claim, since=since)
        except BaseException as error:  # the lease brings them back, also where this thread ends
            self._leases.release(claim.entries)
            if not isinstance(error, Exception):
                raise
            say(log, LogEvent.INTERNAL_ERROR, error=error, doing="cancel orders", count=len(claim.entries))
            return Completion()

    def _turn(self, lanes: tuple[Lane, ...]) -> tuple[Claim, float] | None:
        """Stores what was completed and claims, in one step: for this sender, and for others that are free.

        The claim of this sender, and the moment before it; None: what was completed had to be stored alone.
        """
        completed = self._completions.take()
        not_stored = list(completed)
        others = self.pool.draft()
        claims: list[Claim] = []
        asked = time.monotonic()
        try:
            wanted = self._claim_request(lanes, calls=1 + len(others))
            turn = self._store.turn([each.completed for each in completed], wanted)
            claims, not_stored = turn.claims, []
        except NothingClaimed as error:
            not_stored = []
            self._release(completed)
            self._emit_concluded(completed, error.done)
            raise
        except StoreError:
            if not completed:
                raise
            while not_stored:  # until that is done, the exchange will not say it twice
                self._put_down(not_stored[0])
                del not_stored[0]
            return None
        finally:
            given = [WakeUp(claim, asked, is_counted=True) for claim in claims[1:]]
            self._for_all_lanes.count(len(given))  # now: the sender that is left to risk must not follow them
            self.pool.dismiss(others, given)
            for each in not_stored:
                self._completions.leave(each)
        self._release(completed)
        if turn.snapshot is not None:
            self._snapshot = turn.snapshot.with_lines_of(self._snapshot[0], lanes), time.monotonic()
        is_none_due = claims[0].next_due_s is None or claims[0].next_due_s > 0
        self._is_idle = wanted.idle_s > 0 and not claims[0].entries and is_none_due
        self._call_more(claims[0])
        self._emit_concluded(completed, turn.done)
        return claims[0], asked

    def _call_more(self, claim: Claim) -> None:
        """Has a sender called where there is more than this claim and nobody comes for it."""
        if not claim.entries or not claim.is_more or claim.coming or not self._room.any_idle:
            return
        now = time.monotonic()
        if now - self._called_at > CALL_AGAIN_S:
            self._called_at = now
            self._neighbors.call_sender(claim.entries[0].lane)

    def _stay(self, seconds: float, waits_for: _WaitsFor) -> bool:
        """Waits for what is due or paid for soon, as the one sender that does; False for the others.

        One for each thing to wait for: a second's pause must not keep everybody from tokens due at once.
        """
        staying = self._staying[waits_for]
        if not staying.acquire(blocking=False):
            return False
        try:
            self._called_at = -math.inf
            self.stopping.wait(seconds * random.uniform(1.0, 1.2))  # noqa: S311 - jitter: workers out of step
        finally:
            staying.release()
        return True

    def _claim_request(self, lanes: tuple[Lane, ...], *, calls: int) -> ClaimRequest:
        limits, reads = self._pacer.limits, self._executor.read_slots
        may_be_idle = self.pool.listens and lanes == self._lanes and self._busy.number == 0
        snapshot, seen_at = self._snapshot
        steps = plan(
            snapshot,
            limits,
            lanes,
            free_senders=calls,
            batch_limit=self._executor.batch_size.limit,
            reserve=self._risk_reserve,
            ago_s=time.monotonic() - seen_at,
            reads=reads.free,
            reads_after_s=reads.after_s,
        )
        return ClaimRequest(
            lanes,
            steps,
            lease_s=LEASE_S,
            exchange_ms=self._executor.engine_now(),
            calls=calls,
            reads=reads.free,
            risk_reserve=self._risk_reserve,
            cancel_cost=limits.cancel_cost,
            idle_s=IDLE_S if may_be_idle else 0.0,
        )

    def stop(self) -> None:
        """Ends every :meth:`work` after the call it is in; what is claimed goes back into the store."""
        self.stopping.set()

    def extend_leases(self) -> None:
        """Extends the leases of what is claimed; raises StoreError."""
        self._leases.extend()

    def _breaker_moved(self, state: BreakerState) -> None:
        problem = self.breaker.key_problem if state is BreakerState.KEY_REFUSED else None
        self._emit(BreakerMoved(state, None if problem is None else problem.message))
        self._neighbors.breaker_moved()

    def _put_down_all(self) -> None:
        """Stores what was completed, without a claim."""
        for held in self._completions.take(math.inf):
            self._put_down(held)

    def _put_down(self, held: Completion) -> None:
        """Stores and tells; asks Redis until it is done, because the exchange will not say it twice."""
        done: list[bool] | None = None
        give_up = None
        while held.conclusions and done is None:
            try:
                done = self._store.turn([held.completed], None).done
            except StoreError as error:
                if not error.can_pass:
                    self._put_down_each(held, error)
                    return
                say_failed(log, error, "store results", count=len(held.conclusions))
                if self.stopping.is_set():
                    give_up = give_up or time.monotonic() + STORE_WHEN_STOPPING_S
                    if time.monotonic() > give_up:
                        break  # still in the store: whoever claims it next finds out what became of it
                time.sleep(STORE_AGAIN_EVERY_S)
        self._release([held])
        if done is not None:
            self._emit_concluded([held], done)

    def _put_down_each(self, held: Completion, error: StoreError) -> None:
        """Puts down one by one what Redis does not take together: one that it refuses is kept as text."""
        if len(held.conclusions) > 1:
            for conclusion in held.conclusions:
                self._put_down(replace(held, conclusions=(conclusion,)))
            return
        [conclusion] = held.conclusions
        order_id = conclusion.entry.order_id
        if order_id not in self._not_stored:
            if len(self._not_stored) < NOT_STORED_MOST:
                self._not_stored.add(order_id)
            entry = conclusion.entry
            told = about(entry.lane, entry.request.request_id, entry.request.traceparent)
            say_failed(log, error, "store a result", order_id=order_id, **told)
            result = conclusion.result.to_json() if isinstance(conclusion, Settle) else None
            self._store.keep_not_stored(str(error), order_id=order_id, result=result)
        self._release([held])

    def _release(self, helds: Sequence[Completion]) -> None:
        self._leases.release([each.entry for held in helds for each in held.conclusions])

    def _emit_concluded(self, helds: Sequence[Completion], done: Sequence[bool]) -> None:
        """Emits what has been put down, of all at once: that takes as long for one as for many."""
        conclusions = [each for held in helds for each in held.conclusions]
        if not conclusions:
            return
        now = time.monotonic()
        ages_s = [each.entry.age_s + now - held.since for held in helds for each in held.conclusions]
        self._call_others(conclusions)
        self._emit(Concluded(tuple(conclusions), tuple(done), tuple(ages_s)))

    def _call_others(self, conclusions: Sequence[Conclusion]) -> None:
        """Calls senders that have another key for what this worker's may not cancel."""
        left = {
            (each.for_key, each.entry.lane)
            for each in conclusions
            if isinstance(each, RetryLater) and each.for_key
        }
        for key_id, lane in left:
            try:
                self._store.wake_up_worker_with(key_id, lane)
            except StoreError as error:  # the sweeper finds what nobody comes for
                say_failed(log, error, "wake up workers with another key")


def _until_more(claim: Claim) -> float | None:
    """How long a sender that claimed nothing should stay; None: it is not worth while."""
    if claim.tokens_in_s > 0:
        return min(max(claim.tokens_in_s, GATHER_S), LINGER_S)
    if claim.next_due_s is None or claim.next_due_s > LINGER_S:
        return None
    return max(claim.next_due_s, 0.001)


class _Nobody:
    """The pool of a process that has none: its threads are Celery's, and come with a message."""

    listens = False

    def draft(self) -> Sequence[Any]:
        """Nobody."""
        return ()

    def dismiss(self, others: Sequence[Any], given: Sequence[WakeUp]) -> None:
        """Nothing."""


class _Busy:
    """How many of this process' threads are at a claim."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.number = 0

    def __enter__(self) -> None:
        with self._lock:
            self.number += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.number -= 1


class _Room:
    """How many of this process' threads may be at work in the store; one of several is kept free."""

    def __init__(self, number: int) -> None:
        self._most = max(number - 1, 1)
        self._lock = threading.Lock()
        self._busy = 0

    @property
    def any_idle(self) -> bool:
        """Whether one more sender would be let in."""
        return self._busy < self._most

    def count(self, number: int) -> None:
        """Counts so many as busy that are on their way, and will say so."""
        with self._lock:
            self._busy += number

    @contextmanager
    def one_more(self, *, is_counted: bool = False) -> Iterator[bool]:
        """Counts the body's thread as busy, unless enough are: then it is given False."""
        with self._lock:
            wanted = is_counted or self._busy < self._most
            self._busy += wanted and not is_counted
        try:
            yield wanted
        finally:
            with self._lock:
                self._busy -= wanted
