"""The archive finds orders that the exchange has moved away from its reads, some time after their end.

It can only be listed, not asked for one order. So one look at all of it serves everybody: a look that began
after an order was not found by a read tells for sure whether the archive has that order.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.exchange.protocol import Failure, Meaning, Page
from kalshi_cancel.model.orders import Order
from kalshi_cancel.model.results import Problem
from worker.dispatch.paid_calls import PaidCalls, Target

# Between the beginnings of two looks, for each page of the last one: the read tokens are for others, too.
LOOK_AGAIN_S = 0.5
PAGES_MOST = 200  # 200,000 orders: longer, and nobody waits for the end
WITHOUT_NEWS_MOST = 10  # pages in a row: it has no end, or goes round in a circle
TOKENS_AGAIN_S = 0.5
NOT_NOW_S = 0.3  # long enough for a sender to take up something else meanwhile


@dataclass(frozen=True, slots=True)
class NotNow:
    """Somebody else is looking, or has just looked: ask again after ``wait_s``."""

    wait_s: float


@dataclass(slots=True)
class _Look:
    """One look at the whole archive: which page, by its cursor, has which order."""

    began: float  # monotonic
    page_of: dict[str, str] = field(default_factory=dict)
    pages: int = 0
    failure: Failure | None = None


class Archive:
    """The archive of one account, for one process; safe to share between threads."""

    def __init__(self, exchange: Exchange, calls: PaidCalls, stopping: threading.Event) -> None:
        self._exchange = exchange
        self._calls = calls
        self._stopping = stopping
        self._looking = threading.Lock()
        self._last = _Look(-float("inf"))

    def find(self, order_id: str, *, missing_since: float) -> Order | Failure | NotNow | None:
        """The order as the archive has it, None when it has none.

        ``missing_since`` (monotonic): reads did not show it any more at that moment.
        """
        if not self._looking.acquire(blocking=False):
            return NotNow(NOT_NOW_S)
        try:
            early_s = self._last.began + LOOK_AGAIN_S * max(self._last.pages, 1) - time.monotonic()
            if self._last.began < missing_since or self._last.failure is not None:
                if early_s > 0:
                    return self._last.failure or NotNow(max(early_s, NOT_NOW_S))
                self._last = self._look()
            if order_id in self._last.page_of:
                return self._again(order_id, self._last.page_of[order_id])
            return self._last.failure
        finally:
            self._looking.release()

    def _look(self) -> _Look:
        look, cursor = _Look(time.monotonic()), ""
        without_news = 0
        while look.pages < PAGES_MOST and without_news < WITHOUT_NEWS_MOST:
            page = self._page(cursor)
            if isinstance(page, Failure):
                # An exchange without an archive has nothing in it.
                look.failure = None if page.meaning is Meaning.NOT_FOUND and page.proof else page
                return look
            look.pages += 1
            known = len(look.page_of)
            look.page_of.update(dict.fromkeys((order.order_id for order in page.orders), cursor))
            without_news = 0 if len(look.page_of) > known else without_news + 1
            cursor = page.cursor
            if not page.is_whole:
                words = "a page of the archive has an error, or does not say whether more follow"
                look.failure = Failure(Meaning.NOT_SENT, Problem("archive_partial", words))
                return look
            if not cursor:
                return look
        words = f"the archive has more than {look.pages} pages: the order may be further back"
        look.failure = Failure(Meaning.NOT_SENT, Problem("archive_too_long", words))
        return look

    def _again(self, order_id: str, cursor: str) -> Order | Failure:
        page = self._page(cursor)
        if isinstance(page, Failure):
            return page
        found = next((order for order in page.orders if order.order_id == order_id), None)
        gone = Problem("archive_moved", "the archive has changed while it was read")
        return found or Failure(Meaning.NOT_SENT, gone)

    def _page(self, cursor: str) -> Page | Failure:
        if self._stopping.is_set():
            return _STOPPING
        paid = self._calls.take_in_time("read", self._calls.limits.list_cost, self._waited)
        if paid is None:
            return _STOPPING
        return self._calls.send(paid, Target("list"), lambda: self._exchange.list_archive({}, cursor)).answer

    def _waited(self, seconds: float) -> bool:
        return not self._stopping.wait(min(seconds, TOKENS_AGAIN_S))


_STOPPING = Failure(Meaning.NOT_SENT, Problem("stopping", "this worker is stopping"))
