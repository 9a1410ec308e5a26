"""What a client gets instead of the exchange's reply when a fault strikes its call."""

from __future__ import annotations

import functools
import gzip
import json
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING

from kalshi_cancel.sandbox.refusal import Refusal, html, refuse, too_many_requests
from kalshi_cancel.sandbox.wire import JSON, Manner, Reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from kalshi_cancel.sandbox.faults import Fault

CDN_HEADERS = (
    ("Server", "CloudFront"),
    ("X-Cache", "Error from cloudfront"),
    ("Via", "1.1 cdn (CloudFront)"),
)


def spoil(fault: Fault, reply: Reply | None) -> Reply:
    """What the client gets instead of `reply` (None when the call took no effect)."""
    return SPOILERS[fault.kind](fault, reply or Reply(200))


def answered(fault: Fault, _reply: Reply) -> Reply:
    """Any status and body, or the exchange's own error in some shape."""
    status = fault.status or 500
    if fault.has_body:
        return Reply(status, fault.raw_body, _headers(fault), fault.content_type or JSON)
    code = fault.code or {500: "internal_server_error", 503: "service_unavailable"}.get(status, "error")
    refusal = Refusal(status, code, fault.message, fault.details)
    return replace(refuse(refusal, fault.shape), headers=_headers(fault))


def with_status(status: int) -> Callable[[Fault, Reply], Reply]:
    """The same, always with this status."""
    return lambda fault, reply: answered(replace(fault, status=status), reply)


def bad_gateway(fault: Fault, _reply: Reply) -> Reply:
    """A proxy that cannot reach the exchange."""
    return Reply(502, html(502, "Bad Gateway"), _headers(fault), content_type="text/html")


def by_cdn(fault: Fault, _reply: Reply) -> Reply:
    """A page of the CDN's own, which knows nothing of orders."""
    status = HTTPStatus(fault.status or 403)
    headers = (*CDN_HEADERS, *_headers(fault))
    if fault.has_body:
        return Reply(status.value, fault.raw_body, headers, fault.content_type or "text/html")
    refusal = Refusal(status.value, "cdn", fault.message or status.phrase)
    return replace(refuse(refusal, fault.shape or "html"), headers=headers)


def rate_limited(fault: Fault, _reply: Reply) -> Reply:
    """The rate limiter's answer."""
    return replace(refuse(too_many_requests(), fault.shape), headers=_headers(fault))


def by_manner(manner: Manner) -> Callable[[Fault, Reply], Reply]:
    """The reply itself, put on the wire in this manner."""
    return lambda fault, reply: replace(
        reply, manner=manner, interval_s=fault.interval_s, body=reply.body or b'{"order_id":'
    )


def dropped(fault: Fault, reply: Reply) -> Reply:
    """No reply: the connection ends."""
    return replace(reply, manner=fault.how)


def wrong_body(fault: Fault, reply: Reply) -> Reply:
    """The reply with another order's id."""
    if reply.status >= 300 or not reply.body:
        return reply
    body = json.loads(reply.body)
    for part in (body, body.get("order")):
        if isinstance(part, dict) and "order_id" in part:
            part["order_id"] = fault.body_order_id
            part.pop("client_order_id", None)
    return replace(reply, body=json.dumps(body, separators=(",", ":")).encode())


def garbage(fault: Fault, _reply: Reply) -> Reply:
    """A success whose body may be anything."""
    body = fault.raw_body or b"\x00\xff{not json"
    return Reply(fault.status or 200, body, _headers(fault), fault.content_type or JSON)


def redirected(fault: Fault, _reply: Reply) -> Reply:
    """To somewhere else."""
    return Reply(fault.status or 302, headers=(("Location", fault.location),))


def flooded(fault: Fault, reply: Reply) -> Reply:
    """The reply with too many headers."""
    count = 5000 if fault.count is None else fault.count
    return replace(reply, headers=tuple((f"X-Flood-{n}", "drop" * 8) for n in range(count)))


def bombed(fault: Fault, reply: Reply) -> Reply:
    """A small body that is huge once it is unpacked."""
    return replace(reply, body=_zeros(fault.megabytes), headers=(("Content-Encoding", "gzip"),))


@functools.lru_cache(maxsize=4)
def _zeros(megabytes: int) -> bytes:
    return gzip.compress(bytes(megabytes << 20), compresslevel=9, mtime=0)


def unspoilt(_fault: Fault, reply: Reply) -> Reply:
    """The reply as it is: what is wrong lies elsewhere."""
    return reply


def early(fault: Fault, reply: Reply) -> Reply:
    """The reply with interim responses before it."""
    count = 1 if fault.count is None else fault.count
    return replace(reply, interim=(fault.status or 103,) * count, interim_s=fault.seconds or 0.0)


def cached(fault: Fault, reply: Reply) -> Reply:
    """The reply as a cache has kept it for some seconds."""
    age_s = fault.seconds or 0.0
    headers = (*reply.headers, ("Age", str(int(age_s))))
    return replace(reply, headers=headers, offset_s=reply.offset_s - age_s)


def _headers(fault: Fault) -> tuple[tuple[str, str], ...]:
    headers = tuple(fault.headers.items())
    return headers if fault.retry_after is None else (*headers, ("Retry-After", fault.retry_after))


# Faults that strike a call by themselves, and what they do to its reply; others work in another place.
SPOILERS: dict[str, Callable[[Fault, Reply], Reply]] = {
    "status": answered,
    "http_500": with_status(500),
    "http_502_html": bad_gateway,
    "http_503": with_status(503),
    "http_429": rate_limited,
    "cdn": by_cdn,
    "hang": by_manner("hang"),
    "drop_before": dropped,
    "drop_after": dropped,
    "drop_after_fill": dropped,
    "slow": unspoilt,
    "drip": by_manner("drip"),
    "truncated": by_manner("truncated"),
    "wrong_body": wrong_body,
    "garbage": garbage,
    "redirect": redirected,
    "headers_flood": flooded,
    "gzip_bomb": bombed,
    "endless": by_manner("endless"),
    "oversize": unspoilt,
}

# Faults that strike whatever else strikes a call, and what they do to its reply.
BESIDE: dict[str, Callable[[Fault, Reply], Reply]] = {
    "skew": unspoilt,
    "interim": early,
    "cached": cached,
}
