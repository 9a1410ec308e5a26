"""Gives the exchange's own mass command for a mass cancel, where it is allowed and fits.

The command goes out at once. A first listing gets a moment's head start: it tells what was there, and whether
somebody else is canceling some of that already. Orders that may have been hit by the command are entered as
perhaps canceled, and are read back; what rests on is canceled by itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from worker.book import Book, Fenced, Known
from worker.clock import Span
from worker.dialects import CANCEL_ALL, Call, Meaning, Trouble, compose_trigger, parse_time_ms
from worker.exchange import Exchange
from worker.mass_claim import MassClaim
from worker.mass_entering import Entered, Entering
from worker.mass_listing import Listing
from worker.mass_planning import COMMAND_CATCH_UP_S, GROUP_TRIGGER, Command
from worker.mass_request import MassRequest
from worker.notices import BucketCorrected, CallMade, Tell
from worker.orders import CancelRequest, Lane, Order, Problem, utc_text
from worker.outcomes import Case
from worker.pacing import Pacer
from worker.scripts import BookError

log = logging.getLogger(__name__)

HEAD_START_S = 0.2  # of the first listing
# By then a command is answered, or its runner has vanished: orders are left alone for so long.
ANSWERED_WITHIN_S = 8.0
TOKENS_WITHIN_S = 1.0  # longer, and order by order is as good
AGAIN_S = 1.0  # between two attempts, while nothing can be listed
REDIS_AGAIN_S = 0.1
CANCEL_ALL_TAIL_S = 60.0  # new orders are canceled for so long
# What ended so little before the command may be its doing: the exchange's clock is known to about a second.
CLOCK_MARGIN_MS = 1_000
_DONE = "done"


@dataclass(frozen=True, slots=True)
class Address:
    """Where an order group is; a command for the whole account has none."""

    subaccount: int | None = None
    exchange_index: int | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """What has become of the command so far, as it is stored and reported.

    ``sent`` times; ``answer``: "done", the code of what was answered last, or why it was not sent; None: none
    yet. ``sent_ms``: when it was first sent, on the exchange's clock.
    """

    sent: int = 0
    sent_ms: int | None = None
    answer: str | None = None
    may_have_worked: bool = False

    def to_json(self) -> dict[str, Any]:
        """The stored form."""
        return {
            "sent": self.sent,
            "sent_ms": self.sent_ms,
            "answer": self.answer,
            "may_have_worked": self.may_have_worked,
        }


class Commanding:
    """The command of one mass cancel; works in a thread of its own between ``start`` and ``stop``."""

    def __init__(
        self,
        command: Command,
        request: MassRequest,
        claim: MassClaim,
        entering: Entering,
        *,
        book: Book,
        exchange: Exchange,
        pacer: Pacer,
        tell: Tell,
        now_s: Callable[[], float],
        read_lag_s: float,
    ) -> None:
        self.command = command
        self._request = request
        self._claim = claim
        self._entering = entering
        self._book = book
        self._exchange = exchange
        self._sender = _Sender(command, claim, exchange, pacer, tell)
        self._now_s = now_s
        self._read_lag_s = read_lag_s
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
            self.given = Given(**stored)
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
                self._seek({self._address_of(order) for order in orders.values()})
            doubt = self._doubt(began_s)
            entered: Entered = self._entering.listed(orders, began_s, doubt)
            self._others |= entered.joined
            if self._is_pending:
                self._waiting += [each for each in entered.requests if each.order_id not in entered.joined]

    def hit(self, ended: Iterable[Order]) -> tuple[dict[str, Order], set[str]]:
        """Of canceled orders: those that the command may have canceled and nobody has listed before.

        Those that were there when it was sent; and, by their ids, those that came later.
        """
        before: dict[str, Order] = {}
        later: set[str] = set()
        if not self.given.may_have_worked or self.given.sent_ms is None:
            return before, later
        since_ms = self.given.sent_ms - CLOCK_MARGIN_MS
        for order in ended:
            if self._entering.knows(order.order_id) or (order.last_update_ms or 0) < since_ms:
                continue
            created_ms, _ = parse_time_ms(order.raw.get("created_time"))
            if created_ms is not None and created_ms >= self.given.sent_ms:
                later.add(order.order_id)
            else:
                before[order.order_id] = replace(order, remaining_count=None, fill_count=None)
        return before, later

    def told(self) -> dict[str, Any]:
        """What the report says of it."""
        given, until = self.given, None
        if given.may_have_worked and given.sent_ms is not None and self.command.what != GROUP_TRIGGER:
            until = utc_text(given.sent_ms / 1000 + CANCEL_ALL_TAIL_S)
        return {
            "what": self.command.what,
            "sent": given.sent,
            "sent_at": None if given.sent_ms is None else utc_text(given.sent_ms / 1000),
            "answer": given.answer,
            "in_force_until": until,
        }

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
            self._book.learn(waiting, known, lane=Lane.RISK, fence=self._claim.fence)
        except BookError as error:  # they are due anyway, a little later
            log.warning("mass cancel %s: %s", self._claim.fence.request_id, error)

    # -- its thread

    def _work(self) -> None:
        self._first_listing.wait(HEAD_START_S)
        with self._lock:
            if self._is_pending and self._declined is None:
                if self._others:
                    words = f"somebody else was canceling {len(self._others)} of its orders already"
                    self._set_declined(words)
                elif not self._todo:
                    self._seek({self._scope_address()})
        while not self._stopping:
            try:
                self._send_all()
            except Fenced:
                return
            except BookError as error:
                log.warning("mass cancel %s: %s", self._claim.fence.request_id, error)
                self._wake.wait(REDIS_AGAIN_S)
                continue
            except Exception:
                log.exception("mass cancel %s: its command failed", self._claim.fence.request_id)
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

    def _scope_address(self) -> Address:
        scope = self._request.scope
        return Address(scope.subaccount, scope.exchange_index)

    def _address_of(self, order: Order) -> Address:
        scope = self._scope_address()
        return Address(
            scope.subaccount if order.subaccount is None else order.subaccount,
            scope.exchange_index if order.exchange_index is None else order.exchange_index,
        )

    def _send_all(self) -> None:
        """Sends what is to be sent, and has what waits for that followed up."""
        with self._lock:
            todo = sorted(self._todo, key=lambda each: (each.subaccount or 0, each.exchange_index or 0))
        troubles = []
        for address in todo:
            paid = self._sender.pays()
            with self._lock:
                if self._declined is not None or self._stopping:
                    return
                self._engine = self._engine or self._exchange.engine_now()
                sent_ms = self.given.sent_ms or self._exchange.now_ms()
                given = replace(self.given, sent=self.given.sent + 1, sent_ms=sent_ms, answer=None)
                self.given = given if paid else self.given
            problem = Problem("no_tokens", "there were no write tokens for it")
            troubles.append(self._sender.send(address, given) if paid else Trouble(Meaning.NOT_SENT, problem))
        if todo:
            with self._lock:
                self._todo -= set(todo)
                self._conclude(troubles)

    def _conclude(self, troubles: Sequence[Trouble | None]) -> None:
        answers = [_DONE if trouble is None else trouble.problem.code for trouble in troubles]
        worked = any(trouble is None or trouble.may_have_taken_effect for trouble in troubles)
        self.given = replace(
            self.given,
            answer=next((answer for answer in answers if answer != _DONE), _DONE),
            may_have_worked=self.given.may_have_worked or worked,
        )
        self._answered_s = self._now_s()
        self._is_pending = bool(self._todo)
        permanent = (Meaning.REFUSED, Meaning.KEY_REFUSED, Meaning.RETIRED)
        if any(trouble is not None and trouble.meaning in permanent for trouble in troubles):
            self._declined = "it is refused"
        self._claim.note(command=self.given.to_json())
        self._release()


class _Sender:
    """Sends the command, paid for and under the claim; tells about each call."""

    def __init__(
        self, command: Command, claim: MassClaim, exchange: Exchange, pacer: Pacer, tell: Tell
    ) -> None:
        self._command = command
        self._claim = claim
        self._exchange = exchange
        self._pacer = pacer
        self._tell = tell

    def pays(self) -> bool:
        """Takes the tokens of one call; False: they are not there in time."""
        cost = self._pacer.limits.cancel_cost
        give_up = time.monotonic() + TOKENS_WITHIN_S
        while (wait_s := self._pacer.take("write", cost)) > 0:
            if time.monotonic() + wait_s > give_up:
                return False
            time.sleep(wait_s)
        return True

    def send(self, address: Address, given: Given) -> Trouble | None:
        """Gives the command once, which makes it ``given``; what stood in the way. Raises Fenced."""
        cost, fence = self._pacer.limits.cancel_cost, self._claim.fence
        self._claim.note(command=given.to_json())
        self._claim.keep()
        if not self._claim.is_surely_held:  # stopped in between: somebody else may have finished
            raise Fenced(fence)
        started = time.monotonic()
        trouble = self._exchange.command(self._call(address))
        took_s = time.monotonic() - started
        self._tell(CallMade("command", (), Lane.RISK, trouble, took_s, "write", cost, fence.request_id))
        if trouble is None or trouble.meaning not in (Meaning.BUSY, Meaning.NOT_SENT):
            self._claim.spend(cost)
        code = trouble and trouble.problem.code
        self._claim.tell_trail("command", what=self._command.what, error=code)
        if trouble is not None:
            log.warning(
                "mass cancel %s: its command was not done: %s",
                fence.request_id,
                trouble.problem.message,
                extra={"request_id": fence.request_id, "code": code},
            )
            if trouble.meaning is Meaning.BUSY and self._pacer.correct("write", cost):
                self._tell(BucketCorrected("write"))
        return trouble

    def _call(self, address: Address) -> Call:
        if self._command.order_group_id is None:
            return CANCEL_ALL
        return compose_trigger(
            self._command.order_group_id,
            subaccount=address.subaccount,
            exchange_index=address.exchange_index,
        )
