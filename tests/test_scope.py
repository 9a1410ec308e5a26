"""The scope of a mass cancel: what it lets through, and what it refuses by name."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.dialects import parse_order
from worker.orders import BadRequest
from worker.scope import Scope

ORDER = {
    "order_id": "o-1",
    "client_order_id": "mm-btc-7",
    "ticker": "KXBTC-26NOV22-T100000",
    "status": "resting",
    "outcome_side": "yes",
    "book_side": "bid",
    "yes_price_dollars": "0.4000",
    "created_time": "2026-11-22T10:00:00.250000Z",
    "order_group_id": "group-1",
    "subaccount_number": 3,
    "exchange_index": 2,
    "remaining_count_fp": "10.00",
}
# For each filter: a value that takes ORDER in, and one that leaves it out.
FILTERS = {
    "order_ids": (["o-0", "o-1"], ["o-0", "o-11"]),
    "subaccount": (3, 0),
    "tickers": (["A", "KXBTC-26NOV22-T100000"], ["KXBTC-26NOV22"]),
    "series": ("KXBTC", "KXBT"),
    "ticker_prefix": ("KXBTC-26", "XBTC"),
    "side": ("yes", "no"),
    "client_order_id_prefix": ("mm-", "btc"),
    "order_group_id": ("group-1", "group"),
    "exchange_index": (2, 1),
    "created_after": ("2026-11-22T10:00:00Z", "2026-11-22T10:00:01Z"),
    "created_before": ("2026-11-22T11:00:02+01:00", "2026-11-22T10:00:00.250Z"),
    "min_price": ("0.39", "0.4001"),
    "max_price": (0.41, "0.39"),
}


def order(**changes):
    """ORDER with these fields; None leaves a field out, as the exchange does."""
    fields = {name: value for name, value in {**ORDER, **changes}.items() if value is not None}
    return parse_order(fields)


def takes(scope, each=None):
    return Scope.parse(scope).includes(each or order())


def refused(scope):
    with pytest.raises(BadRequest) as caught:
        Scope.parse(scope)
    return caught.value.problems


# -- what it lets through


def test_every_filter_there_is_is_tried_here():
    assert {"everything", "event_tickers", *FILTERS} == set(Scope.__dataclass_fields__)


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_alone_takes_what_it_names_and_nothing_else(name):
    inside, outside = FILTERS[name]
    assert takes({name: inside})
    assert not takes({name: outside})


@pytest.mark.parametrize("name", FILTERS)
def test_of_filters_together_every_one_must_hold(name):
    everything_fits = {each: inside for each, (inside, _) in FILTERS.items()}
    assert takes(everything_fits)
    assert not takes({**everything_fits, name: FILTERS[name][1]})


def test_everything_takes_every_order():
    assert takes({"everything": True})
    assert takes({"everything": True}, order(ticker=None, subaccount_number=None, created_time=None))


@pytest.mark.parametrize("number", [0, 1])
def test_of_an_order_that_tells_neither_subaccount_nor_shard_the_exchanges_listing_is_believed(number):
    scope = {"subaccount": number, "exchange_index": number}
    assert Scope.parse(scope).listings() == [scope], "it was asked for these only"
    assert takes(scope, order(subaccount_number=None, exchange_index=None))


@pytest.mark.parametrize("ticker", ["KXBTC-26NOV22-T100000", "KXBTC-26NOV22", "KXSOLO"])
def test_which_event_a_market_belongs_to_is_the_exchanges_word(ticker):
    scope = {"event_tickers": ["KXBTC-26NOV22"]}
    assert Scope.parse(scope).listings() == [{"event_ticker": "KXBTC-26NOV22"}], "it was asked for this only"
    assert takes(scope, order(ticker=ticker))


@pytest.mark.parametrize(
    "filters", [{"created_after": 1e9}, {"created_before": 4e9}, {"min_price": 0}, {"max_price": 1}]
)
def test_an_order_that_does_not_tell_its_time_or_price_is_not_in_a_range_of_them(filters):
    assert takes(filters)
    assert not takes(filters, order(created_time=None, yes_price_dollars=None))
    assert not takes(filters, order(created_time="yesterday", yes_price_dollars="cheap"))


@pytest.mark.parametrize(
    ("fields", "sides"),
    [
        ({"outcome_side": "yes", "book_side": "bid"}, {"yes", "bid"}),
        ({"outcome_side": "no", "book_side": "ask"}, {"no", "ask"}),
        ({"outcome_side": "no", "book_side": None}, {"no", "ask"}),
        ({"outcome_side": None, "book_side": "bid"}, {"yes", "bid"}),
        ({"outcome_side": None, "book_side": None, "action": "buy", "side": "yes"}, {"yes", "bid"}),
        ({"outcome_side": None, "book_side": None, "action": "sell", "side": "yes"}, {"no", "ask"}),
        ({"outcome_side": None, "book_side": None, "action": "buy", "side": "no"}, {"no", "ask"}),
        ({"outcome_side": None, "book_side": None, "action": "sell", "side": "no"}, {"yes", "bid"}),
        ({"outcome_side": None, "book_side": None}, set()),
    ],
)
def test_an_orders_side_is_known_in_both_vocabularies_and_from_old_fields(fields, sides):
    assert {side for side in ("yes", "no", "bid", "ask") if takes({"side": side}, order(**fields))} == sides


def test_old_prices_in_cents_are_understood():
    old = order(yes_price_dollars=None, yes_price=41)
    assert takes({"min_price": "0.41", "max_price": "0.41"}, old)
    assert not takes({"min_price": "0.42"}, old)


def test_times_are_compared_as_moments_whatever_their_offset():
    at = datetime(2026, 11, 22, 10, 0, 0, 250_000, tzinfo=UTC)
    elsewhere = at.astimezone(timezone(timedelta(hours=-5)))
    assert takes({"created_after": elsewhere.isoformat()})
    assert takes({"created_after": at.timestamp()})
    assert not takes({"created_before": elsewhere.isoformat()}), "before is meant strictly"


# -- what it asks the exchange for, and how it is written down


def test_the_exchange_is_asked_to_filter_what_it_can_filter():
    scope = {"tickers": "A-B", "subaccount": 0, "exchange_index": 2, "series": "A", "side": "yes"}
    assert Scope.parse(scope).listings() == [{"ticker": "A-B", "subaccount": 0, "exchange_index": 2}]
    assert Scope.parse({"event_tickers": ["A", "B"]}).listings() == [{"event_ticker": "A,B"}]
    eleven = Scope.parse({"event_tickers": [f"E{n}" for n in range(11)]}).listings()
    assert [query["event_ticker"].count(",") + 1 for query in eleven] == [10, 1], "ten at most in one"
    assert Scope.parse({"tickers": ["A-B", "A-C"]}).listings() == [{}]
    assert Scope.parse({"everything": True}).listings() == [{}]


@pytest.mark.parametrize("name", FILTERS)
def test_only_ids_alone_are_meant_wherever_they_rest(name):
    alone = Scope.parse({name: FILTERS[name][0]})
    assert alone.names_orders_only == (name == "order_ids")
    if name != "order_ids":
        assert not Scope.parse({"order_ids": ["a"], name: FILTERS[name][0]}).names_orders_only


@pytest.mark.parametrize("name", FILTERS)
def test_a_scope_reads_back_as_it_was_written(name):
    for value in FILTERS[name]:
        scope = Scope.parse({name: value})
        assert Scope.parse(json.loads(json.dumps(scope.to_json()))) == scope
        assert list(scope.to_json()) == [name]


def test_a_name_given_twice_counts_once():
    assert Scope.parse({"tickers": ["A", "B", "A"]}).tickers == ("A", "B")
    assert Scope.parse({"order_ids": ["a", "a"]}).order_ids == ("a",)


# -- what it refuses


@pytest.mark.parametrize("empty", [{}, {"everything": False}, {"subaccount": None, "tickers": None}])
def test_an_empty_scope_is_refused_because_it_may_be_a_mistake(empty):
    assert refused(empty) == {
        "scope": "nothing is named: set a filter, or everything=true for the whole account"
    }


@pytest.mark.parametrize("name", FILTERS)
def test_everything_and_a_filter_contradict_each_other(name):
    assert set(refused({"everything": True, name: FILTERS[name][0]})) == {"everything"}


@pytest.mark.parametrize("message", [None, [], "everything", 7])
def test_what_is_no_object_is_refused(message):
    assert set(refused(message)) == {"scope"}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("everything", ["yes", 1, []]),
        ("order_ids", ["o-1", [], ["a/b"], [1], [""], {"a": 1}]),
        ("subaccount", [-1, "0", 1.0, True, 10**7]),
        ("tickers", ["", [], [7], "a\nb", "x" * 201, {}, "A-1,B-1", ["A-1", "B 1"]]),
        ("event_tickers", ["", [], [None], 7, "A,B"]),
        ("series", ["", 7, ["A"], "KX%"]),
        ("ticker_prefix", ["", 7, "KX*"]),
        ("side", ["buy", "YES", 1, []]),
        ("client_order_id_prefix", ["", 7]),
        ("order_group_id", ["", 7]),
        ("exchange_index", [-1, "1", True]),
        ("created_after", ["now", "2026-11-22T10:00:00", True, [], 1e30, float("nan"), 2026, 20261128]),
        ("created_before", ["", {}, float("inf")]),
        ("min_price", ["cheap", -0.01, "1.01", True, [], "NaN"]),
        ("max_price", ["Infinity", "2", {}]),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_its_fields_name(name, values):
    for value in values:
        problems = refused({name: value})
        assert list(problems) == [name], value
        assert problems[name].startswith("expected "), value


@pytest.mark.parametrize(
    ("scope", "field"),
    [
        ({"min_price": "0.9", "max_price": "0.1"}, "max_price"),
        ({"created_after": 1.8e9, "created_before": 1.8e9}, "created_before"),
        ({"everything": True, "min_price": 1, "max_price": 0}, "max_price"),
    ],
)
def test_bounds_between_which_no_order_can_be_are_refused_or_it_would_be_flat_at_once(scope, field):
    assert refused(scope)[field].startswith("expected ")


def test_every_bad_field_is_named_at_once_and_unknown_ones_too():
    problems = refused({"ticker": "A", "side": "up", "subaccount": "1", "min_price": "0.5"})
    assert set(problems) == {"'ticker'", "side", "subaccount"}
    assert "known are" in problems["'ticker'"]
    assert "tickers" in problems["'ticker'"]


# -- against an oracle that knows nothing of the code

TICKERS = st.sampled_from(["KXA-26-T1", "KXA-26-T2", "KXA-27-T1", "KXAB-26-T1", "KXB-26", "KXA"])
PRICES = st.integers(0, 100).map(lambda cents: Decimal(cents) / 100)
MOMENTS = st.integers(1_790_000_000, 1_790_000_010)


def is_contradictory(scope):
    prices = Decimal(scope.get("min_price", 0)) > Decimal(scope.get("max_price", 1))
    return prices or scope.get("created_after", 0) >= scope.get("created_before", math.inf)


SCOPES = st.fixed_dictionaries(
    {},
    optional={
        "order_ids": st.lists(st.sampled_from("abcd"), min_size=1, max_size=3),
        "subaccount": st.integers(0, 2),
        "tickers": st.lists(TICKERS, min_size=1, max_size=3),
        "series": st.sampled_from(["KXA", "KXAB"]),
        "ticker_prefix": st.sampled_from(["K", "KXA-", "KXA-26", "KXB-26"]),
        "side": st.sampled_from(["yes", "no", "bid", "ask"]),
        "client_order_id_prefix": st.sampled_from(["m", "mm", "mm-1"]),
        "order_group_id": st.sampled_from(["g1", "g2"]),
        "exchange_index": st.integers(0, 2),
        "created_after": MOMENTS,
        "created_before": MOMENTS,
        "min_price": PRICES.map(str),
        "max_price": PRICES.map(str),
    },
).filter(lambda scope: scope and not is_contradictory(scope))
ORDERS = st.fixed_dictionaries(
    {
        "order_id": st.sampled_from("abcd"),
        "ticker": TICKERS,
        "book_side": st.sampled_from(["bid", "ask"]),
        "price": PRICES,
        "created": MOMENTS,
        "subaccount": st.integers(0, 2),
        "shard": st.integers(0, 2),
        "client_order_id": st.sampled_from(["m-1", "mm-1", "mm-2", "other"]),
        "group": st.sampled_from([None, "g1", "g2"]),
    }
)


def oracle(scope, each):
    """The rules once more, in the words of the issue."""
    outcome = "yes" if each["book_side"] == "bid" else "no"
    rules = {
        "order_ids": lambda ids: each["order_id"] in ids,
        "subaccount": lambda number: each["subaccount"] == number,
        "tickers": lambda tickers: each["ticker"] in tickers,
        "series": lambda series: each["ticker"].split("-")[0] == series and "-" in each["ticker"],
        "ticker_prefix": lambda prefix: each["ticker"][: len(prefix)] == prefix,
        "side": lambda side: side in (outcome, each["book_side"]),
        "client_order_id_prefix": lambda prefix: each["client_order_id"][: len(prefix)] == prefix,
        "order_group_id": lambda group: each["group"] == group,
        "exchange_index": lambda shard: each["shard"] == shard,
        "created_after": lambda at: each["created"] >= at,
        "created_before": lambda at: each["created"] < at,
        "min_price": lambda price: each["price"] >= Decimal(price),
        "max_price": lambda price: each["price"] <= Decimal(price),
    }
    return all(rules[name](value) for name, value in scope.items())


@given(scope=SCOPES, each=ORDERS)
def test_what_it_takes_is_what_the_rules_say(scope, each):
    shown = parse_order(
        {
            "order_id": each["order_id"],
            "status": "resting",
            "ticker": each["ticker"],
            "book_side": each["book_side"],
            "yes_price_dollars": f"{each['price']:.4f}",
            "created_time": datetime.fromtimestamp(each["created"], UTC).isoformat(),
            "subaccount_number": each["subaccount"],
            "exchange_index": each["shard"],
            "client_order_id": each["client_order_id"],
            **({"order_group_id": each["group"]} if each["group"] else {}),
        }
    )
    assert Scope.parse(scope).includes(shown) == oracle(scope, each)


@given(
    st.dictionaries(
        st.sampled_from(["scope", *Scope.__dataclass_fields__]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
            ),
            max_leaves=5,
        ),
    )
)
def test_whatever_a_message_holds_it_is_a_scope_or_refused_by_name(message):
    try:
        scope, problems = Scope.parse(message), {}
    except BadRequest as bad:
        scope, problems = None, bad.problems
    assert (scope is None) == bool(problems)
    assert scope is None or Scope.parse(scope.to_json()) == scope
