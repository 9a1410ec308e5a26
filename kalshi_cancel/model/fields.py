"""The fields of all messages, one row each: how a value is parsed, what is expected, and its JSON Schema.

Refusals ("expected ..., got ...") and the schemas of messages follow from these rows. ``null`` means the
same as leaving a field out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from itertools import islice
from typing import Any, Final

Schema = dict[str, Any]

ORDER_ID_MAX_CHARS = 128  # the exchange's ids are 36-character UUIDs; room for gateways that prefix them
TEXT_MAX_CHARS = 512
SCOPE_TEXT_MAX_CHARS = 200  # far above any ticker
SHOWN_MAX_CHARS = 60  # of a bad value in an error message
PROBLEMS_SHOWN = 20  # in one error message, which is logged and stored: more than there are fields
NUMBER_MAX = 1_000_000  # of shards and subaccounts: far beyond any that there are
DEADLINE_MAX_S = 3600.0  # a waiter that is willing to wait longer should look at the record instead
EPOCH_FROM_S = 946_684_800  # 2000-01-01: a smaller number is a year or a date without its dashes
EPOCH_TO_S = 253_402_300_799  # the last second of the year 9999
SIDES = ("yes", "no", "bid", "ask")

# Letters that mean the same in a path, percent-encoded or not: the signed path is the sent path.
_ORDER_ID = re.compile(rf"[A-Za-z0-9_-]{{1,{ORDER_ID_MAX_CHARS}}}")
_TICKER = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
# What a parser raises for a bad value: datetime and Decimal have errors of their own.
_BAD_VALUE = (ValueError, TypeError, ArithmeticError, OSError)


class BadRequest(ValueError):  # noqa: N818 - it is the sender's error, named like HTTP's
    """A request that cannot be carried out; ``problems`` maps each field to what was expected."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        self.problems = dict(problems)
        words = [f"{field}: {problem}" for field, problem in islice(self.problems.items(), PROBLEMS_SHOWN)]
        if len(self.problems) > PROBLEMS_SHOWN:
            words.append(f"and {len(self.problems) - PROBLEMS_SHOWN} more")
        super().__init__("; ".join(words))


class BadMemberError(ValueError):
    """A list is refused because of this member of it."""

    def __init__(self, member: object) -> None:
        super().__init__()
        self.member = member


@dataclass(frozen=True, slots=True)
class Field:
    """What a field may hold. ``parse`` makes the value that is kept, or raises an error of any words."""

    parse: Callable[[Any], Any]
    expected: str
    schema: Schema


class Message:
    """The message parses its fields, refuses what cannot be meant, and is written as JSON Schema."""

    def __init__(self, fields: Mapping[str, Field], *, required: str | None = None) -> None:
        self.fields: Final = dict(fields)
        self._required = required
        self._parsers = {name: field.parse for name, field in fields.items()}

    def parse(self, message: Mapping[Any, Any], *, may_have_more: bool = False) -> dict[str, Any]:
        """The fields that are set, each parsed; raises BadRequest naming every bad field.

        ``may_have_more``: skip fields that are not known.
        """
        values: dict[str, Any] = {}
        parsers = self._parsers
        try:
            for name, value in message.items():
                parse = parsers.get(name)
                if parse is None:
                    if may_have_more:
                        continue
                    break
                if value is not None:
                    values[name] = parse(value)
            else:
                if self._required is None or self._required in values:
                    return values
        except _BAD_VALUE:
            pass
        raise BadRequest(self._problems(message))

    def _problems(self, message: Mapping[Any, Any]) -> dict[str, str]:
        """What is wrong with each field."""
        problems = {
            _shown(name): f"unknown field; known are {', '.join(sorted(self.fields))}"
            for name in message
            if name not in self.fields
        }
        for name, field in self.fields.items():
            value = message.get(name)
            if value is None and name != self._required:
                continue
            try:
                field.parse(value)
            except BadMemberError as bad:
                problems[name] = f"expected {field.expected}, got {kind(bad.member)}"
            except _BAD_VALUE:
                problems[name] = f"expected {field.expected}, got {kind(value)}"
        return problems

    def schema(self) -> Schema:
        """An object with these fields and no others; all but the required one may be null."""
        properties = {
            name: field.schema if name == self._required else or_null(field.schema)
            for name, field in self.fields.items()
        }
        needed = {} if self._required is None else {"required": [self._required]}
        return {"type": "object", "properties": properties, **needed, "additionalProperties": False}


def or_null(schema: Schema) -> Schema:
    """The schema of the same, or null."""
    if "anyOf" in schema:
        return {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    if "enum" in schema:
        return {"enum": [*schema["enum"], None]}
    return {**schema, "type": [schema["type"], "null"]}


def kind(value: object) -> str:
    """A value as an error message may show it: its type and, for short text and numbers, itself."""
    if value is None:
        return "nothing"
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return f"{type(value).__name__} {_shown(value)}"
    return type(value).__name__


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 128:  # noqa: PLR2004 - str() of a huge one fails
        return "with very many digits"
    text = ascii(value)
    return text if len(text) <= SHOWN_MAX_CHARS else text[: SHOWN_MAX_CHARS - 3] + "..."


def is_order_id(value: object) -> bool:
    """Whether ``value`` is an order id that stands in a path unchanged."""
    return isinstance(value, str) and _ORDER_ID.fullmatch(value) is not None


@functools.lru_cache(maxsize=1024)  # a market's orders are many
def is_ticker(value: str | None) -> bool:
    """Whether ``value`` may be the ticker of a market, an event or a series."""
    return value is not None and _TICKER.fullmatch(value) is not None


def is_traceparent(value: object) -> bool:
    """Whether ``value`` is a W3C traceparent of the version that there is."""
    return isinstance(value, str) and _TRACEPARENT.fullmatch(value) is not None


# -- parsers -----------------------------------------------------------------------------------------------


def _order_id(value: Any) -> str:
    if isinstance(value, str) and _ORDER_ID.fullmatch(value):
        return value
    raise ValueError


def _any_ticker(value: Any) -> str:
    if isinstance(value, str) and _TICKER.fullmatch(value):
        return value
    raise ValueError


def _ticker_start(value: Any) -> str:
    """A ticker, or the start of one; none has small letters, so that nothing rests would prove nothing."""
    ticker = _any_ticker(value)
    if ticker != ticker.upper():
        raise ValueError
    return ticker


def _whole_ticker(value: Any) -> str:
    """A ticker that is no mere start of one."""
    ticker = _ticker_start(value)
    if ticker.endswith("-"):
        raise ValueError
    return ticker


def _tickers(value: Any) -> tuple[str, ...]:
    return (_whole_ticker(value),) if isinstance(value, str) else _list_of(_whole_ticker, value)


def _order_ids(value: Any) -> tuple[str, ...]:
    return _list_of(_order_id, value)


def _list_of(parse: Callable[[Any], str], value: Any) -> tuple[str, ...]:
    """The members, each once."""
    if not isinstance(value, list | tuple) or not value:
        raise TypeError
    parsed: dict[str, None] = {}
    for member in value:
        try:
            parsed[parse(member)] = None
        except ValueError:
            raise BadMemberError(member) from None
    return tuple(parsed)


def _whole_number(least: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if type(value) is int and least <= value <= NUMBER_MAX:
            return value
        raise ValueError

    return parse


def _text(least: int, most: int) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if isinstance(value, str) and least <= len(value) <= most and value.isprintable():
            return value
        raise ValueError

    return parse


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise TypeError


def _deadline(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 < value <= DEADLINE_MAX_S:  # NaN compares false
        return value  # type: ignore[no-any-return]  # narrowed by `is_number`
    raise ValueError


def _traceparent(value: Any) -> str:
    if isinstance(value, str) and _TRACEPARENT.fullmatch(value):
        return value
    raise ValueError


def _side(value: Any) -> str:
    if value in SIDES:
        return str(value)
    raise ValueError


def _moment(value: Any) -> datetime:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value < EPOCH_FROM_S:
            raise ValueError
        return datetime.fromtimestamp(value, tz=UTC)
    moment = datetime.fromisoformat(value)  # anything but text is a TypeError
    if moment.tzinfo is None:
        raise ValueError
    return moment.astimezone(UTC)


def _price(value: Any) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    price = Decimal(str(value))
    if not Decimal(0) <= price <= Decimal(1):
        raise ValueError
    return price


def _object(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Mapping):
        return value
    raise TypeError


# -- schemas -----------------------------------------------------------------------------------------------

# Without control characters, blanks other than the space, and marks that nobody sees; the whole list of what
# cannot be printed is Unicode's, and long.
_PRINTABLE: Final = (
    r"^[^\u0000-\u001f\u007f-\u00a0\u00ad\u1680\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff"
    r"\ud800-\udfff\ue000-\uf8ff]*$"
)


def _text_schema(least: int, most: int) -> Schema:
    return {"type": "string", "minLength": least, "maxLength": most, "pattern": _PRINTABLE}


def _matching(pattern: str) -> Schema:
    return {"type": "string", "pattern": f"^{pattern}$"}


_ID_SCHEMA: Final = _matching(_ORDER_ID.pattern)
_WHOLE_TICKER_SCHEMA: Final = _matching(f"(?!.*(-$|[a-z])){_TICKER.pattern}")
_MOMENT_SCHEMA: Final[Schema] = {
    "anyOf": [
        {
            "type": "string",
            "format": "date-time",
            "pattern": (
                r"^(19|20)[0-9]{2}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?"
                r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$"
            ),
        },
        {"type": "number", "minimum": EPOCH_FROM_S, "maximum": EPOCH_TO_S},
    ]
}
_PRICE_SCHEMA: Final[Schema] = {
    "anyOf": [
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "string", "pattern": r"^(0(\.[0-9]{1,6})?|1(\.0{1,6})?)$"},
    ]
}


# -- the fields --------------------------------------------------------------------------------------------


def _printable(least: int) -> Field:
    expected = f"printable text of at most {TEXT_MAX_CHARS} characters"
    return Field(_text(least, TEXT_MAX_CHARS), expected, _text_schema(least, TEXT_MAX_CHARS))


def _scope_text(expected: str) -> Field:
    return Field(_text(1, SCOPE_TEXT_MAX_CHARS), expected, _text_schema(1, SCOPE_TEXT_MAX_CHARS))


def _numbered(least: int, expected: str) -> Field:
    schema = {"type": "integer", "minimum": least, "maximum": NUMBER_MAX}
    return Field(_whole_number(least), expected, schema)


def _one_or_more_tickers(expected: str) -> Field:
    many = {"type": "array", "items": _WHOLE_TICKER_SCHEMA, "minItems": 1}
    return Field(_tickers, expected, {"anyOf": [_WHOLE_TICKER_SCHEMA, many]})


_OF_LETTERS: Final = "of capital letters, digits, '-', '_', '.' or ':'"
_WHOLE: Final = f"{_OF_LETTERS} that does not end in '-' (ticker_prefix takes the start of a ticker)"

_ID: Final = Field(_order_id, f"1 to {ORDER_ID_MAX_CHARS} letters, digits, '-' or '_'", _ID_SCHEMA)
_SUBACCOUNT: Final = _numbered(0, "a subaccount number from 0")
_FLAG: Final = Field(_flag, "true or false", {"type": "boolean"})
_DEADLINE: Final = Field(
    _deadline,
    f"seconds, above 0 and at most {DEADLINE_MAX_S:g}",
    {"type": "number", "exclusiveMinimum": 0, "maximum": DEADLINE_MAX_S},
)
_TRACE: Final = Field(
    _traceparent,
    "a W3C traceparent like 00-{32 hex digits}-{16 hex digits}-01",
    _matching(_TRACEPARENT.pattern),
)
_MOMENT: Final = Field(
    _moment, "a time: ISO 8601 with an offset, or epoch seconds (from 2000 on)", _MOMENT_SCHEMA
)
_PRICE: Final = Field(_price, "a yes price in dollars, from 0 to 1", _PRICE_SCHEMA)


# -- the messages ------------------------------------------------------------------------------------------

CANCEL: Final = Message(
    {
        "order_id": _ID,
        "market_ticker": Field(
            _any_ticker,
            "a market ticker of letters, digits, '-', '_', '.' or ':'",
            _matching(_TICKER.pattern),
        ),
        "exchange_index": _numbered(-1, "a shard number from 0, or -1 for auto-routing"),
        "subaccount": _SUBACCOUNT,
        "requested_by": _printable(0),
        "reason": _printable(0),
        "deadline_s": _DEADLINE,
        "request_id": _ID,
        "traceparent": _TRACE,
    },
    required="order_id",
)

SCOPE: Final = Message(
    {
        "everything": _FLAG,
        "order_ids": Field(
            _order_ids, "a list of order ids", {"type": "array", "items": _ID_SCHEMA, "minItems": 1}
        ),
        "subaccount": _SUBACCOUNT,
        "tickers": _one_or_more_tickers(f"a market ticker {_WHOLE}, or a list of them"),
        "event_tickers": _one_or_more_tickers(f"an event ticker {_WHOLE}, or a list of them"),
        "series": Field(_whole_ticker, f"a series ticker {_WHOLE}", _WHOLE_TICKER_SCHEMA),
        "ticker_prefix": Field(
            _ticker_start,
            f"the start of a ticker {_OF_LETTERS}",
            _matching(f"(?!.*[a-z]){_TICKER.pattern}"),
        ),
        "side": Field(_side, "yes, no, bid or ask", {"enum": list(SIDES)}),
        "client_order_id_prefix": _scope_text("the start of a client_order_id"),
        "order_group_id": _scope_text("an order group's id"),
        "exchange_index": _numbered(0, "a shard number from 0"),
        "created_after": _MOMENT,
        "created_before": _MOMENT,
        "min_price": _PRICE,
        "max_price": _PRICE,
    }
)

MASS_CANCEL: Final = Message(
    {
        "request_id": _ID,
        "requested_by": _printable(1),
        "reason": _printable(1),
        "automated": _FLAG,
        "dry_run": _FLAG,
        "allow_side_effects": _FLAG,
        "deadline_s": _DEADLINE,
        "traceparent": _TRACE,
        "scope": Field(_object, "an object", {"$ref": "#/$defs/scope"}),
    },
    required="scope",
)
