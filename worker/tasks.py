"""The queue's surface: messages in, results out.

A message from our own producers only wakes a worker up: its order is in the book already. A raw message,
from anybody who speaks Celery, is entered into the book first, and its own task id gets the result too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from celery import Task
from celery.exceptions import Ignore, Reject

from worker.app import app
from worker.bells import ENTERED_HEADER, TRACE_HEADER, ring_for
from worker.book import Accepted
from worker.logs import about
from worker.mass_request import MassRequest
from worker.office import desk, intake, mass_runner
from worker.orders import (
    ORDER_ID_MAX_CHARS,
    BadRequest,
    CancelRequest,
    CancelResult,
    Lane,
    Outcome,
    Problem,
    is_order_id,
    is_traceparent,
    utc_text,
)
from worker.scripts import BookError

log = logging.getLogger(__name__)

_Parsed = TypeVar("_Parsed", CancelRequest | CancelResult, MassRequest)


@app.task(bind=True, name="cancel_order")
def cancel_order(self: Task, /, *args: Any, **fields: Any) -> dict[str, Any] | None:
    """Cancels one order; fields as in CancelRequest. The value is the order's result."""
    if _entered(self):
        desk().work()
        return None  # (not Ignore: Celery would write a traceback, and nobody wants this message's result)
    parsed = _traced(self, _parse(_one_message(args, fields)))
    if isinstance(parsed, CancelResult):
        return _refused(parsed, _lane(self))
    reply_to = "" if self.request.ignore_result else self.request.id
    accepted = _accept([parsed], _lane(self), reply_to=[reply_to])
    intake().take_in(_lane(self))  # where one comes raw, more may be waiting
    if parsed.order_id in accepted.settled:
        return accepted.settled[parsed.order_id].to_json()
    if not accepted.heard:
        desk().work()
    raise Ignore  # the book stores the result under this task's id when the order is settled


@app.task(bind=True, name="cancel_orders")
def cancel_orders(self: Task, /, *args: Any, **fields: Any) -> None:
    """Cancels a list of orders; the value has one result for each, in the order they are first named."""
    parsed = [_traced(self, _parse(message)) for message in _many_messages(args, fields)]
    requests = {each.order_id: each for each in reversed(parsed) if isinstance(each, CancelRequest)}
    ids = list(dict.fromkeys(each.order_id for each in parsed if isinstance(each, CancelRequest)))
    lane = _lane(self)
    accepted = _accept([requests[order_id] for order_id in ids], lane)
    fresh = [requests[order_id] for order_id in ids if order_id not in accepted.settled]
    if not accepted.heard:
        ring_for(app, lane, fresh, waiting=accepted.waiting_messages)
    try:
        refused = [_refused(each, lane) for each in parsed if isinstance(each, CancelResult)]
        if not self.request.ignore_result:
            desk().reply_when_settled(self.request.id, ids, refused)
    except BookError as error:
        raise Reject(str(error), requeue=True) from None  # accepting again changes nothing
    desk().work()
    raise Ignore  # the sweep stores the list under this task's id when all orders are settled


@app.task(bind=True, name="mass_cancel")
def mass_cancel(self: Task, /, *args: Any, **fields: Any) -> dict[str, Any] | None:
    """Cancels everything in a scope; fields as in MassRequest.parse. The value is the report."""
    if _entered(self):
        mass_runner().look()
        return None
    if args:
        fields["positional arguments"] = list(args)
    try:
        request = _traced(self, MassRequest.parse({"request_id": self.request.id, **fields}))
        mass_runner().enter(request, reply_to="" if self.request.ignore_result else self.request.id)
    except BadRequest as bad:
        given = fields.get("request_id")
        known_by = given if is_order_id(given) else self.request.id
        told = about(Lane.RISK, known_by, None, code="invalid_request")
        log.warning("mass cancel refused: %s", bad, extra=told)
        return {"request_id": given, "flat": False, "error": str(bad)}
    except BookError as error:
        raise Reject(str(error), requeue=True) from None
    raise Ignore  # the runner stores the report under this task's id when it is done


@app.task(name="wake_up")
def wake_up(*_args: Any, **_fields: Any) -> None:
    """Works on what is due; published by the sweep when nobody else is coming. Takes no notice of fields."""
    desk().work()


def _accept(requests: Sequence[CancelRequest], lane: Lane, *, reply_to: Sequence[str] = ()) -> Accepted:
    try:
        return desk().accept(requests, lane=lane, reply_to=reply_to)
    except BookError as error:
        raise Reject(str(error), requeue=True) from None  # not ours yet: the message must not be lost


def _entered(task: Task) -> bool:
    """Whether it is one of our bells; those want no result, and a stranger that does is to get one."""
    return bool(task.request.get(ENTERED_HEADER) and task.request.ignore_result)


def _lane(task: Task) -> Lane:
    return Lane.of_queue((task.request.delivery_info or {}).get("routing_key"))


def _one_message(args: tuple[Any, ...], fields: dict[str, Any]) -> object:
    """The message's fields; the order id alone may also come as the one positional argument."""
    if len(args) == 1 and "order_id" not in fields:
        return {"order_id": args[0], **fields}
    return {**fields, "positional arguments": list(args)} if args else fields


def _many_messages(args: tuple[Any, ...], fields: dict[str, Any]) -> list[object]:
    """The messages of ``orders``; what is none of that is one message that will be refused by name."""
    orders = args[0] if len(args) == 1 and not fields else fields.get("orders")
    if len(args) > 1 or set(fields) - {"orders"} or not isinstance(orders, list):
        return [{**fields, "orders": orders}]
    return [{"order_id": order} if isinstance(order, str) else order for order in orders]


def _parse(message: object) -> CancelRequest | CancelResult:
    """The request, or the refusal that answers a message which is none."""
    try:
        return CancelRequest.parse(message)
    except BadRequest as bad:
        now = utc_text(time.time())
        order_id = message.get("order_id") if isinstance(message, Mapping) else None
        return CancelResult(
            order_id=order_id if isinstance(order_id, str) else None,
            outcome=Outcome.REFUSED,
            requested_at=now,
            settled_at=now,
            error=Problem("invalid_request", str(bad)),
        )


def _traced(task: Task, parsed: _Parsed) -> _Parsed:
    """The request with the traceparent of its message's headers, unless it has one of its own."""
    if isinstance(parsed, CancelResult) or parsed.traceparent is not None:
        return parsed
    sent = task.request.get(TRACE_HEADER)
    return replace(parsed, traceparent=sent) if is_traceparent(sent) else parsed


def _refused(result: CancelResult, lane: Lane) -> dict[str, Any]:
    """The refusal as a value, stored for whoever waits for the order as well."""
    log.warning(
        "refused: %s",
        result.error and result.error.message,
        extra={
            "order_id": result.order_id and result.order_id[:ORDER_ID_MAX_CHARS],
            "lane": lane.value,
            "outcome": result.outcome.value,
            "attempts": 0,
            "code": result.error and result.error.code,
        },
    )
    desk().refuse(result)
    return result.to_json()
