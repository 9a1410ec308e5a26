"""The scope of a mass cancel: which resting orders are meant, as a value that can be parsed and matched."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Self

from kalshi_cancel.model.orders import NUMBER_MAX, BadRequest, is_order_id, is_ticker

IDS_SHOWN_MOST = 1_000
TEXT_MAX_CHARS = 200  # far above any ticker
EVENTS_IN_ONE_LISTING = 10  # the exchange's limit on event_ticker
_SIDES = ("yes", "no", "bid", "ask")
EPOCH_FROM_S = 946_684_800  # 2000-01-01: a smaller number is a year or a date without its dashes
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
        scope, problems = cls._read(message)
        if scope is not None:
            problems = contradictions(scope, now_s=now_s)
            if not problems:
                return scope
        raise BadRequest(problems)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """What :meth:`to_json` wrote: it was accepted once, and is not judged again."""
        scope, problems = cls._read(value)
        if scope is None:
            raise BadRequest(problems)
        return scope

    @classmethod
    def _read(cls, message: object) -> tuple[Self | None, dict[str, str]]:
        if not isinstance(message, Mapping):
            return None, {"scope": f"expected an object, got {type(message).__name__}"}
        problems = {
            ascii(name): f"unknown field; known are {', '.join(sorted(_PARSERS))}"
            for name in message
            if name not in _PARSERS
        }
        values: dict[str, Any] = {}
        for name, (parse, expected) in _PARSERS.items():
            given = message.get(name)
            if given is None:
                continue
            try:
                values[name] = parse(given)
            except (ValueError, TypeError, InvalidOperation, OverflowError, OSError):
                problems[name] = f"expected {expected}, got {ascii(given)[:60]}"
        return (None if problems else cls(**values)), problems

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


def _parse_flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _parse_text(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= TEXT_MAX_CHARS or not value.isprintable():
        raise ValueError
    return value


def _parse_ticker(value: object) -> str:
    """A ticker, or the start of one; none has small letters, so that nothing rests would prove nothing."""
    if not is_ticker(value) or str(value) != str(value).upper():
        raise ValueError
    return str(value)


def _parse_whole_ticker(value: object) -> str:
    """A ticker that is no mere start of one."""
    ticker = _parse_ticker(value)
    if ticker.endswith("-"):
        raise ValueError
    return ticker


def _parse_tickers(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_parse_whole_ticker(value),)
    if not isinstance(value, list | tuple) or not value:
        raise TypeError
    return tuple(dict.fromkeys(_parse_whole_ticker(each) for each in value))


def _parse_order_ids(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value or not all(is_order_id(each) for each in value):
        raise ValueError
    return tuple(dict.fromkeys(value))


def _parse_number(value: object) -> int:
    if type(value) is not int or not 0 <= value <= NUMBER_MAX:
        raise ValueError
    return value


def _parse_side(value: object) -> str:
    if value not in _SIDES:
        raise ValueError
    return str(value)


def _parse_moment(value: object) -> datetime:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value < EPOCH_FROM_S:
            raise ValueError
        return datetime.fromtimestamp(value, tz=UTC)
    moment = datetime.fromisoformat(value)  # type: ignore[arg-type]  # anything but text is a TypeError
    if moment.tzinfo is None:
        raise ValueError
    return moment.astimezone(UTC)


def _parse_price(value: object) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    price = Decimal(str(value))
    if not Decimal(0) <= price <= Decimal(1):
        raise ValueError
    return price


_TIME = "a time: ISO 8601 with an offset, or epoch seconds (from 2000 on)"
_OF_LETTERS = "of capital letters, digits, '-', '_', '.' or ':'"
_WHOLE = f"{_OF_LETTERS} that does not end in '-' (ticker_prefix takes the start of a ticker)"
_PRICE = "a yes price in dollars, from 0 to 1"
_PARSERS: dict[str, tuple[Any, str]] = {
    "everything": (_parse_flag, "true or false"),
    "order_ids": (_parse_order_ids, "a list of order ids"),
    "subaccount": (_parse_number, "a subaccount number from 0"),
    "tickers": (_parse_tickers, f"a market ticker {_WHOLE}, or a list of them"),
    "event_tickers": (_parse_tickers, f"an event ticker {_WHOLE}, or a list of them"),
    "series": (_parse_whole_ticker, f"a series ticker {_WHOLE}"),
    "ticker_prefix": (_parse_ticker, f"the start of a ticker {_OF_LETTERS}"),
    "side": (_parse_side, "yes, no, bid or ask"),
    "client_order_id_prefix": (_parse_text, "the start of a client_order_id"),
    "order_group_id": (_parse_text, "an order group's id"),
    "exchange_index": (_parse_number, "a shard number from 0"),
    "created_after": (_parse_moment, _TIME),
    "created_before": (_parse_moment, _TIME),
    "min_price": (_parse_price, _PRICE),
    "max_price": (_parse_price, _PRICE),
}
