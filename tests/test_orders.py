"""What producers send and what they get back: parsing refuses by name, and JSON loses nothing."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_cancel.model.counts import count_text, parse_count
from kalshi_cancel.model.fields import (
    DEADLINE_MAX_S,
    NUMBER_MAX,
    ORDER_ID_MAX_CHARS,
    TEXT_MAX_CHARS,
    BadRequest,
    is_order_id,
)
from kalshi_cancel.model.orders import OrderStatus
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import CancelResult, ConfirmedBy, Outcome, Problem
from kalshi_cancel.model.times import utc_text

ORDER_ID = "0b0d8a5e-7c1f-4f7e-9a77-2f1c7c2f7d11"
NAN, INFINITY = float("nan"), float("inf")
HUGE = 10**400  # no float holds it
ENDLESS = 10**5000  # not even str() takes it


def shown(value):
    return "number" if isinstance(value, int) else ascii(value)[:30]


def problems_of(message):
    with pytest.raises(BadRequest) as caught:
        CancelRequest.parse(message)
    return caught.value.problems


# -- requests that are understood


def test_an_order_id_alone_is_a_request():
    assert CancelRequest.parse({"order_id": ORDER_ID}) == CancelRequest(ORDER_ID)


def test_every_field_of_a_request_arrives():
    message = {
        "order_id": ORDER_ID,
        "market_ticker": "KXBTC-26NOV22-T100.5:A_b",
        "exchange_index": 2,
        "subaccount": 7,
        "requested_by": "market maker 3",
        "reason": "prix trop élevé",
        "deadline_s": 2.5,
        "request_id": "limit-breach_7",
    }
    request = CancelRequest.parse(message)
    assert request == CancelRequest(**message)
    assert request.fields() == message


def test_null_means_the_same_as_an_absent_field():
    message = dict.fromkeys(
        ("market_ticker", "exchange_index", "subaccount", "requested_by", "reason", "deadline_s")
    )
    request = CancelRequest.parse({"order_id": ORDER_ID, **message})
    assert request == CancelRequest(ORDER_ID)
    assert request.fields() == {"order_id": ORDER_ID}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("exchange_index", -1),
        ("exchange_index", 0),
        ("exchange_index", NUMBER_MAX),
        ("subaccount", 0),
        ("subaccount", NUMBER_MAX),
        ("requested_by", ""),
        ("reason", "x" * TEXT_MAX_CHARS),
        ("market_ticker", "x" * 128),
        ("request_id", "x" * ORDER_ID_MAX_CHARS),
        ("deadline_s", 1),
        ("deadline_s", 0.001),
        ("deadline_s", DEADLINE_MAX_S),
    ],
)
def test_a_value_at_the_edge_of_its_range_is_taken(field, value):
    assert getattr(CancelRequest.parse({"order_id": ORDER_ID, field: value}), field) == value


# -- order ids that could change the path


@pytest.mark.parametrize(
    "order_id",
    [
        "a",
        "A-1_z",
        "x" * ORDER_ID_MAX_CHARS,
        ORDER_ID,
        "-",
        "_",
    ],
)
def test_an_order_id_of_plain_letters_stands_in_a_path_as_it_is(order_id):
    assert is_order_id(order_id)
    assert CancelRequest.parse({"order_id": order_id}).order_id == order_id


@pytest.mark.parametrize(
    "order_id",
    [
        "",
        " ",
        ".",
        "..",
        "a/b",
        "/a",
        "a/../b",
        "a\\b",
        "a.b",
        "a?b=1",
        "a#b",
        "a%2Fb",
        "a%",
        "a;b",
        "a:b",
        "a@b",
        "a b",
        " a",
        "a\n",
        "\na",
        "a\r\nX-Evil: 1",
        "a\x00b",
        "a\x7fb",
        "a\u0085",
        "\u0430bc",  # a Cyrillic letter that looks like an a
        "\uff41bc",  # a full-width a
        "abc\u200b",  # a blank of no width
        "\u0661\u0662",  # Arabic digits
        "a\u2215b",  # a stroke that looks like a slash
        "é",
        "\U0001d41a",
        "\ud800",
        "x" * (ORDER_ID_MAX_CHARS + 1),
        "x" * 1_000_000,
        None,
        0,
        1,
        True,
        1.5,
        NAN,
        ENDLESS,
        b"abc",
        ["a"],
        {"a": 1},
        (),
    ],
    ids=shown,
)
def test_an_order_id_that_could_change_the_path_is_refused(order_id):
    assert not is_order_id(order_id)
    problems = problems_of({"order_id": order_id})
    assert list(problems) == ["order_id"]
    assert len(problems["order_id"]) < 250
    assert problems["order_id"].isprintable()


def test_a_missing_order_id_is_named():
    assert problems_of({"reason": "none"}) == {
        "order_id": "expected 1 to 128 letters, digits, '-' or '_', got nothing"
    }


@given(st.text())
def test_whatever_passes_as_an_order_id_is_ascii_and_needs_no_encoding(text):
    if is_order_id(text):
        assert text.isascii()
        assert text.replace("-", "a").replace("_", "a").isalnum()


# -- fields of the wrong kind


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("market_ticker", ""),
        ("market_ticker", "A B"),
        ("market_ticker", "A&subaccount=3"),
        ("market_ticker", "A\n"),
        ("market_ticker", "Ä"),
        ("market_ticker", "x" * 129),
        ("market_ticker", 5),
        ("market_ticker", ["A"]),
        ("exchange_index", -2),
        ("exchange_index", NUMBER_MAX + 1),
        ("exchange_index", HUGE),
        ("exchange_index", ENDLESS),
        ("exchange_index", "1"),
        ("exchange_index", 1.0),
        ("exchange_index", True),
        ("exchange_index", False),
        ("exchange_index", NAN),
        ("subaccount", -1),
        ("subaccount", NUMBER_MAX + 1),
        ("subaccount", "0"),
        ("subaccount", 0.0),
        ("subaccount", True),
        ("subaccount", -ENDLESS),
        ("requested_by", 1),
        ("requested_by", ["me"]),
        ("requested_by", "two\nlines"),
        ("requested_by", "\x1b[31mred"),
        ("requested_by", "\ud800"),
        ("requested_by", "x" * (TEXT_MAX_CHARS + 1)),
        ("reason", {"why": "risk"}),
        ("reason", "a\x00b"),
        ("reason", "\u202egnp.exe"),  # turns the direction of what is printed after it
        ("reason", "\udfff"),
        ("request_id", ""),
        ("request_id", "a b"),
        ("request_id", 7),
        ("deadline_s", 0),
        ("deadline_s", -1),
        ("deadline_s", -0.0),
        ("deadline_s", NAN),
        ("deadline_s", INFINITY),
        ("deadline_s", -INFINITY),
        ("deadline_s", True),
        ("deadline_s", "5"),
        ("deadline_s", [5]),
        ("deadline_s", DEADLINE_MAX_S + 0.1),
        ("deadline_s", HUGE),
        ("deadline_s", ENDLESS),
        ("deadline_s", Decimal(5)),
    ],
    ids=shown,
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_field(field, value):
    problems = problems_of({"order_id": ORDER_ID, field: value})
    assert list(problems) == [field]
    assert problems[field].startswith("expected ")
    assert len(problems[field]) < 250
    assert problems[field].isprintable()


@pytest.mark.parametrize("message", [None, "abc", 5, ["order_id"], [{"order_id": ORDER_ID}], b"{}", True])
def test_a_message_that_is_no_object_is_refused(message):
    problems = problems_of(message)
    assert list(problems) == ["message"]
    assert "expected an object" in problems["message"]


def test_all_problems_of_a_message_are_reported_at_once():
    problems = problems_of({"order_id": "a/b", "subaccount": "x", "deadline_s": -1, "orderid": 1, "force": 1})
    assert set(problems) == {"order_id", "subaccount", "deadline_s", "'orderid'", "'force'"}


def test_the_error_of_a_bad_request_names_each_field_in_one_line():
    with pytest.raises(BadRequest) as caught:
        CancelRequest.parse({"order_id": "a\nb", "Subaccount": 3})
    assert "order_id: expected" in str(caught.value)
    assert "'Subaccount': unknown field" in str(caught.value)
    assert str(caught.value).isprintable()


def test_an_unknown_field_is_refused_with_the_list_of_known_ones():
    problems = problems_of({"order_id": ORDER_ID, "ticker": "A"})
    assert problems["'ticker'"] == (
        "unknown field; known are deadline_s, exchange_index, market_ticker, order_id, reason,"
        " request_id, requested_by, subaccount, traceparent"
    )


@pytest.mark.parametrize(
    "name", [5, None, b"order_id", "\ud800", "x" * 10_000, "a\nb", ENDLESS, ("a",)], ids=shown
)
def test_a_field_name_of_any_kind_is_refused_in_printable_words(name):
    problems = problems_of({"order_id": ORDER_ID, name: 1})
    [shown] = problems
    assert shown.isprintable()
    assert len(shown) <= 60


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([HUGE, -HUGE])
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)
names = st.sampled_from(list(CancelRequest.__slots__)) | st.text(max_size=6)


@given(st.dictionaries(names, anything) | anything)
def test_parsing_anything_gives_a_request_or_a_bad_request(message):
    try:
        request = CancelRequest.parse(message)
    except BadRequest as error:
        problems, words = error.problems, str(error)
    else:
        assert CancelRequest.parse(json.loads(json.dumps(request.fields()))) == request
        return
    assert problems
    assert words.isprintable()


# -- lanes


def test_each_lane_has_its_own_queue_and_risk_comes_first():
    assert [(lane, lane.queue) for lane in Lane] == [(Lane.RISK, "risk"), (Lane.STRATEGY, "cancels")]


@pytest.mark.parametrize(
    ("queue", "lane"),
    [
        ("risk", Lane.RISK),
        ("cancels", Lane.STRATEGY),
        ("celery", Lane.STRATEGY),
        ("RISK", Lane.STRATEGY),
        (None, Lane.STRATEGY),
        (5, Lane.STRATEGY),
        ([], Lane.STRATEGY),
    ],
)
def test_what_did_not_come_through_the_risk_queue_is_a_strategys(queue, lane):
    assert Lane.of_queue(queue) is lane


# -- outcomes and their JSON


def test_only_terminal_orders_make_an_outcome_final():
    assert {outcome for outcome in Outcome if outcome.final} == {Outcome.CANCELED, Outcome.TOO_LATE}
    assert {status for status in OrderStatus if status.terminal} == {
        OrderStatus.CANCELED,
        OrderStatus.EXECUTED,
        OrderStatus.EXPIRED,
        OrderStatus.REJECTED,
    }


FULL = CancelResult(
    order_id=ORDER_ID,
    outcome=Outcome.CANCELED,
    status=OrderStatus.CANCELED,
    reduced_by=Decimal("7.50"),
    fill_count=Decimal(2),
    remaining_count=Decimal(0),
    confirmed_by=ConfirmedBy.READ_BACK,
    attempts=3,
    requested_at="2026-11-22T13:00:00.000Z",
    settled_at="2026-11-22T13:00:01.250Z",
    exchange_ts_ms=1_795_352_401_250,
    requested_by=("risk", "maker"),
    requested_by_left_out=7,
    error=Problem("http_503", "down", 503),
    order={"order_id": ORDER_ID, "status": "canceled"},
)


def test_a_result_has_exactly_the_public_fields():
    assert FULL.to_json() == {
        "order_id": ORDER_ID,
        "outcome": "canceled",
        "status": "canceled",
        "reduced_by": "7.50",
        "fill_count": "2.00",
        "remaining_count": "0.00",
        "confirmed_by": "read_back",
        "attempts": 3,
        "requested_at": "2026-11-22T13:00:00.000Z",
        "settled_at": "2026-11-22T13:00:01.250Z",
        "exchange_ts_ms": 1_795_352_401_250,
        "requested_by": ["risk", "maker"],
        "requested_by_left_out": 7,
        "error": {"code": "http_503", "message": "down", "http_status": 503},
        "order": {"order_id": ORDER_ID, "status": "canceled"},
    }


def test_what_is_not_known_is_null_and_never_left_out():
    value = CancelResult(ORDER_ID, Outcome.UNRESOLVED).to_json()
    assert set(value) == set(FULL.to_json())
    assert {name for name, each in value.items() if each is None} == set(value) - {
        "order_id",
        "outcome",
        "attempts",
        "requested_by",
        "requested_by_left_out",
    }


counts = st.none() | st.decimals(0, 10**15, places=2)
texts = st.none() | st.text(max_size=20)
results = st.builds(
    CancelResult,
    order_id=texts,
    outcome=st.sampled_from(Outcome),
    status=st.none() | st.sampled_from(OrderStatus),
    reduced_by=counts,
    fill_count=counts,
    remaining_count=counts,
    confirmed_by=st.none() | st.sampled_from(ConfirmedBy),
    attempts=st.integers(0, 1000),
    requested_at=texts,
    settled_at=texts,
    exchange_ts_ms=st.none() | st.integers(0, 10**15),
    requested_by=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    requested_by_left_out=st.integers(0, 1000),
    error=st.none()
    | st.builds(
        Problem, code=st.text(max_size=9), message=st.text(max_size=9), http_status=st.none() | st.integers()
    ),
    order=st.none() | st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5)),
)


@given(results)
def test_a_result_survives_its_json(result):
    assert CancelResult.from_json(json.loads(json.dumps(result.to_json()))) == result


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"order_id": ORDER_ID},
        {"outcome": "canceled"},
        {"order_id": ORDER_ID, "outcome": "cancelled"},
        {"order_id": ORDER_ID, "outcome": None},
        {"order_id": ORDER_ID, "outcome": "canceled", "status": "gone"},
        {"order_id": ORDER_ID, "outcome": "canceled", "confirmed_by": "hearsay"},
    ],
)
def test_json_that_no_result_wrote_is_an_error(value):
    with pytest.raises((KeyError, ValueError)):
        CancelResult.from_json(value)


# -- counts


def test_counts_that_are_equal_have_the_same_text_whichever_came_first():
    assert count_text(Decimal("0.00700")) == count_text(Decimal("0.007")) == "0.007"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, None),
        (Decimal(0), "0.00"),
        (Decimal(123), "123.00"),
        (Decimal("0.01"), "0.01"),
        (Decimal("1.5"), "1.50"),
        (Decimal("10.0000"), "10.00"),
        (Decimal("0.001"), "0.001"),
        (Decimal("1E+3"), "1000.00"),
        (Decimal("1E-6"), "0.000001"),
        (Decimal("999999999999999.99"), "999999999999999.99"),
    ],
)
def test_a_count_has_two_places_unless_rounding_would_change_it(count, text):
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (0, Decimal(0)),
        (123, Decimal(123)),
        ("123", Decimal(123)),
        ("1.00", Decimal(1)),
        ("0.01", Decimal("0.01")),
        ("999999999999999.999999", Decimal("999999999999999.999999")),
    ],
)
def test_a_count_is_read_from_an_integer_or_a_decimal_string(value, count):
    assert parse_count(value) == count


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        " ",
        " 1",
        "1 ",
        "1\n",
        "-1",
        "+1",
        -1,
        -(10**400),
        10**16,
        2**64,
        10**400,
        ENDLESS,
        "1e3",
        "1E3",
        "NaN",
        "sNaN",
        "Infinity",
        "1_000",
        "1,000",
        "0x1",
        ".5",
        "5.",
        "1.2.3",
        "\u0661",  # a digit in Arabic
        "\uff11",  # a digit in full width
        "1" * 16,
        "0." + "1" * 7,
        NAN,
        INFINITY,
        -1.0,
        1e-7,
        1e300,
        0.1 + 0.2,
        True,
        False,
        b"1",
        [1],
        {"count": 1},
        Decimal(1),
    ],
    ids=shown,
)
def test_anything_else_is_no_count(value):
    assert parse_count(value) is None


@given(st.decimals(0, 999_999_999_999_999, places=2))
def test_a_count_written_is_the_count_read(count):
    text = count_text(count)
    assert parse_count(text) == count
    assert text.isascii()


# -- moments


@pytest.mark.parametrize(
    ("epoch_s", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1_795_352_401.25, "2026-11-22T13:00:01.250Z"),
        (1_795_352_401.9999, "2026-11-22T13:00:01.999Z"),
    ],
)
def test_a_moment_is_written_in_utc_with_milliseconds(epoch_s, text):
    assert utc_text(epoch_s) == text
