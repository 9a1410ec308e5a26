"""One call on its way through the exchange: what was asked, checked and typed, and what it has done."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from kalshi_cancel.sandbox.refusal import Refusal, invalid, not_found

if TYPE_CHECKING:
    from collections.abc import Callable

    from kalshi_cancel.sandbox.auth import Key
    from kalshi_cancel.sandbox.calls import Call
    from kalshi_cancel.sandbox.floor import Floor
    from kalshi_cancel.sandbox.market import Group, Market, Moment, Order
    from kalshi_cancel.sandbox.settings import Settings
    from kalshi_cancel.sandbox.wire import Request

MOST = 10**12  # contracts or dollars beyond this are a mistake
Answer = tuple[int, Any]  # a status, and a JSON value (None = no body)


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint: where it is, who serves it, what it costs and from which bucket ("" = free)."""

    method: str
    path: str
    operation: str
    serve: Callable[[Visit], Answer]
    bucket: str = "read"
    cost: int = 10
    per_order: bool = False
    public: bool = False


@dataclass(slots=True, eq=False)
class Visit:
    """A call under way. Handlers run under the floor's lock."""

    floor: Floor
    settings: Settings
    route: Route
    request: Request
    path_parameters: dict[str, str]
    record: Call
    moment: Moment
    key: Key | None = None
    query: dict[str, str] = field(init=False)
    json: Any = field(init=False)

    def __post_init__(self) -> None:
        self.query = dict(parse_qsl(self.request.query, keep_blank_values=False))
        self.json = parse_json(self.request.body)

    @property
    def market(self) -> Market:
        """The orders."""
        return self.floor.market

    def fields(self) -> dict[str, Any]:
        """The body as an object; a 400 when it is none."""
        if not isinstance(self.json, dict):
            raise Refusal(400, "invalid_json", None, "the body must be a JSON object")
        return self.json

    def integer(self, name: str, *, least: int = 0, most: int | None = None) -> int | None:
        """A query parameter as a number; None when it is absent."""
        return as_integer(self.query.get(name), name, least=least, most=most)

    def entries(self) -> list[dict[str, Any]]:
        """The orders of a batch, `{"orders": [...]}` or the older `{"ids": [...]}`."""
        body = self.fields()
        entries = body.get("orders")
        if entries is None and isinstance(body.get("ids"), list):
            entries = [{"order_id": order_id} for order_id in body["ids"]]
        if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
            raise invalid("orders: a list of objects is needed")
        return entries

    def write_subaccount(self, named: int | None) -> int | None:
        """The subaccount a write is about (None = any); a 403 when the key may not name it."""
        allowed = self.key.subaccount if self.key else None
        if allowed is not None:
            if named not in {None, allowed}:
                raise Refusal(403, "forbidden", None, "SUBACCOUNT_RESTRICTED")
            return allowed
        if named is None:
            return 0 if self.settings.omitted_subaccount == "primary" else None
        return named

    def read_subaccount(self, named: int | None) -> int | None:
        """The subaccount a read or a mass cancel is about (None = all)."""
        allowed = self.key.subaccount if self.key else None
        return self.write_subaccount(named) if allowed is not None else named

    def locate_by_query(self) -> Order:
        """The resting order that the path names, where the query leads to."""
        return self.locate_by_body({})

    def locate_by_body(self, fields: dict[str, Any]) -> Order:
        """The same for calls whose body names shard and market; the query does too, in some clients."""
        shard = self.query.get("exchange_index", fields.get("exchange_index"))
        ticker = self.query.get("market_ticker", fields.get("market_ticker", fields.get("ticker")))
        return self.locate(
            self.path_parameters["order_id"],
            exchange_index=as_integer(shard, "exchange_index", least=-1),
            market_ticker=as_text(ticker, "market_ticker"),
            subaccount=self.write_subaccount(self.integer("subaccount")),
        )

    def locate(
        self,
        order_id: str,
        *,
        exchange_index: int | None,
        market_ticker: str | None = None,
        subaccount: int | None,
    ) -> Order:
        """The resting order that a write leads to; the same 404 for whatever keeps it from being found.

        An explicit shard is searched alone. -1, or no shard with a ticker, finds the order's own shard.
        Neither of them means shard 0. `subaccount` None = any.
        """
        order = self.market.find(order_id)
        routed = exchange_index == -1 or (exchange_index is None and market_ticker)
        home = order.new.exchange_index if order else 0
        shard = home if routed else exchange_index or 0
        if not self.settings.exchange_active(shard):
            raise self.paused("exchange_is_paused")
        if order is None or shard != home or order.state.status != "resting":
            raise not_found()
        if subaccount not in {None, order.new.subaccount}:
            raise not_found()
        strict = self.settings.wrong_market_ticker == "not_found"
        if strict and routed and market_ticker and market_ticker != order.new.ticker:
            raise not_found()
        return order

    def group(self, group_id: str, *, exchange_index: int | None, subaccount: int | None) -> Group:
        """The order group with this id on this shard and of this subaccount (None = any), else a 404."""
        group = self.market.groups.get(group_id)
        if group is None or exchange_index not in {None, group.exchange_index}:
            raise not_found()
        if subaccount not in {None, group.subaccount}:
            raise not_found()
        return group

    def paused(self, code: str) -> Refusal:
        """What a write gets during a pause."""
        return Refusal(self.settings.pause_status, code)

    def refuse_while_all_paused(self) -> None:
        """Stops a call about many shards while every one of them is paused."""
        if self.settings.exchange_paused is True:
            raise self.paused("exchange_is_paused")

    def cancel(self, order: Order, *, by: str) -> Decimal:
        """Cancels a resting order for this call and returns how many contracts that removed."""
        removed = self.market.cancel(order, self.moment, by=by, call=self.record.seq)
        self.took(order, removed)
        return removed

    def acknowledged(self, order: Order, **counts: str | None) -> dict[str, Any]:
        """The thin answer of V2 to a write: ids, counts, and when it happened."""
        ids = {"order_id": order.order_id, "client_order_id": order.client_order_id}
        return {**ids, **counts, "ts_ms": self.moment.ms}

    def odd(self, order_id: str, body: dict[str, Any]) -> dict[str, Any]:
        """What this call says about an order, with odd fields where a fault wants them."""
        fault = self.floor.faults.strike("odd_fields", self.route.operation, [order_id])
        if fault is None:
            return body
        self.record.fault = fault.kind
        return fault.changed(body)

    def took(self, order: Order, removed: Decimal) -> None:
        """Notes in the record that this call removed contracts."""
        self.record.effects.append({"order_id": order.order_id, "reduced_by": f"{removed:.2f}"})


def parse_json(body: bytes) -> Any:
    """The JSON value of a body; None for nothing and for anything that is not JSON."""
    if not body.strip():
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def as_integer(value: Any, name: str, *, least: int = 0, most: int | None = None) -> int | None:
    """A whole number from a query or a body; a 400 for anything else and for what is out of range."""
    if value is None:
        return None
    try:
        number = int(value) if isinstance(value, str | int) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise invalid(f"{name}: {value!r}")
    return number


def as_decimal(value: Any, name: str, *, places: int = 2) -> Decimal:
    """A positive fixed-point number from a body; a 400 for anything else."""
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        number = Decimal("nan")
    sensible = not isinstance(value, bool) and number.is_finite() and 0 < number < MOST
    if not sensible or number != round(number, places):
        raise invalid(f"{name}: {value!r}")
    return number


def as_text(value: Any, name: str) -> str | None:
    """A text from a body, None when it is absent or empty; a 400 for anything else."""
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise invalid(f"{name}: {value!r}")
    return value
