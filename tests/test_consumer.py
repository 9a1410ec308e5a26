"""What strangers may push into the queues: the worker goes on.

Everything runs through a real worker. After each piece of hostility the same process has to settle a fresh
order promptly; what could not be understood is kept and logged, and whoever waits for it is told.
"""

from __future__ import annotations

import gzip
import json
import pickle
import time
import uuid
from pathlib import Path

import pytest
from celery.exceptions import NotRegistered, TaskRevokedError
from crew import PROMPT_S, about_orders, serves
from envelopes import BAD_ENVELOPES, NO_MESSAGES, SURROGATE, envelope, nested

from kalshi_cancel.model.requests import Lane
from trials.stack import wait_until

PATIENCE_S = 20.0
KEPT = "kalshi-cancel:unreadable"


@pytest.fixture
def push(stack, worker):
    """Puts an item into a queue as it is, past every library."""

    def push(item, queue="cancels"):
        with stack.redis.client() as server:
            server.lpush(queue, item if isinstance(item, bytes) else json.dumps(item))

    return push


@pytest.fixture
def kept(stack, worker):
    """The message that was kept since the test began: its note, which the log has too."""
    with stack.redis.client() as server:
        before = server.lrange(KEPT, 0, -1)

        def kept():
            def news():
                return [text for text in server.lrange(KEPT, 0, 5) if text not in before][:1]

            [text] = wait_until(news, within_s=PATIENCE_S, what="the message is kept")
            assert (
                f"event=message_unreadable message unreadable, kept message_text={json.dumps(text)}"
                in worker.log_text()
            )
            return json.loads(text)

        yield kept


@pytest.mark.parametrize("queue", ["cancels", "risk", "cancels\x06\x169"])
@pytest.mark.parametrize("item", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_what_is_no_message_is_kept_and_logged(push, kept, item, queue):
    push(item, queue)
    note = kept()
    assert note["queue"] == queue.partition("\x06")[0]
    assert note["body_bytes"] == len(item)
    assert note["body"].startswith(item[:100].decode("utf-8", "backslashreplace"))


class Exploit:
    """What runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "content_type",
    ["application/x-python-serialize", "application/x-yaml", "application/data", "text/plain", ""],
)
def test_a_message_of_another_content_type_runs_nothing_and_its_sender_is_told(
    push, kept, celery_producer, tmp_path, content_type
):
    exploited = tmp_path / "exploited"
    task_id = str(uuid.uuid4())
    push(
        envelope(
            body=pickle.dumps([[Exploit(exploited)], {}, {}]),
            headers={"id": task_id},
            **{"content-type": content_type, "content-encoding": "binary"},
        )
    )
    kept()
    assert not exploited.exists()
    with pytest.raises(Exception, match="cannot be understood"):
        celery_producer.AsyncResult(task_id).get(timeout=PATIENCE_S)


@pytest.mark.parametrize("message", BAD_ENVELOPES.values(), ids=BAD_ENVELOPES)
def test_a_message_whose_envelope_cannot_be_used_is_kept_and_nothing_is_sent(push, kept, control, message):
    push({name: value for name, value in message.items() if value is not None})
    assert kept()["queue"] == "cancels"
    assert control.calls("cancel") == []


def test_a_message_that_unpacks_to_hundreds_of_megabytes_is_not_unpacked(push, kept, worker, control, client):
    serves(control, client)
    before = peak_memory_kb(worker)
    bomb = gzip.compress(b"[" + b" " * 200_000_000, 1)
    push(envelope(body=bomb, headers={"compression": "application/x-gzip"}, **{"content-encoding": "binary"}))
    kept()
    assert peak_memory_kb(worker) - before < 100_000


def peak_memory_kb(part):
    status = Path(f"/proc/{part.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def test_objects_that_celery_would_make_values_of_are_read_as_celery_does(push, kept, control):
    push(envelope() | {"headers": {"__type__": "decimal", "__value__": "many"}})
    assert kept()["queue"] == "cancels"
    assert control.calls("cancel") == []


# -- messages that are not for us


OTHER_TASKS = [
    "os.system",
    "worker.tasks.cancel_order",
    "celery.accumulate",
    "celery.backend_cleanup",
    "celery.chain",
    "celery.chord",
    "celery.chord_unlock",
    "celery.chunks",
    "celery.group",
    "celery.map",
    "celery.starmap",
]


@pytest.mark.parametrize("name", OTHER_TASKS)
@pytest.mark.parametrize("protocol", [1, 2])
def test_a_task_that_is_not_ours_is_not_run_and_its_sender_is_told(
    push, kept, celery_producer, name, protocol
):
    task_id = str(uuid.uuid4())
    arguments = [["wake_up", [[]]], {}]
    message = envelope([*arguments, {}], headers={"task": name, "id": task_id})
    if protocol == 1:
        call = {"task": name, "id": task_id, "args": arguments[0], "kwargs": {}}
        message = envelope(call) | {"headers": {}}
    push(message)
    assert name in kept()["why"]
    with pytest.raises(NotRegistered):
        celery_producer.AsyncResult(task_id).get(timeout=PATIENCE_S)


@pytest.mark.parametrize("reserved", ["cancel", "mass", "list"])
@pytest.mark.parametrize("protocol", [1, 2])
@pytest.mark.parametrize("task", ["cancel_order", "celery.accumulate", "nonsense"])
def test_a_message_cannot_store_its_result_where_another_orders_is_looked_for(
    push, stack, control, client, order_id, *, reserved, protocol, task
):
    asked_for = str(uuid.uuid4())
    control.place_many([{"order_id": asked_for}, {"order_id": order_id}])
    task_id = f"{reserved}:{order_id}"
    message = envelope([[], {"order_id": asked_for}, {}], headers={"task": task, "id": task_id})
    if protocol == 1:
        call = {"task": task, "id": task_id, "args": [], "kwargs": {"order_id": asked_for}}
        message = envelope(call) | {"headers": {}}
    push(message)
    if task == "cancel_order":
        wait_until(
            lambda: client.status(asked_for).result, within_s=PATIENCE_S, what="the order's own record"
        )
    serves(control, client)  # which was pushed later
    with stack.redis.client() as server:
        assert server.get(f"celery-task-meta-{task_id}") is None
    assert control.order(order_id)["status"] == "resting"
    assert client.cancel(order_id).result(timeout=PATIENCE_S).order_id == order_id


def test_a_refused_message_cannot_replace_a_settled_orders_record(
    push, control, client, celery_producer, order_id
):
    control.place(order_id)
    settled = client.cancel(order_id).result(timeout=PATIENCE_S)
    push(envelope([[], {"order_id": order_id, "shard": 1}, {}], headers={"id": f"cancel:{order_id}"}))
    again = celery_producer.send_task("cancel_order", kwargs={"order_id": order_id}, queue="cancels")
    assert again.get(timeout=PATIENCE_S) == settled.to_json()
    assert client.status(order_id).result == settled


@pytest.mark.parametrize("outcome", ["a refusal", "a failure"])
def test_what_a_message_wants_run_afterwards_is_not_published(push, stack, celery_producer, outcome):
    task_id, key = str(uuid.uuid4()), f"kalshi-cancel:{uuid.uuid4()}"
    then = {"task": "x", "args": [], "kwargs": {}, "options": {"queue": key}, "subtask_type": None}
    kwargs = {"order_id": "?"} if outcome == "a refusal" else {"self": "?"}
    embed = {name: [then] for name in ("callbacks", "errbacks", "chain")} | {"chord": then}
    push(envelope([[], kwargs, embed], headers={"id": task_id}))
    try:
        assert celery_producer.AsyncResult(task_id).get(timeout=PATIENCE_S)["outcome"] == "refused"
    except TypeError:
        assert outcome == "a failure"
    with stack.redis.client() as server:
        assert server.keys(f"{key}*") == []


# -- times


def test_a_message_that_wants_to_wait_for_long_is_not_held_and_its_sender_is_told(
    push, kept, control, celery_producer
):
    task_id = str(uuid.uuid4())
    push(envelope(headers={"id": task_id, "eta": "9999-12-31T23:59:59.999999+00:00"}))
    assert "eta" in kept()["why"]
    with pytest.raises(Exception, match="publish the message when it is time"):
        celery_producer.AsyncResult(task_id).get(timeout=PATIENCE_S)
    assert control.calls("cancel") == []


@pytest.mark.parametrize(
    "eta", ["0001-01-01T00:00:00", "1970-01-01T00:00:00+23:59", "2020-02-29T00:00:00Z"], ids=str
)
def test_a_message_whose_time_was_long_ago_is_served_at_once(push, control, client, order_id, eta):
    control.place(order_id)
    push(envelope([[], {"order_id": order_id}, {}], headers={"eta": eta}))
    wait_until(lambda: client.status(order_id).result, within_s=PATIENCE_S, what="the record")
    assert control.order(order_id)["status"] == "canceled"


def test_a_message_that_is_due_soon_is_served_then(push, control, celery_producer, order_id):
    control.place(order_id)
    asked = time.monotonic()
    sent = celery_producer.send_task(
        "cancel_order", kwargs={"order_id": order_id}, queue="cancels", countdown=0.5
    )
    assert sent.get(timeout=PATIENCE_S)["outcome"] == "canceled"
    assert time.monotonic() - asked >= 0.5


def test_a_message_that_has_expired_is_not_served_and_its_sender_is_told(
    worker, control, celery_producer, order_id
):
    control.place(order_id)
    sent = celery_producer.send_task(
        "cancel_order", kwargs={"order_id": order_id}, queue="cancels", expires=-1
    )
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=PATIENCE_S)
    assert control.order(order_id)["status"] == "resting"


BAD_DEADLINES = [
    b"-1",
    b"0",
    b"-0.0",
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e400",
    b"1e18",
    b"true",
    b'"5"',
    b"[5]",
]


@pytest.mark.parametrize("deadline", BAD_DEADLINES, ids=bytes.decode)
def test_a_deadline_that_cannot_be_meant_is_refused_by_name(
    push, control, celery_producer, order_id, deadline
):
    control.place(order_id)
    task_id = str(uuid.uuid4())
    body = b'[[], {"order_id": "%s", "deadline_s": %s}, {}]' % (order_id.encode(), deadline)
    push(envelope(body=body, headers={"id": task_id}))
    value = celery_producer.AsyncResult(task_id).get(timeout=PATIENCE_S)
    assert (value["outcome"], value["error"]["code"]) == ("refused", "invalid_request")
    assert "deadline_s" in value["error"]["message"]
    assert control.order(order_id)["status"] == "resting"


# -- what a call says


UGLY_IDS = {
    "empty": "",
    "a blank": " ",
    "a dot": ".",
    "two dots": "..",
    "a path": "../../portfolio/orders",
    "an encoded path": "%2e%2e%2f",
    "a query": "x?subaccount=1",
    "a fragment": "x#y",
    "a header": "x\r\nX-Evil: 1",
    "a NUL": "x\0y",
    "too long": "x" * 129,
    "far too long": "x" * 2_000_000,
    "other digits": "\u0661\u0662\u0663",
    "an accent": "re\u0301sume\u0301",
    "a lone surrogate": SURROGATE,
    "from right to left": "\u202egnp.exe",
    "a script": "'; redis.call('FLUSHALL') --",
    "a key of the store": "x}:pending:{y",
    "null": None,
    "a number": 7,
    "a fraction": 1.5,
    "true": True,
    "a list": ["x"],
    "an object": {"id": "x"},
    "bytes": {"__type__": "bytes", "__value__": "x"},
    "a uuid": {"__type__": "uuid", "__value__": {"hex": uuid.uuid4().hex}},
    "a decimal": {"__type__": "decimal", "__value__": "1e999999"},
    "a moment": {"__type__": "datetime", "__value__": "2026-01-01T00:00:00"},
}


@pytest.mark.parametrize("ugly", UGLY_IDS.values(), ids=UGLY_IDS)
def test_an_order_id_that_cannot_be_one_is_refused_and_nothing_is_sent(push, control, celery_producer, ugly):
    task_id = str(uuid.uuid4())
    push(envelope([[], {"order_id": ugly}, {}], headers={"id": task_id}))
    value = celery_producer.AsyncResult(task_id).get(timeout=PATIENCE_S)
    assert (value["outcome"], value["error"]["code"]) == ("refused", "invalid_request")
    assert "order_id" in value["error"]["message"]
    assert len(value["error"]["message"]) < 500
    assert about_orders(control) == []


def test_ugly_ids_in_a_list_are_refused_one_by_one_and_the_good_one_goes_through(
    push, control, celery_producer, order_id
):
    control.place(order_id)
    task_id = str(uuid.uuid4())
    orders = [*UGLY_IDS.values(), order_id]
    push(envelope([[orders], {}, {}], headers={"task": "cancel_orders", "id": task_id}))
    good, *bad = celery_producer.AsyncResult(task_id).get(timeout=PATIENCE_S)
    assert (good["order_id"], good["outcome"]) == (order_id, "canceled")
    assert [value["outcome"] for value in bad] == ["refused"] * len(UGLY_IDS)


WRONG = {
    "a list": [],
    "an object": {},
    "true": True,
    "far too large": 1e300,
    "a lone surrogate": SURROGATE,
    "a terminal's command": "\x1b[2J",
    "a megabyte": "x" * 1_000_000,
}


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("task", ["cancel_order", "cancel_orders", "mass_cancel"])
def test_wrong_types_in_every_field_are_refused_by_name(
    push, control, celery_producer, order_id, *, task, value
):
    task_id = str(uuid.uuid4())
    names = ["market_ticker", "exchange_index", "requested_by", "subaccount", "reason", "deadline_s"]
    if task == "mass_cancel":
        names = ["scope", "request_id", "requested_by", "reason", "automated", "dry_run", "deadline_s"]
    wrong = dict.fromkeys(names, value)
    if task == "cancel_order":
        wrong |= {"order_id": order_id}
    if task == "cancel_orders":
        wrong = {"orders": [{"order_id": order_id, **wrong}, value, {str(value): value}]}
    push(envelope([[], wrong, {}], headers={"task": task, "id": task_id}))
    answer = celery_producer.AsyncResult(task_id).get(timeout=PATIENCE_S)
    text = json.dumps(answer)
    assert "canceled" not in text
    assert all(name in text for name in (names[0], names[2]))
    assert control.calls("cancel") == control.calls("batch") == control.calls("cancel_all") == []


@pytest.mark.parametrize("task", ["cancel_order", "cancel_orders", "mass_cancel"])
@pytest.mark.parametrize(
    "call", [[[1, 2, 3], {}], [[[]], {"orders": 1}], [[], {"self": 1}], [[None], {"": 1}]], ids=str
)
def test_arguments_that_do_not_fit_are_answered_with_an_error(push, control, celery_producer, task, call):
    task_id = str(uuid.uuid4())
    push(envelope([*call, {}], headers={"task": task, "id": task_id}))
    try:
        answer = celery_producer.AsyncResult(task_id).get(timeout=PATIENCE_S)
    except TypeError:
        return
    assert "error" in json.dumps(answer)


def test_a_bell_with_arguments_is_a_bell(push, stack):
    push(envelope([["x"], {"x\n[forged": SURROGATE}, {}], headers={"task": "wake_up"}))
    with stack.redis.client() as server:
        wait_until(
            lambda: server.llen("cancels") == 0 == server.hlen("kalshi-cancel:taken"), what="it is done"
        )
    assert "\n[forged" not in stack.workers[0].log_text()


def test_a_hundred_thousand_unknown_fields_are_refused_in_few_words(push, control, celery_producer, order_id):
    task_id = str(uuid.uuid4())
    fields = {f"field {n}": n for n in range(100_000)}
    push(envelope([[], {"order_id": order_id, **fields}, {}], headers={"id": task_id}))
    value = celery_producer.AsyncResult(task_id).get(timeout=PATIENCE_S)
    assert "field 0" in value["error"]["message"]
    assert len(value["error"]["message"]) < 5_000


def test_fields_nested_as_deep_as_json_allows_are_refused_by_name(push, control, celery_producer, order_id):
    task_id = str(uuid.uuid4())
    body = b'[[], {"order_id": "%s", "reason": %s}, {}]' % (order_id.encode(), nested(900))
    push(envelope(body=body, headers={"id": task_id}))
    value = celery_producer.AsyncResult(task_id).get(timeout=PATIENCE_S)
    assert "reason" in value["error"]["message"]


def test_ten_thousand_ids_in_one_message_are_all_answered_and_delay_nobody(
    worker, control, client, celery_producer
):
    order_ids = [str(uuid.uuid4()) for _ in range(10_000)]
    control.place_many([{"order_id": order_id} for order_id in order_ids])
    sent = celery_producer.send_task("cancel_orders", args=[order_ids], queue="cancels")
    wait_until(lambda: control.calls("batch"), within_s=PATIENCE_S, what="the first of them are sent")
    risk = str(uuid.uuid4())
    control.place(risk)
    asked = time.monotonic()
    assert client.cancel(risk, lane=Lane.RISK).result(timeout=PATIENCE_S).outcome == "canceled"
    assert time.monotonic() - asked <= PROMPT_S
    values = sent.get(timeout=60)
    assert [value["order_id"] for value in values] == order_ids
    assert {value["outcome"] for value in values} == {"canceled"}


def test_three_thousand_ugly_ids_in_one_message_delay_nobody(worker, control, client, celery_producer):
    ugly = [f"{n}/.." for n in range(3_000)]
    sent = celery_producer.send_task("cancel_orders", args=[ugly], queue="cancels")
    serves(control, client)
    values = sent.get(timeout=60)
    assert [value["order_id"] for value in values] == ugly
    assert {value["outcome"] for value in values} == {"refused"}


def test_one_id_ten_thousand_times_is_one_cancel(worker, control, celery_producer, order_id):
    control.place(order_id)
    sent = celery_producer.send_task("cancel_orders", args=[[order_id] * 10_000], queue="cancels")
    [value] = sent.get(timeout=PATIENCE_S)
    assert value["outcome"] == "canceled"
    assert len(control.calls(order_id=order_id)) == 1


# -- what a producer may not decide


@pytest.mark.parametrize("info", [{"exchange": "risk", "routing_key": "risk"}, {"exchange": 7}, {}], ids=str)
def test_the_lane_is_told_by_the_queue_and_not_by_the_message(push, control, client, order_id, info):
    control.place(order_id)
    control.configure(exchange_paused=True)
    push(envelope([[], {"order_id": order_id}, {}], properties={"delivery_info": info}))
    opened = wait_until(lambda: client.status(order_id).open, within_s=PATIENCE_S, what="the entry")
    assert opened.lane is Lane.STRATEGY
    control.configure(exchange_paused=False)
    wait_until(lambda: client.status(order_id).result, within_s=PATIENCE_S, what="the record")


@pytest.mark.parametrize("priority", [0, 3, 9, 255, -1])
def test_a_priority_of_the_producers_own_is_served(worker, control, celery_producer, order_id, priority):
    control.place(order_id)
    sent = celery_producer.send_task(
        "cancel_order", kwargs={"order_id": order_id}, queue="cancels", priority=priority
    )
    assert sent.get(timeout=PATIENCE_S)["outcome"] == "canceled"


def test_a_forged_sign_that_an_order_is_in_the_store_invents_nothing(push, control, client, order_id):
    control.place(order_id)
    push(envelope([[], {"order_id": order_id}, {}], headers={"kalshi_entered": 1, "ignore_result": True}))
    serves(control, client)  # which was pushed later
    assert client.status(order_id).result is None
    assert control.calls(order_id=order_id) == []


def test_a_forged_sign_that_an_order_is_in_the_store_leaves_no_waiter_without_an_answer(
    push, control, celery_producer, order_id
):
    control.place(order_id)
    task_id = str(uuid.uuid4())
    push(envelope([[], {"order_id": order_id}, {}], headers={"kalshi_entered": 1, "id": task_id}))
    assert celery_producer.AsyncResult(task_id).get(timeout=PATIENCE_S)["outcome"] == "canceled"


# -- a hundred at once


def test_a_burst_of_everything_ends_nothing_and_loses_nothing(push, stack, control, client, kept):
    order_ids = [str(uuid.uuid4()) for _ in range(20)]
    control.place_many([{"order_id": order_id} for order_id in order_ids])
    hostile = [*NO_MESSAGES.values(), *BAD_ENVELOPES.values()]
    asked = time.monotonic()
    for number, item in enumerate(hostile):
        push(item)
        if number < len(order_ids):
            push(envelope([[], {"order_id": order_ids[number]}, {}]))
    found = list(client.results(order_ids, timeout=PATIENCE_S))
    assert {result.outcome for result in found} == {"canceled"}
    assert len(found) == len(order_ids)
    assert time.monotonic() - asked <= PATIENCE_S
    with stack.redis.client() as server:
        wait_until(
            lambda: server.hlen("kalshi-cancel:taken") == 0,
            within_s=PATIENCE_S,
            what="nothing is left unacknowledged",
        )
