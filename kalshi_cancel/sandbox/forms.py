"""How an order is written on the wire: today's fixed-point form and the integers of the first V1."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kalshi_cancel.sandbox.market import Fill, Order, State

USER_ID = "5d8c6a0e-6f9c-4f0e-9a53-0c6a2f6f7d11"
_ONE = Decimal(1)


@lru_cache(maxsize=1024)  # listings show thousands of orders of a few sizes and prices
def counted(number: Decimal) -> str:
    """Contracts as a fixed-point string."""
    return f"{number:.2f}"


@lru_cache(maxsize=1024)
def dollars(number: Decimal) -> str:
    """An amount of money as a fixed-point string."""
    return f"{number:.4f}"


def iso(us: int) -> str:
    """Microseconds since 1970 as ISO 8601 in UTC."""
    seconds, micros = divmod(us, 1_000_000)
    return f"{_second(seconds)}.{micros:06d}Z"


@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _two_hours_east(us: int) -> str:
    east = timezone(timedelta(hours=2))
    return datetime.fromtimestamp(us / 1_000_000, east).isoformat(timespec="microseconds")


# How an order's last update may be written, from microseconds; None = the field is left out.
TIME_FORMS: dict[str, Callable[[int], Any]] = {
    "utc": iso,
    "naive": lambda us: iso(us).removesuffix("Z"),
    "offset": _two_hours_east,
    "epoch_ms": lambda us: us // 1000,
    "epoch_s": lambda us: us // 1_000_000,
    "unreadable": lambda _us: "a moment ago",
    "absent": lambda _us: None,
}


def fixed_point(order: Order, state: State) -> dict[str, Any]:
    """An order as GET /portfolio/orders shows it today; optionals that have no value are left out."""
    new = order.new
    body = {
        "order_id": order.order_id,
        "user_id": USER_ID,
        "client_order_id": order.client_order_id,
        "ticker": new.ticker,
        **_direction(order),
        "outcome_side": "yes" if new.side == "bid" else "no",
        "book_side": new.side,
        "type": "limit",
        "status": state.status,
        "yes_price_dollars": dollars(state.price),
        "no_price_dollars": dollars(_ONE - state.price),
        "fill_count_fp": counted(state.filled),
        "remaining_count_fp": counted(state.remaining),
        "initial_count_fp": counted(state.initial),
        **_money(order, state),
        "created_time": iso(order.created_us),
        "last_update_time": iso(state.updated_us),
        "self_trade_prevention_type": new.self_trade_prevention_type,
        "cancel_order_on_pause": new.cancel_order_on_pause,
        "subaccount_number": new.subaccount,
        "exchange_index": new.exchange_index,
    }
    if new.expiration_time is not None:
        body["expiration_time"] = new.expiration_time
    if new.order_group_id is not None:
        body["order_group_id"] = new.order_group_id
    return body


def integers(order: Order, state: State) -> dict[str, Any]:
    """An order as the first V1 showed it: whole contracts, cents, and no fraction of either."""
    new = order.new
    cost_cents = int(_cost(order, state) * 100)
    return {
        "order_id": order.order_id,
        "user_id": USER_ID,
        "client_order_id": order.client_order_id,
        "ticker": new.ticker,
        **_direction(order),
        "type": "limit",
        "status": state.status,
        "yes_price": int(state.price * 100),
        "no_price": 100 - int(state.price * 100),
        "yes_price_dollars": dollars(state.price),
        "no_price_dollars": dollars(_ONE - state.price),
        "fill_count": int(state.filled),
        "remaining_count": int(state.remaining),
        "initial_count": int(state.initial),
        "taker_fees": 0,
        "maker_fees": 0,
        "taker_fill_cost": 0,
        "maker_fill_cost": cost_cents,
        "queue_position": 0,
        **_money(order, state),
        "expiration_time": new.expiration_time,
        "created_time": iso(order.created_us),
        "last_update_time": iso(state.updated_us),
        "self_trade_prevention_type": new.self_trade_prevention_type,
        "order_group_id": new.order_group_id,
        "cancel_order_on_pause": new.cancel_order_on_pause,
    }


FORMS = {"fp": fixed_point, "int": integers}


def trade(fill: Fill) -> dict[str, Any]:
    """A fill as GET /portfolio/fills shows it."""
    new = fill.order.new
    outcome = "yes" if new.side == "bid" else "no"
    price = fill.order.state.price
    return {
        "fill_id": f"fill-{fill.number}",
        "exchange_index": new.exchange_index,
        "trade_id": f"trade-{fill.number}",
        "order_id": fill.order.order_id,
        "ticker": new.ticker,
        "market_ticker": new.ticker,
        "side": outcome,
        "action": "buy",
        "outcome_side": outcome,
        "book_side": new.side,
        "count_fp": counted(fill.count),
        "yes_price_dollars": dollars(price),
        "no_price_dollars": dollars(_ONE - price),
        "is_taker": False,
        "fee_cost": "0.0000",
        "created_time": iso(fill.at_us),
        "ts": fill.at_us // 1_000_000,
        "subaccount_number": new.subaccount,
    }


def _direction(order: Order) -> dict[str, str]:
    # The book is in YES: a buy of NO reads back as a sell of YES.
    return {"side": "yes", "action": "buy" if order.new.side == "bid" else "sell"}


def _cost(order: Order, state: State) -> Decimal:
    return state.filled * (state.price if order.new.side == "bid" else _ONE - state.price)


def _money(order: Order, state: State) -> dict[str, str]:
    return {
        "taker_fees_dollars": "0.0000",
        "maker_fees_dollars": "0.0000",
        "taker_fill_cost_dollars": "0.0000",
        "maker_fill_cost_dollars": dollars(_cost(order, state)),
    }
