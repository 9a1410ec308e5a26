"""Cancels: single ones in both dialects, routing to shards, batches, cancel-all and its tail."""

from __future__ import annotations

import time

import pytest

from trials.stack import wait_until

NOT_FOUND = b'{"error":{"code":"not_found","message":"not found"}}'
V1 = "/portfolio/orders"
# As the first V1's documentation has them.
V1_FIELDS = (
    "order_id user_id client_order_id ticker side action type status yes_price no_price "
    "yes_price_dollars no_price_dollars fill_count remaining_count initial_count taker_fees "
    "maker_fees taker_fill_cost maker_fill_cost taker_fill_cost_dollars maker_fill_cost_dollars "
    "queue_position taker_fees_dollars maker_fees_dollars expiration_time created_time "
    "last_update_time self_trade_prevention_type order_group_id cancel_order_on_pause"
)


def test_a_cancel_removes_the_rest_and_says_how_much(control, client):
    control.place("a", filled="3.00", client_order_id="mine")
    before_ms = int(time.time() * 1000)

    answer = client.cancel("a")

    assert answer.status == 200
    assert 0 <= answer.json.pop("ts_ms") - before_ms < 20_000
    assert answer.json == {"order_id": "a", "client_order_id": "mine", "reduced_by": "7.00"}
    order = client.get("/portfolio/orders/a").json["order"]
    assert order["status"] == "canceled"
    assert (order["initial_count_fp"], order["fill_count_fp"], order["remaining_count_fp"]) == (
        "10.00",
        "3.00",
        "0.00",
    )
    assert order["last_update_time"] > order["created_time"]
    assert control.order("a")["canceled_count_fp"] == "7.00"


def test_terminal_unknown_and_elsewhere_are_the_same_404_byte_for_byte(control, client):
    control.place("executed", status="executed")
    control.place("canceled", status="canceled", filled="2.00")
    control.place("elsewhere", exchange_index=2)
    control.place("another-subaccount", subaccount=3)

    bodies = {client.cancel(name).body for name in ("executed", "canceled", "elsewhere", "unknown")}
    bodies.add(client.cancel("another-subaccount").body)

    assert bodies == {NOT_FOUND}
    assert control.order("elsewhere")["status"] == "resting"


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 404),
        ("exchange_index=0", 404),
        ("exchange_index=1", 404),
        ("exchange_index=2", 200),
        ("exchange_index=2&market_ticker=KXOTHER-1-A", 200),
        ("exchange_index=-1", 200),
        ("exchange_index=-1&market_ticker=KXBTC-26-T1", 200),
        ("market_ticker=KXBTC-26-T1", 200),
        ("market_ticker=KXOTHER-1-A", 404),
        ("exchange_index=-2", 400),
        ("exchange_index=two", 400),
    ],
)
def test_the_query_decides_on_which_shard_a_cancel_looks(control, client, query, status):
    control.place("a", ticker="KXBTC-26-T1", exchange_index=2)

    assert client.cancel("a", query).status == status
    assert control.order("a")["status"] == ("canceled" if status == 200 else "resting")


def test_a_wrong_market_ticker_can_be_made_harmless(control, client):
    control.configure(wrong_market_ticker="ignored")
    control.place("a", ticker="KXBTC-26-T1", exchange_index=2)

    assert client.cancel("a", "market_ticker=KXOTHER-1-A").status == 200


def test_a_cancel_without_subaccount_is_about_the_primary_one_unless_told_otherwise(control, client):
    control.place("a", subaccount=3)

    assert client.cancel("a").status == 404
    assert client.cancel("a", "subaccount=2").status == 404
    control.configure(omitted_subaccount="any")
    assert client.cancel("a").status == 200


def test_a_cancel_that_names_the_subaccount_finds_the_order(control, client):
    control.place("a", subaccount=3)

    assert client.cancel("a", "subaccount=3").status == 200


def test_order_ids_are_percent_decoded(control, client):
    control.place("a b/c")

    assert client.cancel("a%20b%2Fc").json["order_id"] == "a b/c"


def test_the_retired_v1_is_a_410_that_names_its_successor(client):
    for method, path in (("DELETE", f"{V1}/a"), ("DELETE", f"{V1}/batched"), ("POST", V1)):
        answer = client.ask(method, path, body={"ids": ["a"]})
        assert answer.status == 410
        error = answer.json["error"]
        assert error["code"] == "deprecated_v1_order_endpoint"
        assert error["message"] == "Please switch to the V2 endpoints"
        assert error["details"].startswith("https://docs")


def test_the_first_v1_answers_the_whole_order_in_integers(control, client):
    control.configure(v1="alive_int")
    control.place("a", filled="3.00", price="0.56", exchange_index=2)

    answer = client.ask("DELETE", f"{V1}/a")

    assert answer.status == 200
    assert answer.json["reduced_by"] == 7
    assert sorted(answer.json["order"]) == sorted(V1_FIELDS.split())
    order = answer.json["order"]
    assert (order["status"], order["fill_count"], order["remaining_count"], order["initial_count"]) == (
        "canceled",
        3,
        0,
        10,
    )
    assert (order["yes_price"], order["no_price"], order["yes_price_dollars"]) == (56, 44, "0.5600")
    assert order["queue_position"] == 0


def test_the_later_v1_answers_the_whole_order_in_fixed_point(control, client):
    control.configure(v1="alive_fp")
    control.place("a", count="2.75")

    answer = client.ask("DELETE", f"{V1}/a")

    assert answer.json["reduced_by_fp"] == "2.75"
    assert answer.json["order"]["remaining_count_fp"] == "0.00"
    assert client.ask("DELETE", f"{V1}/a").body == NOT_FOUND


def test_a_v1_batch_takes_ids_and_answers_whole_orders(control, client):
    control.configure(v1="alive_fp")
    control.place("a")

    answer = client.ask("DELETE", f"{V1}/batched", body={"ids": ["a", "unknown"]})

    first, second = answer.json["orders"]
    assert (first["order_id"], first["reduced_by_fp"], first["error"]) == ("a", "10.00", None)
    assert first["order"]["status"] == "canceled"
    assert (second["order_id"], second["order"], second["error"]["code"]) == ("unknown", None, "not_found")


def test_a_batch_gives_each_order_its_own_outcome(control, client):
    control.place("a", filled="4.00")
    control.place("crypto", exchange_index=2)
    control.place("lost", exchange_index=2)
    control.place("third", subaccount=3)

    answer = client.batch(
        "a",
        {"order_id": "crypto", "exchange_index": 2},
        "lost",
        {"order_id": "third", "subaccount": 3},
        "a",
    )

    assert answer.status == 200
    outcomes = [(each["order_id"], each["reduced_by"], "error" in each) for each in answer.json["orders"]]
    assert outcomes == [
        ("a", "6.00", False),
        ("crypto", "10.00", False),
        ("lost", "0.00", True),
        ("third", "10.00", False),
        ("a", "0.00", True),
    ]
    assert answer.json["orders"][2]["error"] == {"code": "not_found", "message": "not found"}
    assert control.order("lost")["status"] == "resting"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"orders":[]}', b'{"orders":["a"]}', b'{"orders":7}'])
def test_a_batch_that_is_no_list_of_orders_is_a_400(client, body):
    answer = client.ask("DELETE", "/portfolio/events/orders/batched", body=body)

    assert answer.status == 400


@pytest.mark.parametrize("status", [400, 413, 429])
def test_an_oversize_batch_is_refused_as_a_whole(control, client, status):
    control.configure(max_batch=2, oversize_status=status)
    control.place_many([{"order_id": name} for name in "abc"])

    assert client.batch("a", "b", "c").status == status
    assert {order["status"] for order in control.orders()} == {"resting"}
    assert client.batch("a", "b").status == 200


def test_the_largest_batch_follows_the_tier(control, client):
    control.configure(tier="basic")

    assert client.batch(*[str(n) for n in range(51)]).status == 400
    assert client.batch(*[str(n) for n in range(50)]).status == 200


def test_cancel_all_takes_every_shard_and_subaccount_and_lists_nothing(control, client):
    control.place("a")
    control.place("b", exchange_index=2)
    control.place("c", subaccount=4)

    answer = client.ask("DELETE", "/portfolio/events/orders")

    assert (answer.status, answer.body) == (204, b"")
    assert {order["status"] for order in control.orders()} == {"canceled"}
    effects = control.calls("cancel_all")[0]["effects"]
    assert sorted(effect["order_id"] for effect in effects) == ["a", "b", "c"]


def test_cancel_all_of_one_subaccount_leaves_the_others(control, client):
    control.place("a")
    control.place("b", subaccount=4)

    assert client.ask("DELETE", "/portfolio/events/orders", "subaccount=4").status == 204
    assert control.order("a")["status"] == "resting"
    assert control.order("b")["status"] == "canceled"


def test_new_orders_of_the_scope_are_canceled_on_arrival_during_the_tail(control, client):
    client.ask("DELETE", "/portfolio/events/orders", "subaccount=4")

    victim = client.create(subaccount=4).json
    spared = client.create(subaccount=5).json

    assert victim["remaining_count"] == "0.00"
    assert control.order(victim["order_id"])["status"] == "canceled"
    assert control.order(victim["order_id"])["history"][-1]["by"] == "tail"
    assert control.order(spared["order_id"])["status"] == "resting"


def test_the_tail_ends(control, client):
    control.configure(tail_s=0.05)
    client.ask("DELETE", "/portfolio/events/orders")

    wait_until(lambda: client.create().json["remaining_count"] == "10.00")


def test_the_tail_may_ignore_the_subaccount(control, client):
    control.configure(tail_honours_subaccount=False)
    client.ask("DELETE", "/portfolio/events/orders", "subaccount=4")

    assert client.create(subaccount=5).json["remaining_count"] == "0.00"


def test_orders_placed_by_the_control_are_spared_by_the_tail(control, client):
    client.ask("DELETE", "/portfolio/events/orders")

    assert control.place("a")["status"] == "resting"


def test_cancel_alls_minute_names_what_it_cancels_besides(control, client):
    control.place("before")
    client.ask("DELETE", "/portfolio/events/orders")
    created = client.create(count="2.00").json["order_id"]
    control.place("later", meets_tail=True)

    [call] = control.calls("cancel_all")

    assert call["effects"] == [{"order_id": "before", "reduced_by": "10.00"}]
    assert call["tail"] == [
        {"order_id": created, "reduced_by": "2.00"},
        {"order_id": "later", "reduced_by": "10.00"},
    ]
    last = control.order("later")["history"][-1]
    assert (last["event"], last["by"], last["call"]) == ("canceled", "tail", call["seq"])
    assert control.calls("create")[0]["tail"] == []


def test_cancel_all_stops_at_its_cap(control, client):
    control.configure(cancel_all_cap=3)
    control.place_many([{} for _ in range(5)])

    client.ask("DELETE", "/portfolio/events/orders")

    assert [order["status"] for order in control.orders()].count("resting") == 2
