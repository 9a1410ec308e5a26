"""The scope of a mass cancel: what it lets through, and what it refuses by name."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import bodies
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_cancel.exchange.protocol import parse_order
from kalshi_cancel.model.fields import BadRequest
from kalshi_cancel.model.scope import Scope
from worker.mass.judging import Judge

ORDER = {
    **bodies.ORDER,
    "order_id": "o-1",
    "ticker": "KXBTC-26NOV22-T100000",
    "order_group_id": "group-1",
}
# For each filter: a value that takes ORDER in, and one that leaves it out.
FILTERS = {
    "order_ids": (["o-0", "o-1"], ["o-0", "o-11"]),
    "subaccount": (3, 0),
    "tickers": (["KXBTC-26NOV22-T1", "KXBTC-26NOV22-T100000"], ["KXBTC-26NOV22"]),
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


def judged(scope, each=None):
    return Judge(Scope.parse(scope))(each or order())


def takes(scope, each=None):
    return judged(scope, each).is_meant


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
    scope = {**everything_fits, name: FILTERS[name][1]}
    assert Judge(Scope.from_json(scope))(order()).is_meant is False


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
def test_of_an_order_that_does_not_tell_its_time_or_price_nobody_can_say_whether_it_is_meant(filters):
    assert takes(filters)
    assert takes(filters, order(created_time=None, yes_price_dollars=None)) is None
    assert takes(filters, order(created_time="yesterday", yes_price_dollars="cheap")) is None


CANNOT_TELL = [
    ({"tickers": ["KXBTC-1", "KXBTC-2"]}, {"ticker": None}, "ticker"),
    ({"series": "KXBTC"}, {"ticker": ""}, "ticker"),
    ({"ticker_prefix": "KXBTC"}, {"ticker": 7}, "ticker"),
    ({"side": "yes"}, {"outcome_side": None, "book_side": None}, "side"),
    ({"side": "bid"}, {"outcome_side": "maybe", "book_side": ["bid"]}, "side"),
    ({"side": "no"}, {"outcome_side": "yes", "book_side": "ask"}, "side"),
    ({"client_order_id_prefix": "mm-"}, {"client_order_id": None}, "client_order_id"),
    ({"client_order_id_prefix": "mm-"}, {"client_order_id": 7}, "client_order_id"),
    ({"order_group_id": "group-1"}, {"order_group_id": 1}, "order_group_id"),
    ({"created_after": 1e9}, {"created_time": None}, "created_time"),
    ({"created_before": 1e9}, {"created_time": "yesterday"}, "created_time"),
    ({"created_before": 4e9}, {"created_time": "2026-11-22T10:00:00"}, "created_time"),
    ({"created_after": "2026-11-22T10:00:00.5Z"}, {"created_time": "2026-11-22T10:00:00Z"}, "created_time"),
    ({"max_price": "0.5"}, {"yes_price_dollars": None}, "price"),
    ({"max_price": "0.5"}, {"yes_price_dollars": "NaN"}, "price"),
    ({"min_price": "0.5"}, {"yes_price_dollars": "sNaN"}, "price"),
    ({"min_price": "0.5"}, {"yes_price_dollars": "Infinity"}, "price"),
    ({"min_price": "0.5"}, {"yes_price_dollars": "50"}, "price"),
    ({"min_price": "0.5"}, {"yes_price_dollars": {"dollars": 1}}, "price"),
]


@pytest.mark.parametrize(("scope", "fields", "field"), CANNOT_TELL)
def test_an_order_that_cannot_be_judged_is_neither_meant_nor_passed_over(scope, fields, field):
    verdict = judged(scope, order(**fields))
    assert (verdict.is_meant, verdict.unclear) == (None, f"no readable {field}")


@pytest.mark.parametrize(("scope", "fields", "_field"), CANNOT_TELL)
def test_another_filter_that_leaves_it_out_decides(scope, fields, _field):
    assert takes({**scope, "exchange_index": 1}, order(**fields)) is False


@pytest.mark.parametrize(("scope", "fields", "_field"), CANNOT_TELL)
def test_an_order_that_is_named_by_its_id_is_meant_when_the_rest_cannot_be_told(scope, fields, _field):
    assert takes({**scope, "order_ids": ["o-1"]}, order(**fields)) is True
    assert takes({**scope, "order_ids": ["o-2"]}, order(**fields)) is False


def test_an_order_without_a_group_is_in_none():
    assert takes({"order_group_id": "group-1"}, order(order_group_id=None)) is False


def test_a_single_ticker_is_the_exchanges_word_for_an_order_that_tells_none():
    assert Scope.parse({"tickers": "KXA-1"}).listings() == [{"ticker": "KXA-1"}], "it was asked for this only"
    assert takes({"tickers": "KXA-1"}, order(ticker=None))


@pytest.mark.parametrize(
    ("scope", "inside", "outside"),
    [
        ({"subaccount": 1}, {"subaccount_number": 1}, {"subaccount_number": 0}),
        ({"subaccount": 1}, {"subaccount_number": 1}, {"subaccount_number": None}),
        ({"subaccount": 0}, {"subaccount_number": None}, {"subaccount_number": 1}),
        ({"exchange_index": 1}, {"exchange_index": 1}, {"exchange_index": None}),
        ({"tickers": "KXA-1-T"}, {"ticker": "KXA-1-T"}, {"ticker": None}),
        ({"event_tickers": ["KXA-1"]}, {"ticker": "KXA-1-T"}, {"ticker": "KXB-1-T"}),
        ({"event_tickers": ["KXA-1"]}, {"ticker": "KXA-1"}, {"ticker": "KXA-12-T"}),
        ({"event_tickers": ["KXA-1", "KXB-1"]}, {"ticker": "KXB-1-T"}, {"ticker": None}),
    ],
)
def test_a_named_order_that_was_read_by_itself_has_to_tell_what_a_listing_would_have_filtered_by(
    scope, inside, outside
):
    judge = Judge(Scope.parse({"order_ids": ["o-1"], **scope}))
    assert judge.alone(order(**inside))
    assert not judge.alone(order(**outside))
    assert not judge.alone(order(order_id="o-2", **inside))


def test_times_of_orders_may_be_numbers():
    assert takes({"created_after": 1_795_000_000}, order(created_time=1_795_341_600_250))
    assert takes({"created_before": 1_795_000_000}, order(created_time=1_795_341_600)) is False


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
        (
            "tickers",
            ["", [], [7], "a\nb", "x" * 201, {}, "A-1,B-1", ["A-1", "B 1"], "A-1-", ["A-1", "A-"], "kxA-1"],
        ),
        ("event_tickers", ["", [], [None], 7, "A,B", "KXBTC-26NOV22-", "kxbtc-26"]),
        ("series", ["", 7, ["A"], "KX%", "KXBTC-", "-", "kxbtc"]),
        ("ticker_prefix", ["", 7, "KX*", "kx"]),
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


def test_a_list_is_refused_with_the_member_that_is_bad():
    assert refused({"order_ids": ["a", "b/c"]}) == {
        "order_ids": "expected a list of order ids, got str 'b/c'"
    }
    assert refused({"tickers": ["KXA-26", 7]})["tickers"].endswith("or a list of them, got int 7")


def test_a_number_of_very_many_digits_is_refused_by_name():
    assert refused({"subaccount": 10**5000}) == {
        "subaccount": "expected a subaccount number from 0, got int with very many digits"
    }


NOW_S = 1_795_341_600.0


@pytest.mark.parametrize(
    ("scope", "field"),
    [
        ({"min_price": "0.9", "max_price": "0.1"}, "max_price"),
        ({"min_price": 1}, "min_price"),
        ({"max_price": "0.00"}, "max_price"),
        ({"created_after": 1.8e9, "created_before": 1.8e9}, "created_before"),
        ({"created_after": "2099-01-01T00:00:00Z"}, "created_after"),
        ({"created_after": NOW_S + 120}, "created_after"),
        ({"everything": True, "min_price": 1, "max_price": 0}, "max_price"),
        ({"tickers": "KXB-26-T1", "series": "KXA"}, "tickers"),
        ({"tickers": ["KXA-26-T1", "KXB-26-T1"], "series": "KXA"}, "tickers"),
        ({"tickers": "KXAB-26-T1", "series": "KXA"}, "tickers"),
        ({"tickers": "KXA-26-T1", "ticker_prefix": "KXA-27"}, "tickers"),
        ({"tickers": "KXA-26-T1", "event_tickers": "KXA-27"}, "event_tickers"),
        ({"tickers": ["KXA-26-T1", "KXB-26-T1"], "event_tickers": "KXA-26"}, "tickers"),
        ({"tickers": "KXA-26-T1", "event_tickers": ["KXA-26", "KXA-27"]}, "event_tickers"),
        ({"event_tickers": "KXB-26", "series": "KXA"}, "event_tickers"),
        ({"event_tickers": ["KXA-26", "KXAB-26"], "series": "KXA"}, "event_tickers"),
        ({"event_tickers": "KXA-26", "ticker_prefix": "KXA-27"}, "event_tickers"),
        ({"series": "KXA", "ticker_prefix": "KXB"}, "ticker_prefix"),
        ({"series": "KXA", "ticker_prefix": "KXAB"}, "ticker_prefix"),
    ],
)
def test_a_scope_in_which_no_order_can_be_is_refused_by_name_or_it_would_be_flat_at_once(scope, field):
    with pytest.raises(BadRequest) as caught:
        Scope.parse(scope, now_s=NOW_S)
    assert caught.value.problems[field].startswith("expected ")
    assert Scope.from_json(scope), "what was accepted once is not judged again"


@pytest.mark.parametrize(
    "scope",
    [
        {"tickers": ["KXA-26-T1", "KXA-27-T1"], "series": "KXA", "event_tickers": ["KXA-26", "KXA-27"]},
        {"tickers": "KXA-26-T1", "ticker_prefix": "KXA-26"},
        {"event_tickers": "KXA-26", "ticker_prefix": "KXA-26-T"},
        {"event_tickers": "KXA-26", "ticker_prefix": "KX"},
        {"event_tickers": "KXA", "series": "KXA"},
        {"series": "KXA", "ticker_prefix": "KXA-2"},
        {"series": "KXA", "ticker_prefix": "KX"},
        {"created_after": NOW_S + 30},
        {"created_before": "2099-01-01T00:00:00Z"},
        {"min_price": "0", "max_price": "1"},
    ],
)
def test_filters_that_have_orders_in_common_are_accepted(scope):
    assert Scope.parse(scope, now_s=NOW_S)


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
    low, high = Decimal(scope.get("min_price", 0)), Decimal(scope.get("max_price", 1))
    times = scope.get("created_after", 0) >= scope.get("created_before", math.inf)
    return low > high or low == 1 or high == 0 or times or names_contradict(scope)


def names_contradict(scope):
    """Of the markets there are: each that is named must be in the rest, and something must be."""
    markets = ["KXA-26-T1", "KXA-26-T2", "KXA-27-T1", "KXAB-26-T1", "KXB-26", "KXA", "KXAB-1"]
    rest = {name: scope[name] for name in ("series", "ticker_prefix") if name in scope}
    shown = [{"ticker": each, "book_side": "bid"} for each in scope.get("tickers", [])]
    if shown:
        return not all(oracle(rest, each) for each in shown)
    return not any(oracle(rest, {"ticker": each, "book_side": "bid"}) for each in markets)


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
            **bodies.ORDER,
            "order_id": each["order_id"],
            "outcome_side": "yes" if each["book_side"] == "bid" else "no",
            "ticker": each["ticker"],
            "book_side": each["book_side"],
            "yes_price_dollars": f"{each['price']:.4f}",
            "no_price_dollars": f"{1 - each['price']:.4f}",
            "created_time": datetime.fromtimestamp(each["created"], UTC).isoformat(),
            "subaccount_number": each["subaccount"],
            "exchange_index": each["shard"],
            "client_order_id": each["client_order_id"],
            **({"order_group_id": each["group"]} if each["group"] else {}),
        }
    )
    assert Judge(Scope.parse(scope))(shown).is_meant == oracle(scope, each)


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
