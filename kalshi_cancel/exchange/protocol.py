"""What the exchange's replies mean, in both dialects, without any I/O.

A reply is bytes from a stranger: deciphering never raises, and what it cannot understand is UNANSWERED ("may
have taken effect"), never a cancellation.

Only the exchange's own shapes are its word. A gateway in front of it (a CDN, a proxy) answers with pages of
its own, as HTML or as JSON; they say nothing about an order and are UNANSWERED, whatever their status.

What each reply means is the table :data:`MEANINGS`; the resolution decides what to do about it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Any, TypeVar

from kalshi_cancel.exchange.calls import LIST_PAGE, Call
from kalshi_cancel.exchange.moments import parse_date_s, parse_time_ms, parse_ts_ms
from kalshi_cancel.model.counts import parse_count
from kalshi_cancel.model.fields import is_order_id
from kalshi_cancel.model.orders import Order, OrderStatus
from kalshi_cancel.model.results import Problem

TEXT_SHOWN_CHARS = 300  # of the exchange's own words in errors and logs
RETRY_AFTER_MAX_S = 60.0  # a longer pause is not believed: a cancel is money at risk
_CODE = re.compile(r"[a-z]+(_[a-z]+)+")
# An error code of the exchange: words in one case, perhaps with a tail (``user_not_found:_5d8c``).
_OWN_CODE = re.compile(r"([a-z0-9]+(_[a-z0-9]+)*|[A-Z0-9]+(_[A-Z0-9]+)*)(:.*)?", re.DOTALL)
_TOO_MANY = ("too_many_requests", "rate_limit")
RETIRED_CODE = "deprecated_v1_order_endpoint"
GATEWAY_CODE = "gateway"  # what stands in front of the exchange has answered in its place


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: header names are lower case; ``clock_s``: the exchange's clock, if it is known."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    clock_s: float | None = None


class Meaning(Enum):
    """What a reply that is no success means for the call.

    ``may_have_taken_effect``: the cancel may have been carried out all the same. ``no_usable_answer``: nobody
    at the exchange has said anything. Breaker, metrics, batches and mass cancels read these two; nobody
    keeps a set of meanings of its own.
    """

    NOT_FOUND = "nothing was canceled there: terminal, unknown, or on another shard"
    RETIRED = "this dialect is retired"
    CLOCK = "our timestamp is outside the exchange's window"
    KEY_REFUSED = "permanent: the exchange does not accept this worker's key"
    REFUSED = "permanent: our request is not acceptable, or this key may not make it"
    PAUSED = "the exchange is paused"
    UNAVAILABLE = "the exchange is down or overloaded", "may have taken effect", "no usable answer"
    BUSY = "over the token budget"
    UNCLEAR = "accepted, but the body does not say what happened to our order", "may have taken effect"
    UNANSWERED = "no usable reply", "may have taken effect", "no usable answer"
    NOT_SENT = "it never left us", "no usable answer"

    def __init__(self, words: str, *more: str) -> None:
        self.words = words
        self.may_have_taken_effect = "may have taken effect" in more
        self.no_usable_answer = "no usable answer" in more


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a status, the start of the error code (empty: any), and the meaning."""

    status: int
    code: str
    meaning: Meaning


# The first row that fits counts; what no row fits is UNANSWERED. Source: kalshi-api, section 4.
MEANINGS = (
    Row(400, "", Meaning.REFUSED),
    Row(401, "header_timestamp_expired", Meaning.CLOCK),
    Row(401, "", Meaning.KEY_REFUSED),
    Row(403, "", Meaning.REFUSED),
    Row(404, "", Meaning.NOT_FOUND),
    Row(409, "exchange_is_paused", Meaning.PAUSED),
    Row(409, "trading_is_paused", Meaning.PAUSED),
    Row(409, "", Meaning.REFUSED),
    Row(410, RETIRED_CODE, Meaning.RETIRED),
    Row(413, "", Meaning.REFUSED),
    Row(422, "", Meaning.REFUSED),
    Row(429, "", Meaning.BUSY),
    Row(503, "exchange_is_paused", Meaning.PAUSED),
    Row(503, "trading_is_paused", Meaning.PAUSED),
    Row(503, "", Meaning.UNAVAILABLE),
)


@dataclass(frozen=True, slots=True)
class Canceled:
    """The exchange's own word that this cancel removed ``reduced_by`` contracts (above zero).

    ``ts_ms`` is when, on the engine's clock, told to within ``ts_within_ms``.
    """

    reduced_by: Decimal
    ts_ms: int | None
    order: Order | None
    ts_within_ms: int = 1


@dataclass(frozen=True, slots=True)
class Failure:
    """Any reply that is no success; ``proof`` says that a 404 was the exchange's, not a proxy's."""

    meaning: Meaning
    problem: Problem
    retry_after_s: float | None = None
    proof: bool = False

    @property
    def may_have_taken_effect(self) -> bool:
        """Whether the call may have been carried out all the same."""
        return self.meaning.may_have_taken_effect

    @property
    def no_usable_answer(self) -> bool:
        """Whether nobody at the exchange has said anything."""
        return self.meaning.no_usable_answer


CancelAnswer = Canceled | Failure
ReadAnswer = Order | Failure


# A 200 without any of these is no answer of the exchange's to a cancel.
_OF_A_CANCEL = frozenset({"order_id", "order", "reduced_by", "reduced_by_fp"})


def decipher_cancel(order_id: str, reply: Reply) -> CancelAnswer:
    """What a reply to the cancel of ``order_id`` says; either dialect's success is understood."""
    if reply.status != 200:  # noqa: PLR2004 - HTTP's OK
        return decipher_error(reply)
    body = _json_object(reply.body)
    if body is None or not body.keys() & _OF_A_CANCEL:
        return _failure(Meaning.UNANSWERED, reply, "garbage", f"no answer to a cancel: {_text(reply.body)}")
    shown = body["order"] if isinstance(body.get("order"), dict) else body
    if shown.get("order_id") != order_id:
        return _failure(Meaning.UNCLEAR, reply, "wrong_order", "the reply describes another order")
    return _decipher_entry(order_id, body, reply)


def decipher_batch(order_ids: Sequence[str], reply: Reply) -> dict[str, CancelAnswer] | Failure:
    """What a reply to a batch says of each order, matched by id alone; or a failure of the whole batch.

    An order that the reply does not mention is UNANSWERED; entries about other orders are passed over.
    """
    if reply.status != 200:  # noqa: PLR2004 - HTTP's OK
        return decipher_error(reply)
    body = _json_object(reply.body)
    entries = body.get("orders") if body is not None else None
    if not isinstance(entries, list):
        return _failure(Meaning.UNANSWERED, reply, "garbage", f"unreadable body: {_text(reply.body)}")
    wanted = set(order_ids)
    answers: dict[str, CancelAnswer] = {}
    for entry in entries:
        order_id = _entry_order_id(entry)
        if order_id in answers:  # two tales of one order: which is its own, only a read-back can tell
            answers[order_id] = _failure(Meaning.UNCLEAR, reply, "twice", "the answer tells of it twice")
        elif order_id in wanted:
            answers[order_id] = _decipher_entry(order_id, entry, reply)
    unmentioned = _failure(
        Meaning.UNANSWERED, reply, "unmentioned", "the batch's answer leaves this order out"
    )
    return {order_id: answers.get(order_id, unmentioned) for order_id in order_ids}


def _entry_order_id(entry: object) -> str:
    if not isinstance(entry, dict):
        return ""
    order = entry.get("order")
    own = entry.get("order_id", order.get("order_id") if isinstance(order, dict) else None)
    return own if isinstance(own, str) else ""


_NO_ERROR: tuple[object, ...] = (None, "", False)


def _decipher_entry(order_id: str, entry: Mapping[str, Any], reply: Reply) -> CancelAnswer:
    error = entry.get("error")
    reduced_by = parse_count(_first(entry, "reduced_by", "reduced_by_fp"))
    if error not in _NO_ERROR:  # (an empty object is an error, too)
        return _decipher_entry_error(error, reduced_by, reply)
    if isinstance(entry.get("order"), dict):
        return _decipher_v1_success(order_id, entry, reply)
    return _canceled(reduced_by, parse_ts_ms(entry.get("ts_ms")), None, reply)


def _decipher_entry_error(error: object, reduced_by: Decimal | None, reply: Reply) -> Failure:
    """What an error inside a 200 means: not applied, whatever it says; only the way on differs."""
    code, message = _error_words({"error": error})
    word = (code or message).lower().replace(" ", "_")
    problem = Problem(code or "error", message or ascii(error)[:TEXT_SHOWN_CHARS], reply.status)
    if reduced_by:
        return Failure(
            Meaning.UNCLEAR, problem
        )  # an error and contracts removed: which is true, a read tells
    if any(each in word for each in _TOO_MANY):
        return Failure(Meaning.BUSY, problem)
    passing = (row.meaning for row in MEANINGS if row.code and word.startswith(row.code))
    return Failure(next(passing, Meaning.NOT_FOUND), problem)


def _decipher_v1_success(order_id: str, body: Mapping[str, Any], reply: Reply) -> CancelAnswer:
    order = parse_order(body["order"])
    if order is None or order.order_id != order_id:
        return _failure(Meaning.UNCLEAR, reply, "wrong_order", "the reply describes another order")
    if order.status is not OrderStatus.CANCELED or order.remaining_count:
        return _failure(
            Meaning.UNCLEAR, reply, "contradiction", f"canceled, but the order is shown {order.status.value}"
        )
    reduced_by = parse_count(_first(body, "reduced_by_fp", "reduced_by"))
    return _canceled(reduced_by, order.last_update_ms, order, reply)


def _canceled(
    reduced_by: Decimal | None, ts_ms: int | None, order: Order | None, reply: Reply
) -> CancelAnswer:
    if reduced_by is None:
        return _failure(
            Meaning.UNCLEAR, reply, "no_count", "accepted, but reduced_by is missing or unreadable"
        )
    if reduced_by == 0:
        return _failure(
            Meaning.NOT_FOUND, reply, "nothing_removed", "accepted, but nothing was left to remove"
        )
    within_ms = parse_time_ms(ts_ms)[1] if order is None else order.last_update_within_ms
    return Canceled(reduced_by, ts_ms, order, within_ms)


def decipher_read(order_id: str, reply: Reply) -> ReadAnswer:
    """The order that a reply to its read-back shows, or what stood in the way."""
    if reply.status != 200:  # noqa: PLR2004 - HTTP's OK
        return decipher_error(reply)
    body = _json_object(reply.body)
    shown = None if body is None else body.get("order")
    order = parse_order(shown)
    if order is not None and order.order_id == order_id and isinstance(order.raw.get("status"), str):
        return order
    if body is None:
        why = f"the body is no JSON object: {_text(reply.body)}"
    elif not isinstance(shown, dict):
        why = f"the body has no order: {_text(reply.body)}"
    elif shown.get("order_id") != order_id:
        why = f"the body shows another order: {shown.get('order_id')!a}"
    else:
        why = f"the order has no readable status: {shown.get('status')!a}"
    return _failure(Meaning.UNANSWERED, reply, "garbage", why)


def decipher_command(reply: Reply) -> Failure | None:
    """None when a mass command was carried out; its answer names no orders."""
    return None if reply.status in (200, 204) else decipher_error(reply)


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a listing; ``cursor`` is empty on the last one.

    ``unreadable``: so many entries are no orders that we understand; with any, the listing has holes.
    ``is_whole``: False for one with an error beside its orders, and for a full one that names no cursor: an
    empty one would say that nothing follows.
    """

    orders: tuple[Order, ...]
    cursor: str
    unreadable: int = 0
    is_whole: bool = True


def decipher_list(reply: Reply) -> Page | Failure:
    """A page of orders, as far as they can be read."""
    if reply.status != 200:  # noqa: PLR2004 - HTTP's OK
        return decipher_error(reply)
    body = _json_object(reply.body)
    listed = cursor = None
    is_whole = False
    if body is not None and (not body or body.keys() & {"orders", "cursor"}):
        cursor = body.get("cursor") or ""
        # The exchange leaves empty lists out, or says null; a page that goes on has orders.
        listed = body.get("orders") if body.get("orders") is not None or cursor else []
        is_whole = body.get("error") in _NO_ERROR
    if body is None or not isinstance(listed, list) or not isinstance(cursor, str):
        return _failure(Meaning.UNANSWERED, reply, "garbage", f"no list of orders: {_text(reply.body)}")
    known = tuple(order for order in map(parse_order, listed) if order is not None)
    is_whole = is_whole and (len(listed) < LIST_PAGE or body.get("cursor") is not None)
    return Page(known, cursor, len(listed) - len(known), is_whole)


def decipher_object(reply: Reply) -> Mapping[str, Any] | Failure:
    """The JSON object of a reply that is wanted whole (limits, status, costs)."""
    if reply.status != 200:  # noqa: PLR2004 - HTTP's OK
        return decipher_error(reply)
    body = _json_object(reply.body)
    if body is None:
        return _failure(Meaning.UNANSWERED, reply, "garbage", f"unreadable body: {_text(reply.body)}")
    return body


def parse_order(value: object) -> Order | None:
    """An order in any field generation (integers, or fixed-point strings); None if it is none we can work on.

    The exchange leaves null optionals out; a count that is absent or unreadable is None.
    """
    if not isinstance(value, dict) or not is_order_id(value.get("order_id")):
        return None
    updated_ms, updated_within_ms = parse_time_ms(value.get("last_update_time"))
    return Order(
        order_id=value["order_id"],
        status=OrderStatus.parse(value.get("status")),
        ticker=_of_type(str, value.get("ticker")),
        exchange_index=_of_type(int, value.get("exchange_index")),
        subaccount=_of_type(int, value.get("subaccount_number")),
        initial_count=_parse_count_of(value, "initial_count_fp", "initial_count"),
        fill_count=_parse_count_of(value, "fill_count_fp", "fill_count"),
        remaining_count=_parse_count_of(value, "remaining_count_fp", "remaining_count"),
        last_update_ms=updated_ms,
        last_update_within_ms=updated_within_ms,
        raw=value,
    )


def _parse_count_of(fields: Mapping[str, Any], fixed_point: str, integer: str) -> Decimal | None:
    value = fields.get(fixed_point)
    return parse_count(fields.get(integer) if value is None else value)


def _first(fields: Mapping[str, Any], *names: str) -> Any:
    """The first of these fields that is there and not null: the generations differ in their names."""
    for name in names:
        value = fields.get(name)
        if value is not None:
            return value
    return None


def server_time_s(call: Call, reply: Reply) -> float | None:
    """The exchange's clock by the ``Date`` header, epoch seconds (whole ones); None where that tells nothing.

    Only an answer of the exchange's own to a call that nobody may answer from a cache tells the time.
    """
    cached = call.is_public or "age" in reply.headers
    if cached or (reply.status >= 400 and not _is_own_error(reply.status, _json_object(reply.body))):  # noqa: PLR2004 - HTTP's errors
        return None
    return parse_date_s(reply.headers.get("date", ""))


def decipher_error(reply: Reply) -> Failure:
    """What a reply means that is no success."""
    body = _json_object(reply.body)
    code, message = _error_words(body)
    message = message or _text(reply.body)
    meaning, word = Meaning.UNANSWERED, code.lower()
    if _is_own_error(reply.status, body):
        rows = (row for row in MEANINGS if row.status == reply.status and word.startswith(row.code))
        meaning = next((row.meaning for row in rows), Meaning.UNANSWERED)
    elif reply.body.strip():
        gateway = f"a gateway, not of the exchange ({_shown(reply.headers.get('server', 'unnamed'))})"
        code, message = GATEWAY_CODE, f"HTTP {reply.status} of {gateway}: {message}"
    return Failure(
        meaning=meaning,
        problem=Problem(code or f"http_{reply.status}", message[:TEXT_SHOWN_CHARS], reply.status),
        retry_after_s=_retry_after_s(reply),
        proof=meaning is Meaning.NOT_FOUND and (not word or word.startswith("not_found")),
    )


def _is_own_error(status: int, body: Mapping[str, Any] | None) -> bool:
    """Whether an error has one of the exchange's shapes: nested, flat, bare ``msg``, or the 429's string."""
    if body is None:
        return False
    error = body.get("error", body)
    if isinstance(error, str):
        return status == 429  # noqa: PLR2004 - HTTP's Too Many Requests
    if not isinstance(error, Mapping):
        return False
    code = error.get("code")
    if isinstance(code, str):
        return _OWN_CODE.fullmatch(code) is not None
    return code is None and isinstance(error.get("msg"), str)


def _error_words(body: Mapping[str, Any] | None) -> tuple[str, str]:
    """Code and message out of the four shapes: nested, flat, bare ``msg``, and the 429's string."""
    if body is None:
        return "", ""
    error = body.get("error", body)
    if isinstance(error, str):
        return "", _shown(error)
    if not isinstance(error, Mapping):
        return "", ""
    code = _of_type(str, error.get("code")) or ""
    bare = _of_type(str, error.get("msg")) or ""
    if not code and _CODE.fullmatch(bare):
        code = bare  # the bare shape has room for one text, and that may be the code
    message = _of_type(str, error.get("message")) or bare
    details = _of_type(str, error.get("details"))
    words = f"{message} ({details})" if details and details != message else message
    return _shown(code), _shown(words)


def _failure(meaning: Meaning, reply: Reply, code: str, message: str) -> Failure:
    return Failure(meaning, Problem(code, message[:TEXT_SHOWN_CHARS], reply.status))


def _retry_after_s(reply: Reply) -> float | None:
    """Seconds to wait, told as such or as a moment on the exchange's clock."""
    told = reply.headers.get("retry-after", "")
    try:
        asked_s = float(told)
    except ValueError:
        moment_s = parse_date_s(told)
        now_s = None if "age" in reply.headers else parse_date_s(reply.headers.get("date", ""))
        now_s = reply.clock_s if now_s is None else now_s
        if moment_s is None or now_s is None:
            return None
        asked_s = max(moment_s - now_s, 0.0)
    return min(asked_s, RETRY_AFTER_MAX_S) if asked_s >= 0 else None  # NaN compares false: no pause


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are no JSON


_T = TypeVar("_T")


def _of_type(kind: type[_T], value: object) -> _T | None:
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _text(body: bytes) -> str:
    shown = " ".join(body[:TEXT_SHOWN_CHARS].decode("utf-8", "replace").split())
    return _shown(shown) or "(empty body)"


def _shown(text: str) -> str:
    """A stranger's words as they may stand in a log: short, no line breaks, no commands to terminals."""
    text = text[:TEXT_SHOWN_CHARS]
    return text if text.isprintable() else ascii(text)[1:-1][:TEXT_SHOWN_CHARS]
