"""Gives the exchange's own mass command for a mass cancel, where it is allowed and fits.

The command goes out at once. A first listing gets a moment's head start: it tells what was there, and whether
somebody else is canceling some of that already. Orders that may have been hit by the command are entered as
perhaps canceled, and are read back; what rests on is canceled by itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from kalshi_cancel.exchange.clock import Span
from kalshi_cancel.exchange.moments import parse_time_ms
from kalshi_cancel.exchange.protocol import Failure, Meaning
from kalshi_cancel.model.mass_request import GROUP_TRIGGER, MassRequest
from kalshi_cancel.model.orders import Order
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import Problem
from kalshi_cancel.model.scope import Scope
from kalshi_cancel.store.cancels import Fenced
from kalshi_cancel.store.mass_claim import MassClaim
from kalshi_cancel.store.pending import Known
from kalshi_cancel.store.scripts import StoreError, say_failed
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say
from worker.dispatch.case import Case
from worker.mass.entering import Entered, Entering
from worker.mass.listing import Listing
from worker.mass.means import Means
from worker.mass.planning import COMMAND_CATCH_UP_S
from worker.mass.sending import Address, CommandSender, Given

log = logging.getLogger(__name__)

HEAD_START_S = 0.2  # of the first listing
# By then a command is answered, or its runner has vanished: orders are left alone for so long.
ANSWERED_WITHIN_S = 8.0
AGAIN_S = 1.0  # between two attempts, while nothing can be listed
REDIS_AGAIN_S = 0.1
# What ended so little before the command may be its doing: the exchange's clock is known to about a second.
CLOCK_MARGIN_MS = 1_000
_DONE = "done"


class Commanding:
    """The command of one mass cancel; works in a thread of its own between ``start`` and ``stop``."""

    def __init__(
        self,
        sender: CommandSender,
        request: MassRequest,
        claim: MassClaim,
        means: Means,
        entering: Entering,
        *,
        now_s: Callable[[], float],
    ) -> None:
        self.command = sender.command
        self._request = request
        self._claim = claim
        self._entering = entering
        self._store = means.store
        self._exchange = means.exchange
        self._sender = sender
        self._now_s = now_s
        self._read_lag_s = means.read_lag_s
        self._lock = threading.Lock()
        self._first_listing = threading.Event()
        self._wake = threading.Event()
        self._stopping = False
        self._todo: set[Address] = set()
        self._sought: set[Address] = set()
        self._is_pending = True  # it may be sent from now on
        self._declined: str | None = None
        self._others: set[str] = set()  # orders that somebody else is at
        self._waiting: list[CancelRequest] = []  # entered while it is pending
        self._swept: set[str] = set()  # orders that it may have hit
        self._engine: Span | None = None  # when it was first sent, on the clock that stamps orders
        self._answered_s = 0.0
        self.given = Given()

    # -- for the runner

    @property
    def is_declined(self) -> bool:
        """Whether it is not given (any more)."""
        return self._declined is not None

    def start(self) -> None:
        """Goes on where a runner before has left off, or begins."""
        stored = self._claim.read("command")
        if stored is not None:
            self.given = Given.from_json(stored)
            self._is_pending, self._answered_s = False, self._now_s()
            if self.given.answer is None:  # its runner has vanished meanwhile
                self.given = replace(self.given, answer="unanswered", may_have_worked=True)
        swept = [order_id for order_id, had in self._claim.orders().items() if had.swept]
        self._waiting += [CancelRequest(order_id) for order_id in swept]
        if stored is not None:
            self._release()
        threading.Thread(
            target=self._work, name=f"mass command {self._claim.fence.request_id}", daemon=True
        ).start()

    def stop(self) -> None:
        """Sends nothing more."""
        self._stopping = True
        self._first_listing.set()
        self._wake.set()

    def go(self) -> None:
        """Ends the head start of the first listing."""
        self._first_listing.set()

    def listed(self, listing: Listing | None) -> None:
        """Tells that a listing has ended: whole, or not."""
        if listing is not None and listing.is_clean and not self._first_listing.is_set():
            self._decline("nothing rested in scope")
        if listing is None:
            self._again()
        self._first_listing.set()

    def enter(self, orders: Mapping[str, Order], began_s: float) -> None:
        """Enters what a listing shows, as perhaps canceled where the command may have hit it."""
        with self._lock:
            if self.command.what == GROUP_TRIGGER:
                self._seek({_address(self._request.scope, order) for order in orders.values()})
            doubt = self._doubt(began_s)
            entered: Entered = self._entering.listed(orders, began_s, doubt)
            self._others |= entered.joined
            mine = [each for each in entered.requests if each.order_id not in entered.joined]
            if doubt is not None:
                self._swept |= {each.order_id for each in mine}
            if self._is_pending:
                self._waiting += mine

    def hit(self, ended: Iterable[Order]) -> tuple[dict[str, Order], set[str]]:
        """Of canceled orders: those that the command may have canceled and nobody has listed before.

        Those that were there when it was sent; and, by their ids, those that came later.
        """
        before: dict[str, Order] = {}
        later: set[str] = set()
        if not self.given.may_have_worked or self.given.sent_ms is None:
            return before, later
        since_ms = self.given.sent_ms - CLOCK_MARGIN_MS
        over = [order for order in ended if (order.last_update_ms or 0) >= since_ms]
        # The end of what it has surely hit tells when that was, on the clock that stamps orders.
        hits = [order.last_update_ms or 0 for order in over if order.order_id in self._swept]
        given_ms = min(hits, default=self.given.sent_ms)
        for order in over:
            if self._entering.knows(order.order_id):
                continue
            created_ms, _ = parse_time_ms(order.raw.get("created_time"))
            if created_ms is not None and created_ms >= given_ms:
                later.add(order.order_id)
            else:
                before[order.order_id] = replace(order, remaining_count=None, fill_count=None)
        return before, later

    # -- what is known of orders

    def _doubt(self, began_s: float) -> Known | None:
        """What is to be known of orders of a listing that began at that moment."""
        if self._is_pending:
            return self._perhaps(ANSWERED_WITHIN_S)
        if self.given.may_have_worked and began_s < self._answered_s + self._read_lag_s:
            return self._perhaps(COMMAND_CATCH_UP_S)
        return None

    def _perhaps(self, due_in_s: float) -> Known:
        nothing = CancelRequest("")  # each order has routing and counts of its own
        swept = Case.swept(nothing, self._engine or self._exchange.engine_now())
        return Known(swept.to_json(), "reads", due_in_s)

    def _release(self) -> None:
        """Has what waits for the command's end followed up."""
        known = self._perhaps(COMMAND_CATCH_UP_S) if self.given.may_have_worked else None
        waiting, self._waiting = self._waiting, []
        try:
            self._store.set_progress(waiting, known, lane=Lane.RISK, fence=self._claim.fence)
        except StoreError as error:  # they are due anyway, a little later
            say_failed(log, error, "note what a mass command did", request_id=self._claim.fence.request_id)

    # -- its thread

    def _work(self) -> None:
        self._first_listing.wait(HEAD_START_S)
        with self._lock:
            if self._is_pending and self._declined is None:
                if self._others:
                    words = f"somebody else was canceling {len(self._others)} of its orders already"
                    self._set_declined(words)
                elif not self._todo:
                    self._seek({_address(self._request.scope)})
        while not self._stopping:
            try:
                self._send_all()
            except Fenced:
                return
            except StoreError as error:
                say_failed(log, error, "send a mass command", request_id=self._claim.fence.request_id)
                self._wake.wait(REDIS_AGAIN_S)
                continue
            except Exception as error:  # noqa: BLE001 - a defect of ours: each order is canceled by itself
                request_id = self._claim.fence.request_id
                say(
                    log,
                    LogEvent.INTERNAL_ERROR,
                    error=error,
                    doing="send a mass command",
                    request_id=request_id,
                )
                self._decline("it failed unexpectedly")
            self._wake.wait()
            self._wake.clear()

    def _decline(self, why: str) -> None:
        with self._lock:
            self._set_declined(why)

    def _set_declined(self, why: str) -> None:
        self._declined = why
        self._todo.clear()
        if self._is_pending:
            self._is_pending = False
            if self.given.answer is None:
                self.given = replace(self.given, answer=f"not sent: {why}")
            self._release()
        self._wake.set()

    def _seek(self, addresses: set[Address]) -> None:
        """Has the command sent to where it was not sent so far."""
        new = addresses - self._sought
        if new and self._declined is None:
            self._sought |= new
            self._todo |= new
            self._is_pending = True
            if self._first_listing.is_set():
                self._wake.set()

    def _again(self) -> None:
        """Has it sent once more, as long as nothing can be listed and it was not done as asked."""
        with self._lock:
            passing = self.given.answer not in (None, _DONE) and self._declined is None
            if passing and not self._is_pending and self._now_s() - self._answered_s >= AGAIN_S:
                self._todo |= self._sought
                self._is_pending = True
                self._wake.set()

    def _send_all(self) -> None:
        """Sends what is to be sent, and has what waits for that followed up."""
        with self._lock:
            todo = sorted(self._todo, key=lambda each: (each.subaccount or 0, each.exchange_index or 0))
        failures = []
        for address in todo:
            paid = self._sender.pay()
            with self._lock:
                if self._declined is not None or self._stopping:
                    return
                self._engine = self._engine or self._exchange.engine_now()
                sent_ms = self.given.sent_ms or self._moment_ms()
                given = replace(self.given, sent=self.given.sent + 1, sent_ms=sent_ms, answer=None)
                self.given = given if paid else self.given
            problem = Problem("no_tokens", "there were no write tokens for it")
            failures.append(
                self._sender.send(paid, address, given) if paid else Failure(Meaning.NOT_SENT, problem)
            )
        if todo:
            with self._lock:
                self._todo -= set(todo)
                self._conclude(failures)

    def _moment_ms(self) -> int:
        """This moment on the clock that stamps orders, or, while that is hardly known, on the front's."""
        engine = self._engine
        if engine is not None and engine.high_ms - engine.low_ms < CLOCK_MARGIN_MS:
            return round(engine.middle_ms)
        return self._exchange.now_ms()

    def _conclude(self, failures: Sequence[Failure | None]) -> None:
        answers = [_DONE if failure is None else failure.problem.code for failure in failures]
        worked = any(failure is None or failure.may_have_taken_effect for failure in failures)
        self.given = replace(
            self.given,
            answer=next((answer for answer in answers if answer != _DONE), _DONE),
            may_have_worked=self.given.may_have_worked or worked,
        )
        self._answered_s = self._now_s()
        self._is_pending = bool(self._todo)
        permanent = (Meaning.REFUSED, Meaning.KEY_REFUSED, Meaning.RETIRED)
        if any(failure is not None and failure.meaning in permanent for failure in failures):
            self._declined = "it is refused"
        self._claim.note(command=self.given.to_json())
        self._release()


def _address(scope: Scope, order: Order | None = None) -> Address:
    """Where an order's group is, as far as the order and the scope tell."""
    subaccount, shard = scope.subaccount, scope.exchange_index
    if order is None:
        return Address(subaccount, shard)
    return Address(
        subaccount if order.subaccount is None else order.subaccount,
        shard if order.exchange_index is None else order.exchange_index,
    )
