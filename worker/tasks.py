"""The queue's surface: messages in, results out.

A message from our own producers only wakes a worker up: its order is in the store already. A raw message,
from anybody who speaks Celery, is entered into the store first, and its own task id gets the result too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from celery import Task
from celery.exceptions import Ignore, InvalidTaskError, Reject

from kalshi_cancel.model.fields import ORDER_ID_MAX_CHARS, BadRequest, is_order_id, is_traceparent
from kalshi_cancel.model.mass_request import MassRequest
from kalshi_cancel.model.requests import CancelRequest, Lane
from kalshi_cancel.model.results import CancelResult, Outcome, Problem
from kalshi_cancel.store.scripts import StoreError, say_failed
from kalshi_cancel.telemetry.log_events import LogEvent
from kalshi_cancel.telemetry.logs import about, say
from kalshi_cancel.wake_ups import ENTERED_HEADER, TRACE_HEADER, wake_up_for
from worker.app import app
from worker.broker.guard import RESERVED_IDS
from worker.broker.links import LINKS_HEADER, Follower, followers, why_refused
from worker.runtime.context import dispatcher, entrance, intake, lists, mass_runner

log = logging.getLogger(__name__)

NOT_ENTERED = "not_entered"  # the code of what Redis does not take
_Done = TypeVar("_Done")
_Parsed = TypeVar("_Parsed", CancelRequest | CancelResult, MassRequest)


class CannotBeAnswered(Exception):  # noqa: N818 - what whoever waits is told
    """The orders of a list are worked on, but the list of their results cannot be given."""


@app.task(bind=True, name="cancel_order")
def cancel_order(self: Task, /, *args: Any, **fields: Any) -> dict[str, Any] | None:
    """Cancels one order; fields as in CancelRequest. The value is the order's result."""
    if _entered(self):
        dispatcher().work()
        return None  # (not Ignore: Celery would write a traceback, and nobody wants this message's result)
    with _set_aside_when_it_fails(self, args, fields):
        lane, message, why = _lane(self), _one_message(args, fields), _refused_links(self)
        parsed = _traced(self, _refusal(message, why) if why else _parse(message))
        if isinstance(parsed, CancelResult):
            return _refused(parsed, lane)
        reply_to = "" if self.request.ignore_result else self.request.id
        entered = _until_done(lambda: entrance().enter([parsed], lane=lane, reply_to=[reply_to]))
        for request, error in entered.refused:
            return _not_entered(self, request, error)
        intake().take_in(lane)  # where one comes raw, more may be waiting
    if parsed.order_id in entered.accepted.settled:
        return entered.accepted.settled[parsed.order_id].to_json()
    if not entered.accepted.listener_woken:
        dispatcher().work()
    raise Ignore  # the store keeps the result under this task's id when the order is settled


@app.task(bind=True, name="cancel_orders")
def cancel_orders(self: Task, /, *args: Any, **fields: Any) -> None:
    """Cancels a list of orders; the value has one result for each, in the order they are first named."""
    with _set_aside_when_it_fails(self, args, fields):
        lane, why = _lane(self), _refused_links(self)
        messages = _many_messages(args, fields)
        parsed = [_traced(self, _refusal(each, why) if why else _parse(each)) for each in messages]
        named = [each for each in parsed if isinstance(each, CancelRequest)]
        requests = list({each.order_id: each for each in reversed(named)}.values())[::-1]
        ids = list(dict.fromkeys(each.order_id for each in named))
        listed = _noted(self, ids)
        reply_to = [listed] * len(requests)
        entered = _until_done(lambda: entrance().enter(requests, lane=lane, reply_to=reply_to))
        bad = {request.order_id for request, _ in entered.refused}
        accepted = entered.accepted
        fresh = [each for each in requests if each.order_id not in {*accepted.settled, *bad}]
        if not accepted.listener_woken:
            wake_up_for(app, lane, fresh, waiting=accepted.waiting_messages)
        refused = [_refused(each, lane) for each in parsed if isinstance(each, CancelResult)]
        refused += [_not_entered(self, request, error) for request, error in entered.refused]
        if listed:  # (accepting again, should it come to that, changes nothing)
            wanted = [each for each in ids if each not in bad]
            with _list_may_fail(self, ids):
                _until_done(lambda: lists().close(self.request.id, wanted, refused, not_entered=bad))
    dispatcher().work()
    raise Ignore  # the sweeper stores the list under this task's id when all orders are settled


@app.task(bind=True, name="mass_cancel")
def mass_cancel(self: Task, /, *args: Any, **fields: Any) -> dict[str, Any] | None:
    """Cancels everything in a scope; fields as in MassRequest.parse. The value is the report."""
    if _entered(self):
        mass_runner().look()
        return None
    given = fields.get("request_id")
    known_by = given if is_order_id(given) else self.request.id
    told = about(Lane.RISK, known_by, None)
    asked = {"positional arguments": list(args), **fields} if args else fields
    try:
        with _set_aside_when_it_fails(self, args, fields):
            request = _traced(self, _mass_request(self, asked))
            reply_to = "" if self.request.ignore_result else self.request.id
            _until_done(lambda: mass_runner().enter(request, reply_to=reply_to))
    except BadRequest as bad:
        say(log, LogEvent.MESSAGE_REFUSED, **told, code="invalid_request", why=str(bad))
        return {"request_id": given, "flat": False, "error": str(bad)}
    except StoreError as error:
        say_failed(log, error, "accept a mass cancel", code=NOT_ENTERED, **told)
        _set_aside(self, str(error), kwargs=fields)
        return {"request_id": known_by, "flat": False, "error": f"not entered: {error}"}
    raise Ignore  # the runner stores the report under this task's id when it is done


@app.task(bind=True, name="wake_up")
def wake_up(self: Task, /, *_args: Any, **_fields: Any) -> None:
    """Works on what is due; published by the sweeper when nobody else is coming. Ignores fields."""
    if why := _refused_links(self):
        say(log, LogEvent.MESSAGE_REFUSED, why=why)
    dispatcher().work()


def _noted(task: Task, order_ids: Sequence[str]) -> str:
    """Under which name the list of these orders' results waits for each of them; empty: nobody wants it."""
    if not task.request.ignore_result:
        with _list_may_fail(task, order_ids):
            return _until_done(lambda: lists().note(task.request.id, order_ids))
    return ""


@contextmanager
def _list_may_fail(task: Task, order_ids: Sequence[str]) -> Iterator[None]:
    """Where Redis does not take a list, its waiter is told; the orders are worked on."""
    try:
        yield
    except StoreError as error:
        say_failed(log, error, "store a list of results", task_id=task.request.id)
        _set_aside(task, str(error), orders=order_ids)
        app.backend.mark_as_failure(task.request.id, CannotBeAnswered(str(error)))


def _until_done(ask: Callable[[], _Done]) -> _Done:
    """Does it, waiting out what can pass; a message that has waited for too long goes back to its queue."""
    try:
        return entrance().until_done(ask)
    except StoreError as error:
        if error.can_pass:
            raise Reject(str(error), requeue=True) from None  # not ours yet: it must not be lost
        raise


@contextmanager
def _set_aside_when_it_fails(task: Task, args: tuple[Any, ...], fields: Mapping[str, Any]) -> Iterator[None]:
    """Keeps the text of a message that fails for good; whoever waits for it is told by what is raised."""
    try:
        yield
    except (Reject, BadRequest, StoreError):  # these are answered
        raise
    except Exception as error:
        say(log, LogEvent.INTERNAL_ERROR, error=error, doing=f"handle {task.name}", task_id=task.request.id)
        _set_aside(task, str(error), args=args, kwargs=fields)
        raise


def _set_aside(task: Task, why: str, **message: Any) -> None:
    queue = (task.request.delivery_info or {}).get("routing_key")
    entrance().set_aside(why, task=task.name, task_id=task.request.id, queue=queue, **message)


def _not_entered(task: Task, request: CancelRequest, error: StoreError) -> dict[str, Any]:
    """The value that says that Redis does not take this request, which is kept as text."""
    now = entrance().now()
    perhaps = "; it may be accepted all the same" if error.may_be_accepted else ""
    result = CancelResult(
        order_id=request.order_id,
        # What may be accepted all the same is not known to rest without anybody at work on it.
        outcome=Outcome.UNRESOLVED if error.may_be_accepted else Outcome.REFUSED,
        requested_at=now,
        settled_at=None if error.may_be_accepted else now,
        error=Problem(NOT_ENTERED, f"{error}{perhaps}: ask again when that is mended"),
    )
    _set_aside(task, str(error), kwargs=request.fields())
    return _refused(result, _lane(task))


def _entered(task: Task) -> bool:
    """Whether it is one of our wake-ups; those want no result, and a stranger that does is to get one."""
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


def _mass_request(task: Task, asked: Mapping[str, Any]) -> MassRequest:
    if why := _refused_links(task):
        raise BadRequest({"message": why})
    return MassRequest.parse({"request_id": task.request.id, **asked}, now_s=mass_runner().now_s())


def _parse(message: object) -> CancelRequest | CancelResult:
    """The request, or the refusal that answers a message which is none."""
    try:
        return CancelRequest.parse(message)
    except BadRequest as bad:
        return _refusal(message, str(bad))


def _refusal(message: object, why: str) -> CancelResult:
    """The answer to a message that is not carried out."""
    now = entrance().now()
    order_id = message.get("order_id") if isinstance(message, Mapping) else None
    return CancelResult(
        order_id=order_id if isinstance(order_id, str) else None,
        outcome=Outcome.REFUSED,
        requested_at=now,
        settled_at=now,
        error=Problem("invalid_request", why),
    )


def _refused_links(task: Task) -> str:
    """Why a message is refused that wants something to follow it (empty: it does not).

    Whoever waits for what was to follow is told.
    """
    links = task.request.get(LINKS_HEADER)
    if not links:
        return ""
    why = why_refused(links)
    for each in followers(links):
        if not each.task_id.startswith(RESERVED_IDS):
            _answer_follower(each, why, _lane(task))
    return why


def _answer_follower(follower: Follower, why: str, lane: Lane) -> None:
    """Stores the result of a call that will never be made, unless it has one."""
    if follower.task == cancel_order.name:
        message = _one_message(follower.args, follower.kwargs)
        value: object = _refused(_refusal(message, why), lane)
    elif follower.task == cancel_orders.name:
        messages = _many_messages(follower.args, follower.kwargs)
        value = [_refused(_refusal(each, why), lane) for each in messages]
    elif follower.task == mass_cancel.name:
        value = {"request_id": follower.kwargs.get("request_id"), "flat": False, "error": why}
    else:
        app.backend.mark_as_failure(follower.task_id, InvalidTaskError(why))
        return
    app.backend.mark_as_done(follower.task_id, value)


def _traced(task: Task, parsed: _Parsed) -> _Parsed:
    """The request with the traceparent of its message's headers, unless it has one of its own."""
    if isinstance(parsed, CancelResult) or parsed.traceparent is not None:
        return parsed
    sent = task.request.get(TRACE_HEADER)
    return replace(parsed, traceparent=sent) if is_traceparent(sent) else parsed


def _refused(result: CancelResult, lane: Lane) -> dict[str, Any]:
    """The refusal as a value, stored for whoever waits for the order as well."""
    problem = result.error
    say(
        log,
        LogEvent.MESSAGE_REFUSED,
        order_id=result.order_id and result.order_id[:ORDER_ID_MAX_CHARS],
        lane=lane.value,
        outcome=result.outcome.value,
        attempts=0,
        code=problem.code if problem else None,
        why=problem.message if problem else None,
    )
    try:
        entrance().refuse(result)
    except StoreError as error:  # who waits for this message has it as its value
        say_failed(log, error, "store a refusal", order_id=result.order_id)
    return result.to_json()
