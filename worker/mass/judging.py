"""Judges orders: whether a scope means an order that the exchange has listed, or nobody can tell.

What cannot be told is neither canceled nor passed over in silence: it stands in the way of a proof.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from kalshi_cancel.exchange.moments import parse_time_ms
from kalshi_cancel.model.orders import Order
from kalshi_cancel.model.scope import Scope


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether an order is meant; None: nobody can tell, because of what ``unclear`` names."""

    is_meant: bool | None
    unclear: str = ""


class Judge:
    """Tells of each order of :meth:`Scope.listings` whether the scope means it.

    By everything that the order's own fields tell. Of what the exchange has filtered by, an order need not
    tell (old ones do not): only what it tells otherwise counts, and which event it belongs to is the
    exchange's word alone. A filter that an order's fields neither pass nor fail leaves it unclear; an order
    that is named by its id is meant then.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._named = frozenset(scope.order_ids)
        self._set = [
            (name, fits, wanted)
            for name, fits in _FITS.items()
            if (wanted := getattr(scope, name)) is not None and wanted != ()
        ]

    def __call__(self, order: Order) -> Judgement:
        """What there is to say of one order."""
        if self._named and order.order_id not in self._named:
            return Judgement(is_meant=False)
        unclear = ""
        for name, fits, wanted in self._set:
            fitting = fits(wanted, order)
            if fitting is False:
                return Judgement(is_meant=False)
            if fitting is None:
                unclear = unclear or name
        if unclear and not self._named:
            return Judgement(None, _UNCLEAR[unclear])
        return Judgement(is_meant=True)

    def alone(self, order: Order) -> bool:
        """Whether an order is meant that was read by itself: the exchange has filtered nothing then.

        What it does not tell itself, only a listing can.
        """
        scope, ticker = self._scope, order.ticker or ""
        is_there = scope.subaccount in (None, order.subaccount or 0)  # the primary's often tell none
        is_there &= scope.exchange_index in (None, order.exchange_index)
        is_there &= not scope.tickers or ticker in scope.tickers
        is_there &= not scope.event_tickers or any(_is_of(event, ticker) for event in scope.event_tickers)
        return is_there and self(order).is_meant is True


def _is_of(event: str, ticker: str) -> bool:
    return ticker == event or ticker.startswith(f"{event}-")


def _fits_tickers(wanted: tuple[str, ...], order: Order) -> bool | None:
    if not order.ticker:
        return True if len(wanted) == 1 else None  # a single one the exchange has filtered by
    return order.ticker in wanted


def _fits_start(wanted: str, order: Order) -> bool | None:
    return order.ticker.startswith(wanted) if order.ticker else None


def _fits_client_order_id(wanted: str, order: Order) -> bool | None:
    given = order.raw.get("client_order_id")
    return given.startswith(wanted) if isinstance(given, str) else None


def _fits_group(wanted: str, order: Order) -> bool | None:
    given = order.raw.get("order_group_id")  # left out of an order that is in none
    return (given or "") == wanted if isinstance(given, str | None) else None


def _fits_side(wanted: str, order: Order) -> bool | None:
    is_bid = _is_bid(order.raw)
    return None if is_bid is None else (wanted in ("yes", "bid")) == is_bid


def _fits_price(fits: Callable[[Decimal], bool], order: Order) -> bool | None:
    price = _price(order.raw.get("yes_price_dollars"), order.raw.get("yes_price"))
    return None if price is None else fits(price)


def _is_since(wanted: datetime, order: Order) -> bool | None:
    """Whether it was created at that moment or later; its own moment is told to within some ms."""
    at_ms, within_ms = parse_time_ms(order.raw.get("created_time"))
    wanted_ms = wanted.timestamp() * 1000
    if at_ms is None:
        return None
    return True if at_ms >= wanted_ms else False if at_ms + within_ms <= wanted_ms else None


def _is_before(wanted: datetime, order: Order) -> bool | None:
    is_since = _is_since(wanted, order)
    return None if is_since is None else not is_since


# Whether an order passes a filter that is set; None: its own fields do not tell.
_FITS: Mapping[str, Callable[[Any, Order], bool | None]] = {
    "subaccount": lambda wanted, order: order.subaccount in (None, wanted),
    "exchange_index": lambda wanted, order: order.exchange_index in (None, wanted),
    "tickers": _fits_tickers,
    "series": lambda wanted, order: _fits_start(f"{wanted}-", order),
    "ticker_prefix": _fits_start,
    "side": _fits_side,
    "client_order_id_prefix": _fits_client_order_id,
    "order_group_id": _fits_group,
    "created_after": _is_since,
    "created_before": _is_before,
    "min_price": lambda wanted, order: _fits_price(lambda price: price >= wanted, order),
    "max_price": lambda wanted, order: _fits_price(lambda price: price <= wanted, order),
}
_UNCLEAR: Mapping[str, str] = {
    **dict.fromkeys(("tickers", "series", "ticker_prefix"), "no readable ticker"),
    "side": "no readable side",
    "client_order_id_prefix": "no readable client_order_id",
    "order_group_id": "no readable order_group_id",
    **dict.fromkeys(("created_after", "created_before"), "no readable created_time"),
    **dict.fromkeys(("min_price", "max_price"), "no readable price"),
}


def _is_bid(raw: Mapping[str, Any]) -> bool | None:
    """An order's side in whichever vocabulary it tells it; None when it does not, or contradicts itself."""
    words = [raw.get("outcome_side"), raw.get("book_side")]
    told = {_BIDS[word] for word in words if isinstance(word, str) and word in _BIDS}
    if not told and raw.get("action") in ("buy", "sell") and raw.get("side") in ("yes", "no"):
        return bool((raw["action"] == "buy") == (raw["side"] == "yes"))
    return told.pop() if len(told) == 1 else None


_BIDS = {"yes": True, "bid": True, "no": False, "ask": False}


def _price(dollars: object, cents: object) -> Decimal | None:
    try:
        price = Decimal(str(cents)) / 100 if dollars is None else Decimal(str(dollars))
        is_one = 0 <= price <= 1
    except InvalidOperation:  # no number, or none that can be compared
        return None
    return price if is_one else None
