"""The way of a call through the exchange: find, record, spoil, authenticate, charge, serve. No sockets."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from kalshi_cancel.sandbox.auth import KEY_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER, authenticate
from kalshi_cancel.sandbox.faults import Fault
from kalshi_cancel.sandbox.levers import PREFIX as LEVERS
from kalshi_cancel.sandbox.levers import pull
from kalshi_cancel.sandbox.refusal import Refusal, refuse, too_many_requests
from kalshi_cancel.sandbox.routes import bucket_of, cost_of, find_route
from kalshi_cancel.sandbox.spoiling import BESIDE, spoil
from kalshi_cancel.sandbox.visit import Visit, parse_json
from kalshi_cancel.sandbox.wire import Reply, Request, http_date

if TYPE_CHECKING:
    from kalshi_cancel.sandbox.floor import Floor


class Exchange:
    """Answers requests; safe from many threads."""

    def __init__(self, floor: Floor) -> None:
        self.floor = floor

    def answer(self, request: Request) -> Reply:
        """The reply to `request`, and in which manner it is to be sent."""
        if request.path.startswith(LEVERS):
            return pull(self.floor, request)
        visit = self._open(request)
        started = time.perf_counter()
        self.floor.wait(visit.settings.latency_s)
        reply = self._spoilt(visit)
        record = visit.record
        record.status = None if reply.manner in {"close", "reset", "hang"} else reply.status
        record.duration_ms = (time.perf_counter() - started) * 1000
        return reply

    def _open(self, request: Request) -> Visit:
        route, path_parameters = find_route(request.method, request.path)
        headers = request.headers
        record = self.floor.calls.add(
            received_ms=time.time_ns() // 1_000_000,
            connection=request.connection,
            method=request.method,
            path=request.path,
            query=request.query,
            operation=route.operation,
            order_ids=[],
            key_id=headers.get(KEY_HEADER, ""),
            timestamp=headers.get(TIMESTAMP_HEADER, ""),
            signature=headers.get(SIGNATURE_HEADER, ""),
            body=request.body.decode(errors="replace"),
        )
        floor = self.floor
        visit = Visit(floor, floor.settings, route, request, path_parameters, record, floor.moment())
        record.order_ids = _order_ids(visit)
        return visit

    def _spoilt(self, visit: Visit) -> Reply:
        """The reply, with whatever fault strikes this call."""
        floor, record = self.floor, visit.record
        operation, order_ids = visit.route.operation, record.order_ids
        released = floor.released  # taken now: what is let go from here on concerns this call
        with floor.lock:
            fault = floor.faults.call_fault(operation, order_ids)
            beside = floor.faults.beside(operation, order_ids)
        skew = beside.get("skew")
        skew_s = (skew.seconds or 0.0) if skew else 0.0
        if fault is None:
            reply = self._served(visit, skew_s)
        else:
            reply = self._struck(fault, visit, skew_s)
            record.code = _code_in(reply)
        if fault or beside:
            record.fault = "+".join([*([fault.kind] if fault else []), *beside])
        reply = replace(reply, offset_s=floor.front_skew_s + skew_s, released=released)
        for kind, each in beside.items():
            reply = BESIDE[kind](each, reply)
        return reply

    def _struck(self, fault: Fault, visit: Visit, skew_s: float) -> Reply:
        floor = self.floor
        if visit.settings.error_shape and not fault.shape:
            fault = replace(fault, shape=visit.settings.error_shape)
        if fault.retry_date_s is not None:
            second = int(floor.front_ms(skew_s) / 1000 + fault.retry_date_s)
            fault = replace(fault, retry_after=http_date(second))
        effect = fault.effect_or_default
        if fault.kind == "oversize":
            return self._refused(visit, _oversized(visit))
        if fault.kind == "slow" and effect == "after":
            floor.wait(fault.seconds or 0.0)
        reply = None
        if effect in {"before", "after"}:
            reply = self._served(visit, skew_s)
        elif effect == "fill":
            self._fill(fault, visit)
        if fault.kind == "slow" and effect == "before":
            floor.wait(fault.seconds or 0.0)
        return spoil(fault, reply)

    def _fill(self, fault: Fault, visit: Visit) -> None:
        with self.floor.lock:
            for order_id in [fault.order_id] if fault.order_id else visit.record.order_ids:
                order = visit.market.find(order_id)
                if order and order.state.status == "resting":
                    visit.market.fill(order, self.floor.moment())

    def _served(self, visit: Visit, skew_s: float) -> Reply:
        """The exchange's own reply: who asks, whether the budget allows it, then the deed."""
        route = visit.route
        try:
            if not route.public:
                self._authenticate(visit, self.floor.front_ms(skew_s))
            with self.floor.lock:
                visit.moment = self.floor.moment(skew_s)
                self._charge(visit)
                status, body = route.serve(visit)
        except Refusal as refusal:
            return self._refused(visit, refusal)
        if body is None:
            return Reply(status)
        return Reply(status, json.dumps(body, separators=(",", ":")).encode())

    def _refused(self, visit: Visit, refusal: Refusal) -> Reply:
        visit.record.code = refusal.code
        return refuse(refusal, visit.settings.error_shape)

    def _authenticate(self, visit: Visit, now_ms: int) -> None:
        settings = visit.settings
        visit.key = authenticate(
            visit.request, self.floor.keys, now_ms=now_ms, window_s=settings.timestamp_window_s
        )
        if settings.refuse_reuse == "refuse" and visit.record.reused:
            raise Refusal(401, "authentication_error", "authentication_error", "REUSED")
        if not visit.key.may_write and visit.route.method != "GET":
            raise Refusal(403, "forbidden", None, "the key is read-only")

    def _charge(self, visit: Visit) -> None:
        """Takes what the call costs out of its bucket; a batch is paid for as a whole or refused."""
        route, settings, record = visit.route, visit.settings, visit.record
        if not route.bucket:
            return
        tokens, bucket = cost_of(route, settings), bucket_of(visit)
        if route.per_order:
            entries = visit.entries()
            if len(entries) > settings.batch_limit:
                raise _oversized(visit)
            tokens *= len(entries)
        record.bucket = bucket
        if not self.floor.budget.take(bucket, tokens, visit.moment.mono_s):
            raise too_many_requests()
        record.tokens = tokens


def _oversized(visit: Visit) -> Refusal:
    if visit.settings.oversize_status == 429:
        return too_many_requests()
    limit = visit.settings.batch_limit
    return Refusal(
        visit.settings.oversize_status, "invalid_parameters", None, f"at most {limit} orders in a batch"
    )


def _code_in(reply: Reply) -> str | None:
    """The error code in a reply that a fault made, if it has one."""
    body = parse_json(reply.body) if 400 <= reply.status < 600 else None
    error = body.get("error", body) if isinstance(body, dict) else None
    return error if isinstance(error, str) else error.get("code") if isinstance(error, dict) else None


def _order_ids(visit: Visit) -> list[str]:
    if "order_id" in visit.path_parameters:
        return [visit.path_parameters["order_id"]]
    if visit.route.operation != "batch":
        return []
    try:
        return [str(entry.get("order_id", "")) for entry in visit.entries()]
    except Refusal:
        return []
