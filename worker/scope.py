"""The scope of a mass cancel: which resting orders are meant, as a value that can be parsed and matched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Self

from worker.orders import NUMBER_MAX, BadRequest, Order, is_order_id, is_ticker

TEXT_MAX_CHARS = 200  # far above any ticker
EVENTS_IN_ONE_LISTING = 10  # the exchange's limit on event_ticker
_SIDES = ("yes", "no", "bid", "ask")
EPOCH_FROM_S = 946_684_800  # 2000-01-01: a smaller number is a year or a date without its dashes


@dataclass(frozen=True, slots=True)
class Scope:
    """Every filter that is set must hold; a list holds when one of its members does.

    ``series`` means all markets of a series, ``ticker_prefix`` any market whose ticker starts so; ``side`` is
    ``yes`` or ``no`` (the outcome) or ``bid`` or ``ask`` (the book); prices are of the yes side, in dollars;
    times are ISO 8601 with an offset, or epoch seconds. ``everything`` is the whole account, and excludes
    all others; a scope with nothing set is refused.
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
    def parse(cls, message: object) -> Self:
        """The scope that a message describes; raises BadRequest naming every bad field."""
        if not isinstance(message, Mapping):
            raise BadRequest({"scope": f"expected an object, got {type(message).__name__}"})
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
        if not problems:
            scope = cls(**values)
            named = [f.name for f in fields(scope) if getattr(scope, f.name) != f.default]
            if not named:
                problems["scope"] = "nothing is named: set a filter, or everything=true for the whole account"
            elif scope.everything and len(named) > 1:
                problems["everything"] = "means the whole account; leave it out or leave the filters out"
            problems |= scope._contradictions()
            if not problems:
                return scope
        raise BadRequest(problems)

    def _contradictions(self) -> dict[str, str]:
        """Bounds between which no order can be: that nothing rests there would prove nothing."""
        problems = {}
        prices = self.min_price, self.max_price
        if prices[0] is not None and prices[1] is not None and prices[0] > prices[1]:
            problems["max_price"] = f"expected at least min_price ({prices[0]}), got {prices[1]}"
        times = self.created_after, self.created_before
        if times[0] is not None and times[1] is not None and times[0] >= times[1]:
            problems["created_before"] = (
                f"expected a time after created_after ({_plain(times[0])}), got {_plain(times[1])}"
            )
        return problems

    def to_json(self) -> dict[str, Any]:
        """What :meth:`parse` takes, without what is not set."""
        return {f.name: _plain(value) for f in fields(self) if (value := getattr(self, f.name)) != f.default}

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

    def includes(self, order: Order) -> bool:
        """Whether an order of :meth:`listings` is meant, by everything that its own fields tell.

        Of what the exchange has filtered by, an order need not tell (old ones do not): only what it tells
        otherwise counts, and which event it belongs to is the exchange's word alone.
        """
        if self.everything:
            return True
        ticker, raw = order.ticker or "", order.fields()
        price = _price(raw.get("yes_price_dollars"), raw.get("yes_price"))
        created = _moment(raw.get("created_time"))
        return (
            (not self.order_ids or order.order_id in self.order_ids)
            and (self.subaccount is None or order.subaccount in (None, self.subaccount))
            and (not self.tickers or ticker in self.tickers)
            and (self.series is None or ticker.startswith(f"{self.series}-"))
            and (self.ticker_prefix is None or ticker.startswith(self.ticker_prefix))
            and (self.side is None or self.side in _sides(raw))
            and (
                self.client_order_id_prefix is None
                or str(raw.get("client_order_id") or "").startswith(self.client_order_id_prefix)
            )
            and (self.order_group_id is None or raw.get("order_group_id") == self.order_group_id)
            and (self.exchange_index is None or order.exchange_index in (None, self.exchange_index))
            and (self.created_after is None or (created is not None and created >= self.created_after))
            and (self.created_before is None or (created is not None and created < self.created_before))
            and (self.min_price is None or (price is not None and price >= self.min_price))
            and (self.max_price is None or (price is not None and price <= self.max_price))
        )


def _sides(raw: Mapping[str, Any]) -> set[str]:
    """An order's side in both vocabularies; old orders tell it by action and side only."""
    outcome, book = raw.get("outcome_side"), raw.get("book_side")
    if book is None and outcome in ("yes", "no"):
        book = "bid" if outcome == "yes" else "ask"
    if book is None and raw.get("action") in ("buy", "sell") and raw.get("side") in ("yes", "no"):
        book = "bid" if (raw["action"] == "buy") == (raw["side"] == "yes") else "ask"
    if outcome is None and book in ("bid", "ask"):
        outcome = "yes" if book == "bid" else "no"
    return {str(outcome), str(book)}


def _price(dollars: object, cents: object) -> Decimal | None:
    try:
        if dollars is not None:
            return Decimal(str(dollars))
        return Decimal(str(cents)) / 100 if cents is not None else None
    except InvalidOperation:
        return None


def _moment(value: object) -> datetime | None:
    try:
        return _parse_moment(value)
    except (ValueError, TypeError, OverflowError, OSError):
        return None


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
    if not is_ticker(value):
        raise ValueError
    return str(value)


def _parse_tickers(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_parse_ticker(value),)
    if not isinstance(value, list | tuple) or not value:
        raise TypeError
    return tuple(dict.fromkeys(_parse_ticker(each) for each in value))


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
_OF_LETTERS = "of letters, digits, '-', '_', '.' or ':'"
_PRICE = "a yes price in dollars, from 0 to 1"
_PARSERS: dict[str, tuple[Any, str]] = {
    "everything": (_parse_flag, "true or false"),
    "order_ids": (_parse_order_ids, "a list of order ids"),
    "subaccount": (_parse_number, "a subaccount number from 0"),
    "tickers": (_parse_tickers, f"a market ticker {_OF_LETTERS}, or a list of them"),
    "event_tickers": (_parse_tickers, f"an event ticker {_OF_LETTERS}, or a list of them"),
    "series": (_parse_ticker, f"a series ticker {_OF_LETTERS}"),
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
