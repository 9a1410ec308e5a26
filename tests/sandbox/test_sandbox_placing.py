"""Placing and changing orders, and order groups."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from signed import LIMIT_S

from kalshi_cancel.sandbox.control import ControlError

GROUPS = "/portfolio/order_groups"


def change(client, order_id, deed, **body):
    return client.ask("POST", f"/portfolio/events/orders/{order_id}/{deed}", body=body)


def test_a_created_order_rests_and_is_acknowledged_thinly(control, client):
    answer = client.create(client_order_id="mine", count="2.50")

    assert answer.status == 201
    assert set(answer.json) == {"order_id", "client_order_id", "fill_count", "remaining_count", "ts_ms"}
    assert (answer.json["fill_count"], answer.json["remaining_count"]) == ("0.00", "2.50")
    order = control.order(answer.json["order_id"])
    assert (order["status"], order["client_order_id"], order["yes_price_dollars"]) == (
        "resting",
        "mine",
        "0.4500",
    )


def test_the_same_client_order_id_again_is_a_409_and_changes_nothing(control, client):
    client.create(client_order_id="mine")

    answer = client.create(client_order_id="mine", count="5.00")

    assert (answer.status, answer.json["error"]["code"]) == (409, "order_already_exists")
    assert len(control.orders()) == 1


def test_orders_go_to_the_shard_of_their_market_or_the_one_named(control, client):
    control.configure(shards={"KX": 1, "KXBTC": 2})
    for ticker, named, shard in (("KXETH-1-A", {}, 1), ("KXBTC-1-A", {}, 2), ("OTHER-1-A", {}, 0)):
        order = control.order(client.create(ticker=ticker, **named).json["order_id"])
        assert order["exchange_index"] == shard
    order_id = client.create(ticker="KXBTC-1-A", exchange_index=3).json["order_id"]
    assert control.order(order_id)["exchange_index"] == 3
    order_id = client.create(ticker="KXBTC-1-A", exchange_index=-1).json["order_id"]
    assert control.order(order_id)["exchange_index"] == 2
    assert control.place("placed", ticker="KXBTC-1-A")["exchange_index"] == 2


@pytest.mark.parametrize("name", ["immediate_or_cancel", "fill_or_kill"])
def test_an_order_that_cannot_wait_is_canceled_unfilled(control, client, name):
    answer = client.create(time_in_force=name)

    assert (answer.json["fill_count"], answer.json["remaining_count"]) == ("0.00", "0.00")
    assert control.order(answer.json["order_id"])["status"] == "canceled"


@pytest.mark.parametrize(
    "fields",
    [
        {"ticker": None},
        {"time_in_force": None},
        {"self_trade_prevention_type": None},
        {"ticker": 7},
        {"side": "yes"},
        {"side": ["bid"]},
        {"count": "0"},
        {"count": "-1"},
        {"count": "1.005"},
        {"count": "NaN"},
        {"count": "1e400"},
        {"count": True},
        {"count": {}},
        {"price": "1.00"},
        {"price": "0"},
        {"time_in_force": "whenever"},
        {"time_in_force": {}},
        {"subaccount": 64},
        {"subaccount": "one"},
        {"exchange_index": 1.5},
        {"client_order_id": []},
    ],
)
def test_an_order_that_makes_no_sense_is_a_400(control, client, fields):
    assert client.create(**fields).status == 400
    assert control.orders() == []


def test_a_batch_of_new_orders_has_an_outcome_for_each(control, client):
    order = {
        "ticker": "KXTEST-26NOV22-A",
        "side": "ask",
        "count": "1.00",
        "price": "0.9",
        "time_in_force": "good_till_canceled",
        "self_trade_prevention_type": "maker",
    }

    answer = client.ask(
        "POST", "/portfolio/events/orders/batched", body={"orders": [order, {**order, "count": "0"}]}
    )

    assert answer.status == 201
    assert answer.json["orders"][0]["remaining_count"] == "1.00"
    assert answer.json["orders"][1]["error"]["code"] == "invalid_parameters"
    assert len(control.orders()) == 1


def counts(order):
    names = ("initial_count_fp", "fill_count_fp", "remaining_count_fp", "canceled_count_fp")
    return tuple(order[name] for name in names)


def test_an_order_can_be_decreased_by_or_to_a_count(control, client):
    control.place("a", filled="2.00")

    answer = change(client, "a", "decrease", reduce_by="3.00")
    assert set(answer.json) == {"order_id", "client_order_id", "remaining_count", "ts_ms"}
    assert answer.json["remaining_count"] == "5.00"
    assert change(client, "a", "decrease", reduce_to="4.00").json["remaining_count"] == "4.00"
    assert change(client, "a", "decrease", reduce_to="5.00").status == 400
    assert counts(control.order("a")) == ("10.00", "2.00", "4.00", "0.00")
    assert change(client, "a", "decrease", reduce_by="99").json["remaining_count"] == "0.00"
    order = control.order("a")
    assert (order["status"], counts(order)) == ("canceled", ("10.00", "2.00", "0.00", "4.00"))
    assert change(client, "a", "decrease", reduce_by="1").status == 404


@pytest.mark.parametrize("body", [{}, {"reduce_by": "1.00", "reduce_to": "1.00"}, {"reduce_by": "-1"}])
def test_a_decrease_names_one_count(control, client, body):
    control.place("a")

    assert change(client, "a", "decrease", **body).status == 400
    assert counts(control.order("a")) == ("10.00", "0.00", "10.00", "0.00")


def test_an_order_can_be_amended(control, client):
    control.place("a", filled="2.00")

    answer = change(client, "a", "amend", count="12.00", price="0.6")

    assert (answer.json["fill_count"], answer.json["remaining_count"]) == ("0.00", "10.00")
    order = control.order("a")
    assert (counts(order), order["yes_price_dollars"]) == (("10.00", "2.00", "10.00", "0.00"), "0.6000")
    again = change(client, "a", "amend", count="12.00", price="0.7")
    assert (again.status, again.json["fill_count"], again.json["remaining_count"]) == (200, None, None)
    change(client, "a", "amend", count="5.00", price="0.6")
    assert counts(control.order("a")) == ("10.00", "2.00", "3.00", "0.00")


@pytest.mark.parametrize(
    ("deed", "body"),
    [("decrease", {"reduce_by": "1.00"}), ("amend", {"count": "5.00", "price": "0.5"})],
)
def test_the_body_leads_a_change_to_the_orders_shard(control, client, deed, body):
    control.place("a", exchange_index=2)

    assert change(client, "a", deed, **body).status == 404
    assert change(client, "a", deed, **body, exchange_index=2).status == 200
    ticker = {"ticker" if deed == "amend" else "market_ticker": "KXTEST-26NOV22-A"}
    assert change(client, "a", deed, **body, **ticker).status == 200


def test_a_cancel_after_a_decrease_removes_what_was_left(control, client):
    control.place("a")
    control.decrease("a", to="6.00")

    assert client.cancel("a").json["reduced_by"] == "6.00"
    shown = client.get("/portfolio/orders/a").json["order"]
    assert (shown["initial_count_fp"], shown["remaining_count_fp"]) == ("10.00", "0.00")
    events = [(line["event"], line["count"]) for line in control.order("a")["history"]]
    assert events == [("created", "10.00"), ("decreased", "4.00"), ("canceled", "6.00")]


def test_the_control_decreases_and_amends_as_the_owner_would(control):
    control.place("a", filled="1.00")

    assert counts(control.decrease("a", by="2.00")) == ("10.00", "1.00", "7.00", "0.00")
    assert counts(control.amend("a", count="5.00")) == ("10.00", "1.00", "4.00", "0.00")
    amended = control.amend("a", price="0.25")
    assert (counts(amended), amended["yes_price_dollars"]) == (("10.00", "1.00", "4.00", "0.00"), "0.2500")
    assert control.decrease("a", to="0")["status"] == "canceled"
    for wrong in ({}, {"by": "1", "to": "1"}, {"by": "0"}, {"to": "11"}):
        control.place("b" + str(wrong))
        with pytest.raises(ControlError, match=r"needed|nothing"):
            control.decrease("b" + str(wrong), **wrong)


def test_a_canceled_order_can_be_restored(control, client):
    for order_id in "abc":
        control.place(order_id, filled="2.00")
        client.cancel(order_id)

    assert counts(control.restore("b")) == ("10.00", "2.00", "8.00", "0.00")

    control.place("d")
    listed = client.get("/portfolio/orders", "status=resting").json["orders"]
    assert [order["order_id"] for order in listed] == ["d", "b"]
    assert client.cancel("b").json["reduced_by"] == "8.00"
    assert [line["event"] for line in control.order("b")["history"]][-3:] == [
        "canceled",
        "restored",
        "canceled",
    ]
    with pytest.raises(ControlError, match="resting"):
        control.restore("d")


@pytest.mark.parametrize("deed", ["fill", "cancel_elsewhere", "decrease", "amend", "restore"])
def test_what_happens_to_an_order_can_have_happened_some_seconds_ago(control, client, deed):
    old = control.place("a", ago_s=120, status="canceled" if deed == "restore" else "resting")
    fields = {"decrease": {"by": "1.00"}, "amend": {"count": "5.00"}}.get(deed, {})

    changed = getattr(control, deed)("a", ago_s=3, **fields)

    now = datetime.now(UTC)
    created, updated = (
        datetime.fromisoformat(changed[name]) for name in ("created_time", "last_update_time")
    )
    assert 120 <= (now - created).total_seconds() < 120 + LIMIT_S
    assert 3 <= (now - updated).total_seconds() < 3 + LIMIT_S
    assert old["created_time"] == old["last_update_time"] == changed["created_time"]
    assert client.get("/portfolio/orders/a").json["order"]["last_update_time"] == changed["last_update_time"]


@pytest.mark.parametrize(("filled", "status"), [("0.00", "resting"), ("2.00", "executed")])
def test_an_amendment_below_what_is_filled_ends_the_order(control, client, filled, status):
    control.place("a", filled=filled)

    change(client, "a", "amend", count="1.00", price="0.5")

    assert control.order("a")["status"] == status


def test_a_triggered_group_cancels_its_orders_and_lets_none_in_until_it_is_reset(control, client):
    group_id = client.ask("POST", f"{GROUPS}/create", body={"contracts_limit_fp": "100.00"}).json[
        "order_group_id"
    ]
    first = client.create(order_group_id=group_id).json["order_id"]
    other = client.create().json["order_id"]
    assert client.get(f"{GROUPS}/{group_id}").json == {
        "is_auto_cancel_enabled": True,
        "contracts_limit_fp": "100.00",
        "exchange_index": 0,
        "orders": [first],
    }
    assert client.get(GROUPS).json["order_groups"][0]["id"] == group_id

    assert client.ask("PUT", f"{GROUPS}/{group_id}/trigger", body={}).status == 200
    assert control.order(first)["status"] == "canceled"
    assert control.order(other)["status"] == "resting"
    assert client.create(order_group_id=group_id).status == 409
    assert client.get(f"{GROUPS}/{group_id}").json["orders"] == []

    client.ask("PUT", f"{GROUPS}/{group_id}/reset", body={})
    assert client.create(order_group_id=group_id).status == 201


def test_a_deleted_group_takes_its_orders_along(control, client):
    control.place("a", order_group_id="g")

    assert client.ask("DELETE", f"{GROUPS}/g").status == 200
    assert control.order("a")["history"][-1]["by"] == "order_group"
    for method, path in (
        ("GET", f"{GROUPS}/g"),
        ("DELETE", f"{GROUPS}/g"),
        ("PUT", f"{GROUPS}/g/trigger"),
        ("PUT", f"{GROUPS}/g/reset"),
    ):
        assert client.ask(method, path).status == 404


def test_a_group_lives_on_one_shard(control, client):
    control.place("a", order_group_id="g", exchange_index=2)

    assert client.create(order_group_id="g").status == 404
    assert client.create(order_group_id="g", exchange_index=2).status == 201
    control.configure(exchange_paused=[2])
    assert client.ask("PUT", f"{GROUPS}/g/trigger", "exchange_index=2").status == 409


@pytest.mark.parametrize(
    ("home", "address"),
    [
        ({"exchange_index": 2}, "exchange_index=2"),
        ({"subaccount": 2}, "subaccount=2"),
        ({"exchange_index": 1, "subaccount": 3}, "exchange_index=1&subaccount=3"),
    ],
)
@pytest.mark.parametrize(
    ("method", "deed"), [("PUT", "/trigger"), ("PUT", "/reset"), ("PUT", "/limit"), ("DELETE", "")]
)
def test_a_change_to_a_group_needs_its_address(control, client, method, deed, home, address):
    control.place("a", order_group_id="g", **home)
    body = {"contracts_limit": 7}

    for wrong in ("", "exchange_index=3", "subaccount=5"):
        assert client.ask(method, f"{GROUPS}/g{deed}", wrong, body).status == 404
    assert control.order("a")["status"] == "resting"
    assert client.ask(method, f"{GROUPS}/g{deed}", address, body).status == 200


def test_groups_are_read_and_listed_wherever_they_are_or_in_one_subaccount(control, client):
    control.place("a", order_group_id="g", exchange_index=2)
    control.place("b", order_group_id="h", subaccount=2)

    def listed(query=""):
        return [group["id"] for group in client.get(GROUPS, query).json["order_groups"]]

    assert (listed(), listed("subaccount=0"), listed("subaccount=2")) == (["g", "h"], ["g"], ["h"])
    assert client.get(f"{GROUPS}/h").json["orders"] == ["b"]
    assert client.get(f"{GROUPS}/h", "subaccount=2").status == 200
    assert client.get(f"{GROUPS}/h", "subaccount=0").status == 404
    assert client.get(f"{GROUPS}/g").json["exchange_index"] == 2


def test_a_group_takes_only_orders_of_its_subaccount(control, client):
    created = client.ask(
        "POST", f"{GROUPS}/create", body={"contracts_limit": 5, "subaccount": 2, "exchange_index": 1}
    ).json
    group_id = created["order_group_id"]

    assert (created["subaccount"], created["exchange_index"]) == (2, 1)
    assert client.create(order_group_id=group_id, exchange_index=1).status == 404
    assert client.create(order_group_id=group_id, exchange_index=1, subaccount=2).status == 201


def test_a_groups_limit_can_be_changed(control, client):
    control.place("a", order_group_id="g")

    assert client.ask("PUT", f"{GROUPS}/g/limit", body={"contracts_limit_fp": "7"}).status == 200
    assert client.get(f"{GROUPS}/g").json["contracts_limit_fp"] == "7.00"
