"""The door of the queues: what is popped is checked before Celery's loop sees it.

Celery ends the worker over an envelope it does not expect, and the message is then restored for the next
worker to die of. So a popped item that is no proper envelope is put into one that the consumer knows how to
keep: its content type says "unreadable", its body is the item.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport.redis import Channel, Transport

UNREADABLE = "application/x-unreadable"


class CheckedChannel(Channel):
    """A channel that hands on only envelopes that can be opened."""

    def _create_client(self, *args: Any, **kwargs: Any) -> Any:
        client = super()._create_client(*args, **kwargs)  # type: ignore[no-untyped-call]  # kombu ships no types
        client.set_response_callback("BRPOP", _check_popped)
        return client


class CheckedTransport(Transport):
    """The Redis transport of this project's workers."""

    Channel = CheckedChannel


def use_checked_transport() -> None:
    """Has this process' connections to redis:// and rediss:// brokers go through the checked transport."""
    for alias in ("redis", "rediss", "redis+socket"):
        if alias in TRANSPORT_ALIASES:
            TRANSPORT_ALIASES[alias] = f"{__name__}:{CheckedTransport.__name__}"


def _check_popped(answer: Any, **_options: Any) -> tuple[bytes, bytes] | None:
    """What BRPOP brought, (queue, item), with an item that is no proper envelope wrapped into one."""
    if not answer:
        return None
    queue, item = answer
    return queue, item if is_envelope(item) else _wrapped(queue, item)


def _wrapped(queue: bytes, item: bytes) -> bytes:
    envelope = {
        "body": base64.b64encode(item).decode(),
        "content-type": UNREADABLE,
        "content-encoding": "binary",
        "headers": {},
        "properties": {
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue.decode("utf-8", "replace")},
        },
    }
    return json.dumps(envelope).encode()


def is_envelope(item: bytes) -> bool:
    """Whether Celery can open the envelope (message protocol 2 or 1) and find a call in it."""
    try:
        envelope = json.loads(item)
        properties, headers = envelope["properties"], envelope["headers"]
        info = properties["delivery_info"]
        body = envelope["body"]
        if properties.get("body_encoding") == "base64":
            body = base64.b64decode(body, validate=True)
        call = json.loads(body)
        return (
            isinstance(info["exchange"], str)
            and isinstance(info["routing_key"], str)
            and isinstance(properties["delivery_tag"], str | int)
            and envelope["content-type"] == "application/json"
            and isinstance(envelope["content-encoding"], str)
            and isinstance(headers, dict)
            and (_is_call_2(headers, call) if "task" in headers else _is_call_1(call))
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return False


def _is_call_2(headers: Mapping[str, Any], call: Any) -> bool:
    args, kwargs, embed = call
    return (
        isinstance(args, list)
        and isinstance(kwargs, dict)
        and isinstance(embed, dict | None)
        and _is_call(headers)
    )


def _is_call_1(call: Any) -> bool:
    return (
        isinstance(call.get("args", []), list) and isinstance(call.get("kwargs", {}), dict) and _is_call(call)
    )


def _is_call(call: Mapping[str, Any]) -> bool:
    """Whether the fields that Celery itself acts on are of the kinds that it expects."""
    limits = call.get("timelimit")
    return (
        isinstance(call["task"], str)
        and isinstance(call["id"], str)
        and isinstance(call.get("retries"), int | None)
        and (limits is None or (isinstance(limits, list) and len(limits) == 2))  # noqa: PLR2004 - a soft and a hard one
        and _is_moment(call.get("eta"))
        and _is_moment(call.get("expires"))
    )


def _is_moment(value: Any) -> bool:
    return value is None or bool(datetime.fromisoformat(value))
