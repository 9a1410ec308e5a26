"""The words of the trade: cancel requests, the exchange's orders, outcomes, and their JSON.

Everything here is a value. Messages and records are parsed once, on the way in; a message that cannot
be understood is refused by field name (:class:`BadRequest`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from functools import lru_cache
from itertools import islice
from typing import Any, Self, TypeVar

ORDER_ID_MAX_CHARS = 128  # the exchange's ids are 36-character UUIDs; room for gateways that prefix them
TEXT_MAX_CHARS = 512
SHOWN_MAX_CHARS = 60  # of a bad value in an error message
PROBLEMS_SHOWN = 20  # in one error message, which is logged and stored: more than there are fields
ORDER_FIELDS_MAX = 100  # documented orders have about 30 fields, all of them short and flat
ORDER_TEXT_MAX_CHARS = 1000
ORDER_NUMBER_MAX_BITS = 64
NUMBER_MAX = 1_000_000  # of shards and subaccounts: far beyond any that there are
DEADLINE_MAX_S = 3600.0  # a waiter that is willing to wait longer should look at the record instead

# Letters that mean the same in a path, percent-encoded or not: the signed path is the sent path.
_ORDER_ID = re.compile(rf"[A-Za-z0-9_-]{{1,{ORDER_ID_MAX_CHARS}}}")
SHARDS = 16  # that have a bucket of their own, as far as we look; the exchange has four
_TICKER = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_COUNT = re.compile(r"[0-9]{1,15}(\.[0-9]{1,6})?")
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_CENT_OF_A_CONTRACT = Decimal("0.01")


class BadRequest(ValueError):  # noqa: N818 - it is the sender's error, named like HTTP's
    """A cancel request that cannot be carried out; ``problems`` maps each field to what was expected."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        self.problems = dict(problems)
        words = [f"{field}: {problem}" for field, problem in islice(self.problems.items(), PROBLEMS_SHOWN)]
        if len(self.problems) > PROBLEMS_SHOWN:
            words.append(f"and {len(self.problems) - PROBLEMS_SHOWN} more")
        super().__init__("; ".join(words))


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """One order to be canceled, as a producer asked for it.

    ``exchange_index`` is the order's shard (-1: let the exchange route by ``market_ticker``);
    ``deadline_s`` is how long the waiter wants us to try before it is told ``unresolved``; ``request_id``
    what the sender knows it by, a mass cancel's own for each of its orders; ``traceparent`` (W3C) the span
    that its traces hang on.

    Three more that no message can set: ``seen_remaining`` and ``seen_filled`` are what the listing has shown
    that the order was found in; ``again``: a record of an earlier cancel of ours was not believed.
    """

    order_id: str
    market_ticker: str | None = None
    exchange_index: int | None = None
    subaccount: int | None = None
    requested_by: str | None = None
    reason: str | None = None
    deadline_s: float | None = None
    request_id: str | None = None
    traceparent: str | None = None
    seen_remaining: Decimal | None = None
    seen_filled: Decimal | None = None
    again: bool = False

    @classmethod
    def parse(cls, message: object) -> Self:
        """The request that a message's fields describe; raises :class:`BadRequest` naming every bad field."""
        return cls(**cls._values(message))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The request as the store keeps it, without fields that only newer versions of us know."""
        kept = json.loads(text)
        values = cls._values(kept, may_have_more=True)
        return cls(
            **values,
            seen_remaining=parse_count(kept.get("seen_remaining")),
            seen_filled=parse_count(kept.get("seen_filled")),
            again=kept.get("again") is True,
        )

    @classmethod
    def _values(cls, message: object, *, may_have_more: bool = False) -> dict[str, Any]:
        """The fields that are set, each checked."""
        if not isinstance(message, Mapping):
            raise BadRequest({"message": f"expected an object with an order_id, got {_kind(message)}"})
        values = {}
        for name, value in message.items():
            check = _CHECKS.get(name)
            if check is None and may_have_more:
                continue
            if check is None or (value is not None and check(value) is not None):
                raise BadRequest(cls._problems(message))
            if value is not None:  # (JSON null and an absent field are the same wish.)
                values[name] = value
        if "order_id" not in values:
            raise BadRequest(cls._problems(message))
        return values

    @staticmethod
    def _problems(message: Mapping[Any, Any]) -> dict[str, str]:
        """What is wrong with each field."""
        problems = {
            _shown(name): f"unknown field; known are {', '.join(sorted(_CHECKS))}"
            for name in message
            if name not in _CHECKS
        }
        for name, check in _CHECKS.items():
            value = message.get(name)
            if value is not None or name == "order_id":
                expected = check(value)
                if expected is not None:
                    problems[name] = f"expected {expected}, got {_kind(value)}"
        return problems

    def fields(self) -> dict[str, Any]:
        """The message's fields: what :meth:`parse` takes, without those that are not set."""
        return {name: value for name in _CHECKS if (value := getattr(self, name)) is not None}

    def kept_fields(self) -> dict[str, Any]:
        """The same with what only we set: what :meth:`from_json` reads."""
        seen = {"seen_remaining": self.seen_remaining, "seen_filled": self.seen_filled}
        counts = {name: str(count) for name, count in seen.items() if count is not None}
        return {**self.fields(), **counts, **({"again": True} if self.again else {})}


def write_path(exchange_index: int | None, orders: int = 1) -> str:
    """The bucket that pays for a cancel: its shard's own for a single one of a named shard from 1.

    Of shards far beyond those there are, the unscoped one: each bucket is looked at by each claim.
    """
    is_own = orders == 1 and 1 <= (exchange_index or 0) < SHARDS
    return f"write:{exchange_index}" if is_own else "write"


def is_order_id(value: object) -> bool:
    """Whether ``value`` is an order id that stands in a path unchanged."""
    return isinstance(value, str) and _ORDER_ID.fullmatch(value) is not None


def is_ticker(value: object) -> bool:
    """Whether ``value`` may be the ticker of a market, an event or a series."""
    return isinstance(value, str) and _TICKER.fullmatch(value) is not None


def is_traceparent(value: object) -> bool:
    """Whether ``value`` is a W3C traceparent of the version that there is."""
    return isinstance(value, str) and _TRACEPARENT.fullmatch(value) is not None


def _expect_order_id(value: object) -> str | None:
    if isinstance(value, str) and _ORDER_ID.fullmatch(value):
        return None
    return f"1 to {ORDER_ID_MAX_CHARS} letters, digits, '-' or '_'"


def _expect_ticker(value: object) -> str | None:
    return None if is_ticker(value) else "a market ticker of letters, digits, '-', '_', '.' or ':'"


def _expect_shard(value: object) -> str | None:
    ok = type(value) is int and -1 <= value <= NUMBER_MAX
    return None if ok else "a shard number from 0, or -1 for auto-routing"


def _expect_subaccount(value: object) -> str | None:
    ok = type(value) is int and 0 <= value <= NUMBER_MAX
    return None if ok else "a subaccount number from 0"


def _expect_text(value: object) -> str | None:
    ok = isinstance(value, str) and len(value) <= TEXT_MAX_CHARS and value.isprintable()
    return None if ok else f"printable text of at most {TEXT_MAX_CHARS} characters"


def _expect_deadline(value: object) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    ok = number and 0 < value <= DEADLINE_MAX_S  # type: ignore[operator]  # narrowed by `number`; NaN compares false
    return None if ok else f"seconds, above 0 and at most {DEADLINE_MAX_S:g}"


def _expect_traceparent(value: object) -> str | None:
    return None if is_traceparent(value) else "a W3C traceparent like 00-{32 hex digits}-{16 hex digits}-01"


_CHECKS = {
    "order_id": _expect_order_id,
    "market_ticker": _expect_ticker,
    "exchange_index": _expect_shard,
    "subaccount": _expect_subaccount,
    "requested_by": _expect_text,
    "reason": _expect_text,
    "deadline_s": _expect_deadline,
    "request_id": _expect_order_id,
    "traceparent": _expect_traceparent,
}


REQUEST_FIELDS = tuple(_CHECKS)  # what a message may say of a cancel


class Lane(StrEnum):
    """Who is served first: risk systems, then strategies; each lane has a queue of its own."""

    RISK = "risk"
    STRATEGY = "strategy"

    @property
    def queue(self) -> str:
        """The Celery queue of the lane."""
        return _QUEUES[self]

    @classmethod
    def of_queue(cls, queue: object) -> Lane:
        """The lane that a queue belongs to; what came any other way is a strategy's."""
        return next((lane for lane, name in _QUEUES.items() if name == queue), cls.STRATEGY)


_QUEUES = {Lane.RISK: "risk", Lane.STRATEGY: "cancels"}


class OrderStatus(StrEnum):
    """An order's status in the exchange's words (``pending`` is only known to old builds).

    ``expired`` and ``rejected`` are ends that the field knows and the exchange has not named so far;
    ``unknown`` stands for every other word, which ``Order.raw`` has.
    """

    PENDING = "pending"
    RESTING = "resting"
    CANCELED = "canceled"
    EXECUTED = "executed"
    EXPIRED = "expired"
    REJECTED = "rejected"
    UNKNOWN = "unknown"

    @classmethod
    def parse(cls, word: object) -> OrderStatus:
        """The status that a word of the wire means, whatever its case and spelling."""
        plain = word.strip().lower() if isinstance(word, str) else ""
        try:
            return cls(_SPELLED_OTHERWISE.get(plain, plain))
        except ValueError:
            return cls.UNKNOWN

    @property
    def terminal(self) -> bool:
        """Whether nothing more can happen to the order."""
        return self in _ENDS


_SPELLED_OTHERWISE = {"cancelled": "canceled", "filled": "executed", "open": "resting"}
_ENDS = (OrderStatus.CANCELED, OrderStatus.EXECUTED, OrderStatus.EXPIRED, OrderStatus.REJECTED)


@dataclass(slots=True)  # thousands are made a second: frozen, each would take three times as long
class Order:
    """An order as the exchange showed it at one moment; counts are contracts, ``raw`` is all that it said.

    ``last_update_ms`` is a moment on the exchange's clock, told to within ``last_update_within_ms``.
    """

    order_id: str
    status: OrderStatus
    ticker: str | None
    exchange_index: int | None
    subaccount: int | None
    initial_count: Decimal | None
    fill_count: Decimal | None
    remaining_count: Decimal | None
    last_update_ms: int | None
    raw: Mapping[str, Any]
    last_update_within_ms: int = 1

    def fields(self) -> dict[str, Any]:
        """Its own fields as they came; what no documented order has (nesting, floods) is left out."""
        return {
            name: value
            for name, value in islice(self.raw.items(), ORDER_FIELDS_MAX)
            if value is None
            or (isinstance(value, str) and len(value) <= ORDER_TEXT_MAX_CHARS)
            or (isinstance(value, int) and value.bit_length() <= ORDER_NUMBER_MAX_BITS)
            or (isinstance(value, float) and math.isfinite(value))
        }


class Outcome(StrEnum):
    """What became of a cancel."""

    CANCELED = "canceled"
    TOO_LATE = "too_late"
    UNKNOWN_ORDER = "unknown_order"
    REFUSED = "refused"
    UNRESOLVED = "unresolved"

    @property
    def final(self) -> bool:
        """Whether asking again can change nothing: the order itself is terminal."""
        return self in (Outcome.CANCELED, Outcome.TOO_LATE)


class ConfirmedBy(StrEnum):
    """How an outcome is known."""

    CANCEL = "cancel"
    READ_BACK = "read_back"


@dataclass(frozen=True, slots=True)
class Problem:
    """The last thing that stood in the way: the exchange's code and words, or ours."""

    code: str
    message: str
    http_status: int | None = None


@dataclass(frozen=True, slots=True)
class CancelResult:
    """The outcome of a cancel: the value of the record ``cancel:{order_id}``.

    ``attempts`` counts cancels sent for this order (read-backs are not counted); times are ISO 8601 UTC,
    ``exchange_ts_ms`` is the exchange's own clock; counts are contracts, None when not known.
    ``requested_by_left_out``: further requests were made in names that the list has no room for.
    """

    order_id: str | None
    outcome: Outcome
    status: OrderStatus | None = None
    reduced_by: Decimal | None = None
    fill_count: Decimal | None = None
    remaining_count: Decimal | None = None
    confirmed_by: ConfirmedBy | None = None
    attempts: int = 0
    requested_at: str | None = None
    settled_at: str | None = None
    exchange_ts_ms: int | None = None
    requested_by: tuple[str, ...] = ()
    requested_by_left_out: int = 0
    error: Problem | None = None
    order: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The public form (design's table of fields): counts as decimal strings, the rest plain JSON."""
        return {
            "order_id": self.order_id,
            "outcome": self.outcome.value,
            "status": self.status and self.status.value,
            "reduced_by": count_text(self.reduced_by),
            "fill_count": count_text(self.fill_count),
            "remaining_count": count_text(self.remaining_count),
            "confirmed_by": self.confirmed_by and self.confirmed_by.value,
            "attempts": self.attempts,
            "requested_at": self.requested_at,
            "settled_at": self.settled_at,
            "exchange_ts_ms": self.exchange_ts_ms,
            "requested_by": list(self.requested_by),
            "requested_by_left_out": self.requested_by_left_out,
            "error": self.error
            and {
                "code": self.error.code,
                "message": self.error.message,
                "http_status": self.error.http_status,
            },
            "order": None if self.order is None else dict(self.order),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The result that :meth:`to_json` wrote; raises ValueError or KeyError for anything else."""
        error = value.get("error")
        return cls(
            order_id=value["order_id"],
            outcome=Outcome(value["outcome"]),
            status=_optional(OrderStatus, value.get("status")),
            reduced_by=_optional(Decimal, value.get("reduced_by")),
            fill_count=_optional(Decimal, value.get("fill_count")),
            remaining_count=_optional(Decimal, value.get("remaining_count")),
            confirmed_by=_optional(ConfirmedBy, value.get("confirmed_by")),
            attempts=value.get("attempts", 0),
            requested_at=value.get("requested_at"),
            settled_at=value.get("settled_at"),
            exchange_ts_ms=value.get("exchange_ts_ms"),
            requested_by=tuple(value.get("requested_by", ())),
            requested_by_left_out=value.get("requested_by_left_out", 0),
            error=error and Problem(error["code"], error["message"], error.get("http_status")),
            order=value.get("order"),
        )


_T = TypeVar("_T")


def _optional(kind: type[_T], value: Any) -> _T | None:
    return None if value is None else kind(value)  # type: ignore[call-arg]  # each kind takes one text


@lru_cache(maxsize=1024)  # orders of a few sizes come by the thousand
def count_text(count: Decimal | None) -> str | None:
    """Contracts as a decimal string: two places, more only where rounding would change the value."""
    if count is None:
        return None
    rounded = count.quantize(_CENT_OF_A_CONTRACT)
    return f"{rounded if rounded == count else count:f}"


def parse_count(value: object) -> Decimal | None:
    """Contracts from the wire, an integer or a decimal string; None for anything that is neither."""
    if type(value) is str:  # most of thousands a second
        return _count(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, int) and value.bit_length() > 64:  # noqa: PLR2004 - far above any count; str() of a huge one fails
        return None
    return _count(str(value))


@lru_cache(maxsize=1024)  # orders of a few sizes come by the thousand
def _count(text: str) -> Decimal | None:
    return Decimal(text) if _COUNT.fullmatch(text) else None


def utc_text(epoch_s: float) -> str:
    """A moment as ISO 8601 UTC with milliseconds."""
    seconds, ms = divmod(math.floor(epoch_s * 1000), 1000)
    return f"{_second_text(seconds)}.{ms:03d}Z"


@lru_cache(maxsize=64)  # thousands of orders a second share one
def _second_text(epoch_s: int) -> str:
    return datetime.fromtimestamp(epoch_s, tz=UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _kind(value: object) -> str:
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
