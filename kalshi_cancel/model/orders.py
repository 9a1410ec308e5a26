"""Describes the exchange's orders: what it showed of one at one moment, and the words for its status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from itertools import islice
from typing import Any

ORDER_FIELDS_MAX = 100  # documented orders have about 30 fields, all of them short and flat
ORDER_TEXT_MAX_CHARS = 1000
ORDER_NUMBER_MAX_BITS = 64


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
