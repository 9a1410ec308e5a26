"""The words of the trade: cancel requests, the exchange's orders, outcomes, and their JSON.

Everything here is a value. Messages and records are parsed once, on the way in; a message that cannot
be understood is refused by field name (:class:`~.model.fields.BadRequest`).
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

from kalshi_cancel.model.fields import CANCEL, BadRequest, kind

ORDER_FIELDS_MAX = 100  # documented orders have about 30 fields, all of them short and flat
ORDER_TEXT_MAX_CHARS = 1000
ORDER_NUMBER_MAX_BITS = 64
SHARDS = 16  # that have a bucket of their own, as far as we look; the exchange has four
_COUNT = re.compile(r"[0-9]{1,15}(\.[0-9]{1,6})?")
_CENT_OF_A_CONTRACT = Decimal("0.01")


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
        if not isinstance(message, Mapping):
            raise BadRequest({"message": f"expected an object with an order_id, got {kind(message)}"})
        return cls(**CANCEL.parse(message))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The request as the store keeps it, without fields that only newer versions of us know."""
        kept = json.loads(text)
        if not isinstance(kept, Mapping):
            raise BadRequest({"message": f"expected an object with an order_id, got {kind(kept)}"})
        return cls(
            **CANCEL.parse(kept, may_have_more=True),
            seen_remaining=parse_count(kept.get("seen_remaining")),
            seen_filled=parse_count(kept.get("seen_filled")),
            again=kept.get("again") is True,
        )

    def fields(self) -> dict[str, Any]:
        """The message's fields: what :meth:`parse` takes, without those that are not set."""
        return {name: value for name in REQUEST_FIELDS if (value := getattr(self, name)) is not None}

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


REQUEST_FIELDS = tuple(CANCEL.fields)  # what a message may say of a cancel


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
    return (
        f"{rounded if rounded == count else count.normalize():f}"  # equal counts share a place in the cache
    )


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
