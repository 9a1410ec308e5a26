"""What the exchange shows beside orders: fills, pauses, and the account with its keys and limits."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from kalshi_cancel.sandbox.auth import SCOPES
from kalshi_cancel.sandbox.forms import dollars, trade
from kalshi_cancel.sandbox.reading import MAX_LIMIT

if TYPE_CHECKING:
    from kalshi_cancel.sandbox.auth import Key
    from kalshi_cancel.sandbox.visit import Answer, Visit

BALANCE_CENTS = 1_000_000  # all of it on shard 0


_ACTIVITIES = ("exchange_active", "trading_active", "intra_exchange_transfers_active")


def list_fills(visit: Visit) -> Answer:
    """The trades of the account, newest first, in one page."""
    limit = visit.integer("limit", least=1, most=MAX_LIMIT) or 100
    subaccount = visit.read_subaccount(visit.integer("subaccount"))
    shard = visit.integer("exchange_index")
    fills = [
        trade(fill)
        for fill in reversed(visit.market.fills)
        if visit.query.get("order_id") in {None, fill.order.order_id}
        and visit.query.get("ticker") in {None, fill.order.new.ticker}
        and subaccount in {None, fill.order.new.subaccount}
        and shard in {None, fill.order.new.exchange_index}
    ]
    return 200, {"fills": fills[:limit], "cursor": ""}


def balance(visit: Visit) -> Answer:
    """A round sum: the sandbox keeps no money. A key that is confined sees no breakdown by shard."""
    shard = visit.integer("exchange_index")
    cents = BALANCE_CENTS if shard in {None, 0} else 0
    body = {
        "balance": cents,
        "balance_dollars": _in_dollars(cents),
        "portfolio_value": 0,
        "updated_ts": visit.moment.ms // 1000,
    }
    if visit.key is None or visit.key.subaccount is None:
        body["balance_breakdown"] = [
            {"exchange_index": index, "balance": _in_dollars(0 if index else BALANCE_CENTS)}
            for index in range(visit.settings.shard_count)
        ]
    return 200, body


def positions(_visit: Visit) -> Answer:
    """None: the sandbox keeps no positions."""
    return 200, {"market_positions": [], "event_positions": [], "cursor": ""}


def exchange_status(visit: Visit) -> Answer:
    """What is paused, as a whole and shard by shard."""
    settings = visit.settings
    shards = [
        {
            "exchange_index": shard,
            "description": f"Shard {shard}",
            "exchange_active": settings.exchange_active(shard),
            "trading_active": settings.trading_active(shard),
            "intra_exchange_transfers_active": settings.exchange_active(shard),
        }
        for shard in range(settings.shard_count)
    ]
    body: dict[str, Any] = {
        **{name: any(shard[name] for shard in shards) for name in _ACTIVITIES},
        "exchange_index_statuses": shards,
    }
    if settings.resume_time is not None:
        body["exchange_estimated_resume_time"] = settings.resume_time
    return 200, body


def limits(visit: Visit) -> Answer:
    """The account's token rates and capacities."""
    return 200, visit.floor.budget.limits()


def api_keys(visit: Visit) -> Answer:
    """All keys of the account, whichever asks; a key that is confined names its subaccount."""
    return 200, {"api_keys": [_key(key) for key in visit.floor.keys.values()]}


def _in_dollars(cents: int) -> str:
    return dollars(Decimal(cents) / 100)


def _key(key: Key) -> dict[str, Any]:
    body: dict[str, Any] = {"api_key_id": key.key_id, "name": key.name, "scopes": list(SCOPES[key.scope])}
    return body if key.subaccount is None else {**body, "subaccount": key.subaccount}
