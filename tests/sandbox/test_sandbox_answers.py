"""What the sandbox answers has the fields and types of the exchange's OpenAPI document.

The fixture `every_answer_is_as_documented` holds all answers in this folder's tests against the table in
`conformance/answers.py`; `make conformance` checks that table against the document.
"""

from __future__ import annotations

import pytest
from signed import pem_of

from conformance.answers import ANSWERS, differences
from kalshi_cancel.sandbox.routes import PREFIX, ROUTES

V2, V1, GROUPS = "/portfolio/events/orders", "/portfolio/orders", "/portfolio/order_groups"
RETIRED = {f"DELETE {V1}/batched", f"DELETE {V1}/:order_id", f"POST {V1}", f"POST {V1}/batched"}


@pytest.fixture
def ask(control, client):
    """Calls an endpoint, where each order and group that a path may name is."""
    place = {"ticker": "KXTEST-26NOV22-A", "side": "bid", "count": "10.00", "price": "0.4500"}
    place |= {"time_in_force": "good_till_canceled", "self_trade_prevention_type": "taker_at_cross"}
    control.place("o", count="10.00", filled="1.00", exchange_index=0, order_group_id="g")
    control.place("twin", exchange_index=2, expiration_time="2030-01-01T00:00:00Z")
    control.fill("twin", "2.5")
    control.place("old", ago_s=10**7)
    control.cancel_elsewhere("old", ago_s=10**7)
    control.register_key("confined", pem_of(client.key), scope="trade", subaccount=2)
    control.configure(resume_time="2026-11-22T10:00:00Z", trading_paused=[1])
    bodies = {
        f"POST {V2}": place,
        f"POST {V2}/batched": {"orders": [place, {**place, "count": "0"}]},
        f"DELETE {V2}/batched": {"orders": [{"order_id": "o"}, {"order_id": "unknown"}]},
        f"POST {V2}/:order_id/amend": {**place, "count": "8.00"},
        f"POST {V2}/:order_id/decrease": {"reduce_by": "2.00"},
        f"POST {GROUPS}/create": {"contracts_limit_fp": "5.00"},
        f"PUT {GROUPS}/:group_id/limit": {"contracts_limit_fp": "5.00"},
    }

    def call(endpoint, key_id="key-rsa"):
        client.key_id = key_id
        method, path = endpoint.replace(":order_id", "o").replace(":group_id", "g").split(" ")
        return client.ask(method, path, body=bodies.get(endpoint))

    return call


def test_the_table_has_every_endpoint_of_the_sandbox():
    served = {f"{route.method} {route.path.removeprefix(PREFIX)}" for route in ROUTES}
    assert set(ANSWERS) == served - RETIRED


@pytest.mark.parametrize("endpoint", ANSWERS)
def test_each_endpoint_answers_in_the_documented_form(ask, every_answer_is_as_documented, endpoint):
    assert ask(endpoint).status == ANSWERS[endpoint][0]
    assert [each.endpoint for each in every_answer_is_as_documented if each.odd is None] == [endpoint]


@pytest.mark.parametrize("endpoint", [each for each in ANSWERS if each.startswith("GET")])
def test_a_key_confined_to_one_subaccount_is_answered_in_the_documented_form(ask, endpoint):
    assert ask(endpoint, "confined").status in {200, 404}


@pytest.mark.parametrize(
    ("key_id", "endpoint", "status"),
    [
        ("nobody", f"GET {V1}", 401),
        ("confined", f"GET {V1}/:order_id", 404),
        ("confined", f"DELETE {V2}/:order_id", 404),
        ("key-rsa", f"POST {V1}", 410),
        ("key-rsa", f"DELETE {V1}/:order_id", 410),
    ],
)
def test_what_is_refused_is_answered_with_an_error(ask, key_id, endpoint, status):
    assert ask(endpoint, key_id).status == status


def test_an_amendment_that_changes_no_size_has_null_for_its_counts(ask, control, client):
    body = {"count": control.order("o")["initial_count_fp"], "price": "0.4600"}
    answer = client.ask("POST", f"{V2}/o/amend", body=body)
    assert (answer.json["fill_count"], answer.json["remaining_count"]) == (None, None)


def test_the_balance_is_the_sum_of_its_shards_and_a_confined_key_sees_no_shards(ask, client):
    endpoint = "GET /portfolio/balance"
    balance = ask(endpoint).json
    assert balance["balance_dollars"] == "10000.0000"
    assert [each["exchange_index"] for each in balance["balance_breakdown"]] == [0, 1, 2, 3]
    assert sum(float(each["balance"]) for each in balance["balance_breakdown"]) == 10_000
    shards = [client.get("/portfolio/balance", f"exchange_index={shard}").json["balance"] for shard in (0, 1)]
    assert shards == [balance["balance"], 0]
    assert "balance_breakdown" not in ask(endpoint, "confined").json


def test_fills_are_of_the_shard_and_subaccount_asked_for(control, client):
    control.place("a", exchange_index=2, subaccount=3)
    control.place("b")
    control.fill("a", "1.00")
    control.fill("b", "1.00")

    def filled(query):
        return [each["order_id"] for each in client.get("/portfolio/fills", query).json["fills"]]

    assert filled("") == ["b", "a"]
    assert filled("exchange_index=2") == filled("subaccount=3") == ["a"]
    assert filled("exchange_index=0&subaccount=0") == ["b"]


def test_the_queue_is_by_age_at_one_price_and_ends_with_the_order(control, client):
    for order_id, fields in {
        "first": {},
        "dearer": {"price": "0.51"},
        "asked": {"side": "ask"},
        "elsewhere": {"ticker": "KXTEST-26NOV22-B"},
        "theirs": {"subaccount": 1},
        "last": {},
    }.items():
        control.place(order_id, count="10.00", **fields)
    control.fill("first", "2.50")

    def queue(query=""):
        answer = client.get(f"{V1}/queue_positions", query).json["queue_positions"]
        return {each["order_id"]: each["queue_position_fp"] for each in answer}

    at_once = {"first": "0.00", "dearer": "0.00", "asked": "0.00", "elsewhere": "0.00"}
    assert queue() == {**at_once, "last": "17.50"}
    assert queue("subaccount=1") == {"theirs": "7.50"}
    assert queue("market_tickers=KXTEST-26NOV22-B,KXOTHER-1") == {"elsewhere": "0.00"}
    assert queue("event_ticker=KXOTHER") == {}
    assert client.get(f"{V1}/last/queue_position").json == {"queue_position_fp": "17.50"}
    client.cancel("first")
    assert client.get(f"{V1}/last/queue_position").json == {"queue_position_fp": "10.00"}
    assert client.get(f"{V1}/first/queue_position").status == 404


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"order_id": "o", "reduced_by": "1.00"}, ["body.ts_ms is missing"]),
        ({"order_id": "o", "reduced_by": "1.00", "ts_ms": 1, "by": "me"}, ["body.by is unknown"]),
        ({"order_id": "o", "reduced_by": "1", "ts_ms": 1}, ["body.reduced_by: '1' is not count"]),
        ({"order_id": "o", "reduced_by": 1, "ts_ms": 1}, ["body.reduced_by: 1 is not count"]),
        ({"order_id": None, "reduced_by": "1.00", "ts_ms": 1}, ["body.order_id: None is not text"]),
        ({"order_id": "o", "reduced_by": "1.00", "ts_ms": True}, ["body.ts_ms: True is not integer"]),
        ({"order_id": "o", "reduced_by": "1.00", "ts_ms": 1}, []),
        ([], ["body: [] is no object"]),
    ],
    ids=str,
)
def test_a_departure_is_named(body, said):
    assert differences(ANSWERS[f"DELETE {V2}/:order_id"][1], body) == said


def test_departures_inside_lists_and_alternatives_are_named():
    form = ANSWERS["GET /portfolio/orders"][1]
    order = {name.removesuffix("?"): None for name in form["orders"][0]}
    said = differences(form, {"orders": [order], "cursor": ""})
    assert "body.orders[0].status: None is not" in " ".join(said)
    assert "expiration_time" not in " ".join(said)
    assert differences(form, {"orders": None, "cursor": ""}) == ["body.orders: None is no list"]
