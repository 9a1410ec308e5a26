"""The door of the queues: what is taken is checked before Celery's loop sees it.

Celery ends the worker over an envelope it does not expect, and the message is then restored for the next
worker to die of. So an item that is no proper envelope is put into one that the consumer knows how to
keep: its content type says "unreadable", its body is the item. And what only a stranger would write into a
proper one is taken out: which queue it came from and what may be stored where is not the sender's to say.
"""

from __future__ import annotations

import base64
import json
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kombu.utils.json import dumps, loads

from worker.broker.links import ID_MAX_CHARS, LINKS_HEADER, take_out

UNREADABLE = "application/x-unreadable"
# Of the header that says what is wrong with an unreadable item.
WHY_HEADER = "why"
# Ids of results that only the store writes; a message under one gets an id of its own, and no result there.
RESERVED_IDS = ("cancel:", "mass:", "list:")
# A message that is held back for longer is delivered again and again meanwhile (visibility_timeout), and is
# not in the store: nobody sees it, and nobody takes over.
ETA_MOST_S = 30.0


_notice: list[Callable[[], None]] = []


def notice_waits(notice: Callable[[], None]) -> None:
    """Has the main thread call ``notice`` before each wait for an answer of Redis, which its timeout ends."""
    _notice[:] = [notice]


def noticed(connection_class: Any) -> Any:
    """The class, with that notice."""

    class Connection(connection_class):  # type: ignore[misc]  # whichever the URL asks for
        def read_response(self, *args: Any, **kwargs: Any) -> Any:
            for notice in _notice:
                if threading.current_thread() is threading.main_thread():
                    notice()
            return super().read_response(*args, **kwargs)

    return Connection


def checked(item: bytes, queue: str) -> bytes:
    """The item if Celery can open it (message protocol 2 or 1), tamed if need be; else wrapped up."""
    try:
        envelope = _read(item)
        call = _call_in(envelope)
        _check_call(envelope["headers"] if "task" in envelope["headers"] else call)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it must not reach Celery's loop
        return _wrapped(item, queue, error)
    return _tamed(envelope, call, queue) or item


@dataclass(frozen=True, slots=True)
class PlainCall:
    """What a message asks for, when it asks for nothing that only Celery can do (a time, an end)."""

    task: str
    task_id: str
    args: list[Any]
    kwargs: dict[str, Any]
    headers: dict[str, Any]


def plain_call(item: bytes, queue: str) -> PlainCall | None:
    """The call in an item of a queue; None when that is for Celery to handle, or cannot be opened."""
    try:
        envelope = _read(checked(item, queue))
        call, headers = _call_in(envelope), envelope["headers"]
        if headers.get("eta") or headers.get("expires") or LINKS_HEADER in headers:
            return None
        args, kwargs, _embed = call
        return PlainCall(headers["task"], headers["id"], args, kwargs, headers)
    except Exception:  # noqa: BLE001 - Celery's side keeps what is wrong with it
        return None


def _read(text: bytes) -> Any:
    """JSON as Celery will read it: UTF-8 only, and what stands for a time or a Decimal is made into one."""
    return loads(text.decode("utf-8"))


class _Unusable(ValueError):  # noqa: N818 - said of the message
    """A part of a message that is not what it has to be."""


def _require(ok: object, what: str) -> None:
    if not ok:
        raise _Unusable(what)


def _call_in(envelope: dict[str, Any]) -> Any:
    """The call in an envelope; raises whatever fits when there is none, or the envelope is odd."""
    properties, headers = envelope["properties"], envelope["headers"]
    info, tag = properties["delivery_info"], properties["delivery_tag"]
    _require(isinstance(info, dict), "delivery_info is no object")
    _require(_is_key(tag), "the delivery tag is no short text")
    _require(isinstance(headers, dict), "the headers are no object")
    _require("compression" not in headers, "compressed content is not accepted")
    _require(envelope["content-type"] == "application/json", "the content is not declared as JSON")
    _require(envelope["content-encoding"] in ("utf-8", "UTF-8"), "the content is not declared as UTF-8")
    encoding = properties.get("body_encoding")
    _require(encoding in (None, "base64", "utf-8"), "the encoding of the body is not known")
    body = envelope["body"]
    call = _read(base64.b64decode(body, validate=True) if encoding == "base64" else body.encode())
    if "task" in headers:
        args, kwargs, embed = call
        _require(isinstance(embed, dict | None), "what goes with the call is no object")
    else:
        args, kwargs = call.get("args", []), call.get("kwargs", {})
    _require(isinstance(args, list), "the arguments are no list")
    _require(isinstance(kwargs, dict), "the keyword arguments are no object")
    return call


def _check_call(call: Mapping[str, Any]) -> None:
    """Raises whatever fits unless the fields that Celery itself acts on are of the kinds it expects."""
    limits = call.get("timelimit")
    _require(_is_key(call["task"]), "the task's name is no short text")
    _require(_is_key(call["id"]), "the task's id is no short text")
    _require(call.get("shadow") is None or _is_key(call["shadow"]), "the name to show is no short text")
    _require(isinstance(call.get("retries"), int | None), "retries is no number")
    _require(
        limits is None
        or (
            isinstance(limits, list)
            and len(limits) == 2  # noqa: PLR2004 - a soft and a hard one
            and all(isinstance(each, float | int | None) for each in limits)
        ),
        "timelimit is no pair of numbers",
    )
    _moment(call.get("expires"))
    eta = _moment(call.get("eta"))
    _require(
        eta is None or (eta - datetime.now(UTC)).total_seconds() <= ETA_MOST_S,
        f"an eta of more than {ETA_MOST_S:g} s is not accepted: publish the message when it is time",
    )


def _is_key(value: object) -> bool:
    """Whether it is text that can be part of a key in Redis and of a line in a log."""
    return isinstance(value, str) and 0 < len(value) <= ID_MAX_CHARS and value.isprintable()


def _moment(value: Any) -> datetime | None:
    if value is None:
        return None
    moment = datetime.fromisoformat(value)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _tamed(envelope: dict[str, Any], call: Any, queue: str) -> bytes | None:
    """The envelope without what is not the sender's to say; None when there is nothing of the kind."""
    properties, headers = envelope["properties"], envelope["headers"]
    info = properties["delivery_info"]
    fields, embed = (headers, call[2]) if "task" in headers else (call, call)
    tamed = False
    if info.get("routing_key") != queue or info.get("exchange") not in ("", queue):
        # The lane is told by the queue, and a message that is restored goes back to where it was.
        properties["delivery_info"] = {**info, "exchange": "", "routing_key": queue}
        tamed = True
    if fields["id"].startswith(RESERVED_IDS):
        fields["id"] = str(uuid.uuid4())
        tamed = True
    tamed = headers.pop(LINKS_HEADER, None) is not None or tamed
    if links := take_out(embed):
        headers[LINKS_HEADER] = links  # the task refuses it
        tamed = True
    kwargs = call[1] if "task" in headers else call.get("kwargs", {})
    if "self" in kwargs:
        # Celery itself calls tasks with a `self`, and would raise; under another name the task refuses it.
        kwargs["self (field)"] = kwargs.pop("self")
        tamed = True
    if not tamed:
        return None
    envelope["body"], properties["body_encoding"] = base64.b64encode(dumps(call).encode()).decode(), "base64"
    text: str = dumps(envelope)
    return text.encode()


def _wrapped(item: bytes, queue: str, error: Exception) -> bytes:
    why = str(error) if isinstance(error, ValueError) else repr(error)
    headers = {WHY_HEADER: ascii(why)[1:-1][:200]}
    waiter = _waiting_task(item)
    if waiter:
        headers["id"] = waiter
    envelope = {
        "body": base64.b64encode(item).decode(),
        "content-type": UNREADABLE,
        "content-encoding": "binary",
        "headers": headers,
        "properties": {
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
        },
    }
    return json.dumps(envelope).encode()


def _waiting_task(item: bytes) -> str:
    """The task id under which somebody may wait for a result of an item that cannot be used; or none."""
    try:
        task_id = _read(item)["headers"]["id"]
        return task_id if _is_key(task_id) and not task_id.startswith(RESERVED_IDS) else ""
    except Exception:  # noqa: BLE001 - see above
        return ""
