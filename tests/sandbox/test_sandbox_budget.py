"""Token buckets: what calls cost, which bucket pays, and what a 429 looks like."""

from __future__ import annotations

import pytest

from kalshi_cancel.sandbox.buckets import TIERS, Budget, TokenBucket
from kalshi_cancel.sandbox.control import ControlError
from trials.stack import wait_until

# Nothing refills: levels are exact.
FROZEN = {"read": [0, 100], "write": [0, 100]}


def level(control, bucket):
    return control.buckets()[bucket]["level"]


def test_a_bucket_refills_continuously_up_to_its_capacity():
    bucket = TokenBucket(10, 20, at_s=100.0)
    assert bucket.take(20, 100.0)
    assert not bucket.take(1, 100.05)
    assert bucket.take(1, 100.125)
    assert bucket.level(1000.0) == 20
    bucket.drain(5, 1000.0)
    assert bucket.level(1000.0) == 15
    assert bucket.level(999.0) == 15


@pytest.mark.parametrize("tier", TIERS)
def test_writes_are_saved_up_for_two_seconds_above_basic_and_one_on_basic(tier):
    rates = Budget(tier).limits()
    seconds = 1 if tier == "basic" else 2

    assert rates["write"]["bucket_capacity"] == rates["write"]["refill_rate"] * seconds
    assert rates["write"]["refill_rate"] == TIERS[tier].write
    assert rates["read"]["refill_rate"] == TIERS[tier].read


def test_calls_cost_what_the_costs_endpoint_says(control, client):
    control.configure(buckets=FROZEN)
    costs = client.get("/account/endpoint_costs").json
    assert costs["default_cost"] == 10
    assert {(each["method"], each["path"]): each["cost"] for each in costs["endpoint_costs"]} == {
        ("DELETE", "/trade-api/v2/portfolio/events/orders/:order_id"): 2,
        ("DELETE", "/trade-api/v2/portfolio/events/orders/batched"): 2,
        ("DELETE", "/trade-api/v2/portfolio/events/orders"): 2,
        ("GET", "/trade-api/v2/portfolio/orders/:order_id"): 2,
    }
    spent = []
    for ask in (
        lambda: client.cancel("a"),
        lambda: client.batch("a", "b", "c"),
        lambda: client.ask("DELETE", "/portfolio/events/orders"),
        client.create,
        lambda: client.get("/portfolio/orders/a"),
        lambda: client.get("/portfolio/orders"),
        lambda: client.get("/exchange/status"),
    ):
        before = level(control, "read"), level(control, "write")
        ask()
        spent.append((before[0] - level(control, "read"), before[1] - level(control, "write")))
    assert spent == [(0, 2), (0, 6), (0, 2), (0, 10), (2, 0), (10, 0), (0, 0)]
    assert [call["tokens"] for call in control.calls()][1:] == [2, 6, 2, 10, 2, 10, 0]


def test_single_cancels_with_an_explicit_shard_draw_on_that_shards_own_bucket(control, client):
    control.configure(buckets=FROZEN)
    control.place("a", exchange_index=2)

    client.cancel("x", "exchange_index=0")
    client.cancel("x", "exchange_index=-1")
    client.cancel("x", "market_ticker=T")
    client.batch({"order_id": "x", "exchange_index": 2})
    assert level(control, "write") == 92
    client.cancel("a", "exchange_index=2")
    assert (level(control, "write"), level(control, "write:2")) == (92, 98)
    assert control.calls("cancel", "a")[0]["bucket"] == "write:2"


def test_a_429_is_a_bare_string_and_nothing_was_looked_at(control, client):
    control.configure(buckets={"write": [0, 1]})
    control.place("a")

    answer = client.cancel("a")

    assert (answer.status, answer.body) == (429, b'{"error":"too many requests"}')
    assert "Retry-After" not in answer.headers
    call = control.calls("cancel")[0]
    assert (call["tokens"], call["code"], call["effects"]) == (0, "too many requests", [])
    assert level(control, "write") == 1
    assert control.order("a")["status"] == "resting"


def test_a_batch_that_does_not_fit_is_refused_whole(control, client):
    control.configure(buckets={"write": [0, 5]}, max_batch=100)
    control.place_many([{"order_id": name} for name in "abc"])

    assert client.batch("a", "b", "c").status == 429
    assert client.batch("a", "b").status == 200
    assert control.order("c")["status"] == "resting"


def test_a_foreign_client_can_drain_a_bucket_and_time_refills_it(control, client):
    control.configure(tier="basic")
    control.place("a")
    control.drain("write")
    answers = []

    def canceled():
        answers.append(client.cancel("a").status)
        return answers[-1] == 200

    wait_until(canceled)
    assert set(answers[:-1]) <= {429}


def test_a_shards_bucket_can_be_drained_alone(control, client):
    control.configure(buckets=FROZEN)
    control.place("a", exchange_index=2)
    control.drain("write:2", 99)

    assert client.cancel("a", "exchange_index=2").status == 429
    assert client.cancel("a", "exchange_index=-1").status == 200
    with pytest.raises(ControlError, match="bucket"):
        control.drain("wine")


def test_limits_are_those_in_force(control, client):
    control.configure(tier="basic")
    assert client.get("/account/limits").json == {
        "usage_tier": "basic",
        "read": {"refill_rate": 200, "bucket_capacity": 200},
        "write": {"refill_rate": 100, "bucket_capacity": 100},
        "grants": [],
    }
    control.configure(tier="prestige", buckets={"write": [9600, 19200.5]})
    limits = client.get("/account/limits").json
    assert limits["write"] == {"refill_rate": 9600, "bucket_capacity": 19200}


def test_without_a_tier_nothing_is_refused(control, client):
    control.drain("write")

    assert client.batch(*map(str, range(1000))).status == 200
    assert client.batch(*map(str, range(1001))).status == 400


def test_the_old_cancel_cost_more_while_it_lived(control, client):
    for v1, cost in (("alive_int", 4), ("alive_fp", 20), ("retired", 0)):
        control.configure(v1=v1)
        client.ask("DELETE", "/portfolio/orders/a")
        assert control.calls("cancel")[-1]["tokens"] == cost
        costs = client.get("/account/endpoint_costs").json["endpoint_costs"]
        listed = {(each["method"], each["path"]): each["cost"] for each in costs}
        assert listed.get(("DELETE", "/trade-api/v2/portfolio/orders/:order_id"), 0) == cost


def test_cancel_all_may_cost_as_much_as_the_largest_batch(control, client):
    control.configure(tier="basic", cancel_all_cost="max_batch")

    assert client.ask("DELETE", "/portfolio/events/orders").status == 204
    assert control.calls("cancel_all")[0]["tokens"] == 100


def test_nonsense_settings_are_refused_by_name(control):
    for settings, words in (
        ({"tier": "gold"}, "tier"),
        ({"buckets": {"wine": [1, 1]}}, "wine"),
        ({"v1": "undead"}, "v1"),
        ({"no_such": 1}, "no_such"),
        ({"read_lag_s": "long"}, "read_lag_s"),
        ({"tail_s": True}, "tail_s"),
    ):
        with pytest.raises(ControlError, match=words):
            control.configure(**settings)
