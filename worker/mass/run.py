"""One mass cancel that this process runs, from its first step to its report.

What is named, and a command that is allowed, go out at once. Then it lists, again and again, whatever is
open: what a listing shows is entered as it comes, until one proves that nothing in scope rests, or the time
is over. A last listing at the deadline names what rests then.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kalshi_cancel.model.mass_request import MassRequest
from kalshi_cancel.model.orders import Order
from kalshi_cancel.store.mass_claim import MassClaim
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say
from worker.dispatch.paid_calls import PaidCalls
from worker.mass import report
from worker.mass.account import Account, Findings
from worker.mass.aside import Aside
from worker.mass.command import Commanding
from worker.mass.entering import Entering
from worker.mass.key_sight import KeySight
from worker.mass.listing import Lister, Listing, NoListing, Proving
from worker.mass.means import Means
from worker.mass.planning import fitting_command
from worker.mass.sending import CommandSender

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1  # at how many orders are still open
LOOK_OFTEN_S = 0.03  # at first: small ones are soon over, and the first cancels tell about the key
OFTEN_FOR_S = 1.0
KEY_HEAD_START_S = 0.1  # of the question what the key may do, before anything is entered
KEY_AGAIN_S = 3.0  # a key that is refused may work again before the deadline
KEY_WITHIN_S = 1.0  # for the answer, when nothing else is missing
PROBE_WITHIN_S = 2.0  # the first cancels tell by then what they can tell
LIST_EVERY_S = 2.0
LIST_SHARE = 0.1  # of the read budget, at most
LIST_PAUSE_TIMES = 2.0  # as long as the last listing took: what reads it does not cancel meanwhile
LIST_AGAIN_S = 0.25  # when one could not be had; twice as long each time
LIST_AGAIN_MOST_S = 1.0
LAST_WITHIN_S = 5.0  # for the last listing
ENDED_PAGES_MOST = 5  # of canceled orders, to see what a command has canceled
NAMED_AT_ONCE = 100  # ids that are read one by one while nothing can be listed
STUMBLES_MOST = 5


class LeftToOthers(Exception):  # noqa: N818 - named after what happens
    """This process stops, or cannot go on with it: another worker shall."""


class MassRun:
    """One mass cancel that this process runs; raises StoreError, and Fenced once it is another's."""

    def __init__(self, request: MassRequest, claim: MassClaim, means: Means) -> None:
        self._request = request
        self._claim = claim
        self._means = means
        clock_s, read_at = claim.now_s(), time.monotonic()
        self._now_s: Callable[[], float] = lambda: clock_s + time.monotonic() - read_at
        self._began_s = clock_s  # in this process
        self._account = Account(request, claim, means)
        self._entering = Entering(request, claim, means, now_s=self._now_s)
        exchange = means.exchange
        calls = PaidCalls(means.pacer, emit=means.emit, spend=claim.spend, request_id=request.request_id)
        self._lister = Lister(
            request, exchange, calls, wait=self._wait, now_s=self._now_s, failed=self._no_head_start
        )
        self._key = KeySight(exchange, calls)
        self._fitting = fitting_command(request)
        self._command: Commanding | None = None
        if self._fitting is not None and not request.dry_run:
            sender = CommandSender(self._fitting, claim, exchange, calls)
            self._command = Commanding(sender, request, claim, means, self._entering, now_s=self._now_s)
        self._proving = Proving(means.read_lag_s)
        self._found = Findings("only planned" if request.dry_run else report.NOTHING_PROVEN)
        self._found_after_s: float | None = None  # from the start until the first order was known
        self._stumbled = 0
        self._failures = 0  # listings in a row that could not be had
        self._listing_is_refused = False
        self._named_read = 0  # ids that were read one by one
        self._still = 0  # orders that are open
        self._settled_s: float | None = None  # since when none is
        self._next_s = -math.inf  # when to list

    def _no_head_start(self) -> None:
        if self._command is not None:
            self._command.go()

    def stumbled(self) -> None:
        """A step has failed unexpectedly; when that goes on, the report says so."""
        self._stumbled += 1

    def to_the_end(self) -> dict[str, Any]:
        """The report; may be asked for again after StoreError. Raises LeftToOthers."""
        if self._stumbled > STUMBLES_MOST:
            self._found.why_not_flat = "a step failed unexpectedly: see the worker's log"
        elif self._request.dry_run:
            self._only_plan()
        else:
            try:
                self._begin()
                while not (self._is_over() and self._has_all()):
                    is_early = self._now_s() - self._began_s < OFTEN_FOR_S
                    pause_s = LOOK_OFTEN_S if is_early else LOOK_EVERY_S
                    self._wait(min(pause_s, max(self._next_s - self._now_s(), 0.0)))
            finally:
                if self._command is not None:
                    self._command.stop()
        if self._still and self._found.why_not_flat == report.NOTHING_PROVEN:
            self._found.why_not_flat = f"{self._still} orders were not settled in time"
        rights = self._key.rights
        self._found.key = None if rights is None else rights.to_json()
        if self._command is not None:
            self._found.command = self._command.given.told(self._command.command.what)
            self._found.command_may_have_worked = self._command.given.may_have_worked
        self._found.not_asked = self._entering.not_asked
        return self._account.report(self._found)

    # -- step by step

    def _begin(self) -> None:
        """Has everything done that needs no listing."""
        self._key.read(0.0)
        self._entering.late = self._account.plan is not None
        if self._request.scope.names_orders_only:
            self._look_at_key()
            self._entering.named()
            self._found_after_s = self._now_s() - self._account.start.started_s
        if self._command is not None:
            self._command.start()

    def _is_over(self) -> bool:
        """One round: looks how it stands, and lists when that is due."""
        self._look()
        now_s, end_s = self._now_s(), self._end_s()
        if now_s >= end_s:
            self._list_once_more(now_s + LAST_WITHIN_S)
            return True
        if self._listing_is_refused:
            return not self._still
        return now_s >= self._next_s and self._list(end_s)

    def _has_all(self) -> bool:
        """Whether Redis has lost nothing since the last look, or it is too late to mend that."""
        self._claim.keep()
        self._claim.count_orders()
        return not self._claim.has_lost or self._now_s() >= self._end_s()

    def _look(self) -> None:
        """Sees how many are open, and whether the first were refused because of the key."""
        self._claim.keep()
        is_late = self._now_s() - self._began_s > OFTEN_FOR_S
        if is_late:
            self._account.read_results()
        self._still, overdue = self._claim.still_open()
        if self._claim.has_lost:  # seen just now, too: then all that is left was struck off
            self._claim.has_lost = False
            self._entering.lost(but=self._account.results.keys())
            self._still, overdue = self._claim.still_open()
        if self._account.plan is not None or is_late:
            self._account.report_progress(self._still, overdue)
        if self._still:
            self._settled_s = None
        elif self._settled_s is None:
            self._settled_s = self._now_s()
            if self._account.plan is not None:
                self._next_s = self._settled_s + self._means.read_lag_s
        probed_long = self._now_s() - self._began_s > PROBE_WITHIN_S
        if self._entering.is_probing and probed_long:
            self._entering.is_probing = False
        elif not self._entering.look_at_first():
            return
        if self._request.scope.names_orders_only:
            self._entering.named()
        self._next_s = self._now_s()

    def _end_s(self) -> float:
        """When its time is over: at the deadline; what is settled by then may still be proven."""
        plan = self._account.plan
        predicted_s = 0.0 if plan is None else float(plan["predicted_s"])
        deadline_s = self._account.start.started_s + predicted_s + self._request.deadline_s
        if self._settled_s is None or self._listing_is_refused:
            return deadline_s
        return max(deadline_s, self._settled_s + self._means.read_lag_s)

    def _list_once_more(self, until_s: float) -> None:
        """Lists for the last time, and once more where two are needed."""
        if self._listing_is_refused:
            return
        self._list(until_s, is_last=True)
        if self._proving.needs_another:
            self._list(until_s, is_last=True)

    def _list(self, until_s: float, *, is_last: bool = False) -> bool:
        """Lists, and has what is found entered as it comes; whether it is over with that."""
        began_s, before = self._now_s(), self._entering.number
        with Aside[Mapping[str, Order]](lambda pages: self._enter_pages(pages, began_s)) as entering:
            listing = self._lister.resting(until_s, entering)
        if isinstance(listing, NoListing):
            if self._command is not None:
                self._command.listed(None)
            return self._not_listed(listing, until_s, is_last=is_last)
        if self._command is not None:
            self._command.listed(listing)
        self._failures = 0
        if self._account.plan is None:
            self._make_plan(listing)
        elif new := self._entering.number - before:
            say(log, LogEvent.ORDERS_APPEARED, request_id=self._request.request_id, count=new)
            self._claim.note_audit("newly_resting", orders=new, listed_at=listing.at, sha256=listing.sha256)
        return self._judged(listing, until_s)

    def _look_at_key(self) -> None:
        """Has only a few orders entered at first where the key may not cancel: another worker's may."""
        rights = self._key.read(KEY_HEAD_START_S)
        self._entering.is_probing = rights is not None and not rights.may_cancel

    def _enter_pages(self, pages: Sequence[Mapping[str, Order]], began_s: float) -> None:
        """Enters pages as one, which takes less time; where a command may go out in between, one by one."""
        joined = {order_id: order for page in pages for order_id, order in page.items()}
        for orders in [joined] if self._command is None else pages:
            self._enter(orders, began_s)

    def _enter(self, orders: Mapping[str, Order], began_s: float) -> None:
        if not orders:
            return
        if self._found_after_s is None:
            self._found_after_s = self._now_s() - self._account.start.started_s
            self._look_at_key()
        if self._command is not None:
            self._command.enter(orders, began_s)
        else:
            self._entering.listed(orders, began_s)

    def _make_plan(self, listing: Listing | None) -> None:
        command = self._fitting
        if self._command is not None and self._command.is_declined:
            command = None
        now_s = self._now_s() - self._account.start.started_s
        after_s = now_s if self._found_after_s is None else self._found_after_s
        self._account.make_plan(listing, after_s=after_s, command=command)
        self._entering.late = True

    def _judged(self, listing: Listing, until_s: float) -> bool:
        """What a listing tells; whether it is over with that."""
        self._found.cannot_tell = listing.cannot_tell
        proven = self._proving.take(listing, self._settled_s)
        self._found.why_not_flat = self._proving.why or self._found.why_not_flat
        now_s = self._now_s()
        budget_s = listing.pages * self._means.pacer.limits.list_cost / self._means.pacer.limits.read_refill
        took_s = now_s - listing.began_s
        self._next_s = now_s + max(LIST_EVERY_S, budget_s / LIST_SHARE, took_s * LIST_PAUSE_TIMES)
        if self._proving.needs_another:
            self._next_s = now_s
        elif self._settled_s is not None and listing.began_s < self._settled_s + self._means.read_lag_s:
            self._next_s = self._settled_s + self._means.read_lag_s
        if proven is not None:
            return not self._has_hit_more(until_s) and self._is_seen_whole(proven)
        if self._still:
            return False
        why = self._entering.why_no_use(listing.resting)
        if why is not None:
            self._found.why_not_flat = why
        return why is not None or self._proving.is_hopeless

    def _has_hit_more(self, until_s: float) -> bool:
        """Enters what a command has canceled without any listing having shown it; whether there was any."""
        if self._command is None or not self._command.given.may_have_worked:
            return False
        ended = self._lister.ended(until_s, pages_most=ENDED_PAGES_MOST)
        before, later = self._command.hit(ended)
        self._found.canceled_by_command |= later
        self._command.enter(before, 0.0)
        return bool(before)

    def _is_seen_whole(self, listing: Listing) -> bool:
        """Takes the proof, if the key sees all of the scope; whether it is over."""
        scope = self._request.scope
        rights = self._key.read(KEY_WITHIN_S)
        if (rights is not None and rights.sees_all_of(scope)) or self._account.all_named_are_over():
            self._found.flat_listing = listing.to_json()
            self._found.proven_s = round(self._now_s() - self._account.start.started_s, 3)
            return True
        if rights is None:
            self._found.why_not_flat = f"what this key sees is not known: {self._key.failure}"
            return False
        self._found.why_not_flat = (
            f"this key sees subaccount {rights.subaccount} only: what rests in others is not known"
        )
        return True

    def _not_listed(self, failure: NoListing, until_s: float, *, is_last: bool) -> bool:
        """No listing could be had; whether it is over with that."""
        self._found.why_not_flat = f"no listing could be had: {failure.problem.code}"
        if failure.is_of_the_key and not is_last:
            refused = self._account.note_refused(self._means.exchange.signs_with[0])
            if self._means.others(refused):
                raise LeftToOthers
        if failure.is_final:
            self._listing_is_refused = True
            return not self._still
        pause_s = min(LIST_AGAIN_S * 2.0**self._failures, LIST_AGAIN_MOST_S)
        if failure.is_of_the_key:
            pause_s = KEY_AGAIN_S
        self._failures += 1
        self._next_s = self._now_s() + max(pause_s, failure.retry_after_s)
        scope = self._request.scope
        if not (scope.names_orders_only or failure.is_of_the_key):  # what is named can be looked at by itself
            began_s, ids = self._now_s(), scope.order_ids[self._named_read :][:NAMED_AT_ONCE]
            self._named_read += len(ids)
            self._enter(self._lister.named(ids, until_s), began_s)
        return False

    def _only_plan(self) -> None:
        """Lists until that works, or the time is over, and plans."""
        self._key.read(KEY_HEAD_START_S)
        until_s = self._account.start.started_s + self._request.deadline_s
        while True:
            began_s = self._now_s()
            listing = self._lister.resting(until_s)
            if isinstance(listing, Listing):
                self._found_after_s = self._now_s() - began_s
                self._make_plan(listing)
                return
            self._found.why_not_flat = f"no listing could be had: {listing.problem.code}"
            if listing.is_final or listing.is_of_the_key or self._now_s() >= until_s:
                return
            self._wait(max(LIST_AGAIN_S, listing.retry_after_s))

    def _wait(self, seconds: float) -> None:
        """Waits, keeping the lease; raises LeftToOthers when this process stops."""
        until = time.monotonic() + seconds
        while True:
            if self._means.stopping.is_set():
                raise LeftToOthers
            self._claim.keep()
            left_s = until - time.monotonic()
            if left_s <= 0:
                return
            self._means.stopping.wait(min(left_s, 0.5))
