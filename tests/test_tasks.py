"""Raw messages, as any Celery producer sends them: each task, its result, and what is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import uuid

import pytest
from crew import about_orders
from records import TICKER, by_cancel, by_read_back, cancels, says

from trials.stack import wait_until

PATIENCE_S = 20.0


# -- raw messages: producers that have none of our code


def test_a_raw_message_gets_its_result_under_its_own_task_id_and_under_the_orders(
    control, celery_producer, order_id
):
    control.place(order_id)
    sent = celery_producer.send_task("cancel_order", kwargs={"order_id": order_id}, queue="cancels")
    value = sent.get(timeout=PATIENCE_S)
    says(value, order_id, **by_cancel(control.order(order_id), requested_by=[]))
    assert celery_producer.AsyncResult(f"cancel:{order_id}").get(timeout=PATIENCE_S) == value
    again = celery_producer.send_task("cancel_order", kwargs={"order_id": order_id}, queue="cancels")
    assert again.get(timeout=PATIENCE_S) == value
    assert len(cancels(control, order_id)) == 1


def test_a_raw_message_may_carry_any_task_id_and_the_order_id_as_its_only_argument(
    control, celery_producer, order_id
):
    control.place(order_id)
    task_id = f'any "thing" {order_id} \u00fc'
    sent = celery_producer.send_task("cancel_order", args=[order_id], queue="cancels", task_id=task_id)
    assert sent.get(timeout=PATIENCE_S)["outcome"] == "canceled"
    assert celery_producer.AsyncResult(task_id).get(timeout=PATIENCE_S)["order_id"] == order_id


def test_a_raw_messages_fields_are_served_like_our_clients(control, celery_producer, order_id):
    control.place(order_id, exchange_index=2, subaccount=4)
    fields = {
        "order_id": order_id,
        "market_ticker": TICKER,
        "exchange_index": 2,
        "subaccount": 4,
        "requested_by": "raw",
        "reason": "a test",
        "deadline_s": 5.5,
    }
    sent = celery_producer.send_task("cancel_order", kwargs=fields, queue="risk")
    says(sent.get(timeout=PATIENCE_S), order_id, **by_cancel(control.order(order_id), requested_by=["raw"]))
    [call] = cancels(control, order_id)
    assert set(call["query"].split("&")) == {"exchange_index=2", "subaccount=4", f"market_ticker={TICKER}"}


def test_a_raw_message_that_ignores_its_result_is_served(control, client, celery_producer, order_id):
    control.place(order_id)
    sent = celery_producer.send_task(
        "cancel_order", kwargs={"order_id": order_id}, queue="cancels", ignore_result=True
    )
    wait_until(lambda: client.status(order_id).result, what="the record")
    assert control.order(order_id)["status"] == "canceled"
    assert not celery_producer.backend.client.exists(f"celery-task-meta-{sent.id}")


def test_a_process_that_has_none_of_our_code_publishes_a_cancel_and_gets_its_result(
    control, stack, order_id, tmp_path
):
    control.place(order_id)
    script = tmp_path / "producer.py"
    script.write_text(
        f"""
import importlib.util, json, sys
sys.path.append({sysconfig.get_path("purelib")!r})
assert not any(map(importlib.util.find_spec, ("kalshi_cancel", "worker")))
from celery import Celery
app = Celery(broker={stack.redis.url!r}, backend={stack.redis.url!r})
sent = app.send_task("cancel_order", kwargs={{"order_id": {order_id!r}}}, queue="cancels")
print(json.dumps([sent.get(timeout=20), app.AsyncResult("cancel:" + {order_id!r}).get(timeout=20)]))
"""
    )
    # -I: no working directory, no environment; -S: no .pth files, so no editable installation of ours.
    ran = subprocess.run(
        [sys.executable, "-I", "-S", str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    own, by_order = json.loads(ran.stdout)
    assert own == by_order
    says(own, order_id, **by_cancel(control.order(order_id), requested_by=[]))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, ["order_id"]),
        ({"order_id": 7}, ["order_id"]),
        ({"order_id": None}, ["order_id"]),
        ({"order_id": "a/../b", "exchange_index": "2"}, ["order_id", "exchange_index"]),
        ({"order_id": "?", "subacount": 1}, ["subacount"]),
        ({"order_id": "?", "exchange_index": 1.0, "subaccount": -1}, ["exchange_index", "subaccount"]),
        ({"order_id": "?", "market_ticker": "a b", "requested_by": ["x"]}, ["market_ticker", "requested_by"]),
        ({"order_id": "?", "deadline_s": 0, "reason": "\x00"}, ["deadline_s", "reason"]),
        ({"order_id": "?", "deadline_s": "NaN"}, ["deadline_s"]),
    ],
    ids=str,
)
def test_a_raw_message_with_fields_that_cannot_be_meant_is_refused_by_name_and_nothing_is_sent(
    control, celery_producer, order_id, fields, named
):
    control.place(order_id)
    fields = {name: order_id if value == "?" else value for name, value in fields.items()}
    value = celery_producer.send_task("cancel_order", kwargs=fields, queue="cancels").get(timeout=PATIENCE_S)
    assert (value["outcome"], value["error"]["code"]) == ("refused", "invalid_request")
    assert all(name in value["error"]["message"] for name in named)
    asked_for = fields.get("order_id")
    assert value["order_id"] == (asked_for if isinstance(asked_for, str) else None)
    assert about_orders(control) == []
    if isinstance(asked_for, str):
        assert celery_producer.AsyncResult(f"cancel:{asked_for}").get(timeout=PATIENCE_S) == value


def test_a_list_in_one_message_answers_for_each_order_once_and_refuses_only_the_bad_ones(
    control, celery_producer
):
    resting, executed, elsewhere, unknown = (str(uuid.uuid4()) for _ in range(4))
    control.place(resting)
    control.place(executed, status="executed", filled="10.00")
    control.place(elsewhere, exchange_index=2)
    orders = [
        {"order_id": resting},
        {"order_id": executed, "requested_by": "list"},
        {"order_id": resting, "reason": "again"},
        {"order_id": 7},
        {"order_id": elsewhere, "exchange_index": 2},
        {"order_id": str(uuid.uuid4()), "sharde": 1},
        unknown,
        resting,
        None,
        {"order_id": "a?b"},
    ]
    sent = celery_producer.send_task("cancel_orders", kwargs={"orders": orders}, queue="cancels")
    values = sent.get(timeout=PATIENCE_S)
    good, bad = values[:4], values[4:]
    assert [value["order_id"] for value in good] == [resting, executed, elsewhere, unknown]
    assert [value["outcome"] for value in good] == ["canceled", "too_late", "canceled", "unknown_order"]
    says(good[0], resting, **by_cancel(control.order(resting), requested_by=[]))
    says(good[1], executed, **by_read_back(control.order(executed), ours=False, requested_by=["list"]))
    says(good[2], elsewhere, **by_cancel(control.order(elsewhere), requested_by=[]))
    assert {(value["outcome"], value["error"]["code"]) for value in bad} == {("refused", "invalid_request")}
    words = [value["error"]["message"] for value in bad]
    assert len(words) == 4
    for named, message in zip(("order_id", "sharde", "message", "order_id"), words, strict=True):
        assert named in message
    assert len(cancels(control, resting)) == 1
    for value in good:
        record = celery_producer.AsyncResult(f"cancel:{value['order_id']}")
        assert record.get(timeout=PATIENCE_S) == value


@pytest.mark.parametrize(
    "kwargs", [{}, {"orders": None}, {"orders": "x"}, {"orders": {}}, {"order_ids": []}], ids=str
)
def test_a_list_message_that_has_no_list_is_refused(control, celery_producer, kwargs):
    sent = celery_producer.send_task("cancel_orders", kwargs=kwargs, queue="cancels")
    [value] = sent.get(timeout=PATIENCE_S)
    assert (value["outcome"], value["error"]["code"]) == ("refused", "invalid_request")
    assert "orders" in value["error"]["message"]


def test_an_empty_list_is_answered_with_an_empty_list(control, celery_producer):
    sent = celery_producer.send_task("cancel_orders", kwargs={"orders": []}, queue="cancels")
    assert sent.get(timeout=PATIENCE_S) == []


@pytest.mark.parametrize("queue", ["cancels", "risk"])
def test_five_hundred_orders_in_one_message_are_all_canceled(control, celery_producer, queue):
    order_ids = [str(uuid.uuid4()) for _ in range(500)]
    control.place_many([{"order_id": order_id} for order_id in order_ids])
    orders = [{"order_id": order_id, "exchange_index": 0} for order_id in order_ids]
    sent = celery_producer.send_task("cancel_orders", kwargs={"orders": orders}, queue=queue)
    values = sent.get(timeout=60)
    assert [value["order_id"] for value in values] == order_ids
    truth = {order["order_id"]: order for order in control.orders()}
    for order_id, value in zip(order_ids, values, strict=True):
        says(value, order_id, **by_cancel(truth[order_id], requested_by=[]))
    assert all(truth[order_id]["status"] == "canceled" for order_id in order_ids)
