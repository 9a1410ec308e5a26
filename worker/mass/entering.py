"""Enters the orders of a mass cancel into the store's risk lane, each once while it is open.

What a listing shows of an order that is being canceled already is no reason to ask again. What it shows of
one whose record is older than reads may lag is: the exchange's word is newer than ours. Where the first
cancels are all refused because of the key, the others are not asked for.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from kalshi_cancel.model.fields import NUMBER_MAX, is_ticker
from kalshi_cancel.model.mass_request import MassRequest
from kalshi_cancel.model.orders import Order
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import CancelResult, Outcome, Problem
from kalshi_cancel.store.cancels import ACCEPT_AT_ONCE
from kalshi_cancel.store.mass_claim import MassClaim, Planned
from kalshi_cancel.store.pending import Accepted, Known
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say
from worker.mass.means import Means

log = logging.getLogger(__name__)

# How long the orders' own waiters wait to be told; the mass cancel has its own deadline.
ORDER_DEADLINE_S = 60.0
REFUSALS_MOST = 3  # of one order: a refusal is permanent, but for a blink of something in between
# Orders that are noted together before they are entered, once the first are on their way.
ENTER_AT_ONCE = 500
# Sizes of a listing that began longer ago prove nothing: somebody may have changed them since.
SIZES_STAND_S = 0.5
# The first cancels in each subaccount tell whether the key may cancel there: so many are watched, and so many
# refusals are enough.
WATCHED = 10
REFUSED_ENOUGH = 3
_OF_THE_KEY = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


@dataclass(frozen=True, slots=True)
class Entered:
    """What was entered: cancels that are open now, and those orders that somebody else is at already."""

    requests: tuple[CancelRequest, ...] = ()
    joined: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class _Noted:
    """Orders that are noted; those with a final record are ``recorded``."""

    requests: Sequence[CancelRequest]
    found: Mapping[str, Planned]
    recorded: set[str]


class Entering:
    """Enters for one mass cancel; safe to share between threads."""

    def __init__(
        self,
        request: MassRequest,
        claim: MassClaim,
        means: Means,
        *,
        now_s: Callable[[], float],
    ) -> None:
        self._request = request
        self._claim = claim
        self._store = means.store
        self._call_senders = means.call_senders
        self._now_s = now_s
        self._read_lag_s = means.read_lag_s
        self._lock = threading.Lock()
        # Everything found so far; of what was entered here, the subaccount.
        self._known: dict[str, int | None] = dict.fromkeys(claim.orders())
        self._in_doubt: set[str] = set()  # Redis may have lost that we have canceled these
        self._refusals: Counter[str] = Counter()
        self._watched: dict[str, int | None] = {}
        self._works: set[int | None] = set()  # subaccounts in which the key may cancel
        self._no_use: dict[int | None, Problem] = {}  # those in which it may not
        self.is_probing = False  # only a few are entered, to see whether the key may cancel at all
        self.late = False  # what comes now was not there when the plan was made
        self.not_asked: dict[str, str] = {}  # with the code of what refuses them

    def knows(self, order_id: str) -> bool:
        """Whether an order has been found already."""
        return order_id in self._known

    @property
    def number(self) -> int:
        """How many orders were found so far."""
        return len(self._known)

    def named(self) -> None:
        """Enters the ids that the scope names and nothing else: wherever they rest."""
        with self._lock:
            ids = self._worth_asking([each for each in self._request.scope.order_ids if not self.knows(each)])
            self._enter_all(dict.fromkeys(ids), None, None)

    def listed(self, orders: Mapping[str, Order], began_s: float, doubt: Known | None = None) -> Entered:
        """Enters what a listing shows that began at that moment; ``doubt``: what is known of new ones."""
        with self._lock:
            new = self._worth_asking([each for each in orders if not self.knows(each)], orders)
            known = [each for each in orders if self.knows(each)]
            over = list(self._claim.without_entry(known)) if known else []
            wanted = [*new, *self._worth_asking_again(over)]
            return self._enter_all({each: orders[each] for each in wanted}, began_s, doubt)

    def lost(self, *, but: Collection[str]) -> None:
        """Enters anew what Redis has lost: orders that have neither a record nor an entry, these excepted.

        The exchange tells what became of those. That it was ours, nothing proves any more.
        """
        with self._lock:
            self._in_doubt |= self._known.keys()
            known = [each for each in self._known if each not in but]
            recorded = self._store.records(known)
            gone = list(self._claim.without_entry([each for each in known if each not in recorded]))
            if not gone:
                return
            say(log, LogEvent.MASS_ORDERS_RESTORED, request_id=self._request.request_id, count=len(gone))
            self._claim.open_again(gone)
            for start in range(0, len(gone), ACCEPT_AT_ONCE):
                portion = gone[start : start + ACCEPT_AT_ONCE]
                self._accept([self._request_for(each, None) for each in portion])

    def look_at_first(self) -> bool:
        """Looks what has become of the first cancels; whether that changes what is entered."""
        with self._lock:
            watched = [each for each, subaccount in self._watched.items() if subaccount not in self._works]
            if not watched:
                return False
            results = self._store.records(watched)
            was_probing, before = self.is_probing, len(self._no_use)
            for subaccount in {self._watched[each] for each in watched}:
                there = [each for each in watched if self._watched[each] == subaccount]
                self._judge_key(subaccount, [results.get(each) for each in there])
            if self._works:
                self.is_probing = False
            return was_probing != self.is_probing or len(self._no_use) > before

    def why_no_use(self, order_ids: Iterable[str]) -> str | None:
        """Why asking for these orders is no use, when that is true of all of them."""
        ids = list(order_ids)
        of_the_key = {
            self._no_use[sub].code for each in ids if (sub := self._known.get(each)) in self._no_use
        }
        of_the_key |= {self.not_asked[each] for each in ids if each in self.not_asked}
        by_itself = [each for each in ids if self._refusals[each] >= REFUSALS_MOST]
        useless = {each for each in ids if self._known.get(each) in self._no_use or each in self.not_asked}
        if not ids or len(useless | set(by_itself)) < len(ids) or self.is_probing:
            return None
        if of_the_key:
            codes = ", ".join(sorted(of_the_key))
            return f"{len(ids)} orders rest, and the exchange refuses this key's cancels: {codes}"
        record = self._store.record(ids[0])
        code = record.error.code if record is not None and record.error is not None else "refused"
        return f"{len(ids)} orders rest and are refused: {code}"

    # -- which

    def _worth_asking(self, new: Sequence[str], orders: Mapping[str, Order] | None = None) -> list[str]:
        """Of orders that were not found before, those to be entered now."""
        wanted: list[str] = []
        for order_id in new:
            subaccount = None if orders is None else orders[order_id].subaccount
            problem = self._no_use.get(subaccount)
            if problem is not None:
                self.not_asked[order_id] = problem.code
            elif self.is_probing and len(self._watched) + len(wanted) >= REFUSED_ENOUGH:
                self.not_asked[order_id] = "key_may_not_cancel"
            else:
                self.not_asked.pop(order_id, None)
                wanted.append(order_id)
        return wanted

    def _worth_asking_again(self, over: Sequence[str]) -> list[str]:
        """Those that are not open and rest, but for what the exchange has refused time after time."""
        for order_id, result in self._store.records(over).items():
            if result.outcome is Outcome.REFUSED:
                self._refusals[order_id] += 1
        return [
            order_id
            for order_id in over
            if self._refusals[order_id] < REFUSALS_MOST and self._known.get(order_id) not in self._no_use
        ]

    def _judge_key(self, subaccount: int | None, results: Sequence[CancelResult | None]) -> None:
        """Decides from the first cancels of a subaccount whether the others are worth asking for."""
        known = [each for each in results if each is not None]
        if any(each.outcome is Outcome.CANCELED for each in known):
            self._works.add(subaccount)
            return
        problems = [
            each.error for each in known if each.outcome is Outcome.REFUSED and each.error is not None
        ]
        refused = [each for each in problems if each.http_status in _OF_THE_KEY]
        enough = min(REFUSED_ENOUGH, len(results)) if self.is_probing else REFUSED_ENOUGH
        if len(refused) < enough or subaccount in self._no_use:
            return
        self._no_use[subaccount] = refused[0]
        self.is_probing = False
        there = [order_id for order_id, where in self._known.items() if where == subaccount]
        withdrawn = self._claim.withdraw([_not_asked_for(each, refused[0]) for each in there])
        say(
            log,
            LogEvent.MASS_KEY_REFUSED,
            request_id=self._request.request_id,
            count=withdrawn + len(self.not_asked),
            code=refused[0].code,
            why=refused[0].message,
        )

    # -- how

    def _enter_all(
        self, orders: Mapping[str, Order | None], began_s: float | None, doubt: Known | None
    ) -> Entered:
        """Enters them in portions: the first are sent while the others are noted."""
        entered: list[Entered] = []

        ids = list(orders)
        while ids:
            at_once = ENTER_AT_ONCE if self._known else ACCEPT_AT_ONCE
            portion, ids = ids[:at_once], ids[at_once:]
            noted = self._note({each: orders[each] for each in portion}, swept=doubt is not None)
            entered.append(self._accept_noted(noted, began_s, doubt))
        if orders:
            self._claim.note_audit("entered", orders=len(orders))
        requests = tuple(request for each in entered for request in each.requests)
        return Entered(requests, frozenset().union(*(each.joined for each in entered)))

    def _note(self, orders: Mapping[str, Order | None], *, swept: bool) -> _Noted:
        """Notes orders with what they have, before they are entered."""
        ids = list(orders)
        recorded = {each for each, result in self._store.records(ids).items() if result.outcome.final}
        found = {each: self._planned(orders[each], settled=each in recorded, swept=swept) for each in ids}
        self._claim.add_orders(found)
        if self._claim.has_lost:  # what was asked for before may have been done
            self._in_doubt |= self._known.keys()
        requests = [self._request_for(order_id, order) for order_id, order in orders.items()]
        self._known |= {each.order_id: each.subaccount for each in requests}
        return _Noted(requests, found, recorded)

    def _accept_noted(self, noted: _Noted, began_s: float | None, doubt: Known | None) -> Entered:
        """Enters what was noted; where the listing is newer than a record, that order anew."""
        age_s = None if began_s is None else self._now_s() - began_s
        older_than_s = None if age_s is None else age_s + self._read_lag_s
        requests = noted.requests
        if age_s is not None and age_s > SIZES_STAND_S:
            requests = [replace(each, seen_remaining=None, seen_filled=None) for each in requests]
        accepted = self._accept(requests, known=doubt, records_older_than_s=older_than_s)
        anew = noted.recorded - accepted.settled.keys()
        if anew:
            asked = {each: replace(noted.found[each], settled=False) for each in anew}
            self._claim.add_orders(asked, anew=True)
        opened = tuple(each for each in requests if each.order_id not in accepted.settled)
        self._watch(opened)
        return Entered(opened, accepted.joined)

    def _accept(self, requests: Sequence[CancelRequest], **how: Any) -> Accepted:
        accepted = self._store.accept(
            requests, lane=Lane.RISK, default_deadline_s=ORDER_DEADLINE_S, fence=self._claim.fence, **how
        )
        if not accepted.listener_woken:
            self._call_senders(Lane.RISK, accepted.waiting_messages)
        return accepted

    def _watch(self, requests: Iterable[CancelRequest]) -> None:
        number = Counter(self._watched.values())
        for each in requests:
            if number[each.subaccount] < WATCHED:
                number[each.subaccount] += 1
                self._watched[each.order_id] = each.subaccount

    def _planned(self, order: Order | None, *, settled: bool, swept: bool) -> Planned:
        if order is None:
            return Planned(None, None, settled, swept, self.late)
        return Planned(order.remaining_count, order.fill_count, settled, swept, self.late)

    def _request_for(self, order_id: str, order: Order | None) -> CancelRequest:
        """The cancel of one order, as far as it was seen; what of it no cancel may say is left out."""
        shard, subaccount = None, None
        if order is not None:  # what an order does not tell itself, the listing that it came from was for
            scope = self._request.scope
            shard = scope.exchange_index if order.exchange_index is None else order.exchange_index
            subaccount = scope.subaccount if order.subaccount is None else order.subaccount
        return CancelRequest(
            order_id,
            market_ticker=order.ticker if order is not None and is_ticker(order.ticker) else None,
            exchange_index=shard if shard is None or -1 <= shard <= NUMBER_MAX else None,
            subaccount=subaccount if subaccount is None or 0 <= subaccount <= NUMBER_MAX else None,
            requested_by=self._request.requested_by,
            reason=self._request.reason,
            request_id=self._request.request_id,
            traceparent=self._request.traceparent,
            seen_remaining=None if order is None else order.remaining_count,
            seen_filled=None if order is None else order.fill_count,
            again=order_id in self._in_doubt,
        )


def _not_asked_for(order_id: str, problem: Problem) -> CancelResult:
    """The result of an order for which asking is no use."""
    words = f"not asked for, because the first cancels were refused: {problem.message}"
    return CancelResult(
        order_id,
        Outcome.REFUSED,
        error=Problem(problem.code, words, problem.http_status),
    )
