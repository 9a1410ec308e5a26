"""Every answer that a cancel can get, through a real worker: what the record says, and what is true."""

from __future__ import annotations

import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count

import pytest
from records import TICKER, by_cancel, by_read_back, cancels, says, updated_ms

from kalshi_cancel.client import CancelClient
from kalshi_cancel.exchange.client import Exchange
from kalshi_cancel.model.requests import Lane
from kalshi_cancel.settings.worker import WorkerSettings
from trials.stack import wait_until

PATIENCE_S = 20.0
NOT_FOUND = {"code": "not_found", "message": "not found", "http_status": 404}


@pytest.fixture
def settle(client, celery_producer):
    """Cancels an order and gives its result, after a look at the record that everybody else reads."""

    def settle(order_id, **fields):
        value = client.cancel(order_id, **fields).result(timeout=PATIENCE_S).to_json()
        assert celery_producer.AsyncResult(f"cancel:{order_id}").get(timeout=PATIENCE_S) == value
        return value

    return settle


_databases = count(1)


@pytest.fixture
def own_worker(stack, control, tmp_path):
    """Starts a worker of the test's own, on a database and with a key id of its own; gives its client."""

    @contextmanager
    def own_worker(*, public_key=None, scope="full", **environment):
        url = stack.redis.url.removesuffix("/0") + f"/{next(_databases)}"
        key_id = str(uuid.uuid4())
        control.register_key(key_id, public_key or stack.keys.public_path.read_text(), scope)
        worker = stack.start_worker(REDIS_URL=url, KALSHI_API_KEY_ID=key_id, **environment)
        client = CancelClient(url, requested_by="test")
        client.worker = worker
        try:
            yield client
        finally:
            client.close()
            worker.stop()
            stack.workers.remove(worker)

    return own_worker


def cancellations(control, order_id):
    """What canceled the order, as often as it happened."""
    history = control.order(order_id)["history"]
    return [event["by"] for event in history if event["event"] == "canceled"]


def statuses(control, order_id):
    """What each of them was answered."""
    return [call["status"] for call in cancels(control, order_id)]


def reads(control, order_id):
    """How often an order was read back."""
    return len(control.calls("read", order_id))


# -- 200


@pytest.mark.parametrize(
    ("placed", "reduced_by"),
    [
        ({}, "10.00"),
        ({"filled": "3.00"}, "7.00"),
        ({"count": "2.75", "filled": "0.01"}, "2.74"),
        ({"count": "1000000000.00"}, "1000000000.00"),
    ],
    ids=["resting", "partly filled", "fractional", "large"],
)
def test_a_200_is_a_cancellation_confirmed_by_the_cancel_itself(
    control, settle, order_id, placed, reduced_by
):
    control.place(order_id, **placed)
    value = settle(order_id)
    truth = control.order(order_id)
    says(value, order_id, **by_cancel(truth, reduced_by=reduced_by))
    assert truth["canceled_count_fp"] == reduced_by
    assert cancellations(control, order_id) == ["cancel"]
    assert statuses(control, order_id) == [200]
    assert reads(control, order_id) == 0


def test_a_200_that_describes_another_order_is_read_back(control, settle, order_id):
    control.place(order_id, filled="4.00")
    control.fault("wrong_body", order_id=order_id, times=1)
    value = settle(order_id)
    says(value, order_id, **by_read_back(control.order(order_id), ours=True))
    assert cancellations(control, order_id) == ["cancel"]
    assert statuses(control, order_id) == [200]
    assert reads(control, order_id) == 1


@pytest.mark.parametrize(
    "body",
    [{"order_id": None}, {"order": {}}, {"order_id": "?", "reduced_by": "many"}, {"reduced_by": -1}],
    ids=json.dumps,
)
def test_a_200_without_a_readable_count_of_our_order_is_read_back(control, settle, order_id, body):
    control.place(order_id)
    body = {name: order_id if value == "?" else value for name, value in body.items()}
    control.fault(
        "status", order_id=order_id, operation="cancel", status=200, body=body, effect="before", times=1
    )
    value = settle(order_id)
    says(value, order_id, **by_read_back(control.order(order_id), ours=True))
    assert cancellations(control, order_id) == ["cancel"]


def test_a_200_that_removed_nothing_is_no_cancellation(control, settle, order_id):
    control.place(order_id, status="executed", filled="10.00")
    body = {"order_id": order_id, "reduced_by": "0.00", "ts_ms": 1715793660456}
    control.fault("status", order_id=order_id, operation="cancel", status=200, body=body, times=1)
    value = settle(order_id)
    says(value, order_id, **by_read_back(control.order(order_id), ours=False, status="executed"))


# -- 404


@pytest.mark.parametrize(
    ("placed", "status", "fill_count"),
    [
        ({"status": "executed", "filled": "10.00"}, "executed", "10.00"),
        ({"status": "canceled", "filled": "4.00"}, "canceled", "4.00"),
        ({"status": "canceled"}, "canceled", "0.00"),
    ],
    ids=["executed", "partly filled, then canceled", "canceled"],
)
def test_a_404_for_a_terminal_order_is_too_late_with_the_status_that_the_read_back_shows(
    control, settle, order_id, *, placed, status, fill_count
):
    control.place(order_id, **placed)
    before = control.order(order_id)
    value = settle(order_id)
    says(
        value,
        order_id,
        **by_read_back(before, ours=False, status=status, fill_count=fill_count, reduced_by="0.00"),
    )
    assert control.order(order_id) == before
    assert statuses(control, order_id) == [404]


def test_an_order_in_the_older_integer_form_is_understood(control, settle, order_id):
    control.configure(order_form="int")
    control.place(order_id, status="executed", filled="10.00")
    value = settle(order_id)
    shown = value["order"]
    assert shown["fill_count"] == 10
    says(
        value,
        order_id,
        "too_late",
        status="executed",
        reduced_by="0.00",
        fill_count="10.00",
        remaining_count="0.00",
        confirmed_by="read_back",
        exchange_ts_ms=value["exchange_ts_ms"],
        order=shown,
    )


def test_a_404_for_an_order_that_no_read_ever_shows_is_an_unknown_order(control, settle, order_id):
    value = settle(order_id)
    says(value, order_id, "unknown_order", confirmed_by="read_back", error=NOT_FOUND)
    assert reads(control, order_id) >= 3  # a single 404 on a read proves nothing
    first, *_, last = control.calls("read", order_id)
    assert last["received_ms"] - first["received_ms"] >= 450  # nor do several within the read lag


def test_an_order_that_reads_show_late_is_not_an_unknown_order(control, settle, order_id):
    control.place(order_id, exchange_index=2)
    control.fault("not_found", order_id=order_id, times=2)
    value = settle(order_id)
    assert (value["outcome"], value["confirmed_by"]) == ("canceled", "cancel")
    assert cancellations(control, order_id) == ["cancel"]


def test_a_404_page_of_a_proxy_proves_nothing(control, settle, client, order_id):
    page = {"status": 404, "body": "<html>404</html>", "content_type": "text/html"}
    control.fault("status", order_id=order_id, operation="read", **page)
    value = settle(order_id, deadline_s=1)
    assert value["outcome"] == "unresolved"
    control.clear_faults()
    assert client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "unknown_order"


@pytest.mark.parametrize(
    ("placed", "asked"),
    [
        ({"exchange_index": 2}, {}),
        ({"exchange_index": 2}, {"exchange_index": 1}),
        ({"exchange_index": 0}, {"exchange_index": 3}),
        ({"exchange_index": 1}, {"market_ticker": "KXOTHER-26NOV22-B"}),
        ({"subaccount": 3}, {}),
        ({"subaccount": 0}, {"subaccount": 5}),
        ({"exchange_index": 3, "subaccount": 7}, {"exchange_index": 0, "market_ticker": "KXOTHER-1-A"}),
    ],
    ids=str,
)
def test_an_order_that_rests_elsewhere_is_canceled_there(control, settle, order_id, placed, asked):
    control.place(order_id, **placed)
    value = settle(order_id, **asked)
    shown = value["order"]  # as it was when it was read back: not the final state, if it is told at all
    says(value, order_id, **by_cancel(control.order(order_id), attempts=2, order=shown))
    assert cancellations(control, order_id) == ["cancel"]
    assert statuses(control, order_id) == [404, 200]
    _, there = cancels(control, order_id)
    assert f"exchange_index={placed.get('exchange_index', 0)}" in there["query"].split("&")
    assert f"market_ticker={TICKER}" in there["query"].split("&")
    assert f"subaccount={placed.get('subaccount', 0)}" in there["query"].split("&")


@pytest.mark.parametrize(
    ("placed", "asked", "query"),
    [
        ({}, {}, ""),
        ({"exchange_index": 2}, {"exchange_index": 2}, "exchange_index=2"),
        ({"exchange_index": 2}, {"market_ticker": TICKER}, f"market_ticker={TICKER}"),
        (
            {"exchange_index": 3, "subaccount": 4},
            {"market_ticker": TICKER, "exchange_index": -1, "subaccount": 4},
            f"subaccount=4&exchange_index=-1&market_ticker={TICKER}",
        ),
    ],
    ids=["none", "shard", "ticker", "all"],
)
def test_the_routing_that_a_producer_knows_is_passed_on(control, settle, order_id, *, placed, asked, query):
    control.place(order_id, **placed)
    says(settle(order_id, **asked), order_id, **by_cancel(control.order(order_id)))
    [call] = cancels(control, order_id)
    assert sorted(call["query"].split("&")) == sorted(query.split("&"))


# -- 401, 403, 400, 413, 422: permanent


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "invalid_parameters"),
        (403, "forbidden"),
        (409, "conflict"),
        (413, "payload_too_large"),
        (422, "user_not_found:_5d8c6a0e"),
    ],
)
@pytest.mark.parametrize("shape", ["nested", "flat"])
def test_a_permanent_error_is_refused_at_once_and_not_asked_again(
    control, settle, order_id, *, status, code, shape
):
    control.place(order_id)
    words = {"code": code, "message": "no", "details": "WHY", "shape": shape}
    control.fault("status", order_id=order_id, operation="cancel", status=status, **words)
    value = settle(order_id)
    error = {"code": code, "message": "no (WHY)", "http_status": status}
    if status == 403:  # about the key's rights: no read can tell more
        says(value, order_id, "refused", error=error)
    else:
        shown = control.order(order_id)
        del shown["canceled_count_fp"], shown["history"]
        counts = {"fill_count": "0.00", "remaining_count": "10.00", "order": shown}
        says(value, order_id, "refused", error=error, **counts)
    assert statuses(control, order_id) == [status]
    assert control.order(order_id)["status"] == "resting"


def test_a_permanent_error_without_a_code_is_named_after_its_status(control, settle, order_id):
    control.place(order_id)
    control.fault("status", order_id=order_id, status=403, message="no", shape="msg")
    error = {"code": "http_403", "message": "no", "http_status": 403}
    says(settle(order_id), order_id, "refused", error=error)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 413, 422, 429])
@pytest.mark.parametrize("shape", ["html", "string", "own json"])
def test_the_page_of_a_gateway_refuses_nothing_and_is_asked_again(control, settle, order_id, status, shape):
    control.place(order_id)
    page = {"message": "no", "shape": shape} if shape != "own json" else {"body": {"message": "Forbidden"}}
    if (status, shape) == (429, "string"):
        page = {"body": {"error": {"message": "Too many"}}}
    control.fault("status", order_id=order_id, operation="cancel", status=status, times=2, **page)
    value = settle(order_id)
    says(value, order_id, **by_cancel(control.order(order_id), attempts=3, order=value["order"]))
    assert statuses(control, order_id) == [status, status, 200]


def test_an_order_behind_a_gateway_stays_open_until_the_exchange_itself_answers(control, client, order_id):
    control.place(order_id)
    page = {"body": "<html>blocked</html>", "content_type": "text/html"}
    fault = {"status": 403, "operation": "cancel", **page}
    control.fault("status", order_id=order_id, **fault)
    value = client.cancel(order_id, deadline_s=1).result(timeout=PATIENCE_S).to_json()
    assert (value["outcome"], value["error"]["code"]) == ("unresolved", "gateway")
    assert value["error"]["message"].startswith("HTTP 403 of a gateway, not of the exchange")
    control.clear_faults()
    wait_until(lambda: client.status(order_id).open is None, within_s=PATIENCE_S, what="settled")
    assert client.status(order_id).result.outcome == "canceled"


def test_a_permanent_error_after_a_lost_answer_does_not_hide_our_own_cancellation(control, settle, order_id):
    control.place(order_id)
    control.fault("drop_after", order_id=order_id, operation="cancel", times=1)
    control.fault("status", order_id=order_id, operation="cancel", status=403, code="forbidden", times=1)
    value = settle(order_id)
    says(value, order_id, **by_read_back(control.order(order_id), ours=True))


def test_a_read_only_key_is_refused_and_the_worker_says_so_once(control, own_worker):
    order_ids = [str(uuid.uuid4()) for _ in range(3)]
    for order_id in order_ids:
        control.place(order_id)
    with own_worker(scope="read_only") as client:
        for order_id in order_ids:
            value = client.cancel(order_id).result(timeout=PATIENCE_S).to_json()
            message = "forbidden (the key is read-only)"
            says(
                value,
                order_id,
                "refused",
                error={"code": "forbidden", "message": message, "http_status": 403},
            )
            assert statuses(control, order_id) == [403]
            assert control.order(order_id)["status"] == "resting"
        assert client.worker.log_text().count("event=key_refused exchange refuses this key status=403") == 1


# -- 401: the clock


def test_a_clock_outside_the_exchanges_window_is_corrected_by_its_date_header(control, own_worker):
    with own_worker() as client:
        for skew_s in (-30, 45, 0):
            control.reset()
            control.configure(skew_s=skew_s)
            first, second = str(uuid.uuid4()), str(uuid.uuid4())
            control.place_many([{"order_id": first}, {"order_id": second}])
            value = client.cancel(first).result(timeout=PATIENCE_S).to_json()
            *expired, last = [call["code"] for call in cancels(control, first)]
            says(value, first, **by_cancel(control.order(first), attempts=len(expired) + 1))
            assert last is None
            assert expired in ([], ["header_timestamp_expired"])  # or another call had progress it already
            value = client.cancel(second).result(timeout=PATIENCE_S).to_json()
            says(value, second, **by_cancel(control.order(second)))  # it has learned
        log = client.worker.log_text()
        assert log.count("event=clock_corrected signing with the exchange's clock skew_ms=-") == 1


def test_a_single_answer_with_a_wrong_clock_is_survived(control, settle, order_id):
    control.place(order_id)
    control.fault("skew", order_id=order_id, operation="cancel", seconds=60, times=1)
    value = settle(order_id)
    assert (value["outcome"], value["confirmed_by"]) == ("canceled", "cancel")
    assert cancellations(control, order_id) == ["cancel"]


# -- 410: the dialects


def test_the_old_dialect_is_spoken_until_it_is_retired_and_then_left_loudly_and_once(control, own_worker):
    with own_worker(KALSHI_ORDERS_API="v1") as client:
        for form in ("alive_int", "alive_fp"):
            control.configure(v1=form)
            order_id = str(uuid.uuid4())
            control.place(order_id, filled="4.00")
            value = client.cancel(order_id).result(timeout=PATIENCE_S).to_json()
            [call] = cancels(control, order_id)
            assert call["path"] == f"/trade-api/v2/portfolio/orders/{order_id}"
            shown = value["order"]
            assert (shown["order_id"], shown["status"]) == (order_id, "canceled")
            assert ("reduced_by" in shown, "fill_count" in shown) == (False, form == "alive_int")
            known = {"reduced_by": "6.00", "fill_count": "4.00", "order": shown}
            known["exchange_ts_ms"] = updated_ms(shown)
            says(value, order_id, **by_cancel(control.order(order_id), **known))
        control.configure(v1="retired")
        order_ids = [str(uuid.uuid4()) for _ in range(3)]
        control.place_many([{"order_id": order_id} for order_id in order_ids])
        values = [client.cancel(each).result(timeout=PATIENCE_S).to_json() for each in order_ids]
        assert client.worker.log_text().count("event=v1_retired") == 1
    for order_id, value, attempts in zip(order_ids, values, (2, 1, 1), strict=True):
        says(value, order_id, **by_cancel(control.order(order_id), attempts=attempts))
    assert [statuses(control, order_id) for order_id in order_ids] == [[410, 200], [200], [200]]


# -- 409, 503: paused or down


@pytest.mark.parametrize("pause_status", [409, 503])
def test_a_cancel_is_held_while_the_exchange_is_paused_and_goes_through_afterwards(
    control, client, order_id, pause_status
):
    control.place(order_id)
    control.configure(exchange_paused=True, pause_status=pause_status)
    pending = client.cancel(order_id)
    wait_until(lambda: cancels(control, order_id), what="an attempt")
    assert client.status(order_id).result is None
    control.configure(exchange_paused=False)
    value = pending.result(timeout=PATIENCE_S).to_json()
    says(value, order_id, **by_cancel(control.order(order_id), attempts=len(cancels(control, order_id))))
    assert set(statuses(control, order_id)[:-1]) == {pause_status}


def test_cancels_work_during_a_trading_pause(control, settle, order_id):
    control.place(order_id)
    control.configure(trading_paused=True)
    says(settle(order_id), order_id, **by_cancel(control.order(order_id)))


# -- 429


@pytest.mark.parametrize(
    ("retry_after", "at_least_ms"), [(None, 0), ("1", 1000), ("0", 0), ("soon", 0), ("-5", 0)]
)
def test_a_429_was_not_applied_and_is_asked_again_not_before_retry_after(
    control, settle, order_id, retry_after, at_least_ms
):
    control.place(order_id)
    control.fault("http_429", order_id=order_id, times=1, retry_after=retry_after)
    value = settle(order_id)
    says(value, order_id, **by_cancel(control.order(order_id), attempts=2))
    assert statuses(control, order_id) == [429, 200]
    first, second = cancels(control, order_id)
    assert second["received_ms"] - first["received_ms"] >= at_least_ms


# -- unknown whether it took effect


SPOILERS = [
    ("http_500", {}),
    ("http_500", {"shape": "flat"}),
    ("http_500", {"shape": "msg"}),
    ("http_500", {"shape": "empty"}),
    ("http_502_html", {}),
    ("http_503", {}),
    ("status", {"status": 504, "shape": "html"}),
    ("status", {"status": 520, "body": ""}),
    ("status", {"status": 418}),
    ("status", {"status": 200, "body": ""}),
    ("status", {"status": 200, "body": "[]"}),
    ("status", {"status": 200, "body": "<html>ok</html>", "content_type": "text/html"}),
    ("status", {"status": 200, "body": '{"order_id":NaN}'}),
    ("status", {"status": 201, "body": "{}"}),
    ("garbage", {}),
    ("truncated", {}),
    ("redirect", {}),
    ("redirect", {"status": 307, "location": "http://127.0.0.1:1/elsewhere"}),
    ("headers_flood", {}),
    ("gzip_bomb", {"megabytes": 8}),
]


def _spoiler(value):
    return value if isinstance(value, str) else "-".join(map(str, value.values()))[:30]


@pytest.mark.parametrize(("kind", "fields"), SPOILERS, ids=_spoiler)
def test_an_unusable_answer_to_a_cancel_without_effect_is_asked_again(
    control, settle, order_id, kind, fields
):
    control.place(order_id)
    control.fault(kind, order_id=order_id, operation="cancel", effect="none", times=1, **fields)
    value = settle(order_id)
    says(value, order_id, **by_cancel(control.order(order_id), attempts=2, order=value["order"]))
    assert cancellations(control, order_id) == ["cancel"]


@pytest.mark.parametrize(("kind", "fields"), SPOILERS, ids=_spoiler)
def test_an_unusable_answer_to_a_cancel_with_effect_is_found_out_to_be_our_own_cancellation(
    control, settle, order_id, kind, fields
):
    control.place(order_id, filled="2.50")
    control.fault(kind, order_id=order_id, operation="cancel", effect="before", times=1, **fields)
    value = settle(order_id)
    says(value, order_id, **by_read_back(control.order(order_id), ours=True))
    assert cancellations(control, order_id) == ["cancel"]


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_connection_lost_before_the_effect_is_asked_again(control, settle, order_id, how):
    control.place(order_id)
    control.fault("drop_before", order_id=order_id, operation="cancel", how=how, times=2)
    value = settle(order_id)
    says(value, order_id, **by_cancel(control.order(order_id), attempts=3, order=value["order"]))


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_connection_lost_after_the_effect_is_found_out_to_be_our_own_cancellation(
    control, settle, order_id, how
):
    control.place(order_id, filled="3.00")
    control.fault("drop_after", order_id=order_id, operation="cancel", how=how, times=1)
    value = settle(order_id)
    says(value, order_id, **by_read_back(control.order(order_id), ours=True))
    assert cancellations(control, order_id) == ["cancel"]


def test_a_cancel_that_keeps_failing_takes_turns_with_reads(control, settle, order_id):
    """Every DELETE fails, the first one took effect, and reads work."""
    control.place(order_id, read_lag_s=0.36)
    control.fault("http_500", order_id=order_id, operation="cancel", effect="before")
    value = settle(order_id)
    says(value, order_id, **by_read_back(control.order(order_id), ours=True, attempts=value["attempts"]))
    assert cancellations(control, order_id) == ["cancel"]
    signatures = [call["signature"] for call in cancels(control, order_id)]
    assert len(set(signatures)) == len(signatures)


def test_an_order_that_was_filled_while_our_answer_was_lost_is_too_late(control, settle, order_id):
    control.place(order_id, filled="3.00")
    control.fault("drop_after_fill", order_id=order_id, operation="cancel", times=1)
    value = settle(order_id)
    says(
        value,
        order_id,
        **by_read_back(
            control.order(order_id), ours=False, attempts=1, status="executed", fill_count="10.00"
        ),
    )
    assert cancellations(control, order_id) == []


def test_slow_silent_and_endless_answers_are_given_up_and_what_became_of_the_orders_found_out(
    control, client
):
    faults = {
        "hang without effect": ("hang", {"effect": "none"}),
        "hang after the effect": ("hang", {"effect": "before"}),
        "dripping after the effect": ("drip", {"effect": "before"}),
        "endless after the effect": ("endless", {"effect": "before"}),
    }
    order_ids = {name: str(uuid.uuid4()) for name in faults}
    for name, (kind, fields) in faults.items():
        control.place(order_ids[name])
        control.fault(kind, order_id=order_ids[name], operation="cancel", times=1, **fields)
    asked, pending = time.monotonic(), {}
    for name, order_id in order_ids.items():
        pending[name] = client.cancel(order_id)
        # One by one: what waits together goes out in one batch.
        wait_until(lambda: cancels(control, order_id), what=f"the attempt that is {name}")  # noqa: B023 - called at once
    for name, each in pending.items():
        value = each.result(timeout=PATIENCE_S).to_json()
        truth = control.order(order_ids[name])
        if faults[name][1]["effect"] == "none":
            says(value, order_ids[name], **by_cancel(truth, attempts=2, order=value["order"]))
        else:
            says(value, order_ids[name], **by_read_back(truth, ours=True))
        assert cancellations(control, order_ids[name]) == ["cancel"]
    assert time.monotonic() - asked < 10  # the default deadline: nobody was told "unresolved" meanwhile


def test_a_slow_answer_within_its_time_is_taken(control, settle, order_id):
    control.place(order_id)
    control.fault("slow", order_id=order_id, operation="cancel", seconds=0.7, times=1)
    says(settle(order_id), order_id, **by_cancel(control.order(order_id)))


# -- reads lag writes


def test_a_stale_read_after_a_lost_answer_is_waited_out(control, settle, order_id):
    control.place(order_id, read_lag_s=0.36)
    control.fault("drop_after", order_id=order_id, operation="cancel", times=1)
    value = settle(order_id)
    attempts = len(cancels(control, order_id))
    says(value, order_id, **by_read_back(control.order(order_id), ours=True, attempts=attempts))
    assert reads(control, order_id) >= 2
    assert cancellations(control, order_id) == ["cancel"]


def test_a_stale_read_after_a_200_that_describes_another_order_is_waited_out(control, settle, order_id):
    control.place(order_id, read_lag_s=0.36)
    control.fault("wrong_body", order_id=order_id, times=1)
    value = settle(order_id)
    attempts = len(cancels(control, order_id))
    says(value, order_id, **by_read_back(control.order(order_id), ours=True, attempts=attempts))


def test_a_stale_read_does_not_turn_an_execution_into_a_cancellation(control, settle, order_id):
    control.place(order_id, read_lag_s=0.36)
    control.fill(order_id)
    value = settle(order_id)
    attempts = len(cancels(control, order_id))
    says(value, order_id, **by_read_back(control.order(order_id), ours=False, attempts=attempts))
    assert value["status"] == "executed"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("http_500", {}),
        ("http_429", {}),
        ("drop_before", {}),
        ("garbage", {}),
        ("truncated", {}),
        ("status", {"status": 200, "body": {"order": {"order_id": "another", "status": "canceled"}}}),
        ("status", {"status": 200, "body": {"order": {"order_id": "?", "status": "perhaps"}}}),
    ],
    ids=_spoiler,
)
def test_an_unusable_read_back_is_asked_again(control, settle, order_id, kind, fields):
    control.place(order_id, status="executed", filled="10.00")
    control.fault(kind, order_id=order_id, operation="read", times=2, **fields)
    value = settle(order_id)
    says(value, order_id, **by_read_back(control.order(order_id), ours=False))
    assert reads(control, order_id) == 3


# -- deadlines


@pytest.mark.parametrize(
    ("kind", "fields", "code", "http_status"),
    [
        ("http_500", {}, "internal_server_error", 500),
        ("http_429", {}, "http_429", 429),
        ("drop_before", {}, "unanswered", None),
        ("hang", {"effect": "none"}, None, None),
    ],
)
def test_without_proof_at_its_deadline_a_cancel_is_unresolved_and_worked_on_until_it_is_settled(
    control, client, order_id, *, kind, fields, code, http_status
):
    control.place(order_id)
    control.fault(kind, order_id=order_id, operation="cancel", **fields)
    asked = time.monotonic()
    value = client.cancel(order_id, deadline_s=1).result(timeout=PATIENCE_S).to_json()
    assert 0.95 <= time.monotonic() - asked < 5  # its own deadline, not the default of ten seconds
    error = value["error"]
    # While the first call hangs there is nothing to tell yet but that there is no answer.
    assert (error["code"], error["http_status"]) == (code or error["code"], http_status)
    says(value, order_id, "unresolved", attempts=value["attempts"], error=error)
    status = client.status(order_id)
    assert status.open is not None
    assert status.open.unresolved
    assert control.order(order_id)["status"] == "resting"
    control.clear_faults()
    wait_until(lambda: client.status(order_id).open is None, what="the cancel is settled")
    final = client.status(order_id).result.to_json()
    assert (final["outcome"], final["status"]) == ("canceled", "canceled")
    assert final["requested_at"] == value["requested_at"]
    assert cancellations(control, order_id) == ["cancel"]


def test_a_deadline_of_its_own_is_kept_while_others_wait_longer(control, client):
    patient, hasty = str(uuid.uuid4()), str(uuid.uuid4())
    control.place_many([{"order_id": patient}, {"order_id": hasty}])
    control.configure(exchange_paused=True)
    asked = time.monotonic()
    pending = client.cancel(hasty, deadline_s=0.5)  # first: the pause that it hears opens the breaker
    waiting = client.cancel(patient, deadline_s=30)
    value = pending.result(timeout=PATIENCE_S).to_json()
    assert 0.45 <= time.monotonic() - asked < 5
    assert (value["outcome"], value["error"]["code"]) == ("unresolved", "exchange_is_paused")
    assert client.status(patient).result is None
    control.configure(exchange_paused=False)
    assert waiting.result(timeout=PATIENCE_S).outcome == "canceled"
    wait_until(lambda: client.status(hasty).open is None, what="the other cancel is settled too")


# -- duplicates, and who asked


def test_an_order_asked_for_many_times_is_canceled_once_and_everybody_is_named(
    control, stack, celery_producer, order_id
):
    control.place(order_id)
    control.fault("slow", order_id=order_id, operation="cancel", seconds=2.0, effect="after", times=1)
    dispatchers = [CancelClient(stack.redis.url, requested_by=f"desk-{n % 3}") for n in range(5)]
    pending = [dispatcher.cancel(order_id) for dispatcher in dispatchers]
    raw = [
        celery_producer.send_task("cancel_order", kwargs=fields, queue=queue)
        for queue in ("cancels", "risk")
        for fields in [{"order_id": order_id, "requested_by": f"raw-{queue}"}]
    ]
    values = [each.result(timeout=PATIENCE_S).to_json() for each in pending]
    values += [each.get(timeout=PATIENCE_S) for each in raw]
    assert all(value == values[0] for value in values)
    assert sorted(values[0]["requested_by"]) == ["desk-0", "desk-1", "desk-2", "raw-cancels", "raw-risk"]
    says(
        values[0],
        order_id,
        **by_cancel(control.order(order_id), requested_by=values[0]["requested_by"]),
    )
    assert len(cancels(control, order_id)) == 1


def test_the_risk_lane_is_served_through_our_client_too(control, settle, order_id):
    control.place(order_id)
    says(settle(order_id, lane=Lane.RISK), order_id, **by_cancel(control.order(order_id)))


# -- one order's trouble is not another's


@pytest.mark.parametrize("producer", ["client", "raw"])
def test_a_cancel_goes_out_at_once_while_others_wait_for_a_paused_shard(
    control, client, celery_producer, producer
):
    paused = [{"order_id": str(uuid.uuid4()), "exchange_index": 3} for _ in range(20)]
    control.place_many(paused)
    control.configure(exchange_paused=[3])
    pending = client.cancel_many([{**each, "deadline_s": 30} for each in paused])
    wait_until(
        lambda: all(len(cancels(control, each["order_id"])) >= 2 for each in paused),
        what="a second attempt of each",
    )
    for _ in range(8):
        order_id = str(uuid.uuid4())
        control.place(order_id)
        asked = time.monotonic()
        if producer == "client":
            client.cancel(order_id).result(timeout=PATIENCE_S)
        else:
            kwargs = {"order_id": order_id}
            celery_producer.send_task("cancel_order", kwargs=kwargs, queue="cancels").get(timeout=PATIENCE_S)
        assert time.monotonic() - asked < 5  # the others wait for 30 s
    control.configure(exchange_paused=False)
    assert {each.outcome for each in pending.results(timeout=40)} == {"canceled"}


# -- signatures


def test_no_two_calls_of_a_process_share_a_signature_or_a_timestamp(control, stack):
    # A batch's body is not signed, and Ed25519 signs the same words alike: the timestamp makes a call unique.
    exchange = Exchange.from_settings(WorkerSettings.from_env(stack.environment))
    order_ids = [str(uuid.uuid4()) for _ in range(200)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda order_id: exchange.read_order(order_id, time_left_s=5), order_ids))
    exchange.close()
    calls = [call for order_id in order_ids for call in control.calls("read", order_id)]
    assert len(calls) == len(order_ids)
    for mark in ("signature", "timestamp"):
        assert len({call[mark] for call in calls}) == len(calls), mark
