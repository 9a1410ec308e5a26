"""Describes what a producer asks for: one order to be canceled, and the lane that serves it.

A message is parsed once, on the way in. One that cannot be understood is refused by field name
(:class:`~kalshi_cancel.model.fields.BadRequest`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any, Self

from kalshi_cancel.model.counts import parse_count
from kalshi_cancel.model.fields import CANCEL, BadRequest, kind

SHARDS = 16  # that have a bucket of their own, as far as we look; the exchange has four


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
