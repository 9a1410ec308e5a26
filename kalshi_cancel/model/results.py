"""Describes what became of a cancel: its outcome, how that is known, and the JSON of its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any, Self, TypeVar

from kalshi_cancel.model.counts import count_text
from kalshi_cancel.model.orders import OrderStatus


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
