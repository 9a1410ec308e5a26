"""What the exchange answers, in short: a form for each endpoint that the sandbox has.

A form is a kind by its name (see KINDS), a set of words, None for null, a tuple of alternatives, a list with
the form of its items, or a dict of fields, where a name that ends in "?" may be absent. The ordinary suite
checks all answers of the sandbox against these; `make conformance` checks these against the OpenAPI document.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conformance.watching import Answered

Form = Any

KINDS = {
    "count": re.compile(r"-?\d+\.\d{2}"),  # contracts: two decimals in every answer
    "dollars": re.compile(r"-?\d+\.\d{2,6}"),  # money: two to six
    "time": re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)"),
    "text": re.compile(r"(?s).*"),
}

ERROR = {"code?": "text", "message?": "text", "details?": "text"}
# As they come from the exchange; the document has ERROR without anything around it.
REFUSED = {"error": ERROR}
RATE_LIMITED = {"error": "text"}
_ORDER = {
    "order_id": "text",
    "user_id": "text",
    "client_order_id": "text",
    "ticker": "text",
    "side?": {"yes", "no"},
    "action?": {"buy", "sell"},
    "outcome_side": {"yes", "no"},
    "book_side": {"bid", "ask"},
    "type": {"limit", "market"},
    "status": {"resting", "canceled", "executed"},
    "yes_price_dollars": "dollars",
    "no_price_dollars": "dollars",
    "fill_count_fp": "count",
    "remaining_count_fp": "count",
    "initial_count_fp": "count",
    "taker_fill_cost_dollars": "dollars",
    "maker_fill_cost_dollars": "dollars",
    "taker_fees_dollars": "dollars",
    "maker_fees_dollars": "dollars",
    "expiration_time?": ("time", None),
    "created_time?": ("time", None),
    "last_update_time?": ("time", None),
    "self_trade_prevention_type?": ({"taker_at_cross", "maker"}, None),
    "order_group_id?": ("text", None),
    "cancel_order_on_pause?": "boolean",
    "subaccount_number?": ("integer", None),
    "exchange_index?": "integer",
}
_PLACED = {
    "order_id": "text",
    "client_order_id?": "text",
    "fill_count": "count",
    "remaining_count": "count",
    "average_fill_price?": "dollars",
    "average_fee_paid?": "dollars",
    "ts_ms": "integer",
}
_ORDERS = {"orders": [_ORDER], "cursor": "text"}
_BUCKET = {"refill_rate": "integer", "bucket_capacity": "integer"}
_DONE: Form = {}
_GROUP = "/portfolio/order_groups/:group_id"
_V2 = "/portfolio/events/orders"

ANSWERS: dict[str, tuple[int, Form]] = {
    f"POST {_V2}": (201, _PLACED),
    f"POST {_V2}/batched": (
        201,
        {
            "orders": [
                {
                    "order_id?": "text",
                    "client_order_id?": ("text", None),
                    "fill_count?": ("count", None),
                    "remaining_count?": ("count", None),
                    "average_fill_price?": ("dollars", None),
                    "average_fee_paid?": ("dollars", None),
                    "ts_ms?": ("integer", None),
                    "error?": (ERROR, None),
                }
            ]
        },
    ),
    f"POST {_V2}/:order_id/amend": (
        200,
        {
            "order_id": "text",
            "client_order_id?": "text",
            "remaining_count?": ("count", None),
            "fill_count?": ("count", None),
            "average_fill_price?": ("dollars", None),
            "average_fee_paid?": ("dollars", None),
            "ts_ms": "integer",
        },
    ),
    f"POST {_V2}/:order_id/decrease": (
        200,
        {"order_id": "text", "client_order_id?": "text", "remaining_count": "count", "ts_ms": "integer"},
    ),
    f"DELETE {_V2}/:order_id": (
        200,
        {"order_id": "text", "client_order_id?": "text", "reduced_by": "count", "ts_ms": "integer"},
    ),
    f"DELETE {_V2}/batched": (
        200,
        {
            "orders": [
                {
                    "order_id": "text",
                    "client_order_id?": ("text", None),
                    "reduced_by": "count",
                    "ts_ms?": ("integer", None),
                    "error?": (ERROR, None),
                }
            ]
        },
    ),
    f"DELETE {_V2}": (204, None),
    "GET /portfolio/orders/:order_id": (200, {"order": _ORDER}),
    "GET /portfolio/orders": (200, _ORDERS),
    "GET /historical/orders": (200, _ORDERS),
    "GET /historical/cutoff": (
        200,
        {
            "market_settled_ts": "time",
            "trades_created_ts": "time",
            "orders_updated_ts": "time",
            "market_positions_last_updated_ts?": "time",
        },
    ),
    "GET /portfolio/orders/queue_positions": (
        200,
        {"queue_positions": [{"order_id": "text", "market_ticker": "text", "queue_position_fp": "count"}]},
    ),
    "GET /portfolio/orders/:order_id/queue_position": (200, {"queue_position_fp": "count"}),
    "POST /portfolio/order_groups/create": (
        201,
        {"order_group_id": "text", "subaccount": "integer", "exchange_index?": "integer"},
    ),
    "GET /portfolio/order_groups": (
        200,
        {
            "order_groups?": [
                {
                    "id": "text",
                    "contracts_limit_fp?": "count",
                    "is_auto_cancel_enabled": "boolean",
                    "exchange_index?": "integer",
                }
            ]
        },
    ),
    f"GET {_GROUP}": (
        200,
        {
            "is_auto_cancel_enabled": "boolean",
            "contracts_limit_fp?": "count",
            "orders": ["text"],
            "exchange_index?": "integer",
        },
    ),
    f"DELETE {_GROUP}": (200, _DONE),
    f"PUT {_GROUP}/trigger": (200, _DONE),
    f"PUT {_GROUP}/reset": (200, _DONE),
    f"PUT {_GROUP}/limit": (200, _DONE),
    "GET /portfolio/fills": (
        200,
        {
            "fills": [
                {
                    "fill_id": "text",
                    "exchange_index": "integer",
                    "trade_id": "text",
                    "order_id": "text",
                    "ticker": "text",
                    "market_ticker": "text",
                    "side?": {"yes", "no"},
                    "action?": {"buy", "sell"},
                    "outcome_side": {"yes", "no"},
                    "book_side": {"bid", "ask"},
                    "count_fp": "count",
                    "yes_price_dollars": "dollars",
                    "no_price_dollars": "dollars",
                    "is_taker": "boolean",
                    "created_time?": "time",
                    "fee_cost": "dollars",
                    "subaccount_number?": ("integer", None),
                    "ts?": "integer",
                }
            ],
            "cursor": "text",
        },
    ),
    "GET /portfolio/balance": (
        200,
        {
            "balance": "integer",
            "balance_dollars": "dollars",
            "portfolio_value": "integer",
            "updated_ts": "integer",
            "balance_breakdown?": [{"exchange_index": "integer", "balance": "dollars"}],
        },
    ),
    "GET /portfolio/positions": (
        200,
        {
            "cursor?": "text",
            "market_positions": [
                {
                    "ticker": "text",
                    "exchange_index": "integer",
                    "total_traded_dollars": "dollars",
                    "position_fp": "count",
                    "market_exposure_dollars": "dollars",
                    "realized_pnl_dollars": "dollars",
                    "fees_paid_dollars": "dollars",
                    "last_updated_ts": "time",
                }
            ],
            "event_positions": [
                {
                    "event_ticker": "text",
                    "total_cost_dollars": "dollars",
                    "total_cost_shares_fp": "count",
                    "event_exposure_dollars": "dollars",
                    "realized_pnl_dollars": "dollars",
                    "fees_paid_dollars": "dollars",
                }
            ],
        },
    ),
    "GET /exchange/status": (
        200,
        {
            "exchange_active": "boolean",
            "trading_active": "boolean",
            "intra_exchange_transfers_active?": "boolean",
            "exchange_estimated_resume_time?": ("time", None),
            "exchange_index_statuses?": [
                {
                    "exchange_index": "integer",
                    "description": "text",
                    "exchange_active": "boolean",
                    "trading_active": "boolean",
                    "intra_exchange_transfers_active": "boolean",
                }
            ],
        },
    ),
    "GET /account/limits": (
        200,
        {
            "usage_tier": "text",
            "read": _BUCKET,
            "write": _BUCKET,
            "grants": [
                {
                    "exchange_instance": {"event_contract", "margined"},
                    "level": "text",
                    "expires_ts?": ("integer", None),
                    "source": "text",
                }
            ],
        },
    ),
    "GET /account/endpoint_costs": (
        200,
        {
            "default_cost": "integer",
            "endpoint_costs": [{"method": "text", "path": "text", "cost": "integer"}],
        },
    ),
    "GET /api_keys": (
        200,
        {
            "api_keys": [
                {
                    "api_key_id": "text",
                    "name": "text",
                    "scopes": [
                        {
                            *("read", "read::block_trade_accept", "read::portfolio_balance"),
                            *("write", "write::trade", "write::transfer", "write::fcm_risk"),
                            "write::block_trade_accept",
                        }
                    ],
                    "subaccount?": ("integer", None),
                    "fcm_subtrader_id?": ("text", None),
                }
            ],
            "api_key_region_expiration_ts?": ("integer", None),
        },
    ),
}


def departures(answered: Answered) -> list[str]:
    """How an answer of the sandbox departs from what the exchange says there, each in words."""
    where = f"{answered.endpoint} {answered.status}"
    body = json.loads(answered.body) if answered.body else None
    if answered.status >= 400:
        return differences(RATE_LIMITED if answered.status == 429 else REFUSED, body, where)
    status, form = ANSWERS[answered.endpoint]
    return [f"{where}: not {status}"] if answered.status != status else differences(form, body, where)


def differences(form: Form, value: object, where: str = "body") -> list[str]:
    """How a JSON value departs from its form, each in words; an unknown field is a difference, too."""
    if isinstance(form, tuple):
        found = [differences(each, value, where) for each in form]
        return [] if [] in found else found[0]
    if isinstance(form, dict):
        return _of_object(form, value, where)
    if isinstance(form, list):
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [
            said for at, each in enumerate(value) for said in differences(form[0], each, f"{where}[{at}]")
        ]
    if isinstance(form, set):
        fits = isinstance(value, str) and value in form
    elif form is None:
        fits = value is None
    elif form in {"integer", "boolean"}:
        fits = type(value) is {"integer": int, "boolean": bool}[form]
    else:
        fits = isinstance(value, str) and KINDS[form].fullmatch(value) is not None
    return [] if fits else [f"{where}: {value!r} is not {form}"]


def _of_object(form: dict[str, Form], value: object, where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no object"]
    known = {name.removesuffix("?"): each for name, each in form.items()}
    missing = [name for name in form if not name.endswith("?") and name not in value]
    return [
        *(f"{where}.{name} is missing" for name in missing),
        *(f"{where}.{name} is unknown" for name in value if name not in known),
        *(
            said
            for name in value
            if name in known
            for said in differences(known[name], value[name], f"{where}.{name}")
        ),
    ]
