"""Makes spans of what a worker tells: one for each order in a hand, and one for each call to the exchange."""

from __future__ import annotations

import time

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from worker.book import Conclusion, Entry, GiveBack, Settle
from worker.notices import CallMade, Claimed, Concluded, Notice

_SERVER_FAILED = 500


class Spans:
    """Call it with a :class:`worker.notices.Notice`; ``settle`` spans hang on the entries' traceparents.

    A call for one order is a child of its ``settle`` span; a call for many is a child of the first one's,
    and linked to all.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._in_hand: dict[str, Span] = {}

    def __call__(self, notice: Notice) -> None:
        """Begins, adds or ends spans."""
        if isinstance(notice, Claimed):
            for entry in notice.entries:
                self._in_hand[entry.order_id] = self._settle(entry)
        elif isinstance(notice, CallMade):
            self._call(notice)
        elif isinstance(notice, Concluded):
            for conclusion, ours in zip(notice.conclusions, notice.ours, strict=True):
                span = self._in_hand.pop(conclusion.entry.order_id, None)
                if span is not None:
                    span.set_attributes(_end_of(conclusion, ours=ours))
                    span.end()

    def _settle(self, entry: Entry) -> Span:
        context = None
        if entry.request.traceparent is not None:
            carrier = {"traceparent": entry.request.traceparent}
            # (On an empty context: what happens to be current in this thread is not its parent.)
            context = TraceContextTextMapPropagator().extract(carrier, context=Context())
        return self._tracer.start_span(
            "settle",
            context=context or Context(),
            kind=SpanKind.CONSUMER,
            attributes={
                "kalshi.order_id": entry.order_id,
                "kalshi.lane": entry.lane.value,
                "kalshi.age_s": entry.age_s,
            },
        )

    def _call(self, call: CallMade) -> None:
        hands = [span for each in call.order_ids if (span := self._in_hand.get(each)) is not None]
        links = [Link(span.get_span_context()) for span in hands] if len(hands) > 1 else None
        ended_ns = time.time_ns()
        span = self._tracer.start_span(
            "exchange call",
            context=trace.set_span_in_context(hands[0], Context()) if hands else Context(),
            kind=SpanKind.CLIENT,
            links=links,
            start_time=ended_ns - round(call.duration_s * 1e9),
            attributes={
                "kalshi.operation": call.operation,
                "kalshi.orders": len(call.order_ids),
                "kalshi.bucket": call.bucket,
                "kalshi.tokens": call.tokens,
            },
        )
        problem = None if call.trouble is None else call.trouble.problem
        status = 200 if problem is None else problem.http_status
        if status is not None:
            span.set_attribute("http.response.status_code", status)
        if problem is not None:
            span.set_attribute("kalshi.code", problem.code)
        if status is None or status >= _SERVER_FAILED:
            span.set_status(StatusCode.ERROR)
        span.end(ended_ns)


def _end_of(conclusion: Conclusion, *, ours: bool) -> dict[str, str | int]:
    if not ours:
        return {"kalshi.outcome": "another_hand"}
    if isinstance(conclusion, Settle):
        result = conclusion.result
        code = {} if result.error is None else {"kalshi.code": result.error.code}
        return {"kalshi.outcome": result.outcome.value, "kalshi.attempts": result.attempts, **code}
    return {"kalshi.outcome": "open" if isinstance(conclusion, GiveBack) else "given_up"}
