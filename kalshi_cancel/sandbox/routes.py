"""The endpoints of the exchange: where each is, who serves it, what it costs and from which bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote

from kalshi_cancel.sandbox import account, cancels, groups, placing, reading
from kalshi_cancel.sandbox.refusal import not_found
from kalshi_cancel.sandbox.visit import Answer, Route, Visit

if TYPE_CHECKING:
    from kalshi_cancel.sandbox.settings import Settings

DEFAULT_COST = 10
PREFIX = "/trade-api/v2"


def cost_of(route: Route, settings: Settings) -> int:
    """Tokens that a call costs at present, or each order of a batch."""
    if route.serve in {cancels.cancel_v1, cancels.cancel_batch_v1}:  # it cost 4, then 20; now it is gone
        return {"retired": 0, "alive_int": 4, "alive_fp": 20}[settings.v1]
    if route.serve is cancels.cancel_all and settings.cancel_all_cost == "max_batch":
        return route.cost * settings.batch_limit
    return route.cost if route.bucket else 0


def bucket_of(visit: Visit) -> str:
    """The bucket a call draws on: a single cancel with an explicit shard >= 1 has that shard's own."""
    if visit.route.serve is cancels.cancel:
        shard = visit.integer("exchange_index", least=-1)
        if shard is not None and shard >= 1:
            return f"write:{shard}"
    return visit.route.bucket


def find_route(method: str, path: str) -> tuple[Route, dict[str, str]]:
    """The route of a raw path and its parameters, decoded; a route to a 404 when there is none."""
    parts = path.split("/")
    for route, pattern in _TABLE.get((method, len(parts)), ()):
        parameters = {}
        for want, part in zip(pattern, parts, strict=True):
            if want.startswith(":"):
                parameters[want[1:]] = unquote(part)
            elif want != part:
                break
        else:
            return route, parameters
    return _NOWHERE, {}


def _endpoint_costs(visit: Visit) -> Answer:
    """The endpoints whose cost is not the default."""
    costs = [
        {"method": route.method, "path": route.path, "cost": cost}
        for route in ROUTES
        if (cost := cost_of(route, visit.settings)) not in {0, DEFAULT_COST}
    ]
    return 200, {"default_cost": DEFAULT_COST, "endpoint_costs": costs}


def _nowhere(_visit: Visit) -> Answer:
    raise not_found()


_NOWHERE = Route("", "", "other", _nowhere, "", public=True)
_V1, _V2 = f"{PREFIX}/portfolio/orders", f"{PREFIX}/portfolio/events/orders"
_GROUPS = f"{PREFIX}/portfolio/order_groups"
ROUTES: tuple[Route, ...] = (
    Route("DELETE", f"{_V2}/batched", "batch", cancels.cancel_batch, "write", 2, per_order=True),
    Route("DELETE", f"{_V2}/:order_id", "cancel", cancels.cancel, "write", 2),
    Route("DELETE", _V2, "cancel_all", cancels.cancel_all, "write", 2),
    Route("DELETE", f"{_V1}/batched", "batch", cancels.cancel_batch_v1, "write", 20, per_order=True),
    Route("DELETE", f"{_V1}/:order_id", "cancel", cancels.cancel_v1, "write", 20),
    Route("POST", _V1, "create", cancels.gone, ""),
    Route("POST", f"{_V1}/batched", "create_batch", cancels.gone, ""),
    Route("POST", f"{_V2}/batched", "create_batch", placing.create_batch, "write", per_order=True),
    Route("POST", _V2, "create", placing.create, "write"),
    Route("POST", f"{_V2}/:order_id/amend", "amend", placing.amend, "write"),
    Route("POST", f"{_V2}/:order_id/decrease", "decrease", placing.decrease, "write"),
    Route("GET", f"{_V1}/queue_positions", "other", reading.queue_positions),
    Route("GET", f"{_V1}/:order_id/queue_position", "other", reading.queue_position),
    Route("GET", f"{_V1}/:order_id", "read", reading.read_order, cost=2),
    Route("GET", _V1, "list", reading.list_orders),
    Route("GET", f"{PREFIX}/historical/orders", "history", reading.list_history),
    Route("GET", f"{PREFIX}/historical/cutoff", "cutoff", reading.historical_cutoff, "", public=True),
    Route("POST", f"{_GROUPS}/create", "group_create", groups.create_group, "write"),
    Route("GET", _GROUPS, "group_list", groups.list_groups),
    Route("GET", f"{_GROUPS}/:group_id", "group_read", groups.read_group),
    Route("DELETE", f"{_GROUPS}/:group_id", "group_delete", groups.delete_group, "write"),
    Route("PUT", f"{_GROUPS}/:group_id/trigger", "group_trigger", groups.trigger_group, "write"),
    Route("PUT", f"{_GROUPS}/:group_id/reset", "group_reset", groups.reset_group, "write"),
    Route("PUT", f"{_GROUPS}/:group_id/limit", "group_limit", groups.limit_group, "write"),
    Route("GET", f"{PREFIX}/portfolio/fills", "other", account.list_fills),
    Route("GET", f"{PREFIX}/portfolio/balance", "other", account.balance),
    Route("GET", f"{PREFIX}/portfolio/positions", "other", account.positions),
    Route("GET", f"{PREFIX}/exchange/status", "status", account.exchange_status, "", public=True),
    Route("GET", f"{PREFIX}/account/limits", "limits", account.limits),
    Route("GET", f"{PREFIX}/api_keys", "api_keys", account.api_keys),
    Route("GET", f"{PREFIX}/account/endpoint_costs", "costs", _endpoint_costs),
)
_TABLE: dict[tuple[str, int], list[tuple[Route, list[str]]]] = {}
for _route in ROUTES:
    _parts = _route.path.split("/")
    _TABLE.setdefault((_route.method, len(_parts)), []).append((_route, _parts))
