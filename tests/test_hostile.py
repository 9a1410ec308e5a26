"""What a hostile exchange may answer, and what a stranger may store: no outcome is made of it.

Everything runs through a real worker. After each piece of hostility the same process has to settle a fresh
order promptly.
"""

from __future__ import annotations

import json
import uuid

import pytest
from envelopes import SURROGATE, nested

from trials.stack import wait_until

PATIENCE_S = 20.0


# -- what somebody has put into Redis


SPOILT = {
    "no JSON": "canceled",
    "a failure": {"status": "FAILURE", "result": {"exc_type": "ValueError"}, "task_id": "cancel:x"},
    "a list": [],
    "deep": nested(10_000).decode(),
    "an outcome that there is not": {"status": "SUCCESS", "result": {"order_id": "x", "outcome": "lost"}},
}


@pytest.mark.parametrize("spoilt", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_record_is_replaced_by_a_true_one_when_its_cancel_is_asked_for(
    worker, stack, control, client, celery_producer, *, order_id, spoilt
):
    control.place(order_id)
    with stack.redis.client() as server:
        text = spoilt if isinstance(spoilt, str) else json.dumps(spoilt)
        server.set(f"celery-task-meta-cancel:{order_id}", text)
    sent = celery_producer.send_task("cancel_orders", args=[[order_id]], queue="cancels")
    [value] = sent.get(timeout=PATIENCE_S)
    assert value["outcome"] == "canceled"
    assert client.status(order_id).result.to_json() == value


# -- hostile answers of the exchange


def settle_truly(control, client, faults):
    """Asks for a cancel against each fault; what is said is true. The outcomes, by the faults' names."""
    asked = {}
    for name, (kind, given) in faults.items():
        order_id = asked[name] = str(uuid.uuid4())
        control.place(order_id)
        fields, body = dict(given), given.get("body")
        if isinstance(body, str | dict | list):
            text = body if isinstance(body, str) else json.dumps(body)
            fields["body"] = text.replace("?", order_id).encode()
        if fields["operation"] == "read":
            control.fault("drop_after", order_id=order_id, operation="cancel", times=1)
        control.fault(kind, order_id=order_id, **fields)
        client.cancel(order_id)
        # One at a time: cancels that wait together go out in one call, which would meet one fault only.
        wait_until(lambda order_id=order_id: control.calls(order_id=order_id), what=f"{name} is sent")
    results = {result.order_id: result for result in client.results(asked.values(), timeout=PATIENCE_S)}
    for order_id in asked.values():
        if results[order_id].outcome in ("canceled", "too_late"):
            assert results[order_id].status == control.order(order_id)["status"] == "canceled"
    return {name: str(results[order_id].outcome) for name, order_id in asked.items()}


STATUSES = (
    *(200, 201, 202, 204, 206, 226, 299, 300, 304, 305, 306, 308, 399, 402, 405, 406, 407),
    *(408, 410, 411, 412, 413, 414, 415, 416, 417, 418, 421, 422, 423, 424, 425, 426, 428),
    *(431, 451, 499, 501, 505, 507, 508, 510, 511, 520, 522, 529, 530, 598, 599),
)
BODIES = {"empty": "", "HTML": "<html>", "an empty object": {}, "canceled": {"status": "canceled"}}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_no_status_is_taken_for_a_cancellation_that_there_was_not(worker, control, client, body):
    faults = {
        status: ("status", {"operation": "cancel", "status": status, "body": body, "times": 1})
        for status in STATUSES
    }
    outcomes = settle_truly(control, client, faults)
    assert {outcomes[status] for status in STATUSES if status < 400 or status >= 500} == {"canceled"}
    assert set(outcomes.values()) <= {"canceled", "refused"}


def test_an_answer_that_is_only_promised_is_no_answer(worker, control, client):
    faults = {
        status: ("status", {"operation": "cancel", "status": status, "times": 1})
        for status in (100, 101, 102, 103, 150, 199)
    }
    assert set(settle_truly(control, client, faults).values()) == {"canceled"}


HUGE = "9" * 5_000
ANSWERS = {
    "another type": ({"order_id": "?"}, {"content_type": "text/html"}),
    "a wrong charset": ({"order_id": "?"}, {"content_type": "application/json; charset=klingon"}),
    "NaN": ({"order_id": "?", "reduced_by": "NaN", "remaining_count": "0.00"}, {}),
    "infinite": ({"order_id": "?", "reduced_by": "Infinity"}, {}),
    "negative": ({"order_id": "?", "reduced_by": "-10.00"}, {}),
    "huge": ({"order_id": "?", "reduced_by": HUGE}, {}),
    "exponents": ({"order_id": "?", "reduced_by": "1e999999999"}, {}),
    "a list of ids": ({"order_id": ["?"], "reduced_by": "10.00"}, {}),
    "a list": ([{"order_id": "?", "reduced_by": "10.00"}], {}),
    "deep": (nested(900).decode(), {}),
    "deeper": (nested(100_000).decode(), {}),
    "surrogates": ({"order_id": "?" + SURROGATE, "reduced_by": SURROGATE}, {}),
    "two answers": ('{"order_id": "?"}{"order_id": "?"}', {}),
    "UTF-16": ('{"order_id": "?"}'.encode("utf-16"), {}),
    "bytes": (bytes(range(256)), {}),
    "a wrong length": ("{}", {"headers": {"Content-Length": "-1"}}),
    "deflated, it says": ("{}", {"headers": {"Content-Encoding": "deflate"}}),
    "headers of another kind": (
        "{}",
        {"headers": {"Date": "yesterday", "Retry-After": "-1", "Set-Cookie": "x=y"}},
    ),
}


@pytest.mark.parametrize("status", [200, 404, 500])
def test_no_answer_however_odd_is_taken_for_a_cancellation_that_there_was_not(
    worker, control, client, status
):
    faults = {
        name: ("status", {"operation": "cancel", "status": status, "body": body, "times": 1, **fields})
        for name, (body, fields) in ANSWERS.items()
    }
    assert settle_truly(control, client, faults) == dict.fromkeys(ANSWERS, "canceled")


@pytest.mark.parametrize("operation", ["cancel", "read"])
def test_an_answer_that_never_ends_or_bursts_leaves_the_truth_to_be_found_out(
    worker, control, client, operation
):
    kinds = {kind: {} for kind in ("truncated", "gzip_bomb", "headers_flood", "garbage", "redirect")}
    kinds |= {kind: {"interval_s": 0.02} for kind in ("endless", "drip")}
    faults = {kind: (kind, {"operation": operation, "times": 1, **fields}) for kind, fields in kinds.items()}
    assert settle_truly(control, client, faults) == dict.fromkeys(kinds, "canceled")


WORDS = {
    "a lone surrogate": SURROGATE,
    "too many": "x" * 100_000,
    "a terminal's command": "\x1b[2J\r\nforged line",
    "a list": ["a list"],
    "an object": {"code": {}},
}


@pytest.mark.parametrize("code", WORDS.values(), ids=WORDS)
def test_an_error_of_any_content_is_stored_as_it_can_be(worker, control, client, order_id, code):
    control.place(order_id)
    body = json.dumps({"error": {"code": code, "message": code, "details": code}})
    control.fault("status", order_id=order_id, operation="cancel", status=400, body=body)
    result = client.cancel(order_id).result(timeout=PATIENCE_S)
    assert result.outcome in {
        "refused",
        "unresolved",
    }  # a code that is none of the exchange's is nobody's word
    assert len(json.dumps(result.to_json())) < 20_000
    assert "\x1b" not in worker.log_text()
    assert "\nforged" not in worker.log_text()
