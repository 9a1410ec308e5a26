"""The scope of a mass cancel: which resting orders are meant, as a value that can be parsed and matched."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from decimal import Decimal
from typing import Any, Self

from kalshi_cancel.model.fields import SCOPE, BadRequest, kind

IDS_SHOWN_MOST = 1_000
EVENTS_IN_ONE_LISTING = 10  # the exchange's limit on event_ticker
# Clocks of hosts differ; an order that is created later than this is surely not there yet.
FUTURE_MARGIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Scope:
    """Every filter that is set must hold; a list holds when one of its members does.

    ``series`` means all markets of a series, ``ticker_prefix`` any market whose ticker starts so; ``side`` is
    ``yes`` or ``no`` (the outcome) or ``bid`` or ``ask`` (the order book); prices are of the yes side, in
    dollars; times are ISO 8601 with an offset, or epoch seconds. ``everything`` is the whole account, and
    excludes all others; a scope with nothing set is refused.
    """

    everything: bool = False
    order_ids: tuple[str, ...] = ()
    subaccount: int | None = None
    tickers: tuple[str, ...] = ()
    event_tickers: tuple[str, ...] = ()
    series: str | None = None
    ticker_prefix: str | None = None
    side: str | None = None
    client_order_id_prefix: str | None = None
    order_group_id: str | None = None
    exchange_index: int | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    min_price: Decimal | None = None
    max_price: Decimal | None = None

    @classmethod
    def parse(cls, message: object, *, now_s: float | None = None) -> Self:
        """The scope that a message describes; raises BadRequest naming every bad field.

        ``now_s``: epoch seconds, to refuse what can only be in the future.
        """
        scope = cls.from_json(message)
        if problems := contradictions(scope, now_s=now_s):
            raise BadRequest(problems)
        return scope

    @classmethod
    def from_json(cls, value: object) -> Self:
        """What :meth:`to_json` wrote: it was accepted once, and is not judged again."""
        if not isinstance(value, Mapping):
            raise BadRequest({"scope": f"expected an object, got {kind(value)}"})
        return cls(**SCOPE.parse(value))

    def to_json(self) -> dict[str, Any]:
        """What :meth:`parse` takes, without what is not set."""
        return {f.name: _plain(value) for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    def in_short(self) -> dict[str, Any]:
        """The same; of more ids than somebody would read, how many they are, and their digest."""
        said = self.to_json()
        if len(self.order_ids) > IDS_SHOWN_MOST:
            digest = hashlib.sha256("\n".join(sorted(self.order_ids)).encode()).hexdigest()
            said["order_ids"] = {"number": len(self.order_ids), "sha256": digest}
        return said

    @property
    def names_orders_only(self) -> bool:
        """Whether order ids are the only filter: what they name is meant wherever and however it rests."""
        return self.to_json().keys() == {"order_ids"}

    def listings(self) -> list[dict[str, str | int]]:
        """The part of the scope that the exchange can filter by itself: one query or more.

        Which event a market belongs to is for the exchange to say: a ticker's text only starts with it.
        """
        query: dict[str, str | int] = {}
        if len(self.tickers) == 1:
            query["ticker"] = self.tickers[0]
        if self.subaccount is not None:
            query["subaccount"] = self.subaccount
        if self.exchange_index is not None:
            query["exchange_index"] = self.exchange_index
        if not self.event_tickers:
            return [query]
        starts = range(0, len(self.event_tickers), EVENTS_IN_ONE_LISTING)
        groups = [self.event_tickers[start : start + EVENTS_IN_ONE_LISTING] for start in starts]
        return [{**query, "event_ticker": ",".join(group)} for group in groups]


def contradictions(scope: Scope, *, now_s: float | None) -> dict[str, str]:
    """What is wrong with a scope in which no order, or none of a name that it gives, can be.

    That nothing rests there would prove nothing.
    """
    named = [f.name for f in fields(scope) if getattr(scope, f.name) != f.default]
    if not named:
        return {"scope": "nothing is named: set a filter, or everything=true for the whole account"}
    problems = {}
    if scope.everything and len(named) > 1:
        problems["everything"] = "means the whole account; leave it out or leave the filters out"
    return {**problems, **_price_problems(scope), **_time_problems(scope, now_s), **_name_problems(scope)}


def _price_problems(scope: Scope) -> dict[str, str]:
    low, high = scope.min_price, scope.max_price
    if low is not None and high is not None and low > high:
        return {"max_price": f"expected at least min_price ({low}), got {high}"}
    if low == 1:
        return {"min_price": f"expected a price below 1, at which no order rests, got {low}"}
    if high == 0:
        return {"max_price": f"expected a price above 0, at which no order rests, got {high}"}
    return {}


def _time_problems(scope: Scope, now_s: float | None) -> dict[str, str]:
    after, before = scope.created_after, scope.created_before
    if after is not None and before is not None and after >= before:
        return {
            "created_before": f"expected a time after created_after ({_plain(after)}), got {_plain(before)}"
        }
    if after is not None and now_s is not None and after.timestamp() > now_s + FUTURE_MARGIN_S:
        return {"created_after": f"expected a time that is not in the future, got {_plain(after)}"}
    return {}


def _name_problems(scope: Scope) -> dict[str, str]:
    """Markets, events, series and prefixes that have no market in common."""
    series = None if scope.series is None else f"{scope.series}-"
    prefix, events = scope.ticker_prefix, scope.event_tickers
    problems = {}
    if series is not None and prefix is not None and not _may_share(series, prefix):
        problems["ticker_prefix"] = (
            f"expected the start of a ticker of the series {scope.series}, got {prefix}"
        )
    for event in events:
        if series is not None and not _may_share(series, event):
            problems["event_tickers"] = f"expected events of the series {scope.series}, got {event}"
        elif prefix is not None and not _may_share(prefix, event):
            problems["event_tickers"] = f"expected events of markets that start with {prefix}, got {event}"
        elif scope.tickers and not any(ticker.startswith(event) for ticker in scope.tickers):
            problems["event_tickers"] = f"expected events of the named markets, got {event}"
    for ticker in scope.tickers:
        if series is not None and not ticker.startswith(series):
            problems["tickers"] = f"expected markets of the series {scope.series}, got {ticker}"
        elif prefix is not None and not ticker.startswith(prefix):
            problems["tickers"] = f"expected markets whose ticker starts with {prefix}, got {ticker}"
        elif events and not any(ticker.startswith(event) for event in events):
            problems["tickers"] = f"expected markets of the named events, got {ticker}"
    return problems


def _may_share(one: str, other: str) -> bool:
    """Whether a ticker can start with both."""
    return one.startswith(other) or other.startswith(one)


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    return str(value) if isinstance(value, Decimal) else value
