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

from sandbox.stack import wait_until
from worker.orders import Lane

PATIENCE_S = 20.0
PROMPT_S = 2.0  # for a fresh order while or after something hostile is dealt with
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
                return [text for text in server.lrange(KEPT, 0, 5) if text not in before]

            [text] = wait_until(news, within_s=PATIENCE_S, what="the message is kept")
            assert text in worker.log_text()
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
    "content_type", ["application/x-python-serialize", "application/x-yaml", "application/data", "text/plain", ""]
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
    "arguments of ten thousand levels": envelope(body=b"[[], {" + b'"a": {' * 10_000 + b"}" * 10_000 + b"}, {}]"),
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


def test_a_message_that_unpacks_to_a_gigabyte_is_not_unpacked(push, kept, worker, control, client):
    serves(control, client)
    before = peak_memory_kb(worker)
    bomb = gzip.compress(b"[" + b" " * 1_000_000_000, 1)
    push(envelope(body=bomb, headers={"compression": "application/x-gzip"}, **{"content-encoding": "binary"}))
    kept()
    assert peak_memory_kb(worker) - before < 100_000


def peak_memory_kb(part):
    status = Path(f"/proc/{part.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])
