"""The messages and values as JSON Schema.

``python -m kalshi_cancel.model.schemas FOLDER`` writes a file for each.

Made of the tables that check the messages and of the classes of the values, so that a new field cannot be
forgotten here: what has no form yet is a KeyError. A message that is valid is accepted. Two things cannot be
said in a schema and are refused all the same: text that is not printable in a rare way, and 1.0 for 1.
Times and prices of a scope are accepted in more forms than shown here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from types import UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from kalshi_cancel.model import mass_request, orders, scope
from kalshi_cancel.model.orders import CancelResult, ConfirmedBy, OrderStatus, Outcome, Problem

Schema = dict[str, Any]

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_NULL: Final[Schema] = {"type": "null"}


def schemas() -> dict[str, Schema]:
    """Each schema by the name of its file, without the ending."""
    return {
        "cancel_order": _file("The keyword arguments of the task cancel_order", _CANCEL),
        "cancel_orders": _file("The keyword arguments of the task cancel_orders", _CANCELS),
        "mass_cancel": _file("The keyword arguments of the task mass_cancel", _MASS),
        "result": _file("The result of a cancel: the value of the record cancel:{order_id}", _RESULT),
        "mass_report": _file(
            "The report of a mass cancel: the value of the record mass:{request_id}", _REPORT
        ),
        "mass_progress": _file("How far a mass cancel has got", _PROGRESS),
    }


def text_of(schema: Schema) -> str:
    """The schema as its file has it."""
    return json.dumps(schema, indent=2) + "\n"


def main(folder: str) -> None:
    """Writes the files into a folder."""
    for name, schema in schemas().items():
        Path(folder, f"{name}.json").write_text(text_of(schema), "utf-8")


def _file(title: str, schema: Schema) -> Schema:
    return {"$schema": _DIALECT, "title": title, **schema}


# --- Messages: what is not known is refused, null is the same as absent -----------------------------------


def _text(*, least: int, most: int) -> Schema:
    return {"type": "string", "minLength": least, "maxLength": most, "pattern": _PRINTABLE}


# Without control characters, blanks other than the space, and marks that nobody sees; the whole list of what
# cannot be printed is Unicode's, and long.
_PRINTABLE: Final = (
    r"^[^\u0000-\u001f\u007f-\u00a0\u00ad\u1680\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff"
    r"\ud800-\udfff\ue000-\uf8ff]*$"
)
_ID: Final[Schema] = {"type": "string", "pattern": f"^{orders._ORDER_ID.pattern}$"}
_TRACEPARENT: Final[Schema] = {"type": "string", "pattern": f"^{orders._TRACEPARENT.pattern}$"}
_FLAG: Final[Schema] = {"type": "boolean"}
_DEADLINE: Final[Schema] = {"type": "number", "exclusiveMinimum": 0, "maximum": orders.DEADLINE_MAX_S}
_SCOPE_TEXT: Final = _text(least=1, most=scope.TEXT_MAX_CHARS)
_TICKER: Final[Schema] = {"type": "string", "pattern": f"^{orders._TICKER.pattern}$"}
_CAPITALS: Final[Schema] = {**_TICKER, "pattern": f"^(?!.*[a-z]){orders._TICKER.pattern}$"}
_WHOLE_TICKER: Final[Schema] = {**_TICKER, "pattern": f"^(?!.*(-$|[a-z])){orders._TICKER.pattern}$"}
_TICKERS: Final[Schema] = {"anyOf": [_WHOLE_TICKER, {"type": "array", "items": _WHOLE_TICKER, "minItems": 1}]}
_MOMENT: Final[Schema] = {
    "anyOf": [
        {
            "type": "string",
            "format": "date-time",
            "pattern": (
                r"^(19|20)[0-9]{2}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?"
                r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$"
            ),
        },
        {"type": "number", "minimum": scope.EPOCH_FROM_S, "maximum": 253402300799},
    ]
}
_PRICE: Final[Schema] = {
    "anyOf": [
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "string", "pattern": r"^(0(\.[0-9]{1,6})?|1(\.0{1,6})?)$"},
    ]
}


def _integer(least: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": orders.NUMBER_MAX}


# What each check lets through, by the check.
_FORMS: Final[Mapping[Any, Schema]] = {
    orders._expect_order_id: _ID,
    orders._expect_ticker: _TICKER,
    orders._expect_shard: _integer(-1),
    orders._expect_subaccount: _integer(0),
    orders._expect_text: _text(least=0, most=orders.TEXT_MAX_CHARS),
    orders._expect_deadline: _DEADLINE,
    orders._expect_traceparent: _TRACEPARENT,
    orders.is_order_id: _ID,
    orders.is_traceparent: _TRACEPARENT,
    mass_request._is_text: _text(least=1, most=orders.TEXT_MAX_CHARS),
    mass_request._is_flag: _FLAG,
    mass_request._is_deadline: _DEADLINE,
    scope._parse_flag: _FLAG,
    scope._parse_order_ids: {"type": "array", "items": _ID, "minItems": 1},
    scope._parse_number: _integer(0),
    scope._parse_ticker: _CAPITALS,
    scope._parse_whole_ticker: _WHOLE_TICKER,
    scope._parse_tickers: _TICKERS,
    scope._parse_text: _SCOPE_TEXT,
    scope._parse_side: {"enum": list(scope._SIDES)},
    scope._parse_moment: _MOMENT,
    scope._parse_price: _PRICE,
}


def _message(checks: Mapping[str, Any], *, required: str | None) -> Schema:
    """An object whose fields are checked by these; all but the required one may be null."""
    properties = {
        name: _FORMS[check] if name == required else _or_null(_FORMS[check]) for name, check in checks.items()
    }
    needed = {} if required is None else {"required": [required]}
    return {"type": "object", "properties": properties, **needed, "additionalProperties": False}


def _or_null(form: Schema) -> Schema:
    if "anyOf" in form:
        return {"anyOf": [*form["anyOf"], _NULL]}
    if "enum" in form:
        return {"enum": [*form["enum"], None]}
    return {**form, "type": [form["type"], "null"]}


def _first(checks: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
    return {name: check for name, (check, _expected) in checks.items()}


def _is_set(name: str) -> Schema:
    return {"required": [name], "properties": {name: {"not": _NULL}}}


_CANCEL: Final = _message(orders._CHECKS, required="order_id")
_CANCELS: Final[Schema] = {
    "type": "object",
    "properties": {"orders": {"type": "array", "items": {"anyOf": [_ID, {"$ref": "#/$defs/cancel_order"}]}}},
    "required": ["orders"],
    "additionalProperties": False,
    "$defs": {"cancel_order": _CANCEL},
}
_FILTERS: Final = [name for name in scope._PARSERS if name != "everything"]
_SCOPE: Final[Schema] = {
    **_message(_first(scope._PARSERS), required=None),
    "oneOf": [
        {
            "required": ["everything"],
            "properties": {"everything": {"const": True}, **dict.fromkeys(_FILTERS, _NULL)},
        },
        {
            "properties": {"everything": {"enum": [False, None]}},
            "anyOf": [_is_set(name) for name in _FILTERS],
        },
    ],
}
_MASS_CHECKS: Final = {name: check for name, check in _first(mass_request._CHECKS).items() if name != "scope"}
_MASS_FORM: Final = _message(_MASS_CHECKS, required=None)
_MASS: Final[Schema] = {
    **_MASS_FORM,
    "properties": {**_MASS_FORM["properties"], "scope": {"$ref": "#/$defs/scope"}},
    "required": ["scope"],
    "$defs": {"scope": _SCOPE},
}


# --- Values: further fields may come ----------------------------------------------------------------------

_COUNT: Final[Schema] = {"type": "string", "pattern": r"^[0-9]+\.[0-9]{2,}$"}
_TIME: Final[Schema] = {"type": "string", "format": "date-time"}
_STRING: Final[Schema] = {"type": "string"}
_NUMBER: Final[Schema] = {"type": "number"}
_NATURAL: Final[Schema] = {"type": "integer", "minimum": 0}


def _value(properties: Mapping[str, Schema]) -> Schema:
    """An object with all of these fields."""
    return {"type": "object", "properties": dict(properties), "required": list(properties)}


def _list_of(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _map_to(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


def _form_of(hint: Any) -> Schema:
    """How a value of this type is written."""
    if get_origin(hint) in (Union, UnionType):
        [kind] = [each for each in get_args(hint) if each is not type(None)]
        return _or_null(_form_of(kind))
    if hint == tuple[str, ...]:
        return _list_of(_STRING)
    return _WRITTEN[get_origin(hint) or hint]


def _fields_of(kind: type) -> dict[str, Schema]:
    return {name: _form_of(hint) for name, hint in get_type_hints(kind).items()}


_WRITTEN: Final[dict[Any, Schema]] = {
    str: _STRING,
    int: _NATURAL,
    Decimal: _COUNT,
    Mapping: {"type": "object"},
    **{kind: {"enum": list(kind)} for kind in (Outcome, OrderStatus, ConfirmedBy)},
}
_WRITTEN[Problem] = _value(_fields_of(Problem))
_RESULT: Final = _value(
    {
        **_fields_of(CancelResult),
        "status": {"enum": [*(status for status in OrderStatus if status.terminal), None]},
        **dict.fromkeys(("requested_at", "settled_at"), _or_null(_TIME)),
    }
)

_PLAN: Final = _value(
    {
        "started_s": _NUMBER,
        "listed_at": _or_null(_TIME),
        "found_after_s": _NUMBER,
        "orders": _NATURAL,
        "ids_not_listed": _NATURAL,
        "contracts": _COUNT,
        "tokens": _NUMBER,
        "shards": _map_to(_NATURAL),
        "paths": _map_to(_STRING),
        "tokens_s": _NUMBER,
        "command": _FLAG,
        "predicted_s": _NUMBER,
        "refused_calls_before": _NATURAL,
    }
)
_KEY: Final = _value({"subaccount": _or_null(_NATURAL), "scopes": _list_of(_STRING), "may_cancel": _FLAG})
_COMMAND: Final = _value(
    {
        "what": {"enum": [mass_request.CANCEL_ALL, mass_request.GROUP_TRIGGER]},
        "sent": _NATURAL,
        "sent_at": _or_null(_TIME),
        "answer": _or_null(_STRING),
        "in_force_until": _or_null(_TIME),
    }
)
_NOT_AFFECTED: Final = _value({"order_id": _STRING, "reason": _STRING, "error": _or_null(_STRING)})
_REPORT_FIELDS: Final[dict[str, Schema]] = {
    "request_id": _STRING,
    "scope": {"type": "object"},
    "requested_by": _or_null(_STRING),
    "reason": _or_null(_STRING),
    "automated": _FLAG,
    "dry_run": _FLAG,
    "deadline_s": _NUMBER,
    "allow_side_effects": _FLAG,
    "traceparent": _or_null(_TRACEPARENT),
    "accepted_at": _TIME,
    "completed_at": _TIME,
    "flat": _FLAG,
    "why_not_flat": _or_null(_STRING),
    "flat_listing": _or_null(_value({"at": _TIME, "sha256": _STRING, "pages": _NATURAL})),
    "key": _or_null(_KEY),
    "plan": _PLAN,
    "command": _or_null(_COMMAND),
    "affected": _list_of(_value({"order_id": _STRING, "reduced_by": _or_null(_COUNT)})),
    "not_affected": _list_of(_NOT_AFFECTED),
    "orders_affected": _NATURAL,
    "contracts_canceled": _COUNT,
    "orders_count_unknown": _NATURAL,
    "orders_result_lost": _NATURAL,
    "contracts_filled_meanwhile": _COUNT,
    "orders_fills_unknown": _NATURAL,
    "canceled_by_command": _list_of(_STRING),
    "tokens_spent": _NUMBER,
    "rate_limited": {"type": "integer"},
    "predicted_s": _NUMBER,
    "actual_s": _or_null(_NUMBER),
    "proven_s": _or_null(_NUMBER),
}
# What could not be meant has an error and nothing else.
_REFUSED: Final = _value({"request_id": {}, "flat": {"const": False}, "error": _STRING})
_REPORT: Final[Schema] = {"anyOf": [_value(_REPORT_FIELDS), _REFUSED]}
_PROGRESS: Final = _value(
    {
        "request_id": _STRING,
        **dict.fromkeys(("orders", "settled", "open", "unresolved"), _NATURAL),
        "at": _TIME,
    }
)

if __name__ == "__main__":
    main(sys.argv[1])
