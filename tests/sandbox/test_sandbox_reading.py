"""What reads show: fields, filters, pages, lag, pauses and the account."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import pytest
import requests
from signed import LIMIT_S

from kalshi_cancel.sandbox.control import ControlError
from trials.stack import wait_until

ORDERS = "/portfolio/orders"


def ids(answer):
    return [order["order_id"] for order in answer.json["orders"]]


def test_an_order_has_all_its_fields_in_fixed_point(control, client):
    control.place(
        "a",
        ticker="KXBTC-26-T1",
        count="2.75",
        filled="0.25",
        price="0.4",
        side="ask",
        subaccount=3,
        exchange_index=2,
        order_group_id="g",
        expiration_time="2030-01-01T00:00:00Z",
        cancel_order_on_pause=True,
        client_order_id="mine",
    )

    order = client.get(f"{ORDERS}/a").json["order"]

    moment = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
    assert moment.fullmatch(order.pop("created_time"))
    assert moment.fullmatch(order.pop("last_update_time"))
    assert order.pop("user_id")
    assert order == {
        "order_id": "a",
        "client_order_id": "mine",
        "ticker": "KXBTC-26-T1",
        "side": "yes",
        "action": "sell",
        "outcome_side": "no",
        "book_side": "ask",
        "type": "limit",
        "status": "resting",
        "yes_price_dollars": "0.4000",
        "no_price_dollars": "0.6000",
        "fill_count_fp": "0.25",
        "remaining_count_fp": "2.50",
        "initial_count_fp": "2.75",
        "taker_fees_dollars": "0.0000",
        "maker_fees_dollars": "0.0000",
        "taker_fill_cost_dollars": "0.0000",
        "maker_fill_cost_dollars": "0.1500",
        "self_trade_prevention_type": "taker_at_cross",
        "cancel_order_on_pause": True,
        "subaccount_number": 3,
        "exchange_index": 2,
        "order_group_id": "g",
        "expiration_time": "2030-01-01T00:00:00Z",
    }


def test_optionals_without_a_value_are_left_out(control, client):
    control.place("a")

    assert not {"order_group_id", "expiration_time"} & set(client.get(f"{ORDERS}/a").json["order"])


def test_reads_can_speak_the_first_v1(control, client):
    control.configure(order_form="int")
    control.place("a", filled="3")

    assert client.get(f"{ORDERS}/a").json["order"]["remaining_count"] == 7
    assert client.get(ORDERS).json["orders"][0]["fill_count"] == 3


def test_an_unknown_order_is_a_404(client):
    assert client.get(f"{ORDERS}/unknown").status == 404


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", "dcba"),
        ("status=resting", "dca"),
        ("status=executed", "b"),
        ("status=canceled", ""),
        ("ticker=KXBTC-26-T1", "ca"),
        ("ticker=KXBTC-26-T1&status=resting", "ca"),
        ("ticker=KXNONE-26-T1", ""),
        ("event_ticker=KXBTC-26", "dca"),
        ("event_ticker=KXETH-26,KXBTC-26", "dcba"),
        ("subaccount=0", "db"),
        ("subaccount=1", "ca"),
        ("exchange_index=2", "a"),
        ("exchange_index=2&status=resting", "a"),
        ("exchange_index=2&status=executed", ""),
        ("min_ts=4102444800", ""),
        ("max_ts=4102444800", "dcba"),
        ("max_ts=1", ""),
        ("min_ts=1", "dcba"),
        ("limit=2", "dc"),
        ("cursor=garbage", "dcba"),
        ("cursor=%00%FF", "dcba"),
    ],
)
def test_lists_are_newest_first_and_filtered(control, client, query, expected):
    control.place("a", ticker="KXBTC-26-T1", subaccount=1, exchange_index=2)
    control.place("b", ticker="KXETH-26-T1", status="executed")
    control.place("c", ticker="KXBTC-26-T1", subaccount=1)
    control.place("d", ticker="KXBTC-26-T2")

    answer = client.get(ORDERS, query)

    assert answer.status == 200
    assert "".join(ids(answer)) == expected


@pytest.mark.parametrize(
    "query",
    [
        "limit=1001",
        "limit=0",
        "limit=ten",
        "status=asleep",
        "subaccount=x",
        "event_ticker=" + ",".join(f"KX{n}" for n in range(11)),
    ],
)
def test_a_list_that_asks_for_too_much_or_nonsense_is_a_400(client, query):
    answer = client.get(ORDERS, query)

    assert (answer.status, answer.json["error"]["code"]) == (400, "invalid_parameters")


@pytest.mark.parametrize(
    "query", ["status=resting", "status=resting&event_ticker=KXTEST-26NOV22", "min_ts=1"]
)
def test_pages_hold_every_order_once_and_the_last_has_no_cursor(control, client, query):
    control.place_many([{"order_id": f"o{n:03}"} for n in range(25)])
    pages, cursor = [], ""
    while True:
        answer = client.get(ORDERS, f"{query}&limit=10&cursor={cursor}")
        pages.append(ids(answer))
        cursor = answer.json["cursor"]
        if not cursor:
            break

    assert [len(page) for page in pages] == [10, 10, 5]
    assert [order_id for page in pages for order_id in page] == [f"o{n:03}" for n in reversed(range(25))]


def test_orders_canceled_between_pages_do_not_shift_the_pages(control, client):
    control.place_many([{"order_id": f"o{n}"} for n in range(6)])
    first = client.get(ORDERS, "status=resting&limit=3")
    for order_id in ids(first):
        client.cancel(order_id)

    second = client.get(ORDERS, f"status=resting&limit=3&cursor={first.json['cursor']}")

    assert ids(first) + ids(second) == ["o5", "o4", "o3", "o2", "o1", "o0"]
    assert second.json["cursor"] == ""


def test_with_cursors_that_are_offsets_an_order_that_leaves_hides_another(control, client):
    control.configure(cursors="offset")
    control.place_many([{"order_id": str(n)} for n in range(6)])
    first = client.get(ORDERS, "status=resting&limit=2")
    assert ids(first) == ["5", "4"]

    client.cancel("5")
    second = client.get(ORDERS, f"status=resting&limit=2&cursor={first.json['cursor']}")
    third = client.get(ORDERS, f"status=resting&limit=2&cursor={second.json['cursor']}")

    assert (ids(second), ids(third), third.json["cursor"]) == (["2", "1"], ["0"], "")


@pytest.mark.parametrize(
    ("setting", "empty"),
    [
        ("array", {"orders": [], "cursor": ""}),
        ("null", {"orders": None, "cursor": ""}),
        ("absent", {"cursor": ""}),
    ],
)
def test_a_page_without_orders_can_be_written_in_three_ways(control, client, setting, empty):
    control.configure(empty_page=setting)
    control.place("a")

    assert ids(client.get(ORDERS, "status=resting")) == ["a"]
    client.cancel("a")
    assert client.get(ORDERS, "status=resting").json == empty


def test_reads_lag_behind_writes(control, client):
    control.configure(read_lag_s=60)
    control.place("a")
    before = client.get(f"{ORDERS}/a").json["order"]

    client.cancel("a")

    assert client.get(f"{ORDERS}/a").json["order"] == before
    assert ids(client.get(ORDERS, "status=resting")) == ["a"]
    assert ids(client.get(ORDERS, "status=canceled")) == []
    assert control.order("a")["status"] == "canceled"
    assert client.cancel("a").status == 404


def test_reads_catch_up_when_the_lag_is_over(control, client):
    control.configure(read_lag_s=0.05)
    control.place("a")
    client.cancel("a")
    order_id = client.create().json["order_id"]

    wait_until(lambda: client.get(f"{ORDERS}/a").json["order"]["status"] == "canceled")
    wait_until(lambda: client.get(f"{ORDERS}/{order_id}").status == 200)
    assert ids(client.get(ORDERS, "status=resting")) == [order_id]
    assert ids(client.get(ORDERS, "status=canceled")) == ["a"]


def test_a_new_order_is_not_seen_while_reads_lag(control, client):
    control.configure(read_lag_s=60)
    order_id = client.create().json["order_id"]

    assert client.get(f"{ORDERS}/{order_id}").status == 404
    assert ids(client.get(ORDERS)) == ids(client.get(ORDERS, "status=resting")) == []
    assert client.cancel(order_id).status == 200


def test_one_order_can_lag_alone(control, client):
    control.place("slow", read_lag_s=60)
    control.place("prompt")
    client.cancel("slow")
    client.cancel("prompt")

    assert client.get(f"{ORDERS}/slow").json["order"]["status"] == "resting"
    assert client.get(f"{ORDERS}/prompt").json["order"]["status"] == "canceled"


def test_fills_are_partial_then_complete(control, client):
    control.place("a")

    assert control.fill("a", "2.5")["status"] == "resting"
    assert control.fill("a")["status"] == "executed"
    order = client.get(f"{ORDERS}/a").json["order"]
    assert (order["fill_count_fp"], order["remaining_count_fp"]) == ("10.00", "0.00")
    fills = client.get("/portfolio/fills", "order_id=a").json["fills"]
    assert [fill["count_fp"] for fill in fills] == ["7.50", "2.50"]


def test_an_exchange_pause_stops_cancels_and_a_trading_pause_does_not(control, client):
    control.place_many([{"order_id": "a"}, {"order_id": "b"}])
    control.configure(exchange_paused=True, resume_time="2026-11-22T10:00:00Z")
    for answer in (
        client.cancel("a"),
        client.batch("a"),
        client.ask("DELETE", "/portfolio/events/orders"),
        client.create(),
    ):
        assert (answer.status, answer.json["error"]["code"]) == (409, "exchange_is_paused")
    assert client.get(f"{ORDERS}/a").status == 200

    control.configure(exchange_paused=False, trading_paused=True)
    assert client.cancel("a").status == 200
    answer = client.create()
    assert (answer.status, answer.json["error"]["code"]) == (409, "trading_is_paused")

    control.configure(trading_paused=False, exchange_paused=True, pause_status=503)
    assert client.cancel("b").status == 503


def test_a_shard_can_be_paused_alone_and_the_status_says_so(control, client):
    control.place("home")
    control.place("crypto", exchange_index=2)
    control.configure(exchange_paused=[2], trading_paused=[1], resume_time="2026-11-22T10:00:00Z")

    assert client.cancel("crypto", "exchange_index=2").status == 409
    assert client.cancel("crypto", "exchange_index=-1").status == 409
    entries = client.batch("home", {"order_id": "crypto", "exchange_index": 2}).json["orders"]
    assert entries[0]["reduced_by"] == "10.00"
    assert entries[1]["error"]["code"] == "exchange_is_paused"
    status = client.ask("GET", "/exchange/status", headers={}).json
    assert (status["exchange_active"], status["trading_active"]) == (True, True)
    assert status["exchange_estimated_resume_time"] == "2026-11-22T10:00:00Z"
    assert [
        (each["exchange_index"], each["exchange_active"], each["trading_active"])
        for each in status["exchange_index_statuses"]
    ] == [(0, True, True), (1, True, False), (2, False, False), (3, True, True)]
    client.ask("DELETE", "/portfolio/events/orders")
    assert control.order("crypto")["status"] == "resting"


def test_a_pause_cancels_the_orders_that_wished_for_it(control):
    control.place("a", cancel_order_on_pause=True)
    control.place("b")
    control.configure(trading_paused=True)

    assert control.order("a")["history"][-1]["by"] == "pause"
    assert control.order("b")["status"] == "resting"


def test_the_account_is_there_in_outline(client):
    assert client.get("/portfolio/balance").json["balance"] > 0
    assert client.get("/portfolio/positions").json["market_positions"] == []


def test_anything_else_is_a_404_in_the_error_shape(client):
    for method, path in (
        ("GET", "/nowhere"),
        ("PATCH", "/portfolio/orders"),
        ("GET", "/portfolio/orders/a/b"),
    ):
        answer = client.ask(method, path)
        assert (answer.status, answer.json["error"]["code"]) == (404, "not_found")


def test_times_are_on_the_exchanges_clock(control, client):
    control.configure(skew_s=-86400)
    control.place("a")

    ts_ms = client.cancel("a", offset_ms=-86_400_000).json["ts_ms"]

    assert abs(time.time() * 1000 - 86_400_000 - ts_ms) < 20_000


def test_the_engines_clock_can_differ_from_the_fronts(control, client):
    control.configure(front_skew_s=3600, engine_skew_s=-3600)
    control.place("a")

    assert client.cancel("a").json["error"]["code"] == "header_timestamp_expired"
    answer = client.cancel("a", offset_ms=3_600_000)
    shown = client.get(f"{ORDERS}/a", offset_ms=3_600_000).json["order"]

    now = datetime.now(UTC)
    date = parsedate_to_datetime(answer.headers["Date"])
    engine = datetime.fromtimestamp(answer.json["ts_ms"] / 1000, UTC)
    assert abs((date - now).total_seconds() - 3600) < LIMIT_S
    assert abs((now - engine).total_seconds() - 3600) < LIMIT_S
    updated = datetime.fromisoformat(shown["last_update_time"])
    assert 0 <= (updated - engine).total_seconds() < 0.001


@pytest.mark.parametrize("path", [ORDERS, f"{ORDERS}/a"])
def test_the_last_update_can_be_written_in_other_forms(control, client, path):
    control.configure(skew_s=1_700_000_000 - time.time(), timestamp_window_s=1e12)
    control.place("a")

    written = {}
    for form in ("utc", "naive", "offset", "epoch_ms", "epoch_s", "unreadable", "absent"):
        control.configure(last_update_form=form)
        body = client.get(path).json
        written[form] = (body.get("order") or body["orders"][0]).get("last_update_time")

    utc, east = (datetime.fromisoformat(written[form]) for form in ("utc", "offset"))
    assert utc == east == datetime.fromisoformat(written["naive"] + "Z")
    assert written["offset"].endswith("+02:00")
    assert written["epoch_s"] == int(utc.timestamp())
    assert written["epoch_ms"] == int(round(utc.timestamp() * 1e6) // 1000)
    assert (written["unreadable"], written["absent"]) == ("a moment ago", None)
    assert re.fullmatch(r"[0-9T:.-]+", written["naive"])


HISTORY = "/historical/orders"


def test_orders_that_ended_before_the_cutoff_are_in_the_archive_alone(control, client):
    control.configure(archive_after_s=3600)
    control.place("old", status="executed", ago_s=4000)
    control.place("resting", ago_s=4000)
    control.place("lately", ago_s=4000)
    control.cancel_elsewhere("lately", ago_s=3000)

    assert ids(client.get(ORDERS)) == ["lately", "resting"]
    assert client.get(f"{ORDERS}/old").status == 404
    assert client.get(f"{ORDERS}/lately").status == 200
    archived = client.get(HISTORY).json
    assert (archived["cursor"], [order["order_id"] for order in archived["orders"]]) == ("", ["old"])
    assert archived["orders"][0]["status"] == "executed"
    assert client.cancel("old").status == 404
    cutoff = requests.get(f"{client.url}/trade-api/v2/historical/cutoff", timeout=LIMIT_S).json()
    assert len(set(cutoff.values())) == 1
    age_s = (datetime.now(UTC) - datetime.fromisoformat(cutoff["orders_updated_ts"])).total_seconds()
    assert 3600 <= age_s < 3600 + LIMIT_S


def test_an_order_can_be_archived_now(control, client):
    control.place("a")
    with pytest.raises(ControlError, match="resting"):
        control.archive("a")
    client.cancel("a")
    assert client.get(f"{ORDERS}/a").status == 200

    control.archive("a")

    assert client.get(f"{ORDERS}/a").status == 404
    assert (ids(client.get(ORDERS)), ids(client.get(HISTORY))) == ([], ["a"])


@pytest.mark.parametrize(
    ("query", "expected"),
    [("", "dcba"), ("ticker=KX-1-A", "ca"), ("subaccount=1", "b"), ("max_ts=1", ""), ("limit=1000", "dcba")],
)
def test_the_archive_is_filtered_and_comes_in_pages(control, client, query, expected):
    for order_id, ticker, subaccount in (("a", "1", 0), ("b", "2", 1), ("c", "1", 0), ("d", "2", 0)):
        control.place(order_id, ticker=f"KX-{ticker}-A", subaccount=subaccount, status="canceled")
        control.archive(order_id)

    assert "".join(ids(client.get(HISTORY, query))) == expected
    found, cursor = [], ""
    while True:
        page = client.get(HISTORY, f"{query}&cursor={cursor}&limit=1".lstrip("&"))
        found += ids(page)
        if not (cursor := page.json["cursor"]):
            break
    assert "".join(found) == expected
    assert client.get(HISTORY, "limit=1001").status == 400
