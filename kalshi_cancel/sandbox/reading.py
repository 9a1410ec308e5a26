"""How orders are read: one by one, in pages, from the archive, in the queue; lag and stale reads included."""

from __future__ import annotations

import base64
import binascii
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from kalshi_cancel.sandbox.forms import FORMS, TIME_FORMS, counted, iso
from kalshi_cancel.sandbox.market import Filter
from kalshi_cancel.sandbox.refusal import invalid, not_found

if TYPE_CHECKING:
    from kalshi_cancel.sandbox.market import Order, State
    from kalshi_cancel.sandbox.visit import Answer, Visit

STATUSES = ("resting", "canceled", "executed", "pending")
MAX_EVENTS = 10
MAX_LIMIT = 1000
_CUTOFFS = (
    *("market_settled_ts", "trades_created_ts", "orders_updated_ts"),
    "market_positions_last_updated_ts",
)


def read_order(visit: Visit) -> Answer:
    """One order, as reads see it at present."""
    order = visit.market.find(visit.path_parameters["order_id"])
    if order is None or visit.read_subaccount(None) not in {None, order.new.subaccount}:
        raise not_found()
    state = _view(visit, order)
    if state is None or order.is_archived(state, _cutoff_us(visit)):
        raise not_found()
    return 200, {"order": _shown(visit, order, state)}


def list_orders(visit: Visit) -> Answer:
    """A page of orders, newest first. A cursor that is garbage starts from the front, silently."""
    query = visit.query
    events = tuple(name for name in query.get("event_ticker", "").split(",") if name)
    if len(events) > MAX_EVENTS:
        raise invalid(f"event_ticker: {len(events)} of at most {MAX_EVENTS}")
    if query.get("status", "resting") not in STATUSES:
        raise invalid(f"status: {query['status']!r}")
    wanted = replace(
        _filter(visit),
        status=query.get("status"),
        event_tickers=events,
        exchange_index=visit.integer("exchange_index"),
    )
    return 200, _listing(visit, wanted)


def list_history(visit: Visit) -> Answer:
    """A page of the archive: orders that ended before the cutoff, and are nowhere else."""
    return 200, _listing(visit, replace(_filter(visit), archive=True))


def historical_cutoff(visit: Visit) -> Answer:
    """Since when what has ended is not in the archive."""
    cutoff = iso(_cutoff_us(visit))
    return 200, dict.fromkeys(_CUTOFFS, cutoff)


def queue_position(visit: Visit) -> Answer:
    """How many contracts come before a resting order."""
    order_id, subaccount = visit.path_parameters["order_id"], visit.read_subaccount(None)
    for order, before in visit.market.queue():
        if order.order_id == order_id and subaccount in {None, order.new.subaccount}:
            return 200, {"queue_position_fp": counted(before)}
    raise not_found()


def queue_positions(visit: Visit) -> Answer:
    """The same for all resting orders of a subaccount, of some markets or of an event, oldest first."""
    tickers = {name for name in visit.query.get("market_tickers", "").split(",") if name}
    event = visit.query.get("event_ticker")
    subaccount = visit.write_subaccount(visit.integer("subaccount"))
    positions = [
        {
            "order_id": order.order_id,
            "market_ticker": order.new.ticker,
            "queue_position_fp": counted(before),
        }
        for order, before in visit.market.queue()
        if subaccount in {None, order.new.subaccount}
        and (not tickers or order.new.ticker in tickers)
        and event in {None, order.event_ticker}
    ]
    return 200, {"queue_positions": positions}


def _cutoff_us(visit: Visit) -> int:
    return visit.moment.us - int(visit.settings.archive_after_s * 1_000_000)


def _filter(visit: Visit) -> Filter:
    """What every list can be asked for."""
    return Filter(
        ticker=visit.query.get("ticker"),
        min_s=visit.integer("min_ts"),
        max_s=visit.integer("max_ts"),
        subaccount=visit.read_subaccount(visit.integer("subaccount")),
        cutoff_us=_cutoff_us(visit),
    )


def _listing(visit: Visit, wanted: Filter) -> dict[str, Any]:
    limit = visit.integer("limit", least=1, most=MAX_LIMIT) or 100
    faults = visit.floor.faults
    faulty = faults.has("stale_read") or faults.has("not_found")
    start = _position_of(visit.query.get("cursor", ""))
    found, following = visit.market.page(
        wanted,
        moment=visit.moment,
        before=start.before,
        skip=start.skip,
        limit=limit,
        view=(lambda order: _view(visit, order)) if faulty else None,
    )
    cursor = ""
    if following is not None and visit.settings.cursors == "offset":
        cursor = _cursor_of(f"o{start.skip + limit}")
    elif following is not None:
        cursor = _cursor_of(f"n{following}")
    return _page(visit, [_shown(visit, order, state) for order, state in found], cursor)


def _page(visit: Visit, orders: list[dict[str, Any]], cursor: str) -> dict[str, Any]:
    """A page as it is written, with what is wrong with pages."""
    faults, operation = visit.floor.faults, visit.route.operation
    if not cursor and (fault := faults.strike("endless_cursor", operation, [])):
        visit.record.fault = fault.kind
        cursor = _cursor_of(f"n0/{visit.record.seq}")  # older than every order, and never the same
    page: dict[str, Any] = {"orders": orders, "cursor": cursor}
    if not orders and visit.settings.empty_page == "null":
        page["orders"] = None
    elif not orders and visit.settings.empty_page == "absent":
        del page["orders"]
    if fault := faults.strike("odd_page", operation, []):
        visit.record.fault = fault.kind
        page = fault.changed(page)
    return page


def _shown(visit: Visit, order: Order, state: State) -> dict[str, Any]:
    """An order as this read writes it."""
    body = FORMS[visit.settings.order_form](order, state)
    form = visit.settings.last_update_form
    if form != "utc":
        body["last_update_time"] = TIME_FORMS[form](state.updated_us)
        if body["last_update_time"] is None:
            del body["last_update_time"]
    return visit.odd(order.order_id, body)


def _view(visit: Visit, order: Order) -> State | None:
    """What a read shows of an order, faults and lag included; None = it is not there."""
    faults, operation = visit.floor.faults, visit.route.operation
    if faults.strike("not_found", operation, [order.order_id]):
        visit.record.fault = "not_found"
        return None
    fault = faults.strike("stale_read", operation, [order.order_id])
    if fault and order.previous is not None:
        age_s = (visit.moment.us - order.state.updated_us) / 1_000_000
        if fault.seconds is None or age_s < fault.seconds:
            visit.record.fault = "stale_read"
            return order.previous
    return visit.market.visible(order, visit.moment)


class _Position(NamedTuple):
    """Where a page starts: with the orders older than number `before`, `skip` of them passed over."""

    before: int | None = None
    skip: int = 0


def _cursor_of(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


def _position_of(cursor: str) -> _Position:
    try:
        text = base64.urlsafe_b64decode(cursor).decode("ascii").partition("/")[0]
        number = int(text[1:])
    except (binascii.Error, ValueError):
        return _Position()
    return {"n": _Position(before=number), "o": _Position(skip=number)}.get(text[0], _Position())
