"""Batch cancels through real workers: when they are chosen, and what becomes of each order in one."""

from __future__ import annotations

import json
import time
from collections import Counter
from decimal import Decimal

import pytest
from crew import PATIENCE_S, SENDERS, SETTLED_PATIENCE_S, ids

from kalshi_cancel.model.requests import Lane
from trials.stack import wait_until
from worker.dispatch.batch_size import BatchSize

BATCH_MOST = 100


@pytest.fixture(scope="module")
def crew_environment():
    return {"KALSHI_BATCH_MOST": str(BATCH_MOST)}


@pytest.fixture
def crew(crew):
    crew.workers(1)
    return crew


def together(crew, orders, **how):
    """Cancels orders that all wait when the worker looks; their results by order id."""
    with crew.frozen(*crew.alive()):
        pending = crew.client.cancel_many(orders, **how)
    return {result.order_id: result for result in pending.results(timeout=PATIENCE_S)}


def batches(crew):
    return crew.control.calls("batch")


def singles(crew):
    return crew.control.calls("cancel")


def truth(crew):
    return {order["order_id"]: order for order in crew.control.orders()}


def tells_the_truth(results, crew):
    """Every result agrees with what the exchange knows of its order."""
    sent = crew.sent()
    for order_id, order in truth(crew).items():
        result = results[order_id]
        assert result.outcome == ("canceled" if order["status"] == "canceled" else "too_late")
        assert result.status == order["status"]
        if result.outcome == "canceled":
            if result.reduced_by is None:  # nothing has proven it
                assert result.confirmed_by == "read_back"
            else:
                assert result.reduced_by == Decimal(order["canceled_count_fp"])
            assert result.attempts == sent[order_id]
    assert set(crew.effective().values()) <= {1}


# -- which path


def test_a_lone_request_is_one_single_call(crew):
    [order_id] = crew.place()
    assert crew.client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "canceled"
    assert [call["operation"] for call in crew.cancels()] == ["cancel"]


def test_what_waits_together_goes_out_in_one_call(crew):
    order_ids = crew.place(50)
    results = together(crew, order_ids)
    [call] = crew.cancels()
    assert (call["operation"], call["bucket"], call["tokens"]) == ("batch", "write", 100)
    assert sorted(call["order_ids"]) == sorted(order_ids)
    assert {result.attempts for result in results.values()} == {1}
    tells_the_truth(results, crew)


def test_a_flood_takes_few_calls_of_at_most_the_allowed_size(crew):
    order_ids = crew.place(950)
    results = together(crew, order_ids)
    assert max(len(call["order_ids"]) for call in crew.cancels()) == BATCH_MOST
    assert len(crew.cancels()) <= 2 * 950 / BATCH_MOST
    assert crew.sent() == Counter(order_ids)
    tells_the_truth(results, crew)


def test_risk_and_strategy_orders_never_share_a_call_and_risk_goes_first(crew):
    [slow], calm, urgent = crew.place(1), crew.place(10), crew.place(10)
    crew.control.fault("slow", order_id=slow, operation="cancel", seconds=0.5, times=1)
    with crew.apart("-c", "1", KALSHI_BATCH_MOST=str(BATCH_MOST)) as apart:
        apart.start()
        waiting = [apart.client.cancel_many([slow])]
        wait_until(lambda: next(apart.client.open_cancels()).claimed, what="the only sender is busy")
        waiting += [apart.client.cancel_many(calm), apart.client.cancel_many(urgent, lane=Lane.RISK)]
        for pending in waiting:
            assert {result.outcome for result in pending.results(timeout=PATIENCE_S)} == {"canceled"}
    _, first, *others = crew.cancels()
    assert sorted(first["order_ids"]) == sorted(urgent)
    assert sorted(order_id for call in others for order_id in call["order_ids"]) == sorted(calm)


def test_a_lone_order_of_a_named_shard_is_paid_for_from_that_shards_bucket(crew):
    for shard in (1, 3):
        [order_id] = crew.place(exchange_index=shard)
        result = crew.client.cancel(order_id, exchange_index=shard).result(timeout=PATIENCE_S)
        assert result.outcome == "canceled"
    assert [(call["operation"], call["bucket"]) for call in crew.cancels()] == [
        ("cancel", "write:1"),
        ("cancel", "write:3"),
    ]


def test_orders_of_several_shards_share_calls_and_each_says_where_it_rests(crew):
    orders = [
        {"order_id": order_id, "exchange_index": shard, "market_ticker": "KXTEST-26NOV22-A"}
        for shard in range(4)
        for order_id in crew.place(20, exchange_index=shard)
    ]
    results = together(crew, orders)
    assert len(batches(crew)) <= 4
    named = {
        entry["order_id"]: entry["exchange_index"]
        for call in batches(crew)
        for entry in json.loads(call["body"])["orders"]
    }
    assert named.items() <= {order["order_id"]: order["exchange_index"] for order in orders}.items()
    assert len(named) >= 70
    assert {call["bucket"] for call in batches(crew)} == {"write"}
    tells_the_truth(results, crew)


def test_orders_without_routing_that_rest_elsewhere_are_found_after_the_batch(crew):
    here, there = crew.place(5), crew.place(5, exchange_index=2, ticker="KXBTC-26NOV22-T1")
    results = together(crew, [*here, *there])
    assert {results[order_id].attempts for order_id in here} == {1}
    assert {results[order_id].attempts for order_id in there} == {2}
    tells_the_truth(results, crew)


# -- each order's own answer


def test_every_order_of_a_batch_gets_its_own_outcome(crew):
    placed = crew.place(8)
    [filled, gone] = placed[:2]
    crew.control.fill(filled)
    crew.control.cancel_elsewhere(gone)
    [unknown] = ids(1)
    results = together(crew, [*placed, unknown])
    assert (results[filled].outcome, results[filled].status) == ("too_late", "executed")
    assert (results[gone].outcome, results[gone].status) == ("too_late", "canceled")
    assert results[unknown].outcome == "unknown_order"
    assert {results[order_id].outcome for order_id in placed[2:]} == {"canceled"}
    assert len(batches(crew)) == 1
    assert {results[order_id].confirmed_by for order_id in placed[2:]} == {"cancel"}


@pytest.mark.parametrize(
    "code",
    [
        "internal_error",
        "service_unavailable",
        "exchange_is_paused",
        "trading_is_paused",
        "header_timestamp_expired",
        "not_found",
        "too_many_requests",
        "RATE_LIMIT_EXCEEDED",
        "invalid_parameters",
        "something_new",
    ],
)
def test_an_error_of_one_order_inside_a_batch_is_that_orders_alone_and_is_seen_through(crew, code):
    order_ids = crew.place(6)
    struck = order_ids[3]
    crew.control.fault("entry_error", order_id=struck, code=code, times=1)
    results = together(crew, order_ids)
    assert [fault["struck"] for fault in crew.control.faults()] == [], "it has struck, and is used up"
    others = set(order_ids) - {struck}
    assert {(results[each].outcome, results[each].attempts) for each in others} == {("canceled", 1)}
    tells_the_truth(results, crew)
    assert results[struck].confirmed_by == "cancel"
    assert set(crew.effective().values()) == {1}


@pytest.mark.parametrize("code", ["ORDER_ALREADY_CANCELED", "internal_error", "not_found"])
def test_an_error_of_an_order_that_somebody_else_canceled_does_not_make_it_ours(crew, code):
    order_ids = crew.place(6)
    gone = order_ids[3]
    crew.control.cancel_elsewhere(gone)
    crew.control.fault("entry_error", order_id=gone, code=code, times=1)
    result = together(crew, order_ids)[gone]
    assert (result.outcome, result.status, result.reduced_by) == ("too_late", "canceled", Decimal(0))


def test_shuffled_answers_are_matched_by_order_id(crew):
    order_ids = ids(40)
    crew.control.place_many(
        [{"order_id": order_id, "count": f"{at}.25"} for at, order_id in enumerate(order_ids, 1)]
    )
    crew.control.fault("shuffled")
    results = together(crew, order_ids)
    assert batches(crew)[0]["fault"] == "shuffled"
    assert [results[order_id].reduced_by for order_id in order_ids] == [
        Decimal(f"{at}.25") for at in range(1, 41)
    ]
    assert {result.attempts for result in results.values()} == {1}


@pytest.mark.parametrize("effect", ["none", "before"])
def test_an_order_that_the_answer_leaves_out_is_not_known_and_is_seen_through(crew, effect):
    order_ids = crew.place(6)
    crew.control.fault("entry_missing", order_id=order_ids[2], effect=effect, times=1)
    results = together(crew, order_ids)
    tells_the_truth(results, crew)
    assert results[order_ids[2]].confirmed_by == ("read_back" if effect == "before" else "cancel")
    assert results[order_ids[0]].attempts == 1


def test_an_entry_about_somebody_elses_order_says_nothing_about_ours(crew):
    order_ids = crew.place(6)
    [stranger] = ids(1)
    crew.control.fault("entry_foreign", order_id=order_ids[2], body_order_id=stranger, times=1)
    results = together(crew, order_ids)
    tells_the_truth(results, crew)
    assert results[order_ids[2]].confirmed_by == "read_back"
    assert crew.client.status(stranger).result is None


def test_an_entry_that_carries_another_of_our_orders_does_not_settle_that_one_with_its_count(crew):
    """The second order is told of twice, with two counts: that is no answer, and both are read back."""
    first, second = ids(2)
    crew.control.place_many([{"order_id": first, "count": "3.00"}, {"order_id": second, "count": "5.00"}])
    crew.control.fault("entry_foreign", order_id=first, body_order_id=second, times=1)
    results = together(crew, [first, second])
    assert results[first].reduced_by in {None, Decimal("3.00")}
    assert results[second].reduced_by in {None, Decimal("5.00")}


# -- the whole call


@pytest.mark.parametrize("status", [400, 413])
def test_a_batch_refused_as_too_large_is_split_and_the_size_is_learned(crew, status):
    crew.control.configure(max_batch=7, oversize_status=status)
    with crew.apart(KALSHI_BATCH_MOST=str(BATCH_MOST)) as apart:
        order_ids = crew.place(300)
        pending = apart.client.cancel_many(order_ids)
        apart.start()
        results = {result.order_id: result for result in pending.results(timeout=PATIENCE_S)}
    refused = [call for call in batches(crew) if call["status"] == status]
    accepted = [len(call["order_ids"]) for call in batches(crew) if call["status"] == 200]
    print(f"refused: {[len(call['order_ids']) for call in refused]}")
    assert 1 <= len(refused) <= 7 * SENDERS, "the search for the size, by every sender once at most"
    assert max(accepted) == 7, "as large as is allowed, found by itself"
    assert {result.outcome for result in results.values()} == {"canceled"}
    assert set(crew.effective().values()) == {1}
    assert len(crew.cancels()) < 300 / 2


@pytest.mark.parametrize("status", [403, 413])
def test_where_a_gateway_lets_only_single_calls_pass_they_are_made(crew, status):
    crew.control.fault("cdn", operation="batch", status=status)
    with crew.apart(KALSHI_BATCH_MOST=str(BATCH_MOST)) as apart:
        order_ids = crew.place(200)
        pending = apart.client.cancel_many([{"order_id": each, "deadline_s": 60} for each in order_ids])
        apart.start()
        results = pending.results(timeout=PATIENCE_S)
    print(f"turned away: {[len(call['order_ids']) for call in batches(crew)]}")
    assert {result.outcome for result in results} == {"canceled"}
    assert len(batches(crew)) < 100


def test_batches_that_are_turned_away_one_after_the_other_for_a_while_are_tried_in_halves(monkeypatch):
    moments = iter([0.0, 0.2, 0.4, 0.6, 0.9, 1.1, 1.1, 1.1, 1.1])
    monkeypatch.setattr("worker.dispatch.batch_size.time.monotonic", lambda: next(moments))
    size = BatchSize(100)
    for _ in range(5):
        size.turned_away(26)
        assert size._limit == 100
    size.turned_away(26)
    assert size._limit == 13


def test_a_batch_that_goes_through_tells_that_those_turned_away_were_not_too_large(monkeypatch):
    monkeypatch.setattr("worker.dispatch.batch_size.TURNED_AWAY_S", 0.0)
    size = BatchSize(100)
    for _ in range(3):
        for _ in range(4):
            size.turned_away(26)
        size.accepted(26)
    assert size.limit == 100


def test_a_batch_turned_away_over_its_size_like_over_the_budget_still_ends(crew):
    crew.control.configure(max_batch=20, oversize_status=429, tier="premier")
    with crew.apart(KALSHI_BATCH_MOST=str(BATCH_MOST)) as apart:
        order_ids = crew.place(100)
        pending = apart.client.cancel_many([{"order_id": each, "deadline_s": 60} for each in order_ids])
        apart.start()
        results = pending.results(timeout=SETTLED_PATIENCE_S)
    turned_away = [call for call in batches(crew) if call["status"] == 429]
    print(f"turned away: {[len(each['order_ids']) for each in turned_away]}")
    assert {result.outcome for result in results} == {"canceled"}
    assert len(turned_away) <= 12


def test_one_order_that_spoils_the_whole_batch_is_found_and_the_others_go_through(crew):
    order_ids = crew.place(20)
    crew.control.fault("status", order_id=order_ids[7], status=400, code="invalid_parameters")
    with crew.apart(KALSHI_BATCH_MOST=str(BATCH_MOST)) as apart:
        pending = apart.client.cancel_many(order_ids)
        apart.start()
        results = {result.order_id: result for result in pending.results(timeout=PATIENCE_S)}
        assert results.pop(order_ids[7]).outcome == "refused"
        assert {result.outcome for result in results.values()} == {"canceled"}

        def goes_out_together():
            """Whether fifty orders are asked for in large calls."""
            seen = max(call["seq"] for call in crew.cancels())
            apart.client.cancel_many(crew.place(50)).results(timeout=PATIENCE_S)
            return any(len(call["order_ids"]) >= 20 for call in crew.control.calls("batch", since=seen))

        wait_until(goes_out_together, within_s=PATIENCE_S, what="large batches again")


@pytest.mark.parametrize("kind", ["drop_after", "drop_before"])
def test_a_batch_whose_answer_is_lost_is_read_back_in_one_listing_and_the_rest_order_by_order(crew, kind):
    order_ids = crew.place(20)
    crew.control.fault(kind, operation="batch", times=1)
    results = together(crew, order_ids)
    listings = [call for call in crew.control.calls("list") if "status=canceled" in call["query"]]
    assert len(listings) == 1
    tells_the_truth(results, crew)
    if kind == "drop_after":
        assert crew.control.calls("read") == []
        assert {result.confirmed_by for result in results.values()} == {"read_back"}
        assert crew.sent() == Counter(order_ids), "what is read back as canceled is not asked for again"
    else:
        assert len(crew.control.calls("read")) >= 20
        assert {result.attempts for result in results.values()} == {2}


@pytest.mark.parametrize("number", [3, 20])
def test_a_batch_that_is_answered_to_come_back_later_is_looked_after_then(crew, number):
    order_ids = crew.place(number)
    crew.control.fault("http_503", operation="batch", times=1, retry_after="1.5")
    results = together(crew, order_ids)
    assert {each.outcome for each in results.values()} == {"canceled"}
    first, second, *_ = (
        call for call in crew.control.calls() if call["operation"] in ("batch", "cancel", "read", "list")
    )
    assert second["received_ms"] - first["received_ms"] >= 1_500


def test_after_a_lost_batch_a_fill_is_told_from_a_cancel(crew):
    order_ids = crew.place(10)
    crew.control.fault("drop_after_fill", order_id=order_ids[0], operation="batch", times=1)
    results = together(crew, order_ids)
    assert (results[order_ids[0]].outcome, results[order_ids[0]].status) == ("too_late", "executed")
    tells_the_truth(results, crew)


@pytest.mark.parametrize("kind", ["http_500", "http_502_html", "http_503", "truncated", "garbage", "hang"])
def test_a_batch_without_a_usable_answer_is_seen_through(crew, kind):
    order_ids = crew.place(10)
    crew.control.fault(kind, operation="batch", times=1)
    results = together(crew, [{"order_id": order_id, "deadline_s": 30} for order_id in order_ids])
    tells_the_truth(results, crew)


def test_a_batch_over_the_budget_is_not_lost_and_is_paid_for_later(crew):
    order_ids = crew.place(10)
    crew.control.fault("http_429", operation="batch", times=1)
    results = together(crew, order_ids)
    assert batches(crew)[0]["status"] == 429
    tells_the_truth(results, crew)
    assert {result.confirmed_by for result in results.values()} == {"cancel"}
    assert crew.control.calls("read") == [], "a 429 took no effect: nothing to be read back"


# -- V1


@pytest.mark.parametrize("form", ["alive_int", "alive_fp"])
def test_v1_has_batches_too_and_each_order_is_told_whole(crew, form):
    crew.control.configure(v1=form)
    with crew.apart(KALSHI_ORDERS_API="v1", KALSHI_BATCH_MOST=str(BATCH_MOST)) as apart:
        placed = crew.place(12)
        crew.control.fill(placed[0])
        crew.control.fill(placed[1], "4.00")
        pending = apart.client.cancel_many(placed)
        apart.start()
        results = {result.order_id: result for result in pending.results(timeout=PATIENCE_S)}
    [call] = batches(crew)
    assert call["path"] == "/trade-api/v2/portfolio/orders/batched"
    assert results[placed[0]].outcome == "too_late"
    assert (results[placed[1]].reduced_by, results[placed[1]].fill_count) == (Decimal(6), Decimal(4))
    assert {results[each].order["status"] for each in placed[1:]} == {"canceled"}
    tells_the_truth(results, crew)


def test_a_retired_v1_batch_moves_to_v2_with_all_its_orders(crew):
    with crew.apart(KALSHI_ORDERS_API="v1", KALSHI_BATCH_MOST=str(BATCH_MOST)) as apart:
        placed = crew.place(12)
        pending = apart.client.cancel_many(placed)
        apart.start()
        results = pending.results(timeout=PATIENCE_S)
    assert {result.outcome for result in results} == {"canceled"}
    assert batches(crew)[0]["status"] == 410
    assert crew.effective() == Counter(placed)


# -- time


def test_a_batch_takes_hardly_longer_than_a_single_call(crew):
    crew.control.configure(latency_s=0.2)
    order_ids = crew.place(100)
    started = time.monotonic()
    together(crew, order_ids)
    assert time.monotonic() - started < 10.0, "a hundred calls one after the other would take 20 s"
