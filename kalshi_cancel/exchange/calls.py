"""The calls to the exchange that there are, in both dialects: method, path, query and body, without any I/O.

V1 is the dialect of ``/portfolio/orders`` (retired in production in June 2026), V2 that of
``/portfolio/events/orders``; reads are common to both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import urlencode

API = "/trade-api/v2"  # the version of the whole API, another numbering than the dialects'
LIST_PAGE = 1000  # more is a 400


class Dialect(StrEnum):
    """Which generation of the orders API the exchange speaks."""

    V1 = "v1"
    V2 = "v2"


_CANCEL_PATH = {Dialect.V1: f"{API}/portfolio/orders/", Dialect.V2: f"{API}/portfolio/events/orders/"}


@dataclass(frozen=True, slots=True)
class Routing:
    """Where an order rests, as far as it is known; all unset means "shard 0, main account"."""

    market_ticker: str | None = None
    exchange_index: int | None = None
    subaccount: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP exchange to be signed and sent; of it, method and ``path`` are signed."""

    method: str
    path: str
    query: str = ""
    body: bytes = b""  # JSON; neither it nor the query is signed
    is_public: bool = False  # answered to anybody, and so perhaps by a cache

    @property
    def target(self) -> str:
        """Path and query as they go on the wire."""
        return f"{self.path}?{self.query}" if self.query else self.path


def compose_cancel(dialect: Dialect, order_id: str, routing: Routing) -> Call:
    """The call that cancels one order; V1 knows no routing."""
    wanted = _routing_fields(routing) if dialect is Dialect.V2 else {}
    return Call("DELETE", _CANCEL_PATH[dialect] + order_id, urlencode(wanted))


def compose_batch(dialect: Dialect, orders: Sequence[tuple[str, Routing]]) -> Call:
    """The call that cancels several orders; V1 knows no routing."""
    if dialect is Dialect.V1:
        content: dict[str, Any] = {"ids": [order_id for order_id, _ in orders]}
    else:
        content = {
            "orders": [{"order_id": order_id, **_routing_fields(routing)} for order_id, routing in orders]
        }
    body = json.dumps(content, separators=(",", ":")).encode()
    return Call("DELETE", _CANCEL_PATH[dialect] + "batched", body=body)


def _routing_fields(routing: Routing) -> dict[str, str | int]:
    named = {
        "subaccount": routing.subaccount,
        "exchange_index": routing.exchange_index,
        "market_ticker": routing.market_ticker,
    }
    return {name: value for name, value in named.items() if value is not None}


def compose_read(order_id: str) -> Call:
    """The call that reads one order back; it needs no routing."""
    return Call("GET", f"{API}/portfolio/orders/{order_id}")


def compose_list(query: Mapping[str, str | int], cursor: str) -> Call:
    """The call that lists orders, resting ones unless the query says otherwise, in the largest pages."""
    wanted = {"status": "resting", "limit": LIST_PAGE, **query, **({"cursor": cursor} if cursor else {})}
    return Call("GET", f"{API}/portfolio/orders", urlencode(wanted))


def compose_archive(query: Mapping[str, str | int], cursor: str) -> Call:
    """The call that lists orders of the archive, where the exchange moves what ended some time ago."""
    wanted = {"limit": LIST_PAGE, **query, **({"cursor": cursor} if cursor else {})}
    return Call("GET", f"{API}/historical/orders", urlencode(wanted))


def compose_trigger(order_group_id: str, *, subaccount: int | None, exchange_index: int | None) -> Call:
    """The call that cancels an order group and closes it for new orders until it is reset.

    Without an address the group is sought in subaccount 0, on shard 0.
    """
    routing = Routing(subaccount=subaccount, exchange_index=exchange_index)
    query = urlencode(_routing_fields(routing))
    return Call("PUT", f"{API}/portfolio/order_groups/{order_group_id}/trigger", query)


# Every subaccount and shard; new orders may be canceled as well during the following minute.
CANCEL_ALL = Call("DELETE", f"{API}/portfolio/events/orders")
EXCHANGE_STATUS = Call("GET", f"{API}/exchange/status", is_public=True)
ACCOUNT_LIMITS = Call("GET", f"{API}/account/limits")
ENDPOINT_COSTS = Call("GET", f"{API}/account/endpoint_costs")
API_KEYS = Call("GET", f"{API}/api_keys")
LIST_ONE_ORDER = Call("GET", f"{API}/portfolio/orders", "limit=1")
