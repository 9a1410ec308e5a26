"""Messages as Celery makes them, and such as nobody can use."""

from __future__ import annotations

import base64
import json
import pickle
import uuid

SURROGATE = "\ud800"


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
