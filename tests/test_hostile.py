"""What strangers may push into the queues and what a hostile exchange may answer: the worker goes on.

Everything runs through a real worker. After each piece of hostility the same process has to settle a fresh
order promptly; what could not be understood is kept and logged, and whoever waits for it is told.
"""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import time
import uuid
from pathlib import Path

import pytest
from celery.exceptions import NotRegistered, TaskRevokedError
from crew import about_orders

from kalshi_cancel.model.requests import Lane
from trials.stack import wait_until

PATIENCE_S = 20.0
PROMPT_S = 3.0  # for a fresh order while or after something hostile is dealt with
KEPT = "kalshi-cancel:unreadable"
SURROGATE = "\ud800"


@pytest.fixture
def worker(stack, control, client):
    """The session's worker; it is the same process at the end, and serves."""
    worker = stack.workers[0]
    yield worker
    assert worker.process.poll() is None, worker.log_text()[-3000:]
    serves(control, client)


def serves(control, client, *, within_s=PROMPT_S):
    """A fresh order is settled promptly."""
    order_id = str(uuid.uuid4())
    control.place(order_id)
    asked = time.monotonic()
    assert client.cancel(order_id).result(timeout=PATIENCE_S).outcome == "canceled"
    assert time.monotonic() - asked <= within_s


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


def envelope(call=None, *, body=None, headers=None, properties=None, **changes):
    """A message as Celery makes it (protocol 2) with changes; None for a field leaves it out."""
    task_id = str(uuid.uuid4())
    call = [[], {"order_id": str(uuid.uuid4())}, {}] if call is None else call
    raw = json.dumps(call).encode() if body is None else body
    made = {
        "body": base64.b64encode(raw).decode() if isinstance(raw, bytes) else raw,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": "cancel_order", "id": task_id, **(headers or {})},
        "properties": {
            "correlation_id": task_id,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "cancels"},
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
            **(properties or {}),
        },
        **changes,
    }
    for part in (made, made["headers"], made["properties"]):
        if isinstance(part, dict):
            for name in [name for name, value in part.items() if value is None]:
                del part[name]
    return made


def nested(levels):
    return b"[" * levels + b"]" * levels


# -- what is no message at all


NO_MESSAGES = {
    "nothing": b"",
    "text": b"cancel everything, please",
    "bytes that are no text": bytes(range(256)),
    "a pickle": pickle.dumps({"order_id": "x"}),
    "yaml": b"!!python/object/apply:os.system ['true']",
    "null": b"null",
    "a number": b"1e999",
    "NaN": b"NaN",
    "a list": b"[]",
    "an object": b"{}",
    "half an envelope": json.dumps(envelope()).encode()[:200],
    "an envelope in UTF-16": json.dumps(envelope()).encode("utf-16"),
    "an envelope in a text": json.dumps(json.dumps(envelope())).encode(),
    "two megabytes": b"x" * 2_000_000,
    "two megabytes of JSON": b"[" + b"0," * 1_000_000 + b"0]",
    "ten thousand levels": nested(10_000),
    "ten thousand levels, never closed": b'{"a":' * 10_000,
}


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


BAD_ENVELOPES = {
    "no body": envelope(body=None) | {"body": None},
    "a body that is a number": envelope() | {"body": 7},
    "a body that is not in base64": envelope() | {"body": "%%%"},
    "a body in base64 without its end": envelope() | {"body": "QUJ"},
    "a body that is no JSON": envelope(body=b"order_id=1"),
    "a body that is no text": envelope(body=b"\xff\xfe\x00"),
    "a body of ten thousand levels": envelope(body=nested(10_000)),
    "arguments of ten thousand levels": envelope(
        body=b"[[], {" + b'"a": {' * 10_000 + b"}" * 10_000 + b"}, {}]"
    ),
    "a number with ten thousand digits": envelope(body=b'[[], {"order_id": ' + b"9" * 10_000 + b"}, {}]"),
    "a body that is no triple": envelope([]),
    "a body that is a text": envelope("abc"),
    "arguments that are none": envelope([{}, [], {}]),
    "keywords that are a text": envelope([[], "order_id", {}]),
    "callbacks that are a list": envelope([[], {}, []]),
    "an unknown encoding of the body": envelope(properties={"body_encoding": "rot13"}),
    "an unknown encoding of the content": envelope(**{"content-encoding": "klingon"}),
    "an encoding that is none": envelope(**{"content-encoding": "base64"}),
    "compressed content that is none": envelope(headers={"compression": "application/x-gzip"}),
    "an unknown compression": envelope(headers={"compression": "rar"}),
    "no properties": envelope() | {"properties": None},
    "properties that are a list": envelope() | {"properties": []},
    "no delivery tag": envelope(properties={"delivery_tag": None}),
    "a delivery tag that is a list": envelope(properties={"delivery_tag": []}),
    "a delivery tag that is no text": envelope(properties={"delivery_tag": SURROGATE}),
    "no delivery information": envelope(properties={"delivery_info": None}),
    "delivery information that is a text": envelope(properties={"delivery_info": "cancels"}),
    "headers that are a list": envelope() | {"headers": []},
    "no headers": envelope() | {"headers": None},
    "no task id": envelope(headers={"id": None}),
    "a task id that is a number": envelope(headers={"id": 7}),
    "a task id that is a list": envelope(headers={"id": []}),
    "a task id that is no text": envelope(headers={"id": SURROGATE}),
    "a task id of a megabyte": envelope(headers={"id": "i" * 1_000_000}),
    "a task id that forges a line of the log": envelope(
        headers={"id": "x] received\n[1970-01-01: INFO] canceled"}
    ),
    "a name to show that commands a terminal": envelope(headers={"shadow": "\x1b[2J"}),
    "a task's name that is a list": envelope(headers={"task": ["cancel_order"]}),
    "a time limit that is a text": envelope(headers={"timelimit": "soon"}),
    "time limits that are texts": envelope(headers={"timelimit": ["a", "b"]}),
    "retries that are a text": envelope(headers={"retries": "many"}),
    "an eta that is no time": envelope(headers={"eta": "tomorrow"}),
    "an eta that is a number": envelope(headers={"eta": 1e300}),
    "an eta in the year nought": envelope(headers={"eta": "0000-00-00T00:00:00"}),
    "an expiry that is a list": envelope(headers={"expires": []}),
    "an older message without an id": envelope({"task": "cancel_order", "kwargs": {}}) | {"headers": {}},
    "an older message whose keywords are a list": envelope({"task": "cancel_order", "id": "x", "kwargs": []})
    | {"headers": {}},
}


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


STATUSES = [
    200,
    201,
    202,
    204,
    206,
    226,
    299,
    300,
    304,
    305,
    306,
    308,
    399,
    402,
    405,
    406,
    407,
    408,
    410,
    411,
]
STATUSES += [
    412,
    413,
    414,
    415,
    416,
    417,
    418,
    421,
    422,
    423,
    424,
    425,
    426,
    428,
    431,
    451,
    499,
    501,
    505,
    507,
]
STATUSES += [508, 510, 511, 520, 522, 529, 530, 598, 599]
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
