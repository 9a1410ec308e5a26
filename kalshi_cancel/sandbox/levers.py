"""The unsigned routes under /sandbox/: how tests, demos and users arrange the exchange and look behind it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from kalshi_cancel.sandbox.auth import read_key
from kalshi_cancel.sandbox.faults import Fault
from kalshi_cancel.sandbox.forms import counted, fixed_point
from kalshi_cancel.sandbox.market import Market, Moment, NewOrder, Order, Status, history_line
from kalshi_cancel.sandbox.wire import Reply, Request

if TYPE_CHECKING:
    from kalshi_cancel.sandbox.floor import Floor

PREFIX = "/sandbox/"
_DECIMALS = ("count", "filled", "price")
_INTEGERS = ("exchange_index", "subaccount")


class NoSuchOrderError(LookupError):
    """The control names an order that was never there."""


def pull(floor: Floor, request: Request) -> Reply:
    """Serves one control request; 400 with the reason for what cannot be done, 404 for what is not there."""
    name, _, order_id = request.path.removeprefix(PREFIX).partition("/")
    order_id, _, deed = order_id.partition("/")
    lever = _LEVERS.get((request.method, "/".join(filter(None, (name, order_id and ":id", deed)))))
    if lever is None:
        return _reply(404, {"error": f"no lever {request.method} {request.path}"})
    query = {key: values[-1] for key, values in parse_qs(request.query).items()}
    try:
        fields = json.loads(request.body) if request.body else {}
        return _reply(200, lever(floor, unquote(order_id), fields, query))
    except NoSuchOrderError as error:
        return _reply(404, {"error": str(error)})
    except (ValueError, TypeError, KeyError, AttributeError, InvalidOperation) as error:
        return _reply(400, {"error": f"{type(error).__name__}: {error}"})


def _reply(status: int, body: Any) -> Reply:
    return Reply(status, json.dumps(body, separators=(",", ":")).encode())


def _reset(floor: Floor, _id: str, _fields: Any, _query: Any) -> Any:
    floor.reset()
    return {}


def _place(floor: Floor, _id: str, fields: Any, _query: Any) -> Any:
    news = [(_new_order(floor, each), each) for each in fields["orders"]]
    with floor.lock:
        market = floor.market
        placed = []
        for new, each in news:
            if new.order_group_id is not None and new.order_group_id not in market.groups:
                market.add_group(
                    group_id=new.order_group_id,
                    exchange_index=new.exchange_index,
                    subaccount=new.subaccount,
                )
            moment = floor.moment(-float(each.get("ago_s") or 0))
            placed.append(market.place(new, moment))
            if each.get("meets_tail"):
                market.meet_tail(placed[-1], moment)
        return [fixed_point(order, order.state) for order in placed]


def _new_order(floor: Floor, fields: dict[str, Any]) -> NewOrder:
    own = ("ago_s", "meets_tail")  # of the lever, not of the order
    values = {name: value for name, value in fields.items() if value is not None and name not in own}
    values |= {name: Decimal(str(values[name])) for name in _DECIMALS if name in values}
    values |= {name: int(values[name]) for name in _INTEGERS if name in values}
    values.setdefault("exchange_index", floor.settings.shard_of(values.get("ticker", NewOrder().ticker)))
    return NewOrder(**values)


def _orders(floor: Floor, _id: str, _fields: Any, _query: Any) -> Any:
    with floor.lock:
        return [_truth(order) for order in floor.market.orders()]


def _order(floor: Floor, order_id: str, _fields: Any, _query: Any) -> Any:
    with floor.lock:
        return _truth(_found(floor, order_id))


Change = Callable[[Market, Order, Moment, Any], object]


def _changing(change: Change, *, of: Status = "resting") -> Callable[[Floor, str, Any, Any], Any]:
    """A lever that changes an order of this status, `ago_s` before now."""

    def lever(floor: Floor, order_id: str, fields: Any, _query: Any) -> Any:
        with floor.lock:
            order = _found(floor, order_id)
            if order.state.status != of:
                raise ValueError(f"{order_id} is {order.state.status}, not {of}")
            ago_s = float(fields.get("ago_s") or 0)
            moment = floor.moment(-ago_s)  # reads have caught up with it since
            change(floor.market, order, replace(moment, mono_s=moment.mono_s - ago_s), fields)
            return _truth(order)

    return lever


def _fill(market: Market, order: Order, moment: Moment, fields: Any) -> None:
    market.fill(order, moment, _decimal(fields, "count"))


def _cancel_elsewhere(market: Market, order: Order, moment: Moment, _fields: Any) -> None:
    market.cancel(order, moment, by="elsewhere")


def _decrease(market: Market, order: Order, moment: Moment, fields: Any) -> None:
    by, to = _decimal(fields, "by"), _decimal(fields, "to")
    if (by is None) == (to is None):
        raise ValueError("one of by and to is needed")
    by = order.state.remaining - to if to is not None else by
    if not by or by < 0:
        raise ValueError(f"{order.state.remaining} remain; nothing to take away")
    market.decrease(order, moment, by=by)


def _amend(market: Market, order: Order, moment: Moment, fields: Any) -> None:
    total, price = _decimal(fields, "count"), _decimal(fields, "price")
    state = order.state
    market.resize(
        order, moment, total=state.filled + state.remaining if total is None else total, price=price
    )


def _restore(market: Market, order: Order, moment: Moment, _fields: Any) -> None:
    market.restore(order, moment)


def _archive(floor: Floor, order_id: str, _fields: Any, _query: Any) -> Any:
    with floor.lock:
        order = _found(floor, order_id)
        if order.state.status == "resting":
            raise ValueError(f"{order_id} is resting: only what has ended is archived")
        order.put_away = True
        return _truth(order)


def _decimal(fields: Any, name: str) -> Decimal | None:
    value = fields.get(name)
    return None if value is None else Decimal(str(value))


def _configure(floor: Floor, _id: str, fields: Any, _query: Any) -> Any:
    floor.configure(fields)
    return {}


def _fault(floor: Floor, _id: str, fields: Any, _query: Any) -> Any:
    return {"id": floor.arm(Fault(**fields))}


def _faults(floor: Floor, _id: str, _fields: Any, _query: Any) -> Any:
    with floor.lock:
        return floor.faults.armed()


def _clear_faults(floor: Floor, _id: str, _fields: Any, _query: Any) -> Any:
    floor.clear_faults()
    return {}


def _calls(floor: Floor, _id: str, _fields: Any, query: dict[str, str]) -> Any:
    return floor.calls.since(
        int(query.get("since", "0")), operation=query.get("operation"), order_id=query.get("order_id")
    )


def _drain(floor: Floor, _id: str, fields: Any, _query: Any) -> Any:
    with floor.lock:
        now_s = floor.moment().mono_s
        floor.budget.bucket(fields["bucket"], now_s).drain(float(fields["tokens"]), now_s)
        return floor.budget.levels(now_s)


def _buckets(floor: Floor, _id: str, _fields: Any, _query: Any) -> Any:
    with floor.lock:
        return floor.budget.levels(floor.moment().mono_s)


def _register_key(floor: Floor, _id: str, fields: Any, _query: Any) -> Any:
    key = read_key(
        fields["key_id"],
        fields["public_key_pem"],
        scope=fields.get("scope", "full"),
        subaccount=fields.get("subaccount"),
        name=fields.get("name"),
    )
    floor.keys = {**floor.keys, key.key_id: key}
    return {}


def _revoke_key(floor: Floor, key_id: str, _fields: Any, _query: Any) -> Any:
    floor.keys = {known: key for known, key in floor.keys.items() if known != key_id}
    return {}


def _found(floor: Floor, order_id: str) -> Order:
    order = floor.market.find(order_id)
    if order is None:
        raise NoSuchOrderError(f"no order {order_id!r}")
    return order


def _truth(order: Order) -> dict[str, Any]:
    """How an order really stands, without any lag, and how it got there."""
    return {
        **fixed_point(order, order.state),
        "canceled_count_fp": counted(order.state.canceled),
        "history": [history_line(event) for event in order.history],
    }


_LEVERS: dict[tuple[str, str], Callable[[Floor, str, Any, Any], Any]] = {
    ("POST", "reset"): _reset,
    ("POST", "orders"): _place,
    ("GET", "orders"): _orders,
    ("GET", "orders/:id"): _order,
    ("POST", "orders/:id/fill"): _changing(_fill),
    ("POST", "orders/:id/cancel"): _changing(_cancel_elsewhere),
    ("POST", "orders/:id/decrease"): _changing(_decrease),
    ("POST", "orders/:id/amend"): _changing(_amend),
    ("POST", "orders/:id/restore"): _changing(_restore, of="canceled"),
    ("POST", "orders/:id/archive"): _archive,
    ("POST", "configure"): _configure,
    ("POST", "faults"): _fault,
    ("GET", "faults"): _faults,
    ("DELETE", "faults"): _clear_faults,
    ("GET", "calls"): _calls,
    ("POST", "drain"): _drain,
    ("GET", "buckets"): _buckets,
    ("POST", "keys"): _register_key,
    ("DELETE", "keys/:id"): _revoke_key,
}
