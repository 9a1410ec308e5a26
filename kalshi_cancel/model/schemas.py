"""The messages and values as JSON Schema.

``python -m kalshi_cancel.model.schemas FOLDER`` writes a file for each.

Made of the tables of fields that parse the messages and of the classes of the values, so that a new field
cannot be forgotten here: a class that has no schema yet is a KeyError. A message that is valid is accepted.
Two things cannot be said in a schema and are refused all the same: text that is not printable in a rare way,
and 1.0 for 1. Times and prices of a scope are accepted in more forms than shown here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from types import UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from kalshi_cancel.model.fields import CANCEL, MASS_CANCEL, SCOPE, Schema, or_null
from kalshi_cancel.model.mass_request import CANCEL_ALL, GROUP_TRIGGER
from kalshi_cancel.model.orders import OrderStatus
from kalshi_cancel.model.results import CancelResult, ConfirmedBy, Outcome, Problem

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


def _is_set(name: str) -> Schema:
    return {"required": [name], "properties": {name: {"not": _NULL}}}


_CANCEL: Final = CANCEL.schema()
_CANCELS: Final[Schema] = {
    "type": "object",
    "properties": {
        "orders": {
            "type": "array",
            "items": {"anyOf": [CANCEL.fields["order_id"].schema, {"$ref": "#/$defs/cancel_order"}]},
        }
    },
    "required": ["orders"],
    "additionalProperties": False,
    "$defs": {"cancel_order": _CANCEL},
}
_FILTERS: Final = [name for name in SCOPE.fields if name != "everything"]
_SCOPE: Final[Schema] = {
    **SCOPE.schema(),
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
_MASS: Final[Schema] = {**MASS_CANCEL.schema(), "$defs": {"scope": _SCOPE}}


# --- Values: further fields may come ----------------------------------------------------------------------

_COUNT: Final[Schema] = {"type": "string", "pattern": r"^[0-9]+\.[0-9]{2,}$"}
_TIME: Final[Schema] = {"type": "string", "format": "date-time"}
_STRING: Final[Schema] = {"type": "string"}
_NUMBER: Final[Schema] = {"type": "number"}
_FLAG: Final[Schema] = {"type": "boolean"}
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
        return or_null(_form_of(kind))
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
        **dict.fromkeys(("requested_at", "settled_at"), or_null(_TIME)),
    }
)

_PLAN: Final = _value(
    {
        "started_s": _NUMBER,
        "listed_at": or_null(_TIME),
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
_KEY: Final = _value({"subaccount": or_null(_NATURAL), "scopes": _list_of(_STRING), "may_cancel": _FLAG})
_COMMAND: Final = _value(
    {
        "what": {"enum": [CANCEL_ALL, GROUP_TRIGGER]},
        "sent": _NATURAL,
        "sent_at": or_null(_TIME),
        "answer": or_null(_STRING),
        "in_force_until": or_null(_TIME),
    }
)
_NOT_AFFECTED: Final = _value({"order_id": _STRING, "reason": _STRING, "error": or_null(_STRING)})
_REPORT_FIELDS: Final[dict[str, Schema]] = {
    "request_id": _STRING,
    "scope": {"type": "object"},
    "requested_by": or_null(_STRING),
    "reason": or_null(_STRING),
    "automated": _FLAG,
    "dry_run": _FLAG,
    "deadline_s": _NUMBER,
    "allow_side_effects": _FLAG,
    "traceparent": or_null(MASS_CANCEL.fields["traceparent"].schema),
    "accepted_at": _TIME,
    "completed_at": _TIME,
    "flat": _FLAG,
    "why_not_flat": or_null(_STRING),
    "flat_listing": or_null(_value({"at": _TIME, "sha256": _STRING, "pages": _NATURAL})),
    "key": or_null(_KEY),
    "plan": _PLAN,
    "command": or_null(_COMMAND),
    "affected": _list_of(_value({"order_id": _STRING, "reduced_by": or_null(_COUNT)})),
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
    "actual_s": or_null(_NUMBER),
    "proven_s": or_null(_NUMBER),
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
