"""Lists what rests in the scope of a mass cancel, and tells whether a listing proves that nothing does.

Reads lag writes, so a listing proves something only when it began after everything known was settled, plus
the lag. Every order in it must have been judged. A listing of several pages is no snapshot: where cursors are
offsets, an order that leaves a page which was read already hides another. So of such a listing a second one
must show every order again: then none has left meanwhile, and none was hidden.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.exchange.protocol import Failure, Meaning, Page
from kalshi_cancel.model.mass_request import MassRequest
from kalshi_cancel.model.orders import Order
from kalshi_cancel.model.results import Problem
from kalshi_cancel.model.times import utc_text
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import say
from worker.dispatch.paid_calls import PaidCalls, Payment, Target
from worker.mass.judging import Judge

log = logging.getLogger(__name__)

PAGE_TRIES = 3
PAGE_AGAIN_S = 0.25
PAGES_MOST = 1_000  # a million orders
WITHOUT_NEWS_MOST = 10  # pages in a row: the listing has no end, or goes round in a circle
TOKENS_AGAIN_S = 1.0  # at most between two looks whether there are tokens for it
NAMED_AT_MOST = 3  # orders in a sentence
SAME_AGAIN = 3  # listings that nobody can judge, until waiting is no use


@dataclass(frozen=True, slots=True)
class Listing:
    """What rested in scope, as listed from ``began_s`` on (the server's clock), and a fingerprint of all that
    was shown.

    ``seen`` are all that were listed; ``cannot_tell`` those that nobody can judge, with the reason;
    ``unreadable``: so many entries are no orders that we understand.
    """

    began_s: float
    at: str
    resting: Mapping[str, Order]
    cannot_tell: Mapping[str, str]
    unreadable: int
    seen: frozenset[str]
    sha256: str
    pages: int
    is_snapshot: bool

    @property
    def is_clean(self) -> bool:
        """Whether it shows nothing in scope, and nothing that may be."""
        return not self.resting and not self.cannot_tell and not self.unreadable

    def why_not_clean(self) -> str:
        """What is in the way of a proof, in words."""
        if self.resting:
            return f"{len(self.resting)} orders were still resting at {self.at}"
        if self.cannot_tell:
            shown = [f"{order_id}: {why}" for order_id, why in self.cannot_tell.items()][:NAMED_AT_MOST]
            more = ", ..." if len(self.cannot_tell) > NAMED_AT_MOST else ""
            return (
                f"of {len(self.cannot_tell)} resting orders nobody can tell whether they are in scope"
                f" ({', '.join(shown)}{more})"
            )
        return f"{self.unreadable} listed orders cannot be understood"

    def proves_with(self, second: Listing) -> bool:
        """Whether this and the next one together prove that nothing rests in scope."""
        return self.is_clean and second.is_clean and self.seen <= second.seen

    def to_json(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"at": self.at, "sha256": self.sha256, "pages": self.pages}


@dataclass(frozen=True, slots=True)
class NoListing:
    """No whole listing was had. ``is_final``: it is refused, and asking again is no use."""

    problem: Problem
    is_final: bool = False
    is_of_the_key: bool = False
    retry_after_s: float = 0.0


class Proving:
    """Decides from one listing after the other whether nothing in scope rests; pure.

    ``why`` says what is in the way; ``is_hopeless``: what nobody can judge stays as it is.
    """

    def __init__(self, read_lag_s: float) -> None:
        self._read_lag_s = read_lag_s
        self._before: Listing | None = None  # a clean one of several pages
        self._same: tuple[object, int] = (None, 0)
        self.why: str | None = None

    @property
    def needs_another(self) -> bool:
        """Whether a clean listing waits for a second one."""
        return self._before is not None

    @property
    def is_hopeless(self) -> bool:
        """Whether waiting for another listing is no use."""
        return self._same[1] >= SAME_AGAIN

    def take(self, listing: Listing, settled_s: float | None) -> Listing | None:
        """The listing that is proven by this one; ``settled_s``: since when everything known is settled."""
        before, self._before = self._before, None
        if not listing.is_clean:
            self.why = listing.why_not_clean()
            shown = None if listing.resting else (frozenset(listing.cannot_tell), listing.unreadable)
            self._same = (shown, self._same[1] + 1 if shown and shown == self._same[0] else 1 if shown else 0)
            return None
        self._same = (None, 0)
        if settled_s is None or listing.began_s < settled_s + self._read_lag_s:
            return None
        if listing.is_snapshot:
            return listing
        if before is not None and before.proves_with(listing):
            return before
        self.why = f"its listing has {listing.pages} pages, and orders left it while it was read"
        self._before = listing
        return None


@dataclass(slots=True)
class _Draft:
    """A listing in the making."""

    judge: Judge
    resting: dict[str, Order] = field(default_factory=dict)
    cannot_tell: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    unreadable: int = 0
    pages: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, page: Page) -> dict[str, Order]:
        """Takes a page in; the orders of it that are to be canceled."""
        self.pages += 1
        self.unreadable += page.unreadable
        found: dict[str, Order] = {}
        for order in page.orders:
            self.digest.update(f"{order.order_id} {order.status} {order.remaining_count}\n".encode())
            self.seen.add(order.order_id)
            if order.status.terminal:
                continue  # listed by mistake
            judgement = self.judge(order)
            if judgement.is_meant:
                found[order.order_id] = order
            elif judgement.is_meant is None:
                self.cannot_tell[order.order_id] = judgement.unclear
        self.resting |= found
        return found


class Lister:
    """Lists for one mass cancel, paid for from the read bucket.

    ``wait`` waits, and raises when this runner is to stop; ``failed`` is called when a page could not be had.
    """

    def __init__(
        self,
        request: MassRequest,
        exchange: Exchange,
        calls: PaidCalls,
        *,
        wait: Callable[[float], None],
        now_s: Callable[[], float],
        failed: Callable[[], object] = lambda: None,
    ) -> None:
        self._scope = request.scope
        self._judge = Judge(request.scope)
        self._id = request.request_id
        self._exchange = exchange
        self._calls = calls
        self._wait = wait
        self._now_s = now_s
        self._failed = failed

    def resting(
        self, until_s: float, on_page: Callable[[Mapping[str, Order]], None] = lambda _found: None
    ) -> Listing | NoListing:
        """Every resting order in scope; ``on_page`` is given what each page shows of them."""
        draft = _Draft(self._judge)
        began_s = self._now_s()
        at = utc_text(began_s)
        queries = self._scope.listings()
        for query in queries:
            failure = self._read(query, until_s, lambda page: on_page(draft.add(page)))
            if failure is not None:
                return failure
        if draft.unreadable:
            say(log, LogEvent.LISTING_UNREADABLE, request_id=self._id, count=draft.unreadable)
        return Listing(
            began_s=began_s,
            at=at,
            resting=draft.resting,
            cannot_tell=draft.cannot_tell,
            unreadable=draft.unreadable,
            seen=frozenset(draft.seen),
            sha256=draft.digest.hexdigest(),
            pages=draft.pages,
            is_snapshot=draft.pages == len(queries),
        )

    def ended(self, until_s: float, *, pages_most: int) -> list[Order]:
        """Orders in scope that are listed as canceled, the first so many pages of them."""
        found: list[Order] = []

        def take(page: Page) -> None:
            found.extend(order for order in page.orders if self._judge(order).is_meant)

        self._read({"status": "canceled"}, until_s, take, pages_most=pages_most)
        return found

    def named(self, order_ids: Sequence[str], until_s: float) -> dict[str, Order]:
        """Those of these orders that rest in scope, each read by itself; ends early when time is over."""
        found: dict[str, Order] = {}
        for order_id in order_ids:
            paid = self._pay(self._calls.limits.read_cost, until_s)
            if paid is None:
                break
            time_left_s = max(until_s - self._now_s(), 0.1)
            ask = functools.partial(self._exchange.read_order, order_id, time_left_s=time_left_s)
            answer = self._calls.send(paid, Target("read_back"), ask).answer
            if isinstance(answer, Order) and not answer.status.terminal and self._judge.alone(answer):
                found[order_id] = answer
        return found

    def _read(
        self,
        query: Mapping[str, str | int],
        until_s: float,
        take: Callable[[Page], None],
        *,
        pages_most: int = PAGES_MOST,
    ) -> NoListing | None:
        """All pages of a query, or the first so many; what stood in the way of that."""
        cursor, seen, without_news = "", set[str](), 0
        for _ in range(pages_most):
            page = self._page(query, cursor, until_s)
            if isinstance(page, NoListing):
                return page
            take(page)
            cursor = page.cursor
            if not page.is_whole:
                said = "a page of the exchange's listing has an error, or does not say whether more follow"
                return NoListing(Problem("partial_listing", said))
            if not cursor:
                return None
            news = {order.order_id for order in page.orders} - seen
            seen |= news
            without_news = 0 if news else without_news + 1
            if without_news >= WITHOUT_NEWS_MOST:
                said = f"the last {without_news} pages of the exchange's listing show nothing new"
                return NoListing(Problem("endless_listing", said))
        return NoListing(Problem("too_many_pages", f"there are more than {pages_most} pages"))

    def _page(self, query: Mapping[str, str | int], cursor: str, until_s: float) -> Page | NoListing:
        """One page, asked for a few times."""
        tries = 0
        while True:
            paid = self._pay(self._calls.limits.list_cost, until_s)
            if paid is None:
                return NoListing(Problem("no_time", "its time was over, or there were no tokens for it"))
            ask = functools.partial(self._exchange.list_orders, query, cursor)
            page = self._calls.send(paid, Target("list"), ask).answer
            tries += 1
            if not isinstance(page, Failure):
                return page
            self._failed()
            problem = page.problem
            say(
                log,
                LogEvent.LISTING_FAILED,
                request_id=self._id,
                code=problem.code,
                why=problem.message,
            )
            wait_s = max(page.retry_after_s or 0.0, PAGE_AGAIN_S)
            is_of_the_key = page.meaning is Meaning.KEY_REFUSED
            is_final = page.meaning is Meaning.REFUSED
            is_enough = is_final or is_of_the_key or tries >= PAGE_TRIES
            if is_enough or self._now_s() + wait_s >= until_s:
                return NoListing(page.problem, is_final, is_of_the_key, wait_s)
            self._wait(wait_s)

    def _pay(self, cost: float, until_s: float) -> Payment | None:
        """Takes the tokens of a read; None: not in time."""

        def wait(seconds: float) -> bool:
            if self._now_s() >= until_s:
                return False
            self._wait(min(seconds, TOKENS_AGAIN_S))
            return True

        self._wait(0.0)  # which sees whether this runner is to stop
        if self._now_s() >= until_s:
            return None
        return self._calls.take_in_time("read", cost, wait)
