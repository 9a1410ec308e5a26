"""Runs mass cancels: plans from a listing, cancels through the book's risk lane, and lists until flat.

"Flat" is a proof: a listing, made after everything known was settled and reads had time to catch up, that
shows no resting order in scope. Without that the report says ``flat: false`` and why.

Each worker has a :class:`MassRunner`; whoever takes a mass cancel first runs it, in a thread of its own, and
any other goes on with it when that worker vanishes.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Self

from worker import mass_report
from worker.book import Book, Known
from worker.dialects import CANCEL_ALL, Call, Meaning, Page, Routing, Trouble, compose_trigger
from worker.exchange import Exchange
from worker.logs import Seldom, about
from worker.masses import Masses, MassRequest, Planned
from worker.notices import BucketCorrected, CallMade, MassStep, Tell, nobody
from worker.orders import (
    SHARDS,
    CancelRequest,
    CancelResult,
    ConfirmedBy,
    Lane,
    Order,
    OrderStatus,
    Outcome,
    count_text,
    is_order_id,
    utc_text,
)
from worker.outcomes import Case
from worker.pacing import Pacer
from worker.scripts import BookError
from worker.services import Service

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1  # at how many orders are still open
FIND_EVERY_S = 1.0  # mass cancels whose runner has vanished
LIST_AGAIN_S = 0.25  # when a page could not be had
TOKENS_AGAIN_S = 1.0  # at most between two looks whether there are tokens for it
# How long the orders' own waiters wait to be told; the mass cancel has its own deadline.
ORDER_DEADLINE_S = 60.0
# What plan, hand-over and the last results take on top of the tokens' time.
OVERHEAD_S = 0.15
# Orders a second that one machine lists and settles when tokens do not hold it up, until measured.
ORDERS_PER_S = 7_000.0
# Single calls a second that two cores sign and send; only these are paid for by a shard's own bucket.
SINGLES_PER_S = 800.0
PACE_FROM_ORDERS = 500  # fewer tell nothing about it
COMMAND_CATCH_UP_S = 0.5  # until listings show what a command has canceled
# By then a command is answered, or its runner has vanished: orders are left alone for so long.
COMMAND_WITHIN_S = 8.0
COMMAND_TOKENS_WITHIN_S = 1.0  # longer, and order by order is as good
AFTER_A_BUG_S = 1.0  # until it is tried again
STUMBLES_MOST = 5
REFUSALS_MOST = 3  # of one order: a refusal is permanent, but for a blink of something in between


class _Vanished(Exception):  # noqa: N818 - named after what has happened
    """This runner's lease is over, or its process is stopping: somebody else goes on."""


@dataclass(frozen=True, slots=True)
class Means:
    """What running mass cancels takes; ``call_hands`` wakes workers up for a lane with so many messages."""

    book: Book
    masses: Masses
    exchange: Exchange
    pacer: Pacer
    call_hands: Callable[[Lane, int], None]
    read_lag_s: float
    name: str
    stopping: threading.Event
    tell: Tell = nobody


class MassRunner:
    """Runs mass cancels for one process."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._running: set[str] = set()
        self.service = Service("mass cancels", self._find, every_s=FIND_EVERY_S)

    def stop(self) -> None:
        """Leaves what is under way to others."""
        self._means.stopping.set()

    def enter(self, request: MassRequest, *, reply_to: str = "") -> None:
        """Accepts a mass cancel and looks at it at once; raises BookError."""
        self._means.masses.enter(request, reply_to=reply_to)
        self.service.wake()

    def look(self) -> None:
        """Looks for mass cancels that nobody is at, now."""
        self.service.wake()

    def _find(self) -> None:
        """Takes each that nobody is at; one that cannot be read keeps no other from its runner."""
        for request_id in self._means.masses.open_ids():
            if self._means.stopping.is_set():
                return  # what runs here gives its lease back
            try:
                if request_id in self._running:  # a step of it may take longer than the lease
                    self._means.masses.keep(request_id, self._means.name)
                else:
                    self._take(request_id)
            except Exception as error:
                if isinstance(error, BookError) and error.can_pass:
                    raise
                said = {"request_id": request_id}
                log.warning("mass cancel %s cannot be read: %s", request_id, error, extra=said)

    def _take(self, request_id: str) -> None:
        request = self._means.masses.take(request_id, self._means.name)
        if request is not None:
            self._running.add(request_id)
            try:
                threading.Thread(
                    target=self._run, args=(request,), name=f"mass {request_id}", daemon=True
                ).start()
            except RuntimeError:  # no more threads: the next look tries again
                self._running.discard(request_id)
                raise

    def _run(self, request: MassRequest) -> None:
        try:
            self._see_through(request)
        finally:
            self._running.discard(request.request_id)

    def _see_through(self, request: MassRequest) -> None:
        said = _about(request)
        if request.dry_run:
            log.info("mass cancel %s by %s is planned", request.request_id, request.requested_by, extra=said)
        else:
            log.warning("mass cancel %s by %s starts", request.request_id, request.requested_by, extra=said)
        self._means.tell(MassStep(request.request_id, "started", request.traceparent))
        run, seldom = _Run(request, self._means), Seldom()
        while not self._means.stopping.is_set():
            try:
                report = run.to_the_end()
                # First the trail: what is there twice, because this worker vanished in between, does no harm.
                self._means.masses.tell_trail(request.request_id, "finished", **mass_report.in_short(report))
                self._means.masses.finish(request.request_id, report)
            except BookError as error:
                if (more := seldom.now()) is not None:
                    log.warning("mass cancel %s: %s", request.request_id, f"{error}{more}", extra=said)
                self._means.stopping.wait(LOOK_EVERY_S)
            except _Vanished:
                break
            except Exception:
                # A defect of ours: not one mass cancel may stay without a report for ever.
                log.exception("mass cancel %s: a step failed", request.request_id, extra=said)
                run.stumbled()
                self._means.stopping.wait(AFTER_A_BUG_S)
            else:
                if request.dry_run:
                    log.info("mass cancel %s: planned only", request.request_id, extra=said)
                else:
                    level = logging.WARNING if report["flat"] else logging.ERROR
                    log.log(level, "mass cancel %s: flat %s", request.request_id, report["flat"], extra=said)
                step = "planned" if request.dry_run else "flat" if report["flat"] else "not_flat"
                self._means.tell(MassStep(request.request_id, step))
                return
        log.warning("mass cancel %s is left to another worker", request.request_id, extra=said)
        self._means.tell(MassStep(request.request_id, "left"))
        try:
            self._means.masses.leave(request.request_id, self._means.name)
        except BookError as error:
            log.warning("its lease runs out by itself: %s", error, extra=said)


@dataclass(frozen=True, slots=True)
class _Listing:
    """The resting orders in scope at one moment, and a fingerprint of what was seen."""

    orders: dict[str, Order]
    at: str
    sha256: str
    pages: int
    first_page_s: float
    unreadable: int

    @property
    def is_proof(self) -> bool:
        """Whether it shows that nothing in scope rests."""
        return not self.orders and not self.unreadable


@dataclass(frozen=True, slots=True)
class _Command:
    """A mass command of the exchange's own, and what it is in words."""

    call: Call
    words: str


class _Run:
    """One mass cancel in this process' hands."""

    def __init__(self, request: MassRequest, means: Means) -> None:
        self._request = request
        self._id = request.request_id
        self._means = means
        self._book = means.book
        self._masses = means.masses
        self._pacer = means.pacer
        self._ids = frozenset(request.scope.order_ids)
        self._scope = replace(request.scope, order_ids=())  # apart from the ids, looked up in the set
        self._why_not_flat: str | None = (
            "only planned" if request.dry_run else "its time was over before a listing could prove it"
        )
        self._stumbled = 0
        self._refusals: Counter[str] = Counter()  # of each order, by this runner's listings

    def stumbled(self) -> None:
        """A step has failed unexpectedly; when that goes on, the report says so."""
        self._stumbled += 1
        self._why_not_flat = "a step failed unexpectedly: see the worker's log"

    def to_the_end(self) -> dict[str, Any]:
        """The report; raises _Vanished and BookError, after either of which anybody can go on."""
        plan = self._masses.plan(self._id) or (
            self._no_plan() if self._stumbled > STUMBLES_MOST else self._plan()
        )
        if self._request.dry_run or self._stumbled > STUMBLES_MOST:
            return self._report(plan, None)
        give_up_s = plan["started_s"] + plan["predicted_s"] + self._request.deadline_s
        if plan["listed_at"] is None and not plan["orders"]:
            return self._report(plan, None)  # nothing was found because nothing could be seen
        while True:  # at least once: who goes on with it after its time may still prove it
            settled_s = self._await_settled(give_up_s)
            if settled_s is None:
                break
            self._wait(max(settled_s + self._means.read_lag_s - self._masses.now_s(), 0.0))
            listing = self._list(give_up_s)
            if listing is None:
                break
            if listing.is_proof:
                self._why_not_flat = None
                return self._report(plan, listing)
            if not listing.orders:
                self._why_not_flat = f"{listing.unreadable} listed orders cannot be understood"
                if self._masses.now_s() >= give_up_s:
                    break
                continue
            self._why_not_flat = f"{len(listing.orders)} orders were still resting at {listing.at}"
            log.warning(
                "mass cancel %s: %d orders still or newly resting",
                self._id,
                len(listing.orders),
                extra=_about(self._request),
            )
            self._trail(
                "still_resting", orders=len(listing.orders), listed_at=listing.at, sha256=listing.sha256
            )
            again = self._worth_asking_again(listing.orders)
            if not again or self._masses.now_s() >= give_up_s:
                break
            self._add(again)
        return self._report(plan, None)

    def _worth_asking_again(self, orders: Mapping[str, Order]) -> dict[str, Order]:
        """Those that still rest, but for what the exchange has refused time after time."""
        records = self._book.records(list(orders))
        refused = [each for each in records.values() if each.outcome is Outcome.REFUSED]
        for result in refused:
            self._refusals[str(result.order_id)] += 1
        again = {each: order for each, order in orders.items() if self._refusals[each] < REFUSALS_MOST}
        if not again and refused and refused[0].error:
            self._why_not_flat = f"{len(orders)} orders rest and are refused: {refused[0].error.code}"
        return again

    # -- plan

    def _no_plan(self) -> dict[str, Any]:
        """What the report of a mass cancel says that could not be planned."""
        return {
            "started_s": self._masses.now_s(),
            "listed_at": None,
            "orders": self._masses.count_orders(self._id),
            "contracts": "0.00",
            "tokens": 0.0,
            "shards": {},
            "paths": {},
            "tokens_s": 0.0,
            "command": False,
            "predicted_s": 0.0,
            "refused_calls_before": self._refused_calls(),
        }

    def _plan(self) -> dict[str, Any]:
        """Lists and plans; unless that is all, what is found is being canceled while the rest is listed.

        Nothing is lost when another runner has to do it again: what was entered is noted, and the plan last.
        """
        begun = self._masses.begin(
            self._id,
            started_s=self._masses.now_s(),
            tokens={str(shard): tokens for shard, tokens in self._pacer.tokens_now(range(SHARDS)).items()},
            refused_calls=self._refused_calls(),
        )
        command = self._command()
        # Where nothing can be listed, half of the time is left to cancel what was named.
        give_up_s = self._masses.now_s() + self._request.deadline_s / 2
        if self._request.dry_run or command is not None:
            listing = self._list(give_up_s)
        else:
            with _Aside(self._add) as entering:
                listing = self._list(give_up_s, on_page=entering)
        orders = {} if listing is None else listing.orders
        # Ids that were not seen resting are asked for blindly, unless they may rest outside of the scope.
        blindly = self._request.scope.order_ids if self._request.scope.names_orders_only else ()
        unlisted = [each for each in blindly if each not in orders]
        if not self._request.dry_run:
            if command is not None:
                self._sweep(command, orders)
            self._note_orders({}, unlisted)
            self._enter(_request_for(each, self._request) for each in unlisted)
        shards: dict[int, int] = {0: len(unlisted)} if unlisted else {}
        for order in orders.values():
            shard = order.exchange_index or 0
            shards[shard] = shards.get(shard, 0) + 1
        count = len(orders) + len(unlisted)
        first_page_s = listing.first_page_s if listing else 0.0
        tokens_s = self._tokens_s(shards, {int(shard): has for shard, has in begun["tokens"].items()})
        work_s = count / (self._masses.pace() or ORDERS_PER_S)
        left = sum((order.remaining_count or Decimal(0) for order in orders.values()), Decimal(0))
        plan: dict[str, Any] = {
            "started_s": begun["started_s"],
            "listed_at": listing and listing.at,
            "orders": count if self._request.dry_run else self._masses.count_orders(self._id),
            "contracts": count_text(left),
            "tokens": self._pacer.limits.cancel_cost * (count if command is None else 1),
            "shards": {str(shard): count for shard, count in sorted(shards.items())},
            "paths": _paths(shards) if command is None else {"all": command.words},
            "tokens_s": round(tokens_s, 3),
            "command": command is not None,
            "predicted_s": round(
                first_page_s + max(tokens_s, work_s) + OVERHEAD_S if count else OVERHEAD_S, 3
            ),
            "refused_calls_before": begun["refused_calls"],
        }
        self._trail("planned", **plan)
        if not self._request.dry_run:
            self._masses.note(self._id, plan=plan)
        return plan

    def _tokens_s(self, shards: Mapping[int, int], levels: Mapping[int, float]) -> float:
        """Seconds until the last of these orders is paid for, from buckets that hold so much."""
        limits = self._pacer.limits
        wanted = sum(shards.values()) * limits.cancel_cost
        low, high = 0.0, wanted / limits.write_refill
        for _ in range(60):
            middle = (low + high) / 2
            refilled = limits.write_refill * middle
            by_singles = sum(
                min(orders * limits.cancel_cost, levels.get(shard, 0.0) + refilled)
                for shard, orders in shards.items()
                if shard != 0
            )
            by_singles = min(by_singles, SINGLES_PER_S * limits.cancel_cost * middle)
            if wanted - by_singles <= levels[0] + refilled:
                high = middle
            else:
                low = middle
        return high

    # -- the exchange's own commands

    def _command(self) -> _Command | None:
        """The exchange's own mass command for this very scope, if its side effects are allowed.

        None for a subaccount: whether cancel-all's minute for new orders keeps to it is not known.
        """
        scope = self._request.scope
        if not self._request.allow_side_effects:
            return None
        if scope.everything:
            return _Command(
                CANCEL_ALL, "the exchange's cancel-all, which also hits orders of the next minute"
            )
        if is_order_id(scope.order_group_id) and scope.to_json().keys() == {"order_group_id"}:
            words = "the order group's trigger, which closes the group until it is reset"
            return _Command(compose_trigger(str(scope.order_group_id)), words)
        return None

    def _sweep(self, command: _Command, orders: Mapping[str, Order]) -> None:
        """Has the exchange cancel these orders, each entered first as perhaps canceled, to be read back.

        Whatever becomes of the command, the read-backs tell; an order that rests on is canceled by itself.
        """
        if not orders:
            return
        self._note_orders(orders)
        requests = [_request_for(each, self._request, order) for each, order in orders.items()]
        exchange = self._means.exchange
        swept = Case.swept(requests[0], exchange.engine_now())
        perhaps = Known(replace(swept, routing=Routing()).to_json(), "reads", COMMAND_WITHIN_S)
        accepted = self._book.accept(
            requests, lane=Lane.RISK, default_deadline_s=ORDER_DEADLINE_S, known=perhaps
        )
        mine = [each for each in requests if each.order_id not in {*accepted.settled, *accepted.joined}]
        # Somebody who is at some of them already would not know of the command: then order by order, too.
        if not accepted.joined and self._has_command_done(command, orders):
            self._book.learn(mine, replace(perhaps, due_in_s=COMMAND_CATCH_UP_S), lane=Lane.RISK)
        else:
            self._book.learn(mine, None, lane=Lane.RISK)
        if not accepted.heard:
            self._means.call_hands(Lane.RISK, accepted.waiting_messages)

    def _has_command_done(self, command: _Command, orders: Mapping[str, Order]) -> bool:
        """Gives the command; whether it may have done anything."""
        cost, exchange = self._pacer.limits.cancel_cost, self._means.exchange
        give_up = time.monotonic() + COMMAND_TOKENS_WITHIN_S
        while (wait_s := self._pacer.take("write", cost)) > 0:
            if time.monotonic() + wait_s > give_up:
                return False
            self._wait(wait_s)
        started = time.monotonic()
        trouble = exchange.command(command.call)
        self._means.tell(
            CallMade("command", (), Lane.RISK, trouble, time.monotonic() - started, "write", cost, self._id)
        )
        self._masses.spend(self._id, cost)
        self._trail("command", orders=len(orders), what=command.words, error=trouble and trouble.problem.code)
        if trouble is not None:
            log.warning(
                "mass cancel %s: order by order after all: %s",
                self._id,
                trouble.problem.message,
                extra=_about(self._request),
            )
            if trouble.meaning is Meaning.BUSY and self._pacer.correct("write", cost):
                self._means.tell(BucketCorrected("write"))
        return trouble is None or trouble.may_have_taken_effect

    # -- execute and verify

    def _enter(self, requests: Iterable[CancelRequest]) -> None:
        wanted = list(requests)
        if not wanted:
            return
        self._trail("entered", orders=len(wanted))
        accepted = self._book.accept(wanted, lane=Lane.RISK, default_deadline_s=ORDER_DEADLINE_S)
        if not accepted.heard:
            self._means.call_hands(Lane.RISK, accepted.waiting_messages)

    def _add(self, orders: Mapping[str, Order]) -> None:
        self._note_orders(orders)
        self._enter(_request_for(each, self._request, order) for each, order in orders.items())

    def _note_orders(self, orders: Mapping[str, Order], unlisted: Sequence[str] = ()) -> None:
        """Notes what they have, and whose outcome was final before this mass cancel touched them."""
        final = {
            order_id
            for order_id, result in self._book.records([*orders, *unlisted]).items()
            if result.outcome.final
        }
        planned = {
            order_id: Planned(order.remaining_count, order.fill_count, order_id in final)
            for order_id, order in orders.items()
        }
        planned |= {order_id: Planned(None, None, order_id in final) for order_id in unlisted}
        self._masses.add_orders(self._id, planned)

    def _await_settled(self, give_up_s: float) -> float | None:
        """When the last of the orders was settled, None when the time is over before that."""
        while True:
            still, overdue = self._masses.still_open(self._id)
            self._tell_progress(still, overdue)
            if not still:
                return self._masses.now_s()
            if self._masses.now_s() >= give_up_s:
                self._why_not_flat = f"{still} orders were not settled in time"
                return None
            self._wait(LOOK_EVERY_S)

    def _list(
        self, give_up_s: float, *, on_page: Callable[[Mapping[str, Order]], None] | None = None
    ) -> _Listing | None:
        """Every resting order in scope, paged and budgeted; asks again until the listing is whole.

        None when it is not whole by then. ``on_page`` is given what each page shows.
        """
        orders: dict[str, Order] = {}
        digest = hashlib.sha256()
        started, first_page_s = time.monotonic(), 0.0
        pages, unreadable, at = 0, 0, utc_text(self._means.exchange.now_ms() / 1000)
        for query in self._request.scope.listings():
            cursors = [""]
            while (cursor := cursors[-1]) or len(cursors) == 1:
                page = self._page(query, cursor, give_up_s)
                if page is None:
                    return None
                pages += 1
                unreadable += page.unreadable
                first_page_s = first_page_s or time.monotonic() - started
                for order in page.orders:
                    digest.update(f"{order.order_id} {order.status} {order.remaining_count}\n".encode())
                found = {
                    order.order_id: order
                    for order in page.orders
                    if order.status is OrderStatus.RESTING and self._is_meant(order)
                }
                orders |= found
                if found and on_page is not None:
                    on_page(found)
                if page.cursor in cursors[1:]:
                    self._why_not_flat = "the exchange's listing goes round in a circle"
                    return None
                cursors.append(page.cursor)
        if unreadable:
            log.error(
                "mass cancel %s: %d listed orders cannot be understood",
                self._id,
                unreadable,
                extra=_about(self._request),
            )
        return _Listing(orders, at, digest.hexdigest(), pages, first_page_s, unreadable)

    def _is_meant(self, order: Order) -> bool:
        return (not self._ids or order.order_id in self._ids) and self._scope.includes(order)

    def _page(self, query: Mapping[str, str | int], cursor: str, give_up_s: float) -> Page | None:
        """One page, paid for; None when it cannot be had by then, or not at all."""
        cost = self._pacer.limits.list_cost
        while True:
            while (wait_s := self._pacer.take("read", cost)) > 0:
                if self._masses.now_s() >= give_up_s:
                    self._why_not_flat = "no listing could be had: no tokens for it"
                    return None
                self._wait(min(wait_s, TOKENS_AGAIN_S))
            started = time.monotonic()
            page = self._means.exchange.list_orders(query, cursor)
            trouble = page if isinstance(page, Trouble) else None
            took_s = time.monotonic() - started
            self._means.tell(CallMade("list", (), None, trouble, took_s, "read", cost, self._id))
            if trouble is None or trouble.meaning is not Meaning.BUSY:
                self._masses.spend(self._id, cost)
            if not isinstance(page, Trouble):
                return page
            log.warning(
                "mass cancel %s: no listing: %s",
                self._id,
                page.problem.message,
                extra=_about(self._request),
            )
            if page.meaning is Meaning.BUSY and self._pacer.correct("read", cost):
                self._means.tell(BucketCorrected("read"))
            if page.meaning is Meaning.REFUSED or self._masses.now_s() >= give_up_s:
                self._why_not_flat = f"no listing could be had: {page.problem.code}"
                return None
            self._tell_progress(*self._masses.still_open(self._id))
            self._wait(max(page.retry_after_s or 0.0, LIST_AGAIN_S))

    def _wait(self, seconds: float) -> None:
        """Waits, keeping the lease; raises _Vanished when stopping, or when another runner has taken over."""
        until = time.monotonic() + seconds
        while True:
            if not self._masses.keep(self._id, self._means.name) or self._means.stopping.is_set():
                raise _Vanished
            left_s = until - time.monotonic()
            if left_s <= 0:
                return
            self._means.stopping.wait(min(left_s, 0.5))

    def _tell_progress(self, still: int, overdue: int) -> None:
        orders = self._masses.count_orders(self._id)
        still = min(still, orders)  # what was noted twice is left twice, for a moment
        progress = {
            "request_id": self._id,
            "orders": orders,
            "settled": orders - still,
            "open": still,
            "unresolved": overdue,
            "at": utc_text(time.time()),
        }
        self._masses.note(self._id, progress=progress)

    def _trail(self, step: str, **details: Any) -> None:
        self._masses.tell_trail(self._id, step, worker=self._means.name, **details)

    # -- report

    def _report(self, plan: Mapping[str, Any], listing: _Listing | None) -> dict[str, Any]:
        planned = {} if self._request.dry_run else self._masses.orders(self._id)
        results = self._book.records(list(planned))
        named = () if self._request.dry_run else self._request.scope.order_ids
        # What was final before this mass cancel touched it took neither its time nor its tokens.
        ours = [each for order_id, each in results.items() if not planned[order_id].settled]
        actual_s = mass_report.seconds_until_last(ours, plan["started_s"])
        orders = len(ours)
        if actual_s and orders >= PACE_FROM_ORDERS and plan["tokens_s"] < actual_s / 2:
            self._masses.note_pace(orders / max(actual_s - OVERHEAD_S, actual_s / 2))
        return {
            **self._request.to_json(),
            "completed_at": utc_text(time.time()),
            "flat": listing is not None and listing.is_proof,
            "why_not_flat": self._why_not_flat,
            "flat_listing": listing and {"at": listing.at, "sha256": listing.sha256, "pages": listing.pages},
            "plan": dict(plan),
            **mass_report.tally(planned, results, named=named),
            "tokens_spent": self._masses.spent(self._id) + self._tokens_of(ours, plan),
            "rate_limited": self._refused_calls() - plan["refused_calls_before"],
            "predicted_s": plan["predicted_s"],
            "actual_s": actual_s,
        }

    def _tokens_of(self, results: Iterable[CancelResult], plan: Mapping[str, Any]) -> float:
        """What the orders' own calls cost at least: cancels, and one read where that told the outcome."""
        limits, by_command = self._pacer.limits, bool(plan["command"])
        return sum(
            (each.attempts - by_command) * limits.cancel_cost
            + (each.confirmed_by is ConfirmedBy.READ_BACK) * limits.read_cost
            for each in results
        )

    def _refused_calls(self) -> int:
        return sum(int(bucket.get("refused", 0)) for bucket in self._pacer.levels().values())


class _Aside:
    """Calls a function in a thread of its own, call after call; what it raises is raised at the end."""

    def __init__(self, function: Callable[[Mapping[str, Order]], None]) -> None:
        self._function = function
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mass-entering")
        self._calls: list[Future[None]] = []

    def __call__(self, orders: Mapping[str, Order]) -> None:
        self._calls.append(self._thread.submit(self._function, orders))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            for call in self._calls:
                call.result()


def _about(request: MassRequest) -> dict[str, Any]:
    return about(Lane.RISK, request.request_id, request.traceparent)


def _request_for(order_id: str, request: MassRequest, order: Order | None = None) -> CancelRequest:
    """The cancel of one order, as far as it was seen."""
    ticker = shard = subaccount = None
    if order is not None:
        # What an order does not tell itself, the listing that it came from was for.
        ticker, shard, subaccount = order.ticker, order.exchange_index, order.subaccount
        shard = request.scope.exchange_index if shard is None else shard
        subaccount = request.scope.subaccount if subaccount is None else subaccount
    return CancelRequest(
        order_id,
        market_ticker=ticker,
        exchange_index=shard,
        subaccount=subaccount,
        requested_by=request.requested_by,
        reason=request.reason,
        request_id=request.request_id,
        traceparent=request.traceparent,
        seen_remaining=None if order is None else order.remaining_count,
        seen_filled=None if order is None else order.fill_count,
    )


def _paths(shards: Mapping[int, int]) -> dict[str, str]:
    return {
        str(shard): "batches from the unscoped budget"
        + ("" if shard == 0 else ", and singles from the shard's own")
        for shard in sorted(shards)
    }
