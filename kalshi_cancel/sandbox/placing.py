"""Placing and changing orders as the exchange serves it: create, amend, decrease."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from kalshi_cancel.sandbox.forms import counted, iso
from kalshi_cancel.sandbox.market import DuplicateOrderError, NewOrder
from kalshi_cancel.sandbox.refusal import Refusal, invalid
from kalshi_cancel.sandbox.visit import Answer, Visit, as_decimal, as_integer, as_text

if TYPE_CHECKING:
    from kalshi_cancel.sandbox.market import Order, Side

SIDES = ("bid", "ask")
IMMEDIATE = ("immediate_or_cancel", "fill_or_kill")
TIMES_IN_FORCE = ("good_till_canceled", *IMMEDIATE)
MOST_SUBACCOUNTS = 63
_REQUIRED = ("ticker", "side", "count", "price", "time_in_force", "self_trade_prevention_type")
_TEXTS = (
    "ticker",
    "side",
    "time_in_force",
    "self_trade_prevention_type",
    "client_order_id",
    "order_group_id",
)


def create(visit: Visit) -> Answer:
    """A new order. A client_order_id that was used before is a 409; the first order stays as it is."""
    return 201, _standing(visit, _create(visit, visit.fields()))


def create_batch(visit: Visit) -> Answer:
    """Many new orders, each with its own outcome inside one 201."""
    answers = []
    for fields in visit.entries():
        try:
            answers.append(_standing(visit, _create(visit, fields)))
        except Refusal as refusal:
            answers.append({"client_order_id": fields.get("client_order_id"), "error": refusal.fields()})
    return 201, {"orders": answers}


def amend(visit: Visit) -> Answer:
    """A resting order's total count (filled ones included) and price.

    The answer has counts only when the resting size has changed; nothing is filled here by an amendment.
    """
    fields = visit.fields()
    order = visit.locate_by_body(fields)
    total = as_decimal(fields.get("count"), "count")
    price = as_decimal(fields.get("price"), "price", places=4)
    before = order.state.remaining
    visit.market.resize(order, visit.moment, total=total, price=price, call=visit.record.seq)
    after = order.state.remaining
    counts = {"fill_count": "0.00", "remaining_count": counted(after)} if after != before else {}
    return 200, visit.acknowledged(order, **({"fill_count": None, "remaining_count": None} | counts))


def decrease(visit: Visit) -> Answer:
    """Takes contracts off a resting order: `reduce_by` so many, or `reduce_to` a rest."""
    fields = visit.fields()
    order = visit.locate_by_body(fields)
    if (fields.get("reduce_by") is None) == (fields.get("reduce_to") is None):
        raise invalid("one of reduce_by and reduce_to is needed")
    if fields.get("reduce_to") is not None:
        by = order.state.remaining - as_decimal(fields["reduce_to"], "reduce_to")
        if by <= 0:
            raise invalid("reduce_to: more than what remains")
    else:
        by = as_decimal(fields["reduce_by"], "reduce_by")
    visit.took(order, visit.market.decrease(order, visit.moment, by=by, call=visit.record.seq))
    return 200, visit.acknowledged(order, remaining_count=counted(order.state.remaining))


def _create(visit: Visit, fields: dict[str, Any]) -> Order:
    settings, market = visit.settings, visit.market
    new = _submitted(visit, fields)
    if not settings.exchange_active(new.exchange_index):
        raise visit.paused("exchange_is_paused")
    if not settings.trading_active(new.exchange_index):
        raise visit.paused("trading_is_paused")
    if new.order_group_id is not None:
        group = visit.group(new.order_group_id, exchange_index=new.exchange_index, subaccount=new.subaccount)
        if group.triggered:
            raise Refusal(409, "order_group_triggered")
    try:
        order = market.place(new, visit.moment, lag_s=settings.read_lag_s, call=visit.record.seq)
    except DuplicateOrderError as error:
        raise Refusal(409, "order_already_exists") from error
    visit.record.order_ids.append(order.order_id)
    if new.time_in_force in IMMEDIATE:  # nothing here to trade with
        market.cancel(order, visit.moment, by="time_in_force", call=visit.record.seq)
    else:
        market.meet_tail(order, visit.moment)
    return order


def _submitted(visit: Visit, fields: dict[str, Any]) -> NewOrder:
    missing = [name for name in _REQUIRED if fields.get(name) is None]
    if missing:
        raise Refusal(400, "missing_parameters", None, ", ".join(missing))
    text = {name: as_text(fields.get(name), name) for name in _TEXTS}
    price = as_decimal(fields["price"], "price", places=4)
    ticker, side, time_in_force = text["ticker"], text["side"], text["time_in_force"]
    if ticker is None or side not in SIDES or price >= 1 or time_in_force not in TIMES_IN_FORCE:
        raise invalid(f"ticker {ticker!r}, side {side!r}, price {price}, time_in_force {time_in_force!r}")
    shard = as_integer(fields.get("exchange_index"), "exchange_index", least=-1)
    subaccount = as_integer(fields.get("subaccount"), "subaccount", most=MOST_SUBACCOUNTS)
    expires_s = as_integer(fields.get("expiration_time"), "expiration_time")
    return NewOrder(
        ticker=ticker,
        count=as_decimal(fields["count"], "count"),
        side=cast("Side", side),
        price=price,
        exchange_index=visit.settings.shard_of(ticker) if shard is None or shard < 0 else shard,
        subaccount=visit.write_subaccount(subaccount) or 0,
        client_order_id=text["client_order_id"],
        order_group_id=text["order_group_id"],
        time_in_force=time_in_force,
        self_trade_prevention_type=text["self_trade_prevention_type"] or "",
        expiration_time=None if expires_s is None else iso(expires_s * 1_000_000),
        cancel_order_on_pause=fields.get("cancel_order_on_pause") is True,
    )


def _standing(visit: Visit, order: Order) -> dict[str, Any]:
    state = order.state
    return visit.acknowledged(
        order, fill_count=counted(state.filled), remaining_count=counted(state.remaining)
    )
